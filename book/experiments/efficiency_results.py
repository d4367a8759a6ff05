"""What the records of *Efficiency* say: the tables, figures and sentences of the chapter read from here."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from experiments.baselines import MAIN, PRIMARY
from experiments.efficiency import AXES, PARTS, RECORDS, SCALED, WHISPER
from mmqlora import plots
from mmqlora.errors import RecordError
from mmqlora.records import read_records

ARMS = {("full", 16): "full", ("lora", 16): "LoRA", ("lora", 4): "QLoRA"}
COLORS = dict(zip(ARMS, (plots.ARM_COLORS[name] for name in ("full", "lora", "qlora")), strict=True))
LABELS = {"frames": "frames of a clip", "rank": "rank", "width": "width of the model"}
NOT_YET = "not measured yet"
WINDOW = 10  # steps that a loss is averaged over
ONCE = 1000  # training items of the benchmark; up to here every batch is new to the model
OTHER_LOSS = {"adalora"}  # its loss has a term of its own in it
Interval = tuple[float, float, float]


class Results:
    """The records, and what follows from them.

    Args:
        folder: of the records of this chapter.
        device: "cpu" or "cuda".
    """

    def __init__(self, folder: Path = RECORDS, device: str = "cpu") -> None:
        found = {part: read_if_there(folder / f"efficiency_{part}.jsonl") for part in (*PARTS, "curves")}
        self.curves = found.pop("curves")
        self.every = found
        self.of = {part: [r for r in rows if r["config"]["device"] == device] for part, rows in found.items()}
        self.runs = read_records(RECORDS / "baselines.jsonl")
        self.costs = read_records(RECORDS / "baselines_cost.jsonl")
        self.whisper = read_if_there(RECORDS / "first_qlora_run.jsonl")
        self.models = [name for name in (*MAIN, WHISPER) if any(r["config"]["model"] == name for r in self.of["hold"])]

    # Steps

    def ratios(self, model: str) -> dict[tuple[str, int], list[float]]:
        """Step times against LoRA's in 16 bits, a number a round, by method and bits."""
        own = [r for r in self.of["steps"] if r["config"]["model"] == model]
        own = own or [r for r in self.costs if r["config"]["task"] == model]
        return {(r["config"]["method"], r["config"]["bits"]): r["items"]["ratio"] for r in own}

    def seconds(self, model: str) -> dict[tuple[str, int], tuple[float, int]]:
        """Seconds of a step and the items in it, by method and bits."""
        own = [r for r in self.of["steps"] if r["config"]["model"] == model]
        own = own or [r for r in self.costs if r["config"]["task"] == model]
        arms = [(r["config"]["method"], r["config"]["bits"]) for r in own]
        return {a: (r["metrics"]["seconds"], r["config"]["batch_size"]) for a, r in zip(arms, own, strict=True)}

    def held(self, model: str) -> dict[tuple[str, int], dict[str, Any]]:
        """Bytes at the peak and bytes stored, by method and bits."""
        own = [r for r in self.of["hold"] if r["config"]["model"] == model]
        return {(r["config"]["method"], r["config"]["bits"]): r["metrics"] for r in own}

    def slowdown(self, model: str, arm: tuple[str, int]) -> Interval:
        """Step time of an arm against LoRA's, with an interval."""
        return middle(self.ratios(model)[arm])

    def paces(self, model: str) -> dict[tuple[str, int], list[float]]:
        """Steps to LoRA's loss, against LoRA's own: a number a seed, infinite where a run does not get there.

        LoRA's loss is that of the same seed, at 16 bits, when it has seen half of the items once. A run has until it
        has seen all of them.
        """
        losses: dict[tuple[str, int], dict[int, list[float]]] = {}
        for record in self.runs if model in MAIN else self.whisper:
            config = record["config"]
            if model in MAIN and config["task"] == model:
                arm = (config["method"], config["bits"])
            elif model == WHISPER and config.get("arm") in ("full", "lora", "qlora"):
                arm = {"full": ("full", 16), "lora": ("lora", 16), "qlora": ("lora", 4)}[config["arm"]]
            else:
                continue
            if record.get("losses") and arm[0] not in OTHER_LOSS:
                size = record["training"]["batch_size"] * record["training"]["accumulate"]
                losses.setdefault(arm, {})[record["seed"]] = record["losses"][: ONCE // size]
        lora = losses.get(("lora", 16), {})
        targets = {seed: float(np.mean(course[: len(course) // 2][-WINDOW:])) for seed, course in lora.items()}
        return {
            arm: [
                reached(course, targets[seed]) / reached(lora[seed], targets[seed])
                for seed, course in sorted(by_seed.items())
                if seed in targets
            ]
            for arm, by_seed in losses.items()
        }

    def times(self, model: str) -> dict[tuple[str, int], Interval]:
        """CPU time to LoRA's loss against LoRA's: steps to it, times what a step takes."""
        paces, ratios = self.paces(model), self.ratios(model)
        found = {}
        for arm in paces.keys() & ratios.keys():
            step = float(np.median(ratios[arm]))
            center, low, high = middle(paces[arm])
            found[arm] = (step * center, step * low, step * high)
        return found

    def table(self, model: str) -> pd.DataFrame:
        """A row for each method and its bits, the quickest step first, as text."""
        held, seconds, ratios, times = self.held(model), self.seconds(model), self.ratios(model), self.times(model)
        rows = []
        for arm in sorted(held.keys() & ratios.keys(), key=lambda arm: np.median(ratios[arm])):
            taken, size = seconds[arm]
            rows.append(
                {
                    "method": arm[0],
                    "bits": arm[1],
                    "step time": said(middle(ratios[arm])),
                    "items/s": f"{size / taken:.3g}",
                    "peak (MB)": f"{held[arm]['peak_bytes'] / 1e6:.0f}",
                    "saved (MB)": f"{held[arm]['stored_bytes'] / 1e6:.3g}",
                    "time to LoRA's loss": said(times[arm]) if arm in times else "",
                }
            )
        return pd.DataFrame(rows)

    def share(self, model: str, arm: tuple[str, int], what: str, of: tuple[str, int]) -> float:
        """Bytes of one arm over those of another; ``what`` is "peak_bytes" or "stored_bytes"."""
        held = self.held(model)
        return held[arm][what] / held[of][what]

    def spread(self, arm: tuple[str, int], what: str, of: tuple[str, int]) -> str:
        """`share` over all models, smallest to largest."""
        shares = [self.share(model, arm, what, of) for model in self.models]
        return f"{min(shares):.2g} to {max(shares):.2g}"

    def slowdowns(self, arm: tuple[str, int]) -> str:
        """`slowdown` over all models, smallest to largest."""
        found = [self.slowdown(model, arm)[0] for model in self.models if arm in self.ratios(model)]
        return f"{min(found):.2f} to {max(found):.2f}"

    def plot_steps(self) -> Figure:
        """Step time of every method beside LoRA's, with intervals: a panel a model, filled at 4 bits, open at 16."""
        found = {model: self.ratios(model) for model in self.models if self.ratios(model)}
        methods = {model: list(dict.fromkeys(method for method, _ in ratios)) for model, ratios in found.items()}
        heights = [len(names) for names in methods.values()]
        figure, panels = plt.subplots(
            len(found), 1, figsize=(7.2, 1.2 + 0.3 * sum(heights)), height_ratios=heights, squeeze=False, sharex=True
        )
        for axes, (model, ratios) in zip(panels[:, 0], found.items(), strict=True):
            order = sorted(methods[model], key=lambda name: min(np.median(ratios[a]) for a in ratios if a[0] == name))
            axes.axvline(1, color="0.4", lw=1)
            for (method, bits), taken in ratios.items():
                center, low, high = middle(taken)
                place = order.index(method) + (0.17 if bits == 4 else -0.17)
                color = plots.ARM_COLORS["qlora" if bits == 4 else "lora"]
                axes.hlines(place, low, high, color=color, lw=2)
                axes.plot(center, place, "o", ms=5.5, color=color, mfc=color if bits == 4 else "white")
            axes.set_yticks(range(len(order)), order, fontsize=9)
            axes.set(title=model, ylim=(len(order) - 0.5, -0.5))
            axes.grid(visible=False, axis="y")
        for bits, name in ((16, "lora"), (4, "qlora")):
            color = plots.ARM_COLORS[name]
            axes.plot([], [], "o-", color=color, mfc=color if bits == 4 else "white", label=f"{bits} bits")
        axes.set_xlabel("step time against LoRA in 16 bits")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2)
        return figure

    def gpu(self) -> pd.DataFrame:
        """The same measurements on a GPU, where there are any."""
        rows = []
        for model in (*MAIN, WHISPER):
            for arm, name in ARMS.items():
                row: dict[str, Any] = {"model": model, "method": name}
                for optimizer, label in (("adamw_torch", "AdamW"), ("paged_adamw_8bit", "paged, 8 bits")):
                    wanted = {"model": model, "method": arm[0], "bits": arm[1], "optimizer": optimizer}
                    step, peak = (
                        [r for r in self.every[p] if {**wanted, "device": "cuda"}.items() <= r["config"].items()]
                        for p in ("steps", "hold")
                    )
                    row[f"step time, {label}"] = said(middle(step[0]["items"]["ratio"])) if step else NOT_YET
                    row[f"peak (MB), {label}"] = f"{peak[0]['metrics']['peak_bytes'] / 1e6:.0f}" if peak else NOT_YET
                rows.append(row)
        return pd.DataFrame(rows)

    # Scores in the course of training

    def to_score(self, share: float) -> pd.DataFrame:
        """CPU seconds to a share of what full fine-tuning gains, by task and arm: a number a seed, as text."""
        rows = []
        for task in MAIN:
            score = PRIMARY[task.split("/")[0]]
            own = [r for r in self.curves if r["config"]["task"] == task]
            for arm, name in ARMS.items():
                taken = []
                for record in (r for r in own if (r["config"]["method"], r["config"]["bits"]) == arm):
                    full = next(r for r in own if r["config"]["method"] == "full" and r["seed"] == record["seed"])
                    start, end = full["course"][0][score], full["course"][-1][score]
                    points = [(point["cpu_s"], point[score]) for point in record["course"]]
                    taken.append(first_time(points, start + share * (end - start)))
                if taken:
                    seconds = ("never" if np.isinf(s) else f"{s:.0f}" for s in taken)
                    rows.append({"task": task, "method": name, "seconds": ", ".join(seconds)})
        return pd.DataFrame(rows, columns=["task", "method", "seconds"])

    # The roofline

    def widths(self) -> list[int]:
        """Widths of the layers that were measured."""
        return sorted(record["config"]["width"] for record in self.of["roofline"])

    def layer(self, width: int) -> Layer:
        """The measurements of a width."""
        return Layer(next(r for r in self.of["roofline"] if r["config"]["width"] == width))

    def plot_roofline(self) -> Figure:
        """Seconds by number of rows: points as measured, lines from the machine's bandwidth and rate."""
        widths = self.widths()
        figure, panels = plt.subplots(1, len(widths), figsize=(7.2, 4.2), squeeze=False, sharey=True)
        for axes, width in zip(panels[0], widths, strict=True):
            self.layer(width).plot(axes)
        panels[0, 0].set_ylabel("time (ms)")
        figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=9)
        return figure

    # How cost grows

    def points(self, axis: str, arm: tuple[str, int], what: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Values on an axis, medians, and intervals (2, N) of "seconds" or "bytes"."""
        wanted = {"axis": axis, "method": arm[0], "bits": arm[1]}
        own = [r for r in self.of["scaling"] if wanted.items() <= r["config"].items()]
        own.sort(key=lambda record: record["config"]["value"])
        values = np.array([record["config"]["value"] for record in own], float)
        if what == "bytes":
            found = np.array([record["metrics"]["peak_bytes"] for record in own], float)
            return values, found, np.stack([found, found])
        intervals = np.array([middle(record["items"]["seconds"]) for record in own]).reshape(-1, 3)
        return values, intervals[:, 0], intervals[:, 1:].T

    def exponents(self) -> pd.DataFrame:
        """The power of frames, rank or width that time and bytes grow with, as text."""
        rows = []
        for axis in AXES:
            for arm, name in ARMS.items():
                if len(self.points(axis, arm, "bytes")[0]) < 3:
                    continue
                row = {"grows": axis, "method": name}
                for what in ("seconds", "bytes"):
                    values, found, _ = self.points(axis, arm, what)
                    row[what] = said(exponent(values, found))
                    row[f"{what}, last two"] = f"{slope(values[-2:], found[-2:]):.2f}"
                rows.append(row)
        return pd.DataFrame(rows)

    def power(self, axis: str, arm: tuple[str, int], what: str) -> str:
        """One fitted exponent, as text."""
        return said(exponent(*self.points(axis, arm, what)[:2]))

    def plot_scaling(self) -> Figure:
        """Step time and peak bytes over frames, rank and width, with the fitted powers."""
        figure, panels = plt.subplots(2, len(AXES), figsize=(7.2, 5), sharex="col")
        for column, axis in enumerate(AXES):
            for what, axes, unit in zip(("seconds", "bytes"), panels[:, column], (1, 1e6), strict=True):
                for arm in SCALED:
                    values, found, (low, high) = self.points(axis, arm, what)
                    if len(values) < 2:
                        continue
                    axes.vlines(values, low / unit, high / unit, color=COLORS[arm], lw=2)
                    axes.plot(values, found / unit, "o", ms=4, color=COLORS[arm])
                    line = np.polyval(np.polyfit(np.log(values), np.log(found), 1), np.log(values))
                    axes.plot(values, np.exp(line) / unit, lw=1.2, color=COLORS[arm], label=ARMS[arm])
                axes.set(xscale="log", yscale="log")
                axes.set_xticks(AXES[axis], [str(value) for value in AXES[axis]])
                axes.minorticks_off()
            panels[1, column].set_xlabel(LABELS[axis])
        panels[0, 0].set_ylabel("step time (s)")
        panels[1, 0].set_ylabel("tensors at the peak (MB)")
        figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
        return figure


class Layer:
    """What was measured of a 4-bit layer, and what the machine's bandwidth and rate say about it.

    Args:
        record: of the roofline.
    """

    def __init__(self, record: dict[str, Any]) -> None:
        config = record["config"]
        self.width, self.rows, self.items = config["width"], np.array(config["rows"]), record["items"]
        self.element = 2 if config["dtype"] == "bfloat16" else 4  # bytes of a number
        self.bandwidth = record["metrics"]["copied_bytes"] / np.median(self.items["copy"])  # bytes read and written
        self.rate = 2 * config["product"] ** 3 / np.median(self.items["product"])
        self.dequantize = float(np.median(self.items["dequantize"]))
        self.stored = record["metrics"]["stored_bytes"]

    def rounds(self, what: str) -> np.ndarray:
        """Seconds of an operation: (rounds, rows)."""
        return np.array([self.items[f"{what} {number}"] for number in self.rows]).T

    def least(self, rows: np.ndarray) -> np.ndarray:
        """Seconds that a multiplication takes at least: the longer of computing, and of reading and writing."""
        moved = self.element * (self.width**2 + 2 * rows * self.width)
        return np.maximum(2 * rows * self.width**2 / self.rate, moved / self.bandwidth)

    @property
    def expansion(self) -> float:
        """Dequantizing against the time of its reading and writing alone."""
        return self.dequantize * self.bandwidth / (self.stored + self.element * self.width**2)

    def crossover(self) -> Interval:
        """Rows from which on multiplying takes longer than dequantizing, by rounds."""
        pairs = zip(self.rounds("multiply"), self.items["dequantize"], strict=True)
        return middle([crossing(self.rows, taken, np.full(len(taken), once)) for taken, once in pairs])

    def predicted(self) -> float:
        """The crossover from the time of dequantizing and the rate of multiplying: t · rate / 2d²."""
        return self.dequantize * self.rate / (2 * self.width**2)

    def break_even(self) -> Interval:
        """Rows from which on a frozen 4-bit layer takes less than a trained one in 16 bits, there and back."""
        pairs = zip(self.rounds("trained"), self.rounds("frozen"), strict=True)
        return middle([crossing(self.rows, trained, frozen) for trained, frozen in pairs])

    def against(self, what: str, other: str, rows: int) -> Interval:
        """Ratio of two operations at a number of rows, paired by round."""
        return middle(np.divide(self.items[f"{what} {rows}"], self.items[f"{other} {rows}"]))

    def plot(self, axes: Axes) -> None:
        """Draw it."""
        fine = np.geomspace(self.rows[0], self.rows[-1], 200)
        colors = {"multiply": "#0173b2", "layer": "#d55e00"}
        labels = {"multiply": "multiply", "layer": "4-bit layer: both"}
        once = middle(self.items["dequantize"])
        axes.axhspan(1e3 * once[1], 1e3 * once[2], color="#029e73", alpha=0.25, lw=0)
        axes.axhline(1e3 * once[0], color="#029e73", lw=1.5, label="dequantize, measured")
        axes.plot(fine, 1e3 * self.least(fine), "--", color=colors["multiply"], lw=1.2, label="multiply, roofline")
        axes.plot(fine, 1e3 * (self.least(fine) + once[0]), "--", color=colors["layer"], lw=1.2, label="their sum")
        for what, color in colors.items():
            intervals = 1e3 * np.array([middle(taken) for taken in self.rounds(what).T])
            axes.vlines(self.rows, intervals[:, 1], intervals[:, 2], color=color, lw=2)
            axes.plot(self.rows, intervals[:, 0], "o", ms=5, color=color, label=f"{labels[what]}, measured")
        axes.axvline(self.crossover()[0], color="0.5", lw=1, ls=":")
        axes.set(xscale="log", yscale="log", title=f"{self.width} × {self.width}", xlabel="rows")
        axes.set_xticks(self.rows, [str(number) for number in self.rows], fontsize=9)
        axes.minorticks_off()


def read_if_there(path: Path) -> list[dict[str, Any]]:
    """The records of a file, none where there is no such file."""
    return read_records(path) if path.exists() else []


def middle(values: Iterable[float], level: float = 0.95) -> Interval:
    """The median, and an interval for it from one value to another: exact, whatever the distribution.

    Example:
        >>> middle([5, 3, 4, 1, 2, 6])  # all but the ends need more than six values
        (3.5, 1.0, 6.0)

    Of n values in order the k-th from either end hold the median in 1 - 2 P(X < k) of all cases, with X binomial of n
    and a half. With fewer than six values even the ends don't reach 95%.
    """
    ordered = np.sort(np.asarray(list(values), float))
    count = len(ordered)
    inner = [k for k in range(1, count // 2 + 1) if 1 - 2 * stats.binom.cdf(k - 1, count, 0.5) >= level]
    k = max(inner, default=1)
    # Infinity minus infinity is no number, as between two runs that don't arrive.
    center = ordered[count // 2] if count % 2 or np.isinf(ordered[count // 2]) else float(np.median(ordered))
    return float(center), float(ordered[k - 1]), float(ordered[-k])


def said(interval: Interval, form: str = ".2f") -> str:
    """An interval as text.

    Example:
        >>> said((1.0, 0.5, float("inf")))
        '1.00 (0.50 to never)'
    """
    center, low, high = ("never" if np.isinf(value) else f"{value:{form}}" for value in interval)
    return f"{center} ({low} to {high})" if (low, high) != (center, center) else center


def reached(losses: Sequence[float], target: float, window: int = WINDOW) -> float:
    """Steps after which the mean loss of the last few is at the target; infinite where it never is.

    Example:
        >>> reached([4, 3, 2, 1], 2.5, window=2)
        3.0
    """
    if len(losses) < window:
        return float("inf")
    means = np.convolve(losses, np.full(window, 1 / window), "valid")
    there = np.flatnonzero(means <= target * (1 + 1e-9))
    return float(there[0] + window) if len(there) else float("inf")


def first_time(points: Sequence[tuple[float, float]], target: float) -> float:
    """When a course of (time, score) first reaches a score, on a straight line between points; else infinite.

    Example:
        >>> first_time([(0, 0.0), (10, 0.5), (20, 1.0)], 0.75)
        15.0
    """
    for (before, low), (after, high) in itertools.pairwise(points):
        if low < target <= high:
            return before + (after - before) * (target - low) / (high - low)
    return 0.0 if points and points[0][1] >= target else float("inf")


def crossing(rows: np.ndarray, rising: np.ndarray, other: np.ndarray) -> float:
    """Rows at which one time, smaller before, overtakes another for good: on straight lines between logarithms.

    Example:
        >>> round(crossing(np.array([1, 10, 100]), np.array([1.0, 10.0, 100.0]), np.full(3, 30.0)), 6)
        30.0
    """
    apart = np.log(rising) - np.log(other)
    below = np.flatnonzero(apart < 0)
    if not len(below):
        return float(rows[0])
    last = below[-1]
    if last == len(rows) - 1:
        return float("inf")
    share = -apart[last] / (apart[last + 1] - apart[last])
    return float(np.exp((1 - share) * np.log(rows[last]) + share * np.log(rows[last + 1])))


def slope(x: np.ndarray, y: np.ndarray) -> float:
    """The power of x that y grows with."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def exponent(x: np.ndarray, y: np.ndarray, level: float = 0.95) -> Interval:
    """The power of x that y grows with, and the t interval of the fit: wide where it is no power at all.

    Example:
        >>> round(exponent(np.array([1.0, 2.0, 4.0]), np.array([3.0, 12.0, 48.0]))[0], 6)
        2.0
    """
    if len(x) < 3:
        raise RecordError(f"{len(x)} points; the interval of an exponent needs three at least.")
    x, y = np.log(x) - np.log(x).mean(), np.log(y) - np.log(y).mean()
    power = float(x @ y / (x @ x))
    error = np.sqrt(np.square(y - power * x).sum() / (len(x) - 2) / (x @ x))
    half = float(stats.t.ppf((1 + level) / 2, len(x) - 2) * error)
    return power, power - half, power + half
