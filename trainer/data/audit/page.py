"""audit.html: the pictures of an audit to look at, in one file."""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer import template
from trainer.data.audit.boxes import KINDS
from trainer.files import write_file

TEMPLATE = Path(__file__).with_name("audit.html.jinja")


def write_page(path: Path, report: Mapping[str, Any], thumbnails: Mapping[str, bytes]) -> None:
    """The page of an audit.json. Pictures of a group of duplicates stand together, the others after them."""
    entries = {entry["file"]: entry for entry in report["pictures"]}
    grouped = {name for group in report["groups"] for name in group}
    stream = template.load(TEMPLATE, data_uri=_data_uri).stream(
        report=report,
        groups=[[entries[name] for name in group] for group in report["groups"]],
        others=[entry for entry in report["pictures"] if entry["file"] not in grouped],
        thumbnails=thumbnails,
        kinds=[kind for kind in KINDS if any(kind in entry["boxes"] for entry in report["pictures"])],
    )
    write_file(path, lambda partial: stream.dump(str(partial), encoding="utf-8"))


def _data_uri(data: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()
