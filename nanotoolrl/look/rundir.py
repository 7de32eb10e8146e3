"""What a run leaves on disk: its settings, its logs, its checkpoint; and how it goes on from them."""

import contextlib
import csv
import dataclasses
import hashlib
import json
import math
import os
import pickle
import platform
import shutil
import subprocess
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TextIO
from zipfile import BadZipFile

import torch
import transformers
from safetensors import SafetensorError

from nanotoolrl.chat import readable
from nanotoolrl.commandline import stored_config
from nanotoolrl.config import SETTINGS, Config, Refused
from nanotoolrl.files import finite, replacing, sync, write_atomically
from nanotoolrl.gpu import distributed
from nanotoolrl.loading import finite_weights
from nanotoolrl.look.evaluate import Scores
from nanotoolrl.look.loggers import Logger, logger, numbers_of
from nanotoolrl.look.metrics import NOT_COLUMNS, columns_of, metrics
from nanotoolrl.model import Policy
from nanotoolrl.run import Run, State, Step

CHANGEABLE = ("steps", "out", "track")  # settings that may differ when a run goes on
DIGITS = 6  # of numbers in the logs
# What reading a file raises that is no checkpoint.
UNREADABLE = (
    OSError,
    RuntimeError,
    EOFError,
    AttributeError,
    ImportError,
    ValueError,
    LookupError,
    TypeError,
)
UNREADABLE += (pickle.UnpicklingError, BadZipFile)


class RunDirectory:
    """config.json, metrics.csv, probes.jsonl, rollouts.jsonl, checkpoint.pt, result.json, model/ and models/
    of one run. Of several processes only the first writes. One run at a time owns the directory: `take`."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.config, self.metrics = self.path / "config.json", self.path / "metrics.csv"
        self.rollouts, self.checkpoint = self.path / "rollouts.jsonl", self.path / "checkpoint.pt"
        self.probes = self.path / "probes.jsonl"
        self.result, self.model = self.path / "result.json", self.path / "model"
        self.owner = self.path / "run.lock"
        self.lock: TextIO | None = None
        self.logger: Logger | None = None  # of `--track`
        self.columns = list(metrics())  # of metrics.csv
        self.names = list(SETTINGS)  # of the settings in config.json

    def take(self) -> None:
        """Own the directory until `release` or the end of the process. Refuses, with the owner's number, one
        that another process owns. Where there are no locks (Windows, some network disks) nobody is kept out.
        """
        try:
            import fcntl
        except ImportError:
            return
        try:
            self.lock = self.owner.open("a+", encoding="utf-8")
        except OSError as error:
            raise Refused(f"cannot write into {self.path}: {error.strerror}") from None
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.lock.seek(0)
            number = self.lock.read().strip() or "unknown"
            self.release()
            raise Refused(f"{self.path} belongs to a run that is going on: process {number}") from None
        except OSError:  # a file system without locks
            return
        self.lock.truncate(0)
        self.lock.write(str(os.getpid()))
        self.lock.flush()

    def release(self) -> None:
        """Close the logger, and let others own the directory, whatever becomes of that."""
        logger, self.logger = self.logger, None
        try:
            if logger:
                logger.close()
        finally:
            if self.lock:
                self.lock.close()
                self.lock = None

    def create(self, config: Config) -> None:
        """Make a new one and own it. Refuses, and leaves as it is, a directory that holds anything."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._refuse_unless_empty()
            self.take()
            self._refuse_unless_empty()  # somebody else may have been faster
        except OSError as error:
            raise Refused(f"cannot make the directory {self.path}: {error.strerror}") from None
        self.start(config)

    def _refuse_unless_empty(self) -> None:
        half = self.config.name + ".tmp"  # of a run that was killed while it began
        there = {entry.name for entry in self.path.iterdir()} - {self.owner.name, half}
        if there:
            advice = ", or go on with --resume" if self.config.name in there else ""
            raise Refused(f"{self.path} exists: choose another --out{advice}")

    def start(self, config: Config) -> None:
        """Write the settings, and logs without a line. From here on --resume works."""
        self.write_config(config)
        header = ",".join(self.columns) + "\n"
        for path, content in ((self.metrics, header), (self.probes, ""), (self.rollouts, "")):
            write_atomically(path, content)

    def write_config(self, config: Config) -> None:
        """Resolved settings with versions and git revision. Only its owner may read what names a judge."""
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        versions |= {"transformers": transformers.__version__, "git": git_revision()}
        versions |= {"machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"}
        settings = {name: getattr(config, name) for name in self.names}
        content = json.dumps(settings | {"versions": versions}, indent=1)
        write_atomically(self.config, content, 0o600 if config.judge else 0o666)

    # ----------------------------------------------------------------------------------------------- going on
    def reopen(self, config: Config, given: set[str]) -> tuple[Config, dict | None]:
        """(config of the run with grown steps, checkpoint). The checkpoint is None if the run ended before
        its first one: it then begins anew. Owns the directory and changes nothing in it.

        Refuses, by name, what cannot go on: other settings, edited ones, a checkpoint that is missing or not
        whole, logs that lack a step.
        """
        old = stored_config(self.config)
        written = json.loads(self.config.read_text(encoding="utf-8"))
        self.names = [name for name in SETTINGS if name in written]  # schemes that came later have others
        distributed.from_first(self.take)
        for name in sorted(given - {*CHANGEABLE, "preset"}):
            if getattr(config, name) != getattr(old, name):
                raise Refused(
                    f"only --steps may change on --resume; {name} is {getattr(old, name)!r}, "
                    f"not {getattr(config, name)!r}"
                )
        if "steps" in given and config.steps < old.steps:
            raise Refused(f"--steps may only grow on --resume: the run has {old.steps}")
        steps = config.steps if "steps" in given else old.steps
        track = config.track if "track" in given else old.track
        resumed = old.but(steps=steps, out=str(self.path), track=track)
        if not self.checkpoint.exists():
            if logged_steps(self.metrics):
                raise Refused(
                    f"{self.path} has no checkpoint.pt, and steps in its log: nothing to go on from"
                )
            return resumed, None
        saved = self.read_checkpoint()
        if saved["settings"] != digest(old, self.names):
            raise Refused(f"{self.checkpoint} was made with other settings than those in {self.config}")
        self.kept_lines(old.scheme, saved["step"])
        return resumed, saved

    def rewind(self, config: Config, step: int) -> None:
        """Cut what is newer than the checkpoint from the logs, and write the config of the longer run."""
        for path, lines in self.kept_lines(config.scheme, step).items():
            write_atomically(path, "".join(lines))
        self.write_config(config)

    def kept_lines(self, scheme: str, step: int) -> dict[Path, list[str]]:
        """The lines of every log up to a step. What comes after them may be anything.

        Refuses logs in which one of these steps is missing, twice, or not whole; a missing rollouts.jsonl is
        an empty one. The columns of metrics.csv stay those that the run began with: those of schemes that
        were added since may be missing.
        """
        lines = whole_lines(self.metrics)
        self.columns = lines[0].removesuffix("\n").split(",") if lines else []
        unique = len(set(self.columns)) == len(self.columns)
        whole = lines[:1] and lines[0].startswith("step,") and lines[0].endswith("\n")
        if not (whole and unique and columns_of(scheme) <= set(self.columns) <= metrics().keys()):
            raise Refused(f"{self.metrics}, line 1: expected the columns {','.join(metrics())[:40]}...")
        kept = _up_to(self.metrics, lines[1:], step, self._step_of_row, range(1, step + 1), 2)
        found = {self.metrics: [lines[0], *kept]}
        lines = whole_lines(self.probes)
        steps = range(step + 1) if step or lines else range(0)  # stopped before it had measured the start
        found[self.probes] = _up_to(self.probes, lines, step, _step_of_entry, steps, 1)
        lines = whole_lines(self.rollouts) if self.rollouts.exists() else []
        found[self.rollouts] = _up_to(self.rollouts, lines, step, _step_of_entry, None, 1)
        return found

    def _step_of_row(self, line: str) -> int:
        """The step of a whole row of metrics.csv; ValueError if it is none."""
        (cells,) = csv.reader([line], strict=True)
        if len(cells) != len(self.columns) or not line.endswith("\n") or not cells[0].isdecimal():
            raise ValueError("not a whole row")
        return int(cells[0])

    def restore(self, run: Run, saved: dict) -> None:
        """Put a checkpoint into a run. Refuses one of another size, or with weights that are not finite."""
        try:
            run.policy.model.load_state_dict(saved["model"])
            run.optimizer.load_state_dict(saved["optimizer"])
            run.masters.load(saved["masters"])
            for weight, moments in run.optimizer.state.items():
                shapes = {name: x.shape for name, x in moments.items()}
                if shapes != {"step": (), "exp_avg": weight.shape, "exp_avg_sq": weight.shape}:
                    raise ValueError("the optimiser's moments have other names or shapes than AdamW's")
            run.step = saved["step"]
            run.state = State(**saved["state"])
            torch.set_rng_state(saved["torch_rng"])
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise Refused(
                f"{self.checkpoint} does not fit the model {run.config.model}: {str(error).splitlines()[0]}"
            ) from None
        if not finite_weights(run.policy.model):
            raise Refused(f"{self.checkpoint} holds weights that are not finite")

    def read_checkpoint(self) -> dict:
        """The saved state. Refuses, by name, a file that is half-written, changed, or no checkpoint."""
        try:
            found = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            if not isinstance(found, dict):
                raise TypeError("no dict")
            saved = found["saved"]
            written = found["checksum"]
            intact = checksum(saved) == written
        except UNREADABLE as error:
            raise Refused(
                f"{self.checkpoint} is not a checkpoint of this program, or is half-written "
                f"({type(error).__name__}); nothing was changed"
            ) from None
        if not intact:
            raise Refused(f"{self.checkpoint} has changed since it was written; nothing was changed")
        return saved

    # ------------------------------------------------------------------------------------------------ writing
    def save(self, run: Run, before: Mapping[str, Scores]) -> None:
        """Write the checkpoint; the logs are on the disk before it. Raises OSError if that fails."""
        if not distributed.first():
            return
        state = {
            "step": run.step,
            "model": run.policy.model.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "masters": run.masters.state(),
            "state": vars(run.state),
            "torch_rng": torch.get_rng_state(),
            "before": {way: dataclasses.asdict(scores) for way, scores in before.items()},
            "settings": digest(run.config, self.names),
        }
        for path in (self.metrics, self.probes, self.rollouts):
            sync(path)
        try:
            with replacing(self.checkpoint) as half:
                torch.save({"saved": state, "checksum": checksum(state)}, half)
        except RuntimeError as error:  # of a full disk, says torch
            raise OSError(f"cannot write {self.checkpoint}: {str(error).splitlines()[0]}") from None

    def save_model(self, policy: Policy, name: str = "model") -> None:
        """Write a model directory, in place of an older one, which stays until the new one stands."""
        if not distributed.first():
            return
        target = (self.path / name).resolve()
        half, old = (target.with_name(target.name + end) for end in (".tmp", ".old"))
        with contextlib.ExitStack() as last:
            last.callback(shutil.rmtree, half, ignore_errors=True)
            try:
                policy.save(half)
            except SafetensorError as error:  # of a full disk
                raise OSError(f"cannot write {target}: {error}") from None
            for path in (*half.iterdir(), half):
                sync(path)
            shutil.rmtree(old, ignore_errors=True)
            try:
                if target.exists():
                    os.replace(target, old)
                os.replace(half, target)
            finally:
                if not target.exists() and old.exists():  # stopped between the two
                    os.replace(old, target)
            shutil.rmtree(old, ignore_errors=True)
            sync(target.parent)

    def open_logger(self, config: Config, step: int) -> None:
        """Open that of `--track`, of a run that has made so many steps. Raises Refused if it cannot begin."""
        settings = {name: getattr(config, name) for name in self.names}
        self.logger = logger(config.track, self.path, settings, step)

    def log_probes(self, details: dict) -> None:
        """One line of probes.jsonl."""
        if not distributed.first():
            return
        with self.probes.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite(details, DIGITS), allow_nan=False) + "\n")

    def log(self, run: Run, row: dict, details: dict, step: Step) -> None:
        """One metrics row, one line of details, and the first `rollout_groups` groups of the step. Numbers
        and groups go to the logger, too.

        Raises Refused if the scheme measured what its decorator does not declare.
        """
        config = run.config
        if odd := row.keys() - columns_of(config.scheme) - NOT_COLUMNS:
            raise Refused(
                f"the scheme {config.scheme} measured {', '.join(sorted(odd))}, which its decorator does not "
                "declare: add it to `metrics`"
            )
        if not distributed.first():
            return
        with self.metrics.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerow([text(row.get(name)) for name in self.columns])
        self.log_probes(details)
        shown = step.trajectories[: config.rollout_groups * config.group]
        table = []  # of the logger
        with self.rollouts.open("a", encoding="utf-8") as file:
            for i, one in enumerate(shown):
                group, rollout = divmod(i, config.group)
                text_of_one, advantage = (
                    run.policy.chat.decode(one.tokens),
                    round(step.advantages[i].item(), 4),
                )
                entry = {"step": run.step, "group": group, "rollout": rollout}
                entry |= {"advantage": advantage, "text": text_of_one} | dataclasses.asdict(one)
                entry["logprobs"] = [round(x, 4) for x in one.logprobs]
                entry["loss_mask"] = [int(x) for x in one.loss_mask]
                file.write(json.dumps(finite(entry), allow_nan=False) + "\n")
                states = " ".join(one.states)
                table.append((one.task_id, rollout, one.reward, advantage, states, readable(text_of_one)))
        if self.logger:
            self.logger.write(run.step, numbers_of(row), table)


def digest(config: Config, names: Iterable[str]) -> str:
    """A short name of these settings, but for those that may change when a run goes on."""
    kept = set(names) - set(CHANGEABLE)
    fixed = {name: value for name, value in vars(config).items() if name in kept}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def checksum(value: object, start: int = 0) -> int:
    """CRC-32 of a nested state: its keys, its numbers, every byte of its tensors."""
    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().reshape(-1).view(torch.uint8).numpy()
        return zlib.crc32(data, zlib.crc32(f"{value.dtype}{tuple(value.shape)}".encode(), start))
    if isinstance(value, dict):
        for key, item in value.items():
            start = checksum(item, zlib.crc32(repr(key).encode(), start))
        return zlib.crc32(b"}", start)
    if isinstance(value, list | tuple):
        for item in value:
            start = checksum(item, start)
        return zlib.crc32(b"]", start)
    return zlib.crc32(repr(value).encode(), start)


def text(value: object) -> str:
    """A metrics cell: empty where a column does not apply or the number is not finite."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    return f"{value:.{DIGITS}g}" if isinstance(value, float) else str(value)


def whole_lines(path: Path) -> list[str]:
    """The lines of a log with their ends; the last one may have none. Refuses a log that cannot be read."""
    try:
        return path.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"{path} cannot be read: {error}") from None


def logged_steps(metrics: Path) -> int:
    """How many rows a metrics.csv has; 0 if there is no such file."""
    return len(whole_lines(metrics)[1:]) if metrics.exists() else 0


def _step_of_entry(line: str) -> int:
    """The step of a whole line of a JSONL log; ValueError if it is none."""
    entry = json.loads(line)
    if not isinstance(entry, dict) or type(entry.get("step")) is not int or not line.endswith("\n"):
        raise ValueError("not a whole line")
    return entry["step"]


def _up_to(
    path: Path,
    lines: list[str],
    step: int,
    step_of: Callable[[str], int],
    wanted: range | None,
    first: int,
) -> list[str]:
    """The lines up to a step, in order. wanted: their steps, once each; None: rising ones. first: the number
    of the first line, for the refusal."""
    kept = []
    steps = []
    for line in lines:
        try:
            at = step_of(line)
        except (ValueError, RecursionError, csv.Error):
            break
        if at > step:
            break
        due = range(steps[-1] if steps else 0, step + 1) if wanted is None else wanted[len(steps) :][:1]
        if at not in due:
            break
        kept.append(line)
        steps.append(at)
    later = lines[len(kept) :]
    if (wanted is not None and len(kept) < len(wanted)) or any(_is_of(line, step, step_of) for line in later):
        raise Refused(
            f"{path}, line {first + len(kept)}: expected the steps up to {step} in order, each whole and in "
            "its place; nothing was changed"
        )
    return kept


def _is_of(line: str, step: int, step_of: Callable[[str], int]) -> bool:
    """Whether a line belongs to a step up to this one."""
    try:
        return step_of(line) <= step
    except (ValueError, RecursionError, csv.Error):
        return False


def git_revision() -> str:
    """Commit of the source tree, "+" if it was changed; "unknown" outside a git checkout."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"
