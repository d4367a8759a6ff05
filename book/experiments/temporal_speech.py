"""The experiment of the chapter *Temporal adapters* on real Whisper: dialogue in synthetic voices.

    cd book && python -m experiments.temporal_speech --tune
    cd book && python -m experiments.temporal_speech

The arms of `temporal` on the model, the data and the steps of `first_qlora_run`. Sentences are judged one by one, by
the share of their words that are right (1 - word error rate, 0 at least), in the window of six seconds of training.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from transformers import set_seed

from experiments import first_qlora_run as speech
from experiments import tuning
from experiments.temporal import ARMS, CONTENT, SEEDS, adapt, mean_of
from mmqlora import quantization
from mmqlora.grids import run_grid
from mmqlora.training import fine_tune
from mmqlora.whisper import collate, prepare, short_window

RECORDS = Path(__file__).parent.parent / "records"
WINDOW = 6.0  # seconds; the longest sentence has 5.8
MIDDLE = 3e-4  # of the first three learning rates
ADAPTERS = {"r": 16, "lora_alpha": 32, "target_modules": speech.LINEARS}


def score(record: Mapping[str, Any]) -> float:
    """Share of right words, mean over sentences."""
    return record["metrics"]["word_accuracy"]


def run(config: dict[str, Any], seed: int) -> dict[str, Any]:
    """One run of the grid."""
    at_hand()
    set_seed(seed)
    model, processor = quantization.load(speech.MODEL, quant_type="nf4", dtype=torch.float32)
    model = adapt(model, config["arm"], CONTENT["audio"], **ADAPTERS)
    with mean_of(config["arm"]):
        return learn(model, processor, config, seed, "temporal_speech")


def at_hand() -> Path:
    """The folder of speech; where it or the model is missing, an error says what to do."""
    folder = speech.at_hand()
    if folder is None:
        raise FileNotFoundError("neither Whisper tiny.en nor speech is at hand; set MMQLORA_REAL to their folder")
    return folder


def learn(
    model: torch.nn.Module,
    processor: Any,
    config: dict[str, Any],
    seed: int,
    experiment: str,
    known: Mapping[str, float] = MappingProxyType({}),
    callbacks: Sequence[Any] = (),
) -> dict[str, Any]:
    """Fine-tune an adapted Whisper on dialogue and judge it: the record, with metrics that are known before."""
    train, sets = speech.data_sets(at_hand(), tuning=config.get("validation", False))
    name = "voices" if config.get("validation") else "synthetic"
    sets = {name: sets[name]}
    judge = speech.judge(sets, processor, {name: (WINDOW,)}, bf16=False)  # as it is trained

    def evaluate(trained: Any) -> dict[str, Any]:
        found = judge(trained)
        edits, words = np.array([item[3:] for item in found.pop("items")], float).T
        right = np.maximum(0, 1 - edits / words)
        items = {"word_accuracy": right.round(4).tolist()}
        return {**found, **known, "word_accuracy": float(right.mean()), "items": items}

    examples = prepare(train, processor, WINDOW, progress=False)
    with short_window(model, WINDOW):
        return fine_tune(
            model,
            examples,
            evaluate,
            collate=collate,
            seed=seed,
            steps=config.get("steps", speech.STEPS),
            batch_size=speech.BATCH,
            learning_rate=config["learning_rate"],
            bf16=False,
            callbacks=callbacks,
            progress=False,
            experiment=experiment,
            config=config,
            data="-".join(one.fingerprint() for one in [train, *sets.values()]),
        )


def rates() -> dict[str, float]:
    """The learning rate of each arm."""
    tried = tuning.tried(RECORDS / "temporal_speech_tuning.jsonl", score)
    return {json.loads(key)["arm"]: max(scores, key=scores.get) for key, scores in tried.items()}


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--arm", action="append", help="only this arm; may be given again")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    arms, options = arguments.arm or list(ARMS), {"processes": arguments.processes, "timeout": 3600}
    function = "experiments.temporal_speech:run"
    if arguments.tune:
        cells = [({"arm": arm, "validation": True}, MIDDLE) for arm in arms]
        tuning.tune(function, cells, RECORDS / "temporal_speech_tuning.jsonl", score, **options)
        return
    chosen = rates()
    runs = [({"arm": arm, "learning_rate": chosen[arm]}, seed) for seed in SEEDS for arm in arms if arm in chosen]
    grid = run_grid(function, runs, RECORDS / "temporal_speech.jsonl", **options)
    for failure in grid.failures:
        print(failure.config, failure.seed, failure.error[-500:], file=sys.stderr)


if __name__ == "__main__":
    main()
