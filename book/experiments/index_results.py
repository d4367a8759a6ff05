"""What the first page shows: what each idea costs and brings, from the records of the chapters."""

from __future__ import annotations

from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import together
from experiments.baselines import RECORDS
from mmqlora.comparisons import compare
from mmqlora.records import read_records

TASK = "video/palette"
OFF, ON = "#949494", "#d55e00"
SIZES = [8, 8]  # of the step whose bytes were counted: 16 clips of one length, as in a run
ARMS = {"all weights": ("full", 16), "LoRA, 16 bits": ("lora", 16), "LoRA on NF4": ("lora", 4)}


class Point(NamedTuple):
    """An arm: its name, what it costs, its records, the measure of their scores, and whether the idea is on."""

    name: str
    cost: float
    records: list[dict[str, Any]]
    measure: str
    on: bool

    @property
    def scores(self) -> np.ndarray:
        """One a seed, in their order."""
        return np.array([r["metrics"][self.measure] for r in sorted(self.records, key=lambda r: r["seed"])])

    @property
    def mean(self) -> float:
        """Over seeds."""
        return float(self.scores.mean())


class Results:
    """The records, and what follows from them."""

    def __init__(self) -> None:
        baselines = [r for r in read_records(RECORDS / "baselines.jsonl") if r["config"]["task"] == TASK]
        counted = {
            ("lora" if r["config"]["method"] == "lora" else "full", 4 if r["config"]["quant_type"] else 16): r
            for r in read_records(RECORDS / "memory_checks.jsonl")
            if (r["config"]["model"], r["config"]["sizes"], r["config"]["checkpointing"]) == (TASK, SIZES, False)
        }
        selected = read_records(RECORDS / "selection_trained.jsonl")
        gated = [r for r in read_records(RECORDS / "temporal.jsonl") if r["config"]["task"] == "retrieval/flashes"]

        def arm(records: list[dict[str, Any]], **config: object) -> list[dict[str, Any]]:
            return [r for r in records if all(r["config"].get(k) == v for k, v in config.items())]

        self.memory, self.parameters = [], []
        for name, (method, bits) in ARMS.items():
            own, on = arm(baselines, method=method, bits=bits), (method, bits) == ("lora", 4)
            measured = counted[method, bits]["metrics"]["measured"] / 1e6
            self.memory.append(Point(name, measured, own, "word_accuracy", on))
            self.parameters.append(Point(name, _trained(own), own, "word_accuracy", on))
        self.frames = [Point("all", 1.0, arm(selected, method="all"), "word_accuracy", False)]
        for part, share in ((None, 1 / 4), (8, 1 / 8)):
            for method, name in (("uniform", "spread evenly"), ("segments", "chosen")):
                own = arm(selected, method=method, part=part)
                self.frames.append(Point(name, share, own, "word_accuracy", method == "segments"))
        self.gates = []
        for kind, name in (("plain", "LoRA"), ("wider", "one rank more"), ("gate from both", "with gates")):
            own = arm(gated, arm=kind)
            self.gates.append(Point(name, _trained(own), own, "reciprocal_rank", kind == "gate from both"))
        runs = read_records(RECORDS / "together.jsonl")
        self.together = [
            Point(name, place, arm(runs, arm=name), "reciprocal_rank", parts == together.PARTS)
            for place, (name, parts) in enumerate(together.ARMS.items())
        ]

    def answer(self) -> str:
        """What each idea brings, in two sentences, and what to know about them."""
        (full, _, small), (every, trained) = self.memory, (self.parameters[0].cost, self.parameters[-1].cost)
        whole, chosen = self.frames[0], self.frames[2]
        plain, gates = self.gates[0], self.gates[-1]
        return (
            f"Adapters on a base in four bits train {trained / every:.0%} of the weights, with "
            f"{small.cost / full.cost:.0%} of a step's bytes, and end {_points(small, full)} full fine-tuning in 16 "
            f"bits (*{TASK}*); a quarter of the frames, chosen well, ends {_points(chosen, whole)} all of them, at as "
            f"many steps. Gates that know when something happens add {gates.cost / plain.cost - 1:.1%} of an adapter's "
            f"parameters and end {_points(gates, plain)} it where timing matters.\n\n"
            "Gates, ranks and selection at once, in the same bytes but for the gates' and with as many frames, end "
            f"{_points(self.together[-1], self.together[0])} QLoRA without them. The models are small; intervals are "
            "of 95%, and every seed is shown below."
        )

    def plot(self) -> Figure:
        """Score against memory, parameters and frames, and all at once: orange with the idea, gray without."""
        figure = plt.figure(figsize=(7.4, 9.0))
        grid = figure.add_gridspec(3, 2)
        panels = np.array([[figure.add_subplot(grid[row, column]) for column in (0, 1)] for row in (0, 1)])
        _draw(panels[0, 0], self.memory, "Four bits: bytes of a step (MB)", "word accuracy")
        _draw(panels[0, 1], self.parameters, "Adapters: trained parameters (thousands)", "word accuracy", log=True)
        _draw(panels[1, 0], self.frames, "Selection: share of the frames", "word accuracy")
        _draw(panels[1, 1], self.gates, "Gates: trained parameters (thousands)", "reciprocal rank")
        panels[0, 0].set_xlim(90, 230)
        panels[1, 0].set_xlim(-0.1, 1.2)
        panels[1, 0].set_ylim(0, 1.1)
        for axes in panels[0]:
            axes.set_ylim(0.94, 1.0)
        last = figure.add_subplot(grid[2, :])
        for point in self.together:
            _dots(last, point)
        last.set_xticks(range(len(self.together)), [point.name.replace(" + ", "\n+ ") for point in self.together])
        last.set(xlabel="All together: one budget of bytes and frames", ylabel="reciprocal rank")
        last.tick_params(axis="x", labelsize=9)
        return figure


def _trained(records: list[dict[str, Any]]) -> float:
    """Thousands of trained parameters."""
    return records[0]["parameters"]["trainable"] / 1e3


def _points(a: Point, b: Point) -> str:
    """How far apart two arms are, with the 95% interval."""
    runs = [{**record, "arm": point.name} for point in (a, b) for record in point.records]
    found = 100 * compare(runs, b.name, by="arm", metric=a.measure).table.iloc[0][["difference", "low", "high"]]
    sign, side = (1, "above") if found.difference >= 0 else (-1, "below")
    low, high = sorted((sign * found.low, sign * found.high))
    return f"{abs(found.difference):.1f} points ({low:.1f} to {high:.1f}) {side}"


def _dots(axes: Axes, point: Point) -> None:
    color = ON if point.on else OFF
    axes.plot(np.full(len(point.scores), point.cost), point.scores, "o", ms=4, alpha=0.5, mew=0, color=color)
    axes.plot(point.cost, point.mean, "D", ms=8, color=color)


def _draw(axes: Axes, points: list[Point], label: str, score: str, log: bool = False) -> None:
    for point in points:
        _dots(axes, point)
        axes.annotate(
            point.name,
            (point.cost, point.mean),
            (0, 9 if point.on else -17),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            color="#a34700" if point.on else "0.35",
        )
    axes.set(xlabel=label, ylabel=score, xscale="log" if log else "linear")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.margins(x=0.3, y=0.2)
