"""What a training step of each method costs beside LoRA's, in the chapter *Baselines*.

    cd book && python -m experiments.baselines_cost

All arms of a task are in one process; a round runs one step of each, in an order by chance. Its ratios are what counts,
as whatever else the machine does hits all of them.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from experiments.baselines import MAIN, arms
from experiments.temporal_cost import step
from mmqlora import benchmark, methods
from mmqlora.records import append_record, make_record

RECORDS = Path(__file__).parent.parent / "records" / "baselines_cost.jsonl"
ROUNDS = 9


def build(task: benchmark.Task, method: str, bits: int, batches: list[dict[str, Any]]) -> torch.nn.Module:
    """The adapted model of an arm."""
    more = {"batches": batches} if method == "eva" else {"steps": 100} if method == "adalora" else {}
    return methods.adapt(task.load(), method, quant_type="nf4" if bits == 4 else None, **more).train()


def run(name: str, rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """A record for each arm of a task."""
    task = benchmark.task(name)
    train = task.train(seed=0)
    size = task.batch_size
    batches = [task.collate([train[i] for i in range(n, n + size)]) for n in range(0, 4 * size, size)]
    models = {arm: build(task, *arm, batches) for arm in arms(name)}
    optimizers = {
        arm: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-5)
        for arm, model in models.items()
    }
    seconds: dict[tuple[str, int], list[float]] = {arm: [] for arm in models}
    order = list(models)
    for number in tqdm(range(-1, rounds), desc=name):
        random.Random(number).shuffle(order)
        for arm in order:
            taken = step(models[arm], optimizers[arm], batches[number % len(batches)])
            if number >= 0:  # the first one warms up
                seconds[arm].append(taken)
    lora = np.array(seconds["lora", 16])
    records = []
    for (method, bits), taken in seconds.items():
        ratios = np.array(taken) / lora
        measured = {
            "metrics": {"ratio": float(np.median(ratios)), "seconds": float(np.mean(taken))},
            "items": {"ratio": ratios.round(4).tolist()},
        }
        config = {"task": name, "method": method, "bits": bits, "batch_size": task.batch_size}
        records.append(make_record("baselines_cost", config, 0, data=train.fingerprint(), measured=measured))
    return records


def main() -> None:
    """Measure, and put the records in place of the old ones."""
    torch.set_num_threads(1)
    RECORDS.unlink(missing_ok=True)
    for name in MAIN:
        for record in run(name):
            append_record(RECORDS, record)
            print(record["config"], record["metrics"])


if __name__ == "__main__":
    main()
