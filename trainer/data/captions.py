"""Captions of a folder's pictures: found in files beside them, checked, cleaned, with the trigger in them.

A caption becomes a part of the text encoder's prompt, so what is not text for a person is refused: control characters,
special tokens of the text encoder, text in another encoding.
"""

import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from trainer.data.notes import Notes
from trainer.data.pictures import SUFFIXES, no_file
from trainer.errors import UserError

CAPTION_SUFFIXES = (".txt", ".caption")
TEXT_KEYS = ("text", "caption", "prompt")  # of metadata.jsonl: the first is the standard name
_SPECIAL_TOKEN = re.compile(r"<\|[^|<>\s]{1,40}\|>")  # Qwen2.5-VL's: <|im_start|>, <|im_end|>, <|vision_pad|>, ...
_PLACEHOLDER = re.compile(r"\[trigger\]", re.IGNORECASE)
_JOINERS = "\u200c\u200d"  # invisible, but with a meaning in emoji and in several scripts
_ENCODINGS = {
    "gb18030": "GBK (Chinese)",
    "shift_jis": "Shift JIS (Japanese)",
    "big5": "Big5 (Chinese)",
    "euc_kr": "EUC-KR (Korean)",
    "cp1251": "Windows-1251 (Cyrillic)",
    "cp1252": "Windows-1252 (Western European)",
}


class CaptionError(UserError):
    """Why a text cannot be a caption, and what to do."""


def same_name(name: str) -> str:
    """Some systems store accented letters as two characters: for comparing names, one form."""
    return unicodedata.normalize("NFC", name)


def clean(text: str) -> tuple[str, list[str]]:
    """The text without what cannot be seen, and what was done to it. CaptionError if it is not text for a person."""
    if match := _SPECIAL_TOKEN.search(text):
        raise CaptionError(f"{match[0]} is a special token, which would change the text encoder's prompt; remove it")
    if "\0" in text:
        raise CaptionError("contains NUL characters, as text in UTF-16 does when it is read as UTF-8; save it as UTF-8")
    if "\ufffd" in text:
        raise CaptionError("contains \ufffd, which stands where a character was lost; write it again")
    if bad := [letter for letter in text if unicodedata.category(letter) == "Cc" and letter not in "\t\n\v\f\r\x85"]:
        raise CaptionError(f"contains the control character {bad[0]!a}, such as a terminal's colours; remove it")
    if meant := _read_twice(text):
        raise CaptionError(f'was saved in the wrong encoding: "{_short(text)}" should be "{_short(meant)}"; correct it')
    seen = "".join(c for c in text if unicodedata.category(c) != "Cf" or c in _JOINERS)
    done = ["invisible characters were removed from the caption"] if seen.strip() != text.strip() else []
    return seen.strip(), done


def _read_twice(text: str) -> str | None:
    """What was meant, if it is UTF-8 that was read as Latin-1 or Windows-1252 and saved as UTF-8 again."""
    if text.isascii():
        return None
    for encoding in ("latin-1", "cp1252"):
        try:
            return text.encode(encoding).decode("utf-8")
        except UnicodeError:
            continue
    return None


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:39] + "…"


def read_text(path: Path) -> str:
    """The text of a caption's file. CaptionError if it is not UTF-8, with a guess of what it is, or not readable."""
    if problem := no_file(path):
        raise CaptionError(problem)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CaptionError(f"cannot be read ({error.strerror})") from error
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise CaptionError("is not UTF-8, but UTF-16; save the caption as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        guess = _guess_encoding(data)
        but = f", but probably {guess}" if guess else ""
        raise CaptionError(f"is not UTF-8{but}; save the caption as UTF-8") from None


def _guess_encoding(data: bytes) -> str | None:
    """The encoding in which the bytes are letters and common signs, the stricter ones first."""
    for encoding, title in _ENCODINGS.items():
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        letters = [c for c in text if c.isalpha()]
        foreign = [c for c in text if not c.isascii()]
        if encoding == "cp1251" and len(foreign) < 0.5 * len(letters):
            continue  # a few accented letters among plain ones
        if foreign and sum(_is_common(c, encoding) for c in foreign) >= 0.8 * len(foreign):
            return title
    return None


def _is_common(letter: str, encoding: str) -> bool:
    """Whether a letter is one that texts in this encoding are made of."""
    name = unicodedata.name(letter, "")
    if encoding in ("gb18030", "big5"):  # the first level of GB 2312 and of Big5 are the common characters
        if name.startswith("CJK UNIFIED"):
            code = letter.encode(encoding)
            return 0xB0 <= code[0] <= 0xD7 if encoding == "gb18030" else 0xA4 <= code[0] <= 0xC6
        return unicodedata.category(letter)[0] in "PZ"
    kinds = {
        "shift_jis": ("HIRAGANA", "KATAKANA", "CJK UNIFIED", "IDEOGRAPHIC"),
        "euc_kr": ("HANGUL",),
        "cp1251": ("CYRILLIC",),
        "cp1252": ("LATIN SMALL", "LATIN CAPITAL", "LEFT", "RIGHT", "EN DASH", "EM DASH"),
    }
    return name.startswith(kinds[encoding])


def with_trigger(trigger: str, caption: str) -> tuple[str, list[str]]:
    """The caption with the trigger, in place of "[trigger]" or in front if it is not there yet; and what was done.

    A letter beside it means that it is a part of another word; not so in scripts without spaces between words.
    """
    if not trigger:
        return caption, []
    if _PLACEHOLDER.search(caption):
        return _PLACEHOLDER.sub(lambda _: trigger, caption), []
    found = [match[0] for match in _as_a_word(trigger).finditer(caption)]
    if trigger in found:
        return caption, []
    if found:
        return caption, [f'the caption has the trigger in another case, "{found[0]}"']
    return f"{trigger}, {caption}", []


def has_trigger(trigger: str, text: str) -> bool:
    """Whether the text has the trigger, in any case, or "[trigger]"."""
    return bool(trigger) and bool(_as_a_word(trigger).search(text) or _PLACEHOLDER.search(text))


def without_trigger(trigger: str, caption: str, instead: str = "") -> str:
    """The caption with other words in place of the trigger, or without it, and without the comma beside it."""
    text = _as_a_word(trigger).sub(lambda _: instead, caption)
    return text if instead else re.sub(r"(,\s*)+,", ",", re.sub(r"\s+", " ", text)).strip(" ,\u3001\uff0c")


def _as_a_word(trigger: str) -> re.Pattern[str]:
    """Matches the trigger in any case, where it is a word of its own."""
    before = "" if _runs_on(trigger[0]) else r"(?<!\w)"
    after = "" if _runs_on(trigger[-1]) else r"(?!\w)"
    return re.compile(before + re.escape(trigger) + after, re.IGNORECASE)


def _runs_on(letter: str) -> bool:
    """Whether the letter is of a script that puts no spaces between words."""
    kinds = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "HANGUL")
    return unicodedata.name(letter, "").startswith(kinds)


class Captions:
    """The captions of a folder's pictures, collected from all places that may hold one."""

    def __init__(self, folder: Path, problems: list[str], notes: Notes):
        self._folder, self._problems, self._notes = folder, problems, notes
        self._given: dict[Path, list[tuple[str, tuple[str, ...] | None]]] = defaultdict(list)
        """picture -> (place, texts or None if something is wrong with them, which is a problem already)"""
        self._decided: set[Path] = set()
        """Pictures whose captions lie elsewhere: what is beside them does not count."""

    def read(self, files: Sequence[Path], pictures: Sequence[Path], elsewhere: Path | None = None) -> None:
        """Read the text files and metadata.jsonl of the folder, and before them those of `elsewhere`, which count."""
        if elsewhere is not None:
            there = sorted(elsewhere.iterdir(), key=lambda path: path.name) if elsewhere.is_dir() else []
            self._read(elsewhere, [path for path in there if not path.name.startswith(".")], pictures)
            self._decided = {*self._given}
            for path in pictures:
                if path not in self._decided:
                    self._notes.add(f"no caption in {elsewhere}: the one beside the picture counts", path.name)
        self._read(self._folder, files, pictures)

    def _read(self, folder: Path, files: Sequence[Path], pictures: Sequence[Path]) -> None:
        owners: dict[str, list[Path]] = defaultdict(list)  # of a.txt: a.png; of a.png.txt, too
        for path in pictures:
            for name in {path.stem, path.name}:
                owners[same_name(name)].append(path)
        for path in files:
            if path.suffix.lower() in CAPTION_SUFFIXES:
                self._read_file(path, owners.get(same_name(path.stem), []))
        by_name = {same_name(path.name): path for path in pictures}
        for owner, place, texts in self._metadata(folder / "metadata.jsonl", by_name):
            if owner not in self._decided:
                self._given[owner].append((place, texts))

    def _read_file(self, path: Path, owners: Sequence[Path]) -> None:
        if not owners:
            self._notes.add("text files that belong to no picture", str(path))
            return
        owners = [owner for owner in owners if owner not in self._decided]
        if not owners:
            self._notes.add("captions beside pictures that are not read, since [data] captions has others", path.name)
            return
        if len(owners) > 1:
            self._notes.add("one caption for several pictures", f"{path.name} for {', '.join(p.name for p in owners)}")
        try:
            text = self._cleaned(read_text(path), path.name)
            if not text:
                raise CaptionError("is empty; write a caption, or remove the file to use default_caption")
        except CaptionError as error:
            self._problems.append(f"{path}: {error}")
            text = ""
        for owner in owners:
            self._given[owner].append((path.name, (text,) if text else None))

    def _cleaned(self, text: str, name: str) -> str:
        text, done = clean(text)
        for remark in done:
            self._notes.add(remark, name)
        return text

    def of(self, pictures: Sequence[Path], *, trigger: str, default: str) -> dict[Path, tuple[str, ...]]:
        """The captions of each picture, with the trigger; those of which something is wrong are left out."""
        try:
            default = self._cleaned(default, "default_caption")
        except CaptionError as error:
            self._problems.append(f"default_caption: {error}")
            return {}
        found = {}
        for path in pictures:
            given = self._given.get(path) or [("default_caption", (default,))]
            texts = given[0][1]
            if texts is None or any(other is None for _, other in given):
                continue  # already a problem
            if len({others for _, others in given}) > 1:
                places = " and ".join(place for place, _ in given)
                self._problems.append(
                    f"{path}: {places} give it different captions; keep one, or list all in metadata.jsonl"
                )
            elif not texts[0]:
                self._problems.append(
                    f"{path}: has no caption; write {path.stem}.txt beside it, name it in metadata.jsonl, or set a "
                    f'default_caption, such as "{trigger or "a photo"}"'
                )
            else:
                whole = [with_trigger(trigger, text) for text in texts]
                found[path] = tuple(text for text, _ in whole)
                for remark in dict.fromkeys(remark for _, done in whole for remark in done):
                    self._notes.add(remark, path.name)
        if default and pictures and all(path in self._given for path in pictures):
            self._notes.add("default_caption not needed: each picture has a caption of its own", str(self._folder))
        return found

    def _metadata(self, path: Path, pictures: dict[str, Path]) -> Iterator[tuple[Path, str, tuple[str, ...] | None]]:
        """(picture, where its captions stand, the captions or None if one is bad) for each row that names a picture."""
        for where, row in self._rows(path):
            name = row.get("file_name") if isinstance(row, dict) else None
            if not isinstance(name, str) or not name:
                self._problems.append(f'{where}: must be like {{"file_name": "a.png", "text": "a caption"}}')
                continue
            inside = Path(name)
            if inside.is_absolute() and inside.parent.resolve() == self._folder.resolve():
                inside = Path(inside.name)
            owner = pictures.get(same_name(str(inside)))
            if owner is None:
                self._problems.append(f"{where}: {_why_not(self._folder, name)}")
                continue
            texts = self._texts(row, where, name)
            if texts is None:
                yield owner, where, None
                continue
            yield owner, f"{path.name} {where.rpartition(', ')[2]}", texts

    def _texts(self, row: dict[str, Any], where: str, name: str) -> tuple[str, ...] | None:
        """The row's captions; None, and a problem, if it has none."""
        given = {key: texts for key in TEXT_KEYS if (texts := _listed(row.get(key)))}
        if len(set(given.values())) > 1:
            self._problems.append(f"{where}: {name} has different texts in {' and '.join(given)}; keep one")
            return None
        try:
            texts = tuple(self._cleaned(text, where) for text in next(iter(given.values()), ()))
            if texts and all(texts):
                return texts
            if len(texts) > 1:
                raise CaptionError(f"{name} has an empty text among others; write a caption, or remove it")
            raise CaptionError(f'{name} has no "text"; write a caption, or remove the line')
        except CaptionError as error:
            self._problems.append(f"{where}: {error}")
            return None

    def _rows(self, path: Path) -> Iterator[tuple[str, Any]]:
        """(place, row) of a file with a JSON object in each line, or with one JSON list."""
        if not path.exists():
            return
        if problem := no_file(path):
            self._problems.append(f"{path}: {problem}")
            return
        try:
            data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
        except OSError as error:
            self._problems.append(f"{path}: cannot be read ({error.strerror})")
            return
        if data.lstrip().startswith(b"["):
            try:
                rows = json.loads(data.decode("utf-8"))
            except (UnicodeDecodeError, json.JSONDecodeError) as error:
                self._problems.append(f"{path}: begins as a JSON list, but is not one ({error})")
                return
            yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1))
            return
        for number, line in enumerate(data.split(b"\n"), 1):
            where = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                yield where, json.loads(line.decode("utf-8"))
            except UnicodeDecodeError:
                self._problems.append(f"{where}: is not UTF-8")
            except json.JSONDecodeError as error:
                self._problems.append(f"{where}: is not JSON ({error.msg}, column {error.colno})")


def _listed(value: Any) -> tuple[str, ...]:
    """A text, or those of a list, as metadata.jsonl has them; () if it is neither, or empty."""
    texts = value if isinstance(value, list) else [value]
    return tuple(texts) if all(isinstance(text, str) for text in texts) and any(text.strip() for text in texts) else ()


def _why_not(folder: Path, name: str) -> str:
    """Why metadata.jsonl may not name this file."""
    if not (folder / name).is_file():
        return f"there is no file {name} in {folder}"
    if Path(name).suffix.lower() not in SUFFIXES:
        return f"{name} is not one of {', '.join(SUFFIXES)}"
    return f"{name} must lie directly in {folder}, under a name without a leading dot"
