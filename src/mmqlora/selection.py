"""Which frames still say something: those that stand for the rest best.

Example:
    >>> from mmqlora.datasets.worlds import World
    >>> clip = World("clips", count=10, seed=1)[6]
    >>> keep = select_frames(clip.frames, budget=3)
    >>> [round(event.start * clip.rate) for event in clip.events], keep.bounds.tolist(), keep.indices.tolist()
    ([3, 10], [0, 3, 10, 23], [1, 6, 16])

A clip is cut into segments within which little changes, and of each segment the frame nearest to its mean is kept.
With x_t the features of frame t, v the deviation of their noise and q_t the weight of frame t for a query::

    min over cuts    sum over segments of [ sum_t q_t |(x_t - m) / v|^2 + price ]        m the mean of the segment

The cut is the best there is (`segmentation`), found by dynamic programming. The price says how many frames are worth
keeping: a segment must explain more than noise of E independent dimensions, D in all, hardly ever does between any two
borders among F frames::

    price = D/E (E + 2 sqrt(E L) + 2 L)        L = log(10 F^2), for a chance of at most 1 in 20

A budget of fewer frames gives as many segments. Frames that a budget has beyond that have nothing new to show: they are
second looks, shared out equally among segments. Twice the noise never finds more segments.

`Noise` may be that of the clip itself (`clip_noise`, the default), or what quantization does to the features of a model
(`mmqlora.noise`), or the sum of both.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.stats import chi2
from torch import Tensor

from .errors import SelectionError
from .features import Features, thumbnail_features
from .media import Video, read_video, uniform_indices
from .segmentation import cut
from .signals import thumbnail_signals

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "SELECTORS",
    "Noise",
    "Selection",
    "Selector",
    "clip_noise",
    "select_frames",
]

STILL = 1e-3  # noise is no less than this share of a clip's contrast, as for signals


@dataclass(frozen=True, eq=False)
class Noise:
    """How far features move when nothing changes: of a difference between two frames, over the root of 2.

    Example:
        >>> both = Noise(np.array([3.0, 0.0])) + Noise(np.array([4.0, 1.0]))
        >>> both.deviation.tolist(), round(both.dimensions, 2)
        ([5.0, 1.0], 2.0)

    Attributes:
        deviation: (D,) float64.
        dimensions: of how many independent numbers it is made, each feature in units of its deviation. None: D.
        error: (D,) float64, standard error of the deviation; empty where unknown.
        source: in words.
    """

    deviation: np.ndarray
    dimensions: float | None = None
    error: np.ndarray = field(default_factory=lambda: np.zeros(0))
    source: str = ""

    def __post_init__(self) -> None:
        if self.dimensions is None:
            object.__setattr__(self, "dimensions", float(max(1, np.size(self.deviation))))

    def __add__(self, other: Noise) -> Noise:
        """Give the noise of both, which know nothing of each other."""
        total = np.sqrt(np.square(self.deviation) + np.square(other.deviation))
        safe = np.maximum(total, 1e-300)
        one, two = np.square(self.deviation / safe), np.square(other.deviation / safe)
        # Squared eigenvalues in units of the total: each as if its share were the same everywhere.
        spread = one.sum() ** 2 / self.dimensions + two.sum() ** 2 / other.dimensions + 2 * (one * two).sum()
        dimensions = float(np.clip((one + two).sum() ** 2 / max(spread, 1e-300), 1, len(total)))
        error = np.zeros(0)
        if len(self.error) and len(other.error):
            error = np.hypot(self.deviation * self.error, other.deviation * other.error) / safe
        return Noise(total, dimensions, error, f"{self.source} + {other.source}".strip(" +"))


@dataclass(frozen=True, eq=False)
class Selection(Sequence):
    """The frames that were chosen: a sequence of their indices, in order of time.

    Example:
        >>> keep = select_frames(np.arange(12.0)[:, None], budget=3)
        >>> list(keep), np.asarray(keep).dtype
        ([2, 6, 10], dtype('int64'))
        >>> read_video("clip.mp4", frames=keep)  # doctest: +SKIP

    Attributes:
        indices: (K,) int64, rising.
        times: (K,) float64, seconds; None where they are unknown.
        frames: how many there were to choose from, F.
        method: a key of `SELECTORS`.
        bounds: (K + 1,) int64 of method "segments": the k-th frame stands for frames ``bounds[k]`` to ``bounds[k+1]``.
            A segment of which several frames are kept is divided between them.
        order: (K,) int64, the indices in the order in which a greedy method took them.
        gains: (K,) float64, what each of those added: nats of "logdet"; the distance to those before of "kcenter".
        error: squared error within segments, before second looks, in units of noise; NaN of the other methods.
        excess: the most by which error and prices could be above the least there is; 0 for up to 1,024 frames.
        price: of a segment, in the unit of the error; 0 of the other methods.
        noise: what the error is measured in.
    """

    indices: np.ndarray
    times: np.ndarray | None
    frames: int
    method: str
    bounds: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64), repr=False)
    order: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64), repr=False)
    gains: np.ndarray = field(default_factory=lambda: np.zeros(0), repr=False)
    error: float = math.nan
    excess: float = 0.0
    price: float = 0.0
    noise: Noise | None = field(default=None, repr=False)

    def __len__(self) -> int:
        """Give the number of frames that were chosen, K."""
        return len(self.indices)

    def __getitem__(self, place: Any) -> Any:
        """Give one index, or several."""
        return self.indices.tolist()[place]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Give the indices."""
        return self.indices.astype(dtype or np.int64)

    def table(self) -> pd.DataFrame:
        """Give a row for each chosen frame: its index, its second, and the frames that it stands for."""
        import pandas as pd

        table = pd.DataFrame({"index": self.indices})
        if self.times is not None:
            table["seconds"] = self.times
        if len(self.bounds):
            table["first"], table["last"] = self.bounds[:-1], self.bounds[1:] - 1
        return table


def select_frames(
    media: Video | Features | str | os.PathLike[str] | np.ndarray | Tensor,
    budget: int | None = None,
    method: str = "segments",
    *,
    adaptive: bool = False,
    noise: Noise | float | np.ndarray | None = None,
    query: np.ndarray | Sequence[float] | Tensor | None = None,
    spacing: int = 1,
    price: float = 1.0,
    seed: int = 0,
    progress: bool = False,
) -> Selection:
    """Choose frames of a video.

    Example:
        >>> steps = np.repeat(np.eye(4), [5, 20, 2, 9], axis=0)
        >>> list(select_frames(steps, budget=4)), list(select_frames(steps, budget=4, method="uniform"))
        ([2, 15, 26, 31], [4, 13, 22, 31])
        >>> len(select_frames(steps))  # no budget: as many as noise allows
        4
        >>> keep = select_frames("clip.mp4", budget=8, noise=quantization_noise(model, clips))  # doctest: +SKIP

    Args:
        media: decoded frames, (F, H, W, 3) uint8 or a `Video`; a path, whose frames stream through as thumbnails; or
            features of a row a frame: `Features`, or (F, D).
        budget: frames to keep, K; all, where there are fewer. None: as many as the noise says.
        method: a key of `SELECTORS`.
        adaptive: take the budget for the most, and keep as many as the noise says: no second looks. Of "segments" only.
        noise: deviation of the features where nothing changes: `Noise`, one number, (D,), or (F, 1), one for each
            frame. None: `clip_noise`.
        query: (F,), how relevant each frame is, 0 or more; for "segments", "logdet" and "aks".
        spacing: least number of frames from one that is chosen to the next. It may leave fewer than the budget.
        price: factor on the price of a segment: above 1 for fewer frames.
        seed: of "random".
        progress: show a progress bar while a file is decoded.

    Returns:
        A `Selection`, in order of time. Where nothing changes, frames are spread evenly. The cut of "segments" is exact
        for up to 1,024 frames; beyond, it is at most 5 times the least, and `Selection.excess` tells more.

    Raises:
        SelectionError: no frame; features, noise or query that are not finite or of another shape; an unknown method,
            or an option that the method has no use for.

    Source:
        "logdet", greedy by Cholesky updates: Chen, Zhang and Zhou, Fast Greedy MAP Inference for Determinantal Point
        Process, 2018. "kcenter": Gonzalez, Clustering to Minimize the Maximum Intercluster Distance, 1985. "aks":
        Tang et al., Adaptive Keyframe Sampling for Long Video Understanding (arXiv 2502.21271).
    """
    features = _features(media, progress)
    x = _checked(features.values)
    _check_options(method, budget, adaptive, noise, query, spacing, price)
    job = _Job(x, budget and min(budget, len(x)), adaptive or budget is None, noise, query, spacing, price, seed)
    found = SELECTORS[method][0](job)
    indices = np.sort(np.asarray(found.pop("indices"), np.int64))
    times = None if features.times is None else features.times[indices]
    return Selection(indices, times, len(x), method, **found)


def clip_noise(features: Features | np.ndarray | Tensor) -> Noise:
    """Measure noise on a clip itself, by its stillest quarter of steps: what moves there is taken for noise.

    Example:
        >>> still = np.random.default_rng(0).normal(0, 3, (400, 50))
        >>> noise = clip_noise(still)
        >>> bool(2.7 < noise.deviation[0] < 3.3), bool(35 < noise.dimensions <= 50)
        (True, True)

    Args:
        features: (F, D). The noise of all D is taken to be the same, and no less than a thousandth of the contrast.

    Returns:
        A `Noise`. The stillest steps are also those with the least noise by chance; of 32 steps or more that is made
        up for, as if nothing moved in any of them.
    """
    x = _checked(features.values if isinstance(features, Features) else features)
    # The square of a contrast so small that only rounding is left.
    least = max(STILL**2 * float(x.var(0, dtype=np.float64).mean()), (1e-7 * float(np.abs(x).max(initial=0))) ** 2)
    if len(x) < 2:
        return Noise(np.full(x.shape[1], math.sqrt(least) or 1.0), float(x.shape[1]), source="clip")
    step = np.diff(x, axis=0)
    size = np.einsum("td,td->t", step, step, dtype=np.float64)
    quiet = np.argsort(size, kind="stable")[: max(1, (len(step) + 3) // 4)]
    variance = float(size[quiet].mean()) / (2 * x.shape[1])
    dimensions = float(x.shape[1])
    if variance > least and len(quiet) >= 8:
        dimensions = independent(step[np.sort(quiet)])
        # The mean of the lowest quarter of chi squared, over that of all of it.
        variance /= 4 * chi2.cdf(chi2.ppf(0.25, dimensions), dimensions + 2)
    deviation = math.sqrt(max(variance, least)) or 1.0
    return Noise(np.full(x.shape[1], deviation), dimensions, source="clip")


def independent(steps: np.ndarray) -> float:
    """Of how many independent numbers of equal size vectors are made, whose mean is zero.

    Example:
        >>> steps = np.random.default_rng(0).normal(size=(300, 3)) @ np.repeat(np.eye(3), 10, axis=1)
        >>> round(independent(steps))
        3

    Args:
        steps: (N, D); of more than 512, as many are looked at.

    Returns:
        From 1 to D: the squared sum of the eigenvalues of their second moment over the sum of their squares.
    """
    some = steps[:: max(1, len(steps) // 512)].astype(np.float64)
    if len(some) < 2:
        return float(steps.shape[1])
    inner = some @ some.T
    # Of products between different vectors only, which few vectors don't bias.
    spread = (np.square(inner).sum() - np.square(np.diag(inner)).sum()) / (len(some) * (len(some) - 1))
    return float(np.clip(np.diag(inner).mean() ** 2 / max(spread, 1e-300), 1, steps.shape[1]))


# Methods


@dataclass(frozen=True, eq=False)
class _Job:
    """What a method is given: all of it checked."""

    x: np.ndarray
    count: int | None  # None: as many as noise allows
    adaptive: bool
    noise: Any
    query: Any
    spacing: int
    price: float
    seed: int

    @property
    def weights(self) -> np.ndarray | None:
        """Relevance of the frames, of mean 1."""
        if self.query is None:
            return None
        query = np.asarray(self.query, np.float64)
        if query.shape != (len(self.x),) or not np.isfinite(query).all() or query.min() < 0 or not query.max() > 0:
            raise SelectionError(
                f"query of shape {query.shape} for {len(self.x)} frames; expected a finite number of 0 or more for "
                "each, not all 0"
            )
        return query / query.mean()

    def measured(self) -> tuple[Noise, np.ndarray]:
        """The noise of the features (D,), and a factor for each frame (F,)."""
        ones = np.ones(len(self.x))
        if self.noise is None:
            return clip_noise(self.x), ones
        noise = self.noise if isinstance(self.noise, Noise) else np.asarray(self.noise, np.float64)
        values = noise.deviation if isinstance(noise, Noise) else noise
        length, width = self.x.shape
        if values.shape not in ((), (width,), (length, 1)) or not np.isfinite(values).all() or not (values > 0).all():
            raise SelectionError(
                f"noise of shape {values.shape} for features {self.x.shape}; expected finite numbers above 0: one, "
                f"({width},) or ({length}, 1)"
            )
        if isinstance(noise, Noise):
            return noise, ones
        if noise.shape == (length, 1):
            usual = math.sqrt(float(np.square(noise).mean()))
            return Noise(np.full(width, usual), float(width)), noise[:, 0] / usual
        return Noise(np.broadcast_to(noise, (width,)).copy(), float(width)), ones


def _segments(job: _Job) -> dict[str, Any]:
    noise, factor = job.measured()
    x = job.x / noise.deviation.astype(job.x.dtype)
    weights = np.square(1 / factor) if job.weights is None else job.weights / np.square(factor)
    price = job.price * _price(job.x.shape[1], noise.dimensions, len(x))
    shortest = min(job.spacing, len(x))
    found = cut(x, job.count, price, weights, shortest)
    bounds = found.bounds if job.adaptive else _looks(found.bounds, job.count, weights, shortest)
    indices = _representatives(x, bounds, weights, shortest)
    excess = max(0.0, found.objective - found.lower)
    return {
        "indices": indices,
        "bounds": bounds,
        "error": found.error,
        "excess": excess,
        "price": price,
        "noise": noise,
    }


def _looks(bounds: np.ndarray, count: int, weights: np.ndarray, shortest: int) -> np.ndarray:
    """Share out the frames beyond one for each segment, one by one, to where a frame stands for most relevance."""
    length = np.diff(bounds)
    room = np.maximum(1, length // shortest)
    worth = np.add.reduceat(weights, bounds[:-1]) / length + 1e-9 * length  # of equals, the longest
    looks = np.ones(len(length), np.int64)
    for _ in range(min(count, int(room.sum())) - len(length)):
        looks[np.where(looks < room, worth / looks, -np.inf).argmax()] += 1
    parts = [a + np.arange(n) * (b - a) // n for (a, b), n in zip(pairwise(bounds), looks, strict=True)]
    return np.append(np.concatenate(parts), bounds[-1])


def _price(width: int, dimensions: float, length: int) -> float:
    """The most by which a cut of noise alone may lower the error: a bound on the tail of chi squared.

    Source: Laurent and Massart, Adaptive Estimation of a Quadratic Functional by Model Selection, 2000, lemma 1.
    """
    rare = math.log(10 * length**2)  # pairs of borders, over the chance
    return width / dimensions * (dimensions + 2 * math.sqrt(dimensions * rare) + 2 * rare)


def _representatives(x: np.ndarray, bounds: np.ndarray, weights: np.ndarray, spacing: int) -> np.ndarray:
    """The frame nearest to the mean of each segment, and of equals the middle one; with spacing between."""
    apart = np.empty(len(x))
    for a, b in pairwise(bounds):
        part = x[a:b].astype(np.float64)
        w = weights[a:b] if weights[a:b].sum() > 0 else np.ones(b - a)
        away = part - np.average(part, axis=0, weights=w)
        # Rounding must not decide between frames that are the same.
        apart[a:b] = np.einsum("td,td->t", away, away)
        scale = apart[a:b].max() * 1e-9 + 1e-12
        apart[a:b] = np.round(apart[a:b] / scale) * scale
        apart[a:b] += scale * 0.25 * np.abs(np.arange(b - a) - (b - a) / 2) / (b - a)
    if spacing == 1:
        return np.array([a + int(apart[a:b].argmin()) for a, b in pairwise(bounds)])
    # The best places for each frame behind each place of the one before: dynamic programming over the segments.
    costs: list[np.ndarray] = []
    for k, (a, b) in enumerate(pairwise(bounds)):
        cost = apart[a:b].copy()
        if k:
            before = np.minimum.accumulate(costs[-1])
            last = np.arange(a, b) - spacing - int(bounds[k - 1])
            cost += np.where(last >= 0, before[np.clip(last, 0, len(before) - 1)], np.inf)
        costs.append(cost)
    places = [int(bounds[-2]) + int(costs[-1].argmin())]
    for k in range(len(costs) - 2, -1, -1):
        reach = places[-1] - spacing - int(bounds[k]) + 1
        places.append(int(bounds[k]) + int(costs[k][:reach].argmin()))
    return np.array(places[::-1])


def _logdet(job: _Job, floor: bool = True) -> dict[str, Any]:
    noise, factor = job.measured() if floor else (None, np.ones(len(job.x)))
    q = np.ones(len(job.x)) if job.weights is None else job.weights
    x = job.x - job.x.mean(0, dtype=np.float64)
    kernel = _Kernel(x, 2 * float(np.square(x).sum()) / len(x) or 1.0, q)  # scale: the mean squared distance
    # What noise moves a frame by in the space of the kernel, where each has length 1.
    moved = np.square(factor) * float(np.square(noise.deviation).sum()) / kernel.scale if floor else np.zeros(len(x))
    floors = 2 * -np.expm1(-moved)
    order, gains = _greedy_logdet(kernel, floors, job.count, job.spacing)
    order = _filled(order, job.count, len(x), job.spacing)
    gains = np.concatenate([gains, np.zeros(len(order) - len(gains))])
    return {"indices": order, "order": order, "gains": gains, "noise": noise}


class _Kernel:
    """``q_t q_s exp(-|x_t - x_s|^2 / scale)``, a column at a time, for x with mean 0."""

    def __init__(self, x: np.ndarray, scale: float, q: np.ndarray) -> None:
        self.x, self.scale, self.q = x, scale, q
        self.norms = np.einsum("td,td->t", x, x)

    def column(self, t: int) -> np.ndarray:
        apart = np.maximum(self.norms + self.norms[t] - 2 * (self.x @ self.x[t]), 0)
        apart[t] = 0
        return self.q * self.q[t] * np.exp(-apart / self.scale)


def _greedy_logdet(kernel: _Kernel, floors: np.ndarray, count: int, spacing: int) -> tuple[np.ndarray, np.ndarray]:
    """Greedy ``1/2 log det(I + N^-1/2 K N^-1/2)``, N the floors; ``1/2 log det K`` where they are 0.

    Without a query all frames are equally good at first: that nearest to the mean is taken.
    """
    noisy = bool(floors.min(initial=1.0) > 0)
    root = 1 / np.sqrt(floors) if noisy else np.ones(len(floors))
    left = np.square(kernel.q * root) + noisy  # variance that the chosen ones leave
    enough = 1e-12 * float(left.max())
    rows = np.zeros((count, len(floors)))
    free = np.ones(len(floors), bool)
    order, gains = [], []
    for k in range(count):
        best = left[free].max(initial=-np.inf)
        if not best > enough:
            break
        equal = np.flatnonzero(free & (left >= best * (1 - 1e-9)))
        equal = equal[kernel.norms[equal] <= kernel.norms[equal].min() * (1 + 1e-9)]
        # Frames that are the same: the one that is farthest in time.
        apart = np.abs(equal[:, None] - np.array(order or [len(left) // 2])).min(1)
        t = int(equal[apart.argmax() if order else apart.argmin()])
        order.append(t)
        gains.append(0.5 * math.log(left[t]))
        column = kernel.column(t) * root * root[t]
        rows[k] = (column - rows[:k, t] @ rows[:k]) / math.sqrt(left[t])
        left = left - np.square(rows[k])
        free[max(0, t - spacing + 1) : t + spacing] = False
    return np.array(order, np.int64), np.array(gains)


def _uniform(job: _Job) -> dict[str, Any]:
    return {"indices": uniform_indices(len(job.x), min(job.count, max(1, len(job.x) // job.spacing)))}


def _random(job: _Job) -> dict[str, Any]:
    # Taken from what is left when the frames between are laid aside: all sets that fit are equally likely.
    count = min(job.count, 1 + (len(job.x) - 1) // job.spacing)
    between = (job.spacing - 1) * np.arange(count)
    left = len(job.x) - int(between[-1])
    return {"indices": np.sort(np.random.default_rng(job.seed).choice(left, count, replace=False)) + between}


def _difference(job: _Job) -> dict[str, Any]:
    step = np.linalg.norm(np.diff(job.x, axis=0, prepend=job.x[:1]).astype(np.float64), axis=1)
    return _highest(step, job)


def _keyframes(job: _Job) -> dict[str, Any]:
    small = torch.from_numpy(np.ascontiguousarray(job.x, np.float32))[None]
    return _highest(thumbnail_signals(small, names="keyframe", standardize=False)[0, :, 0].double().numpy(), job)


def _highest(scores: np.ndarray, job: _Job) -> dict[str, Any]:
    """Frames of the highest scores above 0; the rest, if there is one, far from those in time."""
    free = scores > 0
    order = _filled(_top(scores, job.count, job.spacing, free), job.count, len(scores), job.spacing)
    return {"indices": order, "order": order, "gains": scores[order]}


def _top(scores: np.ndarray, count: int, spacing: int, free: np.ndarray) -> np.ndarray:
    order = []
    for _ in range(count):
        t = int(np.where(free, scores, -np.inf).argmax())
        if not free[t]:
            break
        order.append(t)
        free[max(0, t - spacing + 1) : t + spacing] = False
    return np.array(order, np.int64)


def _filled(order: np.ndarray, count: int, length: int, spacing: int) -> np.ndarray:
    """Frames in the widest gaps, until there are enough: where nothing is left to tell frames apart."""
    if not len(order):
        return uniform_indices(length, min(count, max(1, length // spacing)))
    order = list(order)
    place = np.arange(length)
    gap = np.abs(place[:, None] - np.array(order)).min(1) if len(order) < count else place
    while len(order) < count:
        t = int(gap.argmax())
        if gap[t] < spacing:
            break
        order.append(t)
        gap = np.minimum(gap, np.abs(place - t))
    return np.array(order, np.int64)


def _kcenter(job: _Job) -> dict[str, Any]:
    x = job.x.astype(np.float64)
    away = x - x.mean(0)
    t = int(np.einsum("td,td->t", away, away).argmin())
    order, gains, nearest, free = [t], [0.0], np.full(len(x), np.inf), np.ones(len(x), bool)
    for _ in range(job.count - 1):
        away = x - x[t]
        nearest = np.minimum(nearest, np.einsum("td,td->t", away, away))
        free[max(0, t - job.spacing + 1) : t + job.spacing] = False
        t = int(np.where(free, nearest, -np.inf).argmax())
        if not free[t] or nearest[t] <= 0:
            break
        order.append(t)
        gains.append(math.sqrt(nearest[t]))
    order = _filled(np.array(order), job.count, len(x), job.spacing)
    return {"indices": order, "order": order, "gains": np.array(gains + [0.0] * (len(order) - len(gains)))}


def _aks(job: _Job, threshold: float = 0.8, depth: int = 5) -> dict[str, Any]:
    """Split the clip in halves, and the budget with it, until a part's best frames stand out by the threshold."""
    scores = job.weights
    if scores is None:
        small = torch.from_numpy(np.ascontiguousarray(job.x, np.float32))[None]
        scores = thumbnail_signals(small, names="novelty", standardize=False)[0, :, 0].double().numpy()
    scores = (scores - scores.min()) / (float(np.ptp(scores)) or 1.0)
    place, free, order = np.arange(len(scores)), np.ones(len(scores), bool), []
    parts = [(0, len(scores), job.count, depth)]
    while parts:
        a, b, count, depth = parts.pop()
        part, middle = scores[a:b], (a + b) // 2
        # The original takes the budget over 2^depth, rounded down, so that small budgets lose frames, or all.
        whole = depth == 0 or count <= 1 or count >= b - a
        if whole or np.sort(part)[-count:].mean() - part.mean() > threshold:
            order.append(found := _top(scores, count, job.spacing, free & (place >= a) & (place < b)))
            free &= np.abs(place[:, None] - found).min(1, initial=len(place)) >= job.spacing
        else:
            first = (count + bool(scores[a:middle].mean() >= scores[middle:b].mean())) // 2
            parts += [(middle, b, count - first, depth - 1), (a, middle, first, depth - 1)]
    order = _filled(np.concatenate(order), job.count, len(scores), job.spacing)
    return {"indices": order, "order": order}


SELECTORS: Mapping[str, tuple[Callable[..., dict[str, Any]], str]] = MappingProxyType(
    {
        "segments": (_segments, "the frame nearest to the mean of each of the best segments"),
        "logdet": (_logdet, "greedy: most information about all frames, over a floor of noise"),
        "logdet-no-noise": (lambda job: _logdet(job, floor=False), "greedy: largest determinant"),
        "kcenter": (_kcenter, "greedy: the frame farthest from all that were chosen"),
        "difference": (_difference, "largest differences from the frame before"),
        "keyframes": (_keyframes, "highest rise of novelty, as in `signals`"),
        "aks": (_aks, "halves of the clip by turns, until the best frames of a part stand out"),
        "uniform": (_uniform, "evenly spread"),
        "random": (_random, "by lot"),
    }
)
"""How frames are chosen, name to function and words. "segments" and "logdet" are measured in noise; "segments",
"logdet", "logdet-no-noise" and "aks" listen to a query, and without one "aks" takes the novelty of frames for it.

:meta hide-value:
"""
QUERIED = ("segments", "logdet", "logdet-no-noise", "aks")
BLIND = ("uniform", "random")  # need no features


def _features(media: Any, progress: bool) -> Features:
    if isinstance(media, Features):
        return media
    if isinstance(media, (Video, str, os.PathLike)):
        return thumbnail_features(media, progress=progress)
    values = media.detach().cpu() if isinstance(media, Tensor) else np.asarray(media)
    if values.ndim == 4 and values.dtype in (np.uint8, torch.uint8):
        return thumbnail_features(values)
    return Features(values)


def _checked(values: Any) -> np.ndarray:
    """Features as an array that can be computed with, or what is wrong with them."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = (values.float() if values.is_floating_point() and values.dtype != torch.float64 else values).numpy()
    values = np.asarray(values)
    if values.ndim != 2 or values.dtype.kind not in "fiub" or not values.shape[1]:
        raise SelectionError(
            f"features of shape {values.shape} and type {values.dtype}; expected real (F, D), (F, H, W, 3) uint8, a "
            "Video, Features or a path"
        )
    if not len(values):
        raise SelectionError("there is no frame to choose from")
    if values.dtype not in (np.float32, np.float64):
        values = values.astype(np.float64)
    if not np.isfinite(values).all():
        bad = np.flatnonzero(~np.isfinite(values).all(1))
        raise SelectionError(
            f"features of {len(bad)} of {len(values)} frames are NaN or infinite, the first at {bad[:5].tolist()}"
        )
    return values


def _check_options(
    method: str, budget: int | None, adaptive: bool, noise: Any, query: Any, spacing: int, price: float
) -> None:
    if method not in SELECTORS:
        near = difflib.get_close_matches(str(method), SELECTORS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(SELECTORS)}"
        raise SelectionError(f"method={method!r} is unknown; {hint}")
    if budget is not None and not (isinstance(budget, (int, np.integer)) and budget >= 1):
        raise SelectionError(f"budget={budget!r}; expected a number of frames of at least 1, or None")
    if method != "segments" and (adaptive or budget is None):
        raise SelectionError(f"method {method!r} needs a budget: only 'segments' can say how many frames are enough")
    if noise is not None and method not in ("segments", "logdet"):
        raise SelectionError(f"method {method!r} has no use for noise; 'segments' and 'logdet' have")
    if query is not None and method not in QUERIED:
        raise SelectionError(f"method {method!r} has no use for a query; {', '.join(QUERIED)} have")
    if spacing < 1 or not price > 0:
        raise SelectionError(f"spacing={spacing}, price={price}; expected at least 1 frame, and more than 0")


@dataclass(frozen=True, eq=False)
class Selector:
    """A choice of frames to be made for many videos: for data sets, and for transformers' ``load_video``.

    Example:
        >>> selector = Selector(budget=8)
        >>> selector.read("clip.mp4").frames.shape  # doctest: +SKIP
        (8, 720, 1280, 3)
        >>> from transformers.video_utils import load_video
        >>> load_video("clip.mp4", sample_indices_fn=selector.on("clip.mp4"))  # doctest: +SKIP
        >>> load_video("clip.mp4", sample_indices_fn=selector, path="clip.mp4")  # doctest: +SKIP

    transformers tells a ``sample_indices_fn`` how many frames there are, but not of which file; hence `on`, or the path
    as one more argument. "uniform" and "random" need neither.

    Args:
        budget: as all that follow, see `select_frames`. A ``query`` fits videos of one length only.
        path: the file, see `on`.

    Raises:
        SelectionError: an unknown method, or an option that it has no use for.
    """

    budget: int | None = None
    method: str = "segments"
    adaptive: bool = False
    noise: Noise | float | np.ndarray | None = None
    query: np.ndarray | None = None
    spacing: int = 1
    price: float = 1.0
    seed: int = 0
    path: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        _check_options(self.method, self.budget, self.adaptive, self.noise, self.query, self.spacing, self.price)

    def select(self, media: Any, progress: bool = False) -> Selection:
        """Choose frames of one video, or rows of features, as `select_frames` does."""
        return select_frames(
            media,
            self.budget,
            self.method,
            adaptive=self.adaptive,
            noise=self.noise,
            query=self.query,
            spacing=self.spacing,
            price=self.price,
            seed=self.seed,
            progress=progress,
        )

    def on(self, path: str | os.PathLike[str]) -> Selector:
        """The same for one file, as ``sample_indices_fn`` wants it."""
        return replace(self, path=path)

    def read(self, path: str | os.PathLike[str], size: tuple[int, int] | None = None, timeout: float = 20.0) -> Video:
        """Choose frames of a file by its thumbnails, and decode those that were chosen.

        Example:
            >>> video = Selector(budget=8).read("clip.mp4", size=(224, 224))  # doctest: +SKIP

        Args:
            path: a video file.
            size: (height, width), as in `read_video`.
            timeout: as in `read_video`, for the second reading; see `thumbnail_features` for the first.

        Returns:
            A `Video` of the chosen frames, with their times and their places in the file.

        Raises:
            MediaError: the file can't be decoded.
        """
        small = thumbnail_features(path, timeout=timeout)
        return read_video(path, frames=self.select(small).indices, size=size, timeout=timeout)

    def take(self, video: Video) -> Video:
        """Choose from frames that are decoded already.

        Example:
            >>> clip = Video(np.zeros((20, 8, 8, 3), np.uint8), np.arange(20) / 8, np.arange(20), 8.0, 20, 2.5, "")
            >>> Selector(budget=4).take(clip).times.tolist()
            [0.25, 0.875, 1.5, 2.125]
        """
        keep = self.select(video).indices
        return replace(video, frames=video.frames[keep], times=video.times[keep], indices=video.indices[keep])

    def __call__(self, metadata: Any, path: str | os.PathLike[str] | None = None, **_: Any) -> np.ndarray:
        """Give indices (K,) as transformers asks for them.

        Raises:
            SelectionError: the method looks at frames, and it is not known of which file.
        """
        total = int(metadata.total_num_frames)
        path = self.path if path is None else path
        if self.method in BLIND:
            return self.select(np.zeros((total, 1))).indices
        if path is None:
            raise SelectionError(
                f"method {self.method!r} has to look at the frames, and transformers does not say of which file; give "
                "sample_indices_fn=selector.on(path), or load_video(..., path=path)"
            )
        small = thumbnail_features(path)
        # Readers may differ by a frame or two; what only one of them has is left out.
        return self.select(Features(small.values[:total], small.times[:total])).indices
