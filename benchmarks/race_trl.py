"""TRL's side of the race: `GRPOTrainer` with HF generate, at the best settings found for it."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForImageTextToText, TrainerCallback
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from benchmarks.race_work import (
    GROUP,
    TASK,
    Fixed,
    Save,
    Step,
    Turn,
    Work,
    policy_beside,
    read,
    score,
)
from rollout.tokens import load_processor
from tasks.core import Problem
from tasks.load import load_task

MICRO_BATCH = 64
THREADS = 2


def trl(connection: Any, work: Work) -> None:
    """See `race_work.Side`."""
    torch.set_num_threads(THREADS)
    problems: list[Problem] = read(work.drawn)
    task = load_task(TASK)

    def reward(completions: Any, place: list[int], **_: Any) -> list[float]:
        texts = [said[0]["content"] for said in completions]
        return [
            score(task, problems[i], task.parse(text), text)
            for i, text in zip(place, texts, strict=True)
        ]

    batch = work.problems * GROUP
    micro = min(MICRO_BATCH, batch)
    trainer = TimedTrainer(
        model=work.model,
        processing_class=load_processor(work.model),
        reward_funcs=reward,
        train_dataset=Dataset.from_dict(
            {
                "prompt": [[{"role": "user", "content": p.prompt}] for p in problems],
                "image": [Image.open(io.BytesIO(p.images[0])).convert("RGB") for p in problems],
                "place": list(range(len(problems))),
            }
        ),
        args=GRPOConfig(
            output_dir=str(Path(work.folder) / "trl"),
            use_cpu=True,
            bf16=work.mixed,
            gradient_checkpointing=False,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=batch // micro,
            num_generations=GROUP,
            max_completion_length=work.max_tokens,
            temperature=1.0,
            shuffle_dataset=False,
            max_steps=sum(turn.steps for turn in work.turns),
            learning_rate=work.rate,
            seed=work.seed,
            lr_scheduler_type="constant",
            adam_beta2=0.999,
            max_grad_norm=1.0,
            beta=0.0,
            loss_type="dapo",
            epsilon=0.2,
            epsilon_high=0.28,
            mask_truncated_completions=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
    )
    trainer.add_callback(Turns(connection, trainer))
    trainer.train()


class TimedTrainer(GRPOTrainer):
    """TRL's own; tells how long it sampled (and scored), and how many tokens."""

    sampling, tokens = 0.0, 0

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        begin = time.perf_counter()
        outputs = super()._generate_and_score_completions(inputs)
        self.sampling = time.perf_counter() - begin
        self.tokens = int(outputs["completion_mask"].sum())
        return outputs


class Turns(TrainerCallback):
    """Lets the trainer go on only in its turns; a step lasts from the end of the one before."""

    def __init__(self, connection: Any, trainer: TimedTrainer) -> None:
        self._connection, self._trainer = connection, trainer
        self._steps_left, self._begin = 0, 0.0
        self._steps: list[Step] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._connection.send("ready")
        self._wait(control)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        seconds = time.perf_counter() - self._begin
        sampling = self._trainer.sampling
        self._steps.append(Step(seconds, sampling, seconds - sampling, self._trainer.tokens))
        if len(self._steps) == self._steps_left:
            self._connection.send(self._steps)
            self._wait(control)
        self._begin = time.perf_counter()

    def _wait(self, control: Any) -> None:
        while not isinstance(message := self._connection.recv(), Turn):
            if message is None:
                control.should_training_stop = True
                return
            if isinstance(message, Save):
                self._trainer.save_model(message.folder)
                self._connection.send("saved")
            else:
                self._connection.send(fixed(self._trainer, message))
        self._steps_left, self._steps = message.steps, []
        self._begin = time.perf_counter()


def fixed(trainer: GRPOTrainer, path: str) -> Fixed:
    """What TRL makes of a batch that our side wrote, with our weights for as long: its loss, and
    the norm of its gradient."""
    sequences = read(path)
    images = [[Image.open(io.BytesIO(data)).convert("RGB") for data in s.images] for s in sequences]
    pixels = trainer.processing_class.image_processor(
        [i for of in images for i in of], return_tensors="pt"
    )
    prompts = [torch.tensor(s.prompt_ids).long() for s in sequences]
    responses = [torch.tensor(s.response_ids).long() for s in sequences]
    pad = trainer.processing_class.tokenizer.pad_token_id
    image = trainer.model.config.image_token_id
    masks = [[torch.ones_like(ids) for ids in rows] for rows in (prompts, responses)]
    prompt_ids = pad_sequence(prompts, True, pad, "left")
    completion_ids = pad_sequence(responses, True, pad)
    is_image = torch.cat(
        [prompt_ids == image, torch.zeros_like(completion_ids, dtype=torch.bool)], 1
    )
    old = [torch.tensor(s.sampler_logprobs) for s in sequences]
    weights = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    theirs = AutoModelForImageTextToText.from_pretrained(policy_beside(path), dtype=torch.float32)
    trainer.model.load_state_dict(theirs.state_dict())
    loss = trainer._compute_loss(
        trainer.model,
        {
            "prompt_ids": prompt_ids,
            "prompt_mask": pad_sequence(masks[0], True, 0, "left"),
            "completion_ids": completion_ids,
            "completion_mask": pad_sequence(masks[1], True, 0),
            "advantages": torch.tensor([float(s.advantages[0]) for s in sequences]),
            "old_per_token_logps": pad_sequence(old, True),
            "pixel_values": pixels["pixel_values"],
            "image_grid_thw": pixels["image_grid_thw"],
            "num_images": [len(of) for of in images],
            "mm_token_type_ids": is_image.long(),
            "num_items_in_batch": torch.tensor(sum(len(ids) for ids in responses)),
        },
    )
    loss.backward()
    norm = torch.nn.utils.get_total_norm(
        [p.grad for p in trainer.model.parameters() if p.grad is not None]
    )
    trainer.model.zero_grad()
    trainer.model.load_state_dict(weights)
    return Fixed(float(loss), float(norm))
