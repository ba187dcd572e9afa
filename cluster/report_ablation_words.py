"""An ablation in words and tables: who won, how sure, what was learnt, what it cost. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from cluster.ablation_config import AblationConfig, ArmConfig, CellCommand, CellName, flat
from cluster.ablation_results import (
    SHARES,
    Asymmetry,
    Comparison,
    Cost,
    Level,
    Results,
    Summary,
)
from cluster.report_ablation_charts import at, headlines, levels
from cluster.report_words import METRIC_NAMES, Finding, Table, duration, reward_words, short_path
from cluster.sections_reward import RewardConfig, RewardTermConfig
from cluster.statistics import PHASES, Estimate, seed_interval

LEAST_P = 0.05
"""A difference is called shown below this, after Holm's adjustment."""
FEWEST_SEEDS = 3
"""With fewer the report warns: intervals over seeds are very wide or absent."""
RELIABILITY = {"pooled": "over all", "within": "within groups", "auc": "AUC"}
SPEEDS = {
    "throughput/sampler_tokens_per_second": "sampled tokens/s",
    "throughput/learner_tokens_per_second": "learnt tokens/s",
    "sft/seconds": "seconds an update",
}


def arm_reward(arm: ArmConfig, base: Mapping[str, Any]) -> dict[str, Any]:
    """The arm's reward section: the base recipe's, replaced and changed as the arm says."""
    reward = dict(base.get("reward") or {} if arm.reward is None else arm.reward)
    for key, value in flat(arm.set):
        section, _, field = key.partition(".")
        if section == "reward" and "." not in field:
            reward[field] = value
    return reward


def alpha_of(reward: Mapping[str, Any]) -> float | None:
    """α of a reward α·a_p + (1 − α)·a; 0 for the outcome alone, None for any other."""
    if reward.get("alpha") is not None:
        return float(reward["alpha"])
    try:
        terms = RewardConfig.model_validate(reward).effective_terms()
    except ValidationError:
        return None  # of another version
    # A term credited to some segments only, or whose weight changes, is another reward.
    outcome = RewardTermConfig(name="outcome")
    plain = all(term.model_copy(update={"weight": outcome.weight}) == outcome for term in terms)
    return 0.0 if plain else None


def other_settings(arm: ArmConfig) -> list[tuple[str, Any]]:
    """What an arm sets outside [reward]."""
    return [(key, value) for key, value in flat(arm.set) if key.partition(".")[0] != "reward"]


def fixed_weights(config: AblationConfig, base: Mapping[str, Any]) -> dict[str, float]:
    """Arm -> λ, of the arms of SFT that fix it and set nothing else."""
    plain = dict(base.get("sft") or {})
    found = {}
    for arm in config.arms:
        sft = plain | {
            key.removeprefix("sft."): value for key, value in flat(arm.set) if key[:4] == "sft."
        }
        others = {key for key, _ in flat(arm.set)} - {"sft.balance", "sft.perception_weight"}
        if sft.get("balance") == "fixed" and not others:
            found[arm.name] = float(sft.get("perception_weight", 0.5))
    return found


def lead(
    config: AblationConfig, base: Mapping[str, Any], finished: int, cells: int, reference: str
) -> str:
    """What was compared, on what, how often, and how the numbers are made."""
    tasks = " and ".join(str(t.get("name")) for t in base.get("tasks") or ()) or "unknown tasks"
    model = short_path((base.get("model") or {}).get("path", "?"))
    harder = ", ".join(d.name for d in config.difficulties)
    harder = f" × difficulties {harder}" if harder else ""
    against = f" Arms are compared with {reference}." if reference else ""
    trained, see = "trained by RL on", "problems"
    if config.command == "sft":
        trained, see = "fine-tuned on demonstrations of", "demonstrations"
    return (
        f"{_count(len(config.arms), 'arm')}{harder} × {_count(len(config.seeds), 'seed')} of "
        f"{model} {trained} {tasks}, {config.budget.in_words()} each; "
        f"{finished} of {cells} cells finished.{against} Arms of one seed are to start from "
        f"the same weights and see the same {see} (hashes under Pairing). Intervals are 95 %, "
        "over seeds and test problems; differences are paired by both, their p is Holm-adjusted "
        "over arms."
    )


def findings(summary: Summary, arms: Sequence[str]) -> tuple[Finding, ...]:
    """For each difficulty: which arm ended best and how sure, and what each learnt."""
    found = []
    for difficulty, task in headlines(summary):
        where = f"{at(difficulty, task)}: " if len(headlines(summary)) > 1 else f"On {task}, "
        ranked = sorted(
            (levels(summary, difficulty, task, arm)["a"] for arm in arms
             if "a" in levels(summary, difficulty, task, arm)),
            key=lambda v: -v.after.value,
        )  # fmt: skip
        if ranked:
            found += _winner(summary, where, ranked)
        found += _learnt(summary, where, difficulty, task, arms, ranked)
    found += _cheapest(summary)
    return tuple(found)


def _winner(summary: Summary, where: str, ranked: Sequence[Level]) -> list[Finding]:
    """Who ended best on `a`, against the reference, and whose intervals overlap."""
    best, *others = ranked
    compared = {
        c.arm: c
        for c in summary.comparisons
        if (c.difficulty, c.task, c.metric) == (best.difficulty, best.task, "a")
    }
    ended = f"{where}{best.arm} ended best on a: {show(best.after)}"
    if best.arm == summary.reference:
        ended += ", and it is the reference"
    elif best.arm in compared:
        c = compared[best.arm]
        ended += f", {show(c.difference, '+')} against {c.reference} ({_sure(c)}): {_verdict(c)}"
    ties = [v.arm for v in others if v.after.value == best.after.value]
    ended += f". {', '.join(ties)} ended at the same value" if ties else ""
    details = tuple(
        f"{c.arm} against {c.reference}: {show(c.difference, '+')} ({_sure(c)}): {_verdict(c)}"
        for c in compared.values()
        if c.arm != best.arm
    )
    said = [Finding(f"{ended}.", details)]
    if not others:
        return said
    same = [v.arm for v in others if _overlap(v.after, best.after)]
    apart = [v.arm for v in others if v.arm not in same]
    text = f"The interval of {best.arm}'s a overlaps "
    text += f"that of {', '.join(same)}" if same else "no other arm's"
    text += f"; it is apart from that of {', '.join(apart)}." if same and apart else "."
    if same:
        text += " Levels alone do not say which of these is best; paired differences say more."
    shown = [c.arm for c in compared.values() if c.p_holm is not None and c.p_holm < LEAST_P]
    if compared and not shown:
        text += f" No arm is shown to differ from {summary.reference} on a."
    return [*said, Finding(text.strip())]


def _learnt(
    summary: Summary, where: str, difficulty: str, task: str, arms: Sequence[str],
    ranked: Sequence[Level],
) -> list[Finding]:  # fmt: skip
    """To see or to think, arm by arm, from before to after; the best arm first."""
    last = {
        v.arm: v
        for v in summary.asymmetries
        if (v.difficulty, v.task) == (difficulty, task)
        and v.step == max(w.step for w in summary.asymmetries if w.arm == v.arm)
    }
    order = list(dict.fromkeys([*(v.arm for v in ranked[:1]), *arms]))
    said = [
        text
        for arm in order
        if (text := learnt_words(arm, levels(summary, difficulty, task, arm), last.get(arm)))
    ]
    return [Finding(where + said[0], tuple(said[1:]))] if said else []


def learnt_words(arm: str, of: Mapping[str, Level], index: Asymmetry | None) -> str:
    """Whether an arm learnt to see or to think: changes whose interval leaves 0 out, and which
    gained more by the asymmetry index. "" where neither was measured."""
    parts, up, down = [], [], []
    for metric, word in (("a_p", "see"), ("a_r", "think")):
        if metric not in of:
            continue
        change = of[metric].change
        parts.append(f"Δ{metric} {show(change, '+')}")
        if change.low is not None and change.low > 0:
            up.append(word)
        if change.high is not None and change.high < 0:
            down.append(word)
    if not parts:
        return ""
    worse = f"got worse at {' and at '.join(f'{w}ing' for w in down)}"
    if up:
        text = f"{arm} learnt to {' and to '.join(up)}" + (f", and {worse}" if down else "")
    else:
        text = f"{arm} {worse}" if down else f"{arm} learnt nothing that is beyond chance"
    text += f" ({', '.join(parts)})"
    if index is None:
        return f"{text}."
    low, high = index.index.low, index.index.high
    if low is not None and low > 0:
        more = "thinking gained more"
    elif high is not None and high < 0:
        more = "seeing gained more"
    else:
        more = "neither clearly gained more than the other"
    return f"{text}; {more} (Δa_r − Δa_p = {show(index.index, '+')})."


def _cheapest(summary: Summary) -> list[Finding]:
    found = []
    for difficulty in dict.fromkeys(c.difficulty for c in summary.costs):
        tokens = [c for c in summary.costs if (c.difficulty, c.unit) == (difficulty, "tokens")]
        reached = [c for c in tokens if c.reach.median is not None]
        if not tokens:
            continue
        where = f" ({difficulty})" if difficulty else ""
        to = f"training accuracy {tokens[0].target:.3f}{where}"
        if reached:
            first = min(reached, key=lambda c: c.reach.median or 0)
            text = f"{first.arm} reached {to} with the fewest tokens: {_spent(first)}."
        else:
            text = f"No arm reached {to} in at least half of its seeds."
        rest = tuple(f"{c.arm}: {_spent(c)}" for c in tokens if not reached or c.arm != first.arm)
        found.append(Finding(text, rest))
    return found


def warnings(
    config: AblationConfig, cells: Sequence[CellName], finished: Sequence[str],
    failed: Mapping[str, str], faults: Sequence[str],
) -> list[str]:  # fmt: skip
    """What a reader must know before believing the rest."""
    found = [f"Not paired: {fault}." for fault in faults]
    found += [f"{cell} failed: {' '.join(error.split())[:300]}" for cell, error in failed.items()]
    open_ = [c.id for c in cells if c.id not in finished and c.id not in failed]
    if open_:
        found.append(
            f"{len(open_)} of {len(cells)} cells have neither ended nor failed; `equipoise ablate` "
            "goes on with them. Comparisons use the seeds that both arms have."
        )
    per_arm = {
        arm.name: len({c.seed for c in cells if c.arm == arm.name and c.id in finished})
        for arm in config.arms
    }
    least = min(per_arm.values())
    if finished and least < FEWEST_SEEDS:
        what = (
            "Arms without a finished seed are in no table"
            if least == 0
            else "With one seed nothing is said about other seeds, however narrow an interval "
            "over problems is"
            if least == 1
            else "Intervals over two seeds are very wide"
        )
        counts = ", ".join(f"{arm} {n}" for arm, n in per_arm.items())
        found.append(f"Few seeds (finished: {counts}). {what}.")
    if len(config.arms) < 2:
        found.append("There is one arm only, so nothing is compared.")
    return found


def arms_table(
    config: AblationConfig, base: Mapping[str, Any], cells: Sequence[CellName],
    finished: Sequence[str],
) -> Table:  # fmt: skip
    """What each arm is."""
    rewarded = config.command == "train"
    rows = []
    for i, arm in enumerate(config.arms):
        changed = [f"{key} = {_plain(value)}" for key, value in other_settings(arm)]
        ended = {c.seed for c in cells if c.arm == arm.name and c.id in finished}
        settings = (reward_words({"reward": arm_reward(arm, base)}), "; ".join(changed))
        rows.append(
            (
                arm.name + (" (reference)" if i == 0 else ""),
                *(settings if rewarded else settings[1:]),
                arm.note or "",
                f"{len(ended)} of {len(config.seeds)}",
            )
        )
    named = ("reward", "other settings") if rewarded else ("settings",)
    return Table(
        "What each arm is",
        ("arm", *named, "note", "seeds finished"),
        "ll" + "l" * len(named) + "r",
        tuple(rows),
    )


def level_tables(summary: Summary) -> list[Table]:
    """Before and after, a table a task; the headline's is open, the others folded."""
    open_ = set(headlines(summary))
    tables = []
    for difficulty, task in dict.fromkeys((v.difficulty, v.task) for v in summary.levels):
        rows = tuple(
            (v.arm, METRIC_NAMES.get(v.metric, v.metric), show(v.before), show(v.after),
             show(v.change, "+"), f"{v.after.seeds} × {v.after.problems}")
            for v in summary.levels
            if (v.difficulty, v.task) == (difficulty, task)
        )  # fmt: skip
        tables.append(
            Table(
                f"Accuracies before and after: {at(difficulty, task)}",
                ("arm", "metric", "before", "after", "change", "seeds × problems"),
                "llrrrr",
                rows,
                "Held-out problems, greedy answers; a_r with the true perception forced.",
                folded=(difficulty, task) not in open_,
            )
        )
    return tables


def comparison_tables(summary: Summary) -> list[Table]:
    """Paired differences from the reference after training, a table a task."""
    open_ = set(headlines(summary))
    tables = []
    for difficulty, task in dict.fromkeys((c.difficulty, c.task) for c in summary.comparisons):
        rows = []
        for c in summary.comparisons:
            if (c.difficulty, c.task) != (difficulty, task):
                continue
            ours, theirs = (
                levels(summary, difficulty, task, arm).get(c.metric) for arm in (c.arm, c.reference)
            )
            overlap = ours is not None and theirs is not None and _overlap(ours.after, theirs.after)
            test = ("–", "–", "–")
            if c.test is not None:
                each = ", ".join(f"{p:.2g}" for p in c.test.p_by_seed)
                test = (str(c.test.gained), str(c.test.lost), each)
            rows.append(
                (c.arm, c.metric, show(c.difference, "+"), _p(c.difference.p), _p(c.p_holm),
                 "overlap" if overlap else "apart", *test, str(c.difference.seeds))
            )  # fmt: skip
        tables.append(
            Table(
                f"Against {summary.reference} after training: {at(difficulty, task)}",
                (
                    "arm",
                    "metric",
                    "difference",
                    "p",
                    "p (Holm)",
                    "intervals",
                    "gained",
                    "lost",
                    "McNemar p by seed",
                    "seeds",
                ),
                "llrrrrrrrr",
                tuple(rows),
                "Paired by seed and problem. p and the interval are over other seeds and problems; "
                "McNemar's exact p, gained and lost (wrong in the reference and right here, and "
                "the reverse) compare two checkpoints, seed by seed. “Intervals”: whether those of "
                "the two arms' own levels overlap; paired differences are surer than levels.",
                folded=(difficulty, task) not in open_,
            )
        )
    return tables


def asymmetry_table(summary: Summary) -> Table | None:
    """Δa_r − Δa_p over training."""
    rows = tuple(
        (at(v.difficulty, v.task), v.arm, str(v.step), show(v.index, "+"))
        for v in summary.asymmetries
    )
    return (
        Table(
            "Asymmetry index over training", ("task", "arm", "step", "Δa_r − Δa_p"), "llrr", rows,
            "Above 0: thinking gained more than seeing since the start.",
        )
        if rows
        else None
    )  # fmt: skip


def share_table(summary: Summary) -> Table | None:
    """Perception's share of tokens, loss and gradient norm, and λ, arm by arm."""
    by_arm: dict[tuple[str, str], dict[str, str]] = {}
    for s in summary.shares:
        by_arm.setdefault((s.difficulty, s.arm), {})[s.of] = show(s.share)
    rows = tuple(
        (at(difficulty, arm) if difficulty else arm, *(found.get(of, "–") for of in SHARES))
        for (difficulty, arm), found in by_arm.items()
    )
    return (
        Table(
            "Perception's share of an update", ("arm", *SHARES), "l" + "r" * len(SHARES), rows,
            "Means over the updates of a run, those of the gradient norm over the updates it was "
            "measured at; intervals over seeds. Loss and gradient norm are as λ weighs them; under "
            "the token mean λ is perception's share of the tokens.",
        )
        if rows
        else None
    )  # fmt: skip


def coupling_table(summary: Summary) -> Table | None:
    """Within-group correlations of the outcome by third of training."""
    cells = {(c.difficulty, c.arm, c.of, c.phase): show(c.correlation) for c in summary.couplings}
    keys = dict.fromkeys((c.difficulty, c.of, c.arm) for c in summary.couplings)
    rows = tuple(
        (arm, at(difficulty, of.replace("outcome_", "outcome with ")),
         *(cells.get((difficulty, arm, of, p), "–") for p in PHASES))
        for difficulty, of, arm in keys
    )  # fmt: skip
    return (
        Table(
            "Coupling by phase", ("arm", "correlation", *PHASES), "llrrr", rows,
            "Within groups, which is what an update of GRPO learns from.",
        )
        if rows
        else None
    )  # fmt: skip


def reliability_table(
    results: Results, metrics: Sequence[str], arms: Sequence[str]
) -> Table | None:
    """How well each term tells true perception, arm by arm."""
    terms = dict.fromkeys(
        m.removeprefix("reliability/").rsplit("/", 1)[0]
        for m in metrics
        if m.startswith("reliability/") and m.count("/") > 1
    )
    rows = []
    for difficulty in results.difficulties:
        for term in terms:
            for arm in arms:
                found = [
                    _mean_over_steps(results, difficulty, arm, f"reliability/{term}/{stat}", -1, 1)
                    for stat in RELIABILITY
                ]
                if any(f is not None for f in found):
                    rows.append(
                        (arm, at(difficulty, term), *("–" if f is None else show(f) for f in found))
                    )
    return (
        Table(
            "Reliability of reward terms", ("arm", "term", *RELIABILITY.values()), "llrrr",
            tuple(rows),
            "Correlation of the term with true perception over all rollouts and within groups, "
            "and the chance that a right perception gets more than a wrong one; means over steps, "
            "intervals over seeds.",
        )
        if rows
        else None
    )  # fmt: skip


def cost_table(summary: Summary) -> Table | None:
    """Tokens and seconds to a training accuracy."""
    rows = []
    for c in summary.costs:
        reached = f"{c.reach.reached} of {c.reach.seeds}"
        rows.append(
            (c.arm, at(c.difficulty, c.unit) if c.difficulty else c.unit, f"{c.target:.3f}",
             reached, _spent(c))
        )  # fmt: skip
    return (
        Table(
            "Cost of an accuracy",
            ("arm", "unit", "training a", "seeds that reached it", "median cost"), "llrrr",
            tuple(rows),
            "Counted as reached when the mean of five steps is. The median counts seeds that never "
            "reached it as later than all that did.",
        )
        if rows
        else None
    )  # fmt: skip


def speed_table(
    results: Results, arms: Sequence[str], seconds: Mapping[tuple[str, str], Sequence[float]]
) -> Table | None:
    """Throughput and wall time; `seconds`: (difficulty, arm) -> of each finished cell."""
    rows = []
    known = {
        name: words
        for name, words in SPEEDS.items()
        if any(results.numbers(d, arm, "", name) for d in results.difficulties for arm in arms)
    }
    for difficulty in results.difficulties:
        for arm in arms:
            speeds = [
                _mean_over_steps(results, difficulty, arm, name, 0, math.inf) for name in known
            ]
            walls = seconds.get((difficulty, arm), ())
            wall = duration(sum(walls) / len(walls)) if walls else "–"
            if walls or any(speeds):
                shown = ("–" if s is None else show(s, form=",.0f") for s in speeds)
                rows.append((at(difficulty, arm) if difficulty else arm, *shown, wall))
    return (
        Table(
            "Throughput and wall time", ("arm", *known.values(), "mean time of a cell"),
            "l" + "r" * (len(known) + 1), tuple(rows),
            "A cell's time is all of it: start, evaluations and report included.",
        )
        if rows
        else None
    )  # fmt: skip


def pairing_table(
    cells: Sequence[CellName],
    finished: Mapping[str, Mapping[str, Any]],
    command: CellCommand = "train",
) -> Table | None:
    """Hashes of initial weights and first batch, and whether they equal those of their pair."""
    rows: list[tuple[str, ...]] = []
    first: dict[tuple[str, int], tuple[str, list[str]]] = {}
    for cell in cells:
        result = finished.get(cell.id)
        if result is None:
            continue
        hashes = [str(result.get(name) or "missing") for name in ("weights", "first_batch")]
        pair = first.setdefault((cell.difficulty, cell.seed), (cell.arm, hashes))
        known = "missing" not in hashes
        equal = "the first of its pairs" if pair[0] == cell.arm else (
            "equal" if known and hashes == pair[1] else "NOT equal" if known else "not known"
        )  # fmt: skip
        rows.append(
            (cell.arm, at(cell.difficulty, str(cell.seed)) if cell.difficulty else str(cell.seed),
             hashes[0][:16], hashes[1][:16], equal)
        )  # fmt: skip
    return (
        Table(
            "Are the arms paired?",
            ("arm", "seed", "initial weights", "first batch", "against the first arm"), "lrlll",
            tuple(rows),
            "SHA-256 (its start) of the files of the checkpoint that a cell began from, and of the "
            + (
                "problems of its first step in order: ids, prompts, images."
                if command == "train"
                else "demonstrations of its first update in order: token ids, segments, images."
            ),
        )
        if rows
        else None
    )  # fmt: skip


def cells_table(
    cells: Sequence[CellName],
    ended: Sequence[str],
    finished: Mapping[str, Mapping[str, Any]],
    failed: Mapping[str, str],
) -> Table:
    """Every cell and what became of it; `ended` also has cells that left only numbers."""
    rows = []
    for cell in cells:
        state, told = "not finished", ""
        if cell.id in ended:
            took = finished.get(cell.id, {}).get("seconds")
            state, told = "finished", "" if took is None else duration(float(took))
        elif cell.id in failed:
            state, told = "FAILED", failed[cell.id][:1000]
        rows.append((cell.id, state, told))
    title = "Every cell and what became of it"
    return Table(title, ("cell", "state", "time or error"), "lll", tuple(rows), folded=not failed)


def show(estimate: Estimate, sign: str = "", form: str = ".3f") -> str:
    """A value with its interval, or with a word on why it has none."""
    value = f"{estimate.value:{sign}{form}}"
    if estimate.low is None or estimate.high is None:
        return f"{value} (one seed)".replace("-", "−")
    return f"{value} [{estimate.low:{sign}{form}}, {estimate.high:{sign}{form}}]".replace("-", "−")


def _verdict(c: Comparison) -> str:
    """Whether an arm is shown to differ from the reference, as the end of a sentence."""
    if c.p_holm is None:
        said = "one seed decides nothing about others"
    elif c.p_holm < LEAST_P:
        more = "more" if c.difference.value > 0 else "less"
        others = "problems" if c.difference.seeds == 1 else "seeds and problems"
        said = f"{more} than other {others} explain"
    else:
        said = "no difference shown: 0 lies in the interval, or the adjusted p is not below 0.05"
    if c.difference.seeds == 1:
        return f"one seed only, so this says nothing about other seeds; {said}"
    return said


def _mean_over_steps(
    results: Results, difficulty: str, arm: str, metric: str, low: float, high: float
) -> Estimate | None:
    by_seed = results.numbers(difficulty, arm, "", metric)
    means = []
    for _, values in sorted(by_seed.items()):
        good = [v for step, v in values.items() if step > 0 and v is not None and v == v]
        if good:
            means.append(sum(good) / len(good))
    return seed_interval(means, (low, high)) if means else None


def _spent(c: Cost) -> str:
    median = c.reach.median
    known = c.reach.spent_at_least if median is None else median
    if known is None:
        return "not known"
    amount = duration(known) if c.unit == "seconds" else f"{known:,.0f} {c.unit}"
    return amount if median is not None else f"not within {amount}"


def _sure(c: Comparison) -> str:
    return f"Holm-adjusted p {_p(c.p_holm)}, {_count(c.difference.seeds, 'seed')}"


def _p(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}"


def _overlap(one: Estimate, other: Estimate) -> bool:
    """Whether two intervals overlap; what has none overlaps with all."""
    if one.low is None or one.high is None or other.low is None or other.high is None:
        return True
    return one.low <= other.high and other.low <= one.high


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _plain(value: Any) -> str:
    return short_path(value) if isinstance(value, str) else str(value)
