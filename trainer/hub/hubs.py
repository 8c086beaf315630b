"""The hubs that models come from: what of a repository is on this machine, what it holds, and its download.

Both classes have the same members. The libraries do the work: their caches, their resumed downloads, their bars.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
from huggingface_hub import constants, errors, utils

from trainer.errors import UserError


class HubError(UserError):
    """A repository, or a revision of it, that cannot be had."""


class Unreachable(HubError):
    """A hub that does not answer now."""


@dataclass(frozen=True)
class HuggingFace:
    """A model's repository; `revision` is a branch, a tag or a commit. HF_HUB_OFFLINE and HF_HOME are honoured."""

    name: str
    revision: str | None = None

    title: ClassVar[str] = "Hugging Face"
    moved_by: ClassVar[str] = "HF_HOME"

    @property
    def cache(self) -> Path:
        return Path(constants.HF_HUB_CACHE)

    def problem(self) -> str | None:
        """Why there can be no such repository."""
        try:
            utils.validate_repo_id(self.name)
        except errors.HFValidationError as error:
            return f'"{self.name}" is not a Hugging Face id: {error}'
        return None

    def folder(self) -> Path | None:
        """Where its files lie in the cache, a folder named by the commit; not all of them need be there."""
        try:
            options: dict[str, Any] = {"local_files_only": True, "allow_patterns": []}  # asks for no file in particular
            return Path(huggingface_hub.snapshot_download(self.name, revision=self.revision, **options))
        except errors.LocalEntryNotFoundError:
            return None

    def sizes(self) -> dict[str, int]:
        """Bytes of every file that the repository holds. HubError if it cannot be had."""
        return {file.rfilename: file.size or 0 for file in self._ask().siblings or []}

    def has(self, file: str) -> bool:
        """Whether the cache holds it as the repository has it now."""
        return isinstance(huggingface_hub.try_to_load_from_cache(self.name, file, revision=self._ask().sha), str)

    def download(self, files: Sequence[str], *, quiet: bool) -> None:
        if (
            constants.HF_HUB_DISABLE_PROGRESS_BARS is None
        ):  # transformers' bars, which are off, have turned these off too
            (utils.disable_progress_bars if quiet else utils.enable_progress_bars)()
        huggingface_hub.snapshot_download(self.name, revision=self.revision, allow_patterns=[*files])

    def command(self, files: Sequence[str], *, again: bool = False) -> str:
        """What fetches names or patterns of files by hand; `again`: even those that are in the cache."""
        patterns = any("*" in file for file in files)
        named = " ".join(f"--include '{file}'" if patterns else file for file in files)
        revision = f" --revision {self.revision}" if self.revision else ""
        return f"hf download {self.name} {named}{revision}{' --force-download' if again else ''}"

    def _ask(self) -> Any:
        answer = _model_info(self.name, self.revision)
        if isinstance(answer, HubError):
            raise answer
        return answer


@cache
def _model_info(name: str, revision: str | None) -> Any:
    """What Hugging Face says of a model, or the error: asked once, since a try may take long where nothing answers."""
    api = huggingface_hub.HfApi()
    try:
        found = api.model_info(name, revision=revision, files_metadata=True, timeout=10)
        if found.gated:
            api.auth_check(name)
        return found
    except errors.GatedRepoError:
        address = f"{constants.ENDPOINT}/{name}"
        return HubError(f"{name} is gated: ask for access at {address}, then log in with `hf auth login`")
    except errors.RepositoryNotFoundError:
        return HubError(
            f'there is no folder {name}, and Hugging Face has no "{name}" that you may read: correct the name, or log '
            "in with `hf auth login` if it is private"
        )
    except errors.RevisionNotFoundError:
        return HubError(f'{name} has no revision "{revision}"; a branch, a tag or a commit is needed after the @')
    except Exception as error:  # whatever the network does
        return Unreachable(f"{name} is not on this machine, and Hugging Face does not answer ({_short(error)})")


@dataclass(frozen=True)
class ModelScope:
    """A model's repository; `revision` is a branch, a tag or a commit. MODELSCOPE_CACHE is honoured."""

    name: str
    revision: str | None = None

    title: ClassVar[str] = "ModelScope"
    moved_by: ClassVar[str] = "MODELSCOPE_CACHE"

    @property
    def cache(self) -> Path:
        return Path(_modelscope().get_default_config().cache_dir)

    def problem(self) -> str | None:
        """Why its library cannot be asked."""
        if find_spec("modelscope_hub") is None:
            return f'modelscope:{self.name} needs the library of ModelScope: pip install -e ".[modelscope]"'
        return None

    def folder(self) -> Path | None:
        """Where its files lie in the cache; not all of them need be there."""
        if self.problem():
            return None
        try:
            api = _modelscope().HubApi()
            return Path(api.download_repo(self.name, "model", revision=self.revision, local_files_only=True))
        except _modelscope().CacheNotFound:
            return None

    def sizes(self) -> dict[str, int]:
        """Bytes of every file that the repository holds. HubError if it cannot be had."""
        library = _modelscope()
        try:
            files = library.HubApi().list_repo_files(self.name, "model", revision=self.revision)
        except library.NotExistError as error:
            at = f" at revision {self.revision}" if self.revision else ""
            raise HubError(f"ModelScope has no {self.name}{at} ({_short(error)})") from error
        except (library.AuthenticationError, library.PermissionDeniedError) as error:
            raise HubError(f"{self.name} may not be read ({_short(error)}): log in with `modelscope login`") from error
        except Exception as error:  # whatever the network does
            raise Unreachable(f"{self.name}: ModelScope does not answer ({_short(error)})") from error
        return {file.path: file.size for file in files if not file.is_dir}

    def has(self, file: str) -> bool:
        folder = self.folder()
        return folder is not None and (folder / file).is_file()

    def download(self, files: Sequence[str], *, quiet: bool) -> None:
        """Its library always shows bars."""
        if files:  # no patterns would be all files
            _modelscope().HubApi().download_repo(self.name, "model", revision=self.revision, allow_patterns=[*files])

    def command(self, files: Sequence[str], *, again: bool = False) -> str:
        """What fetches names or patterns of files by hand; `again`: even those that are in the cache."""
        named = " ".join(f"'{file}'" for file in files)
        revision = f" --revision {self.revision}" if self.revision else ""
        return f"modelscope download {self.name} --include {named}{revision}{' --force' if again else ''}"


Hub = HuggingFace | ModelScope


def _modelscope() -> Any:
    """An optional extra, imported where it is needed."""
    import modelscope_hub

    return modelscope_hub


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
