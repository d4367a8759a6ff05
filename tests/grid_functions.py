"""Cheap runs for tests of grids. Light imports only, as every process of a grid imports this file."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import sys
import time
from pathlib import Path

NO_FUNCTION = 1


def record(config, seed, experiment="demo", **more):
    """What records.make_record gives, without importing torch."""
    canonical = json.dumps([experiment, config, seed], sort_keys=True)
    identity = {"id": hashlib.sha256(canonical.encode()).hexdigest()[:12], "experiment": experiment}
    return {**identity, "config": config, "seed": seed, "metrics": {"score": config.get("x", 0) * seed}, **more}


def cheap(config, seed):
    time.sleep(config.get("sleep", 0))
    print("a run may print")
    return record(config, seed, filler="x" * 100_000)  # more than a pipe holds


def log(config, seed):
    """Say in a file that the run was made."""
    with open(config["log"], "a") as file:
        file.write(f"{config['x']} {seed}\n")
    time.sleep(0.05)
    return record(config, seed)


def process(config, seed):
    return record(config, seed, pid=os.getpid(), threads=os.environ["OMP_NUM_THREADS"], argument=sys.stdin.read())


def devices(config, seed):
    return record(config, seed, threads=os.environ["OMP_NUM_THREADS"], devices=os.environ.get("CUDA_VISIBLE_DEVICES"))


def torch_threads(config, seed):
    import torch

    return record(config, seed, threads=torch.get_num_threads())


def troubled(config, seed):
    """Fail in the way that the configuration says; where it names a file, only until that file is there."""
    how = config["how"]
    once = Path(config["once"]) if "once" in config else None
    if once and once.exists():
        how = "not"
    elif once:
        once.touch()
    print("last words", flush=how != "exit")
    match how:
        case "raise":
            raise ValueError("no such arm")
        case "quit":
            sys.exit("enough")
        case "exit":
            os._exit(3)
        case "crash":
            ctypes.string_at(0)
        case "hang":
            time.sleep(600)
        case "orphan":  # dies, while a process that it forked holds the pipe
            if os.fork():
                os._exit(4)
            time.sleep(600)
        case "nan":
            return record(config, seed, loss=float("nan"))
        case "nothing":
            return None
        case "other run":
            return record(config, seed + 1)
        case "other experiment":
            return record(config, seed, experiment="other")
    return record(config, seed)
