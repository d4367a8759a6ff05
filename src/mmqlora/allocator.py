"""What PyTorch's CUDA allocator makes of tensors that come and go: how much it takes from the card.

It (``c10/cuda/CUDACachingAllocator.cpp``) keeps what it has taken, in segments, and cuts tensors out of them:

* a size is rounded up to 512 bytes;
* up to 1 MiB it comes out of segments of 2 MiB, up to 10 MiB out of segments of 20 MiB, and above that a segment is
  made for it, rounded up to 2 MiB;
* it takes the smallest free block that is large enough, and leaves the rest free if that is worth keeping;
* free neighbors in a segment become one.

So more is *reserved* than *allocated*: 10 percent more or twice as much, as the order has it. That order is known here,
and nothing has to be estimated.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable

__all__ = ["reserved"]

KIB, MIB = 2**10, 2**20
UNIT, SMALL, LARGE = 512, MIB, 10 * MIB


def reserved(events: Iterable[tuple[int, int]], repeats: int = 1) -> int:
    """Count the bytes that are taken from the card when tensors come and go in this order.

    Example:
        >>> reserved([(1, 1000), (2, 3 * 2**20)]) // 2**20  # a small segment, and one of 20 MiB
        22

    Args:
        events: the number of a tensor with its bytes, or with 0 where it goes; as in `Ledger.events`.
        repeats: how often to go through what begins and ends within the events, as a training run does.

    Returns:
        Bytes of all segments.
    """
    pools: dict[bool, list[tuple[int, int]]] = {True: [], False: []}  # free blocks (size, start), by size
    segment_ends: dict[int, int] = {}
    after: dict[int, int] = {}  # start of a block -> its end, free or not
    before: dict[int, int] = {}  # end of a block -> its start
    free: set[int] = set()
    held: dict[int, tuple[int, bool]] = {}
    events = list(events)
    top = 0

    def cut(start: int, end: int) -> None:
        after[start], before[end] = end, start

    def take(small: bool, length: int, start: int) -> None:
        free.discard(start)
        del pools[small][bisect_left(pools[small], (length, start))]

    for _ in range(repeats):
        for number, size in events:
            if not size:
                if number not in held:
                    continue
                start, small = held.pop(number)
                end = after[start]
                if (previous := before.get(start)) in free and start not in segment_ends:
                    take(small, start - previous, previous)
                    del after[start], before[start]
                    start = previous
                if end in free and end not in segment_ends:
                    take(small, after[end] - end, end)
                    last = after.pop(end)
                    del before[end]
                    end = last
                cut(start, end)
                free.add(start)
                insort(pools[small], (end - start, start))
                continue
            if number in held:
                continue  # it stayed from the turn before
            need = max(UNIT, -(-size // UNIT) * UNIT)
            small = need <= SMALL
            place = bisect_left(pools[small], (need, -1))
            if place < len(pools[small]):
                length, start = pools[small].pop(place)
                free.discard(start)
            else:
                length = 2 * MIB if small else 20 * MIB if need < LARGE else -(-need // (2 * MIB)) * 2 * MIB
                start, top = top, top + length
                segment_ends[start] = top
            rest = length - need
            if rest >= UNIT if small else rest > SMALL:
                cut(start, start + need)
                cut(start + need, start + length)
                free.add(start + need)
                insort(pools[small], (rest, start + need))
            else:
                cut(start, start + length)
            held[number] = (start, small)
    return top
