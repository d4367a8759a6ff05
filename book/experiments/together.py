"""The experiment of the chapter *All together*: gates, ranks and selection under one budget, in every combination.

    cd book && python -m experiments.together --list    # arms, runs that are left, and what they cost
    cd book && python -m experiments.together --tune    # learning rates: first, as the rest reads them
    cd book && python -m experiments.together           # everything that is not in records/ yet

Two by two by two arms of the retrieval model in NF4, on clips of 48 to 64 frames with other colors and foreign frames.
The budget is the same for all: `FRAMES` frames of a clip, and the bytes of LoRA of rank `RANK` on every Linear, at 16
for each parameter. An arm without selection reads frames that are evenly spread, one without ranks has rank 8
everywhere and a random start, one without gates is LoRA. Gates come on top of the budget: what they add is little, and
the chapter *Temporal adapters* shows that a whole rank more brings nothing by itself.

Each arm has its learning rate chosen by the rule of `tuning`. A run with all three took 196 CPU seconds on a busy core,
165 of them for training.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from experiments import ranks, selection, temporal, tuning
from experiments.baselines import score
from experiments.runs import run_on
from mmqlora import benchmark
from mmqlora.datasets.worlds import Item, World
from mmqlora.gates import TemporalLoraConfig
from mmqlora.grids import run_grid
from mmqlora.records import read_records
from mmqlora.selection import select_frames

RECORDS = Path(__file__).parent.parent / "records"
TASK = "retrieval/palette+flashes"
LENGTHS = selection.FRAMES  # of clips, in frames
FRAMES = benchmark.CLIP_FRAMES  # of which the model reads so many
RANK = 8
PARTS = ("gates", "ranks", "selection")
ARMS = {" + ".join(parts) or "none": parts for n in range(len(PARTS) + 1) for parts in itertools.combinations(PARTS, n)}
SEEDS = range(1, 7)
MIDDLE = 3e-3  # of the first three learning rates
TESTS = 500
CPU_SECONDS = 196  # of a run with all three, measured once
RATES_TRIED = 3.5  # for a learning rate, on average


class Clips(selection.Chosen):
    """Long clips with the frames that an arm reads, encoded when they are first asked for."""

    reader = benchmark.READERS["retrieval"]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index not in self._kept:
            item = self.world[index]
            self._kept[index] = self.reader.encode(selection.with_frames([item], [self.choose(item)])[0])
        return self._kept[index]


def world(seed: int, count: int) -> World:
    """Long clips of the task."""
    return World("clips", count, seed, benchmark.task(TASK).shifts, LENGTHS)


def spread(item: Item) -> np.ndarray:
    """Frames that are evenly spread."""
    return select_frames(item.frames, FRAMES, "uniform").indices


def chosen(item: Item) -> np.ndarray:
    """Frames that stand for the stretches in which nothing changes."""
    return select_frames(item.frames, FRAMES).indices


def build(parts: tuple[str, ...], train: Clips, seed: int) -> nn.Module:
    """The model in NF4 with the adapters of an arm; without gates and ranks, this is QLoRA."""
    task = benchmark.task(TASK)
    model = task.load("nf4")
    settings: dict[str, Any] = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": "all-linear"}
    if "ranks" in parts:
        found, _ = ranks.calibration(task, model, train)
        settings = ranks.ranks_of(task.load, found, "gradient", RANK, seed).as_kwargs()
    torch.manual_seed(seed)
    gates = TemporalLoraConfig(signals=temporal.CONTENT[task.model], hidden=True, **settings)
    adapted = get_peft_model(model, gates if "gates" in parts else LoraConfig(**settings))
    if "ranks" in parts:
        found.start(adapted)
    return adapted


def run(config: dict[str, Any], seed: int) -> dict[str, Any]:
    """One run of the grid."""
    task, parts = benchmark.task(TASK), ARMS[config["arm"]]
    choose = chosen if "selection" in parts else spread
    train = Clips(world(selection.TRAIN + seed, config.get("items", task.items)), choose)
    # All seeds are judged on the same items, as in the benchmark.
    first = selection.CALIBRATION if config.get("validation") else selection.TEST
    tests = list(world(first, config.get("tests", TESTS)))
    tests = selection.with_frames(tests, [choose(item) for item in tests])

    def judge(model: nn.Module) -> dict[str, Any]:
        return benchmark.evaluate(model, Clips.reader, tests)

    about = {"experiment": "together", "config": config, "seed": seed}
    return run_on(task, build(parts, train, seed), train, judge, **about)


def rates() -> dict[str, float]:
    """The learning rate of each arm."""
    found = tuning.tried(RECORDS / "together_tuning.jsonl", score)
    return {json.loads(key)["arm"]: max(scores, key=scores.get) for key, scores in found.items()}


def wanted() -> list[tuple[dict[str, Any], int]]:
    """The runs of the chapter, seed by seed, so that a grid that is stopped has whole seeds."""
    chosen_rates = rates()
    return [
        ({"task": TASK, "arm": arm, "learning_rate": chosen_rates[arm]}, seed)
        for seed in SEEDS
        for arm in ARMS
        if arm in chosen_rates
    ]


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="say what is left to run, and run nothing")
    parser.add_argument("--tune", action="store_true", help="choose learning rates")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    path = RECORDS / "together.jsonl"
    if arguments.list:
        done = {(r["config"]["arm"], r["seed"]) for r in (read_records(path) if path.exists() else [])}
        for arm in ARMS:
            rate = f"learning rate {rates()[arm]:g}" if arm in rates() else "not tuned"
            print(f"{arm}: {sum((arm, seed) in done for seed in SEEDS)} of {len(SEEDS)} seeds, {rate}")
        runs = len(ARMS) * len(SEEDS) - len(done) + RATES_TRIED * (len(ARMS) - len(rates()))
        print(f"about {runs:.0f} runs are left, {runs * CPU_SECONDS / 3600:.1f} CPU hours")
        return
    options = {"processes": arguments.processes, "timeout": 1800}
    if arguments.tune:
        cells = [({"task": TASK, "arm": arm, "validation": True}, MIDDLE) for arm in ARMS]
        tuning.tune("experiments.together:run", cells, RECORDS / "together_tuning.jsonl", score, **options)
        return
    grid = run_grid("experiments.together:run", wanted(), path, **options)
    for failure in grid.failures:
        print(failure.config, failure.seed, failure.error[-500:], file=sys.stderr)


if __name__ == "__main__":
    main()
