"""The options of a command in a shell script, as the shell would hand them over. Nothing is run.

bash and its like: quotes, continued lines, comments, variables and arrays that the script sets. Windows' `.bat` and
`.cmd`: `^` continues a line, backslashes are plain, `set NAME=value`. PowerShell's `.ps1`: a backtick continues a line.
What only the shell can know (the environment, a loop, another command's output) stays unknown: whoever asks for its
value gets an error, never a guess.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

_BLOCKS = {"if": 1, "for": 1, "while": 1, "until": 1, "case": 1, "{": 1, "fi": -1, "done": -1, "esac": -1, "}": -1}
_BEFORE_A_COMMAND = {"then", "do", "else", "elif", "!", "time", "exec", "{", "if", "while", "until"}
_DECLARATIONS = {"export", "local", "declare", "readonly", "typeset"}
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=(.*)", re.DOTALL)
_NAME = r"[A-Za-z_]\w*"
_HEREDOC = re.compile(r"<<-?\s*(['\"]?)(\w+)\1([^\n]*)\n.*?^\s*\2\s*$", re.DOTALL | re.MULTILINE)
_TOKEN = re.compile(
    r"""(?P<continued>\\\r?\n)
    |(?P<blank>[ \t\r]+)
    |(?P<end>\n|;;?|&&?|\|\|?)
    |(?P<bracket>[()])
    |(?P<redirect>\d*(?:>>?|<)(?:&\d)?)
    |'(?P<literal>[^']*)'
    |"(?P<quoted>(?:\\.|[^"\\])*)"
    |\\(?P<escaped>.)
    |(?P<variable>\$(?:\{[^}]*\}|[A-Za-z_]\w*|[0-9@*#?$!-]))
    |(?P<command>\$\([^()]*(?:\([^()]*\)[^()]*)*\)|`[^`]*`)
    |(?P<plain>[^\s'"\\$`;&|()<>]+|\$)""",
    re.VERBOSE | re.DOTALL,
)
_SEVERAL = re.compile(rf"\$\{{{_NAME}\[@\]\}}|\$@")
"""In quotes too, these are as many words as they have values."""
_INSIDE = re.compile(rf"\\(?P<escaped>[\\\"$`\n])|(?P<variable>\$(?:\{{[^}}]*\}}|{_NAME}|[0-9@*#?$!-]))")


@dataclass(frozen=True)
class Word:
    """A word of a command."""

    text: str
    unknown: str = ""
    """The part whose value the script does not tell, such as `$1`."""


_OPEN = Word("(")


@dataclass
class _Script:
    """What a POSIX shell would know after the lines so far."""

    variables: dict[str, list[Word] | None] = field(default_factory=dict)
    """None: set in a way that depends on what only happens when it runs."""
    depth: int = 0
    """How many loops, conditions and functions are open."""
    after_another: bool = False
    """Whether the command runs only if the one before it did, or did not, succeed: after && or ||."""

    def assign(self, name: str, values: list[Word], *, append: bool) -> None:
        before = self.variables.get(name, [])
        if (self.depth or self.after_another) and before != values:
            self.variables[name] = None
        elif append:
            self.variables[name] = None if before is None else [*before, *values]
        else:
            self.variables[name] = values

    def values(self, expression: str) -> list[Word]:
        """What `$NAME`, `${NAME}`, `${NAME[@]}` or `${NAME:-default}` means; `$@` is empty without arguments."""
        inner = expression[1:].removeprefix("{").removesuffix("}")
        name, default = inner, None
        if match := re.fullmatch(rf"({_NAME}):?-(.*)", inner, re.DOTALL):
            name, default = match.groups()
        name = name.removesuffix("[@]").removesuffix("[*]")
        if name in ("@", "*"):
            return []
        found = self.variables.get(name, [Word(default)] if default is not None else None)
        return [Word(expression, expression)] if found is None else found


def commands(text: str, suffix: str) -> list[list[Word]]:
    """The commands of a script, each as its words. suffix: of its file, such as ".bat". ValueError if it cannot be
    read."""
    if suffix.lower() in (".bat", ".cmd"):
        return list(_windows(text))
    if suffix.lower() == ".ps1":
        text = text.replace("\\", "\\\\").replace("`\n", "\\\n").replace("`\r\n", "\\\n")
    return list(_posix(_HEREDOC.sub(r"\3", text)))


def _posix(text: str) -> Iterator[list[Word]]:
    script, words, position = _Script(), list[list[Word]](), 0
    open_word, array, redirected = False, False, False

    def ended() -> Iterator[list[Word]]:
        nonlocal words
        command = _run(script, [word for field_ in words for word in field_])
        words = []
        if command:
            yield command

    while position < len(text):
        if not open_word and text[position] == "#":
            position = (text + "\n").index("\n", position)
            continue
        match = _TOKEN.match(text, position)
        if match is None:
            line = text.count("\n", 0, position) + 1
            raise ValueError(f"line {line}: a quote that begins here never ends")
        kind, position = str(match.lastgroup), match.end()
        if kind == "continued":
            continue
        if kind in ("blank", "end", "redirect", "bracket"):
            if redirected and open_word:
                words, redirected = words[:-1], False
            if kind == "bracket" and match[0] == "(" and open_word and _opens_array(words[-1]):
                array = True
                words.append([_OPEN])
            elif kind == "bracket" and match[0] == ")" and array:
                array, words = False, _array(script, words)
            elif kind == "end" and not (array and match[0] == "\n"):
                yield from ended()
                script.after_another = match[0] in ("&&", "||")
            redirected = redirected or (kind == "redirect" and "&" not in match[0])
            open_word = False
            continue
        if not open_word:
            words.append([])
        open_word = True
        _append(script, words[-1], kind, match)
    if redirected and open_word:
        words = words[:-1]
    yield from ended()


def _append(script: _Script, word: list[Word], kind: str, match: re.Match[str]) -> None:
    """One more part of a word, which an array or an unquoted variable may make several words of."""
    if kind == "quoted":
        text, position = match["quoted"], 0
        if _SEVERAL.fullmatch(text):
            _join(word, script.values(text))
            return
        for part in _INSIDE.finditer(text):
            _join(word, [Word(text[position : part.start()])])
            if part["escaped"]:
                _join(word, [Word(part["escaped"].replace("\n", ""))])
            else:
                values = script.values(part["variable"])
                one = Word(" ".join(x.text for x in values), "".join(x.unknown for x in values))
                _join(word, values if _SEVERAL.fullmatch(part["variable"]) else [one])
            position = part.end()
        _join(word, [Word(text[position:])])
    elif kind == "variable":
        values = script.values(match[0])
        _join(word, [x if x.unknown else Word(part) for x in values for part in x.text.split()])
    elif kind == "command":
        _join(word, [Word(match[0], match[0])])
    else:
        _join(word, [Word(match[kind])])


def _join(word: list[Word], parts: list[Word]) -> None:
    """The first part ends the word so far, the others are words of their own."""
    if not word:
        word += parts
    elif parts:
        last = word[-1]
        word[-1] = Word(last.text + parts[0].text, last.unknown or parts[0].unknown)
        word += parts[1:]


def _opens_array(word: list[Word]) -> bool:
    return len(word) == 1 and re.fullmatch(rf"{_NAME}\+?=", word[0].text) is not None


def _array(script: _Script, words: list[list[Word]]) -> list[list[Word]]:
    """Assign `NAME=( ... )`, and leave the words before it."""
    begin = next(i for i, field_ in enumerate(words) if field_ and field_[0] is _OPEN)
    items = [word for field_ in words[begin + 1 :] for word in field_]
    match = _ASSIGNMENT.fullmatch(words[begin - 1][0].text)
    if match is not None:
        script.assign(match[1], items, append=bool(match[2]))
    return words[: begin - 1]


def _run(script: _Script, words: list[Word]) -> list[Word]:
    """Follow what a command sets and opens; returns the words of the program that it calls, if any."""
    while words:
        first = words[0].text
        if first == "for" and len(words) > 1:
            script.variables[words[1].text] = None
        script.depth = max(0, script.depth + _BLOCKS.get(first, 0))
        if first in _BEFORE_A_COMMAND or first in _DECLARATIONS:
            words = words[1:]
        elif match := _ASSIGNMENT.fullmatch(first):
            script.assign(match[1], [Word(match[3], words[0].unknown)], append=bool(match[2]))
            words = words[1:]
        else:
            break
    return words


def _windows(text: str) -> Iterator[list[Word]]:
    """cmd: a line is a command, `^` continues it, only double quotes quote, and a backslash is a backslash."""
    variables: dict[str, str] = {}
    for number, line in enumerate(re.sub(r"\^[ \t]*\r?\n", " ", text).splitlines(), 1):
        line = line.strip().removeprefix("@")
        if not line or re.match(r"(?i)(rem\b|::)", line):
            continue
        line = re.sub(r"%(\w+)%|!(\w+)!", lambda m: variables.get((m[1] or m[2]).lower(), m[0]), line)
        if assigned := re.fullmatch(r'(?i)set\s+"?(\w+)=(.*?)"?', line):
            variables[assigned[1].lower()] = assigned[2]
            continue
        for part in re.split(r'\s(?:&&?|\|\|?)\s(?=(?:[^"]*"[^"]*")*[^"]*$)', line):
            words = [_without_quotes(word) for word in re.findall(r'(?:\\"|[^\s"]|"(?:\\"|[^"])*"?)+', part)]
            if swallowed := next((word for word in words if re.search(r'"\s+--', word)), None):
                raise ValueError(
                    f'line {number}: Python reads \\" as a quote within the text, so that {swallowed!r} is one word: '
                    "write the path without a backslash at its end"
                )
            yield [Word(word, "".join(re.findall(r"%[\w~]+%?|!\w+!", word))) for word in words]


def _without_quotes(word: str) -> str:
    """As Microsoft's C library, and with it Python, reads a word: a backslash means something only before a quote."""
    word = re.sub(r'(\\*)(")', lambda m: m[1][: len(m[1]) // 2] + ('"' if len(m[1]) % 2 else "\0"), word)
    return word.replace("\0", "")


def options(found: Collection[list[Word]], wanted: str, several: Collection[str] = ()) -> Mapping[str, list[Word]]:
    """The values of each `--name value` and `--name=value` of the one command that has `--wanted`.

    several: options that take more than one value. KeyError if no command has it; ValueError if more than one does, or
    if words stand where options may be and the script does not tell them.
    """
    read = [_options(command, several) for command in found if any(_is(word, wanted) for word in command)]
    if not read:
        raise KeyError(f"command with --{wanted}")
    if len(read) > 1:
        raise ValueError(f"{len(read)} commands in it have --{wanted}: give a file with the one that trains")
    return read[0]


def _is(word: Word, option: str) -> bool:
    return word.text == f"--{option}" or word.text.startswith(f"--{option}=")


def _options(command: list[Word], several: Collection[str]) -> dict[str, list[Word]]:
    values, name = dict[str, list[Word]](), ""
    for word in command:
        if word.text.startswith("--"):
            name, equals, value = word.text[2:].partition("=")
            values[name] = [Word(value, word.unknown)] if equals else []
        elif name and (name in several or not values[name]):
            values[name].append(word)
        elif name and word.unknown:
            raise ValueError(f"it does not tell what {word.unknown} is: write these options out")
    return values
