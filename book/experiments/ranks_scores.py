"""What the grid of *Ranks* says: whether scores follow the ranks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments.ablations import SPEECH, primary
from experiments.baselines_results import MARGIN, PLAIN, nothing
from experiments.ranks import ARMS, BUDGETS, EVERY, MAIN, RECORDS, SCORED, SEEDS, TASKS, cells
from mmqlora.comparisons import Comparison, compare
from mmqlora.records import read_records

PANELS = {model: TASKS[model] for model in SCORED} | {"Whisper": (SPEECH,)}
SHIFTS = {"tower": "#0173b2", "words": "#d55e00", "both": "#029e73", "none": "#949494"}  # what a task has changed
OURS = "gradient, spectral start"
RIVALS = ("uniform", "EVA", "AdaLoRA")
AIM = {"exact_match": 0.03, "loss": 0.025}  # over the best rival at the smallest budget; fixed before any run
UNCHANGED = ("video/none", "audio/none")
ONE_SIDED = ("video/palette", "video/words 0.5", "audio/timbre", "audio/words")


class Scores:
    """What the runs of the grid say: whether scores follow the ranks.

    Args:
        records: of the experiment; the default reads those of the book, of which there may be none yet.
    """

    def __init__(self, records: Sequence[dict[str, Any]] | None = None) -> None:
        if records is None:
            paths = (RECORDS / "ranks.jsonl", RECORDS / "ranks_speech.jsonl")
            records = [record for path in paths if path.exists() for record in read_records(path)]
        self.found, self.wanted = len(records), (len(cells()) + len(MAIN)) * len(SEEDS)
        runs: dict[tuple[str, int], dict[str, dict[int, dict[str, Any]]]] = {}
        for record in records:
            task, config = record["config"].get("task", SPEECH), record["config"]
            runs.setdefault((task, config["budget"]), {}).setdefault(config["arm"], {})[record["seed"]] = record
        # An arm counts once it has all its seeds, and a task once there is something to compare with.
        self.cells = {
            cell: {arm: [own[arm][seed] for seed in SEEDS] for arm in ARMS if set(SEEDS) <= own.get(arm, {}).keys()}
            for cell, own in runs.items()
        }
        self.cells = {cell: own for cell, own in self.cells.items() if "uniform" in own and len(own) > 1}

    @property
    def tasks(self) -> list[str]:
        """Those that have arms to compare at the smallest budget."""
        return [task for task in itertools.chain(*PANELS.values()) if (task, BUDGETS[0]) in self.cells]

    def progress(self) -> str:
        """What is there, in a sentence."""
        if self.found >= self.wanted:
            return f"All {self.wanted} runs are there."
        whole = sum(map(len, self.cells.values()))
        return (
            f"**This experiment is not finished**: {self.found} of {self.wanted} runs are there, and {whole} of its "
            f"{self.wanted // len(SEEDS)} cells have {len(SEEDS)} seeds; the others are not shown."
        )

    def said(self) -> str:
        """Whether scores follow, in a sentence, on the tasks that have the arms of the aim."""
        exact = self.aim().query("measure == 'exact_match'")
        if exact.empty:
            return "**Whether scores follow is not known yet**: no task has six seeds of all that it is compared with."
        tasks = []
        for row in exact.to_dict("records"):
            over = dict.fromkeys(("uniform", row["best of the others"]))
            found = [(rival, self.versus(row["task"], OURS, rival, "exact_match")) for rival in over]
            gains = " and ".join(f"{_points(each)} over {rival}" for rival, each in found)
            tasks.append(f"on *{row['task']}* {gains}")
        return (
            "Ranks by gradient with a start along it gain, at the smallest budget and in points of exact match, over "
            f"uniform ranks and over the best of these, EVA and AdaLoRA: {'; '.join(tasks)}."
        )

    def versus(self, task: str, arm: str, other: str, measure: str = "") -> pd.Series:
        """One arm against another at the smallest budget, paired by seed and item: a row of `compare`."""
        own = self.cells[task, BUDGETS[0]]
        options = {"metric": measure or primary(task), "margin": MARGIN, "higher_is_better": measure != "loss"}
        return compare([*own[arm], *own[other]], other, by="config.arm", **options).table.iloc[0]

    def against_uniform(self, task: str, budget: int = BUDGETS[0]) -> Comparison:
        """Every arm against uniform ranks with a random start."""
        records = list(itertools.chain(*self.cells[task, budget].values()))
        return compare(records, "uniform", by="config.arm", metric=primary(task), margin=MARGIN)

    def table(self, task: str = EVERY, budget: int = BUDGETS[0]) -> pd.DataFrame:
        """One row an arm: scores, share of the region that the task has changed, rate, and verdict against uniform."""
        rows = {}
        plain = PLAIN[task.split("/")[0]]
        verdicts = self.against_uniform(task, budget).table.set_index("arm")["verdict"].to_dict()
        for arm, runs in self.cells[task, budget].items():
            rows[arm] = {
                measure.replace("_", " "): np.mean([run["metrics"][measure] for run in runs])
                for measure in dict.fromkeys((primary(task), plain, "loss"))
                if measure in runs[0]["metrics"]
            }
            rows[arm] |= {
                f"share of {_changed(task)}": _share(task, runs),
                "learning rate": runs[0]["config"]["learning_rate"],
                "against uniform": verdicts.get(arm, ""),
            }
        return pd.DataFrame(rows.values(), list(rows))

    def over_budgets(self) -> pd.DataFrame:
        """In points: what every arm gains over uniform ranks on the task of all budgets, a column a budget."""
        columns = {}
        for budget in BUDGETS:
            if (EVERY, budget) in self.cells:
                rows = self.against_uniform(EVERY, budget).table.set_index("arm")
                columns[f"budget {budget}"] = {arm: _points(row) for arm, row in rows.iterrows()}
        arms = [arm for arm in ARMS if any(arm in found for found in columns.values())]
        return pd.DataFrame(columns, arms).fillna("")

    def crossed(self) -> pd.DataFrame:
        """In points: what ranks bring over uniform ones with the same start, a start over a random one, and both."""
        pairs = {
            f"{what}, {on}": (arm, other)
            for ranks in ("gradient", "whitened")
            for what, on, arm, other in (
                (f"{ranks} ranks", "random start", ranks, "uniform"),
                (f"{ranks} ranks", "spectral start", f"{ranks}, spectral start", "uniform, spectral start"),
                ("spectral start", "uniform ranks", "uniform, spectral start", "uniform"),
                ("spectral start", f"{ranks} ranks", f"{ranks}, spectral start", ranks),
                (f"{ranks} ranks and spectral start", "over neither", f"{ranks}, spectral start", "uniform"),
            )
        }
        table = pd.DataFrame(index=list(pairs))
        for task in self.tasks:
            own = self.cells[task, BUDGETS[0]]
            table[task] = [
                _points(self.versus(task, *pair)) if {*pair} <= own.keys() else "" for pair in pairs.values()
            ]
        return table

    def aim(self) -> pd.DataFrame:
        """Ranks and start together against all rivals, a row a one-sided task and measure: the least gain, over whom.

        The aim is reached if the gain over each of them is large enough and its interval above zero.
        """
        rows = []
        for task in ONE_SIDED:
            if not {OURS, *RIVALS} <= self.cells.get((task, BUDGETS[0]), {}).keys():
                continue
            for measure, least in AIM.items():
                sign = -1 if measure == "loss" else 1
                found = {rival: self.versus(task, OURS, rival, measure) for rival in RIVALS}
                gains = {rival: sign * float(row["difference"]) for rival, row in found.items()}
                lows = {rival: min(sign * row[["low", "high"]].astype(float)) for rival, row in found.items()}
                best = min(gains, key=gains.get)
                ends = sorted(sign * found[best][["low", "high"]].astype(float))
                reached = min(gains.values()) >= least and min(lows.values()) > 0
                rows.append([task, measure, best, gains[best], *ends, least, "yes" if reached else "no"])
        columns = ["task", "measure", "best of the others", "gain", "low", "high", "aim", "reached"]
        return pd.DataFrame(rows, columns=columns)

    def aimed(self) -> pd.DataFrame:
        """The rows of `aim` for reading: exact match in points, loss in nats."""
        rows = []
        for row in self.aim().to_dict("records"):
            name, unit, digits = ("loss (nats)", 1, 3) if row["measure"] == "loss" else ("exact match (points)", 100, 1)
            gain, low, high = (f"{unit * row[end]:+.{digits}f}" for end in ("gain", "low", "high"))
            aim = f"{unit * row['aim']:g}"
            rows.append(
                [row["task"], name, row["best of the others"], f"{gain} ({low} to {high})", aim, row["reached"]]
            )
        return pd.DataFrame(rows, columns=["task", "measure", "best of the others", "gain", "aim", "reached"])

    def control(self) -> str:
        """Ranks and start together against uniform ranks where the aim is no difference, in a sentence."""
        found = []
        for task, budget in [*((task, BUDGETS[0]) for task in UNCHANGED), (EVERY, BUDGETS[-1])]:
            if OURS in self.cells.get((task, budget), {}):
                row = self.against_uniform(task, budget).table.set_index("arm").loc[OURS]
                found.append(f"on *{task}* with as many parameters as rank {budget} {_points(row)}: {row['verdict']}")
        return (
            "Where nothing has changed, and at the largest budget, the aim is no difference from uniform ranks; in "
            f"points of {primary(EVERY).replace('_', ' ')}, {'; '.join(found) or 'no run of these is there yet'}."
        )

    def plot(self) -> Figure:
        """What every main arm gains over uniform ranks and a random start: a panel a model, a color a kind of shift."""
        models = [model for model, tasks in PANELS.items() if set(tasks) & set(self.tasks)]
        if not models:
            return nothing()
        arms = [arm for arm in MAIN if arm != "uniform"]
        figure, panels = plt.subplots(len(models), 1, figsize=(7.2, 0.8 + 2.9 * len(models)), squeeze=False)
        for axes, model in zip(panels[:, 0], models, strict=True):
            tasks = [task for task in PANELS[model] if task in self.tasks]
            axes.axvspan(-100 * MARGIN, 100 * MARGIN, color="0.93", zorder=0)
            axes.axvline(0, color="0.4", lw=1)
            for number, task in enumerate(tasks):
                color = SHIFTS[_kind(task)]
                for row in self.against_uniform(task).table.itertuples():
                    if row.arm in arms:
                        y = arms.index(row.arm) + 0.18 * (number - (len(tasks) - 1) / 2)
                        seeds = 100 * (self._means(task, row.arm) - self._means(task, "uniform"))
                        axes.plot(seeds, np.full(len(seeds), y), "o", color=color, ms=3.5, alpha=0.5, mew=0)
                        axes.hlines(y, 100 * row.low, 100 * row.high, color=color, lw=2)
                        axes.plot(100 * row.difference, y, "D", color=color, ms=5)
            axes.set_yticks(range(len(arms)), arms)
            axes.set(title=model, ylim=(len(arms) - 0.5, -0.5))
            axes.grid(visible=False, axis="y")
        axes.set_xlabel("points over uniform ranks with a random start")
        for name, color in SHIFTS.items():
            panels[0, 0].plot([], [], "D", color=color, ms=5, label=f"changed: {name}")
        figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9)
        return figure

    def _means(self, task: str, arm: str) -> np.ndarray:
        """Primary score of each seed at the smallest budget."""
        return np.array([run["metrics"][primary(task)] for run in self.cells[task, BUDGETS[0]][arm]])

    def plot_shares(self) -> Figure:
        """Score over the share of the region that was changed: a dot an arm, its mean over seeds."""
        tasks = [task for task in ONE_SIDED if task in self.tasks]
        if not tasks:
            return nothing()
        rows = math.ceil(len(tasks) / 2)
        figure, panels = plt.subplots(rows, 2, figsize=(7.2, 3.2 * rows))
        for axes in panels.flat[len(tasks) :]:
            axes.set_axis_off()
        for axes, task in zip(panels.flat, tasks, strict=False):
            for arm, runs in self.cells[task, BUDGETS[0]].items():
                score = np.mean([run["metrics"][primary(task)] for run in runs])
                color, marker = ("#d55e00", "D") if ARMS[arm][1] == "spectral" else ("#0173b2", "o")
                axes.plot(_share(task, runs), score, marker, color=color, ms=6)
            axes.set(title=task, xlabel=f"share of {_changed(task)}", ylabel=primary(task).replace("_", " "))
        return figure

    def plot_budgets(self) -> Figure:
        """Score over the budget on the task on which every arm runs: main arms in color, the others gray."""
        budgets = [budget for budget in BUDGETS if (EVERY, budget) in self.cells]
        if len(budgets) < 2:
            return nothing()
        figure, axes = plt.subplots(figsize=(7.2, 4.6))
        colors = dict(zip(MAIN, plt.rcParams["axes.prop_cycle"].by_key()["color"], strict=False)) | {"AdaLoRA": "0.1"}
        for arm in sorted(ARMS, key=lambda arm: arm in MAIN):
            means = {
                budget: np.mean([run["metrics"][primary(EVERY)] for run in self.cells[EVERY, budget][arm]])
                for budget in budgets
                if arm in self.cells[EVERY, budget]
            }
            axes.plot(
                [*means], [*means.values()], "o-", color=colors.get(arm, "0.85"), label=arm if arm in MAIN else None
            )
        if any(arm not in MAIN for budget in budgets for arm in self.cells[EVERY, budget]):
            axes.plot([], [], "o-", color="0.85", label="controls")
        axes.set(
            xscale="log",
            xlabel="budget: as many parameters as uniform ranks of",
            ylabel=primary(EVERY).replace("_", " "),
        )
        axes.set_xticks(budgets, budgets)
        axes.minorticks_off()
        figure.legend(loc="outside lower center", ncols=2, fontsize=9)
        return figure


def _kind(task: str) -> str:
    """What a task has changed."""
    shift = task.split("/")[1]
    if "+" in shift or task == SPEECH:
        return "both"
    return "none" if shift == "none" else "words" if "words" in shift else "tower"


def _changed(task: str) -> str:
    """The region that a task has changed; the tower, where it is both or none."""
    return "text" if _kind(task) == "words" else "audio" if task.startswith("audio") else "vision"


def _share(task: str, runs: Sequence[dict[str, Any]]) -> float:
    """Of the parameters, in the region that the task has changed; AdaLoRA's are those that it has not pruned."""
    return float(np.mean([run["metrics"].get(f"share {_changed(task)}", np.nan) for run in runs]))


def _points(row: pd.Series) -> str:
    return f"{100 * row['difference']:+.1f} ({100 * row['low']:+.1f} to {100 * row['high']:+.1f})"
