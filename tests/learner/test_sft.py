"""Demonstrations: the right tokens in the right segments, the same stream for any workers."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import islice, pairwise
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from learner.batch import TrainSequence
from learner.settings import SftConfig
from learner.sft import DemonstrationStream, Demonstrator, Source, draw
from rollout.decoding import Decoder, encode
from rollout.tokens import Chat
from tasks.core import NO_SEGMENT, READ, SEGMENTS, DataError, Style
from tasks.datasets import Example
from tasks.images import check_image
from tasks.load import load_task
from tests.support.samples import SPEC, TASK, Loaded, problem

GRAPHS = load_task("graph_coloring")


@pytest.mark.parametrize("style", ["terse", "verbose"])
@pytest.mark.parametrize("task", [TASK, GRAPHS], ids=lambda task: task.name)
def test_the_tokens_of_a_segment_say_what_the_parser_found_there(
    loaded: Loaded, task: Any, style: Style
) -> None:
    _, processor = loaded
    decoder, demonstrator = Decoder(processor.tokenizer), Demonstrator(processor)
    for seed in range(8):
        drawn = task.generate(np.random.default_rng(seed), SPEC if task is TASK else task.spec())
        response = task.demonstrate(drawn, style)
        spans = task.parse(response).spans
        s = demonstrator.sequence(task, drawn, response)
        assert decoder.decode(s.response_ids[:-1])[0] == response
        assert s.response_ids[-1] == processor.tokenizer.eos_token_id
        assert s.segments[-1] == NO_SEGMENT
        for index, segment in enumerate(READ):
            text, _ = decoder.decode(s.response_ids[s.segments == index])
            start, end = spans[segment]
            assert text.strip() == response[start:end].strip()
            assert text
        between, _ = decoder.decode(s.response_ids[:-1][s.segments[:-1] == NO_SEGMENT])
        assert not between.strip()


SQUARE, WIDE, TALL = (64, 64), (96, 64), (40, 72)


@pytest.mark.parametrize(
    ("prompt", "sizes", "said"),
    [
        ("Solve it.", [SQUARE], [0, "Solve it."]),
        ("Solve it.", [WIDE], [0, "Solve it."]),
        ("Solve it.", [], ["Solve it."]),
        ("Solve both.", [TALL, SQUARE], [0, 1, "Solve both."]),
        ("<image>\nIs it <image> ?", [WIDE, TALL], [0, "\nIs it ", 1, " ?"]),
        ("A:<image_2>,<image_3> <image_1>", [SQUARE, WIDE, TALL], ["A:", 1, ",", 2, " ", 0]),
        ("<image><image>", [TALL, SQUARE], [0, 1]),
    ],
)
def test_the_prompt_is_the_processors_own(
    loaded: Loaded, prompt: str, sizes: list[tuple[int, int]], said: list[str | int]
) -> None:
    _, processor = loaded
    drawn = replace(problem(1, *sizes), prompt=prompt)
    if not sizes:
        drawn = replace(drawn, images=())
    shown = [drawn.images[part] for part in said if isinstance(part, int)]
    content = [
        {"type": "image"} if isinstance(part, int) else {"type": "text", "text": part}
        for part in said
    ]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    pictures = {"images": [[check_image(image, "test") for image in shown]]} if shown else {}
    (expected,) = processor(text=[text], **pictures)["input_ids"]
    found = Demonstrator(processor).sequence(TASK, drawn, TASK.demonstrate(drawn, "terse"))
    assert found.prompt_ids.tolist() == list(expected)
    assert found.images == tuple(shown)


@pytest.mark.parametrize("task", [TASK, GRAPHS], ids=lambda task: task.name)
def test_a_blind_demonstration_starts_where_a_blind_request_does(loaded: Loaded, task: Any) -> None:
    _, processor = loaded
    drawn = task.generate(np.random.default_rng(3), SPEC if task is TASK else task.spec())
    response = task.demonstrate(drawn, "terse")
    blind = Demonstrator(processor).sequence(task, drawn, response, blind=True)
    bare = Chat(processor).prompt([drawn.prompt])
    forced = encode(processor.tokenizer, task.oracle_prefix(drawn))
    assert blind.images == ()
    assert blind.prompt_ids.tolist() == [*bare, *forced]
    text, _ = Decoder(processor.tokenizer).decode(blind.response_ids[:-1])
    assert task.oracle_prefix(drawn) + text == response
    assert SEGMENTS.index("perception") not in blind.segments
    whole = Demonstrator(processor).sequence(task, drawn, response)
    assert blind.segments.tolist() == whole.segments[-len(blind.segments) :].tolist()


@pytest.mark.parametrize("task", [TASK, GRAPHS], ids=lambda task: task.name)
def test_a_demonstration_of_the_perception_alone_breaks_off_behind_it(
    loaded: Loaded, task: Any
) -> None:
    _, processor = loaded
    drawn = task.generate(np.random.default_rng(3), SPEC if task is TASK else task.spec())
    response = task.demonstrate(drawn, "terse")
    whole = Demonstrator(processor).sequence(task, drawn, response)
    part = Demonstrator(processor, part="perception").sequence(task, drawn, response)
    end = len(part.response_ids)
    assert content(part) == content(
        replace(whole, response_ids=whole.response_ids[:end], segments=whole.segments[:end])
    )
    text, _ = Decoder(processor.tokenizer).decode(part.response_ids)
    assert text.strip() == task.oracle_prefix(drawn).strip()
    assert SEGMENTS.index("perception") not in whole.segments[end:]
    with pytest.raises(DataError, match=r"has no perception \(sft\.part\)"):
        Demonstrator(processor, untagged=True, part="perception").sequence(
            load_task("vqa"), replace(drawn, task="vqa"), "It is a cat."
        )


def test_a_defective_demonstration_is_refused(loaded: Loaded) -> None:
    drawn = problem(0)
    response = TASK.demonstrate(drawn, "terse").replace("</answer>", "")
    with pytest.raises(DataError, match=f"problem {drawn.id}: has defect"):
        Demonstrator(loaded[1]).sequence(TASK, drawn, response)
    with pytest.raises(DataError, match=f"image of problem {drawn.id}"):
        Demonstrator(loaded[1]).sequence(
            TASK, replace(drawn, images=(b"",)), TASK.demonstrate(drawn, "terse")
        )


def sources() -> list[Source]:
    graphs = GRAPHS.spec(vertices=4, prompt="brief")
    return [Source(TASK, 3.0, "terse", SPEC), Source(GRAPHS, 1.0, "verbose", graphs)]


def first_batches(processor: Any, count: int, workers: int, **how: int) -> list[list[bytes]]:
    """What the first batches hold, as bytes."""
    stream = DemonstrationStream(sources(), partial(Demonstrator, processor), 3, seed=5, **how)
    loader = DataLoader(stream, batch_size=None, num_workers=workers)
    return [[content(s) for s in batch] for batch in islice(loader, count)]


def content(s: TrainSequence) -> bytes:
    ids = [s.prompt_ids.tobytes(), s.response_ids.tobytes(), s.segments.tobytes()]
    return b"".join([*ids, *s.images])


def test_the_stream_is_the_same_for_any_number_of_workers(loaded: Loaded) -> None:
    _, processor = loaded
    plain = first_batches(processor, 5, workers=0)
    assert len({s for batch in plain for s in batch}) == 15
    assert first_batches(processor, 5, workers=0) == plain
    assert first_batches(processor, 5, workers=2) == plain
    assert first_batches(processor, 3, workers=1, start=2) == plain[2:]


def test_draws_follow_the_weights_and_take_stored_rows_where_there_are_some() -> None:
    drawn = [draw(sources(), 1, i) for i in range(60)]
    share = sum(source.task is TASK for source, _ in drawn) / len(drawn)
    assert 0.55 < share < 0.95
    assert len({example.problem.symmetry_key for _, example in drawn}) > 30
    row = Example(problem(3), "stored")
    source = Source(TASK, 1.0, "terse", rows=(row,))
    assert draw([source], 0, 9) == (source, row)


@given(
    steps=st.integers(1, 500),
    warmup=st.integers(0, 100),
    schedule=st.sampled_from(["constant", "linear", "cosine"]),
)
def test_the_learning_rate_rises_to_its_peak_and_never_again(
    steps: int, warmup: int, schedule: Literal["constant", "linear", "cosine"]
) -> None:
    sft = SftConfig(steps=steps, learning_rate=2.0, warmup_steps=warmup, schedule=schedule)
    rates = [sft.rate_at(update) for update in range(1, steps + 1)]
    assert all(0 < rate <= 2.0 for rate in rates)
    rise, fall = rates[:warmup], rates[warmup:]
    assert rise == pytest.approx([2.0 * (i + 1) / warmup for i in range(len(rise))])
    assert all(a >= b - 1e-12 for a, b in pairwise(fall))
    if fall:
        assert fall[0] == pytest.approx(2.0)
    if len(fall) > 1:
        assert fall[-1] == pytest.approx(2.0 if schedule == "constant" else 0.2)


def test_a_response_without_tags_is_learnt_whole_where_that_is_asked_for(loaded: Loaded) -> None:
    _, processor = loaded
    task, drawn = load_task("vqa"), replace(problem(0), task="vqa")
    tagged = "<perception>a cat</perception><reasoning>so</reasoning><answer>cat</answer>"
    whole = Demonstrator(processor, untagged=True)
    with pytest.raises(DataError, match="defect"):
        Demonstrator(processor).sequence(task, drawn, "It is a cat.")
    learnt = whole.sequence(task, drawn, "It is a cat.")
    assert set(learnt.segments.tolist()) == {NO_SEGMENT} and len(learnt.response_ids) > 3
    assert set(whole.sequence(task, drawn, tagged).segments.tolist()) == {0, 1, 2, NO_SEGMENT}
    with pytest.raises(DataError, match="defect"):  # tags that are there must be whole
        whole.sequence(task, drawn, tagged.removesuffix("</answer>"))
