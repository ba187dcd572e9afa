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

from cluster.measure_cli import Address, AsJson, diagnose, evaluate
from cluster.models_cli import app as models_app
from cluster.names import require_own_names
from cluster.record.terminal import as_written
from cluster.submit_cli import COMMANDS as JOB_COMMANDS
from cluster.submit_cli import At, status_of_job
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
    str | None,
    typer.Option(
        metavar="RUN", help="Go on with a run, or a copy at a URI, from its last checkpoint"
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one field: learner.ranks=2"),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Check data and model; print the resolved recipe, the placement, and stop"
    ),
]
Output = Annotated[Path | None, typer.Option(help="Folder of this run instead of a new one")]


def _show_version(requested: bool) -> None:
    if requested:
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
    from cluster.start import loaded, ready, refuse, supervised

    if replay is not None:
        refuse(
            recipe is not None or resume is not None,
            "--replay RUN: the run has its recipe; give neither one nor --resume",
        )
        from cluster.run.replay import recorded, run_replay

        again, source = recorded(replay, set_ or ())
        if pinned := ready(again, "replay", address, dry_run, replay, output):
            run_replay(pinned, source, address=address, output=output)
        return
    config, resumed = loaded("train", recipe, set_, output, resume)
    new = None if resumed else output
    pinned = ready(config, "train", address, dry_run, recipe or resume, new)
    if pinned is None:
        return
    ended = supervised("train", config, recipe, set_, address, output, resumed)
    if ended is not None:
        raise typer.Exit(ended)
    from cluster.run.train import run_training

    folder = run_training(pinned, address=address, output=output, resumed=resumed)
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

    config = recipe_to_sample(where, set_ or ())
    if pinned := ready(config, "sample", address, dry_run, where, output):
        run_sampling(pinned, steps, address=address, output=output)


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
    from cluster.start import loaded, ready, refuse, supervised

    config, resumed = loaded("sft", recipe, set_, output, resume)
    refuse(
        config.sft is None,
        f"{recipe}: sft: `equipoise sft` needs this section and it is missing; add [sft] "
        "with steps = 650, or see recipes/tiny/cold_start.toml",
    )
    new = None if resumed else output
    pinned = ready(config, "sft", address, dry_run, recipe or resume, new)
    if pinned is None:
        return
    ended = supervised("sft", config, recipe, set_, address, output, resumed)
    if ended is not None:
        raise typer.Exit(ended)
    from cluster.run.sft import run_sft

    run_sft(pinned, address=address, output=output, resumed=resumed)


app.command(name="eval")(evaluate)
app.command()(diagnose)


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
    """Show the results of a run or ablation: summary, curves, rollouts to look at, in a file."""
    from cluster.report.run_report import run_report

    print(f"report: {run_report(folder, form, output)}")


@app.command()
def status(
    run: Annotated[str, typer.Argument(help="The folder of a run, or the name of a job")],
    address: At = None,
) -> None:
    """Say how far a run is, how fast, who waits for whom, and what befell it."""
    from rich.console import Console

    from cluster.recipe.recipe import UserError
    from cluster.record.status import event_table, read_status, status_table

    folder = Path(run)
    if not folder.exists():
        if address is None:
            raise UserError(f"status {run}: no such folder; of a job, give --address too")
        raise typer.Exit(status_of_job(run, address))
    state = read_status(folder)
    console = Console()
    console.print(status_table(folder, state).to_rich())
    if state.events:
        console.print(event_table(state).to_rich())


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


@app.command(hidden=True)
def cells() -> None:
    """Run cells that an ablation's launcher asks for on standard input, one after another."""
    answers = os.dup(1)
    os.dup2(2, 1)  # what a library prints is no answer

    from cluster.cells_cli import run_cells

    raise typer.Exit(run_cells(main, answers))


for _command in JOB_COMMANDS:
    app.command()(_command)


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
    recipe: Annotated[
        Path | None, typer.Argument(help="What is to be run: says what shared memory it takes")
    ] = None,
    as_json: AsJson = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Import Ray, vLLM and DeepSpeed without a start")
    ] = False,
) -> None:
    """Say what this machine has, whether the engines start, and what would fail."""
    from cluster.doctor import run_doctor

    raise typer.Exit(run_doctor(as_json=as_json, quick=quick, recipe=recipe))


@app.command()
def demo() -> None:
    """Train the shipped tiny policy for a few minutes and show it before and after."""
    from cluster.demo import run_demo

    run_demo()


@app.command()
def pretrained(
    out: Annotated[Path, typer.Option(help="Folder below which each stage has its own")] = Path(
        "build/pretrained"
    ),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what there is to do, how long it takes, and stop")
    ] = False,
) -> None:
    """Give a language model that others trained eyes: fetch, graft, align, SFT, RL; or go on."""
    from cluster.pretrained import run_pretrained

    run_pretrained(out, dry_run)


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
