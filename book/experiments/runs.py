"""A run on a task of the benchmark, as the experiments record it: what all of them have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from mmqlora.benchmark import Task
from mmqlora.training import fine_tune


def run_on(
    task: Task,
    model: nn.Module,
    train: Any,
    evaluate: Callable[[nn.Module], dict[str, Any]] | None,
    *,
    experiment: str,
    config: Mapping[str, Any],
    seed: int,
    **more: Any,
) -> dict[str, Any]:
    """The record of a run. Steps and batches are the task's, unless the configuration or `more` has others."""
    usual = {
        "collate": task.collate,
        "steps": config.get("steps", task.steps),
        "batch_size": task.batch_size,
        "learning_rate": config["learning_rate"],
        "bf16": False,
        "progress": False,
        "data": train.world.fingerprint(),
    }
    about = {"experiment": experiment, "config": config, "seed": seed}
    return fine_tune(model, train, evaluate, **about, **{**usual, **more})
