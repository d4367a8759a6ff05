"""Cut a sequence of features into segments of least squared error, exactly, and in pieces where it is long.

Example:
    >>> steps = np.repeat([[0.0], [5.0], [1.0]], [4, 2, 6], axis=0)
    >>> cut(steps, count=3).bounds.tolist()
    [0, 4, 6, 12]
    >>> cut(steps, price=2.0).bounds.tolist()  # as many as pay for themselves
    [0, 4, 6, 12]

With w_t the weights and m the weighted mean of a segment [i, j), its error is the sum of ``w_t |x_t - m|^2``. Prefix
sums give the errors of all segments with one product of matrices::

    W_j, S_j, Q_j = sums over t < j of w_t, w_t x_t, w_t |x_t|^2
    c(i, j) = Q_j - Q_i - |S_j - S_i|^2 / (W_j - W_i)

and dynamic programming the best cut, of a given number of segments or with a price on each::

    e_k(j) = min_i e_{k-1}(i) + c(i, j)          f(j) = min_i f(i) + c(i, j) + price

Both take time and memory quadratic in the length. A sequence longer than `CHUNK` is cut in two rounds: each chunk by
itself, then all of it along the borders that were found. The error (with a price, error and prices) is then at most
**5 times the least**, and `Segmentation.lower` says how much it can be for the sequence at hand, which is far less.

Why: let O be the error of the best cut of the whole, and A that of the chunks. A best cut of the whole, seen in one
chunk, has no more segments than that chunk may have, so A <= O. Give each piece of a chunk as a whole to the nearest of
the best cut's means that its frames have: the root of the error between pieces and means is at most sqrt(A) + sqrt(O).
The errors within and between pieces add up to A + (sqrt(A) + sqrt(O))^2 <= 5 O. With prices the same holds for the
sums, as chunks pay for at most one segment each that the whole would not. The two rounds: Terzi and Tsaparas, Efficient
Algorithms for Sequence Segmentation, 2006.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from .errors import SelectionError

__all__ = ["CHUNK", "Segmentation", "cut"]

CHUNK = 1024  # steps that are cut at once; the errors of all their segments take 8 MB
PIECES = 32  # fewest pieces of a chunk: more make the second round better than its guarantee
MOST = 4096  # steps, or pieces of all chunks, whose segments are compared at once: 134 MB
BLOCK = 128
EVEN = 1e-3  # error that a cut of equal lengths may cost more: where nothing changes, lengths are equal


@dataclass(frozen=True, eq=False)
class Segmentation:
    """Where a sequence was cut.

    Attributes:
        bounds: (K + 1,) int64, from 0 to the length; segment k is ``bounds[k]`` to ``bounds[k + 1]``.
        error: squared error within segments.
        objective: the error, with the price of each segment.
        lower: the objective can't be below this, however the sequence is cut; the objective itself where it is exact.
    """

    bounds: np.ndarray
    error: float
    objective: float
    lower: float


def cut(
    x: np.ndarray,
    count: int | None = None,
    price: float = 0.0,
    weights: np.ndarray | None = None,
    shortest: int = 1,
    chunk: int = CHUNK,
) -> Segmentation:
    """Cut a sequence into segments that vary as little as possible.

    Example:
        >>> cut(np.zeros((8, 2)), count=4).bounds.tolist()
        [0, 2, 4, 6, 8]

    Args:
        x: (T, D), finite.
        count: segments; or with a price the most there may be. None: as many as pay for themselves.
        price: what a segment costs, in the unit of the squared error. With 0 there are ``count`` segments.
        weights: (T,), 0 or more; None for ones.
        shortest: fewest steps of a segment.
        chunk: longest sequence that is cut at once, and exactly. A larger ``count`` may take longer chunks.

    Returns:
        A `Segmentation`. Of cuts that are equally good, that of more equal lengths, or with a price of fewer segments.

    Raises:
        SelectionError: no steps, neither count nor price, or a count that is too large for a sequence so long.
    """
    x = np.asarray(x)
    if x.ndim != 2 or not len(x) or (count is None and not price > 0) or (count is not None and count < 1):
        raise SelectionError(
            f"can't cut {x.shape} into count={count} at price={price}; expected (T, D) and one of both"
        )
    weights = np.ones(len(x)) if weights is None else np.asarray(weights, float)
    center = np.average(x, axis=0, weights=weights) if weights.sum() > 0 else x.mean(0)
    shortest = min(shortest, len(x))
    if count is not None:
        count = min(count, len(x) // shortest)
        # Pieces of all chunks are compared at once in the second round, so chunks grow with the count.
        chunk = max(chunk, math.ceil(len(x) * max(count, PIECES) / MOST))
        if chunk > MOST and len(x) > MOST:
            raise SelectionError(
                f"{count} segments of {len(x)} steps would take {8 * chunk**2 / 1e9:.0f} GB to find; expected at most "
                f"{MOST * MOST // len(x)}. Ask for fewer, give a price, or give every second step."
            )
    if len(x) <= chunk:
        costs = _Costs.of(x - center, weights)
        bounds = _best(costs, count, price, shortest)
        error = costs.error(bounds)
        objective = error + price * (len(bounds) - 1)
        return Segmentation(bounds, error, objective, objective)
    pieces, sums, lower = _pieces(x, center, weights, count, price, shortest, chunk)
    bounds = pieces[_best(sums, count and min(count, len(sums)), price, 1)]
    bounds = _polished(bounds, x, center, weights, shortest)
    error = sum(_Costs.of(x[i:j] - center, weights[i:j]).whole() for i, j in pairwise(bounds))
    return Segmentation(bounds, error, error + price * (len(bounds) - 1), lower)


@dataclass(frozen=True)
class _Costs:
    """Prefix sums at the places where a cut may be: W (n + 1,), S (n + 1, D), Q (n + 1,)."""

    w: np.ndarray
    s: np.ndarray
    q: np.ndarray

    @classmethod
    def of(cls, x: np.ndarray, weights: np.ndarray) -> _Costs:
        x = x.astype(np.float64, copy=False)
        s = np.zeros((len(x) + 1, x.shape[1]))
        np.cumsum(x * weights[:, None], axis=0, out=s[1:])
        q = np.concatenate([[0], np.cumsum(weights * np.einsum("td,td->t", x, x))])
        return cls(np.concatenate([[0], np.cumsum(weights)]), s, q)

    def __len__(self) -> int:
        return len(self.w) - 1

    def between(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Errors of some segments, by their places; starts and ends broadcast."""
        w, s = self.w[ends] - self.w[starts], self.s[ends] - self.s[starts]
        inside = self.q[ends] - self.q[starts] - np.einsum("...d,...d->...", s, s) / np.where(w > 0, w, 1)
        return np.maximum(inside, 0)

    def whole(self) -> float:
        return float(self.between(np.array(0), np.array(len(self))))

    def error(self, bounds: np.ndarray) -> float:
        return float(self.between(bounds[:-1], bounds[1:]).sum())

    def table(self, shortest: int) -> np.ndarray:
        """Errors of all segments: row j - 1, column i; infinite where there is none. (n, n)."""
        n = len(self)
        norms = np.einsum("td,td->t", self.s, self.s)
        table = self.s[1:] @ (2 * self.s[:-1]).T
        place = np.arange(n)
        for a in range(0, n, BLOCK):  # in blocks, as what passes through the cache is most of the time
            b = min(n, a + BLOCK)
            rows, ends, width = table[a:b, :b], slice(a + 1, b + 1), slice(b)
            rows -= norms[ends, None]
            rows -= norms[width]  # minus |S_j - S_i|^2
            weight = self.w[ends, None] - self.w[width]
            rows /= np.where(weight > 0, weight, 1)
            rows += self.q[ends, None]
            rows -= self.q[width]
            np.maximum(rows, 0, out=rows)
            rows[place[a:b, None] + 1 - place[:b] < shortest] = np.inf
            table[a:b, b:] = np.inf
        return table


def _best(costs: _Costs, count: int | None, price: float, shortest: int) -> np.ndarray:
    """The best cut: of ``count`` segments, or with a price of at most so many."""
    if price > 0:
        table = costs.table(shortest) if len(costs) <= CHUNK or shortest > 1 else None
        bounds = _priced(costs, table, price, shortest)
        if count is None or len(bounds) - 1 <= count:
            return bounds
        # Too many: of all smaller numbers the one that costs least.
        table = costs.table(shortest) if table is None else table
        ends, back = _layers(table, count)
        return _traced(back, int(np.argmin(ends + price * np.arange(1, count + 1))) + 1)
    table = costs.table(shortest)
    place = np.arange(len(costs)) / len(costs)
    table += EVEN * np.square(place[:, None] - place)
    _, back = _layers(table, count)
    return _traced(back, count)


def _layers(table: np.ndarray, count: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Least error of 1 to ``count`` segments, and for each number of segments where the last one of each end begins."""
    n = len(table)
    best, ends, back = table[:, 0].copy(), [table[-1, 0]], [np.zeros(n, np.int32)]
    for _ in range(1, count):
        reached, start = np.full(n, np.inf), np.zeros(n, np.int32)
        for a in range(0, n, BLOCK):  # a block of ends needs only the starts before them: half of all
            b = min(n, a + BLOCK)
            total = table[a:b, 1:b] + best[: b - 1]
            if total.shape[1]:
                found = total.argmin(1)
                reached[a:b] = total[np.arange(b - a), found]
                start[a:b] = found + 1
        best = reached
        ends.append(best[-1])
        back.append(start)
    return np.array(ends), back


def _traced(back: list[np.ndarray], count: int) -> np.ndarray:
    """Bounds of the best cut into ``count``, from the starts that `_layers` kept."""
    bounds = [len(back[0])]
    for start in back[count - 1 :: -1]:
        bounds.append(int(start[bounds[-1] - 1]))
    return np.array(bounds[::-1], np.int64)


def _priced(costs: _Costs, table: np.ndarray | None, price: float, shortest: int) -> np.ndarray:
    """The best cut where each segment has a price.

    Without a table, starts that can never be best again are left out: Killick et al., Optimal Detection of Changepoints
    With a Linear Computational Cost, 2012.
    """
    n = len(costs)
    least, back = np.full(n + 1, np.inf), np.zeros(n + 1, np.int64)
    least[0] = 0.0
    alive = np.array([0])
    for j in range(1, n + 1):
        if table is not None:
            values = least[:j] + table[j - 1, :j]
            best = int(values.argmin())
            least[j], back[j] = values[best] + price, best
        else:
            values = least[alive] + costs.between(alive, np.array(j))
            best = int(values.argmin())
            least[j], back[j] = values[best] + price, alive[best]
            alive = np.append(alive[values <= least[j]], j)
    bounds = [n]
    while bounds[-1]:
        bounds.append(int(back[bounds[-1]]))
    return np.array(bounds[::-1], np.int64)


def _pieces(
    x: np.ndarray,
    center: np.ndarray,
    weights: np.ndarray,
    count: int | None,
    price: float,
    shortest: int,
    chunk: int,
) -> tuple[np.ndarray, _Costs, float]:
    """Cut each chunk: borders of all pieces, sums at them, and what no cut of the whole can go below."""
    # Chunks of equal length, so that the last one is not too short for the shortest segment.
    edges = np.linspace(0, len(x), math.ceil(len(x) / chunk) + 1).astype(np.int64)
    places, sums, lower = [np.zeros(1, np.int64)], [], 0.0
    offset = (0.0, np.zeros(x.shape[1]), 0.0)
    for a, b in pairwise(edges):
        costs = _Costs.of(x[a:b] - center, weights[a:b])
        table = costs.table(min(shortest, b - a))
        if price > 0:
            found = _priced(costs, table, price, shortest)
            own = costs.error(found) + price * (len(found) - 1)
            if count is not None and len(found) - 1 > count:
                number = min(max(count, PIECES), len(found) - 1)
                found = _traced(_layers(table, number)[1], number)
        else:
            number = min(max(count, PIECES), (b - a) // shortest)
            ends, back = _layers(table, number)
            found, own = _traced(back, number), float(ends[min(count, number) - 1])
        lower += own
        places.append(a + found[1:])
        sums.append(
            tuple(base + part[found[1:]] for base, part in zip(offset, (costs.w, costs.s, costs.q), strict=True))
        )
        offset = tuple(part[-1] for part in sums[-1])
    w, s, q = (np.concatenate([np.zeros_like(part[0][:1]), *part]) for part in zip(*sums, strict=True))
    if price > 0:
        lower = max(0.0, lower - price * (len(edges) - 2))  # a whole may pay one price where two chunks pay two
    return np.concatenate(places), _Costs(w, s, q), lower


def _polished(bounds: np.ndarray, x: np.ndarray, center: np.ndarray, weights: np.ndarray, shortest: int) -> np.ndarray:
    """Move each border to the best place between its neighbors: never worse, and no longer bound to the pieces."""
    bounds = bounds.copy()
    for k in range(1, len(bounds) - 1):
        a, c = int(bounds[k - 1]), int(bounds[k + 1])
        costs = _Costs.of(x[a:c] - center, weights[a:c])
        places = np.arange(shortest, c - a - shortest + 1)
        both = costs.between(np.array(0), places) + costs.between(places, np.array(c - a))
        best = int(both.argmin())
        now = bounds[k] - a - shortest
        if both[best] < both[now] - EVEN:
            bounds[k] = a + places[best]
    return bounds
