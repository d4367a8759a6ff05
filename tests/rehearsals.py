"""A step that was rehearsed against the same step run: behind `test_planner.py` and the book's table.

    cd tests && python rehearsals.py             # all of them, into book/records/memory_checks.jsonl

What is compared is `Ledger.peak`, bytes of tensors: predicted from a model without weights, and counted while
`fine_tune` runs the real model for two steps. No allocator has a say in it.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from architectures import ARCHITECTURES
from batches import BATCHES, batch
from torch import nn
from tqdm import tqdm

from mmqlora import benchmark, methods
from mmqlora.errors import MMQLoRAError
from mmqlora.ledger import Ledger
from mmqlora.records import append_record, make_record
from mmqlora.regions import regions
from mmqlora.rehearsal import hollow, rehearse
from mmqlora.training import fine_tune

RECORDS = Path(__file__).parents[1] / "book" / "records" / "memory_checks.jsonl"
ARMS = (("full", None), ("lora", None), ("lora", "nf4"))
SIZES = ((2, 2), (4, 4), (8, 8))  # frames, or as many pieces of sound
RANK = 4


class Same(torch.utils.data.Dataset[int]):
    """Items that `collate` does not look at."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        return index


def adapted(model: nn.Module, method: str, quant_type: str | None) -> nn.Module:
    rank = {} if method == "full" else {"rank": RANK}
    return methods.adapt(model, method, quant_type=quant_type, **rank)


def measured(
    model: nn.Module, inputs: dict[str, Any], method: str, quant_type: str | None, checkpointing: bool
) -> Ledger:
    """Count what a real run of two steps holds."""

    def collate(_: Any) -> dict[str, Any]:
        return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}

    inside = dict(regions(model))
    model = adapted(model, method, quant_type)
    options = {"steps": 2, "batch_size": 1, "gradient_checkpointing": checkpointing, "bf16": False, "progress": False}
    with Ledger(model, inside) as ledger:
        fine_tune(model, Same(), collate=collate, **options)
    return ledger


def predicted(
    skeleton: nn.Module, inputs: dict[str, Any], method: str, quant_type: str | None, checkpointing: bool
) -> Ledger:
    """Rehearse the same run on a model that is on the meta device."""
    inside = dict(regions(skeleton))
    model = adapted(skeleton, method, quant_type).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    hollow(model)
    return rehearse(model, inputs, regions=inside)


def compare(
    name: str, method: str, quant_type: str | None, checkpointing: bool, sizes: tuple[int, ...]
) -> dict[str, int]:
    """Both for a tiny model of `ARCHITECTURES`, or for a base model of the benchmark."""
    if name in ARCHITECTURES:
        model, inputs = ARCHITECTURES[name](), batch(name, sizes=sizes).inputs
        with torch.device("meta"):
            skeleton = ARCHITECTURES[name]()
    else:
        task = benchmark.task(name)
        data, model = task.train(1), task.load()
        inputs = dict(task.collate([data[0]] * sum(sizes)))  # one clip again and again: none is padded
        with torch.device("meta"):
            skeleton = type(model)._from_config(model.config, dtype=torch.float32)
    run = (method, quant_type, checkpointing)
    return {"predicted": predicted(skeleton, inputs, *run).peak, "measured": measured(model, inputs, *run).peak}


def cases() -> Iterator[tuple[str, str, str | None, bool, tuple[int, ...]]]:
    for name in [*BATCHES, "video/palette", "audio/timbre", "retrieval/palette"]:
        for method, quant_type in ARMS:
            for checkpointing in (False, True):
                for sizes in SIZES:
                    yield name, method, quant_type, checkpointing, sizes


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    RECORDS.unlink(missing_ok=True)
    for case in tqdm(list(cases())):
        config = dict(zip(("model", "method", "quant_type", "checkpointing", "sizes"), case, strict=True))
        try:
            found = compare(*case)
        except (ValueError, RuntimeError, NotImplementedError, MMQLoRAError) as error:
            if case[-1] == (4, 4) or not isinstance(error, ValueError):  # else a model that takes no such clips
                print(f"{case}: {type(error).__name__}: {error}"[:200], file=sys.stderr)
            continue
        append_record(RECORDS, make_record("memory_checks", config, 0, data="", measured={"metrics": found}))


if __name__ == "__main__":
    main()
