"""The experiment of the chapter *First QLoRA run*: Whisper tiny.en learns synthetic voices.

    cd book && python -m experiments.first_qlora_run --tune     # learning rates: first, as the rest reads them
    cd book && python -m experiments.first_qlora_run            # everything that is not in records/ yet
    cd book && python -m experiments.first_qlora_run --memory   # peak memory, each run in a process of its own
    cd book && python -m experiments.first_qlora_run --arm qlora --seed 3    # one run, made again

Three arms learn the same sentences for the same steps: full fine-tuning (fp32 weights, bf16 compute), LoRA on a bf16
base, and QLoRA, the same LoRA on an NF4 base. Learning rates (`best_learning_rate`) are chosen on seed 0, which is not
reported, and on data apart from the test sets.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
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
MEMORY = RECORDS.with_name(f"{NAME}_memory.jsonl")

SEEDS = range(1, 7)
WINDOW = 10.0  # seconds; the longest synthetic sentence has 5.8
WINDOWS = (6.0, 10.0, 20.0, FULL_WINDOW)  # to see what a shorter one costs before any training
STEPS, BATCH = 50, 8
LINEARS = r".*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"  # every Linear but the head
LORA = {"rank": 16, "alpha": 32}
ARMS: dict[str, dict[str, Any]] = {"full": {}, "lora": LORA, "qlora": {**LORA, "quant_type": "nf4"}}
RATES = {"full": (1e-5, 2e-5, 3e-5, 1e-4), "lora": (1e-4, 2e-4, 3e-4, 1e-3), "qlora": (1e-4, 2e-4, 3e-4, 1e-3)}
TUNING_VOICES = ("en-029", "en-gb+f3")  # set aside while learning rates are chosen, learned from afterwards
UNTRAINED = ("zero-shot", "zero-shot-nf4", "windows")
FORGETTING = 0.02  # how much the word error rate on human prompts may rise, when learning rates are chosen


def configuration(arm: str, learning_rate: float) -> dict[str, Any]:
    """What identifies a training run, apart from its seed."""
    training = {"window_s": WINDOW, "steps": STEPS, "batch_size": BATCH, "learning_rate": learning_rate}
    return {"arm": arm, "model": MODEL, **training, **ARMS[arm]}


def untrained(arm: str = "zero-shot", window: float = WINDOW, **options: Any) -> dict[str, Any]:
    """What identifies the model as it comes."""
    return {"arm": arm, "model": MODEL, "window_s": window, "steps": 0, **options}


def build(config: dict[str, Any], seed: int) -> tuple[torch.nn.Module, Any]:
    """The model of an arm, ready to train, and its processor."""
    set_seed(seed)
    if config["arm"] in ("full", "zero-shot", "windows"):
        return quantization.load(config["model"], quant_type=None, dtype=torch.float32)
    model, processor = quantization.load(
        config["model"], quant_type=config.get("quant_type"), dtype=torch.bfloat16, compute_dtype=torch.bfloat16
    )
    if "rank" in config:
        lora = LoraConfig(r=config["rank"], lora_alpha=config["alpha"], target_modules=LINEARS)
        model = get_peft_model(model, lora)
    return model, processor


def data_sets(folder: Path, tuning: bool) -> tuple[Speech, dict[str, Speech]]:
    """What to learn from, and what to judge by.

    To report: all training sentences; the test sentences and the test split of the human prompts. To choose learning
    rates: the training sentences without two voices; these voices, and human prompts of the training split.
    """

    def synthetic(split: str, voices: Callable[[str], bool] = lambda voice: True) -> Speech:
        return Speech(folder / "synthetic", keep=lambda row: row["split"] == split and voices(row["voice"]))

    def prompts(split: str) -> Speech:
        return Speech(folder / "prompts", keep=lambda row: row["split"] == split and row["duration"] <= FULL_WINDOW)

    if tuning:
        train = synthetic("train", lambda voice: voice not in TUNING_VOICES)
        sets = {"voices": synthetic("train", lambda voice: voice in TUNING_VOICES), "prompts": prompts("train")}
        sets["prompts"].rows = sets["prompts"].rows[::7]
    else:
        train = synthetic("train")
        sets = {"synthetic": synthetic("test"), "prompts": prompts("test")}
    for speech in sets.values():
        speech.rows.sort(key=lambda row: row["duration"])  # a batch takes as long as its longest transcript
    return train, sets


def at_hand() -> Path | None:
    """The folder of speech, where both it and the model are on this disk."""
    real = Path(os.environ.get("MMQLORA_REAL", "../../shared/real"))
    if not (real / "speech").is_dir() or not (real / "models" / MODEL.split("/")[-1]).is_dir():
        return None
    places = [os.environ.get("MMQLORA_MODELS"), str(real / "models")]
    os.environ["MMQLORA_MODELS"] = os.pathsep.join(filter(None, places))
    return real / "speech"


def excerpt(folder: Path, train: int, test: int) -> tuple[Speech, Speech]:
    """A few training sentences, and a few dialogue lines of the test set, for a run to watch."""
    learn, sets = data_sets(folder, tuning=False)
    learn.rows = learn.rows[:train]
    lines = sets["synthetic"]
    lines.rows = [row for row in lines.rows if row["kind"] == "line"]
    lines.rows = lines.rows[:: len(lines.rows) // test][:test]
    return learn, lines


def judge(
    sets: dict[str, Speech], processor: Any, windows: dict[str, tuple[float, ...]], bf16: bool = True
) -> Callable[[Any], Any]:
    """A function from a model to its word error rates by set and window, with the errors of every sentence."""
    normalize = english_normalizer(processor)
    kept = {
        (name, window): [i for i, row in enumerate(sets[name].rows) if row["duration"] <= window]
        for name in sets
        for window in windows[name]
    }
    examples = {key: prepare([sets[key[0]][i] for i in indices], processor, key[1]) for key, indices in kept.items()}

    def evaluate(model: Any) -> dict[str, Any]:
        metrics: dict[str, float] = {}
        items: list[list[Any]] = []
        for (name, window), indices in kept.items():
            with short_window(model, window):
                texts = transcribe(model, processor, examples[name, window], bf16=bf16, progress=False)
            rows = [sets[name].rows[i] for i in indices]
            errors = word_error_rate([row["text"] for row in rows], texts, normalize)
            scored = [
                [part(name, row), window, row["path"], int(edits), int(words)]
                for row, edits, words in zip(rows, errors.edits, errors.lengths, strict=True)
            ]
            items += scored
            for group in sorted({item[0] for item in scored} | {name}):
                chosen = np.array([item[3:] for item in scored if item[0].startswith(group)])
                metrics[f"wer/{group}/{window:g}s"] = float(chosen[:, 0].sum() / chosen[:, 1].sum())
        return {**metrics, "items": items}

    return evaluate


def part(name: str, row: dict[str, Any]) -> str:
    """The part of a test set that a sentence belongs to, the finest that is judged apart."""
    if row.get("kind") == "template":
        return f"{name}/templates"
    if row.get("kind") == "line":
        return f"{name}/lines-{'seen' if row['voice_seen'] else 'unseen'}-voices"
    return f"{name}/{'up-to-6s' if row['duration'] <= min(WINDOWS) else 'longer'}"


def run(config: dict[str, Any], seed: int, folder: Path, tuning: bool = False, progress: bool = True) -> dict[str, Any]:
    """One run, from the weights on disk to its record."""
    model, processor = build(config, seed)
    train, sets = data_sets(folder, tuning)
    if config["arm"] == "windows":
        windows = dict.fromkeys(sets, (config["window_s"],))
        for speech in sets.values():
            speech.rows = speech.rows[::3]  # enough to see the difference
    else:
        # The first seed also shows the window of training.
        both = (config["window_s"], FULL_WINDOW)
        windows = {
            "synthetic": both if seed <= 1 else (FULL_WINDOW,),
            "prompts": (FULL_WINDOW,),
            "voices": (FULL_WINDOW,),
        }
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
            bf16=True,
            experiment=NAME,
            config=config,
            data=data,
            progress=progress,
        )


def best_learning_rate(arm: str) -> float:
    """The rate with the fewest word errors on voices set aside, among those that forget little.

    'Little' is a rise of at most `FORGETTING` on human prompts; where every rate forgets more, the one that forgets
    least. QLoRA takes the rate that 16-bit LoRA chose, so that between these two nothing differs but the bits.
    """
    if arm == "qlora":
        return best_learning_rate("lora")
    records = read_records(TUNING)
    before = next(r for r in records if r["config"]["arm"] == "zero-shot")["metrics"]
    tried = [(r["config"]["learning_rate"], r["metrics"]) for r in records if r["config"]["arm"] == arm]
    voices, prompts = f"wer/voices/{FULL_WINDOW:g}s", f"wer/prompts/{FULL_WINDOW:g}s"
    kept = [(rate, after) for rate, after in tried if after[prompts] <= before[prompts] + FORGETTING]
    if kept:
        return min(kept, key=lambda run: run[1][voices])[0]
    return min(tried, key=lambda run: run[1][prompts])[0]


def wanted(tuning: bool) -> list[tuple[dict[str, Any], int]]:
    """Every run of the experiment, in order."""
    as_it_comes = [untrained(), untrained("zero-shot-nf4", quant_type="nf4")]
    if tuning:
        return [(c, 0) for c in as_it_comes] + [(configuration(arm, rate), 0) for arm in ARMS for rate in RATES[arm]]
    rates = {arm: best_learning_rate(arm) for arm in ARMS}
    trained = [(configuration(arm, rates[arm]), seed) for seed in SEEDS for arm in ARMS]
    return [(config, 0) for config in as_it_comes] + trained + [(untrained("windows", w), 0) for w in WINDOWS]


def memory(rounds: int = 3) -> None:
    """Record the peak memory of every arm. In one process, a run would count what the runs before it left behind."""
    for turn in range(rounds):
        for arm in ARMS:
            words = ["-m", f"experiments.{NAME}", "--memory-of", arm, str(turn)]
            subprocess.run([sys.executable, *words], check=True)


def memory_of(arm: str, turn: int, folder: Path, steps: int = 4) -> None:
    """Record a run of a few steps; the peak is reached in the second, when the optimizer has its state."""
    config = {**configuration(arm, best_learning_rate(arm)), "steps": steps}
    model, processor = build(config, turn)
    train, _ = data_sets(folder, tuning=False)
    train.rows = train.rows[: steps * BATCH]
    examples = prepare(train, processor, WINDOW, progress=False)
    with short_window(model, WINDOW):
        record = fine_tune(
            model,
            examples,
            collate=collate,
            seed=turn,
            steps=steps,
            batch_size=BATCH,
            learning_rate=config["learning_rate"],
            bf16=True,
            experiment=f"{NAME}_memory",
            config=config,
            data=train.fingerprint(),
            progress=False,
        )
    append_record(MEMORY, record)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="choose learning rates")
    parser.add_argument("--arm", choices=[*ARMS, *UNTRAINED], help="only this arm, recorded or not")
    parser.add_argument("--seed", type=int, help="only this seed")
    parser.add_argument("--every", type=int, default=1, help="take every Nth run ...")
    parser.add_argument("--first", type=int, default=0, help="... from this one on, to share the work")
    parser.add_argument("--memory", action="store_true", help="peak memory")
    parser.add_argument("--memory-of", nargs=2, metavar=("ARM", "ROUND"), help="one run of --memory")
    options = parser.parse_args()
    folder = Path(os.environ.get("MMQLORA_REAL", "../../shared/real")) / "speech"
    if options.memory_of:
        return memory_of(options.memory_of[0], int(options.memory_of[1]), folder)
    if options.memory:
        return memory()
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
        print(config["arm"], config.get("learning_rate"), seed, record["metrics"], flush=True)


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    print(environment())
    main()
