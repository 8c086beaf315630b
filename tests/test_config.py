"""Every kind of mistake in a configuration is reported, all of them at once, each with where and what to do."""

import json
import pickle
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from trainer.config import ConfigError, apply_overrides, explain, load, parse, read_toml, to_dict
from trainer.data.pictures import DataError


@dataclass(frozen=True, kw_only=True)
class Inner:
    name: str
    """Who it is."""
    size: float | None = None


@dataclass(frozen=True, kw_only=True)
class Train:
    steps: int = 1000
    """Optimizer
    updates."""
    warmup_steps: int = 0
    learning_rate: float = 3e-4
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    compile: bool = False
    prompts: tuple[str, ...] = ()
    betas: tuple[float, float] = (0.9, 0.999)
    targets: str | tuple[str, ...] = "all"
    held_out: int | str = 0
    extra: dict[str, int] = field(default_factory=dict)
    shift: float | None = None

    def problems(self) -> list[str]:
        found = []
        if self.warmup_steps >= self.steps:
            found.append(f"warmup_steps = {self.warmup_steps} leaves nothing of steps = {self.steps}")
        if self.learning_rate <= 0:
            found.append("learning_rate must be above 0")
        return found


@dataclass(frozen=True, kw_only=True)
class Run:
    seed: int = 0
    output: Path = Path("out")
    inner: Inner
    train: Train = Train()
    maybe: Inner | None = None
    many: tuple[Inner, ...] = ()
    """Any number of them."""

    def problems(self) -> list[str]:
        return ["seed must not be negative"] if self.seed < 0 else []


def problems_of(table: dict[str, Any], cls: type = Train, where: str = "train") -> list[str]:
    problems: list[str] = []
    made = parse(cls, table, where, problems)
    assert (made is None) == bool(problems)
    return problems


def value_of(table: dict[str, Any], cls: type = Train) -> Any:
    problems: list[str] = []
    made = parse(cls, table, "", problems)
    assert problems == []
    return made


# --- what is accepted -------------------------------------------------------------------------------------


def test_an_empty_table_gives_the_defaults():
    assert value_of({}) == Train()


def test_all_types_are_read_as_declared():
    made = value_of(
        {
            "steps": 5,
            "learning_rate": 1,
            "optimizer": "adamw8bit",
            "compile": True,
            "prompts": ["a", "b"],
            "betas": [0, 0.5],
            "extra": {"a": 1},
            "shift": 2,
        }
    )
    assert made.learning_rate == 1.0 and type(made.learning_rate) is float
    assert made.shift == 2.0 and type(made.shift) is float
    assert made.prompts == ("a", "b")
    assert made.betas == (0.0, 0.5)
    assert (made.steps, made.optimizer, made.compile, made.extra) == (5, "adamw8bit", True, {"a": 1})


@pytest.mark.parametrize("value, expected", [("x", "x"), (["x", "y"], ("x", "y"))])
def test_text_or_list(value, expected):
    assert value_of({"targets": value}).targets == expected


@pytest.mark.parametrize("value", [3, "folder"])
def test_integer_or_text(value):
    assert value_of({"held_out": value}).held_out == value


def test_tables_nest():
    made = value_of(
        {
            "output": "o",
            "inner": {"name": "a"},
            "train": {"steps": 7},
            "maybe": {"name": "b"},
            "many": [{"name": "c"}, {"name": "d", "size": 1}],
        },
        Run,
    )
    assert made == Run(
        output=Path("o"),
        inner=Inner(name="a"),
        train=Train(steps=7),
        maybe=Inner(name="b"),
        many=(Inner(name="c"), Inner(name="d", size=1.0)),
    )


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "table, expected",
    [
        ({"stepz": 5}, "[train] stepz: unknown key; did you mean steps?"),
        ({"steps": "5"}, '[train] steps: must be an integer, not "5"; write 5, without quotes'),
        ({"steps": 5.0}, "[train] steps: must be an integer, not 5.0; write 5"),
        ({"steps": 5.5}, "[train] steps: must be an integer, not 5.5"),
        ({"steps": True}, "[train] steps: must be an integer, not true"),
        ({"steps": [5]}, "[train] steps: must be an integer, not [5]"),
        ({"steps": {"a": 5}}, "[train] steps: must be an integer, not a table"),
        ({"learning_rate": True}, "[train] learning_rate: must be a number, not true"),
        ({"learning_rate": "1e-4"}, '[train] learning_rate: must be a number, not "1e-4"; write 1e-4, without quotes'),
        ({"learning_rate": float("nan")}, "[train] learning_rate: must be a finite number, not nan"),
        ({"learning_rate": float("inf")}, "[train] learning_rate: must be a finite number, not inf"),
        ({"compile": 1}, "[train] compile: must be true or false, not 1; write true"),
        ({"compile": "False"}, '[train] compile: must be true or false, not "False"; write false'),
        ({"optimizer": "adam"}, '[train] optimizer: "adam" is not one of "adamw", "adamw8bit"; did you mean "adamw"?'),
        ({"optimizer": 5}, '[train] optimizer: 5 is not one of "adamw", "adamw8bit"'),
        ({"prompts": "a"}, '[train] prompts: must be a list of [text, ...], not "a"; write ["a"]'),
        ({"prompts": ["a", 1]}, '[train] prompts[1]: must be text, not 1; write "1", in quotes'),
        ({"betas": [0.9]}, "[train] betas: must be a list of 2: [a number, a number], not 1 values"),
        ({"targets": 5}, "[train] targets: must be text or a list of [text, ...], not 5"),
        ({"targets": ["a", 1]}, '[train] targets: must be text or a list of [text, ...], not ["a", 1]'),
        ({"held_out": True}, "[train] held_out: must be an integer or text, not true"),
        ({"held_out": 0.5}, "[train] held_out: must be an integer or text, not 0.5"),
        ({"extra": {"a": "b"}}, '[train] extra[a]: must be an integer, not "b"'),
        ({"extra": 5}, "[train] extra: must be a table, not 5"),
        ({"shift": "none"}, '[train] shift: must be a number, not "none"'),
        ({"learning_rate": -1}, "[train] learning_rate must be above 0"),
    ],
)
def test_one_mistake_one_problem(table, expected):
    assert problems_of(table) == [expected]


def test_true_is_not_the_choice_one():
    @dataclass(frozen=True, kw_only=True)
    class Level:
        level: Literal[0, 1] = 0

    assert problems_of({"level": True}, Level, "") == ["level: true is not one of 0, 1"]
    assert value_of({"level": 1}, Level) == Level(level=1)


def test_an_unknown_key_without_a_neighbour_lists_the_known_ones():
    (problem,) = problems_of({"name": "a", "qqq": 1}, Inner, "inner")
    assert problem == "[inner] qqq: unknown key; known keys: name, size"


def test_missing_keys_are_named_even_if_their_table_is_missing():
    assert problems_of({}, Run, "") == ["[inner] name: is missing; it must be text"]


def test_a_misspelt_required_key_is_not_reported_missing_too():
    assert problems_of({"inner": {"nam": "a"}}, Run, "") == ["[inner] nam: unknown key; did you mean name?"]


def test_a_key_of_another_table_is_shown_its_home():
    table = {"inner": {"name": "a"}, "learning_rate": 1}
    assert problems_of(table, Run, "") == ["learning_rate: unknown key; did you mean [train] learning_rate?"]
    table = {"inner": {"name": "a"}, "size": 1, "extra": {}}  # `extra` resembles `train`, and is no misspelling of it
    assert problems_of(table, Run, "") == [
        "size: unknown key; did you mean [inner] size?",
        "extra: unknown key; did you mean [train] extra?",
    ]
    table = {"inner": {"name": "a", "seed": 1}}
    assert problems_of(table, Run, "") == ["[inner] seed: unknown key; did you mean seed?"]


def test_an_unknown_table_is_an_unknown_key():
    assert problems_of({"inner": {"name": "a"}, "trian": {}}, Run, "") == ["trian: unknown key; did you mean train?"]


def test_a_value_in_place_of_a_table():
    assert problems_of({"inner": 5}, Run, "") == ["inner: must be a table, [inner], not 5"]


def test_problems_in_optional_tables_and_in_lists_of_tables_say_where():
    table = {"inner": {"name": "a"}, "maybe": {"name": 1}, "many": [{"name": "b"}, {}]}
    assert problems_of(table, Run, "") == [
        '[maybe] name: must be text, not 1; write "1", in quotes',
        "[many.1] name: is missing; it must be text",
    ]


def test_all_mistakes_of_all_tables_come_together():
    table = {
        "seed": -1,
        "inner": {"name": "a"},
        "train": {"stepz": 1, "compile": 2, "optimizer": "sgd", "learning_rate": 0},
        "maybe": {"size": "x"},
    }
    problems = problems_of(table, Run, "")
    assert [p.split(":")[0].split(" must")[0] for p in problems] == [
        "[train] stepz",
        "[train] optimizer",
        "[train] compile",
        "[train] learning_rate",
        "[maybe] name",
        "[maybe] size",
        "seed",
    ]


def test_a_check_between_keys_is_silent_where_one_of_them_is_not_known():
    """The typo is the mistake: that the default of `steps` does not fit the warm-up would be misleading."""
    assert problems_of({"warmup_steps": 5000, "steps": "9000"}) == [
        '[train] steps: must be an integer, not "9000"; write 9000, without quotes'
    ]
    assert problems_of({"warmup_steps": 5000, "stepz": 9000}) == ["[train] stepz: unknown key; did you mean steps?"]
    assert problems_of({"warmup_steps": 5000}) == ["[train] warmup_steps = 5000 leaves nothing of steps = 1000"]


def test_long_values_are_cut_in_messages():
    (problem,) = problems_of({"steps": "x" * 1000})
    assert len(problem) < 120 and "..." in problem


def test_the_error_lists_every_problem_on_its_own_line():
    error = ConfigError(["a", "b"])
    assert str(error) == "a\nb" and error.problems == ["a", "b"] and isinstance(error, ValueError)


# --- files ------------------------------------------------------------------------------------------------


def test_a_file_is_read_with_or_without_byte_order_mark(tmp_path):
    for begin in (b"", b"\xef\xbb\xbf"):
        (tmp_path / "c.toml").write_bytes(begin + 'seed = 1\n[train]\nname = "é"\n'.encode())
        problems: list[str] = []
        assert read_toml(tmp_path / "c.toml", problems) == {"seed": 1, "train": {"name": "é"}}
        assert problems == []


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"a = 1\nb = \nc = 3\n", "line 2: not TOML ("),
        (b"a = 1\nb = 2\na = 3\n", "line 3: not TOML ("),
        (b"a = 1\nb = hello\n", "the line is: b = hello"),
        (b'a = 1\n[train]\nb = "\xe9"\n', "line 3: this is not UTF-8"),
    ],
)
def test_a_file_that_is_not_toml_is_one_problem_with_its_line(tmp_path, content, expected):
    (tmp_path / "c.toml").write_bytes(content)
    problems: list[str] = []
    assert read_toml(tmp_path / "c.toml", problems) == {}
    assert len(problems) == 1 and expected in problems[0] and str(tmp_path / "c.toml") in problems[0]


def test_a_missing_file_and_a_folder_are_problems(tmp_path):
    problems: list[str] = []
    assert read_toml(tmp_path / "no.toml", problems) == read_toml(tmp_path, problems) == {}
    assert len(problems) == 2 and "there is no such file" in problems[0] and "cannot be read" in problems[1]


# --- overrides --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, value",
    [
        ("50", 50),
        (" 3e-4 ", 3e-4),
        ("true", True),
        ('"5"', "5"),
        ("hello world", "hello world"),
        ("a=b", "a=b"),
        ('["x", "y"]', ["x", "y"]),
        ("", ""),
        ("1\nseed = 2", "1\nseed = 2"),
    ],
)
def test_an_override_is_toml_or_text(text, value):
    table: dict[str, Any] = {"train": {"steps": 1, "kept": 2}}
    problems: list[str] = []
    made = apply_overrides(table, [f"train.steps={text}"], problems)
    assert made == {"train": {"steps": value, "kept": 2}} and problems == []
    assert type(made["train"]["steps"]) is type(value)
    assert table == {"train": {"steps": 1, "kept": 2}}  # the caller's is as it was


def test_overrides_make_tables_and_the_last_one_wins():
    problems: list[str] = []
    made = apply_overrides({}, ["init.i2l.rank=1", "seed=1", "seed=2"], problems)
    assert made == {"init": {"i2l": {"rank": 1}}, "seed": 2} and problems == []


@pytest.mark.parametrize(
    "override, expected",
    [
        ("train.steps", "expected key=value"),
        ("=5", "expected key=value"),
        ("train..steps=5", "expected key=value"),
        (".steps=5", "expected key=value"),
        ("seed.deep=5", "seed is not a table, it is 1"),
        ("train=5", "train is a table; set one of its keys"),
    ],
)
def test_a_bad_override_is_a_problem_and_changes_nothing(override, expected):
    table = {"seed": 1, "train": {"steps": 1}}
    problems: list[str] = []
    assert apply_overrides(table, [override], problems) == table
    assert len(problems) == 1 and f"--set {override}" in problems[0] and expected in problems[0]


# --- and back ---------------------------------------------------------------------------------------------


def test_to_dict_is_json_and_parses_to_the_same():
    run = Run(inner=Inner(name="a", size=1.0), train=Train(prompts=("a",)), maybe=Inner(name="b", size=2.0))
    table = json.loads(json.dumps(to_dict(run)))
    assert table["output"] == "out" and table["train"]["prompts"] == ["a"] and table["train"]["shift"] is None
    del table["train"]["shift"]
    assert value_of(table, Run) == run


def test_describe_names_every_key_with_type_default_and_meaning():
    text = explain(Run)
    assert "[inner]\nname = (required)  # text\n    Who it is.\nsize = (not set)  # a number" in text
    assert "[train]\nsteps = 1000  # an integer\n    Optimizer updates.\n" in text
    assert 'optimizer = "adamw"  # one of "adamw", "adamw8bit"' in text
    assert "betas = [0.9, 0.999]" in text and "compile = false" in text
    assert text.index("seed = 0") < text.index("[inner]") < text.index("[train]")
    assert "[[many]]\n    Any number of them.\nname = (required)  # text\n    Who it is.\n" in text
    assert len(re.findall(r"^\w+ = ", text, re.MULTILINE)) == 2 + 2 + 11 + 2 + 2


def test_docstrings_of_a_section_it_extends_are_found():
    @dataclass(frozen=True, kw_only=True)
    class Child(Inner):
        age: int = 1
        """In years."""
        size: float | None = None
        """In metres."""

    @dataclass(frozen=True, kw_only=True)
    class Grandchild(Child):
        size: float | None = 1.0
        """In feet."""

    text = explain(Grandchild)
    assert "Who it is." in text and "In years." in text
    assert "In feet." in text and "In metres." not in text


@pytest.mark.parametrize("kind", [ConfigError, DataError])
def test_problems_survive_the_way_out_of_a_worker_process(kind: type[ConfigError | DataError]) -> None:
    arrived = pickle.loads(pickle.dumps(kind(["first", "second"])))
    assert type(arrived) is kind and arrived.problems == ["first", "second"] and str(arrived) == "first\nsecond"


def test_a_path_in_the_users_home(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/zorp")
    parsed = parse(Inner, {"name": "~/pictures", "size": 1.0}, "inner", problems := [])
    assert parsed is not None and parsed.name == "/home/zorp/pictures" and not problems
    parsed = parse(Inner, {"name": "a ~/b", "size": 1.0}, "inner", problems)
    assert parsed is not None and parsed.name == "a ~/b"


# --- TOML from Windows ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'images = "C:\\Users\\me"', r"single quotes, such as 'C:\pictures'"),
        (b'images = "D:\\pictures\\zorp"', r"single quotes, such as 'C:\pictures'"),
        (b"images = C:\\zorp", "Write a path in single quotes"),
        (b"images = /home/me/zorp", "Write a path in single quotes"),
        ("images = \u201czorp\u201d".encode(), '\u201c is a typographic quotation mark: type " instead'),
        ("images = \u2018zorp\u2019".encode(), '\u2018 is a typographic quotation mark: type " instead'),
        ('images = "zorp"'.encode("utf-16"), "this is UTF-16; save the file as UTF-8"),
        ('images = "zorp"'.encode("utf-16-le"), "It looks like UTF-16: save the file as UTF-8"),
        (b'trigger = "\xe9"', "this is not UTF-8; save the file as UTF-8"),
    ],
)
def test_a_file_that_is_not_toml_says_what_to_type_instead(content: bytes, said: str, tmp_path: Path) -> None:
    path, problems = tmp_path / "run.toml", list[str]()
    path.write_bytes(content)
    assert read_toml(path, problems) == {}
    assert problems[0].startswith(f"{path}, line 1: ") and said in problems[0], problems


def test_a_byte_order_mark_is_no_problem(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_bytes(b'\xef\xbb\xbfimages = "zorp"')
    problems: list[str] = []
    assert read_toml(tmp_path / "run.toml", problems) == {"images": "zorp"} and not problems


@dataclass(frozen=True, kw_only=True)
class Places:
    images: str
    prompts: tuple[str, ...] = ()


@pytest.mark.parametrize(
    ("value", "said"),
    [("C:\temp", r"\t is a tab"), ("C:\new", r"\n is a line break"), ("d:\foto", r"\f is a control character")],
)
def test_a_windows_path_in_double_quotes_is_recognised(value: str, said: str) -> None:
    problems: list[str] = []
    assert parse(Places, {"images": value}, "data", problems) is None
    (problem,) = problems
    assert problem.startswith("[data] images: in double quotes ") and said in problem and "single quotes" in problem


def test_other_texts_may_have_line_breaks_and_tabs() -> None:
    problems: list[str] = []
    assert parse(Places, {"images": r"C:\temp", "prompts": ["a\ncat", "a\tdog"]}, "data", problems) and not problems


def test_a_bad_override_and_a_bad_key_are_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("image = 1")
    with pytest.raises(ConfigError) as caught:
        load(Places, tmp_path / "run.toml", ["nonsense"])
    text = "\n".join(caught.value.problems)
    assert "expected key=value" in text and "did you mean images?" in text
    with pytest.raises(ConfigError) as caught:
        load(Places, tmp_path / "nothing.toml", ["nonsense"])
    assert len(caught.value.problems) == 1  # without a file there is nothing to look at
