"""The one gate through which image bytes enter: whole, sane in size, decodable, or refused."""

from __future__ import annotations

import hashlib
import io
import re
import struct
import warnings
import zlib

import numpy as np
from PIL import ExifTags, Image

from tasks.core import DataError
from tasks.drawing import to_png

MAX_PIXELS = 16_000_000
"""Default limit of `check_image`, width times height: 48 MB decoded. The image processors of
the model families train on far fewer, so a larger file is a mistake or an attack."""

FORMATS = ("PNG", "JPEG", "WEBP")
"""Read by Pillow alone; formats that start other programs (EPS) stay closed."""

BLANK = (128, 128, 128)
"""Of every blanked image: a colour taken from the picture, such as its mean, tells how much is
drawn on it."""

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_METADATA = (b"eXIf", b"iCCP", b"iTXt", b"pHYs", b"tEXt", b"tIME", b"zTXt")
"""Chunks of a PNG that may be damaged; one of another name may have been `tRNS`."""
_ADAM7 = (
    (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4),
    (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2),
)  # fmt: skip
"""Of an interlaced PNG's passes: first column, first row, and their strides."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes an EXIF orientation."""


def content_hash(data: bytes) -> str:
    """SHA-256 of the bytes as 64 hex digits: the name of an image in rollouts and manifests."""
    return hashlib.sha256(data).hexdigest()


def check_image(data: bytes, source: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image file completely, or say why it cannot be used.

    Only pixels are judged. The size is read from the header before any pixel is decoded;
    comments, thumbnails, colour profiles and damaged metadata are passed over. Of a photo with
    further pictures behind it (MPO) the first is taken. Transparency is laid on white and the
    EXIF orientation is applied, so the result is what a person sees.

    Args:
        data: the whole encoded file.
        source: where it came from, put at the head of every error (`file: row 3: image`).
        max_pixels: largest allowed width times height.

    Returns:
        An RGB image, fully loaded.

    Raises:
        DataError: empty, not a PNG, JPEG or WebP image, truncated or damaged, of zero size,
            larger than `max_pixels`, animated, or with more than 8 bits a channel, whose
            scaling to 8 is not ours to choose.
    """
    if not data:
        raise DataError(f"{source}: the image is empty (0 bytes); write the image file again")
    exif = b""
    try:
        if data.startswith(_PNG_SIGNATURE):
            data, exif = _png_pixels(data, source, max_pixels)
        elif data.startswith(b"\xff\xd8\xff"):
            data, exif = _jpeg_pixels(data, source)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # _check_size judges
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except DataError:
        raise
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
        raise _animated(source)
    try:
        image.load()
        if image.format == "JPEG" and not _scans_are_whole(data, image):
            raise _damaged(source, "its end is not that of its pixels")
        turn = _TURNS.get(_orientation(exif or image.info.get("exif", b"")))
        return _flat_rgb(image if turn is None else image.transpose(turn))
    except DataError:
        raise
    except Exception as error:  # as above
        raise _damaged(source, error) from error


def blank_like(data: bytes) -> bytes:
    """A PNG of the same width and height in `BLANK`: of the image, its size alone remains.

    Raises:
        DataError: as `check_image`.
    """
    image = check_image(data, "image to blank")
    return to_png(Image.new("RGB", image.size, BLANK))


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
    return to_png(Image.fromarray(pixels))


def _check_size(width: int, height: int, source: str, max_pixels: int) -> None:
    if width <= 0 or height <= 0:
        raise DataError(f"{source}: the image is {width}x{height}: nothing to see; replace it")
    if width * height > max_pixels:
        raise DataError(
            f"{source}: the image is {width}x{height}, {width * height / 1e6:.1f} Mpx; the limit "
            f"is {max_pixels / 1e6:g} Mpx; scale it down"
        )


def _png_pixels(data: bytes, source: str, max_pixels: int) -> tuple[bytes, bytes]:
    """(a PNG of the chunks that make pixels, the EXIF block); walks the chunks to the end.

    Pillow is content with fewer rows than the header promises, skips checksums where another
    library has set its `LOAD_TRUNCATED_IMAGES`, and fails on texts that nobody looks at.
    """
    if data[12:16] == b"IHDR" and len(data) >= 33:
        width, height, depth, colour, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
        _check_size(width, height, source, max_pixels)
        if depth > 8:
            raise _deep(source, depth)
    else:  # of a dialect, such as the one that Apple's tools write (CgBI)
        raise _damaged(source, f"its first chunk is {data[12:16]!r}, not IHDR")
    parts, pixels, exif, at = [_PNG_SIGNATURE], [], b"", len(_PNG_SIGNATURE)
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        kind, body, end = data[at + 4 : at + 8], data[at + 8 : at + 8 + length], at + 12 + length
        if end > len(data):
            break
        if kind == b"fdAT":
            raise _animated(source)
        sound = zlib.crc32(body, zlib.crc32(kind)) == struct.unpack_from(">I", data, end - 4)[0]
        if kind == b"eXIf" and sound:
            exif = body
        elif not kind.isalpha() or not (sound or kind in _METADATA):
            raise _damaged(source, f"checksum of chunk {kind!r} at byte {at}")
        elif kind[:1].isupper() or kind == b"tRNS":
            if kind == b"tRNS" and colour == 0 and depth in (2, 4) and length == 2:
                # Pillow scales these greys to 8 bits, but not the transparent one.
                top = 2**depth - 1
                body = struct.pack(">H", (body[1] & top) * 255 // top)
            parts += [struct.pack(">I", length), kind, body]
            parts.append(struct.pack(">I", zlib.crc32(body, zlib.crc32(kind))))
            pixels += [body] if kind == b"IDAT" else []
        if kind == b"IEND":
            break
        at = end
    if kind != b"IEND" or end > len(data):
        raise _damaged(source, f"{len(data)} bytes, no end chunk")
    if colour == 3 and b"PLTE" not in parts:
        raise _damaged(source, "it has no palette")
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    expected = sum(
        -(-(height - y) // down) * (1 + (-(-(width - x) // right) * bits + 7) // 8)
        for x, y, right, down in (_ADAM7 if interlaced else ((0, 0, 1, 1),))
        if width > x and height > y
    )
    actual = len(zlib.decompressobj().decompress(b"".join(pixels), expected))
    if actual < expected:
        raise _damaged(source, f"{actual} of {expected} bytes of pixels")
    return b"".join(parts), exif


def _jpeg_pixels(data: bytes, source: str) -> tuple[bytes, bytes]:
    """(a JPEG without comments and application data but what sets its colours, the EXIF block)."""
    parts, exif, at = [data[:2]], b"", 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        marker, (length,) = data[at + 1], struct.unpack_from(">H", data, at + 2)
        if marker == 0xFF or marker == 0x01 or 0xD0 <= marker <= 0xD7:  # padding, no segment
            at += 1 if marker == 0xFF else 2
            continue
        segment = data[at : at + 2 + length]
        at += 2 + length
        if marker == 0xE1 and segment[4:10] == b"Exif\0\0":
            exif = exif or segment[10:]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and segment[4:5] > b"\x08":
            raise _deep(source, segment[4])
        sets_colours = segment[4:9] == b"Adobe" or (segment[4:8] == b"JFIF" and length >= 16)
        if sets_colours or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            parts.append(segment)
    return b"".join([*parts, data[at:]]), exif


def _scans_are_whole(data: bytes, image: Image.Image) -> bool:
    """Whether a JPEG has all its pixels, and not an end mark where it was cut.

    The decoder paints what is missing grey, and says nothing. Letters put before the end mark
    change the picture where pixels are missing, and nothing where none are.
    """
    if image.info.get("progressive") is None and not re.search(rb"\xff[\xc0\xc1]", data):
        return True  # arithmetic coding, which may leave out its last zeros
    end = data.find(b"\xff\xd9", data.find(b"\xff\xda"))
    longer = Image.open(io.BytesIO(data[:end] + b"\x2a\x95\x5c" * 64 + data[end:]), formats=FORMATS)
    return longer.tobytes() == image.tobytes()


def _orientation(block: bytes) -> int:
    """The orientation that an EXIF block tells; 1, as stored, where it tells none."""
    exif = Image.Exif()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of entries that are cut short
            exif.load(block)
            return int(exif.get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged in any way
        return 1


def _flat_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(ground, image)
    return image.convert("RGB")


def _damaged(source: str, reason: Exception | str) -> DataError:
    return DataError(
        f"{source}: the image is damaged or truncated ({reason}); copy or write the file again"
    )


def _animated(source: str) -> DataError:
    return DataError(f"{source}: the image is animated; save one frame of it as PNG")


def _deep(source: str, bits: int) -> DataError:
    return DataError(f"{source}: {bits} bits a channel, at most 8 are read; save it as 8-bit PNG")
