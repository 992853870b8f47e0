"""Find images that decode without an error although pixels are missing.

Decoders fill the gap: libjpeg with gray where the data of a JPEG ends before its end marker, Pillow with zeros where that of a
PNG ends before its last row. An image may end in such pixels for good, so its data is examined only then.
"""

from __future__ import annotations

import re
import struct
import zlib

from PIL import Image

MID_GRAY = (127, 128)  # 127 in an inverted channel
PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by color type
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
CHUNK_BYTES = 1 << 20
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_WITHOUT_LENGTH = (0x01, 0xD8)


def may_lack_pixels(image: Image.Image) -> bool:
    """Return whether a loaded JPEG or PNG ends in the pixels that decoders leave where data is missing."""
    width, height = image.size
    if image.format in ("JPEG", "MPO"):
        corner = image.getpixel((width - 1, height - 1))
        return all(value in MID_GRAY for value in (corner if isinstance(corner, tuple) else (corner,)))
    if image.format == "PNG":  # the last pass of an interlaced one has every second row
        rows = (image.crop((0, y, width, y + 1)) for y in range(max(0, height - 2), height))
        return any(not row.tobytes().strip(b"\0") for row in rows)
    return False


def jpeg_end(data: bytes) -> int | None:
    """Return the position of the end marker of the first image of a file, past those of thumbnails in its metadata."""
    at = 2
    while marker := _JPEG_MARKER.search(data, at):
        kind, at = data[marker.end() - 1], marker.end()
        if kind == 0xD9:
            return marker.start()
        if kind not in _WITHOUT_LENGTH:
            at += int.from_bytes(data[at : at + 2], "big")
    return None


def png_lacks_rows(data: bytes) -> bool:
    """Return whether the compressed data of a PNG is shorter than its size requires."""
    width, height, depth, color = struct.unpack_from(">IIBB", data, 16)
    bits = depth * PNG_CHANNELS[color]
    passes = ADAM7 if data[28] else ((0, 0, 1, 1),)
    missing = sum(_pass_bytes(-(-(width - x) // dx), -(-(height - y) // dy), bits) for x, y, dx, dy in passes)
    stream, at = zlib.decompressobj(), 8
    while missing > 0 and not stream.eof and at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        rest = data[at + 8 : end - 4] if data[at + 4 : at + 8] == b"IDAT" else b""
        while rest and missing > 0 and not stream.eof:
            missing -= len(stream.decompress(rest, CHUNK_BYTES))
            rest = stream.unconsumed_tail
        at = end
    return missing > 0


def _pass_bytes(columns: int, rows: int, bits: int) -> int:
    """Return the number of bytes of the rows of a pass, each with its filter type."""
    return rows * (1 + -(-columns * bits // 8)) if columns > 0 and rows > 0 else 0
