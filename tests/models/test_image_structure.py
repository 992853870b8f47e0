"""The cost of an image is known, or limited, before it is decoded."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from models.errors import ImageError, ImageTooLargeError, TooComplexError
from models.image_structure import Limits, examine
from models.preprocess import decode
from tests.helpers import bomb_images
from tests.helpers.odd_images import odd_images, picture, saved

MIB = 1 << 20
LIMITS = Limits(max_pixels=50_000_000, max_slow_bytes=2_000_000)
REJECTED = bomb_images.rejected()
ISOLATED = bomb_images.isolated()
SIMPLE = bomb_images.simple()


@pytest.mark.parametrize("name", REJECTED)
def test_a_file_designed_to_be_slow_is_rejected(name: str) -> None:
    data, reason = REJECTED[name]
    assert len(data) < 20 * MIB
    with pytest.raises(ImageTooLargeError if reason == "pixels" else TooComplexError) as caught:
        examine(data, LIMITS)
    assert getattr(caught.value, "reason", "pixels") == reason
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize("name", ISOLATED)
def test_a_file_whose_cost_is_not_known_is_not_simple(name: str) -> None:
    assert not examine(ISOLATED[name], LIMITS).is_simple


@pytest.mark.parametrize("name", SIMPLE)
def test_an_ordinary_file_is_simple(name: str) -> None:
    assert examine(SIMPLE[name], LIMITS).is_simple


def test_truncated_and_damaged_files_are_inspected_without_an_error() -> None:
    """Every prefix of every odd file: the parser never reads beyond the end, and raises nothing but ImageError."""
    for data in (*odd_images().values(), *ISOLATED.values(), *SIMPLE.values()):
        for length in (*range(min(len(data), 64)), *range(64, min(len(data), 2000), 97), len(data)):
            try:
                found = examine(data[:length], LIMITS)
            except ImageError:
                continue
            assert found.pixels <= LIMITS.max_pixels


@pytest.mark.parametrize(("form", "options"), [("JPEG", {}), ("PNG", {}), ("WEBP", {}), ("WEBP", {"lossless": True}),
    ("WEBP", {"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0"}), ("GIF", {}), ("BMP", {}), ("TIFF", {}), ("PPM", {})])  # fmt: skip
def test_the_size_is_read(form: str, options: dict[str, bool]) -> None:
    data = saved(picture("P" if form == "GIF" else "RGB", (300, 200)), form, **options)
    assert (examine(data).format, examine(data).pixels) == (form, 60_000)
    with pytest.raises(ImageTooLargeError, match=r"The photo is 60,000 pixels; the limit is 59,999 pixels\."):
        examine(data, Limits(max_pixels=59_999))


def test_two_byte_sizes_are_read_in_either_byte_order() -> None:
    """Programs write the sizes of a TIFF as SHORT, in the first two bytes of a field of four."""
    for order, mark in (("<", b"II*\0"), (">", b"MM\0*")):
        field = struct.Struct(f"{order}HHIHH").pack
        rows = [field(256, 3, 1, 300, 9), field(257, 3, 1, 200, 9), field(322, 3, 1, 512, 9), field(323, 3, 1, 512, 9)]
        data = mark + struct.pack(f"{order}IH", 8, len(rows)) + b"".join(rows) + bytes(4)
        assert examine(data).pixels == 512 * 512


@pytest.mark.parametrize("name", [name for name, (_, reason) in REJECTED.items() if reason != "slow_encoding"])
def test_training_rejects_it_too(name: str) -> None:
    with pytest.raises(ImageError) as caught:
        decode(REJECTED[name][0])
    assert isinstance(caught.value, TooComplexError | ImageTooLargeError)


@pytest.mark.parametrize("name", ["plain PPM", "PGM of 12 bits", "TIFF of 1,000 strips", "BMP of run lengths", "float map"])
def test_training_decodes_unusual_files(name: str) -> None:
    assert decode(ISOLATED[name]).mode == "RGB"


def test_scans_of_other_pictures_in_the_file_do_not_count() -> None:
    """A preview within EXIF, a second picture behind the first, or a video: a hundred SOS markers and one scan."""
    photo = saved(picture(), "JPEG", progressive=True)
    for data in (photo + photo * 50, bomb_images.jpeg_with(bomb_images.segment(0xE5, photo[:600] * 100))):
        examine(data, Limits(max_scans=20))
    with pytest.raises(TooComplexError, match=r"has 2[0-9] scans and at most 20 are accepted. Save it again as a normal JPEG"):
        examine(bomb_images.progressive(20), Limits(max_scans=20))


Builder = Callable[[int], bytes]


@pytest.mark.parametrize(
    ("build", "least", "most"),
    [
        (lambda n: bomb_images.jpeg_with(bomb_images.segment(0xE5, b"") * n), 100, 400),
        (lambda n: bomb_images.png(bomb_images.chunk(b"abCd", b"") * n, bomb_images.LINES), 100, 400),
        (lambda n: bomb_images.gif_with(b"!\xf9\0" * n), 100, 400),
        (bomb_images.tiff_strips, 300, 301),
    ],
)
def test_the_number_of_segments_is_limited(build: Builder, least: int, most: int) -> None:
    limits = Limits(max_segments=300)
    examine(build(least), limits)
    with pytest.raises(TooComplexError, match="more than 300 "):
        examine(build(most), limits)
