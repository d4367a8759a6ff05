"""What the records of *Temporal adapters* say: the tables, figures and sentences of the chapter read from here."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments.baselines import PRIMARY, RECORDS
from experiments.baselines_results import PLAIN
from experiments.temporal import ARMS, CONTROL, SEEDS, TIMING
from experiments.temporal_mechanism import EARLY
from mmqlora.comparisons import Comparison, compare
from mmqlora.records import as_table, read_records

MARGIN = 0.01  # of the primary score: within it the control counts as equal
AIM = 0.05  # of the primary score: what a gain on timing tasks was to be, fixed before any run
KINDS = {"content": "#d55e00", "time": "#0173b2", "shuffled": "#949494", "constant": "#029e73"}


class Results:
    """The records, and what follows from them."""

    def __init__(self) -> None:
        self.records = read_records(RECORDS / "temporal.jsonl")
        self.mechanism = as_table(read_records(RECORDS / "temporal_mechanism.jsonl"))
        self.costs = as_table(read_records(RECORDS / "temporal_cost.jsonl"))
        self.signals = as_table(read_records(RECORDS / "signals_cost.jsonl"))
        self.tasks = [t for t in (*TIMING, *CONTROL) if any(r["config"]["task"] == t for r in self.records)]

    def of(self, task: str, arm: str | None = None) -> list[dict]:
        """Records of a task, by arm."""
        return [r for r in self.records if r["config"]["task"] == task and arm in (None, r["config"]["arm"])]

    def compare(self, task: str, measure: str | None = None) -> Comparison:
        """Every arm that has all its seeds against plain QLoRA, paired by seed and item."""
        order = list(ARMS)
        whole = {arm for arm in ARMS if len(self.of(task, arm)) == len(SEEDS)}
        records = [r for r in self.of(task) if r["config"]["arm"] in whole]
        records.sort(key=lambda r: order.index(r["config"]["arm"]))
        metric = measure or PRIMARY[task.split("/")[0]]
        return compare(records, "plain", by="config.arm", metric=metric, margin=MARGIN)

    def gain(self, task: str, arm: str = "gate", measure: str | None = None) -> str:
        """A difference in points with its interval, in words."""
        table = self.compare(task, measure).table.set_index("arm")
        row = 100 * table.loc[arm, ["difference", "low", "high"]].astype(float)
        return f"{row.difference:+.1f} points ({row.low:+.1f} to {row.high:+.1f})"

    def full(self, task: str) -> float:
        """Primary score of full fine-tuning in 16 bits, one seed."""
        shifts = read_records(RECORDS / "shifts.jsonl")
        found = [r for r in shifts if (r["config"]["task"], r["config"]["method"]) == (task, "full")]
        return found[0]["metrics"][PRIMARY[task.split("/")[0]]]

    def table(self, task: str) -> pd.DataFrame:
        """Means over seeds, by arm."""
        names = {"score": PRIMARY[task.split("/")[0]], "plain measure": PLAIN[task.split("/")[0]]}
        rows = []
        for arm in ARMS:
            if len(runs := self.of(task, arm)) == len(SEEDS):
                means = {name: np.mean([r["metrics"][key] for r in runs]) for name, key in names.items()}
                rate, trained = runs[0]["config"]["learning_rate"], runs[0]["parameters"]["trainable"]
                rows.append({"arm": arm, **means, "parameters": trained, "learning rate": rate, "seeds": len(runs)})
        return pd.DataFrame(rows).rename(columns=names)

    def pulls(self) -> pd.DataFrame:
        """The mechanism in long form: one row a task, time of training, region, measure, kind of signal and seed."""
        columns = [name for name in self.mechanism if name.startswith("metrics.")]
        long = self.mechanism.melt(["config.task", "config.steps", "seed"], columns, "name", "value").dropna()
        long[["region", "measure", "kind"]] = long["name"].str.removeprefix("metrics.").str.split(" ", expand=True)
        long["training"] = np.where(long["config.steps"] == EARLY, "early", "at the end")
        return long.rename(columns={"config.task": "task"}).drop(columns=["name", "config.steps"])

    def plot_mechanism(self, training: str = "early") -> Figure:
        """Agreement of the two halves, by task and region; a dot a seed, a bar at the mean."""
        long = self.pulls()
        long = long[(long["measure"] == "cosine") & (long["training"] == training)]
        models = list(dict.fromkeys(task.split("/")[0] for task in long["task"]))
        rows = {model: long[long["task"].str.startswith(model)] for model in models}
        places = {
            model: list(dict.fromkeys(zip(own["task"], own["region"], strict=True))) for model, own in rows.items()
        }
        heights = [len(place) for place in places.values()]
        figure, panels = plt.subplots(len(models), 1, figsize=(7.2, 1.2 + 0.42 * sum(heights)), height_ratios=heights)
        for axes, model in zip(np.atleast_1d(panels), models, strict=True):
            for index, (task, region) in enumerate(places[model]):
                own = rows[model][(rows[model]["task"] == task) & (rows[model]["region"] == region)]
                for number, (kind, color) in enumerate(KINDS.items()):
                    values = own[own["kind"] == kind]["value"]
                    y = index + 0.19 * (number - 1.5)
                    axes.plot(values, np.full(len(values), y), "o", color=color, ms=3.5, alpha=0.6, mew=0)
                    label = kind if index == 0 else None
                    axes.plot([values.mean()] * 2, [y - 0.09, y + 0.09], color=color, lw=3, label=label)
            names = [f"{task.split('/')[1]}, {region}" for task, region in places[model]]
            axes.set_yticks(range(len(names)), names)
            axes.set(title=model, xlim=(-0.6, 1.02), ylim=(len(names) - 0.5, -0.5))
            axes.axvline(0, color="0.4", lw=1)
            axes.grid(visible=False, axis="y")
        axes.set_xlabel("cosine between the pulls of two halves of the clips")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
        return figure


def conformance() -> pd.DataFrame:
    """The recorded test run: a row an architecture, a column a property; a check mark, or why it does not apply."""
    rows = {r["config"]["architecture"]: r["outcome"] for r in read_records(RECORDS / "conformance.jsonl")}
    return pd.DataFrame(rows).T.replace("yes", "✓")


def gate_strip(table: pd.DataFrame, item: int, steps: int) -> np.ndarray:
    """Mean gate of each layer (rows) over the steps of one clip, from `mmqlora.gates.explain`: (layers, steps)."""
    own = table[(table["item"] == item) & (table["step"] < steps)]
    return own.pivot_table("gate", "layer", "step", sort=False).to_numpy()
