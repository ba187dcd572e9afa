"""Families: positions, parts and image features are the model's own; strangers are refused."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
import transformers

from cluster.models_cli import make
from learner.batch import MicroBatch, TrainSequence
from learner.collate import Collator
from learner.families import FAMILIES, TINY, family_of
from learner.families.base import PARTS, Family, MRopeFamily
from learner.loss_settings import LossConfig
from learner.policy import Policy
from learner.policy_loss import PolicyLoss
from learner.tiny import FAMILIES as FAMILY_NAMES
from rollout.tokens import Chat, ModelError, load_processor
from tests.support.plain import learn, plain_logprobs, summed
from tests.support.samples import Loaded, mixed_batch, placeholder, sequence

LOSS = PolicyLoss(LossConfig(kl_weight=0.1, kl_estimator="k2"))


def alone(policy: Policy, processor: Any, s: TrainSequence) -> tuple[torch.Tensor, dict[str, Any]]:
    """(input ids [1, L], the image tensors that place tokens) of one sequence, unpadded."""
    inputs = Collator(policy, processor)([s]).inputs
    skip = ("input_ids", "mm_token_type_ids")
    return inputs["input_ids"], {n: v for n, v in inputs.items() if n not in skip}


def by_hand(ids: list[int], image_token: int, grids: list[list[int]], merge: int) -> np.ndarray:
    """int [3, L] M-RoPE positions of one sequence: the definition, a token at a time."""
    found, start, seen, grids = [], 0, 0, [*grids]
    for token in ids:
        if token != image_token or not grids:
            found.append((start, start, start))
            start += 1
            continue
        _, height, width = (grids[0][0], grids[0][1] // merge, grids[0][2] // merge)
        found.append((start, start + seen // width, start + seen % width))
        seen += 1
        if seen == height * width:
            start, seen, grids = start + max(height, width), 0, grids[1:]
    return np.array(found).T


def test_positions_are_those_the_model_would_count_itself(loaded: Loaded) -> None:
    policy, processor = loaded
    model: Any = policy.eval().model
    collate = Collator(policy, processor)
    for s in mixed_batch(processor).sequences:
        ids, images = alone(policy, processor, s)
        planes = policy.family.positions(model, ids, images)
        assert planes.shape == (policy.family.planes, ids.shape[1])
        assert planes.dtype == torch.int64
        micro = collate([s])
        inputs = dict(micro.inputs)
        if s.images:
            features = policy.family.image_features(model, micro.vision.inputs)
            inputs["mm_encoder_outputs"] = {"image": features}

        def hidden(inputs: dict[str, Any] = inputs, **more: Any) -> torch.Tensor:
            with torch.no_grad():
                found: torch.Tensor = model.model(**inputs, **more).last_hidden_state
            return found

        own = hidden()
        given = hidden(position_ids=policy.family.position_ids(planes[:, None]))
        torch.testing.assert_close(given, own, rtol=0, atol=1e-6)
        # The comparison can fail: a token of the response at another place is another token.
        moved = planes.clone()
        moved[:, -5:] += 3
        other = hidden(position_ids=policy.family.position_ids(moved[:, None]))
        assert (other - own).abs().max() > 1e-3


def test_m_rope_is_the_definition_a_token_at_a_time(loaded: Loaded) -> None:
    policy, processor = loaded
    model: Any = policy.model
    for s in mixed_batch(processor).sequences:
        ids, images = alone(policy, processor, s)
        found = policy.family.positions(model, ids, images).numpy()
        if policy.family.planes == 1:
            assert found.tolist() == [list(range(ids.shape[1]))]
            continue
        grids = images["image_grid_thw"].tolist() if images else []
        merge = model.config.vision_config.spatial_merge_size
        expected = by_hand(ids[0].tolist(), placeholder(processor), grids, merge)
        assert found.tolist() == expected.tolist()


def test_every_parameter_is_of_one_part_and_the_tower_is_what_features_hang_on(
    loaded: Loaded,
) -> None:
    policy, processor = loaded
    model: Any = policy.model
    family = policy.family
    names = dict(model.named_parameters())
    parts = {part: [n for n in names if family.part_of(n) == part] for part in PARTS}
    assert sorted(n for of in parts.values() for n in of) == sorted(names)
    # The head is tied to the embedding, which is the language model's.
    assert [part for part, of in parts.items() if not of] == ["head"]
    assert family.part_of("lm_head.weight") == "head"
    micro = Collator(policy, processor)(mixed_batch(processor).sequences[:1])
    policy.zero_grad()
    family.total(family.image_features(model, micro.vision.inputs)).backward()
    reached = [n for n, p in names.items() if p.grad is not None]
    policy.zero_grad()
    assert set(reached) <= {*parts["vision"], *parts["merger"]}
    assert set(parts["merger"]) <= set(reached)
    assert len(reached) > 20
    with pytest.raises(ModelError, match=r"parameter model\.audio\.weight: belongs to no known"):
        family.part_of("model.audio.weight")


def test_a_checkpoints_family_is_found_by_its_model_type(family: str, loaded: Loaded) -> None:
    assert loaded[0].family is FAMILIES[family] is TINY[family]
    assert loaded[0].model.config.model_type == family  # type: ignore[union-attr]


def test_the_command_offers_every_family_that_can_be_made() -> None:
    offered = get_type_hints(make, include_extras=True)["family"]
    assert get_args(get_args(offered)[0]) == FAMILY_NAMES == tuple(TINY)


def test_any_split_gives_the_loss_and_the_gradients_of_plain_forward_passes(loaded: Loaded) -> None:
    """Against the model called with pixels, a sequence at a time: images shared by none."""
    policy, processor = loaded
    policy.eval()
    batch, collate = mixed_batch(processor), Collator(policy, processor)

    def plain(micro: MicroBatch) -> torch.Tensor:
        (s,) = (s for s in batch.sequences if s.response_ids.tolist() == micro.tokens.ids.tolist())
        logprobs, entropies = plain_logprobs(policy, processor, s)
        return summed(LOSS, batch, micro, (logprobs.float(), entropies.float()))

    def cut(split: list[list[int]]) -> tuple[float, torch.Tensor]:
        micros = (collate([batch.sequences[i] for i in indices]) for indices in split)
        value, by_name = learn(policy, micros, lambda m: summed(LOSS, batch, m, policy.run(m)))
        return value, flat(by_name)

    expected, by_name = learn(policy, (collate([s]) for s in batch.sequences), plain)
    reference = flat(by_name)
    for split in ([[0, 1, 2, 3, 4]], [[4, 2], [3], [0, 1]], [[0], [1], [2], [3], [4]]):
        loss, found = cut(split)
        assert loss == pytest.approx(expected, rel=1e-5, abs=1e-7)
        assert (found - reference).norm() < 1e-5 * reference.norm()
    _, partial = cut([[0, 1, 2, 3]])
    assert (partial - reference).norm() > 1e-2 * reference.norm()


def flat(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([g.flatten() for g in gradients.values()])


def test_what_is_saved_is_what_transformers_loads(loaded: Loaded, tmp_path: Path) -> None:
    policy, processor = loaded
    policy.model.save_pretrained(tmp_path)  # type: ignore[operator]
    processor.save_pretrained(tmp_path)
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(model) is type(policy.model)
    again = dict(model.named_parameters())
    for name, parameter in policy.model.named_parameters():
        assert torch.equal(again[name], parameter), name
    read = load_processor(str(tmp_path))
    for shown in (True, False):
        ids = Chat(processor).prompt([*[None] * shown, "What is it?"])
        assert Chat(read).prompt([*[None] * shown, "What is it?"]) == ids
        text = read.tokenizer.decode(ids)
        assert ("What is it?" in text) and text.endswith("assistant\n")
    (image,) = sequence(processor, 1, (96, 64), 3).images
    (first,) = Collator(policy, processor).encode_images([image])
    (second,) = Collator(policy, read).encode_images([image])
    assert first.placeholders == second.placeholders
    assert all(torch.equal(first.inputs[name], second.inputs[name]) for name in first.inputs)


@pytest.mark.parametrize("family", ["idefics3"], indirect=True)
def test_images_of_other_numbers_of_tiles_share_a_micro_batch(
    loaded: Loaded, model_path: str
) -> None:
    policy, processor = loaded[0].eval(), load_processor(model_path)
    processor.image_processor.size = {"longest_edge": 128}
    square, wide, tall = (
        sequence(processor, i, size, 12) for i, size in enumerate([(64, 64), (96, 40), (30, 90)])
    )
    blind = mixed_batch(processor).sequences[2]
    chosen = [wide, square, blind, tall, wide]
    collate = Collator(policy, processor)
    tiles = [image.inputs["pixel_values"] for image in collate.encode_images(images_of(chosen))]
    assert [len(t) for t in tiles] == [3, 5, 3, 3]
    assert len(collate(chosen).vision.inputs["pixel_values"]) == 11
    with torch.no_grad():
        found, _ = policy.run(collate(chosen))
        expected = torch.cat([plain_logprobs(policy, processor, s)[0] for s in chosen])
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)


def images_of(sequences: list[TrainSequence]) -> list[bytes]:
    return [image for s in sequences for image in s.images]


TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def stranger(name: str, config: Any) -> Any:
    """A tiny model of a class that has no file of its own, or only its name."""
    text = TEXT | {"vocab_size": config.text_config.vocab_size}
    tokens = {"image_token_id": config.image_token_id}
    torch.manual_seed(0)
    if name == "llava":
        return transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig(
                vision_config=transformers.CLIPVisionConfig(
                    **{k: v for k, v in TEXT.items() if k != "num_key_value_heads"},
                    image_size=64,
                    patch_size=16,
                ),
                text_config=transformers.LlamaConfig(**text),
                image_seq_length=16,
                **tokens,
            )
        )
    if name == "qwen2_vl":
        return transformers.Qwen2VLForConditionalGeneration(
            transformers.Qwen2VLConfig(
                text_config=text
                | {"rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6]}},
                vision_config={
                    "depth": 2,
                    "embed_dim": 64,
                    "num_heads": 2,
                    "hidden_size": 64,
                    "patch_size": 8,
                },
                video_token_id=config.video_token_id,
                vision_start_token_id=config.vision_start_token_id,
                vision_end_token_id=config.vision_end_token_id,
                **tokens,
            )
        )
    return transformers.SmolVLMForConditionalGeneration(
        transformers.SmolVLMConfig(
            text_config=text | {"model_type": "llama"},
            vision_config=config.vision_config.to_dict() | {"model_type": "smolvlm_vision"},
            pad_token_id=0,
            scale_factor=2,
            **tokens,
        )
    )


@pytest.mark.parametrize(
    "family,name,expected",
    [("internvl", "llava", Family), ("qwen2_5_vl", "qwen2_vl", MRopeFamily)],
    indirect=["family"],
)
def test_a_model_without_a_file_works_by_the_defaults(
    loaded: Loaded, name: str, expected: type
) -> None:
    """With the processor of a family whose images it reads."""
    processor = loaded[1]
    policy = Policy(stranger(name, loaded[0].model.config)).eval()
    assert type(policy.family) is expected
    assert name not in FAMILIES
    check_stranger(policy, processor)


@pytest.mark.parametrize("family", ["idefics3"], indirect=True)
def test_smolvlm2_is_read_as_idefics3_is(loaded: Loaded) -> None:
    policy = Policy(stranger("smolvlm", loaded[0].model.config)).eval()
    assert policy.family is FAMILIES["smolvlm"]
    check_stranger(policy, loaded[1])


def check_stranger(policy: Policy, processor: Any) -> None:
    """Log-probs are those of plain forward passes; every parameter has a part."""
    batch = mixed_batch(processor)
    with torch.no_grad():
        found, _ = policy.run(Collator(policy, processor)(batch.sequences))
        plain = torch.cat([plain_logprobs(policy, processor, s)[0] for s in batch.sequences])
    torch.testing.assert_close(found.double(), plain, rtol=0, atol=2e-5)
    parts = {policy.family.part_of(name) for name, _ in policy.model.named_parameters()}
    assert {"vision", "merger", "language"} <= parts


def test_a_model_that_cannot_be_trained_is_refused_by_what_it_lacks() -> None:
    with torch.device("meta"):
        blip = transformers.BlipForConditionalGeneration(transformers.BlipConfig())
        gemma = transformers.Gemma3ForConditionalGeneration(
            transformers.Gemma3Config(
                text_config=TEXT | {"vocab_size": 640, "head_dim": 32},
                vision_config=TEXT | {"image_size": 64, "patch_size": 16},
            )
        )
    with pytest.raises(ModelError, match=r"'blip'.*get_image_features; .*lm_head.*known to work"):
        family_of(blip)
    with pytest.raises(ModelError, match=r"'gemma3'.*lacks causal attention within an image"):
        family_of(gemma)


def test_features_that_are_counted_otherwise_are_refused() -> None:
    rows = torch.tensor([0, 1, 2])
    flat = SimpleNamespace(pooler_output=torch.zeros(48, 8))
    with pytest.raises(ModelError, match="48 for 3 rows of pixel_values"):
        Family().lay_out(flat, [0, 1], rows)
    with pytest.raises(ModelError, match="1 for 2 images"):
        Family().lay_out(SimpleNamespace(pooler_output=[torch.zeros(4, 8)]), [0, 1], rows)


@pytest.mark.skipif(find_spec("num2words") is not None, reason="the package is there")
def test_a_processor_whose_package_is_missing_is_refused_by_name(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    for file in tiny_models["idefics3"].iterdir():
        text = file.read_bytes().replace(b"Idefics3Processor", b"SmolVLMProcessor")
        (tmp_path / file.name).write_bytes(text)
    video = '{"video_processor_type": "SmolVLMVideoProcessor"}'
    (tmp_path / "video_preprocessor_config.json").write_text(video)
    with pytest.raises(ModelError, match=r"model\.path: .*no processor could be loaded.*num2words"):
        load_processor(str(tmp_path))
