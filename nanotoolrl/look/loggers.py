"""`--track`: a run's numbers and rollouts in tensorboard, trackio or wandb, beside its own files.

The packages are imported only where one is asked for. A logger has a name of its own for a run, which is kept
in the run directory, so that a run that goes on (`--resume`) goes on there, too.
"""

import importlib
import importlib.util
import math
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from nanotoolrl.config import Refused
from nanotoolrl.look.arms import heading, line_of

PROJECT = "nanotoolrl"
COLUMNS = ("task", "rollout", "reward", "advantage", "states", "conversation")  # of the table of rollouts
NAMED = "log.id"  # file in the run directory


class Logger(Protocol):
    """What takes a step's numbers, and its rollouts as rows of `COLUMNS`."""

    def write(self, step: int, numbers: Mapping[str, float], rollouts: Sequence[Sequence[Any]]) -> None: ...

    def close(self) -> None: ...


def absent(name: str) -> str:
    """Why a logger cannot be had, or ""."""
    spec = None if name == "none" else importlib.util.find_spec(name)
    there = name == "none" or (spec is not None and spec.origin is not None)  # a mere folder has none
    return "" if there else f"--track {name} needs the package {name}: pip install {name}"


def logger(name: str, directory: Path, settings: Mapping[str, Any], step: int) -> Logger | None:
    """The logger of a run that has made so many steps; None for "none". It shares the settings, but for the
    address of a judge. Raises Refused if it cannot begin."""
    shared = {key: value for key, value in settings.items() if key != "judge"}
    if name == "none":
        return None
    try:
        if name == "tensorboard":
            return TensorBoard(directory, shared, step)
        return Tracked(importlib.import_module(name), directory, shared)
    except Exception as error:  # no login, no network, a full disk: whatever such a package raises
        raise Refused(f"--track {name} cannot begin: {type(error).__name__}: {error}") from None


class TensorBoard:
    """Event files in OUT/tensorboard: `tensorboard --logdir runs`. Steps made anew replace others."""

    def __init__(self, directory: Path, settings: Mapping[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)
        if step == 0:
            self.writer.add_text("settings", table(("setting", "value"), [*settings.items()]), 0)

    def write(self, step: int, numbers: Mapping[str, float], rollouts: Sequence[Sequence[Any]]) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)
        if rollouts:
            self.writer.add_text("rollouts", table(COLUMNS, rollouts), step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Tracked:
    """trackio or wandb, whose interface is the same: a run in the project nanotoolrl. trackio writes to the
    disk, wandb sends all of it to its server unless `WANDB_MODE=offline`. Steps that are made anew after a
    run was killed are in trackio twice; wandb keeps the first."""

    def __init__(self, module: Any, directory: Path, settings: Mapping[str, Any]) -> None:
        self.module = module
        path = directory / NAMED
        if not path.is_file():
            path.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
        name = f"{directory.name}-{path.read_text(encoding='utf-8')}"
        own = {"id": name, "dir": str(directory)} if module.__name__ == "wandb" else {}
        module.init(project=PROJECT, name=name, config=dict(settings), resume="allow", **own)

    def write(self, step: int, numbers: Mapping[str, float], rollouts: Sequence[Sequence[Any]]) -> None:
        rows = [[*row] for row in rollouts]
        shown = {"rollouts": self.module.Table(columns=[*COLUMNS], data=rows)} if rows else {}
        self.module.log({**numbers, **shown}, step=step)

    def close(self) -> None:
        self.module.finish()


def numbers_of(row: Mapping[str, Any]) -> dict[str, float]:
    """The columns of metrics.csv that have a finite number in this step, but for the step's own."""
    named = {name: value for name, value in row.items() if isinstance(value, int | float) and name != "step"}
    return {name: float(value) for name, value in named.items() if math.isfinite(value)}


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; what a model wrote cannot leave its cell."""

    def cell(value: Any) -> str:
        text = f"{value}".replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;")
        return "<br>".join(text.splitlines())

    return "\n".join([*heading(columns), *(line_of([*map(cell, row)]) for row in rows)])
