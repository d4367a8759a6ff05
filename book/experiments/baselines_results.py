"""What the records of *Baselines* say: the tables, figures and sentences of the chapter read from here."""

from __future__ import annotations

import logging
from collections import Counter

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments.baselines import MAIN, PRIMARY, RATES, RECORDS, tried
from mmqlora import plots
from mmqlora.comparisons import Comparison, compare
from mmqlora.methods import METHODS
from mmqlora.records import read_records

PLAIN = {"video": "exact_match", "audio": "exact_match", "retrieval": "recall_at_1"}
MARGIN = 0.02  # of the primary score: within it two methods count as equal
FAMILIES = {
    "whole weights": ["full", "head", "ln-tuning"],
    "low rank": ["lora", "rslora", "dora", "adalora", "eva", "pissa", "vera"],
    "factors and rotations": ["ia3", "oft"],
    "new modules": ["adapter", "prefix", "prompt", "p-tuning"],
}
FAMILY = {method: family for family, members in FAMILIES.items() for method in members}
COLORS = dict(zip(FAMILIES, ("#0173b2", "#d55e00", "#029e73", "#cc78bc"), strict=True))


class Results:
    """The records, and what follows from them."""

    def __init__(self) -> None:
        # What `compare` notes about single seeds stands on the page; in the cell of a figure it would be an output.
        logging.getLogger("mmqlora").setLevel(logging.ERROR)
        every = read_records(RECORDS / "baselines.jsonl")
        self.records = _whole_seeds([r for r in every if r["config"]["method"] in {"none", *RATES}])
        self.memory = read_records(RECORDS / "baselines_memory.jsonl")
        self.costs = read_records(RECORDS / "baselines_cost.jsonl")
        self.tasks = [task for task in MAIN if self.of(task, "lora")]
        self.rates = tried()

    def of(self, task: str, method: str | None = None, bits: int | None = None) -> list[dict]:
        """Records of a task, by method and bits."""
        return [
            r
            for r in self.records
            if r["config"]["task"] == task
            and method in (None, r["config"]["method"])
            and bits in (None, r["config"]["bits"])
        ]

    def seeds(self, task: str) -> int:
        """Number of seeds of a task; every arm has them all."""
        return len(self.of(task, "lora", 4))

    def start(self, task: str, bits: int = 16) -> float:
        """Primary score of the base model as it comes."""
        return self.of(task, "none", bits)[0]["metrics"][primary(task)]

    def table(self, task: str) -> pd.DataFrame:
        """One row a method and bits: scores, share of the gap closed, parameters, time, memory."""
        score, plain = primary(task), PLAIN[task.split("/")[0]]
        full = np.mean([r["metrics"][score] for r in self.of(task, "full")])
        times = {
            (r["config"]["method"], r["config"]["bits"]): r["metrics"]["ratio"]
            for r in self.costs
            if r["config"]["task"] == task
        }
        own = [r for r in self.memory if r["config"]["task"] == task]
        # One start for all: EVA's own leaves memory behind that its training then uses.
        least = min(r["start_bytes"] for r in own)
        peaks = {(r["config"]["method"], r["config"]["bits"]): r["peak_bytes"] - least for r in own}
        rows = []
        for method in RATES:
            for bits in (16, 4):
                if not (runs := self.of(task, method, bits)):
                    continue
                scores = np.array([r["metrics"][score] for r in runs])
                rows.append(
                    {
                        "method": method,
                        "bits": bits,
                        "score": scores.mean(),
                        "sd": scores.std(ddof=1) if len(scores) > 1 else np.nan,
                        "plain": np.mean([r["metrics"][plain] for r in runs]),
                        "recovered": (scores.mean() - self.start(task)) / (full - self.start(task)),
                        "parameters": runs[0]["parameters"]["trainable"],
                        "time": times[method, bits],
                        "peak": peaks.get((method, bits), np.nan) / 1e6,
                    }
                )
        return pd.DataFrame(rows)

    def tuning(self, task: str) -> pd.DataFrame:
        """The rate that was chosen, and what half a decade less or more costs, in points; one row a method."""
        rows = []
        for method in RATES:
            if scores := self.rates.get((task, method)):
                best = max(scores, key=scores.get)
                order = sorted(scores)
                place = order.index(best)
                beside = {"lower": place - 1, "higher": place + 1}
                lost = {
                    name: 100 * (scores[best] - scores[order[i]]) if 0 <= i < len(order) else np.nan
                    for name, i in beside.items()
                }
                rows.append({"method": method, "rate": best, **lost})
        return pd.DataFrame(rows).set_index("method")

    def against_lora(self, task: str, bits: int = 4) -> Comparison:
        """Every method against LoRA, paired by seed and item."""
        records = [r for r in self.of(task, bits=bits) if r["config"]["method"] != "none"]
        if bits == 4:  # full fine-tuning has no 4 bits, and is what all of them are measured by
            records += self.of(task, "full")
        return compare(records, "lora", by="config.method", metric=primary(task), margin=MARGIN)

    def plot_against_lora(self) -> Figure:
        """Differences from LoRA, one panel a task."""
        found = [self.against_lora(task) for task in self.tasks]
        heights = [len(comparison.table) for comparison in found]
        figure, panels = plt.subplots(
            len(found), 1, figsize=(7.2, 0.8 + 0.37 * sum(heights)), height_ratios=heights, squeeze=False
        )
        for axes, comparison, task in zip(panels[:, 0], found, self.tasks, strict=True):
            comparison.plot(axes).set_title(task)
        return figure

    def four_bits(self, task: str) -> pd.DataFrame:
        """Every method at 4 bits against itself at 16: one row each, each a comparison of its own."""
        rows = []
        for method in RATES:
            runs = self.of(task, method)
            if {r["config"]["bits"] for r in runs} == {4, 16}:
                found = compare(runs, 16, by="config.bits", metric=primary(task), margin=MARGIN).table.iloc[0]
                rows.append({"method": method, **found.drop("arm")})
        return pd.DataFrame(rows).set_index("method")

    def cheapest(self, task: str, cost: str) -> pd.Series:
        """The 4-bit method of the lowest cost among those whose mean score is within the margin of the best one's."""
        table = self.table(task).query("bits == 4")
        return table[table["score"] >= table["score"].max() - MARGIN].sort_values(cost).iloc[0]

    def plot_four_bits(self) -> Figure:
        """Score at 4 bits minus score at 16, a row a method, a panel a task, with intervals."""
        found = {task: self.four_bits(task) for task in self.tasks}
        heights = [len(table) for table in found.values()]
        figure, panels = plt.subplots(
            len(found), 1, figsize=(7.2, 1.5 + 0.27 * sum(heights)), height_ratios=heights, sharex=True, squeeze=False
        )
        for axes, (task, table) in zip(panels[:, 0], found.items(), strict=True):
            place = np.arange(len(table))
            axes.axvspan(-100 * MARGIN, 100 * MARGIN, color="0.93", zorder=0)
            axes.axvline(0, color="0.4", lw=1)
            colors = [COLORS[FAMILY[method]] for method in table.index]
            axes.hlines(place, 100 * table["low"], 100 * table["high"], color=colors, lw=2)
            axes.scatter(100 * table["difference"], place, color=colors, s=28, zorder=3)
            axes.set_yticks(place, table.index)
            axes.set(title=task, ylim=(len(table) - 0.5, -0.5))
            axes.grid(visible=False, axis="y")
        axes.set_xlabel("score at 4 bits minus score at 16 (points)")
        return figure

    def plot(self) -> Figure:
        """Score against trainable parameters, one panel a task; filled at 4 bits, open at 16."""
        figure, panels = plt.subplots(len(self.tasks), 1, figsize=(7.2, 4.1 * len(self.tasks)), squeeze=False)
        for axes, task in zip(panels[:, 0], self.tasks, strict=True):
            table = self.table(task)
            for row in table.itertuples():
                color = COLORS[FAMILY[row.method]]
                face = color if row.bits == 4 else "white"
                axes.scatter(row.parameters, row.score, s=42, color=face, edgecolor=color, zorder=3)
            front = pareto(table[table["bits"] == 4], "score")
            axes.step(front["parameters"], front["score"], where="post", color="0.6", lw=1.5, zorder=1)
            axes.axhline(self.start(task), color=plots.ARM_COLORS["zero-shot"], ls="--", lw=1)
            axes.margins(x=0.09)  # room for the rightmost name
            axes.set(xscale="log", title=task, ylabel=primary(task).replace("_", " "), ylim=(None, 1.02))
            _label(axes, table.sort_values("score").groupby("method").last())
        panels[-1, 0].set_xlabel("trainable parameters")
        for family, color in COLORS.items():
            panels[0, 0].scatter([], [], color=color, label=family)
        figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9)
        return figure


def _whole_seeds(records: list[dict]) -> list[dict]:
    """The records of seeds in which no arm of a task is missing, so that every mean is over the same seeds."""
    arms = Counter()
    for task, method in tried():
        arms[task] += (1 + METHODS[method].nf4) * (method in RATES)
    found = Counter((r["config"]["task"], r["seed"]) for r in records if r["config"]["method"] != "none")
    whole = {(task, seed) for (task, seed), count in found.items() if count == arms[task]}
    return [r for r in records if r["config"]["method"] == "none" or (r["config"]["task"], r["seed"]) in whole]


def primary(task: str) -> str:
    """Name of the measure that a task's comparisons are made on."""
    return PRIMARY[task.split("/")[0]]


def nothing() -> Figure:
    """What stands in the place of a figure until there are records."""
    figure, axes = plt.subplots(figsize=(7.2, 0.8))
    axes.text(0.5, 0.5, "not measured yet", ha="center", va="center", transform=axes.transAxes)
    axes.set_axis_off()
    return figure


def pareto(table: pd.DataFrame, score: str, cost: str = "parameters") -> pd.DataFrame:
    """The rows that no other beats at a lower or equal cost, by cost."""
    table = table.sort_values([cost, score], ascending=[True, False])
    return table[table[score] > table[score].cummax().shift(fill_value=-np.inf)]


def _label(axes: plt.Axes, points: pd.DataFrame) -> None:
    """Names beside points, moved up or down until none covers another."""
    axes.figure.canvas.draw()
    taken: list[tuple[float, float]] = []
    for name, row in points.sort_values("score", ascending=False).iterrows():
        x, y = axes.transData.transform((row["parameters"], row["score"]))
        place = y
        while any(abs(x - a) < 62 and abs(place - b) < 11 for a, b in taken):
            place -= 3
        taken.append((x, place))
        line = {"arrowstyle": "-", "color": "0.75", "lw": 0.8} if abs(place - y) > 8 else None
        offset = (9, (place - y) * 72 / axes.figure.dpi)
        axes.annotate(
            name,
            (row["parameters"], row["score"]),
            offset,
            textcoords="offset points",
            fontsize=8,
            va="center",
            arrowprops=line,
        )
