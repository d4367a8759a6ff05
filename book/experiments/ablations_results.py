"""What the records of *Ablations* say: the tables, figures and sentences of the chapter read from here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import t as student

from experiments.ablations import (
    ABLATIONS,
    CROSSINGS,
    SEEDS,
    Config,
    center,
    lent,
    levels,
    primary,
    rate,
    recorded,
    score,
    tried,
    tuned_as,
)
from experiments.baselines_results import nothing
from mmqlora.comparisons import Comparison, compare
from mmqlora.errors import RecordError

MARGIN = 0.02  # of the primary score, as in *Baselines*: within it two levels count as equal
COLORS = ("#0173b2", "#d55e00", "#029e73", "#cc78bc", "#de8f05", "#949494", "#ca9161")
Level = tuple[str, ...]
# What a lesson is about, the ablation, a level, and what it is compared with (None: the center).
LESSONS: tuple[tuple[str, str, Level, Level | None], ...] = (
    ("Four bits against sixteen", "bits", ("nf4",), ("16",)),
    ("Rank 32 against rank 8, each at its learning rate", "rank", ("32",), None),
    ("The text decoder alone against all regions", "placement", ("text",), None),
    ("One frame in sixteen against one in four", "selection budget", ("segments", "1/16"), None),
    ("A learning rate half a decade too low", "learning rate", ("lora", "lower"), None),
)
VERDICTS = {
    "better, equivalent": f"better, by less than {100 * MARGIN:g} points",
    "worse, equivalent": f"worse, by less than {100 * MARGIN:g} points",
    "better": "better",
    "worse": "worse",
    "equivalent": f"equal within {100 * MARGIN:g} points",
}
UNRESOLVED = "not told apart"


class Results:
    """The records, and what follows from them.

    Args:
        find: from a configuration without its rate, and a seed, to a record or None; the default looks in records/.
    """

    def __init__(self, find: Callable[[Config, int], dict[str, Any] | None] | None = None) -> None:
        self._find = find or _found
        self._kept: dict[tuple[str, str], dict[Level, list[dict[str, Any]]]] = {}

    def of(self, ablation: str, task: str) -> dict[Level, list[dict[str, Any]]]:
        """Records by level, in the order of the levels; without levels that have none."""
        if (ablation, task) not in self._kept:
            runs = {
                level: [run for seed in SEEDS if (run := self._find(config, seed))]
                for level, config in levels(ablation, task).items()
            }
            self._kept[ablation, task] = {level: own for level, own in runs.items() if own}
        return self._kept[ablation, task]

    def tasks(self, ablation: str) -> list[str]:
        """The tasks of an ablation of which every level has two seeds at least; figures leave out the others."""
        return [
            task
            for task in ABLATIONS[ablation]
            if self.of(ablation, task).keys() == levels(ablation, task).keys()
            and min(map(len, self.of(ablation, task).values())) > 1
        ]

    def measured(self, ablation: str) -> list[str]:
        """The tasks of an ablation of which every level has all seeds."""
        return [
            task
            for task in ABLATIONS[ablation]
            if [len(own) for own in self.of(ablation, task).values()] == [len(SEEDS)] * len(levels(ablation, task))
        ]

    def state(self) -> pd.DataFrame:
        """One row an ablation and task: its levels, and how many of its runs have a record."""
        rows = [
            {
                "ablation": ablation,
                "task": task,
                "levels": len(levels(ablation, task)),
                "compared with": _name(center(ablation, task)),
                "runs": len(SEEDS) * len(levels(ablation, task)),
                "recorded": sum(map(len, self.of(ablation, task).values())),
            }
            for ablation in ABLATIONS
            for task in ABLATIONS[ablation]
        ]
        return pd.DataFrame(rows).set_index(["ablation", "task"])

    def scores(self, ablation: str, task: str) -> dict[Level, np.ndarray]:
        """Primary score of every seed, by level."""
        return {level: np.array([score(run) for run in own]) for level, own in self.of(ablation, task).items()}

    def table(self, ablation: str, task: str) -> pd.DataFrame:
        """One row a level: mean, deviation over seeds, seeds, parameters, the learning rate."""
        rows = [
            {
                "level": _name(level),
                "score": np.mean([score(run) for run in own]),
                "sd": np.std([score(run) for run in own], ddof=1) if len(own) > 1 else np.nan,
                "seeds": len(own),
                "parameters": own[0].get("parameters", {}).get("trainable"),
                "learning rate": own[0]["config"]["learning_rate"],
            }
            for level, own in self.of(ablation, task).items()
        ]
        return pd.DataFrame(rows).set_index("level")

    def against(self, ablation: str, task: str, baseline: Level | None = None) -> Comparison:
        """Every level against the center, or against another level: paired by seed and item."""
        runs = [
            {**run, "config": {"level": _name(level)}} for level, own in self.of(ablation, task).items() for run in own
        ]
        return compare(
            runs, _name(baseline or center(ablation, task)), by="config.level", metric=primary(task), margin=MARGIN
        )

    def effect(self, ablation: str, task: str, level: Level, baseline: Level | None = None) -> str:
        """A level minus the center, in points with its interval, in words."""
        table = self.against(ablation, task, baseline).table.set_index("arm")
        return _points(table.loc[_name(level)])

    def takeaway(self, ablation: str) -> str:
        """What is to be taken away from an ablation: a sentence for each task that is measured to the end."""
        said = [self._compared(ablation, task) for task in self.measured(ablation)]
        if rest := [task for task in ABLATIONS[ablation] if task not in self.measured(ablation)]:
            said.append("Not measured to the end yet: " + ", ".join(f"*{task}*" for task in rest) + ".")
        return "**To take away.** " + " ".join(said)

    def _compared(self, ablation: str, task: str) -> str:
        """The levels by how they fell against the center, each group with its furthest."""
        table = self.against(ablation, task).table
        equal = f"equal within {100 * MARGIN:g} points"
        groups: dict[str, list[pd.Series]] = {"better": [], "worse": [], equal: [], UNRESOLVED: []}
        for _, row in table.iterrows():
            kind = equal if "equivalent" in row["verdict"] else row["verdict"]
            groups[kind if kind in groups else UNRESOLVED].append(row)
        said = []
        for kind, rows in groups.items():
            if rows:
                furthest = max(rows, key=lambda row: abs(row["difference"]))
                names = [row["arm"].replace(", ", " ") for row in rows]
                listed = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
                most = f"are {kind}, {furthest['arm'].replace(', ', ' ')} furthest" if len(rows) > 1 else f"is {kind}"
                said.append(f"{listed} {most} with {_points(furthest)}")
        standard = _name(center(ablation, task)).replace(", ", " ")
        return f"On *{task}*, against the center ({standard}): {'; '.join(said)}."

    def rates(self, task: str) -> str:
        """What to be taken away from the rates around the one that was chosen."""
        if task not in self.measured("learning rate"):
            return f"**To take away.** Not measured to the end yet: *{task}*."
        found = self._around(task)
        said = {}
        for step in ("lower", "higher"):
            method = min((own for own, other in found if other == step), key=lambda m: found[m, step]["difference"])
            said[step] = f"{-100 * found[method, step]['difference']:.1f} points ({method})"
        return (
            f"**To take away.** On *{task}*, half a decade below the rate that was chosen costs up to {said['lower']}, "
            f"half a decade above up to {said['higher']}. {self.missed(task)}"
        )

    def missed(self, task: str) -> str:
        """Where all seeds say that another rate than the one chosen on the seed of tuning is better."""
        if task not in self.measured("learning rate"):
            return ""
        better = [
            f"for {method}, a rate half a decade {step} is better, by {_points(row)}"
            for (method, step), row in self._around(task).items()
            if row["low"] > 0
        ]
        said = "; ".join(better) or "no other rate that was tried is better"
        return f"Rates are chosen on one seed, and {len(SEEDS)} others say on *{task}*: {said}."

    def _around(self, task: str) -> dict[Level, pd.Series]:
        """The rates below and above the chosen one against it, by method and step."""
        found = {}
        for method in dict.fromkeys(level[0] for level in self.of("learning rate", task)):
            runs = [
                {**run, "config": {"step": level[1]}}
                for level, own in self.of("learning rate", task).items()
                if level[0] == method
                for run in own
            ]
            table = compare(runs, "chosen", by="config.step", metric=primary(task), margin=MARGIN).table
            found |= {(method, row["arm"]): row for _, row in table.iterrows()}
        return found

    def crossed(self, ablation: str, task: str, rows: tuple[str, str], columns: tuple[str, str]) -> str:
        """The interaction of two pairs of levels, in words."""
        if task not in self.measured(ablation):
            return f"**To take away.** Not measured to the end yet: *{task}*."
        found = self.interaction(ablation, task, rows, columns)
        row = 100 * found[["difference", "low", "high"]]
        apart = "so they have to be set together" if row.low > 0 or row.high < 0 else "so nothing says they interact"
        return (
            f"**To take away.** From {columns[0]} to {columns[1]}, {rows[1]} gains {row.difference:+.1f} points "
            f"({row.low:+.1f} to {row.high:+.1f}) more than {rows[0]}, {apart}."
        )

    def lessons(self) -> list[str]:
        """The five lessons, each with its intervals, of what is measured to the end; shorter while that is little."""
        said = [f"**{words}: {way}.** {effects}." for words, way, effects in self._told()]
        return said or ["Nothing is measured to the end."]

    def answer(self) -> str:
        """The lessons in a sentence: what moves the score, and what does not."""
        groups: dict[str, list[str]] = {"moves the score": [], "hardly moves it": [], "is not told apart": []}
        for words, way, effects in self._told():
            equal, unknown = "points" in way, way == UNRESOLVED
            name = list(groups)[2 if unknown else int(equal)]
            groups[name].append(f"{words[0].lower() + words[1:]} ({effects})")
        said = [f"what {name}: {', '.join(own)}" for name, own in groups.items() if own]
        return f"{said[0][0].upper()}{'; '.join(said)[1:]}." if said else "Nothing is measured to the end."

    def _told(self) -> list[tuple[str, str, str]]:
        """Each lesson that is measured to the end: what it is about, which way it fell, and its intervals."""
        told = []
        for words, ablation, level, baseline in LESSONS:
            tasks = [
                task
                for task in self.measured(ablation)
                if {level, baseline or center(ablation, task)} <= set(self.of(ablation, task))
            ]
            if tasks:
                fell = {self.verdict(ablation, task, level, baseline) for task in tasks}
                way = fell.pop() if len(fell) == 1 else "it depends on the task"
                effects = [f"{self.effect(ablation, task, level, baseline)} on *{task}*" for task in tasks]
                told.append((words, way, ", ".join(effects)))
        return told

    def verdict(self, ablation: str, task: str, level: Level, baseline: Level | None = None) -> str:
        """Which way a difference fell, in words."""
        found = self.against(ablation, task, baseline).table.set_index("arm").loc[_name(level), "verdict"]
        for said, words in VERDICTS.items():
            if found.startswith(said):
                return words
        return UNRESOLVED

    def interaction(self, ablation: str, task: str, rows: tuple[str, str], columns: tuple[str, str]) -> pd.Series:
        """How much more the second row gains from the second column than the first row does, with a 95% interval.

        The difference of differences of each seed that has all four runs, and its t interval over these seeds.
        """
        four = [(row, column) for row in rows for column in columns]
        by_seed = [{run["seed"]: score(run) for run in self.of(ablation, task).get(level, [])} for level in four]
        seeds = sorted(set.intersection(*(set(own) for own in by_seed)))
        if len(seeds) < 2:
            raise RecordError(f"{ablation}, {task}: {four} share the seeds {seeds}; expected two at least.")
        values = np.array([[own[seed] for seed in seeds] for own in by_seed])
        found = (values[3] - values[2]) - (values[1] - values[0])
        low, high = _interval(found)
        return pd.Series({"difference": found.mean(), "low": low, "high": high, "seeds": len(seeds)})

    def summary(self) -> pd.DataFrame:
        """One row an ablation and task: the best and the worst level, how far apart, and how levels are judged."""
        rows = []
        for ablation in ABLATIONS:
            for task in self.tasks(ablation):
                table = self.against(ablation, task).table
                means = dict(zip(table["arm"], table["mean"], strict=True))
                means[_name(center(ablation, task))] = table["baseline_mean"].iloc[0]
                best, worst = max(means, key=means.get), min(means, key=means.get)
                rows.append(
                    {
                        "ablation": ablation,
                        "task": task,
                        "best": best,
                        "worst": worst,
                        "range": means[best] - means[worst],
                        "better": int(table["verdict"].str.startswith("better").sum()),
                        "worse": int(table["verdict"].str.startswith("worse").sum()),
                        "equal": int(table["verdict"].str.contains("equivalent").sum()),
                        "levels": len(means),
                    }
                )
        return pd.DataFrame(rows)

    def tuning(self, ablation: str, task: str) -> pd.DataFrame:
        """Score on the seed of tuning, a row a level and a column a learning rate; NaN where a rate was not tried."""
        rows = {
            _name(level): tried(tuned_as(config))
            for level, config in levels(ablation, task).items()
            if tuned_as(config) == config or lent(config)
        }
        table = pd.DataFrame.from_dict({name: own for name, own in rows.items() if own}, orient="index")
        return table[sorted(table.columns)]

    # --- Figures

    def plot_effects(self, ablation: str) -> Figure:
        """Differences from the center, a panel a task: intervals, and every seed as a dot."""
        found = {task: self.against(ablation, task) for task in self.tasks(ablation)}
        if not found:
            return nothing()
        heights = [len(own.table) for own in found.values()]
        size = (7.2, 1.0 * len(found) + 0.4 * sum(heights))
        figure, panels = plt.subplots(len(found), 1, figsize=size, height_ratios=heights, squeeze=False)
        for axes, (task, own) in zip(panels[:, 0], found.items(), strict=True):
            own.plot(axes).set_title(task)
            axes.set_xlabel("")
        axes.set_xlabel(f"difference from {_name(center(ablation, task))} (95% interval; dots: seeds)")
        return figure

    def plot_levels(self, ablation: str) -> Figure:
        """Scores themselves, a panel a task: every seed as a dot, means of seeds with 95% intervals as bars."""
        tasks = self.tasks(ablation)
        if not tasks:
            return nothing()
        figure, panels = plt.subplots(1, len(tasks), figsize=(max(3.6, 2.6 * len(tasks)), 3.6), squeeze=False)
        for axes, task in zip(panels[0], tasks, strict=True):
            scores = self.scores(ablation, task)
            _dots(axes, list(scores.values()), COLORS[0])
            axes.set_xticks(range(len(scores)), [_name(level) for level in scores], rotation=40, ha="right")
            axes.set_title(task, fontsize=10)
            axes.set_ylabel(primary(task).replace("_", " "))
        return figure

    def plot_heat(self, ablation: str, task: str) -> Figure:
        """Means over seeds in two factors: a row a level of the first, a column a level of the second."""
        if task not in self.tasks(ablation):
            return nothing()
        scores = {level: own.mean() for level, own in self.scores(ablation, task).items()}
        rows, columns = _factors(ablation, scores)
        return _heat([[scores.get((r, c), np.nan) for c in columns] for r in rows], rows, columns, primary(task))

    def plot_tuning(self, ablation: str, task: str) -> Figure:
        """The interaction of level and learning rate, on the one seed of tuning."""
        table = self.tuning(ablation, task)
        if len(table) < 2:
            return nothing()
        rates = [f"{one:g}" for one in table.columns]
        figure = _heat(table.to_numpy(), list(table.index), rates, primary(task))
        figure.axes[0].set_xlabel("learning rate")
        return figure

    def plot_interaction(self, ablation: str, task: str) -> Figure:
        """Score over the second factor, a line a level of the first; every seed as a dot, means with 95% intervals."""
        if task not in self.tasks(ablation):
            return nothing()
        scores = self.scores(ablation, task)
        rows, columns = _factors(ablation, scores)
        figure, axes = plt.subplots(figsize=(7.2, 4.2))
        for number, row in enumerate(rows):
            own = [scores.get((row, column), np.array([])) for column in columns]
            shift = 0.12 * (number - (len(rows) - 1) / 2)
            _dots(axes, own, COLORS[number % len(COLORS)], shift, "osD^vP*"[number % 7], row)
        axes.set_xticks(range(len(columns)), columns)
        axes.set_ylabel(primary(task).replace("_", " "))
        figure.legend(loc="outside lower center", ncols=4, fontsize=9)
        return figure


def _found(config: Config, seed: int) -> dict[str, Any] | None:
    found = rate(config)
    return None if found is None else recorded({**config, "learning_rate": found}, seed)


def _name(level: Level) -> str:
    return ", ".join(level)


def _points(row: pd.Series) -> str:
    """A difference in points with its interval, in words."""
    points = 100 * row[["difference", "low", "high"]].astype(float)
    return f"{points.difference:+.1f} points ({points.low:+.1f} to {points.high:+.1f})"


def _factors(ablation: str, found: dict[Level, Any]) -> tuple[list[str], list[str]]:
    """Levels of both factors, in their order."""
    if ablation not in CROSSINGS:
        raise RecordError(f"{ablation} has one factor; crossed are {', '.join(CROSSINGS)}.")
    return list(dict.fromkeys(level[0] for level in found)), list(dict.fromkeys(level[1] for level in found))


def _interval(values: np.ndarray) -> tuple[float, float]:
    """The 95% t interval of a mean over seeds; NaN of fewer than two."""
    if len(values) < 2:
        return float("nan"), float("nan")
    wide = student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean() - wide), float(values.mean() + wide)


def _dots(
    axes: Axes, scores: Sequence[np.ndarray], color: str, shift: float = 0.0, mark: str = "D", label: str | None = None
) -> None:
    """Every seed as a dot; means with intervals, joined where there is a label. Places without scores are left out."""
    there = [place for place, own in enumerate(scores) if len(own)]
    means = np.array([scores[place].mean() for place in there])
    bounds = np.array([_interval(scores[place]) for place in there]).reshape(-1, 2)
    x = np.array(there) + shift
    for place, own in zip(there, (scores[place] for place in there), strict=True):
        axes.plot(np.full(len(own), place + shift - 0.05), own, "o", color=color, alpha=0.4, ms=4, mew=0)
    wide = np.abs(bounds.T - means)
    line = "-" if label else ""
    axes.errorbar(x, means, wide, color=color, marker=mark, ls=line, ms=6, lw=1.4, elinewidth=2, label=label)


def _heat(values: Any, rows: Sequence[str], columns: Sequence[str], label: str) -> Figure:
    """A heat map with its numbers in it; white where there is nothing."""
    values = np.asarray(values, float)
    figure, axes = plt.subplots(figsize=(2.4 + 0.9 * len(columns), 1.4 + 0.5 * len(rows)))
    image = axes.imshow(values, cmap="viridis", aspect="auto")
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            color = "black" if value > middle else "white"
            axes.text(column, row, f"{100 * value:.1f}", ha="center", va="center", color=color, fontsize=10)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.grid(visible=False)
    figure.colorbar(image, label=label.replace("_", " "))
    return figure
