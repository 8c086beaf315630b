"""The hypernetwork trainer: each sample its own LoRA, honest pairs, exact resume, files that the initializer reads."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import train as train_program
from demo import painter, vision
from initializers.i2l import layout, train
from initializers.i2l.batch_lora import BatchLora
from initializers.i2l.expert import Expert
from trainer import adapter, config, flow, qwen_image
from trainer.adapter import AdapterConfig, AdapterWeights, Seed
from trainer.lowrank import LowRank

NUM_SUBJECTS = 8


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("subjects")
    lines = []
    for index in range(NUM_SUBJECTS):
        for number in range(3):
            where = painter.scene(100 + 3 * index + number)
            name = f"{index}-{number}.png"
            Image.fromarray(painter.paint(painter.identity("hyper", index), where)).save(folder / name)
            lines.append(json.dumps({"file_name": name, "text": painter.caption(where), "subject": f"s{index}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders")
    vision.save_encoders(*vision.new_encoders(), folder)
    return folder


@pytest.fixture
def toml(tmp_path: Path, tiny_base: Path, subjects: Path, start: Path) -> Path:
    path = tmp_path / "style.toml"
    path.write_text(
        f"""
output = "{tmp_path / "out"}"
[model]
base = "{tiny_base}"
dtype = "fp32"
[data]
images = "{subjects}"
resolution = 64
held_out_subjects = 3
cache = "{tmp_path / "cache"}"
[expert]
encoders = "{start}"
train_encoders = true
compress = 8
[train]
steps = 4
batch_size = 3
learning_rate = 1e-2
[validation]
every = 2
prompts = ["a big creature in the middle, in a meadow"]
num_inference_steps = 2
[checkpoint]
every = 2
"""
    )
    return path


def test_each_sample_gets_its_own_lora_as_peft_would_apply_it(tiny_base: Path) -> None:
    model = qwen_image.ModelConfig(base=str(tiny_base), dtype="fp32")
    transformer = qwen_image.load_transformer(model, torch.device("cpu"))
    expert = Expert(layout.Geometry(num_blocks=2, hidden_size=64, embedding_size=6, compress=4, rank=2))
    random = flow.generator("test")
    with torch.no_grad():
        for weight in expert.parameters():
            weight.copy_(torch.randn(weight.shape, generator=random) * 0.4)
    factors = {name: (a.detach(), b.detach()) for name, (a, b) in expert(torch.randn(3, 6, generator=random)).items()}
    latents = torch.randn(3, 16, 1, 8, 8, generator=random)
    sigmas, embeds = torch.tensor([0.2, 0.5, 0.9]), torch.randn(3, 7, 64, generator=random)
    lora = BatchLora(transformer, factors)
    with torch.no_grad():
        plain = qwen_image.predict_velocity(transformer, latents, sigmas, embeds, None)
        with lora.applied(factors):
            together = qwen_image.predict_velocity(transformer, latents, sigmas, embeds, None)
        assert torch.equal(plain, qwen_image.predict_velocity(transformer, latents, sigmas, embeds, None))
        for i in range(3):
            alone = qwen_image.load_transformer(model, torch.device("cpu"))
            settings = AdapterConfig(rank=2)
            adapter.inject(alone, settings)
            weights = AdapterWeights({name: LowRank(a[i], b[i]) for name, (a, b) in factors.items()})
            assert adapter.apply_seed(alone, Seed(weights, {}), settings, random_seed=0)["seeded"] == 24
            expected = qwen_image.predict_velocity(
                alone, latents[i : i + 1], sigmas[i : i + 1], embeds[i : i + 1], None
            )
            assert (expected - plain[i : i + 1]).abs().max() > 0.01
            torch.testing.assert_close(together[i : i + 1], expected, rtol=1e-4, atol=1e-4)


def run(toml: Path, *overrides: str, resume: bool = False) -> Path:
    return train.execute(train.load(toml, list(overrides)), resume=resume, quiet=True)


def test_training_moves_the_expert_and_writes_what_the_initializer_reads(
    toml: Path, tmp_path: Path, run_toml: Path, start: Path
) -> None:
    output = run(toml)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    first, last = (next(line for line in lines if line["step"] == step and "val_loss" in line) for step in (0, 4))
    assert first["val_loss"] == first["val_loss_wrong_picture"] == first["val_loss_no_lora"]  # b is zero at the start
    assert last["val_loss"] != last["val_loss_wrong_picture"] != last["val_loss_no_lora"]
    assert last["val_loss_no_lora"] == pytest.approx(first["val_loss_no_lora"])
    assert Image.open(output / "samples" / "step-000004-0.png").width > 300
    for part in ("SigLIP2-G384", "DINOv3-7B"):
        before, after = (load_file(folder / part / "model.safetensors") for folder in (start, output / "encoders"))
        assert before.keys() == after.keys()
        assert any(not torch.equal(before[name], after[name]) for name in before)
    options = [f"init.i2l.weights={output}", f"init.i2l.encoders={output / 'encoders'}", "train.steps=1"]
    arguments = ["--output", str(tmp_path / "lora"), *(part for option in options for part in ("--set", option))]
    assert train_program.main(["--config", str(run_toml), "--init", "i2l", "--quiet", *arguments]) == 0
    report = json.loads((tmp_path / "lora" / "run.json").read_text())
    assert report["status"] == "finished" and report["init"]["applied"]["seeded"] >= 20


def test_resume_is_exact(toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(toml, f"output={tmp_path / 'whole'}")
    loss = train.HypernetworkObjective.loss

    def failing(self: train.HypernetworkObjective, step: int, micro_step: int) -> object:
        if step == 3:
            raise KeyboardInterrupt
        return loss(self, step, micro_step)

    with monkeypatch.context() as patch:
        patch.setattr(train.HypernetworkObjective, "loss", failing)
        with pytest.raises(KeyboardInterrupt):
            run(toml, f"output={tmp_path / 'parts'}")
    parts = run(toml, f"output={tmp_path / 'parts'}", resume=True)
    name = "Qwen-Image-i2L-Style.safetensors"
    assert (whole / name).read_bytes() == (parts / name).read_bytes()


def test_pairs_are_two_pictures_of_one_training_subject(toml: Path) -> None:
    settings = train.load(toml, [])
    data = train.PairData(settings, train.read_subjects(settings, resume=False), torch.device("cpu"), quiet=True)
    subject = {row: number for number, rows in enumerate([*data.train, *data.held_out]) for row in rows}
    assert len(data.train) == NUM_SUBJECTS - 3 and len(data.held_out) == 3 and len(subject) == 3 * NUM_SUBJECTS
    seen = set()
    for step in range(40):
        pairs = data.pairs(4, flow.generator(step))
        for reference, target in zip(pairs.references.tolist(), pairs.targets.tolist(), strict=True):
            assert reference != target and subject[reference] == subject[target] < len(data.train)
            seen.add(subject[reference])
    assert seen == set(range(len(data.train)))


def test_frozen_encoders_embed_each_picture_once(toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = run(toml, "expert.train_encoders=false", "train.steps=2")
    assert not (output / "encoders").exists()
    monkeypatch.setattr(train.encoders, "encode_pictures", lambda *_: pytest.fail("embedded again"))
    again = run(toml, "expert.train_encoders=false", "train.steps=2", f"output={tmp_path / 'again'}")
    name = "Qwen-Image-i2L-Style.safetensors"
    assert (output / name).read_bytes() == (again / name).read_bytes()


def test_all_problems_of_the_data_at_once(toml: Path, tmp_path: Path, subjects: Path) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    rows = [json.loads(line) for line in (subjects / "metadata.jsonl").read_text().splitlines()][:5]
    for row in rows:
        (folder / row["file_name"]).write_bytes((subjects / row["file_name"]).read_bytes())
    Image.fromarray(np.zeros((64, 80, 3), np.uint8)).save(folder / rows[0]["file_name"])
    del rows[1]["subject"]
    rows[4]["subject"] = "alone"
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(config.ConfigError) as caught:
        train.read_subjects(train.load(toml, [f"data.images={folder}"]), resume=True)
    text = str(caught.value)
    for part in ("holds no run", "0-1.png has no subject", '"alone" has one picture', "squares of one size"):
        assert part in text, part


def test_an_output_with_a_run_is_refused(toml: Path) -> None:
    output = run(toml, "train.steps=1", "validation.prompts=[]")
    with pytest.raises(config.ConfigError, match=r"already holds a run.*--resume"):
        run(toml)
    assert output.exists()
