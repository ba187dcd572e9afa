"""Which split a file holds and which side it is on, told by names: decided here alone."""

from __future__ import annotations

import re
from pathlib import PurePath

from tasks.core import DataError
from tasks.splits import Split

_HELD_OUT = re.compile(
    r"(?:^|_)(?:mini_?)?"
    r"(?:test|valid|eval|held_?out|hold_?out|(?:val|vals|valset|dev|devset|development)(?=_|\d|$))"
)
_TRAINING = re.compile(r"(?:^|_)train")
_SHARD = re.compile(
    r"(?:^\d+|^part[-_.]\d.*|[-_.](?:\d+[-_.]of[-_.]\d+|0\d\d+)(?:[-_.][0-9a-f]{6,})?)$", re.I
)
"""What numbers the files of a split: `-00000-of-00002-<hash>`, `_0001`, `0000`, `part-00000`."""


def side_of(split: str) -> Split:
    """The side of `tasks.splits` that a data set's split, by its name, belongs to.

    Held out is what has a word as `test`, `val`, `validation`, `dev`, `eval` or `holdout` in
    it, in any case (`testmini`, `val2017`, `testA`, `train_dev`). All else is for training.
    """
    return "test" if _HELD_OUT.search(_plain(split)) else "train"


def tells_side(split: str) -> bool:
    """Whether the name says so by itself; if not, a user is to hear how it was taken."""
    plain = _plain(split)
    return bool(_HELD_OUT.search(plain)) != bool(_TRAINING.search(plain))


def split_of_file(path: PurePath) -> str:
    """The split of a data file, from its path below, and with, the folder of the source.

    Its own name without a shard's number, if that or nothing else tells a side; else the
    nearest folder that does (`train/0000.parquet`, `test/images.jsonl`).

    Raises:
        DataError: folder and file tell different sides.
    """
    source, *folders = path.parts[:-1] or ("",)
    stem = _SHARD.sub("", path.stem)
    names = [name for name in (stem, *reversed(folders)) if name]
    telling = [name for name in names if tells_side(name)]
    if len({side_of(name) for name in telling}) > 1:
        raise DataError(
            f"{path}: is it held out? {' and '.join(map(repr, telling))} tell different sides; "
            "rename one of them, or import that folder by itself"
        )
    return next(filter(None, map(_plain, (*telling, *names, source))), "train")


def _plain(name: str) -> str:
    """`testA` -> `test_a`, `VAL-2017` -> `val_2017`."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name)
    return re.sub(r"\W+", "_", words).strip("_").lower()
