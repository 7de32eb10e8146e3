"""Files that are whole: written beside the old one, on the disk before they take its place."""

import contextlib
import errno
import math
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path, mode: int = 0o666) -> Iterator[Path]:
    """A file to write in place of `path`. Whatever happens, a reader sees the old content or the new one, and
    so does whoever comes after a power cut; nothing half-written stays behind. A link stays one: what it
    leads to is replaced. mode: of the file, where the process's umask allows it."""
    path = path.resolve()
    half = beside(path)
    try:
        os.close(os.open(half, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, mode))
        yield half
        sync(half)
        os.replace(half, path)
        sync(path.parent)
    finally:
        half.unlink(missing_ok=True)


def write_atomically(path: Path, content: str, mode: int = 0o666) -> None:
    """Write a whole text file (see `replacing`), or into what is no file, such as /dev/stdout."""
    if is_other(path):
        path.write_text(content, encoding="utf-8")
        return
    with replacing(path, mode) as half:
        half.write_text(content, encoding="utf-8")


def sync(path: Path) -> None:
    """Have a file, or the names in a directory, written to the disk; what has no disk is left alone. Raises
    OSError if that fails."""
    place = os.open(path, os.O_RDONLY)
    try:
        os.fsync(place)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):  # some file systems cannot
            raise
    finally:
        os.close(place)


def check_writable(path: Path) -> None:
    """Raise OSError, with the path and why, if `write_atomically` could not write there."""
    trial = path if is_other(path) else beside(path.resolve())
    with trial.open("a", encoding="utf-8"):
        pass
    if trial is not path:
        trial.unlink()


def beside(path: Path) -> Path:
    """Where the new content is written first."""
    return path.with_name(path.name + ".tmp")


def is_other(path: Path) -> bool:
    """Whether something is there that is no file: it can be written into, if at all, and not be replaced."""
    return path.exists() and not path.is_file()


def finite(value: object, digits: int = 17) -> object:
    """JSON of the same shape: floats of so many digits, None for what is not finite."""
    if isinstance(value, dict):
        return {key: finite(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item, digits) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return value
