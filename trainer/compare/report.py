"""A comparison's results to look at: report.html, curves.png, contact_sheet.png, all made from report.json."""

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from trainer import template
from trainer.compare.statistics import Outcome, Run, best_rates, outcomes, summarise
from trainer.data.pictures import DataError, open_picture
from trainer.files import write_file, write_json, write_text
from trainer.validation import grid, write_png

PICTURE_MEASURES = ("similarity", "diversity", "fidelity", "drift")
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1")
THEMES = {"light": ("#ffffff", "#222222", "#d0d0d0"), "dark": ("#16181c", "#e6e6e6", "#444850")}
MAX_COLUMNS = 8  # of the contact sheet
TEMPLATE = Path(__file__).with_name("report.html.jinja")


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write `report` with what follows from its runs, and the page with its pictures."""
    runs = usable(report)
    rows = outcomes(runs, report["baseline"])
    groups = list(dict.fromkeys(run["group"] for run in runs))
    arms = list(dict.fromkeys(run["arm"] for run in runs))
    failures = [run for run in report["runs"] if run["status"] == "failed"]
    summary = [row for group in groups for arm in arms if (row := _summary(group, arm, runs, rows, failures))]
    report = {**report, "summary": summary, "outcomes": [asdict(row) for row in rows]}
    write_json(folder / "report.json", report)
    write_file(folder / "curves.png", lambda path: path.write_bytes(curves(runs, groups, arms, "light")))
    sheet = contact_sheet(folder, report, runs, arms)
    if sheet is not None:
        write_png(folder / "contact_sheet.png", sheet)
    page = template.load(TEMPLATE, percent=_percent, number=_number, bounds=_bounds, seconds=_seconds)
    settings = {"config": report["config"], "arms": report["arms"], "versions": report["versions"]}
    text = page.render(
        report=report,
        groups=groups,
        arms=arms,
        controls={arm["name"]: arm["control"] for arm in report["arms"] if arm["control"]},
        summary={(row["group"], row["arm"]): row for row in summary},
        measures=sorted({name for row in summary for name in row["pictures"]}),
        failures=failures,
        settings=json.dumps(settings, indent=2, ensure_ascii=False),
        figures=[{theme: _data_uri(curves(runs, [group], arms, theme)) for theme in THEMES} for group in groups],
        sheet=_data_uri((folder / "contact_sheet.png").read_bytes()) if sheet is not None else None,
        steps=report["config"]["train"]["steps"],
        headlines=[_headline(row, report["baseline"]) for row in summary if _is_headline(row, report)],
    )
    write_text(folder / "report.html", text)


def usable(report: Mapping[str, Any]) -> list[Run]:
    """The finished runs, and `no-training`, which is i2l's start for as long as the others train."""
    runs = [run for run in report["runs"] if run["status"] == "finished"]
    if any(arm["name"] == "no-training" for arm in report["arms"]):
        for run in [run for run in runs if run["arm"] == "i2l"]:
            start = run["curve"][0]
            end = {**start, "step": run["curve"][-1]["step"]}
            runs.append({**run, "arm": "no-training", "curve": [start, end]})
    return runs


def _summary(
    group: str, arm: str, runs: Sequence[Run], rows: Sequence[Outcome], failures: Sequence[Run]
) -> dict[str, Any] | None:
    """An arm in a group; None if no pair of its runs is left."""
    own = [row for row in rows if (row.group, row.arm) == (group, arm)]
    if not own:
        return None
    stands_for = "i2l" if arm == "no-training" else arm
    failed = sum((run["group"], run["arm"]) == (group, stands_for) for run in failures)
    return {"group": group, "arm": arm, "failed": failed, **summarise(own), "pictures": _measures(runs, own)}


def _measures(runs: Sequence[Run], rows: Sequence[Outcome]) -> dict[str, dict[str, float]]:
    """Means of the picture measures at the start and at the end, over the runs at each subject's best learning rate
    that drew any."""
    found: dict[str, dict[str, list[float]]] = {}
    wanted = {(row.subject, row.arm, row.seed, row.learning_rate) for row in rows}
    for run in runs:
        if (run["subject"], run["arm"], run["seed"], run["learning_rate"]) not in wanted:
            continue
        for place, point in (("start", run["curve"][0]), ("end", run["curve"][-1])):
            for name, value in point.items():
                if name.startswith(PICTURE_MEASURES):
                    found.setdefault(name, {}).setdefault(place, []).append(value)
    return {name: {place: mean(values) for place, values in places.items()} for name, places in found.items()}


def _is_headline(row: Mapping[str, Any], report: Mapping[str, Any]) -> bool:
    controls = {arm["name"] for arm in report["arms"] if arm["control"]}
    return row["arm"] != report["baseline"] and row["arm"] not in controls


def _headline(row: Mapping[str, Any], baseline: str) -> str:
    """One sentence for an arm in a group."""
    where = f"{row['group']}: " if row["group"] else ""
    reached = row["runs"] - row["never"]
    text = f"{where}{row['arm']} reaches {baseline}'s best held-out loss in {reached} of {row['runs']} runs"
    if row["steps"]["value"] is not None:
        text += f", with {'at least ' if row['never'] else ''}{_percent(row['steps']['value'])} of its steps"
    if row["below_at_step_0"]:
        text += f" ({row['below_at_step_0']} of them before the first step)"
    lower = row["best_lower_by"]["value"]
    failed = f" {row['failed']} of its runs failed." if row["failed"] else ""
    return f"{text}; its own best is {abs(lower):.1%} {'lower' if lower >= 0 else 'higher'}.{failed}"


# --- pictures ---------------------------------------------------------------------------------------------


def curves(runs: Sequence[Run], groups: Sequence[str], arms: Sequence[str], theme: str) -> bytes:
    """A PNG: a panel for each group, a line for each arm at each subject's own best rate: the held-out loss, as a share
    of the base's, its median over subjects and seeds, and the band between the quartiles."""
    background, ink, faint = THEMES[theme]
    rates = best_rates(runs)
    figure = Figure(figsize=(5.2 * max(len(groups), 1), 4.2), dpi=110, facecolor=background, layout="constrained")
    axes = figure.subplots(1, max(len(groups), 1), squeeze=False, sharey=True)[0]
    for axis, group in zip(axes, groups, strict=False):
        for colour, arm in zip(COLOURS * 9, arms, strict=False):
            own = [
                run
                for run in runs
                if (run["group"], run["arm"]) == (group, arm) and run["learning_rate"] == rates[run["subject"], arm]
            ]
            if not own:
                continue
            steps = [point["step"] for point in own[0]["curve"]]
            shares = np.array([[point["val_loss"] / run["base_loss"] for point in run["curve"]] for run in own])
            low, middle, high = np.percentile(shares, (25, 50, 75), axis=0)
            style = "--" if arm == "no-training" else "-"
            axis.plot(steps, middle, style, color=colour, label=arm, linewidth=1.8)
            axis.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.axhline(1, color=faint, linewidth=1)
        axis.set_title(group or "held-out loss", color=ink)
        axis.set_xlabel("step", color=ink)
        axis.set_facecolor(background)
        axis.tick_params(colors=ink)
        axis.spines[:].set_color(faint)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylim(top=min(axes[0].get_ylim()[1], 1.6))  # a start that is far off would flatten all others
    axes[0].set_ylabel("held-out stable loss / the base's", color=ink)
    axes[0].legend(facecolor=background, edgecolor=faint, labelcolor=ink, fontsize=8)
    data = io.BytesIO()
    FigureCanvasAgg(figure).print_png(data)
    return data.getvalue()


def contact_sheet(
    folder: Path, report: Mapping[str, Any], runs: Sequence[Run], arms: Sequence[str]
) -> Image.Image | None:
    """For the first subject of each group: a row for each arm at its best rate, a column for each step, the first
    prompt and noise; below them real pictures. None if the runs' samples are not there."""
    rates, rows, titles = best_rates(runs), list[list[Image.Image]](), list[str]()
    first = {subject["group"]: subject for subject in reversed(report["subjects"])}
    steps: list[int] = []
    for subject in reversed(first.values()):
        for arm in arms:
            run = next(
                (
                    run
                    for run in runs
                    if (run["subject"], run["arm"], run["seed"]) == (subject["name"], arm, report["seeds"][0])
                    and run["learning_rate"] == rates[subject["name"], arm]
                ),
                None,
            )
            if run is None or arm == "no-training":
                continue
            files = sorted((folder / run["folder"] / "samples").glob("step-*-0-0.png"))[:MAX_COLUMNS]
            if not files:
                return None
            steps = [int(file.name.split("-")[1]) for file in files]
            rows.append([open_picture(file) for file in files])
            best = min(point["val_loss"] for point in run["curve"])
            losses = f"held-out loss {run['curve'][0]['val_loss']:.3f} at step 0, best {best:.3f}"
            titles.append(f"{subject['name']}, {arm}, learning rate {run['learning_rate']:g}: {losses}")
        if pictures := _real_pictures(subject, len(steps)):
            rows.append(pictures)
            titles.append(f"{subject['name']}: real pictures, those first that no run has seen")
    return grid(rows, [f"step {step}" for step in steps], titles) if rows else None


def _real_pictures(subject: Mapping[str, Any], count: int) -> list[Image.Image]:
    """The first `count` of a subject's pictures, the held-out ones first, as far as they are still there and usable."""
    found = []
    for entry in (*subject["held_out"], *subject["train"])[:count]:
        with suppress(DataError):
            found.append(open_picture(Path(entry["path"])))
    return found


def _data_uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


# --- numbers ----------------------------------------------------------------------------------------------


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"


def _seconds(value: float | None) -> str:
    if value is None:
        return "not measured"
    return "0" if value < 0.05 else f"{value:.1f}"


def _bounds(interval: Mapping[str, float | None]) -> str:
    if interval["low"] is None or interval["high"] is None:
        return ""
    return f"{interval['low']:.1%} to {interval['high']:.1%}"
