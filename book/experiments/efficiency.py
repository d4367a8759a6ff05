"""What fine-tuning costs: time, memory, storage; a roofline of 4-bit layers; how cost grows. Chapter *Efficiency*.

    cd book && python -m experiments.efficiency                    # all of it on a CPU: about 15 minutes
    cd book && python -m experiments.efficiency --part roofline    # or one part: hold, steps, roofline, scaling
    cd book && python -m experiments.efficiency --part curves      # scores in the course of training: 15 minutes more
    cd book && python -m experiments.efficiency --device cuda      # all of it on a GPU, curves apart
    cd book && python -m experiments.efficiency --quick --records FOLDER    # seconds: to see that it runs

``hold`` counts the bytes of tensors at the peak of a step, and those of the saved adapter, each in a process of its
own. Everything else compares within one process: a round does everything once, in an order by chance, and ratios
within rounds are what counts, as whatever else the machine does hits all of them. What `baselines_cost` has measured
on a CPU, the step times of the embedded models, is not measured again.

A GPU computes in bfloat16 under autocast, and trains with AdamW and with paged 8-bit AdamW. Whisper needs its weights,
in a folder that MMQLORA_MODELS lists; without them it is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import random
import sys
import tempfile
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from tqdm import tqdm
from transformers import TrainerCallback

from experiments import baselines
from experiments.baselines import MAIN
from mmqlora import benchmark, methods
from mmqlora.errors import QuantizationError
from mmqlora.grids import run_grid
from mmqlora.ledger import Ledger
from mmqlora.quantization import close_cpu_traps, load
from mmqlora.records import append_record, make_record, read_records
from mmqlora.training import fine_tune

RECORDS = Path(__file__).parent.parent / "records"
PARTS = ("hold", "steps", "roofline", "scaling")
OPTIMIZERS = {"adamw_torch": torch.optim.AdamW, "paged_adamw_8bit": bnb.optim.PagedAdamW8bit}
Batch = dict[str, torch.Tensor]
Arm = tuple[str, int]  # method, bits
Key = TypeVar("Key", bound=Hashable)

WHISPER = "openai/whisper-tiny.en"
# What fits Whisper, and differs in what it costs: a variant of LoRA's start costs what LoRA does.
WHISPER_ARMS: tuple[Arm, ...] = (
    ("full", 16),
    ("lora", 16),
    ("lora", 4),
    ("dora", 4),
    ("adalora", 4),
    ("oft", 4),
    ("vera", 4),
    ("ia3", 4),
    ("adapter", 4),
    ("ln-tuning", 4),
)
SECONDS, WORDS = 30, 24  # of sound and of text in the one item of Whisper's batch

WIDTHS, ROWS = (512, 2048), (1, 4, 16, 64, 256, 1024)
COPIED = 2**24  # float32 numbers, 64 MiB: more than a processor caches
PRODUCT = {"cpu": 1024, "cuda": 8192}  # height and width of the matrices that the rate is measured on
AT_LEAST = 0.01  # seconds; what is shorter is repeated

START = {"frames": 8, "rank": 8, "width": 256}
AXES: dict[str, tuple[int, ...]] = {"frames": (2, 4, 8, 16, 32), "rank": (2, 8, 32, 128), "width": (128, 256, 512, 768)}
SCALED: tuple[Arm, ...] = (("full", 16), ("lora", 16), ("lora", 4))
CLIPS, IMAGE = 2, 5

CURVES: tuple[Arm, ...] = (("full", 16), ("lora", 16), ("lora", 4))
SHARES = (0.1, 0.2, 0.4, 0.7, 1.0)  # of the steps, after which a run is judged
ITEMS = {"video": 50, "audio": 50, "retrieval": 100}


# Clocks


def now(device: str) -> float:
    """CPU seconds of this process; on a GPU seconds, when it has done all that it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def interleaved(
    arms: Mapping[Key, Callable[[int], Any]], rounds: int, device: str, what: str
) -> dict[Key, list[float]]:
    """Seconds of each arm in each round, which does all arms in an order by chance; one round more warms up."""
    seconds: dict[Key, list[float]] = {arm: [] for arm in arms}
    order = list(arms)
    for number in tqdm(range(-1, rounds), desc=what):
        random.Random(number).shuffle(order)
        for arm in order:
            start = now(device)
            arms[arm](number)
            if number >= 0:
                seconds[arm].append(now(device) - start)
    return seconds


# Steps


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    """One step of training: in bfloat16 under autocast on a GPU, in float32 on a CPU."""
    device = next(model.parameters()).device.type
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def batches_of(name: str, size: int, device: str, count: int = 4) -> list[Batch]:
    """Batches of a task of the benchmark; for Whisper noise, as its numbers change no time."""
    if name == WHISPER:
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(size, 80, 100 * SECONDS, generator=generator)
        labels = torch.randint(10, 50_000, (size, WORDS), generator=generator)
        batches = [{"input_features": features, "labels": labels}]
    else:
        task = benchmark.task(name)
        train = task.train(seed=0)
        batches = [task.collate([train[i] for i in range(n, n + size)]) for n in range(0, count * size, size)]
    return [{key: value.to(device) if torch.is_tensor(value) else value for key, value in b.items()} for b in batches]


def build(name: str, method: str, bits: int, batches: list[Batch], device: str) -> nn.Module:
    """The adapted model of an arm. Full fine-tuning keeps its weights in float32."""
    place = {"device_map": {"": device}, **({"dtype": torch.float32} if method == "full" else {})}
    model = load(WHISPER, quant_type=None, **place)[0] if name == WHISPER else benchmark.task(name).load(**place)
    more = {"batches": batches} if method == "eva" else {"steps": 100} if method == "adalora" else {}
    return methods.adapt(model, method, quant_type="nf4" if bits == 4 else None, **more).train()


def optimizer_of(model: nn.Module, name: str) -> torch.optim.Optimizer:
    """An optimizer over what is trained."""
    return OPTIMIZERS[name]([p for p in model.parameters() if p.requires_grad], lr=1e-5)


def peak(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> int:
    """Bytes of tensors at the peak of a step, with weights and with the optimizer's states, as in all but the first."""
    cuda = next(model.parameters()).device.type == "cuda"
    with contextlib.nullcontext() if cuda else Ledger(model, regions={}) as ledger:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # makes the states
        optimizer.zero_grad()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            step(model, optimizer, batch)
            return torch.cuda.max_memory_allocated()
        for value in batch.values():
            if torch.is_tensor(value):
                ledger.count(value, "inputs", "shared")
        step(model, optimizer, batch)
    return ledger.peak


def stored(model: nn.Module) -> int:
    """Bytes of weights that `save_pretrained` writes: of the adapter, or of the whole model where all is trained."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))


def arms_of(name: str) -> Sequence[Arm]:
    """Methods with their bits that are measured on a model."""
    return WHISPER_ARMS if name == WHISPER else baselines.arms(name)


def settings_of(name: str, arm: Arm, size: int, optimizer: str, device: str) -> dict[str, Any]:
    """What identifies a measurement of an arm."""
    run = {"model": name, "method": arm[0], "bits": arm[1], "batch_size": size}
    return {**run, "optimizer": optimizer, "device": device}


def hold(config: dict[str, Any], seed: int) -> dict[str, Any]:
    """The record of what an arm holds and stores. On a GPU it counts what PyTorch has allocated."""
    name, device = config["model"], config["device"]
    batches = batches_of(name, config["batch_size"], device, count=4 if config["method"] == "eva" else 1)
    model = build(name, config["method"], config["bits"], batches, device)
    metrics = {"stored_bytes": stored(model)}
    metrics["peak_bytes"] = peak(model, optimizer_of(model, config["optimizer"]), batches[0])
    measured = {"metrics": metrics, "parameters": methods.trainable(model)}
    return make_record("efficiency", config, seed, data="", measured=measured)


def measure_steps(
    sizes: Mapping[str, int], arms: Mapping[str, Sequence[Arm]], rounds: int, device: str
) -> Iterator[dict]:
    """A record for each arm of each model: seconds of a step, against those of PEFT's LoRA in 16 bits."""
    for name, size in sizes.items():
        batches = batches_of(name, size, device)
        optimizers = OPTIMIZERS if device == "cuda" else ("adamw_torch",)
        running = {}
        for arm in arms[name]:
            for optimizer in optimizers:
                model = build(name, *arm, batches, device)
                running[arm, optimizer] = functools.partial(_numbered, model, optimizer_of(model, optimizer), batches)
        seconds = interleaved(running, rounds, device, name)
        lora = torch.tensor(seconds[("lora", 16), "adamw_torch"])
        for (arm, optimizer), taken in seconds.items():
            config = settings_of(name, arm, size, optimizer, device)
            ratios = torch.tensor(taken) / lora
            middle = float(torch.tensor(taken).median())
            metrics = {"ratio": float(ratios.median()), "seconds": middle, "samples": size / middle}
            items = {"ratio": [round(float(r), 4) for r in ratios]}
            yield make_record("efficiency", config, 0, data="", measured={"metrics": metrics, "items": items})


def _numbered(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Batch], number: int) -> None:
    step(model, optimizer, batches[number % len(batches)])


# The roofline of a 4-bit layer


def measure_roofline(widths: Sequence[int], rows: Sequence[int], rounds: int, device: str) -> Iterator[dict]:
    """A record for each width: seconds of all that a layer does, in bfloat16 on a GPU and float32 on a CPU.

    ``items`` has a list for each operation, a number a round: ``copy`` of `COPIED` float32 numbers and ``product`` of
    two square matrices, which say what the machine can do; ``dequantize`` the layer's weight; and, by number of rows,
    ``multiply`` with a weight as large, ``layer`` a 4-bit layer's forward pass, ``frozen`` its forward and backward
    pass, and ``trained`` those of a 16-bit layer whose weight has a gradient.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for width in widths:
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(0)
        trained = nn.Linear(width, width, bias=False).to(device, dtype)
        settings = {"compute_dtype": dtype, "compress_statistics": False, "quant_type": "nf4"}
        layer, size = bnb.nn.Linear4bit(width, width, bias=False, **settings).to(device), PRODUCT[device]
        close_cpu_traps(layer)
        code, state = layer.weight.data, layer.weight.quant_state
        dense = bnb.functional.dequantize_4bit(code, state).to(dtype)
        source, target = torch.zeros(COPIED, device=device), torch.zeros(COPIED, device=device)
        square = torch.randn(size, size, generator=generator).to(device, dtype)
        arms: dict[str, Callable[[], Any]] = {
            "copy": functools.partial(target.copy_, source),
            "product": functools.partial(torch.mm, square, square),
            "dequantize": functools.partial(bnb.functional.dequantize_4bit, code, state),
        }
        for number in rows:
            # With a gradient wanted, bitsandbytes takes the path of training, not its kernel for one row at a time.
            x = torch.randn(number, width, generator=generator).to(device, dtype).requires_grad_()
            ones = torch.ones_like(x.detach())
            arms[f"multiply {number}"] = functools.partial(F.linear, x.detach(), dense)
            arms[f"layer {number}"] = functools.partial(layer, x)
            arms[f"frozen {number}"] = functools.partial(_there_and_back, layer, x, ones)
            arms[f"trained {number}"] = functools.partial(_there_and_back, trained, x, ones)
        repeats = {name: _repeats(function, device) for name, function in arms.items()}
        loops = {name: functools.partial(_loop, function, repeats[name]) for name, function in arms.items()}
        seconds = interleaved(loops, rounds, device, f"roofline {width}")
        items = {name: [float(f"{s / repeats[name]:.4g}") for s in taken] for name, taken in seconds.items()}
        stored = code.nbytes + state.absmax.nbytes
        config = {"width": width, "rows": list(rows), "product": size, "dtype": str(dtype)[6:], "device": device}
        measured = {"metrics": {"stored_bytes": stored, "copied_bytes": 8 * COPIED}, "items": items}
        yield make_record("efficiency", config, 0, data="", measured=measured)


def _there_and_back(layer: nn.Module, x: torch.Tensor, gradient: torch.Tensor) -> None:
    """A forward and a backward pass, with the gradient of the input and of a weight that has one."""
    wanted = [tensor for tensor in (x, layer.weight) if tensor.requires_grad]
    torch.autograd.grad(layer(x), wanted, gradient)


def _repeats(function: Callable[[], Any], device: str) -> int:
    """How often a function fits into `AT_LEAST`."""
    function()
    start = now(device)
    function()
    return min(1000, math.ceil(AT_LEAST / max(now(device) - start, 1e-9)))


def _loop(function: Callable[[], Any], repeats: int, _: int) -> None:
    for _ in range(repeats):
        function()


# How cost grows


def sized(frames: int, rank: int, width: int, arm: Arm, device: str) -> tuple[nn.Module, Batch]:
    """A video model of a width with adapters of a rank, and clips of so many frames of noise, four tokens each."""
    torch.manual_seed(0)
    tower = {
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": 4,
        "num_attention_heads": max(1, width // 64),
    }
    text = {"model_type": "llama", **tower, "num_key_value_heads": max(1, width // 64), "vocab_size": 512}
    config = transformers.SmolVLMConfig(
        vision_config={**tower, "image_size": 64, "patch_size": 16},
        text_config={**text, "max_position_embeddings": 512, "pad_token_id": 0},
        image_token_id=IMAGE,
        scale_factor=2,
    )
    base = transformers.SmolVLMForConditionalGeneration(config)
    method, bits = arm
    base = base.to(device, torch.bfloat16 if device == "cuda" and method != "full" else torch.float32)
    size = {} if method == "full" else {"rank": rank}
    model = methods.adapt(base, method, quant_type="nf4" if bits == 4 else None, **size).train()
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(IMAGE + 1, 500, (CLIPS, 16), generator=generator)
    ids = torch.cat([torch.full((CLIPS, frames * 4), IMAGE), words], 1)
    batch = {
        "pixel_values": torch.randn(CLIPS, frames, 3, 64, 64, generator=generator),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.where(ids == IMAGE, -100, ids),
    }
    return model, {name: value.to(device) for name, value in batch.items()}


def measure_scaling(
    axes: Mapping[str, Sequence[int]], start: Mapping[str, int], rounds: int, device: str
) -> Iterator[dict]:
    """A record for each value on each axis and each arm: seconds of a step by round, and bytes at its peak."""
    for axis, values in axes.items():
        points = [(value, arm) for value in values for arm in SCALED if (axis, arm[0]) != ("rank", "full")]
        # On a GPU all that is allocated is counted: first one after another, then all at once.
        running: dict[tuple[int, Arm], Callable[[int], None]] = {}
        held = {(value, arm): peak(*_ready({**start, axis: value}, arm, device)) for value, arm in points}
        for value, arm in points:
            model, optimizer, batch = _ready({**start, axis: value}, arm, device)
            running[value, arm] = functools.partial(_numbered, model, optimizer, [batch])
            del model, optimizer, batch
        for (value, arm), taken in interleaved(running, rounds, device, axis).items():
            config = {"axis": axis, "value": value, "method": arm[0], "bits": arm[1], "device": device}
            metrics = {"peak_bytes": held[value, arm], "seconds": float(torch.tensor(taken).median())}
            measured = {"metrics": metrics, "items": {"seconds": [round(s, 6) for s in taken]}}
            yield make_record("efficiency", config, 0, data="", measured=measured)


def _ready(sizes: dict[str, int], arm: Arm, device: str) -> tuple[nn.Module, torch.optim.Optimizer, Batch]:
    model, batch = sized(**sizes, arm=arm, device=device)
    return model, optimizer_of(model, "adamw_torch"), batch


# Scores in the course of training


class Watch(TrainerCallback):
    """Judges a model after some steps, and knows how long training itself took.

    Args:
        judge: from a model to its scores.
        points: steps after which to judge.
    """

    def __init__(self, judge: Callable[[nn.Module], dict[str, Any]], points: Sequence[int]) -> None:
        self.judge, self.points = judge, set(points)
        self.course: list[dict[str, Any]] = []
        self.judging = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step in self.points:
            before = time.process_time()
            scores = {name: value for name, value in self.judge(model).items() if name != "items"}
            model.train()
            self.course.append({"step": state.global_step, "cpu_s": before - self.start - self.judging, **scores})
            self.judging += time.process_time() - before


def curve(config: dict[str, Any], seed: int) -> dict[str, Any]:
    """The record of a run of the benchmark, with its scores on validation items on the way."""
    task = benchmark.task(config["task"])
    train, steps = task.train(seed), config.get("steps", task.steps)
    judge = task.judge(validation=True, count=config.get("items", ITEMS[task.model]))
    torch.manual_seed(seed)
    quant_type = "nf4" if config["bits"] == 4 else None
    model = methods.adapt(task.load(), config["method"], quant_type=quant_type, seed=seed)
    watch = Watch(judge, sorted({math.ceil(share * steps) for share in SHARES}))
    start = judge(model)
    record = fine_tune(
        model,
        train,
        collate=task.collate,
        seed=seed,
        steps=steps,
        batch_size=task.batch_size,
        learning_rate=config["learning_rate"],
        bf16=False,
        callbacks=[watch],
        experiment="efficiency",
        config=config,
        data=train.fingerprint(),
        progress=False,
    )
    first = {"step": 0, "cpu_s": 0.0, **{name: value for name, value in start.items() if name != "items"}}
    return {**record, "course": [first, *watch.course]}


def curve_runs(seeds: Sequence[int] = (1, 2)) -> list[tuple[dict[str, Any], int]]:
    """Runs of the curves, at the learning rates that the baselines chose."""
    return [
        ({"task": task, "method": method, "bits": bits, "learning_rate": baselines.best_rate(task, method)}, seed)
        for seed in seeds
        for task in MAIN
        for method, bits in CURVES
    ]


# All of it


def replace(path: Path, records: Iterator[dict]) -> None:
    """Put records in place of those that were made on the same device, once all of them are there."""
    fresh = list(records)
    devices = {record["config"]["device"] for record in fresh}
    kept = [r for r in (read_records(path) if path.exists() else []) if r["config"]["device"] not in devices]
    new = path.with_suffix(".new")
    new.unlink(missing_ok=True)
    for record in [*kept, *fresh]:
        append_record(new, record)
    new.replace(path)
    new.with_name(new.name + ".lock").unlink(missing_ok=True)


def at_hand(name: str) -> bool:
    """Whether a model is on this machine, or can be had."""
    if name in benchmark.TASKS:
        return True
    try:
        load(name, quant_type=None)
        return True
    except QuantizationError as error:
        print(f"{name} is left out: {str(error)[:200]}", file=sys.stderr)
        return False


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for, and put the records in place of the old ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=(*PARTS, "curves"), help="only this; may be given again")
    parser.add_argument("--method", action="append", help="hold and steps: only LoRA and this; may be given again")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--processes", type=int, default=2, help="of hold and curves, which are no matter of time")
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder to write into")
    parser.add_argument("--quick", action="store_true", help="little of everything")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no GPU")
    parts, device, rounds, quick = options.part or PARTS, options.device, options.rounds, options.quick
    rounds, names = (2, MAIN[:1]) if quick else (rounds, (*MAIN, *filter(at_hand, (WHISPER,))))
    arms = {name: (CURVES if quick else arms_of(name)) for name in names}
    if options.method:
        wanted = {"lora", *options.method}  # LoRA's time is what the others are measured by
        arms = {name: [arm for arm in some if arm[0] in wanted] for name, some in arms.items()}
    sizes = {name: 2 if quick else 1 if name == WHISPER else benchmark.task(name).batch_size for name in names}
    path = {part: options.records / f"efficiency_{part}.jsonl" for part in (*PARTS, "curves")}
    torch.set_num_threads(1)
    if "hold" in parts:
        optimizers = OPTIMIZERS if device == "cuda" else ("adamw_torch",)
        runs = [(settings_of(n, arm, sizes[n], o, device), 0) for n in names for arm in arms[n] for o in optimizers]
        if quick:  # a process of its own would take longer than all the rest
            replace(path["hold"], (hold(*run) for run in runs))
        else:
            processes = 1 if device == "cuda" else options.processes
            _grid("hold", runs, path["hold"], processes=processes, fresh=device == "cuda")
    if "steps" in parts:
        # The embedded ones are in baselines_cost.
        timed = {name: size for name, size in sizes.items() if device == "cuda" or quick or name not in MAIN}
        if timed:
            replace(path["steps"], measure_steps(timed, arms, rounds, device))
    if "roofline" in parts:
        widths, rows = ((64,), (1, 8, 64)) if quick else (WIDTHS, ROWS)
        replace(path["roofline"], measure_roofline(widths, rows, rounds, device))
    if "scaling" in parts:
        axes = {"frames": (1, 2), "rank": (1, 2), "width": (64, 128)} if quick else AXES
        start = {"frames": 1, "rank": 2, "width": 64} if quick else START
        replace(path["scaling"], measure_scaling(axes, start, rounds, device))
    if "curves" in parts:
        _grid("curve", curve_runs(), path["curves"], processes=options.processes)


def _grid(function: str, runs: list[tuple[dict[str, Any], int]], path: Path, **options: Any) -> None:
    grid = run_grid(f"experiments.efficiency:{function}", runs, path, timeout=3600, **options)
    for failure in grid.failures:
        print(failure.config, failure.seed, failure.error[-500:], file=sys.stderr)


if __name__ == "__main__":
    main()
