"""audit.html: the pictures of an audit to look at, in one file."""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from trainer.data.audit.boxes import KINDS
from trainer.data.audit.find import EXTRA

TEMPLATE = Path(__file__).with_name("audit.html.jinja")


def page(report: Mapping[str, Any], thumbnails: Mapping[str, bytes]) -> str:
    """The page of an audit.json. Pictures of a group of duplicates stand together, the others after them."""
    entries = {entry["file"]: entry for entry in report["pictures"]}
    grouped = {name for group in report["groups"] for name in group}
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        report=report,
        groups=[[entries[name] for name in group] for group in report["groups"]],
        others=[entry for entry in report["pictures"] if entry["file"] not in grouped],
        thumbnails={name: _data_uri(data) for name, data in thumbnails.items() if data},
        kinds=[kind for kind in KINDS if any(kind in entry["boxes"] for entry in report["pictures"])],
        extra=EXTRA,
    )


def _data_uri(data: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()
