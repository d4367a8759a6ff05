"""The experiment of the chapter *Temporal adapters*: QLoRA that knows the time, beside QLoRA that doesn't.

    cd book && python -m experiments.temporal --tune    # learning rates: first, as the rest reads them
    cd book && python -m experiments.temporal           # everything that is not in records/ yet

All arms adapt the same Linears of the same model in NF4 with the same rank, but "wider", which has one rank more and
with it more parameters than any gate adds. Each has its learning rate chosen by the same rule, on the first task of
each model, and keeps it on the others. "Shuffled" arms get what they gate by from a step of the clip by chance.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from peft import LoraConfig, get_peft_model

from experiments import tuning
from experiments.baselines import score
from experiments.runs import run_on
from mmqlora import benchmark
from mmqlora.gates import TemporalLoraConfig, timekeeper
from mmqlora.grids import run_grid
from mmqlora.timeline import Placement, Stream

RECORDS = Path(__file__).parent.parent / "records"
# Where it matters when something is, and where it does not.
TIMING = ("retrieval/flashes", "audio/timbre+flashes", "video/flashes")
CONTROL = ("retrieval/palette",)
TUNED = {"retrieval": "retrieval/flashes", "audio": "audio/timbre+flashes", "video": "video/flashes"}
SEEDS = range(1, 7)
RANK = 8
MIDDLE = 3e-3  # of the first three learning rates
CONTENT = {
    "video": ("motion", "novelty", "keyframe"),
    "retrieval": ("motion", "novelty", "keyframe"),
    "audio": ("flux", "energy", "speech", "onset"),
}
TIME = ("time1", "time2", "time3", "time4")
ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "wider": {},  # one rank more
    "time": {"gate": False, "shift": True, "signals": TIME},
    "gate": {},
    "convolution": {"gate": False, "kernel": 3},
    "gate and convolution": {"kernel": 3},
    "gate from the hidden state": {"gate": False, "hidden": True},
    "gate, signals shuffled": {},
    "gate from the hidden state, shuffled": {"gate": False, "hidden": True},
    "gate from both": {"hidden": True},
    "shift": {"gate": False, "shift": True},
}
PLAIN = ("plain", "wider")
MEAN = Placement.mean


def adapt(model: torch.nn.Module, arm: str, content: Sequence[str], **settings: Any) -> torch.nn.Module:
    """The adapters of an arm on a model in NF4; `content` are the signals that it gates by."""
    settings |= {"r": settings["r"] + 1} if arm == "wider" else ARMS[arm]
    if arm in PLAIN:
        return get_peft_model(model, LoraConfig(**settings))
    model = get_peft_model(model, TemporalLoraConfig(**{"signals": content, **settings}))
    if arm == "gate, signals shuffled":
        keeper = timekeeper(model.get_base_model())
        media = {name: shuffled(read) for name, read in keeper.family.media.items()}
        keeper.family = replace(keeper.family, media=media)
    return model


def build(task: benchmark.Task, arm: str) -> torch.nn.Module:
    """The model of a task with the adapters of an arm."""
    settings = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": "all-linear"}
    return adapt(task.load(quant_type="nf4"), arm, CONTENT[task.model], **settings)


def mean_of(arm: str) -> Any:
    """What an arm does to the means of steps, as a context."""
    own = shuffled_mean if arm == "gate from the hidden state, shuffled" else MEAN
    return patch.object(Placement, "mean", own)


def shuffled(read: Callable[..., Stream | None]) -> Callable[..., Stream | None]:
    """A reader of media whose signals come in an order by chance, each clip's own steps among themselves."""

    def read_shuffled(arguments: Any, names: Sequence[str]) -> Stream | None:
        stream = read(arguments, names)
        if stream is None:
            return None
        signals = stream.signals
        padding = torch.zeros(signals.shape[:2], dtype=torch.bool) if stream.valid is None else ~stream.valid
        place = padding.long().argsort(dim=1, stable=True)
        order = torch.rand(signals.shape[:2]).masked_fill(padding, 2).argsort(dim=1)
        place, order = (index[..., None].expand_as(signals) for index in (place, order))
        return replace(stream, signals=signals.scatter(1, place, signals.gather(1, order)), _levels={})

    return read_shuffled


def shuffled_mean(self: Placement, h: torch.Tensor) -> torch.Tensor:
    """The mean over the rows of each step, of another step of the clip."""
    counts = torch.tensor(self.level.counts)
    item = torch.arange(len(counts)).repeat_interleave(counts)
    return MEAN(self, h)[(item + torch.rand(len(item))).argsort()]


def run(config: dict[str, Any], seed: int) -> dict[str, Any]:
    """One run of the grid."""
    task = benchmark.task(config["task"])
    train = task.train(seed)
    torch.manual_seed(seed)
    with mean_of(config["arm"]):
        judge, about = task.judge(config.get("validation", False)), {"experiment": "temporal", "config": config}
        return run_on(task, build(task, config["arm"]), train, judge, seed=seed, **about)


def rates() -> dict[tuple[str, str], float]:
    """The learning rate of each arm, by model."""
    found = {}
    for key, scores in tuning.tried(RECORDS / "temporal_tuning.jsonl", score).items():
        config = json.loads(key)
        found[config["task"].split("/")[0], config["arm"]] = max(scores, key=scores.get)
    return found


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--task", action="append", help="only this task; may be given again")
    parser.add_argument("--arm", action="append", help="only this arm; may be given again")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    tasks, arms = arguments.task or (*TIMING, *CONTROL), arguments.arm or list(ARMS)
    options = {"processes": arguments.processes, "timeout": 1800}
    if arguments.tune:
        models = dict.fromkeys(task.split("/")[0] for task in tasks)
        cells = [({"task": TUNED[model], "arm": arm, "validation": True}, MIDDLE) for model in models for arm in arms]
        tuning.tune("experiments.temporal:run", cells, RECORDS / "temporal_tuning.jsonl", score, **options)
        return
    chosen = rates()
    runs = [
        ({"task": task, "arm": arm, "learning_rate": chosen[task.split("/")[0], arm]}, seed)
        for task in tasks
        for seed in SEEDS
        for arm in arms
        if (task.split("/")[0], arm) in chosen
    ]
    grid = run_grid("experiments.temporal:run", runs, RECORDS / "temporal.jsonl", **options)
    for failure in grid.failures:
        print(failure.config, failure.seed, failure.error[-500:], file=sys.stderr)


if __name__ == "__main__":
    main()
