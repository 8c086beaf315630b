"""An evaluation to look at: evaluation.html, and a table for a terminal, both made from evaluation.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer import template
from trainer.files import write_text
from trainer.page.pictures import shrunk

TEMPLATE = Path(__file__).with_name("evaluation.html.jinja")
SEEDS_SHOWN, REDRAWN_SHOWN = 2, 4
SIDE = 256


def write_page(page: Path, written: Mapping[str, Any], folder: Path) -> None:
    """The page, whole or not at all, with pictures of the folder in it."""
    text = template.load(TEMPLATE, number=_text, difference=_difference).render(
        written=written,
        names=[one["name"] for one in written["loras"]],
        samples=_samples(written, folder),
        redrawn=_redrawn(written, folder),
    )
    write_text(page, text)


def table(written: Mapping[str, Any]) -> str:
    """A line for each measure, a column for each LoRA; a star marks the best LoRA."""
    names = [one["name"] for one in written["loras"]]
    real = any(measure["real"] for measure in written["measures"])
    rows = [["", *names, *(["training pictures"] if real else [])]]
    for measure in written["measures"]:
        cells = [_text(measure["values"].get(name)) + ("*" if name in measure["best"] else " ") for name in names]
        rows.append([_called(measure), *cells, *([_text(measure["real"]) + " "] if real else [])])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *line[1:]]).rstrip() for row, line in zip(rows, lines, strict=True)
    )


def _called(measure: Mapping[str, Any]) -> str:
    return f"{measure['name']} ({measure['better']} is better)" if measure["better"] else str(measure["name"])


def _text(value: Mapping[str, Any] | None, *, sign: bool = False) -> str:
    """A number with its standard error; an en dash where there is none."""
    if value is None:
        return "\N{EN DASH}"
    digits = 2 if abs(value["value"]) >= 10 else 4
    error = "" if value["error"] is None else f" ± {value['error']:.{digits}f}"
    return f"{value['value']:{'+' if sign else ''}.{digits}f}{error}"


def _difference(value: Mapping[str, Any]) -> str:
    return _text(value, sign=True)


def _samples(written: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    """For each prompt a row for each LoRA, with its first seeds."""
    seeds, shown = written["seeds"], min(written["seeds"], SEEDS_SHOWN)
    return [
        {
            "prompt": prompt,
            "rows": [
                (one["name"], [shrunk(folder / file, SIDE) for file in one["samples"][row * seeds :][:shown]])
                for one in written["loras"]
            ],
        }
        for row, prompt in enumerate(written["prompts"])
    ]


def _redrawn(written: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    """For each of some held-out pictures the picture itself, and what each LoRA makes of it at each sigma."""
    folders = [Path(one["samples"][0]).parent.name for one in written["loras"]]
    return [
        {
            "picture": name,
            "original": shrunk(folder / "redrawn" / f"{place}.png", SIDE),
            "rows": [
                (
                    one["name"],
                    [shrunk(folder / "redrawn" / f"{place}-{s:g}-{own}.png", SIDE) for s in written["sigmas"]],
                )
                for one, own in zip(written["loras"], folders, strict=True)
            ],
        }
        for place, name in enumerate(written["looked_at"][:REDRAWN_SHOWN])
    ]
