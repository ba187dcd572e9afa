"""The samplers' processes: which are started, which sleep and which wake. Pure, as `Dispatch` is.

Where samplers and learner share GPUs they take turns (`cluster.run.turns`): in the learner's the
samplers are at rest, which means that no process of theirs holds a GPU's memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from rollout.jobs import Command, Seat


class Seats:
    """The samplers of a pool by name, and the commands to their processes.

    resting: it is the learner's turn. None is started, woken, sent weights or given work; each
    falls asleep when it is up and its last request is answered.
    """

    def __init__(self, names: Sequence[str], now: float) -> None:
        self._prefix = names[0].rpartition("-")[0] if names else "sampler"
        self._next_seat = 0
        self._commands: list[Command] = []
        self.seats: dict[str, Seat] = {}
        self.resting = False
        for name in names:
            self._open(name, now)

    def take(self) -> list[Command]:
        """The commands since the last call, in order."""
        commands, self._commands = self._commands, []
        return commands

    def rest(self, now: float) -> None:
        """The learner's turn begins, as soon as `at_rest`.

        One that starts is waited for, unless it had no place to start before.
        """
        self.resting = True
        for seat in self.seats.values():
            if seat.absent and seat.rest != "down":
                self._commands.append(Command("kill", seat.name, seat.life))
                self._start(seat, now)
            self._lay_down(seat, now)

    @property
    def at_rest(self) -> bool:
        """Whether every sampler sleeps, or has no process."""
        return self.resting and all(s.rest in ("asleep", "down") for s in self.seats.values())

    def slept(self, name: str, life: int, now: float) -> None:
        """A sampler has fallen asleep; what it remembered of images is gone."""
        if (seat := self._seat(name, life)) is not None:
            seat.rest, seat.heard, seat.busy = "asleep", now, None
            seat.images.clear()
            if not self.resting:
                self._rouse(seat, now)

    def wake(self, now: float) -> None:
        """The samplers' turn: those that sleep wake, and load the last version if it is another;
        those that were lost meanwhile are started."""
        self.resting = False
        for seat in self.seats.values():
            if seat.rest == "asleep":
                self._rouse(seat, now)
            elif seat.rest == "down":
                self._launch(seat, now)

    def _seat(self, name: str, life: int) -> Seat | None:
        """The sampler, unless that life of it is over."""
        seat = self.seats.get(name)
        return seat if seat is not None and seat.life == life else None

    def _open(self, name: str, now: float) -> None:
        self.seats[name] = Seat(name, 0, now)
        self._next_seat += 1
        self._launch(self.seats[name], now)

    def _start(self, seat: Seat, now: float) -> None:
        """Begin a sampler's next life."""
        seat.life += 1
        seat.up, seat.version, seat.busy = False, None, None
        seat.images.clear()
        self._launch(seat, now)

    def _launch(self, seat: Seat, now: float) -> None:
        seat.started = now
        seat.rest = "down" if self.resting else "awake"
        if not self.resting:
            self._commands.append(Command("start", seat.name, seat.life))

    def _close(self, seat: Seat, action: Literal["kill", "retire"]) -> None:
        del self.seats[seat.name]
        self._commands.append(Command(action, seat.name, seat.life))

    def _fetch(self, seat: Seat, now: float) -> None:
        seat.busy = now
        self._commands.append(Command("renew", seat.name, seat.life))

    def _lay_down(self, seat: Seat, now: float) -> None:
        """Have a sampler fall asleep, unless it has something to do first."""
        idle = seat.up and seat.busy is None and not seat.running and not seat.retiring
        if idle and seat.rest == "awake":
            seat.rest, seat.busy = "falling", now
            self._commands.append(Command("sleep", seat.name, seat.life))

    def _rouse(self, seat: Seat, now: float) -> None:
        seat.rest, seat.busy = "waking", now
        self._commands.append(Command("wake", seat.name, seat.life))
