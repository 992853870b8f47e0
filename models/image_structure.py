"""Bound what decoding an image costs before any of it is decoded.

A few bytes can make a decoder work for minutes or allocate gigabytes: a JPEG that repeats one scan, a TIFF whose single tile
is a thousand times the image, a PNG of a million empty chunks. ``examine`` walks the markers, chunks or blocks of a file
without decoding one, in a bounded number of steps, and sorts it into one of three groups:

- rejected (``TooComplexError``, ``ImageTooLargeError``): no program writes such a file;
- simple: a plain JPEG, PNG, WebP, GIF, BMP or PPM, whose time and memory follow from its pixels and its length;
- anything else. It may be fine, but only a process with a time and memory limit can tell.

The simple group is a list of shapes that are known to be cheap, not the rest after known attacks. The walk mirrors the order
in which Pillow's plug-ins read a file, as their Python loops are among the costs.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from models.errors import ImageError, ImageTooLargeError, TooComplexError
from models.heif_structure import file_format, read_items

MIB = 1 << 20
SIMPLE_SEGMENTS = {"JPEG": 256, "PNG": 4096, "GIF": 8192, "WEBP": 64}
SIMPLE_SCANS = 24  # libjpeg and mozjpeg write 10 to 13
SIMPLE_PNG_TEXTS = 64
SIMPLE_METADATA_BYTES = 256 << 10  # what the tags of EXIF refer to, overlaps counted each time
SIMPLE_PPM_HEADER = 1024
LONGEST_PPM_HEADER = 64 << 10
MAX_PLAIN_PPM_COMMENTS = 100
MAX_TILE_PADDING = 2  # the tiles of a HEIC or AVIF photo may extend beyond it
# Memory while decoding and converting, in bytes per pixel, as measured; for what is not simple the highest.
BYTES_PER_PIXEL = {"JPEG": 4, "PNG": 16, "WEBP": 20, "GIF": 16, "BMP": 16, "TIFF": 20, "PPM": 8, "AVIF": 20, "HEIF": 21}
COEFFICIENT_BYTES_PER_PIXEL = 8  # more, where a JPEG has several scans


@dataclass(frozen=True)
class Limits:
    """What is rejected before it is decoded.

    Args:
        max_pixels: Pixels that are allocated, by the image or by one tile of it.
        max_scans: Scans of a JPEG.
        max_segments: Segments, chunks, blocks, boxes or strips.
        max_slow_bytes: File size where Pillow decodes in Python: plain PPM, PPM of an odd depth, run-length BMP.
    """

    max_pixels: int = 178_956_970  # Pillow's own limit
    max_scans: int = 100
    max_segments: int = 50_000
    max_slow_bytes: int = 64 * MIB


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class Structure:
    """What the walk found. ``pixels`` is 0 where the size could not be read; ``memory`` is the bytes to decode it, bounded."""

    format: str | None
    pixels: int
    is_simple: bool
    memory: int = 0


class _NotSimpleError(Exception):
    """The file is not on the list of simple shapes."""


def examine(data: bytes, limits: Limits = DEFAULT_LIMITS) -> Structure:
    """Walk the structure of an image file.

    Args:
        data: The file.
        limits: What to reject.

    Returns:
        Its structure. A file of no known format counts as simple: Pillow identifies none without decoding.

    Raises:
        TooComplexError: The file is built to be slow.
        ImageTooLargeError: The image, or a tile of it, has more than ``limits.max_pixels``.
        ImageError: The structure of a HEIF or AVIF file is damaged or not supported.
    """
    matches = [(name, walk) for magic, name, walk in _WALKS if data.startswith(magic)]
    if name := file_format(data):
        matches = [(name, _heif)]
    if not matches:
        return Structure(None, 0, is_simple=True)
    ((name, walk),) = matches
    found = _Found(limits)
    try:
        walk(data, found)
        is_simple = True
    except _NotSimpleError:
        is_simple = False
    except (struct.error, IndexError):  # truncated: Pillow reports it, in a process that can be stopped
        is_simple = False
    if found.pixels > limits.max_pixels:
        raise too_large(*found.size, limits.max_pixels, what=found.what)
    return Structure(name, found.pixels, is_simple, found.pixels * found.bytes_per_pixel(name))


def too_large(width: int, height: int, max_pixels: int, *, what: str = "The photo") -> ImageTooLargeError:
    """Return the error of an image, or of ``what`` in it, with more than ``max_pixels``."""
    size, limit = _megapixels(width * height), _megapixels(max_pixels)
    if size == limit:
        size, limit = f"{width * height:,} pixels", f"{max_pixels:,} pixels"
    else:
        size += " megapixels"
    return ImageTooLargeError(f"{what} is {size}; the limit is {limit}. Resize it and try again.")


def _megapixels(pixels: int) -> str:
    return f"{pixels / 1e6:,.0f}" if pixels >= 1e8 else f"{pixels / 1e6:.3g}"


class _Found:
    """What one walk has found so far, and the limits that it counts against."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.pixels = 0
        self.size: tuple[int, int] = 0, 0
        self.what = "The photo"
        self.has_coefficients = False

    def add_size(self, width: int, height: int, what: str = "The photo") -> None:
        """Note a size that is allocated; the largest counts."""
        if width * height > self.pixels:
            self.pixels, self.size, self.what = width * height, (width, height), what

    def bytes_per_pixel(self, name: str) -> int:
        return BYTES_PER_PIXEL[name] + (COEFFICIENT_BYTES_PER_PIXEL if self.has_coefficients else 0)

    def check_segments(self, count: int, what: str) -> None:
        """Raise TooComplexError where ``count`` is too many; ``what`` they are follows the number."""
        if count > self.limits.max_segments:
            raise TooComplexError(
                "segments", f"The {what.format(f'more than {self.limits.max_segments:,}')}. Save it again with an image editor."
            )


# JPEG


def _jpeg(data: bytes, found: _Found) -> None:
    """Walk the segments before the first scan as Pillow does, then count the scans."""
    tables = frames = components = exifs = 0
    is_progressive = is_simple = True
    at, steps, most = 2, 0, found.limits.max_segments
    while steps <= most:
        steps += 1
        begin, marker, length = _JPEG_SEGMENT(data, at)
        if begin != 0xFF:  # Pillow passes over junk one byte at a time
            is_simple, at = False, at + 1
            continue
        if marker == 0xFF:  # padding
            at += 1
            continue
        if marker in _JPEG_BARE:
            is_simple, at = False, at + 2
            continue
        body = at + 4
        if marker in _JPEG_FRAMES:
            frames += 1
            components = data[body + 5]
            found.add_size(_u16(data, body + 3), _u16(data, body + 1))
            is_progressive = marker == 0xC2
            is_simple = is_simple and marker in (0xC0, 0xC1, 0xC2) and length == 8 + 3 * components
        elif marker == 0xDB:
            tables += length
            steps += length // 65  # a segment may hold many tables, and Pillow reads each in Python
        elif marker == 0xE1 and data.startswith(b"Exif\0\0", body):
            is_simple = is_simple and _are_tags_small(data[body + 6 : at + 2 + length])
            exifs += 1
        elif marker == 0xE2 and data.startswith(b"MPF\0", body):
            is_simple = is_simple and _are_tags_small(data[body + 4 : at + 2 + length])
        elif marker == 0xED:
            steps += data.count(b"8BIM", body, at + 2 + length)
        elif marker == 0xDA:
            break
        at += 2 + length
    if steps > most:
        found.check_segments(steps, "JPEG has {} segments")
    is_simple = is_simple and steps <= SIMPLE_SEGMENTS["JPEG"] and frames == 1
    is_simple = is_simple and tables <= 2048 and exifs <= 1
    if is_progressive or data[body] < components:  # from other files libjpeg reads only the first scan
        found.has_coefficients = True
        if data.count(b"\xff\xda", at) > SIMPLE_SCANS:  # every scan starts with this marker, but other data can contain it
            is_simple = False
            end = data.find(b"\xff\xd9", at)
            scans = data.count(b"\xff\xda", at, end if end > 0 else len(data))
            if scans > found.limits.max_scans:
                raise TooComplexError(
                    "jpeg_scans",
                    f"The JPEG has {scans:,} scans and at most {found.limits.max_scans:,} are accepted. "
                    "Save it again as a normal JPEG.",
                )
    if not is_simple:
        raise _NotSimpleError


_JPEG_SEGMENT = struct.Struct(">BBH").unpack_from
_JPEG_BARE = frozenset((*range(0xC0), *range(0xD0, 0xDA), 0xC8, *range(0xF0, 0xFE)))  # Pillow takes them to have no length
_JPEG_FRAMES = frozenset((*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0), 0xDE))


# EXIF, and the tags of TIFF

_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_INNER_TAGS = {0x8769, 0x8825, 0xA005}  # Exif, GPS, Interoperability
_CLASSIC = {b"II*\0": "<", b"MM\0*": ">"}


def _are_tags_small(block: bytes) -> bool:
    """Whether the EXIF tags, including nested directories, refer to little data. Pillow copies the data of each tag."""
    order = _CLASSIC.get(block[:4])
    if order is None:  # Pillow accepts other byte orders; such a file is not simple
        return False
    total, starts = 0, [struct.unpack_from(f"{order}I", block, 4)[0]]
    for _ in range(4):
        if not starts:
            return total <= SIMPLE_METADATA_BYTES
        for tag, _, size, value in _tags(block, starts.pop(), order):
            total += size
            if tag in _INNER_TAGS:
                starts.append(value)
        if total > SIMPLE_METADATA_BYTES:
            return False
    return not starts


def _tags(block: bytes, start: int, order: str) -> Iterator[tuple[int, int, int, int]]:
    """The tags of a folder that lie inside ``block``: (tag, count, bytes, value or offset)."""
    if start + 2 > len(block):
        return
    (count,) = struct.unpack_from(f"{order}H", block, start)
    end = min(start + 2 + 12 * count, start + 2 + (len(block) - start - 2) // 12 * 12)
    for tag, kind, number, value in struct.iter_unpack(f"{order}HHII", block[start + 2 : end]):
        size = _TYPE_BYTES.get(kind, 0)
        if number * size < 4:  # a shorter value is in the first bytes of its field
            value = value & (1 << 8 * size) - 1 if order == "<" else value >> 32 - 8 * size
        yield tag, number, 12 + min(number * size, len(block)), value


# PNG


def _png(data: bytes, found: _Found) -> None:
    """Walk the chunks to the end of the image."""
    if data[12:16] != b"IHDR":
        raise _NotSimpleError
    found.add_size(*struct.unpack_from(">II", data, 16))
    texts, at, is_simple = 0, 8, True
    steps, most = 0, found.limits.max_segments
    while steps <= most:
        steps += 1
        if at + 8 > len(data):
            break
        length, kind = _PNG_CHUNK(data, at)
        if kind != b"IDAT":
            if kind == b"IEND":
                break
            texts += kind in (b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf")
            if kind == b"acTL" or (kind == b"IHDR" and at > 8):
                is_simple = False
            elif kind == b"eXIf":
                is_simple = is_simple and _are_tags_small(data[at + 8 : at + 8 + length])
            elif kind in (b"tEXt", b"zTXt", b"iTXt"):  # EXIF in hexadecimal, or what passes for it
                is_simple = is_simple and not data.startswith((b"Raw profile", b"exif"), at + 8)
        at += 12 + length
    if steps > most:
        found.check_segments(steps, "PNG has {} chunks")
    if not (is_simple and steps <= SIMPLE_SEGMENTS["PNG"] and texts <= SIMPLE_PNG_TEXTS):
        raise _NotSimpleError


_PNG_CHUNK = struct.Struct(">I4s").unpack_from


# WebP


def _webp(data: bytes, found: _Found) -> None:
    """Take the canvas from the header; a still image of few chunks is simple."""
    if data[8:12] != b"WEBP":
        return
    kind = data[12:16]
    if kind == b"VP8 ":
        found.add_size(_u16(data, 26, "<") & 0x3FFF, _u16(data, 28, "<") & 0x3FFF)
    elif kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        found.add_size((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
    elif kind == b"VP8X":
        found.add_size(int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1)
        _webp_chunks(data, found)


def _webp_chunks(data: bytes, found: _Found) -> None:
    if data[20] & 2:  # animated
        raise _NotSimpleError
    at = 12
    for _ in range(SIMPLE_SEGMENTS["WEBP"]):
        if at + 8 > len(data):
            return
        kind, (length,) = data[at : at + 4], struct.unpack_from("<I", data, at + 4)
        if kind == b"ANMF":
            raise _NotSimpleError
        if kind == b"EXIF" and not _are_tags_small(data[at + 8 : at + 8 + length].removeprefix(b"Exif\0\0")):
            raise _NotSimpleError
        at += 8 + length + (length & 1)
    raise _NotSimpleError


# GIF


def _gif(data: bytes, found: _Found) -> None:
    """Walk the blocks through the first frame to the second: Pillow goes so far to find out whether there is one."""
    screen = _u16(data, 6, "<"), _u16(data, 8, "<")
    found.add_size(*screen)
    at = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
    steps = frames = 0
    most = found.limits.max_segments
    while steps <= most and at < len(data) and (block := data[at]) != 0x3B:
        steps += 1
        if block == 0x2C:
            frames += 1
            if frames == 2:
                break
            left, top, width, height = struct.unpack_from("<HHHH", data, at + 1)
            found.add_size(max(screen[0], left + width), max(screen[1], top + height))
            flags = data[at + 9]
            at += 10 + (3 << (flags & 7) + 1 if flags & 0x80 else 0) + 1
        elif block == 0x21:
            at += 2
        else:  # Pillow passes over junk one byte at a time
            at += 1
            continue
        while steps <= most and at < len(data) and (length := data[at]):
            at += 1 + length
            steps += 1
        at += 1
    if steps > most:
        found.check_segments(steps, "GIF has {} blocks before its second frame")
    if steps > SIMPLE_SEGMENTS["GIF"]:
        raise _NotSimpleError


# BMP


def _bmp(data: bytes, found: _Found) -> None:
    """Uncompressed is simple; run lengths are decoded in Python."""
    (header,) = struct.unpack_from("<I", data, 14)
    if header == 12:
        found.add_size(_u16(data, 18, "<"), _u16(data, 20, "<"))
        return
    width, height, _, _, compression = struct.unpack_from("<iiHHI", data, 18)
    found.add_size(abs(width), abs(height))
    if compression in (1, 2):
        _check_slow(data, found, "BMP is run-length encoded")
        if len(data) > 4 * found.pixels + 4 * abs(height) + 4096:
            raise TooComplexError("run_lengths", "The BMP has more run lengths than pixels. Save it again as PNG or JPEG.")
        raise _NotSimpleError
    if compression not in (0, 3):
        raise _NotSimpleError


# TIFF


def _tiff(data: bytes, found: _Found) -> None:
    """Check the first folder's geometry. libtiff allocates by it, so no TIFF is simple."""
    order = "<" if data[:2] == b"II" else ">"
    tags: dict[int, tuple[int, int]] = {}
    total = 0
    folder = _big_tags(data, order) if 43 in data[2:4] else _tags(data, struct.unpack_from(f"{order}I", data, 4)[0], order)
    for tag, count, size, value in folder:
        before = tags.get(tag, (0, 0))
        tags[tag] = max(before[0], count), max(before[1], value)  # readers disagree on which duplicate tag applies
        total += size
    if total > 4 * len(data) + MIB:
        raise TooComplexError("tags", "The tags of the TIFF refer to more than the file holds. Save it again as PNG or JPEG.")
    width, height = (tags.get(tag, (0, 0))[1] for tag in (256, 257))
    found.add_size(width, height)
    tile_width, tile_height = (tags.get(tag, (0, 0))[1] for tag in (322, 323))
    found.add_size(tile_width, tile_height, "A tile of the photo")
    strips = max(tags.get(tag, (0, 0))[0] for tag in (273, 279, 324, 325))
    found.check_segments(strips, "TIFF has {} strips or tiles")
    raise _NotSimpleError


def _big_tags(data: bytes, order: str) -> Iterator[tuple[int, int, int, int]]:
    (start,) = struct.unpack_from(f"{order}Q", data, 8)
    (number,) = struct.unpack_from(f"{order}Q", data, start) if start + 8 <= len(data) else (0,)
    end = min(start + 8 + 20 * number, start + 8 + (len(data) - start - 8) // 20 * 20)
    for tag, kind, count, field in struct.iter_unpack(f"{order}HHQ8s", data[start + 8 : end]):
        size = _TYPE_BYTES.get(kind, 0)
        value = struct.unpack_from(f"{order}{_INTEGERS.get(size, 'Q')}", field)[0]
        yield tag, count, 20 + min(count * size, len(data)), value


_INTEGERS = {1: "B", 2: "H", 4: "I", 8: "Q"}


# HEIF and AVIF


def _heif(data: bytes, found: _Found) -> None:
    """Bound the primary image with all that it consists of. Only these pixels are decoded, so previews do not count."""
    boxes = 0

    def count(number: int) -> None:
        nonlocal boxes
        boxes += number
        found.check_segments(boxes, "HEIC or AVIF file has {} boxes")

    try:
        items = read_items(data, count)
        found.add_size(*items.size())
        decoded = items.decoded_pixels()
    except (ValueError, struct.error, IndexError) as error:
        raise ImageError(f"The image is damaged and could not be read ({error}). Use another copy.") from None
    if decoded > MAX_TILE_PADDING * found.limits.max_pixels:
        found.add_size(decoded, 1, "The photo with its tiles and overlays")
    raise _NotSimpleError


# PPM

_PPM_OF_DEPTH = (b"P5", b"P6", b"P0CMYK", b"PyP", b"PyRGBA", b"PyCMYK")
_SPACE = rb"[ \t\n\v\f\r]"
_PPM_TOKEN = re.compile(rb"%(s)s*(?:#[^\r\n]*[\r\n]%(s)s*)*([^# \t\n\v\f\r]{1,10})(?=%(s)s)" % {b"s": _SPACE})


def _ppm(data: bytes, found: _Found) -> None:
    """Binary maps of 8 bits are simple. Pillow reads plain ones, and those of another depth, in Python."""
    if data[1:2] in (b"1", b"2", b"3"):
        _check_slow(data, found, "PPM is plain text")
        if data.count(b"#") > MAX_PLAIN_PPM_COMMENTS:  # the decoding time grows with the square of their number
            raise TooComplexError(
                "comments",
                f"The plain PPM has more than {MAX_PLAIN_PPM_COMMENTS} comments. Save it again as binary PPM, PNG or JPEG.",
            )
    if data[1:2] not in b"0123456fy":
        return
    head = data[:LONGEST_PPM_HEADER]
    tokens, at = [], 0
    for _ in range(3 if data.startswith((b"P1", b"P4")) else 4):
        if not (match := _PPM_TOKEN.match(head, at)):
            if len(data) > len(head):
                raise TooComplexError("header", "The header of the PPM does not end. Save it again as PNG or JPEG.")
            raise _NotSimpleError
        tokens.append(match[1])
        at = match.end()
    if not all(token.isdigit() for token in tokens[1:3]):
        raise _NotSimpleError
    found.add_size(int(tokens[1]), int(tokens[2]))
    kind, depth = tokens[0], tokens[3:]
    if kind in _PPM_OF_DEPTH and not (depth == [b"255"] or (kind == b"P5" and depth == [b"65535"])):
        _check_slow(data, found, f"PPM has a highest value of {depth[0].decode(errors='replace')}")
    if at > SIMPLE_PPM_HEADER or not (kind == b"P4" or (kind in (b"P5", b"P6") and depth == [b"255"])):
        raise _NotSimpleError


def _check_slow(data: bytes, found: _Found, what: str) -> None:
    if len(data) > found.limits.max_slow_bytes:
        raise TooComplexError(
            "slow_encoding",
            f"The {what}, which takes too long to decode above {found.limits.max_slow_bytes / MIB:.3g} MiB. "
            "Save it again as PNG or JPEG.",
        )


def _u16(data: bytes, at: int, order: str = ">") -> int:
    value: int = (_U16_BIG if order == ">" else _U16_LITTLE)(data, at)[0]
    return value


_U16_BIG, _U16_LITTLE = struct.Struct(">H").unpack_from, struct.Struct("<H").unpack_from


# By the first bytes, at least all that Pillow's plug-ins of these formats take.
_WALKS = (
    (b"\xff\xd8", "JPEG", _jpeg),
    (b"\x89PNG\r\n\x1a\n", "PNG", _png),
    (b"RIFF", "WEBP", _webp),
    (b"GIF8", "GIF", _gif),
    (b"BM", "BMP", _bmp),
    ((b"II", b"MM"), "TIFF", _tiff),
    (b"P", "PPM", _ppm),
)
