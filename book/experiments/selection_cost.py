"""What a choice of frames costs: beside their decoding, and beside determinants; and an hour of video, in memory.

    cd book && python -m experiments.selection_cost [--hour]

A generated film of 1,280 x 720 pixels, 1,024 frames in JPEG pictures, is shrunk to thumbnails while it is decoded, and
16 of its frames are chosen. CPU seconds count, the decoder's too, so that other work matters little; each round does
everything, in an order by chance. ``--hour`` adds a quarter of an hour and an hour at 5 frames a second.
"""

from __future__ import annotations

import argparse
import io
import random
import struct
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from tqdm import tqdm

from mmqlora import media
from mmqlora.features import Features, thumbnail_features
from mmqlora.memory import measure
from mmqlora.records import append_record, make_record
from mmqlora.selection import clip_noise, select_frames

RECORDS = Path(__file__).parent.parent / "records" / "selection_cost.jsonl"
ROUNDS, FRAMES, BUDGET, RATE = 7, 1024, 16, 5
HEIGHT, WIDTH, SCENE = 720, 1280, 40  # frames of a scene, on average


def film(path: Path, count: int, seed: int = 0) -> None:
    """Write an AVI file of JPEG pictures: scenes of soft colors, in which a square moves."""
    rng = np.random.default_rng(seed)
    left, places = 0, []
    with path.open("wb") as file:
        file.write(bytes(224))  # room for the head
        for _ in tqdm(range(count), desc="film", leave=False):
            if not left:
                left = int(rng.integers(SCENE // 4, 2 * SCENE))
                colors = rng.integers(0, 256, (6, 8, 3), np.uint8)
                scene = Image.fromarray(colors).resize((WIDTH, HEIGHT), Image.BICUBIC)
                x, y, speed = rng.integers(0, WIDTH // 2), rng.integers(0, HEIGHT - 80), rng.integers(0, 6)
            picture = scene.copy()
            picture.paste((255, 255, 255), (int(x), int(y), int(x) + 80, int(y) + 80))
            x, left = x + speed, left - 1
            body = io.BytesIO()
            picture.save(body, "JPEG", quality=60)
            data = body.getvalue() + bytes(body.tell() % 2)
            places.append((file.tell() - 220, len(data)))
            file.write(b"00dc" + struct.pack("<I", len(data)) + data)
        end = file.tell()
        index = b"".join(b"00dc" + struct.pack("<III", 0x10, *place) for place in places)
        file.write(b"idx1" + struct.pack("<I", len(index)) + index)
        largest = max(length for _, length in places)
        avih = struct.pack("<14I", 10**6 // RATE, 0, 0, 0x10, count, 0, 1, largest, WIDTH, HEIGHT, 0, 0, 0, 0)
        rest = (0, 0, 0, 1, RATE, 0, count, largest, 10000, 0, 0, 0, WIDTH, HEIGHT)
        strh = struct.pack("<4s4s8IiI4H", b"vids", b"MJPG", *rest)
        strf = struct.pack("<IiiHHIIiiII", 40, WIDTH, HEIGHT, 1, 24, 0x47504A4D, 3 * WIDTH * HEIGHT, 0, 0, 0, 0)
        stream = b"LIST" + struct.pack("<I", 4 + 16 + len(strh) + len(strf)) + b"strl"
        stream += b"strh" + struct.pack("<I", len(strh)) + strh + b"strf" + struct.pack("<I", len(strf)) + strf
        head = b"LIST" + struct.pack("<I", 4 + 8 + len(avih) + len(stream)) + b"hdrl"
        head += b"avih" + struct.pack("<I", len(avih)) + avih + stream
        head += b"LIST" + struct.pack("<I", end - 220) + b"movi"
        file.seek(0)
        file.write(b"RIFF" + struct.pack("<I", end + 8 + len(index) - 8) + b"AVI " + head)
        assert file.tell() == 224


def seconds() -> float:
    """CPU seconds of this process and of its decoder."""
    process = media._decoder().process
    times = psutil.Process(process.pid).cpu_times() if process is not None else None
    return time.process_time() + (times.user + times.system if times is not None else 0.0)


def determinants(x: np.ndarray, count: int, first: int) -> float:
    """The information of the frames that "logdet" chooses, by the determinant of every set that a frame more makes."""
    noise = clip_noise(x)
    x = x - x.mean(0, dtype=np.float64)
    square = np.square(x).sum(1)
    apart = np.maximum(square[:, None] + square - 2 * x @ x.T, 0)
    scale = 2 * square.mean()
    signal = np.exp(-apart / scale) / (2 * -np.expm1(-np.square(noise.deviation).sum() / scale)) + np.eye(len(x))
    chosen = [first]
    for _ in range(1, count):
        left = [t for t in range(len(x)) if t not in chosen]
        logs = [np.linalg.slogdet(signal[np.ix_([*chosen, t], [*chosen, t])])[1] for t in left]
        chosen.append(left[int(np.argmax(logs))])
    return float(max(logs)) / 2


def timed(function: Any) -> float:
    """CPU seconds."""
    start = seconds()
    function()
    return seconds() - start


def streamed(path: str) -> dict[str, float]:
    """Choose frames of a long film in a process of its own: CPU seconds, and bytes, those of the decoder apart.

    The decoder's bytes are those of the file and some more: decord puts what is not decoded yet into a queue.
    """
    torch.set_num_threads(1)
    with measure() as memory:
        start = seconds()
        features = thumbnail_features(path)
        decoding = seconds() - start
        start = seconds()
        kept = select_frames(features, BUDGET)
        adaptive = select_frames(features)
        choosing = seconds() - start
    decoder = psutil.Process(media._decoder().process.pid).memory_full_info()
    return {
        "frames": len(features),
        "decoding": decoding,
        "choosing": choosing,
        "file": Path(path).stat().st_size,
        "libraries": memory.start_bytes,
        "needed": memory.peak_bytes - memory.start_bytes,
        "decoder": decoder.rss,
        "excess": kept.excess / kept.error,
        "kept": len(adaptive),
    }


def main() -> None:
    """Measure, and put the record in place of the old one."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--hour", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "film.avi"
        film(path, FRAMES)
        features = Features(thumbnail_features(path).values)
        arms = {
            "decoding": lambda: thumbnail_features(path),
            "segments": lambda: select_frames(features, BUDGET),
            "adaptive": lambda: select_frames(features),
            "logdet": lambda: select_frames(features, BUDGET, "logdet"),
            "determinants": lambda: determinants(features.values, BUDGET, found.order[0]),
        }
        found = select_frames(features, BUDGET, "logdet")
        assert abs(found.gains.sum() - determinants(features.values, BUDGET, found.order[0])) < 1e-6
        taken: dict[str, list[float]] = {name: [] for name in arms}
        names = list(arms)
        for number in tqdm(range(-1, ROUNDS)):
            random.Random(number).shuffle(names)
            for name in names:
                spent = timed(arms[name])
                if number >= 0:  # the first one warms up
                    taken[name].append(spent)
        hours = {}
        if arguments.hour:
            for minutes in (15, 60):
                film(path, 60 * RATE * minutes)
                with ProcessPoolExecutor(1, get_context("spawn")) as alone:
                    hours[f"{minutes} minutes"] = alone.submit(streamed, str(path)).result()

    def ratio(one: str, other: str) -> list[float]:
        return [round(a / b, 5) for a, b in zip(taken[one], taken[other], strict=True)]

    items = {
        "segments over decoding": ratio("segments", "decoding"),
        "logdet over decoding": ratio("logdet", "decoding"),
        "determinants over logdet": ratio("determinants", "logdet"),
    }
    metrics: dict[str, Any] = {name: float(np.median(values)) for name, values in items.items()}
    metrics |= {f"{name}, seconds": float(np.median(values)) for name, values in taken.items()}
    metrics |= hours
    config = {"frames": FRAMES, "budget": BUDGET, "size": f"{HEIGHT}x{WIDTH}", "hour": arguments.hour}
    RECORDS.unlink(missing_ok=True)
    append_record(
        RECORDS, make_record("selection_cost", config, 0, data="", measured={"metrics": metrics, "items": items})
    )
    print(metrics)


if __name__ == "__main__":
    main()
