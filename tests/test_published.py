"""The published models of the family, by their configuration files: which are trained, what is said of the others."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import configuration_utils
from huggingface_hub import constants
from safetensors.torch import save_file

import initializers
from initializers.i2l import layout
from initializers.i2l.encoders import ENCODER_FILES
from initializers.i2l.training import train as training
from tests import published
from tests.helpers import BAD_INPUT, FINISHED, run
from tests.hub.server import Hub, serving
from tests.hub.test_sources import forget
from train import main
from trainer import qwen_image
from trainer.config import ConfigError
from trainer.hub import sources
from trainer.plan import load_config, notes, prepare

CONFIG = "configs/qwen_image.toml"
I2L, ENCODERS = "DiffSynth-Studio/Qwen-Image-i2L", "DiffSynth-Studio/General-Image-Encoders"
TRAINED = (published.FIRST, published.LATER)
REFUSED = {
    published.EDIT: ("Qwen-Image-Edit", 'model_index.json says _class_name = "QwenImageEditPipeline"'),
    published.EDIT_2509: ("Qwen-Image-Edit", 'model_index.json says _class_name = "QwenImageEditPlusPipeline"'),
    published.EDIT_2511: ("Qwen-Image-Edit", 'model_index.json says _class_name = "QwenImageEditPlusPipeline"'),
    published.LAYERED: ("Qwen-Image-Layered", 'model_index.json says _class_name = "QwenImageLayeredPipeline"'),
    published.NEW_CLASS: ("Qwen-Image-2.1", 'model_index.json says _class_name = "QwenImage21Pipeline"'),
}
BY_TRANSFORMER = {  # without model_index.json
    published.EDIT_2511: "transformer/config.json says zero_cond_t = true",
    published.LAYERED: "transformer/config.json says use_layer3d_rope = true",
    published.NEW_CLASS: 'transformer/config.json says _class_name = "QwenImage21Transformer2DModel"',
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Hugging Face with all models of the family and i2L, and an empty cache. Weights are a few bytes."""
    names = {name: [*map(str, layout.FILES.values())] for name in (I2L,)} | {ENCODERS: [*ENCODER_FILES]}
    for model in published.MODELS:
        folder = published.write(tmp_path / "hub" / model, model)
        names[model] = published.weight_files()
        published.write_indices(folder)
    for name, files in names.items():
        for file in files:
            (tmp_path / "hub" / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "hub" / name / file).write_bytes(b"weights")
    with serving(Hub({name: {"main": tmp_path / "hub" / name} for name in names})) as server:
        address = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        forget()
        yield server
    forget()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen-Image on this machine, whole but for what is in its weights."""
    where = published.write(tmp_path_factory.mktemp("published"), published.FIRST)
    published.write_weights(where)
    return where


def plan(config: str, pictures: Path, *settings: str) -> int:
    words = (f"data.images={pictures}", *settings)
    return main(["--config", config, "--plan", *(word for setting in words for word in ("--set", setting))])


@pytest.mark.parametrize("model", TRAINED)
def test_the_plan_of_a_model_that_is_yet_to_be_fetched(
    model: str, hub: Hub, pictures: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """It reads configurations, and no weights."""
    assert plan(CONFIG, pictures, f"model.base={model}", "data.resolution=64") == FINISHED
    text = capsys.readouterr().out
    assert f"{model}: 20,430.4 M parameters in bf16" in text and "rank 16 on 720 modules" in text
    assert f"{model}: 0.0 MB from Hugging Face" in text and f"{I2L}: 0.0 MB" in text
    assert not [record for record in caplog.records if record.levelname != "INFO"]
    assert hub.files() and all(file.endswith(".json") for file in hub.files())
    assert ("i2L was made for the first Qwen-Image" in text) == (model == published.LATER)


def test_the_plan_of_a_model_on_this_machine(
    folder: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights in 9 shards fit the configuration, and its keys are nothing to warn of."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(configuration_utils.logger, "warning", lambda *said: pytest.fail(str(said)))
    settings = (f"model.base={folder}", "data.resolution=64", "init.method=random")
    assert plan(CONFIG, pictures, *settings) == FINISHED
    text = capsys.readouterr().out
    assert "20,430.4 M parameters in bf16" in text and "download" not in text


def test_weights_that_are_missing_or_of_another_size_are_told(folder: Path, tmp_path: Path) -> None:
    need = qwen_image.need(str(folder))
    assert len(list((folder / "transformer").glob("*.safetensors"))) == 9 and sources.check(need) == []
    other = published.write(tmp_path / "other", published.FIRST, transformer={"num_layers": 61})
    for part in published.SHARDS:
        for file in (folder / part).glob("*.safetensors*"):
            (other / part / file.name).symlink_to(file)
    (wrong,) = sources.check(qwen_image.need(str(other)))
    assert "32 of 1965 tensors are missing or of another shape, such as transformer_blocks.60." in wrong
    shard = other / published.weight_files()[4]
    shard.unlink()
    assert sources.check(qwen_image.need(str(other))) == [f"{other} has no transformer/{shard.name}"]


def test_what_the_classes_take_of_the_published_values(folder: Path) -> None:
    with torch.device("meta"):
        default = qwen_image.QwenImageTransformer2DModel()
    for model in TRAINED:
        transformer = published.files(model)["transformer/config.json"]
        taken = qwen_image.known_keys(qwen_image.QwenImageTransformer2DModel, transformer)
        assert taken == {
            name: value for name, value in transformer.items() if name in default.config and name[0] != "_"
        }
    assert qwen_image.picture_multiple(str(folder)) == 16
    assert qwen_image.transformer_on_meta(str(folder)).config["joint_attention_dim"] == 3584
    assert 16e9 < qwen_image.text_encoder_bytes(str(folder)) < 17e9
    scheduler = qwen_image.Sampler(str(folder))._scheduler
    assert scheduler.config["shift_terminal"] == 0.02 and scheduler.config["use_dynamic_shifting"]


def test_a_run_with_keys_that_no_class_takes(
    run_toml: Path, tiny_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Encoding, training, validation, samples and export of a base that another version of the libraries saved."""
    where = Path(shutil.copytree(tiny_base, tmp_path / "model"))
    for file in (*where.glob("*/config.json"), where / "scheduler" / "scheduler_config.json"):
        content = json.loads(file.read_text())
        file.write_text(json.dumps({**content, "_diffusers_version": "0.34.0.dev0", "pooled_projection_dim": 768}))
    assert run(run_toml, tmp_path / "out", f"model.base={where}", "train.steps=1") == FINISHED
    assert (tmp_path / "out" / "samples" / "step-000001-0.png").exists()
    assert not [record for record in caplog.records if record.levelname != "INFO"]


@pytest.mark.parametrize("kind", ["style", "coarse", "fine"])
def test_the_plan_of_an_expert_s_training(
    kind: str, hub: Hub, pictures: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    words = [f"data.images={pictures}", "data.held_out_subjects=2", "data.resolution=64"]
    options = [word for setting in words for word in ("--set", setting)]
    assert training.main(["--config", f"configs/i2l_qwen_image_{kind}.toml", "--plan", *options]) == FINISHED
    text = capsys.readouterr().out
    assert "20,430.4 M parameters in bf16, frozen" in text and "Qwen/Qwen-Image: 0.0 MB from Hugging Face" in text
    assert not [record for record in caplog.records if record.levelname != "INFO"]
    assert all(file.endswith(".json") for file in hub.files())


@pytest.mark.parametrize("model", REFUSED)
def test_other_models_of_the_family_are_refused_by_name_before_anything_large_is_fetched(
    model: str, hub: Hub, pictures: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name, said = REFUSED[model]
    assert plan(CONFIG, pictures, f"model.base={model}", "data.resolution=64") == BAD_INPUT
    assert f"[model] base: {model} is {name}, " in caplog.text and f"({said})" in caplog.text
    assert "choose Qwen/Qwen-Image or Qwen/Qwen-Image-2512" in caplog.text
    assert all(file.endswith(".json") for file in hub.files())
    with pytest.raises(ConfigError):
        sources.fetch([qwen_image.need(model)])
    assert all(file.endswith(".json") for file in hub.files())


@pytest.mark.parametrize("model", REFUSED)
def test_a_folder_of_another_model_is_refused_by_name(model: str, tmp_path: Path) -> None:
    where = published.write(tmp_path / "model", model)
    name, said = REFUSED[model]
    (problem,) = qwen_image.check_base(str(where))
    assert f"{where} is {name}, " in problem and f"({said})" in problem
    (where / "model_index.json").unlink()
    found = qwen_image.check_base(str(where))
    assert [BY_TRANSFORMER[model] in problem for problem in found] == [True] if model in BY_TRANSFORMER else not found


def test_another_model_that_is_in_the_cache_is_refused(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a word to the hub: model_index.json has come with it."""
    need = qwen_image.need(published.EDIT_2509)
    with monkeypatch.context() as patch:
        patch.setattr(qwen_image, "_OTHERS", ())
        with pytest.raises(ConfigError):  # of the weights, which are no safetensors
            sources.fetch([qwen_image.need(published.EDIT_2509)])
    asked = len(hub.asked)
    for path in sources.local(published.EDIT_2509).rglob("*.safetensors"):
        path.unlink()
        save_file({}, path)
    (problem,) = sources.check(need)
    assert "is Qwen-Image-Edit" in problem and len(hub.asked) == asked


def test_a_quantised_repository_is_not_refused(tmp_path: Path) -> None:
    """Its tensors are packed, and do not have the configuration's shapes."""
    nf4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    quantised = {"quantization_config": nf4}
    where = published.write(tmp_path / "model", published.FIRST, transformer=quantised, text_encoder=quantised)
    for file in published.weight_files():
        save_file({"img_in.weight": torch.zeros(8, 1, dtype=torch.uint8)}, where / file)
    published.write_indices(where)
    assert qwen_image.check_base(str(where)) == sources.check(qwen_image.need(str(where))) == []
    assert qwen_image.transformer_on_meta(str(where)).config["num_layers"] == 60


def test_notes_say_what_is_not_known_of_a_model(run_toml: Path, tiny_base: Path, tmp_path: Path) -> None:
    """That i2L was made for the first Qwen-Image, and that Qwen-Image overflows in fp16."""
    made, overflows = "i2L was made for the first Qwen-Image", "(65504)"
    later = tmp_path / "Qwen-Image-2512"
    later.symlink_to(tiny_base)

    def said(*overrides: str) -> str:
        settings, start = load_config(run_toml, [f"output={tmp_path / 'out'}", *overrides], initializers)
        return "\n".join(notes(prepare(settings, start, resume=False)))

    i2l = ("init.method=i2l", "init.i2l.weights=demo/i2l", "init.i2l.encoders=demo/encoders")
    assert made in said(f"model.base={later}", *i2l)
    assert made not in said(*i2l) and made not in said(f"model.base={later}")
    assert overflows in said("model.dtype=fp16") and overflows not in said("model.dtype=bf16")
