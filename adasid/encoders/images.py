"""Decode pictures. Content never raises an error: what cannot be decoded has a reason."""

from __future__ import annotations

import warnings
from functools import cache
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

from adasid.encoders.base import needed

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

EMPTY_FILE = "empty_file"
TOO_MANY_BYTES = "too_many_bytes"
NOT_A_PICTURE = "not_a_picture"
UNSUPPORTED_PICTURE = "unsupported_picture"
"""Reason: a picture of another format than FORMATS, such as SVG, PSD, ICO, AVIF."""
TOO_MANY_PIXELS = "too_many_pixels"
TRUNCATED = "truncated"
UNDECODABLE = "undecodable"
TOO_SMALL = "too_small"
"""Reason: a side of 1 pixel, or of less than a hundredth of the other, as of tracking pixels and rules."""

_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"BM", b"II*\0", b"MM\0*")
_OTHERS = (b"8BPS", b"\0\0\1\0", b"\0\0\0\x0cjP  ", b"\xff\x0a", b"\0\0\0\x0cJXL ", b"\xff\x4f\xff\x51", b"DDS ")
"""First bytes of PSD, ICO, JPEG 2000, JPEG XL, DDS."""
_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1")
_SLIM = 100


def decode(data: bytes, max_bytes: int, max_pixels: int, side: int = 0) -> Image | str:
    """Return the picture in RGB, upright, its transparent parts white, the first frame of an animation; or the reason
    why it cannot be used. A JPEG much larger than ``side`` pixels is decoded at a half, a quarter or an eighth of its
    size, with no side below that; 0: at full size."""
    if len(data) > max_bytes or not data:
        return TOO_MANY_BYTES if data else EMPTY_FILE
    library = _pillow()
    try:
        with library.open(BytesIO(data), formats=FORMATS) as picture:
            return _refused(picture.size, max_pixels) or _loaded(picture, side)
    except library.DecompressionBombError:
        return TOO_MANY_PIXELS
    except library.UnidentifiedImageError:
        return _unidentified(data)
    except Exception as error:  # Pillow's readers raise errors of many types
        return TRUNCATED if "truncated" in str(error).lower() or _incomplete(data) else UNDECODABLE


def _refused(size: tuple[int, int], max_pixels: int) -> str | None:
    width, height = size
    if width * height > max_pixels:
        return TOO_MANY_PIXELS
    return TOO_SMALL if min(width, height) < max(2, max(width, height) / _SLIM) else None


def _loaded(picture: Image, side: int) -> Image:
    if side:
        picture.draft(None, (side, side))
    picture.load()
    return _rgb(_upright(picture))


@cache
def _pillow() -> Any:
    library = needed("content.encoders", "PIL.Image")
    warnings.filterwarnings("ignore", module=r"PIL\.")
    return library


def _upright(picture: Image) -> Image:
    """Apply the orientation of EXIF, where that can be read."""
    try:
        return needed("content.encoders", "PIL.ImageOps").exif_transpose(picture)  # type: ignore[no-any-return]
    except Exception:
        return picture


def _rgb(picture: Image) -> Image:
    if picture.mode.startswith("I") or picture.mode == "F":
        picture = _bytes_of(picture)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = _pillow().new("RGBA", picture.size, "white")
        white.alpha_composite(picture)
        picture = white
    return picture.convert("RGB")


def _bytes_of(picture: Image) -> Image:
    """Scale grey values of 16 bits, 32 bits or floats to 8 bits."""
    values = np.nan_to_num(np.asarray(picture, np.float32))
    tops = (1.0, 255.0, 65535.0) if picture.mode == "F" else (255.0, 65535.0) if picture.mode == "I" else (65535.0,)
    highest = float(values.max())
    top = next((top for top in tops if highest <= top), highest)
    scaled = np.clip(values * (255 / top), 0, 255).round().astype(np.uint8)
    return _pillow().fromarray(scaled)  # type: ignore[no-any-return]


def _unidentified(data: bytes) -> str:
    start = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if data.startswith(_SIGNATURES) or _is_webp(data):
        return TRUNCATED if _incomplete(data) else UNDECODABLE
    svg = b"<svg" in start and not start.startswith((b"<!doctype html", b"<html"))
    if svg or data.startswith(_OTHERS) or (data[4:8] == b"ftyp" and data[8:12] in _BRANDS):
        return UNSUPPORTED_PICTURE
    return NOT_A_PICTURE


def _is_webp(data: bytes) -> bool:
    return data.startswith(b"RIFF") and data[8:12] == b"WEBP"


def _incomplete(data: bytes) -> bool:
    """Return whether the end of a file is missing, as far as its format shows."""
    if _is_webp(data):
        return len(data) < 8 + int.from_bytes(data[4:8], "little")
    if data.startswith(b"BM"):
        return len(data) < int.from_bytes(data[2:6], "little")
    ends = {b"\xff\xd8": b"\xff\xd9", b"\x89P": b"IEND", b"GI": b";"}
    end = ends.get(data[:2])
    return end is not None and end not in data[-32:]
