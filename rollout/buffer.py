"""The group buffer: which groups may be started, which may be learnt from, each used once.

A run draws its problems in a fixed order; a group's *position* in it says which problem it samples.
The buffer knows every position from its start to its use. It holds no engine and no clock: the
driver tells it what was sampled and which policy version the learner has.

Staleness is counted in policy versions: the learner's version when a step begins to learn, less
the version that sampled the oldest token of the group. So a group whose weights changed while
it was sampled is as old as its first token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rollout.record import Group
from rollout.settings import StalenessConfig


class GroupBufferError(RuntimeError):
    """A group came back that nobody waits for, or was started twice; names the group."""


@dataclass(frozen=True)
class BufferState:
    """What a checkpoint keeps: positions 0 to `drawn` - 1 were started, all but `open` are done.

    `open` were being sampled, or complete and not yet learnt from: a resumed run samples them
    again, so each is still used exactly once.
    """

    drawn: int = 0
    open: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `from_dict` reads it back."""
        return {"drawn": self.drawn, "open": list(self.open)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> BufferState:
        """Read what `to_dict` wrote; raises ValueError for what it cannot have written."""
        state = cls(int(data["drawn"]), tuple(int(position) for position in data["open"]))
        if list(state.open) != sorted(set(state.open)) or not all(
            0 <= position < state.drawn for position in state.open
        ):
            raise ValueError(f"buffer: open positions {state.open} do not fit {state.drawn} drawn")
        return state


@dataclass
class _Entry:
    """One position that is not done with: waiting for a start, in flight (an id), or complete."""

    position: int
    group_id: str | None = None
    group: Group | None = None
    oldest: int | None = None
    rank: int = 0


class GroupBuffer:
    """The groups of a run of `steps` steps, between their start and their use.

    `steps_done` and `state` are those of the checkpoint that a resumed run goes on from.
    """

    def __init__(
        self,
        rule: StalenessConfig,
        steps: int,
        steps_done: int = 0,
        state: BufferState | None = None,
    ) -> None:
        state = state or BufferState(steps_done * rule.problems_per_step)
        self._rule, self._steps, self._steps_done = rule, steps, steps_done
        self._groups = rule.problems_per_step
        self._drawn = state.drawn
        self._entries = {position: _Entry(position) for position in state.open}
        self._in_flight: dict[str, _Entry] = {}
        self._used = steps_done * rule.problems_per_step
        self._completed = 0
        self._counts = Counter({"dropped": 0, "resampled": 0, "aborted": 0})

    # --- starting -----------------------------------------------------------------------------

    def admit(self) -> list[int]:
        """Positions to sample now, ascending; `started` is to be told of each.

        Those that wait (put back, too old, or open in a checkpoint), then new ones: as many as
        can be used in time if each step takes its share, `steps_ahead` steps beyond the one due.
        """
        waiting = [p for p, e in self._entries.items() if not e.group_id]
        due = min(self._steps_done + 1 + self._rule.steps_ahead, self._steps) * self._groups
        fresh = range(self._drawn, self._drawn + max(0, due - self._used - len(self._entries)))
        self._drawn += len(fresh)
        self._entries |= {position: _Entry(position) for position in fresh}
        return sorted([*waiting, *fresh])

    def started(self, position: int, group_id: str) -> None:
        """A position is sampled under this id. Raises GroupBufferError if it already is."""
        entry = self._entries.get(position)
        if entry is None or entry.group_id or group_id in self._in_flight:
            raise GroupBufferError(
                f"group {group_id!r}: position {position} does not wait for a start"
            )
        entry.group_id = group_id
        self._in_flight[group_id] = entry

    def in_flight(self) -> list[str]:
        """Ids of the groups that are being sampled, in the order of their start."""
        return list(self._in_flight)

    def put_back(self, group_ids: Sequence[str]) -> None:
        """Note that groups in flight are sampled no more; `admit` names their positions again."""
        for group_id in group_ids:
            self._in_flight.pop(group_id).group_id = None
        self._counts["aborted"] += len(group_ids)

    # --- using --------------------------------------------------------------------------------

    def add(self, group: Group) -> None:
        """Keep a complete group; raises GroupBufferError where it came twice, or was not asked."""
        entry = self._in_flight.pop(group.group_id, None)
        if entry is None:
            raise GroupBufferError(f"group {group.group_id!r} came back, but is not being sampled")
        self._completed += 1
        entry.group, entry.oldest, entry.rank = group, oldest_version(group), self._completed

    def expire(self, version: int) -> None:
        """Send back, or drop, what is too old to be learnt from at policy version `version`."""
        oldest = version - self._rule.max_staleness
        for entry in list(self._entries.values()):
            if entry.group is None or entry.oldest is None or entry.oldest >= oldest:
                continue
            if self._rule.too_old == "drop":
                del self._entries[entry.position]
                self._counts["dropped"] += 1
            else:
                entry.group = entry.group_id = None
                self._counts["resampled"] += 1

    def missing(self) -> int:
        """How many more groups must complete, at least, before the step due can be taken."""
        turn = self._turn()
        return self._groups - sum(entry.group is not None for entry in turn)

    def take(self, version: int) -> list[Group]:
        """The groups of the step due, in the order of their problems; each is given once.

        `version` is that of the learner. Raises GroupBufferError where a group is missing, or too
        old.
        """
        self.expire(version)
        if missing := self.missing():
            raise GroupBufferError(f"the step is short of {missing} of {self._groups} groups")
        turn = sorted(self._turn(), key=lambda entry: entry.position)
        for entry in turn:
            del self._entries[entry.position]
        self._used += len(turn)
        return [entry.group for entry in turn if entry.group is not None]

    def step_over(self) -> None:
        """Note that the samplers hold the step's weights: what `admit` allows moves on a step."""
        self._steps_done += 1

    def _turn(self) -> list[_Entry]:
        """The entries whose turn it is; in the order of problems some may not be complete."""
        entries = self._entries.values()
        if self._rule.order == "problem":
            chosen = sorted(entries, key=lambda entry: entry.position)
        else:
            complete = [entry for entry in entries if entry.group is not None]
            chosen = sorted(complete, key=lambda entry: (entry.oldest or 0, entry.rank))
        return chosen[: self._groups]

    # --- telling ------------------------------------------------------------------------------

    def state(self) -> BufferState:
        """For the checkpoint."""
        return BufferState(self._drawn, tuple(sorted(self._entries)))

    def counts(self) -> dict[str, float]:
        """Groups `dropped`, `resampled` and `aborted` since the buffer was made."""
        return {name: float(count) for name, count in self._counts.items()}

    def waiting(self) -> int:
        """Groups that are complete and not yet used."""
        return sum(entry.group is not None for entry in self._entries.values())


def oldest_version(group: Group) -> int | None:
    """The policy version that sampled the oldest token of a group; None where it has no token."""
    versions = [int(r.versions.min()) for r in group.rollouts if len(r.versions)]
    return min(versions, default=None)
