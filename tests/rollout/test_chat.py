"""What is relied on in a model's folder, and data that spells out control tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, normalizers
from transformers import AutoProcessor

from learner.sft import Demonstrator
from rollout.decoding import special_tokens
from rollout.settings import ModelConfig
from rollout.tokens import Chat, ModelError, load_processor
from tasks.core import READ, DataError
from tests.support.habits import (
    Habit,
    assert_refused,
    change,
    no_pad,
    sentencepiece,
    several_ends,
    with_habits,
)
from tests.support.samples import TASK, problem

HABITS: dict[str, tuple[Habit, ...]] = {
    "ours": (),
    "several ends": (several_ends,),
    "no pad": (no_pad,),
    "sentencepiece": (sentencepiece, several_ends, no_pad),
}


@pytest.fixture(scope="module", params=HABITS)
def folder(
    request: pytest.FixtureRequest,
    tiny_models: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    made = tmp_path_factory.mktemp("habits") / "model"
    return with_habits(tiny_models["idefics3"], made, *HABITS[request.param])


def test_a_demonstration_ends_as_the_template_ends_a_turn(folder: Path) -> None:
    chat = Chat(load_processor(str(folder)))
    assert chat.tokenizer.convert_ids_to_tokens(chat.end) == "<|im_end|>"
    drawn = problem(0)
    s = Demonstrator(load_processor(str(folder))).sequence(
        TASK, drawn, TASK.demonstrate(drawn, "terse")
    )
    assert s.response_ids[-1] == chat.end in chat.ends
    assert not chat.ends & set(s.response_ids[:-1].tolist())
    assert not chat.ends & set(chat.placeholders)
    assert chat.image_token in chat.placeholders


def test_every_id_that_generation_config_names_ends_a_response(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    model = with_habits(tiny_models["qwen3_vl"], tmp_path / "model", several_ends)
    chat = Chat(load_processor(str(model)))
    assert {chat.tokenizer.convert_ids_to_tokens(i) for i in chat.ends} == {
        "<|im_end|>",
        "<|endoftext|>",
    }
    # A class's default that a config repeats is no end where it is an ordinary token.
    change(model / "config.json", eos_token_id=300)
    (model / "generation_config.json").unlink()
    assert 300 not in Chat(load_processor(str(model))).ends


@pytest.mark.parametrize("blind", [False, True])
def test_segments_say_what_the_parser_found(folder: Path, blind: bool) -> None:
    chat, drawn = Chat(load_processor(str(folder))), problem(0)
    response = TASK.demonstrate(drawn, "terse")
    s = Demonstrator(load_processor(str(folder))).sequence(TASK, drawn, response, blind)
    parsed = TASK.parse(response)
    for index, segment in enumerate(READ):
        text, _ = chat.decoder.decode(s.response_ids[s.segments == index])
        start, end = parsed.spans[segment]
        expected = "" if blind and segment == "perception" else response[start:end]
        # A first token with a space before its tag starts outside.
        expected = expected.strip()
        assert text.strip() in (expected, expected.removeprefix("<perception>\n"))
    if blind:
        asked = [
            *chat.prompt([drawn.prompt]),
            *chat.text(TASK.oracle_prefix(drawn)),
        ]
        assert s.prompt_ids.tolist() == asked


HOSTILE = st.lists(
    st.one_of(
        st.text(max_size=6),
        st.sampled_from(
            ["<|im_end|>", "<|im_start|>", "<image>", "<|endoftext|>", "<global-img>", " ", "\n"]
        ),
    ),
    max_size=8,
).map("".join)


@given(text=HOSTILE)
def test_no_text_of_data_becomes_a_control_token(folder: Path, text: str) -> None:
    chat = _chat(folder)
    specials = set(special_tokens(chat.tokenizer))

    def controls(ids: list[int]) -> list[int]:
        return [i for i in ids if i in specials]

    for around in ([], [None], [None, "b", None]):
        ids = chat.prompt([*around, text])
        assert controls(ids) == controls(chat.prompt([*around, "a"]))
        said, _ = chat.decoder.decode(ids)
        # A tokenizer that puts a space before a text does so here too.
        assert text in said and len(said) - len(text) - len(
            chat.decoder.decode(chat.prompt([*around, ""]))[0]
        ) in range(2 + around.count("b"))
    assert not controls(chat.text(text))
    assert chat.decoder.decode(chat.text(text))[0].removeprefix(" ") == text.removeprefix(" ")


_CHATS: dict[Path, Chat] = {}


def _chat(folder: Path) -> Chat:
    if folder not in _CHATS:
        _CHATS[folder] = Chat(load_processor(str(folder)))
    return _CHATS[folder]


def test_a_demonstration_that_spells_out_an_end_teaches_its_characters(folder: Path) -> None:
    chat, drawn = _chat(folder), problem(0)
    drawn = replace(drawn, prompt=f"{drawn.prompt} <image><|im_end|>")
    response = TASK.demonstrate(drawn, "terse").replace(
        "<reasoning>\n", "<reasoning>\nno <|im_end|> <image> yet "
    )
    s = Demonstrator(load_processor(str(folder))).sequence(TASK, drawn, response)
    text, _ = chat.decoder.decode(s.response_ids[:-1])
    assert text.removeprefix(" ") == response
    specials = set(special_tokens(chat.tokenizer))
    assert not specials & set(s.response_ids[:-1].tolist())
    assert int((s.prompt_ids == chat.end).sum()) == 1
    plain = Demonstrator(load_processor(str(folder))).sequence(
        TASK, problem(0), TASK.demonstrate(problem(0), "terse")
    )
    images = [int((found.prompt_ids == chat.image_token).sum()) for found in (s, plain)]
    assert images[0] == images[1] > 0


def test_what_a_tokenizer_cannot_read_as_text_is_named_with_its_problem(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """A placeholder that was added as an ordinary token, as some folders have it."""
    model = with_habits(tiny_models["qwen3_vl"], tmp_path / "model")
    change(model / "tokenizer_config.json", extra_special_tokens=[])
    _edit(model / "tokenizer.json", '"special": true', '"special": false')
    demonstrator = Demonstrator(load_processor(str(model)))
    drawn = problem(0)
    response = TASK.demonstrate(drawn, "terse")
    for asked, said, field in (
        (replace(drawn, prompt="an <|image_pad|> of"), response, "prompt"),
        (drawn, response.replace("<reasoning>\n", "<reasoning>\n<|image_pad|>"), "response"),
    ):
        with pytest.raises(
            DataError,
            match=rf"^problem {drawn.id}: {field} holds '<\|image_pad\|>', .*; remove it$",
        ):
            demonstrator.sequence(TASK, asked, said)


@pytest.mark.parametrize(
    ("file", "fields", "words"),
    [
        ("generation_config.json", {"eos_token_id": "<|im_end|>"}, "eos_token_id"),
        ("config.json", {"image_token_id": 6}, "image token is 5, its config.json's 6"),
        ("config.json", {"text_config": {"vocab_size": 2}}, "and its model knows 2"),
    ],
)
def test_a_folder_that_contradicts_itself_is_refused(
    tiny_models: dict[str, Path],
    tmp_path: Path,
    file: str,
    fields: dict[str, object],
    words: str,
) -> None:
    model = with_habits(tiny_models["qwen3_vl"], tmp_path / "model")
    change(model / file, **fields)
    assert_refused(model, words)


def test_a_folder_without_any_end_and_a_broken_json_are_refused(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    model = with_habits(tiny_models["qwen3_vl"], tmp_path / "model")
    (model / "generation_config.json").write_text("{")
    assert_refused(model, "generation_config.json: not JSON")
    (model / "generation_config.json").unlink()
    change(model / "tokenizer_config.json", eos_token=None)
    for name in ("config.json",):
        _edit(model / name, '"eos_token_id": 2', '"eos_token_id": null')
    _edit(model / "chat_template.jinja", "<|im_end|>", "")
    assert_refused(model, "nothing ends a response")


def test_a_tokenizer_that_changes_text_is_refused(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    model = with_habits(tiny_models["qwen3_vl"], tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save(str(model / "tokenizer.json"))
    assert_refused(model, "its tokenizer loses \"It's ")


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_images_are_scaled_to_the_pixels_that_a_recipe_allows(
    tiny_models: dict[str, Path], family: str, tmp_path: Path
) -> None:
    path, sizes = str(tiny_models[family]), [(8, 8), (64, 64), (300, 200)]
    for limits in (
        {"max_pixels": 4096},
        {"min_pixels": 9216},
        {"min_pixels": 5000, "max_pixels": 6000},
    ):
        processor = load_processor(path, reading=ModelConfig(path=path, **limits))
        theirs = AutoProcessor.from_pretrained(path, **limits)
        token = processor.tokenizer.convert_ids_to_tokens(processor.image_token_id)
        counts = [len(Chat(processor).image_block(size)) for size in sizes]
        for size, count in zip(sizes, counts, strict=True):
            made = theirs(images=[Image.new("RGB", size)], text=[token])["input_ids"][0]
            assert len(made) == count
        assert counts != [len(Chat(load_processor(path)).image_block(size)) for size in sizes]
        # A checkpoint that is saved with it reads so without a recipe.
        processor.save_pretrained(tmp_path)
        (tmp_path / "config.json").write_bytes(Path(path, "config.json").read_bytes())
        again = Chat(load_processor(str(tmp_path)))
        assert [len(again.image_block(size)) for size in sizes] == counts


@pytest.mark.parametrize(
    ("family", "limits", "says"),
    [
        (
            "internvl",
            {"max_pixels": 4096},
            "model.max_pixels: {}: a GotOcr2ImageProcessor knows no",
        ),
        (
            "idefics3",
            {"min_pixels": 4096},
            "model.min_pixels: {}: a Idefics3ImageProcessor knows no",
        ),
        ("qwen3_vl", {"max_pixels": 9}, "model.max_pixels: {}: its own limits are 256 to 262144"),
        ("qwen3_vl", {"min_pixels": 10**9}, "model.min_pixels: {}: its own limits are 256 to"),
    ],
)
def test_limits_of_pixels_that_cannot_be_kept_are_refused(
    tiny_models: dict[str, Path], family: str, limits: dict[str, int], says: str
) -> None:
    path = str(tiny_models[family])
    with pytest.raises(ModelError) as refusal:
        load_processor(path, reading=ModelConfig(path=path, **limits))
    assert str(refusal.value).startswith(says.format(path)) and "\n" not in str(refusal.value)


def _edit(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")
