"""Where a model is: in a folder of this machine, in the hub's cache, or at the hub."""

from __future__ import annotations

from pathlib import Path

from tasks.files import recover

ASK_SECONDS = 10.0
"""The hub's own client asks again and again, for minutes, where there is no network."""


def why_missing(model: str) -> str:
    """What is wrong with a model's path or hub name, in words; empty where it can be had.

    The hub is asked once, for a name that is not in its cache.
    """
    folder = Path(model)
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
