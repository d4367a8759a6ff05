"""Load a model in 4 or 8 bits, or convert one in place, and say what that did to every layer.

NF4 (Dettmers et al., QLoRA, arXiv 2305.14314) stores a weight matrix in flat blocks of 64 values. A block keeps one
scale, its largest magnitude a = max|w|, and for every value the index of the nearest of 16 levels c:

    q_i = argmin_k |w_i / a - c_k|,    ŵ_i = a · c_{q_i}

With double quantization the scales are stored in 8 bits, in blocks of 256 with an fp32 scale each, so that a weight
costs 4 + 8/64 + 32/(64 · 256) = 4.127 bits. The codes are those of bitsandbytes, and a converted model is what
``from_pretrained`` with a ``BitsAndBytesConfig`` returns, bit for bit. What this file adds is that two faults of
bitsandbytes on a CPU can't be met: see `quantize`.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from mmqlora.errors import QuantizationError

# bitsandbytes warns on import that it found no optional kernel from the hub; nothing here needs one.
_bnb_logger = logging.getLogger("bitsandbytes")
_level = _bnb_logger.level
_bnb_logger.setLevel(logging.ERROR)
import bitsandbytes as bnb  # noqa: E402

_bnb_logger.setLevel(_level)

logger = logging.getLogger("mmqlora")

QUANT_TYPES = ("nf4", "fp4", "int8")


@dataclass(frozen=True)
class QuantizedLayer:
    """One row of a report: a Linear, what it is stored in, and the error or the reason why it was left alone."""

    name: str
    shape: tuple[int, int]
    region: str
    bits: float
    bytes_before: int
    bytes_after: int
    error: float
    left: str = ""


@dataclass
class QuantizationReport:
    """What was quantized, what was not and why, and the error that it left."""

    quant_type: str
    layers: list[QuantizedLayer] = field(default_factory=list)


def quantize(
    model: nn.Module,
    quant_type: str = "nf4",
    double_quant: bool = True,
    compute_dtype: torch.dtype | None = None,
    exclude: str | Iterable[str] = (),
) -> QuantizationReport:
    """Convert the Linear layers of a model to 4 or 8 bits, in place, one layer at a time."""
    _check(model, quant_type)
    modules = dict(model.named_modules())
    left = _left_alone(model, quant_type, exclude)
    compute_dtype = compute_dtype or _compute_dtype(next(model.parameters()).device)
    config = _config(quant_type, double_quant, compute_dtype, list(left))
    report = QuantizationReport(quant_type)
    for name, module in modules.items():
        if not _is_linear(module):
            continue
        size = module.weight.numel() * module.weight.element_size()
        if name not in left:
            new, error = _convert(module, config)
            if new is None:
                left[name] = "the CPU kernel of bitsandbytes would read it back wrongly"
            else:
                model.set_submodule(name, new)
                stored = _stored_bytes(new)
                numel = new.in_features * new.out_features
                report.layers.append(
                    QuantizedLayer(
                        name, (new.out_features, new.in_features), "?", 8 * stored / numel, size, stored, error
                    )
                )
                continue
        bits = 8.0 * module.weight.element_size()
        report.layers.append(QuantizedLayer(name, tuple(module.weight.shape), "?", bits, size, size, 0.0, left[name]))
    config.llm_int8_skip_modules = _skip_list(modules, left)
    _mark(model, config)
    model._mmqlora_report = report
    return report


def load(
    name_or_path: str | os.PathLike,
    quant_type: str | None = "nf4",
    double_quant: bool = True,
    compute_dtype: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
    exclude: str | Iterable[str] = (),
    model_class: type | None = None,
    **kwargs: Any,
) -> tuple[nn.Module, Any]:
    """Load a model and its processor, quantized on the way in."""
    place = _find(name_or_path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or _compute_dtype(device)
    try:
        config = AutoConfig.from_pretrained(place)
        model_class = model_class or getattr(transformers, config.architectures[0])
        if quant_type is not None:
            with torch.device("meta"):
                skeleton = model_class(config)
            skeleton_modules = dict(skeleton.named_modules())
            _check(skeleton, quant_type)
            left = _left_alone(skeleton, quant_type, exclude, device)
            kwargs["quantization_config"] = _config(
                quant_type, double_quant, compute_dtype or _compute_dtype(device), _skip_list(skeleton_modules, left)
            )
        model = model_class.from_pretrained(place, dtype=dtype, use_safetensors=True, **kwargs)
    except OSError as error:
        raise QuantizationError(f"can't load {str(name_or_path)!r}: {error}") from error
    _close_trap(model)
    return model, _processor(place)


def _find(name_or_path: str | os.PathLike) -> str:
    name = str(name_or_path)
    if Path(name).is_dir():
        return name
    for folder in filter(None, os.environ.get("MMQLORA_MODELS", "").split(os.pathsep)):
        for candidate in (name, name.replace("/", "--"), name.rsplit("/", 1)[-1]):
            path = Path(folder) / candidate
            if (path / "config.json").is_file():
                print(f"{name}: taken from the folder {candidate!r} of MMQLORA_MODELS")
                return str(path)
    return name


def _processor(place: str) -> Any:
    for auto in ("AutoProcessor", "AutoFeatureExtractor", "AutoImageProcessor", "AutoTokenizer"):
        try:
            return getattr(transformers, auto).from_pretrained(place)
        except (OSError, ValueError, KeyError, ImportError):
            continue
    return None


def _compute_dtype(device: torch.device) -> torch.dtype:
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def _is_linear(module: nn.Module) -> bool:
    # The same test as transformers': subclasses (quantized layers, attention's own projections) are something else.
    return type(module) is nn.Linear or isinstance(module, Conv1D)


def _check(model: nn.Module, quant_type: str) -> None:
    if quant_type not in QUANT_TYPES:
        raise QuantizationError(f"quant_type {quant_type!r} is unknown; use one of {', '.join(QUANT_TYPES)}")
    if any(isinstance(m, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)) for m in model.modules()):
        raise QuantizationError("the model is quantized already; load it again in 16 or 32 bits")


def _config(quant_type: str, double_quant: bool, compute_dtype: torch.dtype, skip: list[str]) -> BitsAndBytesConfig:
    if quant_type == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=skip,
    )


def _left_alone(
    model: nn.Module, quant_type: str, exclude: str | Iterable[str], device: torch.device | None = None
) -> dict[str, str]:
    """Names of the Linears that stay as they are, each with the reason."""
    linears = {name: module for name, module in model.named_modules() if _is_linear(module)}
    default = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    left = {name: "head or tied weights" for name in linears if not should_convert_module(name, default)}
    for pattern in [exclude] if isinstance(exclude, str) else exclude:
        hits = [name for name in linears if re.search(pattern, name)]
        if not hits:
            near = difflib.get_close_matches(pattern, linears, n=3, cutoff=0.0)
            raise QuantizationError(f"exclude={pattern!r} matches no Linear; the nearest are {', '.join(near)}")
        left.update(dict.fromkeys(hits, f"excluded by {pattern!r}"))
    for name, module in linears.items():
        width = module.weight.shape[0] if isinstance(module, Conv1D) else module.weight.shape[-1]
        where = device or module.weight.device
        if quant_type != "int8" and where.type == "cpu" and width % 64 and name not in left:
            left[name] = f"{width} columns: not a multiple of 64, which bitsandbytes reads back wrongly on a CPU"
    return left


def _skip_list(modules: dict[str, nn.Module], left: dict[str, str]) -> list[str]:
    """`left` in the language of ``llm_int8_skip_modules``, which matches prefixes and suffixes of names."""
    others = [name for name, module in modules.items() if name not in left]
    return [n if all(should_convert_module(o, [n]) for o in others) else f"^{re.escape(n)}$" for n in left]


def _convert(module: nn.Module, config: BitsAndBytesConfig) -> tuple[nn.Module | None, float]:
    """The quantized twin of a Linear and its relative round-trip error."""
    weight = module.weight.data.T if isinstance(module, Conv1D) else module.weight.data
    rows, columns = weight.shape
    with torch.device("meta"):
        if config.load_in_8bit:
            new = bnb.nn.Linear8bitLt(
                columns,
                rows,
                module.bias is not None,
                has_fp16_weights=config.llm_int8_has_fp16_weight,
                threshold=config.llm_int8_threshold,
            )
        else:
            new = bnb.nn.Linear4bit(
                columns,
                rows,
                module.bias is not None,
                config.bnb_4bit_compute_dtype,
                compress_statistics=config.bnb_4bit_use_double_quant,
                quant_type=config.bnb_4bit_quant_type,
                quant_storage=config.bnb_4bit_quant_storage,
            )
    new.source_cls = type(module)
    new.requires_grad_(False)
    new.train(module.training)
    arguments = {k: v for k, v in new.weight.__dict__.items() if k != "SCB"}
    kind = bnb.nn.Int8Params if config.load_in_8bit else bnb.nn.Params4bit
    new.weight = kind(weight, requires_grad=False, **arguments).to(weight.device)
    if module.bias is not None:
        new.bias = nn.Parameter(module.bias.data, requires_grad=False)
    back = _dequantized(new)
    if not config.load_in_8bit:
        new.support_avx512bf16_for_cpu = False
        if not torch.equal(back, _dequantized(new, flat=True)):
            return None, float("nan")
    norm = weight.float().norm()
    return new, float((weight.float() - back.float()).norm() / norm) if norm > 0 else 0.0


def _dequantized(module: nn.Module, flat: bool = False) -> torch.Tensor:
    """The weight that a quantized layer computes with; `flat` reads 4-bit blocks as they were written."""
    weight = module.weight
    if isinstance(module, bnb.nn.Linear8bitLt):
        scale = weight.SCB if weight.SCB is not None else module.state.SCB
        return bnb.functional.int8_vectorwise_dequant(weight.data, scale)
    state, shape = weight.quant_state, weight.quant_state.shape
    if not flat:
        return bnb.functional.dequantize_4bit(weight.data, state)
    try:
        state.shape = (1, shape.numel())
        return bnb.functional.dequantize_4bit(weight.data, state).view(shape)
    finally:
        state.shape = shape


def _stored_bytes(module: nn.Module) -> int:
    weight = module.weight
    tensors = [weight.data]
    if isinstance(module, bnb.nn.Linear8bitLt):
        tensors.append(weight.SCB if weight.SCB is not None else module.state.SCB)
    else:
        state = weight.quant_state
        tensors += [state.absmax] + ([state.state2.absmax, state.offset] if state.nested else [])
    return sum(t.numel() * t.element_size() for t in tensors)


def _mark(model: nn.Module, config: BitsAndBytesConfig) -> None:
    """Set what PEFT, Trainer and ``save_pretrained`` look for, as ``from_pretrained`` does."""
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    quantizer.modules_to_not_convert = list(config.llm_int8_skip_modules)
    model.is_quantized = True
    model.quantization_method = config.quant_method
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)


def _close_trap(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
