"""What the records of *Memory* say: the tables, figures and sentences of the chapter read from here."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments.memory_published import GIB, RECORDS
from mmqlora.planner import Plan
from mmqlora.records import as_table, read_records

ARMS = {("full", "16"): "full", ("lora", "16"): "LoRA", ("lora", "nf4"): "QLoRA"}
COLORS = {"allocated": "#029e73", "reserved": "#0173b2"}


class Results:
    """The records, and what follows from them."""

    def __init__(self) -> None:
        checks = as_table(read_records(RECORDS.with_name("memory_checks.jsonl")))
        checks["error"] = checks["metrics.predicted"] / checks["metrics.measured"] - 1
        bits = checks["config.quant_type"].fillna("16")
        checks["arm"] = [ARMS[pair] for pair in zip(checks["config.method"], bits, strict=True)]
        self.checks = checks
        self.published = read_records(RECORDS)

    def about_checks(self) -> str:
        """Errors of predicted tensor bytes, in a sentence."""
        size = self.checks["error"].abs()
        return (
            f"{len(size)} runs of {self.checks['config.model'].nunique()} models: the median error is "
            f"{size.median():.2%}, the worst {size.max():.2%}; {np.mean(size < 0.001):.0%} are within 0.1%."
        )

    def plot_checks(self) -> Figure:
        """Errors by architecture: a dot for each run."""
        order = sorted(self.checks["config.model"].unique(), key=str.lower, reverse=True)
        figure, axes = plt.subplots(figsize=(7.2, 0.24 * len(order) + 1))
        for arm, color, shift in zip(ARMS.values(), ("#949494", "#029e73", "#d55e00"), (0.22, 0, -0.22), strict=True):
            own = self.checks[self.checks["arm"] == arm]
            rows = [order.index(model) + shift for model in own["config.model"]]
            axes.plot(100 * own["error"], rows, "o", ms=4, alpha=0.6, mew=0, color=color, label=arm)
        axes.axvline(0, color="0.3", lw=1)
        axes.set_yticks(range(len(order)), order, fontsize=8)
        axes.set(xlabel="predicted against counted bytes (%)", ylim=(-0.7, len(order) - 0.3))
        axes.grid(visible=False, axis="y")
        figure.legend(loc="outside upper center", ncols=3)
        return figure

    def rows(self) -> pd.DataFrame:
        """Every published figure beside what is predicted for it."""
        rows = []
        for record in self.published:
            config, found = record["config"], record["metrics"]
            method = "full" if not config["rank"] else "QLoRA" if config["bits"] == 4 else "LoRA"
            settings = f"{'DoRA' if config['dora'] else method} r={config['rank']}" if config["rank"] else method
            settings += ", checkpointing" if config["checkpointing"] else ""
            settings += ", eager" if config["attention"] == "eager" else ""
            settings += ", double" if config["card"] and config["double_quant"] else ""
            run = {"model": config["model"], "settings": settings, "batch": f"{config['batch']}×{config['tokens']}"}
            for what in ("allocated", "reserved"):
                if config[what]:
                    there = config[what] / GIB
                    error = found[what] / config[what] - 1
                    rows.append(
                        {**run, "what": what, "published": there, "predicted": found[what] / GIB, "error": error}
                    )
            if config["fits"] is not None:
                rows.append(
                    {**run, "what": "fits" if config["fits"] else "out of memory", "predicted": found["reserved"] / GIB}
                )
                rows[-1]["card"] = config["card"] / GIB
        return pd.DataFrame(rows)

    def about_published(self) -> str:
        """Errors of published peaks, in sentences."""
        rows = self.rows()
        parts = []
        for what in ("reserved", "allocated"):
            size = rows[rows["what"] == what]["error"].abs()
            parts.append(f"of {what} memory {size.median():.1%} (median of {len(size)}; worst {size.max():.0%})")
        verdicts = rows[rows["card"].notna()]
        right = (verdicts["predicted"] < verdicts["card"]) == (verdicts["what"] == "fits")
        return (
            f"The error {' and '.join(parts)}. Of {len(verdicts)} runs that are only known to have fitted a T4 or not, "
            f"{right.sum()} are predicted rightly."
        )

    def predicted(self, model: str, tokens: int, double_quant: bool) -> float:
        """GiB that are predicted for a run of which only the outcome is known."""
        wanted = {"model": model, "tokens": tokens, "double_quant": double_quant}
        found = [r for r in self.published if r["config"]["card"] and wanted.items() <= r["config"].items()]
        return found[0]["metrics"]["reserved"] / GIB

    def plot_published(self) -> Figure:
        """Predicted over published, one dot for each figure, both axes logarithmic."""
        rows = self.rows()
        figure, axes = plt.subplots(figsize=(5.4, 5))
        ends = np.array([2, 50])
        axes.fill_between(ends, 0.9 * ends, 1.1 * ends, color="0.9", lw=0, label="within 10%")
        axes.plot(ends, ends, color="0.4", lw=1)
        for (what, color), marker in zip(COLORS.items(), "so", strict=True):
            own = rows[rows["what"] == what]
            axes.plot(own["published"], own["predicted"], marker, color=color, ms=6, alpha=0.8, mew=0, label=what)
        axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel="published (GiB)", ylabel="predicted (GiB)")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(plt.FixedLocator([2, 5, 10, 20, 50]))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_locator(plt.NullLocator())
        axes.legend(loc="upper left")
        return figure

    def table(self) -> pd.DataFrame:
        """Every published row, as text."""
        table = self.rows()
        shown = table[["model", "settings", "batch", "what"]].copy()
        shown["published"] = [
            f"{there:.2f}" if there == there else f"T4, {card:.2f}"
            for there, card in zip(table["published"], table["card"], strict=True)
        ]
        shown["predicted"] = table["predicted"].map("{:.2f}".format)
        shown["error"] = ["" if error != error else f"{error:+.0%}" for error in table["error"]]
        return shown


def plot_frames(plans: dict[str, list[Plan]]) -> Figure:
    """Memory of the process over frames, a line for each way of training, cards across."""
    figure, axes = plt.subplots(figsize=(7, 3.8))
    colors = ("#949494", "#029e73", "#d55e00", "#0173b2")
    for (label, found), color, marker in zip(plans.items(), colors, "so^D", strict=False):
        frames = [plan.settings["frames"] for plan in found]
        axes.plot(frames, [plan.process / GIB for plan in found], marker + "-", color=color, label=label)
    cards = {plan.settings["gpu"]: plan.limit / GIB for found in plans.values() for plan in found}
    for name, limit in cards.items():
        axes.axhline(limit, color="0.3", ls="--", lw=1)
        axes.text(1, limit, f"{name} ", va="bottom", fontsize=9, color="0.3")
    frames = sorted({plan.settings["frames"] for found in plans.values() for plan in found})
    axes.set(xscale="log", yscale="log", xlabel="frames", ylabel="memory of the process (GiB)")
    axes.set_xticks(frames, [str(number) for number in frames])
    axes.yaxis.set_major_locator(plt.FixedLocator([1, 2, 5, 10, 20, 50, 100]))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.legend(fontsize=9)
    return figure
