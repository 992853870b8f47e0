"""HEIC and AVIF files, as phones write them and as no program does."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from models.heif_structure import read_items
from tests.helpers.odd_images import saved


def box(kind: bytes, *parts: bytes) -> bytes:
    data = b"".join(parts)
    return struct.pack(">I4s", 8 + len(data), kind) + data


def full_box(kind: bytes, *parts: bytes, version: int = 0, flags: int = 0) -> bytes:
    return box(kind, struct.pack(">I", version << 24 | flags), *parts)


def size_box(width: int, height: int) -> bytes:
    return full_box(b"ispe", struct.pack(">II", width, height))


@dataclass
class Item:
    """An item of a file: its type, its data, its properties as boxes, and the items that it refers to."""

    kind: bytes
    data: bytes = b""
    properties: list[bytes] = field(default_factory=list)
    references: dict[bytes, list[int]] = field(default_factory=dict)


def coded(image: Image.Image, form: str = "HEIF", size: tuple[int, int] | None = None, **options: Any) -> Item:
    """Encode an image as an item that declares ``size``, or its own."""
    file = saved(image, form, **options)
    items = read_items(file, lambda number: None)
    assert items.primary
    ((start, end),) = items.extents[items.primary]
    properties = [box(entry.kind, entry.data) for entry in items.properties[items.primary] if entry.kind != b"ispe"]
    return Item(items.types[items.primary], file[start:end], [size_box(*(size or image.size)), *properties])


def grid(rows: int, columns: int, width: int, height: int, tiles: list[int]) -> Item:
    data = struct.pack(">BBBBII", 0, 1, rows - 1, columns - 1, width, height)
    return Item(b"grid", data, [size_box(width, height)], {b"dimg": tiles})


def overlay(width: int, height: int, images: list[int]) -> Item:
    data = struct.pack(">BB4HII", 0, 1, 0, 0, 0, 65535, width, height) + struct.pack(">ii", 0, 0) * len(images)
    return Item(b"iovl", data, [size_box(width, height)], {b"dimg": images})


def heif(items: dict[int, Item], *, primary: int = 1, brand: bytes = b"heic", extra: bytes = b"") -> bytes:
    """Write a file of these items, with ``extra`` boxes in its item table."""
    entries = [full_box(b"infe", struct.pack(">HH4sx", number, 0, item.kind), version=2) for number, item in items.items()]
    properties = [entry for item in items.values() for entry in item.properties]
    associations, places, references, at, index = b"", b"", b"", 0, 1
    for number, item in items.items():
        indexes = range(index, index + len(item.properties))
        associations += struct.pack(">HB", number, len(indexes)) + b"".join(struct.pack(">H", i) for i in indexes)
        places += struct.pack(">HHHHII", number, 1, 0, 1, at, len(item.data))
        at, index = at + len(item.data), index + len(item.properties)
        for kind, targets in item.references.items():
            references += box(kind, struct.pack(f">HH{len(targets)}H", number, len(targets), *targets))
    meta = full_box(
        b"meta",
        full_box(b"hdlr", struct.pack(">I4s12xx", 0, b"pict")),
        full_box(b"pitm", struct.pack(">H", primary)),
        full_box(b"iinf", struct.pack(">H", len(entries)), *entries),
        full_box(b"iloc", struct.pack(">BBH", 0x44, 0, len(items)), places, version=1),
        full_box(b"iref", references) if references else b"",
        box(b"iprp", box(b"ipco", *properties), full_box(b"ipma", struct.pack(">I", len(items)), associations, flags=1)),
        box(b"idat", *(item.data for item in items.values())),
        extra,
    )
    return box(b"ftyp", brand, bytes(4), b"mif1", brand) + meta


def avif(items: dict[int, Item], **options: Any) -> bytes:
    return heif(items, brand=b"avif", **options)
