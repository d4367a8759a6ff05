"""Does it fit? The memory of a fine-tuning run, before there is a run::

    plan = mm.plan("HuggingFaceTB/SmolVLM2-500M-Video-Instruct", gpu="T4", frames=16)
    plan.table()          # what lives at the peak, by kind and region
    plan.fit()            # the cheapest change that makes it fit

A training step is rehearsed (`rehearsal`): the model's own code runs, on tensors without memory, and every byte that
would live is counted (`ledger`). From the order in which tensors come and go follows what PyTorch's allocator takes
from the card (`allocator`). So three figures are kept apart::

    allocated   bytes of tensors at the peak
    reserved    what the allocator holds for them
    process     reserved + the CUDA context, which is what nvidia-smi shows and what has to fit

Nothing was fitted to measurements, and there is no table of models.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoConfig, PretrainedConfig

from . import methods, quantization
from .allocator import reserved
from .errors import MMQLoRAError, PlanError
from .inputs import Sizes, make_inputs
from .ledger import KINDS
from .regions import REGIONS, regions
from .rehearsal import hollow, rehearse, tower

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["GPU", "GPUS", "Plan", "plan"]

logger = logging.getLogger("mmqlora")
GIB = 2**30


@dataclass(frozen=True)
class GPU:
    """A card of `GPUS`.

    Attributes:
        bytes: what PyTorch can use of it, as its own messages say.
        context: bytes that a CUDA context takes beside its tensors.
    """

    bytes: int
    context: int = int(0.5 * GIB)


GPUS: Mapping[str, GPU] = {
    "T4": GPU(int(14.74 * GIB), 141 * 2**20),
    "L4": GPU(int(22.03 * GIB)),
    "A10G": GPU(int(22.06 * GIB)),
    "RTX 4090": GPU(int(23.64 * GIB)),
    "A100 40GB": GPU(int(39.39 * GIB)),
    "A100": GPU(int(79.15 * GIB)),
    "H100": GPU(int(79.18 * GIB)),
}
"""The cards that `plan` knows by name; any other is given in bytes."""

# Where to look for the class of a configuration that does not name one, and so was not saved by a model.
WITH_LOSS = (
    "AutoModelForImageTextToText",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForMultimodalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForCausalLM",
    "AutoModelForCTC",
    "AutoModelForVideoClassification",
    "AutoModelForAudioClassification",
    "AutoModel",
)

WORKSPACE = 8_519_680  # of cuBLAS, which PyTorch takes from its allocator: 2 * 4 MiB + 8 * 16 KiB

# What a run can do without, in the order of what that costs: nothing, time, a little quality, and more of it.
CHANGES: tuple[tuple[str, str], ...] = (
    ("optimizer", "8-bit optimizer states, paged"),
    ("checkpointing", "recompute activations: about a third more time"),
    ("accumulate", "one item at a time, gradients accumulated"),
    ("rank", "half the rank"),
    ("frames", "half the frames"),
    ("pixels", "three quarters of the height and width"),
    ("frozen", "no adapters in the towers of frames and sounds"),
)


@dataclass(frozen=True)
class Plan:
    """What `plan` returns.

    Example:
        >>> plan = mm.plan(config, gpu="T4", frames=16)  # doctest: +SKIP
        >>> plan.fits, plan.process / 2**30  # doctest: +SKIP
        (True, 7.6)

    Attributes:
        model: name of the model or of its class.
        settings: the arguments of `plan`.
        parts: bytes at the peak by kind and region; their sum is ``allocated``.
        allocated: bytes of all tensors at the peak.
        reserved: bytes that PyTorch's allocator holds for them; on a CPU the same as allocated.
        process: bytes of the process on the card.
        paged: bytes of optimizer states that live in the host's memory and come when needed.
        trained: trained parameters.
        tokens: of the longest text, with those that stand for media.
    """

    model: str
    settings: Mapping[str, Any]
    parts: Mapping[tuple[str, str], int]
    allocated: int
    reserved: int
    process: int
    paged: int
    trained: int
    tokens: int
    _source: Any = field(repr=False, default=None)

    @property
    def limit(self) -> int | None:
        """Bytes of the card; None where none was named."""
        gpu = self.settings["gpu"]
        return None if gpu is None else _gpu(gpu).bytes

    @property
    def fits(self) -> bool | None:
        """Whether the process fits the card; None where none was named."""
        return None if self.limit is None else self.process <= self.limit

    def __str__(self) -> str:
        """Say what it takes, in a line."""
        where = "" if self.limit is None else f" of {self.limit / GIB:.2f} on {self.settings['gpu']}"
        verdict = {None: "", True: ": fits", False: ": does not fit"}[self.fits]
        return (
            f"{self.process / GIB:.2f} GiB{where}{verdict} "
            f"(allocated {self.allocated / GIB:.2f}, reserved {self.reserved / GIB:.2f})"
        )

    def table(self) -> pd.DataFrame:
        """Give bytes at the peak: a row for each kind, a column for each region."""
        import pandas as pd

        columns = [region for region in (*REGIONS, "shared") if any(place[1] == region for place in self.parts)]
        rows = [kind for kind in KINDS if any(place[0] == kind for place in self.parts)]
        values = [[self.parts.get((kind, region), 0) for region in columns] for kind in rows]
        table = pd.DataFrame(values, index=rows, columns=columns)
        table["all"] = table.sum(axis=1)
        return table

    def changed(self, **settings: Any) -> Plan:
        """Plan again with other settings.

        Example:
            >>> plan.changed(frames=8, checkpointing=True).process  # doctest: +SKIP
        """
        return plan(self._source, **{**self.settings, **settings})

    def changes(self) -> pd.DataFrame:
        """Try every change of `CHANGES` alone: what it costs, and what the run then takes.

        Example:
            >>> plan.changes()  # doctest: +SKIP
        """
        import pandas as pd

        rows = []
        for name, why in tqdm(CHANGES, desc="plan", leave=False):
            other = _less(self, name)
            if other:
                then = self.changed(**other)
                said = ", ".join(f"{key}={value!r}" for key, value in other.items())
                rows.append({"change": said, "costs": why, "process": then.process, "fits": then.fits})
        return pd.DataFrame(rows, columns=["change", "costs", "process", "fits"])

    def fit(self) -> Plan:
        """Give the plan itself if it fits, and else the one with the cheapest changes that do.

        First each change alone, in the order of what it costs; then all of them together, one after another.

        Example:
            >>> plan.fit().settings["checkpointing"]  # doctest: +SKIP
            True

        Raises:
            PlanError: no card was named, or nothing makes it fit; the message says what comes nearest.
        """
        if self.fits is None:
            raise PlanError("no GPU was named to fit; give gpu, one of " + ", ".join(GPUS) + ", or bytes.")
        if self.fits:
            return self
        alone = [other for name, _ in CHANGES if (other := _less(self, name))]
        for other in tqdm(alone, desc="plan", leave=False):
            if (then := self.changed(**other)).fits:
                return then
        then = self
        while True:
            before = then
            for name, _ in CHANGES:
                if other := _less(then, name):
                    then = then.changed(**other)
                    if then.fits:
                        return then
            if then is before:
                raise PlanError(f"nothing makes it fit; the least is {then}, with {_said(then)}.")

    def plot(self) -> Figure:
        """Draw the peak as a bar, a color for each region, with the card's limit across."""
        import matplotlib.pyplot as plt

        from . import plots

        table = self.table().drop(columns="all") / GIB
        figure, axes = plt.subplots(figsize=(7.2, 0.4 * len(table) + 1))
        colors = [plots.REGION_COLORS.get(region, "0.6") for region in table.columns]
        table.iloc[::-1].plot.barh(stacked=True, ax=axes, color=colors, width=0.7)
        axes.set_xlabel("GiB at the peak")
        axes.legend(title=None)
        return figure


def plan(
    model: str | os.PathLike[str] | PretrainedConfig | nn.Module,
    method: str = "lora",
    *,
    gpu: str | int | None = None,
    quant_type: str | None = "nf4",
    rank: int | None = None,
    frames: int = 8,
    pixels: int | None = None,
    seconds: float = 30.0,
    tokens: int = 128,
    batch_size: int = 1,
    accumulate: int = 1,
    checkpointing: bool = False,
    optimizer: str | None = None,
    frozen: tuple[str, ...] = (),
    dtype: torch.dtype | None = None,
    attention: str | None = None,
    inputs: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Plan:
    """Predict the memory of fine-tuning from a model's configuration alone: no weights, no GPU.

    Example:
        >>> mm.plan("Qwen/Qwen2.5-VL-7B-Instruct", gpu="T4", frames=16)  # doctest: +SKIP
        >>> mm.plan(config, "full", quant_type=None, gpu="A100").fit()  # doctest: +SKIP

    Args:
        model: a name or folder as for `load`, a configuration, or a model, whose weights are not looked at.
        method: a name in `METHODS`.
        gpu: a name in `GPUS`, or bytes; None plans for a CPU.
        quant_type: of the frozen base, "nf4" or "fp4"; None for 16 bits (32 on a CPU). Not for ``full``.
        rank: the size of the method, as for `adapt`.
        frames: frames of each video, F.
        pixels: height and width of a frame; None takes what the configuration says, or 448 where any size will do.
        seconds: of each sound; a model with a window, such as Whisper, takes all of it whatever is said.
        tokens: of text, beside those that stand for media.
        batch_size: B, of a forward pass.
        accumulate: forward passes of a step.
        checkpointing: recompute activations in the backward pass.
        optimizer: one of `rehearsal.OPTIMIZERS`; the default is that of `fine_tune`.
        frozen: regions without adapters, such as ``("vision",)``.
        dtype: of weights that are not quantized, and of the computation. Default: 16 bits on a GPU, float32 on a CPU.
            Full fine-tuning keeps its weights in float32.
        attention: "sdpa" or "eager"; None takes the model's default.
        inputs: a batch for the forward pass, where `make_inputs` can't make one. Frames and sounds may be on the meta
            device; the sizes above are then not looked at.
        settings: of the method, as for `adapt`.

    Returns:
        A `Plan`.

    Raises:
        PlanError: a setting is out of range, or the model's forward pass can't be rehearsed.
        MMQLoRAError: as of `load` and `adapt`.
    """
    asked = {key: value for key, value in locals().items() if key not in ("model", "settings")} | settings
    asked["frozen"] = frozen = (frozen,) if isinstance(frozen, str) else tuple(frozen)
    sizes = Sizes(frames, pixels, seconds, tokens, batch_size)
    if accumulate < 1:
        raise PlanError(f"accumulate={accumulate!r}: expected a whole number from 1 on.")
    card = None if gpu is None else _gpu(gpu)
    full = method == "full"
    if full and quant_type:
        raise PlanError("full fine-tuning changes the weights, which 4-bit weights can't be; give quant_type=None.")
    # float16, which autocast does not know on a CPU, where this runs, takes as much as bfloat16.
    compute = torch.bfloat16 if card else torch.float32
    if dtype:
        compute = torch.float32 if dtype.itemsize == 4 else torch.bfloat16
    config = _config(model)
    skeleton = _skeleton(model, config, torch.float32 if full else compute, attention)
    parts = regions(skeleton)
    adapted = _adapt(skeleton, method, quant_type, rank, frozen, settings, dict(parts))
    adapted.train()
    if checkpointing:
        adapted.gradient_checkpointing_enable()
    hollow(adapted)
    base = adapted.get_base_model() if hasattr(adapted, "get_base_model") else adapted
    optimizer = optimizer or ("adamw_torch" if card is None else "paged_adamw_8bit")
    try:
        batch = inputs or make_inputs(base, sizes, features=tower(base))
        ledger = rehearse(
            adapted,
            batch,
            optimizer=optimizer,
            bf16=card is not None or compute == torch.bfloat16,
            cuda=card is not None,
            accumulate=accumulate > 1,
            regions=dict(parts),
        )
    except MMQLoRAError:
        raise
    except Exception as error:  # a model's own code may raise anything when it meets inputs that are none
        raise PlanError(
            f"{type(base).__name__} can't be rehearsed with such inputs ({type(error).__name__}: {error}). "
            "Give `inputs`, a batch for its forward pass with labels; frames and sounds may be on the meta device."
        ) from error
    peak, held = ledger.peak, dict(ledger.at_peak)
    taken = peak
    if card is not None:
        held["workspace", "shared"] = held.get(("workspace", "shared"), 0) + WORKSPACE
        peak += WORKSPACE
        taken = max(peak, reserved([(0, WORKSPACE), *ledger.events], repeats=2))
    name = str(model) if isinstance(model, (str, os.PathLike)) else type(base).__name__
    return Plan(
        model=name,
        settings=asked,
        parts={place: size for place, size in held.items() if size},
        allocated=peak,
        reserved=taken,
        process=taken + (card.context if card else 0),
        paged=ledger.paged,
        trained=sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        tokens=int(batch["input_ids"].shape[-1]) if "input_ids" in batch else 0,
        _source=model if isinstance(model, nn.Module) else config,
    )


def _gpu(gpu: str | int) -> GPU:
    if isinstance(gpu, str):
        if gpu not in GPUS:
            raise PlanError(f"gpu={gpu!r} is unknown; use one of {', '.join(GPUS)}, or bytes.")
        return GPUS[gpu]
    if not gpu > 0:
        raise PlanError(f"gpu={gpu!r}: expected bytes, above 0, or one of {', '.join(GPUS)}.")
    return GPU(int(gpu))


def _config(model: Any) -> PretrainedConfig:
    if isinstance(model, PretrainedConfig):
        return model
    if isinstance(model, nn.Module):
        if not hasattr(model, "config"):
            raise PlanError(f"{type(model).__name__} has no config; expected a model of transformers.")
        return model.config
    place, searched = quantization._find(str(model))
    try:
        return AutoConfig.from_pretrained(place, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise PlanError(f"no configuration of {str(model)!r} in {'; '.join(searched)}: {error}") from error


def _skeleton(model: Any, config: PretrainedConfig, dtype: torch.dtype, attention: str | None) -> nn.Module:
    """The model on the meta device."""
    kind = type(model) if isinstance(model, nn.Module) else _class(config)
    arguments = {"attn_implementation": attention} if attention else {}
    with torch.device("meta"):
        return kind._from_config(config, dtype=dtype, **arguments)


def _class(config: PretrainedConfig) -> type[Any]:
    """The class that a configuration names, or where it names none, the first that is made for it and has a loss."""
    if config.architectures:
        return quantization._model_class(config, config.name_or_path or type(config).__name__)
    for auto in WITH_LOSS:
        if type(config) in (known := getattr(transformers, auto)._model_mapping):
            return known[type(config)]
    raise PlanError(f"{type(config).__name__} names no architecture; set config.architectures, or give a model.")


def _adapt(
    model: nn.Module,
    method: str,
    quant_type: str | None,
    rank: int | None,
    frozen: tuple[str, ...],
    settings: dict[str, Any],
    inside: dict[str, str],
) -> nn.Module:
    """The model with adapters, which start from nothing where a method would look at weights or batches."""
    if unknown := set(frozen) - set(REGIONS):
        raise PlanError(f"frozen={frozen!r}: {', '.join(sorted(unknown))} is no region; use {', '.join(REGIONS)}.")
    if method in ("eva", "pissa"):
        method = "lora"
    if method == "adalora":
        settings = {"steps": 1000, **settings}
    if frozen and method != "full":
        usual = methods._targets(model, methods.METHODS[method])
        settings = {"target_modules": [name for name in usual if inside.get(name) not in frozen], **settings}
        if not settings["target_modules"]:
            raise PlanError(f"frozen={frozen!r} leaves nothing to adapt.")
    adapted = methods.adapt(model, method, quant_type=quant_type, rank=rank, **settings)
    if frozen and method == "full":
        for name, region in inside.items():
            if region in frozen:
                model.get_submodule(name).requires_grad_(False)
    return adapted


def _less(planned: Plan, name: str) -> dict[str, Any]:
    """The settings of a change; none where there is nothing to change."""
    now = planned.settings
    if name == "optimizer" and now["optimizer"] not in (None, "paged_adamw_8bit"):
        return {"optimizer": "paged_adamw_8bit"}
    if name == "checkpointing" and not now["checkpointing"]:
        return {"checkpointing": True}
    if name == "accumulate" and now["batch_size"] > 1:
        return {"batch_size": 1, "accumulate": now["batch_size"] * now["accumulate"]}
    if (
        name == "rank"
        and (rank := now["rank"] or methods.METHODS[now["method"]].default_rank) > 1
        and now["method"] != "full"
    ):
        return {"rank": rank // 2}
    if now["inputs"] is None:
        if name == "frames" and now["frames"] > 1:
            return {"frames": now["frames"] // 2}
        if name == "pixels" and now["pixels"] and now["pixels"] >= 64:
            return {"pixels": 3 * now["pixels"] // 4}
    towers = tuple(r for r in ("vision", "audio") if ("weights", r) in planned.parts and r not in now["frozen"])
    if name == "frozen" and towers:
        return {"frozen": (*now["frozen"], *towers)}
    return {}


def _said(planned: Plan) -> str:
    usual = ("frames", "pixels", "batch_size", "accumulate", "checkpointing", "rank", "optimizer", "frozen")
    return ", ".join(f"{key}={planned.settings[key]!r}" for key in usual)
