"""Memory: measure it during a run."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch


@dataclass
class Memory:
    """What `measure` saw, in bytes.

    Attributes:
        start_bytes: in use when the measurement began.
        peak_bytes: the most in use at any moment since. On CUDA what PyTorch allocated, elsewhere the resident memory
            of the whole process, interpreter and libraries included.
        device: "cuda" or "cpu".
    """

    start_bytes: int
    peak_bytes: int
    device: str


@contextmanager
def measure(every: float = 0.02) -> Iterator[Memory]:
    """Measure the peak memory of what runs inside.

    Example:
        >>> with measure() as memory:
        ...     _ = torch.ones(2**24).sum()
        >>> memory.peak_bytes >= memory.start_bytes
        True

    Args:
        every: seconds between two looks at the process's memory, on a CPU. Shorter peaks may go unseen.

    Yields:
        A `Memory` whose figures are final when the block ends.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        memory = Memory(torch.cuda.memory_allocated(), 0, "cuda")
        try:
            yield memory
        finally:
            torch.cuda.synchronize()
            memory.peak_bytes = torch.cuda.max_memory_allocated()
        return

    process = psutil.Process()
    start = process.memory_info().rss
    memory = Memory(start, start, "cpu")
    done = threading.Event()

    def look() -> None:
        memory.peak_bytes = max(memory.peak_bytes, process.memory_info().rss)

    def watch() -> None:
        while not done.wait(every):
            look()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield memory
    finally:
        done.set()
        watcher.join()
        look()
