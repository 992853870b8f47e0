"""Image preprocessing: decode a file, apply its EXIF orientation, resize and crop.

Normalization is the network's first layer (``models.networks.classifier.Normalize``), so the exported graph takes plain
pixels. Only Pillow and NumPy are needed, and pillow-heif for HEIC. Training and serving both call ``Preprocessing.pixels``,
so their inputs are identical.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import AvifImagePlugin, Image, ImageOps, UnidentifiedImageError, features

from models.errors import ImageError, ImageTooLargeError, TooComplexError, UnsupportedImageError, UserError
from models.heif_structure import file_format, hide_sequence
from models.image_structure import DEFAULT_LIMITS, Limits, examine
from models.missing_pixels import jpeg_end, may_lack_pixels, png_lacks_rows

INTERPOLATIONS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # Pillow's other decoders are risky: EPS runs Ghostscript
HAS_AVIF = importlib.util.find_spec("PIL._avif") is not None  # a Pillow that was built without libavif has none
HAS_HEIF = importlib.util.find_spec("pillow_heif") is not None  # the extra "heic"
IMAGE_FORMATS_TEXT = f"JPEG, PNG, WebP, {'AVIF, ' * HAS_AVIF}{'HEIC, ' * HAS_HEIF}GIF, BMP, TIFF or PPM"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
SIGNATURES = (b"\xff\xd8\xff", PNG_SIGNATURE, b"GIF87a", b"GIF89a")
VIDEO_BRANDS = (b"isom", b"iso2", b"mp41", b"mp42", b"avc1", b"M4V ", b"qt  ", b"3gp4", b"3gp5")
JPEG_END = b"\xff\xd9"
JPEG_FILLERS = (b"\x5a\x3c\x96\xe1" * 16, b"\xa5\xc3\x69\x1e" * 16)
MIN_DECODE_PX = 512
ImageInspector = Callable[[Image.Image], None]

# Pillow warns about odd metadata, but the pixels are usable. This is not in decode because catch_warnings is not thread-safe.
warnings.filterwarnings("ignore", module=r"PIL\.")
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # images are decoded in parallel, not parts of one


@dataclass(frozen=True)
class Preprocessing:
    """The preprocessing parameters of a network.

    Attributes:
        input_px: Side of the square center crop, in pixels.
        resize_px: Length of the shorter side before cropping, in pixels.
        interpolation: A key of ``INTERPOLATIONS``.
        mean: Mean per channel of pixels scaled to 0..1: three values for RGB, one for grayscale.
        std: Standard deviation per channel, on the same scale.
    """

    input_px: int = 224
    resize_px: int = 256
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    @property
    def channels(self) -> int:
        return len(self.mean)

    @property
    def decode_px(self) -> int:
        """Minimum shorter side of a large image after decoding, in pixels: twice ``resize_px``, but at least 512.

        JPEG can be decoded at 1/2, 1/4 or 1/8 of its size. For a 12-megapixel photo this takes a third of the time. The
        cropped pixels differ by 0.3 levels on average, and 99% of them by at most 2.
        """
        return max(MIN_DECODE_PX, 2 * self.resize_px)

    def sha256(self) -> str:
        """Hash the parameters, so that any change can be detected."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def decode(
        self, data: bytes, *, inspect: ImageInspector | None = None, limits: Limits | None = DEFAULT_LIMITS
    ) -> Image.Image:
        """Decode an image at the resolution that this network needs (``decode_px``). See ``decode``."""
        return decode(data, min_side_px=self.decode_px, inspect=inspect, limits=limits)

    def pixels(
        self, data: bytes, *, inspect: ImageInspector | None = None, limits: Limits | None = DEFAULT_LIMITS
    ) -> NDArray[np.uint8]:
        """Decode an image and convert it to the network's input: (input_px, input_px, channels) uint8. See ``decode``."""
        return self.crop(self.decode(data, inspect=inspect, limits=limits))

    def crop(self, photo: Image.Image) -> NDArray[np.uint8]:
        """Resize and crop an image to the network's input.

        Only the region inside the crop is resampled. The result matches torchvision's Resize and CenterCrop up to rounding:
        a few pixels in a thousand differ by 1 level, rarely by 2.

        Returns:
            (input_px, input_px, channels) uint8.
        """
        short_px = min(photo.size)
        x_first, x_end, left, right = self._crop_range(photo.width, short_px)
        y_first, y_end, top, bottom = self._crop_range(photo.height, short_px)
        region = photo.crop((x_first, y_first, x_end, y_end))
        # Resize one axis at a time: Pillow's order of the axes depends on its version and affects the pixels.
        resample = INTERPOLATIONS[self.interpolation]
        narrow = region.resize((self.input_px, region.height), resample, (left, 0, right, region.height))
        square = narrow.resize((self.input_px, self.input_px), resample, (0, top, self.input_px, bottom))
        pixels = np.asarray(_as_mode(square, "RGB" if self.channels == 3 else "L"))
        return pixels.reshape(self.input_px, self.input_px, self.channels)

    def _crop_range(self, side_px: int, short_px: int) -> tuple[int, int, float, float]:
        """Return the pixel range [first, end) that the crop needs along one side, and the crop's bounds within that range."""
        new_px = self.resize_px if side_px == short_px else int(self.resize_px * side_px / short_px)
        offset_px = round((new_px - self.input_px) / 2.0)
        begin, end = offset_px * side_px / new_px, (offset_px + self.input_px) * side_px / new_px
        reach = 2 * max(1.0, side_px / new_px) + 1  # covers the support of both filters
        first = max(0, math.floor(begin - reach))
        return first, min(side_px, math.ceil(end + reach)), begin - first, end - first


def decode(
    data: bytes,
    *,
    min_side_px: int | None = None,
    inspect: ImageInspector | None = None,
    limits: Limits | None = DEFAULT_LIMITS,
) -> Image.Image:
    """Decode the first frame of an image to RGB and apply its EXIF orientation.

    Transparent areas become white, 16-bit grayscale is scaled (not clipped) to 8 bits, and CMYK is converted.

    Args:
        data: The bytes of the file.
        min_side_px: Allow a large image to be reduced by powers of two while its shorter side keeps this many pixels.
        inspect: Called with the opened image before its pixels are decoded. It may reject the image with a UserError.
        limits: Reject files that are built to be slow. None if the file's structure has been examined already.

    Returns:
        An RGB image.

    Raises:
        UnsupportedImageError: The data is not an image in one of ``IMAGE_FORMATS``.
        ImageTooLargeError: The image has too many pixels.
        TooComplexError: Decoding takes too long or too much memory.
        ImageError: The image is damaged or truncated.
    """
    if limits:
        examine(data, limits)
    try:
        try:
            return _decode(data, min_side_px, inspect)
        except (OSError, ValueError, SyntaxError) as error:
            if (repaired := _repair(data, error)) is None:
                raise
            return _decode(repaired, min_side_px, inspect)
    except UserError:
        raise
    except UnidentifiedImageError:
        raise unidentified(data) from None
    except Image.DecompressionBombError as error:
        raise ImageTooLargeError(f"The image is too large to decode safely ({error}). Use a smaller one.") from None
    except MemoryError:
        raise TooComplexError("memory", "Decoding the image needs too much memory. Save it again as a smaller JPEG.") from None
    except Exception as error:  # Pillow raises many types on damaged data: struct.error, SyntaxError, ...
        raise ImageError(f"The image is damaged and could not be read ({error}). Use another copy.") from None


def _decode(
    data: bytes, min_side_px: int | None, inspect: ImageInspector | None = None, *, find_missing_pixels: bool = True
) -> Image.Image:
    with _open(data) as file:
        if inspect:
            inspect(file)
        if min_side_px:
            file.draft(None, (min_side_px, min_side_px))
        file.load()
        if find_missing_pixels and may_lack_pixels(file) and _lacks_pixels(data):
            raise ImageError("The image is damaged and could not be read (its last pixels are missing). Use another copy.")
        photo = _reduced(file, min_side_px) if min_side_px else file
        with contextlib.suppress(Exception):  # unreadable EXIF does not affect the pixels
            ImageOps.exif_transpose(photo, in_place=True)
        return to_rgb(photo)


def _open(data: bytes) -> Image.Image:
    container = file_format(data)
    if container is None:
        return Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    if container == "AVIF" and not HAS_AVIF:
        raise UnidentifiedImageError
    if container == "HEIF":
        _register_heif()
    file = Image.open(io.BytesIO(hide_sequence(data)), formats=[container])
    file.info.pop("xmp", None)  # Pillow would apply an orientation from there, but the one of the container applies
    return file


@functools.cache
def _register_heif() -> None:
    """Load libheif, which only files of this format need."""
    if not HAS_HEIF:
        raise UnidentifiedImageError
    import pillow_heif

    # Without previews Pillow's ``draft`` decodes the image itself.
    pillow_heif.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False, decode_threads=1)


def decoder_versions() -> dict[str, str | None]:
    """Return the versions of the libraries that pixels depend on."""
    return {
        "pillow": PIL.__version__,
        "jpeg": features.version("jpg"),
        "avif": features.version("avif") if HAS_AVIF else None,
        "heif": importlib.metadata.version("pillow-heif") if HAS_HEIF else None,
    }


def _repair(data: bytes, error: Exception) -> bytes | None:
    """Return data that Pillow decodes where it rejects ``data`` although all pixels are there, or None."""
    if data.startswith(b"\xff\xd8") and any(reason in str(error) for reason in ("truncated", "broken data stream")):
        second = data.find(b"\xff\xd8\xff", data.find(b"\xff\xda"))  # an image that follows without an end marker before it
        return _with_end_marker(data[:second] if second > 0 else data)
    if data.startswith(PNG_SIGNATURE):
        return _without_metadata(data)
    return None


def _lacks_pixels(data: bytes) -> bool:
    if data.startswith(PNG_SIGNATURE):
        return png_lacks_rows(data)
    end = jpeg_end(data)
    return end is not None and _with_end_marker(data[:end]) is None


def _with_end_marker(data: bytes) -> bytes | None:
    """Append the end marker that some cameras omit, or return None if pixels are missing as well.

    If the entropy-coded data is incomplete, the decoder continues in what follows it, also after a restart marker. So the
    pixels are complete if they are the same with two different continuations.
    """
    data = data.rstrip(b"\xff")
    try:
        first, second = (
            _decode(
                data + b"".join(filler + bytes((0xFF, 0xD0 + n)) for n in range(8)) + filler + JPEG_END,
                MIN_DECODE_PX,
                find_missing_pixels=False,
            )
            for filler in JPEG_FILLERS
        )
    except Exception:
        return None
    return data + JPEG_END if first.tobytes() == second.tobytes() else None


def _without_metadata(data: bytes) -> bytes | None:
    """Remove the chunks of a PNG that do not affect its pixels or orientation. None if there are none."""
    chunks, at = [PNG_SIGNATURE], len(PNG_SIGNATURE)
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        is_critical = not data[at + 4] & 0x20
        if is_critical or data[at + 4 : at + 8] in (b"tRNS", b"eXIf"):
            chunks.append(data[at:end])
        at = end
    pixels_only = b"".join(chunks)
    return pixels_only if len(pixels_only) < len(data) else None


def unidentified(data: bytes) -> ImageError:
    """Return the error for a file that no decoder takes. It names the format if that is known."""
    if not data:
        return UnsupportedImageError("The file is empty.")
    container = file_format(data)
    if container == "HEIF" and not HAS_HEIF:
        return UnsupportedImageError(
            f"HEIC needs the package pillow-heif, which is not installed. Install it, or use {IMAGE_FORMATS_TEXT}."
        )
    if container == "AVIF" and not HAS_AVIF:
        return UnsupportedImageError(
            f"AVIF needs a Pillow that was built with libavif. Install it, or use {IMAGE_FORMATS_TEXT}."
        )
    is_webp = data.startswith(b"RIFF") and data[8:12] == b"WEBP"
    if container or is_webp or data.startswith(SIGNATURES) or _is_tiff_without_tags(data):
        return ImageError("The image is damaged and could not be read. Use another copy.")
    name = _unsupported_format(data)
    what = f"{name} is not supported." if name else "This file is not a supported image."
    return UnsupportedImageError(f"{what} Use {IMAGE_FORMATS_TEXT}.")


def _is_tiff_without_tags(data: bytes) -> bool:
    """Return whether a TIFF is cut off: its tags usually follow the pixels."""
    if data[:4] not in (b"II*\0", b"MM\0*"):
        return False
    return int.from_bytes(data[4:8], "little" if data[:2] == b"II" else "big") + 2 > len(data)


def _unsupported_format(data: bytes) -> str | None:
    """Return the name of a common format that is not supported, by the first bytes of the file."""
    if data[:100].lstrip().startswith((b"<svg", b"<?xml")) and b"<svg" in data[:2000]:
        return "SVG"
    if data[4:8] == b"ftyp" and data[8:12] in VIDEO_BRANDS:
        return "Video"
    signatures = {
        b"%PDF-": "PDF",
        b"\0\0\0\x0cjP  \r\n\x87\n": "JPEG 2000",
        b"\xffO\xffQ": "JPEG 2000",
        b"\0\0\0\x0cJXL \r\n\x87\n": "JPEG XL",
        b"\xff\n": "JPEG XL",
    }
    return next((name for start, name in signatures.items() if data.startswith(start)), None)


def _reduced(photo: Image.Image, min_side_px: int) -> Image.Image:
    """Halve a large image before any conversion, which at full size would need several times the memory."""
    halvings = int(math.log2(max(1, min(photo.size) // min_side_px)))
    if halvings == 0:
        return photo
    info = photo.info
    if photo.mode in ("1", "P", "PA"):
        photo = photo.convert("RGBA" if photo.has_transparency_data else "RGB")
    elif photo.mode.startswith("I;"):
        photo = photo.convert("I")
    small = photo.reduce(2**halvings)
    small.info = info  # transparency and EXIF orientation
    return small


def to_rgb(photo: Image.Image) -> Image.Image:
    """Convert an image of any Pillow mode to RGB without clipping deep grayscale or losing transparency."""
    if photo.mode.startswith("I") or photo.mode == "F":
        return _from_deep_gray(photo).convert("RGB")
    if photo.has_transparency_data:
        overlay = photo.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", photo.size, "white"), overlay).convert("RGB")
    return _as_mode(photo, "RGB")


def _as_mode(photo: Image.Image, mode: str) -> Image.Image:
    """Convert to ``mode``, without the copy that Pillow makes if the mode already matches."""
    return photo if photo.mode == mode else photo.convert(mode)


def _from_deep_gray(photo: Image.Image) -> Image.Image:
    """Scale 16-bit, 32-bit or float grayscale to 8 bits; Pillow's ``convert`` would clip values above 255 to white."""
    values = np.asarray(photo, dtype=np.float32)
    if photo.mode == "F" and not np.isfinite(values).all():  # NaN marks missing pixels in scientific images
        finite = values[np.isfinite(values)]
        values = np.nan_to_num(values, nan=0.0, posinf=finite.max(initial=0.0), neginf=0.0)
    highest = float(values.max(initial=0.0))
    if photo.mode == "F" and highest <= 1.0:
        top = 1.0
    elif highest <= 255.0:
        top = 255.0
    else:
        top = highest if photo.mode == "F" else 65535.0
    return Image.fromarray(np.clip(values * np.float32(255.0 / top), 0, 255).round().astype(np.uint8))
