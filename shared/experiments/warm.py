"""A process that has imported the heavy libraries once and forks for each stage that it is asked for.

Importing torch and transformers takes 5 s of CPU. A paper at scale tiny has dozens of stages of half a minute, at scale
smoke of a second, so that this would be a good part of their time. One such process serves one slot of the scheduler:
it has the slot's environment and has loaded libraries only, no code of a paper (which it reads, for the stages' keys).

It forks, so it is for stages without a GPU alone: CUDA does not survive a fork.

Pages that a child does not write to stay shared with it. So the objects of the libraries are kept from the garbage
collector, and the child ends without taking them apart: this saves 1 to 3 s per stage.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from shared.experiments import keys
from shared.experiments.run import die_with_parent

HEAVY = ("torch", "transformers", "accelerate", "trl", "peft")


class WarmProcess:
    """The side of the scheduler: starts stages, one at a time."""

    def __init__(self, modules: Iterable[str], environment: Mapping[str, str], root: Path):
        self._server = subprocess.Popen(
            [sys.executable, "-m", "shared.experiments.warm", *modules],
            cwd=root,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,  # what one reply leaves in the pipe must not end up in a buffer
            start_new_session=True,
            preexec_fn=die_with_parent,
        )

    def start(self, command: Sequence[str], out: Path) -> Fork | None:
        """Runs `command`, `python -m MODULE ...`, printing to the file `out`; waits for the imports to be done.

        Returns:
            The running process; None if this server has ended (see `main`).
        """
        try:
            self._server.stdin.write(json.dumps({"argv": list(command[2:]), "out": str(out)}).encode() + b"\n")
            reply = self._server.stdout.readline()
        except BrokenPipeError:
            return None
        return Fork(int(reply), self._server) if reply else None

    def close(self) -> None:
        """Ends the process; what it has started must have ended."""
        self._server.kill()
        self._server.wait()
        self._server.stdin.close()
        self._server.stdout.close()


class Fork:
    """A stage that a WarmProcess has started, in a process group of its own; what we need of subprocess.Popen."""

    def __init__(self, pid: int, server: subprocess.Popen):
        self.pid, self.returncode, self._server, self._reply = pid, None, server, b""

    def poll(self) -> int | None:
        """The exit status (-n: killed by signal n) once it has ended, else None."""
        if self.returncode is None:
            fd = self._server.stdout.fileno()
            os.set_blocking(fd, False)
            with contextlib.suppress(BlockingIOError):
                part = os.read(fd, 100)
                self._reply += part
                if not part:  # the server is gone and has taken the stage along
                    self.returncode = -signal.SIGKILL
            os.set_blocking(fd, True)
            if self._reply.endswith(b"\n"):
                self.returncode = int(self._reply)
        return self.returncode


def heavy_modules(names: Iterable[str]) -> list[str]:
    """Those of the imported `names` that belong to libraries which take long to import."""
    return sorted(name for name in set(names) if name.split(".")[0] in HEAVY)


def main(modules: Sequence[str]) -> None:
    """Imports `modules`; then reads one request per line, forks, and writes the child's pid and its exit status."""
    for name in modules:
        _import(name)
    torch = sys.modules.get("torch")
    if torch is not None and torch.version.cuda is not None:
        return None  # a stage might find a GPU
    gc.collect()
    gc.freeze()
    server = os.getpid()
    while line := sys.stdin.buffer.readline():
        request = json.loads(line)
        with contextlib.suppress(Exception):  # a module elsewhere, or one that the stage will complain about
            keys.remember(Path(*request["argv"][0].split(".")).with_suffix(".py").resolve(), Path.cwd())
        pid = os.fork()
        if pid == 0:
            os._exit(_become(request, server))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    return None


def _import(name: str) -> None:
    """Imports `package.module` or, as `from package.module import name` does, loads its attribute of that name."""
    with contextlib.suppress(Exception):  # the stage that needs it will say what is wrong
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            package, _, attribute = name.rpartition(".")
            getattr(importlib.import_module(package), attribute)


def _become(request: Mapping, server: int) -> int:
    """In the child: goes on as `python -m MODULE ...`, in a group of its own, and returns its exit status."""
    os.setsid()
    die_with_parent()
    if os.getppid() != server:  # it ended before we asked
        os._exit(1)
    files = os.open(os.devnull, os.O_RDONLY), os.open(request["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for fd, source in zip((0, 1, 2), (files[0], files[1], files[1]), strict=True):
        os.dup2(source, fd)
    for fd in files:
        os.close(fd)
    module, *sys.argv[1:] = request["argv"]
    status = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as error:
        status = _status(error)
    except BaseException:
        traceback.print_exc()
        status = 1
    # What the interpreter does at its end before it takes everything apart.
    threading._shutdown()
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError):  # a full disk
        sys.stdout.flush()
        sys.stderr.flush()
    return status


def _status(error: SystemExit) -> int:
    if error.code is None or isinstance(error.code, int):
        return (error.code or 0) & 0xFF
    print(error.code, file=sys.stderr)
    return 1


if __name__ == "__main__":
    main(sys.argv[1:])
