"""The stored scores of a run, with further terms judged on its rollouts where asked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cluster.recipe.recipe import UserError
from cluster.record.stored import StoredScores, read_groups, read_scores, stored_steps
from rewards.scored import TermError
from rewards.terms import AskingTerm, Term, is_remote, load_term, score_group
from tasks.load import load_task


def load_scores(run: Path, rescore: Sequence[str] = ()) -> list[StoredScores]:
    """Every stored group's scores, with the terms of `rescore` (`TERM` or `TERM={...}`) added.

    A rescored term goes by the words it was asked for with, and `(rescored)`: it stands beside the
    run's own term of that name. Its failures are counted, like those of training.
    """
    steps = stored_steps(run)
    if not rescore:
        return [scores for step in steps for scores in read_scores(run, step)]
    terms = {spec: rescored_term(spec) for spec in rescore}
    scores_by_group = []
    for step in steps:
        for stored in read_groups(run, step):
            scores, task = stored.scores, load_task(stored.group.problem.task)
            for spec, term in terms.items():
                label = f"{spec} (rescored)"
                fresh = score_group(task, stored.group, {label: term}, with_diagnosis=False)
                scores = replace(
                    scores,
                    terms={**scores.terms, **fresh.values},
                    failures=(*scores.failures, *fresh.failures),
                )
            scores_by_group.append(scores)
    return scores_by_group


def rescored_term(spec: str) -> Term:
    """The term that `TERM` or `TERM={"arg": 1}` names; raises UserError for what cannot be run."""
    name, _, text = spec.partition("=")
    try:
        args = json.loads(text) if text else {}
    except ValueError as error:
        raise UserError(f"--rescore {spec}: after `=` comes a JSON object: {error}") from error
    if not isinstance(args, dict):
        raise UserError(
            f'--rescore {spec}: after `=` comes a JSON object of arguments, such as {{"scale": 2}}'
        )
    try:
        term = load_term(name, args)
    except TermError as error:
        raise UserError(f"--rescore {spec}: {error}") from error
    if isinstance(term, AskingTerm) or is_remote(term):
        raise UserError(
            f"--rescore {spec}: this term asks a model or a server, and `diagnose` starts none; "
            "log it in a training run with weight 0"
        )
    return term
