"""How good answers are: multiple choice, and open questions after the usual normalization, by type of question."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import MetricError

__all__ = ["Accuracy", "answer_accuracy", "choice_accuracy", "normalize_answer"]


@dataclass(frozen=True, eq=False)
class Accuracy:
    """What `choice_accuracy` and `answer_accuracy` return.

    Attributes:
        correct: bool (N,), whether each question was answered right; what paired tests take.
        types: (N,), the type of each question, or None.
    """

    correct: np.ndarray
    types: np.ndarray | None = None

    @property
    def accuracy(self) -> float:
        """Share of all questions answered right: the mean over questions, not over types."""
        return float(self.correct.mean())

    @property
    def by_type(self) -> dict[str, float]:
        """Share of the questions of each type, in the order of their names; empty where no types were given."""
        if self.types is None:
            return {}
        return {str(name): float(self.correct[self.types == name].mean()) for name in np.unique(self.types)}


def choice_accuracy(
    answers: Sequence[int], choices: Sequence[int] | Sequence[Sequence[float]], types: Sequence[str] | None = None
) -> Accuracy:
    """Accuracy of multiple choice, from the options picked or from a score for every option.

    Example:
        >>> choice_accuracy([0, 2], [[-1.2, -3.4], [-0.7, -0.9, -0.3]]).accuracy  # log-likelihoods of the options
        1.0
        >>> choice_accuracy([0, 2, 1], [0, 1, -1], types=["what", "when", "what"]).by_type
        {'what': 0.5, 'when': 0.0}

    Args:
        answers: int (N,), the right option of each question.
        choices: int (N,), the option picked, -1 where a model named none; or for each question a row of scores, one an
            option, of which the highest is picked. Questions may differ in their number of options. Where another
            option scores as much as the right one, the answer counts as wrong.
        types: the type of each question, for `Accuracy.by_type`.

    Returns:
        An `Accuracy`.

    Raises:
        MetricError: lengths that differ, no questions, scores that are NaN, or a right option that is not among them.
    """
    _check_lengths(len(answers), len(choices), types, "choices")
    correct = []
    for index, (answer, choice) in enumerate(zip(answers, choices, strict=True)):
        if int(answer) != answer or answer < 0:
            raise MetricError(f"The right option of question {index} is {answer}; expected its index, 0 or more.")
        if np.ndim(choice) == 0:
            if int(choice) != choice or choice < -1:
                raise MetricError(f"The option picked in question {index} is {choice}; expected its index, or -1.")
            correct.append(choice == answer)
            continue
        scores = np.asarray(choice, float)
        if scores.ndim != 1 or answer >= len(scores) or np.isnan(scores).any():
            raise MetricError(
                f"Question {index} has the scores {np.array2string(scores, threshold=8)} and {answer} as its right "
                "option; expected a number for every option, the right one among them."
            )
        correct.append((scores >= scores[int(answer)]).sum() == 1)
    return Accuracy(np.array(correct, bool), None if types is None else np.asarray(types))


def answer_accuracy(
    answers: Sequence[str | Sequence[str]],
    predictions: Sequence[str],
    types: Sequence[str] | None = None,
    normalize: Callable[[str], str] | None = None,
) -> Accuracy:
    """Exact match of open answers, both normalized first.

    Example:
        >>> result = answer_accuracy(["two dogs", ["tv", "television"]], ["The 2 dogs.", "TV"], types=["count", "what"])
        >>> result.accuracy, result.by_type
        (1.0, {'count': 1.0, 'what': 1.0})

    Args:
        answers: the right answer of each question, or several of which any is right.
        predictions: what was answered; an empty one is wrong.
        types: the type of each question, for `Accuracy.by_type`.
        normalize: applied to both; None for `normalize_answer`.

    Returns:
        An `Accuracy`. Video data sets (MSRVTT-QA, MSVD-QA, ActivityNet-QA) have one answer a question, and this is
        what they report. It is not the soft score of image VQA, where ten people answered and three make it right.

    Raises:
        MetricError: lengths that differ, no questions, or a question without a right answer.
    """
    _check_lengths(len(answers), len(predictions), types, "predictions")
    normalize = normalize or normalize_answer
    correct = []
    for index, (answer, prediction) in enumerate(zip(answers, predictions, strict=True)):
        right = {normalize(a) for a in ([answer] if isinstance(answer, str) else answer)}
        if not right or "" in right:
            raise MetricError(
                f"Question {index} has the right answers {answer!r}; expected at least one, and no empty."
            )
        correct.append(normalize(prediction) in right)
    return Accuracy(np.array(correct, bool), None if types is None else np.asarray(types))


# The marks that the reference takes out; apostrophes and colons stay, as in "girl's" and "2:50".
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_DIGITS = {
    "none": "0",
    **{word: str(n) for n, word in enumerate("zero one two three four five six seven eight nine ten".split())},
}
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()
# Each as it looks with one of its apostrophes forgotten. "Shed", "well" and the like are words, so they are not here.
_FORGOTTEN = {
    word[:place] + word[place + 1 :]: word for word in _CONTRACTIONS for place, mark in enumerate(word) if mark == "'"
}


def normalize_answer(text: str) -> str:
    """An answer as visual question answering compares it.

    Lowercase; no articles; number words up to ten as digits; no periods but decimal points; forgotten apostrophes of
    contractions put back; other punctuation taken out or made a space, but for apostrophes and colons.

    Example:
        >>> normalize_answer("The two Dogs, I think."), normalize_answer("1,000"), normalize_answer("dont know")
        ('2 dogs i think', '1000', "don't know")

    Args:
        text: an answer.

    Returns:
        The answer normalized. One that has nothing else, such as "a", keeps what it has, so that it can be right.

    Source: Antol et al., VQA: Visual Question Answering, 2015, and the rules on visualqa.org/evaluation.html, as its
        evaluation code has them, which applies them only where annotators differ; here they always apply.
    """
    text = " ".join(text.split())
    joined = re.search(r"\d,\d", text)
    marked = text
    for mark in _MARKS:
        # A mark beside a space, or in a number such as 1,000, leaves nothing behind; one between words leaves a space.
        alone = joined or f"{mark} " in text or f" {mark}" in text
        marked = marked.replace(mark, "" if alone else " ")
    words = [_DIGITS.get(word, word) for word in re.sub(r"\.(?!\d)", "", marked).lower().split()]
    kept = [_FORGOTTEN.get(word, word) for word in words if word not in ("a", "an", "the")]
    return " ".join(kept) or text.lower()


def _check_lengths(n_answers: int, n_given: int, types: Any, given: str) -> None:
    if n_answers != n_given or not n_answers or (types is not None and len(types) != n_answers):
        n_types = "" if types is None else f" and {len(types)} types"
        raise MetricError(
            f"{n_answers} answers, {n_given} {given}{n_types}; expected one of each for every question, and at least "
            "one question."
        )
