"""What is kept of language: the numbers are those of the log-probs, and hang on nothing else."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from learner.policy import load_policy
from rewards.language import OwnText
from rollout.tokens import Chat
from tests.support.live_engine import gaps

SMALL = OwnText(
    ("One two three.", "Four."), (("Which?", ("this", "that", "those")), ("Who?", ("I", "you")))
)


def test_its_own_file_is_fit_to_measure_with() -> None:
    own = OwnText.read()
    assert len(own.passages) == 10 and len(own.questions) == 40
    assert all("\n" not in passage and "<" not in passage for passage in own.passages)
    assert len({question for question, _ in own.questions}) == len(own.questions)
    assert all(len(set(answers)) == 4 for _, answers in own.questions)


def test_loss_is_a_mean_of_each_passage_and_an_answer_counts_as_a_whole() -> None:
    requests = SMALL.requests(lambda text: [ord(letter) for letter in text])
    assert len(requests) == 2 + 3 + 2
    assert len({request.request_id for request in requests}) == 7
    assert {request.images for request in requests} == {()}
    assert "Which?" in requests[3].problem.prompt
    replies = [np.array(row, np.float32) for row in (
        [-1.0, -2.0, -6.0], [-0.5],
        # The second answer's tokens are likelier each; the first is as a whole.
        [-1.0], [-0.7, -0.7], [-3.0],
        [-0.2, -0.2], [-0.3],
    )]  # fmt: skip
    found = SMALL.values(replies)
    assert found["text_loss"] == pytest.approx({"passage 1": 3.0, "passage 2": 0.5})
    assert found["text_right"] == {"Which?": 1.0, "Who?": 0.0}


def test_an_answer_as_likely_as_another_is_not_right() -> None:
    replies = [np.zeros(1, np.float32)] * 7
    assert set(SMALL.values(replies)["text_right"].values()) == {0.0}


def test_a_policys_numbers_are_those_of_its_own_forward_pass(tiny_models: dict[str, Path]) -> None:
    """By transformers alone, on prompts that the template writes."""
    policy, processor = load_policy(str(tiny_models["idefics3"]))
    chat, model = Chat(processor), policy.eval().model
    replies = []
    for request in SMALL.requests(chat.text):
        prompt = chat.prompt([request.problem.prompt])
        ids = torch.tensor([[*prompt, *request.response_ids.tolist()]])
        with torch.no_grad():
            logprobs = model(input_ids=ids).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
        replies.append(logprobs.gather(-1, ids[0, len(prompt) :, None]).squeeze(-1).numpy())
    inputs: list[Any] = [
        (np.asarray(chat.prompt([r.problem.prompt]), np.int32), r.response_ids, ())
        for r in SMALL.requests(chat.text)
    ]
    assert max(gap.max() for gap in gaps(policy, processor, inputs, replies)) < 1e-4
    loss = SMALL.values(replies)["text_loss"]
    # Random weights: about as sure as a die with as many sides as there are tokens.
    assert all(abs(value - math.log(len(processor.tokenizer))) < 1 for value in loss.values())
