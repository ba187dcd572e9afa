"""How a job is asked for: its words, its environment, its record; values stand in one place."""

from __future__ import annotations

import json
import shlex

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.jobs.request import (
    RECORD,
    Job,
    Request,
    latest,
    read_record,
    runtime_env,
)
from cluster.recipe.recipe import UserError
from cluster.recipe.sections import JobConfig, is_key

TEXT = st.text(max_size=20)
REQUESTS = st.builds(
    Request,
    name=st.from_regex(r"[a-z][a-z0-9.-]{0,9}", fullmatch=True),
    command=st.sampled_from(["train", "sft", "ablate"]),
    recipe=TEXT,
    place=TEXT,
    output=TEXT,
    settings=st.lists(TEXT, max_size=3).map(tuple),
    env=st.lists(TEXT, max_size=3).map(tuple),
    include=st.lists(TEXT, max_size=3).map(tuple),
    life=st.integers(1, 9),
    stop_seconds=st.integers(1, 9999),
)


@settings(max_examples=60)
@given(REQUESTS, st.lists(TEXT, max_size=2))
def test_a_shell_reads_the_words_that_were_meant_and_a_record_is_read_back(
    request: Request, changed: list[str]
) -> None:
    first = [request.place, "--output", request.output]
    again = ["--resume", request.output]
    goes_on = request.life > 1 and request.command != "ablate"
    said = changed if goes_on else request.settings
    wanted = ["py thon", "-m", "cluster", request.command, *(again if goes_on else first)]
    wanted += [word for setting in said for word in ("--set", setting)]
    assert shlex.split(request.words("py thon", changed)) == wanted
    assert read_record(request.record()) == request
    assert request.again().id != request.id and request.again().name == request.name


@settings(max_examples=60)
@given(
    st.dictionaries(
        st.from_regex(r"[A-Z]{3,8}", fullmatch=True).filter(lambda name: not is_key(name)),
        st.text("0123456789abcdef", min_size=16, max_size=16),
        min_size=1,
        max_size=6,
    ),
    st.data(),
)
def test_named_variables_go_along_and_no_other_and_no_value_stands_elsewhere(
    environ: dict[str, str], data: st.DataObject
) -> None:
    names = data.draw(st.lists(st.sampled_from(sorted(environ)), unique=True))
    job = JobConfig(runtime_env={"pip": ["x"], "env_vars": {"OWN": "a", "ABC": "b"}})
    made = runtime_env(job, names, environ)
    kept = {"RAY_JOB_STOP_WAIT_TIME_S": "600", "OWN": "a", "ABC": "b"}
    assert made == {
        "pip": ["x"],
        "env_vars": kept | {name: environ[name] for name in names},
    }
    assert job.runtime_env["env_vars"] == {"OWN": "a", "ABC": "b"}
    request = Request("n", "train", "r", "r", "/o", env=tuple(names))
    said = request.words("python") + json.dumps(request.record())
    assert not [value for value in environ.values() if value in said]


def test_names_of_keys_stay() -> None:
    for name in ("HF_TOKEN", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "db-password", "apikey"):
        assert is_key(name)
        with pytest.raises(UserError, match=r"--env .*: has the name of a key.*nodes"):
            runtime_env(JobConfig(), [name], {name: "v"})
    for name in ("TOKENIZERS_PARALLELISM", "KEYBOARD", "HF_HOME", "NCCL_DEBUG", "MONKEY"):
        assert not is_key(name)


def test_a_record_that_is_not_ours_is_none() -> None:
    ours = json.loads(Request("n", "train", "r", "r", "/o").record()[RECORD])
    for told in (None, [], "x", {}, ours | {"command": "rm"}, ours | {"life": "x"}):
        assert read_record({RECORD: json.dumps(told)}) is None
    for metadata in (None, {}, {RECORD: "{"}, {"job_submission_id": "x"}):
        assert read_record(metadata) is None
    assert read_record({RECORD: json.dumps(ours | {"more": 1}), "other": "x"}) is not None


def test_of_each_name_the_last_life_is_meant() -> None:
    def job(name: str, life: int, started: float) -> Job:
        request = Request(name, "train", "r", "r", "/o", life=life)
        return Job(request, "RUNNING", "", started, 0)

    found = latest([job("b", 2, 9), job("a", 1, 5), job("b", 1, 1), job("c", 1, 3)])
    assert [(j.request.name, j.request.life) for j in found] == [("c", 1), ("a", 1), ("b", 2)]
