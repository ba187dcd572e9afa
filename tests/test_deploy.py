"""The files of deploy/, as far as they can be held against something without a cluster."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest
import typer.main
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster.cli import app
from cluster.recipe.nodes import Node, lacking
from cluster.recipe.recipe import load_recipe
from cluster.record.metric_table import all_metrics
from tests.support.recipes import ROOT
from tests.support.waiting import until

DEPLOY = ROOT / "deploy"
IMAGES = {"equipoise:cpu", "equipoise:cuda"}


def asked(words: list[str]) -> dict[str, Any]:
    """What our own command line makes of a command; it is not run."""
    program, name, *rest = words
    assert program == "equipoise"
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group) or hasattr(group, "commands")
    command = group.commands[name]
    return dict(command.make_context(name, rest).params)


def test_what_was_not_run_says_so_in_its_first_lines() -> None:
    for file in DEPLOY.iterdir():
        assert "not run" in " ".join(file.read_text().splitlines()[:4]).lower(), file.name


@pytest.mark.parametrize("machine", ["cpu", "cuda"])
def test_an_image_is_made_of_what_the_checkout_has(machine: str) -> None:
    text = (DEPLOY / f"Dockerfile.{machine}").read_text().replace("\\\n", " ")
    lines = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    words = {"FROM", "RUN", "WORKDIR", "COPY", "ENV", "USER", "CMD"}
    assert lines[0][0] == "FROM" and {line[0] for line in lines} <= words
    for line in lines:
        if line[0] == "COPY" and not line[1].startswith("--from"):
            assert (ROOT / line[1]).exists()
    assert f"requirements/{machine}.txt" in text and "USER equipoise" in text
    hidden = (ROOT / ".dockerignore").read_text().split()
    assert not {"requirements", "recipes", "models", "cluster"} & {*hidden}


def test_a_job_of_kubernetes_runs_a_command_of_ours_that_fits_on_its_nodes() -> None:
    job = yaml.safe_load((DEPLOY / "kuberay.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    versions = (ROOT / "requirements" / "cuda.txt").read_text()
    assert f"\nray=={cluster['rayVersion']}\n" in versions
    nodes = []
    for group, count in [
        (cluster["headGroupSpec"], 1),
        *((g, g["replicas"]) for g in cluster["workerGroupSpecs"]),
    ]:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["image"] in IMAGES
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
        offers = container["resources"]["limits"]
        one = Node("", float(offers["cpu"]), float(offers["nvidia.com/gpu"]), group["labels"])
        nodes += [one] * count
    params = asked(shlex.split(job["spec"]["entrypoint"]))
    recipe_path = ROOT / Path(params["recipe"]).relative_to("/opt/equipoise")
    recipe = load_recipe(recipe_path, params["set_"])
    assert recipe.checkpoint.restarts and recipe.checkpoint.every
    assert lacking(recipe, "train", nodes) == ""
    assert "sampler" in lacking(recipe, "train", nodes[:1])  # it would be told


def test_the_file_of_rays_launcher_is_one_by_its_own_schema() -> None:
    config = yaml.safe_load((DEPLOY / "ray-cluster.yaml").read_text())
    validate_config(prepare_config(config))  # as `ray up` does, before it asks the cloud
    assert config["docker"]["image"] in IMAGES
    assert "-e RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert set(config["available_node_types"]) >= {config["head_node_type"]}
    with pytest.raises(Exception, match="not_a_field"):
        validate_config(prepare_config(config | {"not_a_field": 1}))


STAND_INS = {
    "scontrol": 'printf "one\\ntwo\\nthree\\n"',
    # As Slurm does, it hands on the environment and gets ended by a signal.
    "srun": 'echo "srun $* $RAY_AUTH_MODE $RAY_AUTH_TOKEN" >> "$TOLD"; exec sleep 600',
    "equipoise": """echo "equipoise $*" >> "$TOLD"; echo "token $RAY_AUTH_TOKEN" >> "$TOLD"
trap 'sleep 1; echo saved >> "$TOLD"; exit 0' TERM
case "$*" in *fails*) exit 7;; esac
echo waits >> "$TOLD"; while :; do sleep 0.1; done""",
}


def under_slurm(folder: Path, *words: str) -> tuple[subprocess.Popen[bytes], Path]:
    """The script of a job of three nodes, on stand-ins; and what they were told."""
    (folder / "bin").mkdir()
    for name, lines in STAND_INS.items():
        (folder / "bin" / name).write_text(f"#!/usr/bin/env bash\n{lines}\n")
        (folder / "bin" / name).chmod(0o755)
    told = folder / "told"
    variables = os.environ | {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "n[1-3]",
        "TOLD": str(told),
    }
    command = ["bash", str(DEPLOY / "slurm.sh"), *words]
    return subprocess.Popen(command, env=variables, start_new_session=True), told


def ended(job: subprocess.Popen[bytes]) -> int:
    """Its exit code; what Slurm would end with it is ended."""
    try:
        return job.wait(60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)


def test_a_job_of_slurm_starts_a_head_and_the_others_and_ends_in_order(tmp_path: Path) -> None:
    run = tmp_path / "run"
    job, told = under_slurm(tmp_path, "recipe.toml", str(run), "--set", "seed=1")

    def both_started() -> bool:
        said = told.read_text() if told.exists() else ""
        return "waits" in said and said.count("srun") == 2

    until(both_started, 60)
    job.send_signal(signal.SIGTERM)
    assert ended(job) == 0
    lines = told.read_text().splitlines()
    assert lines[-1] == "saved", "it was waited for"
    (words,) = [line for line in lines if line.startswith("equipoise")]
    assert words == f"equipoise train recipe.toml --output {run} --address one:6379 --set seed=1"
    params = asked(shlex.split(words))
    assert params["address"] == "one:6379" and params["set_"] == ["seed=1"]
    (token,) = [line.split()[1] for line in lines if line.startswith("token")]
    parts = [line for line in lines if line.startswith("srun")]
    assert len(token) == 64 and all(part.endswith(f" token {token}") for part in parts)
    head, others = sorted(parts, key=lambda part: "--exclude" in part)
    assert "--nodelist=one ray start --head --block --port=6379" in head
    assert "--nodes=2 --ntasks=2 --exclude=one" in others and "one:6379" in others


def test_a_job_that_was_requeued_goes_on_and_a_failure_is_the_jobs(tmp_path: Path) -> None:
    run = tmp_path / "fails"
    (run / "checkpoints" / "step-000002").mkdir(parents=True)
    job, told = under_slurm(tmp_path, "recipe.toml", str(run))
    assert ended(job) == 7
    assert f"equipoise train --resume {run} --address one:6379\n" in told.read_text()


def test_each_panel_of_the_dashboard_asks_for_numbers_that_a_run_logs() -> None:
    dashboard = json.loads((DEPLOY / "grafana.json").read_text())
    names = [row.name for row in all_metrics()]
    for panel in dashboard["panels"]:
        (target,) = panel["targets"]
        asked = re.fullmatch(
            r'ray_equipoise_metric\{run=~"\$run", metric=~"([^"]+)"\}', target["expr"]
        )
        assert asked
        for wanted in asked[1].split("|"):
            like = re.compile(wanted)
            assert any(
                like.fullmatch(re.sub("<learner>", "learner", re.sub("<task>", "vqa", name)))
                for name in names
            ), wanted
