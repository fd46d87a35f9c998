"""Options of a measurement: a dataclass whose fields are its flags too, so that each is stated once."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

Options = TypeVar("Options")
Default = TypeVar("Default")


def flag(
    default: Default,
    help: str,
    type: Callable[[str], object] | None = None,
    metavar: str | None = None,
    choices: Sequence[str] | None = None,
    name: str | None = None,
) -> Default:
    """Declare a field of a dataclass, from which `add_flags` makes a flag.

    Args:
        default: of the field and the flag; a bool makes a flag without a value, which turns it over.
        help: what it is. A default that is not None is added.
        type, metavar, choices: as in argparse.
        name: of the flag, by default the field's.
    """
    settings = {"help": help, "type": type, "metavar": metavar, "choices": choices, "name": name}
    known = {key: value for key, value in settings.items() if value is not None}
    return field(default=default, metadata=known)  # type: ignore[return-value]


def add_flags(command: argparse.ArgumentParser, options: type[Any]) -> None:
    """Add a flag for every field of a dataclass of options."""
    for each in fields(options):
        settings = dict(each.metadata)
        name = settings.pop("name", f"--{each.name.replace('_', '-')}")
        if isinstance(each.default, bool):
            settings["action"] = "store_false" if each.default else "store_true"
        elif each.default is not None:
            shown = ",".join(map(str, each.default)) if isinstance(each.default, tuple) else each.default
            settings["help"] += f" (default: {shown})"
        command.add_argument(name, dest=each.name, default=each.default, **settings)


def options_from(arguments: argparse.Namespace, options: type[Options]) -> Options:
    """Fill a dataclass of options with the values of its flags."""
    return options(**{each.name: getattr(arguments, each.name) for each in fields(options)})  # type: ignore[arg-type]


@dataclass(frozen=True)
class DeviceOptions:
    """Where a measurement without an engine runs, and on what."""

    device: str = flag("auto", "auto is a GPU, if there is one", choices=("auto", "cpu", "cuda"))
    shape: str | None = flag(
        None,
        "sizes of the model; small is 2 layers of d=256 (default: melt-1.6b on a GPU, small on a CPU)",
        choices=("small", "melt-1.6b"),
    )

    def shape_on(self, device: "torch.device") -> str:
        """Return the name of the shape to measure, by default the one that suits the device."""
        return self.shape or ("melt-1.6b" if device.type == "cuda" else "small")
