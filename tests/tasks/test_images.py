"""What passes the image gate is whole and of sane size; everything else is named and refused."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from tasks.core import DataError
from tasks.images import BLANK, MAX_PIXELS, blank_like, check_image, content_hash, mask_patches
from tests.support.image_files import chunk, encoded, noise, png_header, raw_png
from tests.support.puzzles import TASKS


def exif_block(orientation: int, entries: int = 1) -> bytes:
    """TIFF with a pixel density of 0/0 after the orientation; `entries` may promise more."""
    turn = struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0)
    return b"MM\0*" + struct.pack(">IH", 8, entries) + turn + struct.pack(">HHII", 282, 5, 1, 0)


def with_segments(jpeg: bytes, *segments: tuple[int, bytes]) -> bytes:
    """A JPEG with application segments (marker, body) at its head."""
    made = (struct.pack(">BBH", 0xFF, marker, len(b) + 2) + b for marker, b in segments)
    return jpeg[:2] + b"".join(made) + jpeg[2:]


PNG = encoded(noise(7, 5))


def test_pixels_come_through_unchanged() -> None:
    image = check_image(PNG, "x")
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), np.asarray(noise(7, 5)))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_no_proper_prefix_of_an_image_passes(kind: str) -> None:
    data = encoded(noise(24, 24), kind)
    check_image(data, "x")
    for length in range(len(data)):
        with pytest.raises(DataError, match=r"^data\.bin: row 3: "):
            check_image(data[:length], "data.bin: row 3")


@settings(max_examples=200)
@given(st.integers(0, len(PNG) - 1), st.integers(1, 255))
def test_no_changed_byte_in_a_png_passes(at: int, change: int) -> None:
    damaged = bytearray(PNG)
    damaged[at] ^= change
    with pytest.raises(DataError):
        check_image(bytes(damaged), "x")


@settings(max_examples=300)
@given(
    st.sampled_from([b"", PNG[:8], PNG[:33], b"\xff\xd8\xff\xe0", b"RIFF\x20\x00\x00\x00WEBPVP8 "]),
    st.binary(max_size=200),
)
def test_hostile_bytes_raise_only_data_errors(start: bytes, rest: bytes) -> None:
    with pytest.raises(DataError):
        check_image(start + rest, "x")


def test_truncation_is_found_even_where_pillow_was_told_to_accept_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(DataError, match="truncated"):
        check_image(PNG[:-20], "x")


def test_size_is_judged_from_the_header() -> None:
    # There are no pixels to decode here, so this error can only come from the header.
    with pytest.raises(DataError, match=r"big.png: .*20000x20000.*limit is 16 Mpx; scale it down"):
        check_image(png_header(20_000, 20_000), "big.png")


def test_a_real_decompression_bomb_is_refused() -> None:
    bomb = encoded(Image.new("1", (20_000, 20_000)), compress_level=1)
    assert len(bomb) < 1_000_000
    with pytest.raises(DataError, match="20000x20000"):
        check_image(bomb, "x")


@pytest.mark.parametrize("side", [4001, 10_000, 20_000])
def test_large_jpeg_is_refused_from_its_header(side: int) -> None:
    data = bytearray(encoded(noise(16, 16), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", side, side)
    with pytest.raises(DataError, match=r"too large|limit"):
        check_image(bytes(data), "x")


def test_the_limit_is_exact() -> None:
    check_image(encoded(noise(10, 10)), "x", max_pixels=100)
    with pytest.raises(DataError, match="10x10"):
        check_image(encoded(noise(10, 10)), "x", max_pixels=99)
    assert MAX_PIXELS < 20_000 * 20_000


def test_zero_size_and_empty() -> None:
    for size in ((0, 5), (5, 0)):
        with pytest.raises(DataError, match=f"{size[0]}x{size[1]}"):
            check_image(png_header(*size), "x")
    with pytest.raises(DataError, match="empty"):
        check_image(b"", "x")


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_animated_images_are_refused(kind: str) -> None:
    data = encoded(noise(8, 8), kind, save_all=True, append_images=[noise(8, 8, 1)])
    with pytest.raises(DataError, match="animated"):
        check_image(data, "x")


def test_other_formats_are_refused() -> None:
    for kind in ("GIF", "BMP", "TIFF", "EPS"):
        with pytest.raises(DataError, match="save it as PNG"):
            check_image(encoded(noise(8, 8), kind), "x")


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_deep_channels_are_refused_whatever_the_colours(colour: int, channels: int) -> None:
    data = raw_png((3, 2), 16, colour, (b"\0" + b"\x9c\x40" * channels * 3) * 2)
    with pytest.raises(DataError, match=r"^x: 16 bits a channel, .*save it as 8-bit PNG$"):
        check_image(data, "x")
    jpeg = bytearray(encoded(noise(8, 8), "JPEG"))
    jpeg[jpeg.index(b"\xff\xc0") + 4] = 12
    with pytest.raises(DataError, match="12 bits a channel"):
        check_image(bytes(jpeg), "x")


@pytest.mark.parametrize(
    "ancillary",
    [
        chunk(b"zTXt", b"workflow\0\0" + zlib.compress(bytes(2_000_000))),
        chunk(b"iCCP", b"name\0\0not a profile"),
        chunk(b"eXIf", b"MM\0*" + bytes(3)),
        chunk(b"eXIf", exif_block(1, entries=900)),
        chunk(b"pHYs", b""),
        chunk(b"acTL", struct.pack(">II", 1, 0)),
        chunk(b"tEXt", b"Title\0x")[:-1] + b"!",  # its checksum is wrong
        chunk(b"prVt", b"\xff" * 99),
    ],
)
def test_what_is_not_pixels_is_not_judged_in_a_png(ancillary: bytes) -> None:
    image = check_image(PNG[:33] + ancillary + PNG[33:], "x")
    assert np.array_equal(np.asarray(image), np.asarray(noise(7, 5)))


@pytest.mark.parametrize(
    "segments",
    [
        [(0xE2, b"MPF\0MM\0*" + bytes(9))],
        [(0xE0, b"JFIF\0")],
        [(0xED, b"Photoshop 3.0\08BIM\x03\xed")],
        [(0xE1, b"Exif\0\0MM")],
        [(0xE1, b"Exif\0\0" + exif_block(6))],
        [(0xE1, b"Exif\0\0" + exif_block(1)), (0xFE, b"\xff\xd9 no end")],
        [(0xE2, b"ICC_PROFILE\0")],
    ],
)
def test_what_is_not_pixels_is_not_judged_in_a_jpeg(segments: list[tuple[int, bytes]]) -> None:
    data = encoded(noise(16, 8), "JPEG")
    turned = any(b.endswith(exif_block(6)) for _, b in segments)
    plain = check_image(data, "x")
    expected = plain.transpose(Image.Transpose.ROTATE_270) if turned else plain
    found = check_image(with_segments(data, *segments), "x")
    assert np.array_equal(np.asarray(found), np.asarray(expected))


def test_of_a_phones_two_pictures_the_first_is_taken() -> None:
    first, second = noise(32, 24), noise(16, 12, 1)
    data = encoded(first, "MPO", save_all=True, append_images=[second])
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 2
    expected = np.asarray(Image.open(io.BytesIO(encoded(first, "JPEG"))))
    assert np.array_equal(np.asarray(check_image(data, "x")), expected)
    with pytest.raises(DataError, match="truncated"):
        check_image(data[: len(encoded(first, "JPEG")) // 2], "x")


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 2}])
@pytest.mark.parametrize("colours", ["RGB", "L", "CMYK"])
def test_a_jpeg_that_was_cut_and_ended_is_refused(options: dict[str, int], colours: str) -> None:
    """The decoder paints what is missing grey, and is content with the end mark."""
    data = encoded(noise(40, 32).convert(colours), "JPEG", **options)
    whole = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(np.asarray(check_image(data + b"tail", "x")), whole)
    cuts, taken = range(data.index(b"\xff\xda") + 14, len(data) - 2, len(data) // 60), 0
    for cut in cuts:
        try:
            check_image(data[:cut] + b"\xff\xd9", "x")
            taken += 1  # cut between two scans, or at a restart: a file that is whole
        except DataError as error:
            assert "damaged or truncated" in str(error)
    assert taken <= len(cuts) / 10, (taken, len(cuts))


@pytest.mark.parametrize("interlaced", [0, 1])
def test_a_png_with_fewer_rows_than_it_promises_is_refused(interlaced: int) -> None:
    """Pillow paints the missing rows black where the compressed data ends as it should."""
    rows = (b"\0" + bytes([200] * 12)) * 3
    data = raw_png((4, 4), 8, 2, rows, interlaced=interlaced)
    with pytest.raises(DataError, match=r"truncated \(39 of (52|55) bytes of pixels\)"):
        check_image(data, "x")


def test_png_dialects_that_would_be_read_wrongly_are_refused() -> None:
    data = raw_png((2, 1), 8, 2, b"\0" + bytes(6))
    with pytest.raises(DataError, match="CgBI"):  # blue and red are swapped in it
        check_image(data[:8] + chunk(b"CgBI", bytes(4)) + data[8:], "x")
    with pytest.raises(DataError, match="palette"):
        check_image(raw_png((2, 1), 8, 3, bytes(3)), "x")


@pytest.mark.parametrize(("width", "height"), [(1, 1), (3, 2), (8, 8), (13, 9), (2, 17)])
def test_interlaced_pngs_come_through_unchanged(width: int, height: int) -> None:
    pixels = np.asarray(noise(width, height))
    starts = [(0, 0), (4, 0), (0, 4), (2, 0), (0, 2), (1, 0), (0, 1)]
    strides = [(8, 8), (8, 8), (4, 8), (4, 4), (2, 4), (2, 2), (1, 2)]
    passes = [
        pixels[y::down, x::right] for (x, y), (right, down) in zip(starts, strides, strict=True)
    ]
    rows = b"".join(b"\0" + row.tobytes() for part in passes if part.size for row in part)
    data = raw_png((width, height), 8, 2, rows, interlaced=1)
    assert np.array_equal(np.asarray(check_image(data, "x")), pixels)


def test_transparent_pixels_become_white() -> None:
    for clear in (Image.new("RGBA", (2, 2), (0, 0, 0, 0)), Image.new("LA", (2, 2), (0, 0))):
        assert check_image(encoded(clear), "x").getpixel((0, 0)) == (255, 255, 255)


def test_the_transparent_grey_of_few_bits_becomes_white() -> None:
    """Grey 3 of 15 is transparent; Pillow compares it to the greys scaled to 255."""
    data = raw_png((4, 1), 4, 0, b"\0\x34\x56", chunk(b"tRNS", struct.pack(">H", 3)))
    shown = np.asarray(check_image(data, "x"))
    assert shown[0, :, 0].tolist() == [255, 4 * 17, 5 * 17, 6 * 17]


@pytest.mark.parametrize("kind", [b"tVNS", b"4RNS", b"tR\xceS", b"tRNS"])
def test_a_chunk_that_may_have_been_the_transparency_must_be_whole(kind: bytes) -> None:
    palette, clear = chunk(b"PLTE", bytes(6)), bytearray(chunk(b"tRNS", b"\0"))
    clear[4:8] = kind
    clear[8] ^= kind == b"tRNS"
    with pytest.raises(DataError, match="checksum of chunk"):
        check_image(raw_png((2, 1), 8, 3, b"\0\0\1", palette, bytes(clear)), "x")


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(noise(8, 4), kind, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert expected is not None and expected.size == ((4, 8) if 5 <= orientation <= 8 else (8, 4))
    assert np.array_equal(np.asarray(check_image(data, "x")), np.asarray(expected))


@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("sudoku", {"size": 4, "rotation": 40.0, "ink": "random", "paper": "random"}),
        ("sudoku", {"blanks": 30, "noise": 60.0, "contrast": 0.5}),
        ("graph_coloring", {"vertices": 9, "canvas": 160}),
        ("graph_coloring", {"background": "random", "layout": "spring", "jitter": 2.0}),
    ],
)
def test_blanks_of_different_problems_are_the_same_file(name: str, knobs: dict[str, Any]) -> None:
    """What differs between two blanks could tell a blind policy which problem it has."""
    task = TASKS[name]
    spec, rng = task.spec(**knobs), np.random.default_rng(0)
    images = [task.generate(rng, spec).images[0] for _ in range(12)]
    assert len({blank_like(image) for image in images}) == 1 < len(set(images))


def test_of_an_image_a_blank_keeps_its_size_alone() -> None:
    shown = {kind: encoded(noise(9, 6), kind) for kind in ("PNG", "JPEG")}
    blanks = {kind: np.asarray(check_image(blank_like(shown[kind]), "x")) for kind in shown}
    assert all(blank.shape == (6, 9, 3) for blank in blanks.values())
    assert all((blank == BLANK).all() for blank in blanks.values())


def test_content_hash_is_sha256() -> None:
    assert content_hash(b"abc").startswith("ba7816bf8f01cfea")


@pytest.mark.parametrize("share", [0.05, 0.25, 0.6, 1.0])
@pytest.mark.parametrize(("width", "height", "patch"), [(40, 24, 8), (41, 27, 8), (30, 30, 14)])
def test_masking_blackens_the_promised_share_of_patches(
    share: float, width: int, height: int, patch: int
) -> None:
    bright = np.maximum(np.asarray(noise(width, height)), 1)
    data = encoded(Image.fromarray(bright))
    masked = np.asarray(check_image(mask_patches(data, patch, share), "x"))
    assert masked.shape == bright.shape
    black = touched = total = 0
    for y in range(0, height, patch):
        for x in range(0, width, patch):
            part = np.s_[y : y + patch, x : x + patch]
            total += 1
            black += not masked[part].any()
            touched += bool((masked[part] != bright[part]).any())
    assert black == touched == max(1, round(share * total))


def test_masking_is_decided_by_the_image_alone() -> None:
    one, two = encoded(noise(64, 64, 1)), encoded(noise(64, 64, 2))
    assert mask_patches(one, 8, 0.5) == mask_patches(one, 8, 0.5)

    def where(data: bytes) -> list[bool]:
        pixels = np.asarray(check_image(mask_patches(data, 8, 0.5), "x"))
        tiles = pixels.reshape(8, 8, 8, 8, 3).any(axis=(1, 3, 4))
        return [not tile for tile in tiles.ravel().tolist()]

    assert where(one) != where(two)
    np.random.seed(1)
    assert mask_patches(one, 8, 0.5) == mask_patches(one, 8, 0.5)


def test_masking_covers_every_patch_alike() -> None:
    """Over many images no patch is favoured: each is masked close to `share` of the time."""
    counts = np.zeros((4, 4))
    for seed in range(300):
        pixels = np.asarray(check_image(mask_patches(encoded(noise(16, 16, seed)), 4, 0.5), "x"))
        counts += ~pixels.reshape(4, 4, 4, 4, 3).any(axis=(1, 3, 4))
    assert counts.sum() == 300 * 8
    assert np.abs(counts / 300 - 0.5).max() < 0.15  # 5 standard deviations


def test_an_image_that_cannot_be_read_is_not_masked() -> None:
    with pytest.raises(DataError, match="image to mask"):
        mask_patches(PNG[:-20], 8, 0.5)
