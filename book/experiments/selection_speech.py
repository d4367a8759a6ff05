"""What leaving out silence saves in a model with a window of 30 seconds: real Whisper and a human voice.

    cd book && python -m experiments.selection_speech

Telephone prompts are joined with pauses, of a faint hiss, to recordings that fill part of one window, or two. What is
kept of a recording is joined, and read in windows of 30 seconds; "window cut" gives the encoder no more positions than
that needs, which it was not trained for.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.first_qlora_run import MODEL, at_hand
from mmqlora import quantization
from mmqlora.datasets.speech import Speech
from mmqlora.grids import run_grid
from mmqlora.media import Audio
from mmqlora.metrics import english_normalizer, word_error_rate
from mmqlora.records import make_record
from mmqlora.spans import select_segments
from mmqlora.whisper import FULL_WINDOW, prepare, short_window, transcribe

RECORDS = Path(__file__).parent.parent / "records" / "selection_speech.jsonl"
SEEDS, COUNT, RATE = range(1, 7), 4, 16000
LENGTHS = {"one window": (14.0, 27.0), "two windows": (20.0, 50.0)}  # seconds: of speech at most, and in all
ARMS = ("all", "silence left out", "silence and repeats left out", "window cut", "uniform")
MARGIN = 0.2  # seconds around what is kept


def recording(speech: Speech, rng: np.random.Generator, said: float, total: float) -> tuple[Audio, str]:
    """Prompts by chance, with pauses of chance between them, and what they say."""
    parts, texts, left = [], [], said
    for index in rng.permutation(len(speech)):
        if speech.rows[index]["duration"] <= min(left, 8.0):
            item = speech[int(index)]
            parts.append(item["samples"])
            texts.append(item["text"])
            left -= len(item["samples"]) / RATE
    pauses = rng.dirichlet(np.ones(len(parts) + 1)) * (total * RATE - sum(map(len, parts)))
    silence = [np.zeros(int(length), np.float32) for length in pauses]
    samples = np.concatenate([silence[0], *(x for pair in zip(parts, silence[1:], strict=True) for x in pair)])
    return Audio(samples + rng.normal(0, 1e-4, len(samples)).astype(np.float32), RATE), " ".join(texts)


def kept(audio: Audio, arm: str, seed: int) -> Audio:
    """What the model hears."""
    if arm == "all":
        return audio
    spans = select_segments(audio, repeats="repeats" not in arm, margin=MARGIN)
    if arm == "uniform":
        spans = select_segments(audio, spans.kept, "uniform", margin=0.0, seed=seed)
    return spans.cut(audio)


def run(config: dict[str, Any], seed: int) -> dict[str, Any]:
    """A few recordings, transcribed."""
    folder = at_hand()
    if folder is None:
        raise FileNotFoundError("neither Whisper tiny.en nor speech is at hand; set MMQLORA_REAL to their folder")
    speech = Speech(folder / "prompts", keep=lambda row: row["split"] == "test" and 1.5 < row["duration"])
    model, processor = quantization.load(MODEL, quant_type="nf4", dtype=torch.float32)
    rng = np.random.default_rng(seed)
    said, texts, seconds, windows, spent = [], [], [], 0, 0.0
    for _ in range(COUNT):
        audio, text = recording(speech, rng, *LENGTHS[config["length"]])
        heard = kept(audio, config["arm"], seed).samples
        seconds.append(len(heard) / RATE)
        size = FULL_WINDOW if config["arm"] != "window cut" else min(FULL_WINDOW, float(np.ceil(seconds[-1] / 2) * 2))
        parts = [heard[a : a + int(size * RATE)] for a in range(0, len(heard), int(size * RATE))]
        start = time.process_time()
        with short_window(model, size):
            examples = prepare([{"samples": part, "text": "."} for part in parts], processor, size, progress=False)
            said.append(" ".join(transcribe(model, processor, examples, bf16=False, max_tokens=220, progress=False)))
        spent += time.process_time() - start
        windows += len(parts)
        texts.append(text)
    normal = english_normalizer()
    errors = word_error_rate([normal(text) for text in texts], [normal(text) for text in said])
    metrics = {
        "word_error_rate": float(errors.edits.sum() / errors.lengths.sum()),
        "seconds": float(np.mean(seconds)),
        "windows": windows / COUNT,
        "cpu_s": spent / COUNT,
    }
    return make_record("selection_speech", config, seed, data=speech.fingerprint(), measured={"metrics": metrics})


def main() -> None:
    """Run what is not in the records yet."""
    runs = [({"length": length, "arm": arm}, seed) for seed in SEEDS for length in LENGTHS for arm in ARMS]
    grid = run_grid("experiments.selection_speech:run", runs, RECORDS, timeout=1800)
    for failure in grid.failures:
        print(failure.config, failure.seed, failure.error[-500:], file=sys.stderr)


if __name__ == "__main__":
    main()
