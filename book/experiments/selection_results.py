"""What the records of *Selection* say: the tables, figures and sentences of the chapter read from here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import t as student

from experiments.selection import BITS, BUDGETS, FLOORS, GRAINS, LONGER, PARTS, RECORDS, STORES, happening, states
from mmqlora.comparisons import Comparison, compare
from mmqlora.datasets.worlds import PACES, Item
from mmqlora.records import as_table, read_records

MARGIN = 0.01  # of the word accuracy: what counts as equal, fixed before any run
COLORS = {
    "segments": "#d55e00",
    "segments, repeats dropped": "#de8f05",
    "logdet": "#0173b2",
    "logdet-no-noise": "#56b4e9",
    "kcenter": "#029e73",
    "difference": "#cc78bc",
    "keyframes": "#ca9161",
    "aks": "#8c8c00",
    "uniform": "#000000",
    "random": "#949494",
}
MARKS = dict(zip(COLORS, "osDdv^<>Xx", strict=True))
NAMES = {"word_accuracy": "word accuracy", "coverage": "states covered", "collisions": "collisions shown"}


class Results:
    """The records, and what follows from them."""

    def __init__(self) -> None:
        self.records = {
            part: read_records(RECORDS / f"selection_{part}.jsonl")
            for part in ("frames", "sounds", "floors", "heights", "prices", "cache", "trained", "speech", "cost")
        }

    def table(self, part: str) -> pd.DataFrame:
        """The records of a part, a row a run; names without "config" and "metrics"."""
        table = as_table(self.records[part])
        return table.rename(columns=lambda name: name.removeprefix("metrics.").removeprefix("config."))

    def mean(self, part: str, measure: str = "word_accuracy", **cell: object) -> float:
        """Mean over seeds of the runs of a configuration, or of several."""
        table = self.table(part)
        for name, value in cell.items():
            table = table[table[name].isna() if value is None else table[name] == value]
        return float(table[measure].mean())

    def scores(self, budget: int, measure: str = "word_accuracy") -> pd.DataFrame:
        """Means by selector (rows) and pace."""
        table = self.table("frames").query("budget == @budget")
        found = table.pivot_table(measure, "method", "pace")[list(PACES)]
        return found.sort_values(list(PACES), ascending=False)

    def against(self, other: str, budget: int, pace: str) -> Comparison:
        """Every selector against another one, on the clips of a pace, as the model comes."""
        runs = [r for r in self.records["frames"] if (r["config"]["pace"], r["config"]["budget"]) == (pace, budget)]
        runs.sort(key=lambda r: list(COLORS).index(r["config"]["method"]))
        return compare(runs, other, items="nested", margin=MARGIN)

    def after(self, baseline: str, pace: str | None = None) -> Comparison:
        """Every selector against another one, each fine-tuned on what it keeps."""
        metric = "word_accuracy" if pace is None else f"word_accuracy {pace}"
        runs = [r for r in self.records["trained"] if r["config"].get("part", PARTS[0]) == PARTS[0]]
        return compare(runs, baseline, metric=metric, margin=MARGIN)

    def gain(self, found: Comparison, arm: str) -> str:
        """A difference in points with its interval, in words."""
        row = 100 * found.table.set_index("arm").loc[arm, ["difference", "low", "high"]].astype(float)
        return f"{row.difference:+.1f} points ({row.low:+.1f} to {row.high:+.1f})"

    def plot_frames(self, measure: str = "word_accuracy") -> Figure:
        """A measure against the frames that are kept, a panel a pace; means of seeds with 95% intervals."""
        figure, panels = plt.subplots(1, 3, figsize=(7.4, 4.4), sharey=True)
        table = self.table("frames")
        for axes, pace in zip(panels, PACES, strict=True):
            own = table[table["pace"] == pace]
            for method in [name for name in COLORS if name in set(own["method"])]:
                _line(axes, own[own["method"] == method], "budget", measure, method)
            axes.set(title=pace, xlabel="frames kept", xscale="log", xticks=BUDGETS, xticklabels=BUDGETS)
            axes.minorticks_off()
            if measure == "word_accuracy":
                whole = own[own["method"] == "all"][measure].mean()
                axes.axhline(whole, color="0.4", ls=":", lw=1.5, label="all frames")
        panels[0].set_ylabel(NAMES[measure])
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
        return figure

    def plot_trained(self) -> Figure:
        """Word accuracy after fine-tuning on what is kept, against the share of frames, a panel a pace."""
        figure, panels = plt.subplots(1, 3, figsize=(7.4, 4.6), sharey=True)
        table = self.table("trained")
        table["part"] = table["part"].fillna(PARTS[0])
        shares = [round(100 / part, 1) for part in PARTS[::-1]]
        for axes, pace in zip(panels, PACES, strict=True):
            measure = f"word_accuracy {pace}"
            for method in [name for name in COLORS if name in set(table["method"])]:
                own = table[table["method"] == method]
                _line(axes, own.assign(share=100 / own["part"]), "share", measure, method, by="part")
            for method, style in (("all", ":"), (LONGER, "--")):
                whole = table[table["method"] == method][measure].mean()
                axes.axhline(whole, color="0.4", ls=style, lw=1.5, label=method)
            axes.set(title=pace, xlabel="frames kept (%)", xticks=shares, xlim=(10, 27.5))
        panels[0].set_ylabel("word accuracy")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
        return figure

    def plot_sounds(self) -> Figure:
        """Word accuracy against the seconds that are kept, a panel a pace."""
        figure, panels = plt.subplots(1, 3, figsize=(7.4, 4.2), sharey=True)
        table = self.table("sounds")
        for axes, pace in zip(panels, PACES, strict=True):
            own = table[table["pace"] == pace]
            for method in [name for name in COLORS if name in set(own["method"])]:
                _line(axes, own[(own["method"] == method) & own["budget"].notna()], "seconds", "word_accuracy", method)
            whole = own[own["method"] == "all"]
            axes.axhline(whole["word_accuracy"].mean(), color="0.4", ls=":", lw=1.5, label="all of it")
            axes.set(title=pace, xlabel="seconds kept")
        panels[0].set_ylabel("word accuracy")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
        return figure

    def floors(self, measure: str, budget: int | None) -> pd.DataFrame:
        """Means by noise in the video and bits (rows), and by what is taken for noise."""
        table = self.table("floors")
        table = table[table["budget"].isna() if budget is None else table["budget"] == budget]
        found = table.pivot_table(measure, ["grain", "bits"], "floor")[list(FLOORS)]
        return found.reindex([(grain, bits) for grain in GRAINS for bits in BITS])

    def noise(self) -> pd.DataFrame:
        """Error and its differences, over the size of the features, by noise in the video and bits."""
        table = self.table("floors").query("bits < 16 and floor == 'difference'")
        columns = ["noise error", "noise difference", "noise variation"]
        return table.pivot_table(columns, ["grain", "bits"])[columns].sort_index(ascending=[True, False])

    def fewest(self, name: str) -> int:
        """Bits to which the noise of "difference" or "error" hides no change, on the clips for calibration."""
        found = self.table("cache")[f"fewest by {name}"].unique()
        assert len(found) == 1, found
        return int(found[0])

    def stored(self, store: int) -> Comparison:
        """Every number of bits against 16, at the same budget of memory."""
        runs = [r for r in self.records["cache"] if r["config"]["method"] == "segments"]
        runs = [r for r in runs if r["config"]["store"] == store]
        return compare(runs, self.fewest("error"), by="config.bits", items="nested", margin=MARGIN)

    def plot_cache(self) -> Figure:
        """Word accuracy against bits, a line a budget of memory; marked, what noise says."""
        figure, axes = plt.subplots(figsize=(7.2, 4.4))
        table = self.table("cache").query("method == 'segments'")
        shades = ("#cfd8e3", "#8fb3d9", "#3f86c4", "#0b3c6f")
        for store, color in zip(STORES, shades, strict=True):
            own = table[table["store"] == store]
            mean = own.groupby("bits")["word_accuracy"].agg(["mean", "sem", "count"])
            wide = mean["sem"] * student.ppf(0.975, mean["count"] - 1)
            axes.errorbar(mean.index, mean["mean"], wide, color=color, marker="o", lw=2, label=f"{store}")
        for name, style in (("difference", "-"), ("error", "--")):
            axes.axvline(self.fewest(name), color="#d55e00", ls=style, lw=1.5, label=f"says the {name}")
        bits = sorted(table["bits"].unique())
        axes.set(xscale="log", xlabel="bits for each stored number", ylabel="word accuracy", xticks=bits)
        axes.set_xticklabels(bits)
        axes.minorticks_off()
        figure.legend(loc="outside lower center", ncols=3, fontsize=9, title="bits for each feature of a clip")
        return figure


def _line(axes: Axes, table: pd.DataFrame, x: str, y: str, method: str, by: str = "budget") -> None:
    """Means over seeds with 95% intervals."""
    grouped = table.groupby(by)
    mean, sem, count = grouped[y].mean(), grouped[y].sem(), grouped[y].count()
    ours = method == "segments"
    axes.errorbar(
        grouped[x].mean(),
        mean,
        sem * student.ppf(0.975, count - 1),
        color=COLORS[method],
        marker=MARKS[method],
        ms=6 if ours else 4,
        lw=2.6 if ours else 1.2,
        zorder=4 if ours else 2,
        label=method,
    )


def plot_choices(item: Item, kept: Mapping[str, Sequence[int]]) -> Figure:
    """What selectors keep of a clip, a row a selector: events in color, states between them in turns."""
    figure, axes = plt.subplots(figsize=(7.2, 1.3 + 0.32 * len(kept)))
    for number, (first, end) in enumerate(states(item)):
        axes.axvspan(first - 0.5, end - 0.5, color="0.88" if number % 2 else "0.96", lw=0)
    for number, (first, end) in enumerate(happening(item)):
        axes.axvspan(first - 0.5, end - 0.5, color=f"C{number}", alpha=0.45, lw=0, label=item.events[number].phrase)
    for row, frames in enumerate(kept.values()):
        axes.plot(frames, np.full(len(frames), row), "o", color="#222222", ms=5)
    axes.set_yticks(range(len(kept)), list(kept))
    axes.set(xlim=(-0.5, len(item.frames) - 0.5), ylim=(len(kept) - 0.5, -0.5), xlabel="frame")
    axes.grid(visible=False)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9)
    return figure


def plot_cancelling(item: Item, clean: np.ndarray, noisy: np.ndarray) -> Figure:
    """Over the frames of a clip: how far features change, how far quantization moves them, and what is left of that."""
    figure, axes = plt.subplots(figsize=(7.2, 3.8))
    error = noisy - clean
    size = np.sqrt(np.square(clean).sum(1).mean())
    place = np.arange(1, len(clean))
    change = np.linalg.norm(np.diff(clean, axis=0), axis=1) / size
    left = np.linalg.norm(np.diff(error, axis=0), axis=1) / np.sqrt(2) / size
    least = 1e-6  # of frames that are equal to the last digit
    axes.plot(np.linalg.norm(error, axis=1) / size, color="#0173b2", lw=2, label="error of a frame")
    axes.plot(place, np.maximum(left, least), color="#d55e00", lw=2, label="what is left in a difference")
    axes.plot(place, np.maximum(change, least), color="0.35", lw=1.2, ls="--", label="change from the frame before")
    for first, end in happening(item):
        axes.axvspan(first - 0.5, end - 0.5, color="0.85", lw=0)
    axes.set(yscale="log", xlabel="frame (events are shaded)", ylabel="over the size of features")
    figure.legend(loc="outside lower center", ncols=3, fontsize=9)
    return figure


def plot_film(frames: np.ndarray, bounds: np.ndarray, keep: Sequence[int]) -> Figure:
    """A film as thin slices in order of time, cut where segments end, and below them the frames that stand for them."""
    columns = len(keep)
    height = frames.shape[1] / frames.shape[2]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7.2, 1.5 + 7.2 / columns * height), height_ratios=[1, 1.2])
    slices = np.concatenate([frame[:, frame.shape[1] // 2][:, None] for frame in frames], axis=1)
    top.imshow(slices, aspect="auto", extent=(0, len(frames), 0, 1))
    for end in bounds[1:-1]:
        top.axvline(end, color="white", lw=2)
    top.plot(np.array(keep) + 0.5, np.full(columns, 0.5), "o", color="white", mec="black", ms=6)
    top.set_yticks([])
    top.set_xlabel("frame")
    for number, index in enumerate(keep):
        bottom.imshow(frames[index], extent=(number, number + 0.95, 0, height))
    bottom.set(xlim=(0, columns), ylim=(0, height))
    for axes in (top, bottom):
        axes.grid(visible=False)
    bottom.axis("off")
    return figure
