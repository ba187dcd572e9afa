"""A scalar reward model: a sequence classifier that reads a prompt and a response."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass

from rewards.settings import ARGUMENTS
from rollout.record import Group
from rollout.tokens import NOT_ITS_CODE, encode
from tasks.core import Task
from tasks.fetched import fetched, local
from tasks.fields import Amount, Count, Positive, Share
from tasks.files import expanded

_USER, _ASSISTANT = "\x01user\x01", "\x01assistant\x01"


@dataclass(config=ARGUMENTS, kw_only=True)
class RewardModel:
    """What a Hugging Face sequence classifier says of prompt and response (text, no images).

    A classifier of one label gives its logit, one of several the probability of `label`. The text
    is the tokenizer's chat template around both, or without one the two as a pair of sentences. A
    special token spelled out in them is read as plain characters.

    Args:
        model: folder, hub name or URI.
        label: index of the label that is paid, where the classifier has several.
        dtype: of the weights.
        batch_size: responses in one forward pass.
        max_tokens: a longer text fails; 0: as many as the model has positions.
        cpus, gpus: cores, and share of a GPU, that its actor reserves.
    """

    name = "reward_model"
    model: Annotated[str, Field(min_length=1), AfterValidator(expanded)]
    label: Count | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    batch_size: Positive = 8
    max_tokens: Count = 0
    cpus: Amount = 1.0
    gpus: Share = 0.0

    def __post_init__(self) -> None:
        file = Path(local(self.model)) / "config.json"
        self._classifier: Any = None
        self._alone = ThreadPoolExecutor(1)
        if not file.is_file():
            return  # a hub's name; the loaded model is looked at again
        config = json.loads(file.read_text(encoding="utf-8"))
        kinds = config.get("architectures") or ["no architecture"]
        if not kinds[0].endswith("ForSequenceClassification"):
            raise ValueError(f"model: {self.model} is a {kinds[0]}, no sequence classifier")
        labels = config.get("id2label")
        self._require_label(2 if labels is None else len(labels))

    async def __call__(self, task: Task, group: Group) -> list[float]:
        """float [G]: logits, or probabilities in [0, 1]. One group after the other."""
        texts = [rollout.prefix + rollout.text for rollout in group.rollouts]
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._alone, self.scores, group.problem.prompt, texts)

    def scores(self, prompt: str, responses: Sequence[str]) -> list[float]:
        """One number a response to a prompt; the weights are loaded at the first call."""
        import torch

        if self._classifier is None:
            self._load()
        ids = [self._ids(prompt, response) for response in responses]
        scores: list[float] = []
        for start in range(0, len(ids), self.batch_size):
            rows = ids[start : start + self.batch_size]
            longest = max(map(len, rows))
            shape = (len(rows), longest)
            tokens = torch.full(shape, self._padding, dtype=torch.long)
            mask = torch.zeros(shape, dtype=torch.long)
            for row, row_ids in enumerate(rows):
                tokens[row, : len(row_ids)] = torch.tensor(row_ids)
                mask[row, : len(row_ids)] = 1
            device = self._classifier.device
            with torch.no_grad():
                logits = self._classifier(
                    input_ids=tokens.to(device), attention_mask=mask.to(device)
                ).logits.float()
            chosen = logits[:, 0] if self.label is None else logits.softmax(-1)[:, self.label]
            scores += chosen.tolist()
        return scores

    def _load(self) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        torch.set_num_threads(max(1, int(self.cpus)))
        self._tokenizer = AutoTokenizer.from_pretrained(fetched(self.model), **NOT_ITS_CODE)
        classifier = AutoModelForSequenceClassification.from_pretrained(
            fetched(self.model), **NOT_ITS_CODE, dtype=getattr(torch, self.dtype)
        )
        config = classifier.config
        self._require_label(config.num_labels)
        text = config.get_text_config()
        self._limit = self.max_tokens or getattr(text, "max_position_embeddings", 2**31)
        # Where it reads the last token's state it tells padding by its id.
        padding = text.pad_token_id
        if padding is None:
            padding = self._tokenizer.pad_token_id or 0
            text.pad_token_id = padding
        self._padding = padding
        if self.gpus and not torch.cuda.is_available():
            raise ValueError(f"gpus: {self.gpus:g}, and torch {torch.__version__} sees no GPU")
        device = "cuda" if self.gpus else "cpu"
        self._classifier = classifier.eval().requires_grad_(False).to(device)

    def _require_label(self, count: int) -> None:
        if count > 1 and self.label is None:
            raise ValueError(f"label: {self.model} has {count} labels; say which is paid")
        if self.label is not None and self.label >= count:
            raise ValueError(f"label: {self.label}: {self.model} has {count}, counted from 0")

    def _ids(self, prompt: str, response: str) -> list[int]:
        """Raises ValueError for a text that is too long."""
        tokenizer = self._tokenizer
        if tokenizer.chat_template:
            messages = [
                {"role": "user", "content": _USER},
                {"role": "assistant", "content": _ASSISTANT},
            ]
            rendered = tokenizer.apply_chat_template(messages, tokenize=False)
            head, _, rest = rendered.partition(_USER)
            middle, _, tail = rest.partition(_ASSISTANT)
            ids = [
                *encode(tokenizer, head),
                *encode(tokenizer, prompt, literal=True),
                *encode(tokenizer, middle),
                *encode(tokenizer, response, literal=True),
                *encode(tokenizer, tail),
            ]
        else:
            ids = tokenizer(prompt, response, split_special_tokens=True)["input_ids"]
        if len(ids) > self._limit:
            raise ValueError(f"prompt and response are {len(ids):,} tokens, above {self._limit:,}")
        return ids
