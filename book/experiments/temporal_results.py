"""What the records of *Temporal adapters* say: the tables, figures and sentences of the chapter read from here."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments.ablations import SPEECH, primary
from experiments.baselines import RECORDS
from experiments.baselines_results import PLAIN, nothing
from experiments.temporal import ARMS, CONTROL, SEEDS, TIMING
from mmqlora.comparisons import Comparison, compare
from mmqlora.records import as_table, read_records

MARGIN = 0.01  # of the primary score: within it the control counts as equal
AIM = 0.05  # of the primary score: what a gain on timing tasks was to be, fixed before any run
KINDS = {"content": "#d55e00", "time": "#0173b2", "shuffled": "#949494", "constant": "#029e73"}


class Results:
    """The records, and what follows from them."""

    def __init__(self) -> None:
        self.records = read_records(RECORDS / "temporal.jsonl")
        speech = RECORDS / "temporal_speech.jsonl"
        for record in read_records(speech) if speech.exists() else []:
            self.records.append({**record, "config": {**record["config"], "task": SPEECH}})
        self.mechanism = as_table(read_records(RECORDS / "temporal_mechanism.jsonl"))
        self.costs = as_table(read_records(RECORDS / "temporal_cost.jsonl"))
        self.signals = as_table(read_records(RECORDS / "signals_cost.jsonl"))
        # A task counts once plain QLoRA and something to compare with it have all their seeds.
        self.tasks = [t for t in (*TIMING, *CONTROL, SPEECH) if self.whole(t) > {"plain"}]

    def of(self, task: str, arm: str | None = None) -> list[dict]:
        """Records of a task, by arm."""
        return [r for r in self.records if r["config"]["task"] == task and arm in (None, r["config"]["arm"])]

    def whole(self, task: str) -> set[str]:
        """The arms that have all their seeds."""
        return {arm for arm in ARMS if len(self.of(task, arm)) == len(SEEDS)}

    def compare(self, task: str, measure: str | None = None) -> Comparison:
        """Every arm that has all its seeds against plain QLoRA, paired by seed and item."""
        order, whole = list(ARMS), self.whole(task)
        records = [r for r in self.of(task) if r["config"]["arm"] in whole]
        records.sort(key=lambda r: order.index(r["config"]["arm"]))
        metric = measure or primary(task)
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
        return found[0]["metrics"][primary(task)]

    def table(self, task: str) -> pd.DataFrame:
        """Means over seeds, by arm: of the primary score and, where there is one, of the stricter one."""
        measures = {"score": primary(task)}
        if strict := PLAIN.get(task.split("/")[0]):
            measures["strict score"] = strict
        rows = []
        for arm in ARMS:
            if arm in self.whole(task):
                runs = self.of(task, arm)
                means = {name: np.mean([r["metrics"][measure] for r in runs]) for name, measure in measures.items()}
                rate, trained = runs[0]["config"]["learning_rate"], runs[0]["parameters"]["trainable"]
                rows.append({"arm": arm, **means, "parameters": trained, "learning rate": rate, "seeds": len(runs)})
        return pd.DataFrame(rows)

    def plot_others(self) -> Figure:
        """The tasks beside those of the claim: every arm against plain QLoRA, a panel a task."""
        tasks = [task for task in self.tasks if task not in (TIMING[0], *CONTROL)]
        if not tasks:
            return nothing()
        found = [self.compare(task) for task in tasks]
        heights = [len(comparison.table) for comparison in found]
        figure, panels = plt.subplots(
            len(tasks), 1, figsize=(7.2, 0.8 + 0.45 * sum(heights)), height_ratios=heights, squeeze=False
        )
        for axes, comparison, task in zip(panels[:, 0], found, tasks, strict=True):
            comparison.plot(axes).set_title(task)
        return figure

    def pulls(self) -> pd.DataFrame:
        """The mechanism in long form: one row a task, region, measure, kind of signal and seed."""
        columns = [name for name in self.mechanism if name.startswith("metrics.")]
        long = self.mechanism.melt(["config.task", "seed"], columns, "name", "value").dropna()
        long[["region", "measure", "kind"]] = long["name"].str.removeprefix("metrics.").str.split(" ", expand=True)
        return long.rename(columns={"config.task": "task"}).drop(columns="name")

    def explained(self) -> pd.DataFrame:
        """Held-out R² of single gradients, by task and region (rows) and kind of signal: means over seeds."""
        own = self.pulls().query("measure == 'R2'")
        return own.pivot_table("value", ["task", "region"], "kind")[["content", "shuffled", "time", "both"]]

    def plot_mechanism(self) -> Figure:
        """Agreement of the two halves, by task and region; a dot a seed, a bar at the mean."""
        long = self.pulls()
        long = long[long["measure"] == "cosine"]
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


def pefts_own() -> str:
    """What PEFT's tests of custom models gave, in a sentence."""
    runs = {r["config"]["run"]: r for r in read_records(RECORDS / "peft_suite.jsonl")}
    worse, opened = (runs[name]["worse_than_lora"] for name in ("gates", "open"))
    why = ", ".join(f"{reason} ({len(tests)})" for reason, tests in worse.items())
    total, count, more = sum(runs["lora"]["counts"].values()), *(sum(map(len, own.values())) for own in (worse, opened))
    return (
        f"Of PEFT's own {total:,} tests of LoRA on custom models, {count} pass with LoRA and fail with gates: {why}. "
        f"With gates that are open from the start it is {more}, of which {len(opened['merging open gates'])} merge."
    )


def gate_strip(table: pd.DataFrame, item: int, steps: int) -> np.ndarray:
    """Mean gate of each layer (rows) over the steps of one clip, from `mmqlora.gates.explain`: (layers, steps)."""
    own = table[(table["item"] == item) & (table["step"] < steps)]
    return own.pivot_table("gate", "layer", "step", sort=False).to_numpy()
