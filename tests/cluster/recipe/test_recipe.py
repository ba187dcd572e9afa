"""Recipes: every error at once, each with field and remedy; a resolved recipe loads as itself."""

from __future__ import annotations

import datetime
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.recipe.algorithm import AlgorithmConfig
from cluster.recipe.recipe import (
    Recipe,
    RecipeError,
    load_recipe,
    parse_setting,
    resolved_toml,
    task_of,
)
from cluster.recipe.toml_writer import table_lines
from learner.loss_settings import CORRECTION_BOUNDS, CorrectionConfig
from learner.settings import LoraConfig
from tests.support.recipes import TINY_POLICY, recipe_file
from tests.support.terminal import run

ROOT = Path(__file__).resolve().parents[3]
RECIPES = sorted(p for p in (ROOT / "recipes").rglob("*.toml") if p.parent.name != "ablations")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return recipe_file(tmp_path, model=TINY_POLICY)


def errors(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value).splitlines()


def error(path: Path, *overrides: str) -> str:
    (line,) = errors(path, *overrides)
    return line


def test_a_small_recipe_gets_the_defaults_of_the_design(recipe: Path) -> None:
    loaded = load_recipe(recipe)
    assert (loaded.algorithm.clip_low, loaded.algorithm.clip_high) == (0.2, 0.28)
    assert loaded.algorithm.group_size == 8
    assert loaded.algorithm.drop_zero_variance and loaded.model.lm_head_float32
    assert loaded.algorithm.max_staleness == 0
    assert [term.name for term in loaded.reward.effective_terms()] == ["outcome"]


def test_every_error_is_reported_at_once_with_file_and_field(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text(
        """
        name = "x"
        sede = 3
        [model]
        path = 3
        [[tasks]]
        name = "sudoku"
        knobs = { blankz = 3, noise = "much" }
        [[tasks]]
        name = "sudokoo"
        [sampler]
        cout = 3
        zero_stage = 3
        temperature = 0
        [[reward.terms]]
        name = "outcome"
        [[reward.terms]]
        name = "percption"
        [algorithm]
        steps = "40"
        [learner]
        betas = [0.9, "a"]
        [sft]
        balance = "fix"
        """
    )
    lines = errors(path, "eval.problms=3")
    assert all(line.startswith(f"{path}: ") for line in lines)
    said = dict(line.removeprefix(f"{path}: ").split(": ", 1) for line in lines)
    assert said["tasks[1].name"].startswith('no task "sudokoo"; did you mean "sudoku"?')
    del said["tasks[1].name"]
    assert said == {
        "sede": 'no such key; did you mean "seed"?',
        "model.path": 'expected text in quotes ("..."), got 3',
        "tasks[0].knobs.blankz": 'no such key; did you mean "blanks"?',
        "tasks[0].knobs.noise": 'expected a number, got "much"',
        "sampler.cout": 'no such key; did you mean "count"?',
        "sampler.zero_stage": 'no such key; did you mean "learner.zero_stage"?',
        "sampler.temperature": "must be more than 0, got 0",
        "reward.terms[1].name": 'no reward term "percption"; did you mean "perception"?',
        "algorithm.steps": 'expected a whole number, got "40"',
        "learner.betas[1]": 'expected a number, got "a"',
        "sft.balance": (
            'expected "token_mean", "fixed", "ngdiff" or "ngdiff_sum", got "fix"; '
            'did you mean "fixed"?'
        ),
        "sft.steps": "is required and missing; add it",
        "eval.problms": 'no such key; did you mean "problems"? (from --set)',
    }


@pytest.mark.parametrize("value", ["true", '"2"', "2.0", "[2]", "{ a = 2 }"])
def test_nothing_is_coerced_to_a_count(recipe: Path, value: str) -> None:
    assert "learner.ranks: expected a whole number, got" in error(recipe, f"learner.ranks={value}")


def test_what_a_task_says_of_its_own_knobs_is_placed_at_the_knob(recipe: Path) -> None:
    line = error(recipe, "tasks[0].knobs.blanks=16")
    assert line.startswith(f"{recipe}: tasks[0].knobs.blanks: 16 leave no unique solution")


SHARED = ["sampler.gpus=0.5", "sampler.gpu_memory_utilization=0.4", "learner.gpus=0.5"]
"""A sampler and a learner rank on one GPU."""


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ('transfer.transport="nccl"', "transfer.transport"),
        ('learner={zero_stage=0, offload="optimizer"}', "learner.offload"),
        ('learner.offload="all"', "learner.offload"),
        ('learner={freeze=["vision"], lora={rank=8}}', "learner.freeze"),
        ("learner.lora={rank=0}", "learner.lora.rank"),
        ("learner.rates={vision=0.0}", "learner.rates.vision"),
        ('model.attention="flash"', "model.attention"),
        ("sampler.gpus=0.5", "sampler.gpu_memory_utilization"),
        ("sampler.max_tokens=1024", "sampler.max_tokens"),
        ("sampler.gpus=2", "sampler.gpus"),
        ("algorithm.updates_per_step=17", "algorithm.updates_per_step"),
        ("algorithm.max_staleness=-1", "algorithm.max_staleness"),
        ("algorithm={max_staleness=1, updates_per_step=2}", "algorithm.max_staleness"),
        ('transfer.in_flight="pause"', "transfer.in_flight"),
        ("transfer.overlap=true", "transfer.overlap"),
        ("transfer.bucket_mib=-1", "transfer.bucket_mib"),
        ("reward.terms=[{name='outcome', weight=0}]", "reward.terms"),
        ("algorithm.kl_weight=0.1", "algorithm.kl_weight"),
        ("reward.alpha=1.5", "reward.alpha"),
        ("learner.learning_rate=inf", "learner.learning_rate"),
        ("tasks=[]", "tasks"),
        ('tasks[0].data="x.parquet"', "tasks[0].knobs"),
        ('name="../x"', "name"),
    ],
)
def test_settings_that_cannot_work_name_their_field(
    recipe: Path, override: str, field: str
) -> None:
    assert error(recipe, override).startswith(f"{recipe}: {field}: ")


def test_only_the_host_transport_sends_beside_an_update(recipe: Path) -> None:
    ahead = ["algorithm.max_staleness=1", "transfer.overlap=true"]
    assert load_recipe(recipe, ahead).transfer.overlap
    gpus = ["sampler.gpus=1", "learner.gpus=1", 'transfer.transport="nccl"']
    line = error(recipe, *ahead, *gpus)
    assert line.startswith(f'{recipe}: transfer.overlap: got true with transport "nccl"')


def test_ipc_needs_a_sampler_and_a_rank_on_each_gpu(recipe: Path) -> None:
    ipc = 'transfer.transport="ipc"'
    for gpus in (["sampler.gpus=1", "learner.gpus=1"], [*SHARED, "sampler.count=2"]):
        assert error(recipe, ipc, *gpus).startswith(f"{recipe}: transfer.transport: ")
    line = error(recipe, ipc, *SHARED, "learner.gpus=0.6")
    assert line.startswith(f"{recipe}: sampler.gpus: got 0.5 beside learner.gpus = 0.6")
    assert load_recipe(recipe, [ipc, *SHARED]).sampler.gpus == 0.5


TURNS = ["placement.mode=colocated", *SHARED, "sampler.gpu_memory_utilization=0.9"]
"""The same by turns, each with nearly all of it."""


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["algorithm.max_staleness=1"], "algorithm.max_staleness: got 1 with placement.mode"),
        (["learner.gpus=0"], 'placement.mode: "colocated" takes turns on the same GPUs'),
        (["sampler.gpus=0"], 'placement.mode: "colocated" takes turns on the same GPUs'),
        (["sampler.count=2"], 'placement.mode: under mode "colocated" each sampler shares'),
        (["sampler.gpus=1", "learner.gpus=1"], "placement.mode: under mode"),
        (["sampler.gpus=2", "sampler.tensor_parallel=2"], "placement.mode: under mode"),
        (["learner.gpus=0.6"], "sampler.gpus: got 0.5 beside learner.gpus = 0.6"),
        (["transfer.transport=nccl"], 'transfer.transport: "nccl" takes no two processes'),
        (["learner.zero_stage=0"], "learner.zero_stage: got 0, whose states DeepSpeed does not"),
        (["learner.zero_stage=3"], "learner.zero_stage: got 3, whose states DeepSpeed does not"),
        (['placement.learner={role="learner"}'], "placement.samplers: differs from"),
        (["placement.mode=disaggregated"], "sampler.gpu_memory_utilization: got 0.9 with gpus"),
    ],
)
def test_turns_are_refused_where_they_cannot_be_taken(
    recipe: Path, overrides: list[str], said: str
) -> None:
    assert load_recipe(recipe, TURNS).paired
    line = error(recipe, *TURNS, *overrides)
    assert line.startswith(f"{recipe}: {said}") and "\n" not in line.strip()


def test_turns_are_taken_by_either_transport_and_on_cpus(recipe: Path) -> None:
    for more in ("transfer.transport=ipc", "learner.lora={rank=4}"):
        assert load_recipe(recipe, [*TURNS, more]).paired
    all_there = ["learner.zero_stage=3", 'learner.offload="all"']
    assert load_recipe(recipe, [*TURNS, *all_there]).placement.by_turns
    cpus = load_recipe(recipe, ["placement.mode=colocated", "sampler.count=2"])
    assert cpus.placement.by_turns and not cpus.paired


def test_flash_attention_needs_a_gpu_and_bfloat16(recipe: Path) -> None:
    gpu, half = "learner.gpus=1", "model.dtype=bfloat16"
    for alone in (gpu, half):
        line = error(recipe, 'model.attention="flash"', alone)
        assert line.startswith(f'{recipe}: model.attention: "flash" needs a GPU and bfloat16')
    load_recipe(recipe, ['model.attention="flash"', gpu, half])


def test_graphs_are_on_where_there_is_a_gpu(recipe: Path) -> None:
    assert load_recipe(recipe).sampler.eager
    assert not load_recipe(recipe, ["sampler.gpus=1"]).sampler.eager
    assert load_recipe(recipe, ["sampler.gpus=1", "sampler.enforce_eager=true"]).sampler.eager


def test_eager_attention_takes_no_packed_rows(recipe: Path) -> None:
    line = error(recipe, 'model.attention="eager"', 'learner.layout="packed"')
    assert line.startswith(f'{recipe}: learner.layout: got "packed", which "eager" attention')
    assert load_recipe(recipe).learner.layout == "shared_prefix"
    assert load_recipe(recipe, ['model.attention="eager"']).learner.layout == "padded"


def test_a_loss_brings_its_own_clip_and_aggregation(recipe: Path) -> None:
    for loss, expected in {
        "gspo": ("sequence_mean", 3e-4, 4e-4),
        "cispo": ("token_mean", 1.0, 4.0),
    }.items():
        loaded = load_recipe(recipe, [f"algorithm.loss={loss}"]).algorithm
        assert (loaded.aggregation, loaded.clip_low, loaded.clip_high) == expected
        own = load_recipe(recipe, [f"algorithm.loss={loss}", "algorithm.clip_low=0.5"]).algorithm
        assert (own.clip_low, own.clip_high) == (0.5, expected[2])
    assert "algorithm.loss: " in error(recipe, "algorithm.loss=ppo")
    assert "algorithm.loss: " in error(recipe, "algorithm.loss=[]")


def test_epochs_are_of_one_data_set_and_an_evaluation_fits_what_was_measured(recipe: Path) -> None:
    assert "algorithm.epochs: got 2, and epochs are those of one data set" in error(
        recipe, "algorithm.epochs=2"
    )
    entry = '{name="sudoku", data="somewhere"}'
    assert load_recipe(recipe, [f"tasks=[{entry}]", "algorithm.epochs=2"]).algorithm.epochs == 2
    assert "algorithm.epochs: " in error(recipe, f"tasks=[{entry}, {entry}]", "algorithm.epochs=2")
    longest = load_recipe(recipe).sampler.max_tokens
    load_recipe(recipe, [f"eval.sampling.max_tokens={longest}"])
    line = error(recipe, f"eval.sampling.max_tokens={longest + 1}")
    assert f"eval.sampling.max_tokens: got {longest + 1}, above sampler.max_tokens" in line


def test_a_correction_brings_its_own_bounds_and_refuses_those_it_has_not(recipe: Path) -> None:
    assert load_recipe(recipe).algorithm.correction.kind == "none"
    for kind, bounds in CORRECTION_BOUNDS.items():
        chosen = load_recipe(recipe, [f"algorithm.correction.kind={kind}"]).algorithm.correction
        assert (chosen.low, chosen.high) == (bounds.get("low", 0.0), bounds["high"])
        assert chosen.low <= 1 <= chosen.high
    own = ["algorithm.correction.kind=icepop", "algorithm.correction.high=3"]
    chosen = load_recipe(recipe, own).algorithm.correction
    assert (chosen.low, chosen.high) == (0.5, 3.0)
    for override, field in (
        ("{kind='token_tis', low=0.5}", "low"),
        ("{kind='none', high=2.0}", "high"),
        ("{kind='icepop', high=0.9}", "high"),
        ("{kind='icepop', low=1.1}", "low"),
        ("{kind='tis'}", "kind"),
    ):
        said = error(recipe, f"algorithm.correction={override}")
        assert said.startswith(f"{recipe}: algorithm.correction.{field}: ")


def test_stale_tokens_are_corrected_unless_the_recipe_says_otherwise() -> None:
    assert AlgorithmConfig(max_staleness=2).correction.kind == "token_tis"
    own = AlgorithmConfig(max_staleness=2, correction=CorrectionConfig(kind="icepop"))
    assert own.correction.kind == "icepop"
    none = AlgorithmConfig(max_staleness=2, correction=CorrectionConfig())
    assert none.correction.kind == AlgorithmConfig().correction.kind == "none"


def test_a_kl_term_without_a_gradient_is_refused(recipe: Path) -> None:
    said = error(recipe, "algorithm.kl_weight=0.1")
    assert "algorithm.kl_weight: got 0.1" in said and "updates_per_step" in said
    load_recipe(recipe, ["algorithm.kl_weight=0.1", "algorithm.updates_per_step=2"])
    load_recipe(recipe, ["algorithm.kl_weight=0.1", "algorithm.max_staleness=1"])


def test_alpha_and_terms_are_two_ways_to_say_one_thing(recipe: Path) -> None:
    short = load_recipe(recipe, ["reward.alpha=0.25"]).reward.effective_terms()
    assert {term.name: term.weight for term in short} == {"outcome": 0.75, "perception": 0.25}
    terms = 'reward.terms=[{ name = "outcome" }]'
    assert ": reward.alpha: " in error(recipe, "reward.alpha=0.25", terms)
    twice = 'reward.terms=[{ name = "outcome" }, { name = "outcome" }]'
    assert ": reward.terms[1].name: " in error(recipe, twice)


@pytest.mark.parametrize("name", ["mine.rewards:Term", "rewards:T"])
def test_a_reward_term_of_ones_own_is_taken_as_named(recipe: Path, name: str) -> None:
    (term,) = load_recipe(recipe, [f'reward.terms=[{{ name = "{name}" }}]']).reward.terms
    assert term.name == name


def test_overrides_reach_into_lists_and_tables(recipe: Path) -> None:
    loaded = load_recipe(
        recipe,
        ["tasks[0].knobs.noise=70", "tasks.0.knobs.blanks=5", "model.path=a/b", "eval.every = 3"],
    )
    assert loaded.tasks[0].knobs["noise"] == 70.0
    assert loaded.tasks[0].knobs["blanks"] == 5
    assert (loaded.model.path, loaded.eval.every) == ("a/b", 3)


def test_an_override_of_an_unknown_path_says_what_was_meant(recipe: Path) -> None:
    assert 'smpler: no such key; did you mean "sampler"?' in error(recipe, "smpler.count=2")
    assert "tasks is a list with 1 entries" in error(recipe, "tasks[1].weight=2")
    assert "name has nothing below it" in error(recipe, "name.x=2")
    assert "expected key=value" in error(recipe, "seed")
    assert len(errors(recipe, "seed", "a..b=1", "learner.ranks=0")) == 3


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a=1", 1),
        ("a=1e-5", 1e-5),
        ("a=true", True),
        ("a='t'", "t"),
        ("a=[1, 2]", [1, 2]),
        ("a=plain words", "plain words"),
        ("a=b=c", "b=c"),
        ("a=", ""),
        ("a=1\nb = 2", "1\nb = 2"),
    ],
)
def test_setting_values_are_toml_or_else_text(text: str, value: object) -> None:
    assert parse_setting(text) == ("a", value)


@given(st.text(max_size=60))
@settings(max_examples=200)
def test_any_override_is_applied_or_a_recipe_error(text: str) -> None:
    try:
        loaded = load_recipe(ROOT / "recipes/tiny/sudoku.toml", [text, f"question={text}"])
    except RecipeError:
        return
    assert tomllib.loads(resolved_toml(loaded))


def test_toml_syntax_errors_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text('name = "x"\n[model\n')
    assert "bad.toml: not valid TOML: " in error(path) and "line 2" in error(path)


def test_a_byte_order_mark_is_no_part_of_a_recipe_and_utf_16_is_named(recipe: Path) -> None:
    text = recipe.read_text(encoding="utf-8")
    plain = load_recipe(recipe)
    recipe.write_text(text, encoding="utf-8-sig")
    assert load_recipe(recipe) == plain
    recipe.write_text(text, encoding="utf-16")
    assert error(recipe).startswith(f"{recipe}: is UTF-16 or no text (")


def test_a_missing_file_suggests_its_neighbour(recipe: Path) -> None:
    assert error(recipe.with_name("xx.toml")).endswith(f"did you mean {recipe}?")


def test_knobs_given_on_the_command_line_are_checked_the_same_way() -> None:
    assert task_of("sudoku", ["size=4", "blanks=3"]).knobs["blanks"] == 3
    with pytest.raises(RecipeError, match=r'^--set blankz: no such key; did you mean "blanks"\?$'):
        task_of("sudoku", ["blankz=3"])
    with pytest.raises(RecipeError, match=r'^--task: no task "sudokoo"'):
        task_of("sudokoo")


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_resolved_recipe_loads_to_an_equal_one(path: Path, tmp_path: Path) -> None:
    loaded = load_recipe(path)
    again = tmp_path / "resolved.toml"
    again.write_text(resolved_toml(loaded), encoding="utf-8")
    assert load_recipe(again) == loaded
    opening = path.read_text().splitlines()[1]
    assert opening.startswith("# "), "behind its schema a recipe opens with the question it answers"


def test_rates_by_pattern_keep_their_order_since_the_last_match_counts(
    recipe: Path, tmp_path: Path
) -> None:
    patterns = {"vision": 0.1, "model.visual.blocks.*": 0.5, '*."q_proj"*': 2.0, "merger": 0.3}
    loaded = load_recipe(recipe).model_dump()
    made = Recipe.model_validate(loaded | {"learner": {"rates": patterns, "freeze": ("head",)}})
    again = tmp_path / "resolved.toml"
    again.write_text(resolved_toml(made), encoding="utf-8")
    found = load_recipe(again).learner
    assert list(found.rates.items()) == list(patterns.items())
    assert (found.freeze, found.lora) == (("head",), None)


def test_adapters_are_not_sent_by_what_cannot_merge_them(recipe: Path) -> None:
    gpus = ("sampler.gpus=1", "learner.gpus=1.0", 'transfer.transport="nccl"')
    assert load_recipe(recipe, gpus).transfer.transport == "nccl"
    line = error(recipe, *gpus, "learner.lora={rank=8}")
    assert line.startswith(f"{recipe}: transfer.transport: ") and 'use "host"' in line
    warmed = "sft={steps=3, vision_warmup_steps=2}"
    assert "sft.vision_warmup_steps: " in error(recipe, warmed, "learner.lora={rank=8}")
    chosen = load_recipe(recipe, ["learner.lora={rank=8, targets=['vision']}"]).learner
    assert chosen.lora == LoraConfig(rank=8, targets=("vision",))


def test_a_resolved_recipe_keeps_awkward_values(recipe: Path, tmp_path: Path) -> None:
    odd = {
        "quote": 'a "b" \\ \n\t\x7f é',
        "day": datetime.date(2026, 5, 28),
        "list": [{"x": 1}, 2],
        "dotted.key": {"": [0.1, 1e22]},
    }
    term = {"name": "mine:Term", "args": odd}
    loaded = load_recipe(recipe).model_dump()
    made = Recipe.model_validate(loaded | {"reward": {"terms": [term]}, "question": "a\nb"})
    again = tmp_path / "resolved.toml"
    again.write_text(resolved_toml(made), encoding="utf-8")
    assert load_recipe(again) == made


scalars = (
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8"))
    | st.dates()
)
keys = st.text(st.characters(codec="utf-8"), max_size=8)
values = st.recursive(
    scalars,
    lambda below: st.lists(below, max_size=3) | st.dictionaries(keys, below, max_size=3),
    max_leaves=12,
)


@given(st.dictionaries(keys, values, max_size=4))
@settings(max_examples=150)
def test_the_writer_writes_what_tomllib_reads(table: dict[str, Any]) -> None:
    assert tomllib.loads("\n".join(table_lines(table, ()))) == table


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_recipe_dry_runs_without_an_accelerator(
    path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = "sft" if load_recipe(path).sft else "train"
    # Some start from what another recipe makes.
    shipped = [] if path.parent.name == "gpu" else ["model.path=models/tiny-qwen3-vl"]
    settings = [word for setting in shipped for word in ("--set", setting)]
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for engine in ("ray", "vllm", "deepspeed"):
        monkeypatch.setitem(sys.modules, engine, None)  # cannot be imported
    code = run(monkeypatch, command, path, "--dry-run", *settings)
    printed = capsys.readouterr()
    assert (code, printed.err) == (0, "")
    assert "# learner 0" in printed.out
    generated = [task.knobs for task in load_recipe(path).tasks if task.data is None]
    assert printed.out.count(": held out: ") == len(generated)
    labelled = [knobs for knobs in generated if knobs.get("split_by") == "labelled"]
    assert printed.out.count("an isomorphic one may be in training") == len(labelled)
    again = tmp_path / "printed.toml"
    again.write_text(printed.out, encoding="utf-8")
    assert load_recipe(again) == load_recipe(path, shipped)
    if path.parent.name == "gpu":
        assert "needs 8 GPUs, this machine has 0: dry run only" in printed.out
        assert "is not on this machine, so no row was measured" in printed.out


def test_help_and_what_files_tell_come_before_the_heavy_imports(tmp_path: Path) -> None:
    """In a process of its own; a base checkpoint stands for all that `glance` refuses."""
    base = tmp_path / "base"
    shutil.copytree(TINY_POLICY, base, ignore=shutil.ignore_patterns("chat_template*"))
    code = """
import sys
from cluster.cli import main
for words, heavy in (
    (["--help"], {"numpy", "pydantic", "torch", "transformers", "ray"}),
    (["train", sys.argv[1]], {"torch", "transformers", "ray", "scipy", "vllm", "deepspeed"}),
):
    sys.argv = ["equipoise", *words]
    try:
        main()
    except SystemExit as end:
        print("CODE", end.code)
    print("HEAVY", sorted(heavy & set(sys.modules)))
"""
    words = [sys.executable, "-c", code, str(recipe_file(tmp_path, model=base))]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    said = [line for line in done.stdout.splitlines() if line.startswith(("CODE", "HEAVY"))]
    assert said == ["CODE 0", "HEAVY []", "CODE 2", "HEAVY []"], done.stderr
    assert done.stderr.startswith(f"model.path: {base}: has no chat template; take the instruct")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "{recipe}", "--set", "learner.rank=2"], "learner.rank: no such key; did you"),
        (
            ["train", "{recipe}", "--set", "learner.ranks=999"],
            "learner.ranks × learner.cpus = 1000",
        ),
        (["sft", "{recipe}"], "sft: `equipoise sft` needs this section"),
        (["eval", "nowhere", "--task", "sudokoo"], '--task: no task "sudokoo"'),
    ],
)
def test_bad_input_is_one_message_exit_2_and_nothing_written(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    filled = [argument.format(recipe=recipe) for argument in arguments]
    assert run(monkeypatch, *filled) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and said in printed.err and "Traceback" not in printed.err
    assert sorted(tmp_path.rglob("*")) == before
