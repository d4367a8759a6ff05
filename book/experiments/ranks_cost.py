"""What calibration costs: time beside EVA's start on the same batches, memory beside a QLoRA step; chapter *Ranks*.

    cd book && python -m experiments.ranks_cost

The model of `temporal_cost`, 20 million parameters in NF4. A round does both, in an order by chance. Memory is counted
tensor by tensor.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tqdm import tqdm

from experiments.temporal_cost import batch, build, peak
from mmqlora import methods
from mmqlora.calibration import calibrate
from mmqlora.ledger import Ledger
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


def calibration_peak() -> int:
    """Bytes that calibration needs beyond the model, with as many directions as it looks for by default."""
    model = base()
    with Ledger(model) as ledger:
        before = ledger.total
        calibrate(model, [batch()] * BATCHES)
    return ledger.peak - before


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
    ratios = [a / b for a, b in zip(seconds["gradient"], seconds["eva"], strict=True)]
    metrics = {
        "ratio": float(torch.tensor(ratios).median()),
        "seconds": sum(seconds["gradient"]) / ROUNDS,
        "EVA's seconds": sum(seconds["eva"]) / ROUNDS,
        "peak": calibration_peak(),
        "peak of a step": peak("lora"),
    }
    config = {"batches": BATCHES, "rank": RANK, "parameters": sum(_elements(p) for p in base().parameters())}
    measured = {"metrics": metrics, "items": {"ratio": [round(ratio, 4) for ratio in ratios]}}
    RECORDS.unlink(missing_ok=True)
    append_record(RECORDS, make_record("ranks_cost", config, 0, data="", measured=measured))
    print(metrics)


if __name__ == "__main__":
    main()
