"""Where the rank goes, before anything is trained: the shares of regions under every shift, in the chapter *Ranks*.

    cd book && python -m experiments.ranks_shares

One calibration for each task and seed, on training items of that seed, and another on a quarter of them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from experiments.ranks import BUDGETS, SEEDS, TASKS, calibration, ranks_of
from mmqlora import benchmark
from mmqlora.grids import run_grid
from mmqlora.records import make_record

RECORDS = Path(__file__).parent.parent / "records" / "ranks_shares.jsonl"
METHODS = ("uniform", "gradient", "adam", "whitened", "variance", "reversed")


def run(config: dict[str, Any], seed: int) -> dict[str, Any]:
    """The shares of one task, and how much of the loss's fall is expected of each Linear."""
    task = benchmark.task(config["task"])
    train, model = task.train(seed), task.load("nf4")
    found, _ = calibration(task, model, train, batches=config["batches"])
    metrics: dict[str, float] = {"loss": found.loss}
    for method in METHODS:
        for budget in BUDGETS:
            shares = ranks_of(task.load, found, method, budget, seed).by_region()["share"]
            metrics |= {f"{method} {budget} {region}": float(share) for region, share in shares.items()}
    gains = [float(spectrum.energies.sum() / 2) for spectrum in found.spectra.values()]
    measured = {"metrics": metrics, "items": {"gain": gains}}
    return make_record("ranks_shares", config, seed, data=train.fingerprint(), measured=measured)


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    tasks = [task for own in TASKS.values() for task in own]
    runs = [({"task": task, "batches": batches}, seed) for seed in SEEDS for task in tasks for batches in (4, 1)]
    run_grid("experiments.ranks_shares:run", runs, RECORDS, processes=arguments.processes)


if __name__ == "__main__":
    main()
