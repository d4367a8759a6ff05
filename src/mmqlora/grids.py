"""Grids of runs: what is missing in a file of records is run, in processes that may die at any moment.

Example:
    >>> runs = [({"method": m}, seed) for seed in range(1, 7) for m in ("lora", "qlora")]
    >>> grid = run_grid("experiments.demo:run", runs, "records/demo.jsonl")  # doctest: +SKIP
    >>> grid.records, grid.failures  # doctest: +SKIP

The file of records is all that a grid knows: start it again after a crash, and it goes on. The parent process writes
the records, each whole (`records.append_record`). It claims a run by a lock that the operating system drops when the
process dies, and looks at the file once more behind the lock; so two grids on one file never make a run twice.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import operator
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from ._grid_process import POLL_S, SCRIPT, Worker
from .cluster import Cluster, Seat
from .errors import GridError
from .records import append_record, read_records, run_id

__all__ = ["Failure", "Grid", "run_grid"]

logger = logging.getLogger("mmqlora")

_ERROR_LINES = 20


@dataclass(frozen=True)
class Failure:
    """A run that failed as often as it was tried.

    Attributes:
        config: Its configuration.
        seed: Its seed.
        attempts: How often it was tried.
        error: What ended it the last time: the last lines of the traceback, or of what a crashed process printed.
    """

    config: dict[str, Any]
    seed: int
    attempts: int
    error: str


@dataclass(frozen=True)
class Grid:
    """What `run_grid` returns.

    Attributes:
        records: The record of every run that has one, in the order of the runs.
        failures: The runs that failed, in the same order.
    """

    records: list[dict[str, Any]]
    failures: list[Failure]


def run_grid(
    function: str | Callable[[dict[str, Any], int], Mapping[str, Any]],
    runs: Iterable[tuple[Mapping[str, Any], int]],
    path: str | os.PathLike[str],
    *,
    processes: int = 2,
    threads: int = 1,
    retries: int = 1,
    timeout: float | None = None,
    fresh: bool = False,
    progress: bool = True,
    cluster: str | None = None,
    gpus: float = 0,
) -> Grid:
    """Run what is missing in a file of records; what is there is never run again.

    Example:
        >>> runs = [({"method": m}, seed) for seed in range(1, 7) for m in ("lora", "qlora")]
        >>> grid = run_grid("experiments.demo:run", runs, "records/demo.jsonl", timeout=600)  # doctest: +SKIP
        >>> grid.failures  # doctest: +SKIP
        []

    Args:
        function: ``"package.module:callable"``, or the callable itself where a new process can import it. It is
            called with a configuration and a seed and returns a record, as `records.make_record` makes them.
        runs: configurations, which JSON can hold, each with a seed; no two alike.
        path: a ``.jsonl`` file of the records of one experiment. It is made where missing.
        processes: runs at the same time.
        threads: threads of each.
        retries: how often a run is tried again that raised an error, crashed, was killed, or took too long.
        timeout: seconds that a run may take, with the imports of its process; None for no limit.
        fresh: a new process for each run. It costs the imports each time. Ask for it where peak memory is measured:
            a process that made other runs before has the memory that they left behind.
        progress: show a progress bar with an estimate of the time left.
        cluster: where the runs are made: None for processes of this machine; ``"local"`` for a Ray cluster that is
            started on this machine and stopped at the end; else the address of a running one, as `cluster` explains.
        gpus: GPUs of each run on a cluster, such as 1, or 0.5 for two runs on one GPU. A run sees no others.

    Returns:
        A `Grid`. A run that fails does not stop the others: look at ``failures``.

    Raises:
        GridError: the function can't be imported, two runs are alike, a configuration is not JSON, an option is out
            of range, the file holds another experiment's records too, Ray is not installed, or the cluster does not
            answer.
        RecordError: the file is damaged, or the disk refused a record.
    """
    name, wanted, path = _importable(function), _by_key(runs), Path(path)
    _check(processes, threads, retries, timeout, cluster, gpus)
    waiting = deque(key for key in wanted if key not in _recorded(path))
    attempts: Counter[str] = Counter()
    failures: dict[str, Failure] = {}
    busy: list[Worker | Seat] = []
    idle: list[Worker | Seat] = []
    # Not where everything is recorded: a cluster takes a while to start.
    nodes = Cluster(cluster, processes, threads, gpus) if cluster is not None and waiting else None
    # smoothing=0: runs take the same time, so the mean of all says best how long the rest takes.
    bar = tqdm(
        total=len(wanted),
        initial=len(wanted) - len(waiting),
        desc=path.stem,
        unit="run",
        smoothing=0,
        disable=not progress,
    )
    try:
        while waiting or busy:
            for _ in range(len(waiting)):
                if len(busy) == processes:
                    break
                key = waiting.popleft()
                claim = _claim(path, key)
                if claim is None:
                    waiting.append(key)  # another grid is at it; look again later, as it may fail
                elif key in _recorded(path):
                    _release(claim, recorded=True)
                    bar.update()
                else:
                    attempts[key] += 1
                    while idle and not idle[-1].alive:  # killed while it waited
                        idle.pop().stop()
                    worker = (
                        idle.pop() if idle else nodes.seat(name, fresh, timeout) if nodes else Worker(name, threads)
                    )
                    busy.append(worker)
                    worker.start(key, wanted[key], claim)
            if not busy:
                time.sleep(POLL_S)
                continue
            (nodes.wait if nodes else wait)([worker.replies for worker in busy], POLL_S)
            for worker in list(busy):
                reply = worker.reply(timeout)
                if reply is None:
                    continue
                key, (config, seed) = worker.key, wanted[worker.key]
                error = reply.get("error") or _mismatch(reply["record"], config, seed, path)
                if error is None:
                    append_record(path, reply["record"])
                    bar.update()
                else:
                    logger.warning("%s, seed %d, attempt %d failed: %s", config, seed, attempts[key], _tail(error, 1))
                    if attempts[key] <= retries:
                        waiting.append(key)
                    else:
                        failures[key] = Failure(config, seed, attempts[key], _tail(error))
                        bar.set_postfix(failed=len(failures))
                _release(worker.claim, recorded=error is None)
                busy.remove(worker)
                if (fresh and not nodes) or not worker.alive:
                    worker.stop()
                else:
                    idle.append(worker)
    finally:
        bar.close()
        for worker in busy + idle:
            worker.stop()
        for worker in busy:
            _release(worker.claim, recorded=False)
        if nodes:
            nodes.close()
    done = _recorded(path)
    return Grid([done[key] for key in wanted if key in done], [failures[key] for key in wanted if key in failures])


def _tail(text: str, lines: int = _ERROR_LINES) -> str:
    return "\n".join(text.strip().splitlines()[-lines:])


def _importable(function: str | Callable[..., Any]) -> str:
    """The name by which a new process finds the function."""
    if getattr(sys.modules["__main__"], "__file__", None) == SCRIPT:
        raise GridError(
            "run_grid was called while a process of a grid imported the function's module. "
            'Put the call behind if __name__ == "__main__":'
        )
    if isinstance(function, str):
        name = function
    else:
        module = getattr(function, "__module__", None)
        if module == "__main__":  # started by python -m, it has another name for everybody else
            module = getattr(getattr(sys.modules[module], "__spec__", None), "name", module)
        name = f"{module}:{getattr(function, '__qualname__', repr(function))}"
    module, _, attribute = name.partition(":")
    try:
        if module == "__main__" or not attribute:
            raise ImportError("no name of a module and of a function in it")
        found = operator.attrgetter(attribute)(importlib.import_module(module))
    except Exception as error:  # a module may raise anything
        raise GridError(
            f"{name!r} can't be imported by a new process ({error}). Expected a function of a module, neither of a "
            "notebook nor inside another function, such as run_grid('experiments.demo:run', ...)."
        ) from error
    if not callable(found):
        raise GridError(f"{name!r} is a {type(found).__name__}; expected a function of a configuration and a seed.")
    return name


def _key(config: Any, seed: Any) -> str:
    return json.dumps([config, seed], sort_keys=True, allow_nan=False)


def _by_key(runs: Iterable[tuple[Mapping[str, Any], int]]) -> dict[str, tuple[dict[str, Any], int]]:
    wanted: dict[str, tuple[dict[str, Any], int]] = {}
    for number, run in enumerate(runs):
        try:
            config, seed = run
            key = _key(dict(config), seed)
        except (TypeError, ValueError) as error:
            raise GridError(
                f"Run {number}, {run!r}, is no configuration and seed that JSON can hold ({error}). Expected such as "
                "({'method': 'lora', 'rank': 8}, 1): strings, finite numbers, lists and dictionaries."
            ) from error
        if not isinstance(seed, int):
            raise GridError(f"Run {number} has the seed {seed!r}; expected an int, such as 1.")
        if key in wanted:
            raise GridError(f"Run {number}, {config} with seed {seed}, is there twice. Name every run once.")
        wanted[key] = (json.loads(key)[0], seed)  # as the record file will have it: a tuple is a list there
    return wanted


def _check(processes: int, threads: int, retries: int, timeout: float | None, cluster: str | None, gpus: float) -> None:
    for name, value, least in (("processes", processes, 1), ("threads", threads, 1), ("retries", retries, 0)):
        if value < least:
            raise GridError(f"{name}={value}, expected at least {least}.")
    if timeout is not None and not timeout > 0:
        raise GridError(f"timeout={timeout}, expected seconds above 0, or None for no limit.")
    if gpus < 0 or (gpus and cluster is None):
        raise GridError(f"gpus={gpus}, expected 0 or more, and a cluster to have them, such as cluster='local'.")


def _recorded(path: Path) -> dict[str, dict[str, Any]]:
    records = read_records(path) if path.exists() else []
    experiments = sorted({str(record.get("experiment")) for record in records})
    if len(experiments) > 1:
        raise GridError(f"{path} holds records of {experiments}; expected one experiment a file. Give it its own.")
    return {_key(record.get("config"), record.get("seed")): record for record in records}


def _mismatch(record: Any, config: dict[str, Any], seed: int, path: Path) -> str | None:
    """What is wrong with the identity of a record, in words."""
    if not isinstance(record, dict) or not isinstance(record.get("experiment"), str):
        return f"The function returned {str(record)[:200]!r}; expected a record, as records.make_record makes them."
    if record.get("id") != run_id(record["experiment"], config, seed) or _key(config, seed) != _key(
        record.get("config"), record.get("seed")
    ):
        return (
            f"The record is that of another run: {record.get('config')}, seed {record.get('seed')}, "
            f"id {record.get('id')}; asked for {config}, seed {seed}. Pass both to make_record as they came."
        )
    others = {r["experiment"] for r in _recorded(path).values()} - {record["experiment"]}
    if others:
        return f"The record is of the experiment {record['experiment']!r}, but {path} holds those of {others}."
    return None


def _claim(path: Path, key: str) -> FileLock | None:
    """Take a run, unless another process has it. The claim ends with this process, however that ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{path}.{hashlib.sha256(key.encode()).hexdigest()[:12]}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    return lock


def _release(claim: FileLock, recorded: bool) -> None:
    if recorded:  # whoever still waits for this very file will find the record; else the file has to stay
        Path(claim.lock_file).unlink(missing_ok=True)
    claim.release()
