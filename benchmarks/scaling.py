"""What a run of 8 to 4,096 GPUs moves, and what of it breaks first: arithmetic on a few constants.

    python -m benchmarks.scaling              # the tables of docs/scaling.md
    python -m benchmarks.scaling --measure    # between two raylets of this machine: RAY_PULL below

Nothing here was run on a GPU or on more than one machine. Each constant says where it is from.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.tables import ROOT, between_marks
from tasks.files import put_text

PAGE = ROOT / "docs" / "scaling.md"
GPUS = (8, 64, 512, 4096)
NODE = 8
"""GPUs of a node; half of the nodes (of one node: half of the GPUs) sample."""
NIC = 50e9
"""Bytes/s of a GPU's own network card: 400 Gbit/s (NVIDIA's data sheet of the DGX H100)."""
RAY_PULL = 1.0e9
"""Bytes/s at which one node gives objects to others through Ray: `--measure` on two cores."""
DRIVER = 15_652
"""Rollouts/s that the driver takes at 256 samplers (docs/results/asynchrony.md)."""
STORED = 3.2
"""Bytes of a stored token, ids, log-probs, versions, segments and text together, in Parquet
(7,680 rollouts of examples/charts, 680,215 tokens)."""
ROLLOUTS, TOKENS = 64, 1500
"""Of a GPU a step, and tokens of each, prompt and image included: a choice."""
HOST = 2048 * 2**30
"""Bytes of a node's main memory (benchmarks/memory_that_fits.py)."""
SLOW = 0.1
"""Of a step, what a transfer or the driver may take before it is said to break."""


@dataclass(frozen=True)
class Model:
    """Parameters are counted (`benchmarks.memory_that_fits --counts`); tokens a second and GPU of a
    whole step are those of EasyR1's table on 8 H100s, for the 3 B, 7 B and 32 B that it has."""

    name: str
    parameters: int
    rate: float
    tensor_parallel: int = 1

    @property
    def bytes(self) -> float:
        """Of one version in bfloat16."""
        return 2.0 * self.parameters


MODELS = (
    Model("4 B", 4_437_815_808, 1800),
    Model("8 B", 8_767_123_696, 1600),
    Model("32 B", 33_357_390_064, 620, 2),
)


@dataclass(frozen=True)
class Load:
    """What one model on so many GPUs asks for, in seconds and bytes a step."""

    model: Model
    gpus: int

    @property
    def nodes(self) -> float:
        """That sample; half a node of one."""
        return self.gpus / NODE / 2

    @property
    def step(self) -> float:
        return ROLLOUTS * TOKENS / self.model.rate

    @property
    def engines(self) -> int:
        return self.gpus // 2 // self.model.tensor_parallel

    @property
    def pulled(self) -> float:
        """Bytes that leave the learner's node with `host`: a copy a node; none within one node."""
        return self.model.bytes * self.nodes if self.gpus > NODE else 0.0

    @property
    def host(self) -> float:
        """Seconds of these; from shared memory each engine reads its copy at a node's leisure."""
        return self.pulled / RAY_PULL

    @property
    def nccl(self) -> float:
        """Seconds of a broadcast in which each card passes on what it gets."""
        return self.model.bytes / NIC

    @property
    def rollouts(self) -> int:
        return ROLLOUTS * self.gpus

    @property
    def driver(self) -> float:
        """Share of a step."""
        return self.rollouts / DRIVER / self.step

    @property
    def stored(self) -> float:
        return STORED * TOKENS * self.rollouts

    def breaks(self) -> str:
        """What takes more than `SLOW` of a step, or more than there is; the worst first."""
        shares = {
            "`host` transfer": self.host / self.step,
            "`nccl` transfer": self.nccl / self.step,
            "driver": self.driver,
            "object store": SLOW * 2 * self.model.bytes / (0.3 * HOST),  # two versions at a time
        }
        worst = sorted((share, name) for name, share in shares.items() if share > SLOW)
        return ", ".join(name for _, name in reversed(worst)) or "nothing"


def table() -> str:
    """Markdown: a row for each model on each number of GPUs."""
    head = (
        "policy", "GPUs", "engines", "a step, s", "a version, GB", "leaves the learner's node, GB",
        "`host`, s", "`nccl`, s", "rollouts a step", "driver, of a step", "stored a step, GB",
        "breaks first",
    )  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 2) + "---|"]
    for model in MODELS:
        for gpus in GPUS:
            load = Load(model, gpus)
            host = f"{load.host:,.1f}" if load.host else "in memory"
            cells = (
                model.name, f"{gpus:,}", f"{load.engines:,}", f"{load.step:.0f}",
                f"{model.bytes / 1e9:.0f}", f"{load.pulled / 1e9:,.0f}", host,
                f"{load.nccl:.1f}", f"{load.rollouts:,}", f"{load.driver:.1%}",
                f"{load.stored / 1e9:.2f}", load.breaks(),
            )  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def measured(gib: float = 1.0, repeats: int = 3) -> float:
    """Bytes/s at which one raylet of this machine pulls an object from another."""
    import numpy as np
    import ray
    from ray.cluster_utils import Cluster

    store = int(4 * gib * 2**30)
    nodes = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": store}
    )
    nodes.add_node(num_cpus=1, resources={"far": 1}, object_store_memory=store)
    ray.init(address=nodes.address, log_to_driver=False)

    @ray.remote(resources={"far": 1}, num_cpus=0)
    class Far:
        def pull(self, refs: list[ray.ObjectRef]) -> float:
            began = time.perf_counter()
            ray.get(refs[0])
            return time.perf_counter() - began

    far, size, rates = Far.remote(), int(gib * 2**30), list[float]()
    for _ in range(repeats + 1):
        ref = ray.put(np.ones(size, np.uint8))
        rates.append(size / ray.get(far.pull.remote([ref])))
        del ref
    ray.shutdown()
    nodes.shutdown()
    print(f"{[f'{rate / 1e9:.2f}' for rate in rates]} GB/s; the first is not counted")
    return statistics.median(rates[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--measure", action="store_true", help="what RAY_PULL is here")
    parser.add_argument("--to", type=Path, default=PAGE, help="the page")
    given = parser.parse_args()
    if given.measure:
        print(f"{measured() / 1e9:.2f} GB/s")
        return
    page = given.to.read_text(encoding="utf-8")
    put_text(given.to, between_marks(page, "scaling", table()))


if __name__ == "__main__":
    main()
