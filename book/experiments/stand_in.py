"""A stand-in for Whisper and speech, made in seconds, where neither is at hand.

Its 'speech' are the notes of a scale, played one after the other; its 'words' are their names. A voice is a timbre
and a tuning. The model is a real `WhisperForConditionalGeneration`, 1,000 times smaller than Whisper tiny, that
learned one voice from nothing. It shows that the code runs and what fine-tuning does; its error rates say nothing
about speech.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils.data import Dataset
from transformers import (
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    set_seed,
)

from mmqlora.training import fine_tune
from mmqlora.whisper import collate, prepare

NOTES = {"do": 0, "re": 2, "mi": 4, "fa": 5, "sol": 7, "la": 9, "ti": 11}  # semitones above the tonic
RATE = 16000
WINDOW = 2.0  # seconds


class Melodies(Dataset):
    """Melodies of one to five notes, and the names of the notes.

    Args:
        count: how many.
        seed: which ones.
        shifted: play in a new voice, tuned higher, richer in overtones and noisy.
    """

    def __init__(self, count: int, seed: int, shifted: bool = False) -> None:
        self.count, self.seed, self.shifted = count, seed, shifted
        self.rows = [{"text": self[i]["text"], "duration": WINDOW} for i in range(count)]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One melody: ``text``, and ``samples``, float32 (N,)."""
        rng = np.random.default_rng([self.seed, index])
        names = rng.choice(list(NOTES), size=rng.integers(1, 6))
        tonic, overtones, noise = (330.0, [1.0, 0.9, 0.8, 0.7], 0.05) if self.shifted else (262.0, [1.0, 0.3], 0.005)
        notes = []
        for name in names:
            time = np.arange(int(RATE * rng.uniform(0.2, 0.35))) / RATE
            pitch = tonic * 2 ** (NOTES[name] / 12)
            wave = sum(a * np.sin(2 * np.pi * pitch * (k + 1) * time) for k, a in enumerate(overtones))
            notes.append(wave * np.sqrt(np.hanning(len(time))))
        samples = np.concatenate(notes)[: int(WINDOW * RATE)]
        samples = samples / np.abs(samples).max() + noise * rng.standard_normal(len(samples))
        return {"text": " ".join(names), "samples": (0.5 * samples).astype(np.float32), "path": f"melody {index}"}


def processor() -> WhisperProcessor:
    """Log-mel features like Whisper's, and a vocabulary of seven notes."""
    words = [*NOTES, "<eos>", "<start>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <eos>", special_tokens=[("<start>", len(NOTES) + 1), ("<eos>", len(NOTES))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<start>", pad_token="<eos>"
    )
    made = WhisperProcessor.__new__(WhisperProcessor)
    made.feature_extractor, made.tokenizer = WhisperFeatureExtractor(chunk_length=int(WINDOW)), fast
    return made


def model(steps: int = 400) -> WhisperForConditionalGeneration:
    """The stand-in for Whisper, trained on the plain voice."""
    set_seed(0)
    eos, start = len(NOTES), len(NOTES) + 1
    sizes = {
        f"{side}_{what}": n
        for side in ("encoder", "decoder")
        for what, n in {"layers": 2, "attention_heads": 2, "ffn_dim": 128}.items()
    }
    config = WhisperConfig(
        vocab_size=len(NOTES) + 2,
        d_model=64,
        max_source_positions=int(50 * WINDOW),
        max_target_positions=16,
        bos_token_id=start,
        decoder_start_token_id=start,
        eos_token_id=eos,
        pad_token_id=eos,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        **sizes,
    )
    whisper = WhisperForConditionalGeneration(config)
    examples = prepare(Melodies(600, seed=1), processor(), WINDOW, progress=False)
    fine_tune(
        whisper,
        examples,
        collate=collate,
        steps=steps,
        batch_size=32,
        learning_rate=1e-3,
        bf16=False,
        progress=False,
    )
    return whisper
