"""Small files that take a decoder long or make it allocate a lot of memory. No real program writes them."""

from __future__ import annotations

import functools
import io
import struct
import zlib

from PIL import Image

from tests.helpers.odd_images import SIZE, chunk, picture, png, saved
from tests.helpers.phone_images import box, coded, grid, heif, overlay

MIB = 1 << 20
LINES = chunk(b"IDAT", zlib.compress((b"\0" + b"\x80\x20\x20" * 8) * 8))


@functools.cache
def progressive(scans: int, side_px: int = 64) -> bytes:
    """A progressive JPEG that repeats its last refinement scan ``scans`` times."""
    data = saved(Image.new("RGB", (side_px, side_px), (120, 130, 140)), "JPEG", quality=50, progressive=True)
    start, end = _last_scan(data)
    return data[:start] + data[start:end] * scans + data[end:]


def hidden_scans(scans: int, side_px: int) -> bytes:
    """Return ``progressive`` with a comment before the scans that contains an end-of-image marker."""
    data = progressive(scans, side_px)
    start, _ = _last_scan(saved(Image.new("RGB", (side_px, side_px), (120, 130, 140)), "JPEG", quality=50, progressive=True))
    return data[:start] + b"\xff\xfe\x00\x04\xff\xd9" + data[start:]


def _last_scan(data: bytes) -> tuple[int, int]:
    """Return the start and end of the last refinement scan of the first component."""
    found, at = (0, 0), data.index(b"\xff\xda")
    while at > 0:
        end = at + 2
        while not (data[end] == 0xFF and data[end + 1] and not 0xD0 <= data[end + 1] <= 0xD7):
            end += 1
        if data[at + 4 : at + 6] == b"\1\1" and data[at + 7] == 1:
            found = at, end
        at = data.find(b"\xff\xda", end)
    return found


def jpeg_with(inserted: bytes) -> bytes:
    """A JPEG with bytes inserted after its first marker."""
    data = saved(picture(), "JPEG")
    return data[:2] + inserted + data[2:]


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, 2 + len(body)) + body


def overlapping_tags(number: int, size: int) -> bytes:
    """EXIF whose tags all refer to the same bytes."""
    tags = b"".join(struct.pack("<HHII", 1000 + i, 7, size, 8) for i in range(number))
    return (b"II*\0\x08\0\0\0" + struct.pack("<H", number) + tags).ljust(size + 8, b"\0")


def tiff(tags: list[tuple[int, int, int, int]], data: bytes = b"") -> bytes:
    """A TIFF of the tags (tag, type, count, value or offset), with ``data`` at ``tiff_data_at(len(tags))``."""
    rows = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + rows + bytes(4) + data


def tiff_data_at(tags: int) -> int:
    return 8 + 2 + 12 * tags + 4


def tiff_tile(side_px: int) -> bytes:
    """A TIFF of 100 x 100 pixels in one tile of ``side_px`` squared."""
    data = zlib.compress(bytes(1000))
    tags = [(256, 4, 1, 100), (257, 4, 1, 100), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1)]
    tags += [(322, 4, 1, side_px), (323, 4, 1, side_px), (324, 4, 1, tiff_data_at(10)), (325, 4, 1, len(data))]
    return tiff(tags, data)


def big_tiff_tile(side_px: int) -> bytes:
    """The same as a big-endian BigTIFF."""
    tags = [(256, 4, 100), (257, 4, 100), (258, 3, 8), (259, 3, 8), (262, 3, 1), (277, 3, 1), (322, 4, side_px)]
    tags += [(323, 4, side_px), (324, 16, 248), (325, 16, 20)]
    rows = b"".join(
        struct.pack(">HHQ", tag, kind, 1) + (struct.pack(">H6x", value) if kind == 3 else struct.pack(">I4x", value))
        if kind < 16
        else struct.pack(">HHQQ", tag, kind, 1, value)
        for tag, kind, value in tags
    )
    return b"MM\0\x2b\0\x08\0\0" + struct.pack(">QQ", 16, len(tags)) + rows + bytes(8) + zlib.compress(bytes(1000))


def tiff_strips(number: int) -> bytes:
    """A TIFF of ``number`` lines, one per strip."""
    tags = [(256, 4, 1, 2), (257, 4, 1, number), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (277, 3, 1, 1)]
    at = tiff_data_at(9)
    tags += [(273, 4, number, at), (278, 4, 1, 1), (279, 4, number, at)]
    return tiff(sorted(tags), struct.pack("<I", 8) * number)


def webp_canvas(side_px: int) -> bytes:
    """An animation of small frames with a declared canvas of ``side_px`` squared."""
    frames = [Image.new("RGB", (64, 64), (shade, 0, 0)) for shade in (10, 20, 30)]
    data = bytearray(saved(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True))
    data[24:30] = struct.pack("<I", side_px - 1)[:3] * 2
    return bytes(data)


def run_lengths(length: int, *, bits: int = 8, size: tuple[int, int] = (5000, 4000)) -> bytes:
    """A run-length encoded BMP of about ``length`` bytes."""
    info = struct.pack("<IiiHHIIiiII", 40, *size, 1, bits, 1 if bits == 8 else 2, 0, 0, 0, 256, 0)
    return struct.pack("<2sIHHI", b"BM", 0, 0, 0, 54 + 1024) + info + bytes(1024) + b"\x01\x05" * (length // 2)


def gif_with(inserted: bytes) -> bytes:
    """A GIF with bytes inserted before its first frame."""
    data = saved(picture("P"), "GIF")
    place = data.index(b",", 13 + 3 * 2 ** ((data[10] & 7) + 1))
    return data[:place] + inserted + data[place:]


def rejected() -> dict[str, tuple[bytes, str]]:
    """Files that are rejected by their structure: name -> (the file, the reason)."""
    gif = saved(picture("P"), "GIF")
    frame = gif.index(b",", 13 + 3 * 2 ** ((gif[10] & 7) + 1))
    size = b"%d %d " % SIZE
    tile = coded(picture(size=(64, 64)))
    return {
        "JPEG of 6,000 scans": (progressive(6000), "jpeg_scans"),
        "JPEG of padding": (jpeg_with(b"\xff" * MIB), "segments"),
        "JPEG of junk between segments": (jpeg_with(segment(0xFE, b"") + bytes(MIB)), "segments"),
        "JPEG of application segments": (jpeg_with(segment(0xE5, b"") * 300_000), "segments"),
        "JPEG of comments": (jpeg_with(segment(0xFE, b"") * 300_000), "segments"),
        "JPEG of quantization tables": (jpeg_with(segment(0xDB, (b"\0" + b"\1" * 64) * 1000) * 60), "segments"),
        "JPEG of Photoshop's blocks": (
            jpeg_with(segment(0xED, b"Photoshop 3.0\0" + b"8BIM\x04\x04\0\0\0\0\0\0" * 5000) * 20), "segments",
        ),
        "PNG of empty chunks": (png(chunk(b"abCd", b"") * 100_000, LINES), "segments"),
        "PNG of empty chunks behind its pixels": (png(LINES, chunk(b"abCd", b"") * 100_000), "segments"),
        "PNG of empty pixels": (png(chunk(b"IDAT", b"") * 100_000, LINES), "segments"),
        "PNG of texts": (png(chunk(b"tEXt", b"a\0b") * 100_000, LINES), "segments"),
        "GIF of comments": (gif_with(b"!\xfe" + b"\1x" * MIB + b"\0"), "segments"),
        "GIF of extensions": (gif_with(b"!\xf9\0" * MIB), "segments"),
        "GIF of junk": (gif_with(b"x" * MIB), "segments"),
        "GIF of junk behind its frame": (gif[:-1] + b"x" * MIB, "segments"),
        "GIF of tiny blocks": (gif[: frame + 11] + b"\1\0" * MIB + gif[frame + 11 :], "segments"),
        "TIFF of two million strips": (tiff_strips(2_000_000), "segments"),
        "TIFF of overlapping tags": (overlapping_tags(60_000, MIB), "tags"),
        "TIFF of one huge tile": (tiff_tile(46_336), "pixels"),
        "BigTIFF of one huge tile": (big_tiff_tile(46_336), "pixels"),
        "WebP of a huge canvas": (webp_canvas(16_000), "pixels"),
        "HEIC of a huge grid": (heif({1: grid(1, 1, 60_000, 60_000, [2]), 2: tile}), "pixels"),
        "HEIC of overlays of overlays": (
            heif({1: overlay(9, 9, [2] * 200), 2: overlay(9, 9, [3] * 200), 3: overlay(9, 9, [4] * 200), 4: tile}), "pixels",
        ),
        "HEIC of boxes": (heif({1: tile}) + box(b"free") * 100_000, "segments"),
        "plain PBM of comments": (b"P1 " + size + b"1 #\n" * 1000, "comments"),
        "plain PGM of comments": (b"P2 " + size + b"255\n" + b"1 #\n" * 1000, "comments"),
        "plain PPM of comments": (b"P3 " + size + b"255\n" + b"#\n" * 1000, "comments"),
        "long plain PPM": (b"P3 2000 2000 255\n" + b"1 " * (2 * MIB), "slow_encoding"),
        "PPM of an odd depth": (b"P6 1500 1000 77\n" + bytes(4_500_000), "slow_encoding"),
        "PGM of an odd depth": (b"P5 2000 2000 4095\n" + bytes(8_000_000), "slow_encoding"),
        "PPM of 16 bits": (b"P6 1000 1000 65535\n" + bytes(6_000_000), "slow_encoding"),
        "PPM with a comment of a megabyte": (b"P6 #" + b"x" * MIB + b"\n 9 9 255\n" + bytes(243), "header"),
        "PPM with a megabyte of spaces": (b"P6 " + b" " * MIB + b"9 9 255\n" + bytes(243), "header"),
        "BMP of run lengths": (run_lengths(8 * MIB), "slow_encoding"),
        "BMP of more run lengths than pixels": (run_lengths(MIB, size=(100, 100)), "run_lengths"),
        "BMP of more short run lengths than pixels": (run_lengths(MIB, bits=4, size=(100, 100)), "run_lengths"),
    }  # fmt: skip


def isolated() -> dict[str, bytes]:
    """Files whose cost is only known after decoding. Some are harmless, some are decoded until the timeout."""
    tags = overlapping_tags(5000, 60_000)
    jpeg = progressive(6000, 256)
    strip = [(256, 4, 1, 256), (257, 4, 1, 256), (258, 3, 1, 8), (259, 3, 1, 7), (262, 3, 1, 6)]
    strip += [(273, 4, 1, tiff_data_at(9)), (277, 3, 1, 3), (278, 4, 1, 256), (279, 4, 1, len(jpeg))]
    raw = b"Raw profile type exif\0\nexif\n 900\n" + overlapping_tags(8000, 100_000).hex().encode()
    return {
        "JPEG whose scans come behind a comment": hidden_scans(300, 64),
        "JPEG of overlapping tags": jpeg_with(segment(0xE1, b"Exif\0\0" + tags)),
        "JPEG of overlapping tags of several pictures": jpeg_with(segment(0xE2, b"MPF\0" + tags)),
        "JPEG in pieces of EXIF": jpeg_with(segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0\0\0") * 2),
        "JPEG of 300 comments": jpeg_with(segment(0xFE, b"") * 300),
        "PNG of overlapping tags": png(chunk(b"eXIf", overlapping_tags(8000, 100_000)), LINES),
        "PNG of overlapping tags in text": png(chunk(b"tEXt", raw), LINES),
        "PNG of overlapping tags in compressed text": png(chunk(b"zTXt", raw[:22] + b"\0" + zlib.compress(raw[22:])), LINES),
        "PNG of 5,000 chunks": png(chunk(b"abCd", b"") * 5000, LINES),
        "PNG of 100 texts": png(chunk(b"tEXt", b"a\0b") * 100, LINES),
        "PNG of several frames": saved(picture(), "PNG", save_all=True, append_images=[picture().rotate(90)]),
        "WebP of several frames": webp_canvas(64),
        "GIF of 10,000 comments": gif_with(b"!\xfe" + b"\1x" * 10_000 + b"\0"),
        "TIFF": saved(picture(), "TIFF"),
        "TIFF of JPEG scans": tiff(strip, jpeg),
        "TIFF of 1,000 strips": saved(picture("L", (4, 1000)), "TIFF", compression="tiff_lzw", tiffinfo={278: 1}),
        "TIFF of a large tile": tiff_tile(2000),
        "BMP of run lengths": run_lengths(0, size=(40, 30)) + b"\x28\x05\0\0" * 30 + b"\0\1",
        "plain PPM": b"P3 2 2 255\n" + b"7 " * 12,
        "PGM of 12 bits": b"P5 4 4 4095\n" + bytes(32),
        "float map": b"Pf\n5 5\n-1.0\n" + bytes(100),
        "PPM with a comment of 2 kB": b"P6 #" + b"x" * 2000 + b"\n 9 9 255\n" + bytes(243),
        "nothing behind a JPEG's first bytes": b"\xff\xd8\xff",
    }


def simple() -> dict[str, bytes]:
    """Ordinary files, which must not need the decoder process."""
    tags = Image.Exif()
    tags[0x0112], tags[0x010F], tags.get_ifd(0x8769)[0x9286] = 6, "a camera", b"x" * 20_000
    file = io.BytesIO()
    picture().save(file, "MPO", save_all=True, append_images=[picture()])
    photoshop = segment(0xED, b"Photoshop 3.0\0" + b"8BIM\x04\x04\0\0" + struct.pack(">I", 50_000) + bytes(50_000))
    moving = saved(picture(), "JPEG") + b"\xff\xda\xff\xd8" * 1000  # a phone's video follows the photo
    found = {
        "JPEG": saved(picture(), "JPEG"),
        "JPEG of a phone": saved(picture(), "JPEG", exif=tags, icc_profile=bytes(3000), comment=b"x"),
        "JPEG of two pictures": file.getvalue(),
        "JPEG with a video": moving,
        "JPEG of Photoshop": jpeg_with(photoshop),
        "progressive JPEG": saved(picture(), "JPEG", progressive=True),
        "CMYK JPEG": saved(picture("CMYK"), "JPEG"),
        "PNG with a profile and EXIF": saved(picture("RGBA"), "PNG", exif=tags, icc_profile=bytes(3000)),
        "interlaced PNG": png(chunk(b"IDAT", zlib.compress(bytes(500))), interlaced=1),
        "WebP": saved(picture(), "WEBP"),
        "WebP with a profile and EXIF": saved(picture("RGBA"), "WEBP", exif=tags, icc_profile=bytes(3000)),
        "lossless WebP": saved(picture(), "WEBP", lossless=True),
        "GIF": saved(picture("P"), "GIF"),
        "GIF of several frames": saved(picture("P"), "GIF", save_all=True, append_images=[picture("P").rotate(90)]),
        "BMP": saved(picture(), "BMP"),
        "BMP of masks": saved(picture("RGBA"), "BMP"),
        "PPM": saved(picture(), "PPM"),
        "PPM with a comment": b"P6\n# made by hand\n9 9\n# and again\n255\n" + bytes(243),
        "PGM": saved(picture("L"), "PPM"),
        "PBM": saved(picture("1"), "PPM"),
        "not an image": b"hello",
        "nothing": b"",
    }
    return found | {f"{name}, 50 kB": saved(picture(size=(900, 700)), name) for name in ("JPEG", "PNG", "WEBP")}
