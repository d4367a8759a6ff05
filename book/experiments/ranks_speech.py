"""The experiment of the chapter *Ranks* on real Whisper: dialogue in synthetic voices.

    cd book && python -m experiments.ranks_speech --tune
    cd book && python -m experiments.ranks_speech

The main arms of `ranks`, at its smallest budget, on the model, the data, the steps and the measure of
`temporal_speech`. All seeds learn the same sentences, so each calibrates on others of them.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from experiments import first_qlora_run as speech
from experiments import temporal_speech, tuning
from experiments.ranks import BATCHES, BUDGETS, ITEMS, MAIN, SEEDS, build, first
from mmqlora import methods, quantization
from mmqlora.grids import run_grid
from mmqlora.whisper import collate, prepare, short_window

RECORDS = Path(__file__).parent.parent / "records"
MIDDLE = 1e-3  # of the first three learning rates


def run(config: dict[str, Any], seed: int) -> dict[str, Any]:
    """One run of the grid."""
    folder = temporal_speech.at_hand()
    set_seed(seed)

    processor = quantization.load(speech.MODEL, quant_type=None)[1]
    train, _ = speech.data_sets(folder, tuning=config.get("validation", False))
    drawn = [train[i] for i in random.Random(seed).sample(range(len(train)), BATCHES * ITEMS)]
    batches = first(prepare(drawn, processor, temporal_speech.WINDOW, progress=False), collate)
    with ExitStack() as stack:

        def load(quant_type: str | None = None) -> torch.nn.Module:
            model, _ = quantization.load(speech.MODEL, quant_type=quant_type, dtype=torch.float32)
            stack.enter_context(short_window(model, temporal_speech.WINDOW))
            return model

        model, shares = build(config, load, batches, seed, config.get("steps", speech.STEPS))
        callbacks = methods.callbacks(model)
        return temporal_speech.learn(model, processor, config, seed, "ranks_speech", shares, callbacks)


def rates() -> dict[str, float]:
    """The learning rate of each arm whose sweep is finished."""
    tried = tuning.tried(RECORDS / "ranks_speech_tuning.jsonl", temporal_speech.score)
    done = {key: scores for key, scores in tried.items() if not tuning.wanted(scores, MIDDLE)}
    return {json.loads(key)["arm"]: max(scores, key=scores.get) for key, scores in done.items()}


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="choose learning rates")
    parser.add_argument("--arm", action="append", choices=MAIN, help="only this arm; may be given again")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    arms, options = arguments.arm or MAIN, {"processes": arguments.processes, "timeout": 3600}
    function, cell = "experiments.ranks_speech:run", {"budget": BUDGETS[0]}
    if arguments.tune:
        cells = [({"arm": arm, **cell, "validation": True}, MIDDLE) for arm in arms]
        tuning.tune(function, cells, RECORDS / "ranks_speech_tuning.jsonl", temporal_speech.score, **options)
        return
    chosen = rates()
    runs = [
        ({"arm": arm, **cell, "learning_rate": chosen[arm]}, seed) for seed in SEEDS for arm in arms if arm in chosen
    ]
    grid = run_grid(function, runs, RECORDS / "ranks_speech.jsonl", **options)
    for failure in grid.failures:
        print(failure.config, failure.seed, failure.error[-500:], file=sys.stderr)


if __name__ == "__main__":
    main()
