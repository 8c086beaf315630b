"""run.html, from what a run has left in its folder so far."""

from pathlib import Path

from trainer import template
from trainer.files import write_file
from trainer.page import charts, pictures, table, words
from trainer.page.charts import Chart
from trainer.page.left import Left, at, read, table_at

PAGE = "run.html"
TEMPLATE = Path(__file__).with_name("run.html.jinja")
LOSSES = {"val_loss": "held out", "train_stable_loss": "training", "val_loss_masked": "held out, masked"}
SMOOTHING = 20  # the training loss is averaged over this share of a run's steps


def write_page(folder: Path) -> None:
    """Write `folder/run.html`, whole or not at all. It depends on nothing but the files in the folder and the pictures
    that run.json names; what is missing or damaged is left out. OSError if it cannot be written."""
    left = read(folder)
    album = pictures.album(left)
    steps, rows = pictures.samples(left)
    changed, settings = words.settings(left)
    values = {
        "headline": words.headline(left),
        "losses": words.losses(left),
        "running": left.running,
        "steps": steps,
        "shown": _first_shown(left, steps),
        "chosen": left.chosen,
        "rows": rows,
        "real": pictures.real(left, album),
        "curves": _curves(left),
        "trades": _trades(left),
        "rate": _rate(left),
        "seed": words.seed(left),
        "doubtful": table.doubtful(left, album),
        "table": table.table(left, album),
        "changed": changed,
        "settings": settings,
        "versions": [*_plain(left, "versions"), *_plain(left, "hardware")],
        "results": words.results(left),
        "base": words.base_of(left),
        "dora": bool(at(left.report, "config", "adapter", "use_dora")),
        "charts": charts,
    }
    write_file(folder / PAGE, lambda path: path.write_text(template.load(TEMPLATE).render(values), encoding="utf-8"))


def _first_shown(left: Left, steps: list[int]) -> int:
    """Where the slider stands: at the newest samples while a run goes on, then at the chosen step's."""
    if left.chosen in steps and not left.running:
        return steps.index(left.chosen)
    return len(steps) - 1


def _curves(left: Left) -> list[Chart]:
    chosen = left.chosen
    stable = {told: left.curve(name) for name, told in LOSSES.items()}
    losses = [(step, values["loss"]) for step, values in left.steps if "loss" in values]
    window = max(1, len(losses) // SMOOTHING)
    mean = f"The mean of the last {window} steps." if window > 1 else ""
    rates = _rates(left)
    likeness = {name.removeprefix("likeness "): left.curve(name) for name in _likenesses(left)}
    alike = "Mean cosine of samples with real pictures: higher is more like them."
    away = "How far the velocity for unrelated prompts has moved from the base's: lower is better."
    found = [
        charts.curves("Stable loss", stable, marked=chosen, note="Always with the same sigmas and noise."),
        charts.curves("Training loss", {"loss": charts.smoothed(losses, window)}, marked=chosen, note=mean),
        charts.curves("Learning rate", {"lr": rates}) if len({rate for _, rate in rates}) > 1 else None,
        charts.curves("Likeness", likeness, marked=chosen, note=alike),
        charts.curves("Drift", {"drift": left.curve("drift")}, marked=chosen, note=away),
    ]
    return [chart for chart in found if chart]


def _trades(left: Left) -> list[Chart]:
    """Likeness against drift, for each encoder."""
    drift, found = dict(left.curve("drift")), []
    for name in _likenesses(left):
        points = [(int(step), drift[step], y) for step, y in left.curve(name) if step in drift]
        if len(points) > 1:
            title = f"Likeness ({name.removeprefix('likeness ')}) against drift"
            found.append(charts.trade(title, points, ("drift", "likeness"), left.chosen))
    return found


def _likenesses(left: Left) -> list[str]:
    names = dict.fromkeys(name for values in left.validations.values() for name in values)
    return [name for name in names if name.startswith("likeness ")]


def _rates(left: Left) -> list[tuple[float, float]]:
    return [(step, values["lr"]) for step, values in left.steps if "lr" in values]


def _rate(left: Left) -> str:
    """The learning rate in words, if it never changes."""
    rates = {rate for _, rate in _rates(left)}
    return f"The learning rate is {min(rates):g} at each step." if len(rates) == 1 else ""


def _plain(left: Left, name: str) -> list[tuple[str, list[str]]]:
    return [(str(key), [str(value)]) for key, value in table_at(left.report, name).items()]
