"""Where a model is, in a folder of this machine, the hub's cache or at the hub, and what its files
tell of it in milliseconds, before the seconds that torch and transformers take to come up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tasks.fetched import fetched, is_uri
from tasks.files import recover

NOT_ITS_CODE = {"trust_remote_code": False}
"""For transformers: Python that lies in a checkpoint is never run. Not told so, it asks at the
terminal, and runs it for a `y`."""
ASK_SECONDS = 10.0
"""The hub's own client asks again and again, for minutes, where there is no network."""
NO_TEMPLATE = (
    "has no chat template; take the instruct checkpoint, or put the chat_template.jinja of one "
    "into the folder"
)


class ModelError(ValueError):
    """A checkpoint that cannot be used; the message names the folder and the remedy."""


def require_model(path: str, field: str = "model.path") -> str:
    """The folder that has its files on this node (`tasks.fetched`), or its hub name.

    Raises ModelError, naming `field`, for a model that is nowhere or whose files will not do.
    """
    if wrong := why_missing(path) or _why_unusable(Path(fetched(path))):
        raise ModelError(f"{field}: {path}: {wrong}")
    return fetched(path)


def _why_unusable(folder: Path) -> str:
    """What a folder's files lack for a conversation, with images where its config has them."""
    file = folder / "config.json"
    if not file.is_file():
        return ""  # a name of the hub's
    try:
        config = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        return f"config.json there cannot be read ({error}); is the checkpoint whole?"
    if not isinstance(config, dict):
        return "config.json there holds no JSON object; is the checkpoint whole?"
    readers = ("preprocessor_config.json", "processor_config.json")
    if "vision_config" in config and not any((folder / name).is_file() for name in readers):
        return (
            f"no processor: neither {readers[0]} nor {readers[1]} is there; a VLM folder holds "
            "one and its tokenizer beside the weights"
        )
    files = [*folder.glob("chat_template*"), *folder.glob("*config.json")]
    if (folder / "tokenizer_config.json").is_file() and not any(
        b"chat_template" in file.name.encode() + file.read_bytes()
        for file in files
        if file.is_file()
    ):
        return NO_TEMPLATE
    return ""


def why_missing(model: str) -> str:
    """What is wrong with a model's path, hub name or URI, in words; empty where it can be had.

    The hub is asked once, for a name that is not in its cache.
    """
    folder = Path(fetched(model))
    if is_uri(str(model)) and not folder.is_dir():
        return "was not fetched; cluster.recipe.fetching pins a recipe's URIs"
    recover(folder)
    if (folder / "config.json").is_file():
        return ""
    if folder.is_file():
        return "is a file; give the folder that holds config.json and the weights"
    if folder.is_dir():
        return f"no config.json in {folder.resolve()}; a model's folder holds it beside the weights"
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    no_folder = f"no such folder: looked for {folder.absolute()}"
    # `build/policy` could be a name of the hub's; with a folder `build` here it is a path.
    if model.startswith((".", "/")) or (len(folder.parts) > 1 and Path(folder.parts[0]).is_dir()):
        return no_folder
    try:
        if isinstance(try_to_load_from_cache(model, "config.json"), str):
            return ""
        get_hf_file_metadata(hf_hub_url(model, "config.json"), timeout=ASK_SECONDS)
    except HFValidationError:
        return no_folder
    except OfflineModeIsEnabled:
        return f"{no_folder}; not in the hub's cache either, and HF_HUB_OFFLINE is set"
    except HfHubHTTPError as error:
        status = error.response.status_code
        return f"{no_folder}; the hub answers {status} to this name (private models need HF_TOKEN)"
    except Exception as error:  # the kinds of its HTTP client change with its version
        why = f"{type(error).__name__}: {error}"
        return f"{no_folder}; not in the hub's cache either, and the hub cannot be asked ({why})"
    return ""


def json_beside(tokenizer: Any, name: str) -> dict[str, Any]:
    """A JSON file beside a tokenizer's, empty where there is none."""
    from transformers.utils import cached_file

    if not tokenizer.name_or_path:
        return {}
    file = cached_file(
        tokenizer.name_or_path,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if file is None:
        return {}
    try:
        with open(file, encoding="utf-8") as stream:
            content = json.load(stream)
    except ValueError as error:
        raise ModelError(f"{name}: not JSON ({first_line(error)})") from error
    if not isinstance(content, dict):
        raise ModelError(f"{name}: not a JSON object")
    return content


def token_ids(value: Any) -> list[int]:
    """Token ids of a config's field, which is one, a list or nothing."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(index) is int for index in ids):
        raise ModelError(f"eos_token_id: {str(value)[:40]}: neither a token id nor a list of them")
    return ids


def first_line(error: Exception) -> str:
    """Of its message; its kind where that is empty."""
    return (str(error).splitlines() or [type(error).__name__])[0]
