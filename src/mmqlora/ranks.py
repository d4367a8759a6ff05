"""Where the rank goes: a budget is spent where the loss falls fastest::

    ranks = mm.allocate_ranks(model, batches, mm.Budget(parameters=100_000))
    model = get_peft_model(model, LoraConfig(**ranks.as_kwargs()))
    ranks.calibration.start(model)                     # if A should start along the gradient too

Let G be the gradient of the loss for a frozen weight, and s_1 >= s_2 >= ... its singular values (`calibration`). Of all
updates of rank r and norm t, the one along the first r singular pairs lowers the loss most, to first order. A rank
along the j-th is worth, and costs::

    u_j = s_j^2 / 2      what a unit step along it lowers a loss of unit curvature by
    c   = d_in + d_out   parameters

A budget is spent by taking ranks in the order of u_j / c. As the u_j of a Linear fall with j and its ranks cost the
same, no other choice of the same cost has a larger sum: the greedy choice is optimal for what it spends.

In bytes there is more to pay than ranks: the first adapter of a tower makes everything behind it keep its activations.
`Budget(bytes=...)` counts that too, and the choice is then a small integer program. `Budget(gpu="T4")` is what `plan`
says is left of a card beside the frozen model.
"""

from __future__ import annotations

import difflib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from .calibration import Calibration, _rows, calibrate
from .errors import RankError
from .regions import REGIONS, Row

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["GAINS", "Budget", "Ranks", "allocate_ranks"]

OPTIMIZER_BYTES = {"adamw_torch": 16.0, "paged_adamw_8bit": 10.03}  # of a trained float32 parameter, with its gradient


@dataclass(frozen=True)
class Budget:
    """What adapters may cost; one of the first three.

    Example:
        >>> Budget(parameters=100_000)
        Budget(parameters=100000, bytes=None, gpu=None, optimizer='adamw_torch')

    Args:
        parameters: trained parameters.
        bytes: bytes of adapters, gradients and optimizer states, and of the activations that the frozen model keeps for
            them, with batches like the first of the calibration. What adapters keep themselves, their inputs, comes on
            top, as it depends on how they are trained; ``gpu`` counts that too.
        gpu: a name in `GPUS`, or bytes of a card: a step on such a batch fits it, with the frozen model, by `plan`.
        optimizer: "adamw_torch" (16 bytes a parameter) or "paged_adamw_8bit" (10.03).
    """

    parameters: int | None = None
    bytes: int | None = None
    gpu: str | int | None = None
    optimizer: str = "adamw_torch"

    def __post_init__(self) -> None:
        given = [amount for amount in (self.parameters, self.bytes, self.gpu) if amount is not None]
        if len(given) != 1 or not (isinstance(given[0], str) or given[0] > 0):
            raise RankError(f"{self}: expected parameters, bytes or gpu, one of them, above 0.")
        if self.optimizer not in OPTIMIZER_BYTES:
            raise RankError(f"optimizer={self.optimizer!r}; expected one of {', '.join(OPTIMIZER_BYTES)}.")


@dataclass(frozen=True, eq=False)
class Ranks(Mapping[str, int]):
    """What `allocate_ranks` returns: a mapping from the names of Linears to ranks, and what PEFT needs of it.

    Example:
        >>> ranks.by_region()  # doctest: +SKIP
        >>> LoraConfig(**ranks.as_kwargs(), lora_dropout=0.05)  # doctest: +SKIP

    Attributes:
        ranks: rank of each Linear, 0 for none, in the model's order.
        rows: the Linears, as in `Regions`.
        method: what the gains were taken from.
        budget: what was asked for.
        spent: parameters or bytes, as the budget counts.
        gains: gain of each rank that was bought, by Linear; in nats where the method is "gradient".
        curve: (n, 2): what was spent and gained after each rank, in the order of greed; of a budget in parameters.
        notes: what is worth knowing, such as a tower for which the budget is too small.
        calibration: where the gains come from, None after `load` and where nothing was calibrated.
    """

    ranks: Mapping[str, int]
    rows: tuple[Row, ...]
    method: str
    budget: Budget
    spent: float
    gains: Mapping[str, tuple[float, ...]]
    curve: np.ndarray
    notes: tuple[str, ...] = ()
    calibration: Calibration | None = None

    def __getitem__(self, name: str) -> int:
        """Return the rank of a Linear, by its full name without PEFT's prefixes."""
        return self.ranks[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of all Linears, in the model's order."""
        return iter(self.ranks)

    def __len__(self) -> int:
        """Return the number of Linears."""
        return len(self.ranks)

    @property
    def parameters(self) -> int:
        """Trained parameters."""
        return sum(self.ranks[row.name] * sum(row.shape) for row in self.rows)

    def as_kwargs(self, scaling: float = 2.0) -> dict[str, Any]:
        """Give the ranks as arguments of `peft.LoraConfig`, `TemporalLoraConfig` or any other config of LoRA.

        Example:
            >>> LoraConfig(**ranks.as_kwargs())  # doctest: +SKIP

        Args:
            scaling: the factor before BAx. ``lora_alpha`` is that times the rank, so that a rank moves a Linear by as
                much as it would alone.

        Returns:
            ``target_modules``, ``exclude_modules``, ``r``, ``lora_alpha``, ``rank_pattern``, ``alpha_pattern``. Every
            pattern matches one module.

        Raises:
            RankError: no Linear has a rank.
        """
        targets = [name for name, rank in self.ranks.items() if rank]
        if not targets:
            raise RankError(f"a budget of {self.budget} bought no rank. " + " ".join(self.notes))
        # PEFT reads a name among the targets as the end of names, and a string as a whole one.
        excluded = [n for n, rank in self.ranks.items() if not rank and any(n.endswith(f".{t}") for t in targets)]
        usual = max(set(values := [self.ranks[name] for name in targets]), key=values.count)
        other = {f"^{re.escape(name)}": self.ranks[name] for name in targets if self.ranks[name] != usual}
        return {
            "target_modules": targets,
            "exclude_modules": "|".join(map(re.escape, excluded)) or None,
            "r": usual,
            "lora_alpha": scaling * usual,
            "rank_pattern": other,
            "alpha_pattern": {key: scaling * rank for key, rank in other.items()},
        }

    def table(self) -> pd.DataFrame:
        """Give a row for each Linear: region, shape, rank, parameters, and the gain that is expected of it."""
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "name": row.name,
                    "region": row.region,
                    "layer": _layer(row.name),
                    "module": row.name.rpartition(".")[2],
                    "rank": self.ranks[row.name],
                    "parameters": self.ranks[row.name] * sum(row.shape),
                    "gain": float(sum(self.gains.get(row.name, ()))),
                }
                for row in self.rows
            ]
        ).set_index("name")

    def by_region(self) -> pd.DataFrame:
        """Give a row for each region: its Linears, ranks and parameters, their shares, and the expected gain.

        The share of uniform ranks stands beside that of these.
        """
        table = self.table()
        table["uniform"] = [sum(row.shape) for row in self.rows]
        sums = table.groupby("region")[["rank", "parameters", "gain", "uniform"]].sum()
        sums.insert(0, "modules", table.groupby("region").size())
        sums["share"] = sums["parameters"] / max(1, sums["parameters"].sum())
        sums["uniform"] /= sums["uniform"].sum()
        return sums.loc[[region for region in REGIONS if region in sums.index]]

    def plot(self) -> Figure:
        """Draw the ranks as heat maps, one for each region: layers by modules."""
        import matplotlib.pyplot as plt
        import seaborn as sns

        table = self.table()
        maps = {
            region: table[table["region"] == region].pivot_table("rank", "module", "layer", "sum", sort=False)
            for region in dict.fromkeys(table["region"])
        }
        heights = [len(values) + 1 for values in maps.values()]
        figure, panels = plt.subplots(
            len(maps), 1, figsize=(7.2, 0.34 * sum(heights) + 0.6 * len(maps)), height_ratios=heights, squeeze=False
        )
        top = max(1, *(values.max().max() for values in maps.values()))
        for axes, (region, values) in zip(panels[:, 0], maps.items(), strict=True):
            small = values.shape[1] <= 16
            style = {"cmap": "cividis", "vmin": 0, "vmax": top, "linewidths": 0.5, "annot": small, "fmt": ".0f"}
            sns.heatmap(values, ax=axes, cbar_kws={"label": "rank"}, **style)
            axes.set(title=region, xlabel="", ylabel="")
        panels[-1, 0].set_xlabel("layer")
        return figure

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all but the calibration as JSON.

        Example:
            >>> ranks.save("ranks.json")  # doctest: +SKIP
            >>> Ranks.load("ranks.json") == ranks  # doctest: +SKIP
            True
        """
        content = {
            "ranks": dict(self.ranks),
            "rows": [row._asdict() for row in self.rows],
            "method": self.method,
            "budget": asdict(self.budget),
            "spent": self.spent,
            "gains": {name: list(values) for name, values in self.gains.items()},
            "curve": self.curve.tolist(),
            "notes": list(self.notes),
        }
        Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Ranks:
        """Read what `save` wrote.

        Raises:
            RankError: no such file, or one that holds something else.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            rows = tuple(Row(**{**row, "shape": tuple(row["shape"])}) for row in content.pop("rows"))
            return cls(
                rows=rows,
                budget=Budget(**content.pop("budget")),
                gains={name: tuple(values) for name, values in content.pop("gains").items()},
                curve=np.array(content.pop("curve")).reshape(-1, 2),
                notes=tuple(content.pop("notes")),
                **content,
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RankError(f"{path} holds no ranks as Ranks.save writes them: {error!r}.") from error


def allocate_ranks(
    model: nn.Module | Calibration,
    batches: Iterable[Mapping[str, Any]] = (),
    budget: Budget | None = None,
    *,
    method: str = "gradient",
    min_rank: int = 0,
    max_rank: int = 32,
    fixed: Mapping[str, int] | None = None,
    share: Sequence[str] = (),
    fill: bool = False,
    exclude: str | None = None,
    seed: int = 0,
) -> Ranks:
    """Choose the rank of every Linear under a budget.

    Example:
        >>> from mmqlora import benchmark
        >>> task = benchmark.task("audio/timbre")
        >>> items = task.train(seed=1)
        >>> batches = [task.collate([items[i] for i in range(n, n + 8)]) for n in (0, 8)]
        >>> ranks = allocate_ranks(task.load("nf4"), batches, Budget(parameters=20_000))
        >>> ranks.parameters <= 20_000
        True

    Args:
        model: a model of transformers without adapters, or what `calibrate` returned for it.
        batches: for `calibrate`; not needed by the methods that look at no data.
        budget: see `Budget`.
        method: what a rank is worth, a key of `GAINS`.
        min_rank: rank that every Linear gets first.
        max_rank: the most that one gets.
        fixed: regular expression for full names, or a region -> rank; what is fixed counts against the budget.
        share: regular expressions; Linears that match the same one get the same rank.
        fill: of a budget in parameters, spend what is left when the next rank does not fit on those that still do.
            Without, a larger budget never lowers a rank.
        exclude: see `calibrate`.
        seed: of the sketches, and of the order in which ranks of equal worth are taken.

    Returns:
        `Ranks`.

    Raises:
        RankError: a budget that is missing or below the minimum, an unknown method, an option out of range, a pattern
            that matches nothing; and what `calibrate` raises.

    Source:
        the budget in bytes is a knapsack with set-up costs, solved by `scipy.optimize.milp` (HiGHS).
    """
    if budget is None:
        raise RankError("no budget; expected one such as Budget(parameters=100_000).")
    if method not in GAINS:
        near = difflib.get_close_matches(method, GAINS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(GAINS)}"
        raise RankError(f"method={method!r} is unknown; {hint}")
    if not 0 <= min_rank <= max_rank:
        raise RankError(f"min_rank={min_rank}, max_rank={max_rank}; expected 0 <= min_rank <= max_rank.")
    calibration = model if isinstance(model, Calibration) else None
    if calibration and budget.gpu is not None:
        raise RankError("a budget for a GPU needs the model and its batches; a calibration was given.")
    if calibration and exclude is not None:
        raise RankError(f"exclude={exclude!r} came with a calibration; give it to calibrate.")
    batches = iter(batches)
    first = list(itertools.islice(batches, 1))
    if calibration is None and (method in CALIBRATED or budget.parameters is None):
        calibration = calibrate(
            model,
            itertools.chain(first, batches),
            exclude=exclude,
            directions=max_rank,
            variances=method == "variance",
            activations=budget.parameters is None,
            seed=seed,
        )
    rows = tuple(calibration.rows if calibration else _rows(model, exclude))
    source = _Source(rows, calibration, None if isinstance(model, Calibration) else model, max_rank, seed)
    gains = {name: np.maximum(np.asarray(values, float), 0) for name, values in GAINS[method](source).items()}
    groups = _groups(rows, gains, share, fixed or {}, min_rank, max_rank)

    def choose(budget: Budget) -> Ranks:
        if budget.parameters is not None:
            taken, curve = _greedy(groups, budget.parameters, fill, seed)
            notes: tuple[str, ...] = ()
        else:
            if calibration is None or not calibration.order:
                raise RankError("a budget in bytes needs calibrate(..., activations=True).")
            taken, notes = _optimal(groups, budget, calibration)
            curve = np.zeros((0, 2))
        ranks = {row.name: 0 for row in rows}
        for group, rank in zip(groups, taken, strict=True):
            ranks.update(dict.fromkeys(group.names, rank))
        bought = {row.name: tuple(gains[row.name][: ranks[row.name]].tolist()) for row in rows}
        capped = [r.name for r in rows if 0 < ranks[r.name] == len(gains[r.name]) < min(max_rank, *r.shape)]
        if capped:
            found = max(len(gains[name]) for name in capped)
            notes += (
                f"{len(capped)} Linears have rank {found} because no more directions were calibrated; "
                f"calibrate(..., directions={max_rank}) finds more.",
            )
        spent = float(sum(ranks[row.name] * sum(row.shape) for row in rows))
        if budget.bytes is not None:
            spent = _bytes(ranks, rows, budget, calibration)
        return Ranks(ranks, rows, method, budget, spent, bought, curve, notes, calibration)

    return choose(budget) if budget.gpu is None else _for_gpu(model, first[0], budget, choose)


# What a rank is worth


@dataclass(frozen=True)
class _Source:
    """What gains can be taken from."""

    rows: tuple[Row, ...]
    calibration: Calibration | None
    model: nn.Module | None
    max_rank: int
    seed: int

    def alike(self, worth: Callable[[Row], float]) -> dict[str, np.ndarray]:
        """Gains with which ranks become proportional to a worth: that times the cost, over 1, 2, 3, ..."""
        fall = 1 / np.arange(1, self.max_rank + 1)
        return {row.name: worth(row) * sum(row.shape) * fall for row in self.rows}


def _by_gradient(source: _Source) -> dict[str, np.ndarray]:
    return {name: s.energies / 2 for name, s in source.calibration.spectra.items()}


def _by_adam(source: _Source) -> dict[str, np.ndarray]:
    """To first order: Adam moves every entry of b_j alike, so that the loss falls by |G a_j|_1 ~ s_j sqrt(d_out)."""
    rows = {row.name: row for row in source.rows}
    return {n: np.sqrt(s.energies * rows[n].shape[0]) for n, s in source.calibration.spectra.items()}


def _by_whitened(source: _Source) -> dict[str, np.ndarray]:
    return {name: s.whitened / 2 for name, s in source.calibration.spectra.items()}


def _by_variance(source: _Source) -> dict[str, np.ndarray]:
    spectra = source.calibration.spectra
    if any(not len(s.variances) for s in spectra.values()):
        raise RankError('method="variance" needs calibrate(..., variances=True).')
    costs = {row.name: sum(row.shape) for row in source.rows}  # EVA counts ranks: the cost cancels
    return {name: costs[name] * s.variances for name, s in spectra.items()}


def _by_error(source: _Source) -> dict[str, np.ndarray]:
    import bitsandbytes.functional as bnb

    if source.model is None:
        raise RankError('method="error" compares weights with their 4-bit copies; give the model itself.')
    gains = {}
    for row in source.rows:
        weight = source.model.get_submodule(row.name).weight
        if row.bits < 16:
            raise RankError(f'method="error" needs weights in 16 or 32 bits; {row.name} has {row.bits}.')
        weight = weight.detach().float().contiguous()
        if weight.shape != row.shape:  # Conv1D
            weight = weight.T.contiguous()
        # Flat, as a CPU's kernel is wrong for rows that are no multiple of a block.
        packed, state = bnb.quantize_4bit(weight.view(1, -1), quant_type="nf4")
        error = weight - bnb.dequantize_4bit(packed, state).view_as(weight)
        gains[row.name] = torch.linalg.svdvals(error)[: source.max_rank].square().double().cpu().numpy()
    return gains


def _by_random(source: _Source) -> dict[str, np.ndarray]:
    worth = np.random.default_rng(source.seed).lognormal(size=len(source.rows))
    return source.alike(dict(zip(source.rows, worth, strict=True)).__getitem__)


def _by_reversed(source: _Source) -> dict[str, np.ndarray]:
    """The Linear that gains most per parameter gets what the one that gains least had, and so on."""
    costs = {row.name: sum(row.shape) for row in source.rows}
    each = {name: values / costs[name] for name, values in _by_gradient(source).items()}
    order = sorted(each, key=lambda name: (each[name].sum(), name))
    return {name: costs[name] * each[other] for name, other in zip(order, order[::-1], strict=True)}


GAINS: Mapping[str, Callable[..., dict[str, np.ndarray]]] = {
    "gradient": _by_gradient,
    "adam": _by_adam,
    "whitened": _by_whitened,
    "variance": _by_variance,
    "error": _by_error,
    "uniform": lambda source: source.alike(lambda row: 1.0),
    "width": lambda source: source.alike(lambda row: float(sum(row.shape))),
    "connector": lambda source: source.alike(lambda row: 2.0 if row.region == "fusion" else 1.0),
    "random": _by_random,
    "reversed": _by_reversed,
}
"""What a rank is worth, by name. ``gradient``: ours. ``adam``: what a first step of Adam along it lowers the loss by.
``whitened``: as ``gradient``, with each input feature in units of its own size. ``variance``: the share of the
inputs' variance along a direction, whatever a rank costs (EVA, arXiv 2410.07170). ``error``: energy of the rounding
error of NF4. ``uniform``: one rank for all; ``width``: in proportion to the sum of a Linear's two sides;
``connector``: twice as much for fusion. ``random`` and ``reversed``: checks that it matters.

:meta hide-value:
"""
CALIBRATED = {"gradient", "adam", "whitened", "variance", "reversed"}


# Spending a budget


@dataclass(frozen=True)
class _Group:
    """Linears of one rank: summed gains of ranks 1, 2, ..., parameters of a rank, and what the rank may be."""

    names: tuple[str, ...]
    gains: np.ndarray
    cost: int
    least: int
    most: int


def _groups(
    rows: Sequence[Row],
    gains: Mapping[str, np.ndarray],
    share: Sequence[str],
    fixed: Mapping[str, int],
    min_rank: int,
    max_rank: int,
) -> list[_Group]:
    shared = _matches(share, rows, "share")
    held = _matches(fixed, rows, "fixed")
    members: dict[str, list[Row]] = {}
    for row in rows:
        members.setdefault(shared.get(row.name, f"={row.name}"), []).append(row)
    groups = []
    for inside in members.values():
        names = tuple(row.name for row in inside)
        asked = {fixed[held[name]] if name in held else None for name in names}
        if len(asked) > 1:
            raise RankError(f"{names[0]} and others share a rank, but fixed gives them {sorted(map(str, asked))}.")
        rank = asked.pop()
        if rank is not None and rank < 0:
            raise RankError(f"fixed gives {names[0]} the rank {rank}; expected 0 or more.")
        most = min(max_rank, *(min(row.shape) for row in inside)) if rank is None else rank
        values = np.zeros(max(most, max_rank))
        for name in names:
            values[: len(gains[name][: len(values)])] += gains[name][: len(values)]
        least = min(min_rank, most) if rank is None else rank
        groups.append(_Group(names, values, sum(sum(row.shape) for row in inside), least, most))
    return groups


def _matches(patterns: Iterable[str], rows: Sequence[Row], what: str) -> dict[str, str]:
    """Which pattern (or region) each Linear matches; the later of two wins."""
    found = {}
    for pattern in patterns:
        own = [row.name for row in rows if row.region == pattern or re.fullmatch(pattern, row.name)]
        if not own:
            near = difflib.get_close_matches(pattern, [*REGIONS, *(row.name for row in rows)], n=3, cutoff=0.3)
            raise RankError(f"{what}: {pattern!r} matches no Linear; expected whole names or a region, such as {near}.")
        found.update(dict.fromkeys(own, pattern))
    return found


def _greedy(groups: Sequence[_Group], budget: int, fill: bool, seed: int) -> tuple[list[int], np.ndarray]:
    """Ranks of each group, and the curve of what was spent and gained."""
    taken = [group.least for group in groups]
    spent = sum(group.cost * group.least for group in groups)
    if spent > budget:
        raise RankError(f"a budget of {budget:,} parameters is less than the {spent:,} of min_rank and what is fixed.")
    gained = float(sum(group.gains[: group.least].sum() for group in groups))
    owner = np.concatenate([np.full(g.most - g.least, i) for i, g in enumerate(groups)]).astype(int)
    gains = np.concatenate([g.gains[g.least : g.most] for g in groups])
    place = np.concatenate([np.arange(g.least, g.most) for g in groups])
    costs = np.array([g.cost for g in groups])[owner]
    # Ties: the lower rank first, then by lot, so that no end of the model is preferred; drawn by name, not by place.
    names = sorted(group.names for group in groups)
    lots = dict(zip(names, np.random.default_rng(seed).permutation(len(names)), strict=True))
    chance = np.array([lots[group.names] for group in groups])[owner]
    ratio = gains / costs
    # Ranks of one group are bought in their order even where a sketch's values are out of it by rounding.
    top = ratio.max(initial=0) or 1.0
    order = np.lexsort((chance, place, -np.round(ratio / top, 12)))
    curve = [(spent, gained)]
    stopped: set[int] = set()
    for item in order:
        if gains[item] <= 0:
            continue
        if spent + costs[item] > budget:
            if not fill:
                break
            stopped.add(owner[item])
        elif owner[item] not in stopped:
            taken[owner[item]] += 1
            spent, gained = spent + costs[item], gained + gains[item]
            curve.append((spent, gained))
    return taken, np.array(curve, float)


def _optimal(groups: Sequence[_Group], budget: Budget, calibration: Calibration) -> tuple[list[int], tuple[str, ...]]:
    """Ranks of each group under a budget in bytes, with the activations that adapters make the model keep."""
    from scipy import sparse
    from scipy.optimize import Bounds, LinearConstraint, milp

    each = OPTIMIZER_BYTES[budget.optimizer]
    region = {row.name: row.region for row in calibration.rows}
    step = {name: index for index, name in enumerate(calibration.order)}
    count = [group.most for group in groups]
    first = np.concatenate([[0], np.cumsum(count)])
    kept, towers = calibration.kept, calibration.towers
    steps = kept.shape[1]
    # Variables: x, one for each rank; z[t, e], tower t has an adapter at step e or before; w[e], bytes kept at step e.
    z0 = int(first[-1])
    w0 = z0 + len(towers) * steps
    total = w0 + steps
    unit = max(1.0, budget.bytes / 1e6)  # numbers of a size that the solver likes
    objective, upper, lower = np.zeros(total), np.ones(total), np.zeros(total)
    upper[w0:] = np.inf
    scale = max(group.gains.max(initial=0) for group in groups) or 1.0
    cost = np.zeros(total)
    cost[w0:] = 1.0
    entries: list[tuple[int, int, float]] = []
    limits: list[float] = []

    def at_most(terms: Mapping[int, float], bound: float) -> None:
        entries.extend((len(limits), column, value) for column, value in terms.items())
        limits.append(bound)

    for index, group in enumerate(groups):
        own = np.arange(first[index], first[index + 1])
        objective[own] = -group.gains[: group.most] / scale
        cost[own] = group.cost * each / unit
        lower[own[: group.least]] = 1
        for one, other in itertools.pairwise(own):
            at_most({other: 1, one: -1}, 0)
        if len(own):
            for name in group.names:
                at_most({own[0]: 1, z0 + towers.index(region[name]) * steps + step[name]: -1}, 0)
    for tower in range(len(towers)):
        for e in range(steps):
            z = z0 + tower * steps + e
            if e + 1 < steps:
                at_most({z: 1, z + 1: -1}, 0)
            if kept[tower, e]:
                at_most({z: kept[tower, e] / unit, w0 + e: -1}, 0)
    at_most({i: v for i, v in enumerate(cost) if v}, budget.bytes / unit)
    rows, columns, values = zip(*entries, strict=True)
    matrix = sparse.csr_array((values, (rows, columns)), shape=(len(limits), total))
    whole = np.ones(total)
    whole[w0:] = 0
    solved = milp(
        objective,
        constraints=LinearConstraint(matrix, -np.inf, limits),
        integrality=whole,
        bounds=Bounds(lower, upper),
        options={"mip_rel_gap": 1e-6, "time_limit": 120},
    )
    if solved.x is None:
        raise RankError(
            f"a budget of {budget.bytes:,} bytes is less than min_rank and what is fixed need, with the activations "
            f"that are kept for them ({solved.message})."
        )
    x = np.round(solved.x[: first[-1]]).astype(int)
    taken = [int(x[first[i] : first[i + 1]].sum()) for i in range(len(groups))]
    used = {region[name] for group, rank in zip(groups, taken, strict=True) if rank for name in group.names}
    notes = []
    if solved.status == 1:
        notes.append("The solver ran out of time: there may be a better choice.")
    could = {region[name] for group in groups if group.most for name in group.names}
    for tower, name in enumerate(towers):
        if name in could - used:
            last = max(step[row.name] for row in calibration.rows if row.region == name)
            notes.append(
                f"{name} has no adapters: keeping its activations would take {kept[tower].sum() / 1e6:,.1f} MB "
                f"({kept[tower, last:].sum() / 1e6:,.1f} MB from its last Linear on) of {budget.bytes / 1e6:,.1f}."
            )
    return taken, tuple(notes)


def _bytes(ranks: Mapping[str, int], rows: Sequence[Row], budget: Budget, calibration: Calibration) -> float:
    """What ranks take, as `Budget(bytes=...)` counts."""
    step = {name: index for index, name in enumerate(calibration.order)}
    kept = np.zeros(calibration.kept.shape[1])
    for tower, region in enumerate(calibration.towers):
        starts = [step[row.name] for row in rows if row.region == region and ranks[row.name]]
        if starts:
            begun = np.arange(len(kept)) >= min(starts)
            kept = np.maximum(kept, calibration.kept[tower] * begun)
    parameters = sum(ranks[row.name] * sum(row.shape) for row in rows)
    return float(parameters * OPTIMIZER_BYTES[budget.optimizer] + kept.sum())


def _for_gpu(model: nn.Module, batch: Mapping[str, Any], budget: Budget, choose: Callable[[Budget], Ranks]) -> Ranks:
    """Ranks with which a step fits a card: a budget in bytes, less what `plan` says is too much, until it does."""
    import bitsandbytes as bnb

    from .planner import plan

    settings = {
        "gpu": budget.gpu,
        "quant_type": next((m.weight.quant_type for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)), None),
        "optimizer": budget.optimizer,
        "checkpointing": any(getattr(module, "gradient_checkpointing", False) for module in model.modules()),
        "inputs": batch,
    }
    empty = plan(model, rank=1, **settings)
    room = empty.limit
    while room > 0:
        ranks = choose(replace(budget, gpu=None, bytes=room))
        if not any(ranks.values()):
            break
        given = ranks.as_kwargs()
        planned = plan(model, rank=given.pop("r"), **given, **settings)
        if planned.fits:
            return replace(ranks, budget=budget, notes=(*ranks.notes, f"A step takes {planned}."))
        # At least a little less each time, so that this ends soon.
        room = int(ranks.spent) - max(planned.process - planned.limit, room // 200, 1)
    raise RankError(
        f"{type(model).__name__} leaves no room for adapters on gpu={budget.gpu!r}: with rank 1 on all Linears a step "
        f"takes {empty}. `plan(...).fit()` says what would make room."
    )


def _layer(name: str) -> int:
    """The number of the block that a Linear is in, the first in its name."""
    return next((int(part) for part in name.split(".") if part.isdigit()), 0)
