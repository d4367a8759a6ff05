"""The look of the book's figures, in one place.

Example:
    >>> from mmqlora import plots
    >>> plots.use_style()
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

    from .media import Audio

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


def film_strip(axis: Axes, frames: np.ndarray, rate: float, events: Sequence[Any] = (), columns: int = 12) -> None:
    """Show frames in rows, in order of time, with a numbered bar under those of each event.

    Example:
        >>> import matplotlib.pyplot as plt
        >>> from mmqlora.datasets.worlds import World
        >>> clip = World("clips", count=1)[0]
        >>> figure, axis = plt.subplots(figsize=(7, 2))
        >>> film_strip(axis, clip.frames, clip.rate, clip.events)
        >>> plt.close(figure)

    Args:
        axis: where to draw. A row is as wide as ``columns`` frames and 1.3 frames high.
        frames: (F, H, W, 3) uint8.
        rate: frames a second.
        events: objects with ``start`` and ``stop`` in seconds.
        columns: frames in a row.
    """
    tall = frames.shape[1] / frames.shape[2]
    rows = -(-len(frames) // columns)
    for index, frame in enumerate(frames):
        row, column = divmod(index, columns)
        top = -row * (tall + 0.3)
        axis.imshow(frame, extent=(column, column + 0.94, top - tall, top))
    for number, event in enumerate(events):
        first, stop = round(event.start * rate), round(event.stop * rate)
        for index in range(first, stop):
            row, column = divmod(index, columns)
            y = -row * (tall + 0.3) - tall - 0.12
            joined = 1.0 if index + 1 < stop and column + 1 < columns else 0.94
            axis.plot([column, column + joined], [y, y], color=f"C{number}", lw=9, solid_capstyle="butt")
        row, column = divmod(first, columns)
        y = -row * (tall + 0.3) - tall - 0.12
        style = dict(ha="center", va="center_baseline", fontsize=9, fontweight="bold", color="white")
        axis.text(column + 0.47, y, number + 1, **style)
    starts = np.arange(rows) * columns / rate
    axis.set_yticks([-row * (tall + 0.3) - tall / 2 for row in range(rows)], [f"{start:g} s" for start in starts])
    axis.set(xlim=(0, columns), ylim=(-rows * (tall + 0.3) + 0.03, 0.03), xticks=[], aspect="equal")
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.grid(False)


def spectrogram(axis: Axes, audio: Audio, events: Sequence[Any] = (), bands: int = 80) -> AxesImage:
    """Show a mel spectrogram over time, with a numbered bar above the span of each event.

    Example:
        >>> import matplotlib.pyplot as plt
        >>> from mmqlora.datasets.worlds import World
        >>> sound = World("sounds", count=1)[0]
        >>> figure, axis = plt.subplots(figsize=(7, 3))
        >>> image = spectrogram(axis, sound.audio, sound.events)
        >>> bar = figure.colorbar(image, label="power (dB)")
        >>> plt.close(figure)

    Args:
        axis: where to draw.
        audio: samples with their rate.
        events: objects with ``start`` and ``stop`` in seconds.
        bands: mel bands.

    Returns:
        The image, for a color bar. Its scale goes from -60 to 20 dB, so that figures can be compared.
    """
    from .media import log_mel

    mel, times = log_mel(audio, bands)
    extent = (times[0], times[-1], 0, bands)
    image = axis.imshow(mel.T, origin="lower", aspect="auto", extent=extent, vmin=-60, vmax=20, cmap="viridis")
    hertz = np.array([500, 1000, 2000, 4000])
    axis.set_yticks(bands * _mel(hertz) / _mel(audio.rate / 2), hertz)
    above = axis.get_xaxis_transform()  # y = 1 is the upper edge
    for number, event in enumerate(events):
        span = [event.start, event.stop]
        axis.vlines(span, 0, bands, color="white", lw=0.8, linestyle=":")
        bar = dict(color=f"C{number}", lw=9, solid_capstyle="butt", clip_on=False, transform=above)
        axis.plot(span, [1.06, 1.06], **bar)
        style = dict(ha="center", va="center_baseline", fontsize=9, fontweight="bold", color="white")
        axis.text(np.mean(span), 1.06, number + 1, transform=above, **style)
    axis.set(xlim=(times[0], times[-1]), ylim=(0, bands), xlabel="time (s)", ylabel="frequency (Hz)")
    axis.grid(False)
    return image


def _mel(hertz: Any) -> Any:
    """Slaney's scale: linear to 1 kHz, logarithmic above."""
    hertz = np.asarray(hertz, float)
    return np.where(hertz < 1000, hertz * 3 / 200, 15 + 27 * np.log(np.maximum(hertz, 1000) / 1000) / np.log(6.4))
