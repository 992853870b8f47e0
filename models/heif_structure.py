"""Read what decoding a HEIF or AVIF file would allocate, without decoding any of it.

Both formats are ISO base media files: nested boxes that describe *items*. An item is a coded image, or a grid or overlay of
other items, so a file of a few kilobytes can describe gigapixels. ``read_items`` parses the boxes, and
``Items.decoded_pixels`` adds up all items that the primary image consists of. A coded image counts with the size that its
codec's headers declare if that is larger than the size in the box.

The formats: https://www.w3.org/TR/mse-byte-stream-format-isobmff/, https://aomediacodec.github.io/av1-avif/ and ISO/IEC
23008-12 (HEIF), 14496-15 (HEVC in boxes).
"""

from __future__ import annotations

import functools
import struct
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from models.errors import TooComplexError, UnsupportedImageError

AVIF_BRANDS = frozenset((b"avif", b"avis"))
HEIF_BRANDS = frozenset((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"))
GENERIC_BRANDS = frozenset((b"mif1", b"msf1", b"miaf"))
SEQUENCE_BRANDS = {b"avis": b"avif", b"hevc": b"heic", b"hevx": b"heix", b"hevm": b"heim", b"hevs": b"heis", b"msf1": b"mif1"}
MAX_BRANDS_BYTES = 256
MAX_NESTING = 4  # a grid of coded images has 2 levels
HEVC_SPS, AV1_SEQUENCE = 33, 1
HEVC_HEADER_BYTES = 160  # the size of an HEVC picture comes within this many bytes
Count = Callable[[int], None]
Size = tuple[int, int]


def file_format(data: bytes) -> str | None:
    """Return "AVIF" or "HEIF" by the brands at the start of a file, or None."""
    if data[4:8] != b"ftyp":
        return None
    brands = [data[at : at + 4] for at in _brand_positions(data)]
    for brand in brands:
        if brand in AVIF_BRANDS:
            return "AVIF"
        if brand in HEIF_BRANDS:
            return "HEIF"
    return "HEIF" if GENERIC_BRANDS.intersection(brands) else None


def has_sequence(data: bytes) -> bool:
    """Return whether a HEIF or AVIF file contains a sequence of frames, as an animation or video."""
    return any(kind == b"moov" for kind, _, _ in _top_level(data, lambda number: None))


def hide_sequence(data: bytes) -> bytes:
    """Return a HEIF or AVIF file without its sequence of frames, so that decoders take the primary image.

    Positions in the file stay the same: the box of the sequence becomes free space, and brands become those of still images.
    """
    result = bytearray(data)
    for at in _brand_positions(data):
        result[at : at + 4] = SEQUENCE_BRANDS.get(data[at : at + 4], data[at : at + 4])
    if result[8:12] not in (*AVIF_BRANDS, *HEIF_BRANDS, b"mif1"):  # Pillow's plug-ins look only at the major brand
        result[8:12] = b"avif" if file_format(data) == "AVIF" else b"heic"
    for kind, start, _ in _top_level(data, lambda number: None):
        if kind == b"moov":
            at = result.rindex(kind, 0, start)
            result[at : at + 4] = b"free"
    return bytes(result)


def _brand_positions(data: bytes) -> list[int]:
    """Return where the major brand is, and the compatible ones."""
    end = min(int.from_bytes(data[:4], "big"), MAX_BRANDS_BYTES, len(data) - 3)
    return [8, *range(16, end, 4)]


@dataclass(frozen=True)
class _Property:
    kind: bytes
    data: bytes


@dataclass
class Items:
    """The items of a file: their types, properties, references and data.

    Args:
        file: The bytes of the file.
        count: Called with the number of boxes and entries that are read. It raises TooComplexError when they are too many.
    """

    file: bytes
    count: Count
    primary: int | None = None
    types: dict[int, bytes] = field(default_factory=dict)
    properties: dict[int, list[_Property]] = field(default_factory=lambda: defaultdict(list))
    references: dict[bytes, dict[int, list[int]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))
    extents: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    _pixels: dict[int, int] = field(default_factory=dict, init=False)

    def size(self) -> Size:
        """Return the declared width and height of the primary image before rotation."""
        return self._declared_size(self._primary())

    def decoded_pixels(self) -> int:
        """Return how many pixels are decoded for the primary image with its tiles and overlays.

        Raises:
            TooComplexError: Items are nested too deeply.
            UnsupportedImageError: The image is of a kind that phones and editors do not write.
            ValueError: The structure is damaged.
        """
        return self._pixels_of(self._primary(), 1)

    def _primary(self) -> int:
        if self.primary is None:
            raise ValueError("it has no primary image")
        return self.primary

    def _pixels_of(self, item: int, depth: int) -> int:
        if depth > MAX_NESTING:
            raise TooComplexError("nesting", f"The image is nested more than {MAX_NESTING} levels deep. Save it again as JPEG.")
        if item not in self._pixels:
            kind = self.types.get(item)
            if kind in _CODECS:
                own = max(width * height for width, height in (self._declared_size(item), *self._coded_sizes(item)))
                inner = 0
            else:
                own = self._canvas_pixels(item)
                inner = sum(self._pixels_of(other, depth + 1) for other in self.references[b"dimg"][item])
            alphas = (self._pixels_of(other, depth + 1) for other in self._alphas.get(item, ()))
            self._pixels[item] = max(own, inner, *alphas)
        return self._pixels[item]

    def _declared_size(self, item: int) -> Size:
        sizes = [struct.unpack_from(">II", entry.data, 4) for entry in self.properties[item] if entry.kind == b"ispe"]
        if not sizes:
            raise ValueError("an image has no size")
        return max(sizes)[0], max(sizes)[1]

    def _coded_sizes(self, item: int) -> Iterator[Size]:
        """Yield the sizes in the headers of the codec."""
        config_kind, sizes = _CODECS[self.types[item]]
        configs = [entry.data for entry in self.properties[item] if entry.kind == config_kind]
        if not configs:
            raise ValueError("an image has no decoder configuration")
        for config in configs:
            yield from sizes(config, self._data(item), self.count)

    def _canvas_pixels(self, item: int) -> int:
        """Return the output size of an item that is derived from others."""
        kind, sources = self.types.get(item), len(self.references[b"dimg"][item])
        declared = self._declared_size(item)
        if kind == b"iden" and sources == 1:
            return declared[0] * declared[1]
        if kind not in (b"grid", b"iovl"):
            raise UnsupportedImageError("This kind of HEIC or AVIF image is not supported. Save it again as JPEG.")
        reader = _Reader(self._data(item))
        _, flags = reader.uint(1), reader.uint(1)
        number_bytes = 4 if flags & 1 else 2
        if kind == b"grid":
            rows, columns = reader.uint(1) + 1, reader.uint(1) + 1
            if sources != rows * columns:
                raise ValueError(f"its grid has {sources} of {rows * columns} tiles")
        else:
            reader.uint(8)  # the color behind the images
        width, height = reader.uint(number_bytes), reader.uint(number_bytes)
        return max(width * height, declared[0] * declared[1])

    @functools.cached_property
    def _alphas(self) -> dict[int, list[int]]:
        """The items with the transparency of an item."""
        found: dict[int, list[int]] = defaultdict(list)
        for source, targets in self.references[b"auxl"].items():
            if any(entry.kind == b"auxC" and _is_alpha(entry.data) for entry in self.properties.get(source, ())):
                for target in targets:
                    found[target].append(source)
        return found

    def _data(self, item: int) -> bytes:
        extents = self.extents.get(item)
        if extents is None:
            raise ValueError("the data of an image is missing")
        return b"".join(self.file[start:end] for start, end in extents)


def read_items(data: bytes, count: Count) -> Items:
    """Read the boxes that describe the items of a file.

    Args:
        data: The file.
        count: See ``Items``.

    Raises:
        TooComplexError: There are too many boxes or entries, or they refer to more than the file contains.
        ValueError: The structure is damaged.
    """
    metas = [(start, end) for kind, start, end in _top_level(data, count) if kind == b"meta"]
    if not metas:
        raise ValueError("it has no still image")
    if len(metas) > 1:
        raise ValueError("it has two item tables")
    items = Items(data, count)
    start, end = metas[0]
    inner = _only_once(_boxes(data, start + 4, end, count))
    for name, parse in (
        (b"pitm", _parse_primary), (b"iinf", _parse_types), (b"iprp", _parse_properties), (b"iref", _parse_references),
    ):  # fmt: skip
        if name in inner:
            parse(items, *inner[name])
    if b"iloc" in inner:
        _parse_locations(items, *inner[b"iloc"], inner.get(b"idat", (0, 0)))
    return items


# Boxes


def _boxes(data: bytes, start: int, end: int, count: Count) -> Iterator[tuple[bytes, int, int]]:
    """Yield (type, start, end) of the contents of each box. Raises ValueError where one does not fit."""
    at = start
    while at + 8 <= end:
        count(1)
        size, kind = struct.unpack_from(">I4s", data, at)
        body = at + 8
        if size == 1:
            size, body = int.from_bytes(data[body : body + 8], "big"), body + 8
        elif size == 0:
            size = end - at
        if not body - at <= size <= end - at:
            raise ValueError("a box does not fit into the file")
        yield kind, body, at + size
        at += size


def _top_level(data: bytes, count: Count) -> list[tuple[bytes, int, int]]:
    """Return the boxes of a file up to one that does not fit: some cameras append other data."""
    found = []
    boxes = _boxes(data, 0, len(data), count)
    while True:
        try:
            found.append(next(boxes))
        except (StopIteration, ValueError, struct.error):
            return found


def _only_once(boxes: Iterator[tuple[bytes, int, int]]) -> dict[bytes, tuple[int, int]]:
    """Return the contents by type. Readers disagree on which of two boxes applies."""
    found: dict[bytes, tuple[int, int]] = {}
    for kind, start, end in boxes:
        if kind in found and kind in _UNIQUE:
            raise ValueError(f"it has two {kind.decode()} boxes")
        found[kind] = start, end
    return found


_UNIQUE = frozenset((b"pitm", b"iinf", b"iprp", b"iref", b"iloc", b"idat", b"ipco"))


class _Reader:
    """Read big-endian integers in sequence."""

    def __init__(self, data: bytes, start: int = 0, end: int | None = None) -> None:
        self._data, self.at, self._end = data, start, len(data) if end is None else end

    def uint(self, size: int) -> int:
        if self.at + size > self._end:
            raise ValueError("a box is truncated")
        self.at += size
        return int.from_bytes(self._data[self.at - size : self.at], "big")

    def version(self) -> tuple[int, int]:
        """Read the version and the flags of a full box."""
        return self.uint(1), self.uint(3)


def _parse_primary(items: Items, start: int, end: int) -> None:
    reader = _Reader(items.file, start, end)
    version, _ = reader.version()
    items.primary = reader.uint(4 if version else 2)


def _parse_types(items: Items, start: int, end: int) -> None:
    reader = _Reader(items.file, start, end)
    version, _ = reader.version()
    reader.uint(4 if version else 2)
    for kind, entry, entry_end in _boxes(items.file, reader.at, end, items.count):
        if kind == b"infe":
            inner = _Reader(items.file, entry, entry_end)
            version, _ = inner.version()
            if version >= 2:  # others are not images
                item = inner.uint(4 if version > 2 else 2)
                inner.uint(2)  # protection
                if item in items.types:
                    raise ValueError("it has two items of one number")
                items.types[item] = inner.uint(4).to_bytes(4, "big")


def _parse_properties(items: Items, start: int, end: int) -> None:
    properties: list[_Property] = []
    tables = []
    for kind, inner, inner_end in _boxes(items.file, start, end, items.count):
        if kind == b"ipco":
            if properties:
                raise ValueError("it has two ipco boxes")
            properties = [_Property(name, items.file[a:b]) for name, a, b in _boxes(items.file, inner, inner_end, items.count)]
        elif kind == b"ipma":
            tables.append((inner, inner_end))
    for inner, inner_end in tables:
        reader = _Reader(items.file, inner, inner_end)
        version, flags = reader.version()
        for _ in range(reader.uint(4)):
            item = reader.uint(4 if version else 2)
            number = reader.uint(1)
            items.count(1 + number)
            for _ in range(number):
                index = reader.uint(2) & 0x7FFF if flags & 1 else reader.uint(1) & 0x7F
                if index > len(properties):
                    raise ValueError("a property is missing")
                if index:
                    items.properties[item].append(properties[index - 1])


def _parse_references(items: Items, start: int, end: int) -> None:
    reader = _Reader(items.file, start, end)
    version, _ = reader.version()
    number_bytes = 4 if version else 2
    for kind, inner, inner_end in _boxes(items.file, reader.at, end, items.count):
        inner_reader = _Reader(items.file, inner, inner_end)
        source = inner_reader.uint(number_bytes)
        number = inner_reader.uint(2)
        items.count(number)
        items.references[kind][source] += [inner_reader.uint(number_bytes) for _ in range(number)]


def _parse_locations(items: Items, start: int, end: int, item_data: tuple[int, int]) -> None:
    reader = _Reader(items.file, start, end)
    version, _ = reader.version()
    sizes = reader.uint(2)
    offset_bytes, length_bytes, base_bytes, index_bytes = (sizes >> shift & 15 for shift in (12, 8, 4, 0))
    total = 0
    for _ in range(reader.uint(4 if version > 1 else 2)):
        items.count(1)
        item = reader.uint(4 if version > 1 else 2)
        method = reader.uint(2) & 15 if version else 0
        source = reader.uint(2)
        base = reader.uint(base_bytes)
        outer = (0, len(items.file)) if method == 0 else item_data
        extents = []
        is_inside = method <= 1 and source == 0
        for _ in range(reader.uint(2)):
            items.count(1)
            if version and index_bytes:
                reader.uint(index_bytes)
            first = outer[0] + base + reader.uint(offset_bytes)
            length = reader.uint(length_bytes)
            last = first + length if length else outer[1]
            is_inside = is_inside and outer[0] <= first <= last <= outer[1]
            extents.append((first, last))
            total += last - first
        if item in items.extents:
            raise ValueError("it has two places for one item")
        if is_inside:
            items.extents[item] = extents
    if total > 2 * len(items.file):
        raise TooComplexError("extents", "The items of the image refer to more than the file contains. Save it again as JPEG.")


def _is_alpha(data: bytes) -> bool:
    return data[4:].startswith((b"urn:mpeg:mpegB:cicp:systems:auxiliary:alpha", b"urn:mpeg:hevc:2015:auxid:1\0"))


# The headers of the codecs


class _Bits:
    """Read bits in sequence, the most significant first."""

    def __init__(self, data: bytes) -> None:
        self._value, self._left = int.from_bytes(data, "big"), 8 * len(data)

    def read(self, number: int) -> int:
        if number > self._left:
            raise ValueError("the header of an image is truncated")
        self._left -= number
        return self._value >> self._left & (1 << number) - 1

    def exp_golomb(self) -> int:
        zeros = 0
        while not self.read(1):
            zeros += 1
        if zeros > 32:
            raise ValueError("the header of an image is damaged")
        return (1 << zeros) - 1 + self.read(zeros)


def _hevc_sizes(config: bytes, data: bytes, count: Count) -> Iterator[Size]:
    """Yield the size of each sequence parameter set, in the configuration and in the data."""
    reader = _Reader(config, 21)
    length_bytes = (reader.uint(1) & 3) + 1
    for _ in range(reader.uint(1)):
        reader.uint(1)
        for _ in range(reader.uint(2)):
            count(1)
            length = reader.uint(2)
            yield from _hevc_size(config[reader.at : reader.at + min(length, HEVC_HEADER_BYTES)])
            reader.at += length
    at = 0
    while at + length_bytes <= len(data):
        count(1)
        length = int.from_bytes(data[at : at + length_bytes], "big")
        at += length_bytes
        yield from _hevc_size(data[at : at + min(length, HEVC_HEADER_BYTES)])
        at += length


def _hevc_size(unit: bytes) -> Iterator[Size]:
    if len(unit) < 2 or unit[0] >> 1 != HEVC_SPS or unit[0] & 1 or unit[1] >> 3:  # another layer is not decoded
        return
    bits = _Bits(unit[2:].replace(b"\0\0\3", b"\0\0"))
    bits.read(4)
    layers = bits.read(3)
    bits.read(1 + 96)
    if layers:
        present = [(bits.read(1), bits.read(1)) for _ in range(8)][:layers]
        bits.read(sum(88 * profile + 8 * level for profile, level in present))
    bits.exp_golomb()
    if bits.exp_golomb() == 3:
        bits.read(1)
    yield bits.exp_golomb(), bits.exp_golomb()


def _av1_sizes(config: bytes, data: bytes, count: Count) -> Iterator[Size]:
    """Yield the size of each sequence header, in the configuration and in the data."""
    for units in (config[4:], data):
        at = 0
        while at < len(units):
            count(1)
            head = units[at]
            at += 2 if head & 4 else 1
            length = len(units) - at
            if head & 2:
                length, at = _leb128(units, at)
            if head >> 3 & 15 == AV1_SEQUENCE:
                yield _av1_size(units[at : at + length])
            at += length


def _leb128(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 56, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            break
    return value, at


def _av1_size(header: bytes) -> Size:
    """Return the maximum size of the frames (section 5.5 of https://aomediacodec.github.io/av1-spec/)."""
    bits = _Bits(header[:MAX_BRANDS_BYTES])
    bits.read(4)
    if bits.read(1):  # a reduced header of a still image
        bits.read(5)
    else:
        delay_bits = 0
        if bits.read(1):  # timing
            bits.read(64)
            if bits.read(1):
                bits.exp_golomb()
            if bits.read(1):  # decoder model
                delay_bits = bits.read(5) + 1
                bits.read(42)
        has_display_delay = bits.read(1)
        for _ in range(bits.read(5) + 1):
            bits.read(12)
            if bits.read(5) > 7:
                bits.read(1)
            if delay_bits and bits.read(1):
                bits.read(2 * delay_bits + 1)
            if has_display_delay and bits.read(1):
                bits.read(4)
    width_bits, height_bits = bits.read(4) + 1, bits.read(4) + 1
    return bits.read(width_bits) + 1, bits.read(height_bits) + 1


_CODECS = {b"hvc1": (b"hvcC", _hevc_sizes), b"av01": (b"av1C", _av1_sizes)}
