"""Images for display: upright, in the right colors, and without metadata."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageCms

from models.errors import UserError
from service.http.errors import problem_from
from service.images.render import encode_png
from service.inference.image_decoder import ImageDecoder
from service.settings import Settings

DECODER = ImageDecoder.of(Settings())
DISPLAY = {"max_side_px": 2048, "quality": 90}


def encode(photo: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    photo.save(file, kind, **options)
    return file.getvalue()


def shown(data: bytes, **options: int) -> Image.Image:
    return Image.open(io.BytesIO(DECODER.render(data, **{**DISPLAY, **options})))


def test_image_is_upright() -> None:
    photo = Image.new("RGB", (300, 200), "black")
    photo.paste("white", (0, 0, 300, 40))  # what is at the top of the stored pixels
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned right: the stored top is the right side
    upright = np.asarray(shown(encode(photo, exif=exif)).convert("L"))
    assert upright.shape == (300, 200)
    assert upright[:, 170:].min() > 200
    assert upright[:, :140].max() < 50


def test_metadata_is_removed() -> None:
    exif = Image.Exif()
    exif[0x010E] = "SECRET description"
    exif.get_ifd(0x8825)[1] = "N"
    photo = Image.new("RGB", (300, 200), "red")
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for data in (
        encode(photo, exif=exif, comment=b"SECRET comment", icc_profile=profile, dpi=(72, 72)),
        encode(photo, "PNG", exif=exif, icc_profile=profile),
        encode(photo, "WEBP", exif=exif, xmp=b"SECRET xmp"),
    ):
        made = DECODER.render(data, **DISPLAY)
        again = Image.open(io.BytesIO(made))
        assert b"SECRET" not in made
        assert not again.getexif()
        assert not {"exif", "icc_profile", "comment", "xmp", "photoshop"} & set(again.info)


def test_colors_of_another_profile_are_converted_to_srgb() -> None:
    """A profile with swapped red and blue: the stored red is displayed as blue."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, blue = data.index(b"rXYZ"), data.index(b"bXYZ")
    data[red : red + 4], data[blue : blue + 4] = b"bXYZ", b"rXYZ"
    photo = encode(Image.new("RGB", (64, 64), (255, 0, 0)), "PNG", icc_profile=bytes(data))
    red_seen, _, blue_seen = shown(photo).getpixel((32, 32))  # type: ignore[misc]
    assert (red_seen < 40, blue_seen > 215) == (True, True)


@pytest.mark.parametrize("profile", [b"nonsense" * 50, b"\0" * 200])
def test_an_unreadable_profile_leaves_the_colors_unchanged(profile: bytes) -> None:
    photo = encode(Image.new("RGB", (64, 64), (200, 30, 30)), "PNG", icc_profile=profile)
    assert np.abs(np.asarray(shown(photo).getpixel((32, 32))) - (200, 30, 30)).max() <= 4


def test_a_cmyk_profile_leaves_the_decoded_colors_unchanged() -> None:
    photo = encode(Image.new("CMYK", (64, 64), (0, 255, 255, 0)), icc_profile=b"\0" * 16 + b"CMYK" + b"\0" * 180)
    assert shown(photo).mode == "RGB"


def test_transparent_pixels_become_white() -> None:
    photo = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    assert min(shown(encode(photo, "PNG")).getpixel((5, 5))) > 250  # type: ignore[arg-type]


def test_a_large_photo_is_capped_and_a_small_one_is_not_enlarged() -> None:
    assert shown(encode(Image.new("RGB", (4000, 1000)))).size == (2048, 512)
    assert shown(encode(Image.new("RGB", (4000, 1000))), max_side_px=100).size == (100, 25)
    assert shown(encode(Image.new("L", (30, 20)))).size == (30, 20)


def test_an_undecodable_file_is_rejected() -> None:
    with pytest.raises(UserError) as caught:
        DECODER.render(b"nothing", **DISPLAY)
    problem = problem_from(caught.value)
    assert problem
    assert problem.code == "not_an_image"


@pytest.mark.parametrize("channels", [1, 3])
def test_the_crop_is_the_input_of_the_model(channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, channels)).astype(np.uint8)
    again = np.asarray(Image.open(io.BytesIO(encode_png(pixels)))).reshape(pixels.shape)
    assert (again == pixels).all()
