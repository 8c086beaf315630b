"""What was found, for 60 blocks, beside what `--plan` says."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.pretended_gpu.device import OTHER
from trainer.hardware.memory import CONTEXT_BYTES, usable

PAGE = Path(__file__).parents[2] / "docs" / "real_size.md"
BEGIN, END = "<!-- pretended GPU: begin -->\n", "<!-- pretended GPU: end -->\n"
Found = Mapping[str, Any]
"""A case's card and the outcomes of its sizes, as `__main__.outcomes` makes it."""


def found_peaks(found: Found) -> dict[str, float]:
    """Bytes on the GPU in each stage with 60 blocks, CUDA's own included."""
    return _carried_on(found, lambda size: {name: stage["peak"] for name, stage in size["stages"].items()})


def planned_peaks(found: Found) -> dict[str, float]:
    """The same by the plan, of stages that run on the GPU."""
    here = usable(found["card"]) / 1.1
    return _carried_on(
        found,
        lambda size: {
            name: stage["num_bytes"] - CONTEXT_BYTES
            for name, stage in size["planned"].items()
            if stage["instead"] is None or stage["num_bytes"] < here
        },
    )


def _carried_on(found: Found, bytes_of: Callable[[Found], dict[str, float]]) -> dict[str, float]:
    first, *others = found["sizes"]
    whole = {}
    for name, num_bytes in bytes_of(first).items():
        if name == OTHER:  # what is left of the stage before, which may have found all in the cache
            continue
        further = [(size["more"], bytes_of(size).get(name, num_bytes)) for size in others]
        whole[name] = num_bytes + sum(count * (other - num_bytes) for count, other in further) + CONTEXT_BYTES
    return whole


def markdown(found: Mapping[str, Found]) -> str:
    """Those that have a plan, with a row for each stage; then the others."""
    planned = {name: one for name, one in found.items() if one["sizes"][0]["planned"]}
    others = {name: one for name, one in found.items() if name not in planned}
    return "\n\n".join(_table(part) for part in (planned, others) if part)


def _table(found: Mapping[str, Found]) -> str:
    peaks = {name: (found_peaks(one), planned_peaks(one)) for name, one in found.items()}
    what = "found / planned" if any(planned for _, planned in peaks.values()) else "found"
    lines = [
        f"| GB on the GPU: {what} | {' | '.join(f'`{name}`' for name in found)} |",
        "|---" * (1 + len(found)) + "|",
    ]
    for stage in dict.fromkeys(name for one in found.values() for name in one["sizes"][0]["planned"]):
        cells = (_cell(stage, *peaks[name]) for name in found)
        lines.append(f"| {stage} | {' | '.join(cells)} |")
    ends = [(max(found_peaks(one).values()), one["card"]) for one in found.values()]
    lines.append(f"| **highest** | {' | '.join(f'**{_gb(highest)}**' for highest, _ in ends)} |")
    lines.append(f"| card | {' | '.join(f'{card} GB' for _, card in ends)} |")
    lines.append(f"| fits | {' | '.join('yes' if highest <= usable(card) else 'no' for highest, card in ends)} |")
    return "\n".join(lines)


def _cell(stage: str, measured: Mapping[str, float], planned: Mapping[str, float]) -> str:
    if stage not in measured:
        return ""
    return f"{_gb(measured[stage])} / {_gb(planned[stage])}" if stage in planned else "on the CPU"


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f}"


def write(text: str) -> None:
    """Into the page, between its marks."""
    page = PAGE.read_text(encoding="utf-8")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}{text}\n{END}{after}", encoding="utf-8")
