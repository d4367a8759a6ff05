r"""Comparisons of arms with a baseline: paired differences with intervals, tests, and every seed.

Example:
    >>> records = [
    ...     {"config": {"method": m}, "seed": s, "metrics": {"word_accuracy": a + s / 100}}
    ...     for m, a in (("lora", 0.6), ("qlora", 0.5))
    ...     for s in range(6)
    ... ]
    >>> compare(records, "lora").table[["arm", "n_seeds", "difference", "verdict"]].round(2)
         arm  n_seeds  difference verdict
    0  qlora        6        -0.1   worse

An arm minus the baseline gives a difference for every seed and test item. What its mean tells about other seeds and
other items depends on how the two are laid out:

**Crossed**: all seeds are judged by the same items. An item that is hard for one seed is hard for the others, so seeds
and items are two samples, each with a variance of its own. For S seeds s and I items i,

.. math::
    d_{si} = \mu + a_s + b_i + e_{si}, \qquad
    \widehat{\mathrm{Var}}(\bar d) = \frac{1}{SI} \max(MS_a,\; MS_b,\; MS_a + MS_b - MS_e)

with the mean squares of the two-way analysis of variance and Satterthwaite's degrees of freedom. The claim is about
new seeds *and* new items of the kind.

**Nested**: every seed is judged by items of its own. What varies between items then varies between the means of seeds
too, and these are all that is needed: it is the paired t test over seeds. Where seeds do share a test set, the same
interval makes a weaker claim: new seeds on *this very* test set. New items it covers far too seldom.

In simulations with 6 seeds and 200 items, 94% to 97% of the 95% intervals held the truth, whatever the ratio of the
variances; of the seeds' t intervals, only 61% did where crossed items were what varied. With 3 seeds, 92% to 97%.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from scipy import stats

from .errors import RecordError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Comparison", "compare"]

logger = logging.getLogger("mmqlora")

_MOST_EXACT = 16  # seeds; 2^16 sign flips are still quick


@dataclass(frozen=True, eq=False)
class Comparison:
    """What `compare` returns.

    Attributes:
        table: One row an arm: ``arm``, ``n_seeds``, ``n_items`` (of a seed; 0 where records have none), ``mean``,
            ``baseline_mean``, ``difference``, the interval from ``low`` to ``high``, ``p`` (t test), ``p_holm`` (the
            same, corrected for the number of arms), ``p_exact`` (sign flips of seeds), ``p_equivalence`` and
            ``p_equivalence_holm`` (None without a margin), and a ``verdict`` in words.
        seeds: One row an arm and seed: ``arm``, ``seed``, ``difference``.
        notes: What limits the comparison, in words; each was also logged as a warning.
        baseline: The arm that the others are compared with.
        metric: What is compared.
        margin: The margin of equivalence, or None.
        level: Of the intervals.
    """

    table: pd.DataFrame
    seeds: pd.DataFrame
    notes: tuple[str, ...]
    baseline: Any
    metric: str
    margin: float | None
    level: float

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the intervals, and every seed as a dot.

        Example:
            >>> comparison.plot()  # doctest: +SKIP

        Args:
            ax: where to draw; the default is a new figure.

        Returns:
            The axes. The line at zero is the baseline; the gray band, where there is one, the margin of equivalence.
        """
        import matplotlib.pyplot as plt

        from .plots import ARM_COLORS

        if ax is None:
            _, ax = plt.subplots(figsize=(7.0, 1.2 + 0.5 * len(self.table)))
        if self.margin is not None:
            ax.axvspan(-self.margin, self.margin, color="#949494", alpha=0.2, lw=0)
        ax.axvline(0, color="#333333", lw=1)
        for row, arm in enumerate(self.table.itertuples()):
            color = ARM_COLORS.get(arm.arm, "#0173b2") if isinstance(arm.arm, str) else "#0173b2"
            dots = self.seeds.loc[self.seeds["arm"] == arm.arm, "difference"]
            # Dots above, interval below: neither hides the other, and no jitter looks like data.
            ax.plot(dots, np.full(len(dots), row - 0.12), "o", color=color, alpha=0.5, ms=5, mew=0)
            ax.plot([arm.low, arm.high], [row + 0.12] * 2, color=color, lw=3, solid_capstyle="butt")
            ax.plot(arm.difference, row + 0.12, "D", color=color, mec="white", ms=8)
        ax.set_yticks(range(len(self.table)), [str(arm) for arm in self.table["arm"]])
        ax.set_ylim(len(self.table) - 0.5, -0.5)
        ax.set_xlabel(f"{self.metric}: difference from {self.baseline} ({100 * self.level:g}% interval; dots: seeds)")
        ax.grid(visible=False, axis="y")
        return ax


def compare(
    records: Sequence[Mapping[str, Any]],
    baseline: Any,
    *,
    by: str = "config.method",
    metric: str = "word_accuracy",
    items: Literal["crossed", "nested"] = "crossed",
    margin: float | None = None,
    higher_is_better: bool = True,
    level: float = 0.95,
) -> Comparison:
    """Compare every arm with a baseline, paired by seed and test item.

    Example:
        >>> comparison = compare(read_records("records/demo.jsonl"), "lora", margin=0.01)  # doctest: +SKIP
        >>> comparison.table  # doctest: +SKIP
        >>> comparison.plot()  # doctest: +SKIP

    Args:
        records: run records, one for an arm and seed. Their ``items[metric]`` is a list of scores, one a test item, in
            the same order for all arms of a seed; their mean is the arm's score. Where no record has items, its score
            is ``metrics[metric]``, and seeds alone are compared.
        baseline: the arm to compare with.
        by: what tells arms apart, a path of keys joined by dots.
        metric: what to compare.
        items: ``"crossed"`` where all seeds share one test set, ``"nested"`` where every seed has its own (see above).
        margin: the largest difference that counts as none, stated before looking; in units of the metric. With it, the
            two one-sided tests (TOST) say whether an arm is equivalent to the baseline.
        higher_is_better: False for error rates; it only decides between the words better and worse.
        level: of the intervals. A test counts where its p is below 1 - level.

    Returns:
        A `Comparison`. Where arms have different seeds, those that an arm shares with the baseline are used. One seed
        is judged by items alone, and the interval then says nothing of other seeds. ``p_exact`` is the share of sign
        patterns of the seeds' differences with a mean as far from zero (with 6 seeds at least 2/64); it assumes
        nothing about their distribution, and speaks about seeds on these items alone.

    Raises:
        RecordError: the baseline or a score is missing, an arm has two records for a seed, an arm shares no seed with
            the baseline, or items that should be paired differ in number.

    Source: Satterthwaite, An approximate distribution of estimates of variance components, 1946; Schuirmann, A
    comparison of the two one-sided tests procedure, 1987; Holm, A simple sequentially rejective multiple test
    procedure, 1979.
    """
    if items not in ("crossed", "nested"):
        raise RecordError(f"items={items!r}, expected 'crossed' (one test set) or 'nested' (one for each seed).")
    if not 0 < level < 1:
        raise RecordError(f"level={level}, expected a share between 0 and 1, such as 0.95.")
    if margin is not None and not margin > 0:
        raise RecordError(f"margin={margin}, expected a number above 0 in units of {metric}, such as 0.01.")
    arms, with_items = _scores(records, by, metric)
    if baseline not in arms:
        raise RecordError(f"No record has {by}={baseline!r}, the baseline. There are {list(arms)}.")
    if len(arms) == 1:
        raise RecordError(f"All records have {by}={baseline!r}; expected another arm to compare with this baseline.")
    notes: list[str] = []
    rows, dots = [], []
    for arm in arms:
        if arm == baseline:
            continue
        seeds = _shared(arms, arm, baseline, notes)
        pairs = [(arms[arm][seed], arms[baseline][seed]) for seed in seeds]
        for seed, (one, other) in zip(seeds, pairs, strict=True):
            if len(one) != len(other):
                raise RecordError(
                    f"Seed {seed}: {arm!r} has {len(one)} items and {baseline!r} {len(other)}. "
                    "Expected the same items in the same order."
                )
        differences = [one - other for one, other in pairs]
        by_seed = np.array([d.mean() for d in differences])
        variance, df = _variance(differences, items, arm, notes)
        rows.append(
            {
                "arm": arm,
                "n_seeds": len(seeds),
                "n_items": round(float(np.mean([len(d) for d in differences]))) if with_items else 0,
                "mean": float(np.mean([one.mean() for one, _ in pairs])),
                "baseline_mean": float(np.mean([other.mean() for _, other in pairs])),
                **_judge(float(by_seed.mean()), variance, df, margin, level),
                "p_exact": _sign_flip(by_seed),
            }
        )
        dots += [{"arm": arm, "seed": s, "difference": float(d)} for s, d in zip(seeds, by_seed, strict=True)]
    table = pd.DataFrame(rows)
    table["p_holm"] = _holm(table["p"])
    table["p_equivalence_holm"] = _holm(table["p_equivalence"]) if margin is not None else None
    table["verdict"] = [_verdict(row, margin, higher_is_better, 1 - level) for row in table.to_dict("records")]
    first = ["arm", "n_seeds", "n_items", "mean", "baseline_mean", "difference", "low", "high", "p", "p_holm"]
    table = table[[*first, "p_exact", "p_equivalence", "p_equivalence_holm", "verdict"]]
    for note in notes:
        logger.warning("%s", note)
    return Comparison(table, pd.DataFrame(dots), tuple(notes), baseline, metric, margin, level)


def _scores(
    records: Sequence[Mapping[str, Any]], by: str, metric: str
) -> tuple[dict[Any, dict[int, np.ndarray]], bool]:
    """The scores of every arm and seed, (I,), and whether they are of items; else there is one, the metric."""
    if not records:
        raise RecordError("No records; expected those of a baseline and of one other arm at least.")
    arms: dict[Any, dict[int, np.ndarray]] = {}
    listed = []
    for record in records:
        arm, seed = _look_up(record, by), record["seed"]
        own = record.get("items")
        scores = own.get(metric) if isinstance(own, Mapping) else None
        listed.append(scores is not None)
        value = record.get("metrics", {}).get(metric)
        who = f"{by}={arm!r}, seed {seed}"
        if seed in arms.setdefault(arm, {}):
            raise RecordError(f"{who}: more than one record. Keep those of one configuration for each arm.")
        if scores is None and value is None:
            known = sorted({*record.get("metrics", {}), *(own if isinstance(own, Mapping) else ())})
            raise RecordError(f"{who}: neither items nor a metric {metric!r}. There are {known}.")
        try:
            array = np.atleast_1d(np.asarray(value if scores is None else scores, dtype=float))
        except (TypeError, ValueError) as error:
            raise RecordError(f"{who}: {metric} has scores that are no numbers ({error}).") from error
        if array.ndim != 1 or not array.size or not np.isfinite(array).all():
            raise RecordError(f"{who}: {metric} needs a finite number for each item, and one item at least.")
        if None not in (scores, value) and not math.isclose(array.mean(), value, rel_tol=1e-3, abs_tol=1e-6):
            raise RecordError(
                f"{who}: {metric} is {value:.6g}, but the mean of its items is {array.mean():.6g}. Expected a metric "
                "that is the mean of its items; a rate over a whole set has to be recorded item by item."
            )
        arms[arm][seed] = array
    if len(set(listed)) > 1:
        raise RecordError(f"{sum(listed)} of {len(listed)} records have items for {metric!r}; expected all or none.")
    return arms, listed[0]


def _look_up(record: Mapping[str, Any], path: str) -> Any:
    value: Any = record
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            known = sorted(value) if isinstance(value, Mapping) else value
            raise RecordError(f"A record has no {path!r}: no {key!r} in {known}. Expected such as by='config.method'.")
        value = value[key]
    if isinstance(value, (Mapping, list)):
        raise RecordError(f"{path!r} is {value}; expected a name or a number, such as by='config.method'.")
    return value


def _shared(arms: dict[Any, dict[int, np.ndarray]], arm: Any, baseline: Any, notes: list[str]) -> list[int]:
    ours, theirs = arms[arm], arms[baseline]
    shared = sorted(ours.keys() & theirs.keys())
    if not shared:
        raise RecordError(
            f"{arm!r} has the seeds {sorted(ours)} and {baseline!r} {sorted(theirs)}; expected one in common at least."
        )
    if left := sorted(ours.keys() ^ theirs.keys()):
        notes.append(f"{arm!r} and {baseline!r} share the seeds {shared}; left out: {left}.")
    return shared


def _variance(differences: list[np.ndarray], items: str, arm: Any, notes: list[str]) -> tuple[float, float]:
    """Variance of the mean difference, and its degrees of freedom."""
    sizes = [len(d) for d in differences]
    if len(differences) == 1:
        if sizes[0] == 1:
            raise RecordError(f"{arm!r} has one seed and no items, so nothing tells how sure its difference is.")
        notes.append(
            f"{arm!r} has one seed: its interval is about new items for this very run, not about how another seed "
            "would come out."
        )
        return float(differences[0].var(ddof=1)) / sizes[0], sizes[0] - 1
    if items == "crossed" and len(set(sizes)) > 1:
        raise RecordError(
            f"{arm!r} has {sorted(set(sizes))} items in different seeds; expected one test set for all. "
            "Where every seed has items of its own, say items='nested'."
        )
    if items == "nested" or sizes[0] == 1:
        variance, df = _nested(np.array([d.mean() for d in differences]))
    else:
        variance, df = _crossed(np.stack(differences))
    return float(variance), float(df)


def _nested(means: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """From the differences of seeds, (..., S), to the variance of their mean and its degrees of freedom, (...)."""
    seeds = means.shape[-1]
    variance = means.var(-1, ddof=1) / seeds
    return variance, np.full_like(variance, seeds - 1)


def _crossed(differences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """From differences by seed and item, (..., S, I), to the variance of their mean and its degrees of freedom, (...).

    The estimate MS_a + MS_b - MS_e falls below that of one sample alone where the other does not vary; the largest of
    the three is taken, with its own degrees of freedom, so that no interval is shorter than the seeds' own.
    """
    seeds, items = differences.shape[-2:]
    by_seed, by_item = differences.mean(-1, keepdims=True), differences.mean(-2, keepdims=True)
    rest = differences - by_seed - by_item + differences.mean((-2, -1), keepdims=True)
    df_seed, df_item = seeds - 1, items - 1
    ms_seed = items * by_seed[..., 0].var(-1, ddof=1)
    ms_item = seeds * by_item[..., 0, :].var(-1, ddof=1)
    ms_error = (rest**2).sum((-2, -1)) / (df_seed * df_item)
    both = ms_seed + ms_item - ms_error
    parts = ms_seed**2 / df_seed + ms_item**2 / df_item + ms_error**2 / (df_seed * df_item)
    # Where nothing varies there is no degree of freedom to estimate; the variance of 0 decides.
    satterthwaite = np.divide(both**2, parts, out=np.full_like(both, df_seed), where=parts > 0)
    largest = np.maximum(both, np.maximum(ms_seed, ms_item))
    df = np.where(largest == both, satterthwaite, np.where(largest == ms_seed, df_seed, df_item))
    return largest / (seeds * items), df


def _judge(difference: float, variance: float, df: float, margin: float | None, level: float) -> dict[str, Any]:
    error = math.sqrt(variance)
    half = float(stats.t.ppf((1 + level) / 2, df)) * error

    def above(value: float) -> float:
        """P of a t at least as large, for the hypothesis that the truth is not above zero."""
        # Scores that differ by the same everywhere leave rounding errors alone to vary.
        if error <= 1e-12 * max(1.0, abs(difference)):
            return 0.5 if abs(value) <= 1e-12 else float(value < 0)
        return float(stats.t.sf(value / error, df))

    return {
        "difference": difference,
        "low": difference - half,
        "high": difference + half,
        "p": min(1.0, 2 * above(abs(difference))),
        "p_equivalence": None if margin is None else max(above(margin + difference), above(margin - difference)),
    }


def _sign_flip(differences: np.ndarray) -> float | None:
    """Exact two-sided p of the hypothesis that the differences of seeds, (S,), are as likely to have either sign."""
    seeds = len(differences)
    if seeds < 2:
        return None
    if seeds <= _MOST_EXACT:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=seeds)))
    else:  # the pattern that came counts among those drawn, so that p is never 0
        signs = np.random.default_rng(0).choice((1.0, -1.0), size=(2**_MOST_EXACT, seeds))
        signs[0] = 1.0
    sums = np.abs(signs @ differences)
    return float((sums >= sums[0] * (1 - 1e-9) - 1e-15).mean())


def _holm(p: Sequence[float]) -> np.ndarray:
    """Holm's correction: the smallest p times their number, the next times one less, and never falling again."""
    values = np.asarray(p, dtype=float)
    order = np.argsort(values)
    corrected = np.empty(len(values))
    corrected[order] = np.minimum(1, np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1)))
    return corrected


def _verdict(row: Mapping[str, Any], margin: float | None, higher_is_better: bool, alpha: float) -> str:
    words = []
    if row["p_holm"] < alpha:
        words.append("better" if (row["difference"] > 0) == higher_is_better else "worse")
    if margin is not None and row["p_equivalence_holm"] < alpha:
        words.append(f"equivalent within {margin:g}")
    return ", ".join(words) or "not resolved"
