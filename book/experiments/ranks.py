"""The experiment of the chapter *Ranks*: where the rank goes, crossed with where A starts, at three budgets.

    cd book && python -m experiments.ranks --list    # how many runs there are, and how many have a record
    cd book && python -m experiments.ranks --tune    # learning rates: first, as the rest reads them
    cd book && python -m experiments.ranks           # everything that is not in records/ yet

All arms adapt the 4-bit base of a task with LoRA and train the same number of parameters: as many as uniform ranks of
`BUDGETS` have. AdaLoRA has half as many again at the start, and prunes ranks down to the budget. Every arm runs at
every budget on the task `EVERY`; the main arms, those of `MAIN`, run at the smallest budget on all tasks of the models
in `SCORED`. Each main arm has its learning rate chosen by the same rule for each budget on the tasks of `TUNED`; on the
other tasks of a model it keeps that of the first. The rest, which are controls, keep that of the smallest budget.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import EvaConfig
from torch import nn

from experiments import tuning
from experiments.baselines import score
from experiments.runs import run_on
from mmqlora import benchmark, methods
from mmqlora.calibration import Calibration, calibrate
from mmqlora.grids import run_grid
from mmqlora.ranks import Budget, Ranks, allocate_ranks
from mmqlora.records import read_records
from mmqlora.regions import regions

RECORDS = Path(__file__).parent.parent / "records"
# What a shift touches: vision or audio alone, text alone, both, nothing.
TASKS = {
    "video": ("video/palette", "video/words 0.5", "video/palette+words 0.5", "video/none"),
    "audio": ("audio/timbre", "audio/words", "audio/timbre+words", "audio/none"),
    "retrieval": ("retrieval/palette", "retrieval/words", "retrieval/none"),
}
SCORED = ("video", "audio")  # the models that are trained; of the third, where the rank goes is all that is measured
TUNED = ("video/palette", "video/words 0.5", "audio/timbre", "audio/words")  # a tower alone, text alone
EVERY = "audio/timbre"  # of the model that trains quickest
SEEDS = range(1, 7)
BUDGETS = (2, 4, 16)  # uniform ranks
MIDDLE = 3e-3  # of the first three learning rates
BATCHES, ITEMS = 4, 16  # of the calibration; items of a batch
HIGHEST = 32  # rank of a Linear
# Name -> (what ranks are worth, where A starts). AdaLoRA does both by itself.
ARMS: dict[str, tuple[str, str]] = {
    "uniform": ("uniform", "random"),
    "uniform, spectral start": ("uniform", "spectral"),
    "gradient": ("gradient", "random"),
    "gradient, spectral start": ("gradient", "spectral"),
    "Adam's step": ("adam", "random"),
    "Adam's step, spectral start": ("adam", "spectral"),
    "whitened": ("whitened", "random"),
    "whitened, spectral start": ("whitened", "spectral"),
    "EVA": ("variance", "eva"),
    "EVA's ranks": ("variance", "random"),
    "EVA's start": ("uniform", "eva"),
    "OLoRA's start": ("uniform", "olora"),
    "PiSSA's start": ("uniform", "pissa"),
    "AdaLoRA": ("adalora", "adalora"),
    "rounding error": ("error", "random"),
    "width": ("width", "random"),
    "twice the connector": ("connector", "random"),
    "random": ("random", "random"),
    "reversed": ("reversed", "random"),
    "audio alone": ("audio", "random"),
    "fusion alone": ("fusion", "random"),
    "text alone": ("text", "random"),
}
MAIN = (
    "uniform",
    "uniform, spectral start",
    "gradient",
    "gradient, spectral start",
    "whitened",
    "whitened, spectral start",
    "EVA",
    "AdaLoRA",
)
REGIONS = ("audio", "fusion", "text")  # of the model of `EVERY`


def calibration(
    task: benchmark.Task, model: nn.Module, train: Any, batches: int = BATCHES
) -> tuple[Calibration, list[dict[str, Any]]]:
    """Spectra of a base model on the first training items, and the batches they were found with."""
    given = first(train, task.collate, batches)
    return calibrate(model, given, directions=HIGHEST, variances=True), given


def first(train: Any, collate: Callable[[list[Any]], dict[str, Any]], batches: int = BATCHES) -> list[dict[str, Any]]:
    """The batches of a calibration."""
    stop = batches * ITEMS
    return [collate([train[i] for i in range(n, n + ITEMS)]) for n in range(0, stop, ITEMS)]


def ranks_of(load: Callable[[], nn.Module], found: Calibration, allocation: str, budget: int, seed: int) -> Ranks:
    """The ranks of an allocation, with as many parameters as uniform ranks of `budget`; `load` gives 16 bits."""
    fixed, method, most = None, allocation, HIGHEST
    if allocation in REGIONS:
        regions = {row.region for row in found.rows}
        fixed, method, most = dict.fromkeys(regions - {allocation}, 0), "uniform", 512
    total = budget * sum(sum(row.shape) for row in found.rows)
    options = {"fixed": fixed, "fill": True, "max_rank": most, "seed": seed}
    if allocation == "error":
        # Of the weights before they were rounded.
        return allocate_ranks(load(), (), Budget(parameters=total), method=method, **options)
    return allocate_ranks(found, budget=Budget(parameters=total), method=method, **options)


def build(
    config: dict[str, Any],
    load: Callable[..., nn.Module],
    batches: list[dict[str, Any]],
    seed: int,
    steps: int,
) -> tuple[nn.Module, dict[str, Any]]:
    """The adapted model of an arm, and the share of its parameters in each region; AdaLoRA's is known at the end.

    `load` gives the base model in 16 bits, and with ``quant_type="nf4"`` in four; `batches` are for calibration.
    """
    allocation, start = ARMS[config["arm"]]
    if allocation == "adalora":
        return methods.adapt(load(), "adalora", quant_type="nf4", rank=config["budget"], seed=seed, steps=steps), {}
    model = load(quant_type="nf4")
    found = calibrate(model, batches, directions=HIGHEST, variances=True)
    ranks = ranks_of(load, found, allocation, config["budget"], seed)
    shares = {f"share {region}": float(share) for region, share in ranks.by_region()["share"].items()}
    settings: dict[str, Any] = ranks.as_kwargs()
    method, quant_type = "lora", None
    if start == "eva":
        method = "eva"
        settings |= {"batches": batches, "eva_config": EvaConfig(rho=1.0)}  # its start, with ranks as they are
    elif start in ("pissa", "olora"):
        # Both split the weights, which are rounded afterward.
        model, method, quant_type = load(), "pissa", "nf4"
        settings["init_lora_weights"] = start
    adapted = methods.adapt(model, method, quant_type=quant_type, rank=settings.pop("r"), seed=seed, **settings)
    if start == "spectral":
        found.start(adapted)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    if abs(trained - ranks.parameters) > 0.01 * ranks.parameters:  # EVA moves a rank where inputs are alike
        raise RuntimeError(f"{config['arm']} trains {trained:,} parameters; its ranks have {ranks.parameters:,}")
    return adapted, shares


def kept(model: nn.Module) -> dict[str, float]:
    """The share of parameters in each region of the ranks that AdaLoRA has not pruned."""
    counts: dict[str, int] = {}
    for row in regions(model).rows:
        layer = model.get_base_model().get_submodule(row.name)
        for values in getattr(layer, "lora_E", {}).values():
            counts[row.region] = counts.get(row.region, 0) + int(values.count_nonzero()) * sum(row.shape)
    return {f"share {region}": count / sum(counts.values()) for region, count in counts.items()}


def run(config: dict[str, Any], seed: int) -> dict[str, Any]:
    """One run of the grid."""
    task = benchmark.task(config["task"])
    train = task.train(seed)
    steps = config.get("steps", task.steps)
    model, shares = build(config, task.load, first(train, task.collate), seed, steps)
    judge = task.judge(config.get("validation", False))

    def judged(trained: nn.Module) -> dict[str, Any]:
        return {**judge(trained), **(shares or kept(trained))}

    about = {"experiment": "ranks", "config": config, "seed": seed}
    return run_on(task, model, train, judged, **about, callbacks=methods.callbacks(model))


def rates() -> dict[tuple[str, str, int], float]:
    """The learning rate of every cell whose sweep is finished: by task, arm and budget."""
    best = {}
    for key, scores in tuning.tried(RECORDS / "ranks_tuning.jsonl", score).items():
        if not tuning.wanted(scores, MIDDLE):
            config = json.loads(key)
            best[config["task"], config["arm"], config["budget"]] = max(scores, key=scores.get)
    found = {}
    for task, arm, budget in cells():
        tuned = task if task in TUNED else TASKS[task.split("/")[0]][0]
        key = tuned, arm, budget if arm in MAIN else BUDGETS[0]
        if key in best:
            found[task, arm, budget] = best[key]
    return found


def cells() -> list[tuple[str, str, int]]:
    """Task, arm and budget of every cell of the grid: those of the smallest budget come first."""
    main = [(task, arm, BUDGETS[0]) for model in SCORED for task in TASKS[model] for arm in MAIN]
    every = [(EVERY, arm, budget) for budget in BUDGETS for arm in ARMS]
    return list(dict.fromkeys(main + every))


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="say what there is to run, and run nothing")
    parser.add_argument("--tune", action="store_true", help="choose learning rates")
    parser.add_argument("--task", action="append", help="only this task; may be given again")
    parser.add_argument("--arm", action="append", help="only this arm; may be given again")
    parser.add_argument("--budget", action="append", type=int, help="only this budget; may be given again")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    wanted = (arguments.task, arguments.arm, arguments.budget)
    chosen = [cell for cell in cells() if all(not only or own in only for own, only in zip(cell, wanted, strict=True))]
    options = {"processes": arguments.processes, "timeout": 1800}
    if arguments.list:
        records = read_records(RECORDS / "ranks.jsonl") if (RECORDS / "ranks.jsonl").exists() else []
        done = [r for r in records if tuple(r["config"][name] for name in ("task", "arm", "budget")) in chosen]
        print(f"{len(chosen)} cells with {len(SEEDS)} seeds: {len(done)} of {len(chosen) * len(SEEDS)} runs are done")
        return
    if arguments.tune:
        configs = [
            ({"task": task, "arm": arm, "budget": budget, "validation": True}, MIDDLE)
            for task, arm, budget in chosen
            if task in TUNED and (arm in MAIN or budget == BUDGETS[0])
        ]
        tuning.tune("experiments.ranks:run", configs, RECORDS / "ranks_tuning.jsonl", score, **options)
        return
    rate = rates()
    runs = [
        ({"task": task, "arm": arm, "budget": budget, "learning_rate": rate[task, arm, budget]}, seed)
        for seed in SEEDS
        for task, arm, budget in chosen
        if (task, arm, budget) in rate
    ]
    grid = run_grid("experiments.ranks:run", runs, RECORDS / "ranks.jsonl", **options)
    for failure in grid.failures:
        print(failure.config, failure.seed, failure.error[-500:], file=sys.stderr)


if __name__ == "__main__":
    main()
