"""The model card that goes with a checkpoint: what it came from and what it can do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.recipe.recipe import Recipe, resolved_toml
from cluster.record.evaluation import EvalTable


def model_card(recipe: Recipe, summary: Mapping[str, Any], tables: Mapping[str, EvalTable]) -> str:
    """Markdown: recipe, seed, wall time, perception's shares, and every figure with its n."""
    first, last = summary["shares_first_fifth"], summary["shares_last_fifth"]
    lines = [
        f"# {recipe.name}",
        "",
        f"{summary['steps']} SFT updates of {summary['batch_size']} demonstrations, seed "
        f"{recipe.seed}, {summary['wall_seconds']:.0f} s wall time, warm-up included.",
        "",
        "| perception's share of | first fifth of the updates | last fifth |",
        "|---|---|---|",
        f"| response tokens | {first['perception_tokens']:.1%} | {last['perception_tokens']:.1%} |",
        f"| token-mean loss | {first['perception_loss']:.1%} | {last['perception_loss']:.1%} |",
        "",
    ]
    for task, table in tables.items():
        lines += [
            f"## {task}, held-out problems",
            "",
            "| metric | value | 95% interval | n |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {row.metric} | {row.value:.3f} | {row.low:.3f} – {row.high:.3f} | {row.n} |"
            for row in table.rows
        ]
        lines.append("")
    lines += ["## Recipe", "", "```toml", resolved_toml(recipe).strip(), "```", ""]
    return "\n".join(lines)
