"""How good a transcript is: word and character error rates.

Captions are scored in `captions`, answers in `answers`, and retrieval in `retrieval`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jiwer
import numpy as np

from .errors import MetricError


@dataclass(frozen=True)
class ErrorRate:
    """Edits over reference length, for a whole set and for each item.

    Attributes:
        edits: int (N,), substitutions + deletions + insertions of each item.
        lengths: int (N,), words or characters of each reference.
    """

    edits: np.ndarray
    lengths: np.ndarray

    @property
    def rate(self) -> float:
        """All edits over all reference words, as speech papers report it; can be above 1."""
        return float(self.edits.sum() / max(1, self.lengths.sum()))


def word_error_rate(
    references: Sequence[str], hypotheses: Sequence[str], normalize: Callable[[str], str] | None = None
) -> ErrorRate:
    """Word error rate, through jiwer, over a set and by item.

    Example:
        >>> word_error_rate(["the cat sat", "hello"], ["the cat", "hello"]).rate
        0.25

    Args:
        references: what was said.
        hypotheses: what was recognized.
        normalize: applied to both first, such as `english_normalizer`; None leaves case and punctuation as they are.

    Returns:
        An `ErrorRate`. Where a normalized reference is empty, every word of the hypothesis is an insertion.

    Raises:
        MetricError: the two differ in length or are empty.
    """
    return _error_rate(jiwer.process_words, references, hypotheses, normalize)


def character_error_rate(
    references: Sequence[str], hypotheses: Sequence[str], normalize: Callable[[str], str] | None = None
) -> ErrorRate:
    """Character error rate; see `word_error_rate`.

    Example:
        >>> character_error_rate(["abcd"], ["abed"]).rate
        0.25

    Args:
        references: what was said.
        hypotheses: what was recognized.
        normalize: applied to both first.

    Returns:
        An `ErrorRate`.

    Raises:
        MetricError: the two differ in length or are empty.
    """
    return _error_rate(jiwer.process_characters, references, hypotheses, normalize)


def _error_rate(process, references, hypotheses, normalize) -> ErrorRate:
    if len(references) != len(hypotheses) or not references:
        raise MetricError(
            f"{len(references)} references and {len(hypotheses)} hypotheses; expected one hypothesis for each "
            "reference, and at least one."
        )
    if normalize is not None:
        references, hypotheses = [normalize(r) for r in references], [normalize(h) for h in hypotheses]
    edits, lengths = [], []
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        if reference.strip():
            out = process(reference, hypothesis)
            edits.append(out.substitutions + out.deletions + out.insertions)
            lengths.append(out.hits + out.substitutions + out.deletions)
        else:  # jiwer refuses an empty reference
            edits.append(len(hypothesis.split()) if process is jiwer.process_words else len(hypothesis.strip()))
            lengths.append(0)
    return ErrorRate(np.array(edits), np.array(lengths))


def english_normalizer(tokenizer: object | None = None) -> Callable[[str], str]:
    """Whisper's English text normalizer: case, punctuation, numbers, contractions, fillers.

    Example:
        >>> english_normalizer()("Mr. Dashwood won't pay twenty-five pounds!")
        'mister dashwood will not pay £25'

    Args:
        tokenizer: a Whisper tokenizer or processor; with it British spellings become American ones, as published
            Whisper scores have it. None leaves spelling alone.

    Returns:
        A function from text to text.

    Source: Radford et al., Robust Speech Recognition via Large-Scale Weak Supervision, 2022, appendix C.
    """
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    return EnglishTextNormalizer(getattr(tokenizer, "english_spelling_normalizer", None) or {})
