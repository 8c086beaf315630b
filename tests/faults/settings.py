"""Bad configurations: each ends with a message that names the key and what to do, before any model is loaded."""

import functools
from collections.abc import Callable
from pathlib import Path

from tests.faults.table import Fault
from tests.faults.world import Outcome, no_model_loads, say
from tests.helpers import BAD_INPUT

KIND = "a configuration"
_I2L = ("init.method=i2l", "init.i2l.weights=i2l", "init.i2l.encoders=encoders", 'init.i2l.experts=["style"]')


def _settings(*settings: str) -> Outcome:
    """A new run with these overrides."""
    return _arguments("--config", "run.toml", *_overrides("output=new", *settings))


def _overrides(*settings: str) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def _arguments(*arguments: str) -> Outcome:
    before = {str(path) for path in Path().rglob("*")}
    with no_model_loads():
        done = say("--quiet", *arguments)
    assert {str(path) for path in Path().rglob("*")} == before, "something was written"
    return done


def _toml(change: Callable[[bytes], bytes]) -> Outcome:
    """A file that was changed by hand."""
    Path("changed.toml").write_bytes(change(Path("run.toml").read_bytes()))
    return _arguments("--config", "changed.toml", *_overrides("output=new"))


def _replaced(old: str, new: str) -> Callable[[], Outcome]:
    def change(text: bytes) -> bytes:
        assert old.encode() in text
        return text.replace(old.encode(), new.encode(), 1)

    return functools.partial(_toml, change)


def _empty_folder() -> Outcome:
    Path("empty").mkdir()
    return _settings("data.images=empty")


def _without_weights() -> Outcome:
    """A folder of models without the transformer's weights. They are moved, since the user's files may not change."""
    Path("other").mkdir()
    for part in Path("model").iterdir():
        if part.name != "transformer":
            (Path("other") / part.name).symlink_to(part.absolute())
    (Path("other") / "transformer").mkdir()
    config = Path("model/transformer/config.json").read_bytes()
    (Path("other") / "transformer" / "config.json").write_bytes(config)
    return _settings("model.base=other")


OVERRIDES: list[tuple[str, tuple[str, ...], str]] = [
    # [model]
    ("no such model", ("model.base=nowhere",), "[model] base: "),
    ("a model's name that is empty", ("model.base=",), "[model] base: "),
    ("a folder that is no model", ("model.base=pictures",), "[model] base: pictures is not a Qwen-Image folder"),
    ("a number for a model", ("model.base=5",), "[model] base: must be text, not 5"),
    ("a precision that is none", ("model.dtype=fp64",), '[model] dtype: "fp64" is not one of'),
    ("fp16 without a GPU", ("model.dtype=fp16",), '[model] dtype: "fp16" needs a CUDA GPU'),
    ("a quantisation that is none", ("model.quantization=int4",), '[model] quantization: "int4" is not one of'),
    ("int8 without a GPU", ("model.quantization=int8",), '[model] quantization: "int8" needs a CUDA GPU'),
    ("fp8 without checkpointing", ("model.quantization=fp8",), "gradient_checkpointing = true"),
    ("an attention that is none", ("model.attention=flash",), '[model] attention: "flash" is not one of'),
    ("xformers without a GPU", ("model.attention=xformers",), '[model] attention: "xformers" needs a CUDA GPU'),
    ("1 for true", ("model.compile=1",), "[model] compile: must be true or false, not 1; write true"),
    # [data]
    ("no folder of pictures", ("data.images=nowhere",), "[data] images: there is no folder"),
    ("a folder's name that is empty", ("data.images=",), "[data] images must name a folder"),
    ("a file for a folder", ("data.images=run.toml",), "[data] images: there is no folder"),
    ("a resolution off the multiple", ("data.resolution=100",), "must be a multiple of 16, such as 96 or 112"),
    ("a resolution too small", ("data.resolution=8",), "[data] resolution must be at least 16"),
    ("a number in quotes", ('data.resolution="64"',), "write 64, without quotes"),
    ("the same resolution twice", ("data.resolution=[64,64]",), "[data] resolution: 64 is there twice"),
    ("a folder beside folders", ('data.folders=[{images="pictures"}]',), "[data] images: there are [[data.folders]]"),
    ("a folder named twice", ("data.images=", 'data.folders=[{images="pictures"},{images="./pictures"}]'),
     "[data] folders.1: ./pictures is the folder of folders.0, too"),
    ("a folder repeated 0 times", ("data.images=", 'data.folders=[{images="pictures",repeats=0}]'),
     "[data.folders.0] repeats = 0 of pictures: must be at least 1"),
    ("fewer than no held-out pictures", ("data.held_out=-1",), "[data] held_out must not be negative"),
    ("all pictures held out", ("data.held_out=6",), "[data] held_out = 6 leaves nothing to train on"),
    ("training pictures held out", ("data.held_out=pictures",), "[data] held_out is the same folder as images"),
    ("no folder of held-out pictures", ("data.held_out=nowhere",), "[data] held_out: there is no folder"),
    ("captions dropped too often", ("data.caption_dropout=2",), "[data] caption_dropout must be from 0 to 1"),
    ("a space before the trigger", ('data.trigger=" zorp"',), "[data] trigger must not begin or end with a space"),
    ("a special token as trigger", ('data.trigger="<|im_end|>"',), "[data] trigger: <|im_end|> is a special token"),
    ("a colour code in the caption", (r'data.default_caption="\u001b[1m"',), "[data] default_caption: "),
    ("a cache without a name", ("data.cache=",), "[data] cache must name a folder"),
    ("a file for the cache", ("data.cache=run.toml",), "[data] cache: run.toml is a file"),
    ("a cache below a file", ("data.cache=run.toml/cache",), "[data] cache: run.toml is a file"),
    ("yes for true", ("data.recursive=yes",), '[data] recursive: must be true or false, not "yes"; write true'),
    # [adapter]
    ("rank 0", ("adapter.rank=0",), "[adapter] rank must be at least 1, not 0"),
    ("half a rank", ("adapter.rank=4.5",), "[adapter] rank: must be an integer, not 4.5"),
    ("alpha 0", ("adapter.alpha=0",), "[adapter] alpha must be above 0"),
    ("everything dropped out", ("adapter.dropout=1",), "[adapter] dropout must be at least 0 and below 1"),
    ("a layer for a set of layers", ("adapter.target_modules=to_q",), 'for single module types give a list: ["to_q"]'),
    ("no layers", ("adapter.target_modules=[]",), "[adapter] target_modules must name at least one"),
    ("layers that are not there", ('adapter.target_modules=["to_z"]',), 'target_modules: "to_z" matches no module'),
    ("a layer that is no Linear", ('adapter.target_modules=["attn"]',), "which is not a Linear layer"),
    ("a rank for no layer", ("adapter.rank_pattern={x = 4}",), '[adapter] rank_pattern: there is no module "x"'),
    ("a layer's rank 0", ("adapter.rank_pattern={x = 0}",), "[adapter] rank_pattern: x must be at least 1"),
    ("DoRA on fp8", ("adapter.use_dora=true", "model.quantization=fp8"), '[adapter] use_dora: DoRA needs the base'),
    ("DoRA in other layouts", ("adapter.use_dora=true", 'export.layouts=["kohya"]'), "[export] layouts: "),
    # [init]
    ("a start that is none", ("init.method=i2k",), 'did you mean "i2l"?'),
    ("a start from no file", ("init.method=gone.safetensors",), "path: gone.safetensors: there is no such file"),
    ("a start from a text", ("init.method=run.toml",), "[init.file] path: run.toml: only .safetensors files are read"),
    ("a number for a start", ("init.method=5",), "[init] method: must be text, not 5"),
    ("a table of no start", ("init.i2k.strength=1",), "[init.i2k] "),
    ("a start from a file at strength 0", ("init.method=i2l/Qwen-Image-i2L-Bias.safetensors", "init.file.strength=0"),
     "[init.file] strength must be a finite number other than 0"),
    ("experts that are not there", (*_I2L, "init.i2l.weights=nowhere"), "[init.i2l] experts: "),
    ("encoders that are not there", (*_I2L, "init.i2l.encoders=nowhere"), "[init.i2l] encoders: "),
    ("Fine without Coarse", (*_I2L, 'init.i2l.experts=["fine"]'), "[init.i2l] experts: "),
    ("an expert that is none", (*_I2L, 'init.i2l.experts=["rough"]'), '"rough" is neither an expert'),
    ("an expert twice", (*_I2L, 'init.i2l.experts=["style", "style"]'), "experts must not name an expert twice"),
    ("a factor for no expert", (*_I2L, "init.i2l.expert_weights={cat = 1}"), 'expert_weights: "cat" is not one of'),
    ("a negative strength", (*_I2L, "init.i2l.strength=-1"), "[init.i2l] strength must be at least 0"),
    ("a strength that is a word", (*_I2L, "init.i2l.strength=high"), "[init.i2l] strength: must be a number or"),
    ("a mode that is none", (*_I2L, "init.i2l.mode=melt"), 'mode: "melt" is not one of'),
    ("more than all energy", (*_I2L, "init.i2l.energy=2"), "[init.i2l] energy must be above 0 and at most 1"),
    ("energy without effect", (*_I2L, "init.i2l.energy=0.9", "init.i2l.mode=merge"), "energy has no effect with mode"),
    ("ranks without energy", (*_I2L, "init.i2l.rank_per_module=true"), "rank_per_module has no effect without energy"),
    ("a picture that is not there", (*_I2L, 'init.i2l.pictures=["nine.png"]'), "nine.png: not among the training"),
    ("a strength tried on one picture", (*_I2L, "init.i2l.strength=auto", "init.i2l.pictures=1"), "at least two"),
    ("merge with DoRA", (*_I2L, "init.i2l.mode=merge", "adapter.use_dora=true"), "choose one"),
    # [train], [flow]
    ("no steps", ("train.steps=0",), "[train] steps must be at least 1"),
    ("steps as a float", ("train.steps=1e3",), "[train] steps: must be an integer, not 1000.0; write 1000"),
    ("empty batches", ("train.batch_size=0",), "[train] batch_size must be at least 1"),
    ("no accumulation steps", ("train.gradient_accumulation_steps=0",), "gradient_accumulation_steps must be"),
    ("no learning rate", ("train.learning_rate=0",), "[train] learning_rate must be above 0"),
    ("a learning rate of nan", ("train.learning_rate=nan",), "[train] learning_rate: must be a finite number"),
    ("a learning rate in quotes", ('train.learning_rate="1e-4"',), "write 1e-4, without quotes"),
    ("a schedule misspelt", ("train.lr_schedule=cosin",), 'did you mean "cosine"?'),
    ("a warm-up longer than the run", ("train.warmup_steps=9",), "[train] warmup_steps = 9 leaves nothing of steps"),
    ("an optimizer that is none", ("train.optimizer=adam",), '[train] optimizer: "adam" is not adamw'),
    ("a paged optimizer without a GPU", ("train.optimizer=paged_adamw8bit",), "needs a CUDA GPU"),
    ("a negative weight decay", ("train.weight_decay=-1",), "[train] weight_decay must not be negative"),
    ("a negative norm", ("train.max_grad_norm=-1",), "[train] max_grad_norm must not be negative"),
    ("a shift without its sampling", ("flow.shift=3",), "[flow] shift has no effect with sigma_sampling"),
    ("no shift for its sampling", ("flow.sigma_sampling=shift",), "[flow] shift must be above 0"),
    # [validation], [checkpoint], [export]
    ("no validation interval", ("validation.every=0",), "[validation] every must be at least 1"),
    ("a single inference step", ("validation.num_inference_steps=1",), "num_inference_steps must be at least 2"),
    ("a prompt without a list", ("validation.prompts=a cat",), '[validation] prompts: must be a list of [text, ...]'),
    ("a special token in a prompt", ('validation.prompts=["<|im_end|>"]',), "[validation] prompts: "),
    ("guidance below 1", ("validation.true_cfg_scale=0.5",), "[validation] true_cfg_scale must be at least 1"),
    ("no checkpoint interval", ("checkpoint.every=0",), "[checkpoint] every must be at least 1"),
    ("a single checkpoint", ("checkpoint.keep=1",), "[checkpoint] keep must be at least 2"),
    ("a layout that is none", ('export.layouts=["comfy"]',), '[export] layouts: "comfy" is not one of'),
    ("export at rank 0", ("export.rank=0",), "[export] rank must be at least 1, not 0"),
    ("an upload to no repository", ("export.push_to_hub=me",), '[export] push_to_hub: "me" is not a repository'),
    # the file
    ("a word for the seed", ("seed=x",), 'seed: must be an integer, not "x"'),
    ("an unknown key", ("train.stepz=5",), "[train] stepz: unknown key; did you mean steps?"),
    ("a key in the wrong table", ("data.rank=5",), "[data] rank: unknown key; did you mean [adapter] rank?"),
    ("an unknown table", ("trian.steps=5",), "trian: unknown key; did you mean train?"),
    ("an override without =", ("train.steps",), "--set train.steps: expected key=value"),
    ("an override of a table", ("train=5",), "--set train=5: train is a table"),
    ("an output without a name", ("output=",), "output must name a folder"),
    ("a file for the output", ("output=run.toml",), "output: run.toml is a file"),
    ("an output below a file", ("output=run.toml/out",), "output: run.toml is a file"),
    ("an output that is used", ("output=out",), "output: out already holds a run; continue it with --resume"),
]  # fmt: skip

COMMANDS: list[tuple[str, tuple[str, ...], str]] = [
    ("no configuration of that name", ("--config", "gone.toml"), "gone.toml: there is no such file"),
    ("a folder for a configuration", ("--config", "pictures"), "pictures: cannot be read"),
    ("no configuration", (), "--config is needed"),
    ("nothing to resume", ("--config", "run.toml", "--output", "new", "--resume"), "holds no run to resume"),
    ("--vram without --plan", ("--config", "run.toml", "--vram", "24"), "goes with --plan"),
    ("--seeds without --compare", ("--config", "run.toml", "--seeds", "2"), "--seeds: only with --compare"),
    ("--compare with --init", ("--config", "run.toml", "--compare", "random", "--init", "i2l"), "leave --init out"),
    (
        "a comparison of a start that is none",
        ("--config", "run.toml", "--output", "new", "--compare", "random", "i2k"),
        '"i2k" is neither an initializer',
    ),
    (
        "a comparison in a run's folder",
        ("--config", "run.toml", "--output", "out", "--compare", "random"),
        "out holds a run",
    ),
]
FILES: list[tuple[str, Callable[[], Outcome], str]] = [
    ("a word without quotes", _replaced('"pictures"', "pictures"), "not TOML"),
    ("a typographic quotation mark", _replaced('"pictures"', "“pictures”"), 'type " instead'),
    ("a key twice", _replaced("rank = 4", "rank = 4\nrank = 5"), "not TOML"),
    ("text in UTF-16", functools.partial(_toml, lambda text: text.decode().encode("utf-16")), "save the file as UTF-8"),
    ("no [model]", _replaced('[model]\nbase = "model"\ndtype = "fp32"\n', ""), "[model] base: is missing"),
    ("a flipped byte", functools.partial(_toml, lambda text: bytes([text[0] ^ 255]) + text[1:]), "is not UTF-8"),
    ("a file cut short", functools.partial(_toml, lambda text: text[:30]), "changed.toml, line "),
    ("no bytes", functools.partial(_toml, lambda text: b""), "[model] base: is missing"),
    ("a folder without pictures", _empty_folder, "[data] empty: there is no picture in it"),
    ("a model without weights", _without_weights, "[model] base: "),
]


def _fault(what: str, do: Callable[[], Outcome], says: str) -> Fault:
    return Fault(KIND, what, do, BAD_INPUT, says, stable=True)


FAULTS = [
    *(_fault(what, functools.partial(_settings, *settings), says) for what, settings, says in OVERRIDES),
    *(_fault(what, functools.partial(_arguments, *arguments), says) for what, arguments, says in COMMANDS),
    *(_fault(what, do, says) for what, do, says in FILES),
]
