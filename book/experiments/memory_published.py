"""Peaks that others measured and published, against what is predicted for them; chapter *Memory*.

    cd book && python -m experiments.memory_published

Each row is a fine-tuning run whose settings its source says. What it does not say is assumed and named. Nothing in
the planner was fitted to these rows. Runs that are spread over several GPUs, use another library's model code, or
int8 weights, are not predicted, and listed with the reason.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from tqdm import tqdm

from mmqlora.allocator import reserved
from mmqlora.inputs import Sizes, make_inputs
from mmqlora.planner import WORKSPACE
from mmqlora.quantization import quantize
from mmqlora.records import append_record, make_record
from mmqlora.rehearsal import hollow, rehearse, tower

RECORDS = Path(__file__).parent.parent / "records" / "memory_published.jsonl"
GIB, MIB = 2**30, 2**20
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEARS = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


def config(kind: type[Any], width: int, inner: int, layers: int, heads: int, key_heads: int, **more: Any) -> Any:
    """The configuration of a text model."""
    return kind(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=8192,
        **more,
    )


llama = partial(config, transformers.LlamaConfig)
qwen = partial(config, transformers.Qwen2Config, vocab_size=151936, tie_word_embeddings=True)
tied = {"tie_word_embeddings": True}
CONFIGS: dict[str, Callable[[], Any]] = {
    "LLaMA-7B": partial(llama, 4096, 11008, 32, 32, 32, vocab_size=32000),
    "LLaMA-13B": partial(llama, 5120, 13824, 40, 40, 40, vocab_size=32000),
    "Llama-3.2-3B": partial(llama, 3072, 8192, 28, 24, 8, vocab_size=128256, head_dim=128, **tied),
    "TinyLlama-1.1B": partial(llama, 2048, 5632, 22, 32, 4, vocab_size=32000),
    "SmolLM2-1.7B": partial(llama, 2048, 8192, 24, 32, 32, vocab_size=49152, **tied),
    "Qwen2.5-0.5B": partial(qwen, 896, 4864, 24, 14, 2),
    "Qwen2.5-1.5B": partial(qwen, 1536, 8960, 28, 12, 2),
    "Qwen2.5-3B": partial(qwen, 2048, 11008, 36, 16, 2),
    "Qwen2.5-7B": partial(qwen, 3584, 18944, 28, 28, 4, vocab_size=152064, tie_word_embeddings=False),
}


@dataclass(frozen=True)
class Row:
    """One published run.

    Args:
        model: a key of `CONFIGS`.
        source: where it is published.
        tokens: of each text.
        batch: texts of a forward pass.
        allocated: bytes, where the source says so.
        reserved: the same.
        fits: whether it fitted into ``card`` bytes, where that is all the source says.
        card: bytes of the GPU.
        rank: of LoRA; 0 for full fine-tuning.
        targets: what LoRA is on.
        bits: of the base.
        checkpointing: whether activations are recomputed.
        optimizer: as `rehearse` names it.
        autocast: whether computation is under bfloat16 autocast.
        prepared: whether `prepare_model_for_kbit_training` made what is not quantized float32.
        double_quant: whether the scales are quantized, too.
        attention: how transformers computes it.
        dora: whether LoRA is DoRA.
        assumed: what the source does not say.
    """

    model: str
    source: str
    tokens: int
    batch: int = 1
    allocated: float | None = None
    reserved: float | None = None
    fits: bool | None = None
    card: float = 0
    rank: int = 16
    targets: tuple[str, ...] = tuple(LINEARS)
    bits: int = 4
    checkpointing: bool = True
    optimizer: str = "paged_adamw_8bit"
    autocast: bool = True
    prepared: bool = True
    double_quant: bool = True
    attention: str = "sdpa"
    dora: bool = False
    assumed: tuple[str, ...] = field(default=("LoRA on all Linears", "mixed precision"))


CAN = "DaoyuanLi2816/can-i-finetune-this, docs/rtx4080_baselines.md"
FITCHECK = "Anassbzdd/fitcheck, t4-qlora-2026-09-01.json"
PEFT = "huggingface/peft@5d602fd, method_comparison/MetaMathQA"
BLOG = "Hugging Face blog, 4bit-transformers-bitsandbytes"
T4 = 14.74 * GIB

_metamath = {
    "tokens": 768,
    "batch": 4,
    "bits": 16,
    "checkpointing": False,
    "autocast": False,
    "prepared": False,
    "optimizer": "adamw_torch",
}
_blog = {
    "attention": "eager",
    "rank": 8,
    "targets": ("q_proj", "v_proj"),
    "optimizer": "adamw_torch",
    "card": T4,
    "double_quant": False,
}
_unsaid = (
    "eager attention, as transformers had no other then",
    "LoRA of rank 8 on queries and values",
    "mixed precision",
    "float32 for what is not quantized",
)

ROWS: tuple[Row, ...] = (
    *(
        Row("Qwen2.5-1.5B", CAN, tokens, reserved=gib * GIB)
        for tokens, gib in ((512, 2.91), (1024, 4.36), (2048, 7.10), (4096, 13.56))
    ),
    Row("Qwen2.5-1.5B", CAN, 1024, 2, reserved=6.88 * GIB),
    Row("Qwen2.5-1.5B", CAN, 1024, reserved=9.55 * GIB, checkpointing=False),
    Row("Qwen2.5-0.5B", CAN, 1024, reserved=3.30 * GIB, allocated=3.12 * GIB),
    Row("Qwen2.5-3B", CAN, 1024, reserved=5.54 * GIB, allocated=5.17 * GIB),
    Row("Qwen2.5-7B", CAN, 1024, reserved=11.23 * GIB, allocated=10.00 * GIB),
    Row("TinyLlama-1.1B", FITCHECK, 2048, 2, 6655 * MIB, 7640 * MIB, rank=32, attention="eager"),
    Row("TinyLlama-1.1B", FITCHECK, 2048, 2, 3897 * MIB, 4640 * MIB, rank=32),
    Row("SmolLM2-1.7B", FITCHECK, 1024, 4, 5281 * MIB, 5908 * MIB, rank=32),
    Row("Qwen2.5-1.5B", FITCHECK, 1024, 2, 6823 * MIB, 7232 * MIB, rank=32),
    Row("Llama-3.2-3B", PEFT, reserved=38.87e9, rank=0, assumed=("longest batch: 4 times 768",), **_metamath),
    *(
        Row(
            "Llama-3.2-3B",
            PEFT,
            reserved=gb * 1e9,
            rank=rank,
            dora=dora,
            targets=("q_proj", "v_proj"),
            assumed=("LoRA on queries and values, PEFT's default", "longest batch: 4 times 768"),
            **_metamath,
        )
        for gb, rank, dora in ((22.29, 32, False), (22.55, 64, False), (24.53, 32, True))
    ),
    *(
        Row(
            model,
            BLOG,
            tokens,
            fits=fits,
            checkpointing=checkpointing,
            assumed=_unsaid,
            **{**_blog, "double_quant": twice},
        )
        for model, tokens, checkpointing, twice, fits in (
            ("LLaMA-7B", 512, False, False, True),
            ("LLaMA-7B", 1024, False, False, False),
            ("LLaMA-7B", 1024, True, False, True),
            ("LLaMA-13B", 512, True, False, True),
            ("LLaMA-13B", 1024, True, False, False),
            ("LLaMA-13B", 1024, True, True, True),
        )
    ),
)

NOT_PREDICTED = (
    ("Llama-2-7B, FSDP on two GPUs (fsdp_qlora)", "weights and states are spread over two cards"),
    ("Qwen2.5-VL-7B full and Qwen3-VL-4B LoRA (ms-swift)", "ZeRO spreads weights and states over two or four cards"),
    (
        "Llama-3.1-8B, Llama-3.2-3B (torchtune)",
        "torchtune's own model code, chunked loss, optimizer in the backward pass",
    ),
    ("VideoLLaMA2-7B", "not a model of transformers; text length not said"),
    ("Whisper-large-v2, int8 LoRA", "int8 weights are not planned"),
    ("Voxtral-Mini-3B, InternVL3.5-8B (axolotl)", "fused losses and kernels; media not said"),
    ("SmolVLM, Ministral-3-3B", "measured after training, or with images of sizes that are not said"),
    ("Qwen2.5-VL-7B LoRA (ms-swift)", "text length, precision and what is adapted not said"),
)


def predict(row: Row) -> dict[str, int]:
    """Bytes allocated and reserved, as the planner has them."""
    text, kind = CONFIGS[row.model](), transformers.AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(text, dtype=torch.bfloat16, attn_implementation=row.attention)
    if row.bits == 4:
        quantize(model, "nf4", double_quant=row.double_quant, compute_dtype=torch.bfloat16)
        if row.prepared:
            prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if row.rank:
        targets = list(row.targets)
        model = get_peft_model(model, LoraConfig(r=row.rank, target_modules=targets, use_dora=row.dora))
    model.train()
    if row.checkpointing:
        model.gradient_checkpointing_enable()
        model.config.use_cache = False
    hollow(model)
    base = model.get_base_model() if row.rank else model
    inputs = make_inputs(base, Sizes(tokens=row.tokens, batch_size=row.batch), features=tower(base))
    ledger = rehearse(model, inputs, optimizer=row.optimizer, bf16=row.autocast, cuda=True, regions={})
    events = [(0, WORKSPACE), *ledger.events]
    return {"allocated": ledger.peak + WORKSPACE, "reserved": reserved(events, repeats=2)}


def main() -> None:
    """Predict every row, and put the records in place of the old ones."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    RECORDS.unlink(missing_ok=True)
    for row in tqdm(ROWS):
        started = time.perf_counter()
        found = predict(row)
        settings = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(row).items()}
        measured = {"metrics": found, "wall_s": time.perf_counter() - started}
        append_record(RECORDS, make_record("memory_published", settings, 0, data="", measured=measured))
        published = {name: getattr(row, name) for name in ("allocated", "reserved") if getattr(row, name)}
        said = ", ".join(f"{name} {found[name] / GIB:.2f} of {there / GIB:.2f}" for name, there in published.items())
        said = said or f"reserved {found['reserved'] / GIB:.2f}, {'fitted' if row.fits else 'did not fit'}"
        tqdm.write(f"{row.model} {row.batch}x{row.tokens}: {said}")


if __name__ == "__main__":
    main()
