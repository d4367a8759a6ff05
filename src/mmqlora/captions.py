r"""How good captions are: BLEU, ROUGE-L and CIDEr-D as the COCO caption evaluation computes them.

Published captioning numbers come from the COCO caption evaluation (``pycocoevalcap``), so these are its definitions, to
the last digit, and its tokens. It is not used itself: its tokenizer and METEOR need Java, SPICE downloads its models
when it is first asked, and the package is 100 MB for the 100 lines below. Other libraries compute something else under
the same names (sacrebleu: tokens and smoothing of translation; rouge-score: an F1 for one reference) or bring models
along (aac-metrics).

**CIDEr-D** compares n-grams weighted by how few items of the test set have them in their references. With the counts
h of a hypothesis and r of a reference, weighted by \ :math:`\log N - \log \mathrm{df}`\ ,

.. math::
    \frac{10}{4} \sum_{n=1}^{4} \frac{1}{|R|} \sum_{r \in R}
    \frac{\sum \min(h_n, r_n)\, r_n}{\lVert h_n \rVert \lVert r_n \rVert}\; e^{-(l_h - l_r)^2 / 72}

Its value depends on the whole test set, so score all items of a set together, however they were generated.

Source: Chen et al., Microsoft COCO Captions: Data Collection and Evaluation Server, 2015 (arXiv 1504.00325); Vedantam
et al., CIDEr, 2015 (arXiv 1411.5726); Papineni et al., BLEU, 2002; Lin, ROUGE, 2004.
"""

from __future__ import annotations

import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from rapidfuzz.distance import LCSseq

from .errors import MetricError

__all__ = ["CaptionScores", "caption_scores", "caption_tokens"]

_N = 4  # the longest n-grams
_SIGMA = 6.0  # words; the width of CIDEr-D's penalty of lengths
_BETA = 1.2  # ROUGE-L's weight of recall


@dataclass(frozen=True, eq=False)
class CaptionScores:
    """What `caption_scores` returns.

    Attributes:
        values: of the whole set, by name: ``bleu_1`` to ``bleu_4`` (0 to 1), ``rouge_l`` (0 to 1), ``cider_d`` (0 to
            10) and, if asked for and able to run, ``meteor`` (0 to 1). Papers print them times 100.
        items: float (N,) of each item, by the same names. ``rouge_l`` and ``cider_d`` of the set are their means.
            ``bleu_*`` and ``meteor`` of the set are not: these add up the counts of all items first.
        absent: name to reason, of the scores of the field that are not here.
    """

    values: dict[str, float]
    items: dict[str, np.ndarray]
    absent: dict[str, str]


def caption_tokens(text: str) -> list[str]:
    """Words of a caption, as the COCO caption evaluation splits them: Penn Treebank, lowercase, no punctuation.

    Example:
        >>> caption_tokens("A dog's bark can't be heard (it's far away).")
        ['a', 'dog', "'s", 'bark', 'ca', "n't", 'be', 'heard', '-lrb-', 'it', "'s", 'far', 'away', '-rrb-']

    Args:
        text: a caption in English.

    Returns:
        Its tokens. They equal those of Stanford's PTBTokenizer 3.4.1, which needs Java, on 19,690 captions of
        Clotho and on the captions of the tests. Addresses of the web, smileys, "½" and "y'all" may differ.
        Brackets stay, as "-lrb-": the reference means to drop them and doesn't.
    """
    text = _CLITIC.sub(r" \1", text.lower().translate(_PLAIN))
    text = _JOINED.sub(lambda match: " ".join(filter(None, match.groups())), text)
    return [_BRACKETS.get(token, token) for token in _TOKEN.findall(text) if token not in _DROPPED]


_PLAIN = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": ".", "£": "#", "€": "$"})
_DROPPED = set("'\"`.?!,:-;")
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_CLITIC = re.compile(r"(?<=[^\W_])(n't|'(?:s|m|d|re|ve|ll))(?![^\W_])")
_JOINED = re.compile(r"\b(can)(not)\b|\b(gon|wan)(na)\b|\b(got)(ta)\b|\b(gim|lem)(me)\b|('t)(is|was)\b")
_ABBREVIATIONS = (
    "mr mrs ms dr st jr sr vs etc prof gen capt lt sgt col rev gov sen rep inc co ltd corp ave blvd rd "
    "jan feb mar apr jun jul aug sept sep oct nov dec"
)
_TOKEN = re.compile(
    rf"\b(?:{_ABBREVIATIONS.replace(' ', '|')})\.|\bno\.(?=\s*\d)"
    r"|\b(?:[a-z]\.)+(?![^\W_])"  # initials: "u.s.", "p.m."
    r"|n't|'(?:s|m|d|re|ve|ll|t)(?![^\W_])|'\d\ds\b"
    r"|(?:\.(?=\d))?[^\W_]+(?:[-_.:/][^\W_]+|,(?=\d)[^\W_]+|'[^\W\d_]+)*"  # "t-shirt", "10:30", "1,000", "o'clock"
    r"|[?!]{2,}|[^\w\s]"  # "?!" is one token that the reference does not drop
)


def caption_scores(
    references: Sequence[Sequence[str]],
    hypotheses: Sequence[str],
    tokenize: Callable[[str], list[str]] = caption_tokens,
    *,
    meteor: bool = False,
) -> CaptionScores:
    """Scores of captions against one or more references each, of a set and by item.

    Example:
        >>> references = [["a dog barks", "a dog is barking"], ["rain falls on a roof"]]
        >>> scores = caption_scores(references, ["a dog barks", "rain falls"])
        >>> {name: round(scores.values[name], 3) for name in ("bleu_1", "bleu_2", "rouge_l", "cider_d")}
        {'bleu_1': 0.549, 'bleu_2': 0.549, 'rouge_l': 0.765, 'cider_d': 3.71}
        >>> scores.items["rouge_l"].round(3)
        array([1.  , 0.53])
        >>> scores.absent["fense"]
        'needs two models that its package downloads; mmqlora downloads nothing to score'

    Args:
        references: what people wrote, one or more captions an item.
        hypotheses: the caption to judge, one an item. An empty one scores 0.
        tokenize: caption to tokens. Scores compare with published ones only by the default's.
        meteor: METEOR too, where pycocoevalcap is installed and Java is on the path. It takes Java seconds and 1 GB
            to read its table of paraphrases.

    Returns:
        A `CaptionScores`. METEOR is there where it was asked for and can run; SPICE, SPIDEr and FENSE never are.
        `CaptionScores.absent` says why.

    Raises:
        MetricError: the two differ in length or are empty, or an item has no references or one without words.
    """
    if len(references) != len(hypotheses) or not len(references):
        raise MetricError(
            f"{len(references)} items have references and {len(hypotheses)} have hypotheses; expected one hypothesis "
            "for each item, and at least one."
        )
    spoken = [tokenize(hypothesis) for hypothesis in hypotheses]
    written = []
    for index, captions in enumerate(references):
        if isinstance(captions, str):
            raise MetricError(f"The references of item {index} are the string {captions!r}; expected a list of them.")
        written.append([tokenize(caption) for caption in captions])
        if not all(written[-1]) or not written[-1]:
            raise MetricError(f"Item {index} has the references {list(captions)!r}; expected one or more, with words.")

    counts = [_ngrams(tokens) for tokens in spoken]
    reference_counts = [[_ngrams(tokens) for tokens in captions] for captions in written]
    absent = {
        "spice": "needs Java and models that its package downloads; mmqlora downloads nothing to score",
        "spider": "is the mean of SPICE, which is absent, and CIDEr-D",
        "fense": "needs two models that its package downloads; mmqlora downloads nothing to score",
    }
    values, items = _bleu(spoken, written, counts, reference_counts)
    items["rouge_l"] = np.array([_rouge_l(*pair) for pair in zip(spoken, written, strict=True)])
    values["rouge_l"] = float(items["rouge_l"].mean())
    if len(spoken) > 1:
        items["cider_d"] = np.array(list(_cider_d(counts, reference_counts)))
        values["cider_d"] = float(items["cider_d"].mean())
    else:
        absent["cider_d"] = "weights n-grams by the other items of the test set, and there is only one item"
    if meteor:
        try:
            values["meteor"], items["meteor"] = _meteor(spoken, written)
        except _Absent as reason:
            absent["meteor"] = str(reason)
    else:
        absent["meteor"] = "was not asked for; meteor=True runs it with pycocoevalcap and Java"
    return CaptionScores(values, items, absent)


def _ngrams(tokens: list[str]) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + n]) for n in range(1, _N + 1) for i in range(len(tokens) - n + 1))


def _bleu(spoken, written, counts, reference_counts) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    found, possible, lengths, closest = [], [], [], []
    for tokens, captions, has, may in zip(spoken, written, counts, reference_counts, strict=True):
        most: Counter[tuple[str, ...]] = Counter()
        for reference in may:
            most |= reference  # of each n-gram, the most that any one reference has
        found.append([0] * _N)
        for ngram, count in (has & most).items():
            found[-1][len(ngram) - 1] += count
        possible.append([max(0, len(tokens) - n) for n in range(_N)])
        lengths.append(len(tokens))
        closest.append(min((abs(len(c) - len(tokens)), len(c)) for c in captions)[1])
    found, possible, lengths, closest = map(np.array, (found, possible, lengths, closest))
    of_items = _bleu_of_counts(found, possible, lengths, closest)
    of_set = _bleu_of_counts(found.sum(0), possible.sum(0), lengths.sum(), closest.sum())
    names = [f"bleu_{n}" for n in range(1, _N + 1)]
    return dict(zip(names, of_set.tolist(), strict=True)), dict(zip(names, of_items.T, strict=True))


def _bleu_of_counts(found, possible, length, reference_length) -> np.ndarray:
    # The reference's guards against dividing by 0. They are seen: without a match, 1e-15 ** (1 / 4) is 2e-4.
    precisions = (found + 1e-15) / (possible + 1e-9)
    means = np.cumprod(precisions, -1) ** (1 / np.arange(1, _N + 1))
    ratio = (length + 1e-15) / (reference_length + 1e-9)
    return means * np.exp(np.minimum(0, 1 - 1 / ratio))[..., None]


def _rouge_l(tokens: list[str], captions: list[list[str]]) -> float:
    if not tokens:
        return 0.0
    common = [LCSseq.similarity(tokens, caption) for caption in captions]
    # The best precision and the best recall, though they may be of different references.
    precision = max(common) / len(tokens)
    recall = max(c / len(caption) for c, caption in zip(common, captions, strict=True))
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision) if recall else 0.0


def _cider_d(counts, reference_counts) -> Iterator[float]:
    log_n = math.log(len(counts))
    items_with = Counter(ngram for captions in reference_counts for ngram in set().union(*captions))

    def weigh(ngrams: Counter) -> tuple[dict, np.ndarray, int]:
        weights = {ngram: count * (log_n - math.log(max(1, items_with[ngram]))) for ngram, count in ngrams.items()}
        squares = np.zeros(_N)
        for ngram, weight in weights.items():
            squares[len(ngram) - 1] += weight**2
        # The reference takes the number of bigrams as the length: one less, but for captions without a word.
        return weights, np.sqrt(squares), sum(count for ngram, count in ngrams.items() if len(ngram) == 2)

    for ngrams, captions in zip(counts, reference_counts, strict=True):
        weights, norm, length = weigh(ngrams)
        similarity = np.zeros(_N)
        for caption in captions:
            other, other_norm, other_length = weigh(caption)
            products = np.zeros(_N)
            for ngram in weights.keys() & other.keys():
                products[len(ngram) - 1] += min(weights[ngram], other[ngram]) * other[ngram]
            norms = norm * other_norm
            cosine = np.divide(products, norms, out=np.zeros(_N), where=norms > 0)
            similarity += cosine * math.exp(-((length - other_length) ** 2) / (2 * _SIGMA**2))
        yield 10 * float(similarity.mean()) / len(captions)


class _Absent(Exception):
    """Why a score is not there."""


def _meteor(spoken: list[list[str]], written: list[list[list[str]]]) -> tuple[float, np.ndarray]:
    try:
        from pycocoevalcap.meteor.meteor import Meteor
    except ImportError:
        raise _Absent("needs the package pycocoevalcap, which is not installed, and Java") from None
    if shutil.which("java") is None:
        raise _Absent("needs Java, which is not on the path")
    references = {i: [" ".join(c) for c in captions] for i, captions in enumerate(written)}
    try:
        value, of_items = Meteor().compute_score(references, {i: [" ".join(tokens)] for i, tokens in enumerate(spoken)})
    except (OSError, ValueError) as error:  # what is left when its Java process ends early
        raise _Absent(f"Java could not run it: {error}") from error
    return float(value), np.array(of_items)
