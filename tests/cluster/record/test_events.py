"""What befell a run: each event is kept whole, in order, whatever its text is."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cluster.record.events as events
from cluster.recipe.recipe import UserError
from cluster.record.events import ENDINGS, Event, add_events, read_events, seconds_down

TEXT = st.text(st.characters(), max_size=20)


@settings(max_examples=30)
@given(
    told=st.lists(
        st.builds(Event, TEXT, TEXT, TEXT, TEXT, st.none() | st.floats(0, 1e6), st.floats(1, 1e9)),
        max_size=5,
    ),
    cut=st.integers(0, 5),
)
def test_events_come_back_in_order_however_they_are_written(
    told: list[Event], cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = tmp_path_factory.mktemp("run")
    add_events(run, *told[:cut])
    for event in told[cut:]:
        add_events(run, event)
    found = read_events(run)
    assert [one._replace(who="", what="", why="", lost="") for one in found] == [
        one._replace(who="", what="", why="", lost="") for one in told
    ]
    for one, other in zip(found, told, strict=True):
        for stored, text in zip(one[:4], other[:4], strict=True):
            assert stored == text.encode("utf-8", "backslashreplace").decode()
    assert not list(run.glob(".*.tmp"))


def test_a_crash_while_one_is_written_leaves_those_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_events(tmp_path, Event("driver", "began", wall_seconds=1.0))
    before = read_events(tmp_path)

    def torn(table: object, path: Path) -> None:
        path.write_bytes(b"PAR1 half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(events.pq, "write_table", torn)
        add_events(tmp_path, Event("driver", "ended"))
    assert read_events(tmp_path) == before


@pytest.mark.parametrize("content", [b"", b"PAR1 half", b"who,what\n"])
def test_a_damaged_file_is_one_line_and_stays(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "events.parquet"
    file.write_bytes(content)
    for use in (read_events, lambda run: add_events(run, Event("driver", "ended"))):
        with pytest.raises(UserError, match=r"events\.parquet: holds no events.*move it away"):
            use(tmp_path)
    assert file.read_bytes() == content


@settings(max_examples=30)
@given(what=st.sampled_from([*ENDINGS, "began", "lost"]), restart=st.booleans())
def test_down_is_since_the_last_driver_ended(
    what: str, restart: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = tmp_path_factory.mktemp("run")
    assert seconds_down(run, 9.0) is None
    add_events(run, Event("driver", what, wall_seconds=5.0))
    if restart:
        add_events(run, Event("supervisor", "restart", wall_seconds=6.0))
        add_events(run, Event("driver", "stalled", wall_seconds=7.0))
    assert seconds_down(run, 9.0) == (4.0 if what in ENDINGS else None)
