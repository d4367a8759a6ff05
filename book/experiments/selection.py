"""The experiment of the chapter *Selection*: which frames are kept, and what a model makes of them.

    cd book && python -m experiments.selection frames     # every selector, and a model as it comes
    cd book && python -m experiments.selection sounds     # the same for segments of sound
    cd book && python -m experiments.selection floors     # how many frames, by what is taken for noise
    cd book && python -m experiments.selection heights    # how high the floor of log-determinants is
    cd book && python -m experiments.selection prices     # thumbnails, or what the encoder makes of the frames
    cd book && python -m experiments.selection cache      # frames and bits under one budget of memory
    cd book && python -m experiments.selection trained --tune   # learning rates: before the next
    cd book && python -m experiments.selection trained    # QLoRA on the frames of a selector

Clips of 48 to 64 frames, two to four times as long as those that the base model has seen. It is in NF4 throughout.
Selectors see thumbnails, but for "floors", "prices" and "cache", where they see what the model itself computes. Each
seed has clips of its own; what is tuned, or calibrated, has others.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from experiments import tuning
from experiments.runs import run_on
from mmqlora import benchmark
from mmqlora.datasets.worlds import FRAME_RATE, PACES, Item, World
from mmqlora.features import Features, thumbnail_features
from mmqlora.grids import run_grid
from mmqlora.noise import QuantizationNoise, encoder_features, quantization_noise
from mmqlora.records import make_record
from mmqlora.selection import SELECTORS, Noise, independent, select_frames
from mmqlora.spans import select_segments

RECORDS = Path(__file__).parent.parent / "records"
SEEDS = range(1, 7)
FRAMES = (48, 64)
ITEMS = 100  # of each pace
TEST, CALIBRATION, TRAIN = 3000, 4000, 5000  # plus the seed
BUDGETS = (4, 8, 16, 24)
SECONDS = (1.0, 1.5, 2.0, 3.0)
BITS = (16, 8, 4, 3, 2)
GRAINS = (0.0, 0.1)
FLOORS = ("none", "clip", "difference", "error")
MOST = 24  # frames that the base model has seen in training
HEIGHTS = (0.0, 1e-3, 0.1, 1.0, 10.0, 100.0)  # gray levels of 255
FEATURES = {
    "thumbnails": (0, None),
    "first layer, NF4": (1, 4),
    "encoder, NF4": (None, 4),
    "encoder, 16 bits": (None, 16),
}
STORED = (16, 8, 6, 5, 4, 3, 2)
STORES = (16, 32, 64, 96)  # bits for each feature of a clip, all its frames together
BLOCK = 64  # numbers that share a scale
TRAINED = ("all", *SELECTORS)
PARTS = (4, 8)  # one frame in so many; learning rates are chosen at the first
LONGER = "all, 3 times the steps"
RATE, RANK, STEPS, BATCH = 3e-3, 8, 100, 16


def states(item: Item) -> list[tuple[int, int]]:
    """First frame and last + 1 of each stretch between events, in which nothing happens."""
    starts, stops = zip(*happening(item), strict=True)
    return [(a, b) for a, b in zip((0, *stops), (*starts, len(item.frames)), strict=True) if b > a]


def happening(item: Item) -> list[tuple[int, int]]:
    """First frame and last + 1 of each event."""
    return [(round(event.start * FRAME_RATE), round(event.stop * FRAME_RATE)) for event in item.events]


def shown(spans: Sequence[tuple[int, int]], keep: np.ndarray) -> float:
    """Share of spans of which a frame is kept; NaN of none."""
    return float(np.mean([((keep >= a) & (keep < b)).any() for a, b in spans])) if spans else float("nan")


def truth(items: Sequence[Item], keeps: Sequence[np.ndarray]) -> dict[str, list[float]]:
    """Of each item: the share of states that are covered, of events, and of collisions, which leave no trace."""
    scores: dict[str, list[float]] = {"coverage": [], "recall": [], "collisions": []}
    for item, keep in zip(items, keeps, strict=True):
        spans = happening(item)
        hits = [span for span, event in zip(spans, item.events, strict=True) if event.predicate.startswith("hits")]
        for name, what in (("coverage", states(item)), ("recall", spans), ("collisions", hits)):
            scores[name].append(shown(what, keep))
    return scores


def with_frames(items: Sequence[Item], keeps: Sequence[np.ndarray]) -> list[Item]:
    """The items with the frames that were kept."""
    return [replace(item, frames=item.frames[keep]) for item, keep in zip(items, keeps, strict=True)]


@functools.lru_cache(maxsize=1)
def clips(seed: int, pace: str | None, count: int = ITEMS, grain: float = 0.0) -> tuple[list[Item], str]:
    """Items with the fingerprint of their world."""
    world = World("clips", count, seed, {"grain": grain} if grain else {}, FRAMES, pace)
    return list(world), world.fingerprint()


@functools.lru_cache(maxsize=1)
def small(seed: int, pace: str | None) -> list[Features]:
    """The thumbnails of items."""
    return [thumbnail_features(item.frames) for item in clips(seed, pace)[0]]


def record(config: dict[str, Any], seed: int, data: str, items: dict[str, list[float]], **metrics: float) -> Any:
    """Metrics are means over items; the score of each item stays beside them."""
    means = {name: float(np.nanmean(values)) for name, values in items.items()}
    kept = {name: items[name] for name in ("coverage", "word_accuracy", "exact_match") if name in items}
    kept = {name: np.round(values, 4).tolist() for name, values in kept.items()}
    return make_record("selection", config, seed, data=data, measured={"metrics": {**means, **metrics}, "items": kept})


def frames(config: dict[str, Any], seed: int) -> dict[str, Any]:
    """One selector and budget, and the score of the model as it comes."""
    items, data = clips(TEST + seed, config["pace"])
    keeps = [np.arange(len(item.frames)) for item in items]
    if config["method"] != "all":
        own = small(TEST + seed, config["pace"])
        keeps = [
            select_frames(one, config["budget"], config["method"], seed=seed * ITEMS + index).indices
            for index, one in enumerate(own)
        ]
    scores = benchmark.evaluate(_model("video"), benchmark.READERS["video"], with_frames(items, keeps))["items"]
    return record(config, seed, data, {**truth(items, keeps), **scores})


def sounds(config: dict[str, Any], seed: int) -> dict[str, Any]:
    """The same for segments of sound; ``budget`` in seconds, margins not counted. What is kept is joined."""
    world = World("sounds", ITEMS, TEST + seed, frames=(40, 48), pace=config["pace"])
    items, cut, heard, whole, kept = list(world), [], [], [], []
    for index, item in enumerate(items):
        audio, seconds = item.audio, np.array([[0.0, item.audio.duration]])
        if config["method"] != "all":
            method = config["method"].removesuffix(", repeats dropped")
            repeats = not config["method"].endswith("dropped")
            options = {"repeats": repeats, "margin": 0.05} if method == "segments" else {"margin": 0.0}
            spans = select_segments(audio, config["budget"], method, seed=seed * ITEMS + index, **options)
            audio, seconds = spans.cut(audio), spans.seconds
        cut.append(replace(item, audio=audio))
        share = [
            np.clip(np.minimum(seconds[:, 1], e.stop) - np.maximum(seconds[:, 0], e.start), 0, None).sum()
            / (e.stop - e.start)
            for e in item.events
        ]
        heard.append(float(np.mean(share)))
        whole.append(float(np.mean(np.array(share) > 0.5)))
        kept.append(float((seconds[:, 1] - seconds[:, 0]).sum()))
    scores = benchmark.evaluate(_model("audio"), benchmark.READERS["audio"], cut)["items"]
    return record(config, seed, world.fingerprint(), {"heard": heard, "recall": whole, "seconds": kept, **scores})


def rounded(weight: Tensor, bits: int) -> Tensor:
    """What is left of numbers that are stored with so many bits: whole multiples of a scale for each 64."""
    if bits == 16:
        return weight
    rows, top = weight.float().reshape(-1, BLOCK), 2 ** (bits - 1) - 1
    scale = (rows.abs().amax(1, keepdim=True) / top).clamp(min=1e-12)
    return ((rows / scale).round() * scale).reshape(weight.shape).to(weight.dtype)


@functools.lru_cache(maxsize=1)
def at_bits(bits: int) -> nn.Module:
    """The video model with weights of 16, 8, 3 or 2 bits, rounded to nearest, or of 4 bits, NF4."""
    if bits == 4:
        return _model("video")
    model = benchmark.task("video/none").load()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith("lm_head") and module.weight.numel() % BLOCK == 0:
            module.weight.data = rounded(module.weight.data, bits)
    return model


def batches(items: Sequence[Item], size: int = 12) -> Iterator[dict[str, Tensor]]:
    """Items as the model reads them."""
    reader = benchmark.READERS["video"]
    for start in range(0, len(items), size):
        yield reader.collate([reader.encode(item) for item in items[start : start + size]])


@functools.lru_cache(maxsize=1)
def seen(bits: int, seed: int, grain: float) -> list[Features]:
    """What the encoder of so many bits makes of the test clips."""
    return [one for b in batches(mixed(TEST + seed, grain)[0]) for one in encoder_features(at_bits(bits), b)]


@functools.lru_cache(maxsize=1)
def measured(bits: int, grain: float) -> QuantizationNoise:
    """The noise of the encoder, on other clips."""
    reference = benchmark.task("video/none").load()
    return quantization_noise(at_bits(bits), batches(clips(CALIBRATION, None, 24, grain)[0]), reference)


def mixed(seed: int, grain: float = 0.0, each: int = 20) -> tuple[list[Item], str]:
    """Clips of all paces."""
    found = [clips(seed, pace, each, grain) for pace in PACES]
    return [item for items, _ in found for item in items], " ".join(data for _, data in found)


def floors(config: dict[str, Any], seed: int) -> dict[str, Any]:
    """As many frames as a floor of noise says, at most `MOST`; or so many, of which it says how many show something."""
    bits, grain = config["bits"], config["grain"]
    items, data = mixed(TEST + seed, grain)
    noise: Any = None
    if config["floor"] == "none":
        noise = 1e-4
    elif config["floor"] != "clip":
        noise = measured(bits, grain)
        if config["floor"] == "error":
            noise = Noise(noise.errors, noise.dimensions)
    budget = config["budget"]
    keeps = [
        select_frames(one, budget or MOST, adaptive=budget is None, noise=noise).indices
        for one in seen(bits, seed, grain)
    ]
    scores = benchmark.evaluate(at_bits(bits), benchmark.READERS["video"], with_frames(items, keeps))["items"]
    counts = [float(len(keep)) for keep in keeps]
    more = {}
    if bits < 16:
        last = measured(bits, grain).layers.iloc[-1]
        more = {f"noise {name}": float(last[name]) for name in ("error", "difference", "variation")}
    return record(config, seed, data, {**truth(items, keeps), "frames": counts, **scores}, **more)


def heights(config: dict[str, Any], seed: int) -> dict[str, Any]:
    """Log-determinants with a floor of some height, or of none."""
    items, data = clips(TEST + seed, "bursty")
    method = {"method": "logdet", "noise": config["height"]} if config["height"] else {"method": "logdet-no-noise"}
    keeps = [select_frames(one, 16, **method).indices for one in small(TEST + seed, "bursty")]
    scores = benchmark.evaluate(_model("video"), benchmark.READERS["video"], with_frames(items, keeps))["items"]
    return record(config, seed, data, {**truth(items, keeps), **scores})


def prices(config: dict[str, Any], seed: int) -> dict[str, Any]:
    """The same frames to choose from, seen as thumbnails, behind the first layer or behind all of the encoder."""
    items, data = mixed(TEST + seed)
    layer, bits = FEATURES[config["features"]]
    start = time.process_time()
    if bits is None:
        found = [thumbnail_features(item.frames) for item in items]
    else:
        found = [one for batch in batches(items) for one in encoder_features(at_bits(bits), batch, layer=layer)]
    spent = (time.process_time() - start) / len(items)
    keeps = [select_frames(one, config["budget"]).indices for one in found]
    scores = benchmark.evaluate(_model("video"), benchmark.READERS["video"], with_frames(items, keeps))["items"]
    return record(config, seed, data, {**truth(items, keeps), **scores}, cpu_s=spent)


@contextmanager
def stored(model: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """What the connector gives the decoder, one row a frame, as it comes out of a store."""
    handle = model.model.connector.register_forward_hook(lambda module, args, output: change(output))
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def rows(items: Sequence[Item]) -> list[Tensor]:
    """What the connector makes of each frame of each item, (F, D)."""
    model, found = _model("video"), []
    for item in items:
        with stored(model, lambda output: found.append(output.flatten(0, -2)) or output):
            model(**next(batches([item])))
    return found


@functools.lru_cache(maxsize=1)
def calibrated() -> dict[str, Any]:
    """The fewest bits at which noise hides no change between frames, by its differences and by the error itself."""
    found = rows(clips(CALIBRATION, None, 24)[0])
    exact = sum(len(select_frames(x, noise=1e-4)) for x in found)
    fewest: dict[str, int] = {}
    table = {}
    size = float(np.mean([float(x.var(0).mean()) for x in found]))
    for bits in STORED[1:]:
        errors = [(rounded(x, bits) - x).double().numpy() for x in found]
        steps = [np.diff(e, axis=0) / np.sqrt(2) for e in errors]
        for name, parts in (("difference", steps), ("error", errors)):
            deviation = np.sqrt(np.mean([np.square(part).mean(0) for part in parts], axis=0))
            noise = Noise(deviation, independent(np.concatenate(parts) / deviation))
            kept = sum(len(select_frames(x, noise=noise)) for x in found) / exact
            table[f"{name} {bits}"] = float(np.sqrt(np.square(deviation).mean() / size))
            table[f"{name} kept {bits}"] = kept
            if kept > 0.99:
                fewest[name] = bits
    return {"fewest": fewest, "table": table}


def cache(config: dict[str, Any], seed: int) -> dict[str, Any]:
    """As many frames as a budget holds with so many bits for each feature; the decoder reads what was stored."""
    items, data = mixed(TEST + seed)
    bits, table = config["bits"], calibrated()
    budget = min(MOST, config["store"] // bits)
    keeps = [select_frames(x, budget, config["method"]).indices for x in _rows(seed)]
    model = _model("video")
    with stored(model, lambda output: rounded(output, bits)):
        scores = benchmark.evaluate(model, benchmark.READERS["video"], with_frames(items, keeps))["items"]
    more = {f"fewest by {name}": float(number) for name, number in table["fewest"].items()}
    return record(config, seed, data, {**truth(items, keeps), **scores}, frames=float(budget), **more, **table["table"])


@functools.lru_cache(maxsize=1)
def _rows(seed: int) -> list[Tensor]:
    return rows(mixed(TEST + seed)[0])


@functools.lru_cache(maxsize=2)
def _model(name: str) -> nn.Module:
    return benchmark.task(f"{name}/none").load("nf4")


class Chosen(torch.utils.data.Dataset):
    """Items of a world with the frames that a selector keeps, encoded when they are first asked for."""

    def __init__(self, world: World, choose: Callable[[Item], np.ndarray]) -> None:
        self.world, self.choose, self._kept = world, choose, {}

    def __len__(self) -> int:
        return len(self.world)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index not in self._kept:
            item = self.world[index]
            self._kept[index] = benchmark.READERS["video"].encode(with_frames([item], [self.choose(item)])[0])
        return self._kept[index]


def trained(config: dict[str, Any], seed: int) -> dict[str, Any]:
    """QLoRA on long clips in new colors, of which the model reads all frames, or one in four."""
    method, part = config["method"], config.get("part", PARTS[0])

    def choose(item: Item) -> np.ndarray:
        length = len(item.frames)
        if method not in SELECTORS:
            return np.arange(length)
        return select_frames(item.frames, length // part, method, seed=item.index).indices

    train = Chosen(World("clips", 1000, TRAIN + seed, {"palette": 1.0}, FRAMES), choose)
    # All seeds are judged on the same items, as in the benchmark.
    first = CALIBRATION if config.get("validation") else TEST
    tests = [item for p in PACES for item in World("clips", ITEMS, first, {"palette": 1.0}, FRAMES, p)]
    keeps = [choose(item) for item in tests]

    def judge(model: nn.Module) -> dict[str, Any]:
        scores = benchmark.evaluate(model, benchmark.READERS["video"], with_frames(tests, keeps))
        for name in ("word_accuracy", "exact_match"):
            by_pace = np.reshape(scores["items"][name], (len(PACES), ITEMS))
            scores |= {f"{name} {pace}": float(own.mean()) for pace, own in zip(PACES, by_pace, strict=True)}
            scores["items"] |= {f"{name} {pace}": own.tolist() for pace, own in zip(PACES, by_pace, strict=True)}
        return scores

    torch.manual_seed(seed)
    settings = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": "all-linear"}
    task = benchmark.task("video/none")
    model = get_peft_model(task.load("nf4"), LoraConfig(**settings))
    about = {"experiment": "selection_trained", "config": config, "seed": seed}
    sizes = {"steps": 3 * STEPS if method == LONGER else STEPS, "batch_size": BATCH}
    return run_on(task, model, train, judge, **about, **sizes)


def score(found: Any) -> float:
    """Primary score of a record."""
    return found["metrics"]["word_accuracy"]


def rates() -> dict[str, float]:
    """The learning rate of each selector."""
    found = tuning.tried(RECORDS / "selection_tuning.jsonl", score)
    return {json.loads(key)["method"]: max(scores, key=scores.get) for key, scores in found.items()}


def wanted(part: str) -> list[tuple[dict[str, Any], int]]:
    """The runs of a part."""
    cells: list[dict[str, Any]] = []
    if part == "frames":
        cells = [{"pace": p, "method": m, "budget": b} for p in PACES for m in SELECTORS for b in BUDGETS]
        cells += [{"pace": p, "method": "all", "budget": None} for p in PACES]
    elif part == "sounds":
        methods = ("segments", "segments, repeats dropped", "uniform", "random", "kcenter", "logdet", "difference")
        cells = [{"pace": p, "method": m, "budget": b} for p in PACES for m in methods for b in SECONDS]
        cells += [{"pace": p, "method": m, "budget": None} for p in PACES for m in ("all", *methods[:2])]
    elif part == "floors":
        cells = [
            {"bits": bits, "grain": grain, "budget": budget, "floor": floor}
            for bits in BITS
            for grain in GRAINS
            for budget in (None, 16)
            for floor in (FLOORS if bits < 16 else FLOORS[:2])
        ]
    elif part == "heights":
        cells = [{"height": height} for height in HEIGHTS]
    elif part == "prices":
        cells = [{"features": name, "budget": budget} for name in FEATURES for budget in (4, 6, 8)]
    elif part == "cache":
        cells = [
            {"store": store, "bits": bits, "method": method}
            for store in STORES
            for bits in STORED
            for method in ("segments", "uniform")
            if store >= bits
        ]
    else:
        chosen = rates()
        cells = [{"method": method, "learning_rate": chosen[method]} for method in TRAINED if method in chosen]
        cells.append({"method": LONGER, "learning_rate": chosen["all"]})
        fewer = [
            {"method": method, "learning_rate": chosen[method], "part": part}
            for part in PARTS[1:]
            for method in SELECTORS
            if method in chosen
        ]
        return [(cell, seed) for some in (cells, fewer) for seed in SEEDS for cell in some]
    return [(cell, seed) for seed in SEEDS for cell in cells]


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("frames", "sounds", "floors", "heights", "prices", "cache", "trained"))
    parser.add_argument("--tune", action="store_true", help="of 'trained'")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    options = {"processes": arguments.processes, "timeout": 1800}
    if arguments.tune:
        cells = [({"method": method, "validation": True}, RATE) for method in TRAINED]
        tuning.tune("experiments.selection:trained", cells, RECORDS / "selection_tuning.jsonl", score, **options)
        return
    path = RECORDS / f"selection_{arguments.part}.jsonl"
    grid = run_grid(f"experiments.selection:{arguments.part}", wanted(arguments.part), path, **options)
    for failure in grid.failures:
        print(failure.config, failure.seed, failure.error[-500:], file=sys.stderr)


if __name__ == "__main__":
    main()
