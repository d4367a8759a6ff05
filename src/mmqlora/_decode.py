"""The child process that decodes video for `mmqlora.media`: decord behind a pipe.

A decoder that hangs can't be interrupted and one that crashes takes its process along, so it gets a process of its
own, which the caller can end. This file is run as a script and imports nothing but NumPy and decord: it starts in a
fifth of a second. Requests are lines of JSON on stdin; replies are lines of JSON on stdout, followed by raw arrays.

    {"open": path, "size": [height, width] or null}  ->  {"count": N, "announced": N or null, "cut": bool, "rate": Hz}
                                                         and the float64 (N, 2) start and end of every frame
    {"read": [index, ...]}                           ->  {"shape": [F, H, W, 3]} and that many bytes, until all are read
    {"decodable": seconds}                           ->  {"decodable": N, "sure": bool}, the frames before the first bad
                                                         one; good ones may get lost near it, hence 'sure'
    any that fails                                   ->  {"error": text}
"""

from __future__ import annotations

import json
import math
import os
import queue
import signal
import struct
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, BinaryIO

CHUNK_BYTES = 32 << 20  # decoded at once, so that a long video is never in memory twice


def boxes(file: BinaryIO, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Give kind, first byte and last byte + 1 of every box of an MP4 file between two positions."""
    while start + 8 <= end:
        file.seek(start)
        size, kind = struct.unpack(">I4s", file.read(8))
        head = 8
        if size == 1:
            size, head = struct.unpack(">Q", file.read(8))[0], 16
        elif size == 0:
            size = end - start
        if size < head:
            return
        yield kind, start + head, start + size
        start += size


def within(file: BinaryIO, path: list[bytes], start: int, end: int) -> Iterator[tuple[int, int]]:
    """Give first and last byte + 1 of every box at a path of kinds."""
    for kind, first, last in boxes(file, start, end):
        if kind == path[0]:
            if len(path) == 1:
                yield first, last
            else:
                yield from within(file, path[1:], first, last)


def announced(path: str) -> tuple[int | None, bool]:
    """Say how many frames an MP4 or AVI file announces (None where it doesn't), and whether the file was cut short.

    decord counts the frames that it finds, so a file cut in half looks to it like a shorter one.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(4096)
        if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
            stream = head.find(b"strh")
            while stream >= 0 and head[stream + 8 : stream + 12] != b"vids":
                stream = head.find(b"strh", stream + 1)
            field = head[stream + 40 : stream + 44] if stream >= 0 else b""
            cut = struct.unpack("<I", head[4:8])[0] + 8 > size
            return (struct.unpack("<I", field)[0] or None if len(field) == 4 else None), cut
        if head[4:8] == b"ftyp":
            cut = any(last > size for _, _, last in boxes(file, 0, size))
            for first, last in within(file, [b"moov", b"trak", b"mdia"], 0, size):
                for handler, _ in within(file, [b"hdlr"], first, last):
                    file.seek(handler + 8)
                    if file.read(4) == b"vide":
                        for table, _ in within(file, [b"minf", b"stbl", b"stsz"], first, last):
                            file.seek(table + 8)
                            # A fragmented file has an empty table: its frames are announced elsewhere.
                            return struct.unpack(">I", file.read(4))[0] or None, cut
            return None, cut
    return None, False


def serve(requests: queue.SimpleQueue[bytes], out: BinaryIO) -> None:
    """Answer requests for ever."""
    import numpy as np

    path: str = ""
    size: tuple[int, int] = (-1, -1)
    reader: Any = None

    def opened() -> Any:
        from decord import VideoReader

        # One thread: workers are the parallelism. A vanishing tolerance: decord would otherwise put a copy of the
        # frame before in the place of one that it could not decode.
        return VideoReader(path, height=size[0], width=size[1], num_threads=1, fault_tol=1e-9)

    def one_by_one(indices: Any, end: float = math.inf) -> Iterator[Any]:
        """Decode frames singly. Stop at one that fails again and again, or when time is out."""
        nonlocal reader
        reader, tries, since = opened(), 0, time.monotonic()
        done = 0
        while done < len(indices) and time.monotonic() < end:
            try:
                if tries:
                    reader = opened()
                    reader[int(len(reader) * (0.618 * tries % 1))]
                frame = reader[int(indices[done])].asnumpy()
            except Exception:
                # decord reads ahead, and where it meets a damaged frame it drops good ones that are still in work. How
                # many is chance, worse on a busy machine and in a cold reader. So: a new one, warmed up elsewhere.
                tries += 1
                if tries >= 50 or (tries >= 8 and time.monotonic() > since + 1):
                    return
                continue
            done, tries, since = done + 1, 0, time.monotonic()
            # decord takes the padding at the end of a row for more channels where the padded length is a multiple of
            # the width: 8, 16, 24, 48 and 72 pixels, among others.
            height, width, _ = frame.shape
            yield frame.reshape(height, -1)[:, : 3 * width].reshape(height, width, 3)

    def decoded(indices: Any) -> Any:
        try:
            return reader.get_batch(indices).asnumpy()
        except Exception:
            frames = list(one_by_one(indices))
            if len(frames) < len(indices):
                raise
            return np.stack(frames)

    def reply(message: dict[str, Any], *arrays: Any) -> None:
        out.write(json.dumps(message).encode() + b"\n")
        for array in arrays:
            out.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        out.flush()

    while True:
        request = json.loads(requests.get())
        try:
            if "open" in request:
                path, size = request["open"], tuple(request["size"] or (-1, -1))
                reader = None  # free the one before first
                reader = opened()
                promised, cut = announced(path)
                times = reader.get_frame_timestamp(np.arange(len(reader))).astype(np.float64)
                rate = float(reader.get_avg_fps())
                message = {"count": len(reader), "announced": promised, "cut": cut}
                reply({**message, "rate": rate if np.isfinite(rate) else 0.0}, times)
            elif "read" in request:
                indices = np.asarray(request["read"], np.int64)
                step = 1
                while len(indices):
                    frames = decoded(indices[:step])
                    indices = indices[step:]
                    step = max(1, CHUNK_BYTES // frames[0].nbytes)
                    reply({"shape": frames.shape}, frames)
            else:
                end = time.monotonic() + request["decodable"]
                size = (64, 64)
                count = sum(1 for _ in one_by_one(np.arange(len(reader)), end))
                reply({"decodable": count, "sure": count == len(reader)})
        except Exception as error:
            reply({"error": f"{type(error).__name__}: {error}"})


def main() -> None:
    """Set up the pipes and serve until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it ends this process
    # What the decoder prints must not mix with the replies.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin.buffer:
            requests.put(line)
        os._exit(0)  # the parent is gone or done, and the main thread may be stuck in the decoder

    threading.Thread(target=listen, daemon=True).start()
    serve(requests, out)


if __name__ == "__main__":
    main()
