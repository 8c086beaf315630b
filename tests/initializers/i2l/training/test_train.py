"""The hypernetwork trainer: each sample its own LoRA, honest pairs, exact resume, files that the initializer reads."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import train as train_program
from demo import painter, vision
from initializers.i2l import layout
from initializers.i2l.expert import Expert, Factors, read_geometry
from initializers.i2l.training import train
from initializers.i2l.training.batch_lora import BatchLora
from initializers.i2l.training.hypernetwork import ExpertConfig, Hypernetwork
from initializers.i2l.training.subjects import Encoding, SubjectData
from trainer import adapter, config, flow, qwen_image
from trainer.adapter import AdapterConfig, AdapterWeights, Seed
from trainer.checkpoint import CheckpointError
from trainer.data.cache import Cache
from trainer.formats import read_lora
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
    return write_toml(tmp_path, tiny_base, subjects, start)


def write_toml(folder: Path, tiny_base: Path, subjects: Path, start: Path) -> Path:
    """The configuration of a small training of Style, whose files lie in `folder`."""
    path = folder / "style.toml"
    path.write_text(
        f"""
output = "{folder / "out"}"
[model]
base = "{tiny_base}"
dtype = "fp32"
[data]
images = "{subjects}"
resolution = 64
held_out_subjects = 3
cache = "{folder / "cache"}"
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
            assert adapter.apply_seed(alone, Seed(weights, {}), random_seed=0)["seeded"] == 24
            expected = qwen_image.predict_velocity(
                alone, latents[i : i + 1], sigmas[i : i + 1], embeds[i : i + 1], None
            )
            assert (expected - plain[i : i + 1]).abs().max() > 0.01
            torch.testing.assert_close(together[i : i + 1], expected, rtol=1e-4, atol=1e-4)


def test_blocks_that_are_computed_again_have_the_loras_of_their_forward_pass(tiny_base: Path) -> None:
    """Two losses with other LoRAs and one without, then passes that need no gradient, then one backward pass for all:
    gradients are those without gradient checkpointing, and afterwards nothing is applied."""
    model, random = qwen_image.ModelConfig(base=str(tiny_base), dtype="fp32"), flow.generator("test")
    shapes = layout.module_shapes(layout.Geometry(num_blocks=2, hidden_size=64))
    values = [
        {name: (torch.randn(3, 2, i, generator=random) * 0.1, torch.randn(3, o, 2, generator=random) * 0.1)
         for name, (i, o) in shapes.items()} for _ in range(2)
    ]  # fmt: skip
    latents = torch.randn(3, 16, 1, 8, 8, generator=random)
    sigmas, embeds = torch.tensor([0.2, 0.5, 0.9]), torch.randn(3, 7, 64, generator=random)
    gradients = []
    for checkpointing in (False, True):
        transformer = qwen_image.load_transformer(model, torch.device("cpu"))
        qwen_image.set_up(transformer, model, gradient_checkpointing=checkpointing)
        lora = BatchLora(transformer, shapes)
        noisy = latents.clone().requires_grad_()
        first, second = (
            {name: (a.clone().requires_grad_(), b.clone().requires_grad_()) for name, (a, b) in part.items()}
            for part in values
        )

        def velocity(
            factors: dict[str, Factors], noisy: torch.Tensor = noisy, lora: BatchLora = lora, model: Any = transformer
        ) -> torch.Tensor:
            with lora.applied(factors):
                return qwen_image.predict_velocity(model, noisy, sigmas, embeds, None)

        losses = [velocity(factors).square().mean() for factors in (first, second, {})]
        with torch.no_grad():
            plain = velocity({})
            assert (velocity(second) - plain).abs().max() > 0.01
        with lora.applied(first):  # wherever the backward pass comes
            torch.stack(losses).sum().backward()
        with torch.no_grad():
            assert torch.equal(qwen_image.predict_velocity(transformer, noisy, sigmas, embeds, None), plain)
        found = {f"{name} {number} {k}": pair[k].grad for number, part in enumerate((first, second))
                 for name, pair in part.items() for k in (0, 1)}  # fmt: skip
        gradients.append({**found, "latents": noisy.grad})
    for name, expected in gradients[0].items():
        assert (expected is None) == (gradients[1][name] is None), name
        if expected is not None:
            torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=1e-7, msg=name)
    assert sum(gradient is not None for gradient in gradients[0].values()) > 80


def load(toml: Path, overrides: list[str]) -> train.HypernetworkConfig:
    return config.load(train.HypernetworkConfig, toml, overrides)


def run(toml: Path, *overrides: str, resume: bool = False) -> Path:
    return train.execute(load(toml, list(overrides)), resume=resume, quiet=True)


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


@pytest.mark.slow
def test_a_training_with_gradient_checkpointing_is_the_same(toml: Path, tmp_path: Path) -> None:
    """With validations and samples between the steps, and several backward passes in each."""
    curves = []
    for value in ("false", "true"):
        options = ("train.gradient_accumulation_steps=2", f"train.gradient_checkpointing={value}")
        output = run(toml, f"output={tmp_path / value}", *options)
        curves.append([json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()])
    names = {"loss", "grad_norm", "val_loss", "val_loss_wrong_picture", "val_loss_no_lora"}
    assert names == names & {name for line in curves[0] for name in line} and len(curves[0]) == len(curves[1])
    for plain, checkpointed in zip(*curves, strict=True):
        for name in names & plain.keys():
            assert checkpointed[name] == pytest.approx(plain[name], rel=1e-5), (name, plain["step"])


def subject_data(toml: Path, *overrides: str) -> SubjectData:
    settings = load(toml, [*overrides])
    cache, device = Cache(Path(settings.data.cache or "")), torch.device("cpu")
    encoding = Encoding(settings.model, None, resolutions=(), cache=cache, device=device, quiet=True)
    return SubjectData(settings.data, train.prepare(settings, resume=False), encoding, seed=0)


@pytest.mark.parametrize("max_references", [1, 2])
def test_pairs_are_different_pictures_of_one_training_subject(toml: Path, max_references: int) -> None:
    data = subject_data(toml, f"data.max_references={max_references}")
    subject = {row: number for number, rows in enumerate([*data.train, *data.held_out]) for row in rows}
    assert len(data.train) == NUM_SUBJECTS - 3 and len(data.held_out) == 3 and len(subject) == 3 * NUM_SUBJECTS
    seen, counts = set(), set()
    for step in range(40):
        pairs = data.pairs(4, flow.generator(step))
        counts.add(pairs.references.shape[1])
        for references, target in zip(pairs.references.tolist(), pairs.targets.tolist(), strict=True):
            assert target not in references and len(set(references)) == len(references)
            assert {subject[row] for row in references} == {subject[target]} and subject[target] < len(data.train)
            seen.add(subject[target])
    assert seen == set(range(len(data.train))) and counts == set(range(1, max_references + 1))


def test_only_the_first_pictures_of_a_subject_are_references_where_that_is_asked(toml: Path) -> None:
    """And they are all that is looked at."""
    data = subject_data(toml, "data.references_each=1")
    first = {row: {*rows} for rows in data.train for row in rows[:1]}
    targets = set()
    for step in range(60):
        pairs = data.pairs(4, flow.generator(step))
        for (reference,), target in zip(pairs.references.tolist(), pairs.targets.tolist(), strict=True):
            assert target in first[reference] and target != reference
            targets.add(target)
        references, residuals = data.references(pairs.references)
        expected = [np.asarray(Image.open(data.examples[row].path)) for (row,) in pairs.references.tolist()]
        assert np.array_equal(references[:, 0].permute(0, 2, 3, 1).numpy(), np.stack(expected)) and not residuals
    assert len(targets) == 2 * len(data.train)
    with pytest.raises(KeyError):
        data.references(torch.tensor([[data.train[0][1]]]))


def test_a_target_leaves_as_many_references_as_are_drawn(toml: Path) -> None:
    """Two of three pictures may be references: where both are, the third is the target."""
    data = subject_data(toml, "data.references_each=2", "data.max_references=2")
    counts = set()
    for step in range(40):
        pairs = data.pairs(4, flow.generator(step))
        counts.add(pairs.references.shape[1])
        for references, target in zip(pairs.references.tolist(), pairs.targets.tolist(), strict=True):
            assert target not in references
            data.references(torch.tensor([references]))
    assert counts == {1, 2}


def test_some_references_are_of_other_subjects_where_that_is_asked(toml: Path) -> None:
    data = subject_data(toml)
    subject = {row: number for number, rows in enumerate(data.train) for row in rows}
    strange = 0
    for step in range(50):
        pairs = data.pairs(4, flow.generator(step), other_subjects=0.5)
        for (reference,), target in zip(pairs.references.tolist(), pairs.targets.tolist(), strict=True):
            strange += subject[reference] != subject[target]
            assert reference != target
    assert 60 < strange < 140


def test_without_subjects_a_picture_is_its_own_reference(toml: Path, tmp_path: Path, subjects: Path) -> None:
    folder = tmp_path / "alone"
    folder.mkdir()
    for path in sorted(subjects.glob("*.png"))[:6]:
        (folder / path.name).write_bytes(path.read_bytes())
        (folder / f"{path.stem}.txt").write_text("a creature")
    data = subject_data(toml, f"data.images={folder}")
    assert len(data.train) == 3 and len(data.held_out) == 3
    for step in range(10):
        pairs = data.pairs(3, flow.generator(step))
        assert pairs.references[:, 0].tolist() == pairs.targets.tolist()


def test_an_expert_is_averaged_over_references(start: Path) -> None:
    settings = ExpertConfig(encoders=str(start), compress=4, rank=2)
    network = Hypernetwork(settings, layout.Geometry(num_blocks=1, hidden_size=8, embedding_size=6, compress=4, rank=2))
    random = flow.generator("test")
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(torch.randn(weight.shape, generator=random))
        references = torch.randn(3, 2, 6, generator=random)  # B K D
        together = network(references, {})
        single = [network(references[:, i : i + 1], {}) for i in range(2)]
    for name, (a, b) in together.items():
        assert a.shape[1] == b.shape[2] == 4
        mean = sum(part[name][1] @ part[name][0] for part in single) / 2
        torch.testing.assert_close(b @ a, mean, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_all_four_experts_one_after_another(
    toml: Path, tmp_path: Path, run_toml: Path, start: Path, subjects: Path
) -> None:
    """Style, Coarse, Fine on Coarse, Bias on both; each learns alone; the initializer reads what they leave."""
    files = {kind: layout.PUBLISHED[kind].file for kind in ("style", "coarse", "fine")}
    weights = tmp_path / "weights"
    weights.mkdir()
    few = tmp_path / "few"  # Fine's pictures are large
    few.mkdir()
    rows = [json.loads(line) for line in (subjects / "metadata.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["file_name"][0] in "0123" and row["file_name"][2] in "01"]
    for row in rows:
        (few / row["file_name"]).write_bytes((subjects / row["file_name"]).read_bytes())
    (few / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    for kind in ("style", "coarse", "fine", "bias"):
        options = [f"expert.kind={kind}", f"expert.weights={weights}", "expert.train_encoders=false"]
        options += ["expert.residual_compress=3", f"data.images={few}", "data.held_out_subjects=2", "train.steps=2"]
        options += ["data.references_each=1", *(["validation.prompts=[]"] if kind in ("style", "coarse") else [])]
        output = run(toml, f"output={tmp_path / kind}", *options)
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        first, last = [line for line in lines if "val_loss" in line]
        assert last["val_loss"] != first["val_loss"]
        if kind in ("fine", "bias"):
            assert first["val_loss"] == pytest.approx(first["val_loss_frozen_only"], rel=1e-5)
            assert last["val_loss_frozen_only"] == first["val_loss_frozen_only"]
            assert first["val_loss_frozen_only"] != first["val_loss_no_lora"]
        else:
            assert first["val_loss"] == first["val_loss_no_lora"]
        (name,) = [path.name for path in output.glob("Qwen-Image-i2L-*.safetensors")]
        (weights / name).write_bytes((output / name).read_bytes())
    assert read_geometry(weights / files["fine"]).residual == layout.Residual(num_tokens=1376, compress=3, width=64)
    bias, _ = read_lora(weights / "Qwen-Image-i2L-Bias.safetensors")
    assert len(bias.factors) == 24
    assert sum(bool(x.b.any()) for x in bias.factors.values()) >= 20  # the last block's text is never looked at
    options = [f"init.i2l.weights={weights}", f"init.i2l.encoders={start}", "train.steps=1", "validation.prompts=[]"]
    arguments = ["--output", str(tmp_path / "lora"), *(part for option in options for part in ("--set", option))]
    assert train_program.main(["--config", str(run_toml), "--init", "i2l", "--quiet", *arguments]) == 0
    report = json.loads((tmp_path / "lora" / "run.json").read_text())
    assert [entry["expert"] for entry in report["init"]["experts"]] == ["coarse", "fine", "bias"]


TWO_PROCESSES = ("train.steps=3", "validation.prompts=[]", "expert.train_encoders=false")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, subjects: Path, start: Path) -> Path:
    """The output of a run with twice the batch, beside its configuration."""
    folder = tmp_path_factory.mktemp("one")
    return run(write_toml(folder, tiny_base, subjects, start), *TWO_PROCESSES, "train.batch_size=4")


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
def test_two_processes_are_one_with_twice_the_batch(fsdp: bool, one_process: Path, tmp_path: Path) -> None:
    words = [word for setting in (*TWO_PROCESSES, "train.batch_size=2") for word in ("--set", setting)]
    command = [sys.executable, "-m", "initializers.i2l", "train", "--quiet", "--output", str(tmp_path / "two"), *words]
    command += ["--config", str(one_process.parent / "style.toml")]
    # what `accelerate launch` sets on GPUs; on CPUs it would want MPI
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 20000 + fsdp)}
    if fsdp:
        environment |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    ranks = [{"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    processes = [subprocess.Popen(command, env=environment | rank, stderr=subprocess.PIPE, text=True) for rank in ranks]
    try:
        for process in processes:
            _, said = process.communicate()
            assert process.returncode == 0, said[-3000:]
    finally:
        for process in processes:
            process.kill()
    curves = [
        [line for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "loss" in line]
        for folder in (one_process, tmp_path / "two")
    ]
    assert len(curves[0]) == 3
    for single, shared in zip(*curves, strict=True):
        for name in ("loss", "grad_norm"):
            assert shared[name] == pytest.approx(single[name], rel=1e-4), name
    file = "Qwen-Image-i2L-Style.safetensors"
    assert read_geometry(tmp_path / "two" / file) == read_geometry(one_process / file)


@pytest.mark.parametrize(("kind", "parameters"), [("style", "2.406"), ("coarse", "7.927"), ("fine", "7.573")])
def test_the_plan_of_the_published_sizes(kind: str, parameters: str, subjects: Path) -> None:
    """From shapes alone, without a byte of the real weights."""
    options = [f"data.images={subjects}", "data.held_out_subjects=2"]
    settings = load(Path(f"configs/i2l_qwen_image_{kind}.toml"), options)
    text = train.plan_text(settings, train.prepare(settings, resume=False))
    assert f"{kind}: {parameters} B parameters, 720 modules, rank 4" in text
    assert "8 with 24 pictures, 2 subjects held out" in text and "20,430.4 M parameters in bf16" in text
    assert "8-bit AdamW" in text and text.count("with FSDP over 8 GPUs") == 2


def test_a_frozen_expert_that_is_not_there_is_told_before_anything_loads(toml: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(config.ConfigError, match=r"weights: .* has no Qwen-Image-i2L-Coarse.safetensors"):
        load(toml, ["expert.kind=fine", "expert.train_encoders=false", f"expert.weights={tmp_path / 'empty'}"])


def test_frozen_encoders_embed_each_picture_once(toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ["expert.train_encoders=false", "train.steps=2", "validation.prompts=[]"]
    output = run(toml, *settings)
    assert not (output / "encoders").exists()
    monkeypatch.setattr(train.encoders, "encode_squares", lambda *_: pytest.fail("embedded again"))
    again = run(toml, *settings, f"output={tmp_path / 'again'}")
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
        train.prepare(load(toml, [f"data.images={folder}", "model.compile=true"]), resume=True)
    text = str(caught.value)
    for part in (
        "[model] compile",
        "holds no run",
        "0-1.png has no subject",
        '"alone" has 1 pictures',
        "squares of one size",
    ):
        assert part in text, part


def test_a_resume_that_is_refused_changes_nothing(toml: Path) -> None:
    """run.json tells the settings to resume with; other pictures in a step are another training."""
    output = run(toml, "train.steps=1", "validation.prompts=[]")
    before = (output / "run.json").read_bytes()
    settings = load(toml, ["train.steps=1", "validation.prompts=[]"])
    saved = output / "checkpoints" / "step-00000001" / "state.json"
    saved.write_text(saved.read_text().replace('steps x processes": 1', 'steps x processes": 3'))
    with pytest.raises(CheckpointError, match="x processes is 1, the checkpoint has 3"):
        train.execute(settings, resume=True, quiet=True)
    assert (output / "run.json").read_bytes() == before


def test_an_output_with_a_run_is_refused(toml: Path) -> None:
    output = run(toml, "train.steps=1", "validation.prompts=[]")
    with pytest.raises(config.ConfigError, match=r"already holds a run.*--resume"):
        run(toml)
    assert output.exists()
