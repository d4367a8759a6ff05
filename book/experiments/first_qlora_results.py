"""What the records of *First QLoRA run* say: the tables, figures and sentences of the chapter read from here.

cd book && python -m experiments.first_qlora_results    # draws the README's figure again
"""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from experiments.first_qlora_run import ARMS, MEMORY, RECORDS, TUNING, WINDOW, best_learning_rate
from mmqlora import plots
from mmqlora.records import read_records
from mmqlora.whisper import FULL_WINDOW

PARTS = {
    "dialogue lines": "synthetic/lines",
    "unseen voices": "synthetic/lines-unseen-voices",
    "templates": "synthetic/templates",
    "human prompts": "prompts",
}
START = ("zero-shot", "zero-shot-nf4")
NAMES = {
    "zero-shot": "as it comes",
    "zero-shot-nf4": "as it comes, in NF4",
    "full": "full fine-tuning",
    "lora": "LoRA, 16 bits",
    "qlora": "QLoRA, 4 bits",
}
RESAMPLES = 5000


class Results:
    """The records, and what follows from them."""

    def __init__(self) -> None:
        self.records, self.tuned, self.measured = read_records(RECORDS), read_records(TUNING), read_records(MEMORY)

    def of(self, arm: str) -> list[dict[str, Any]]:
        """The records of an arm, by seed."""
        return sorted((r for r in self.records if r["config"]["arm"] == arm), key=lambda r: r["seed"])

    def errors(self, arm: str, part: str, window: float = FULL_WINDOW) -> tuple[np.ndarray, np.ndarray]:
        """Word errors (seeds, sentences) and words (sentences) of a part of the test set."""
        rows = [[i for i in r["items"] if i[0].startswith(part) and i[1] == window] for r in self.of(arm)]
        rows = [run for run in rows if run]  # the window of training was judged on the first seed alone
        return np.array([[i[3] for i in run] for run in rows]), np.array([i[4] for i in rows[0]])

    def rate(self, arm: str, part: str, window: float = FULL_WINDOW) -> float:
        """Mean word error rate of an arm over seeds."""
        edits, words = self.errors(arm, part, window)
        return float(edits.sum() / (len(edits) * words.sum()))

    def table(self) -> pd.DataFrame:
        """One row for each arm, seed, part of the test set and window."""
        rows = []
        for arm in (*START, *ARMS):
            for name, part in PARTS.items():
                for window in (WINDOW, FULL_WINDOW) if name != "human prompts" else (FULL_WINDOW,):
                    edits, words = self.errors(arm, part, window)
                    for run, rate in zip(self.of(arm), edits.sum(1) / words.sum(), strict=False):
                        rows.append((arm, run["seed"], name, window, rate))
        return pd.DataFrame(rows, columns=["arm", "seed", "part", "window", "wer"])

    def plot(self) -> Axes:
        """Word error rates in the usual window: a dot a seed, a bar at the mean."""
        table = self.table()
        table = table[table.window == FULL_WINDOW]
        _, axes = plt.subplots(figsize=(7, 4.2))
        for shift, (arm, color) in enumerate(plots.ARM_COLORS.items()):
            for place, part in enumerate(PARTS):
                rates = table[(table.arm == arm) & (table.part == part)].wer
                x = place + 0.18 * (shift - 1.5)
                axes.scatter(x + np.linspace(-0.05, 0.05, len(rates)) * (len(rates) > 1), rates, s=14, color=color)
                name = NAMES[arm] if place == 0 else None
                axes.hlines(rates.mean(), x - 0.08, x + 0.08, color=color, linewidth=2.5, label=name)
        axes.set(xticks=range(len(PARTS)), xticklabels=[part.replace(" ", "\n") for part in PARTS])
        axes.set(ylabel="word error rate", ylim=(0, None))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.grid(axis="x", visible=False)
        axes.legend()
        return axes

    def summary(self) -> pd.DataFrame:
        """Mean word error rate, smallest to largest seed in parentheses, by arm, part and window."""
        table = self.table()

        def cell(rates: pd.Series) -> str:
            spread = f" ({rates.min():.1%} to {rates.max():.1%})" if len(rates) > 1 else ""
            return f"{rates.mean():.1%}{spread}"

        wide = table.groupby(["part", "window", "arm"], sort=False).wer.agg(cell).unstack("arm")
        wide.index = [f"{part}, {window:g} s" for part, window in wide.index]
        return wide[[*START, *ARMS]].rename(columns=NAMES).rename_axis(index="test set", columns=None)

    def _resampled(self, part: str, arms: tuple[str, ...]) -> list[np.ndarray]:
        """Word error rates (resamples,) of each arm, seeds and sentences drawn again with replacement."""
        rng = np.random.default_rng(0)
        edits = [self.errors(arm, part)[0] for arm in arms]
        words = self.errors(arms[0], part)[1]
        sentences = rng.integers(0, len(words), (RESAMPLES, len(words)))  # the same ones for every arm
        rates = []
        for runs in edits:
            # How often a seed is drawn is its weight; one pass over (resamples, sentences) a seed.
            weights = rng.multinomial(len(runs), np.full(len(runs), 1 / len(runs)), RESAMPLES) / len(runs)
            errors = sum(weights[:, s] * runs[s][sentences].sum(1) for s in range(len(runs)))
            rates.append(errors / words[sentences].sum(1))
        return rates

    def share(self, part: str, arm: str = "qlora") -> tuple[float, float, float]:
        """The share of full fine-tuning's gain over the model as it comes that an arm has, with a 95% interval."""

        def ratio(before, full, after):
            return (before - after) / (before - full)

        arms = ("zero-shot", "full", arm)
        low, high = np.quantile(ratio(*self._resampled(part, arms)), [0.025, 0.975])
        return float(ratio(*(self.rate(a, part) for a in arms))), float(low), float(high)

    def change(self, part: str, arm: str) -> tuple[float, float, float]:
        """The change of the word error rate against the model as it comes, with a 95% interval."""
        before, after = self._resampled(part, ("zero-shot", arm))
        low, high = np.quantile(after - before, [0.025, 0.975])
        return self.rate(arm, part) - self.rate("zero-shot", part), float(low), float(high)

    def recovered(self, part: str, arm: str = "qlora") -> str:
        """`share` as text."""
        return "{:.0%} ({:.0%} to {:.0%})".format(*self.share(part, arm))

    def rise(self, part: str, arm: str) -> str:
        """`change` as text, in points."""
        return "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * x for x in self.change(part, arm)))

    def trainable(self, arm: str) -> float:
        """Share of the weights that an arm trains."""
        count = self.of(arm)[0]["parameters"]
        return count["trainable"] / count["total"]

    def tuning(self) -> pd.DataFrame:
        """What the learning rates were chosen by; the chosen ones are marked."""
        rows = []
        for record in self.tuned:
            config, metrics = record["config"], record["metrics"]
            arm, rate = config["arm"], config.get("learning_rate")
            chosen = arm in ARMS and rate == best_learning_rate(arm)
            scores = metrics[f"wer/voices/{FULL_WINDOW:g}s"], metrics[f"wer/prompts/{FULL_WINDOW:g}s"]
            rows.append((arm, rate, *scores, "chosen" if chosen else ""))
        names = ["arm", "learning rate", "voices set aside", "human prompts", ""]
        order = [*START, *ARMS]
        table = pd.DataFrame(rows, columns=names).sort_values("learning rate", na_position="first", kind="stable")
        return table.sort_values("arm", key=lambda arms: arms.map(order.index), kind="stable")

    def about_tuning(self) -> str:
        """How much of the choice of learning rates is luck, and the one run at a rate that was given up."""
        words = sum(item[4] for item in self.tuned[0]["items"] if item[0].startswith("prompts"))
        (run,) = read_records(RECORDS.with_name("first_qlora_run_discarded.jsonl"))
        lines = np.array([i[3:] for i in run["items"] if i[0].startswith("synthetic/lines") and i[1] == FULL_WINDOW])
        errors = lines[:, 0].sum() / lines[:, 1].sum()
        return (
            f"The human prompts of this table hold {words} words, so that a point is about {words / 100:.0f} of them: "
            "between neighboring rates, luck decides. Left to itself, QLoRA would have taken "
            f"{run['config']['learning_rate']:g}, which {run['config']['steps']} steps leave half learned: a first run "
            f"at it (seed {run['seed']}, kept in `book/records/first_qlora_run_discarded.jsonl`) left {errors:.0%} "
            "errors on the dialogue lines of the test set. It was seen before QLoRA was given LoRA's rate, and is not "
            "counted below."
        )

    def windows(self) -> pd.DataFrame:
        """The model as it comes on clips of at most 6 s, by window: word error rate, clips, and those that ran away.

        A clip has run away if it has more than 30 word errors: there, the model never stopped.
        """
        rows = []
        for record in self.of("windows"):
            window = record["config"]["window_s"]
            for name, part in {"synthetic lines": "synthetic/lines", "human prompts": "prompts/up-to-6s"}.items():
                chosen = np.array([i[3:] for i in record["items"] if i[0].startswith(part)])
                edits, words = chosen.T
                rows.append((name, window, edits.sum() / words.sum(), len(edits), int((edits > 30).sum())))
        return pd.DataFrame(rows, columns=["set", "window", "wer", "clips", "ran away"]).sort_values(["set", "window"])

    def memory(self, arm: str) -> list[dict[str, Any]]:
        """The runs in processes of their own, whose peak was measured, by round."""
        return sorted((r for r in self.measured if r["config"]["arm"] == arm), key=lambda r: r["seed"])

    def costs(self) -> pd.DataFrame:
        """Median cost of a run by arm."""
        rows = {}
        for arm in ARMS:
            trained = self.of(arm)[0]["parameters"]["trainable"]
            peak, start = (np.median([r[key] for r in self.memory(arm)]) for key in ("peak_bytes", "start_bytes"))
            rows[NAMES[arm]] = {
                "trained weights": f"{trained:,}",
                "share": f"{self.trainable(arm):.2%}",
                "CPU s a step": f"{np.median([r['cpu_s'] / r['config']['steps'] for r in self.of(arm)]):.2f}",
                "peak of the process (GB)": f"{peak / 1e9:.2f}",
                "of it before training (GB)": f"{start / 1e9:.2f}",
                "to store for each task (MB)": f"{4 * trained / 1e6:.1f}",
            }
        return pd.DataFrame(rows).T

    def ratio(self, key: str, arm: str, against: str) -> str:
        """Median of the ratios of paired runs, smallest to largest in parentheses."""
        runs = self.memory if key == "peak_bytes" else self.of
        ratios = [run[key] / other[key] for run, other in zip(runs(arm), runs(against), strict=True)]
        return f"{np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"

    def beside_weights(self) -> float:
        """Bytes at the peak of a full run that are not weights, gradients or optimizer."""
        runs = self.memory("full")
        return float(np.median([r["peak_bytes"] for r in runs])) - 16 * runs[0]["parameters"]["trainable"]


if __name__ == "__main__":
    plots.use_style()
    Results().plot().set_title("Whisper tiny.en learns new voices: six seeds")
    plt.savefig(RECORDS.parent.parent / "_static" / "first-qlora-run.svg", metadata={"Date": None})
