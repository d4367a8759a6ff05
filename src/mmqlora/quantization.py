"""Load a model in 4 or 8 bits, or convert one in place, and say what that did to every layer.

NF4 (Dettmers et al., QLoRA, arXiv 2305.14314) stores a weight matrix in flat blocks of 64 values. A block keeps one
scale, its largest magnitude a = max|w|, and for every value the index of the nearest of 16 levels c::

    q_i = argmin_k |w_i / a - c_k|,    ŵ_i = a · c_{q_i}

With double quantization the scales are stored in 8 bits, in blocks of 256 with an fp32 scale each, so that a weight
costs 4 + 8/64 + 32/(64 · 256) = 4.127 bits.

The codes are those of bitsandbytes, and what is converted here is what ``from_pretrained`` with a
``BitsAndBytesConfig`` gives, bit for bit. What this file adds: two faults of bitsandbytes 0.50 on a CPU are kept out
(`close_cpu_traps` says which), patterns that match nothing are errors, and a report tells what became of each layer.
"""

from __future__ import annotations

import difflib
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from .errors import QuantizationError, RegionError
from .regions import REGIONS, regions

# On import bitsandbytes warns that an optional kernel from the hub is missing; nothing here needs one.
_bnb_logger = logging.getLogger("bitsandbytes")
_level = _bnb_logger.level
_bnb_logger.setLevel(logging.ERROR)
import bitsandbytes as bnb  # noqa: E402

_bnb_logger.setLevel(_level)

logger = logging.getLogger("mmqlora")

QUANT_TYPES = ("nf4", "fp4", "int8")
CHECKPOINTS = Path(__file__).parent / "checkpoints"  # base models of the embedded benchmark


@dataclass(frozen=True)
class LayerReport:
    """One Linear of a model: what it is stored in and the error that this left.

    Args:
        name: full name of the module.
        region: "vision", "audio", "fusion", "text", or "?" where the model's regions are unknown.
        shape: (d_out, d_in) of the weight.
        stored: "nf4", "fp4", "int8", or the dtype of a layer that was left alone.
        bits: bits per weight as stored, with the scales.
        bytes_before: bytes of the weight before quantization.
        bytes_after: bytes of the codes and scales.
        error: ‖W − Ŵ‖_F / ‖W‖_F. 0 for a layer left alone, NaN where W was never seen.
        why: why the layer was left alone, else empty.
    """

    name: str
    region: str
    shape: tuple[int, int]
    stored: str
    bits: float
    bytes_before: int
    bytes_after: int
    error: float
    why: str = ""


@dataclass
class QuantizationReport:
    """What was quantized, what was left alone and why, and the error that it left.

    Example:
        >>> report = mm.quantize(model)  # doctest: +SKIP
        >>> report.summary()  # doctest: +SKIP
        >>> report.table().nlargest(5, "error")  # doctest: +SKIP

    It prints as the summary by region and, below, what was left alone.

    Args:
        layers: one `LayerReport` per Linear, in the model's order.
        other_bytes: bytes of all parameters outside Linear layers (embeddings, norms, convolutions).
    """

    layers: list[LayerReport]
    other_bytes: int = 0

    def table(self) -> pd.DataFrame:
        """A row per Linear, with the fields of `LayerReport` as columns."""
        return pd.DataFrame([asdict(layer) for layer in self.layers])

    def summary(self) -> pd.DataFrame:
        """A row per region: layers, quantized layers, parameters, MiB before and after; bits and error.

        ``bits`` (a weight, with the scales), ``error`` (the mean) and ``worst`` (the largest) are over the quantized
        layers only; the rest is over all Linears of the region.
        """
        table = self.table()
        table["parameters"] = [rows * columns for rows, columns in table["shape"]]
        groups, quantized = table.groupby("region"), table[table["why"] == ""].groupby("region")
        summary = pd.DataFrame(
            {
                "layers": groups.size(),
                "quantized": quantized.size(),
                "parameters": groups["parameters"].sum(),
                "MiB before": groups["bytes_before"].sum() / 2**20,
                "MiB after": groups["bytes_after"].sum() / 2**20,
                "bits": 8 * quantized["bytes_after"].sum() / quantized["parameters"].sum(),
                "error": quantized["error"].mean(),
                "worst": quantized["error"].max(),
            }
        )
        summary["quantized"] = summary["quantized"].fillna(0).astype(int)
        return summary.sort_index(key=lambda names: [(*REGIONS, "?").index(name) for name in names])

    def left_alone(self) -> pd.DataFrame:
        """A row per reason why layers were left alone: how many layers, their MiB, and one of them as an example."""
        table = self.table()
        groups = table[table["why"] != ""].groupby("why", sort=False)
        return pd.DataFrame(
            {"layers": groups.size(), "MiB": groups["bytes_after"].sum() / 2**20, "example": groups["name"].first()}
        )

    def _headline(self) -> str:
        before = sum(layer.bytes_before for layer in self.layers)
        after = sum(layer.bytes_after for layer in self.layers)
        done = sum(not layer.why for layer in self.layers)
        return (
            f"{done} of {len(self.layers)} Linear layers quantized: {before / 2**20:.1f} MiB became "
            f"{after / 2**20:.1f} MiB; other parameters: {self.other_bytes / 2**20:.1f} MiB"
        )

    def __str__(self) -> str:
        """The summary and the reasons, as text."""
        left = self.left_alone()
        text = f"{self._headline()}\n\n{self.summary().round(3).to_string()}"
        return text + (f"\n\nLeft alone:\n{left.round(3).to_string()}" if len(left) else "")

    __repr__ = __str__

    def _repr_html_(self) -> str:
        left = self.left_alone()
        html = f"<p>{self._headline()}</p>{self.summary().round(3).to_html()}"
        return html + (f"<p>Left alone:</p>{left.round(3).to_html()}" if len(left) else "")


def quantize(
    model: nn.Module,
    quant_type: str = "nf4",
    double_quant: bool = True,
    compute_dtype: torch.dtype | None = None,
    exclude: str | Iterable[str] = (),
    quant_storage: torch.dtype = torch.uint8,
) -> QuantizationReport:
    """Quantize the Linear layers of a model in place, on the device where they are, one at a time.

    Example:
        >>> model = WhisperForConditionalGeneration.from_pretrained("openai/whisper-tiny.en")  # doctest: +SKIP
        >>> mm.quantize(model, exclude=["fusion", r"layers\\.0\\."])  # doctest: +SKIP
        >>> peft_model = get_peft_model(model, LoraConfig(target_modules="all-linear"))  # doctest: +SKIP

    The model is then what ``from_pretrained`` with a ``BitsAndBytesConfig`` returns: PEFT uses its 4-bit layers,
    ``save_pretrained`` writes 4-bit weights, and a plain ``from_pretrained`` reads them. Layers are converted
    where they are, so that there are never two copies of the model. Left alone are: the output head, tied weights,
    everything that is not a Linear (or GPT-2's Conv1D), what `exclude` names, and on a CPU the layers whose 4-bit
    weights bitsandbytes would read back wrongly (`close_cpu_traps`).

    Args:
        model: a model in 16 or 32 bits, usually a `transformers.PreTrainedModel`, without adapters. One on the meta
            device gets layers without weights, for `plan`.
        quant_type: "nf4", "fp4" or "int8".
        double_quant: store the scales of 4-bit blocks in 8 bits (4.127 bits a weight instead of 4.5).
        compute_dtype: dtype of the matrix products of 4-bit layers. Default: float32 on a CPU, and on a GPU
            bfloat16, or float16 where the GPU has no bfloat16; on the meta device that of the weights.
        exclude: what to leave alone. A region's name ("vision", "audio", "fusion", "text") or a regular expression
            that is searched anywhere in the full names of the Linears; one, or several.
        quant_storage: dtype that the bytes of 4-bit codes are kept as, which changes no value. FSDP needs that of the
            rest of the model, such as bfloat16, to shard them; it leaves uint8 whole on every GPU.

    Returns:
        The report; `quantization_report` finds it again from the model.

    Raises:
        QuantizationError: `quant_type` is unknown, the model is quantized already, has adapters or weights that
            are not loaded, or a pattern of `exclude` matches no Linear.

    Source:
        Dettmers et al., QLoRA (arXiv 2305.14314), sections 3 and Appendix E; Dettmers et al., LLM.int8()
        (arXiv 2208.07339) for "int8".
    """
    _check(model, quant_type)
    missing = [name for name, module in _linears(model).items() if module.weight.is_meta]
    if missing and (len(missing) < len(_linears(model)) or quant_type == "int8"):
        raise QuantizationError(
            f"the model has weights that are not loaded (on the meta device), such as {missing[0]}; load them first. "
            "A model without any weights can be quantized to 4 bits, to plan with."
        )
    device = next(model.parameters()).device
    kept = _left_alone(model, quant_type, exclude, device)
    # Without weights there is no device either; they say by their type what it will be.
    usual = model.get_submodule(missing[0]).weight.dtype if missing else _default_dtype(device)
    config = _config(quant_type, double_quant, compute_dtype or usual, _skip_list(model, kept), quant_storage)
    before, errors = {}, {}
    for name in list(_linears(model)):  # names only: a reference to a module would keep its old weight alive
        before[name] = _nbytes(model.get_submodule(name).weight)
        if name not in kept:
            new, errors[name] = _converted(model.get_submodule(name), config)
            model.set_submodule(name, new)
    _mark(model, config)
    model._mmqlora_report = _report(model, kept, before, errors)
    return model._mmqlora_report


def load(
    name_or_path: str | os.PathLike[str],
    quant_type: str | None = "nf4",
    double_quant: bool = True,
    compute_dtype: torch.dtype | None = None,
    dtype: torch.dtype | str | None = None,
    exclude: str | Iterable[str] = (),
    model_class: type[PreTrainedModel] | None = None,
    quant_storage: torch.dtype = torch.uint8,
    **kwargs: Any,
) -> tuple[PreTrainedModel, Any]:
    """Load a model with its processor, quantized as it comes from the disk.

    Example:
        >>> model, processor = mm.load("openai/whisper-tiny.en", quant_type="nf4")  # doctest: +SKIP
        >>> mm.quantization_report(model)  # doctest: +SKIP

    "mmqlora/video", "mmqlora/audio" and "mmqlora/retrieval" come with the library (see `benchmark`). Any other
    model is looked for in this order: `name_or_path` as a folder; then, in each folder that the environment
    variable ``MMQLORA_MODELS`` lists, ``org/name``, ``org--name`` and ``name``; then the Hugging Face hub. One line
    says which it was, and the full path is logged under "mmqlora". Only safetensors are read, and no code
    that comes with a model is run.

    Weights are quantized one by one as they are read, so the model is never in memory in 16 bits. The report
    has no round-trip errors for that reason: ``load(..., quant_type=None)`` and then `quantize` measures them.

    Args:
        name_or_path: a folder, or a name such as "openai/whisper-tiny.en".
        quant_type: "nf4", "fp4", "int8", or None to load without quantization. A checkpoint that is quantized
            already is loaded as it is.
        double_quant: as in `quantize`.
        compute_dtype: as in `quantize`.
        dtype: dtype of what is not quantized. Default: as `compute_dtype`'s default, whatever the checkpoint
            has: on a CPU float16 is several times slower than float32.
        exclude: as in `quantize`.
        model_class: a class with ``from_pretrained``. Default: the one that the configuration names first.
        quant_storage: as in `quantize`.
        kwargs: passed on to ``from_pretrained`` (``device_map``, ``revision``, ``attn_implementation``, …).

    Returns:
        The model in evaluation mode, on the first GPU where there is one (each process of a launch has its own), and
        its processor (or feature extractor, image processor or tokenizer; None if it has none).

    Raises:
        QuantizationError: the model is in none of the places, has no safetensors, needs code of its own, or can't
            be quantized as asked.
    """
    if kwargs.pop("trust_remote_code", False):
        raise QuantizationError("trust_remote_code: load never runs code that comes with a model")
    place, searched = _find(str(name_or_path))
    hub = {
        key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only", "subfolder") if key in kwargs
    }
    device = _device(kwargs.setdefault("device_map", {"": _own_device()}))
    default = _default_dtype(device)
    try:
        config = AutoConfig.from_pretrained(place, trust_remote_code=False, **hub)
        model_class = model_class or _model_class(config, name_or_path)
        kept = {}
        if quant_type is not None and getattr(config, "quantization_config", None) is None:
            with init_empty_weights():
                skeleton = model_class(config)
            _check(skeleton, quant_type)
            kept = _left_alone(skeleton, quant_type, exclude, device)
            kwargs["quantization_config"] = _config(
                quant_type, double_quant, compute_dtype or default, _skip_list(skeleton, kept), quant_storage
            )
        model = model_class.from_pretrained(
            place, dtype=dtype or default, use_safetensors=True, trust_remote_code=False, **kwargs
        )
    except (OSError, ValueError) as error:
        raise QuantizationError(
            f"can't load {str(name_or_path)!r}. Looked in: {'; '.join(searched)}. "
            "Check the name; without a network, put the model's folder into one that the environment variable "
            f"MMQLORA_MODELS lists. The reason given: {error}"
        ) from error
    kept.update(close_cpu_traps(model))
    model._mmqlora_report = _report(model, kept)
    return model, _processor(place, hub)


def quantization_report(model: nn.Module) -> QuantizationReport:
    """The report of a model, with or without adapters on it, whoever quantized it.

    Example:
        >>> model, _ = mm.load("openai/whisper-tiny.en")  # doctest: +SKIP
        >>> mm.quantization_report(model).summary()  # doctest: +SKIP

    Args:
        model: a model from `load`, one that went through `quantize`, or any other with bitsandbytes layers. For
            the last the original weights are gone: its errors are NaN, and its reasons "not recorded".

    Returns:
        The report.
    """
    # Adapters of PEFT forward what they don't know to the model below, so this finds it there too.
    report = getattr(model, "_mmqlora_report", None)
    return report if report is not None else _report(model, {})


def close_cpu_traps(model: nn.Module) -> dict[str, str]:
    """Make a model with 4-bit layers safe on a CPU. `load` and `quantize` do this by themselves.

    Example:
        >>> model = AutoModelForCausalLM.from_pretrained("my-nf4-model")  # doctest: +SKIP
        >>> close_cpu_traps(model)  # doctest: +SKIP
        {}

    bitsandbytes 0.50 has two faults on a CPU, both silent:

    - On processors with AVX512-BF16 a 4-bit layer in evaluation mode repacks its weights for good: its output moves,
      training afterwards fails, and what is saved has drifted. This switches that off, layer by layer.
    - Blocks run over the flattened matrix, but the kernel for AVX512 reads them row by row, so where d_in is a multiple
      of 16 and not of 64 (96, 4304) it takes wrong scales. On every CPU this reads layers with d_in not a multiple
      of 64 as they were written and puts a plain Linear in their place.

    Args:
        model: any model, such as one that comes from a GPU. Changed in place.

    Returns:
        The layers that were turned back into plain ones, each with the reason.

    Raises:
        QuantizationError: a layer has been repacked already; its weights are damaged.
    """
    restored = {}
    for name, module in list(model.named_modules()):
        if not isinstance(module, bnb.nn.Linear4bit):
            continue
        state = module.weight.quant_state
        if getattr(state, "packing_format_for_cpu", False):
            raise QuantizationError(f"{name} was repacked for AVX512-BF16 by a forward pass; load the model again")
        module.support_avx512bf16_for_cpu = False
        why = _unreadable(module.in_features, module.weight.device)
        if why:
            plain = nn.Linear(module.in_features, module.out_features, device="meta")
            plain.weight = nn.Parameter(_dequantized(module, flat=True).to(model.dtype), requires_grad=False)
            plain.bias = module.bias
            model.set_submodule(name, plain.train(module.training))
            restored[name] = why
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if restored and config is not None:
        # So that the model can be saved and read again: without it a reader would expect 4 bits there.
        config.llm_int8_skip_modules = [*(config.llm_int8_skip_modules or []), *_skip_list(model, restored)]
    return restored


def multiplies_bf16(device: torch.device | str) -> bool:
    """Whether a device multiplies bfloat16 in hardware; where it does not, bfloat16 can be tens of times slower.

    Example:
        >>> dtype = torch.bfloat16 if multiplies_bf16("cpu") else torch.float32

    Args:
        device: the CPU, or a CUDA device.

    Returns:
        True on NVIDIA GPUs from Ampere on and on CPUs with AVX512-BF16, AMX or Arm's BF16 extension.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(there for name, there in torch.cpu.get_capabilities().items() if name.endswith("bf16"))


def prefers_bf16(model: nn.Module) -> bool:
    """Whether to run a model under bfloat16 autocast: on a GPU, on a processor that has it, and with such weights.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16, enabled=prefers_bf16(model)):  # doctest: +SKIP
        ...     model(**batch)
    """
    codes = bnb.nn.Params4bit  # of any type, see quant_storage
    weights = [w for w in model.parameters() if w.is_floating_point() and not isinstance(w, codes)]
    # Older GPUs emulate it, which is still better than weights and inputs of different types.
    cuda = torch.cuda.is_available()  # also where the model is still on the CPU: training moves it
    return cuda or any(w.dtype == torch.bfloat16 for w in weights) or multiplies_bf16("cpu")


def _find(name: str) -> tuple[str, list[str]]:
    """Where to load from, and the places that were searched."""
    if Path(name).is_dir():
        logger.info("%s: a folder", name)
        return name, [f"the folder {name!r}"]
    if name.startswith("mmqlora/"):
        own = sorted(f"mmqlora/{path.parent.name}" for path in CHECKPOINTS.glob("*/config.json"))
        if name not in own:
            raise QuantizationError(f"{name!r} does not come with mmqlora; {', '.join(own)} do")
        return str(CHECKPOINTS / name.removeprefix("mmqlora/")), ["mmqlora itself"]
    searched = []
    for folder in filter(None, os.environ.get("MMQLORA_MODELS", "").split(os.pathsep)):
        for candidate in dict.fromkeys((name, name.replace("/", "--"), name.rsplit("/", 1)[-1])):
            path = Path(folder) / candidate
            searched.append(str(path))
            if (path / "config.json").is_file():
                logger.info("%s: %s", name, path)
                # Printed, because a local copy that stands in for the hub's should not go unseen in a notebook.
                print(f"{name}: the local copy {candidate!r} in MMQLORA_MODELS")
                return str(path), [str(path)]
    logger.info("%s: the Hugging Face hub", name)
    print(f"{name}: from the Hugging Face hub")
    return name, [f"the folder {name!r}", *(searched or ["MMQLORA_MODELS (not set)"]), "the Hugging Face hub"]


def _model_class(config: Any, name: object) -> type[PreTrainedModel]:
    named = getattr(config, "architectures", None) or []
    found = getattr(transformers, named[0], None) if named else None
    if found is None:
        raise QuantizationError(
            f"{str(name)!r} names the model class {named}, which transformers lacks; pass model_class"
        )
    return found


def _processor(place: str, hub: dict[str, Any]) -> Any:
    for auto in ("AutoProcessor", "AutoFeatureExtractor", "AutoImageProcessor", "AutoTokenizer"):
        try:
            found = getattr(transformers, auto).from_pretrained(place, trust_remote_code=False, **hub)
        except Exception as error:  # transformers raises anything here, and a model is of use without its processor
            logger.info("%s: no %s (%s)", place, auto, error)
            continue
        if getattr(found, "vocab_size", None) != 0:  # transformers makes up an empty tokenizer where there is none
            return found
    logger.warning("%s has no processor, feature extractor, image processor or tokenizer", place)
    return None


def _own_device() -> str:
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"


def _device(device_map: Any) -> torch.device:
    """The device that decides about dtypes and kernels: the CPU only where every part of the model goes there."""
    places = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
    cpu = places <= {"cpu", torch.device("cpu"), "disk"} or not torch.cuda.is_available()
    return torch.device("cpu" if cpu else "cuda")


def _default_dtype(device: torch.device) -> torch.dtype:
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if multiplies_bf16(device) else torch.float16


def _linears(model: nn.Module) -> dict[str, nn.Module]:
    # The test of transformers: subclasses of Linear are something else, such as layers that are quantized already.
    return {n: m for n, m in model.named_modules() if type(m) is nn.Linear or isinstance(m, Conv1D)}


def _shape(module: nn.Module) -> tuple[int, int]:
    """(d_out, d_in), also of a Conv1D, which stores its weight transposed."""
    if hasattr(module, "out_features"):
        return module.out_features, module.in_features
    return module.weight.shape[1], module.weight.shape[0]


def _nbytes(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _check(model: nn.Module, quant_type: str) -> None:
    if quant_type not in QUANT_TYPES:
        raise QuantizationError(f"quant_type={quant_type!r} is unknown; use one of {', '.join(map(repr, QUANT_TYPES))}")
    if any(isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)) for module in model.modules()):
        raise QuantizationError("the model is quantized already; load it again in 16 or 32 bits to quantize it anew")
    if hasattr(model, "peft_config") or any(hasattr(module, "lora_A") for module in model.modules()):
        raise QuantizationError(
            "the model has adapters, which must stay in 16 or 32 bits; quantize it before adding them"
        )
    if any(hasattr(module, "_hf_hook") for module in _linears(model).values()):
        raise QuantizationError("the model is spread over devices; use load(..., device_map=...) to quantize it")


def _left_alone(
    model: nn.Module, quant_type: str, exclude: str | Iterable[str], device: torch.device
) -> dict[str, str]:
    """The Linears that stay as they are, each with the reason."""
    linears = _linears(model)
    # What from_pretrained leaves alone: the last module, tied weights, the output embedding, and what a class asks for.
    # Said again here, because it takes the head of a classifier for any layer if it has a bias, and on a model that
    # is in memory already it takes another module for the last one if the head is tied.
    names = list(model.named_parameters(remove_duplicate=False))
    default = [names[-1][0].rpartition(".")[0]]
    if isinstance(model, PreTrainedModel):
        tied = model.all_tied_weights_keys
        default += [name.removesuffix(".weight") for pair in tied.items() for name in pair]
        head = model.get_output_embeddings()
        default += [name for name, module in model.named_modules() if module is head and head is not None]
        default += model._keep_in_fp32_modules or []
    else:
        uses = Counter(id(parameter) for _, parameter in names)
        default += [name.rpartition(".")[0] for name, parameter in names if uses[id(parameter)] > 1]
    kept = {name: "output head or tied weights" for name in linears if not should_convert_module(name, default)}
    for pattern in [exclude] if isinstance(exclude, str) else exclude:
        kept |= dict.fromkeys(_matching(model, linears, pattern), f"excluded by {pattern!r}")
    if quant_type != "int8":
        for name, module in linears.items():
            why = name not in kept and _unreadable(_shape(module)[1], device)
            if why:
                kept[name] = why
    return kept


def _matching(model: nn.Module, linears: dict[str, nn.Module], pattern: str) -> list[str]:
    if pattern in REGIONS:
        inside = _regions(model)
        hits = [name for name in linears if inside.get(name) == pattern]
        fits = sorted({inside[name] for name in linears if name in inside})
    else:
        try:
            hits = [name for name in linears if re.search(pattern, name)]
        except re.error as error:
            raise QuantizationError(f"exclude={pattern!r} is no regular expression: {error}") from error
        # Compare with parts of names, not with whole ones: "fc3" is near "fc1" and near no "encoder.layers.0.fc1".
        parts = list(dict.fromkeys(part for name in linears for part in name.split(".") if not part.isdigit()))
        fits = difflib.get_close_matches(pattern, parts, n=3, cutoff=0.4) or list(linears)[-3:]
    if not hits:
        raise QuantizationError(f"exclude={pattern!r} matches no Linear of the model; what would: {', '.join(fits)}")
    return hits


def _regions(model: nn.Module) -> dict[str, str]:
    """Region of every Linear; empty for a model whose regions are unknown."""
    try:
        return dict(regions(model))
    except RegionError as error:
        logger.info("regions unknown: %s", error)
        return {}


def _unreadable(columns: int, device: torch.device) -> str:
    """Why a device can't be trusted with 4-bit rows of this length; empty if it can."""
    # Shown wrong: multiples of 16 on processors with AVX512. A rule that all processors share gives everyone one model.
    if device.type != "cpu" or columns % 64 == 0:
        return ""
    return f"rows of {columns}: on a CPU only whole blocks of 64 are read back rightly"


def _skip_list(model: nn.Module, kept: Iterable[str]) -> list[str]:
    """`kept` for ``llm_int8_skip_modules``, whose entries match names, prefixes and suffixes of names."""
    others = [name for name in _linears(model) if name not in set(kept)]
    return [n if all(should_convert_module(o, [n]) for o in others) else f"^{re.escape(n)}$" for n in kept]


def _config(
    quant_type: str, double_quant: bool, compute_dtype: torch.dtype, skip: list[str], quant_storage: torch.dtype
) -> BitsAndBytesConfig:
    if quant_type == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_quant_storage=quant_storage,
        llm_int8_skip_modules=skip,
    )


def _converted(module: nn.Module, config: BitsAndBytesConfig) -> tuple[nn.Module, float]:
    """The quantized twin of a Linear and its relative round-trip error."""
    weight = (module.weight.T if isinstance(module, Conv1D) else module.weight).detach()
    d_out, d_in = _shape(module)
    with torch.device("meta"):
        if config.load_in_8bit:
            new = bnb.nn.Linear8bitLt(
                d_in, d_out, has_fp16_weights=config.llm_int8_has_fp16_weight, threshold=config.llm_int8_threshold
            )
        else:
            new = bnb.nn.Linear4bit(
                d_in,
                d_out,
                compute_dtype=config.bnb_4bit_compute_dtype,
                compress_statistics=config.bnb_4bit_use_double_quant,
                quant_type=config.bnb_4bit_quant_type,
                quant_storage=config.bnb_4bit_quant_storage,
            )
    new.bias = module.bias
    new.source_cls = type(module)  # transformers looks at it to undo the transposition of a Conv1D
    new.support_avx512bf16_for_cpu = False  # see close_cpu_traps
    if weight.is_meta:
        new.weight = _hollow(new.weight, weight)
        return new.train(module.training), float("nan")
    kind = bnb.nn.Int8Params if config.load_in_8bit else bnb.nn.Params4bit
    settings = {key: value for key, value in vars(new.weight).items() if key != "SCB"}
    new.weight = kind(weight, requires_grad=False, **settings).to(weight.device)
    weight = weight.float()
    error = (weight - _dequantized(new).float()).norm() / weight.norm().clamp_min(1e-30)
    return new.train(module.training), float(error)


def _hollow(parameter: bnb.nn.Params4bit, weight: torch.Tensor) -> bnb.nn.Params4bit:
    """A 4-bit weight on the meta device, with the shapes of the real one and of its scales."""

    def state(size: int, block: int, codes: int, scales: torch.dtype, **more: Any) -> bnb.functional.QuantState:
        absmax = torch.empty(math.ceil(size / block), dtype=scales, device="meta")
        code = torch.empty(codes, device="meta")
        return bnb.functional.QuantState(absmax, code=code, blocksize=block, **more)

    size, block, storage = weight.numel(), parameter.blocksize, parameter.quant_storage
    more = {"shape": weight.shape, "dtype": weight.dtype, "quant_type": parameter.quant_type}
    if parameter.compress_statistics:
        second = state(math.ceil(size / block), 256, 256, torch.float32, dtype=torch.float32)
        more |= {"offset": torch.empty((), device="meta"), "state2": second}
    scales = torch.uint8 if parameter.compress_statistics else torch.float32
    hollow = bnb.nn.Params4bit(
        torch.empty(math.ceil(size / 2 / storage.itemsize), 1, dtype=storage, device="meta"),
        requires_grad=False,
        quant_state=state(size, block, 16, scales, **more),
        blocksize=block,
        compress_statistics=parameter.compress_statistics,
        quant_type=parameter.quant_type,
        quant_storage=storage,
        bnb_quantized=True,
    )
    hollow.__deepcopy__ = lambda memo: hollow  # bitsandbytes would make the copy on the CPU
    return hollow


def _dequantized(module: nn.Module, flat: bool = False) -> torch.Tensor:
    """The weight that a quantized layer computes with; `flat` reads 4-bit blocks as they were written."""
    weight = module.weight
    if isinstance(module, bnb.nn.Linear8bitLt):
        return bnb.functional.int8_vectorwise_dequant(weight.data, _scale(module))
    state, shape = weight.quant_state, weight.quant_state.shape
    if not flat:
        return bnb.functional.dequantize_4bit(weight.data, state)
    try:
        state.shape = torch.Size((1, shape.numel()))
        return bnb.functional.dequantize_4bit(weight.data, state).view(shape)
    finally:
        state.shape = shape


def _scale(module: bnb.nn.Linear8bitLt) -> torch.Tensor:
    # The first forward pass moves it.
    return module.state.SCB if module.weight.SCB is None else module.weight.SCB


def _mark(model: nn.Module, config: BitsAndBytesConfig) -> None:
    """Set what PEFT, Trainer and ``save_pretrained`` ask a model for, as ``from_pretrained`` does."""
    if not isinstance(model, PreTrainedModel):
        setattr(model, "is_loaded_in_8bit" if config.load_in_8bit else "is_loaded_in_4bit", True)
        return
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    quantizer.modules_to_not_convert = list(config.llm_int8_skip_modules)
    model.is_quantized = True
    model.quantization_method = config.quant_method
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)


def _report(
    model: nn.Module, kept: dict[str, str], before: dict[str, int] | None = None, errors: dict[str, float] | None = None
) -> QuantizationReport:
    inside, layers, done = _regions(model), [], set()
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, bnb.nn.Linear4bit):
            state = weight.quant_state
            nested = [state.state2.absmax, state.offset] if state.nested else []
            stored, dtype, size = weight.quant_type, state.dtype, _nbytes(weight, state.absmax, *nested)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            stored, dtype, size = "int8", getattr(model, "dtype", torch.float16), _nbytes(weight, _scale(module))
        elif type(module) is nn.Linear or isinstance(module, Conv1D):
            stored, dtype, size = str(weight.dtype).removeprefix("torch."), weight.dtype, _nbytes(weight)
        else:
            continue
        done.add(id(weight))
        shape, quantized = _shape(module), stored in QUANT_TYPES
        layers.append(
            LayerReport(
                name=name,
                region=inside.get(name, "?"),
                shape=shape,
                stored=stored,
                bits=8 * size / (shape[0] * shape[1]),
                bytes_before=(before or {}).get(name, shape[0] * shape[1] * dtype.itemsize),
                bytes_after=size,
                error=(errors or {}).get(name, float("nan")) if quantized else 0.0,
                why="" if quantized else kept.get(name, "not recorded"),
            )
        )
    other = _nbytes(*(parameter for parameter in model.parameters() if id(parameter) not in done))
    return QuantizationReport(layers, other)
