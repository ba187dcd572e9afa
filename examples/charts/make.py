"""Draw a data set of charts, tables, scenes, sketches and pairs of pictures, as people's files are.

    python examples/charts/make.py                      # 3,000 rows into examples/charts/data
    python examples/charts/make.py --rows 8000 --short 0.6   # those of docs/your_data.md
    python examples/charts/make.py --rows 200 --out DIR --seed 1 --categories table bars

`train.parquet` and `test.parquet` have EasyR1's columns and some more:

| column | |
|---|---|
| `images` | a list of none, one or two PNG files, 64x64 |
| `problem` | the question, with `<image>` where an image stands |
| `answer` | the gold |
| `verifier` | the checker: number, expression, choice, text, box or point |
| `choices` | the options' texts, where the question has some |
| `category` | bars, line, pie, table, scene, geometry, pair or text |
| `perception` | what a perfect reader of the images would write down; "" in most rows |
| `response` | a right response in Equipoise's tags, for SFT; of the share `--short` a bare answer |
| `id` | |

A recipe reads them with

    [[tasks]]
    name = "vqa"
    data = "examples/charts/data"
    checker = { column = "verifier" }
    columns = { choices = "choices" }

No picture is in both files. The pictures are small and plain, so that a tiny policy, whose vision
tower sees 16 tokens of each, can learn to read them; the same seed draws the same rows.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

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


class Question(NamedTuple):
    """What is asked, the gold, its checker, how one gets there, and what a right answer writes."""

    words: str
    gold: str
    verifier: str
    why: str
    choices: tuple[str, ...] = ()
    said: str = ""


@dataclass(frozen=True)
class Row:
    """One problem; `seen` is what a perfect reader of the images would write down."""

    category: str
    question: Question
    seen: str
    images: tuple[bytes, ...] = ()
    labelled: bool = True
    short: bool = False

    @property
    def problem(self) -> str:
        """The words, with the images before them unless they say where."""
        words = self.question.words
        return words if "<image>" in words else "<image>" * len(self.images) + words

    @property
    def response(self) -> str:
        """A right one; a short one says neither what is seen nor why."""
        said = self.question.said or self.question.gold
        seen, why = ("-", "-") if self.short else (self.seen, self.question.why)
        return (
            f"<perception>\n{seen}\n</perception>\n<reasoning>\n{why}\n"
            f"</reasoning>\n<answer>\n{said}\n</answer>"
        )


def bars(rng: Rng) -> Row:
    """Three or four coloured bars, 1 to 9 high."""
    names = pick(rng, NAMES, int(rng.integers(3, 5)))
    heights = (rng.permutation(9)[: len(names)] + 1).tolist()
    high = dict(zip(names, heights, strict=True))
    one = choose(rng, *names)
    low, *_, top = sorted(names, key=high.__getitem__)
    question = choose(
        rng,
        Question(f"How high is the {one} bar?", str(high[one]), "number", f"{one} {high[one]}"),
        choice(rng, "Which bar is the highest?", names, top, f"{top} {high[top]}"),
        Question("What colour is the lowest bar?", low, "text", f"{low} {high[low]}"),
    )
    picture = plotted(
        lambda axes: axes.bar(
            range(len(names)), heights, width=0.9, color=[COLOURS[name] for name in names]
        ),
        (-0.5, len(names) - 0.5),
    )
    return Row("bars", question, "\n".join(f"{n} {high[n]}" for n in names), (picture,))


def line(rng: Rng) -> Row:
    """A line over five steps, with one highest and one lowest point."""
    heights = (rng.permutation(9)[:5] + 1).tolist()
    top = heights.index(max(heights))
    # Pixels: the axes fill the picture, from -0.5 to 4.5 and from 0 to 10.
    x, y = round((top + 0.5) * SIDE / 5), round(SIDE - heights[top] * SIDE / 10)
    near = listed((x - 6, y - 6, x + 6, y + 6))
    step = int(rng.integers(1, 5))
    turn = "rise" if heights[step] > heights[step - 1] else "fall"
    why = f"step {top + 1} is {heights[top]}"
    asked = f"The line has steps 1 to 5. Does it rise or fall from {step} to {step + 1}?"
    where = "Where is the highest point? Answer (x, y) in pixels of 64."
    question = choose(
        rng,
        Question(where, near, "point", why, said=f"({x}, {y})"),
        Question(asked, turn, "text", f"from {heights[step - 1]} to {heights[step]}"),
    )
    picture = plotted(lambda axes: axes.plot(heights, color="#202020", linewidth=2), (-0.5, 4.5))
    return Row("line", question, spaced(heights), (picture,))


def pie(rng: Rng) -> Row:
    """A pie cut in eighths, two or three colours."""
    names = pick(rng, NAMES, int(rng.integers(2, 4)))
    cuts = np.sort(rng.permutation(7)[: len(names) - 1] + 1).tolist()
    shares = [b - a for a, b in zip([0, *cuts], [*cuts, 8], strict=True)]
    name, share = choose(rng, *zip(names, shares, strict=True))
    why = f"{name} {share} of 8"
    question = Question(f"What share of the pie is {name}?", fraction(share, 8), "expression", why)
    colours = [COLOURS[name] for name in names]
    picture = plotted(
        lambda axes: axes.pie(shares, colors=colours, radius=1.2, startangle=90), None
    )
    seen = "\n".join(f"{name} {share}" for name, share in zip(names, shares, strict=True))
    return Row("pie", question, seen, (picture,))


def table(rng: Rng) -> Row:
    """Four rows of four digits."""
    cells = rng.integers(1, 10, size=(CELLS, CELLS))
    r, c = (int(place) for place in rng.integers(CELLS, size=2))
    sums = cells.sum(axis=1).tolist()
    shown, added = spaced(cells[r]), f"{' + '.join(map(str, cells[r]))} = {sums[r]}"
    what = f"What is in row {r + 1}, column {c + 1}?"
    largest = f"What is the largest number in row {r + 1}?"
    question = choose(
        rng,
        Question(what, str(cells[r, c]), "number", shown),
        Question(f"What do the numbers of row {r + 1} add up to?", str(sums[r]), "number", added),
        Question(largest, str(cells[r].max()), "number", shown),
    )
    return Row("table", question, grid(cells), (digits(cells),))


def scene(rng: Rng) -> Row:
    """Coloured discs and squares in the cells of a grid."""
    shown = scattered(rng)
    colours = [colour for colour, _ in shown.values()]
    shapes = [shape for _, shape in shown.values()]
    one = choose(rng, *NAMES)
    counts = {name: colours.count(name) for name in NAMES}
    discs, total = shapes.count("disc"), len(shown)
    compared = f"disc {discs}, square {total - discs}"
    more = "yes" if discs > total - discs else "no"
    of = f"{one} {counts[one]} of {total}"
    questions = [
        Question(f"How many {one} shapes are there?", str(counts[one]), "number", of),
        Question("Are there more discs than squares?", more, "text", compared),
    ]
    most = [name for name in NAMES if counts[name] == max(counts.values())]
    if len(most) == 1:
        why = f"{most[0]} {counts[most[0]]}"
        questions.append(choice(rng, "Which colour is there most of?", NAMES, most[0], why))
    if places := [place for place, (colour, _) in shown.items() if counts[colour] == 1]:
        r, c = choose(rng, *places)
        box = listed((c * CELL + 2, r * CELL + 2, (c + 1) * CELL - 2, (r + 1) * CELL - 2))
        words = f"Where is the {shown[r, c][0]} shape? Answer [x1, y1, x2, y2] in pixels of 64."
        questions.append(Question(words, box, "box", f"row {r + 1}, column {c + 1}"))
    return Row("scene", choose(rng, *questions), told(shown), (painted(shown),))


def geometry(rng: Rng) -> Row:
    """A right triangle or a rectangle with its sides written beside it."""
    a, b = (int(side) for side in rng.integers(2, 10, size=2))
    figure = choose(rng, "triangle", "rectangle")
    half = "" if figure == "rectangle" else ", half"
    area = fraction(a * b, 2 if half else 1)
    question = Question("What is the area?", area, "expression", f"{a}*{b} = {a * b}{half}")
    picture = sketched(a, b, figure == "triangle", choose(rng, *NAMES))
    return Row("geometry", question, f"{figure} {a} {b}", (picture,))


def pair(rng: Rng) -> Row:
    """Two scenes, or two tables that differ in some cells."""
    if rng.integers(2):
        here = there = 0
        while here == there:
            scenes = scattered(rng), scattered(rng)
            here, there = (sum(s == "disc" for _, s in shown.values()) for shown in scenes)
        words = "<image><image>Which picture has more discs?"
        more, why = "first" if here > there else "second", f"{here} and {there}"
        question = choice(rng, words, ("first", "second"), more, why)
        seen, pictures = "\nthen\n".join(map(told, scenes)), tuple(map(painted, scenes))
        return Row("pair", question, seen, pictures)
    cells = rng.integers(1, 10, size=(CELLS, CELLS))
    changed, count = cells.copy(), int(rng.integers(1, 5))
    for place in rng.permutation(CELLS**2)[:count]:
        changed.flat[place] = cells.flat[place] % 9 + 1
    words = "Before: <image> After: <image> How many numbers have changed?"
    by_row = spaced((cells != changed).sum(axis=1))
    seen = f"{grid(cells)}\nthen\n{grid(changed)}"
    pictures = digits(cells), digits(changed)
    return Row("pair", Question(words, str(count), "number", f"by row {by_row}"), seen, pictures)


def text(rng: Rng) -> Row:
    """A question without an image, and so without a label of what is seen."""
    a, b = (int(n) for n in rng.permutation(60)[:2] + 2)
    low, high = sorted((a, b))
    question = choose(
        rng,
        Question(f"What is {a} + {b}?", str(a + b), "number", f"{a} + {b} = {a + b}"),
        choice(rng, "Which number is larger?", (str(a), str(b)), str(high), f"{low} and {high}"),
    )
    return Row("text", question, "no image", labelled=False)


KINDS: tuple[tuple[Callable[[Rng], Row], float], ...] = (
    (bars, 0.2), (line, 0.1), (pie, 0.05), (table, 0.2), (scene, 0.25), (geometry, 0.04),
    (pair, 0.09), (text, 0.07),
)  # fmt: skip


def draw(count: int, seed: int, categories: Sequence[str] = (), short: float = 0.0) -> list[Row]:
    """Rows, of some categories only, whose pictures, or words where there are none, all differ.

    `short`: the share of them whose response is the answer alone, as people's mostly are.
    """
    chosen = [pair for pair in KINDS if not categories or pair[0].__name__ in categories]
    kinds, weights = zip(*chosen, strict=True)
    shares = np.array(weights) / sum(weights)
    rng = np.random.default_rng(seed)
    found: dict[bytes, Row] = {}
    for _ in range(count):
        kind = kinds[int(rng.choice(len(kinds), p=shares))]
        for _ in range(PATIENCE):
            made = kind(rng)
            key = hashlib.sha256(b"".join(made.images) or made.problem.encode()).digest()
            if key not in found:
                break
        else:
            raise SystemExit(f"make.py: no {count} rows that differ; ask for fewer")
        labelled = rng.random() < LABELLED
        found[key] = replace(made, labelled=made.labelled and labelled)
    answers = np.random.default_rng([seed, 1]).random(len(found)) < short
    return [replace(row, short=bool(n)) for row, n in zip(found.values(), answers, strict=True)]


def write(rows: Sequence[Row], path: Path, first: int) -> None:
    """A Parquet file as the `datasets` library writes it."""
    from datasets import Dataset, Features, Image, Sequence, Value, disable_progress_bars

    disable_progress_bars()

    records = [
        {
            "id": f"charts-{first + n:05}",
            "images": [{"bytes": image, "path": None} for image in row.images],
            "problem": row.problem,
            "answer": row.question.gold,
            "verifier": row.question.verifier,
            "choices": list(row.question.choices),
            "category": row.category,
            "perception": row.seen if row.labelled else "",
            "response": row.response,
        }
        for n, row in enumerate(rows)
    ]
    lists = {"images": Sequence(Image()), "choices": Sequence(Value("string"))}
    features = Features({name: lists.get(name, Value("string")) for name in records[0]})
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(records, features=features).to_parquet(path)


def choice(rng: Rng, words: str, options: Sequence[str], right: str, why: str) -> Question:
    """A question with its options in any order, whose gold is a letter."""
    shown = pick(rng, options, len(options))
    letters = "ABCD"[: len(shown)]
    listing = " ".join(f"({a}) {option}" for a, option in zip(letters, shown, strict=True))
    return Question(f"{words} {listing}", letters[shown.index(right)], "choice", why, shown)


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


def listed(numbers: Sequence[int]) -> str:
    """A JSON list."""
    return f"[{', '.join(map(str, numbers))}]"


def spaced(numbers: Iterable[int]) -> str:
    """Numbers as in a row of a table."""
    return " ".join(map(str, numbers))


def grid(cells: np.ndarray) -> str:
    """A table as text."""
    return "\n".join(map(spaced, cells.tolist()))


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
    names = [kind.__name__ for kind, _ in KINDS]
    parser.add_argument("--categories", nargs="+", choices=names, default=(), help="only these")
    parser.add_argument("--out", type=Path, default=HERE / "data")
    parser.add_argument("--short", type=float, default=0.0, help="share of bare answers for SFT")
    given = parser.parse_args()
    if not 0 <= given.short <= 1:
        parser.error("--short: a share from 0 to 1")
    if given.rows < 10:
        parser.error("--rows: at least 10, so that both files have some")
    rows = draw(given.rows, given.seed, given.categories, given.short)
    held_out = round(TEST_SHARE * len(rows))
    write(rows[held_out:], given.out / "train.parquet", held_out)
    write(rows[:held_out], given.out / "test.parquet", 0)
    print(f"{given.out}: train.parquet {len(rows) - held_out} rows, test.parquet {held_out}")


if __name__ == "__main__":
    main()
