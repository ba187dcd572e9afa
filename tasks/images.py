"""The one gate through which image bytes enter: whole, sane in size, decodable, or refused."""

from __future__ import annotations

import hashlib
import io
import struct
import warnings
import zlib

import numpy as np
from PIL import Image, ImageOps

from tasks.core import DataError

MAX_PIXELS = 16_000_000
"""Default limit of `check_image`, width times height: 48 MB decoded. The image processors of
the model families train on far fewer, so a larger file is a mistake or an attack."""

FORMATS = ("PNG", "JPEG", "WEBP")
"""Read by Pillow alone; formats that start other programs (EPS) stay closed."""

BLANK = (128, 128, 128)
"""Of every blanked image: a colour taken from the picture, such as its mean, tells how much is
drawn on it."""

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def content_hash(data: bytes) -> str:
    """SHA-256 of the bytes as 64 hex digits: the name of an image in rollouts and manifests."""
    return hashlib.sha256(data).hexdigest()


def check_image(data: bytes, source: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image file completely, or say why it cannot be used.

    The size is judged from the header before any pixel is decoded. Transparency is laid on
    white and the EXIF orientation is applied, so the result is what a person sees.

    Args:
        data: the whole encoded file.
        source: where it came from, put at the head of every error (`file: row 3: image`).
        max_pixels: largest allowed width times height.

    Returns:
        An RGB image, fully loaded.

    Raises:
        DataError: empty, not a PNG, JPEG or WebP image, truncated or damaged, of zero size,
            larger than `max_pixels`, animated, or with more than 8 bits a channel.
    """
    if not data:
        raise DataError(f"{source}: the image is empty (0 bytes); write the image file again")
    if data.startswith(_PNG_SIGNATURE):
        _check_png_chunks(data, source, max_pixels)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # _check_size judges
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise DataError(f"{source}: the image is too large: {error}; scale it down") from error
    except Image.UnidentifiedImageError as error:
        raise DataError(
            f"{source}: not an image that can be read ({len(data)} bytes starting with "
            f"{data[:8]!r}); save it as PNG, JPEG or WebP"
        ) from error
    except Exception as error:  # a hostile header may fail anywhere inside the decoder
        raise _damaged(source, error) from error
    _check_size(*image.size, source, max_pixels)
    if getattr(image, "n_frames", 1) > 1:
        raise DataError(f"{source}: the image is animated; save one frame of it as PNG")
    if image.mode.startswith(("I", "F")):
        raise DataError(
            f"{source}: more than 8 bits a channel (mode {image.mode}); save it as 8-bit PNG"
        )
    try:
        image.load()
        return _flat_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # as above
        raise _damaged(source, error) from error


def blank_like(data: bytes) -> bytes:
    """A PNG of the same width and height in `BLANK`: of the image, its size alone remains.

    Raises:
        DataError: as `check_image`.
    """
    image = check_image(data, "image to blank")
    out = io.BytesIO()
    Image.new("RGB", image.size, BLANK).save(out, format="PNG")
    return out.getvalue()


def mask_patches(data: bytes, patch_size: int, share: float) -> bytes:
    """A PNG of the image with `share` of its square patches painted black, as in PAPO.

    PAPO (arXiv 2507.06448) blackens each patch with that probability; here the number is exact,
    `share` times the patches rounded, at least one. Which ones follows from the image's bytes
    alone, so every rollout of a problem, and every run, sees the same mask.

    Args:
        data: the whole encoded file.
        patch_size: side of a patch in pixels; patches at the right and lower edge are cut off.
        share: of the patches, above 0 and up to 1.

    Raises:
        DataError: as `check_image`.
    """
    pixels = np.array(check_image(data, "image to mask"))
    rows, columns = (-(-side // patch_size) for side in pixels.shape[:2])
    rng = np.random.default_rng(int(content_hash(data), 16))
    count = max(1, round(share * rows * columns))
    for patch in rng.permutation(rows * columns)[:count].tolist():
        y, x = (patch_size * at for at in divmod(patch, columns))
        pixels[y : y + patch_size, x : x + patch_size] = 0
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="PNG")
    return out.getvalue()


def _check_size(width: int, height: int, source: str, max_pixels: int) -> None:
    if width <= 0 or height <= 0:
        raise DataError(f"{source}: the image is {width}x{height}: nothing to see; replace it")
    if width * height > max_pixels:
        raise DataError(
            f"{source}: the image is {width}x{height}, {width * height / 1e6:.1f} Mpx; the limit "
            f"is {max_pixels / 1e6:g} Mpx; scale it down"
        )


def _check_png_chunks(data: bytes, source: str, max_pixels: int) -> None:
    """Walk a PNG's chunks to the end.

    Pillow is content once it has its pixels, and skips checksums where another library has
    set its `LOAD_TRUNCATED_IMAGES`; a file cut short anywhere must not pass.
    """
    if len(data) >= 24 and data[12:16] == b"IHDR":
        width, height = struct.unpack_from(">II", data, 16)
        _check_size(width, height, source, max_pixels)
    at = len(_PNG_SIGNATURE)
    while True:
        if at + 12 > len(data):
            break
        (length,) = struct.unpack_from(">I", data, at)
        end = at + 12 + length
        if end > len(data):
            break
        kind = data[at + 4 : at + 8]
        (stored,) = struct.unpack_from(">I", data, end - 4)
        if zlib.crc32(memoryview(data)[at + 4 : end - 4]) != stored:
            raise DataError(
                f"{source}: the PNG is damaged (checksum of chunk {kind!r} at byte {at}); "
                "copy or write the file again"
            )
        if kind == b"IEND":
            return
        at = end
    raise DataError(
        f"{source}: the PNG is truncated ({len(data)} bytes, no end chunk); "
        "copy or write the file again"
    )


def _flat_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(ground, image)
    return image.convert("RGB")


def _damaged(source: str, error: Exception) -> DataError:
    return DataError(
        f"{source}: the image is damaged or truncated ({error}); copy or write the file again"
    )
