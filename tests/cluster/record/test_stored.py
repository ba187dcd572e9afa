"""Rollouts read back: what was scored can be scored again, and a spoilt file says where."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cluster.ablation.results import RESULT_SCHEMA
from cluster.recipe.sections import OutputConfig
from cluster.record.folder import (
    DEMONSTRATION_SCHEMA,
    METRIC_SCHEMA,
    NAMED_VALUES,
    ROLLOUT_SCHEMA,
    by_name,
)
from cluster.record.stored import not_kept, read_groups, read_rollouts, read_scores, stored_steps
from cluster.record.tracker import Tracker
from cluster.report.diagnose import run_diagnose
from cluster.report.rollouts import read_shown
from cluster.report.run_report import FLAT_SCHEMA, read_run
from rewards.compose import Composition
from rewards.diagnosis import diagnose
from rewards.scored import ScoredGroup
from rewards.terms import Outcome, score_group
from rollout.record import Group, Turn
from tasks.core import DataError
from tasks.drawing import to_png
from tasks.images import content_hash
from tests.support.toys import TASK, Length, Misbehaves, group, scored


def failing(*groups: Group, composition: Composition | None = None) -> list[ScoredGroup]:
    return scored(*groups, terms=[Misbehaves("nan")], composition=composition)


LENIENT = Composition({"outcome": 1.0}, on_failure={"nan": "drop_group"})
ZERO = Composition({"outcome": 1.0}, on_failure={"nan": "zero"})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    first = group(5, "5;10;", "4;10;bad_cell", ";;x,y", name="a")
    second = group(3, "3;6;", kind="oracle", prefix="", finish_reason="length", name="b")
    with Tracker(tmp_path / "run") as tracker:
        tracker.log_rollouts(2, failing(first, second, group(0, "0;0;"), composition=LENIENT))
        tracker.log_rollouts(11, failing(group(0, "0;0;", "1;2;"), composition=ZERO))
    return tmp_path / "run"


def file_of(run: Path) -> Path:
    return run / "rollouts" / "step-000002.parquet"


def rewrite(run: Path, column: str, values: list[object] | None, type_: object = None) -> None:
    """Replace a column of step 2 (None removes it)."""
    table = pq.read_table(file_of(run))
    index = table.schema.get_field_index(column)
    if values is None:
        table = table.remove_column(index)
    else:
        kind = type_ or table.schema.field(index).type
        table = table.set_column(index, column, pa.array(values, kind))
    pq.write_table(table, file_of(run))


def test_groups_come_back_as_they_were(run: Path) -> None:
    originals = failing(
        group(5, "5;10;", "4;10;bad_cell", ";;x,y", name="a"),
        group(3, "3;6;", kind="oracle", prefix="", finish_reason="length", name="b"),
        group(0, "0;0;"),
        composition=LENIENT,
    )
    assert stored_steps(run) == [2, 11]
    back = read_groups(run, 2)
    assert len(back) == 3
    for old, new in zip(originals, back, strict=True):
        assert new.group.group_id == old.group.group_id
        assert new.group.problem == old.group.problem
        for a, b in zip(old.group.rollouts, new.group.rollouts, strict=True):
            for name, value in vars(a).items():
                if isinstance(value, np.ndarray):
                    assert value.dtype == getattr(b, name).dtype
                    assert np.array_equal(value, getattr(b, name))
                else:
                    assert value == getattr(b, name)
        assert {n: v.tolist() for n, v in new.scores.terms.items()} == {
            n: v.tolist() for n, v in old.terms.items()
        }
        assert np.array_equal(new.scores.totals, old.totals, equal_nan=True)
        assert (new.scores.zero_variance, new.scores.dropped) == (old.zero_variance, old.dropped)
        assert (new.scores.step, new.scores.task) == (2, TASK.name)
        # Scored again, the same comes out.
        again = score_group(TASK, new.group, {"outcome": Outcome(), "length": Length()})
        assert np.array_equal(again.values["outcome"], old.terms["outcome"])
        found, true = diagnose(TASK, new.group), new.scores.diagnosis
        assert true is not None
        assert found.defects == true.defects
        for name in ("a", "a_p", "a_p_graded", "self_consistency", "leak"):
            assert np.array_equal(getattr(found, name), getattr(true, name))
    failure = back[2].scores.failures[0]
    assert (failure.term, failure.kind) == ("nan", "nan")
    assert "nan" not in back[2].scores.terms


def test_several_images_or_none_and_other_columns_come_back(tmp_path: Path) -> None:
    one = group(5, "5;10;", "4;10;")
    pictures = (b"\x89PNG a", b"\xff\xd8 b", b"\x89PNG a")
    several = replace(one.problem, images=pictures, extra={"source": ["é", {"n": 1}]})
    none = replace(one.problem, id="none", images=())
    groups = [replace(one, group_id=name, problem=of) for name, of in (("a", several), ("b", none))]
    with Tracker(tmp_path) as tracker:
        tracker.log_rollouts(1, scored(*groups))
    assert [found.group.problem for found in read_groups(tmp_path, 1)] == [several, none]
    assert {file.read_bytes() for file in (tmp_path / "images").iterdir()} == set(pictures)
    shown = read_shown(tmp_path)
    assert [len(rollout["images"]) for rollout in shown.rollouts] == [3, 3, 0, 0]
    assert shown.images.keys() == {sha for r in shown.rollouts for sha in r["images"]}
    assert len(shown.images) == 2


def test_episodes_come_back_with_their_images_and_turns(tmp_path: Path) -> None:
    own, crop, kept = (to_png(Image.new("RGB", (20, 20), c)) for c in ("red", "blue", "green"))
    made = group(5, "5;10;", "4;10;")
    turns = (
        Turn("so <look>100 200 300 400</look>", True, "there\ud800", 1, 0.5, ("odd",)),
        Turn("5;10;"),
    )
    asked = replace(made.problem, images=(own,))
    looked = replace(made.rollouts[0], images=(own, kept, crop), turns=turns, failure="died: gone")
    plain = replace(made.rollouts[1], images=(own,))
    with Tracker(tmp_path) as tracker:
        tracker.log_rollouts(1, scored(replace(made, problem=asked, rollouts=(looked, plain))))
    other = replace(made, problem=asked, rollouts=(plain, plain))
    found, also = read_groups(tmp_path, 1)[0].group.rollouts
    stored = replace(turns[0], said="there\\ud800")
    assert (found.turns, found.failure) == ((stored, turns[1]), "died: gone")
    assert found.images == looked.images
    assert (also.turns, also.failure, also.images) == ((), "", (own,))
    # The report draws the call on the problem's picture and shows what came back.
    one, none = read_shown(tmp_path).rollouts
    (sha,) = one["turns"][0]["images"]
    assert sha == content_hash(crop) and one["turns"][0]["call"] == [0, 100, 200, 300, 400]
    assert [turn["images"] for turn in one["turns"]] == [[sha], []] and none["turns"] == []
    assert sha in read_shown(tmp_path).images
    folder = tmp_path / "rollouts"
    with Tracker(tmp_path, output=OutputConfig(rollouts_keep=1), after_step=1) as tracker:
        for step in (2, 3, 4):
            tracker.log_rollouts(step, scored(other))
    assert sorted(file.name[10:11] for file in folder.iterdir()) == ["1", "4"]
    assert read_groups(tmp_path, 1)[0].group.rollouts[0].images == looked.images


def test_a_run_of_when_no_response_had_turns_is_read(run: Path) -> None:
    found, shown = read_groups(run, 2), read_shown(run)
    rewrite(run, "shown_sha256", None)
    rewrite(run, "episode", None)
    again = read_groups(run, 2)
    for old, new in zip(found, again, strict=True):
        assert [r.images for r in new.group.rollouts] == [r.images for r in old.group.rollouts]
    assert read_shown(run) == shown and not shown.problems
    with Tracker(run, output=OutputConfig(rollouts_keep=1), after_step=11) as tracker:
        tracker.log_rollouts(12, failing(group(0, "0;0;"), composition=ZERO))


@pytest.mark.parametrize("cell", ["[]", "{", '{"turns": [{"word": 1}], "failure": ""}', "{}"])
def test_an_episode_that_cannot_be_read_is_named(run: Path, cell: str) -> None:
    rewrite(run, "episode", [cell] * len(read_rollouts(run, 2)))
    with pytest.raises(DataError, match=r"step-000002\.parquet: column 'episode'"):
        read_groups(run, 2)
    assert not read_shown(run).rollouts[0]["turns"]


def test_a_run_of_when_a_rollout_had_one_image_is_read(run: Path) -> None:
    found, shown = read_groups(run, 2), read_shown(run)
    hashes = [sha for (sha,) in read_rollouts(run, 2)["image_sha256"].to_pylist()]
    rewrite(run, "image_sha256", hashes, pa.string())
    rewrite(run, "extra", None)
    assert [g.group.problem for g in read_groups(run, 2)] == [g.group.problem for g in found]
    assert read_shown(run) == shown and not shown.problems
    again = read_rollouts(run, 2)
    assert again.schema.equals(ROLLOUT_SCHEMA) and again["extra"].null_count == len(again)
    with Tracker(run, output=OutputConfig(rollouts_keep=1), after_step=11) as tracker:
        tracker.log_rollouts(12, scored(group(9, "9;18;")))
    assert {p.problem.images[0] for p in (g.group for g in read_groups(run, 2))} <= {
        file.read_bytes() for file in (run / "images").iterdir()
    }


def test_scores_alone_are_those_of_the_groups(run: Path) -> None:
    for step in (2, 11):
        for alone, whole in zip(read_scores(run, step), read_groups(run, step), strict=True):
            assert alone.group_id == whole.group.group_id
            assert alone.totals.tolist() == pytest.approx(whole.scores.totals, nan_ok=True)
    # A failure that counts as zero is a number of the reward and none of the term.
    (zeroed,) = read_scores(run, 11)
    assert zeroed.terms["nan"].tolist() == [0.0, 0.0]
    assert set(zeroed.measured()) == {"outcome", "perception"}


def test_the_advantage_is_not_needed_and_an_undiagnosed_group_has_no_diagnosis(run: Path) -> None:
    for name in pq.read_schema(file_of(run)).names:
        if name.startswith("advantage"):
            rewrite(run, name, None)
    rewrite(run, "leak", [None] * 5)
    kept = [s.diagnosis for s in read_scores(run, 2)]
    assert all(d is not None and d.leak is None and d.a_p is not None for d in kept)
    rewrite(run, "a", [None] * 5)
    assert [s.diagnosis for s in read_scores(run, 2)] == [None] * 3


@pytest.mark.parametrize(
    ("column", "values", "words"),
    [
        ("terms", None, "missing"),
        ("text", None, "missing"),
        ("prefix", ["", None, "", "", ""], "empty cells"),
        ("truth", ["{"] * 5, "Expecting"),
        ("task", ["tests.support.toys:Tripling"] * 5, "Tripling"),
        ("image_sha256", [["../../secret"]] * 5, "no SHA-256"),
        ("image_sha256", [["0" * 64]] * 5, "is missing"),
        ("failures", [["it broke"]] * 5, "it broke"),
        ("terms", [[{"name": "outcome", "value": 1.0}], *[[]] * 4], "different terms"),
    ],
)
def test_a_spoilt_column_is_named(
    run: Path, column: str, values: list[object] | None, words: str
) -> None:
    rewrite(run, column, values)
    with pytest.raises(DataError) as caught:
        read_groups(run, 2)
    message = str(caught.value)
    assert "step-000002.parquet" in message
    assert repr(column) in message
    assert words in message


def test_a_run_of_when_terms_were_maps_is_read(run: Path) -> None:
    def terms() -> list[dict[str, list[float]]]:
        found = [group.scores.terms for group in read_groups(run, 2)]
        return [{name: values.tolist() for name, values in terms.items()} for terms in found]

    new, shown = terms(), read_shown(run)
    assert shown.problems == () and shown.rollouts
    for column in ("terms", "advantages"):
        cells = pq.read_table(file_of(run))[column].to_pylist()
        pairs: list[object] = [list(by_name(cell).items()) for cell in cells]
        rewrite(run, column, pairs, pa.map_(pa.string(), pa.float64()))
    assert terms() == new
    assert read_rollouts(run, 2)["terms"].type == NAMED_VALUES
    assert read_shown(run) == shown


def test_a_runs_tables_load_with_datasets(run: Path, tmp_path: Path) -> None:
    for schema in (
        ROLLOUT_SCHEMA, METRIC_SCHEMA, DEMONSTRATION_SCHEMA, FLAT_SCHEMA, RESULT_SCHEMA
    ):  # fmt: skip
        datasets.Features.from_arrow_schema(schema)
    loaded = datasets.load_dataset(
        "parquet", data_files=str(file_of(run)), cache_dir=str(tmp_path / "cache"), split="train"
    )
    stored = read_rollouts(run, 2).to_pylist()
    assert [row["terms"] for row in loaded] == [row["terms"] for row in stored]
    assert [row["response_ids"] for row in loaded] == [row["response_ids"] for row in stored]


def test_the_rollouts_that_output_asks_for_stay_with_their_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ("0;0;", "1;2;")
    with Tracker(tmp_path, output=OutputConfig(rollouts_every=2, rollouts_keep=2)) as tracker:
        for step in range(1, 9):
            # The picture of 0 is in every step, each other in one.
            tracker.log_rollouts(
                step, failing(group(step, *texts), group(0, *texts), composition=ZERO)
            )
            tracker.log(step, {"group/count": 2.0})
    assert stored_steps(tmp_path) == [1, 6, 8]
    pictures = {file.read_bytes() for file in (tmp_path / "images").iterdir()}
    assert pictures == {group(n, *texts).problem.images[0] for n in (0, 1, 6, 8)}
    assert len(read_groups(tmp_path, 6)) == 2
    lacking = (
        "the rollouts of 5 of 8 steps (2, 3, 4, ...) are not there (see [output] in its recipe)"
    )
    assert not_kept(tmp_path) == lacking
    run_diagnose(tmp_path, as_json=True)
    assert capsys.readouterr().err == f"note: {lacking}\n"
    assert read_run(tmp_path).problems == (f"T{lacking[1:]}.",)


def test_rollouts_without_token_arrays_are_shown_and_diagnosed_but_not_scored_again(
    tmp_path: Path,
) -> None:
    with Tracker(tmp_path, output=OutputConfig(rollout_tokens=False)) as tracker:
        tracker.log_rollouts(1, failing(group(1, "1;2;", "1;3;"), composition=ZERO))
    assert read_rollouts(tmp_path, 1)["logprobs"].null_count == 2
    (found,) = read_scores(tmp_path, 1)
    assert found.totals.tolist() == [1.0, 0.0]
    assert read_shown(tmp_path).problems == () and read_shown(tmp_path).total == 2
    assert not_kept(tmp_path) == "token arrays are not there (see [output] in its recipe)"
    with pytest.raises(DataError, match=r"step-000001\.parquet: without token arrays"):
        read_groups(tmp_path, 1)


def test_a_column_of_another_type_is_named(run: Path) -> None:
    rewrite(run, "step", ["two"] * 5, pa.string())
    with pytest.raises(DataError, match=r"step-000002\.parquet: column 'step'"):
        read_scores(run, 2)


def test_spoilt_files_and_folders_are_named(run: Path, tmp_path: Path) -> None:
    image = next((run / "images").iterdir())
    kept = image.read_bytes()
    image.write_bytes(b"another picture")
    with pytest.raises(DataError, match=image.name):
        [read_groups(run, step) for step in (2, 11)]
    image.write_bytes(kept)
    with pytest.raises(DataError, match=r"step-000007\.parquet: no such file"):
        read_scores(run, 7)
    file_of(run).write_bytes(b"PAR1 half a file")
    with pytest.raises(DataError, match=r"step-000002\.parquet: not a readable Parquet"):
        read_scores(run, 2)
    with pytest.raises(DataError, match="no folder"):
        stored_steps(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no run with rollouts"):
        stored_steps(tmp_path)
