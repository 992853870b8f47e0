"""The bounds of HEIC and AVIF files: what a small file may make a decoder allocate."""

from __future__ import annotations

import io
import struct
from typing import Any

import pytest
from PIL import Image

from models.errors import ImageError, ImageTooLargeError, TooComplexError, UnsupportedImageError
from models.heif_structure import file_format, has_sequence, hide_sequence, read_items
from models.image_structure import Limits, examine
from models.preprocess import decode
from tests.helpers.odd_images import picture, saved
from tests.helpers.phone_images import Item, avif, box, coded, full_box, grid, heif, overlay, size_box

TILE = coded(picture(size=(128, 128)))
AV1_TILE = coded(picture(size=(128, 128)), "AVIF")
LIMITS = Limits(max_pixels=100_000, max_segments=2000)


def decoded_pixels(data: bytes) -> int:
    return read_items(data, lambda number: None).decoded_pixels()


@pytest.mark.parametrize(
    ("form", "mode", "options", "decoded"),
    [
        ("HEIF", "RGB", {}, 304 * 200),  # whole blocks of 8 pixels
        ("HEIF", "RGBA", {}, 304 * 200),
        ("HEIF", "L", {"quality": -1}, 304 * 200),
        ("HEIF", "RGB", {"tile_size": 128}, 6 * 128 * 128),
        ("HEIF", "RGB", {"save_all": True, "append_images": [picture(size=(90, 90))]}, 304 * 200),
        ("HEIF", "RGB", {"thumbnails": [64]}, 304 * 200),
        ("AVIF", "RGB", {}, 300 * 200),
        ("AVIF", "RGBA", {"subsampling": "4:4:4"}, 300 * 200),
        ("AVIF", "L", {}, 300 * 200),
        ("AVIF", "RGB", {"save_all": True, "append_images": [picture(size=(300, 200)).rotate(90)]}, 300 * 200),
    ],
)  # fmt: skip
def test_the_size_is_read_from_the_boxes_and_the_codec(form: str, mode: str, options: dict[str, Any], decoded: int) -> None:
    data = saved(picture(mode, (300, 200)), form, **options)
    found = examine(data, LIMITS)
    assert (found.format, found.pixels, found.is_simple) == (form, 60_000, False)
    assert decoded_pixels(data) == decoded
    with pytest.raises(ImageTooLargeError, match=r"The photo is 60,000 pixels; the limit is 59,999 pixels\."):
        examine(data, Limits(max_pixels=59_999))


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_rotation_does_not_change_the_pixels_that_are_counted(orientation: int) -> None:
    tags = Image.Exif()
    tags[0x0112] = orientation
    for form in ("HEIF", "AVIF"):
        assert examine(saved(picture(size=(300, 200)), form, exif=tags)).pixels == 60_000


@pytest.mark.parametrize(("tile", "write"), [(TILE, heif), (AV1_TILE, avif)])
def test_grids_and_overlays_that_are_in_order_are_decoded(tile: Item, write: Any) -> None:
    files = {
        (250, 256): write({1: grid(2, 2, 250, 256, [2, 3, 4, 5]), 2: tile, 3: tile, 4: tile, 5: tile}),
        (128, 128): write({1: tile}),
    }
    if write is heif:
        files[(200, 300)] = heif({1: overlay(200, 300, [2, 3]), 2: grid(1, 2, 256, 128, [3, 3]), 3: tile})
        files[(128, 127)] = heif({1: Item(b"iden", b"", [size_box(128, 127)], {b"dimg": [2]}), 2: tile})
    for size, data in files.items():
        assert examine(data, LIMITS).pixels == size[0] * size[1]
    assert decode(files[(250, 256)]).size == (250, 256)


BOMBS = {
    "a declared size": (heif({1: coded(picture(), size=(40_000, 40_000))}), 1_600_000_000),
    "a grid's output": (heif({1: grid(1, 1, 60_000, 60_000, [2]), 2: TILE}), 3_600_000_000),
    "a grid that declares two sizes": (
        heif({1: Item(b"grid", grid(1, 1, 60_000, 60_000, [2]).data, [size_box(9, 9)], {b"dimg": [2]}), 2: TILE}),
        3_600_000_000,
    ),
    "an overlay's canvas": (heif({1: overlay(60_000, 60_000, [2]), 2: TILE}), 3_600_000_000),
    "a tile that is repeated": (heif({1: grid(30, 60, 128, 128, [2] * 1800), 2: TILE}), 1800 * 128 * 128),
    "an image that is laid over itself": (heif({1: overlay(128, 128, [2] * 1800), 2: TILE}), 1800 * 128 * 128),
    "overlays of overlays": (
        heif({1: overlay(9, 9, [2] * 100), 2: overlay(9, 9, [3] * 100), 3: overlay(9, 9, [4] * 100), 4: TILE}),
        100**3 * 128 * 128,
    ),
    "a transparency that is larger than its image": (
        heif({
            1: TILE,
            2: Item(
                b"grid", grid(30, 60, 128, 128, []).data,
                [size_box(128, 128), full_box(b"auxC", b"urn:mpeg:hevc:2015:auxid:1\0")],
                {b"dimg": [3] * 1800, b"auxl": [1]},
            ),
            3: TILE,
        }),
        1800 * 128 * 128,
    ),
    "an HEVC image that is larger than it declares": (
        heif({1: coded(Image.new("RGB", (512, 512)), size=(64, 64))}), 512 * 512,
    ),
    "an AV1 image that is larger than it declares": (
        avif({1: coded(Image.new("RGB", (512, 512)), "AVIF", size=(64, 64))}), 512 * 512,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_pixels_are_bounded_before_they_are_decoded(name: str) -> None:
    data, pixels = BOMBS[name]
    assert len(data) < 20_000
    assert decoded_pixels(data) == pixels
    message = r"The photo (with its tiles and overlays )?is [0-9.,]+ megapixels; the limit is 0\.1\. Resize it and try again\."
    with pytest.raises(ImageTooLargeError, match=message):
        examine(data, LIMITS)


def in_band(item: Item) -> Item:
    """Repeat the size of a large HEVC image within the data of a small one."""
    large = next(entry for entry in coded(Image.new("RGB", (512, 512))).properties if entry[4:8] == b"hvcC")
    start = large.index(b"\x42\x01")  # a sequence parameter set
    (length,) = struct.unpack_from(">H", large, start - 2)
    return Item(item.kind, struct.pack(">I", length) + large[start : start + length] + item.data, item.properties)


def test_a_second_size_within_the_data_counts() -> None:
    assert decoded_pixels(heif({1: in_band(TILE)})) == 512 * 512


def cycle() -> bytes:
    return heif({1: overlay(9, 9, [2]), 2: overlay(9, 9, [1])})


def shared_extents(number: int) -> bytes:
    """Items that all refer to the same data."""
    data = heif({1: TILE})
    place = data.index(b"iloc") - 4
    (size,) = struct.unpack_from(">I", data, place)
    entries = b"".join(struct.pack(">HHHHII", i, 1, 0, 1, 0, len(TILE.data)) for i in range(1, number + 1))
    table = full_box(b"iloc", struct.pack(">BBH", 0x44, 0, number), entries, version=1)
    data = data[:place] + table + data[place + size :]
    meta = data.index(b"meta") - 4
    return data[:meta] + struct.pack(">I", len(data) - meta) + data[meta + 4 :]


REJECTED = {
    "items that refer to each other": (cycle(), "nesting", "nested more than 4 levels deep"),
    "deep nesting": (
        heif({**{i: overlay(9, 9, [i + 1]) for i in range(1, 5)}, 5: TILE}), "nesting", "nested more than 4 levels deep",
    ),
    "boxes": (heif({1: TILE}, extra=box(b"free") * 3000), "segments", "HEIC or AVIF file has more than 2,000 boxes"),
    "boxes outside": (heif({1: TILE}) + box(b"free") * 3000, "segments", "has more than 2,000 boxes"),
    "references": (heif({1: grid(50, 50, 9, 9, [2] * 2500), 2: TILE}), "segments", "has more than 2,000 boxes"),
    "items": (heif({i: Item(b"Exif") for i in range(1, 1500)}), "segments", "has more than 2,000 boxes"),
    "overlapping data": (shared_extents(900), "extents", "refer to more than the file contains"),
}  # fmt: skip


@pytest.mark.parametrize("name", REJECTED)
def test_files_that_are_slow_to_read_are_rejected(name: str) -> None:
    data, reason, message = REJECTED[name]
    with pytest.raises(TooComplexError, match=message) as caught:
        examine(data, LIMITS)
    assert caught.value.reason == reason


DAMAGED = {
    "no item table": (box(b"ftyp", b"heic", bytes(4), b"mif1"), "it has no still image"),
    "two item tables": (heif({1: TILE}) + heif({1: TILE}), "it has two item tables"),
    "two tables of types": (heif({1: TILE}, extra=full_box(b"iinf", b"\0\0")), "it has two iinf boxes"),
    "two tables of places": (heif({1: TILE}, extra=full_box(b"iloc", bytes(4))), "it has two iloc boxes"),
    "no such primary": (heif({1: TILE}, primary=7), "an image has no size"),
    "no size": (heif({1: Item(b"hvc1", TILE.data, TILE.properties[1:])}), "an image has no size"),
    "no configuration": (heif({1: Item(b"hvc1", TILE.data, TILE.properties[:1])}), "an image has no decoder configuration"),
    "too few tiles": (heif({1: grid(2, 2, 256, 256, [2]), 2: TILE}), "its grid has 1 of 4 tiles"),
    "a short grid": (heif({1: Item(b"grid", b"\0\0", [size_box(9, 9)], {b"dimg": [2]}), 2: TILE}), "a box is truncated"),
    "an odd box": (heif({1: TILE}, extra=b"\xff\xff\xff\xffbad!"), "a box does not fit into the file"),
    "the first half": (saved(picture(), "HEIF")[:-200], "the data of an image is missing"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_structure_is_rejected_before_decoding(name: str) -> None:
    data, reason = DAMAGED[name]
    with pytest.raises(ImageError) as caught:
        examine(data, LIMITS)
    assert str(caught.value) == f"The image is damaged and could not be read ({reason}). Use another copy."


@pytest.mark.parametrize("kind", [b"jpeg", b"unci", b"mski", b"avc1", b"vvc1", b"tili"])
def test_other_codecs_are_not_decoded(kind: bytes) -> None:
    with pytest.raises(UnsupportedImageError, match=r"kind of HEIC or AVIF image is not supported\. Save it again as JPEG\."):
        decode(heif({1: Item(kind, TILE.data, TILE.properties)}))


def test_every_start_of_a_file_is_rejected_with_an_image_error() -> None:
    for data in (saved(picture("RGBA"), "HEIF", tile_size=64), saved(picture("RGBA"), "AVIF"), heif({1: in_band(TILE)})):
        for length in range(12, len(data), 11):
            with pytest.raises(ImageError):
                examine(data[:length], LIMITS)


def test_data_that_a_camera_appends_is_ignored() -> None:
    data = saved(picture(), "HEIF")
    assert decode(data + b"SEFH" * 50).tobytes() == decode(data).tobytes()
    assert decode(data + box(b"mpvd", box(b"ftyp", b"mp42"), box(b"moov", bytes(500)))).tobytes() == decode(data).tobytes()


@pytest.mark.parametrize(
    ("data", "form"),
    [
        (box(b"ftyp", b"mif1", bytes(4), b"mif1", b"heic"), "HEIF"),
        (box(b"ftyp", b"mif1", bytes(4), b"avif", b"miaf"), "AVIF"),
        (box(b"ftyp", b"msf1", bytes(4), b"avis"), "AVIF"),
        (box(b"ftyp", b"hevc", bytes(4), b"heic"), "HEIF"),
        (box(b"ftyp", b"mif1", bytes(4)), "HEIF"),
        (box(b"ftyp", b"mp42", bytes(4), b"isom"), None),
        (box(b"ftyp", b"qt  ", bytes(4)), None),
        (b"\0\0\0\x18ftyp", None),
    ],
)
def test_the_brands_tell_the_format(data: bytes, form: str | None) -> None:
    assert file_format(data) == form


@pytest.mark.parametrize(("item", "brand"), [(TILE, b"heic"), (AV1_TILE, b"avif")])
def test_a_brand_among_the_compatible_ones_is_enough(item: Item, brand: bytes) -> None:
    data = heif({1: item}, brand=brand)
    assert decode(data[:8] + b"miaf" + data[12:]).tobytes() == decode(data).tobytes()


def test_a_sequence_is_hidden_in_place() -> None:
    data = saved(picture(), "AVIF", save_all=True, append_images=[picture().rotate(90)])
    assert has_sequence(data)
    hidden = hide_sequence(data)
    assert not has_sequence(hidden)
    assert len(hidden) == len(data)
    with Image.open(io.BytesIO(data)) as moving, Image.open(io.BytesIO(hidden)) as still:
        assert (moving.n_frames, still.n_frames) == (2, 1)  # type: ignore[attr-defined]
