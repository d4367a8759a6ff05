"""A process that makes runs for `mmqlora.grids`, seen from its parent: on this machine, or on a node of a cluster.

A cluster gets this file by value, so that the workers of Ray import neither mmqlora nor torch. It therefore imports
nothing but the standard library.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from filelock import FileLock

SCRIPT = str(Path(__file__).with_name("_grid_worker.py"))
POLL_S = 0.2  # between two looks at time limits and at runs that another grid holds
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "RAYON_NUM_THREADS",  # Hugging Face's tokenizers
)


class Worker:
    """A child process that runs `_grid_worker.py`, and the run that it is at."""

    key: str
    claim: FileLock | None

    def __init__(self, function: str, threads: int, script: str = SCRIPT) -> None:
        self.log = tempfile.TemporaryFile()  # what runs print; a pipe that nobody empties would block them
        self.process = subprocess.Popen(
            # -P: the script's folder has modules whose names others could mean.
            [sys.executable, "-P", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env={**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(threads)), "PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # so that it can be killed together with the processes that it started
        )
        self.replies = self.process.stdout
        places = [place for place in sys.path if isinstance(place, str)]
        self._send({"parent": os.getpid(), "path": places, "threads": threads, "function": function})

    def start(self, key: str, run: tuple[dict[str, Any], int], claim: FileLock | None = None) -> None:
        self.key, self.claim = key, claim
        self.buffer, self.started, self.logged = b"", time.monotonic(), os.fstat(self.log.fileno()).st_size
        self._send({"config": run[0], "seed": run[1]})

    def _send(self, message: dict[str, Any]) -> None:
        with suppress(BrokenPipeError):  # it has died; the end of its replies says so
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def reply(self, timeout: float | None) -> dict[str, Any] | None:
        """What came of the run, or None while it lasts. A process that died or took too long is no longer alive."""
        # Asked before reading: what it wrote before it died still counts. Not left to the end of the pipe alone, which
        # does not come while a process that it started is left.
        ended = not self.alive
        while wait([self.replies], 0):
            part = os.read(self.replies.fileno(), 1 << 16)
            self.buffer += part
            if self.buffer.endswith(b"\n"):
                return json.loads(self.buffer)
            if not part:
                ended = True
                break
        if ended:
            return self._lost(f"The process {_how_it_ended(self._kill())}.")
        if timeout is not None and time.monotonic() - self.started > timeout:
            self._kill()
            return self._lost(f"The run took longer than {timeout:g} s.")
        return None

    def _kill(self) -> int:
        with suppress(ProcessLookupError, PermissionError):  # macOS: EPERM where only zombies are left
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()

    def _lost(self, why: str) -> dict[str, str]:
        size = os.fstat(self.log.fileno()).st_size
        start = max(self.logged, size - 65536)
        # pread: the child shares the file's position, so it must not move.
        printed = os.pread(self.log.fileno(), size - start, start).decode(errors="replace")
        return {"error": f"{printed.rstrip()}\n{why}"}

    def stop(self) -> None:
        self._kill()
        for file in (self.process.stdin, self.replies, self.log):
            with suppress(OSError):
                file.close()


class Place:
    """A place on a node of a cluster. Runs get a process of their own there too, so that they fail as they do here."""

    def __init__(self, function: str, threads: int, fresh: bool, timeout: float | None, path: list[str]) -> None:
        # First the modules of the grid's own machine, where this node has the same folders.
        places = [place for place in path if os.path.exists(place)]
        sys.path[:] = places + [place for place in sys.path if place not in places]
        found = importlib.util.find_spec("mmqlora")
        if found is None:
            raise ImportError(f"mmqlora is not installed for {sys.executable} on the node {os.uname().nodename}")
        self.script = str(Path(found.origin).with_name("_grid_worker.py"))
        self.function, self.threads, self.fresh, self.timeout = function, threads, fresh, timeout
        self.worker: Worker | None = None

    def run(self, key: str, run: tuple[dict[str, Any], int]) -> dict[str, Any]:
        """Make one run and wait for it. The time limit begins here, not when the grid asked for a place."""
        if self.worker is None:
            self.worker = Worker(self.function, self.threads, self.script)
        self.worker.start(key, run)
        while (reply := self.worker.reply(self.timeout)) is None:
            wait([self.worker.replies], POLL_S)
        if self.fresh or not self.worker.alive:
            self.worker.stop()
            self.worker = None
        return reply


def _how_it_ended(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended itself with exit code {code}"
