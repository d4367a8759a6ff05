"""The look of the book's figures, in one place.

Example:
    >>> from mmqlora import plots
    >>> plots.use_style()
"""

from __future__ import annotations

# Seaborn's "colorblind" palette, by what a color stands for in every figure of the book.
REGION_COLORS = {"vision": "#0173b2", "audio": "#de8f05", "fusion": "#029e73", "text": "#cc78bc"}
ARM_COLORS = {"zero-shot": "#949494", "full": "#0173b2", "lora": "#029e73", "qlora": "#d55e00"}


def use_style() -> None:
    """Set the book's figure style: color-blind-safe, readable on a phone, on white in both themes.

    Example:
        >>> use_style()
    """
    import matplotlib.pyplot as plt
    import seaborn as sns

    sns.set_theme(context="notebook", style="whitegrid", palette="colorblind", font="DejaVu Sans")
    plt.rcParams.update(
        {
            "figure.figsize": (7.0, 4.0),
            "figure.dpi": 110,
            "savefig.bbox": "tight",
            "figure.constrained_layout.use": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": "medium",
            "legend.frameon": False,
        }
    )
