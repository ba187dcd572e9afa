"""What a run that ended early goes on from: its last whole checkpoint, under which recipe."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from cluster.recipe.machine import claimed
from cluster.recipe.recipe import Recipe, RecipeError, UserError, load_recipe, resolved_toml
from cluster.record.evaluation import EvalTable
from cluster.run.budget import Spent
from cluster.run.checkpoints import (
    MAY_CHANGE,
    ONE_SIGNAL_SECONDS,
    Position,
    newest,
    resume,
    stop_signal,
)
from learner.checkpoint import checkpoint_folder, seal, write_json
from tasks.fields import Section
from tasks.files import replacing
from tests.support.recipes import ROOT, recipe_file
from tests.support.terminal import Equipoise

RECIPE = """
seed = 3
algorithm.group_size = 4
reward.terms = [{ name = "outcome" }]
checkpoint.every = 3
"""
TABLE = EvalTable({"a": {"p1": 1.0, "p2": 0.0}})


def make_run(folder: Path, *steps: int) -> Path:
    """The folder of a run that left training checkpoints at `steps`."""
    folder.mkdir()
    recipe = load_recipe(recipe_file(folder.parent, RECIPE))
    (folder / "recipe.toml").write_text(resolved_toml(recipe))
    for step in steps:
        with replacing(checkpoint_folder(folder, step)) as fresh:
            (fresh / "training").mkdir()
            (fresh / "model.safetensors").write_text("weights")
            position = Position(step, 2 * step, Spent(100 * step, 1.5 * step), {"sudoku": TABLE})
            write_json(fresh / "training" / "state.json", position.to_dict())
            seal(fresh)
    return folder


def test_the_last_whole_checkpoint_is_used_and_the_torn_one_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 3, 6, 9)
    assert newest(run).position == Position(9, 18, Spent(900, 13.5), {"sudoku": TABLE})
    torn = checkpoint_folder(run, 9) / "model.safetensors"
    torn.write_text("weigh")
    recipe, resumed = resume(run)
    assert resumed.checkpoint == checkpoint_folder(run, 6).resolve()
    assert (resumed.position.step, resumed.position.version) == (6, 12)
    (reason,) = resumed.refused
    assert reason == f"{torn}: has 5 bytes, 7 were written"
    assert recipe == load_recipe(run / "recipe.toml")
    for step in (3, 6):
        (checkpoint_folder(run, step) / "manifest.json").unlink()
    with pytest.raises(UserError) as none:
        resume(run)
    assert [str(none.value).count(f"step-00000{step}") for step in (3, 6, 9)] == [1, 1, 1]


def test_a_state_of_another_shape_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 3)
    for state in ([], {"step": 4}, {"step": 4, "version": 4, "before": {"x": 3}}):
        with replacing(checkpoint_folder(run, 4)) as fresh:
            (fresh / "training").mkdir()
            write_json(fresh / "training" / "state.json", state)
            seal(fresh)
        found = newest(run)
        assert found.position.step == 3
        assert "state.json: not a" in found.refused[0]


def test_what_cannot_be_resumed_says_why(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run folder: it has no recipe\.toml"):
        resume(tmp_path / "nothing")
    bare = make_run(tmp_path / "bare")
    with pytest.raises(UserError, match=r"no training checkpoint.*checkpoint\.every"):
        resume(bare)
    run = make_run(tmp_path / "run", 6)
    with pytest.raises(RecipeError, match=r"algorithm\.steps is 4, but 6 steps are done"):
        resume(run, ["algorithm.steps=4"])
    (run / "evaluation.json").write_text("{}")
    with pytest.raises(UserError, match=r"all 6 steps are done.*--set algorithm\.steps=N"):
        resume(run, ["algorithm.steps=6"])
    recipe, _ = resume(run, ["algorithm.steps=12"])
    assert recipe.algorithm.steps == 12
    # Step 6 of this run has sampled 600 tokens.
    spent = ["algorithm.steps=12", 'algorithm.budget={kind="tokens", amount=600}']
    with pytest.raises(UserError, match=r"budget of 600 tokens is spent.*budget\.amount=N"):
        resume(run, spent)
    recipe, _ = resume(run, [*spent[:1], 'algorithm.budget={kind="tokens", amount=601}'])
    assert recipe.algorithm.budget is not None


DECIDES = """
    seed tasks.name tasks.weight tasks.data tasks.knobs tasks.style tasks.form tasks.prompt
    tasks.checker tasks.columns
    model.path model.dtype model.max_model_len model.lm_head_float32 model.min_pixels
    model.max_pixels model.system_prompt
    sampler.temperature sampler.max_tokens reward.alpha reward.compose
    reward.terms.name reward.terms.label reward.terms.weight reward.terms.final_weight
    reward.terms.schedule reward.terms.schedule_share reward.terms.segments reward.terms.gate
    reward.terms.gate_threshold reward.terms.args reward.terms.on_failure reward.terms.scope
    algorithm.advantage algorithm.advantage_args algorithm.group_size
    algorithm.problems_per_step algorithm.loss algorithm.loss_args
    algorithm.aggregation algorithm.clip_low algorithm.clip_high algorithm.kl_weight
    algorithm.kl_estimator algorithm.reference_kl_weight algorithm.reference_kl_estimator
    algorithm.entropy_weight algorithm.drop_zero_variance
    algorithm.max_staleness algorithm.too_old algorithm.order algorithm.updates_per_step
    algorithm.segment_weights.perception algorithm.segment_weights.reasoning
    algorithm.segment_weights.answer algorithm.segment_weights.act
    algorithm.entropy_weights.perception
    algorithm.entropy_weights.reasoning algorithm.entropy_weights.answer
    algorithm.entropy_weights.act
    algorithm.papo.weight algorithm.papo.entropy_weight algorithm.papo.patch_size
    algorithm.papo.share algorithm.correction.kind algorithm.correction.low
    algorithm.correction.high algorithm.dynamic_sampling.max_rounds
    algorithm.dynamic_sampling.max_groups algorithm.curriculum.strategy
    algorithm.curriculum.args algorithm.curriculum.memory
    learner.learning_rate learner.weight_decay learner.betas learner.warmup_steps
    learner.max_grad_norm learner.freeze learner.rates learner.lora.rank learner.lora.alpha
    learner.lora.targets learner.lora.dropout
    environment.name environment.args environment.calls environment.turns environment.images
    environment.image_tokens environment.on_failure
    transfer.in_flight eval.problems eval.seed eval.samples eval.passes eval.text eval.reader
    eval.sampling.temperature eval.sampling.top_p eval.sampling.top_k eval.sampling.max_tokens
    sft.batch_size sft.part sft.untagged sft.learning_rate sft.warmup_steps sft.schedule sft.balance
    sft.perception_weight sft.blind_share sft.norm_every sft.norm_of sft.norm_smoothing
    sft.call_share sft.curriculum sft.curriculum_share sft.curriculum_weight sft.vision_warmup_steps
    sft.vision_warmup_lr
"""
"""Recipe fields that decide what a run learns, draws or measures."""


def fields(section: type[Section], at: str = "") -> Iterator[str]:
    """Dotted names of a section's fields and of those below, or in the tables of an array."""
    for name, field in section.model_fields.items():
        kinds = (field.annotation, *get_args(field.annotation))
        below = [k for k in kinds if isinstance(k, type) and issubclass(k, Section)]
        if below:
            yield from fields(below[0], f"{at}{name}.")
        else:
            yield f"{at}{name}"


def test_each_field_of_a_recipe_may_change_on_resuming_or_decides_what_is_learnt() -> None:
    every = list(fields(Recipe))
    assert sorted([*MAY_CHANGE, *DECIDES.split()]) == sorted(every)


def test_more_epochs_go_on_beyond_the_steps_of_the_first(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 3)
    stored = (run / "recipe.toml").read_text()
    of_data = re.sub(r"\[tasks.knobs\].*?\n\n", "\n\n", stored, flags=re.S)
    of_data = of_data.replace('\nname = "sudoku"\n', '\nname = "sudoku"\ndata = "mine"\n', 1)
    steps = "steps = 3\nepochs = 1\n"
    (run / "recipe.toml").write_text(re.sub(r"\nsteps = \d+\n", f"\n{steps}", of_data, count=1))
    (run / "evaluation.json").write_text("{}")
    with pytest.raises(UserError, match="all 3 steps are done"):
        resume(run)
    assert resume(run, ["algorithm.epochs=2"])[0].algorithm.epochs == 2


def test_only_what_leaves_the_experiment_alone_may_change(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 3)
    fine = ("learner.ranks=2", "learner.zero_stage=3", "sampler.count=2", "learner.threads=2")
    less = (
        "learner.micro_batch_tokens=100", "learner.logits_mib=1.0", "sampler.max_num_seqs=8",
        "learner.activation_checkpointing=true", "sampler.gpu_memory_utilization=0.5",
        "reward.workers=3", "reward.deadline_seconds=99.0", "transfer.deadline_seconds=600.0",
        'placement.learner={zone="b"}',
    )  # fmt: skip
    recipe, _ = resume(run, [*fine, *less, "sampler.threads=2", "seed=3"])
    assert (recipe.learner.ranks, recipe.learner.zero_stage, recipe.sampler.count) == (2, 3, 2)
    assert (recipe.learner.micro_batch_tokens, recipe.reward.workers) == (100, 3)
    assert recipe.placement.learner == {"zone": "b"}
    for override in (
        "seed=4",
        "learner.learning_rate=1e-4",
        "learner.lora={rank=4}",
        "tasks[0].knobs.blanks=5",
        "algorithm.group_size=8",
        "reward.terms=[]",
        "model.path=other",
    ):
        with pytest.raises(RecipeError, match="would make another run") as wrong:
            resume(run, [override])
        assert override.partition("=")[0].replace("[0]", "") in str(wrong.value)
        assert "\n" not in str(wrong.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give a recipe, or --resume RUN"),
        (["r.toml", "--resume", "x"], "give neither"),
        (["--resume", "x", "--output", "y"], "give neither"),
        (["--resume", "x"], "no run folder"),
    ],
)
def test_the_command_line_says_what_is_wrong(
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    equipoise: Equipoise,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, error = equipoise("train", *arguments)
    assert code == 2 and said in error


def test_the_first_signal_is_a_wish_and_a_later_one_ends() -> None:
    clock = [5.0]
    for number in (signal.SIGTERM, signal.SIGINT):
        before = signal.getsignal(number)

        def harsh(*_: object) -> None:
            raise InterruptedError

        signal.signal(number, harsh)
        try:
            with stop_signal(lambda: clock[0]) as stop:
                assert not stop.requested
                for _ in range(3):  # one for each thread of a supervisor that was killed
                    signal.raise_signal(number)
                assert stop.requested
                clock[0] += ONE_SIGNAL_SECONDS
                with pytest.raises(InterruptedError):
                    signal.raise_signal(number)
            assert signal.getsignal(number) is harsh
        finally:
            signal.signal(number, before)


def test_two_processes_cannot_run_one_folder(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from cluster.recipe.machine import claimed\n"
    code += "with claimed(Path(sys.argv[1])): print('mine', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as other:  # type: ignore[call-overload]
        assert other.stdout.readline() == b"mine\n"
        with pytest.raises(UserError, match="another process"), claimed(tmp_path):
            pass
        other.kill()
        other.wait()
    with claimed(tmp_path):
        pass
