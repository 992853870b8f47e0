"""Unusual, broken and malicious image files, reproducible, as a public server receives them."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pillow_heif
from PIL import Image, PngImagePlugin, TiffImagePlugin

SIZE = (61, 47)
pillow_heif.register_heif_opener()  # for Image.save


def odd_images() -> dict[str, bytes]:
    """Return the files by description."""
    found: dict[str, bytes] = {}
    for source in (_modes, _jpegs, _pngs, _tiffs, _bitmaps, _plain_maps, _animations, _phones, _not_photos, _broken):
        for name, data in source():
            assert name not in found, name
            found[name] = data
    return found


def picture(mode: str = "RGB", size: tuple[int, int] = SIZE) -> Image.Image:
    """Soft noise in any mode."""
    noise = np.random.default_rng(7).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    soft = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
    if mode in ("RGB", "L", "1", "P", "CMYK", "YCbCr", "HSV", "LAB", "RGBA", "F", "I"):
        return soft.convert(mode)
    if mode == "I;16":
        return Image.fromarray(np.asarray(soft.convert("L"), np.uint16) * 257)
    return soft.convert("RGBA").convert(mode)


def saved(photo: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    photo.save(file, form, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes, *, length: int | None = None, crc: int | None = None) -> bytes:
    """Return a PNG chunk, optionally with a false length or checksum."""
    size = len(data) if length is None else length
    return struct.pack(">I", size) + kind + data + struct.pack(">I", zlib.crc32(kind + data) if crc is None else crc)


def png(*chunks: bytes, width: int = 8, height: int = 8, depth: int = 8, color: int = 2, interlaced: int = 0) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlaced)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks) + chunk(b"IEND", b"")


def _modes() -> Iterator[tuple[str, bytes]]:
    """Every mode in every format that supports it."""
    modes = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "La", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "F")
    for form in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"):
        for mode in modes:
            try:
                yield f"{form} of mode {mode}", saved(picture(mode), form)
            except (OSError, ValueError, KeyError):  # the format has no such mode
                continue


def _jpegs() -> Iterator[tuple[str, bytes]]:
    plain = saved(picture(), "JPEG")
    yield "progressive JPEG", saved(picture(), "JPEG", progressive=True)
    for name in ("4:4:4", "4:2:2", "4:2:0", "4:1:1"):
        yield f"JPEG {name}", saved(picture(), "JPEG", subsampling=name)
    yield "JPEG with restart markers", saved(picture(), "JPEG", restart_marker_blocks=2)
    yield "JPEG of quality 1", saved(picture(), "JPEG", quality=1)
    yield "JPEG that says arithmetic coding", plain.replace(b"\xff\xc0", b"\xff\xc9", 1)
    yield "JPEG that says lossless", plain.replace(b"\xff\xc0", b"\xff\xc3", 1)
    start = plain.index(b"\xff\xc0")
    for name, size in (("no size", b"\0\0\0\0"), ("no height", b"\0\0\0\x3d"), ("65535 square", b"\xff\xff\xff\xff")):
        yield f"JPEG of {name}", plain[: start + 5] + size + plain[start + 9 :]
    yield "JPEG of 12 bits", plain[: start + 4] + b"\x0c" + plain[start + 5 :]
    yield "JPEG of 200 parts", plain[: start + 9] + b"\xc8" + plain[start + 10 :]
    yield "JPEG with junk behind it", plain + bytes(10_000)
    yield "JPEG with junk before it", bytes(10) + plain
    yield "JPEG without tables", b"\xff\xd8" + plain[plain.index(b"\xff\xc0") :]
    yield "JPEG of markers only", b"\xff\xd8" + b"\xff\xe0\x00\x02" * 1000 + b"\xff\xd9"
    yield "JPEG of a soi", b"\xff\xd8\xff"
    tags = Image.Exif()
    tags[0x0112] = 99
    yield "JPEG turned in a way there is not", saved(picture(), "JPEG", exif=tags)
    yield "JPEG with EXIF that breaks off", saved(picture(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\xff\x01\x12")
    yield (
        "JPEG with EXIF that points to itself",
        saved(picture(), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\1\0\x69\x87\4\0\1\0\0\0\x08\0\0\0\x08\0\0\0"),
    )
    yield "JPEG with a profile that is none", saved(picture(), "JPEG", icc_profile=b"no profile" * 50)
    yield "JPEG with a comment of 60 kB", saved(picture(), "JPEG", comment=b"x" * 60_000)
    yield "CMYK JPEG, Adobe's way", saved(picture("CMYK"), "JPEG")
    second = picture().resize((20, 10))
    yield "MPO", saved(picture(), "MPO", save_all=True, append_images=[second])
    yield "MPO that breaks off", saved(picture(), "MPO", save_all=True, append_images=[second])[:-200]


def _pngs() -> Iterator[tuple[str, bytes]]:
    lines = chunk(b"IDAT", zlib.compress((b"\0" + b"\x80\x20\x20" * 8) * 8))
    yield "PNG with a wrong checksum", png(chunk(b"IDAT", zlib.compress(b"\0" * 200), crc=1))
    yield "PNG with a wrong checksum of a comment", png(chunk(b"tEXt", b"a\0b", crc=1), lines)
    yield "PNG without pixels", png()
    yield "PNG with too few lines", png(chunk(b"IDAT", zlib.compress(b"\0" * 50)))
    yield "PNG with too many lines", png(chunk(b"IDAT", zlib.compress(b"\0" * 5000)))
    yield "PNG with lines that are no zlib", png(chunk(b"IDAT", b"nonsense" * 10))
    yield "PNG of no width", png(lines, width=0)
    yield "PNG of 2147483647 square", png(lines, width=2**31 - 1, height=2**31 - 1)
    yield "PNG of 4294967295 wide", png(lines, width=2**32 - 1, height=1)
    yield (
        "PNG of 100 million pixels",
        png(chunk(b"IDAT", zlib.compress(bytes(10_000 * 1251))), width=10_000, height=10_000, depth=1, color=0),
    )
    yield "PNG of a depth there is not", png(lines, depth=3)
    yield "PNG of a colour there is not", png(lines, color=5)
    yield "PNG of a palette that is missing", png(lines, color=3)
    yield "PNG of a palette of 1000", png(chunk(b"PLTE", bytes(3000)), lines, color=3)
    yield "interlaced PNG", png(chunk(b"IDAT", zlib.compress(bytes(500))), interlaced=1)
    yield "PNG of 16 bits", png(chunk(b"IDAT", zlib.compress((b"\0" + bytes(range(48))) * 8)), depth=16)
    yield "PNG of one pixel", png(chunk(b"IDAT", zlib.compress(b"\0\x80\x20\x20")), width=1, height=1)
    yield "PNG a million wide", png(chunk(b"IDAT", zlib.compress(bytes(3_000_001))), width=1_000_000, height=1)
    yield "PNG a million high", png(chunk(b"IDAT", zlib.compress(bytes(4_000_000))), width=1, height=1_000_000)
    bomb = zlib.compress(bytes(80 << 20), 9)
    yield "PNG with a text of 80 MB", png(chunk(b"zTXt", b"a\0\0" + bomb), lines)
    yield "PNG with international text of 80 MB", png(chunk(b"iTXt", b"a\0\1\0\0\0" + bomb), lines)
    yield "PNG with a profile of 80 MB", png(chunk(b"iCCP", b"a\0\0" + bomb), lines)
    yield "PNG with 20,000 comments", png(*[chunk(b"tEXt", b"a\0b")] * 20_000, lines)
    yield "PNG with a chunk that says it is 2 GB", png(chunk(b"tEXt", b"a\0b", length=2**31), lines)
    yield "PNG with an unknown chunk that matters", png(chunk(b"ABCD", b"x"), lines)
    yield "PNG with two headers", png(chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 8, 0, 0, 0, 0)), lines)
    yield "PNG with EXIF that is none", png(chunk(b"eXIf", b"nonsense"), lines)
    yield "PNG with a transparency that is too short", png(chunk(b"tRNS", b"\0"), lines)
    yield "animated PNG of no frames", png(chunk(b"acTL", struct.pack(">II", 0, 0)), lines)
    yield "animated PNG of four thousand million frames", png(chunk(b"acTL", struct.pack(">II", 2**32 - 1, 0)), lines)
    yield "animated PNG without its frames", png(chunk(b"acTL", struct.pack(">II", 5, 0)), lines)
    text = PngImagePlugin.PngInfo()
    text.add_text("Software", "x" * 100_000, zip=True)
    yield "PNG with a long text", saved(picture(), "PNG", pnginfo=text)


def _tiffs() -> Iterator[tuple[str, bytes]]:
    for way in ("tiff_lzw", "tiff_deflate", "packbits", "jpeg", "tiff_adobe_deflate"):
        yield f"TIFF, {way}", saved(picture(), "TIFF", compression=way)
    for way in ("group3", "group4"):
        yield f"TIFF, {way}", saved(picture("1"), "TIFF", compression=way)
    yield "TIFF of big endian", saved(picture("I;16"), "TIFF")[:4] + b"\0\0\0\0"
    yield "TIFF of 100 pictures", saved(picture("L", (8, 8)), "TIFF", save_all=True, append_images=[picture("L", (8, 8))] * 99)
    plain = saved(picture("L"), "TIFF")
    (start,) = struct.unpack("<I", plain[4:8])
    (tags,) = struct.unpack("<H", plain[start : start + 2])
    end = start + 2 + 12 * tags
    yield "TIFF whose next picture is itself", plain[:end] + struct.pack("<I", start) + plain[end + 4 :]
    yield "TIFF whose next picture is beyond its end", plain[:end] + struct.pack("<I", 2**31) + plain[end + 4 :]
    yield "TIFF whose first picture is beyond its end", plain[:4] + struct.pack("<I", 2**31) + plain[8:]
    yield "TIFF of 65535 tags", plain[:start] + b"\xff\xff" + plain[start + 2 :]
    for index in range(tags):
        at = start + 2 + 12 * index
        (tag,) = struct.unpack("<H", plain[at : at + 2])
        yield f"TIFF with a huge value of tag {tag}", plain[: at + 8] + b"\xff\xff\xff\x7f" + plain[at + 12 :]
        yield f"TIFF with a huge count of tag {tag}", plain[: at + 4] + b"\xff\xff\xff\x7f" + plain[at + 8 :]
        yield f"TIFF without the tag {tag}", plain[:at] + b"\xfe\xff" + plain[at + 2 :]
    odd = TiffImagePlugin.ImageFileDirectory_v2()
    odd[270] = "x" * 100_000
    odd[65000] = tuple(range(1000))
    yield "TIFF with tags of its own", saved(picture(), "TIFF", tiffinfo=odd)
    yield "TIFF of 65536 bits", plain.replace(struct.pack("<HHI", 258, 3, 1), struct.pack("<HHI", 258, 4, 1), 1)


def _bitmaps() -> Iterator[tuple[str, bytes]]:
    plain = saved(picture(), "BMP")
    for name, at, value in (
        ("no width", 18, 0), ("a negative width", 18, -5), ("a huge width", 18, 2**31 - 1), ("no height", 22, 0),
        ("a negative height", 22, -47), ("a height that cannot be negated", 22, -(2**31)), ("an odd compression", 30, 9),
        ("run lengths that are none", 30, 1), ("pixels before its start", 10, 0), ("pixels beyond its end", 10, 2**30),
        ("a palette of 2 thousand million", 46, 2**31 - 1), ("a header of 1 byte", 14, 1), ("a header of 108", 14, 108),
    ):  # fmt: skip
        yield f"BMP with {name}", plain[:at] + struct.pack("<i", value) + plain[at + 4 :]
    for bits in (0, 2, 3, 16, 32, 64):
        yield f"BMP of {bits} bits", plain[:28] + struct.pack("<H", bits) + plain[30:]
    coded = saved(picture("L"), "BMP")
    for bits, way in ((8, 1), (4, 2)):
        body = coded[:28] + struct.pack("<HI", bits, way) + coded[34:]
        yield f"BMP of run lengths in {bits} bits", body
        yield f"BMP of run lengths in {bits} bits that leap out", body[:1078] + b"\0\2\xff\xff" * 200
    yield "a bitmap without its file header", plain[14:]


def _plain_maps() -> Iterator[tuple[str, bytes]]:
    for name, head in (
        ("of no size", b"P6 0 0 255\n"), ("of a negative size", b"P6 -5 5 255\n"),
        ("of a huge size", b"P6 99999999 99999999 255\n"),
        ("of a huge number", b"P6 " + b"9" * 5000 + b" 5 255\n"), ("of no highest value", b"P6 5 5 0\n"),
        ("of a highest value of 70000", b"P6 5 5 70000\n"), ("of 16 bits", b"P6 5 5 65535\n"),
        ("without an end", b"P6 " + b"#" * 9000),
        ("of text", b"P3 5 5 255\n"), ("of bits in text", b"P1 5 5\n"), ("of grey", b"P5 5 5 200\n"), ("of nothing", b"P6"),
        ("of arbitrary depth", b"P7\nWIDTH 5\nHEIGHT 5\nDEPTH 4\nMAXVAL 255\nTUPLTYPE RGB_ALPHA\nENDHDR\n"),
    ):  # fmt: skip
        yield f"portable map {name}", head + b"7 " * 200
    yield "portable map that breaks off", b"P6 50 50 255\n" + bytes(100)
    for name, values in (
        ("not numbers", b"\0\0\xc0\x7f"),
        ("endless", b"\0\0\x80\x7f"),
        ("less than nothing", b"\0\0\x80\xbf"),
    ):
        yield f"float map of values that are {name}", b"Pf\n5 5\n-1.0\n" + values * 25
    yield "float map of a scale of 0", b"Pf\n5 5\n0\n" + bytes(100)
    yield "float map of a scale that is no number", b"Pf\n5 5\nnan\n" + bytes(100)


def _animations() -> Iterator[tuple[str, bytes]]:
    frames = [picture("P").rotate(angle) for angle in (90, 180, 270)]
    moving = saved(picture("P"), "GIF", save_all=True, append_images=frames, loop=0)
    yield "animated GIF", moving
    yield "animated GIF whose second frame breaks off", moving[: len(saved(picture("P"), "GIF")) + 40]
    yield "GIF of no frames", b"GIF89a" + struct.pack("<HHBBB", 5, 5, 0, 0, 0) + b";"
    yield "GIF of a header", b"GIF89a" + struct.pack("<HHBBB", 5, 5, 0, 0, 0)
    yield "GIF of no size", b"GIF89a" + struct.pack("<HHBBB", 0, 0, 0, 0, 0) + saved(picture("P"), "GIF")[13:]
    still = saved(picture("P", (10, 10)), "GIF")
    place = still.index(b",", 13 + 3 * 2 ** ((still[10] & 7) + 1))  # behind the palette
    yield "GIF whose frame lies outside", still[: place + 1] + struct.pack("<HHHH", 60000, 60000, 10, 10) + still[place + 9 :]
    yield "GIF whose frame is 65535 square", still[: place + 1] + struct.pack("<HHHH", 0, 0, 65535, 65535) + still[place + 9 :]
    yield "GIF of 300 comments", still[:place] + b"!\xfe\xff" + b"x" * 255 + b"\0" + still[place:]
    yield "GIF with a code size of 200", still[: place + 10] + b"\xc8" + still[place + 11 :]
    colors = [picture().rotate(angle) for angle in (90, 180)]
    for name, options in (("lossy", {}), ("lossless", {"lossless": True})):
        yield f"animated WebP, {name}", saved(picture(), "WEBP", save_all=True, append_images=colors, **options)
    yield "lossless WebP", saved(picture("RGBA"), "WEBP", lossless=True)
    webp = saved(picture(), "WEBP")
    yield "WebP that says it is 4 GB", webp[:4] + b"\xff\xff\xff\xff" + webp[8:]
    yield "WebP of nothing", b"RIFF\x04\0\0\0WEBP"
    apng = saved(picture(), "PNG", save_all=True, append_images=colors)
    yield "animated PNG", apng
    yield "animated PNG that breaks off", apng[: len(apng) * 2 // 3]


def _phones() -> Iterator[tuple[str, bytes]]:
    second = picture(size=(64, 64))
    for form in ("HEIF", "AVIF"):
        for mode in ("RGB", "RGBA", "L"):
            yield f"{form} of mode {mode}", saved(picture(mode), form)
        yield f"{form} of one pixel", saved(picture(size=(1, 1)), form)
        yield f"{form} with a profile that is none", saved(picture(), form, icc_profile=b"no profile" * 50)
        yield f"{form} with junk behind it", saved(picture(), form) + b"SEFH" * 100
    yield "HEIF of tiles", saved(picture(size=(150, 100)), "HEIF", tile_size=64)
    yield "HEIF of two images", saved(picture(), "HEIF", save_all=True, append_images=[second])
    yield "HEIF with a preview", saved(picture(), "HEIF", thumbnails=[32])
    yield "AVIF of several frames", saved(picture(), "AVIF", save_all=True, append_images=[picture().rotate(180)])
    yield "HEIC of nothing", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200)


def _not_photos() -> Iterator[tuple[str, bytes]]:
    for form in ("EPS", "PDF", "ICO", "TGA", "PCX", "SGI", "MSP", "XBM", "DDS", "ICNS", "JPEG2000", "SPIDER", "QOI"):
        mode = "1" if form in ("MSP", "XBM") else "F" if form == "SPIDER" else "RGB"
        try:
            yield form, saved(picture(mode, (32, 32)), form)
        except (OSError, KeyError, ValueError):  # this Pillow was built without it
            continue
    yield "SVG", b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
    yield "PSD", b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 9, 9, 8, 3) + bytes(500)
    yield "HTML", b"<!doctype html><title>x</title>"
    yield "a zip", b"PK\3\4" + bytes(100)
    yield "a program", b"\x7fELF" + bytes(200)
    yield "a video", b"\0\0\0\x18ftypmp42" + bytes(200)
    yield "one zero", b"\0"
    yield "a line's end", b"\n"
    yield "a megabyte of zeros", bytes(1 << 20)
    yield "EPS that loops", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n{} loop\n"


def _broken() -> Iterator[tuple[str, bytes]]:
    """Valid files truncated at every tenth, and with flipped bits."""
    rng = random.Random(11)
    for form, options in (
        ("JPEG", {}), ("PNG", {}), ("WEBP", {}), ("GIF", {}), ("BMP", {}), ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "jpeg"}), ("PPM", {}), ("HEIF", {}), ("AVIF", {}),
    ):  # fmt: skip
        whole = saved(picture("P" if form == "GIF" else "RGB"), form, **options)
        name = "-".join((form, *options.values()))
        for tenth in range(1, 10):
            yield f"{name}, {tenth} tenths of it", whole[: len(whole) * tenth // 10]
        for number in range(12):
            turned = bytearray(whole)
            reach = len(whole) if number % 2 else min(len(whole), 120)  # every other time in its head
            for _ in range(3):
                turned[rng.randrange(reach)] ^= 1 << rng.randrange(8)
            yield f"{name} with three bits turned over, {number}", bytes(turned)
