"""A flipped byte, or the last third cut off, in every kind of file that the program reads."""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import train
from tests.data.made import flipped
from tests.faults.table import Fault
from tests.faults.world import I2L, MERGE, RANDOM, Outcome, adapter, output_of, patched, run, say
from tests.helpers import BAD_INPUT, FINISHED
from trainer.compare import __main__ as compare

KIND = "damage"
UNSEEN = "not seen: the format has no checksum"
UNSEEN_TEXT = "not seen: a text has no checksum, and may be any"
_QUICK = ("validation.prompts=[]", "validation.every=1000")


def cut(data: bytes) -> bytes:
    return data[: 2 * len(data) // 3]


def flip(data: bytes) -> bytes:
    return flipped(data)


def flip_header(data: bytes) -> bytes:
    """In the names and shapes of a safetensors file."""
    return data[:20] + bytes([data[20] ^ 255]) + data[21:]


def flip_number(data: bytes) -> bytes:
    """In the tensors of a safetensors file: the last digits of one number."""
    start = 8 + int.from_bytes(data[:8], "little")
    at = start + (len(data) - start) // 2 // 8 * 8
    return data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :]


WAYS: dict[str, Callable[[bytes], bytes]] = {
    "cut short": cut,
    "a flipped byte": flip,
    "a flipped byte in the header": flip_header,
    "a flipped byte in a number": flip_number,
}


def spoil(pattern: str, way: str) -> None:
    """Damage the first file of that name under the current folder."""
    path = sorted(Path().glob(pattern))[0]
    path.write_bytes(WAYS[way](path.read_bytes()))


# --- what is run with the damaged file --------------------------------------------------------------------


def anew() -> Outcome:
    """Another run, with the cache of the first."""
    return run(RANDOM, "output=new", "data.cache=out/cache", *_QUICK)


def anew_i2l() -> Outcome:
    return run(I2L, "output=new", "data.cache=out-i2l/cache", *_QUICK)


def from_adapter() -> Outcome:
    return run(RANDOM, "output=new", "data.cache=out/cache", "init.method=out/adapter", *_QUICK)


def same_again(toml: str) -> Outcome:
    """The same run once more with its cache: it must end with the same bytes, whatever was damaged."""
    output = output_of(toml)
    done = run(toml, "output=new", f"data.cache={output}/cache")
    if done.code == FINISHED:
        assert adapter(Path("new")) == Path(toml).with_suffix(".done").read_bytes()
    return done


def resume(toml: str, *settings: str) -> Outcome:
    """If it ends, then with the bytes of the run that nothing happened to."""
    done = run(toml, *settings, resume=True)
    if done.code == FINISHED:
        assert adapter(output_of(toml)) == Path(toml).with_suffix(".done").read_bytes()
    return done


def resume_from_the_one_before() -> Outcome:
    """What the message says is done: the checkpoint is deleted, and the one before it ends the run."""
    done = resume(RANDOM)
    assert done.code == BAD_INPUT, done
    assert "Delete the folder out/checkpoints/step-00000002" in done.message, done
    shutil.rmtree("out/checkpoints/step-00000002")
    assert resume(RANDOM).code == FINISHED
    return done


def resume_without() -> Outcome:
    """The curve is whole but for the line that was damaged."""
    done = resume(RANDOM)
    steps = [json.loads(line)["step"] for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert set(steps) >= {0, 1}, steps
    return done


def longer() -> Outcome:
    """One more step, so that the contact sheet is drawn again."""
    return run(RANDOM, "train.steps=3", resume=True)


_COMPARE = ("--config", RANDOM, "--output", "compared", "--compare", "random", "gaussian", "--seeds", "1", "--quiet")


def compared(pattern: str, way: str) -> Outcome:
    """A comparison whose file is damaged, given again."""
    arguments = [*_COMPARE, "--learning-rates", "1e-3", "--set", "validation.prompts=[]"]
    assert say(*arguments).code == FINISHED
    before = _curves()
    spoil(pattern, way)
    if pattern.endswith("report.json"):
        with patched(train, "main", compare.main):
            return say("report", "compared")
    done = say(*arguments)
    assert done.code != FINISHED or _curves() == before
    return done


def _curves() -> list[list[float]]:
    runs = json.loads(Path("compared/report.json").read_text())["runs"]
    return [[point["val_loss"] for point in run["curve"]] for run in runs]


def metadata(way: str) -> Outcome:
    """Captions in metadata.jsonl instead of text files."""
    rows = []
    for path in sorted(Path("pictures").glob("*.txt")):
        rows.append(json.dumps({"file_name": f"{path.stem}.png", "text": path.read_text()}) + "\n")
        path.unlink()
    Path("pictures/metadata.jsonl").write_bytes(WAYS[way]("".join(rows).encode()))
    return anew()


def _do(pattern: str, way: str, then: Callable[[], Outcome]) -> Outcome:
    spoil(pattern, way)
    return then()


_CUT, _FLIP, _HEADER, _NUMBER = WAYS
_BOTH, _WEIGHTS = (_CUT, _FLIP), (_CUT, _HEADER)
_AGAIN = functools.partial(same_again, RANDOM)
_AGAIN_I2L = functools.partial(same_again, I2L)
_Row = tuple[str, str, tuple[str, ...], Callable[[], Outcome], int, str]
ROWS: list[_Row] = [
    ("a picture", "pictures/1.png", _BOTH, anew, BAD_INPUT, "pictures/1.png: is damaged"),
    ("a caption", "pictures/1.txt", (_FLIP,), anew, BAD_INPUT, "pictures/1.txt: is not UTF-8"),
    ("a caption of a run that goes on", "pictures/[1-4].txt", (_CUT,), functools.partial(resume, RANDOM), BAD_INPUT,
     "1 captions have changed"),
    ("the transformer's weights", "model/transformer/*.safetensors", _WEIGHTS, anew, BAD_INPUT, "model/transformer/"),
    ("the transformer's configuration", "model/transformer/config.json", _BOTH, anew, BAD_INPUT,
     "model/transformer/config.json"),
    ("the VAE's weights", "model/vae/*.safetensors", _WEIGHTS, anew, BAD_INPUT, "model/vae/"),
    ("the VAE's configuration", "model/vae/config.json", _BOTH, anew, BAD_INPUT, "model/vae/config.json"),
    ("the text encoder's weights", "model/text_encoder/*.safetensors", _WEIGHTS, anew, BAD_INPUT,
     "model/text_encoder/"),
    ("the text encoder's configuration", "model/text_encoder/config.json", _BOTH, anew, BAD_INPUT,
     "model/text_encoder/config.json"),
    ("the tokenizer", "model/tokenizer/tokenizer.json", _BOTH, anew, BAD_INPUT, "model/tokenizer"),
    ("the tokenizer's configuration", "model/tokenizer/tokenizer_config.json", _BOTH, anew, BAD_INPUT,
     "model/tokenizer"),
    ("the scheduler's configuration", "model/scheduler/*.json", _BOTH,
     functools.partial(run, RANDOM, "output=new", "data.cache=out/cache"), BAD_INPUT, "model/scheduler"),
    ("an expert of i2L", "i2l/*Style*", _WEIGHTS, anew_i2l, BAD_INPUT, "i2l/Qwen-Image-i2L-Style.safetensors"),
    ("Bias of i2L", "i2l/*Bias*", _WEIGHTS, anew_i2l, BAD_INPUT, "i2l/Qwen-Image-i2L-Bias.safetensors"),
    ("an image encoder's weights", "encoders/SigLIP2-G384/*.safetensors", _WEIGHTS, anew_i2l, BAD_INPUT,
     "encoders/SigLIP2-G384/model.safetensors"),
    ("an image encoder's configuration", "encoders/DINOv3-7B/config.json", _BOTH, anew_i2l, BAD_INPUT,
     "encoders/DINOv3-7B/config.json"),
    ("a LoRA to start from", "out/adapter/adapter_model.safetensors", _WEIGHTS, from_adapter, BAD_INPUT,
     "out/adapter/adapter_model.safetensors"),
    ("its configuration", "out/adapter/adapter_config.json", _BOTH, from_adapter, BAD_INPUT, "out/adapter"),
    ("a shard of the cache", "out/cache/*.safetensors", (_CUT, _HEADER, _NUMBER), _AGAIN, FINISHED,
     "is damaged"),
    ("a prediction of i2L in the cache", "out-i2l/cache/i2l/style-*", (_CUT, _HEADER, _NUMBER), _AGAIN_I2L, FINISHED,
     "is damaged"),
    ("trainable.safetensors of a checkpoint", "out/checkpoints/step-00000002/trainable.safetensors",
     (_CUT, _HEADER, _NUMBER), resume_from_the_one_before, BAD_INPUT, "trainable.safetensors"),
    ("optimizer.safetensors of a checkpoint", "out/checkpoints/step-00000002/optimizer.safetensors",
     (_CUT, _HEADER, _NUMBER), resume_from_the_one_before, BAD_INPUT, "optimizer.safetensors"),
    ("state.json of a checkpoint", "out/checkpoints/step-00000002/state.json", _BOTH, resume_from_the_one_before,
     BAD_INPUT, "state.json"),
    ("frozen.safetensors of a run", "out-merge/frozen.safetensors", (_CUT, _HEADER, _NUMBER),
     functools.partial(resume, MERGE), BAD_INPUT, "out-merge/frozen.safetensors"),
    ("run.json of a run", "out/run.json", _BOTH, functools.partial(resume, RANDOM), BAD_INPUT, "out/run.json"),
    ("metrics.jsonl of a run", "out/metrics.jsonl", _BOTH, resume_without, FINISHED, ""),
    ("a sample of a run", "out/samples/step-000000-0.png", _BOTH, longer, FINISHED, "step-000000-0.png"),
]  # fmt: skip
UNSEEN_ROWS: list[tuple[str, str, Callable[[], Outcome]]] = [
    ("the transformer's weights", "model/transformer/*.safetensors", anew),
    ("the VAE's weights", "model/vae/*.safetensors", anew),
    ("the text encoder's weights", "model/text_encoder/*.safetensors", anew),
    ("an expert of i2L", "i2l/*Style*", anew_i2l),
    ("Bias of i2L", "i2l/*Bias*", anew_i2l),
    ("an image encoder's weights", "encoders/SigLIP2-G384/*.safetensors", anew_i2l),
    ("a LoRA to start from", "out/adapter/adapter_model.safetensors", from_adapter),
]  # fmt: skip
LOST = {"checkpoint": "the steps since the checkpoint before it", "metrics": "the damaged line of the curve"}


def _fault(what: str, do: Callable[[], Outcome], code: int, says: str, *, slow: bool = False) -> Fault:
    lost = next((lost for word, lost in LOST.items() if word in what), "nothing")
    return Fault(KIND, what, do, code, says, lost, slow=slow)


FAULTS = [
    *(
        _fault(f"{what}, {way}", functools.partial(_do, pattern, way, then), code, says)
        for what, pattern, ways, then, code, says in ROWS
        for way in ways
    ),
    Fault(KIND, "a caption of a new run, cut short", functools.partial(_do, "pictures/1.txt", _CUT, anew), FINISHED, "",
          UNSEEN_TEXT),
    *(_fault(f"metadata.jsonl, {way}", functools.partial(metadata, way), BAD_INPUT, "line") for way in _BOTH),
    *(
        _fault(f"{name} of a comparison, {way}", functools.partial(compared, f"compared/{pattern}", way), code, says,
               slow=True)
        for name, pattern, code, says in (
            ("result.json", "runs/*/random/*/result.json", FINISHED, "result.json"),
            ("init.json", "runs/*/random/init.json", FINISHED, ""),  # the runs are done, and need it no more
            ("report.json", "report.json", BAD_INPUT, "report.json"),
        )
        for way in _BOTH
    ),
    *(
        Fault(KIND, f"{what}, {_NUMBER}", functools.partial(_do, pattern, _NUMBER, then), FINISHED, "", UNSEEN,
              slow=True)
        for what, pattern, then in UNSEEN_ROWS
    ),
]  # fmt: skip
