"""The rollouts that a report shows: which are chosen, and what is told of each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.record.tracker import Tracker
from cluster.report.charts import CELLS
from cluster.report.choice import Entry, choose
from cluster.report.rollouts import _pieces, read_shown
from rewards.compose import Composition, compose_groups
from rewards.terms import Outcome, score_group
from tasks.core import Parsed
from tasks.figures import Words
from tests.support.report_pages import RUN_RECIPE
from tests.support.toys import TASK, Doubling, group


def entry(step: int, cell: int, name: str, defects: tuple[str, ...] = ()) -> Entry:
    return Entry(Path("x"), 0, step, name, f"p{name}", "sudoku", f"i{name}", cell, defects)


@settings(max_examples=8)
@given(seed=st.integers(0, 10_000), limit=st.integers(120, 200))
def test_the_choice_represents_every_kind_and_is_the_same_each_time(seed: int, limit: int) -> None:
    rng = np.random.default_rng(seed)
    entries = [
        entry(
            int(rng.integers(1, 40)),
            int(rng.choice(5, p=[0.9, 0.07, 0.02, 0.005, 0.005])),
            str(i),
            tuple(f"d{d}" for d in range(8) if rng.random() < 0.5**d / 8),
        )
        for i in range(600)
    ]
    again = Entry(**(vars(entries[0]) | {"rollout_id": "again", "step": entries[0].step + 50}))
    entries.append(again)
    chosen = choose(entries, limit)
    assert len(chosen) == len({e.rollout_id for e in chosen}) == limit
    for kind in ("step", "cell"):
        assert {getattr(e, kind) for e in chosen} == {getattr(e, kind) for e in entries}
    assert {d for e in chosen for d in e.defects} == {d for e in entries for d in e.defects}
    assert {"0", "again"} <= {e.rollout_id for e in chosen}
    shuffled = [entries[i] for i in rng.permutation(len(entries))]
    assert {e.rollout_id for e in choose(shuffled, limit)} == {e.rollout_id for e in chosen}
    assert choose(entries[:limit], limit) == entries[:limit]


def test_a_users_own_task_is_compared_as_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toys = [group(5, "5;10;", "4;8;made_up"), group(2, "2;666;")]
    terms = Composition({"outcome": 1.0}, on_failure={"outcome": "drop_group"})
    scored = compose_groups(
        toys, [score_group(TASK, g, {"outcome": Outcome()}) for g in toys], terms
    )
    with Tracker(tmp_path, RUN_RECIPE) as tracker:
        tracker.log_rollouts(1, scored)
    shown = read_shown(tmp_path).rollouts
    assert shown[1]["figure"]["rows"] == [["missing", "5"], ["extra", "4"]]
    assert shown[1]["defects"] == ["made_up"]
    assert shown[2]["cell"] == CELLS.index("not judged")
    assert (shown[2]["total"], shown[2]["note"]) == (None, "dropped")
    assert "the checker cannot take 666" in shown[2]["failures"][0]
    # One that draws is asked for it; where it fails at that, the texts are compared again.
    for name in ("draw_perception", "draw_answer"):
        monkeypatch.setattr(Doubling, name, lambda *_: Words(rows=(), text="drawn"), raising=False)
    drawn = {"kind": "words", "rows": [], "text": "drawn"}
    assert [r["figure"] for r in read_shown(tmp_path).rollouts] == [drawn] * 3
    monkeypatch.setattr(Doubling, "draw_answer", lambda *_: 1 / 0)
    assert read_shown(tmp_path).rollouts[1]["figure"] == shown[1]["figure"]
    # A parser that raises on what it reads, as no stored row of ours would make it.
    file = tmp_path / "rollouts" / "step-000001.parquet"
    table = pq.read_table(file)
    place = table.schema.get_field_index("text")
    pq.write_table(table.set_column(place, "text", pa.array(["<b>"] * 3)), file)
    assert read_shown(tmp_path).rollouts[0]["pieces"] == [["", "<b>"]]
    unknown = table.set_column(
        table.schema.get_field_index("task"), "task", pa.array(["no_such:Task"] * 3)
    )
    pq.write_table(unknown, file)
    found = read_shown(tmp_path)
    assert "no_such" in found.problems[0]
    assert found.rollouts[0]["pieces"] == [["", "5;10;"]]


def test_a_call_is_a_piece_of_its_own_wherever_it_stands() -> None:
    text = "I see. <look>1</look>so<look>2</look>4"
    spans = {"reasoning": (7, 37), "answer": (37, 38)}
    parsed = Parsed(None, "", None, spans, ())  # type: ignore[arg-type]
    assert _pieces(text, parsed, [(7, 21), (23, 37)]) == [
        ["", "I see. "], ["act", "<look>1</look>"], ["reasoning", "so"],
        ["act", "<look>2</look>"], ["answer", "4"],
    ]  # fmt: skip
    assert _pieces(text, None, []) == [["", text]]
