"""Run records: what was run, on what, and what came out, one JSON line a run.

A number in the book comes from a record or it does not appear. A record is appended whole or not at all: the line is
written in one call under a lock, and what a killed process or a full disk left unfinished is cut off again.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import pandas as pd
import psutil
import torch
from filelock import FileLock

from .errors import RecordError

logger = logging.getLogger("mmqlora")

_PACKAGES = ("mmqlora", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "numpy")


def run_id(experiment: str, config: Mapping[str, Any], seed: int) -> str:
    """The name of a run: the same experiment, configuration and seed always give the same twelve letters.

    Example:
        >>> run_id("first_qlora_run", {"arm": "qlora", "rank": 16}, seed=1)
        '2500364fa588'

    Args:
        experiment: name of the experiment.
        config: the configuration; its keys may come in any order.
        seed: the seed of the run.

    Returns:
        The first twelve hexadecimal digits of a SHA-256.
    """
    canonical = json.dumps([experiment, dict(config), seed], sort_keys=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def fingerprint(*parts: bytes | str | os.PathLike[str]) -> str:
    """A short hash of data: text and bytes as they are, a path by the bytes of its file.

    Example:
        >>> fingerprint("the same text", b"the same bytes")
        '38a53fe145e0'

    Args:
        parts: strings, bytes, or `pathlib.Path` objects, in order.

    Returns:
        The first twelve hexadecimal digits of a SHA-256.
    """
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part if isinstance(part, bytes) else Path(part).read_bytes()
        digest.update(hashlib.sha256(data).digest())
    return digest.hexdigest()[:12]


def environment() -> dict[str, Any]:
    """What a run ran on: package versions, the commit, the machine.

    Example:
        >>> sorted(environment())
        ['commit', 'machine', 'versions']

    Returns:
        ``versions`` by package; ``commit``, with ``+`` behind it where the tree had uncommitted changes, None outside
        a checkout; ``machine``: processor, cores, threads in use, memory in bytes, accelerator.
    """
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"versions": versions, "commit": _commit(), "machine": _machine()}


def _commit() -> str | None:
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, check=True).stdout

    try:
        # An installed copy may lie inside somebody else's repository: only a tracked file speaks for its commit.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "HEAD").strip()[:12] + ("+" if git("status", "--porcelain", "-uno").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _machine() -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def make_record(
    experiment: str, config: Mapping[str, Any], seed: int, *, data: str, measured: Mapping[str, Any]
) -> dict[str, Any]:
    """Put a run together: its identity, what it ran on, and what was measured.

    Example:
        >>> record = make_record("demo", {"rank": 8}, 1, data="38a53fe145e0", measured={"metrics": {"wer": 0.1}})
        >>> record["metrics"]["wer"]
        0.1

    Args:
        experiment: name of the experiment; its command is ``python -m experiments.<name>`` in ``book/``.
        config: configuration of the run.
        seed: seed of the run.
        data: `fingerprint` of the data.
        measured: what came out, such as ``metrics``, ``wall_s``, ``peak_bytes``, ``items``.

    Returns:
        A dictionary that JSON can hold.
    """
    identity = {"id": run_id(experiment, config, seed), "experiment": experiment, "config": dict(config), "seed": seed}
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {**identity, "data": data, "when": when, **environment(), **measured}


def append_record(path: str | os.PathLike[str], record: Mapping[str, Any]) -> None:
    """Append one record, whole or not at all; safe for several processes at once.

    Example:
        >>> append_record("records/demo.jsonl", record)  # doctest: +SKIP

    Args:
        path: a ``.jsonl`` file; it and its folder are made where missing.
        record: what JSON can hold. NaN and infinity are no JSON.

    Raises:
        RecordError: the record can't be written as JSON, or the disk refused it. The file is then as it was before.
    """
    path = Path(path)
    try:
        line = (json.dumps(record, sort_keys=True, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise RecordError(
            f"{path}: the record is not JSON ({error}). Expected dictionaries, lists, strings, finite numbers, "
            "booleans and None; turn tensors into numbers with .item() and NaN into None."
        ) from error
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered: a buffer would be written once more when the file is closed, behind what was cut off.
        with FileLock(f"{path}.lock"), open(path, "a+b", buffering=0) as file:
            size = _whole_length(file, path)
            file.truncate(size)
            try:
                if (written := file.write(line)) < len(line):
                    raise OSError(f"{written} of {len(line)} bytes written")
                os.fsync(file.fileno())
            except OSError:
                file.truncate(size)
                raise
    except OSError as error:
        raise RecordError(f"{path}: the record could not be written ({error}); the file is as it was.") from error


def _whole_length(file: BinaryIO, path: Path) -> int:
    """Length of the file up to its last line break; behind that lies what a killed writer left."""
    size = position = file.seek(0, os.SEEK_END)
    while position > 0:
        start = max(0, position - 65536)
        file.seek(start)
        found = file.read(position - start).rfind(b"\n")
        if found >= 0:
            position = start + found + 1
            break
        position = start
    if position < size:
        logger.warning("%s: cut off an unfinished record of %d bytes", path, size - position)
    return position


def read_records(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read all records of a file, in the order in which they were written.

    Example:
        >>> read_records("records/first_qlora_run.jsonl")  # doctest: +SKIP

    Args:
        path: a ``.jsonl`` file.

    Returns:
        The records. A run that was recorded more than once counts once, with its latest record. An unfinished last
        line is left out with a warning.

    Raises:
        RecordError: there is no such file, or a line inside it is no record.
    """
    path = Path(path)
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*.jsonl")) if path.parent.is_dir() else []
        raise RecordError(f"{path}: no such file of records. {f'There are {near}.' if near else 'Run the experiment.'}")
    records: dict[str, dict[str, Any]] = {}
    lines = path.read_bytes().split(b"\n")
    if lines[-1]:
        logger.warning("%s: left out an unfinished record of %d bytes at the end", path, len(lines[-1]))
    for number, line in enumerate(lines[:-1], 1):
        try:
            record = json.loads(line)
            records[record["id"]] = record
        except (ValueError, KeyError, TypeError) as error:
            raise RecordError(f"{path}, line {number}: no record ({error!r}): {line[:80]!r}") from error
    return list(records.values())


def as_table(records: list[dict[str, Any]]) -> pd.DataFrame:
    """Records as a table, one row a run; nested keys are joined by dots, per-item scores left out.

    Example:
        >>> as_table([{"id": "a", "config": {"rank": 8}, "metrics": {"wer": 0.1}}])
          id  config.rank  metrics.wer
        0  a            8          0.1

    Args:
        records: what `read_records` returned.

    Returns:
        A data frame.
    """
    return pd.json_normalize([{key: value for key, value in r.items() if key != "items"} for r in records])
