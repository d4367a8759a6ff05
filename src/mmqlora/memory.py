"""Memory: measure it during a run."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil
import torch

POINTS = 50  # of a timeline, at most


@dataclass
class Memory:
    """What `measure` saw, in bytes.

    Attributes:
        start_bytes: in use when the measurement began.
        peak_bytes: the most in use at any moment since. On CUDA what PyTorch allocated, elsewhere the resident memory
            of the whole process, interpreter and libraries included.
        device: "cuda" or "cpu".
        timeline: seconds since the start, and the most that was in use since the point before; 50 points at most. By
            region and kind, and to the byte, a `Ledger` has it.
    """

    start_bytes: int
    peak_bytes: int
    device: str
    timeline: list[tuple[float, int]] = field(default_factory=list)

    def note(self, seconds: float, used: int) -> None:
        """Take down what is in use."""
        self.peak_bytes = max(self.peak_bytes, used)
        self.timeline.append((round(seconds, 3), used))
        if len(self.timeline) >= 2 * POINTS:
            self.timeline = _halved(self.timeline)


@contextmanager
def measure(every: float = 0.02) -> Iterator[Memory]:
    """Measure the memory of what runs inside: its peak, and its course.

    Example:
        >>> with measure() as memory:
        ...     _ = torch.ones(2**24).sum()
        >>> memory.peak_bytes >= memory.start_bytes
        True

    Args:
        every: seconds between two looks. On a CPU shorter peaks may go unseen; on CUDA only the timeline misses them.

    Yields:
        A `Memory` whose figures are final when the block ends.
    """
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    process = psutil.Process()
    look = torch.cuda.memory_allocated if cuda else lambda: process.memory_info().rss
    memory = Memory(look(), 0, "cuda" if cuda else "cpu")
    began, done = time.perf_counter(), threading.Event()

    def watch() -> None:
        while not done.wait(every):
            memory.note(time.perf_counter() - began, look())

    memory.note(0.0, memory.start_bytes)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield memory
    finally:
        done.set()
        watcher.join()
        if cuda:
            torch.cuda.synchronize()
        memory.note(time.perf_counter() - began, look())
        if cuda:
            memory.peak_bytes = torch.cuda.max_memory_allocated()
        while len(memory.timeline) > POINTS:
            memory.timeline = _halved(memory.timeline)


def _halved(timeline: list[tuple[float, int]]) -> list[tuple[float, int]]:
    """Every two points as one, at the later time and with the larger number; the first stays."""
    first, rest = timeline[:1], timeline[1:]
    pairs = [rest[index : index + 2] for index in range(0, len(rest), 2)]
    return first + [(pair[-1][0], max(used for _, used in pair)) for pair in pairs]
