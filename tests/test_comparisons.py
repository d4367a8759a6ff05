from __future__ import annotations

import logging

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import ttost_paired

from mmqlora import RecordError, compare
from mmqlora.comparisons import _crossed, _holm, _judge, _nested, _sign_flip


def records_of(scores, *, items=True):
    """Records of arms from {arm: (S, I) scores}; seeds from 1."""
    return [
        {
            "config": {"method": arm},
            "seed": seed,
            "metrics": {"word_accuracy": float(np.mean(row))},
            **({"items": {"word_accuracy": list(row)}} if items else {}),
        }
        for arm, rows in scores.items()
        for seed, row in enumerate(np.asarray(rows, float), 1)
    ]


def noise(seed=0, arms=("base", "one", "two"), seeds=6, items=40):
    generator = np.random.default_rng(seed)
    return {
        arm: generator.normal(0.5 + 0.1 * n, 0.2, (seeds, items)) + generator.normal(0, 0.05, (seeds, 1))
        for n, arm in enumerate(arms)
    }


def simulate(generator, runs, seeds, items, variances, crossed):
    """Differences (runs, S, I) whose true mean is 0; variances of seeds, items, and the rest."""
    by_seed, by_item, rest = np.sqrt(variances)
    return (
        by_seed * generator.standard_normal((runs, seeds, 1))
        + by_item * generator.standard_normal((runs, 1 if crossed else seeds, items))
        + rest * generator.standard_normal((runs, seeds, items), dtype=np.float32)
    )


def within(share, expected, runs):
    """Whether a share is within four standard errors of what was expected."""
    return abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / runs)


# Variances of seeds, items and the rest: none but the rest, items alone, equal parts of the mean's variance, mostly
# seeds, seeds alone.
RATIOS = [(0, 0, 1), (0, 1, 1), (0.03, 1, 1), (0.1, 0.3, 1), (1, 1, 1), (0.3, 0, 1)]


@pytest.mark.parametrize("variances", RATIOS)
def test_intervals_of_crossed_items_cover_and_their_test_errs_as_often_as_it_says(variances):
    runs = 1000
    differences = simulate(np.random.default_rng(1), runs, 6, 200, variances, crossed=True)
    variance, df = _crossed(differences)
    mean = differences.mean((-2, -1))
    covered = (np.abs(mean) <= stats.t.ppf(0.975, df) * np.sqrt(variance)).mean()
    # Where neither seeds nor items vary, the larger of two estimates is taken, and the interval errs to the safe side.
    assert within(covered, 0.95, runs) or (variances[:2] == (0, 0) and 0.95 < covered < 0.985)
    assert (2 * stats.t.sf(np.abs(mean) / np.sqrt(variance), df) < 0.05).mean() == pytest.approx(1 - covered)
    assert (variance >= _nested(differences.mean(-1))[0] * (1 - 1e-9)).all()


@pytest.mark.parametrize("variances", RATIOS)
def test_intervals_of_nested_items_cover(variances):
    runs = 1000
    differences = simulate(np.random.default_rng(2), runs, 6, 200, variances, crossed=False)
    variance, df = _nested(differences.mean(-1))
    covered = (np.abs(differences.mean((-2, -1))) <= stats.t.ppf(0.975, df) * np.sqrt(variance)).mean()
    assert within(covered, 0.95, runs)


def test_the_seeds_own_interval_covers_new_items_far_too_seldom():
    differences = simulate(np.random.default_rng(3), 1000, 6, 200, (0, 1, 1), crossed=True)
    variance, df = _nested(differences.mean(-1))
    covered = (np.abs(differences.mean((-2, -1))) <= stats.t.ppf(0.975, df) * np.sqrt(variance)).mean()
    assert covered < 0.7


def test_intervals_of_right_and_wrong_answers_cover_too():
    generator, runs = np.random.default_rng(4), 1000
    ease = generator.normal(0, 1, (runs, 1, 200))
    skill = generator.normal(0, 0.2, (runs, 6, 1))

    def answers(skill):
        return (generator.random((runs, 6, 200)) < 1 / (1 + np.exp(-(skill + ease)))).astype(float)

    differences = answers(skill) - answers(generator.normal(0, 0.2, (runs, 6, 1)))
    variance, df = _crossed(differences)
    covered = (np.abs(differences.mean((-2, -1))) <= stats.t.ppf(0.975, df) * np.sqrt(variance)).mean()
    assert within(covered, 0.95, runs) or 0.95 < covered < 0.985


def test_equivalence_is_claimed_wrongly_at_most_as_often_as_it_says():
    generator, runs, margin = np.random.default_rng(5), 2000, 0.1
    differences = margin + simulate(generator, runs, 6, 50, (0.001, 0.01, 0.1), crossed=True)  # just not equivalent
    means, (variance, df) = differences.mean((-2, -1)), _crossed(differences)
    found = [_judge(*of_run, margin, 0.95)["p_equivalence"] < 0.05 for of_run in zip(means, variance, df, strict=True)]
    assert within(np.mean(found), 0.05, runs)


def test_nested_is_the_paired_t_test_over_seeds():
    scores = noise()
    comparison = compare(records_of(scores), "base", items="nested")
    for arm, row in zip(("one", "two"), comparison.table.itertuples(), strict=True):
        expected = stats.ttest_rel(scores[arm].mean(1), scores["base"].mean(1))
        assert (row.arm, row.n_seeds, row.n_items) == (arm, 6, 40)
        assert row.p == pytest.approx(expected.pvalue)
        assert (row.low, row.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))
        assert row.difference == pytest.approx(row.mean - row.baseline_mean)
        assert row.mean == pytest.approx(scores[arm].mean())
        own = comparison.seeds.loc[comparison.seeds["arm"] == arm]
        assert list(own["seed"]) == [1, 2, 3, 4, 5, 6]
        assert list(own["difference"]) == pytest.approx(list((scores[arm] - scores["base"]).mean(1)))


def test_without_items_seeds_alone_are_compared():
    scores = noise()
    with_items = compare(records_of(scores), "base", items="nested").table
    for items in ("crossed", "nested"):
        alone = compare(records_of(scores, items=False), "base", items=items).table
        assert set(alone["n_items"]) == {0}
        pd.testing.assert_frame_equal(alone.drop(columns="n_items"), with_items.drop(columns="n_items"))


def test_one_seed_is_the_paired_t_test_over_items_and_says_what_it_leaves_out(caplog):
    scores = noise(seeds=1)
    with caplog.at_level(logging.WARNING):
        comparison = compare(records_of(scores), "base")
    expected = stats.ttest_rel(scores["one"][0], scores["base"][0])
    row = comparison.table.iloc[0]
    assert row["p"] == pytest.approx(expected.pvalue)
    assert (row["low"], row["high"]) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert row["p_exact"] is None
    assert "not about how another seed would come out" in comparison.notes[0] and comparison.notes[0] in caplog.text
    with pytest.raises(RecordError, match="one seed and no items"):
        compare(records_of(scores, items=False), "base")


def test_the_mean_squares_of_crossed_items_are_those_of_statsmodels():
    generator = np.random.default_rng(6)
    differences = simulate(generator, 1, 4, 10, (0.3, 0.5, 1), crossed=True)[0]
    seed, item = np.indices(differences.shape)
    columns = {"d": differences.ravel(), "seed": seed.ravel(), "item": item.ravel()}
    table = anova_lm(ols("d ~ C(seed) + C(item)", pd.DataFrame(columns)).fit())
    ms = table["mean_sq"]
    sum_of_all = ms["C(seed)"] + ms["C(item)"] - ms["Residual"]
    assert sum_of_all > max(ms["C(seed)"], ms["C(item)"])
    variance, df = _crossed(differences)
    assert variance == pytest.approx(sum_of_all / 40)
    assert df == pytest.approx(sum_of_all**2 / (ms**2 / table["df"]).sum())


def test_the_exact_test_is_that_of_scipy():
    generator = np.random.default_rng(7)
    for seeds in (2, 5, 6, 8):
        differences = generator.normal(0.5, 1, seeds)
        expected = stats.permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=np.inf)
        assert _sign_flip(differences) == pytest.approx(expected.pvalue)
    assert _sign_flip(np.array([0.1, 0.2, 0.3, 0.1, 0.2, 0.1])) == 2 / 64
    assert _sign_flip(np.zeros(6)) == 1
    assert 0 < _sign_flip(np.ones(20)) < 1e-4


def test_holm_is_that_of_statsmodels():
    for p in ([0.01, 0.04, 0.03, 0.005], [0.5, 0.9, 0.02], [0.04], [0.03, 0.03, 0.03]):
        assert list(_holm(p)) == pytest.approx(list(multipletests(p, method="holm")[1]))
    table = compare(records_of(noise(arms="abcd")), "a", margin=0.2).table
    assert list(table["p_holm"]) == pytest.approx(list(multipletests(table["p"], method="holm")[1]))
    corrected = multipletests(table["p_equivalence"], method="holm")[1]
    assert list(table["p_equivalence_holm"]) == pytest.approx(list(corrected))


@pytest.mark.parametrize("margin", [0.05, 0.11, 0.3])
def test_equivalence_is_that_of_statsmodels(margin):
    scores = noise()
    row = compare(records_of(scores), "base", items="nested", margin=margin).table.iloc[0]
    expected, _, _ = ttost_paired(scores["one"].mean(1), scores["base"].mean(1), -margin, margin)
    assert row["p_equivalence"] == pytest.approx(expected)


def test_verdicts_are_words():
    generator = np.random.default_rng(8)
    base = generator.random((6, 100))
    shifts = {"up": 0.1, "same": 0.0, "slightly up": 0.004, "down": -0.1}
    scores = {"base": base, **{arm: base + by + generator.normal(0, 0.005, base.shape) for arm, by in shifts.items()}}
    scores["wild"] = generator.random((6, 100))
    table = compare(records_of(scores), "base", margin=0.01).table.set_index("arm")
    assert dict(table["verdict"]) == {
        "up": "better",
        "same": "equivalent within 0.01",
        "slightly up": "better, equivalent within 0.01",
        "down": "worse",
        "wild": "not resolved",
    }
    lower = compare(records_of(scores), "base", higher_is_better=False).table.set_index("arm")
    assert (lower.loc["up", "verdict"], lower.loc["down", "verdict"]) == ("worse", "better")
    assert lower["p_equivalence"].isna().all() and lower["p_equivalence_holm"].isna().all()


def test_arms_that_differ_by_the_same_everywhere_are_sure():
    base = np.random.default_rng(9).random((6, 30))
    table = compare(records_of({"base": base, "same": base, "up": base + 0.1}), "base", margin=0.01).table
    assert list(table["p"]) == [1, 0] and list(table["p_equivalence"]) == [0, 1]
    assert list(table["verdict"]) == ["equivalent within 0.01", "better"]
    assert list(table["p_exact"]) == [1, 2 / 64]


def test_a_test_set_of_one_item_leaves_seeds_alone():
    scores = noise(items=1)
    crossed, nested = (compare(records_of(scores), "base", items=items).table for items in ("crossed", "nested"))
    assert crossed.equals(nested)


def test_shared_seeds_are_used_and_named():
    scores = noise()
    records = [r for r in records_of(scores) if (r["config"]["method"], r["seed"]) not in {("one", 2), ("base", 5)}]
    comparison = compare(records, "base")
    assert list(comparison.table["n_seeds"]) == [4, 5]
    assert comparison.notes[0] == "'one' and 'base' share the seeds [1, 3, 4, 6]; left out: [2, 5]."
    assert comparison.table["baseline_mean"][0] == pytest.approx(scores["base"][[0, 2, 3, 5]].mean())


def test_nested_items_may_differ_in_number_between_seeds():
    records = records_of(noise())
    for record in records:
        kept = 10 + record["seed"]
        record["items"]["word_accuracy"] = record["items"]["word_accuracy"][:kept]
        record["metrics"] = {}
    assert (compare(records, "base", items="nested").table["n_items"] == 14).all()
    with pytest.raises(RecordError, match=r"has \[11, 12, 13, 14, 15, 16\] items .* say items='nested'"):
        compare(records, "base")


def test_arms_are_told_apart_by_any_key():
    records = [
        {**r, "bits": 4 if r["config"]["method"] == "one" else 16} for r in records_of(noise(arms=("base", "one")))
    ]
    comparison = compare(records, 16, by="bits")
    assert comparison.table["arm"].tolist() == [4]


def broken(change):
    records = records_of(noise(seeds=2))
    change(records)
    return records


@pytest.mark.parametrize(
    "change, options, words",
    [
        (lambda r: r.clear(), {}, "No records"),
        (
            lambda r: None,
            {"baseline": "full"},
            r"config.method='full', the baseline. There are \['base', 'one', 'two'\]",
        ),
        (lambda r: r.__delitem__(slice(2, None)), {}, "expected another arm"),
        (lambda r: None, {"by": "config.arm"}, r"no 'arm' in \['method'\]"),
        (lambda r: None, {"by": "config"}, "expected a name or a number"),
        (lambda r: None, {"metric": "bleu"}, r"config.method='base', seed 1: neither .*'bleu'. There are \['word_acc"),
        (lambda r: r.append(r[0]), {}, "config.method='base', seed 1: more than one record"),
        (
            lambda r: r[2]["items"]["word_accuracy"].append(0.5) or r[2].pop("metrics"),
            {},
            "'one' has 41 items and 'base' 40",
        ),
        (lambda r: r[3].pop("items"), {}, "5 of 6 records have items"),
        (lambda r: r[3]["items"]["word_accuracy"].__setitem__(0, None), {}, "seed 2: .* a finite number for each item"),
        (lambda r: r[3]["items"]["word_accuracy"].__setitem__(0, "x"), {}, "seed 2: .* that are no numbers"),
        (lambda r: r[3].update(items={"word_accuracy": []}), {}, "one item at least"),
        (lambda r: r[3]["metrics"].update(word_accuracy=0.1), {}, "is 0.1, but the mean of its items is"),
        (lambda r: [x.update(seed=9) for x in r[:2] if x["seed"] == 1] + [r.pop(1)], {}, r"\[1, 2\] and 'base' \[9\]"),
        (lambda r: None, {"items": "fixed"}, "items='fixed', expected 'crossed'"),
        (lambda r: None, {"margin": -0.1}, "margin=-0.1"),
        (lambda r: None, {"level": 95}, "level=95"),
    ],
)
def test_records_that_cannot_be_compared_are_refused(change, options, words):
    with pytest.raises(RecordError, match=words):
        compare(broken(change), options.pop("baseline", "base"), **options)


def test_the_plot_shows_intervals_and_every_seed():
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")
    comparison = compare(records_of(noise()), "base", margin=0.02)
    ax = comparison.plot()
    drawn = [line.get_xdata() for line in ax.lines]
    for arm, row in zip(("one", "two"), comparison.table.itertuples(), strict=True):
        dots = comparison.seeds.loc[comparison.seeds["arm"] == arm, "difference"]
        assert any(len(x) == 6 and np.allclose(x, dots) for x in drawn)
        assert any(len(x) == 2 and np.allclose(x, [row.low, row.high]) for x in drawn)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["one", "two"]
    assert "word_accuracy" in ax.get_xlabel() and "base" in ax.get_xlabel()
    _, own = plt.subplots()
    assert comparison.plot(own) is own
    plt.close("all")
