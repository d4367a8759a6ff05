from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmqlora import MMQLoRAError
from mmqlora.metrics import character_error_rate, english_normalizer, word_error_rate


def levenshtein(a: list[str], b: list[str]) -> int:
    """The textbook recurrence, as a reference."""
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    table[:, 0], table[0, :] = range(len(a) + 1), range(len(b) + 1)
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (a[i - 1] != b[j - 1]))
    return int(table[-1, -1])


words = st.lists(st.sampled_from(["a", "b", "cat", "dog"]), max_size=8)


@given(st.lists(st.tuples(words, words), min_size=1, max_size=4))
def test_word_errors_are_the_edit_distance_of_words(pairs):
    rate = word_error_rate([" ".join(r) for r, _ in pairs], [" ".join(h) for _, h in pairs])
    assert list(rate.edits) == [levenshtein(r, h) for r, h in pairs]
    assert list(rate.lengths) == [len(r) for r, _ in pairs]
    assert rate.rate == pytest.approx(sum(rate.edits) / max(1, sum(rate.lengths)))


@given(st.text("ab c", max_size=8), st.text("ab c", max_size=8))
def test_character_errors_are_the_edit_distance_of_characters(reference, hypothesis):
    reference, hypothesis = " ".join(reference.split()), " ".join(hypothesis.split())
    assert character_error_rate([reference], [hypothesis]).edits[0] == levenshtein(list(reference), list(hypothesis))


def test_whispers_normalizer_makes_equal_what_is_said_alike():
    normalize = english_normalizer()
    assert (
        word_error_rate(["Mr. Brown won't pay £25!"], ["mister brown will not pay twenty-five pounds"], normalize).rate
        == 0
    )


def test_spelling_is_normalized_where_the_tokenizer_knows_how(real):
    from transformers import AutoProcessor

    normalize = english_normalizer(AutoProcessor.from_pretrained(real / "models" / "whisper-tiny.en"))
    assert normalize("The colour of the theatre") == normalize("the color of the theater")


@pytest.mark.parametrize("references, hypotheses", [([], []), (["a"], []), (["a"], ["a", "b"])])
def test_sets_that_do_not_match_are_refused(references, hypotheses):
    with pytest.raises(MMQLoRAError, match="one hypothesis for each"):
        word_error_rate(references, hypotheses)
