"""Every configuration that is shipped loads."""

from pathlib import Path

import pytest
import tomli
import torch
from diffusers import QwenImageTransformer2DModel

import initializers
from initializers.i2l.training.train import HypernetworkConfig
from trainer import config
from trainer.adapter import RunFacts
from trainer.hardware import memory
from trainer.plan import RunConfig, load_config

CONFIGS = Path(__file__).parents[1] / "configs"
ALL = sorted(CONFIGS.rglob("*.toml"))


def of_a_hypernetwork(path: Path) -> bool:
    return "expert" in tomli.loads(path.read_text())


def load(path: Path, *overrides: str) -> object:
    if of_a_hypernetwork(path):
        return config.load(HypernetworkConfig, path, overrides)
    return load_config(path, [*overrides], initializers)[0]


def test_there_are_configurations_of_both_kinds() -> None:
    assert {path.name for path in ALL} >= {"creatures.toml", "qwen_image.toml", "i2l_creatures_style.toml"}
    assert {of_a_hypernetwork(path) for path in ALL} == {True, False}


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place where nothing is but the folders that a configuration names: pictures and models may not be made yet."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_folders(path: Path) -> None:
    table = tomli.loads(path.read_text())
    Path(table["data"]["images"]).mkdir(parents=True)
    if table["model"]["base"].startswith("demo/"):
        for part in ("transformer", "vae", "text_encoder", "tokenizer"):
            (Path(table["model"]["base"]) / part).mkdir(parents=True, exist_ok=True)


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_it_loads_and_says_what_the_file_says(path: Path, elsewhere: Path) -> None:
    make_folders(path)
    loaded = config.to_dict(load(path))
    table = tomli.loads(path.read_text())
    for section, values in table.items():
        if isinstance(values, list):  # of tables
            for number, own in enumerate(values):
                assert own.items() <= loaded[section][number].items()
            continue
        if not isinstance(values, dict):
            assert loaded[section] == values
            continue
        for name, value in values.items():
            if not isinstance(value, dict):  # [init.i2l] is the initializer's
                assert loaded[section][name] == value


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_a_misspelt_key_in_any_table_is_found(path: Path, elsewhere: Path) -> None:
    make_folders(path)
    tables = [name for name, value in tomli.loads(path.read_text()).items() if isinstance(value, dict)]
    assert len(tables) >= 6
    for table in tables:
        with pytest.raises(config.ConfigError) as caught:
            load(path, f"{table}.no_such_key=1")
        (problem,) = caught.value.problems
        assert "no_such_key: unknown key" in problem


@pytest.mark.parametrize("path", [path for path in ALL if not of_a_hypernetwork(path)], ids=lambda path: path.stem)
def test_each_initializer_can_be_chosen_instead(path: Path, elsewhere: Path) -> None:
    make_folders(path)
    for name in initializers.names():
        run, start = load_config(path, [f"init.method={name}"], initializers)
        assert isinstance(run, RunConfig) and start.method == run.init.method == name
        assert isinstance(start.options, initializers.config_class(name))


def test_outputs_do_not_collide(elsewhere: Path) -> None:
    outputs = [tomli.loads(path.read_text())["output"] for path in ALL]
    assert len({*outputs}) == len(outputs)
    assert all(output.startswith("outputs/") for output in outputs)


@pytest.mark.parametrize("vram", [80, 24, 16, 12])
def test_the_configurations_for_a_card_fit_it_by_estimate(vram: int, elsewhere: Path) -> None:
    path = CONFIGS / f"qwen_image_{vram}gb.toml"
    make_folders(path)
    run, start = load_config(path, [], initializers)
    with torch.device("meta"):
        transformer = QwenImageTransformer2DModel()  # its defaults are the published shape
    facts = RunFacts(tuple(Path(f"{number}.png") for number in range(20)), run.adapter, can_try=True)
    needs = memory.estimate(
        memory.Request(
            transformer=transformer,
            model=run.model,
            adapter=run.adapter,
            train=run.train,
            pixels=run.data.resolution**2,
            start=start.work(facts),
        )
    )
    assert needs.peak < memory.usable(vram)
    text = path.read_text()
    for name in ("training", "decoding samples"):
        assert f"{needs.stage(name).num_bytes / 1e9:.1f} GB while {name}" in text
