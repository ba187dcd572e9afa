"""Draw a data set of charts, tables, scenes, sketches and pairs of pictures, as people's files are.

    python examples/charts/make.py                      # 3,000 rows into examples/charts/data
    python examples/charts/make.py --rows 200 --out DIR --seed 1

`train.parquet` and `test.parquet` have EasyR1's columns and some more:

| column | |
|---|---|
| `images` | a list of none, one or two PNG files, 64x64 |
| `problem` | the question, with `<image>` where an image stands |
| `answer` | the gold |
| `verifier` | the checker: number, expression, choice, text, box or point |
| `choices` | the options' texts, where the question has some |
| `category` | bars, line, pie, table, scene, geometry, pair or text |
| `perception` | what a perfect reader of the image would write down; "" in most rows |
| `id` | |

No picture is in both files. The pictures are small and plain, so that a tiny policy, whose vision
tower sees 16 tokens of each, can learn to read them; the same seed draws the same rows.
"""

from __future__ import annotations

import argparse
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from pictures import CELL, CELLS, COLOURS, SIDE, Scene, digits, painted, plotted, sketched

NAMES = tuple(COLOURS)
SHAPES = ("disc", "square")
LABELLED = 0.6
"""Share of rows that keep their perception label, of those that have one."""
TEST_SHARE = 0.15
PATIENCE = 1000
HERE = Path(__file__).resolve().parent

Rng = np.random.Generator


@dataclass(frozen=True)
class Row:
    """One problem."""

    category: str
    problem: str
    answer: str
    verifier: str
    images: tuple[bytes, ...] = ()
    perception: str = ""
    choices: tuple[str, ...] = ()


# What a question asks: its words, the gold, the checker and the options.
Question = tuple[str, str, str, tuple[str, ...]]


def bars(rng: Rng) -> Row:
    """Three or four coloured bars, 1 to 9 high."""
    names = pick(rng, NAMES, int(rng.integers(3, 5)))
    heights = (rng.permutation(9)[: len(names)] + 1).tolist()
    high = dict(zip(names, heights, strict=True))
    one, other = pick(rng, names, 2)
    ordered = sorted(names, key=high.__getitem__)
    question = choose(
        rng,
        (f"How high is the {one} bar?", str(high[one]), "number", ()),
        (f"How high are {one} and {other} together?", str(high[one] + high[other]), "number", ()),
        choice(rng, "Which bar is the highest?", names, ordered[-1]),
        ("What colour is the lowest bar?", ordered[0], "text", ()),
    )
    picture = plotted(
        lambda axes: axes.bar(
            range(len(names)), heights, width=0.9, color=[COLOURS[name] for name in names]
        ),
        (-0.5, len(names) - 0.5),
    )
    return row("bars", question, (picture,), "\n".join(f"{n} {high[n]}" for n in names))


def line(rng: Rng) -> Row:
    """A line over five steps, with one highest and one lowest point."""
    heights = (rng.permutation(9)[:5] + 0.5).tolist()
    top = int(np.argmax(heights))
    # Pixels: the axes fill the picture, from -0.5 to 4.5 and from 0 to 10.
    x, y = (top + 0.5) * SIDE / 5, SIDE - heights[top] * SIDE / 10
    near = [round(edge) for edge in (x - 6, y - 6, x + 6, y + 6)]
    step = int(rng.integers(1, 5))
    question = choose(
        rng,
        ("The line has steps 1 to 5. At which is it highest?", str(top + 1), "number", ()),
        ("Where is the highest point? Answer (x, y) in pixels of 64.", listed(near), "point", ()),
        (
            f"The line has steps 1 to 5. Does it rise or fall from {step} to {step + 1}?",
            "rise" if heights[step] > heights[step - 1] else "fall",
            "text",
            (),
        ),
    )
    picture = plotted(lambda axes: axes.plot(heights, color="#202020", linewidth=2), (-0.5, 4.5))
    return row("line", question, (picture,))


def pie(rng: Rng) -> Row:
    """A pie cut in eighths, two or three colours."""
    names = pick(rng, NAMES, int(rng.integers(2, 4)))
    cuts = np.sort(rng.permutation(7)[: len(names) - 1] + 1).tolist()
    shares = [b - a for a, b in zip([0, *cuts], [*cuts, 8], strict=True)]
    one = int(rng.integers(len(names)))
    question = choose(
        rng,
        (f"What share of the pie is {names[one]}?", fraction(shares[one], 8), "expression", ()),
        (f"How many eighths of the pie are {names[one]}?", str(shares[one]), "number", ()),
    )
    colours = [COLOURS[name] for name in names]
    picture = plotted(
        lambda axes: axes.pie(shares, colors=colours, radius=1.2, startangle=90), None
    )
    seen = "\n".join(f"{name} {share}" for name, share in zip(names, shares, strict=True))
    return row("pie", question, (picture,), seen)


def table(rng: Rng) -> Row:
    """Four rows of four digits."""
    cells = rng.integers(1, 10, size=(CELLS, CELLS))
    r, c = (int(place) for place in rng.integers(CELLS, size=2))
    sums = cells.sum(axis=1).tolist()
    rows = tuple(f"row {n + 1}" for n in range(CELLS))
    questions = [
        (f"What is in row {r + 1}, column {c + 1}?", str(cells[r, c]), "number", ()),
        (f"What do the numbers of row {r + 1} add up to?", str(sums[r]), "number", ()),
        (f"What is the largest number in row {r + 1}?", str(cells[r].max()), "number", ()),
        (f"What is the mean of row {r + 1}?", fraction(sums[r], CELLS), "expression", ()),
    ]
    if sums.count(max(sums)) == 1:
        best = rows[sums.index(max(sums))]
        questions.append(choice(rng, "Which row has the largest sum?", rows, best))
    seen = "\n".join(" ".join(map(str, line)) for line in cells.tolist())
    return row("table", choose(rng, *questions), (digits(cells),), seen)


def scene(rng: Rng) -> Row:
    """Coloured discs and squares in the cells of a grid."""
    shown = scattered(rng)
    colours = [colour for colour, _ in shown.values()]
    shapes = [shape for _, shape in shown.values()]
    one, shape = choose(rng, *NAMES), choose(rng, *SHAPES)
    counts = {name: colours.count(name) for name in NAMES}
    questions: list[Question] = [
        (f"How many {one} shapes are there?", str(counts[one]), "number", ()),
        (f"How many {shape}s are there?", str(shapes.count(shape)), "number", ()),
        ("How many shapes are there?", str(len(shown)), "number", ()),
        (
            f"What share of the shapes is {one}?",
            fraction(counts[one], len(shown)),
            "expression",
            (),
        ),
        (
            "Are there more discs than squares?",
            "yes" if shapes.count("disc") > shapes.count("square") else "no",
            "text",
            (),
        ),
    ]
    most = [name for name in NAMES if counts[name] == max(counts.values())]
    if len(most) == 1:
        questions.append(choice(rng, "Which colour is there most of?", NAMES, most[0]))
    if places := [place for place, (colour, _) in shown.items() if counts[colour] == 1]:
        r, c = choose(rng, *places)
        edges = [c * CELL + 2, r * CELL + 2, (c + 1) * CELL - 2, (r + 1) * CELL - 2]
        words = f"Where is the {shown[r, c][0]} shape? Answer [x1, y1, x2, y2] in pixels of 64."
        questions.append((words, listed(edges), "box", ()))
    return row("scene", choose(rng, *questions), (painted(shown),), told(shown))


def geometry(rng: Rng) -> Row:
    """A right triangle or a rectangle with its sides written beside it."""
    a, b = (int(side) for side in rng.integers(2, 10, size=2))
    triangle = bool(rng.integers(2))
    long = math.isqrt(a * a + b * b)
    slant = str(long) if long**2 == a * a + b * b else rf"\sqrt{{{a * a + b * b}}}"
    if triangle:
        question = choose(
            rng,
            ("What is the area of the triangle?", fraction(a * b, 2), "expression", ()),
            ("How long is the longest side of the triangle?", slant, "expression", ()),
        )
    else:
        question = choose(
            rng,
            ("What is the area of the rectangle?", str(a * b), "number", ()),
            ("What is the perimeter of the rectangle?", str(2 * (a + b)), "number", ()),
            ("How long is the diagonal of the rectangle?", slant, "expression", ()),
        )
    seen = f"{'triangle' if triangle else 'rectangle'} {a} {b}"
    return row("geometry", question, (sketched(a, b, triangle, choose(rng, *NAMES)),), seen)


def pair(rng: Rng) -> Row:
    """Two scenes, or two tables that differ in some cells."""
    if rng.integers(2):
        first, second = scattered(rng), scattered(rng)
        shape, one = choose(rng, *SHAPES), choose(rng, *NAMES)
        here, there = (sum(s == shape for _, s in shown.values()) for shown in (first, second))
        both = sum(c == one for shown in (first, second) for c, _ in shown.values())
        questions: list[Question] = [
            (f"<image><image>How many {one} shapes are in both pictures?", str(both), "number", ())
        ]
        if here != there:
            more = "first" if here > there else "second"
            words = f"<image><image>Which picture has more {shape}s?"
            questions.append(choice(rng, words, ("first", "second"), more))
        return row("pair", choose(rng, *questions), (painted(first), painted(second)))
    cells = rng.integers(1, 10, size=(CELLS, CELLS))
    changed, count = cells.copy(), int(rng.integers(1, 5))
    for place in rng.permutation(CELLS**2)[:count]:
        changed.flat[place] = cells.flat[place] % 9 + 1
    words = "Before: <image> After: <image> How many numbers have changed?"
    return row("pair", (words, str(count), "number", ()), (digits(cells), digits(changed)))


def text(rng: Rng) -> Row:
    """A question without an image."""
    a, b = (int(n) for n in rng.permutation(60)[:2] + 2)
    over, under = sorted((a, b))
    return row(
        "text",
        choose(
            rng,
            (f"What is {a} + {b}?", str(a + b), "number", ()),
            (f"What is {under} - {over}?", str(under - over), "number", ()),
            (f"Reduce {over}/{under}.", fraction(over, under), "expression", ()),
            choice(rng, "Which number is larger?", (str(a), str(b)), str(under)),
        ),
        (),
    )


KINDS: tuple[tuple[Callable[[Rng], Row], float], ...] = (
    (bars, 0.18), (line, 0.08), (pie, 0.08), (table, 0.2), (scene, 0.22), (geometry, 0.08),
    (pair, 0.09), (text, 0.07),
)  # fmt: skip


def draw(count: int, seed: int) -> list[Row]:
    """Rows whose pictures, or words where there are none, all differ."""
    kinds, weights = zip(*KINDS, strict=True)
    rng = np.random.default_rng(seed)
    found: dict[bytes, Row] = {}
    for _ in range(count):
        kind = kinds[int(rng.choice(len(kinds), p=weights))]
        for _ in range(PATIENCE):
            made = kind(rng)
            key = hashlib.sha256(b"".join(made.images) or made.problem.encode()).digest()
            if key not in found:
                break
        else:
            raise SystemExit(f"make.py: no {count} rows that differ; ask for fewer")
        labelled = rng.random() < LABELLED
        found[key] = made if labelled else replace(made, perception="")
    return list(found.values())


def write(rows: Sequence[Row], path: Path, first: int) -> None:
    """A Parquet file as the `datasets` library writes it."""
    from datasets import Dataset, Features, Image, Sequence, Value, disable_progress_bars

    disable_progress_bars()

    words = {name: Value("string") for name in ("problem", "answer", "verifier", "category")}
    features = Features(
        {"id": Value("string"), "images": Sequence(Image()), **words,
         "choices": Sequence(Value("string")), "perception": Value("string")}
    )  # fmt: skip
    records = [
        {
            "id": f"charts-{first + n:05}",
            "images": [{"bytes": image, "path": None} for image in made.images],
            "choices": list(made.choices),
            "perception": made.perception,
            **{name: getattr(made, name) for name in words},
        }
        for n, made in enumerate(rows)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(records, features=features).to_parquet(path)


def row(category: str, question: Question, images: tuple[bytes, ...], perception: str = "") -> Row:
    """A question about images, which stand before it unless it says where."""
    words, answer, verifier, choices = question
    if "<image>" not in words:
        words = "<image>" * len(images) + words
    return Row(category, words, answer, verifier, images, perception, choices)


def choice(rng: Rng, words: str, options: Sequence[str], right: str) -> Question:
    """A question with its options in any order, whose gold is a letter."""
    shown = pick(rng, options, len(options))
    letters = "ABCD"[: len(shown)]
    listing = " ".join(f"({a}) {option}" for a, option in zip(letters, shown, strict=True))
    return f"{words} {listing}", letters[shown.index(right)], "choice", shown


def choose(rng: Rng, *options: Any) -> Any:
    """One of them."""
    return options[int(rng.integers(len(options)))]


def pick(rng: Rng, options: Sequence[str], count: int) -> tuple[str, ...]:
    """Some of them, in any order."""
    return tuple(options[int(place)] for place in rng.permutation(len(options))[:count])


def fraction(over: int, under: int) -> str:
    """Reduced, as LaTeX; a whole number as such."""
    value = Fraction(over, under)
    if value.denominator == 1:
        return str(value.numerator)
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def listed(numbers: Sequence[float]) -> str:
    """A JSON list."""
    return f"[{', '.join(f'{number:g}' for number in numbers)}]"


def scattered(rng: Rng) -> Scene:
    """Two to nine shapes in different cells, in reading order."""
    places = np.sort(rng.permutation(CELLS**2)[: int(rng.integers(2, 10))])
    return {
        (int(place) // CELLS, int(place) % CELLS): (choose(rng, *NAMES), choose(rng, *SHAPES))
        for place in places
    }


def told(shown: Scene) -> str:
    """How many there are of each kind."""
    kinds = list(shown.values())
    return "\n".join(f"{c} {s} {kinds.count((c, s))}" for c, s in sorted(set(kinds)))


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "data")
    given = parser.parse_args()
    if given.rows < 10:
        parser.error("--rows: at least 10, so that both files have some")
    rows = draw(given.rows, given.seed)
    held_out = round(TEST_SHARE * len(rows))
    write(rows[held_out:], given.out / "train.parquet", held_out)
    write(rows[:held_out], given.out / "test.parquet", 0)
    print(f"{given.out}: train.parquet {len(rows) - held_out} rows, test.parquet {held_out}")


if __name__ == "__main__":
    main()
