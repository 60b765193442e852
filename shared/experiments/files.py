"""Files that are either absent, old, or complete: never half-written."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from shared.experiments.errors import UserError

# What the system says when nothing more can be written, and what to do.
FULL = {
    errno.ENOSPC: "disk full",
    errno.EDQUOT: "disk quota used up",
    errno.EFBIG: "limit on file sizes (ulimit -f) reached",
}


class DiskFull(UserError):
    """There is no space for a file."""


def write_atomic(path: Path, write: Callable[[IO], object], binary: bool = False) -> None:
    """Calls `write(file)` on a temporary neighbour of `path`, syncs it, and renames it over `path`.

    Raises:
        DiskFull: there is no space; `path` is as it was.
    """
    path = Path(path)
    with disk_full_explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(fd, "wb" if binary else "w", encoding=None if binary else "utf-8") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
        _sync_directory(path.parent)


@contextlib.contextmanager
def disk_full_explained(path: Path) -> Iterator[None]:
    """Turns the many ways in which libraries say `no space left` into a sentence that says what to do.

    Raises:
        DiskFull: whatever was raised, if it comes from a full disk.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not (reason := _disk_full(error)):
            raise
        raise DiskFull(f"{reason} while writing {path}: free some space and run the same command again") from error


def _disk_full(error: BaseException | None) -> str:
    """What of FULL is behind `error`; "" if nothing is."""
    while error is not None:
        for number, reason in FULL.items():
            # safetensors gives the number as text only
            if (isinstance(error, OSError) and error.errno == number) or f"(os error {number})" in str(error):
                return reason
        if "basic_ios::clear: iostream error" in str(error):  # all that torch.save to a path has to say
            return FULL[errno.ENOSPC]
        error = error.__cause__ or error.__context__
    return ""


def _sync_directory(path: Path) -> None:
    # Without this a power cut can forget the rename although the data is on the disk.
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def lock(directory: Path) -> Iterator[None]:
    """Holds `directory` for this process alone; the system lets go of it however the process ends.

    Raises:
        UserError: another process holds it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise UserError(
                f"{directory} is in use by {file.read() or 'another process'}: wait for it to finish, or stop it"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def remove_leftovers(directory: Path) -> None:
    """Deletes the temporary files of writers that were killed. Only for who holds the directory's lock."""
    for path in directory.glob(".*.tmp"):
        path.unlink()


def write_text(path: Path, text: str) -> None:
    write_atomic(path, lambda file: file.write(text))


def write_json(path: Path, value: Any) -> None:
    """Refuses NaN and infinity: they are not JSON, and a result that holds one is a defect to look at."""
    text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False)
    write_text(path, text + "\n")


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    def write(file: IO) -> None:
        for row in rows:
            file.write(json.dumps(row, allow_nan=False) + "\n")

    write_atomic(path, write)


def read_json(path: Path) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not even text
        raise UserError(f"{path}: not valid JSON ({error}); delete it and run again") from error


def read_jsonl(path: Path) -> list[dict]:
    """Rows of a file written by appending: a last line cut short by a crash is left out."""
    rows = []
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise UserError(f"{path}:{number}: not valid JSON ({error})") from error
    return rows
