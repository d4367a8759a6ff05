"""One pass over some batches: along which directions the loss falls fastest, for every frozen Linear of a model::

    calibration = mm.calibrate(model, batches)
    calibration.spectra["model.encoder.layers.0.fc1"].energies     # squared singular values of the weight's gradient

The gradient of the loss for a frozen weight W is G, the sum over input rows x of (output gradient) x^T. Four-bit layers
never form it, and large ones could not afford it. So it is accumulated exactly only where it is no larger than two
sketches with random matrices, from which a gradient of low rank is put together again::

    Y = G Omega     (d_out, k)
    Z = Psi G       (2 k, d_in)
    G ~ Q (Psi Q)^+ Z     Q an orthonormal basis of Y

Both need no more than x and the output gradient, row by row, and add up over batches and over processes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from tqdm.auto import tqdm

from .errors import RankError
from .quantization import close_cpu_traps
from .regions import REGIONS, Row, exact_pattern, regions

__all__ = ["Calibration", "Spectrum", "calibrate"]

OVERSAMPLING = 2  # width of a sketch, as a multiple of the directions that are asked for
START_NORM = 3**-0.5  # of a row of A: that of PEFT's own start, uniform in +-1/sqrt(d_in)


@dataclass(frozen=True, eq=False)
class Spectrum:
    """What calibration found for one Linear.

    Attributes:
        energies: (k,) float64, squared singular values of the gradient, falling.
        directions: (k, d_in) float32, its right singular vectors.
        variances: (k,) float64, the shares of the inputs' variance along its principal directions, falling; empty
            unless asked for.
        whitened: (k,) float64, squared singular values of the gradient with each input feature in units of its size.
        rows: input rows that were seen.
    """

    energies: np.ndarray
    directions: Tensor
    variances: np.ndarray
    whitened: np.ndarray
    rows: int


@dataclass(frozen=True, eq=False)
class Calibration:
    """What `calibrate` returns: gradient spectra of a model's Linears, and what adapting them makes a model keep.

    Attributes:
        rows: the Linears, as in `Regions`.
        spectra: one `Spectrum` each.
        loss: mean over the batches.
        kept: (towers, Linears) float64: bytes of activations that are kept between the call of a Linear and that of the
            next one if a tower (`towers`) has adapters before; empty unless asked for.
        towers: regions, in the order of the first axis of ``kept``.
        order: names of the Linears in the order in which the model calls them, the second axis of ``kept``.
    """

    rows: tuple[Row, ...]
    spectra: Mapping[str, Spectrum]
    loss: float
    kept: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    towers: tuple[str, ...] = ()
    order: tuple[str, ...] = ()

    def start(self, model: nn.Module, adapter: str = "default") -> int:
        """Turn the A of LoRA adapters to the directions along which the loss falls fastest. B stays zero.

        Example:
            >>> model = get_peft_model(model, LoraConfig(**ranks.as_kwargs()))  # doctest: +SKIP
            >>> calibration.start(model)  # doctest: +SKIP
            42

        Each row of A becomes a right singular vector of the gradient, as long as PEFT makes it. So the model is still
        the base model, and what is saved is a plain adapter.

        Args:
            model: a `peft.PeftModel` with LoRA, of any ranks; what was not calibrated, and ranks beyond the directions
                that were found, stay as they are.
            adapter: its name.

        Returns:
            The number of Linears that were changed.

        Raises:
            RankError: no Linear of the model was calibrated.
        """
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        changed = 0
        for name, module in base.named_modules():
            if name in self.spectra and isinstance(module, BaseTunerLayer) and adapter in getattr(module, "lora_A", {}):
                weight = module.lora_A[adapter].weight
                spectrum = self.spectra[name]
                found = spectrum.directions[: min(len(weight), int((spectrum.energies > 0).sum()))]
                with torch.no_grad():
                    weight[: len(found)] = START_NORM * found.to(weight)
                changed += 1
        if not changed:
            raise RankError(
                f"none of the model's adapters named {adapter!r} is on a Linear that was calibrated, such as "
                f"{next(iter(self.spectra))}; expected a PeftModel with LoRA on the model that was."
            )
        return changed


def calibrate(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    exclude: str | None = None,
    directions: int = 32,
    variances: bool = False,
    activations: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> Calibration:
    """Measure the gradient of the loss for every frozen Linear, as a spectrum, in one pass over some batches.

    Example:
        >>> from mmqlora import benchmark
        >>> task = benchmark.task("audio/timbre")
        >>> items = task.train(seed=1)
        >>> found = calibrate(task.load("nf4"), [task.collate([items[i] for i in range(4)])], exclude="proj_out")
        >>> energies = found.spectra["model.encoder.layers.0.fc1"].energies
        >>> bool(energies[0] > energies[-1] > 0)
        True

    The model is left as it was. Nothing is trained, and a weight may be in 4, 8, 16 or 32 bits. What is not calibrated
    and comes before all that is, keeps no activations. The model's mode is kept too: in evaluation mode there is no
    dropout, and no gradient checkpointing either.

    With `torch.distributed`, each process passes over batches of its own, and all get the spectra of all, and the first
    one's activations.

    Args:
        model: a model of transformers without adapters, that returns a loss.
        batches: model inputs with labels. A batch counts by its labels that are not -100 (by its items, where there
            are none), so that large batches cut into small ones give the same.
        exclude: a regular expression for full names of Linears that are not calibrated. The output embedding never is.
        directions: singular directions that are found for each Linear, at most. A Linear takes
            ``2 directions (d_out + 2 d_in)`` floats at most, whatever its size. Where it is sketched, energies above
            3% of its largest come within 2%, and so does their sum; small ones are less exact.
        variances: also find the spectrum of the inputs, for ``2 directions d_in`` floats more.
        activations: also measure what adapters would make the model keep; one forward pass of the first batch for each
            region.
        seed: of the sketches and, in training mode, of dropout.
        progress: show a progress bar.

    Returns:
        A `Calibration`.

    Raises:
        RankError: no batch, no loss, a loss or a gradient that is not finite, Linears that no gradient reaches, a
            pattern that matches nothing, or adapters that are there already. The message names the Linears.

    Source:
        the sketch: Tropp, Yurtsever, Udell and Cevher, Practical Sketching Algorithms for Low-Rank Matrix
        Approximation (arXiv 1609.00048), algorithm 4.
    """
    rows = _rows(model, exclude)
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        raise RankError("no batches; expected at least one dictionary of model inputs with labels.")
    device = next(model.parameters()).device
    modules = {row.name: model.get_submodule(row.name) for row in rows}
    shared = _Sketches(OVERSAMPLING * directions, seed, device)
    sums = {row.name: _Sum(row.shape, shared, variances) for row in rows}
    losses, weights = [], []
    with _frozen(model), torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        kept, towers, order = _kept(model, first, rows, modules, device) if activations else (np.zeros((0, 0)), (), ())
        if activations and _distributed():
            same = [kept, towers, order]
            torch.distributed.broadcast_object_list(same)
            kept, towers, order = same
        with _taps(modules, lambda name, x, grad: sums[name].add(x, grad)):
            for batch in tqdm(_chain(first, batches), desc="calibration", unit="batch", disable=not progress):
                weight = _weight(batch)
                for each in sums.values():
                    each.scale = weight
                loss = _loss(model, batch, device)
                loss.backward()
                losses.append(float(loss.detach()))
                weights.append(weight)
    total = _everywhere(torch.tensor([sum(weights)], dtype=torch.float64, device=device)).item()
    for each in sums.values():
        each.gather()
    _check_gradients(sums)
    if activations and (missed := [name for name in sums if name not in order]):
        raise _missed("the first batch, on which activations are measured, does not reach", missed, sums)
    spectra = {name: each.spectrum(directions, total) for name, each in sums.items()}
    return Calibration(tuple(rows), spectra, float(np.average(losses, weights=weights)), kept, towers, order)


class _Tap(torch.autograd.Function):
    """The identity on a Linear's output, which shows the Linear's input and output gradient to a function.

    The input is saved as autograd saves tensors, so that gradient checkpointing drops and recomputes it. `anchor`
    requires a gradient, so that the graph begins at the first Linear that is of interest.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, anchor: Tensor, see: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.see = see
        return output.clone()  # not a view: some models go on in place, and the Linear needs its own no more

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        ctx.see(x, grads[0])
        return grads[0], None, None, None


class _Sketches:
    """Random matrices, one for each width, as all Linears of a width can share them."""

    def __init__(self, width: int, seed: int, device: torch.device) -> None:
        self.width = width
        self.device = device
        self._seed = seed
        self._made: dict[tuple[int, int], Tensor] = {}

    def __call__(self, size: int, width: int) -> Tensor:
        if (size, width) not in self._made:
            # From a seed of its own, so that it does not depend on which Linear came first, or on the device.
            generator = torch.Generator().manual_seed(hash((self._seed, size, width)) % 2**63)
            made = torch.randn(size, width, generator=generator) / math.sqrt(width)
            self._made[size, width] = made.to(self.device)
        return self._made[size, width]


class _Sum:
    """What is added up over batches for one Linear."""

    def __init__(self, shape: tuple[int, int], sketches: _Sketches, variances: bool) -> None:
        outputs, inputs = shape
        k = sketches.width
        self._sketches, self._inputs, self._outputs = sketches, inputs, outputs
        self.exact = outputs * inputs <= k * outputs + 2 * k * inputs
        self.variances = variances
        self.scale, self.rows = 1.0, 0
        self.parts: dict[str, Tensor] = {}
        self._inner = min(inputs, k)  # of the inputs' second moment: exact where it is that small

    def add(self, x: Tensor, grad: Tensor) -> None:
        x, grad = x.reshape(-1, x.shape[-1]).float(), grad.reshape(-1, grad.shape[-1]).float() * self.scale
        self.rows += len(x)
        if self.exact:
            self._plus("gradient", grad.T @ x)
        else:
            k = self._sketches.width
            self._plus("right", grad.T @ (x @ self._sketches(self._inputs, k)))
            self._plus("left", (grad @ self._sketches(self._outputs, 2 * k)).T @ x)
        self._plus("inputs", x.square().sum(0))
        if self.variances:
            exact = self._inner == self._inputs
            self._plus("mean", x.sum(0))
            self._plus("moment", x.T @ (x if exact else x @ self._sketches(self._inputs, self._inner)))

    def _plus(self, name: str, value: Tensor) -> None:
        if name in self.parts:
            self.parts[name] += value
        else:
            self.parts[name] = value

    def gather(self) -> None:
        """Add up over processes. One whose batches did not reach this Linear adds zeros, lest the others wait."""
        if not _distributed():
            return
        k, device = self._sketches.width, self._sketches.device
        shapes = {"right": (self._outputs, k), "left": (2 * k, self._inputs), "inputs": (self._inputs,)}
        if self.exact:
            shapes = {"gradient": (self._outputs, self._inputs), "inputs": (self._inputs,)}
        if self.variances:
            shapes |= {"moment": (self._inputs, self._inner), "mean": (self._inputs,)}
        self.rows = int(_everywhere(torch.tensor([self.rows], device=device)).item())
        found = {name: self.parts.get(name, torch.zeros(shape, device=device)) for name, shape in shapes.items()}
        self.parts = {name: _everywhere(value) for name, value in found.items()} if self.rows else {}

    def factors(self, total: float) -> tuple[Tensor, Tensor]:
        """Singular values and right singular vectors of the gradient; of a sketched one, as good as the sketch."""
        if self.exact:
            _, values, right = torch.linalg.svd(self.parts["gradient"].double() / total, full_matrices=False)
            return values, right
        psi = self._sketches(self._outputs, 2 * self._sketches.width).double()
        basis, _ = torch.linalg.qr(self.parts["right"].double())
        inner = torch.linalg.lstsq(psi.T @ basis, self.parts["left"].double() / total).solution
        _, values, right = torch.linalg.svd(inner, full_matrices=False)  # the basis turns the left vectors only
        return values, right

    def spectrum(self, directions: int, total: float) -> Spectrum:
        """Singular values and right directions, and what else was asked for."""
        values, right = self.factors(total)
        mean_square = self.parts["inputs"].double() / max(1, self.rows)
        # Damped: a feature that never moves would be worth anything.
        scale = (mean_square + 0.01 * mean_square.mean().clamp(min=1e-30)).sqrt()
        whitened = torch.linalg.svdvals((values[:, None] * right) / scale)
        return Spectrum(
            energies=values[:directions].square().cpu().numpy(),
            directions=right[:directions].float().cpu(),
            variances=self._variances(directions),
            whitened=whitened[:directions].square().cpu().numpy(),
            rows=self.rows,
        )

    def _variances(self, directions: int) -> np.ndarray:
        """Eigenvalues of the inputs' covariance over their sum: exact, or Nystrom's."""
        if "moment" not in self.parts:
            return np.zeros(0)
        rows = max(1, self.rows)
        mean, moment = self.parts["mean"].double() / rows, self.parts["moment"].double() / rows
        total = (self.parts["inputs"].double() / rows - mean.square()).sum().clamp(min=1e-300)
        if self._inner == self._inputs:
            values = torch.linalg.eigvalsh(moment - mean[:, None] * mean).flip(0)
        else:
            omega = self._sketches(self._inputs, self._inner).double()
            moment = moment - mean[:, None] * (mean @ omega)
            core = omega.T @ moment
            lower, vectors = torch.linalg.eigh((core + core.T) / 2)
            good = lower > lower.max() * 1e-10
            values = torch.linalg.svdvals(moment @ vectors[:, good] / lower[good].sqrt()).square()
        return (values[:directions].clamp(min=0) / total).cpu().numpy()


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _everywhere(value: Tensor) -> Tensor:
    """The sum over processes, where there are several."""
    if _distributed():
        torch.distributed.all_reduce(value)
    return value


def _rows(model: nn.Module, exclude: str | None) -> list[Row]:
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise RankError("the model has adapters already; start from the base model.")
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    rows = [row for row in regions(model).rows if model.get_submodule(row.name) is not head]
    if exclude is None:
        return rows
    left = [row for row in rows if not re.fullmatch(exclude, row.name)]
    if len(left) == len(rows) and not any(re.fullmatch(exclude, name) for name, _ in model.named_modules()):
        raise RankError(f"exclude={exclude!r} matches no Linear; expected whole names, such as {rows[0].name!r}.")
    if not left:
        raise RankError(f"exclude={exclude!r} matches every Linear; expected to leave some.")
    return left


def _chain(first: Any, rest: Iterable[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def _weight(batch: Mapping[str, Any]) -> float:
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.ndim > 1:
        return float((labels != -100).sum())
    return float(max((len(v) for v in batch.values() if isinstance(v, Tensor) and v.ndim), default=1))


def _loss(model: nn.Module, batch: Mapping[str, Any], device: torch.device) -> Tensor:
    moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    loss = getattr(model(**moved), "loss", None)
    if loss is None:
        raise RankError(
            f"the model returned no loss for a batch of {', '.join(batch)}; expected labels in it "
            "(return_loss=True for a dual encoder)."
        )
    if not torch.isfinite(loss.detach()):
        raise RankError(f"the loss of a batch is {loss.item()}; expected a finite one. Look at its labels and inputs.")
    if not loss.requires_grad:
        raise RankError("no Linear that is calibrated has a part in the loss.")
    return loss


@contextmanager
def _taps(modules: Mapping[str, nn.Module], see: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Show input and output gradient of some Linears, by name, during every backward pass."""
    anchors: dict[torch.device, Tensor] = {}

    def tap(name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return output
        anchor = anchors.setdefault(output.device, torch.zeros((), device=output.device, requires_grad=True))
        return _Tap.apply(output, args[0].detach(), anchor, partial(see, name))

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(partial(tap, name)).remove)
        yield


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient, and no graph begins before a tap; afterwards all is as it was."""
    close_cpu_traps(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    grads = [p.grad for p in trained]
    functions = [
        (module, function)
        for module in model.modules()
        if isinstance(function := getattr(module, "_gradient_checkpointing_func", None), partial)
        and function.keywords.get("use_reentrant", True)
    ]
    # By name: transformers forgets those that it registered before, and PEFT has its own.
    hooks = [
        (module, key, hook)
        for module in model.modules()
        for key, hook in module._forward_hooks.items()
        if getattr(hook, "__name__", "") == "make_inputs_require_grads"
    ]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        # Reentrant checkpointing needs inputs with gradients, for which frozen towers would keep their graphs.
        for module, function in functions:
            changed = {**function.keywords, "use_reentrant": False}
            module._gradient_checkpointing_func = partial(function.func, *function.args, **changed)
        for module, key, _ in hooks:
            del module._forward_hooks[key]
        yield
    finally:
        for parameter, grad in zip(trained, grads, strict=True):
            parameter.requires_grad_(True)
            parameter.grad = grad
        for module, function in functions:
            module._gradient_checkpointing_func = function
        for module, key, hook in hooks:
            module._forward_hooks[key] = hook


def _check_gradients(sums: Mapping[str, _Sum]) -> None:
    broken = [name for name, s in sums.items() if not all(torch.isfinite(part).all() for part in s.parts.values())]
    if broken:
        raise RankError(f"gradients or inputs that are not finite in {_listed(broken)}; look at the batches.")
    if missed := [name for name, s in sums.items() if not s.parts]:
        raise _missed("no gradient reached", missed, sums)


def _missed(what: str, missed: Sequence[str], names: Mapping[str, Any]) -> RankError:
    pattern = exact_pattern(missed, names.keys() - set(missed))
    return RankError(
        f"{what} {len(missed)} of {len(names)} Linears: {_listed(missed)}. Give batches that use them, or leave them "
        f'out, with exclude=r"{pattern}".'
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


# What adapters make a model keep


def _kept(
    model: nn.Module,
    batch: Mapping[str, Any],
    rows: Sequence[Row],
    modules: Mapping[str, nn.Module],
    device: torch.device,
) -> tuple[np.ndarray, tuple[str, ...], tuple[str, ...]]:
    """Bytes that autograd saves if the graph begins at a tower's first Linear: see `Calibration.kept`."""
    towers = tuple(region for region in REGIONS if any(row.region == region for row in rows))
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    order: dict[str, int] = {}
    found: dict[tuple[str, str], int] = {}
    for tower in towers:
        now = [""]
        seen: set[tuple[int, int]] = set()
        alive: list[Tensor] = []  # so that no address is used twice

        def arrive(name: str, now: list[str], module: nn.Module, args: tuple) -> None:
            order.setdefault(name, len(order))
            now[0] = name

        def pack(tensor: Tensor, now: list[str], seen: set, alive: list[Tensor], tower: str) -> Tensor:
            storage = tensor.untyped_storage()
            key = (storage.data_ptr(), storage.nbytes())
            if key not in seen and key[0] not in own:
                seen.add(key)
                alive.append(tensor)
                found[tower, now[0]] = found.get((tower, now[0]), 0) + storage.nbytes()
            return tensor

        with ExitStack() as stack:
            for name, module in modules.items():
                stack.callback(module.register_forward_pre_hook(partial(arrive, name, now)).remove)
            stack.enter_context(_anchors({row.name: modules[row.name] for row in rows if row.region == tower}))
            keep = partial(pack, now=now, seen=seen, alive=alive, tower=tower)
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor))
            try:
                _loss(model, batch, device)
            except RankError as error:
                raise RankError(f"activations of {tower}, which the first batch has to reach: {error}") from error
    kept = np.zeros((len(towers), len(order)))
    for (tower, name), count in found.items():
        kept[towers.index(tower), order.get(name, 0)] += count
    return kept, towers, tuple(order)


@contextmanager
def _anchors(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """The graph begins at these Linears, and nothing is saved for them."""

    def begin(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output if output.requires_grad else output + torch.zeros((), device=output.device, requires_grad=True)

    with ExitStack() as stack:
        for module in modules.values():
            stack.callback(module.register_forward_hook(begin).remove)
        yield
