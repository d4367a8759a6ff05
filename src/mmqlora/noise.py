"""What quantization does to the features of an encoder, and what of it is left in the difference of two frames.

Example:
    >>> noise = mm.quantization_noise(model, [processor(videos=clip) for clip in clips])  # doctest: +SKIP
    >>> noise.layers[["error", "difference"]]  # doctest: +SKIP
    >>> keep = mm.select_frames(features, noise=noise)  # doctest: +SKIP

With h_t the features of step t in the quantized model and r_t in its twin in 16 or 32 bits, e_t = h_t - r_t is the
error. It is no accident: the same weights err in the same way on frames that are alike, and in their difference most of
it cancels. So what can be taken for a change is not the error but what is left of it::

    error        sqrt mean |e_t|^2
    difference   sqrt mean |e_t - e_{t-1}|^2 / 2         equal to the error where errors know nothing of each other

A `Noise` holds the second, for each feature.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .errors import QuantizationError, SelectionError, TimelineError
from .features import Features
from .quantization import load
from .regions import regions
from .selection import Noise, independent
from .signals import pool_steps
from .timeline import FAMILIES, Nothing, Placement, Timekeeper, timekeeper

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["QuantizationNoise", "encoder_features", "quantization_noise"]

LEAST = 1e-6  # of the size of features: smaller errors are rounding


@dataclass(frozen=True, eq=False)
class QuantizationNoise(Noise):
    """A `Noise` that was measured in a model, with all that was found on the way.

    Attributes:
        errors: (D,) float64, root mean square of the error of each feature; of the encoder, also where the deviation is
            that of thumbnails.
        bias: (D,) float64, mean of the error.
        layers: a row for each layer up to the one that was asked for, and for each of the columns a second one with its
            standard error over clips, ``..._se``: ``size``, root mean square of the features; and relative to it
            ``error``, ``difference`` (of neighbors), ``apart`` (of any two steps of a clip); ``variation``, how much
            the size of the error varies over the steps of a clip: deviation over mean.
        steps: the size of the error of each step of each clip, (T,) each, relative to ``size``.
    """

    errors: np.ndarray = field(default_factory=lambda: np.zeros(0))
    bias: np.ndarray = field(default_factory=lambda: np.zeros(0))
    layers: pd.DataFrame | None = None
    steps: tuple[np.ndarray, ...] = ()


@torch.no_grad()
def encoder_features(
    model: nn.Module,
    inputs: Mapping[str, Any],
    region: str | None = None,
    layer: int | None = None,
    clip_frames: int | None = None,
) -> list[Features]:
    """Take features of each time step from a layer of a model's encoder.

    Example:
        >>> from mmqlora import benchmark
        >>> task = benchmark.task("video/none")
        >>> batch = task.collate([task.train(seed=1)[i] for i in range(2)])
        >>> [one.values.shape for one in encoder_features(task.load("nf4"), batch, layer=1)]
        [(18, 128), (23, 128)]

    Args:
        model: a model of transformers, quantized or not. Adapters are switched off, and as far as it can be, nothing
            behind the layer is computed.
        inputs: what the model is called with, for one clip or more.
        region: "vision" or "audio"; None for the one that the model has.
        layer: features behind so many blocks of the encoder, from 1; None for all.
        clip_frames: frames of every clip, for models that take frames without a dimension of their own, such as CLIP.

    Returns:
        `Features` (T, D) float32 for each clip, the mean over the rows of a step. T is what the encoder makes of the
        frames: it may merge some. The inputs of an architecture that `timeline` does not know have to be one clip, of
        whose frames the encoder makes (F, L, D).

    Raises:
        SelectionError: no such region or layer, or rows that belong to no step.
        TimelineError: inputs of a shape that does not fit.
    """
    tower = _Tower(model, region, clip_frames)
    found = tower.run(inputs, [tower.number(layer)])
    return [Features(values) for values in found[tower.number(layer)]]


@torch.no_grad()
def quantization_noise(
    model: nn.Module,
    clips: Iterable[Mapping[str, Any]],
    reference: nn.Module | None = None,
    region: str | None = None,
    layer: int | None = None,
    clip_frames: int | None = None,
    thumbnails: Sequence[Features | np.ndarray] | None = None,
    progress: bool = False,
) -> QuantizationNoise:
    """Measure what quantization does to the features of an encoder, against its twin in 16 or 32 bits.

    Example:
        >>> from mmqlora import benchmark
        >>> task = benchmark.task("video/none")
        >>> batches = [task.collate([task.train(seed=1)[i] for i in range(n, n + 4)]) for n in (0, 4)]
        >>> noise = quantization_noise(task.load("nf4"), batches)
        >>> last = noise.layers.iloc[-1]
        >>> bool(last["difference"] < last["error"] < 0.2)
        True

    Args:
        model: the quantized model. Adapters are switched off.
        clips: what the model is called with: a few clips, one or more at a time.
        reference: the same model unquantized. None: loaded from where the model came from, with `load`.
        region: as in `encoder_features`.
        layer: as in `encoder_features`; the table has all layers before, too.
        clip_frames: as in `encoder_features`.
        thumbnails: features without a model, (F, D), for each clip in order. The deviation is then that of thumbnails:
            the change of a thumbnail that changes the encoder's features as much as quantization does, on average over
            pairs of steps.
        progress: show a progress bar.

    Returns:
        A `QuantizationNoise`; its standard errors are over clips, NaN for a single one.

    Raises:
        SelectionError: no clip of two steps, no such region or layer, a reference of another shape, or none that can be
            loaded; thumbnails of another number of clips.
    """
    reference = _twin(model) if reference is None else reference
    towers = [_Tower(each, region, clip_frames) for each in (model, reference)]
    last = towers[0].number(layer)
    if len(towers[1].blocks) != len(towers[0].blocks):
        raise SelectionError(f"the reference has {len(towers[1].blocks)} layers, the model {len(towers[0].blocks)}")
    layers = list(range(1, last + 1))
    clipwise: list[dict[int, _Clip]] = []
    for inputs in tqdm(clips, desc="noise", unit="batch", disable=not progress):
        noisy, clean = (tower.run(inputs, layers) for tower in towers)
        for index in range(len(noisy[last])):
            pairs = {k: (noisy[k][index], clean[k][index]) for k in layers}
            if pairs[last][0].shape != pairs[last][1].shape:
                raise SelectionError(
                    f"the reference gives features {pairs[last][1].shape}, the model {pairs[last][0].shape}"
                )
            clipwise.append({k: _Clip(*pair) for k, pair in pairs.items()})
    used = [clip for clip in clipwise if len(clip[last].error) > 1]
    if not used:
        raise SelectionError(f"{len(clipwise)} clips, none of two time steps or more; expected at least one")
    own = [clip[last] for clip in used]
    square, error = _mean([clip.difference for clip in own])
    size = np.sqrt(np.mean([np.square(clip.clean).mean() for clip in own]))
    deviation = np.maximum(np.sqrt(square), LEAST * size)
    dimensions = independent(np.concatenate([np.diff(clip.error, axis=0) for clip in own]) / deviation)
    error = error / (2 * deviation)
    if thumbnails is not None:
        if len(thumbnails) != len(clipwise):
            raise SelectionError(f"thumbnails of {len(thumbnails)} clips for {len(clipwise)}; expected one for each")
        deviation, error = _through(thumbnails, clipwise, last, deviation, error)
        dimensions = min(dimensions, float(len(deviation)))
    return QuantizationNoise(
        deviation=deviation,
        dimensions=dimensions,
        error=error,
        source="quantization" if thumbnails is None else "quantization, in thumbnails",
        errors=np.sqrt(_mean([np.square(clip.error).mean(0) for clip in own])[0]),
        bias=_mean([clip.error.mean(0) for clip in own])[0],
        layers=_table([[clip[k] for clip in used] for k in layers], layers),
        steps=tuple(np.sqrt(np.square(clip.error).mean(1)) / size for clip in own),
    )


class _Clip:
    """One clip at one layer: features of the twin and errors, (T, D) float64."""

    def __init__(self, noisy: np.ndarray, clean: np.ndarray) -> None:
        self.clean = clean.astype(np.float64)
        self.error = noisy.astype(np.float64) - self.clean

    @property
    def difference(self) -> np.ndarray:
        """Half the mean square of the difference between the errors of neighbors, (D,)."""
        return np.square(np.diff(self.error, axis=0)).mean(0) / 2

    def row(self) -> dict[str, float]:
        """What the table says of a clip, in squares."""
        sizes = np.sqrt(np.square(self.error).mean(1))
        return {
            "size": np.square(self.clean).mean(),
            "error": np.square(self.error).mean(),
            "difference": self.difference.mean(),
            "apart": self.error.var(0, ddof=1).mean(),
            "variation": sizes.std() / max(sizes.mean(), 1e-30),
        }


def _mean(values: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean over clips and its standard error."""
    stacked = np.stack(values)
    several = len(values) > 1
    spread = stacked.std(0, ddof=1) / np.sqrt(len(values)) if several else np.full(stacked.shape[1:], np.nan)
    return stacked.mean(0), spread


def _table(by_layer: list[list[_Clip]], layers: list[int]) -> pd.DataFrame:
    import pandas as pd

    rows = []
    for clips in by_layer:
        each = [clip.row() for clip in clips]
        mean, spread = _mean([np.array(list(row.values())) for row in each])
        # The root of a mean square, relative to that of the features; its error by the delta method.
        root = np.sqrt(mean[:4])
        scale = np.array([1.0, *[max(root[0], 1e-30)] * 3, 1.0])
        value = np.array([*root, mean[4]]) / scale
        error = np.array([*(spread[:4] / np.maximum(2 * root, 1e-150)), spread[4]]) / scale
        row = {}
        for name, number, uncertain in zip(each[0], value, error, strict=True):
            row |= {name: float(number), f"{name}_se": float(uncertain)}
        rows.append(row)
    return pd.DataFrame(rows, index=pd.Index(layers, name="layer"))


def _through(
    thumbnails: Sequence[Any], clips: list[dict[int, _Clip]], last: int, deviation: np.ndarray, error: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The change of thumbnails that moves the encoder's features as far as the noise does."""
    moved, seen, width = 0.0, 0.0, 0
    for small, clip in zip(thumbnails, clips, strict=True):
        clean = clip[last].clean
        values = torch.as_tensor(np.asarray(small.values if isinstance(small, Features) else small))
        pooled = pool_steps(values[None], len(clean))[0].double().numpy()
        width = pooled.shape[1]
        if len(clean) > 1:
            # The variance over a clip is half the mean squared difference of two of its steps.
            moved += len(clean) * float(clean.var(0).sum())
            seen += len(clean) * float(pooled.var(0).sum())
    if not moved > 0 or not seen > 0:
        raise SelectionError("nothing changes in these clips, or in their thumbnails; expected clips that move")
    total = float(np.square(deviation).sum())
    each = np.sqrt(total * seen / moved / width)
    relative = np.sqrt(np.square(deviation * error).sum()) / total  # of the root of the sum of squares
    return np.full(width, each), np.full(width, each * relative)


def _twin(model: nn.Module) -> nn.Module:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    name = getattr(getattr(base, "config", None), "_name_or_path", "")
    if not name:
        raise SelectionError(f"it is not known where this {type(base).__name__} came from; give its twin as reference")
    try:
        twin, _ = load(name, quant_type=None, model_class=type(base))
    except QuantizationError as error:
        raise SelectionError(f"can't load {name!r} unquantized; give it as reference. {error}") from error
    return twin.to(next(model.parameters()).device)


class _Stop(Exception):
    """All that was asked for has been seen."""


class _Tower:
    """The blocks of a model's encoder."""

    def __init__(self, model: nn.Module, region: str | None, clip_frames: int | None) -> None:
        self.model, self.clip_frames = model, clip_frames
        self.base = model.get_base_model() if hasattr(model, "get_base_model") else model
        parts = regions(model)
        there = [name for name in ("vision", "audio") if parts.of(name)]
        if region is None and len(there) != 1:
            raise SelectionError(f"this model has {' and '.join(there) or 'neither vision nor audio'}; name the region")
        self.region = region or there[0]
        config = getattr(self.base, "config", None)
        make = FAMILIES.get(getattr(config, "model_type", ""))
        self.family = make(config, clip_frames=clip_frames) if make else None
        # The longest list of modules, such as "encoder.layers", that hold Linears of the region whose rows have a time.
        lists: dict[str, dict[int, list[str]]] = {}
        for name in parts.of(self.region):
            if self.family is not None and isinstance(self.family.rule(name), Nothing):
                continue
            words = name.split(".")
            place = next((i for i, word in enumerate(words) if word.isdigit()), None)
            if place is not None:
                lists.setdefault(".".join(words[:place]), {}).setdefault(int(words[place]), []).append(name)
        if not lists:
            raise SelectionError(
                f"the {self.region} of this {type(self.base).__name__} has no layers whose rows belong to time steps"
            )
        prefix = max(lists, key=lambda name: len(lists[name]))
        self.blocks = [(f"{prefix}.{index}", lists[prefix][index]) for index in sorted(lists[prefix])]

    def number(self, layer: int | None) -> int:
        """A layer from 1 on, checked."""
        if layer is not None and not 1 <= layer <= len(self.blocks):
            raise SelectionError(f"layer={layer}; the {self.region} encoder has layers 1 to {len(self.blocks)}")
        return layer or len(self.blocks)

    def run(self, inputs: Mapping[str, Any], layers: list[int]) -> dict[int, list[np.ndarray]]:
        """Features behind some layers: (T, D) for each clip."""
        known = "_mmqlora_time" in self.base.__dict__
        keeper = timekeeper(self.base, self.clip_frames) if self.family is not None else None
        seen: dict[int, list[tuple[Any, Tensor]]] = {layer: [] for layer in layers}
        device = next(self.model.parameters()).device
        inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        with ExitStack() as stack:
            if hasattr(self.model, "disable_adapter"):
                stack.enter_context(self.model.disable_adapter())
            if keeper is not None and not known:
                stack.callback(keeper.remove, self.base)
            for layer in layers:
                path, linears = self.blocks[layer - 1]
                hook = _Hook(seen[layer], keeper, linears[::-1], stop=layer == max(layers))
                stack.callback(self.base.get_submodule(path).register_forward_hook(hook).remove)
            for module in self.model.modules():
                stack.callback(setattr, module, "training", module.training)
            self.model.eval()
            try:
                self.model(**inputs)
            except _Stop:
                pass
        return {layer: _joined(found, self.region) for layer, found in seen.items()}


@dataclass
class _Hook:
    """Keeps the means over the rows of each step of what a block gives, with the steps."""

    seen: list[tuple[Any, Tensor]]
    keeper: Timekeeper | None
    linears: list[str]
    stop: bool

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        h = output if isinstance(output, Tensor) else output[0]
        rule = None
        if self.keeper is not None:
            rule, place = self._place(h)
            self.seen.append((place.level, place.mean(h.float()).cpu()))
        elif h.ndim == 3 and len(h) > 1:
            self.seen.append((None, h.float().mean(1).cpu()))
        else:
            raise SelectionError(
                f"{self.linears[-1]}: it is not known which step the rows of an output {tuple(h.shape)} belong to; "
                "expected (F, L, D), or an architecture that is in mmqlora.timeline.FAMILIES"
            )
        # A tower that is called for one frame, or one stream, after the other, has to go on.
        if self.stop and (rule is None or not rule.tower):
            raise _Stop

    def _place(self, h: Tensor) -> tuple[Any, Placement]:
        """The rule of a Linear of the block, the last whose input has the rows of the block's output."""
        why = None
        for linear in self.linears:
            rule = self.keeper.family.rule(linear)
            try:
                return rule, self.keeper.clock.place(rule, linear, h.shape)
            except TimelineError as error:
                why = error
        raise why


def _joined(found: list[tuple[Any, Tensor]], region: str) -> list[np.ndarray]:
    """Clips of all calls. Calls of the same steps hold zeros for the steps of the others."""
    if found and found[0][0] is None:
        return [torch.cat([means for _, means in found]).numpy()]
    total: dict[int, Tensor] = {}
    levels = {id(level): level for level, _ in found}
    for level, means in found:
        total[id(level)] = total[id(level)] + means if id(level) in total else means
    clips = [part for key, level in levels.items() for part in total[key].split(list(level.counts))]
    if not clips:
        raise SelectionError(f"these inputs have no time steps for the {region} encoder; expected clips that it reads")
    return [clip.numpy() for clip in clips]
