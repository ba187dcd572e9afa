"""What lies in a checkpoint is read, never run."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from learner.outline import _outline
from learner.policy import load_policy
from rollout.models import ModelError
from rollout.tokens import load_processor, load_reader

CODE = """
from pathlib import Path
Path({marker!r}).write_text("it ran")
from transformers import PreTrainedConfig
class Own(PreTrainedConfig):
    model_type = "own"
    vision_config = {{}}
"""


@pytest.mark.parametrize("load", [load_processor, load_reader, load_policy, _outline])
def test_python_of_a_checkpoint_is_not_run_whatever_is_typed(
    load: Callable[[str], object],
    tiny_models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, marker = tmp_path / "model", tmp_path / "marker"
    shutil.copytree(tiny_models["qwen3_vl"], folder)
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    for name in ("config.json", "processor_config.json", "preprocessor_config.json"):
        if (folder / name).exists():
            config = json.loads((folder / name).read_text())
            config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
            config |= {"processor_class": "Nobodys", "image_processor_type": "Nobodys"}
            (folder / name).write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    with pytest.raises(ModelError):
        load(str(folder))
    assert not marker.exists()
