from __future__ import annotations

import math
import shutil

import numpy as np
import pytest
import torch
from caption_examples import EXAMPLES, ITEMS, VALUES
from hypothesis import given
from hypothesis import strategies as st

import mmqlora.retrieval
from mmqlora import MetricError, MMQLoRAError
from mmqlora.answers import answer_accuracy, choice_accuracy, normalize_answer
from mmqlora.captions import caption_scores, caption_tokens
from mmqlora.metrics import character_error_rate, english_normalizer, word_error_rate
from mmqlora.retrieval import dual_softmax_ranks, retrieval_ranks


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


# Captions

HYPOTHESES, REFERENCES = [example[0] for example in EXAMPLES], [list(example[1:]) for example in EXAMPLES]
SCORES = [name for name in VALUES if name != "meteor"]


@pytest.mark.parametrize("name", SCORES)
def test_captions_score_as_in_the_coco_evaluation(name):
    scores = caption_scores(REFERENCES, HYPOTHESES)
    assert scores.values[name] == pytest.approx(VALUES[name], abs=1e-8)
    assert scores.items[name] == pytest.approx(ITEMS[name], abs=1e-8)


def test_captions_score_as_published_by_aac_metrics():
    # The example in the README of aac-metrics 0.6.0, with the digits that it prints.
    references = [
        ["a man speaks.", "someone speaks.", "a man is speaking while a bird is chirping in the background"],
        ["rain is falling hard on a surface"],
    ]
    scores = caption_scores(references, ["a man is speaking", "rain falls"])
    assert scores.values["bleu_1"] == pytest.approx(0.4278, abs=5e-5)
    assert scores.values["cider_d"] == pytest.approx(0.9614, abs=5e-5)
    assert scores.items["cider_d"] == pytest.approx([1.3641, 0.5587], abs=5e-5)


def test_meteor_is_that_of_the_coco_evaluation_where_it_can_run():
    pytest.importorskip("pycocoevalcap.meteor.meteor")
    if not shutil.which("java"):
        pytest.skip("no Java")
    scores = caption_scores(REFERENCES, HYPOTHESES, meteor=True)
    assert scores.values["meteor"] == pytest.approx(VALUES["meteor"], abs=1e-8)
    assert scores.items["meteor"] == pytest.approx(ITEMS["meteor"], abs=1e-8)


def test_scores_that_are_not_there_are_named_with_a_reason():
    scores = caption_scores(REFERENCES[:1], HYPOTHESES[:1])
    assert "only one item" in scores.absent["cider_d"]
    assert scores.absent.keys() >= {"spice", "spider", "fense"}
    assert not scores.absent.keys() & scores.values.keys()
    assert scores.absent.keys() | scores.values.keys() == {*VALUES, "spice", "spider", "fense"}
    assert scores.values.keys() == scores.items.keys()


def test_meteor_that_cannot_run_is_named_with_a_reason(monkeypatch):
    monkeypatch.setenv("PATH", "")  # where no Java is
    scores = caption_scores(REFERENCES, HYPOTHESES, meteor=True)
    assert "Java" in scores.absent["meteor"]
    assert "was not asked for" in caption_scores(REFERENCES, HYPOTHESES).absent["meteor"]
    assert scores.values["cider_d"] == pytest.approx(VALUES["cider_d"])


def test_identical_captions_reach_the_top():
    texts = ["a dog barks at a small cat", "heavy rain falls on the roof", "two men talk in an office"]
    scores = caption_scores([[text] for text in texts], texts)
    assert [scores.values[f"bleu_{n}"] for n in range(1, 5)] == pytest.approx([1] * 4)
    assert scores.values["rouge_l"] == pytest.approx(1)
    assert scores.values["cider_d"] == pytest.approx(10)


def test_bleu_and_rouge_by_hand():
    scores = caption_scores([["the cat is on the mat"]], ["the the cat sat"], str.split)
    assert scores.values["bleu_1"] == pytest.approx(3 / 4 * math.exp(1 - 6 / 4))
    assert scores.values["bleu_2"] == pytest.approx(math.sqrt(3 / 4 * 1 / 3) * math.exp(1 - 6 / 4))
    precision, recall = 2 / 4, 2 / 6
    assert scores.values["rouge_l"] == pytest.approx(2.44 * precision * recall / (recall + 1.44 * precision))


def test_cider_by_hand():
    # "a" is in both items, so it weighs nothing; "b" is half of the one-word n-grams of weight, the rest is log 2.
    scores = caption_scores([["a b c"], ["a d"]], ["a b", "a d"], str.split)
    unigrams, bigrams = 1 / math.sqrt(2), 1 / math.sqrt(2)
    assert scores.items["cider_d"][0] == pytest.approx(10 / 4 * (unigrams + bigrams) * math.exp(-1 / 72))
    assert scores.items["cider_d"][1] == pytest.approx(10 / 4 * 2)


captions = st.lists(st.sampled_from(["a", "b", "cat", "dog", "runs"]), min_size=1, max_size=7).map(" ".join)
items = st.lists(st.tuples(captions, st.lists(captions, min_size=1, max_size=3)), min_size=2, max_size=5)


@given(items, st.randoms(use_true_random=False))
def test_scores_do_not_depend_on_the_order_of_items_or_references(pairs, random):
    before = caption_scores([refs for _, refs in pairs], [hyp for hyp, _ in pairs])
    order = random.sample(range(len(pairs)), len(pairs))
    shuffled = [(pairs[i][0], random.sample(pairs[i][1], len(pairs[i][1]))) for i in order]
    after = caption_scores([refs for _, refs in shuffled], [hyp for hyp, _ in shuffled])
    for name in SCORES:
        assert after.values[name] == pytest.approx(before.values[name], abs=1e-12)
        assert after.items[name] == pytest.approx(before.items[name][order], abs=1e-12)


@given(items)
def test_a_reference_given_twice_changes_nothing_where_the_best_counts(pairs):
    before = caption_scores([refs for _, refs in pairs], [hyp for hyp, _ in pairs])
    twice = caption_scores([[*refs, refs[0]] for _, refs in pairs], [hyp for hyp, _ in pairs])
    for name in ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l"):
        assert twice.items[name] == pytest.approx(before.items[name], abs=1e-12)
    # CIDEr-D is a mean over references, so all of them have to come twice.
    all_twice = caption_scores([refs * 2 for _, refs in pairs], [hyp for hyp, _ in pairs])
    assert all_twice.items["cider_d"] == pytest.approx(before.items["cider_d"], abs=1e-12)


def test_corpus_values_are_means_of_items_only_where_said():
    scores = caption_scores(REFERENCES, HYPOTHESES)
    assert scores.values["cider_d"] == pytest.approx(scores.items["cider_d"].mean())
    assert scores.values["rouge_l"] == pytest.approx(scores.items["rouge_l"].mean())
    assert abs(scores.values["bleu_4"] - scores.items["bleu_4"].mean()) > 0.01


# As PTBTokenizer of pycocoevalcap 1.2 has them.
@pytest.mark.parametrize(
    "text, tokens",
    [
        ("A man can't open the door; it's locked, isn't it?", "a man ca n't open the door it 's locked is n't it"),
        ("Cannot, gonna, wanna, gimme, lemme, gotta.", "can not gon na wan na gim me lem me got ta"),
        ("1,000 people and/or 2/3 of a crowd & more...", "1,000 people and/or 2/3 of a crowd & more"),
        ("U.S.A. 3.5 .5 5. no.1 No. 5 vs. a TV. An SUV.", "u.s.a. 3.5 .5 5 no. 1 no. 5 vs. a tv an suv"),
        ("A dog--a big one--barks !! ?!", "a dog a big one barks !! ?!"),
        ("it is 5pm, 5 p.m. 20ft 6'2\" 24/7 10am-5pm", "it is 5pm 5 p.m. 20ft 6 2 24/7 10am-5pm"),
        ("don't. won't! shouldn't've ain't d'you c'mon", "do n't wo n't should n't 've ai n't d'you c'mon"),
        ("It’s “great” – really — fine…", "it 's great really fine"),
        ("50% of £20 or €30 #1 a_b c*d e+f=g", "50 % of # 20 or $ 30 # 1 a_b c * d e + f = g"),
        ("wow...what? yes,no.Maybe", "wow what yes no.maybe"),
        ("can not not n't 'tis 'twas", "can not not n't 't is 't was"),
    ],
)
def test_captions_are_split_as_the_penn_treebank_does(text, tokens):
    assert caption_tokens(text) == tokens.split()


@pytest.mark.parametrize(
    "references, hypotheses, message",
    [
        ([], [], "at least one"),
        ([["a"]], ["a", "b"], "one hypothesis for each item"),
        ([["a"], []], ["a", "b"], "Item 1 has the references"),
        ([["a", "..."]], ["a"], "with words"),
        (["a dog"], ["a dog"], "expected a list"),
    ],
)
def test_captions_that_cannot_be_scored_are_refused(references, hypotheses, message):
    with pytest.raises(MetricError, match=message):
        caption_scores(references, hypotheses)


# Retrieval


def example() -> tuple[np.ndarray, np.ndarray]:
    """36 texts of 12 clips."""
    texts, clips = np.arange(36)[:, None], np.arange(12)
    media = texts[:, 0] * 7 % 12
    return np.round(0.3 * np.sin(3.1 * (texts + 1) * (clips + 2)) + 0.1 * (media[:, None] == clips), 4), media


def test_ranks_are_those_of_torchmetrics():
    # retrieval_reciprocal_rank and retrieval_hit_rate of torchmetrics 1.9.0, of each query; its hit rate, not its
    # recall, is R@K. It takes scores at or below 0 for misses, so it was given the order of the scores instead.
    ranks = retrieval_ranks(*example())
    assert ranks.text_to_media.tolist() == [
        *(5, 4, 7, 4, 9, 1, 8, 7, 4, 8, 1, 5, 9, 1, 8, 8, 1, 3, 5, 7, 8, 1, 1, 8, 9, 4, 1, 6, 9, 3, 1, 1, 9, 10, 1, 1)
    ]
    assert ranks.media_to_text.tolist() == [1, 1, 1, 1, 1, 1, 1, 1, 5, 17, 1, 7]
    to_media, to_text = ranks.table().to_dict("records")
    assert [to_media[f"R@{k}"] for k in (1, 5, 10)] == pytest.approx([0.305555556, 0.555555556, 1])
    assert [to_text[f"R@{k}"] for k in (1, 5, 10)] == pytest.approx([0.75, 0.833333333, 0.916666667])
    assert to_media["mean_reciprocal_rank"] == pytest.approx(0.424096122)
    assert to_text["mean_reciprocal_rank"] == pytest.approx(0.783473390)
    assert (to_text["median_rank"], to_text["n_queries"]) == (1, 12)
    assert to_text["mean_rank"] == pytest.approx(38 / 12)


@pytest.mark.parametrize("scale", [1.0, 20.0, 100.0])
def test_dual_softmax_is_the_matrix_times_its_softmax(scale):
    similarities, media = example()
    scores = torch.from_numpy(similarities)
    ranks = dual_softmax_ranks(similarities, media, scale=scale)
    # A direction's scores rank all its candidates, so plain ranks of the weighted matrix say what is expected.
    by_texts = retrieval_ranks(scores * torch.softmax(scale * scores, 0), media)
    by_media = retrieval_ranks(scores * torch.softmax(scale * scores, 1), media)
    assert ranks.text_to_media.tolist() == by_texts.text_to_media.tolist()
    assert ranks.media_to_text.tolist() == by_media.media_to_text.tolist()
    assert ranks.table()["dual_softmax"].all()
    assert ranks.text_to_media.tolist() != retrieval_ranks(similarities, media).text_to_media.tolist()


@st.composite
def pools(draw):
    n_media = draw(st.integers(1, 4))
    more = draw(st.lists(st.integers(0, n_media - 1), max_size=4))
    media = draw(st.permutations([*range(n_media), *more]))
    values = st.sampled_from([-0.5, 0.0, 0.25, 0.5, 1.0])  # few, so that many tie
    rows = st.lists(values, min_size=n_media, max_size=n_media)
    return np.array(draw(st.lists(rows, min_size=len(media), max_size=len(media)))), np.array(media)


@given(pools(), st.integers(1, 9))
def test_ranks_count_what_scores_as_much_as_the_right_one(pool, block):
    similarities, media = pool
    with pytest.MonkeyPatch.context() as patch:  # few rows at a time, as with many texts
        patch.setattr(mmqlora.retrieval, "_BLOCK", block)
        ranks = retrieval_ranks(similarities, media)
    for text, row in enumerate(similarities):
        wrong = [score for clip, score in enumerate(row) if clip != media[text]]
        assert ranks.text_to_media[text] == 1 + sum(score >= row[media[text]] for score in wrong)
    for clip, column in enumerate(similarities.T):
        wrong = column[media != clip]
        assert ranks.media_to_text[clip] == min(1 + sum(wrong >= score) for score in column[media == clip])


@pytest.mark.parametrize("ranks", [retrieval_ranks, dual_softmax_ranks])
@given(st.permutations(range(36)), st.permutations(range(12)))
def test_ranks_move_with_their_queries(ranks, texts, clips):
    similarities, media = example()
    before = ranks(similarities, media)
    after = ranks(similarities[texts][:, clips], np.argsort(clips)[media[texts]])
    assert after.text_to_media.tolist() == before.text_to_media[texts].tolist()
    assert after.media_to_text.tolist() == before.media_to_text[clips].tolist()


def test_a_model_that_says_the_same_of_all_ranks_last():
    for ranks in (retrieval_ranks(np.zeros((5, 5))), dual_softmax_ranks(np.ones((5, 5)))):
        assert ranks.text_to_media.tolist() == ranks.media_to_text.tolist() == [5] * 5


def test_another_text_of_a_clip_does_not_stand_in_its_way():
    ranks = retrieval_ranks([[0.9, 0.0], [0.9, 0.0], [0.1, 0.5]], media=[0, 0, 1])
    assert ranks.media_to_text.tolist() == [1, 1]


def test_tensors_of_16_bits_are_ranked_like_arrays():
    similarities, media = example()
    tensor = torch.from_numpy(similarities).to(torch.bfloat16)
    ranks = retrieval_ranks(tensor, torch.from_numpy(media))
    assert ranks.text_to_media.tolist() == retrieval_ranks(tensor.double().numpy(), media).text_to_media.tolist()


@pytest.mark.parametrize(
    "similarities, media, message",
    [
        ([[1.0, math.nan], [0.0, 1.0]], None, "text 0 and clip 1 is"),
        ([1.0, 2.0], None, "expected numbers of shape"),
        (np.zeros((0, 3)), None, "expected numbers of shape"),
        ([["a"]], None, "expected numbers of shape"),
        (np.zeros((3, 2)), None, "3 texts and 2 clips"),
        (np.zeros((3, 2)), [0, 1], "for 3 texts"),
        (np.zeros((3, 2)), [0.0, 1.0, 1.0], "expected the index"),
        (np.zeros((3, 2)), [0, 1, 2], "Text 2 belongs to clip 2"),
        (np.zeros((3, 2)), [0, 1, -1], "Text 2 belongs to clip -1"),
        (np.zeros((3, 2)), [1, 1, 1], "such as clip 0"),
    ],
)
@pytest.mark.parametrize("ranks", [retrieval_ranks, dual_softmax_ranks])
def test_similarities_that_cannot_be_ranked_are_refused(ranks, similarities, media, message):
    with pytest.raises(MetricError, match=message):
        ranks(similarities, media)


def test_dual_softmax_needs_finite_scores_and_a_positive_scale():
    with pytest.raises(MetricError, match="text 0 and clip 1 is -inf"):
        dual_softmax_ranks([[1.0, -math.inf], [0.0, 1.0]])
    with pytest.raises(MetricError, match="positive number"):
        dual_softmax_ranks([[1.0]], scale=0.0)
    with pytest.raises(MetricError, match="1 or more"):
        retrieval_ranks([[1.0]]).table(ks=(0,))


# Answers


# processPunctuation and processDigitArticle of GT-Vision-Lab/VQA, vqaEval.py, say so.
@pytest.mark.parametrize(
    "answer, normalized",
    [
        ("The two Dogs, I think.", "2 dogs i think"),
        ("1,000", "1000"),
        ("dont know", "don't know"),
        ("Yes!", "yes"),
        ("a red T-shirt", "red t shirt"),
        ("3.5 miles", "3.5 miles"),
        ("10:30 p.m.", "10:30 pm"),
        ("girl's hat", "girl's hat"),
        ("none", "0"),
        ("on the left/right", "on left right"),
        ("(blue)", "blue"),
        ("What? No.", "what no"),
        ("black & white", "black & white"),
        ("ten-year-old", "10 year old"),
        ("its 5 o'clock", "its 5 o'clock"),
        ("oclock", "o'clock"),
        ("New  York", "new york"),
        ("U.S.A.", "usa"),
        ("$5.00", "$5.00"),
        ("hes running", "he's running"),
        ("wouldntve", "wouldntve"),
        ("shouldn'tve", "shouldn't've"),
        ("yall'll", "y'all'll"),
        ("1,5 and a/b", "15 and ab"),
        ("hello , world", "hello world"),
        ("tv / radio", "tv radio"),
    ],
)
def test_answers_are_normalized_as_in_the_vqa_evaluation(answer, normalized):
    assert normalize_answer(answer) == normalized


def test_an_answer_that_is_only_an_article_stays():
    assert normalize_answer("A") == "a"
    assert answer_accuracy(["a", "a"], ["A", "the"]).correct.tolist() == [True, False]


def test_open_answers_are_right_where_any_right_one_is_met():
    result = answer_accuracy(
        [["tv", "television"], "two", "red", "no"],
        ["A television.", "2", "dark red", ""],
        ["what", "count", "what", "is"],
    )
    assert result.correct.tolist() == [True, True, False, False]
    assert result.accuracy == 0.5
    assert result.by_type == {"count": 1.0, "is": 0.0, "what": 0.5}
    assert answer_accuracy(["Red"], ["red"], normalize=str).accuracy == 0


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(-1, 2), st.sampled_from("abc")), min_size=1, max_size=9))
def test_options_picked_count_like_scores_of_one_for_them(rows):
    answers, picked, types = zip(*rows, strict=True)
    scores = [[float(option == choice) for option in range(3)] for choice in picked]
    by_index, by_score = choice_accuracy(answers, picked, types), choice_accuracy(answers, scores, types)
    assert (
        by_index.correct.tolist() == by_score.correct.tolist() == [a == p for a, p in zip(answers, picked, strict=True)]
    )
    sizes = {name: types.count(name) for name in types}
    assert sum(by_index.by_type[name] * size for name, size in sizes.items()) == pytest.approx(by_index.correct.sum())


def test_options_that_tie_with_the_right_one_are_wrong():
    assert choice_accuracy([0, 1], [[0.5, 0.5], [0.1, 0.9, 0.2]]).correct.tolist() == [False, True]
    assert choice_accuracy(np.array([1]), torch.tensor([[0.1, 0.9]])).by_type == {}


@pytest.mark.parametrize(
    "answers, choices, types, message",
    [
        ([], [], None, "at least one"),
        ([0], [0, 1], None, "1 answers, 2 choices"),
        ([0], [0], ["a", "b"], "2 types"),
        ([2], [[0.1, 0.2]], None, "2 as its right"),
        ([0], [[math.nan, 0.2]], None, "expected a number for every option"),
        ([0], [[]], None, "expected a number for every option"),
        ([-1], [0], None, "The right option of question 0 is -1"),
        ([0], [-2], None, "The option picked in question 0 is -2"),
        ([0.5], [0], None, "The right option of question 0 is 0.5"),
    ],
)
def test_choices_that_cannot_be_judged_are_refused(answers, choices, types, message):
    with pytest.raises(MetricError, match=message):
        choice_accuracy(answers, choices, types)


@pytest.mark.parametrize(
    "answers, predictions, message",
    [
        ([], [], "at least one"),
        (["a"], [], "0 predictions"),
        (["a", []], ["a", "b"], "Question 1"),
        ([""], ["a"], "no empty"),
    ],
)
def test_open_answers_that_cannot_be_judged_are_refused(answers, predictions, message):
    with pytest.raises(MetricError, match=message):
        answer_accuracy(answers, predictions)
