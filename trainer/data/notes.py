"""What a user should know of a folder of pictures without it being a mistake."""

from dataclasses import dataclass, field

from trainer.config import first_few


@dataclass
class Notes:
    """The same remark about many pictures is one line."""

    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, remark: str, name: str) -> None:
        self.names.setdefault(remark, []).append(name)

    def lines(self) -> tuple[str, ...]:
        return tuple(f"{remark} ({len(names)}): {first_few(names, count=5)}" for remark, names in self.names.items())
