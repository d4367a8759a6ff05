"""What gates cost: time and memory of a training step beside PEFT's own QLoRA, in the chapter *Temporal adapters*.

    cd book && python -m experiments.temporal_cost
    cd book && python -m experiments.temporal_cost --signals    # signals beside decoding

One video-text model of 20 million parameters in NF4 with LoRA on all Linears, as PEFT has it and with gates. A round
runs one step of each, in an order by chance; its ratios are what counts, as whatever else the machine does hits all of
them. Memory is counted tensor by tensor.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from tqdm import tqdm

from mmqlora.gates import TemporalLoraConfig
from mmqlora.ledger import Ledger
from mmqlora.media import read_audio, read_video
from mmqlora.quantization import quantize
from mmqlora.records import append_record, fingerprint, make_record
from mmqlora.signals import signals
from mmqlora.training import _elements

RECORDS = Path(__file__).parent.parent / "records" / "temporal_cost.jsonl"
ROUNDS = 40
CLIPS, FRAMES, WORDS = 4, 16, 16
IMAGE = 5
ARMS: dict[str, dict[str, Any]] = {
    "lora": {},
    "gate": {"gate": True},
    "gate and convolution": {"gate": True, "kernel": 3},
    "gate from both": {"gate": True, "hidden": True},
    "shift": {"gate": False, "shift": True},
}


def build(arm: str) -> torch.nn.Module:
    """The model with one of the adapters."""
    torch.manual_seed(0)
    tower = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6}
    text = {"model_type": "llama", **tower, "num_key_value_heads": 6, "vocab_size": 512, "pad_token_id": 0}
    config = transformers.SmolVLMConfig(
        vision_config={**tower, "image_size": 64, "patch_size": 16},
        text_config={**text, "max_position_embeddings": 512},
        image_token_id=IMAGE,
        scale_factor=2,
    )
    model = transformers.SmolVLMForConditionalGeneration(config)
    quantize(model, "nf4")
    settings = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
    config = LoraConfig(**settings) if arm == "lora" else TemporalLoraConfig(**settings, **ARMS[arm])
    return get_peft_model(model, config).train()


def batch() -> dict[str, torch.Tensor]:
    """Clips of noise, four tokens a frame, and words."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(IMAGE + 1, 500, (CLIPS, WORDS), generator=generator)
    ids = torch.cat([torch.full((CLIPS, FRAMES * 4), IMAGE), words], 1)
    return {
        "pixel_values": torch.randn(CLIPS, FRAMES, 3, 64, 64, generator=generator),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.where(ids == IMAGE, -100, ids),
    }


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, given: dict[str, torch.Tensor]) -> float:
    """One optimizer step; CPU seconds."""
    start = time.process_time()
    model(**given).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.process_time() - start


def peak(arm: str) -> int:
    """Bytes that training needs beyond the model."""
    model = build(arm)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)
    with Ledger(model) as ledger:
        before = ledger.total
        for _ in range(2):  # the first makes the optimizer's states
            step(model, optimizer, batch())
    return ledger.peak - before


def run(rounds: int = ROUNDS, progress: bool = True) -> list[dict[str, Any]]:
    """A record for each arm."""
    given, order = batch(), list(ARMS)
    models = {arm: build(arm) for arm in ARMS}
    optimizers = {
        arm: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)
        for arm, model in models.items()
    }
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for number in tqdm(range(-2, rounds), disable=not progress):
        random.Random(number).shuffle(order)
        for arm in order:
            taken = step(models[arm], optimizers[arm], given)
            if number >= 0:  # the first ones warm up
                seconds[arm].append(taken)
    records = []
    for arm, model in models.items():
        ratios = [a / b for a, b in zip(seconds[arm], seconds["lora"], strict=True)]
        size = sum(_elements(p) for p in model.parameters())
        config = {"arm": arm, "clips": CLIPS, "frames": FRAMES, "parameters": size}
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        measured = {
            "metrics": {"ratio": float(torch.tensor(ratios).median()), "seconds": sum(seconds[arm]) / rounds},
            "items": {"ratio": [round(ratio, 4) for ratio in ratios]},
            "peak_bytes": peak(arm),
            "parameters": {"trainable": trained, "total": size},
        }
        records.append(make_record("temporal_cost", config, 0, data="", measured=measured))
    return records


def signals_beside_decoding(folder: Path, rounds: int = 7) -> list[dict[str, Any]]:
    """Seconds to read real files, and to compute their signals: the best of a few rounds of each, in turns."""
    files = [(path, read_video) for path in sorted((folder / "video").iterdir())]
    files += [(path, read_audio) for path in sorted((folder / "speech" / "librivox").glob("*.flac"))[-1:]]
    records = []
    for path, read in tqdm(files):
        taken: list[list[float]] = [[], []]
        for _ in range(rounds):
            start = time.perf_counter()
            media = read(path)
            between = time.perf_counter()
            signals(media)
            taken[0].append(between - start)
            taken[1].append(time.perf_counter() - between)
        decoding, computing = map(min, taken)
        metrics = {"decoding": decoding, "signals": computing, "ratio": computing / decoding}
        what = "x".join(map(str, media.frames.shape[:3])) if read is read_video else f"{media.duration:.0f} s"
        config = {"file": path.name, "size": what}
        records.append(make_record("signals_cost", config, 0, data=fingerprint(path), measured={"metrics": metrics}))
    return records


def main() -> None:
    """Measure, and put the records in place of the old ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--signals", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    real = Path(os.environ.get("MMQLORA_REAL", "../../shared/real"))
    records = signals_beside_decoding(real) if arguments.signals else run()
    path = RECORDS.with_name("signals_cost.jsonl") if arguments.signals else RECORDS
    path.unlink(missing_ok=True)
    for record in records:
        append_record(path, record)
        print(record["config"], record["metrics"])


if __name__ == "__main__":
    main()
