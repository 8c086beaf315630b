"""What a LoRA can start from, and `warm_start`: one line for scripts. See `registry` for how to add an initializer."""

from typing import TYPE_CHECKING, Any

from initializers.registry import (
    UnknownInitializer,
    check,
    config_class,
    embed,
    get,
    identity,
    names,
    needs,
    resolve,
)

if TYPE_CHECKING:
    from initializers.script import warm_start

__all__ = [
    "UnknownInitializer",
    "check",
    "config_class",
    "embed",
    "get",
    "identity",
    "names",
    "needs",
    "resolve",
    "warm_start",
]


def __getattr__(name: str) -> Any:
    """`warm_start` brings PEFT along: it is imported when it is asked for."""
    if name == "warm_start":
        from initializers.script import warm_start

        return warm_start
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
