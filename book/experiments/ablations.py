"""The experiment of the chapter *Ablations*: one thing at a time is turned, around the book's standard run.

    cd book && python -m experiments.ablations --list     # cells, runs, and what they cost
    cd book && python -m experiments.ablations --tune     # learning rates: first, as the rest reads them
    cd book && python -m experiments.ablations            # everything that is not in records/ yet
    cd book && python -m experiments.ablations --only placement    # one ablation; also with --list and --tune

The center is LoRA of rank 8 and alpha 16 on all Linears of a base in NF4, on the main task of each base model. Two
grids cross factors, on the task that is furthest from solved. A run that another experiment has is that one's to
make, and is read from its records: `twin` says which one it is; ``--twins`` makes it here where it is missing.

A change of rank, alpha, placement, or of the bits to two also moves the best learning rate, so that at one rate for all
a level would win for its rate. Each of these levels has a rate of its own, by the rule and on the seed of `tuning`; its
scores at all rates that were tried stay in the records, as the interaction of level and rate. A level that leaves the
update as it is (three bits or more, double quantization, one region in fewer bits, single signals, the size of a
calibration, the part of frames) keeps the rate of its like; `tuned_as` says whose.

Three and two bits are HQQ's, which PEFT trains on a CPU. They need ``pip install hqq`` and are left out without it;
"hqq 4", on one task, tells the bits from the method. "16" are the weights as they are stored; a CPU computes in
float32 with any. Whisper needs the model and the speech of `first_qlora_run`, and is left out without them.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import set_seed

from experiments import baselines, ranks, selection, temporal, temporal_speech, tuning
from experiments import first_qlora_run as speech
from experiments.baselines import MAIN, SEEDS, best_rate
from experiments.runs import run_on
from mmqlora import benchmark, methods, quantization
from mmqlora.grids import run_grid
from mmqlora.records import read_records, run_id
from mmqlora.regions import REGIONS, regions

RECORDS = Path(__file__).parent.parent / "records"
NAME = "ablations"
Config = dict[str, Any]

CENTER: Config = {
    "weights": "nf4",
    "double_quant": True,
    "quantized": "all",
    "rank": 8,
    "alpha": 16,
    "placement": "all",
}
CROSSED = "audio/timbre"  # the task of the grids: full fine-tuning leaves most room above LoRA there
SPEECH = "speech/voices"  # Whisper tiny.en
LONG = "video/palette, 48 to 64 frames"
GATED = "retrieval/flashes"  # where gates help most
WEIGHTS = ("16", "int8", "nf4", "fp4", "hqq 4", "hqq 3", "hqq 2")
FEW, CONTROL = "hqq 2", "hqq 4"
RANKS = (1, 2, 8, 32)
ALPHAS = (4, 16, 64)
PLACEMENTS = ("all", "attention", "mlp", "tower", "fusion", "text")  # tower: vision or audio
CROSSED_PLACEMENTS = ("all", "tower", "fusion", "text")
QUANTIZED = ("tower", "fusion", "text")
SELECTORS = ("segments", "uniform")
PARTS = (2, 4, 8, 16)  # one frame in so many
BATCHES = (1, 4, 16)  # of a calibration
METHODS = ("full", "lora", "rslora", "adalora", "ia3")
STEPS = {"lower": -1, "chosen": 0, "higher": 1}  # half decades from the rate that was chosen
# Ablation -> its tasks.
ABLATIONS: dict[str, tuple[str, ...]] = {
    "bits": (*MAIN, SPEECH),
    "double quantization": MAIN,
    "rank": MAIN,
    "alpha": (CROSSED,),
    "placement": MAIN,
    "quantized region": (CROSSED,),
    "gate signals": (GATED,),
    "selection budget": (LONG,),
    "calibration size": (CROSSED,),
    "learning rate": (CROSSED,),
    "bits and rank": (CROSSED,),
    "rank and placement": (CROSSED,),
}
# CPU seconds of a run besides its training, which is what records have: making items, and judging. Measured once.
JUDGING = {"video": 23.0, "audio": 21.0, "retrieval": 20.0, "long": 30.0, "speech": 40.0}
# Time of a training step beside the same with all Linears: below the lowest adapter nothing is differentiated.
SHARES = {"all": 1.0, "attention": 0.8, "mlp": 0.75, "tower": 0.87, "fusion": 0.47, "text": 0.5}
RATES_TRIED = 3.7  # for a learning rate, as there were in `baselines` on average
CROSSINGS = ("selection budget", "learning rate", "bits and rank", "rank and placement")


def cell(task: str, **changes: Any) -> Config:
    """A configuration without its learning rate: the center but for what is said. Alpha is twice the rank."""
    rank = changes.get("rank", 16 if task == SPEECH else CENTER["rank"])
    return {"task": task, **CENTER, "rank": rank, "alpha": 2 * rank, **changes}


def levels(ablation: str, task: str) -> dict[tuple[str, ...], Config]:
    """Cells of an ablation by the name of the level; by two names where two factors are crossed."""
    make = functools.partial(cell, task)
    match ablation:
        case "bits":
            weights = {CROSSED: WEIGHTS, SPEECH: ("nf4", "hqq 3", FEW)}.get(task) or [
                w for w in WEIGHTS if w != CONTROL
            ]
            return {(name,): make(weights=name) for name in weights}
        case "double quantization":
            return {("on",): make(), ("off",): make(double_quant=False)}
        case "rank":
            return {(str(rank),): make(rank=rank) for rank in RANKS}
        case "alpha":
            return {(str(alpha),): make(alpha=alpha) for alpha in ALPHAS}
        case "placement":
            return {(name,): make(placement=name) for name in PLACEMENTS}
        case "quantized region":
            found = {("none",): make(weights="16")}
            # Four bits may cost too little to tell regions apart.
            few = [(part, weights) for weights in ("nf4", FEW) for part in ("all", *QUANTIZED)]
            return found | {(f"{part}, {weights}",): make(weights=weights, quantized=part) for part, weights in few}
        case "gate signals":
            every = list(temporal.CONTENT[task.split("/")[0]])
            return {
                ("none",): make(signals=[]),
                ("all",): make(signals=every),
                **{(one,): make(signals=[one]) for one in every},
            }
        case "selection budget":
            found = {(name, f"1/{part}"): {"task": task, "selector": name, "part": part} for name, part in _choices()}
            return found | {("all", "1/1"): {"task": task, "selector": "all", "part": 1}}
        case "calibration size":
            found = {("uniform",): make(rank=4)}
            return found | {(str(n),): make(rank=4, allocation="gradient", batches=n) for n in BATCHES}
        case "learning rate":
            return {
                (method, name): {"task": task, "method": method, "bits": 16 if method == "full" else 4, "step": step}
                for method in METHODS
                for name, step in STEPS.items()
            }
        case "bits and rank":
            return {(w, str(r)): make(weights=w, rank=r) for w in ("16", "nf4", "hqq 3", FEW) for r in _crossed_ranks()}
        case "rank and placement":
            return {(p, str(r)): make(placement=p, rank=r) for p in CROSSED_PLACEMENTS for r in _crossed_ranks()}
    raise KeyError(ablation)


def _choices() -> list[tuple[str, int]]:
    return [(name, part) for name in SELECTORS for part in PARTS]


def _crossed_ranks() -> tuple[int, ...]:
    return RANKS[0], CENTER["rank"], RANKS[-1]


def center(ablation: str, task: str) -> tuple[str, ...]:
    """The level that others are compared with: the standard run, or what stands for it where that says nothing."""
    named: dict[str, tuple[str, ...]] = {
        "quantized region": ("none",),
        "gate signals": ("all",),
        "calibration size": (str(ranks.BATCHES),),
        "selection budget": (SELECTORS[0], f"1/{selection.PARTS[0]}"),
        "learning rate": ("lora", "chosen"),
    }
    return named.get(ablation) or next(name for name, own in levels(ablation, task).items() if own == cell(task))


# --- One run


def run(config: Config, seed: int) -> dict[str, Any]:
    """One run of the grid. What another experiment knows how to do, it does."""
    validation = {"validation": True} if config.get("validation") else {}
    if "selector" in config:
        part = {"part": config["part"]} if config["selector"] != "all" else {}
        own = {"method": config["selector"], "learning_rate": config["learning_rate"], **part}
        return _renamed(selection.trained({**own, **validation}, seed), config, seed)
    if "method" in config:
        own = {name: value for name, value in config.items() if name != "step"}
        return _renamed(baselines.run(own, seed), config, seed)
    if config["task"] == SPEECH:
        return _speech(config, seed)
    task = benchmark.task(config["task"])
    train, judge = task.train(seed), task.judge(bool(validation))
    torch.manual_seed(seed)
    model, error = build(config, seed)

    def judged(trained: nn.Module) -> dict[str, Any]:
        return {**judge(trained), "weight_error": error}

    return run_on(task, model, train, judged, experiment=NAME, config=config, seed=seed)


def _renamed(record: dict[str, Any], config: Config, seed: int) -> dict[str, Any]:
    """A record of another experiment's run as one of this."""
    return {**record, "experiment": NAME, "config": config, "id": run_id(NAME, config, seed)}


def build(config: Config, seed: int) -> tuple[nn.Module, float]:
    """The adapted model of a configuration of a benchmark task, and the mean relative error of its weights."""
    task = benchmark.task(config["task"])
    settings = {"r": config["rank"], "lora_alpha": config["alpha"]}
    plain = task.load()
    names = targets(plain, config["placement"])
    error = quantize(plain, config)
    if "signals" in config:
        arm = "gate" if config["signals"] else "plain"
        return temporal.adapt(plain, arm, config["signals"], **settings, target_modules="all-linear"), error
    if "allocation" in config:
        found, _ = ranks.calibration(task, plain, task.train(seed), config["batches"])
        given = ranks.ranks_of(task.load, found, config["allocation"], config["rank"], seed).as_kwargs()
        return methods.adapt(plain, "lora", rank=given.pop("r"), seed=seed, **given), error
    return adapted(plain, names, seed, **settings), error


def adapted(model: nn.Module, names: list[str], seed: int, **settings: Any) -> nn.Module:
    """LoRA on these Linears, as `methods.adapt` puts it there; that one does not know HQQ's layers."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, LoraConfig(target_modules=names, **settings))


def targets(model: nn.Module, placement: str) -> list[str]:
    """Names of the Linears of a placement, in a model that is not quantized; never the output head."""
    head, parts = model.get_output_embeddings(), regions(model)
    names = [name for name in parts if model.get_submodule(name) is not head]
    if placement == "attention":
        return [name for name in names if "attn" in name or "attention" in name]
    if placement == "mlp":
        return [name for name in names if ".mlp." in name or name.rpartition(".")[2].startswith("fc")]
    return [name for name in names if placement == "all" or parts[name] in inside(placement)]


def inside(part: str) -> tuple[str, ...]:
    """The regions of a part; a model has one tower."""
    return ("vision", "audio") if part == "tower" else (part,)


def quantize(model: nn.Module, config: Config) -> float:
    """Bring a model to the weights of a configuration in place; the mean relative error of what was quantized."""
    weights = config["weights"]
    if weights == "16":
        return 0.0
    kept = inside(config["quantized"]) if config["quantized"] != "all" else REGIONS
    exclude = sorted(set(regions(model).values()) - set(kept))
    if not weights.startswith("hqq"):
        report = quantization.quantize(model, weights, config["double_quant"], exclude=exclude)
        return float(np.mean([layer.error for layer in report.layers if not layer.why]))
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    # The Linears that NF4 takes, so that nothing differs but how they are stored.
    skipped = quantization._left_alone(model, "nf4", exclude, torch.device("cpu"))
    errors = []
    for name in [name for name in quantization._linears(model) if name not in skipped]:
        plain = model.get_submodule(name)
        weight = plain.weight.detach().clone()
        stored = BaseQuantizeConfig(nbits=int(weights.split()[1]), group_size=64, axis=1)
        new = HQQLinear(plain, stored, compute_dtype=torch.float32, device="cpu")
        errors.append(float((new.dequantize() - weight).norm() / weight.norm()))
        model.set_submodule(name, new)
    return float(np.mean(errors))


def _speech(config: Config, seed: int) -> dict[str, Any]:
    """Whisper on the dialogue of `temporal_speech`, in other bits."""
    temporal_speech.at_hand()
    set_seed(seed)
    model, processor = quantization.load(speech.MODEL, quant_type=None, dtype=torch.float32)
    names = targets(model, config["placement"])
    quantize(model, config)
    model = adapted(model, names, seed, r=config["rank"], lora_alpha=config["alpha"])
    return temporal_speech.learn(model, processor, config, seed, NAME)


# --- Runs of other experiments, and learning rates


def twin(config: Config) -> tuple[str, Config] | None:
    """The same run in another experiment: the file of its records, and its configuration there."""
    rate, rest = config["learning_rate"], {name: config[name] for name in config if name != "learning_rate"}
    validation = {"validation": True} if rest.pop("validation", False) else {}
    own = {"learning_rate": rate, **validation}
    kind, task = "_tuning" if validation else "", rest["task"]
    if "selector" in rest:
        if rest["part"] not in (1, *selection.PARTS):
            return None
        part = {"part": rest["part"]} if rest["part"] in selection.PARTS[1:] else {}
        return f"selection{kind or '_trained'}", {"method": rest["selector"], **own, **part}
    if "method" in rest:
        if rest["step"] != STEPS["chosen"]:
            return None
        return f"baselines{kind}", {"task": task, "method": rest["method"], "bits": rest["bits"], **own}
    if task == SPEECH:
        return (f"temporal_speech{kind}", {"arm": "plain", **own}) if rest == cell(SPEECH) else None
    if "signals" in rest:
        content = temporal.CONTENT[task.split("/")[0]]
        arm = {(): "plain", tuple(content): "gate"}.get(tuple(rest["signals"]))
        return (f"temporal{kind}", {"task": task, "arm": arm, **own}) if arm else None
    if rest in (cell(task), cell(task, weights="16")):
        # A method takes the rate in 4 bits that was best in 16.
        bits = 16 if validation or rest["weights"] == "16" else 4
        return f"baselines{kind}", {"task": task, "method": "lora", "bits": bits, **own}
    if rest["rank"] in ranks.BUDGETS:
        gradient = {"allocation": "gradient", "batches": ranks.BATCHES}
        for arm, more in (("uniform", {}), ("gradient", gradient)):
            if rest == cell(task, rank=rest["rank"], **more) and (task, arm, rest["rank"]) in ranks.cells():
                return f"ranks{kind}", {"task": task, "arm": arm, "budget": rest["rank"], **own}
    return None


@functools.cache
def _recorded(name: str) -> dict[str, dict[str, Any]]:
    path = RECORDS / f"{name}.jsonl"
    return {_key(r["config"], r["seed"]): r for r in (read_records(path) if path.exists() else [])}


def _key(config: Config, seed: int) -> str:
    return json.dumps([config, seed], sort_keys=True)


def recorded(config: Config, seed: int) -> dict[str, Any] | None:
    """The record of a run, of this experiment or of another one; of the latter under this one's configuration."""
    kind = "_tuning" if config.get("validation") else ""
    if own := _recorded(NAME + kind).get(_key(config, seed)):
        return own
    other = twin(config)
    found = _recorded(other[0]).get(_key(other[1], seed)) if other else None
    return {**found, "config": config} if found else None


def tuned_as(config: Config) -> Config:
    """The configuration whose learning rate this one takes: itself, or one that differs in nothing that moves it."""
    if "selector" in config:
        return {**config, "part": 1 if config["selector"] == "all" else selection.PARTS[0]}
    if "method" in config:
        return {**config, "bits": 16, "step": STEPS["chosen"]}
    weights = config["weights"] if config["weights"] == FEW else CENTER["weights"]
    changes: Config = {"weights": weights, "double_quant": True, "quantized": "all"}
    if config.get("signals"):
        changes["signals"] = list(temporal.CONTENT[config["task"].split("/")[0]])
    if "allocation" in config:
        changes["batches"] = ranks.BATCHES
    return {**config, **changes}


def middle(config: Config) -> float:
    """The middle of the first three rates: lower where the update is scaled up, and the other way round."""
    if config["task"] == SPEECH:
        return temporal_speech.MIDDLE
    scale = config["alpha"] / (2 * config["rank"])
    return tuning.rate_at((scale < 1) - (scale > 1), ranks.MIDDLE)


def primary(task: str) -> str:
    """Name of the measure that levels are compared by."""
    return baselines.PRIMARY.get(task.split("/")[0], "word_accuracy")


def score(record: Mapping[str, Any]) -> float:
    """Primary score of a record."""
    return record["metrics"][primary(record["config"]["task"])]


def tried(config: Config) -> dict[float, float]:
    """Score of each learning rate that was tried for a configuration, here or elsewhere."""
    rates = [tuning.rate_at(step, ranks.MIDDLE) for step in range(-6, 5)]
    runs = {rate: recorded({**config, "validation": True, "learning_rate": rate}, tuning.SEED) for rate in rates}
    return {rate: score(run) for rate, run in runs.items() if run}


def rate(config: Config) -> float | None:
    """The learning rate of a configuration; None while it is not tuned."""
    if "selector" in config:
        return _chosen("selection").get(config["selector"])
    if "method" in config:
        return tuning.rate_at(config["step"], _chosen(config["task"], config["method"]))
    own = tuned_as(config)
    scores = tried(own)
    return None if tuning.wanted(scores, middle(own)) else max(scores, key=scores.get)


@functools.cache
def _chosen(*of: str) -> Any:
    """Learning rates of other experiments, whose records are long to read."""
    return selection.rates() if of == ("selection",) else best_rate(*of)


# --- The grid


def here(config: Config) -> bool:
    """Whether what a configuration needs is on this machine."""
    if config["task"] == SPEECH and speech.at_hand() is None:
        return False
    return not config.get("weights", "").startswith("hqq") or importlib.util.find_spec("hqq") is not None


def cells(only: Iterable[str] = ()) -> list[Config]:
    """Every configuration of some ablations, or of all, once; without learning rates."""
    chosen = list(only) or list(ABLATIONS)
    return _once(own for name in chosen for task in ABLATIONS[name] for own in levels(name, task).values())


def lent(config: Config, validation: bool = False) -> bool:
    """Whether another experiment makes the runs of a configuration."""
    return twin({**config, "learning_rate": 0.0, **({"validation": True} if validation else {})}) is not None


def arms(configs: Iterable[Config], twins: bool = False) -> list[Config]:
    """What has learning rates to be chosen here for some configurations; with `twins` also for other experiments."""
    like = _once(tuned_as(own) for own in configs if "selector" not in own and "method" not in own)
    return [own for own in like if twins or not lent(own, validation=True)]


def wanted(only: Iterable[str] = (), twins: bool = False) -> list[tuple[Config, int]]:
    """Runs of this experiment, seed by seed, and with `twins` those that others lack; without what is not tuned."""
    own = [config for config in cells(only) if twins or not lent(config)]
    ready = [{**config, "learning_rate": found} for config in own if (found := rate(config)) is not None]
    return [(config, seed) for seed in SEEDS for config in ready if not (lent(config) and recorded(config, seed))]


def seconds(config: Config) -> float:
    """CPU time of a run, from the records of its like and `JUDGING`."""
    model = config["task"].split("/")[0]
    if "selector" in config:
        runs = [r for r in _recorded("selection_trained").values() if r["config"]["method"] in (*SELECTORS, "all")]
        shares = [1 / _part(r["config"]) for r in runs]
        slope, start = np.polyfit(shares, [r["cpu_s"] for r in runs], 1)
        return float(start + slope / config["part"]) + JUDGING["long"]
    if "signals" in config:
        return _median("temporal", task=GATED, arm="gate") + JUDGING[model]
    if config["task"] == SPEECH:
        return _median("first_qlora_run", arm="qlora") + JUDGING[model]
    method = {"method": config.get("method", "lora"), "bits": config.get("bits", 4)}
    share = SHARES[config.get("placement", "all")]
    return share * _median("baselines", task=config["task"], **method) + JUDGING[model]


def _part(config: Config) -> int:
    return 1 if config["method"] == "all" else config.get("part", selection.PARTS[0])


def _median(name: str, **what: Any) -> float:
    own = [r["cpu_s"] for r in _recorded(name).values() if what.items() <= r["config"].items() and "cpu_s" in r]
    return float(np.median(own))


def bill(only: Iterable[str] = ()) -> pd.DataFrame:
    """What the grid costs, a row an ablation and task; what two of them share counts where it comes first.

    ``lent`` are cells that another experiment makes, ``recorded`` the runs of all cells that have a record.
    """
    rows, seen, swept = [], [], []
    for name in list(only) or ABLATIONS:
        for task in ABLATIONS[name]:
            every = list(levels(name, task).values())
            own = [config for config in every if config not in seen and not lent(config)]
            sweeps = [config for config in arms(every) if config not in swept]
            seen, swept = seen + own, swept + sweeps
            spent = sum(len(SEEDS) * seconds(config) for config in own)
            spent += sum(RATES_TRIED * seconds(config) for config in sweeps)
            rates = [rate(config) for config in every]
            rows.append(
                {
                    "ablation": name,
                    "task": task,
                    "cells": len(every),
                    "lent": sum(lent(config) for config in every),
                    "runs": len(own) * len(SEEDS),
                    "tuning": round(RATES_TRIED * len(sweeps)),
                    "CPU hours": spent / 3600,
                    "recorded": sum(
                        recorded({**config, "learning_rate": found}, seed) is not None
                        for config, found in zip(every, rates, strict=True)
                        if found is not None
                        for seed in SEEDS
                    ),
                }
            )
    return pd.DataFrame(rows)


def _once(configs: Iterable[Config]) -> list[Config]:
    return list({json.dumps(own, sort_keys=True): own for own in configs}.values())


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="say what is left to run, and run nothing")
    parser.add_argument("--tune", action="store_true", help="choose learning rates")
    parser.add_argument("--only", action="append", choices=ABLATIONS, help="only this ablation; may be given again")
    parser.add_argument("--twins", action="store_true", help="also what other experiments should make, and have not")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    only = arguments.only or ()
    if arguments.list:
        for name in only or ABLATIONS:
            for task in ABLATIONS[name]:
                print(f"{name}, {task}: {'; '.join(' x '.join(level) for level in levels(name, task))}")
        table = bill(only)
        print(table.round(2).to_string(index=False))
        spent = f"{table['CPU hours'].sum():.1f} CPU hours"
        print(f"{table['runs'].sum()} runs, and about {table['tuning'].sum()} for learning rates: {spent}")
        return
    for name in {own["task"] if own["task"] == SPEECH else own["weights"] for own in cells(only) if not here(own)}:
        print(f"left out, as what it needs is not here: {name}", file=sys.stderr)
    options = {"processes": arguments.processes, "timeout": 1800}
    if arguments.tune:
        swept = [own for own in arms(cells(only), arguments.twins) if here(own)]
        given = [({**own, "validation": True}, middle(own)) for own in swept]
        tuning.tune(f"experiments.{NAME}:run", given, RECORDS / f"{NAME}_tuning.jsonl", score, **options)
        return
    runs = [(own, seed) for own, seed in wanted(only, arguments.twins) if here(own)]
    grid = run_grid(f"experiments.{NAME}:run", runs, RECORDS / f"{NAME}.jsonl", **options)
    for failure in grid.failures:
        print(failure.config, failure.seed, failure.error[-500:], file=sys.stderr)


if __name__ == "__main__":
    main()
