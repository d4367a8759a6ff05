"""Which segments of a sound still say something: neither silence nor what was heard before.

Example:
    >>> beep = np.sin(np.arange(8000) / 3).astype(np.float32)
    >>> audio = Audio(np.concatenate([np.zeros(16000, np.float32), beep, np.zeros(40000, np.float32)]), rate=16000)
    >>> spans = select_segments(audio)
    >>> spans.seconds.tolist(), spans.cut(audio).duration, spans.original(0.25).tolist()
    ([[0.95, 1.55]], 0.6, 1.2)

The sound is cut as a video is (`selection`), by its mel bands. What is heard in a model that reads what was kept is at
another time than in the whole; `Spans` knows the way back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from .errors import SelectionError
from .features import Features, mel_features
from .media import Audio
from .selection import Noise, Selection, _check_options, clip_noise, select_frames

__all__ = ["Spans", "select_segments"]

MEL_NOISE = 2.0  # decibels by which a steady noise moves a band's mean over a tenth of a second
STEADY = 4  # steps by which a sound is known, whatever came before it
QUIET = 50.0  # a step so many decibels below the loudest is silent


@dataclass(frozen=True, eq=False)
class Spans:
    """The segments of a sound that were kept, and the way from their time to that of the whole and back.

    Example:
        >>> spans = Spans(np.array([[1.0, 2.0], [5.0, 5.5]]), start=0.0, duration=8.0)
        >>> spans.original([0.25, 1.25]).tolist(), spans.selected([1.25, 3.0, 5.25]).tolist()
        ([1.25, 5.25], [0.25, nan, 1.25])

    Attributes:
        seconds: (K, 2) float64, where each begins and ends in the whole; in order, and apart from each other.
        start: the second at which the whole begins.
        duration: seconds of the whole.
        silent: seconds that were left out for silence.
        repeated: seconds that were left out because they had been heard before.
    """

    seconds: np.ndarray
    start: float
    duration: float
    silent: float = 0.0
    repeated: float = 0.0

    def __len__(self) -> int:
        """Give the number of segments, K."""
        return len(self.seconds)

    @property
    def kept(self) -> float:
        """Seconds that were kept."""
        return float((self.seconds[:, 1] - self.seconds[:, 0]).sum())

    @property
    def _ends(self) -> np.ndarray:
        return np.concatenate([[0.0], np.cumsum(self.seconds[:, 1] - self.seconds[:, 0])])

    def original(self, seconds: float | Sequence[float] | np.ndarray) -> np.ndarray:
        """From seconds of what was kept to seconds of the whole.

        Args:
            seconds: any shape, from 0 to `kept`. Where two segments meet, the later one counts.

        Raises:
            SelectionError: a time that was not kept.
        """
        times, ends = np.asarray(seconds, np.float64), self._ends
        if not len(self) or (times < -1e-9).any() or (times > self.kept + 1e-9).any() or np.isnan(times).any():
            raise SelectionError(f"{seconds} s; {self.kept:g} s were kept")
        place = np.clip(np.searchsorted(ends, times, side="right") - 1, 0, len(self) - 1)
        return self.seconds[place, 0] + times - ends[place]

    def selected(self, seconds: float | Sequence[float] | np.ndarray) -> np.ndarray:
        """From seconds of the whole to seconds of what was kept; NaN where nothing was.

        Args:
            seconds: any shape. A segment holds its beginning and its end.
        """
        times = np.asarray(seconds, np.float64)
        if not len(self):
            return np.full(times.shape, np.nan)
        place = np.clip(np.searchsorted(self.seconds[:, 0], times + 1e-9, side="right") - 1, 0, None)
        inside = (times >= self.seconds[place, 0] - 1e-9) & (times <= self.seconds[place, 1] + 1e-9)
        return np.where(inside, self._ends[place] + times - self.seconds[place, 0], np.nan)

    def cut(self, audio: Audio, fade: float = 0.005) -> Audio:
        """Join the segments into one sound.

        Args:
            audio: the whole.
            fade: seconds over which each segment rises from silence and falls back to it, so that joints don't click.

        Returns:
            An `Audio` that starts at 0.

        Raises:
            SelectionError: nothing was kept.
        """
        if not len(self):
            raise SelectionError("nothing was kept: the sound is silent")
        places = np.rint((self.seconds - audio.start) * audio.rate).astype(np.int64)
        parts = []
        for first, last in places:
            part = audio.samples[first:last].copy()
            length = min(round(fade * audio.rate), len(part) // 2)
            ramp = np.linspace(0, 1, length, endpoint=False, dtype=part.dtype)
            if first > 0:
                part[:length] *= ramp
            if last < len(audio.samples):
                part[len(part) - length :] *= ramp[::-1]
            parts.append(part)
        return Audio(np.concatenate(parts), audio.rate, 0.0, audio.path)


def select_segments(
    audio: Audio,
    budget: float | None = None,
    method: str = "segments",
    *,
    noise: Noise | float | np.ndarray | None = None,
    repeats: bool = False,
    margin: float = 0.05,
    step: float = 0.1,
    price: float = 1.0,
    seed: int = 0,
) -> Spans:
    """Leave out silence and what was heard before.

    Example:
        >>> beep = np.sin(np.arange(8000) / 3).astype(np.float32)
        >>> still = np.zeros(16000, np.float32)
        >>> audio = Audio(np.concatenate([still, beep, still, beep, still]), rate=16000)
        >>> spans = select_segments(audio, margin=0.0)
        >>> spans.seconds.tolist(), spans.repeated
        ([[1.0, 1.5]], 0.5)

    The sound is cut as a video is, by its mel features in steps of a tenth of a second. A segment is silent where no
    step is within 50 decibels of the loudest. It repeats an earlier one if to take both for one would cost less than
    the price of a segment; one shorter than 4 steps has to follow the same sound, too, so that a falling chirp is no
    rising one. Words that are said again fall into other steps, and are rarely taken for the same. Where they must not
    be, as for speech recognition, ``repeats=True`` keeps all that is not silent.

    Args:
        audio: samples with their rate.
        budget: seconds to keep, without margins. Too long segments are all cut to one length that fits; if there are
            too many even so, those least like others are kept. None: all that is neither silent nor repeated.
        method: a key of `SELECTORS`. All but "segments" choose steps, silent or not, and need a budget.
        noise: as in `select_frames`, of `mel_features`. None: 2 decibels, or `clip_noise` if that is more.
        repeats: keep what was heard before.
        margin: seconds that are kept around each segment.
        step: seconds.
        price: factor on the price of a segment: above 1 for fewer and longer ones.
        seed: of "random".

    Returns:
        `Spans`. None where the sound is silent.

    Raises:
        SelectionError: no samples, samples that are not finite, a budget below a step, an unknown method.
    """
    if not isinstance(audio, Audio):
        raise SelectionError(f"segments are of an Audio, as read_audio gives; not {type(audio)}")
    if not np.isfinite(audio.samples).all():
        raise SelectionError(f"{np.count_nonzero(~np.isfinite(audio.samples))} samples are NaN or infinite")
    if (budget is not None and not budget >= step) or margin < 0:
        raise SelectionError(f"budget={budget}, margin={margin} s; expected at least a step of {step} s, and 0")
    count = None if budget is None else int(budget / step + 1e-6)
    _check_options(method, count, False, noise, None, 1, price)
    features = mel_features(audio, step)
    size = round((features.times[1] - audio.start) * audio.rate) if len(features) > 1 else len(audio.samples)
    steps, silent, repeated = np.zeros((0, 2), np.int64), len(features), 0
    if method != "segments":
        chosen = np.sort(select_frames(features, count, method, noise=noise, seed=seed).indices)
        steps, silent = np.stack([chosen, chosen + 1], 1), 0
    elif not audio.is_silent:
        quiet = _quiet(audio.samples, size)
        noise = _mel_noise(features) if noise is None else noise
        found = select_frames(features, noise=noise, price=price)
        steps, repeated = _heard(features.values / found.noise.deviation, found, quiet, repeats)
        silent = len(features) - int((steps[:, 1] - steps[:, 0]).sum()) - repeated
        steps = _shortened(steps, count, features.values)
    return _spans(steps * size, audio, margin, silent * size, repeated * size)


def _quiet(samples: np.ndarray, size: int) -> np.ndarray:
    """Which steps are silent, (T,) bool."""
    power = np.square(np.pad(samples, (0, -len(samples) % size)).astype(np.float64)).reshape(-1, size).mean(1)
    return power <= power.max() * 10 ** (-QUIET / 10)


def _mel_noise(features: Features) -> Noise:
    own = clip_noise(features)
    return own if own.deviation[0] > MEL_NOISE else replace(own, deviation=np.full(len(own.deviation), MEL_NOISE))


def _heard(x: np.ndarray, found: Selection, quiet: np.ndarray, repeats: bool) -> tuple[np.ndarray, int]:
    """First and last step + 1 of the segments that are heard for the first time, and how many steps repeat others."""
    kept, repeated = [], 0
    means, sizes = np.zeros((0, x.shape[1])), np.zeros(0)  # of each sound
    follows: set[tuple[int, int]] = set()  # which sound came behind which; -1 is silence
    before, end = -1, 0
    for a, b in pairwise(found.bounds):
        loud = a + np.flatnonzero(~quiet[a:b])
        if not len(loud):
            continue
        a, b = int(loud[0]), int(loud[-1]) + 1
        mean = x[a:b].mean(0, dtype=np.float64)
        cost = sizes * (b - a) / (sizes + b - a) * np.square(means - mean).sum(1)  # of taking both for one
        sound = int(cost.argmin()) if (cost <= found.price).any() else len(means)
        step = (before if a == end else -1, sound)
        if sound == len(means):
            means, sizes = np.vstack([means, mean]), np.append(sizes, b - a)
            again = False
        else:
            # A short piece is part of a sound that moves: backwards it is another one.
            again = b - a >= STEADY or step in follows
        if again and not repeats:
            repeated += b - a
        else:
            kept.append((a, b))
        follows.add(step)
        before, end = sound, b
    return np.array(kept, np.int64).reshape(-1, 2), repeated


def _shortened(steps: np.ndarray, count: int | None, values: np.ndarray) -> np.ndarray:
    """Segments of no more than ``count`` steps in all: the longest are cut first, then those like others go."""
    if count is None or not len(steps):
        return steps
    if len(steps) > count:
        means = np.stack([values[a:b].mean(0) for a, b in steps])
        steps = steps[select_frames(means, count, "kcenter").indices]
    length = steps[:, 1] - steps[:, 0]
    allowed = np.arange(1, length.max() + 1)
    fits = np.minimum(length[:, None], allowed).sum(0) <= count
    most = int(allowed[fits].max())
    return np.stack([steps[:, 0], steps[:, 0] + np.minimum(length, most)], 1)


def _spans(places: np.ndarray, audio: Audio, margin: float, silent: int, repeated: int) -> Spans:
    """Segments in samples as spans in seconds, with margins; those that touch become one."""
    around = round(margin * audio.rate)
    first, last = np.clip(places[:, 0] - around, 0, None), np.minimum(places[:, 1] + around, len(audio.samples))
    new = np.concatenate([[True], first[1:] > last[:-1]])[: len(first)]
    starts, ends = first[new], last[np.flatnonzero(np.append(new[1:], True))[: int(new.sum())]]
    seconds = audio.start + np.stack([starts, ends], 1) / audio.rate
    return Spans(seconds.reshape(-1, 2), audio.start, audio.duration, silent / audio.rate, repeated / audio.rate)
