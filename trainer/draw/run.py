"""Draw what was planned: single pictures as they are done, then one sheet of all.

encode the prompts -> ask i2L, if it is wanted -> put LoRA after LoRA on the base, and draw -> sheet -> compare views
"""

import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image
from tqdm import tqdm

from trainer import adapter, checkpoint, config, validation
from trainer.data.pictures import grey_pictures, open_picture
from trainer.draw.library import Choice, choose, library_lines
from trainer.draw.plan import DrawPlan, Predictor
from trainer.draw.views import alike, with_view
from trainer.errors import UserError
from trainer.files import content_hash, file_in_the_way, read_json, write_json
from trainer.formats import write_lora
from trainer.formats.asked import Asked
from trainer.formats.lora import interface_metadata
from trainer.hub import sources
from trainer.hub.sources import Need
from trainer.lowrank import rank
from trainer.plan import Start
from trainer.qwen_image import EMPTY_PROMPT, need
from trainer.run import frozen_beside
from trainer.studio import Studio, Worn, read_worn
from trainer.validation import GREY, Sample

log = logging.getLogger("trainer")

REQUEST_FILE, SHEET_FILE = "draw.json", "sheet.png"
FOLDERS = Path("outputs/draw")
"""Where the numbered folders are that are made without --output."""


@dataclass(frozen=True, eq=False)
class Outfit:
    """What is on the base while a picture is drawn."""

    label: str
    worn: tuple[Worn, ...] = ()
    step: Path | None = None
    """A checkpoint, instead."""

    def told(self) -> dict[str, Any]:
        found: dict[str, Any] = {"loras": [one.told() for one in self.worn]}
        return found | ({"checkpoint": str(self.step)} if self.step else {})


@dataclass(frozen=True)
class Cell:
    """One picture."""

    prompt: str
    text: str
    """What is drawn from: the prompt, with its trigger and the words of its view."""
    view: str
    seed: int
    outfit: Outfit
    place: tuple[int, int, int]
    """The numbers of its prompt, its outfit and its view."""

    @property
    def name(self) -> str:
        words = [f"{self.place[0] + 1:02d}", self.view, f"seed{self.seed}", f"{self.place[1]:02d}", self.outfit.label]
        return re.sub(r"[^\w.+-]+", "-", "-".join(word for word in words if word))[:100].strip("-") + ".png"


def draw(
    plan: DrawPlan, predictor: Predictor, start: Start, output: Path | None, *, quiet: bool
) -> tuple[Path, list[str]]:
    """Draw into `output`, or into a numbered folder; returns the folder, and what is to be told.

    A folder in which the same request was stopped is gone on with. UserError if it holds something else.
    """
    needs = [need(plan.config.model.base), *(predictor.needs if plan.uses_i2l else ())]
    needs += start.embed_needs if len(plan.views) > 1 else []
    sources.fetch(needs, quiet=quiet)
    request = _request(plan, predictor, needs)
    folder = _folder(output, request)
    if plan.keep is not None and plan.keep.exists() and not folder.exists():
        raise UserError(f"--keep {plan.keep}: it is there already; choose another name")
    write_json(folder / REQUEST_FILE, request)
    studio = Studio(plan.config.model, plan.device, plan.config.cache, quiet=quiet)
    studio.encode([EMPTY_PROMPT, *(with_view(text, view) for text in plan.prompts for view in plan.views)])
    cells, lines = _cells(plan, predictor, studio)
    negative = _negative(plan, predictor, studio)
    _draw_cells(plan, studio, folder, cells, negative)
    report: dict[str, Any] = {"pictures": {cell.name: _settings(plan, cell, negative) for cell in cells}}
    if len(plan.views) > 1:
        studio.unload()
        report["alike"], more = _compare_views(plan, start, folder, cells)
        lines += more
    write_json(folder / REQUEST_FILE, {**request, **report})
    validation.write_png(folder / SHEET_FILE, _sheet(folder, cells))  # with it, the folder is done
    return folder, lines


def _request(plan: DrawPlan, predictor: Predictor, needs: Sequence[Need]) -> dict[str, Any]:
    """All that decides the pictures, as JSON."""
    files = [*plan.loras, *([plan.negative] if isinstance(plan.negative, Asked) else [])]
    named = [*plan.pictures, *(one.file.path for one in files), *(book.file.path for book in plan.library)]
    return {
        "model": config.to_dict(plan.config.model),
        "sources": sources.used(needs),
        "i2l": predictor.settings if plan.uses_i2l else None,
        "prompts": [*plan.prompts],
        "views": [*plan.views],
        "seeds": [*plan.seeds],
        "drawn_with": asdict(plan.settings) | {"size": [*plan.settings.size]},
        "strengths": [*plan.strengths],
        "each": plan.each,
        "with_base": plan.with_base,
        "loras": [[str(one.path), one.strength] for one in plan.loras],
        "negative": [str(plan.negative.path), plan.negative.strength] if isinstance(plan.negative, Asked) else None,
        "grey": [[*size] for size in plan.grey_sizes],
        "steps": [str(path) for path in plan.steps.paths.values()] if plan.steps else None,
        "files": {str(path): content_hash(path) for path in named},
    }


def _folder(output: Path | None, request: dict[str, Any]) -> Path:
    if output is not None:
        if way := file_in_the_way(output):
            raise UserError(f"--output: {way} is a file: choose another folder")
        if output.exists() and any(output.iterdir()) and not _goes_on(output, request):
            raise UserError(f"--output: {output} holds other things already: choose another folder")
        return output
    there = sorted((path for path in FOLDERS.glob("*") if path.name.isdigit()), key=lambda path: int(path.name))
    if there and _goes_on(there[-1], request):
        return there[-1]
    return FOLDERS / f"{int(there[-1].name) + 1 if there else 1:03d}"


def _goes_on(folder: Path, request: dict[str, Any]) -> bool:
    """Whether the same request was stopped there: its sheet is not there yet."""
    file = folder / REQUEST_FILE
    if not file.is_file() or (folder / SHEET_FILE).exists():
        return False
    found = read_json(file)
    return isinstance(found, dict) and all(found.get(name) == value for name, value in request.items())


def _cells(plan: DrawPlan, predictor: Predictor, studio: Studio) -> tuple[list[Cell], list[str]]:
    """All pictures, those of an outfit one after the other; and lines on what was chosen."""
    texts, lines = {text: text for text in plan.prompts}, list[str]()
    if plan.library:
        choices = choose(plan.prompts, plan.library, studio.encode)
        lines = library_lines(choices)
        for line in lines:
            log.info("%s", line)
        outfits = {text: _of_choice(plan, choice) for text, choice in zip(plan.prompts, choices, strict=True)}
        texts = {text: choice.prompt for text, choice in zip(plan.prompts, choices, strict=True)}
    else:
        own = _outfits(plan, predictor, studio)
        outfits = {text: own for text in plan.prompts}
    found = [
        Cell(text, with_view(texts[text], view), view, seed, outfit, (number, column, side))
        for number, text in enumerate(plan.prompts)
        for column, outfit in enumerate(outfits[text])
        for side, view in enumerate(plan.views)
        for seed in plan.seeds
    ]
    studio.encode([cell.text for cell in found])
    return found, lines


def _of_choice(plan: DrawPlan, choice: Choice) -> list[Outfit]:
    if not choice.books:
        return [Outfit("base")]
    worn = [read_worn(Asked(book.path, book.file, 1.0)) for book in choice.books]
    name = " + ".join(book.name for book in choice.books)
    found = [Outfit("base")] if plan.with_base else []
    return found + [_scaled(name, worn, strength, plan) for strength in plan.strengths]


def _outfits(plan: DrawPlan, predictor: Predictor, studio: Studio) -> list[Outfit]:
    """What is drawn with, beside one another."""
    found = [Outfit("base")] if plan.with_base else []
    if plan.steps is not None:
        return found + [Outfit(f"step {step}", step=path) for step, path in plan.steps.paths.items()]
    worn = [read_worn(asked) for asked in plan.loras]
    if plan.pictures:
        worn.append(_predicted(plan, predictor, studio, plan.pictures, plan.keep))
    if not worn:
        return [Outfit("base")]
    groups = [[one] for one in worn] if plan.each else [worn]
    for group in groups:
        name = " + ".join(one.name for one in group)
        found += [_scaled(name, group, strength, plan) for strength in plan.strengths]
    return found


def _scaled(name: str, worn: Sequence[Worn], strength: float, plan: DrawPlan) -> Outfit:
    own = worn[0].strength * strength if len(worn) == 1 else strength  # of several each may have another
    label = f"{name} x {own:g}" if len(plan.strengths) > 1 or own != 1 else name
    return Outfit(label, tuple(replace(one, strength=one.strength * strength) for one in worn))


def _predicted(
    plan: DrawPlan, predictor: Predictor, studio: Studio, pictures: Sequence[Path], keep: Path | None
) -> Worn:
    weights, _ = predictor.predict(pictures, plan.config.cache, studio.text_encoder)
    weights = adapter.AdapterWeights(dict(weights.factors))  # which are computed when they are asked for
    origin = {"pictures": {path.name: content_hash(path) for path in pictures}}
    if keep is not None:
        ranks = {rank(factors) for factors in weights.factors.values()}
        shown = interface_metadata("diffusion_model", keep.stem, ranks)
        write_lora(keep, weights, {**shown, "i2l": json.dumps(origin)}, layout="diffusion_model")
        log.info("the LoRA of the pictures, rank %d, is in %s", max(ranks), keep)
    return Worn("i2l", weights, 1.0, origin)


def _negative(plan: DrawPlan, predictor: Predictor, studio: Studio) -> list[Worn] | None:
    """What the negative branch of guidance wears; None if it wears what the other one wears."""
    if isinstance(plan.negative, Asked):
        return [read_worn(plan.negative)]
    if plan.negative != GREY:
        return None
    with TemporaryDirectory(prefix="grey-") as folder:
        return [_predicted(plan, predictor, studio, grey_pictures(Path(folder), plan.grey_sizes), None)]


def _draw_cells(
    plan: DrawPlan, studio: Studio, folder: Path, cells: Sequence[Cell], negative: Sequence[Worn] | None
) -> None:
    """Each picture into its file, unless it is there; each outfit is put on once."""
    by_outfit = dict[Outfit, list[Cell]]()
    for cell in cells:
        by_outfit.setdefault(cell.outfit, []).append(cell)
    with tqdm(total=len(cells), desc="draw", unit="picture", disable=studio.quiet, dynamic_ncols=True) as bar:
        for outfit, own in by_outfit.items():
            missing = [cell for cell in own if not (folder / cell.name).is_file()]
            bar.update(len(own) - len(missing))
            if not missing:
                continue
            with _wearing(plan, studio, outfit), _branch(studio, negative) as branch:
                for cell in missing:
                    picture = studio.pictures(studio.latents([cell.text], [cell.seed], plan.settings, branch))[0]
                    settings = json.dumps(_settings(plan, cell, negative), ensure_ascii=False)
                    validation.write_sample(
                        folder / cell.name, Sample(cell.text, cell.seed, picture), settings=settings
                    )
                    bar.update()


def _branch(studio: Studio, negative: Sequence[Worn] | None) -> AbstractContextManager[Any]:
    return nullcontext(None) if negative is None else studio.with_negative(negative)


@contextmanager
def _wearing(plan: DrawPlan, studio: Studio, outfit: Outfit) -> Iterator[None]:
    """Inside, the outfit is on the base."""
    if outfit.step is None:
        with studio.wearing(outfit.worn):
            yield
        return
    assert plan.steps is not None
    adapter.inject(studio.transformer, plan.steps.settings)
    try:
        adapter.load_tensors(studio.transformer, checkpoint.load(outfit.step).result)
        frozen = frozen_beside(plan.steps.run, plan.steps.report)
        with studio.wearing([] if frozen is None else [Worn("frozen", frozen)]):
            yield
    finally:
        adapter.remove(studio.transformer)


def _settings(plan: DrawPlan, cell: Cell, negative: Sequence[Worn] | None) -> dict[str, Any]:
    """What made a picture, besides its prompt and seed."""
    return {
        "base": plan.config.model.base,
        "quantization": plan.config.model.quantization,
        **asdict(plan.settings),
        **cell.outfit.told(),
        **({} if negative is None else {"negative": [one.told() for one in negative]}),
    }


def _sheet(folder: Path, cells: Sequence[Cell]) -> Image.Image:
    """Columns are what is compared: LoRAs, strengths or steps; else views; else seeds. All else has rows."""
    num_outfits, num_views = len({cell.place[1] for cell in cells}), len({cell.view for cell in cells})
    axis = "outfit" if num_outfits > 1 else "view" if num_views > 1 else "seed"

    def split(cell: Cell) -> tuple[str, str]:
        seed = f"seed {cell.seed}"
        column = {"outfit": cell.outfit.label, "view": cell.view, "seed": seed}[axis]
        rest = [cell.view if axis == "outfit" else "", "" if axis == "seed" else seed]
        return column, " · ".join([part for part in rest if part] + [cell.prompt])

    rows, columns = dict[str, dict[str, Path]](), list[str]()
    for cell in cells:
        column, title = split(cell)
        rows.setdefault(title, {})[column] = folder / cell.name
        columns += [] if column in columns else [column]
    pictures = [[open_picture(row[name]) if name in row else None for name in columns] for row in rows.values()]
    return validation.grid(pictures, columns, [*rows])


def _compare_views(
    plan: DrawPlan, start: Start, folder: Path, cells: Sequence[Cell]
) -> tuple[dict[str, Any], list[str]]:
    """How alike the subject stays over the views, by the image encoders of the configuration."""
    embeddings = start.embed([open_picture(folder / cell.name) for cell in cells], plan.device) if start.embed else {}
    if not embeddings:
        return {}, ["how alike the views are was not measured: [init.i2l] encoders names the image encoders for that"]
    numbers = dict[tuple[int, int, int], list[int]]()
    for number, cell in enumerate(cells):
        numbers.setdefault((cell.place[0], cell.place[1], cell.seed), []).append(number)
    found, lines = dict[str, Any](), list[str]()
    for label in dict.fromkeys(cell.outfit.label for cell in cells):
        groups = [own for own in numbers.values() if cells[own[0]].outfit.label == label]
        found[label] = alike(embeddings, groups)
        told = ", ".join(f"{name} {own['mean']:.3f} (lowest {own['lowest']:.3f})" for name, own in found[label].items())
        lines.append(f"{label}: over the views the subject is alike by {told}")
    return found, lines
