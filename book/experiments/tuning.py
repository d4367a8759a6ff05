"""The rule by which every experiment of the book chooses learning rates.

Three rates half a decade apart, another one outward while the best is the outermost, five at most. Each arm of an
experiment gets the same, on a seed that is not reported and on validation items.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmqlora.grids import run_grid
from mmqlora.records import read_records

SEED = 0
MOST = 5
STEP = 10**0.5  # from one learning rate to the next
Config = dict[str, Any]


def rate_at(step: int, middle: float) -> float:
    """The learning rate so many half decades from the middle of the first three, as it is written."""
    return float(f"{middle * STEP**step:.2g}")


def wanted(scores: Mapping[float, float], middle: float) -> list[float]:
    """Learning rates to try next; empty when the best lies between two others, or enough were tried."""
    first = [rate_at(step, middle) for step in (-1, 0, 1)]
    if missing := [rate for rate in first if rate not in scores]:
        return missing
    steps = {step: scores[rate_at(step, middle)] for step in range(-4, 5) if rate_at(step, middle) in scores}
    best = max(steps, key=steps.get)
    if len(steps) >= MOST or min(steps) < best < max(steps):
        return []
    return [rate_at(best + (1 if best == max(steps) else -1), middle)]


def tried(path: Path, score: Callable[[Mapping[str, Any]], float]) -> dict[str, dict[float, float]]:
    """Score of each rate, by what else the configuration says (`arm`)."""
    scores: dict[str, dict[float, float]] = {}
    for record in read_records(path) if path.exists() else []:
        scores.setdefault(arm(record["config"]), {})[record["config"]["learning_rate"]] = score(record)
    return scores


def arm(config: Mapping[str, Any]) -> str:
    """What a configuration is but for its learning rate, as a key."""
    return json.dumps({key: value for key, value in config.items() if key != "learning_rate"}, sort_keys=True)


def tune(
    function: str,
    arms: Sequence[tuple[Config, float]],
    path: Path,
    score: Callable[[Mapping[str, Any]], float],
    **options: Any,
) -> None:
    """Try learning rates until each arm has its best.

    Args:
        function: what runs a configuration, "module:name".
        arms: configurations without a learning rate, each with the middle of its first three.
        path: of the records.
        score: of a record; higher is better.
        options: for `run_grid`.
    """
    failed: set[str] = set()
    while True:
        scores = tried(path, score)
        runs = [
            ({**config, "learning_rate": rate}, SEED)
            for config, middle in arms
            if arm(config) not in failed
            for rate in wanted(scores.get(arm(config), {}), middle)
        ]
        if not runs:
            return
        for failure in run_grid(function, runs, path, **options).failures:
            # A rate that diverges is a rate that is not the best.
            print(failure.config, failure.error[-300:], file=sys.stderr)
            failed.add(arm(failure.config))
