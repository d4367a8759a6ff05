"""What the records of *All together* say: the tables, figures and sentences of the chapter read from here."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments.baselines_results import nothing
from experiments.together import ARMS, PARTS, RECORDS, SEEDS
from mmqlora.comparisons import Comparison, compare
from mmqlora.records import read_records

METRIC = "reciprocal_rank"
MARGIN = 0.02  # of the score, as in *Baselines*: within it two arms count as equal, and an interaction as none
COLORS = {1: "#0173b2", 2: "#d55e00", 3: "#029e73"}  # by the number of contributions in an effect
EFFECTS = tuple(parts for n in (1, 2, 3) for parts in itertools.combinations(PARTS, n))


class Results:
    """The records, and what follows from them.

    Args:
        records: of the experiment; the default reads those of the book, of which there may be none yet.
    """

    def __init__(self, records: Sequence[dict[str, Any]] | None = None) -> None:
        path = RECORDS / "together.jsonl"
        if records is None:
            records = read_records(path) if path.exists() else []
        by_seed: dict[int, dict[str, dict[str, Any]]] = {}
        for record in records:
            by_seed.setdefault(record["seed"], {})[record["config"]["arm"]] = record
        # An effect needs all eight runs of a seed.
        self.whole = {seed: runs for seed, runs in sorted(by_seed.items()) if set(runs) == set(ARMS)}
        self.records = [runs[arm] for runs in self.whole.values() for arm in ARMS]
        self.found = len(records)

    @property
    def shows(self) -> bool:
        """Whether there are two whole seeds: intervals need them."""
        return len(self.whole) > 1

    @property
    def finished(self) -> bool:
        """Whether there are six whole seeds."""
        return set(SEEDS) <= set(self.whole)

    def progress(self) -> str:
        """What is there, in a sentence."""
        if self.finished:
            return f"All {len(ARMS)} arms have {len(self.whole)} seeds."
        return (
            f"**This chapter is not finished.** A claim takes {len(SEEDS)} seeds of all {len(ARMS)} arms. So far there "
            f"are {self.found} of {len(SEEDS) * len(ARMS)} runs, and {len(self.whole)} whole seeds. With fewer than "
            "two there is nothing to show; with fewer than six, intervals say little about other runs."
        )

    def table(self) -> pd.DataFrame:
        """One row an arm: score, deviation over seeds, what it gains over none, parameters, time."""
        rows = []
        for arm in ARMS:
            runs = [seed[arm] for seed in self.whole.values()]
            scores = np.array([run["metrics"][METRIC] for run in runs])
            rows.append(
                {
                    "arm": arm,
                    "score": scores.mean() if runs else np.nan,
                    "sd": scores.std(ddof=1) if len(runs) > 1 else np.nan,
                    "recall at 1": np.mean([run["metrics"]["recall_at_1"] for run in runs]) if runs else np.nan,
                    "parameters": runs[0]["parameters"]["trainable"] if runs else np.nan,
                    "learning rate": runs[0]["config"]["learning_rate"] if runs else np.nan,
                }
            )
        return pd.DataFrame(rows).set_index("arm")

    def arms(self) -> Comparison:
        """Every arm against none, paired by seed and item."""
        return compare(self.records, "none", by="config.arm", metric=METRIC, margin=MARGIN)

    def effect(self, parts: tuple[str, ...]) -> pd.Series:
        """What one contribution brings on average over the others; or how much more several bring than their sum.

        For a pair that is (both - one) - (other - none), averaged over the third: twice the mean of the arms that lack
        an even number of ``parts`` minus twice the mean of those that lack an odd number. Pairs are seeds and items.
        """
        lacking = {on: len(set(parts) - set(on)) for on in ARMS.values()}
        plus, minus = ([on for on, count in lacking.items() if count % 2 == odd] for odd in (0, 1))
        return 2 ** (len(parts) - 1) * self._contrast(plus, minus)

    def _contrast(self, plus: Sequence[tuple[str, ...]], minus: Sequence[tuple[str, ...]]) -> pd.Series:
        """The mean of some arms minus the mean of others, with its interval."""
        names = {parts: arm for arm, parts in ARMS.items()}
        records = []
        for seed, runs in self.whole.items():
            for side, arms in (("plus", plus), ("minus", minus)):
                items = np.mean([runs[names[parts]]["items"][METRIC] for parts in arms], axis=0)
                means = {METRIC: float(items.mean())}
                records.append(
                    {"config": {"side": side}, "seed": seed, "metrics": means, "items": {METRIC: items.tolist()}}
                )
        row = compare(records, "minus", by="config.side", metric=METRIC).table.iloc[0]
        return row[["difference", "low", "high"]].astype(float)

    def effects(self) -> pd.DataFrame:
        """Main effects and interactions with 95% intervals, in points."""
        return pd.DataFrame({" x ".join(parts): 100 * self.effect(parts) for parts in EFFECTS}).T

    def said(self, name: str) -> str:
        """An effect with its interval, in words."""
        return _points(self.effects().loc[name])

    def gain(self, arm: str, other: str) -> str:
        """What an arm gains over another, with its interval, in words."""
        return _points(100 * self._contrast([ARMS[arm]], [ARMS[other]]))

    def beyond(self) -> str:
        """What all three gain over none, less the sum of what each gains alone, with its interval, in words."""
        return _points(300 * self._contrast([PARTS, (), ()], [(part,) for part in PARTS]))

    def plot(self) -> Figure:
        """Above: the score of every arm, a dot a seed. Below: effects with their intervals."""
        if not self.shows:
            return nothing()
        figure, (above, below) = plt.subplots(2, 1, figsize=(7.2, 6.4), height_ratios=[len(ARMS), len(EFFECTS)])
        for place, arm in enumerate(ARMS):
            scores = [runs[arm]["metrics"][METRIC] for runs in self.whole.values()]
            color = COLORS.get(len(ARMS[arm]), "#949494")
            above.plot(scores, np.full(len(scores), place), "o", color=color, alpha=0.5, ms=5, mew=0)
            above.plot(np.mean(scores), place, "D", color=color, ms=8)
        above.set_yticks(range(len(ARMS)), ARMS)
        above.set(xlabel=METRIC.replace("_", " "), ylim=(len(ARMS) - 0.5, -0.5))
        effects = self.effects()
        below.axvspan(-100 * MARGIN, 100 * MARGIN, color="0.93", zorder=0)
        below.axvline(0, color="0.4", lw=1)
        for place, (parts, row) in enumerate(zip(EFFECTS, effects.itertuples(), strict=True)):
            color = COLORS[len(parts)]
            below.hlines(place, row.low, row.high, color=color, lw=2)
            below.plot(row.difference, place, "D", color=color, ms=7)
        below.set_yticks(range(len(EFFECTS)), effects.index)
        below.set(xlabel="points, with 95% intervals", ylim=(len(EFFECTS) - 0.5, -0.5))
        for axes in (above, below):
            axes.grid(visible=False, axis="y")
        return figure


def _points(row: pd.Series) -> str:
    return f"{row['difference']:+.1f} points ({row['low']:+.1f} to {row['high']:+.1f})"


def plot_arms() -> Figure:
    """The eight arms: what each of them has."""
    figure, axes = plt.subplots(figsize=(7.2, 3.4))
    for row, (arm, parts) in enumerate(ARMS.items()):
        for column, part in enumerate(PARTS):
            face = COLORS[len(parts)] if part in parts else "white"
            axes.plot(column, row, "o", ms=14, color=face, mec="0.4")
        axes.text(len(PARTS) - 0.4, row, arm, va="center", fontsize=10)
    axes.set_xticks(range(len(PARTS)), PARTS)
    axes.xaxis.tick_top()
    axes.set(yticks=[], xlim=(-0.5, 5), ylim=(len(ARMS) - 0.5, -0.5))
    axes.spines[:].set_visible(False)
    axes.grid(False)
    return figure
