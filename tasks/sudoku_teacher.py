"""The reasoning of a Sudoku demonstration: a terse and a verbose chain of thought."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tasks.sudoku_puzzle import (
    Layout,
    Step,
    candidates_of,
    digits_of,
    flat,
    layout_of,
    singles,
)


def terse_steps(puzzle: Sequence[Sequence[int]], solution: Sequence[Sequence[int]]) -> str:
    """A line a blank, in solving order: `r1c2=3`."""
    size = len(puzzle)
    return "\n".join(
        f"{_cell_name(step.cell, size)}={step.digit}" for step in _steps(puzzle, solution)
    )


def verbose_steps(puzzle: Sequence[Sequence[int]], solution: Sequence[Sequence[int]]) -> str:
    """The grid restated, every step with its reason, and a check of every unit."""
    size = len(puzzle)
    layout = layout_of(size * size)
    cells = flat(puzzle)
    blanks = [cell for cell, digit in enumerate(cells) if not digit]
    lines = [
        f"The grid has {size * size - len(blanks)} given digits and {len(blanks)} empty cells. "
        f"Every row, column and box must hold each digit from 1 to {size} once.",
        "What each empty cell may hold at the start:",
    ]
    lines += [
        f"{_cell_name(cell, size)}: {_listed(digits_of(candidates_of(cells, cell)))}."
        for cell in blanks
    ]
    for number, step in enumerate(_steps(puzzle, solution), start=1):
        name = _cell_name(step.cell, size)
        lines.append(f"Step {number}: {_why(cells, step, layout)} So {name} = {step.digit}.")
        cells[step.cell] = step.digit
    lines.append("Every cell is filled. Check each row, column and box:")
    lines += [
        f"{_unit_name(unit, size).capitalize()} reads "
        f"{' '.join(str(cells[cell]) for cell in layout.units[unit])}, each digit once."
        for unit in range(3 * size)
    ]
    return "\n".join(lines)


def _steps(puzzle: Sequence[Sequence[int]], solution: Sequence[Sequence[int]]) -> Iterator[Step]:
    """Every blank in solving order; where singles end, a step with several candidates left.

    Such a step takes the blank with the fewest candidates; only the true one leads on.
    """
    cells, truth = flat(puzzle), flat(solution)
    while True:
        yield from singles(cells, hidden=True)
        if 0 not in cells:
            return
        open_ = {cell: candidates_of(cells, cell) for cell, digit in enumerate(cells) if not digit}
        cell = min(open_, key=lambda blank: open_[blank].bit_count())
        cells[cell] = truth[cell]
        yield Step(cell, truth[cell], open_[cell], None)


def _why(cells: list[int], step: Step, layout: Layout) -> str:
    """The reason for a step, told from the board as it is before the step."""
    size = layout.size
    name = _cell_name(step.cell, size)
    if step.unit is not None:
        unit = layout.units[step.unit]
        excluded = [
            f"{_cell_name(other, size)} cannot, its {_blocker(cells, other, step.digit, layout)} "
            f"has {step.digit}"
            for other in unit
            if not cells[other] and other != step.cell
        ]
        return (
            f"{_unit_name(step.unit, size).capitalize()} still needs {step.digit}; "
            f"where can it go? {'; '.join(excluded)}. Only {name} is left for it."
        )
    have = [
        f"{_unit_name(unit, size)} has "
        + _listed(sorted(cells[cell] for cell in layout.units[unit] if cells[cell]))
        for unit in layout.of[step.cell]
    ]
    text = f"{name}. {'; '.join(have).capitalize()}. "
    options = digits_of(step.candidates)
    if len(options) == 1:
        return f"{text}The only digit left is {step.digit}."
    text += f"That leaves {_listed(options)}, and no other cell or digit is forced, so try them."
    for option in options:
        if option != step.digit:
            text += f" {_failed_trial(cells, step.cell, option, layout)}"
    return text


def _failed_trial(cells: list[int], cell: int, digit: int, layout: Layout) -> str:
    """What comes of trying a wrong digit, told as far as singles lead."""
    trial = list(cells)
    trial[cell] = digit
    size = layout.size
    forced = [
        f"{_cell_name(step.cell, size)} = {step.digit}" for step in singles(trial, hidden=True)
    ]
    told = f"Try {_cell_name(cell, size)} = {digit}"
    if forced:
        told += f": it forces {', '.join(forced)}"
    for other, held in enumerate(trial):
        if not held and not candidates_of(trial, other):
            return f"{told}. Then {_cell_name(other, size)} can hold nothing, so {digit} fails."
    for number, unit in enumerate(layout.units):
        places = 0
        for other in unit:
            places |= 1 << (trial[other] - 1) if trial[other] else candidates_of(trial, other)
        if places != layout.full:
            missing = digits_of(layout.full & ~places)[0]
            return (
                f"{told}. Then {_unit_name(number, size)} has no place for {missing}, "
                f"so {digit} fails."
            )
    return f"{told}. No way of filling the rest works from there, so {digit} fails."


def _blocker(cells: Sequence[int], cell: int, digit: int, layout: Layout) -> str:
    """Which of a cell's units already holds the digit."""
    for kind, unit in zip(("row", "column", "box"), layout.of[cell], strict=True):
        if any(cells[other] == digit for other in layout.units[unit]):
            return kind
    raise AssertionError(f"digit {digit} is not excluded from cell {cell}")


def _cell_name(cell: int, size: int) -> str:
    return f"r{cell // size + 1}c{cell % size + 1}"


def _unit_name(unit: int, size: int) -> str:
    return f"{('row', 'column', 'box')[unit // size]} {unit % size + 1}"


def _listed(digits: Sequence[int]) -> str:
    return ", ".join(map(str, digits)) or "nothing"
