"""Every byte of every tensor, from the operation that makes it to the moment that nothing needs it any more::

    with Ledger(model) as ledger:
        model(**inputs).loss.backward()
    ledger.peak, ledger.at_peak["activations", "vision"]

It counts what tensors hold, whoever asked for them: autograd, the optimizer or a library. What a device's allocator
makes of that is another question (`allocator`). The same counting serves tensors that are there and tensors that are
not: `planner` runs a training step of a model without weights, of which a ledger is all that is left.
"""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Mapping
from functools import partial
from typing import Any

import bitsandbytes  # noqa: F401  (registers the operations that are looked up below)
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from .errors import RegionError
from .regions import regions as regions_of

__all__ = ["KINDS", "Ledger"]

KINDS = ("weights", "adapters", "gradients", "optimizer", "inputs", "activations", "logits", "workspace")
UNSEEN = {torch.ops.bitsandbytes.gemm_4bit.default}  # they expand a weight inside, where no mode looks
DEVICE = torch.ops.prim.device.default
Place = tuple[str, str]  # kind, region


class Ledger(TorchDispatchMode):
    """A mode that counts the bytes of living tensors, by kind and region.

    Example:
        >>> with Ledger() as ledger:
        ...     kept = torch.ones(256) + torch.ones(256)
        >>> ledger.total, ledger.peak
        (1024, 3072)

    Args:
        model: what is counted from the start, and says in which region an operation is; None counts only what is made.
        regions: region of each Linear; None asks `regions` for those of the model.

    Attributes:
        total: bytes that live now.
        peak: the most that lived at any moment.
        at_peak: what lived then: bytes by kind (`KINDS`) and region. What runs outside of all parts of a model, such
            as its loss, is "shared".
        paged: bytes that are in the host's memory, which whoever knows of them sets.
        events: a row for each tensor that came or went: its number, and its bytes or, where it went, 0.
    """

    def __init__(self, model: nn.Module | None = None, regions: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.total = self.peak = 0
        self.at_peak: dict[Place, int] = {}
        self.events: list[tuple[int, int]] = []
        self.paged = 0
        self.kept: Any = None  # what should outlive the mode
        self._sums: dict[Place, int] = defaultdict(int)
        self._living: dict[int, tuple[weakref.ref[Any], int, int, Place]] = {}  # by the address of a storage
        self._made = 0
        self._inside: list[Place] = [("activations", "shared")]
        self._hooks: list[Any] = []
        if model is not None:
            self._read(model, _regions(model) if regions is None else regions)

    def __enter__(self) -> Ledger:
        """Count from here on."""
        for optimizer_hook, reader in (
            (register_optimizer_step_pre_hook, self._before_step),
            (register_optimizer_step_post_hook, self._after_step),
        ):
            self._hooks.append(optimizer_hook(reader))
        return super().__enter__()

    def __exit__(self, *reason: Any) -> None:
        """Stop counting."""
        super().__exit__(*reason)
        while self._hooks:
            self._hooks.pop().remove()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else each call goes through a wrapper that is slower than what is done here

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it made."""
        if operation is DEVICE:  # asked for several times an operation
            return args[0].fake_device
        if operation in UNSEEN:
            self._count_briefly(args[0].element_size() * args[2][0] * args[2][1])
        made = operation(*args, **(kwargs or {}))
        for part in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(part, torch.Tensor):
                self.count(part)
        return made

    def count(self, tensor: torch.Tensor, kind: str = "", region: str = "") -> None:
        """Count a tensor, once for all that share its memory. One that is known moves to the kind that is given."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._living.get(key)
        if known:
            reference, made, size, old = known
            if kind and old[0] != kind:
                place = (kind, region or old[1])
                self._living[key] = (reference, made, size, place)
                self._sums[old] -= size
                self._sums[place] += size
        elif size := storage.nbytes():
            self._made += 1
            place = (kind, region) if kind else self._place()
            self._living[key] = (weakref.ref(storage, partial(self._forget, key)), self._made, size, place)
            self.events.append((self._made, size))
            self._add(place, size)

    def hold(self, size: int, kind: str, region: str) -> None:
        """Count bytes that are not in a tensor here, and stay."""
        self._made += 1
        self.events.append((self._made, size))
        self._add((kind, region), size)

    def restart(self) -> tuple[int, dict[Place, int]]:
        """Return the peak and what lived then, and look for the next from here on."""
        before = self.peak, self.at_peak
        self.peak, self.at_peak = self.total, dict(self._sums)
        return before

    def _count_briefly(self, size: int) -> None:
        self._made += 1
        self.events += [(self._made, size), (self._made, 0)]
        place = ("workspace", self._place()[1])
        self._add(place, size)
        self._add(place, -size)

    def _place(self) -> Place:
        """What is made now: in a backward pass it is workspace, unless a checkpointed layer runs again."""
        backward = torch._C._current_graph_task_id() != -1
        return ("workspace", "shared") if backward and len(self._inside) == 1 else self._inside[-1]

    def _add(self, place: Place, size: int) -> None:
        self.total += size
        self._sums[place] += size
        if self.total > self.peak:
            self.peak, self.at_peak = self.total, dict(self._sums)

    def _forget(self, key: int, _: Any) -> None:
        _, made, size, place = self._living.pop(key)
        self.events.append((made, 0))
        self._add(place, -size)

    def _read(self, model: nn.Module, regions: Mapping[str, str]) -> None:
        """Count what the model holds, and follow which of its parts is running."""
        parts = _parts(model, regions)
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        for name, module in model.named_modules():
            region = _nearest(parts, name)
            tensors = list(module.parameters(recurse=False)) + list(module.buffers(recurse=False))
            for tensor in tensors:
                new = "lora_" in name or any(part in name for part in ("adapter", "modules_to_save", "prompt_encoder"))
                self.count(tensor, "adapters" if new else "weights", region)
                for scale in _scales(tensor):
                    self.count(scale, "weights", region)
                if tensor.requires_grad:
                    count = partial(self._count_gradient, region)
                    self._hooks.append(tensor.register_post_accumulate_grad_hook(count))
            logits = name == "" or module is head
            if logits or parts.get(name, region) != _nearest(parts, name.rpartition(".")[0]):
                enter = partial(self._enter, ("logits" if logits else "activations", region))
                self._hooks.append(module.register_forward_pre_hook(enter))
                self._hooks.append(module.register_forward_hook(self._leave, always_call=True))

    def _enter(self, place: Place, *_: Any) -> None:
        self._inside.append(place)

    def _leave(self, *_: Any) -> None:
        self._inside.pop()

    def _count_gradient(self, region: str, parameter: torch.Tensor) -> None:
        self.count(parameter.grad, "gradients", region)

    def _before_step(self, *_: Any) -> None:
        self._inside.append(("workspace", "shared"))

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._inside.pop()
        for state in optimizer.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    self.count(value, "optimizer", "shared")


def _regions(model: nn.Module) -> Mapping[str, str]:
    try:
        return regions_of(model)
    except RegionError:
        return {}


def _parts(model: nn.Module, regions: Mapping[str, str]) -> dict[str, str]:
    """Region of every module with Linears in it: the one that most of them are in. The whole is "shared"."""
    votes: dict[str, Counter[str]] = defaultdict(Counter)
    for name, region in regions.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            votes[".".join(parts[:end])][region] += 1
    return {name: count.most_common(1)[0][0] for name, count in votes.items()}


def _nearest(parts: Mapping[str, str], name: str) -> str:
    name = name.removeprefix("base_model.model.")  # PEFT's
    while name and name not in parts:
        name = name.rpartition(".")[0]
    return parts.get(name, "shared")


def _scales(weight: torch.Tensor) -> list[torch.Tensor]:
    """What a 4-bit weight has beside it."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return []
    nested = [state.state2.absmax, state.offset, state.state2.code] if state.nested else []
    return [part for part in (state.absmax, state.code, *nested) if isinstance(part, torch.Tensor)]
