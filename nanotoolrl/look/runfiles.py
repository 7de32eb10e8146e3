"""What a finished run left on the disk, read for people who look at it."""

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


class Unreadable(Exception):
    """A run directory cannot be reported on; the text says which file and why."""


@dataclass
class RunFiles:
    """What a run left: settings, columns of metrics.csv (None: an empty cell), lines of probes.jsonl."""

    path: Path
    name: str
    config: dict
    metrics: dict[str, list[float | None]]
    probes: list[dict]

    def series(self, column: str) -> tuple[list[float], list[float]]:
        """(steps, values) of a column where it is not empty; from step 0, the start, if that was measured."""
        pairs = zip(self.metrics.get("step", []), self.metrics.get(column, []))
        found = [(line["step"], line[column]) for line in self.probes[:1] if column in line]
        found += [(step, value) for step, value in pairs if value is not None]
        return [step for step, _ in found], [value for _, value in found]

    def details(self, *keys: str) -> tuple[list[float], list[float]]:
        """(steps, values) of a nested entry of probes.jsonl, given by its keys."""
        steps, values = [], []
        for line in self.probes:
            value = line
            for key in keys:
                value = value.get(key) if isinstance(value, dict) else None
            if value is not None:
                steps.append(line["step"])
                values.append(value)
        return steps, values

    @property
    def tokens(self) -> list[str]:
        """The control tokens that were probed."""
        return next((list(line["tokens"]) for line in self.probes if "tokens" in line), [])


def read_run(path: Path) -> RunFiles:
    """Read a run directory. Raises Unreadable."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        with (path / "metrics.csv").open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        metrics = {name: [_number(row[name]) for row in rows] for name in rows[0]}
        probes = [json.loads(line) for line in logged_lines(path / "probes.jsonl")]
        if not {"scheme", "model"} <= config.keys() or not all("step" in line for line in probes):
            raise KeyError("scheme, model or step is missing")
        if None in metrics["step"]:
            raise ValueError("metrics.csv has a row without a step")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise Unreadable(f"{path} is not a finished step of a run: {type(error).__name__}: {error}") from None
    return RunFiles(path, path.resolve().name, config, metrics, probes)


def _number(cell: str) -> float | None:
    """A cell of metrics.csv; None if it is empty or not finite."""
    value = float(cell or "nan")
    return value if math.isfinite(value) else None


def tell_apart(runs: Sequence[RunFiles]) -> None:
    """Name runs by their directories, with the parent's where two are alike, for legends and menus."""
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = f"{run.path.resolve().parent.name}/{run.name}"
        run.name = run.name.lstrip("_") or "run"  # matplotlib hides labels that begin with one


def logged_lines(path: Path) -> list[str]:
    """Whole lines of a log; none where there is no such file."""
    if not path.exists():
        return []
    return [
        line
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True)
        if line.endswith("\n") and line.strip()
    ]
