"""Models by name: found on this machine, or fetched and checked, before anything loads.

    folder                                taken as it is; a folder wins over a repository of the same name
    owner/name                            a repository of Hugging Face
    owner/name@revision                   at a branch, a tag or a commit
    modelscope:owner/name[@revision]      a repository of ModelScope

What the hub's cache holds is taken without asking the network; what it lacks is fetched at the newest commit of the
revision. Only files that are needed are fetched, and only data: nothing that comes from a repository is executed.
"""

import errno
import json
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path, PurePosixPath

from huggingface_hub import constants

from trainer.config import ConfigError, first_few
from trainer.errors import UserError
from trainer.files import LayoutError, free_bytes, read_header, size
from trainer.hub.hubs import Hub, HubError, HuggingFace, ModelScope, Unreachable

log = logging.getLogger("trainer")

_ID = re.compile(r"(modelscope:)?([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_SHARD = re.compile(r"-\d+-of-\d+\.safetensors$")
_VARIANT = re.compile(r"\.\w+(-\d+-of-\d+)?\.safetensors$")  # such as model.fp16.safetensors: other weights, not more


class SourceError(UserError):
    """A model that is not on this machine, or not as it should be."""


class DownloadError(OSError):
    """A download that stopped on its way; given again, the command goes on with it."""


@dataclass(frozen=True)
class Need:
    """What a run takes from a source."""

    source: str
    files: tuple[str, ...]
    """Each of these names and patterns must be there; of weights in shards, all that their index names."""
    extra: tuple[str, ...] = ()
    """Taken where they are there."""
    check: Callable[[], list[str]] = list
    """What else can be wrong with the files, from headers and configurations alone."""
    early: Callable[[], list[str]] = list
    """What can be wrong with a model that is yet to be fetched, from its small files, which are fetched for that."""


def repository(source: str) -> Hub | None:
    """The repository that `source` names; None if it is a folder, or not an id."""
    match = _ID.fullmatch(source)
    if match is None or Path(source).expanduser().is_dir():
        return None
    return (ModelScope if match[1] else HuggingFace)(match[2], match[3])


def plain_id(source: str) -> str:
    """owner/name, or the folder: what other libraries take."""
    hub = repository(source)
    return source if hub is None else hub.name


def folder(source: str) -> Path | None:
    """The folder itself, or where the hub's cache has the repository; not all files need be there."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    hub = repository(source)
    return None if hub is None else _cached_folder(hub)


@cache
def _cached_folder(hub: Hub) -> Path | None:
    """Looked up once: a run stays with its commit, whatever others fetch meanwhile."""
    return hub.folder()


def cached(source: str, file: str) -> Path | None:
    """The path of a file, or None if it is not on this machine."""
    where = folder(source)
    return where / file if where is not None and (where / file).is_file() else None


def local(source: str) -> Path:
    """The folder to load from, once `fetch` has been called. SourceError if there is none."""
    if (where := folder(source)) is None:
        raise SourceError(problem(source) or f"{source} is not on this machine, and has not been fetched")
    return where


def locate(source: str, file: str) -> Path:
    """The path of a file, as `local`."""
    if (path := cached(source, file)) is None:
        raise SourceError(f"{local(source) / file} is missing")
    return path


def commit(source: str) -> str | None:
    """The commit that is on this machine, of a repository of Hugging Face."""
    hub, where = repository(source), folder(source)
    return where.name if isinstance(hub, HuggingFace) and where is not None else None


def problem(source: str) -> str | None:
    """Why `source` can be neither a folder nor a repository."""
    if Path(source).expanduser().is_dir():
        return None
    if (hub := repository(source)) is None:
        return (
            f'there is no folder {Path(source).expanduser().absolute()}, and "{source}" is not a Hugging Face id '
            "(owner/name or owner/name@revision; of ModelScope, modelscope:owner/name)"
        )
    return hub.problem()


def missing(need: Need) -> list[str]:
    """What cannot be had: a source that is none, files that a folder lacks, or a cache while HF_HUB_OFFLINE is set."""
    if why := problem(need.source):
        return [why]
    hub, where = repository(need.source), folder(need.source)
    gone = list(need.files) if where is None else _absent(where, need.files)
    if where is not None and hub is None:
        beside = [path.relative_to(where).as_posix() for file in gone for path in (where / file).parent.glob("*")]
        return _lacks(need.source, gone, beside)
    if gone and hub is not None and constants.HF_HUB_OFFLINE:
        command = hub.command([*need.files, *need.extra])
        return [
            f"{need.source}: not on this machine, and HF_HUB_OFFLINE is set: {first_few(gone)}. Fetch them where there "
            f"is a network, into the same cache: {command}"
        ]
    return []


def is_here(need: Need) -> bool:
    """Whether all its files are on this machine."""
    where = folder(need.source)
    return where is not None and not _absent(where, need.files)


def check(need: Need) -> list[str]:
    """All that is wrong with what is on this machine, of weights by their headers; and with small files of a model that
    is yet to be fetched, if the hub answers."""
    if found := missing(need):
        return found
    where = folder(need.source)
    if where is None or _absent(where, need.files):
        return need.early()
    return _damaged(need, where) or need.check()


def config_file(source: str, file: str) -> Path | None:
    """The path of a small file, fetched if need be; None if the hub does not answer. HubError if it has none."""
    path, hub = cached(source, file), repository(source)
    if path is not None or hub is None:
        return path or locate(source, file)
    try:
        if file not in hub.sizes():
            raise HubError(f"{source} has no {file}")
        _download(hub, [file], quiet=True)
    except (Unreachable, DownloadError):
        return None
    return locate(source, file)


def download_lines(needs: Sequence[Need]) -> list[str]:
    """For a plan: a line on each download, and on what stands in its way. Nothing is fetched."""
    todo, problems = _to_fetch(needs)
    return [_line(hub, files) for hub, files in todo.items() if files] + list(dict.fromkeys(problems))


def download_problems(needs: Sequence[Need]) -> list[str]:
    """What stands in the way of fetching what is missing: repositories, access, the network, disk space."""
    return list(dict.fromkeys(_to_fetch(needs)[1]))


def fetch(needs: Sequence[Need], *, quiet: bool = False) -> None:
    """Have all files on this machine, and know that they are whole and what they should be.

    ConfigError lists the `download_problems`, before the first byte is downloaded, else what small files tell, before
    the weights are. DownloadError if a download stops.
    """
    todo, problems = _to_fetch(needs)
    problems = problems or [problem for need in needs if not is_here(need) for problem in need.early()]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    for hub, files in todo.items():
        if files:
            log.info("fetching %s", _line(hub, files))
        _download(hub, [*files], quiet=quiet)
    for need in needs:
        where = local(need.source)
        problems += [f"{need.source}: {file} is missing in {where}" for file in _absent(where, need.files)]
        problems += check(need)
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))


def used(needs: Iterable[Need]) -> dict[str, str]:
    """For a report: the commit of each source, or its folder."""
    return {need.source: commit(need.source) or str(local(need.source)) for need in needs}


def _to_fetch(needs: Sequence[Need]) -> tuple[dict[Hub, dict[str, int]], list[str]]:
    """Repository -> file -> bytes of what is to be downloaded, and what stands in the way."""
    todo: dict[Hub, dict[str, int]] = {}
    problems = []
    for need in needs:
        hub, where = repository(need.source), folder(need.source)
        if found := missing(need):
            problems += found
        elif hub is not None and (where is None or _absent(where, need.files)):
            try:
                sizes = hub.sizes()
                chosen = [name for name in sizes if any(_matches(name, file) for file in (*need.files, *need.extra))]
                gone = [file for file in need.files if not any(_matches(name, file) for name in chosen)]
                problems += _lacks(need.source, gone, sizes)
                todo.setdefault(hub, {}).update({name: sizes[name] for name in chosen if not hub.has(name)})
            except HubError as error:
                problems.append(str(error))
    for place, moved_by in {hub.cache: hub.moved_by for hub in todo}.items():
        wanted = sum(sum(files.values()) for hub, files in todo.items() if hub.cache == place)
        if wanted > (free := free_bytes(place)):
            problems.append(
                f"{size(wanted)} are to be downloaded to {place}, where {size(free)} are free: free some of the disk, "
                f"or set {moved_by} to a folder on a larger one"
            )
    return todo, problems


def _line(hub: Hub, files: dict[str, int]) -> str:
    return (
        f"{hub.name}: {size(sum(files.values()))} from {hub.title} to {hub.cache} ({size(free_bytes(hub.cache))} free)"
    )


def _download(hub: Hub, files: Sequence[str], *, quiet: bool) -> None:
    try:
        hub.download(files, quiet=quiet)
    except Exception as error:  # of the network, of the disk, of the hub: each library has its own
        advice = ""
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            advice = f"Free some of the disk, or set {hub.moved_by} to a folder on a larger one. "
        raise DownloadError(
            f"{hub.name}: the download from {hub.title} to {hub.cache} stopped ({str(error).strip()}). {advice}"
            "Give the same command again: files that are whole are kept."
        ) from error
    finally:
        _cached_folder.cache_clear()


def _matches(name: str, file: str) -> bool:
    """Whether a file is meant by a name or pattern."""
    return name == file or (fnmatchcase(name, file) and not _VARIANT.search(name))


def _absent(where: Path, files: Iterable[str]) -> list[str]:
    """Names and patterns that match nothing in the folder, and shards that an index there names."""
    gone = []
    for file in files:
        found = [path for path in where.glob(file) if _matches(path.relative_to(where).as_posix(), file)]
        indices = [*where.glob(f"{file}.index.json")] if file.endswith(".safetensors") else []
        if not found:
            gone.append(file)
        elif not indices and all(_SHARD.search(path.name) for path in found):
            gone.append(f"{file}.index.json")
        for index in indices:
            shards = [index.parent / name for name in shards_of(index)]
            gone += [path.relative_to(where).as_posix() for path in shards if not path.is_file()]
    return gone


def weight_files(folder: Path, stem: str) -> list[Path]:
    """The safetensors files of a model's weights in a folder: those that an index names, else the only one."""
    index = folder / f"{stem}.safetensors.index.json"
    return [folder / name for name in (shards_of(index) if index.is_file() else [f"{stem}.safetensors"])]


def shards_of(index: Path) -> list[str]:
    """The files that an index of weights names."""
    try:
        return sorted({*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{index}: not an index of weights in shards ({error}); fetch it again") from error


def _lacks(source: str, gone: Iterable[str], names: Iterable[str]) -> list[str]:
    """A problem for each missing file, given the names of those that are there."""
    problems = []
    for file in gone:
        part = str(PurePosixPath(file).parent)
        pickles = [name for name in names if name.endswith(_PICKLES) and str(PurePosixPath(name).parent) == part]
        if file.endswith(".safetensors") and pickles:
            problems.append(
                f"{source} has {pickles[0]}, but no {file}: files of that kind can execute code, and are not loaded; "
                "convert them to safetensors, by save_pretrained or https://huggingface.co/spaces/safetensors/convert"
            )
        else:
            problems.append(f"{source} has no {file}")
    return problems


def _damaged(need: Need, where: Path) -> list[str]:
    """Weights that are not as long as their headers say, or no safetensors at all; JSON that is none."""
    problems, hub = [], repository(need.source)
    for path in sorted({path for file in (*need.files, *need.extra) for path in where.glob(file)}):
        try:
            if path.suffix == ".safetensors":
                read_header(path)
            elif path.suffix == ".json":
                _read_json(path)
        except LayoutError as error:
            again = hub.command([path.relative_to(where).as_posix()], again=True) if hub else "delete it first"
            problems.append(f"{error} ({again})")
    return problems


def _read_json(path: Path) -> None:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LayoutError(f"{path}: cannot be read as JSON ({error}). Download it again.") from error
