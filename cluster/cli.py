"""The command line: `equipoise COMMAND`, the same as `python -m cluster COMMAND`.

What a command needs is imported inside it, so that `--help` answers at once, and after what can be
refused without it. `--dry-run` needs none of the engines (Ray, vLLM, DeepSpeed).
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Literal

import typer

from cluster.models_cli import app as models_app
from cluster.names import require_own_names
from cluster.record.terminal import as_written
from tasks.files import expanded

app = typer.Typer(
    name="equipoise",
    help="RL post-training for vision-language models that keeps seeing and thinking in balance.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(models_app, name="models")
recipes = typer.Typer(help="What a recipe may hold.", no_args_is_help=True)
app.add_typer(recipes, name="recipe")

OptionalRecipe = Annotated[
    Path | None, typer.Argument(help="A TOML recipe, such as recipes/tiny/sudoku.toml")
]
Resume = Annotated[
    Path | None,
    typer.Option(metavar="RUN", help="Go on with a run from its last training checkpoint"),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one field: learner.ranks=2"),
]
Address = Annotated[
    str | None,
    typer.Option(envvar="RAY_ADDRESS", help="A running Ray cluster; without it, one of its own"),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Check data and model; print the resolved recipe, the placement, and stop"
    ),
]
Output = Annotated[Path | None, typer.Option(help="Folder of this run instead of a new one")]
AskReader = Annotated[
    str,
    typer.Option(
        "--reader", metavar="CHECKPOINT", help="A text-only model to ask: sufficiency and used"
    ),
]
ReaderPlace = Annotated[
    Literal["prompt", "prefix"],
    typer.Option(help="Where --reader finds a perception (eval.reader_place)"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else")]


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"equipoise {importlib.metadata.version('equipoise')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version and stop"
        ),
    ] = False,
) -> None:
    """Stand before the command."""


@app.command()
def train(
    recipe: OptionalRecipe = None,
    set_: Overrides = None,
    address: Address = None,
    dry_run: DryRun = False,
    output: Output = None,
    resume: Resume = None,
    replay: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Learn again from a run's stored rollouts, no samplers"),
    ] = None,
) -> None:
    """Train a policy with RL: sample, score, learn, send the weights back."""
    from cluster.start import loaded, ready, refuse

    if replay is not None:
        refuse(
            recipe is not None or resume is not None,
            "--replay RUN: the run has its recipe; give neither one nor --resume",
        )
        from cluster.run.replay import recorded, run_replay

        again, source = recorded(replay, set_ or ())
        if ready(again, "replay", address, dry_run, replay, output):
            run_replay(again, source, address=address, output=output)
        return
    wanted, resumed = loaded("train", recipe, set_, output, resume)
    if not ready(wanted, "train", address, dry_run, recipe or resume, output):
        return
    from cluster.run.train import run_training

    folder = run_training(wanted, address=address, output=output, resumed=resumed)
    from cluster.report.run_report import draw_report

    draw_report(folder)


@app.command()
def sample(
    where: Annotated[Path, typer.Argument(help="A TOML recipe, or a checkpoint in a run folder")],
    steps: Annotated[int, typer.Option(min=1, help="Training steps' worth of groups")] = 1,
    set_: Overrides = None,
    address: Address = None,
    dry_run: DryRun = False,
    output: Output = None,
) -> None:
    """Sample and score rollouts as training would, without a learner; diagnose reads them."""
    from cluster.run.replay import recipe_to_sample, run_sampling
    from cluster.start import ready

    wanted = recipe_to_sample(where, set_ or ())
    if ready(wanted, "sample", address, dry_run, where, output):
        run_sampling(wanted, steps, address=address, output=output)


@app.command()
def sft(
    recipe: OptionalRecipe = None,
    set_: Overrides = None,
    address: Address = None,
    dry_run: DryRun = False,
    output: Output = None,
    resume: Resume = None,
) -> None:
    """Fine-tune a policy on generated demonstrations: the cold start."""
    from cluster.start import loaded, ready, refuse

    wanted, resumed = loaded("sft", recipe, set_, output, resume)
    refuse(
        wanted.sft is None,
        f"{recipe}: sft: `equipoise sft` needs this section and it is missing; add [sft] "
        "with steps = 650, or see recipes/tiny/cold_start.toml",
    )
    if not ready(wanted, "sft", address, dry_run, recipe or resume, output):
        return
    from cluster.run.sft import run_sft

    run_sft(wanted, address=address, output=output, resumed=resumed)


@app.command(name="eval")
def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="A folder with a policy, or a hub name")],
    task: Annotated[
        str, typer.Option(help="sudoku, graph_coloring or module:Class; with --data, vqa")
    ] = "",
    data: Annotated[
        str,
        typer.Option(help="A file, folder or hub name: questions of your own, all by default"),
    ] = "",
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="A knob: blanks=8; with --data a field: form=boxed"
        ),
    ] = None,
    problems: Annotated[
        int | None, typer.Option(min=1, help="How many held-out problems [512; of --data all]")
    ] = None,
    samples: Annotated[
        int, typer.Option(min=1, help="Responses a problem for avg@k, pass@k and maj@k")
    ] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the problems")] = 1234567,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="A recipe whose [model], [sampler] and [eval.sampling] to run with; with --data "
            "its vqa entry too"
        ),
    ] = None,
    by: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN", help="With --data: numbers by what rows say; repeatable"),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(help="With --data: another evaluation's folder, compared by problem"),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="A file for the JSON; with --data the folder")
    ] = None,
    reader: AskReader = "",
    reader_place: ReaderPlace = "prompt",
    as_json: AsJson = False,
    address: Address = None,
) -> None:
    """Measure end-to-end, perception and reasoning accuracy on held-out problems, or on a file."""
    from cluster.recipe.machine import require_free
    from cluster.recipe.recipe import data_task, load_recipe, task_of
    from cluster.start import refuse
    from rollout.models import require_model

    refuse(not (task or data), "eval: give --task, or --data with questions of your own")
    refuse(not data and bool(by or against), "--by, --against: they go with --data")
    if output:
        require_free(output, "--output")
        output.parent.mkdir(parents=True, exist_ok=True)  # now, not after the evaluation
    like = load_recipe(recipe) if recipe else None
    chosen = data_task(data, task, set_ or (), like) if data else task_of(task, set_ or ())
    require_model(checkpoint)
    if data:
        from cluster.report.run_report import draw_report
        from cluster.run.evaluate_data import run_data_eval

        folder = run_data_eval(
            checkpoint,
            chosen,
            problems=problems,
            samples=samples,
            seed=seed,
            by=by or (),
            against=against,
            output=output,
            as_json=as_json,
            address=address,
            like=like,
            reader=reader,
            reader_place=reader_place,
        )
        draw_report(folder)
        return
    from cluster.run.evaluate import run_eval

    run_eval(
        checkpoint,
        task=chosen,
        problems=problems or 512,
        samples=samples,
        seed=seed,
        as_json=as_json,
        output=output,
        address=address,
        like=like,
        reader=reader,
        reader_place=reader_place,
    )


@app.command()
def diagnose(
    run: Annotated[Path, typer.Argument(help="A run folder, as `equipoise train` printed it")],
    rescore: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TERM[={JSON}]",
            help='Judge a further term on the stored rollouts: format={"default": 0.5}; repeatable',
        ),
    ] = None,
    reader: AskReader = "",
    reader_place: ReaderPlace = "prompt",
    as_json: AsJson = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print Markdown tables and nothing else")
    ] = False,
    address: Address = None,
) -> None:
    """Say what a stored run's rewards taught, and which reward terms can be trusted."""
    from cluster.start import refuse

    refuse(as_json and markdown, "--json and --markdown: choose one")
    from cluster.report.diagnose import run_diagnose

    readings = None
    if reader:
        from cluster.run.reading import read_run

        readings = read_run(run, expanded(reader), reader_place, address)
    run_diagnose(run, rescore or (), as_json, markdown, reader, readings)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="The folder of a run or of an ablation")],
    form: Annotated[
        Literal["html", "md", "json", "parquet"],
        typer.Option("--format", help="A page, tables as text, all as data, or flat tables"),
    ] = "html",
    output: Annotated[
        Path | None, typer.Option(help="File to write instead of FOLDER/report.*")
    ] = None,
) -> None:
    """Show what a run did or an ablation found: summary, curves, rollouts to look at, in a file."""
    from cluster.report.run_report import run_report

    print(f"report: {run_report(folder, form, output)}")


@app.command()
def scale(
    run: Annotated[Path, typer.Argument(help="The folder of a run that goes on, on this machine")],
    samplers: Annotated[int, typer.Option(min=1, help="How many samplers it is to have")],
) -> None:
    """Give a run that goes on more samplers, or fewer, from its next step."""
    from cluster.run.scaling import ask

    ask(run, samplers)
    print(f"{run}: {samplers} samplers from its next step; see sampler/asked and sampler/count")


@app.command()
def ablate(
    ablation: Annotated[Path, typer.Argument(help="A TOML ablation: recipes/ablations/...")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the cells and what they cost, and stop")
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the ablation; a second call goes on in it")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Run each cell as a Ray job: http://HEAD:8265")
    ] = None,
    pilot: Annotated[
        Path | None,
        typer.Option(help="With --dry-run: an ablation's folder whose spread tells the power"),
    ] = None,
    difference: Annotated[
        float, typer.Option(help="With --dry-run: the difference in a that is to be shown")
    ] = 0.03,
) -> None:
    """Compare reward designs: paired arms, the same seeds, problems and budget, and intervals.

    Exit code 1 when a cell failed or arms turned out not to be paired.
    """
    from cluster.ablate_cli import ablate_to_the_end
    from cluster.ablation.grid import load_ablation

    code = ablate_to_the_end(
        load_ablation(ablation), output, address, dry_run, pilot=pilot, difference=difference
    )
    raise typer.Exit(code)


@recipes.command()
def reference() -> None:
    """Print docs/recipe.md: every field with its type, default and meaning."""
    from cluster.recipe.reference import page

    print(page(), end="")


@recipes.command()
def schema() -> None:
    """Print recipes/recipe.schema.json, by which an editor completes a recipe."""
    from cluster.recipe.reference import schema_text

    print(schema_text(), end="")


@app.command(
    name="tasks",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def tasks_command(context: typer.Context) -> None:
    """Generate, import and show data sets of problems."""
    from cluster.tasks_cli import app as tasks_app

    # `prog_name` makes its own help say `equipoise tasks`.
    as_written(tasks_app)(args=context.args, prog_name="equipoise tasks")


@app.command()
def doctor(
    as_json: AsJson = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Import Ray, vLLM and DeepSpeed without a start")
    ] = False,
) -> None:
    """Say what this machine has, whether the engines start, and what would fail."""
    from cluster.doctor import run_doctor

    raise typer.Exit(run_doctor(as_json=as_json, quick=quick))


@app.command()
def demo() -> None:
    """Train the shipped tiny policy for a few minutes and show it before and after."""
    from cluster.demo import run_demo

    run_demo()


def main() -> None:
    """Run the command line; what the user can put right is one message and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal may lack characters that data has
            stream.reconfigure(errors="backslashreplace")
    # A recipe's `module:Class` is found from the folder the command is run in, however it is run.
    require_own_names()
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    # A shell expands `~` neither in quotes nor behind `=`.
    sys.argv[1:] = [re.sub(r"^(--[\w-]+=)?~.*", _at_home, word) for word in sys.argv[1:]]
    try:
        as_written(app)(prog_name="equipoise")
    except BrokenPipeError:  # nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise SystemExit(1) from None
    except Exception as error:
        from cluster.start import in_words

        message, code = in_words(error)
        if not code:
            raise
        print(message, file=sys.stderr)
        raise SystemExit(code) from None


def _at_home(word: re.Match[str]) -> str:
    option = word[1] or ""
    return option + expanded(word[0].removeprefix(option))
