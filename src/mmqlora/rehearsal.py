"""A training step of a model that is not there: every operation and no numbers.

A model on PyTorch's meta device is quantized, given adapters and trained for a step as ever, under `FakeTensorMode`:
its tensors have shapes, types and lifetimes, and no memory. A `Ledger` that watches counts what the real step would
hold. Nothing is known of the model but its code, so that it works for models that we have never seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from accelerate.utils import convert_to_fp32
from peft.tuners.lora import dora, variants
from torch import nn
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from .errors import PlanError
from .ledger import Ledger

__all__ = ["OPTIMIZERS", "hollow", "rehearse"]

aten = torch.ops.aten
CPU = torch.device("cpu")
WHOLE = (torch.bool, torch.int32, torch.int64)  # token ids, masks, positions; packed weights are uint8
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
FALSE = {aten.eq.Scalar, aten.eq.Tensor, aten.isinf.default, aten.isnan.default}

OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "sgd")
EIGHT_BITS_FROM = 4096  # elements of a tensor, as bitsandbytes has it; smaller ones keep 32 bits
PAGED_FROM = 100_000


def hollow(model: nn.Module) -> FakeTensorMode:
    """Take a model's weights away, in place, so that `rehearse` can run it.

    Example:
        >>> with torch.device("meta"):  # doctest: +SKIP
        ...     model = WhisperForConditionalGeneration(config)
        >>> mode = hollow(mm.adapt(model, "lora", quant_type="nf4"))  # doctest: +SKIP

    Args:
        model: any model, with adapters or without, usually on the meta device.

    Returns:
        The mode under which it runs.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # with the old one, whose id must not be used again

    def empty(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            new = FakeTensor(mode, tensor.detach().to("meta"), CPU)
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, requires_grad=tensor.requires_grad)
                if hasattr(tensor, "quant_state"):
                    new.quant_state = tensor.quant_state
            made[id(tensor)] = new, tensor
        return made[id(tensor)][0]

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit) and module.bias is not None and module.compute_dtype:
            module.bias.data = module.bias.data.to(module.compute_dtype)  # as its first forward pass does
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and (tensor.is_meta or tensor.dtype not in WHOLE):
                    tensors[name] = empty(tensor)
    return mode


def rehearse(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    optimizer: str = "adamw_torch",
    bf16: bool = False,
    cuda: bool = False,
    accumulate: bool = False,
    regions: Mapping[str, str] | None = None,
) -> Ledger:
    """Train a hollow model for a step and count what the real one would hold.

    Example:
        >>> ledger = rehearse(model, inputs)  # doctest: +SKIP
        >>> ledger.peak, ledger.at_peak["activations", "vision"]  # doctest: +SKIP

    The step is that of `fine_tune`: a forward pass, a backward pass, clipping, and the optimizer's step, with its
    states in place from the start.

    Args:
        model: a model after `hollow`, in training mode, with gradient checkpointing or without.
        inputs: of its forward pass, with what makes it return a ``loss``. Frames and sounds (of two dimensions and
            more) may be on the meta device; whole numbers must be real.
        optimizer: one of `OPTIMIZERS`.
        bf16: compute under bfloat16 autocast.
        cuda: as a GPU does it: norms and softmax in float32 under autocast, the optimizer over all tensors at once.
        accumulate: gradients of an earlier batch are there already.
        regions: as in `Ledger`.

    Returns:
        The ledger, with paged optimizer states, which live in pinned memory of the host, left out.

    Raises:
        PlanError: nothing to train, no loss, an unknown optimizer, or a model that needs to see numbers.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise PlanError("no parameter of the model requires a gradient; add adapters, or unfreeze something.")
    modes = {tensor.fake_mode for tensor in model.parameters() if isinstance(tensor, FakeTensor)}
    if len(modes) != 1:
        raise PlanError("the model has weights; `hollow` takes them away.")
    mode = modes.pop()
    inputs = {name: _medium(value, mode) for name, value in inputs.items()}
    with _without_numbers(mode, cuda and bf16), Ledger(model, regions) as ledger:
        # Where there is no other device to go to, the loader holds the next batch, too.
        ahead = [] if cuda else [value.clone() for value in inputs.values() if isinstance(value, torch.Tensor)]
        for value in [*inputs.values(), *ahead]:
            if isinstance(value, torch.Tensor):
                ledger.count(value, "inputs", "shared")
        if accumulate:
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
                ledger.count(parameter.grad, "gradients", "shared")
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            outputs = model(**inputs)
        if bf16:  # as accelerate does
            outputs = convert_to_fp32(outputs)
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
        if loss is None:
            raise PlanError(f"{type(model).__name__} returned no loss; its inputs were {', '.join(inputs)}.")
        del outputs
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        running, held = ledger.restart()
        states, ledger.kept = _step(
            [parameter for parameter in trained if parameter.grad is not None], optimizer, cuda, ledger
        )
        # In later steps the states are there from the start.
        if running + states > ledger.peak:
            ledger.peak, ledger.at_peak = running + states, held | {("optimizer", "shared"): states}
        for parameter in trained:
            parameter.grad = None
    return ledger


def tower(model: nn.Module) -> Callable[..., Any]:
    """Give a function that calls methods of a hollow model by name, as `inputs.make_inputs` wants it."""
    mode = next(tensor.fake_mode for tensor in model.parameters() if isinstance(tensor, FakeTensor))

    def call(method: str, **arguments: Any) -> Any:
        arguments = {name: _medium(value, mode) for name, value in arguments.items()}
        with torch.no_grad(), _without_numbers(mode):
            return getattr(model if hasattr(model, method) else model.model, method)(**arguments)

    return call


def _attention(query: torch.Tensor, *_: Any, **settings: Any) -> tuple[torch.Tensor, ...]:
    """What the CPU's kernel of attention gives: values, and log-sums for the backward pass; (B, H, T, D) queries."""
    batch, heads, time, _ = query.shape
    kind = torch.float64 if query.dtype == torch.float64 else torch.float32
    return _like(query), torch.empty((batch, time, heads), dtype=kind, device="meta").transpose(1, 2)


def _attention_backward(_: torch.Tensor, *inputs: Any, **settings: Any) -> tuple[torch.Tensor, ...]:
    """The gradients of queries, keys and values, as that kernel leaves them in memory."""
    return tuple(
        torch.empty((batch, time, heads, width), dtype=like.dtype, device="meta").transpose(1, 2)
        for like in inputs[:3]
        for batch, heads, time, width in [like.shape]
    )


def _gemm(inputs: torch.Tensor, _: torch.Tensor, shape: list[int], *args: Any, **settings: Any) -> torch.Tensor:
    """What a Linear with a 4-bit weight of this shape gives."""
    return inputs.new_empty((*inputs.shape[:-1], shape[0]))


def _like(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """What empty_like gives, which takes ten times as long."""
    if tensor.is_contiguous():
        return torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device="meta")
    return torch.empty_like(tensor, dtype=dtype)


def _elementwise(operation: Any) -> Callable[..., torch.Tensor]:
    """An operation of two tensors, of which the second is often a number, or broadcast to the first."""

    def run(one: Any, other: Any, **settings: Any) -> torch.Tensor:
        if isinstance(one, torch.Tensor) and one.is_contiguous() and one.is_floating_point():
            if isinstance(other, (int, float)):
                return _like(one)
            same = isinstance(other, torch.Tensor) and other.dtype == one.dtype
            if same and other.shape == one.shape[one.ndim - other.ndim :]:
                return _like(one)
        return operation(one, other, **settings)

    return run


def _copied(tensor: torch.Tensor, **settings: Any) -> Any:
    return _like(tensor, **settings) if set(settings) == {"dtype"} else NotImplemented


def _cat(parts: list[torch.Tensor], dim: int = 0) -> torch.Tensor:
    shape, kind = list(parts[0].shape), parts[0].dtype
    if not all(part.is_contiguous() and part.ndim == len(shape) and part.dtype == kind for part in parts):
        return aten.cat.default(parts, dim)
    shape[dim] = sum(part.shape[dim] for part in parts)
    return torch.empty(shape, dtype=kind, device="meta")


def _dequantized(
    packed: torch.Tensor, scales: Any, block: int, kind: str, shape: list[int], dtype: Any
) -> torch.Tensor:
    return packed.new_empty(shape, dtype=dtype)


# Most of what is called, and what its results look like: known from shapes and strides, so that a meta tensor's own
# code can say it, several times quicker than FakeTensorMode, which looks for what may be special about an operation.
QUICK: dict[Any, Callable[..., Any]] = {
    **{
        operation: operation
        for operation in (
            aten.view.default,
            aten._unsafe_view.default,
            aten.detach.default,
            aten.transpose.int,
            aten.permute.default,
            aten.slice.Tensor,
            aten.select.int,
            aten.t.default,
            aten.unsqueeze.default,
            aten.expand.default,
            aten.split_with_sizes.default,
            aten.mm.default,
        )
    },
    aten._scaled_dot_product_flash_attention_for_cpu.default: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _attention_backward,
    **{operation: _elementwise(operation) for operation in (aten.add.Tensor, aten.mul.Tensor)},
    aten._to_copy.default: _copied,
    aten.cat.default: _cat,
    torch.ops.bitsandbytes.gemm_4bit.default: _gemm,
    torch.ops.bitsandbytes.dequantize_4bit.default: _dequantized,
}


class _Numbers(TorchDispatchMode):
    """Keeps whole numbers real, so that a model can look at its token ids, masks and grids.

    What depends on frames or sounds can't be known. Comparisons with them are true, so that a mask keeps everything,
    the most that there could be to do; two of their numbers are never equal, and none is infinite.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self.mode = mode
        self._same = vars(FakeTensor(mode, torch.empty(0, device="meta"), CPU))  # in all tensors of a mode

    def _fake(self, made: torch.Tensor) -> torch.Tensor:
        """What FakeTensor(mode, made, CPU) is, which takes five times as long to look at its arguments."""
        new = torch.Tensor._make_subclass(
            FakeTensor, made, made.requires_grad, dispatch_device=True, device_for_backend_keys=CPU
        )
        new.__dict__.update(self._same)
        return new

    def _quickly(self, operation: Any, args: Any, kwargs: Any) -> Any:
        with in_kernel_invocation_manager(self.mode):
            made = operation(*args, **kwargs)
        if isinstance(made, torch.Tensor):
            return self._fake(made)
        return made if made is NotImplemented else type(made)(map(self._fake, made))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as in `Ledger`

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = _tensors(args)
        if tensors and not any(type(tensor) is FakeTensor or isinstance(tensor, FakeTensor) for tensor in tensors):
            with unset_fake_temporarily():
                return operation(*args, **kwargs)
        if operation in QUICK and all(
            (isinstance(one, FakeTensor) or one.is_meta) and one.dtype not in WHOLE for one in tensors
        ):
            made = self._quickly(QUICK[operation], args, kwargs)
            if made is not NotImplemented:
                return made
        if operation is aten._local_scalar_dense.default:
            return 1.0
        if operation is aten.rand.default and not args[0]:  # whether to drop a layer: it stays
            with unset_fake_temporarily():
                return torch.ones(())
        if operation is aten.masked_select.default:
            operation, args = aten.index.Tensor, (args[0], [args[1]])
        if operation in INDEXED:
            args = (args[0], [place for index in args[1] for place in _places(index)], *args[2:])
        elif operation is aten._ctc_loss.Tensor:
            return _ctc(*args)
        made = operation(*args, **kwargs)
        if not tensors and isinstance(made, torch.Tensor) and made.dtype in WHOLE:
            with unset_fake_temporarily():
                return operation(*args, **kwargs)
        true = operation not in FALSE
        return type(made)(_guess(true, part) for part in made) if type(made) in (tuple, list) else _guess(true, made)


def _tensors(arguments: Any) -> list[torch.Tensor]:
    """Those among the arguments of an operation, and in lists of them: quicker than a walk through any tree."""
    found = []
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            found.append(argument)
        elif isinstance(argument, (list, tuple)):
            found += [part for part in argument if isinstance(part, torch.Tensor)]
    return found


def _guess(true: bool, made: Any) -> Any:
    if not isinstance(made, FakeTensor) or made.dtype not in WHOLE:
        return made
    with unset_fake_temporarily():
        return torch.full(made.shape, int(true and made.dtype == torch.bool), dtype=made.dtype)


def _places(index: Any) -> tuple[Any, ...]:
    """A mask as numbers, as `FakeTensorMode` can't count what a mask keeps."""
    if not isinstance(index, torch.Tensor) or index.dtype != torch.bool:
        return (index,)
    with unset_fake_temporarily():
        return index.nonzero(as_tuple=True)


def _ctc(scores: torch.Tensor, labels: torch.Tensor, lengths: torch.Tensor, sizes: torch.Tensor, *_: Any) -> Any:
    """The loss of each sample and the table of its recursion; (T, B, L) scores."""
    time, batch, _ = scores.shape
    with unset_fake_temporarily():
        longest = int(sizes.max())
    return scores.new_empty(batch), scores.new_empty(batch, time, 2 * longest + 1)


@contextmanager
def _cuda_autocast() -> Iterator[None]:
    """Computes in float32, under autocast, what a GPU computes so and a CPU does not.

    The functions themselves are exchanged, as layers that are checkpointed run again in the backward pass, where modes
    do not reach.
    """

    def exact(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            if torch.is_autocast_enabled("cpu"):
                args, kwargs = tree_map(_float, (args, kwargs))
            return function(*args, **kwargs)

        return run

    enabled = torch.is_autocast_enabled

    with ExitStack() as stack:
        # Asked without a device it is about the GPU; PEFT asks so.
        stack.enter_context(patch.object(torch, "is_autocast_enabled", lambda device="cpu": enabled(device)))
        for name in ("layer_norm", "group_norm", "softmax", "log_softmax"):
            stack.enter_context(patch.object(F, name, exact(getattr(F, name))))
        yield


@contextmanager
def _without_numbers(mode: FakeTensorMode, cuda_autocast: bool = False) -> Iterator[None]:
    """Run models whose weights are hollow."""

    # DoRA looks at weights, and PEFT knows those of 4 bits by the name of their class, which hollow ones have lost.
    def expanded(module: nn.Module) -> torch.Tensor:
        state = getattr(module.weight, "quant_state", None)
        return module.weight if state is None else bnb.functional.dequantize_4bit(module.weight.data, state)

    with ExitStack() as stack:
        for user in (dora, variants):
            stack.enter_context(patch.object(user, "dequantize_module_weight", expanded))
        if cuda_autocast:
            stack.enter_context(_cuda_autocast())
        stack.enter_context(mode)
        stack.enter_context(_Numbers(mode))
        yield


def _float(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 else value


def _medium(value: Any, mode: FakeTensorMode) -> Any:
    """Frames and sounds without their numbers. What is small, such as seconds per frame, may be looked at."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.ndim < 2:
        return value
    return FakeTensor(mode, value.detach().to("meta"), CPU)


def _step(trained: list[nn.Parameter], optimizer: str, cuda: bool, ledger: Ledger) -> tuple[int, Any]:
    """Take a step as it is when the states are there; return their bytes, and the tensors to keep."""
    if optimizer not in OPTIMIZERS:
        raise PlanError(f"optimizer={optimizer!r} is unknown; use one of {', '.join(OPTIMIZERS)}.")
    before = ledger.total
    if optimizer in ("adamw_torch", "adamw_torch_fused", "sgd"):
        kind = torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW
        trained = sorted(trained, key=lambda parameter: parameter.ndim < 2)  # those without decay last, as in Trainer
        at_once = kind(trained, lr=1e-3, foreach=cuda and optimizer != "adamw_torch_fused")
        at_once.step()
        states = ledger.total - before
        ledger.restart()
        at_once.step()
        return states, at_once
    for parameter in trained:
        size = parameter.numel()
        if optimizer.startswith("paged") and size >= PAGED_FROM:
            ledger.paged += 2 * size + 8 * math.ceil(size / 256) if "8bit" in optimizer else 8 * size
            continue
        eight = "8bit" in optimizer and size >= EIGHT_BITS_FROM
        for held in 2 * ([size, 4 * math.ceil(size / 256)] if eight else [4 * size]):
            ledger.hold(held, "optimizer", "shared")
    return ledger.total - before, None
