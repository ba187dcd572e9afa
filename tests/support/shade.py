"""A task of 4x4 pixels, and small files for the tests of data sets."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict

from tasks.core import DataError, Parsed, Problem, Style
from tasks.datasets import read_examples
from tasks.responses import Read, compose_response, oracle_prefix, parse_response
from tests.support.image_files import encoded


class ShadeSpec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    shades: int = 200
    grain: int = 1000


class Shade:
    """See a grey level, answer with the next one; a picture's grain is no part of the problem."""

    name = "shade"
    spec: type[BaseModel] = ShadeSpec

    def generate(self, rng: np.random.Generator, spec: BaseModel) -> Problem:
        assert isinstance(spec, ShadeSpec)
        shade, grain = int(rng.integers(spec.shades)), int(rng.integers(spec.grain))
        image = self.picture(shade, grain)
        return self._problem("Which shade?", image, shade, f"shade-{shade}-{grain}")

    def picture(self, shade: int, grain: int = 0) -> bytes:
        out = io.BytesIO()
        Image.new("RGB", (4, 4), (shade, grain % 256, grain // 256)).save(out, format="PNG")
        return out.getvalue()

    def _problem(self, prompt: str, image: bytes, shade: int, name: str) -> Problem:
        return Problem(
            id=name,
            task=self.name,
            prompt=prompt,
            perception=str(shade),
            truth={"shade": shade},
            knobs={"shades": 200},
            symmetry_key=f"key-{shade}",
            images=(image,),
        )

    def number(self, text: str) -> Read:
        digits = text.strip()
        read = digits.isdecimal() and len(digits) < 9
        return (int(digits), ()) if read else (None, ("bad_number",))

    def parse(self, text: str) -> Parsed:
        return parse_response(text, self.number, self.number)

    def check(self, problem: Problem, answer: Any) -> bool:
        return bool(answer == problem.truth["shade"] + 1)

    def score_perception(self, problem: Problem, perception: Any) -> tuple[bool, float]:
        exact = perception == problem.truth["shade"]
        return exact, float(exact)

    def consistent(self, problem: Problem, perception: Any, answer: Any) -> bool:
        return bool(answer == perception + 1)

    def oracle_prefix(self, problem: Problem) -> str:
        return oracle_prefix(problem.perception)

    def solve(self, problem: Problem, perception: Any) -> Any | None:
        return perception + 1

    def demonstrate(self, problem: Problem, style: Style) -> str:
        shade = problem.truth["shade"]
        return compose_response(
            str(shade), "one more" * (1 + 9 * (style == "verbose")), f"{shade + 1}"
        )

    def from_row(self, query: str, image: bytes, ground_truth: str) -> Problem:
        if not ground_truth.isdecimal():
            raise DataError(f"ground_truth: {ground_truth!r} is not a shade; write a number")
        return self._problem(query, image, int(ground_truth), f"shade-{ground_truth}")

    def to_ground_truth(self, problem: Problem) -> str:
        return str(problem.truth["shade"])


SHADE = Shade()
SPEC = ShadeSpec()


def shades(numbers: Iterable[int]) -> list[Problem]:
    return [SHADE.from_row("Which shade?", b"", str(number)) for number in numbers]


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too, with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def png(shade: int = 0, side: int = 4) -> bytes:
    return encoded(Image.new("RGB", (side, side), (shade, 0, 0)))


def read_dataset(path: str | Path, split: str = "train", **options: Any) -> list[Problem]:
    """All problems of a split."""
    return [example.problem for example in read_examples(path, split, **options)]
