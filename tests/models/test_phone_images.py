"""HEIC, AVIF and MPO photos are decoded to the pixels that a person sees, upright, and as in serving."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import pillow_heif
import pytest
from PIL import Image, ImageCms

from models import preprocess
from models.errors import UnsupportedImageError
from models.preprocess import Preprocessing, decode, decoder_versions
from service.inference.decoding import render
from tests.helpers.odd_images import picture, saved
from tests.helpers.phone_images import Item, box, coded, heif, size_box
from tests.models.test_preprocess import STORED_AS, exif

LOSSLESS: dict[str, dict[str, Any]] = {
    "HEIF": {"quality": -1, "chroma": 444, "matrix_coefficients": 0},
    "AVIF": {"quality": 100, "subsampling": "4:4:4"},
}
FORMS = list(LOSSLESS)


def close(image: Image.Image, expected: Image.Image, *, levels: float = 3.0) -> bool:
    """Return whether the mean difference is at most ``levels``. The formats are lossy."""
    assert (image.mode, image.size) == ("RGB", expected.size)
    difference = np.abs(np.asarray(image, np.int16) - np.asarray(expected.convert("RGB"), np.int16))
    return float(difference.mean()) <= levels


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [{}, {"tile_size": 64}], ids=str)
def test_colors_are_those_of_the_photo(form: str, options: dict[str, int]) -> None:
    photo = picture(size=(150, 110))
    assert close(decode(saved(photo, form, **LOSSLESS[form], **options)), photo)
    assert close(decode(saved(photo.convert("L"), form, **LOSSLESS[form], **options)), photo.convert("L"))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("orientation", STORED_AS)
def test_every_orientation_is_applied_once(orientation: int, form: str) -> None:
    upright = picture(size=(64, 48))
    transpose = STORED_AS[orientation]
    stored = upright if transpose is None else upright.transpose(transpose)
    assert close(decode(saved(stored, form, exif=exif(orientation), **LOSSLESS[form])), upright)


def test_a_grid_is_rotated_as_a_whole() -> None:
    """Phones store tiles of 512 pixels and one rotation."""
    upright = picture(size=(150, 110))
    stored = upright.transpose(Image.Transpose.ROTATE_90)
    assert close(decode(saved(stored, "HEIF", tile_size=64, exif=exif(6), **LOSSLESS["HEIF"])), upright)


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="1"/></x:xmpmeta>'


def replaced(data: bytes, old: bytes, new: bytes) -> bytes:
    assert data.count(old) == 1
    return data.replace(old, new)


@pytest.mark.parametrize("form", FORMS)
def test_an_orientation_in_xmp_does_not_apply(form: str) -> None:
    """The container has its own. Editors rotate the pixels and leave the metadata as they are."""
    photo = picture(size=(64, 48))
    for orientation, expected in ((1, photo), (3, photo.transpose(Image.Transpose.ROTATE_180))):
        data = saved(photo, form, xmp=XMP, exif=exif(orientation), **LOSSLESS[form])
        turned = replaced(data, b'Orientation="1"', b'Orientation="6"')
        assert close(decode(turned), expected)


@pytest.mark.parametrize("form", FORMS)
def test_an_orientation_in_exif_alone_does_not_apply(form: str) -> None:
    photo, tags = picture(size=(64, 48)), Image.Exif()
    tags[0x0113] = 6
    data = saved(photo, form, exif=tags.tobytes(), **LOSSLESS[form])
    field = tags.tobytes()[16:26]
    order: Literal["little", "big"] = "little" if field.startswith(b"\x13\x01") else "big"
    assert close(decode(replaced(data, field, (0x0112).to_bytes(2, order) + field[2:])), photo)


@pytest.mark.parametrize("form", FORMS)
def test_transparent_areas_are_white(form: str) -> None:
    photo = picture("RGBA", (64, 64))
    photo.putalpha(Image.new("L", photo.size, 0))
    assert close(decode(saved(photo, form, **LOSSLESS[form])), Image.new("RGB", (64, 64), "white"))
    photo.putalpha(255)
    assert close(decode(saved(photo, form, **LOSSLESS[form])), picture(size=(64, 64)))


def test_premultiplied_transparency_is_white_too() -> None:
    photo = Image.new("RGBA", (64, 64), (200, 40, 40, 128))
    data = saved(photo, "AVIF", alpha_premultiplied=True, **LOSSLESS["AVIF"])
    assert close(decode(data), Image.alpha_composite(Image.new("RGBA", photo.size, "white"), photo))


@pytest.mark.parametrize("mode", ["RGB;16", "RGBA;16", "I;16"])
def test_ten_bits_become_eight(mode: str) -> None:
    channels = {"RGB;16": 3, "RGBA;16": 4, "I;16": 1}[mode]
    values = np.full((64, 64, channels), 65535, np.uint16)
    values[:, :, :3] = np.linspace(0, 65535, 64, dtype=np.uint16)[None, :, None]
    file = io.BytesIO()
    pillow_heif.from_bytes(mode, (64, 64), values.tobytes()).save(file, quality=-1, chroma=444)
    expected = Image.fromarray((values[:, :, :1] >> 8).astype(np.uint8).repeat(3, axis=2))
    assert pillow_heif.open_heif(file, convert_hdr_to_8bit=False).info["bit_depth"] == 10
    assert close(decode(file.getvalue()), expected)


def test_the_primary_image_is_decoded() -> None:
    photo, other = picture(size=(64, 48)), Image.new("RGB", (80, 80), "red")
    first = saved(photo, "HEIF", save_all=True, append_images=[other], **LOSSLESS["HEIF"])
    second = saved(other, "HEIF", save_all=True, append_images=[photo], primary_index=1, **LOSSLESS["HEIF"])
    still = saved(photo, "AVIF", save_all=True, append_images=[photo.rotate(180)], **LOSSLESS["AVIF"])
    assert all(close(decode(data), photo) for data in (first, second, still))


def test_a_heic_sequence_is_decoded_as_its_still_image() -> None:
    photo = picture(size=(64, 64))
    data = heif({1: coded(photo)}, brand=b"hevc") + box(b"moov", box(b"mvhd", bytes(100)))
    assert decode(data).tobytes() == decode(heif({1: coded(photo)})).tobytes()


def test_a_preview_is_never_decoded_in_place_of_the_image() -> None:
    """Pillow's ``draft`` would take one that is large enough. It may show something else."""
    photo = picture(size=(300, 240))
    data = saved(photo, "HEIF", thumbnails=[128])
    with_preview, without = (decode(file, min_side_px=64) for file in (data, saved(photo, "HEIF")))
    assert with_preview.size == (150, 120)
    assert with_preview.tobytes() == without.tobytes()


@pytest.mark.parametrize("form", [*FORMS, "MPO"])
def test_a_large_photo_is_reduced_and_upright(form: str) -> None:
    upright = Image.new("RGB", (1100, 1400), "red")
    upright.paste("blue", (0, 700, 1100, 1400))
    options = {"save_all": True, "append_images": [Image.new("RGB", (90, 60))]} if form == "MPO" else {}
    data = saved(upright.transpose(Image.Transpose.ROTATE_90), form, exif=exif(6), **options)
    reduced = decode(data, min_side_px=512)
    assert reduced.size == (550, 700)
    assert reduced.getpixel((275, 100))[0] > 240  # type: ignore[index]
    assert reduced.getpixel((275, 600))[2] > 240  # type: ignore[index]


def test_an_mpo_is_decoded_like_its_first_jpeg() -> None:
    photo = picture(size=(700, 900))
    both = saved(photo, "MPO", save_all=True, append_images=[Image.new("RGB", (350, 450))], quality=90)
    single = saved(photo, "JPEG", quality=90)
    for min_side_px in (None, 200):
        assert decode(both, min_side_px=min_side_px).tobytes() == decode(single, min_side_px=min_side_px).tobytes()


def swapped_profile() -> bytes:
    """An RGB profile with the primaries of red and green exchanged."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for tag, other in ((b"rXYZ", b"gXYZ"),):
        first, second = data.index(tag) + 4, data.index(other) + 4
        data[first : first + 8], data[second : second + 8] = data[second : second + 8], data[first : first + 8]
    return bytes(data)


@pytest.mark.parametrize("form", [*FORMS, "JPEG"])
def test_a_profile_affects_what_people_see_and_not_what_the_network_gets(form: str) -> None:
    photo, profile = Image.new("RGB", (64, 64), (200, 40, 40)), swapped_profile()
    options = LOSSLESS.get(form, {"quality": 100, "subsampling": 0})
    data = saved(photo, form, icc_profile=profile, **options)
    assert close(decode(data), photo)
    shown = Image.open(io.BytesIO(render(data, max_side_px=64, quality=95, max_pixels=10_000)))
    assert shown.format == "JPEG"
    red, green, _ = shown.getpixel((30, 30))  # type: ignore[misc]
    assert green > red + 100


@pytest.mark.parametrize("form", [*FORMS, "MPO"])
def test_pixels_are_the_same_on_every_run(form: str) -> None:
    data = saved(picture(size=(300, 200)), form)
    pixels = [Preprocessing().pixels(data) for _ in range(3)]
    assert all(np.array_equal(pixels[0], other) for other in pixels)


@pytest.fixture
def without_heif(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(preprocess, "HAS_HEIF", False)
    preprocess._register_heif.cache_clear()
    yield
    preprocess._register_heif.cache_clear()


@pytest.mark.usefixtures("without_heif")
def test_an_installation_without_the_extra_names_the_package() -> None:
    with pytest.raises(UnsupportedImageError) as caught:
        decode(saved(picture(), "HEIF"))
    assert str(caught.value) == (
        "HEIC needs the package pillow-heif, which is not installed. "
        "Install it, or use JPEG, PNG, WebP, AVIF, HEIC, GIF, BMP, TIFF or PPM."
    )


def test_a_pillow_without_avif_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved(picture(), "AVIF")
    monkeypatch.setattr(preprocess, "HAS_AVIF", False)
    with pytest.raises(UnsupportedImageError, match=r"^AVIF needs a Pillow that was built with libavif\. Install it"):
        decode(data)


def test_caches_depend_on_the_versions_of_the_decoders() -> None:
    assert decoder_versions().keys() == {"pillow", "jpeg", "avif", "heif"}
    assert all(decoder_versions().values())


def test_an_item_without_data_is_damaged() -> None:
    with pytest.raises(preprocess.ImageError, match="damaged"):
        decode(heif({1: Item(b"hvc1", b"", [size_box(64, 64), *coded(picture()).properties[1:]])}))
    with pytest.raises(preprocess.ImageError, match="damaged"):
        decode(heif({1: Item(b"hvc1", struct.pack(">I", 900) + b"x" * 100, coded(picture()).properties)}))
