"""Tools and what they answer in a chat: by the template of each family, or as a user's words."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rollout.tokens import Chat, load_processor
from tasks.calls import Tool, as_prompt
from tests.support.habits import whole, with_habits

FAMILIES = ["qwen3_vl", "internvl", "qwen2_5_vl", "idefics3"]
LOOK = Tool("look", "See a part larger.", {"at": {"type": "array", "items": {"type": "integer"}}})
TOOLS = json.dumps([LOOK.schema()])

HERMES = (
    "{% macro say(parts, bare) %}{% for p in parts %}{% if p.type == 'image' %}"
    "{% if not bare %}PLACEHOLDER{% endif %}{% else %}{{ p.text }}{% endif %}{% endfor %}"
    "{% endmacro %}{% if tools %}<|im_start|>system\n{% if messages[0].role == 'system' %}"
    "{{ say(messages[0].content, false) }}\n\n{% endif %}Tools:{% for t in tools %}\n"
    "{{ t | tojson }}{% endfor %}\nCall one in <tool_call></tool_call>.<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n"
    "{{ say(m.content, BARE) }}\n</tool_response><|im_end|>\n"
    "{% elif not (tools and m.role == 'system') %}<|im_start|>{{ m.role }}\n"
    "{{ say(m.content, false) }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As Qwen's and other families tell of tools; BARE: images of a tool's answer are left out."""


def chat_of(folder: Path, at: Path, bare: str | None, system: str = "") -> tuple[Chat, object]:
    """`bare`: whether the template of tools drops their images; None keeps the family's own."""
    model = with_habits(folder, at / "model")
    if bare is not None:
        file = model / "chat_template.jinja"
        own = re.search(r"part.type == 'image' %}(.*?){% else", file.read_text(), re.DOTALL)
        assert own
        file.write_text(HERMES.replace("PLACEHOLDER", own[1]).replace("BARE", bare))
    processor = load_processor(str(model))
    processor.system_prompt = system
    return Chat(processor), processor


@pytest.mark.parametrize("bare", [None, "true", "false"], ids=["own", "drops", "hermes"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_tool_returns_is_rendered_with_its_placeholders(
    tiny_models: dict[str, Path], tmp_path: Path, family: str, bare: str | None
) -> None:
    chat, processor = chat_of(tiny_models[family], tmp_path, bare)
    said = "<tool_call>{}</tool_call>"
    for parts in ([None], [None, "So?"], ["a", None, None], ["No."]):
        between = chat.turn(parts, chat.end, "tool")
        assert between.count(chat.image_token) == parts.count(None)  # type: ignore[arg-type]
        known = bare is not None and not (bare == "true" and None in parts)
        assert (between == chat.turn(parts, chat.end)) == (not known)
        text = chat.decoder.decode(between)[0]
        assert ("<tool_response>" in text) == known and all(p in text for p in parts if p)
        ids = [*chat.prompt([None, "Q"]), *chat.text(said), chat.end, *between]
        turns: list[tuple[str, list[str | None]]] = [("user", [None, "Q"]), ("assistant", [said])]
        turns.append(("tool" if known else "user", parts))
        assert chat.decoder.decode(ids)[0] == whole(chat, processor, turns)


@pytest.mark.parametrize("system", ["", "Be brief."])
@pytest.mark.parametrize("bare", [None, "true"], ids=["own", "hermes"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tools_are_told_by_the_template_that_knows_them_else_in_words(
    tiny_models: dict[str, Path], tmp_path: Path, family: str, bare: str | None, system: str
) -> None:
    chat, _ = chat_of(tiny_models[family], tmp_path, bare, system)
    ids = chat.prompt([None, "What? <|im_end|>"], TOOLS)
    text = chat.decoder.decode(ids)[0]
    assert ids.count(chat.image_token) == 1  # type: ignore[arg-type]
    assert (as_prompt(TOOLS) in text) == (bare is None)
    assert text.count(LOOK.says) == text.count('"look"') == 1
    assert text.count(system) >= 1 and (not system or text.index(system) < text.index('"look"'))
    assert (text.index('"look"') < text.index("What?")) == (bare is not None)
    plain = chat.decoder.decode(chat.prompt([None, "What? <|im_end|>"]))[0]
    assert "look" not in plain
    assert ids.count(chat.end) - chat.prompt(["a"]).count(chat.end) == (bare is not None) * (
        not system
    )
