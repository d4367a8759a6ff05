r"""Retrieval between texts and media: the rank of the right one, both ways, with and without dual softmax.

A query's **rank** is 1 for the right candidate on top. Everything that papers report follows from the ranks: R@K is
the share of queries with a rank of at most K. A wrong candidate that scores as much as the right one stands before it,
so a model that says the same of everything gets the worst ranks, not the best.

Where a clip has several texts, it is found by the best of them, and the others don't stand in its way, as in image
retrieval on COCO and Flickr30k. Some video papers (MSVD in CLIP4Clip) take the best text of *every* clip and rank
clips instead: give them the similarities of those texts alone, one row a clip.

**Dual softmax** weights the score s of query q and candidate c by how much c prefers q to other queries,

.. math::
    s'_{qc} = s_{qc} \cdot \frac{\exp(\lambda s_{qc})}{\sum_{q'} \exp(\lambda s_{q'c})}

It needs all queries of the test set at once and gains from there being one right query for each candidate. No query
that comes alone can be answered that way, so its numbers stand in a row of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.special import logsumexp

from .errors import MetricError

__all__ = ["RetrievalRanks", "dual_softmax_ranks", "retrieval_ranks"]

_BLOCK = 2**22  # similarities looked at at once: 32 MiB in float64


@dataclass(frozen=True, eq=False)
class RetrievalRanks:
    """What `retrieval_ranks` and `dual_softmax_ranks` return.

    Example:
        >>> ranks = retrieval_ranks([[0.9, 0.1], [0.8, 0.3]])
        >>> ranks.table()[["direction", "R@1", "R@5", "median_rank", "mean_rank", "mean_reciprocal_rank"]]
               direction  R@1  R@5  median_rank  mean_rank  mean_reciprocal_rank
        0  text to media  0.5  1.0          1.5        1.5                  0.75
        1  media to text  1.0  1.0          1.0        1.0                  1.00

    Attributes:
        text_to_media: int (N,), of each text: the rank of its clip among all M.
        media_to_text: int (M,), of each clip: the rank of the best of its texts among all N, leaving out its others.
        dual_softmax: whether scores were weighted by all queries of the test set.
    """

    text_to_media: np.ndarray
    media_to_text: np.ndarray
    dual_softmax: bool = False

    def table(self, ks: Sequence[int] = (1, 5, 10)) -> pd.DataFrame:
        """What papers report of the ranks.

        Example:
            >>> list(retrieval_ranks([[1.0]]).table(ks=(1, 50)).columns)[:5]
            ['direction', 'dual_softmax', 'n_queries', 'R@1', 'R@50']

        Args:
            ks: the K of R@K.

        Returns:
            One row a direction: ``direction``, ``dual_softmax``, ``n_queries``, ``R@K`` (shares, 0 to 1),
            ``median_rank``, ``mean_rank`` and ``mean_reciprocal_rank``. But for the median, all are means over
            queries of ``ranks <= K``, ``ranks`` and ``1 / ranks``, which are what paired tests take.

        Raises:
            MetricError: a K below 1.
        """
        if not all(k >= 1 for k in ks):
            raise MetricError(f"R@K for K of {list(ks)}; ranks begin with 1, so give every K as 1 or more.")
        rows = []
        for direction, ranks in (("text to media", self.text_to_media), ("media to text", self.media_to_text)):
            rows.append(
                {
                    "direction": direction,
                    "dual_softmax": self.dual_softmax,
                    "n_queries": len(ranks),
                    **{f"R@{k}": float((ranks <= k).mean()) for k in ks},
                    "median_rank": float(np.median(ranks)),
                    "mean_rank": float(ranks.mean()),
                    "mean_reciprocal_rank": float((1 / ranks).mean()),
                }
            )
        return pd.DataFrame(rows)


def retrieval_ranks(similarities: Any, media: Sequence[int] | None = None) -> RetrievalRanks:
    """Rank of the right one, from texts to media and back.

    Example:
        >>> similarities = [[0.9, 0.2], [0.6, 0.7], [0.1, 0.8]]  # three texts, two clips
        >>> ranks = retrieval_ranks(similarities, media=[0, 0, 1])
        >>> ranks.text_to_media, ranks.media_to_text
        (array([1, 2, 1]), array([1, 1]))

    Args:
        similarities: float (N, M), array or tensor: of N texts with M clips; higher is closer. Looked at a few rows
            at a time, so it may be memory-mapped.
        media: int (N,), the clip that each text belongs to. None where text i belongs to clip i.

    Returns:
        A `RetrievalRanks`.

    Raises:
        MetricError: similarities that are not a matrix or hold NaN, texts of no clip, or clips without a text.

    Source: best of several texts: Karpathy and Fei-Fei, Deep Visual-Semantic Alignments, 2015 (arXiv 1412.2306).
    """
    similarities, media = _checked(similarities, media)
    for rows in _blocks(similarities.shape):
        if np.isnan(similarities[rows]).any():
            text, clip = np.argwhere(np.isnan(similarities[rows]))[0]
            raise MetricError(
                f"The similarity of text {rows.start + text} and clip {clip} is NaN; expected a number. A vector of "
                "zeros that was divided by its length is a common cause."
            )
    return RetrievalRanks(*_ranks(similarities.__getitem__, similarities.__getitem__, media, similarities.shape))


def dual_softmax_ranks(
    similarities: Any, media: Sequence[int] | None = None, *, scale: float = 100.0
) -> RetrievalRanks:
    """The same after dual softmax, which uses all queries of the test set at once: report it beside, not instead.

    Example:
        >>> similarities = [[0.9, 0.3], [0.8, 0.7]]  # the second text is near both clips
        >>> retrieval_ranks(similarities).text_to_media, dual_softmax_ranks(similarities).text_to_media
        (array([1, 2]), array([1, 1]))

    Args:
        similarities: float (N, M), all finite; see `retrieval_ranks`.
        media: int (N,); see `retrieval_ranks`.
        scale: λ, what similarities are multiplied by before the softmax. 100 is what CLIP multiplies its cosines by;
            give 1 for logits, which are multiplied already.

    Returns:
        A `RetrievalRanks` with `dual_softmax` set. Queries of either direction are weighted by the others of theirs.

    Raises:
        MetricError: as `retrieval_ranks`, similarities that are not finite, or a scale that is not positive.

    Source: Cheng et al., Improving Video-Text Retrieval by Multi-Stream Corpus Alignment and Dual Softmax Loss, 2021
        (arXiv 2109.04290), which multiplies by the softmax at inference too.
    """
    similarities, media = _checked(similarities, media)
    if not (np.isfinite(scale) and scale > 0):
        raise MetricError(f"A scale of {scale}; expected a positive number, such as 100 for cosines and 1 for logits.")
    n_texts, n_media = similarities.shape
    # A softmax over texts needs one number a clip, one over clips one number a text: no second matrix is kept.
    over_texts, over_media = np.full(n_media, -np.inf), np.empty(n_texts)
    for rows in _blocks(similarities.shape):
        logits = scale * similarities[rows].astype(np.float64)
        if not np.isfinite(logits).all():
            text, clip = np.argwhere(~np.isfinite(logits))[0]
            raise MetricError(
                f"The similarity of text {rows.start + text} and clip {clip} is {similarities[rows][text, clip]}; "
                "dual softmax needs a finite one for every text and clip."
            )
        over_media[rows] = logsumexp(logits, axis=1)
        over_texts = np.logaddexp(over_texts, logsumexp(logits, axis=0))

    def weighted(rows: slice, log_sum: np.ndarray) -> np.ndarray:
        block = similarities[rows].astype(np.float64)
        return block * np.exp(scale * block - log_sum)

    ranks = _ranks(
        lambda rows: weighted(rows, over_texts),
        lambda rows: weighted(rows, over_media[rows, None]),
        media,
        similarities.shape,
    )
    return RetrievalRanks(*ranks, dual_softmax=True)


def _ranks(
    score_texts: Callable[[slice], np.ndarray],
    score_media: Callable[[slice], np.ndarray],
    media: np.ndarray,
    shape: tuple[int, int],
) -> tuple[np.ndarray, np.ndarray]:
    """Ranks by the scores of a slice of texts with all clips: for queries that are texts, and for those that are clips.

    Counting what stands before the right one needs no sorted copy of the matrix.
    """
    text_to_media, media_to_text = np.empty(shape[0], np.int64), np.ones(shape[1], np.int64)
    best = np.full(shape[1], -np.inf)
    for rows in _blocks(shape):
        scores, own = score_texts(rows), media[rows, None]
        # The right one counts itself, which makes ranks begin with 1.
        text_to_media[rows] = (scores >= np.take_along_axis(scores, own, 1)).sum(1)
        np.maximum.at(best, own[:, 0], np.take_along_axis(score_media(rows), own, 1)[:, 0])
    for rows in _blocks(shape):
        before = score_media(rows) >= best
        np.put_along_axis(before, media[rows, None], False, 1)
        media_to_text += before.sum(0)
    return text_to_media, media_to_text


def _blocks(shape: tuple[int, int]) -> Iterator[slice]:
    step = max(1, _BLOCK // shape[1])
    for start in range(0, shape[0], step):
        yield slice(start, start + step)


def _checked(similarities: Any, media: Sequence[int] | None) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(similarities, torch.Tensor):  # NumPy has no bfloat16
        similarities = similarities.detach().cpu()
        similarities = (similarities.float() if similarities.dtype == torch.bfloat16 else similarities).numpy()
    similarities = np.asarray(similarities)
    if similarities.ndim != 2 or not similarities.size or similarities.dtype.kind not in "fiu":
        raise MetricError(
            f"Similarities of shape {similarities.shape} and type {similarities.dtype}; expected numbers of shape "
            "(N, M), a row for each text and a column for each clip."
        )
    n_texts, n_media = similarities.shape
    if media is None:
        if n_texts != n_media:
            raise MetricError(
                f"{n_texts} texts and {n_media} clips, and nothing says which text belongs to which clip; give "
                "`media`, the clip of each text, or as many texts as clips in the same order."
            )
        return similarities, np.arange(n_texts)
    owners = np.asarray(media)
    if owners.shape != (n_texts,) or owners.dtype.kind not in "iu":
        raise MetricError(
            f"`media` of shape {owners.shape} and type {owners.dtype} for {n_texts} texts; expected the index of a "
            "clip, an int, for each text."
        )
    if owners.min() < 0 or owners.max() >= n_media:
        text = int(np.argmax((owners < 0) | (owners >= n_media)))
        raise MetricError(f"Text {text} belongs to clip {owners[text]}; the {n_media} columns are 0 to {n_media - 1}.")
    alone = np.setdiff1d(np.arange(n_media), owners)
    if alone.size:
        raise MetricError(
            f"{alone.size} of {n_media} clips have no text, such as clip {alone[0]}, so no text is right for them; "
            "leave their columns out."
        )
    return similarities, owners.astype(np.int64)
