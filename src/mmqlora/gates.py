"""Temporal LoRA: adapters that act when something happens::

    config = TemporalLoraConfig(r=8, target_modules="all-linear", signals=("motion", "novelty"))
    model = get_peft_model(model, config)

A Linear with the frozen weight Ŵ, in 4 bits or not, gets the input x of step t and gives::

    y = Ŵx + s · B [ (1 + tanh(c · (U φ_t + V ĥ_t))) ⊙ Ax + E φ_t + (k ∗_t h̄)_t ]

    φ_t   (m,) signals of the step, standardized for each clip
    h̄_t   (R,) the mean of Ax over the rows of the step
    ĥ_t   (R,) the same, divided by its root mean square
    U, V  (m, R), (R, R) open and close the ranks: gate, hidden
    E     (m, R) adds the signals to the bottleneck: shift
    k     (R, w) a convolution over time, a kernel for each rank: kernel

B, U, V, E and k are zero at the start, so that training starts exactly at the base model. A gate has no gradient before
B has moved, and moves too little at the learning rate of A and B; c makes its rate c times theirs under Adam.
Rows without time, such as words, have φ = 0 and therefore exactly the gate 1. The rest is LoRA (arXiv 2106.09685).

`timeline` knows which step a row belongs to. The one file that knows PEFT's inside: a variant (`LoraVariant`) on PEFT's
own layers, and a PEFT type of its own, so that saving, loading and everything else stay PEFT's.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from peft import LoraConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.lora.layer import LoraVariant, ParamWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from . import families  # noqa: F401  # registers them
from .errors import GateError
from .signals import SIGNALS, _check_names
from .timeline import Calls, Clock, Nothing, Placement, Rule, Timekeeper, timekeeper

DEFAULT_SIGNALS = ("motion", "novelty", "keyframe", "flux", "energy", "speech")
PARTS = ("lora_gate", "lora_hidden", "lora_shift", "lora_conv")
# Variants of LoRA that have a forward of their own.
OTHER_VARIANTS = (
    "use_dora",
    "alora_invocation_tokens",
    "arrow_config",
    "velora_config",
    "monteclora_config",
    "kasa_config",
    "use_bdlora",
)


class TemporalLoraType(enum.StrEnum):
    """The PEFT type, as `peft.PeftType` takes no names from outside."""

    TEMPORAL_LORA = "TEMPORAL_LORA"


@dataclass
class TemporalLoraConfig(LoraConfig):
    """LoRA whose update follows the content over time.

    Example:
        >>> config = TemporalLoraConfig(r=8, target_modules="all-linear", signals=("motion", "flux"))
        >>> model = get_peft_model(model, config)  # doctest: +SKIP
        >>> PeftModel.from_pretrained(base, "adapter")  # doctest: +SKIP

    Every argument of `peft.LoraConfig` works as it does there, but for other variants of LoRA (DoRA and kin). A Linear
    takes the signals of what it sees: those of pictures in a vision tower, those of sound in an audio tower, all in a
    decoder that reads both. Linears that see words only are plain LoRA.

    Args:
        signals: names in `signals.SIGNALS`, or one name.
        gate: open and close the ranks by the signals.
        hidden: open and close them by the step's mean bottleneck state as well. It scored best on the book's clips, for
            a little more time.
        shift: add the signals to the bottleneck.
        kernel: width of a convolution over the steps, an odd number; 0 for none.
        gate_scale: c, by which the learning rate of the gates exceeds that of the rest.
        clip_frames: frames of every clip, for models that get frames without a dimension of their own (CLIP).

    Raises:
        GateError: an unknown signal, none that is used, an even kernel, or another variant of LoRA.
        TimelineError: later, when the model's architecture has no known time.
    """

    signals: str | tuple[str, ...] = field(default=DEFAULT_SIGNALS)
    gate: bool = True
    hidden: bool = False
    shift: bool = False
    kernel: int = 0
    gate_scale: float = 10.0
    clip_frames: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = TemporalLoraType.TEMPORAL_LORA
        self.signals = (self.signals,) if isinstance(self.signals, str) else tuple(self.signals)
        for name in self.signals:
            _check_names([name], SIGNALS.get(name, ("video",))[0])
        if self.kernel < 0 or (self.kernel and self.kernel % 2 == 0):
            raise GateError(f"kernel={self.kernel}; expected an odd number of steps, such as 3, or 0 for none")
        if not (self.gate or self.hidden or self.shift or self.kernel):
            raise GateError("no gate, hidden, shift or kernel: that is plain LoRA; use peft.LoraConfig")
        if (self.gate or self.shift) and not self.signals:
            raise GateError(f"gate and shift need signals; there are {', '.join(SIGNALS)}")
        for name in OTHER_VARIANTS:
            if getattr(self, name, None):
                raise GateError(f"{name} is another variant of LoRA, and a layer has one; leave it out")


class TemporalLora(LoraVariant):
    """What one adapter of one layer does about time.

    Args:
        name: full name of the layer.
        rule: where its rows belong.
        keeper: the clock of the model.
        config: the adapter's.
    """

    def __init__(self, name: str, rule: Rule, keeper: Timekeeper, config: TemporalLoraConfig) -> None:
        self.name, self.rule, self.keeper, self.config = name, rule, keeper, config
        own = [signal for signal in config.signals if SIGNALS[signal][0] in (*rule.modalities, "both")]
        self.signals = tuple(own)

    def supports_lora_conversion(self) -> bool:
        """No: an update that depends on the input is no matrix."""
        return False

    def init(self, module: LoraLayer, adapter_name: str, **_: Any) -> None:
        """Make the parameters, again when the rank changes."""
        rank, config = module.r[adapter_name], self.config
        shapes = {
            "lora_gate": (len(self.signals), rank) if config.gate and self.signals else None,
            "lora_hidden": (rank, rank) if config.hidden else None,
            "lora_shift": (len(self.signals), rank) if config.shift and self.signals else None,
            "lora_conv": (rank, config.kernel) if config.kernel else None,
        }
        beside = module.lora_A[adapter_name].weight
        for part, shape in shapes.items():
            if not hasattr(module, part):
                setattr(module, part, nn.ParameterDict())
                module.adapter_layer_names = (*module.adapter_layer_names, part)
            if shape is not None:
                zeros = torch.zeros(shape, dtype=beside.dtype, device=beside.device)
                getattr(module, part)[adapter_name] = nn.Parameter(zeros, requires_grad=beside.requires_grad)

    def forward(
        self, module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        """The formula above."""
        config, adapter, clock = self.config, active_adapter, self.keeper.clock
        if (own := self.keeper.own(adapter, len(x))) is None:
            place = clock.place(self.rule, self.name, x.shape)
        else:
            whole = (len(own), *x.shape[1:])
            place = clock.place(self.rule, self.name, whole).part(own.to(x.device), whole)
        h = module.lora_A[adapter](module.lora_dropout[adapter](x))
        new = h
        mean = place.mean(h) if config.hidden or config.kernel else None
        gate = self._table(module, adapter, clock, place)
        if config.hidden:
            unit = mean * torch.rsqrt(mean.square().mean(-1, keepdim=True) + 1e-12)
            change = config.gate_scale * place.padded(unit @ module.lora_hidden[adapter].to(unit.dtype))
            gate = 1 + torch.tanh(change if gate is None else gate + change)
        if gate is not None:
            if self.keeper.record is not None:
                self.keeper.record.append((self.name, adapter, place, gate))
            new = new * place.spread(gate.to(h.dtype), x.shape)
        added = None
        if adapter in module.lora_shift:
            added = self._signals(place) @ module.lora_shift[adapter].float()
        if config.kernel:
            moved = place.padded(self._convolved(module.lora_conv[adapter], mean, place))
            added = moved if added is None else added + moved
        if added is not None:
            new = new + place.spread(added.to(h.dtype), x.shape)
        up, scale = module.lora_B[adapter], module.scaling[adapter]
        if up.bias is not None:
            return result + up(new) * scale
        return result + up(new * scale)  # R columns to multiply, where PEFT does it to all outputs

    def _signals(self, place: Placement) -> torch.Tensor:
        names = self.keeper.names
        if self.signals == names:
            return place.signals
        return place.signals[:, [names.index(name) for name in self.signals]]

    def _table(self, module: LoraLayer, adapter: str, clock: Clock, place: Placement) -> torch.Tensor | None:
        """The gate of every step, like `Placement.signals`; what goes into its tanh where the hidden state does too."""
        if adapter not in module.lora_gate:
            return None
        if clock.recomputed:  # a graph that is shared with other blocks would be gone when this one runs again
            return self._gates(place, module.lora_gate[adapter].float())
        # All layers of a sort at once: small products for each would cost more than the gates are worth.
        key = (adapter, self.rule, place.level, place.index is None, torch.is_grad_enabled())
        if key not in clock.tables:
            layers = [layer for layer in self.keeper.groups[adapter, self.rule] if adapter in layer.lora_gate]
            own = [layer.lora_gate[adapter].float() for layer in layers]
            pieces = self._gates(place, torch.cat(own, 1)).split([gate.shape[1] for gate in own], 1)
            clock.tables[key] = dict(zip(map(id, layers), pieces, strict=True))
        return clock.tables[key][id(module)]

    def _gates(self, place: Placement, weights: torch.Tensor) -> torch.Tensor:
        before = self.config.gate_scale * (self._signals(place) @ weights)
        return before if self.config.hidden else 1 + torch.tanh(before)

    def _convolved(self, kernel: torch.Tensor, mean: torch.Tensor, place: Placement) -> torch.Tensor:
        near = nn.functional.embedding(place.level.around(kernel.shape[1]), nn.functional.pad(mean, (0, 0, 0, 1)))
        return (near * kernel.T.to(mean.dtype)).sum(1)

    # --- Merging: exact while every gate is still 1, refused afterward

    def merge_safe(self, module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        """The weight with the update in it."""
        self._check_closed(module, active_adapter)
        return orig_weight + module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    def merge_unsafe(self, module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> None:
        """The same in place."""
        self._check_closed(module, active_adapter)
        orig_weight.data += module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    def unmerge(self, module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        """The weight without it."""
        return orig_weight - module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    def _check_closed(self, module: LoraLayer, adapter: str) -> None:
        if moved(module, adapter):
            raise GateError(
                f"{self.name}: the update of {adapter!r} depends on the input, so it can't be merged into a weight. "
                "Keep the adapter beside the model."
            )


def moved(layer: nn.Module, adapter: str) -> bool:
    """Whether anything about time was learned, so that the layer is no longer plain LoRA."""
    parts = (getattr(layer, part, {}) for part in PARTS)
    return any(bool(part[adapter].detach().any()) for part in parts if adapter in part)


class TemporalLoraModel(LoraModel):
    """PEFT's `LoraModel`, whose layers know the time."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model with its hooks, which PEFT's own tuners pass by."""
        return self.model(*args, **kwargs)

    def _create_and_replace(
        self,
        lora_config: TemporalLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        keeper = timekeeper(self.model, lora_config.clip_frames)
        rule = keeper.rule(current_key)
        if rule is None:
            raise GateError(
                f"{current_key} has no rule in the timeline of {type(self.model).__name__}; leave it out by "
                "exclude_modules, or register a family that has one (mmqlora.timeline.family)"
            )
        if lora_config.kernel and isinstance(rule, Calls):
            raise GateError(
                f"{current_key} sees one frame at a time, so a kernel of {lora_config.kernel} steps has nothing to go "
                "over; set kernel=0, or leave the tower out by exclude_modules"
            )
        super()._create_and_replace(
            lora_config, adapter_name, target, target_name, parent, current_key=current_key, **kwargs
        )
        layer = getattr(parent, target_name)
        # Convolutions, embeddings and expert weights stay plain LoRA.
        if isinstance(rule, Nothing) or not _is_linear(layer):
            return
        keeper.want(lora_config.signals)
        variant = TemporalLora(current_key, rule, keeper, lora_config)
        layer.lora_variant[adapter_name] = variant
        variant.init(layer, adapter_name)
        keeper.groups.setdefault((adapter_name, rule), []).append(layer)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter, or leave the model as it was."""
        first = not any(isinstance(layer, LoraLayer) for layer in model.modules())
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            self._check_signals(adapter_name)
        except Exception:
            if first:
                self.unload()
            else:
                self.delete_adapter(adapter_name)
            raise

    def _check_signals(self, adapter: str) -> None:
        """Refuse signals of which no layer sees any: all would be plain LoRA, and nobody would be told."""
        keeper = self.model.__dict__.get("_mmqlora_time")
        groups = {rule: own for (name, rule), own in (keeper.groups if keeper else {}).items() if name == adapter}
        layers = [layer for own in groups.values() for layer in own]
        if layers and not any(adapter in getattr(layer, part) for layer in layers for part in PARTS):
            kinds = sorted({kind for rule in groups for kind in rule.modalities})
            fit = [name for name, (kind, _) in SIGNALS.items() if kind in (*kinds, "both")]
            raise GateError(
                f"signals={self.peft_config[adapter].signals} fit none of the {len(layers)} layers that see "
                f"{' and '.join(kinds)}; expected some of {', '.join(fit)}"
            )

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, and with the last one that knows the time the model's clock."""
        super().delete_adapter(adapter_name)
        if (keeper := self.model.__dict__.get("_mmqlora_time")) is None:
            return
        for key in [key for key in keeper.groups if key[0] == adapter_name]:
            for layer in keeper.groups.pop(key):
                layer.lora_variant.pop(adapter_name, None)
        if not keeper.groups:
            keeper.remove(self.model)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        keeper = self.model.__dict__.get("_mmqlora_time")
        with super()._enable_peft_forward_hooks(*args, **kwargs):
            if keeper is not None:
                keeper.adapters = kwargs.get("adapter_names")
            try:
                yield
            finally:
                if keeper is not None:
                    keeper.adapters = None

    def add_weighted_adapter(self, adapters: list[str], *args: Any, **kwargs: Any) -> None:
        """Refused once a gate has moved: a weighted sum of updates that depend on the input is not of their kind."""
        if any(moved(layer, name) for layer in self.modules() if isinstance(layer, LoraLayer) for name in adapters):
            raise GateError(f"adapters {adapters} have gates that have moved; they can't be added up")
        super().add_weighted_adapter(adapters, *args, **kwargs)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        if (keeper := model.__dict__.get("_mmqlora_time")) is not None:
            keeper.remove(model)
        return model


def _is_linear(layer: nn.Module) -> bool:
    # A `ParamWrapper` has a Linear inside too, but adapts its weight as a tensor and never asks a variant.
    plain = isinstance(layer, LoraLayer) and not isinstance(layer, ParamWrapper)
    return plain and isinstance(layer.get_base_layer(), (nn.Linear, Conv1D))


def explain(model: nn.Module, **batch: Any) -> pd.DataFrame:
    """When the gates of each layer are open.

    Example:
        >>> table = explain(model, **batch)  # doctest: +SKIP
        >>> table.pivot_table("gate", "step", "layer")  # doctest: +SKIP

    Args:
        model: a model with a temporal adapter, as `peft.get_peft_model` returns it.
        batch: what its ``forward`` takes.

    Returns:
        A row for each adapted layer, item and step: ``layer``, ``adapter``, ``item``, ``step``, and ``gate``, the mean
        over the ranks, with the lowest and highest of them as ``low`` and ``high``. 1 is plain LoRA, 0 no update, 2
        twice the update.

    Raises:
        GateError: the model has no gates.
    """
    keeper = next((m.__dict__["_mmqlora_time"] for m in model.modules() if "_mmqlora_time" in m.__dict__), None)
    if keeper is None or not keeper.groups:
        raise GateError("the model has no gates; get_peft_model(model, TemporalLoraConfig(...)) adds them")
    layers = [(adapter, layer) for (adapter, _), group in keeper.groups.items() for layer in group]
    if not any(adapter in layer.lora_gate or adapter in layer.lora_hidden for adapter, layer in layers):
        names = ", ".join(sorted({adapter for adapter, _ in layers}))
        raise GateError(f"{names}: only a shift or a kernel, no gates; expected gate=True or hidden=True in the config")
    keeper.record = []
    try:
        with torch.no_grad():
            model(**batch)
        recorded = keeper.record
    finally:
        keeper.record = None
    tables = []
    for name, adapter, place, gate in recorded:
        level = place.level
        steps = [(item, step) for item, count in enumerate(level.counts) for step in range(count)]
        # A tower that is called once a frame sees one step of each item at a time.
        seen = range(level.steps) if place.index is None else place.index[place.index < level.steps].unique().tolist()
        table = pd.DataFrame([steps[number] for number in seen], columns=["item", "step"])
        values = gate[list(seen)].float().cpu()
        table.insert(0, "adapter", adapter)
        table.insert(0, "layer", name)
        table["gate"], table["low"], table["high"] = values.mean(1), values.amin(1), values.amax(1)
        tables.append(table)
    columns = ["layer", "adapter", "item", "step", "gate", "low", "high"]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns)


PEFT_TYPE_TO_CONFIG_MAPPING[TemporalLoraType.TEMPORAL_LORA] = TemporalLoraConfig  # type: ignore[index]
PEFT_TYPE_TO_TUNER_MAPPING[TemporalLoraType.TEMPORAL_LORA] = TemporalLoraModel  # type: ignore[index]
PEFT_TYPE_TO_PREFIX_MAPPING[TemporalLoraType.TEMPORAL_LORA] = TemporalLoraModel.prefix  # type: ignore[index]
