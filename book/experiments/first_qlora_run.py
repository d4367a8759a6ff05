"""The experiment of the chapter *First QLoRA run*: Whisper tiny.en learns sixteen synthetic voices.

    cd book && python -m experiments.first_qlora_run            # everything that is not in records/ yet
    cd book && python -m experiments.first_qlora_run --tune     # learning rates, on seed 0 and held-out training items
    cd book && python -m experiments.first_qlora_run --arm qlora --seed 3    # one run, made again

Three arms learn the same 300 sentences for the same steps: full fine-tuning (fp32 weights, bf16 compute), LoRA on a
bf16 base, and QLoRA, the same LoRA on an NF4 base. Each uses its own best learning rate, chosen on seed 0, which is
not reported, by word errors on 50 training sentences set aside.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import set_seed

from mmqlora import quantization
from mmqlora.datasets.speech import Speech
from mmqlora.metrics import english_normalizer, word_error_rate
from mmqlora.records import append_record, environment, make_record, read_records, run_id
from mmqlora.training import fine_tune
from mmqlora.whisper import FULL_WINDOW, collate, prepare, short_window, transcribe

NAME = "first_qlora_run"
MODEL = "openai/whisper-tiny.en"
RECORDS = Path(__file__).parent.parent / "records" / f"{NAME}.jsonl"
TUNING = RECORDS.with_name(f"{NAME}_tuning.jsonl")

SEEDS = range(1, 7)
WINDOW = 6.0  # seconds; the longest synthetic sentence has 5.8
LINEARS = r".*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"  # every Linear but the head
ARMS: dict[str, dict[str, Any]] = {
    "full": {"learning_rates": [3e-5, 1e-4, 3e-4]},
    "lora": {"learning_rates": [3e-4, 1e-3, 3e-3], "rank": 16, "alpha": 32},
    "qlora": {"learning_rates": [3e-4, 1e-3, 3e-3], "rank": 16, "alpha": 32, "quant_type": "nf4"},
}
BEST = {"full": 1e-4, "lora": 1e-3, "qlora": 1e-3}  # what --tune chose
STEPS, BATCH = 100, 8


def configuration(arm: str, learning_rate: float, window: float = WINDOW, steps: int = STEPS) -> dict[str, Any]:
    """What identifies a run, apart from its seed."""
    options = {key: value for key, value in ARMS[arm].items() if key != "learning_rates"}
    return {
        "arm": arm,
        "model": MODEL,
        "window_s": window,
        "steps": steps,
        "batch_size": BATCH,
        "learning_rate": learning_rate,
        **options,
    }


def build(config: dict[str, Any], seed: int) -> tuple[torch.nn.Module, Any]:
    """The model of an arm, ready to train, and its processor."""
    set_seed(seed)
    if config["arm"] in ("full", "zero-shot"):
        return quantization.load(config["model"], quant_type=None, dtype=torch.float32)
    model, processor = quantization.load(
        config["model"], quant_type=config.get("quant_type"), dtype=torch.bfloat16, compute_dtype=torch.bfloat16
    )
    if "rank" in config:
        lora = LoraConfig(r=config["rank"], lora_alpha=config["alpha"], target_modules=LINEARS)
        model = get_peft_model(model, lora)
    return model, processor


def training_sets(folder: Path) -> tuple[Speech, Speech]:
    """The synthetic training sentences: 300 to learn, and every seventh set aside to choose learning rates."""

    def held_out(row: dict[str, Any]) -> bool:
        return int(Path(row["path"]).stem) % 7 == 0

    train = Speech(folder / "synthetic", keep=lambda row: row["split"] == "train" and not held_out(row))
    held = Speech(folder / "synthetic", keep=lambda row: row["split"] == "train" and held_out(row))
    return train, held


def evaluation_sets(folder: Path) -> dict[str, Speech]:
    """The test sets, each apart: synthetic dialogue lines and templates, human prompts."""
    return {
        "synthetic": Speech(folder / "synthetic", keep=lambda row: row["split"] == "test"),
        "prompts": Speech(folder / "prompts", keep=lambda row: row["split"] == "test"),
    }


def judge(sets: dict[str, Speech], processor: Any, windows: tuple[float, ...]) -> Callable[[Any], dict[str, Any]]:
    """A function from a model to its word error rates by set and window, with every transcript as an item."""
    normalize = english_normalizer(processor)
    fitting = {
        (name, window): [i for i, row in enumerate(speech.rows) if row["duration"] <= window]
        for name, speech in sets.items()
        for window in windows
    }
    examples = {
        (name, window): prepare([sets[name][i] for i in kept], processor, window)
        for (name, window), kept in fitting.items()
    }

    def evaluate(model: Any) -> dict[str, Any]:
        metrics, items = {}, []
        for (name, window), kept in fitting.items():
            with short_window(model, window):
                texts = transcribe(model, processor, examples[name, window], progress=False)
            rows = [sets[name].rows[i] for i in kept]
            errors = word_error_rate([row["text"] for row in rows], texts, normalize)
            for row, text, edits, words in zip(rows, texts, errors.edits, errors.lengths, strict=True):
                items.append([name, window, row["path"], text.strip(), int(edits), int(words)])
            for group, chosen in groups(rows):
                picked = errors.edits[chosen].sum(), errors.lengths[chosen].sum()
                metrics[f"wer/{name}{group}/{window:g}s"] = float(picked[0] / picked[1])
        return {**metrics, "items": items}

    return evaluate


def groups(rows: list[dict[str, Any]]) -> Iterator[tuple[str, list[int]]]:
    """The parts of a test set that are judged apart."""
    yield "", list(range(len(rows)))
    tests: dict[str, Callable[[dict[str, Any]], bool]] = {
        "/lines": lambda row: row["kind"] == "line",
        "/lines-unseen-voices": lambda row: row["kind"] == "line" and not row["voice_seen"],
        "/lines-seen-voices": lambda row: row["kind"] == "line" and row["voice_seen"],
        "/templates": lambda row: row["kind"] == "template",
    }
    if "kind" in rows[0]:
        for group, test in tests.items():
            yield group, [i for i, row in enumerate(rows) if test(row)]


def run(config: dict[str, Any], seed: int, folder: Path, tuning: bool = False, progress: bool = True) -> dict[str, Any]:
    """One run, from the weights on disk to its record."""
    model, processor = build(config, seed)
    train, held = training_sets(folder)
    sets = {"held-out": held} if tuning else evaluation_sets(folder)
    windows = (config["window_s"],) if tuning else (config["window_s"], FULL_WINDOW)
    evaluate = judge(sets, processor, windows)
    data = "-".join(speech.fingerprint() for speech in [train, *sets.values()])
    if not config["steps"]:
        started = time.perf_counter()
        metrics = evaluate(model.eval())
        measured = {"items": metrics.pop("items"), "metrics": metrics, "wall_s": time.perf_counter() - started}
        return make_record(NAME, config, seed, data=data, measured=measured)
    examples = prepare(train, processor, config["window_s"])
    with short_window(model, config["window_s"]):
        return fine_tune(
            model,
            examples,
            evaluate,
            collate=collate,
            seed=seed,
            steps=config["steps"],
            batch_size=config["batch_size"],
            learning_rate=config["learning_rate"],
            experiment=NAME,
            config=config,
            data=data,
            progress=progress,
        )


def wanted(tuning: bool) -> list[tuple[dict[str, Any], int]]:
    """Every run of the experiment, in order."""
    if tuning:
        return [(configuration(arm, rate), 0) for arm, options in ARMS.items() for rate in options["learning_rates"]]
    untrained = {"model": MODEL, "window_s": WINDOW, "steps": 0, "batch_size": BATCH, "learning_rate": 0.0}
    zero_shot = [
        ({"arm": "zero-shot", **untrained}, 0),
        ({"arm": "zero-shot-nf4", **untrained, "quant_type": "nf4"}, 0),
    ]
    return zero_shot + [(configuration(arm, BEST[arm]), seed) for seed in SEEDS for arm in ARMS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="choose learning rates")
    parser.add_argument("--arm", choices=[*ARMS, "zero-shot", "zero-shot-nf4"], help="only this arm, recorded or not")
    parser.add_argument("--seed", type=int, help="only this seed")
    parser.add_argument("--every", type=int, default=1, help="take every Nth run ...")
    parser.add_argument("--first", type=int, default=0, help="... from this one on, to share the work")
    options = parser.parse_args()
    folder = Path(os.environ.get("MMQLORA_REAL", "../../shared/real")) / "speech"
    path = TUNING if options.tune else RECORDS
    runs = wanted(options.tune)[options.first :: options.every]
    for config, seed in runs:
        if (options.arm or config["arm"]) != config["arm"] or options.seed not in (None, seed):
            continue
        known = {record["id"] for record in read_records(path)} if path.exists() else set()
        if options.arm is None and run_id(NAME, config, seed) in known:
            continue
        record = run(config, seed, folder, options.tune)
        append_record(path, record)
        print(config["arm"], config["learning_rate"], seed, record["metrics"], flush=True)


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    print(environment())
    main()
