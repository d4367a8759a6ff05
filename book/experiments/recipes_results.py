"""What the records of *Going to real scale* say: the table, the figure and the sentence of the chapter."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from experiments.recipes import RECORDS
from mmqlora import GPUS
from mmqlora.plots import REGION_COLORS
from mmqlora.records import read_records

GIB = 2**30


class Results:
    """The planned memory of every recipe."""

    def __init__(self) -> None:
        self.records = read_records(RECORDS)

    def about(self) -> str:
        """How many recipes there are, and what they fit, in a sentence."""
        cards = [record["fits"] for record in self.records]
        shares = ", ".join(f"{card} for {cards.count(card)}" for card in GPUS if card in cards)
        models, sets = ({record[key] for record in self.records} for key in ("model", "data_set"))
        count = f"{len(cards)} recipes for {len(models)} models and {len(sets)} data sets."
        return f"{count} The smallest card that fits, by the plan: {shares}."

    def table(self) -> pd.DataFrame:
        """Each recipe with its planned memory, and the smallest card for it."""
        return pd.DataFrame(
            {
                "recipe": record["config"]["recipe"],
                "trained (millions)": f"{record['trained'] / 1e6:.1f}",
                "memory (GiB)": f"{record['process'] / GIB:.1f}",
                "fits": record["fits"],
            }
            for record in self.records
        )

    def published(self) -> str:
        """What others published, by recipe."""
        return "\n".join(f"* *{record['config']['recipe']}*: {record['published']}." for record in self.records)

    def plot(self) -> Figure:
        """Planned memory by region, and the limits of cards."""
        figure, axes = plt.subplots(figsize=(7.2, 0.34 * len(self.records) + 1.2))
        names = [record["config"]["recipe"] for record in self.records][::-1]
        left = [0.0] * len(names)
        for region, color in (REGION_COLORS | {"shared": "0.6"}).items():
            sizes = [record["regions"].get(region, 0) / GIB for record in self.records][::-1]
            if any(sizes):
                axes.barh(names, sizes, left=left, color=color, label=region)
                left = [a + b for a, b in zip(left, sizes, strict=True)]
        whole = [record["process"] / GIB for record in self.records][::-1]
        missing = [all_of_it - part for all_of_it, part in zip(whole, left, strict=True)]
        axes.barh(names, missing, left=left, color="0.85", label="allocator, context")
        for card in ("T4", "L4"):
            limit = GPUS[card].bytes / GIB
            axes.axvline(limit, color="0.3", ls="--", lw=1)
            axes.text(limit, len(names) - 0.4, f" {card}", va="bottom", fontsize=9)
        axes.set(xlabel="memory at the peak (GiB)", ylim=(-0.6, len(names) - 0.4))
        axes.grid(visible=False, axis="y")
        figure.legend(loc="outside upper center", ncols=3)
        return figure
