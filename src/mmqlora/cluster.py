"""Grids of runs on a cluster, through Ray: the same runs, the same records, on as many machines as there are.

Example:
    >>> run_grid("experiments.demo:run", runs, path, cluster="local")  # doctest: +SKIP
    >>> run_grid("experiments.demo:run", runs, path, cluster="10.0.0.1:6379", processes=64, gpus=1)  # doctest: +SKIP

It needs Ray: ``pip install 'ray[client]'``. ``"local"`` starts a cluster on this machine and stops it again. Any other
string is the address of one that runs: ``"auto"`` for that of the machine this is started on, ``"host:6379"`` from a
machine of the cluster, ``"ray://host:10001"`` from outside. A process that has called ``ray.init`` itself, with a
``runtime_env`` for example, goes on with that cluster by ``"auto"``, and stays connected. A cluster that asks for a
token gets it as Ray has it: from ``RAY_AUTH_TOKEN``, ``RAY_AUTH_TOKEN_PATH`` or Ray's own file, and only where
``RAY_AUTH_MODE=token`` is set, as Ray sends none to an address by itself.

Ray only finds the places. On its node a run gets the process that it would get here, with the same threads, time limit
and last words, and the record comes back here to be written. So nodes need no common disk; they need mmqlora, the
module of the function, and what the runs read. Modules are looked for in the folders of ``sys.path`` here as far as a
node has them too, then where the node itself looks.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any
from urllib.parse import urlsplit

import psutil
from filelock import FileLock

from . import _grid_process
from .errors import GridError

logger = logging.getLogger("mmqlora")

_ANSWER_S = 10  # for a machine that is asked whether it is there
_STARTS = 3  # on a busy machine: Ray gives up where its own agents take longer than 15 s to start
_STORE_BYTES = 100 * 2**20  # records pass through it, nothing else; Ray takes no less than 75 MiB
_FITS = (
    "Expected 'local' to start a cluster on this machine, 'auto' for one that runs on it, or an address such as "
    "'host:6379' or 'ray://host:10001'."
)


class Cluster:
    """A connection to a Ray cluster, for one grid.

    Args:
        address: ``"local"``, ``"auto"``, or an address.
        processes: runs at the same time.
        threads: processor cores of each.
        gpus: GPUs of each.
    """

    def __init__(self, address: str, processes: int, threads: int, gpus: float) -> None:
        # Set before Ray is imported, which reads it then: nobody's cluster is reported to anybody.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
            from ray import is_initialized  # not there where "ray" is but a folder of that name
        except ImportError as error:
            raise GridError(
                f"cluster={address!r} needs Ray, which can't be imported ({error}): pip install 'ray[client]'"
            ) from error
        self.ray, self.address, self.needs = ray, address, {"CPU": threads, "GPU": gpus}
        self.own = not is_initialized()
        if not self.own and address not in ("auto", ray.get_runtime_context().gcs_address):
            raise GridError(
                f"cluster={address!r}, but this process is connected to a Ray cluster already. Expected cluster='auto' "
                "to go on with that one, or ray.shutdown() before."
            )
        if self.own:
            self._connect(processes)
        try:
            self._look_for_room()
        except BaseException:
            self.close()
            raise

    def _connect(self, processes: int) -> None:
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if self.address == "local":
            options |= {
                "num_cpus": processes * self.needs["CPU"],
                "include_dashboard": False,
                "object_store_memory": _STORE_BYTES,
            }
        elif self.address != "auto":
            _ask(self.address)
        for left in reversed(range(_STARTS if self.address == "local" else 1)):
            before = set(psutil.Process().children(recursive=True))
            try:
                with _quiet(), _soon() if self.address != "local" else nullcontext():
                    self.ray.init(address=self.address, **options)
                return
            except BaseException as error:  # Ray raises many kinds, by its version and by what is wrong
                self.ray.shutdown()
                self._end_all_but(before)
                if not isinstance(error, Exception):
                    raise
                if not left:
                    raise GridError(f"cluster={self.address!r} can't be used ({error!r}). {_FITS}") from error

    def _end_all_but(self, before: set[psutil.Process]) -> None:
        """End what a start that failed has left; Ray itself would, but only with this process."""
        home = os.path.dirname(self.ray.__file__)
        for process in set(psutil.Process().children(recursive=True)) - before:
            with suppress(psutil.Error):
                if any(home in word for word in process.cmdline()):
                    process.kill()
                    process.wait()

    def _look_for_room(self) -> None:
        rooms = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        if any(all(room.get(what, 0) >= much for what, much in self.needs.items()) for room in rooms):
            return
        most = {what: max((room.get(what, 0) for room in rooms), default=0) for what in self.needs}
        words = f"cluster={self.address!r}: no node has {self.needs}, what one run asks for; the most are {most}."
        if self.address == "local":
            raise GridError(f"{words} Ask for less with threads= and gpus=.")
        logger.warning("%s The runs wait for such a node to join.", words)

    def seat(self, function: str, fresh: bool, timeout: float | None) -> Seat:
        """Ask for a place on some node."""
        pickle = self.ray.cloudpickle
        pickle.register_pickle_by_value(_grid_process)  # nodes then need not import mmqlora and torch for it
        try:
            # No retries of Ray's: the grid counts its own, whatever went wrong.
            place = self.ray.remote(_grid_process.Place).options(
                num_cpus=self.needs["CPU"], num_gpus=self.needs["GPU"], max_restarts=0, max_task_retries=0
            )
            path = [os.path.abspath(entry) for entry in sys.path if isinstance(entry, str)]
            return Seat(self.ray, place.remote(function, self.needs["CPU"], fresh, timeout, path))
        finally:
            pickle.unregister_pickle_by_value(_grid_process)

    def wait(self, replies: list[Any], timeout: float) -> None:
        """Wait until a reply is there, not longer than the time in seconds."""
        self.ray.wait(replies, timeout=timeout)

    def close(self) -> None:
        """Leave the cluster; a local one ends."""
        if self.own:
            self.ray.shutdown()


class Seat:
    """A place on a node and the run that is made there, for the grid what a process on this machine is."""

    key: str
    claim: FileLock

    def __init__(self, ray: Any, place: Any) -> None:
        self.ray, self.place, self.alive = ray, place, True

    def start(self, key: str, run: tuple[dict[str, Any], int], claim: FileLock) -> None:
        """Ask for a run; it waits for its place where the cluster is full."""
        self.key, self.claim = key, claim
        self.replies = self.place.run.remote(key, run)

    def reply(self, timeout: float | None) -> dict[str, Any] | None:
        """What came of the run, or None while it waits or lasts. The node keeps the time limit."""
        if not self.ray.wait([self.replies], timeout=0)[0]:
            return None
        try:
            return self.ray.get(self.replies)
        except Exception as error:  # of Ray: the place was lost, or could not be made
            self.alive = False
            return {"error": f"{str(error).strip()}\nRay lost the run ({type(error).__name__})."}

    def stop(self) -> None:
        """Give the place back, and end what runs there."""
        with suppress(Exception):  # nothing to end where the cluster itself is gone
            self.ray.kill(self.place)


def _ask(address: str) -> None:
    """Look whether anybody is there at all: Ray takes a minute and more to give up."""
    try:
        parts = urlsplit(address if "://" in address else f"ray://{address}")
        if parts.scheme != "ray":
            return  # a service's own, which only Ray can resolve
        if parts.hostname is None or parts.port is None:
            raise ValueError("no host and port in it")
        socket.create_connection((parts.hostname, parts.port), timeout=_ANSWER_S).close()
    except (OSError, ValueError) as error:
        raise GridError(f"cluster={address!r} does not answer ({error}). {_FITS}") from error


@contextmanager
def _soon() -> Iterator[None]:
    """Ray asks an address twenty times, 40 s each, where something answers that is no Ray; here twice."""
    name = "RAY_gcs_server_port_wait_time_s"
    if name in os.environ:
        yield  # somebody knows his cluster
        return
    os.environ[name] = "2"
    try:
        yield
    finally:
        del os.environ[name]  # a cluster that is started later in this process would not get the time it needs


@contextmanager
def _quiet() -> Iterator[None]:
    """Ray says at every start that it started, where its documentation is, and that connections need a token."""
    log = logging.getLogger("ray")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
