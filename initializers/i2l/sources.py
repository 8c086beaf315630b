"""Where weights lie: a local folder, or a repository of the Hugging Face hub."""

import re
from pathlib import Path

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class SourceError(ValueError):
    """A file of weights is neither here nor to be had."""


def cached(source: str, file: str) -> Path | None:
    """The local path of `file` from the folder or hub id `source`, or None if it is not on this machine."""
    from huggingface_hub import try_to_load_from_cache

    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder / file if (folder / file).is_file() else None
    if not _HUB_ID.fullmatch(source):
        return None
    found = try_to_load_from_cache(source, file)
    return Path(found) if isinstance(found, str) else None


def problem(source: str, file: str) -> str | None:
    """Why `file` cannot be had from `source`, or None if it is here or can be downloaded."""
    from huggingface_hub import constants

    if cached(source, file) is not None:
        return None
    if Path(source).expanduser().is_dir():
        return f"{Path(source) / file} is missing"
    if not _HUB_ID.fullmatch(source):
        return f"{source} is neither a folder nor a Hugging Face id (owner/name)"
    if constants.HF_HUB_OFFLINE:
        return (
            f"there is no folder {source}, and {file} of the Hugging Face repository of that name is not in the cache, "
            f"while HF_HUB_OFFLINE is set. Download it where there is a network: hf download {source} {file}"
        )
    return None


def locate(source: str, file: str) -> Path:
    """The local path of `file`, downloaded if `source` is a hub id. SourceError if it cannot be had."""
    if (path := cached(source, file)) is not None:
        return path
    if (why := problem(source, file)) is not None:
        raise SourceError(why)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(source, file))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise SourceError(
            f"there is no folder {source}, and {file} could not be downloaded from the Hugging Face repository of that "
            f"name ({error}). Correct the name, or download it elsewhere (hf download {source} {file}) and give its "
            "folder."
        ) from error
