"""Whisper: examples to train on, transcripts to judge by, and a window shorter than 30 seconds.

Whisper pads whatever it hears to 30 s, so a two-second utterance costs 1,500 encoder positions. A shorter window
makes training several times cheaper. It is not innocent: a model that never saw a short window adds words at the end
of short clips. Judge a model in the window in which it will be used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from .errors import MediaError, MMQLoRAError
from .quantization import prefers_bf16

FRAMES_PER_SECOND = 100  # mel frames; the encoder halves them
FULL_WINDOW = 30.0


def prepare(
    speech: Sequence[Mapping[str, Any]], processor: Any, window: float = FULL_WINDOW, progress: bool = True
) -> list[dict[str, torch.Tensor]]:
    """Turn utterances into what Whisper reads and what it should say.

    Example:
        >>> examples = prepare(Speech("speech/synthetic"), processor, window=6.0)  # doctest: +SKIP
        >>> examples[0]["input_features"].shape  # doctest: +SKIP
        torch.Size([80, 600])

    Args:
        speech: items with ``samples``, float32 (N,) at 16 kHz, and ``text``.
        processor: the model's processor.
        window: seconds that the model will see; silence is added behind what is shorter.
        progress: show a progress bar.

    Returns:
        A list, which is a data set to `fine_tune`: ``input_features`` (M, 100 * window) for M mel bands, and
        ``labels`` int64 (L,), where the prompt that generation forces is -100 and so not trained.

    Raises:
        MediaError: an utterance is longer than the window, so that words would be lost, or its samples are not finite.
    """
    frames = round(window * FRAMES_PER_SECOND)
    rate = processor.feature_extractor.sampling_rate
    examples = []
    for index in tqdm(range(len(speech)), desc="mel", leave=False, disable=not progress):
        item = speech[index]
        if len(item["samples"]) > window * rate:
            raise MediaError(
                f"{item.get('path', 'an utterance')} is {len(item['samples']) / rate:.1f} s long, the window "
                f"{window:g} s. Leave it out, cut it, or widen the window (at most {FULL_WINDOW:g} s)."
            )
        if not np.isfinite(item["samples"]).all():
            raise MediaError(f"{item.get('path', 'an utterance')} holds samples that are not finite numbers.")
        features = processor.feature_extractor(item["samples"], sampling_rate=rate, return_tensors="pt")
        # The space is how Whisper writes the first word; the start token is what `shift_tokens_right` puts back.
        labels = torch.tensor(processor.tokenizer(" " + item["text"].strip()).input_ids[1:])
        prompt = (labels >= processor.tokenizer.eos_token_id) & (torch.arange(len(labels)) < len(labels) - 1)
        labels[prompt] = -100
        examples.append({"input_features": features.input_features[0, :, :frames], "labels": labels})
    return examples


def collate(examples: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Make a batch of what `prepare` gave: features stacked, labels padded with -100.

    Example:
        >>> batch = collate(examples[:8])  # doctest: +SKIP

    Args:
        examples: items of one window.

    Returns:
        ``input_features`` (B, M, T) and ``labels`` (B, L).
    """
    labels = torch.nn.utils.rnn.pad_sequence([e["labels"] for e in examples], batch_first=True, padding_value=-100)
    return {"input_features": torch.stack([e["input_features"] for e in examples]), "labels": labels}


@contextmanager
def short_window(model: torch.nn.Module, window: float) -> Iterator[None]:
    """Let the encoder see ``window`` seconds for as long as the block runs.

    Example:
        >>> with short_window(model, 6.0):  # doctest: +SKIP
        ...     record = fine_tune(model, examples, collate=collate)

    Args:
        model: a Whisper model, wrapped by PEFT or not. Don't save it inside the block: its position table is cut.
        window: seconds, more than 0 and at most 30.

    Raises:
        MMQLoRAError: the window is out of range, or there is no Whisper encoder in the model.
    """
    encoder = next((m for m in model.modules() if isinstance(m, WhisperEncoder)), None)
    if encoder is None:
        raise MMQLoRAError(f"{type(model).__name__} holds no Whisper encoder; expected a Whisper model.")
    # Windows may be nested, to train in a short one and judge in the full one: the whole table is kept with the
    # encoder, in a list, so that it does not become a second parameter.
    whole = encoder.__dict__.setdefault("_whole_table", [encoder.embed_positions.weight])[0]
    before = encoder.embed_positions.weight
    positions = round(window * FRAMES_PER_SECOND) // 2
    if not 0 < positions <= len(whole):
        raise MMQLoRAError(
            f"window={window}: expected more than 0 and at most {2 * len(whole) / FRAMES_PER_SECOND:g} s."
        )

    def use(table: torch.nn.Parameter) -> None:
        encoder.embed_positions.weight, encoder.embed_positions.num_embeddings = table, len(table)
        encoder.config.max_source_positions = encoder.max_source_positions = len(table)

    cut = whole if positions == len(whole) else torch.nn.Parameter(whole[:positions].clone(), requires_grad=False)
    use(cut)
    try:
        yield
    finally:
        use(before)


@torch.no_grad()
def transcribe(
    model: torch.nn.Module,
    processor: Any,
    examples: Sequence[Mapping[str, torch.Tensor]],
    *,
    batch_size: int = 16,
    max_tokens: int = 100,
    bf16: bool | None = None,
    progress: bool = True,
) -> list[str]:
    """Write down what is said, greedily.

    Example:
        >>> transcribe(model, processor, examples)  # doctest: +SKIP
        [' Grace and Emma will meet near the station in Toronto.', ...]

    Args:
        model: a Whisper model in the window that ``examples`` were prepared for.
        processor: its processor.
        examples: what `prepare` gave.
        batch_size: clips at a time.
        max_tokens: the longest transcript, within what the model has positions for.
        bf16: compute in bfloat16 under autocast; the default is `quantization.prefers_bf16`.
        progress: show a progress bar.

    Returns:
        One text an example, in order.
    """
    device = next(model.parameters()).device
    if bf16 is None:
        bf16 = prefers_bf16(model)
    model.eval()
    max_tokens = min(max_tokens, model.config.max_target_positions - 4)  # start, language, task, no timestamps
    texts: list[str] = []
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        for start in tqdm(range(0, len(examples), batch_size), desc="transcribe", leave=False, disable=not progress):
            features = torch.stack([e["input_features"] for e in examples[start : start + batch_size]]).to(device)
            mask = torch.ones(features.shape[0], features.shape[2], dtype=torch.long, device=device)
            tokens = model.generate(
                input_features=features, attention_mask=mask, max_new_tokens=max_tokens, num_beams=1, do_sample=False
            )
            texts += processor.batch_decode(tokens, skip_special_tokens=True)
    return texts
