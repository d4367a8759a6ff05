"""What calibration costs: time beside EVA's start on the same batches, memory beside a QLoRA step; chapter *Ranks*.

    cd book && python -m experiments.ranks_cost

The model of `temporal_cost`, 20 million parameters in NF4. A round does both, in an order by chance.
"""

from __future__ import annotations

import random
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tqdm import tqdm

from experiments.temporal_cost import batch, build, peak
from mmqlora import methods
from mmqlora.calibration import calibrate
from mmqlora.memory import measure
from mmqlora.records import append_record, make_record
from mmqlora.training import _elements

RECORDS = Path(__file__).parent.parent / "records" / "ranks_cost.jsonl"
ROUNDS, BATCHES, RANK = 7, 4, 8


def base() -> torch.nn.Module:
    """The model in 4 bits without adapters."""
    return build("lora").unload().eval()


def gradient(model: torch.nn.Module, batches: list[dict[str, Any]]) -> None:
    """Calibrate, and start A along the gradient."""
    found = calibrate(model, batches, directions=RANK)
    found.start(get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear")))


def eva(model: torch.nn.Module, batches: list[dict[str, Any]]) -> None:
    """PEFT's EVA."""
    methods.adapt(model, "eva", rank=RANK, batches=batches)


def timed(function: Any) -> float:
    """CPU seconds on a fresh model."""
    model, batches = base(), [batch()] * BATCHES
    start = time.process_time()
    function(model, batches)
    return time.process_time() - start


def calibration_peak(_: str = "") -> int:
    """Bytes that calibration needs beyond the model, in a process of its own."""
    torch.set_num_threads(1)
    given, model = batch(), base()
    with measure() as memory:
        calibrate(model, [given] * BATCHES, directions=RANK)
    return memory.peak_bytes - memory.start_bytes


def main() -> None:
    """Measure, and put the record in place of the old one."""
    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {"gradient": [], "eva": []}
    arms = [("gradient", gradient), ("eva", eva)]
    for number in tqdm(range(-1, ROUNDS)):
        random.Random(number).shuffle(arms)
        for name, function in arms:
            taken = timed(function)
            if number >= 0:  # the first one warms up
                seconds[name].append(taken)
    needed = {}
    for name, function, argument in (("calibration", calibration_peak, ""), ("step", peak, "lora")):
        with ProcessPoolExecutor(1, get_context("spawn")) as alone:
            needed[name] = alone.submit(function, argument).result()
    ratios = [a / b for a, b in zip(seconds["gradient"], seconds["eva"], strict=True)]
    metrics = {
        "ratio": float(torch.tensor(ratios).median()),
        "seconds": sum(seconds["gradient"]) / ROUNDS,
        "EVA's seconds": sum(seconds["eva"]) / ROUNDS,
        "peak": needed["calibration"],
        "peak of a step": needed["step"],
    }
    config = {"batches": BATCHES, "rank": RANK, "parameters": sum(_elements(p) for p in base().parameters())}
    measured = {"metrics": metrics, "items": {"ratio": [round(ratio, 4) for ratio in ratios]}}
    RECORDS.unlink(missing_ok=True)
    append_record(RECORDS, make_record("ranks_cost", config, 0, data="", measured=measured))
    print(metrics)


if __name__ == "__main__":
    main()
