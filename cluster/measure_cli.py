"""`equipoise eval` and `equipoise diagnose`: what a policy can do, and what a run taught it."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from tasks.files import expanded

Address = Annotated[
    str | None,
    typer.Option(envvar="RAY_ADDRESS", help="A running Ray cluster; without it, one of its own"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else")]
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


def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="A folder with a policy, a hub name or a URI")],
    task: Annotated[
        str, typer.Option(help="sudoku, graph_coloring or module:Class; with --data, vqa")
    ] = "",
    data: Annotated[
        str,
        typer.Option(help="A file, folder, hub name or URI: questions of your own, all by default"),
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
    from tasks.fetched import is_uri

    refuse(not (task or data), "eval: give --task, or --data with questions of your own")
    refuse(not data and bool(by or against), "--by, --against: they go with --data")
    if output:
        require_free(output, "--output")
        output.parent.mkdir(parents=True, exist_ok=True)  # now, not after the evaluation
    like = load_recipe(recipe) if recipe else None
    task_config = data_task(data, task, set_ or (), like) if data else task_of(task, set_ or ())
    if not is_uri(checkpoint):  # which is fetched first
        require_model(checkpoint)
    if data:
        from cluster.report.run_report import draw_report
        from cluster.run.evaluate_data import run_data_eval

        folder = run_data_eval(
            checkpoint,
            task_config,
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
        draw_report(folder, partial(print, file=sys.stderr) if as_json else print)
        return
    from cluster.run.evaluate import run_eval

    run_eval(
        checkpoint,
        task=task_config,
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
    tool: Annotated[
        bool,
        typer.Option(
            "--tool",
            help="Evaluate the run's last policy with its [environment] and without instead: what "
            "the tool gives, what it takes, and whether what it shows is used",
        ),
    ] = False,
    problems: Annotated[
        int | None, typer.Option(min=1, help="With --tool: held-out problems [as in its recipe]")
    ] = None,
    as_json: AsJson = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print Markdown tables and nothing else")
    ] = False,
    address: Address = None,
) -> None:
    """Say what a stored run's rewards taught, and which reward terms can be trusted."""
    from cluster.start import refuse

    refuse(as_json and markdown, "--json and --markdown: choose one")
    refuse(tool and bool(reader or rescore), "--tool: goes with neither --reader nor --rescore")
    refuse(problems is not None and not tool, "--problems: goes with --tool")
    if tool:
        from cluster.report.run_report import draw_report
        from cluster.report.tool_use import print_tool
        from cluster.run.tool_use import measure_tool, recipe_with_tool

        say = partial(print, file=sys.stderr)
        recipe = recipe_with_tool(run, problems)
        print_tool(run.name, measure_tool(run, recipe, address, say), as_json, markdown)
        draw_report(run, say)
        return
    from cluster.report.diagnose import run_diagnose

    readings = None
    if reader:
        from cluster.run.reading import read_run
        from tasks.fetched import is_uri, pinned

        model = expanded(reader)
        if is_uri(model):
            model = pinned(model, partial(print, file=sys.stderr), weights=True)
        readings = read_run(run, model, reader_place, address)
    run_diagnose(run, rescore or (), as_json, markdown, reader, readings)
