"""What the records of *Baselines* say: the tables, figures and sentences of the chapter read from here."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments.baselines import MAIN, PRIMARY, RATES, RECORDS, best_rate
from mmqlora import methods, plots
from mmqlora.comparisons import Comparison, compare
from mmqlora.records import read_records

PLAIN = {"video": "exact_match", "audio": "exact_match", "retrieval": "recall_at_1"}
MARGIN = 0.02  # of the primary score: within it two methods count as equal
FAMILIES = {
    "full": ["full", "head", "ln-tuning"],
    "low rank": ["lora", "rslora", "dora", "adalora", "eva", "pissa", "vera"],
    "factors and rotations": ["ia3", "oft", "boft"],
    "new modules": ["adapter", "prefix", "prompt", "p-tuning"],
}
FAMILY = {method: family for family, members in FAMILIES.items() for method in members}
COLORS = dict(zip(FAMILIES, ("#0173b2", "#d55e00", "#029e73", "#cc78bc"), strict=True))


class Results:
    """The records, and what follows from them."""

    def __init__(self) -> None:
        self.records = read_records(RECORDS / "baselines.jsonl")
        self.memory = read_records(RECORDS / "baselines_memory.jsonl")
        self.tasks = [task for task in MAIN if any(r["config"]["task"] == task for r in self.records)]

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
        """Seeds that every arm of a task has."""
        counts = pd.Series(
            [(r["config"]["method"], r["config"]["bits"]) for r in self.of(task) if r["config"]["method"] != "none"]
        )
        return int(counts.value_counts().min()) if len(counts) else 0

    def table(self, task: str) -> pd.DataFrame:
        """One row a method and bits: scores, share of the gap closed, parameters, time, memory."""
        primary, plain = (names[task.split("/")[0]] for names in (PRIMARY, PLAIN))
        start = {bits: self.of(task, "none", bits)[0]["metrics"] for bits in (16, 4)}
        full = np.mean([r["metrics"][primary] for r in self.of(task, "full", 16)])
        lora = np.mean([r["cpu_s"] for r in self.of(task, "lora", 16)])
        peaks = {
            (r["config"]["method"], r["config"]["bits"]): r["peak_bytes"] - r["start_bytes"]
            for r in self.memory
            if r["config"]["task"] == task
        }
        rows = []
        for method in RATES:
            for bits in (16, 4):
                runs = self.of(task, method, bits)
                if not runs:
                    continue
                score = np.array([r["metrics"][primary] for r in runs])
                rows.append(
                    {
                        "method": method,
                        "bits": bits,
                        primary: score.mean(),
                        "sd": score.std(ddof=1) if len(score) > 1 else np.nan,
                        plain: np.mean([r["metrics"][plain] for r in runs]),
                        "recovered": (score.mean() - start[16][primary]) / (full - start[16][primary]),
                        "parameters": runs[0]["parameters"]["trainable"],
                        "time": np.mean([r["cpu_s"] for r in runs]) / lora,
                        "peak_mb": peaks.get((method, bits), np.nan) / 1e6,
                        "learning rate": best_rate(task, method),
                        "seeds": len(runs),
                    }
                )
        return pd.DataFrame(rows)

    def against_lora(self, task: str, bits: int = 4) -> Comparison:
        """Every method against LoRA, paired by seed and item."""
        return self._compare(self.of(task, bits=bits), task, "lora", "config.method")

    def four_bits(self, task: str) -> pd.DataFrame:
        """Every method at 4 bits against itself at 16: one row each, corrected for all of them."""
        rows = []
        for method in RATES:
            runs = self.of(task, method)
            if {r["config"]["bits"] for r in runs} == {4, 16}:
                row = self._compare(runs, task, 16, "config.bits").table.iloc[0]
                rows.append({"method": method, **row.drop("arm")})
        return pd.DataFrame(rows)

    def _compare(self, records: list[dict], task: str, baseline: object, by: str) -> Comparison:
        metric = PRIMARY[task.split("/")[0]]
        records = [r for r in records if r["config"]["method"] != "none"]
        return compare(records, baseline, by=by, metric=metric, margin=MARGIN)

    def plot(self) -> Figure:
        """Score against trainable parameters, one panel a task; filled at 4 bits, open at 16."""
        figure, panels = plt.subplots(len(self.tasks), 1, figsize=(7.5, 3.9 * len(self.tasks)), squeeze=False)
        for axes, task in zip(panels[:, 0], self.tasks, strict=True):
            primary = PRIMARY[task.split("/")[0]]
            table = self.table(task)
            for row in table.itertuples():
                color = COLORS[FAMILY[row.method]]
                face = color if row.bits == 4 else "white"
                axes.scatter(row.parameters, getattr(row, primary), s=48, color=face, edgecolor=color, zorder=3)
            for method, group in table.groupby("method"):
                top = group.sort_values(primary).iloc[-1]
                axes.annotate(method, (top.parameters, top[primary]), (4, 4), textcoords="offset points", fontsize=8)
            front = pareto(table, primary)
            axes.step(front["parameters"], front[primary], where="post", color="0.6", lw=1.5, zorder=1)
            zero = self.of(task, "none", 16)[0]["metrics"][primary]
            axes.axhline(zero, color=plots.ARM_COLORS["zero-shot"], ls="--", lw=1)
            axes.set(xscale="log", title=task, ylabel=primary.replace("_", " "))
        panels[-1, 0].set_xlabel("trainable parameters")
        for family, color in COLORS.items():
            panels[0, 0].scatter([], [], color=color, label=family)
        panels[0, 0].legend(loc="lower right", fontsize=8)
        return figure


def pareto(table: pd.DataFrame, score: str, cost: str = "parameters") -> pd.DataFrame:
    """The rows that no other beats at a lower or equal cost, by cost."""
    table = table.sort_values([cost, score], ascending=[True, False])
    return table[table[score] > table[score].cummax().shift(fill_value=-np.inf)]


def supported(model: object) -> pd.DataFrame:
    """Which methods fit a model at 16 and at 4 bits, and why not."""
    rows = [
        (name, *(methods.why_not(model, name, quant_type) or "yes" for quant_type in (None, "nf4"))) for name in RATES
    ]
    return pd.DataFrame(rows, columns=["method", "16 bits", "4 bits"])
