"""A tower grafted onto a language model: what was there stays, what is new fits."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedTokenizerFast
from typer.testing import CliRunner

from cluster.cli import app
from learner.graft import graft
from learner.policy import load_policy
from rollout.tokens import Chat, ModelError, load_processor, load_reader
from tests.support.languages import TEMPLATE, TEXTS, lines, tiny_bpe
from tests.support.recipes import recipe_file

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "eos_token_id": 2,
    "bos_token_id": None, "pad_token_id": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}  # fmt: skip
# Of another number of rows than the tokenizer has, or of the same; with a head of its own, or not.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"vocab_size": 400, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {"vocab_size": 400, "tie_word_embeddings": False}),
    "qwen3": ("Qwen3", {"vocab_size": 448, "tie_word_embeddings": True, "head_dim": 16}),
}


def write_text_model(kind: str, folder: Path, template: str | None = TEMPLATE) -> Path:
    name, own = KINDS[kind]
    torch.manual_seed(1)
    config = getattr(transformers, f"{name}Config")(**SIZES, **own)
    getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny_bpe(), eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def grafted(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    """(folder of the language model, folder of what became of it, its sizes)."""
    folder = tmp_path_factory.mktemp(request.param)
    source = write_text_model(request.param, folder / "text")
    (source / "README.md").write_text("---\nlicense: mit\n---\n\nFrom a test.\n")
    return source, folder / "vlm", graft(str(source), "tiny", folder / "vlm", seed=0)


def test_every_weight_of_the_language_model_is_as_it_was(grafted: Any) -> None:
    source, out, sizes = grafted
    old = AutoModelForCausalLM.from_pretrained(source)
    new = dict(AutoModelForImageTextToText.from_pretrained(out).named_parameters())
    for name, weight in old.named_parameters():
        inner = name.removeprefix("model.")
        found = next(
            new[name]
            for name in (f"model.text_model.{inner}", f"model.language_model.{inner}", name)
            if name in new
        )
        rows = len(weight)
        assert torch.equal(found[:rows], weight), name
        added = found[rows:]
        assert len(added) == 0 or rows == old.config.vocab_size
        torch.testing.assert_close(added, weight.mean(0).expand_as(added), rtol=0, atol=1e-7)
    assert sizes["language"] + sizes["vision"] + sizes["merger"] == sizes["parameters"]
    assert ("lm_head.weight" in new) == (not old.config.tie_word_embeddings)


def test_it_reads_text_as_the_language_model_did(grafted: Any) -> None:
    source, out, sizes = grafted
    old, new = AutoModelForCausalLM.from_pretrained(source), load_policy(str(out))[0].model
    ids = torch.randint(3, 400, (2, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, after = old(ids).logits, new(input_ids=ids).logits
    words = before.shape[-1]
    assert torch.equal(after[..., :words], before)
    lost = before.log_softmax(-1) - after.log_softmax(-1)[..., :words]
    assert lost.min() > -1e-6 and lost.max() <= math.log(1 + sizes["new_tokens"] / words) + 1e-6


def test_what_it_is_shown_changes_what_it_says(grafted: Any) -> None:
    policy, processor = load_policy(str(grafted[1]))
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}],
        add_generation_prompt=True,
    )
    noise = np.random.default_rng(0).integers(256, size=(2, 90, 70, 3), dtype=np.uint8)
    shown = [
        processor(images=[Image.fromarray(pixels)], text=[text], return_tensors="pt")
        for pixels in noise
    ]
    assert (shown[0]["input_ids"] == processor.image_token_id).sum() == grafted[2]["image_tokens"]
    one, other = (policy.model(**inputs).logits[0, -1] for inputs in shown)
    assert one.isfinite().all() and not torch.equal(one, other)


def test_ten_thousand_lines_are_the_same_tokens_and_the_same_prompts(grafted: Any) -> None:
    source, out, _ = grafted
    old, new = load_reader(str(source)), load_processor(str(out))
    before, after = Chat(old), Chat(new)
    said = list(lines(10_000))
    found = [reader(said, add_special_tokens=False)["input_ids"] for reader in (old, new.tokenizer)]
    assert found[0] == found[1]
    for line, ids in zip(said, found[0], strict=True):
        assert after.decoder.decode(ids)[0] == line
    for line in said[::50]:
        assert after.prompt([line]) == before.prompt([line])
    assert (before.end, before.ends) == (after.end, after.ends)


def test_its_template_writes_lists_and_strings_alike(grafted: Any) -> None:
    old, new = load_reader(str(grafted[0])), load_processor(str(grafted[1]))
    roles = ["system", "user", "assistant"] * 2
    said = [{"role": r, "content": f" {t}\n"} for r, t in zip(roles, TEXTS, strict=True)]
    listed = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in said]
    wanted = old.apply_chat_template(said, tokenize=False)
    for messages in (said, listed, [*listed[:3], *said[3:]]):
        assert new.apply_chat_template(messages, tokenize=False) == wanted
    several = [{"type": "text", "text": "one "}, {"type": "image"}, {"type": "image"}]
    written = new.apply_chat_template([{"role": "user", "content": several}], tokenize=False)
    assert written.count(new.tokenizer.convert_ids_to_tokens(new.image_token_id)) == 2
    assert written.startswith("<|im_start|>user\none <")


def test_its_card_keeps_licence_and_source_and_says_what_is_new(grafted: Any) -> None:
    card = (grafted[1] / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n") and "From a test." in card
    assert f"{grafted[2]['vision']:,}" in card and "16 tokens" in card


def test_a_recipe_takes_it(grafted: Any, tmp_path: Path) -> None:
    file = recipe_file(tmp_path, model=grafted[1])
    ran = CliRunner().invoke(app, ["train", str(file), "--dry-run"])
    assert ran.exit_code == 0, ran.output


def test_the_command_says_what_is_new(tmp_path: Path) -> None:
    source, out = write_text_model("qwen3", tmp_path / "text"), tmp_path / "vlm"
    command = ["models", "graft", "--language", str(source), "--tower", "tiny", "--out", str(out)]
    ran = CliRunner().invoke(app, command)
    assert ran.exit_code == 0, ran.output
    sizes = graft(str(source), "tiny", tmp_path / "again")
    for name, size in sizes.items():
        assert f"{name.replace('_', ' ')} {size:,}" in ran.output
    weights = "model.safetensors"
    assert (out / weights).read_bytes() == (tmp_path / "again" / weights).read_bytes()
    assert CliRunner().invoke(app, command).exit_code != 0  # the folder is taken


@pytest.mark.parametrize(("kind", "seer"), [("llama", "siglip"), ("qwen2", "internvl")])
def test_a_tower_of_a_folder_is_taken_over(
    kind: str, seer: str, tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    source, folder = write_text_model(kind, tmp_path / "text"), tmp_path / "tower"
    if seer == "siglip":
        config = transformers.SiglipVisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            image_size=96, patch_size=8,
        )  # fmt: skip
        transformers.SiglipVisionModel(config).save_pretrained(folder)
    else:
        folder = tiny_models[seer]
    sizes = graft(str(source), str(folder), tmp_path / "vlm")
    assert sizes["image_tokens"] == (9 if seer == "siglip" else 16)
    held = transformers.AutoModel.from_pretrained(folder).state_dict()
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "vlm").model
    own = model.vision_model if kind == "llama" else model.vision_tower
    for name, weight in own.state_dict().items():
        assert any(torch.equal(weight, held[n]) for n in held if n.endswith(name)), name


def test_what_cannot_be_grafted_is_one_line_and_nothing_written(
    tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    llama, plain = write_text_model("llama", tmp_path / "a"), tmp_path / "plain"
    write_text_model("llama", plain, template=None)
    other = tmp_path / "other"
    transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=400)
    ).save_pretrained(other)
    unfit = tmp_path / "unfit"
    unfit.mkdir()
    (unfit / "config.json").write_text(
        json.dumps({"model_type": "siglip_vision_model", "image_size": 100, "patch_size": 16})
    )
    (plain / "model.safetensors").unlink()
    see, out = str(tiny_models["internvl"]), tmp_path / "out"
    for language, tower, message in (
        (other, "tiny", r"other: no family .* model_type 'gpt2'; take one of qwen2, qwen3, llama"),
        (plain, "tiny", "plain: has no chat template"),
        (see, "tiny", "sees already"),
        (tmp_path / "none", "tiny", "none: no such folder"),
        (llama, "large", "large: neither one of tiny, small, base nor a folder"),
        (llama, unfit, "unfit: "),
        (llama, see, "holds no vision tower as idefics3 has it"),
        (llama, other, "its config names no vision tower"),
    ):
        with pytest.raises(ModelError, match=message) as caught:
            graft(str(language), str(tower), out)
        assert "\n" not in str(caught.value) and not out.exists()
