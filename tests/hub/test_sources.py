"""Models by name, with the real libraries of the hubs against a small server of our own."""

import errno
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from huggingface_hub import constants, file_download
from safetensors.torch import load_file, save_file

from tests.helpers import BAD_INPUT, FAILED, FINISHED, run
from tests.hub.server import Hub, commit, listing, serving
from trainer import qwen_image
from trainer.config import ConfigError
from trainer.hub import hubs, sources
from trainer.hub.sources import DownloadError, Need


def forget() -> None:
    """What a process has learned of the hubs: the next test, or the next run, is another process."""
    hubs._model_info.cache_clear()
    sources._cached_folder.cache_clear()


@pytest.fixture
def hub(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Hugging Face, and an empty cache. `some/model` is a base of two commits, with files that nobody needs."""
    for revision in ("v1", "main"):
        folder = tmp_path / "hub" / revision
        shutil.copytree(tiny_base, folder)
        (folder / "README.md").write_text(f"this is {revision}")
        (folder / "transformer" / "evil.py").write_text("raise SystemExit")
        for name in ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.safetensors"):
            (folder / "transformer" / name).write_bytes(b"other weights")
    with serving(Hub({"some/model": {name: tmp_path / "hub" / name for name in ("main", "v1")}})) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        forget()
        yield server
    forget()


def base(source: str) -> list[Need]:
    return [qwen_image.need(source)]


def problems(needs: list[Need]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        sources.fetch(needs)
    return caught.value.problems


# --- names ------------------------------------------------------------------------------------------------


def test_one_way_to_name_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sources.repository("some/model") == hubs.HuggingFace("some/model")
    assert sources.repository("some/model@refs/pr/1") == hubs.HuggingFace("some/model", "refs/pr/1")
    assert sources.repository("modelscope:some/model@v1.0") == hubs.ModelScope("some/model", "v1.0")
    assert [
        sources.repository(name) for name in ("model", "/some/model", "a/b/c", "other:some/model", "some/model@")
    ] == [None] * 5
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some" / "model").mkdir(parents=True)
    assert sources.repository("some/model") is None and sources.folder("some/model") == Path("some/model")
    assert sources.problem("some/model") is None is sources.problem("other/model")
    assert f"there is no folder {tmp_path / 'nothing'}, and" in str(sources.problem("nothing"))
    assert "is not a Hugging Face id" in str(sources.problem("some--strange/model"))
    assert [sources.plain_id(name) for name in ("modelscope:x/y@z", "x/y", "/x/y")] == ["x/y", "x/y", "/x/y"]


# --- downloads --------------------------------------------------------------------------------------------


def test_a_model_is_fetched_by_its_id_and_nothing_that_is_not_needed(hub: Hub, tiny_base: Path) -> None:
    (line,) = sources.download_lines(base("some/model"))
    assert line.startswith("some/model: ") and "from Hugging Face" in line and not hub.files()
    sources.fetch(base("some/model"))
    folder, served = sources.local("some/model"), hub.repositories["some/model"]["main"]
    assert folder.name == commit(served) == sources.commit("some/model")
    wanted = {name for name in listing(tiny_base) if "/" in name} | {"model_index.json"}
    assert set(listing(folder)) == wanted >= {path.split("/", 5)[5] for path in hub.files()}
    assert all((folder / name).read_bytes() == (served / name).read_bytes() for name in wanted)
    assert sources.used(base("some/model")) == {"some/model": commit(served)}


def test_what_is_here_is_not_asked_for_again(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    sources.fetch(base("some/model"))
    asked = len(hub.asked)
    forget()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    sources.fetch(base("some/model"))
    assert sources.download_lines(base("some/model")) == [] and len(hub.asked) == asked


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub: Hub) -> None:
    old, new = hub.repositories["some/model"]["v1"], hub.repositories["some/model"]["main"]
    need = [Need("some/model@v1", ("README.md",))]
    sources.fetch(need)
    assert sources.locate("some/model@v1", "README.md").read_text() == "this is v1"
    assert sources.commit("some/model@v1") == commit(old) and sources.folder("some/model") is None
    sources.fetch([Need(f"some/model@{commit(new)}", ("README.md",))])
    assert sources.locate(f"some/model@{commit(new)}", "README.md").read_text() == "this is main"


def test_the_commit_is_the_identity_that_caches_go_by(hub: Hub) -> None:
    for source in ("some/model", "some/model@v1", f"some/model@{commit(hub.repositories['some/model']['v1'])}"):
        sources.fetch(base(source))
    main, v1, same = (
        qwen_image.identity(source)
        for source in ("some/model", "some/model@v1", f"some/model@{commit(hub.repositories['some/model']['v1'])}")
    )
    assert main != v1 == same


def test_a_run_stays_with_its_commit(hub: Hub) -> None:
    sources.fetch(base("some/model"))
    first = sources.local("some/model")
    hub.repositories["some/model"]["main"] = hub.repositories["some/model"]["v1"]
    huggingface_hub.snapshot_download("some/model")  # another program
    assert sources.local("some/model") == first
    forget()
    assert sources.local("some/model") != first


def test_a_dropped_connection_is_taken_up_where_it_broke(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)
    file = "transformer/diffusion_pytorch_model.safetensors"
    hub.drop_after = 50_000
    sources.fetch([Need("some/model", (file,))])
    served = hub.repositories["some/model"]["main"]
    (again,) = [asked for _, path, asked in hub.asked if path.endswith(file) and asked]
    assert 0 < int(again.removeprefix("bytes=").removesuffix("-")) <= 50_000
    assert sources.locate("some/model", file).read_bytes() == (served / file).read_bytes()


def test_a_full_disk_leaves_nothing_half_written_and_the_next_try_goes_on(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = file_download.http_get

    def fills_up(url: str, temp_file: Any, **options: Any) -> None:
        if "transformer" in url:
            temp_file.write(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(url, temp_file, **options)

    monkeypatch.setattr(file_download, "http_get", fills_up)
    with pytest.raises(DownloadError, match=r"No space left .* set HF_HOME to .* the same command again"):
        sources.fetch(base("some/model"))
    assert sources.cached("some/model", "transformer/diffusion_pytorch_model.safetensors") is None
    before = set(hub.files())
    monkeypatch.setattr(file_download, "http_get", write)
    forget()
    sources.fetch(base("some/model"))
    later = hub.files()[len(before) :]
    assert before and not {path for path in later if "/transformer/" not in path} & before


def test_too_little_space_is_told_before_the_first_byte(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    (problem,) = problems(base("some/model"))
    assert f"to {constants.HF_HUB_CACHE}, where 0.0 MB are free" in problem and "HF_HOME" in problem
    assert problem in sources.download_lines(base("some/model"))
    assert not hub.files() and not Path(constants.HF_HUB_CACHE).exists()


def test_offline_what_is_missing_is_named_with_the_command(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (problem,) = problems([Need("some/model@v1", ("a.safetensors", "b/*.json"))])
    assert "not on this machine, and HF_HUB_OFFLINE is set: a.safetensors, b/*.json" in problem
    assert problem.endswith("hf download some/model --include 'a.safetensors' --include 'b/*.json' --revision v1")
    assert qwen_image.transformer_on_meta("some/model").config.num_layers == 60 and hub.asked == []


def test_all_that_stands_in_the_way_is_told_at_once(hub: Hub, tmp_path: Path) -> None:
    pickles = tmp_path / "hub" / "pickles"
    (pickles / "vae").mkdir(parents=True)
    (pickles / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"...")
    hub.repositories |= {"only/pickles": {"main": pickles}, "gated/model": {"main": pickles}}
    hub.gated.add("gated/model")
    weights = ("vae/diffusion_pytorch_model*.safetensors",)
    missing, revision, gated, pickled, absent = problems(
        [
            Need("no/model", weights),
            Need("some/model@v9", weights),
            Need("gated/model", weights),
            Need("only/pickles", weights),
            Need("some/model", ("expert.safetensors",)),
        ]
    )
    assert 'Hugging Face has no "no/model" that you may read' in missing and "hf auth login" in missing
    assert 'some/model has no revision "v9"' in revision
    assert f"gated/model is gated: ask for access at {hub.url}/gated/model" in gated
    assert "only/pickles has vae/diffusion_pytorch_model.bin, but no vae/diffusion" in pickled and "convert" in pickled
    assert absent == "some/model has no expert.safetensors"
    assert not hub.files()


# --- files that are here ----------------------------------------------------------------------------------


@pytest.fixture
def folder(tiny_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "model"))


def wrong(folder: Path) -> list[str]:
    found = sources.check(qwen_image.need(str(folder)))
    assert problems(base(str(folder))) == found  # both before a download and before loading
    return found


def test_the_demo_s_model_passes(tiny_base: Path) -> None:
    for folder in ("demo/model", str(tiny_base)):
        assert sources.check(qwen_image.need(folder)) == []
        sources.fetch(base(folder))


def test_a_file_that_was_cut_short_is_named(folder: Path) -> None:
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    (problem,) = wrong(folder)
    assert problem.startswith(f"{weights}: ") and "not downloaded to its end" in problem and "delete it" in problem


def test_a_damaged_file_in_the_cache_comes_with_the_command_that_mends_it(hub: Hub) -> None:
    sources.fetch(base("some/model"))
    blob = sources.locate("some/model", "vae/diffusion_pytorch_model.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:-10])
    (problem,) = problems(base("some/model"))
    assert "hf download some/model vae/diffusion_pytorch_model.safetensors --force-download" in problem


def test_shards_that_an_index_names_must_be_there(folder: Path) -> None:
    transformer = QwenImageTransformer2DModel.from_pretrained(folder, subfolder="transformer")
    shutil.rmtree(folder / "transformer")
    transformer.save_pretrained(folder / "transformer", max_shard_size="200KB")
    assert sources.check(qwen_image.need(str(folder))) == []
    shard = sorted((folder / "transformer").glob("*-of-*"))[-1]
    shard.unlink()
    assert wrong(folder) == [f"{folder} has no transformer/{shard.name}"]
    (index,) = (folder / "transformer").glob("*.index.json")
    index.unlink()
    assert wrong(folder) == [f"{folder} has no transformer/diffusion_pytorch_model*.safetensors.index.json"]


def test_other_classes_and_other_shapes_are_told_together(folder: Path) -> None:
    for part, key, value in (("vae", "_class_name", "AutoencoderKL"), ("text_encoder", "model_type", "t5")):
        file = folder / part / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["img_in.weight"] = torch.zeros(3, 5)
    del tensors["proj_out.weight"]
    save_file(tensors, weights)
    shapes, vae, text_encoder = wrong(folder)
    assert "vae/config.json: _class_name is AutoencoderKL, but AutoencoderKLQwenImage is needed" in vae
    assert "text_encoder/config.json: model_type is t5, but qwen2_5_vl is needed" in text_encoder
    assert "2 of " in shapes and "such as img_in.weight (weights: (3, 5), configuration: (64, 64))" in shapes


def test_nothing_of_a_repository_is_executed() -> None:
    root = Path(__file__).parents[2]
    files = [
        *root.glob("*.py"),
        *(path for name in ("trainer", "initializers", "demo") for path in (root / name).rglob("*.py")),
    ]
    texts = {path: path.read_text(encoding="utf-8") for path in files}
    assert not [path for path, text in texts.items() if "trust_remote_code" in text or "torch.load(" in text]


# --- ModelScope -------------------------------------------------------------------------------------------


def test_a_model_of_modelscope(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = pytest.importorskip("modelscope_hub")
    hub.repositories["some/model"]["master"] = hub.repositories["some/model"]["main"]
    config = library.HubConfig(endpoint=hub.url, cache_dir=tmp_path / "scope")
    library.set_default_config(config)
    try:
        need = [qwen_image.need("modelscope:some/model", ("vae",))]
        (line,) = sources.download_lines(need)
        assert line.startswith("some/model: ") and f"from ModelScope to {tmp_path / 'scope'}" in line
        sources.fetch(need)
        folder, served = sources.local("modelscope:some/model"), hub.repositories["some/model"]["main"]
        weights = "vae/diffusion_pytorch_model.safetensors"
        small = {"model_index.json", "transformer/config.json", "vae/config.json"}  # which tell what the model is
        assert set(listing(folder)) == {*small, weights}
        assert all((folder / name).read_bytes() == (served / name).read_bytes() for name in listing(folder))
        asked = len(hub.asked)
        sources.fetch(need)
        assert len(hub.asked) == asked
        (problem,) = problems([Need("modelscope:no/model", ("vae/config.json",))])
        assert "ModelScope has no no/model" in problem
    finally:
        library.set_default_config(None)


def test_without_modelscope_s_library_its_models_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hubs, "find_spec", lambda _: None)
    assert 'pip install -e ".[modelscope]"' in str(sources.problem("modelscope:some/model"))
    assert problems(base("modelscope:some/model")) == [str(sources.problem("modelscope:some/model"))]


# --- whole runs -------------------------------------------------------------------------------------------


def test_a_run_by_id_and_the_same_again_offline(
    hub: Hub, run_toml: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_folder, by_id, offline = (tmp_path / name for name in ("by_folder", "by_id", "offline"))
    two = ("train.steps=2", "validation.prompts=[]")
    assert run(run_toml, by_folder, *two) == FINISHED
    assert run(run_toml, by_id, *two, "model.base=some/model") == FINISHED
    report = json.loads((by_id / "run.json").read_text())
    assert report["sources"] == {"some/model": commit(hub.repositories["some/model"]["main"])}
    asked = len(hub.asked)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    forget()
    assert run(run_toml, offline, *two, "model.base=some/model") == FINISHED
    assert len(hub.asked) == asked
    weights = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (by_folder, by_id, offline)]
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]) and torch.equal(tensor, weights[2][name])


def test_what_is_wrong_with_the_model_is_told_with_all_the_rest(
    folder: Path, run_toml: Path, pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (pictures / "0.png").write_bytes(b"")
    weights = folder / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert run(run_toml, tmp_path / "out", f"model.base={folder}") == BAD_INPUT
    assert f"[model] base: {weights}" in caplog.text and "0.png: is empty" in caplog.text


def test_a_download_that_stops_ends_a_run_with_a_message(
    hub: Hub, run_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ConnectionError("gone")

    assert run(run_toml, tmp_path / "none", "model.base=no/model") == BAD_INPUT
    assert '[model] base: there is no folder no/model, and Hugging Face has no "no/model"' in caplog.text
    monkeypatch.setattr(file_download, "http_get", fails)
    monkeypatch.setattr("trainer.hardware.machine.check", lambda *_: None)  # of its size nothing is known yet
    assert run(run_toml, tmp_path / "stopped", "model.base=some/model") == FAILED
    assert "some/model: the download from Hugging Face" in caplog.text and "Traceback" not in caplog.text
    assert not (tmp_path / "stopped").exists()
