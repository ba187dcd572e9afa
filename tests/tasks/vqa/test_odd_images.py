"""Odd pictures in rows: read as a person sees them, or refused by name."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tasks.images import check_image
from tests.support.image_files import encoded, noise
from tests.support.vqa_files import opened, write_parquet


def _rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(noise(8, 20), "JPEG", exif=exif)


def _animated() -> bytes:
    out = io.BytesIO()
    noise(8, 8).save(out, "PNG", save_all=True, append_images=[noise(8, 8, 1)])
    return out.getvalue()


def _deep() -> bytes:
    return encoded(Image.fromarray(np.full((4, 4), 40000, np.uint16)))


READ = {
    "palette": (encoded(noise(8, 9).quantize(16)), (8, 9)),
    "CMYK": (encoded(noise(8, 9).convert("CMYK"), "JPEG"), (8, 9)),
    "EXIF rotation": (_rotated(), (20, 8)),
    "one pixel wide": (encoded(noise(1, 40)), (1, 40)),
    "extreme aspect": (encoded(noise(2000, 4)), (2000, 4)),
    "WebP": (encoded(noise(8, 9), "WEBP"), (8, 9)),
    "transparent": (encoded(noise(8, 9).convert("RGBA")), (8, 9)),
}
REFUSED = {
    "16 bits": (_deep(), "16 bits a channel"),
    "animated": (_animated(), "animated"),
    "truncated": (encoded(noise(40, 40))[:-30], "truncated"),
    "truncated JPEG": (encoded(noise(40, 40), "JPEG")[:-300], "truncated"),
    "empty": (b"", "is empty (0 bytes)"),
    "a web page": (b"<html>not found</html>", "not an image"),
}


def test_odd_pictures_are_read_or_refused_by_name(tmp_path: Path) -> None:
    rows = []
    for name, (data, _) in {**READ, **REFUSED}.items():
        path = f"{name}.jpg"  # a wrong suffix for most
        (tmp_path / path).write_bytes(data)
        rows.append({"image": {"bytes": data, "path": None}, "problem": f"{name}?", "answer": "1"})
        rows.append({"image": {"bytes": None, "path": path}, "problem": f"{name}!", "answer": "1"})
    found = opened({"test": str(write_parquet(tmp_path / "rows.parquet", rows))})
    test = found.rows["test"]
    sizes = {test[at].problem.prompt: test.fact(at).sizes for at in range(len(test))}
    assert sizes == {f"{n}{mark}": (size,) for n, (_, size) in READ.items() for mark in "?!"}
    for example in test:
        for image, size in zip(example.problem.images, sizes[example.problem.prompt], strict=True):
            assert check_image(image, "image").size == size
    reasons = [bad.reason for bad in found.bad]
    wanted = [said for _, said in REFUSED.values() for _ in "?!"]
    assert len(reasons) == len(wanted)
    for reason, said in zip(reasons, wanted, strict=True):
        assert reason.startswith("image: ") and said in reason


@pytest.mark.parametrize("kind", ["base64", "bytes"])
def test_a_cell_that_is_far_too_large_is_not_decoded(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.image_cells.MAX_FILE_BYTES", 3000)
    rows = []
    for size in (20, 60):
        data = encoded(noise(size, size))
        cell = data if kind == "bytes" else base64.b64encode(data).decode()
        rows.append({"image": cell, "problem": f"{size}?", "answer": "1"})
    found = opened({"test": str(write_parquet(tmp_path / "rows.parquet", rows))})
    assert [example.problem.prompt for example in found.rows["test"]] == ["20?"]
    (bad,) = found.bad
    assert "bytes; scale the image down" in bad.reason


@pytest.mark.parametrize("kind", ["base64", "data URI", "list of paths", "bytes"])
def test_every_form_of_a_cell_is_the_same_picture(kind: str, tmp_path: Path) -> None:
    data = encoded(noise(8, 9))
    (tmp_path / "a.png").write_bytes(data)
    text = base64.b64encode(data).decode()
    cells = {
        "base64": text,
        "data URI": f"data:image/png;base64,{text}",
        "list of paths": ["a.png", "a.png"],
        "bytes": data,
    }
    rows = [{"image": cells[kind], "problem": "What?", "answer": "1"}]
    found = opened({"test": str(write_parquet(tmp_path / "rows.parquet", rows))})
    assert set(found.rows["test"][0].problem.images) == {data} and not found.bad
