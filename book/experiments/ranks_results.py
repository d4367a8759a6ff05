"""What the records of *Ranks* say: the tables, figures and sentences of the chapter read from here."""

from __future__ import annotations

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from experiments.ranks import RECORDS, TASKS
from mmqlora.ranks import Ranks
from mmqlora.records import as_table, read_records

COLORS = {"gradient": "#0173b2", "whitened": "#d55e00", "variance": "#949494"}
LABELS = {"gradient": "gradient", "whitened": "whitened gradient", "variance": "variance of inputs (EVA)"}


class Results:
    """The records, and what follows from them."""

    def __init__(self) -> None:
        self.records = read_records(RECORDS / "ranks_shares.jsonl")
        self.cost = read_records(RECORDS / "ranks_cost.jsonl")[0]

    def shares(self) -> pd.DataFrame:
        """Share of the parameters by task, seed, method, budget and region, in long form."""
        table = as_table([r for r in self.records if r["config"]["batches"] > 1])
        columns = [name for name in table if name.startswith("metrics.") and name != "metrics.loss"]
        long = table.melt(["config.task", "seed"], columns, "name", "share").dropna()
        long[["method", "budget", "region"]] = long["name"].str.removeprefix("metrics.").str.split(" ", expand=True)
        long["budget"] = long["budget"].astype(int)
        return long.rename(columns={"config.task": "task"}).drop(columns="name")

    def plot_shares(self, budget: int = 2) -> Figure:
        """Share of the tower that sees or hears, by task: a dot a seed, a line at uniform ranks."""
        long = self.shares().query("budget == @budget")
        heights = [len(tasks) for tasks in TASKS.values()]
        figure, panels = plt.subplots(3, 1, figsize=(7.2, 1.2 + 0.55 * sum(heights)), height_ratios=heights)
        for axes, (model, tasks) in zip(panels, TASKS.items(), strict=True):
            tower = "audio" if model == "audio" else "vision"
            own = long[(long["region"] == tower) & long["task"].isin(tasks)]
            axes.axvline(own[own["method"] == "uniform"]["share"].mean(), color="0.3", ls="--", lw=1, label="uniform")
            for index, task in enumerate(tasks):
                for number, (method, color) in enumerate(COLORS.items()):
                    values = own[(own["task"] == task) & (own["method"] == method)]["share"]
                    y = index + 0.22 * (number - 1)
                    axes.plot(values, np.full(len(values), y), "o", color=color, ms=4, alpha=0.6, mew=0)
                    label = LABELS[method] if index == 0 else None
                    axes.plot([values.mean()] * 2, [y - 0.1, y + 0.1], color=color, lw=3, label=label)
            axes.set_yticks(range(len(tasks)), [task.split("/")[1] for task in tasks])
            axes.set(title=model, xlim=(0, 1), ylim=(len(tasks) - 0.5, -0.5))
            axes.grid(visible=False, axis="y")
            axes.set_xlabel(f"share of the {tower} tower")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9)
        return figure

    def share(self, task: str, method: str, region: str, budget: int = 2) -> float:
        """Mean over seeds."""
        found = self.shares().query("task == @task and method == @method and region == @region and budget == @budget")
        return float(found["share"].mean())

    def table(self) -> pd.DataFrame:
        """Share of the tower that sees or hears by the gradient, by task and budget, beside that of uniform ranks."""
        long = self.shares()
        long = long[
            (long["region"] == "audio") | ((long["region"] == "vision") & ~long["task"].str.startswith("audio"))
        ]
        means = long.pivot_table("share", "task", ["method", "budget"])
        table = means["gradient"].add_prefix("budget ")
        table["uniform"] = means["uniform"].mean(axis=1)
        return table.rename_axis(columns=None).loc[list(itertools.chain(*TASKS.values()))]

    def stability(self) -> pd.DataFrame:
        """Spearman's correlation of the Linears' expected gains from other items: of four batches, and of one and four.

        No two share an item.
        """
        gains = {(r["config"]["task"], r["config"]["batches"], r["seed"]): r["items"]["gain"] for r in self.records}
        rows = []
        for task in itertools.chain(*TASKS.values()):
            one, four = (
                {seed: gain for (name, batches, seed), gain in gains.items() if (name, batches) == (task, count)}
                for count in (1, 4)
            )
            pairs = [spearmanr(a, b).statistic for a, b in itertools.combinations(four.values(), 2)]
            few = [spearmanr(one[a], four[b]).statistic for a, b in itertools.permutations(four, 2)]
            rows.append({"task": task, "four batches": np.mean(pairs), "one batch and four": np.mean(few)})
        return pd.DataFrame(rows).set_index("task")


def plot_budget(ranks: dict[str, Ranks]) -> Figure:
    """Shares of regions as the budget grows, from the ranks that each budget bought."""
    table = pd.DataFrame({label: own.by_region()["parameters"] for label, own in ranks.items()}).T / 1e3
    from mmqlora.plots import REGION_COLORS

    axes = table.plot.bar(stacked=True, color=[REGION_COLORS[name] for name in table], figsize=(7.2, 3.6), rot=0)
    axes.set(xlabel="budget (MB)", ylabel="trained parameters (thousands)")
    return axes.figure
