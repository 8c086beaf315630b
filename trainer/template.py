"""Jinja templates of pages, that lie beside the module that fills them."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jinja2


@cache
def load(path: Path, **filters: Callable[..., Any]) -> jinja2.Template:
    """A template whose values are escaped for HTML. A name that is not given to it is an error."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= filters
    return environment.from_string(path.read_text(encoding="utf-8"))
