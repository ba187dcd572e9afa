"""`equipoise diagnose --reader` on a stored run of free text, with a reader that is scripted."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.record.tracker import Tracker
from cluster.report.diagnose import read_reports, run_diagnose, sheets
from cluster.report.rescore import load_scores
from cluster.run import reading
from rewards.compose import Composition, compose_groups
from rewards.reader import Reader, Reading, readings
from rewards.reliability import reliability
from rewards.terms import Outcome, score_group
from rollout.models import ModelError
from rollout.record import Group
from tasks.load import load_task
from tests.rewards.test_reader import Scripted, doubles, group
from tests.support.prose import LabelledProse, Prose, prose, says

READER = "models/reader"


def made(step: int, place: int, rng: np.random.Generator) -> Group:
    """Sight falls and thinking rises over the steps; every other problem has a label."""
    n = 8 + place
    label = (lambda n: f"dots: {n}") if place % 2 else (lambda n: "")
    texts = []
    for _ in range(6):
        p = n if rng.random() < 0.9 - 0.08 * step else n + 1
        answer = 2 * p if rng.random() < 0.3 + 0.07 * step else 1
        texts.append(says(f"dots: {p}", answer))
    one = group(prose(n, LabelledProse, label), *texts)
    return Group(f"s{step}-{place}", one.problem, one.rollouts)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("runs") / "prose", np.random.default_rng(0)
    with Tracker(folder) as tracker:
        for step in range(1, 7):
            groups = [made(step, place, rng) for place in range(12)]
            scored = [
                score_group(load_task(g.problem.task), g, {"outcome": Outcome()}) for g in groups
            ]
            tracker.log_rollouts(step, compose_groups(groups, scored, Composition({"outcome": 1})))
    (folder / "recipe.toml").write_text(
        f'name = "prose"\n[model]\npath = "m"\n[[tasks]]\nname = "{Prose.name}"\ndata = "d"\n'
    )
    return folder


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A pool that answers by `doubles`, without Ray; what was started and stopped."""
    said: list[str] = []

    class Pool(Scripted):
        def wait_ready(self, seconds: float) -> None:
            said.append("ready")

        def stop(self) -> None:
            said.append("stopped")

    def pool(recipe: Any, places: Any, model: str, frozen: int) -> Pool:
        said.append(f"{model} {frozen}")
        return Pool(doubles)

    monkeypatch.setattr(reading, "sampler_pool", pool)
    monkeypatch.setattr(reading, "places_of", lambda recipe, actors: nullcontext())
    monkeypatch.setattr(reading, "connected", lambda address: nullcontext())
    monkeypatch.setattr(reading, "require_model", lambda model, field: None)
    return said


def test_a_stored_run_is_read_and_told(
    run: Path, scripted: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    found = reading.read_run(run, READER)
    assert scripted == [f"{READER} 0", "ready", "stopped"]
    scores = load_scores(run)
    assert set(found) == {(s.step, s.group_id) for s in scores}
    (report,) = run_diagnose(run, as_json=True, reader=READER, readings=found)
    told = json.loads(capsys.readouterr().out)["tasks"][0]["reading"]
    assert told["reader"] == READER and told["unread"] == 0
    assert report.reading is not None
    names = [name for name, *_ in report.reading.phases]
    assert names == ["all", "first third", "second third", "last third"]
    whole, first, last = (report.reading.phases[i][2] for i in (0, 1, 3))
    # It doubles what it reads, so it is right where the perception is, and from p*; blind, never.
    pairs = [(s, found[s.step, s.group_id]) for s in scores]
    sufficient = np.concatenate([r.sufficient for _, r in pairs])
    right = np.concatenate([s.diagnosis.a for s, _ in pairs])  # type: ignore[union-attr]
    assert whole.sufficiency.value == sufficient.mean()
    assert whole.used.value == pytest.approx(right[sufficient].mean())
    assert (whole.blind.value, whole.ceiling.value, whole.labelled) == (0.0, 1.0, 36)
    assert whole.rollouts == 6 * 12 * 6
    assert last.sufficiency.value < first.sufficiency.value  # type: ignore[operator]
    assert last.used.value > first.used.value  # type: ignore[operator]
    assert report.reading.change.low is not None and report.reading.change.low > 0

    # As a term it is judged on the rows with a label, like any other.
    label = f"sufficiency ({READER})"
    judged = report.phases[0].terms[label].reliability
    known = [(s, r) for s, r in pairs if s.diagnosis is not None and s.diagnosis.a_p is not None]
    assert judged.n == 36 * 6
    assert judged == reliability(
        [r.sufficient for _, r in known],
        [s.diagnosis.a_p for s, _ in known],  # type: ignore[union-attr,misc]
        [s.symmetry_key for s, _ in known],
        graded=[s.diagnosis.a_p_graded for s, _ in known],  # type: ignore[union-attr,misc]
    )
    assert judged.within.value == pytest.approx(1.0) and report.drifts[label] is not None


def test_a_reader_that_p_star_does_not_help_is_refused_by_name(run: Path) -> None:
    task = load_task(LabelledProse.name)
    groups = [made(step, place, np.random.default_rng(1)) for step in (1, 2) for place in range(12)]
    mute = readings(
        Reader(READER), Scripted(lambda request: "no idea"), [(task, g) for g in groups]
    )
    scores = [s for s in load_scores(run) if s.step <= 2]
    keys = [(s.step, s.group_id) for s in scores]
    (report,) = read_reports(scores, dict(zip(keys, mute, strict=True)), READER)  # type: ignore[arg-type]
    note = sheets(report)[1].note
    assert f"{READER} is refused for this task: from p* it answers 0.00 of 12 labelled" in note
    assert report.reading is not None and report.reading.change.value is None
    assert report.reading.phases[0][2].sufficiency.value is None


def test_groups_that_were_not_read_are_counted_and_names_are_inert(run: Path) -> None:
    scores = load_scores(run)
    some = {
        (s.step, s.group_id): Reading(np.ones(6, bool), False, None, np.zeros(6, bool))
        for s in scores[:5]
    }
    (report,) = read_reports(scores, some, "evil [red]\x1b[2J|*x*")
    assert report.reading is not None and report.reading.unread == len(scores) - 5
    first, second = sheets(report)[1:3]
    assert f"{len(scores) - 5} groups are left out" in first.note
    for sheet in (first, second):
        table = [line for line in sheet.to_markdown().splitlines() if line.startswith("|")]
        assert all(line.replace("\\|", "").count("|") == len(sheet.columns) + 1 for line in table)
        assert "\x1b" not in sheet.to_markdown()
    (without,) = read_reports(scores, None, "")
    assert without.reading is None and len(sheets(without)) == len(sheets(report)) - 2


def test_a_checkpoint_that_is_none_is_refused_before_anything_is_started(run: Path) -> None:
    with pytest.raises(ModelError, match="--reader"):
        reading.read_run(run, "no/such/model/here")
