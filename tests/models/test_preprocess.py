from __future__ import annotations

import io
import itertools
import random
import re
import struct
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import ExifTags, Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from finetune.data.synthetic.dataset import draw_image
from models.errors import ImageError, UnsupportedImageError
from models.missing_pixels import ADAM7, jpeg_end, may_lack_pixels
from models.preprocess import Preprocessing, decode

ORIENTATION = ExifTags.Base.Orientation
T = Image.Transpose


def noise(width: int, height: int, *, seed: int = 0) -> Image.Image:
    """Random pixels, the most difficult image to resample."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def levels(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.int16]:
    return np.abs(a.astype(np.int16) - b)


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    return tags.tobytes()


# Resizing and cropping


def torchvision_crop(image: Image.Image, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    mode = InterpolationMode(preprocessing.interpolation)
    transform = Compose([Resize(preprocessing.resize_px, interpolation=mode), CenterCrop(preprocessing.input_px)])
    return np.asarray(transform(image))


SIZES = [
    (256, 256), (224, 224), (500, 375), (375, 500), (257, 301), (301, 257), (1023, 767), (767, 1023),
    (100, 99), (60, 41), (41, 60), (5, 3), (1, 1), (2, 1), (600, 17), (1000, 10),
]  # fmt: skip


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("resize_px", "input_px"), [(256, 224), (232, 224), (224, 224), (36, 32)])
def test_crop_matches_torchvision_up_to_rounding(resize_px: int, input_px: int, interpolation: str) -> None:
    preprocessing = Preprocessing(input_px, resize_px, interpolation)
    for size in SIZES:
        image = noise(*size)
        difference = levels(preprocessing.crop(image), torchvision_crop(image, preprocessing))
        assert difference.max() <= 2, size
        assert (difference > 0).mean() < 0.06, size


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(333, 777), (291, 602), (17, 600), (5, 500)])
def test_tall_images_are_resized_horizontally_first(size: tuple[int, int], interpolation: str) -> None:
    """Pillow 13 resizes some tall images vertically first, which changes bicubic results by up to 25 levels."""
    preprocessing = Preprocessing(interpolation=interpolation)
    image, new_height = noise(*size), int(256 * size[1] / size[0])
    resample = Image.Resampling[interpolation.upper()]
    resized = image.resize((256, size[1]), resample).resize((256, new_height), resample)
    difference = levels(preprocessing.crop(image), np.asarray(CenterCrop(224)(resized)))
    assert difference.max() <= 2
    assert (difference > 0).mean() < 0.06


@pytest.mark.parametrize("size", [(1, 3_000_000), (3_000_000, 1)])
def test_line_of_millions_of_pixels_is_cropped_without_resizing_all_of_it(size: tuple[int, int]) -> None:
    pixels = Preprocessing().crop(Image.new("RGB", size, (10, 20, 30)))
    assert (pixels == (10, 20, 30)).all()


def test_grayscale_preprocessing_has_one_channel() -> None:
    preprocessing = Preprocessing(mean=(0.5,), std=(0.5,))
    pixels = preprocessing.crop(Image.new("RGB", (300, 300), (200, 200, 200)))
    assert pixels.shape == (224, 224, 1)
    assert (pixels == 200).all()


def test_sha256_depends_on_every_field() -> None:
    default = Preprocessing()
    changes = {
        "input_px": 225, "resize_px": 257, "interpolation": "bicubic", "mean": (0.485, 0.456, 0.407), "std": (0.5, 0.5, 0.5),
    }  # fmt: skip
    assert set(changes) == {field.name for field in fields(Preprocessing)}
    digests = {replace(default, **{name: value}).sha256() for name, value in changes.items()}
    assert len(digests | {default.sha256()}) == len(changes) + 1
    assert default.sha256() == Preprocessing().sha256()


# Decoding

STORED_AS = {
    1: None, 2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM,
    5: T.TRANSPOSE, 6: T.ROTATE_90, 7: T.TRANSVERSE, 8: T.ROTATE_270,
}  # fmt: skip
"""How the stored image is transposed for each EXIF orientation."""


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
@pytest.mark.parametrize("orientation", STORED_AS)
def test_every_exif_orientation_is_applied(orientation: int, form: str) -> None:
    upright = noise(40, 30)
    transpose = STORED_AS[orientation]
    data = saved(upright if transpose is None else upright.transpose(transpose), form, exif=exif(orientation))
    assert np.array_equal(decode(data), upright)


def test_large_rotated_jpeg_is_decoded_upright_and_reduced() -> None:
    upright = Image.new("RGB", (1536, 2048), "red")
    upright.paste((0, 0, 255), (0, 1024, 1536, 2048))
    image = decode(saved(upright.transpose(T.ROTATE_90), "JPEG", exif=exif(6)), min_side_px=512)
    assert image.size == (768, 1024)
    assert image.getpixel((384, 100))[0] > 250
    assert image.getpixel((384, 900))[2] > 250


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("broken", [b"Exif\0\0garbage", b"garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01", exif(99)])
def test_unreadable_exif_is_ignored(broken: bytes, form: str) -> None:
    assert decode(saved(noise(40, 30), form, exif=broken)).size == (40, 30)


def palette(*, transparent: bool) -> bytes:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    return saved(image, "PNG", **({"transparency": 0} if transparent else {}))


def two(mode: str, left: Any, right: Any, form: str, **options: Any) -> bytes:
    """Encode an image of two pixels."""
    image = Image.new(mode, (2, 1), left)
    image.putpixel((1, 0), right)
    return saved(image, form, **options)


def gif() -> bytes:
    frames = [Image.new("RGB", (2, 1), color) for color in ("red", "blue")]
    return saved(frames[0], "GIF", save_all=True, append_images=frames[1:])


def big_endian_16_bit_tiff() -> bytes:
    values = np.array([[0x4000, 0xFFFF]], dtype=">u2")
    return saved(Image.frombytes("I;16B", (2, 1), values.tobytes()), "TIFF")


RED, BLUE, WHITE, BLACK = (255, 0, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)
IMAGES: dict[str, tuple[bytes, tuple[int, int, int], tuple[int, int, int]]] = {
    "gray": (two("L", 0, 100, "PNG"), BLACK, (100, 100, 100)),
    "gray with a transparent level": (two("L", 0, 100, "PNG", transparency=0), WHITE, (100, 100, 100)),
    "gray with alpha": (two("LA", (0, 0), (100, 255), "PNG"), WHITE, (100, 100, 100)),
    "one bit": (two("1", 0, 1, "PNG"), BLACK, WHITE),
    "palette": (palette(transparent=False), RED, BLUE),
    "palette with a transparent color": (palette(transparent=True), WHITE, BLUE),
    "RGB with a transparent color": (two("RGB", RED, BLUE, "PNG", transparency=RED), WHITE, BLUE),
    "RGBA": (two("RGBA", (0, 0, 0, 0), (0, 0, 255, 255), "PNG"), WHITE, BLUE),
    "RGBA half transparent": (two("RGBA", (0, 0, 0, 255), (0, 0, 0, 128), "PNG"), BLACK, (127, 127, 127)),
    "CMYK": (two("CMYK", (0, 0, 0, 0), (255, 0, 0, 0), "TIFF"), WHITE, (0, 255, 255)),
    "16 bit PNG": (two("I;16", 0x4000, 0xFFFF, "PNG"), (64, 64, 64), WHITE),
    "16 bit TIFF": (two("I;16", 0x4000, 0xFFFF, "TIFF"), (64, 64, 64), WHITE),
    "16 bit TIFF, big endian": (big_endian_16_bit_tiff(), (64, 64, 64), WHITE),
    "16-bit values in 32 bits": (two("I", 0x4000, 0xFFFF, "TIFF"), (64, 64, 64), WHITE),
    "8-bit values in 32 bits": (two("I", 0x40, 0xFF, "TIFF"), (64, 64, 64), WHITE),
    "float from 0 to 1": (two("F", 0.25, 1.0, "TIFF"), (64, 64, 64), WHITE),
    "animated GIF": (gif(), RED, RED),
}


@pytest.mark.parametrize("name", IMAGES)
def test_every_mode_is_converted_to_rgb(name: str) -> None:
    data, left, right = IMAGES[name]
    image = decode(data)
    assert (image.mode, image.size) == ("RGB", (2, 1))
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [left, right]


@pytest.mark.parametrize("missing", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("scale", [1.0, 200.0, 40_000.0])
def test_missing_pixels_of_a_float_image_do_not_change_the_others(missing: float, scale: float) -> None:
    values = np.linspace(0, scale, 48, dtype=np.float32).reshape(6, 8)
    expected = np.asarray(decode(saved(Image.fromarray(values), "TIFF")))
    values[2, 3] = missing
    found = np.array(decode(saved(Image.fromarray(values), "TIFF")))
    assert found[2, 3, 0] == (found.max() if missing == np.inf else 0)
    found[2, 3] = expected[2, 3]
    assert (found == expected).all()


def test_cmyk_jpeg_is_not_inverted() -> None:
    image = decode(saved(Image.new("CMYK", (64, 64), (255, 0, 0, 0)), "JPEG", quality=95))
    assert image.getpixel((32, 32)) == pytest.approx((0, 255, 255), abs=4)


# Invalid images


def png_with_declared_size(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


PHOTO = draw_image("cats", rng=random.Random(0))
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", r"^The file is empty\.$"),
    "text": (b"hello world", r"^This file is not a supported image\. Use JPEG, PNG"),
    "random bytes": (random.Random(0).randbytes(4000), "not a supported image"),
    "JPEG signature, then random bytes": (b"\xff\xd8\xff\xe0" + random.Random(0).randbytes(4000), "damaged"),
    "truncated JPEG": (saved(PHOTO, "JPEG")[:9000], "damaged.*truncated"),
    "JPEG header only": (saved(PHOTO, "JPEG")[:200], "damaged"),
    "truncated large JPEG": (saved(PHOTO.resize((2000, 1600)), "JPEG")[:60_000], "damaged.*truncated"),
    "truncated PNG": (saved(PHOTO, "PNG")[:9000], "damaged.*truncated"),
    "truncated WebP": (saved(PHOTO, "WEBP")[:5000], "damaged"),
    "truncated GIF": (saved(PHOTO, "GIF")[:9000], "damaged.*truncated"),
    "truncated TIFF": (
        saved(PHOTO, "TIFF", compression="tiff_lzw")[:9000],
        "damaged",
    ),
    "big-endian TIFF without tags": (b"MM\0*\0\0\1\0" + bytes(200), "damaged"),
    "PNG signature": (b"\x89PNG\r\n\x1a\n", r"^The image is damaged and could not be read\. Use another copy\.$"),
    "start of a WebP": (saved(PHOTO, "WEBP")[:16], "damaged"),
    "RIFF of another kind": (b"RIFF\0\0\0\0WAVEfmt ", "not a supported image"),
    "TIFF of another kind": (b"II*\0\x10\0\0\0CR\2\0" + bytes(200), "not a supported image"),
    "PNG of 60,000 x 60,000 pixels": (
        png_with_declared_size(60_000, 60_000),
        r"^The photo is 3,600 megapixels; the limit is 179\. Resize it and try again\.$",
    ),
    "PostScript, which Ghostscript would execute": (saved(PHOTO, "EPS"), "not a supported image"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("min_side_px", [None, 512])
def test_invalid_image_is_rejected_with_a_one_line_message(name: str, min_side_px: int | None) -> None:
    data, reason = BAD[name]
    with pytest.raises(ImageError, match=reason) as caught:
        decode(data, min_side_px=min_side_px)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
        (b"\xff\x0a\xfa", "JPEG XL"),
    ],
)
def test_a_file_of_another_format_is_named(head: bytes, name: str) -> None:
    with pytest.raises(UnsupportedImageError) as caught:
        decode(head + bytes(500))
    assert str(caught.value) == f"{name} is not supported. Use JPEG, PNG, WebP, AVIF, HEIC, GIF, BMP, TIFF or PPM."


# Files that Pillow rejects although all pixels are there

JPEG_OPTIONS: list[dict[str, Any]] = [
    {},
    {"progressive": True},
    {"subsampling": 0},
    {"restart_marker_rows": 1},
    {"restart_marker_blocks": 3},
    {"optimize": True},
]


@pytest.mark.parametrize("options", JPEG_OPTIONS, ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("tail", [b"", b"\xff", b"\xff\xff", bytes(2000), b"SEFH" * 50, saved(noise(64, 48), "JPEG")])
@pytest.mark.parametrize("min_side_px", [None, 100])
def test_a_jpeg_without_end_marker_is_decoded(options: dict[str, Any], mode: str, tail: bytes, min_side_px: int | None) -> None:
    """Phones write panoramas so, often with their own data in place of the marker."""
    data = saved(Image.blend(PHOTO, noise(*PHOTO.size), 0.1).convert(mode), "JPEG", **options)
    assert data.endswith(b"\xff\xd9")
    expected = decode(data, min_side_px=min_side_px)
    assert decode(data[:-2] + tail, min_side_px=min_side_px).tobytes() == expected.tobytes()


@pytest.mark.parametrize("options", JPEG_OPTIONS, ids=str)
@pytest.mark.parametrize("missing", [1, 2, 10, 500, 2000])
def test_a_jpeg_without_its_last_pixels_is_rejected(options: dict[str, Any], missing: int) -> None:
    data = saved(Image.blend(PHOTO, noise(*PHOTO.size), 0.1), "JPEG", **options)[: -2 - missing]
    with pytest.raises(ImageError, match=r"damaged.*truncated"):
        decode(data)


def test_a_jpeg_without_its_last_pixels_is_rejected_also_before_another_image() -> None:
    first, second = saved(Image.blend(PHOTO, noise(*PHOTO.size), 0.1), "JPEG"), saved(noise(64, 48), "JPEG")
    with pytest.raises(ImageError, match="damaged"):
        decode(first[: len(first) // 2] + second)


def test_a_jpeg_cut_before_a_restart_marker_is_rejected() -> None:
    data = saved(noise(200, 160), "JPEG", restart_marker_rows=1)
    for marker in range(0xD0, 0xD8):
        at = data.rfind(bytes((0xFF, marker)))
        for end in (at, at + 2):
            with pytest.raises(ImageError, match=r"damaged.*truncated"):
                decode(data[:end])


@pytest.mark.parametrize("min_side_px", [None, 512])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
@pytest.mark.parametrize(("options", "mode"), [
    ({}, "RGB"), ({"subsampling": 0}, "RGB"), ({}, "L"), ({}, "CMYK"), ({"restart_marker_rows": 1}, "RGB"),
])  # fmt: skip
def test_a_jpeg_cut_before_its_end_marker_is_rejected(
    options: dict[str, Any], mode: str, kept: float, min_side_px: int | None
) -> None:
    data = saved(noise(1100, 1100).convert(mode), "JPEG", **options)
    cut = data[: int(kept * len(data))].rstrip(b"\xff") + b"\xff\xd9"
    with pytest.raises(ImageError, match=r"^The image is damaged and could not be read \(its last pixels are missing\)\. Use"):
        decode(cut, min_side_px=min_side_px)


def test_a_progressive_jpeg_cut_in_its_first_scan_is_rejected_and_later_only_lacks_detail() -> None:
    data = saved(noise(600, 400), "JPEG", progressive=True)
    first, second = (match.start() for match in itertools.islice(re.finditer(b"\xff\xda", data), 2))
    with pytest.raises(ImageError, match="its last pixels are missing"):
        decode(data[: (first + second) // 2] + b"\xff\xd9")
    assert decode(data[: len(data) // 2].rstrip(b"\xff") + b"\xff\xd9").size == (600, 400)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("tail", [b"", b"\0" * 100, saved(Image.new("RGB", (50, 50), "red"), "JPEG")])
def test_a_complete_jpeg_that_ends_in_gray_is_decoded(mode: str, options: dict[str, Any], tail: bytes) -> None:
    image = noise(600, 800)
    image.paste((128, 128, 128), (0, 500, 600, 800))
    image = image.convert(mode) if mode != "CMYK" else Image.merge("CMYK", [image.convert("L")] * 4)
    data = saved(image, "JPEG", **options)
    assert may_lack_pixels(loaded(data))
    assert decode(data + tail).size == (600, 800)


def test_a_complete_jpeg_with_a_thumbnail_that_ends_in_gray_is_decoded() -> None:
    image = Image.new("RGB", (640, 480), (128, 128, 128))
    thumbnail = saved(image.resize((160, 120)), "JPEG")
    data = saved(image, "JPEG", exif=b"Exif\0\0" + thumbnail)
    assert data.index(b"\xff\xd9") < jpeg_end(data) == len(data) - 2
    assert decode(data).size == (640, 480)
    assert jpeg_end(data[:-2]) is None


def test_a_complete_photo_of_a_phone_that_ends_in_gray_is_decoded() -> None:
    image = Image.new("RGB", (640, 480), (128, 128, 128))
    data = saved(image, "MPO", save_all=True, append_images=[image.resize((320, 240))])
    assert loaded(data).format == "MPO"
    assert may_lack_pixels(loaded(data))
    assert decode(data).size == (640, 480)


def loaded(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


PNG_MODES = [("1", 1, 0), ("L", 8, 0), ("I;16", 16, 0), ("RGB", 8, 2), ("P", 8, 3), ("LA", 8, 4), ("RGBA", 8, 6)]


def interlaced_png(image: Image.Image, *, missing_rows: int = 0) -> bytes:
    """Encode an RGB image in the seven passes of Adam7, without the last rows of the last pass."""
    pixels = np.asarray(image)
    passes = [
        [b"\0" + row.tobytes() for row in pixels[y::dy, x::dx]] if pixels[y::dy, x::dx].size else [] for x, y, dx, dy in ADAM7
    ]
    rows = [row for rows in passes for row in rows]
    size = struct.pack(">IIBBBBB", *image.size, 8, 2, 0, 0, 1)
    return png_of(size, b"".join(rows[: len(rows) - missing_rows]))


def png_of(size: bytes, rows: bytes, *, chunk_bytes: int = 500) -> bytes:
    packed = zlib.compress(rows)
    parts = [packed[start : start + chunk_bytes] for start in range(0, len(packed), chunk_bytes)]
    chunks = [(b"IHDR", size), *((b"IDAT", part) for part in parts), (b"IEND", b"")]
    framed = (struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


@pytest.mark.parametrize("missing_rows", [0, 1, 20])
@pytest.mark.parametrize(("mode", "depth", "color"), PNG_MODES)
def test_a_png_without_its_last_rows_is_rejected(mode: str, depth: int, color: int, missing_rows: int) -> None:
    width, height = 33, 40
    row_bytes = 1 + -(-width * depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color] // 8)
    rows = b"".join(b"\0" + bytes([200]) * (row_bytes - 1) for _ in range(height - missing_rows))
    size = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    data = png_of(size, rows)
    if color == 3:
        at = data.index(b"IDAT") - 4
        palette = b"PLTE" + bytes(range(256)) * 3
        data = data[:at] + struct.pack(">I", 768) + palette + struct.pack(">I", zlib.crc32(palette)) + data[at:]
    if missing_rows:
        with pytest.raises(ImageError, match="its last pixels are missing"):
            decode(data)
    else:
        assert decode(data).size == (width, height)


@pytest.mark.parametrize("size", [(40, 41), (41, 40), (3, 2), (1, 9)])
def test_an_interlaced_png_without_its_last_rows_is_rejected(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, (9, 8, 7))
    assert np.array_equal(decode(interlaced_png(image)), image)
    with pytest.raises(ImageError, match="its last pixels are missing"):
        decode(interlaced_png(image, missing_rows=1))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA"])
def test_a_complete_png_that_ends_in_black_is_decoded(mode: str) -> None:
    image = noise(300, 300)
    image.paste((0, 0, 0), (0, 200, 300, 300))
    data = saved(image.convert(mode), "PNG")
    assert decode(data).size == (300, 300)
    assert decode(saved(Image.new(mode, (300, 300)), "PNG")).size == (300, 300)
    assert decode(interlaced_png(Image.new("RGB", (50, 50)))).size == (50, 50)


def png_with(*chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG with more chunks before its pixels. A wrong checksum is that of a program which changed the text only."""
    data = saved(PHOTO, "PNG")
    end = 8 + 25  # the signature and IHDR
    more = [struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks]
    return data[:end] + b"".join(more) + data[end:]


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_a_png_with_a_long_text_or_profile_is_decoded(kind: bytes) -> None:
    compressed = zlib.compress(bytes(2_000_000))
    body = {b"zTXt": b"Comment\0\0", b"iTXt": b"XML:com.adobe.xmp\0\1\0\0\0", b"iCCP": b"profile\0\0"}[kind] + compressed
    assert decode(png_with((kind, body))).tobytes() == PHOTO.tobytes()


def test_a_png_with_a_damaged_text_is_decoded_upright() -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    data = png_with((b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")), (b"tEXt", b"Comment\0text"))
    damaged = data.replace(b"Comment\0text", b"Comment\0TEXT")
    assert decode(damaged).tobytes() == decode(data).tobytes()
    assert decode(damaged).size == (PHOTO.height, PHOTO.width)
    with pytest.raises(ImageError, match="damaged"):
        decode(damaged[:9000])


def test_decoding_in_threads_does_not_change_the_warning_filters() -> None:
    data = saved(noise(64, 48), "JPEG")
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(decode, [data] * 1000))
    assert list(warnings.filters) == before


# Reduced decoding of large images


@pytest.mark.parametrize(
    ("size", "min_side_px", "decoded"),
    [
        ((4000, 3000), 512, (1000, 750)),
        ((3000, 4000), 512, (750, 1000)),
        ((4000, 3000), None, (4000, 3000)),
        ((2046, 1023), 512, (2046, 1023)),
        ((2048, 1024), 512, (1024, 512)),
        ((4200, 4096), 512, (525, 512)),
        ((300, 200), 512, (300, 200)),
    ],
)
def test_jpeg_is_not_decoded_below_the_min_side(
    size: tuple[int, int], min_side_px: int | None, decoded: tuple[int, int]
) -> None:
    assert decode(saved(Image.new("RGB", size), "JPEG"), min_side_px=min_side_px).size == decoded


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_large_image_of_another_format_is_halved_before_conversion(mode: str) -> None:
    ramp = Image.linear_gradient("L").resize((2000, 1600))
    image = ramp.convert("I").point(lambda level: level * 256).convert("I;16") if mode == "I;16" else ramp.convert(mode)
    data = saved(image, "PNG")
    halved, full = decode(data, min_side_px=512), decode(data)
    assert (halved.mode, halved.size, full.size) == ("RGB", (1000, 800), (2000, 1600))
    actual, expected = (np.asarray(Preprocessing().crop(decoded), dtype=int) for decoded in (halved, full))
    assert np.abs(actual - expected).max() <= (24 if mode == "1" else 2)  # dithering is noise at full size


def test_large_image_of_another_format_is_halved_upright() -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    file = io.BytesIO()
    Image.new("RGB", (2000, 1600)).save(file, "PNG", exif=exif)
    assert decode(file.getvalue(), min_side_px=512).size == (800, 1000)


@pytest.mark.parametrize(("resize_px", "decode_px"), [(232, 512), (256, 512), (384, 768)])
def test_decode_size_is_at_least_twice_the_resize(resize_px: int, decode_px: int) -> None:
    assert Preprocessing(resize_px=resize_px).decode_px == decode_px


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_reduced_decoding_of_a_large_jpeg_hardly_changes_the_input(
    large_photo: Callable[[int], bytes], interpolation: str
) -> None:
    preprocessing = Preprocessing(interpolation=interpolation)
    data = large_photo(0)
    assert preprocessing.decode(data).size == (1200, 900)
    difference = levels(preprocessing.pixels(data), preprocessing.crop(decode(data)))
    assert difference.mean() < 0.5
    assert np.percentile(difference, 99) <= 2
    assert difference.max() <= 8


@pytest.fixture(scope="module")
def large_photo() -> Callable[[int], bytes]:
    """A JPEG of 2400 x 1800 pixels: a drawing with noise like a camera's."""

    def make(seed: int) -> bytes:
        drawing = draw_image("dogs", rng=random.Random(seed)).resize((2400, 1800), Image.Resampling.BICUBIC)
        return saved(Image.blend(drawing, noise(2400, 1800, seed=seed), 0.06), "JPEG", quality=90)

    return make
