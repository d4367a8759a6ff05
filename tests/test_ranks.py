"""Budgets: never exceeded, spent as well as brute force could, and read by PEFT as they were meant."""

from __future__ import annotations

import itertools

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

import mmqlora as mm
from mmqlora import benchmark
from mmqlora.calibration import Calibration, Spectrum, calibrate
from mmqlora.errors import RankError
from mmqlora.ranks import GAINS, OPTIMIZER_BYTES, Budget, Ranks, allocate_ranks
from mmqlora.regions import Row

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


def calibration(energies: list[list[float]], shapes: list[tuple[int, int]], **more) -> Calibration:
    """Made up: falling energies of Linears named a, b, c ..., the first vision, the rest text."""
    names = [chr(ord("a") + i) for i in range(len(shapes))]
    rows = tuple(
        Row(name, "text" if i else "vision", shape, shape[0] * shape[1], 32, 4 * shape[0] * shape[1])
        for i, (name, shape) in enumerate(zip(names, shapes, strict=True))
    )
    spectra = {
        name: Spectrum(np.array(e), torch.zeros(len(e), shape[1]), np.array(e), np.array(e), 1)
        for name, e, shape in zip(names, energies, shapes, strict=True)
    }
    return Calibration(rows, spectra, loss=1.0, **more)


@st.composite
def calibrations(draw, linears=5, ranks=4):
    count = draw(st.integers(2, linears))
    sizes = st.integers(1, 9)
    shapes = [(ranks + draw(sizes), ranks + draw(sizes)) for _ in range(count)]
    value = st.floats(1e-3, 1e3)
    return calibration(
        [sorted(draw(st.lists(value, min_size=ranks, max_size=ranks)), reverse=True) for _ in shapes], shapes
    )


def worth(ranks: Ranks) -> float:
    return sum(sum(values) for values in ranks.gains.values())


@given(calibrations(), st.integers(1, 400), st.booleans())
def test_a_budget_is_never_exceeded(found, budget, fill):
    ranks = allocate_ranks(found, budget=Budget(parameters=budget), max_rank=4, fill=fill)
    assert ranks.parameters == ranks.spent <= budget
    if fill:  # nothing that would still fit is left
        assert all(ranks.parameters + sum(row.shape) > budget for row in found.rows if ranks[row.name] < 4)
    assert all(0 <= rank <= 4 for rank in ranks.values())
    assert ranks.curve[-1] == pytest.approx([ranks.spent, worth(ranks)])
    assert (np.diff(ranks.curve, axis=0) > 0).all()


@given(calibrations(linears=4, ranks=3), st.integers(10, 300))
def test_greed_is_as_good_as_brute_force(found, budget):
    """Of all ranks that cost no more than what was spent, none gain more."""
    ranks = allocate_ranks(found, budget=Budget(parameters=budget), max_rank=3)
    costs = [sum(row.shape) for row in found.rows]
    sums = [np.concatenate([[0], np.cumsum(found.spectra[row.name].energies / 2)]) for row in found.rows]
    best = max(
        sum(s[r] for s, r in zip(sums, choice, strict=True))
        for choice in itertools.product(range(4), repeat=len(costs))
        if np.dot(choice, costs) <= ranks.spent
    )
    assert worth(ranks) == pytest.approx(best)


@given(calibrations(), st.integers(1, 300), st.integers(0, 300))
def test_more_never_lowers_a_rank(found, budget, more):
    few = allocate_ranks(found, budget=Budget(parameters=budget), max_rank=4)
    many = allocate_ranks(found, budget=Budget(parameters=budget + more), max_rank=4)
    assert all(few[name] <= many[name] for name in few)


@given(calibrations(), st.integers(1, 300), st.sampled_from([1e-9, 0.5, 1e9]))
def test_the_unit_of_the_loss_does_not_matter(found, budget, factor):
    scaled = calibration(
        [(s.energies * factor).tolist() for s in found.spectra.values()], [row.shape for row in found.rows]
    )
    one, other = (allocate_ranks(c, budget=Budget(parameters=budget), max_rank=4) for c in (found, scaled))
    assert dict(one) == dict(other)


@given(calibrations(), st.integers(1, 300), st.sampled_from(["gradient", "uniform", "variance"]), st.randoms())
def test_the_order_of_linears_does_not_matter(found, budget, method, random):
    rows = list(found.rows)
    random.shuffle(rows)
    other = Calibration(tuple(rows), {row.name: found.spectra[row.name] for row in rows}, found.loss)
    one, two = (allocate_ranks(c, budget=Budget(parameters=budget), method=method, max_rank=4) for c in (found, other))
    assert dict(one) == dict(two)


# Bytes


@st.composite
def charged(draw):
    """Two towers in a chain, or side by side: the second keeps what it keeps with adapters in the first, or not."""
    sizes, value = st.integers(3, 8), st.floats(0.01, 10)
    shapes = [(draw(sizes), draw(sizes)) for _ in range(4)]
    energies = [sorted((draw(value) for _ in range(2)), reverse=True) for _ in shapes]
    own = [draw(st.integers(0, 900)) for _ in shapes]
    chain = draw(st.booleans())
    kept = np.array([own if chain else [*own[:2], 0, 0], [0, 0, *own[2:]]], float)
    found = calibration(energies, shapes, kept=kept, towers=("vision", "text"), order=("a", "b", "c", "d"))
    rows = tuple(row._replace(region="vision" if row.name in "ab" else "text") for row in found.rows)
    return Calibration(rows, found.spectra, 1.0, kept, found.towers, found.order)


def bytes_of(found: Calibration, ranks: tuple[int, ...]) -> float:
    """What they take, counted step by step."""
    total = sum(16.0 * rank * sum(row.shape) for rank, row in zip(ranks, found.rows, strict=True))
    for step in range(4):
        begun = [
            found.kept[tower, step]
            for tower, region in enumerate(found.towers)
            if any(
                r and row.region == region and i <= step
                for i, (r, row) in enumerate(zip(ranks, found.rows, strict=True))
            )
        ]
        total += max(begun, default=0)
    return total


@given(charged(), st.integers(100, 8000))
def test_bytes_are_spent_as_well_as_brute_force_could(found, budget):
    ranks = allocate_ranks(found, budget=Budget(bytes=budget), max_rank=2)
    chosen = tuple(ranks[row.name] for row in found.rows)
    assert ranks.spent == pytest.approx(bytes_of(found, chosen)) and ranks.spent <= budget * (1 + 1e-6)
    gains = [found.spectra[row.name].energies / 2 for row in found.rows]
    best = max(
        sum(g[:r].sum() for g, r in zip(gains, choice, strict=True))
        for choice in itertools.product(range(3), repeat=4)
        if bytes_of(found, choice) <= budget
    )
    assert worth(ranks) == pytest.approx(best, rel=1e-5, abs=1e-9)


def test_of_two_towers_the_one_that_fits_is_adapted():
    kept = np.array([[2000, 2000, 0, 0], [0, 0, 100, 100]], float)
    names = {"kept": kept, "towers": ("vision", "text"), "order": ("a", "b", "c", "d")}
    found = calibration([[9.0, 4.0], [9.0, 4.0], [1.0, 0.5], [1.0, 0.5]], [(4, 4)] * 4, **names)
    rows = tuple(row._replace(region="vision" if row.name in "ab" else "text") for row in found.rows)
    found = Calibration(rows, found.spectra, 1.0, kept, found.towers, found.order)
    ranks = allocate_ranks(found, budget=Budget(bytes=1000), max_rank=2)
    assert dict(ranks) == {"a": 0, "b": 0, "c": 2, "d": 2}  # a rank is 128 bytes, and text's set-up 200
    assert len(ranks.notes) == 1 and ranks.notes[0].startswith("vision has no adapters: keeping its activations")
    assert not allocate_ranks(found, budget=Budget(bytes=1000), max_rank=2, fixed={"vision": 0}).notes  # was asked for
    more = allocate_ranks(found, budget=Budget(bytes=3000), max_rank=2)
    assert more["b"] == 2 and not more.notes


def test_a_tower_that_does_not_fit_is_left_out_and_named():
    task = benchmark.task("retrieval/palette")
    items = task.train(seed=0)
    found = calibrate(task.load(), [task.collate([items[i] for i in range(16)])], activations=True)
    assert found.towers == ("vision", "fusion", "text")
    vision, _, text = found.kept.sum(1)
    assert vision > 3 * text > 0  # side by side: a text adapter makes the vision tower keep nothing
    ranks = allocate_ranks(found, budget=Budget(bytes=int(text + 200_000)), max_rank=8, fixed={"fusion": 0})
    used = ranks.by_region()["rank"]
    # Its last layers may still fit, but not the tower.
    assert used["text"] > 0 and not any(ranks[n] for n in found.order if n.startswith("vision_model.layers.0"))
    nothing = allocate_ranks(found, budget=Budget(bytes=2000), max_rank=8)
    assert not any(nothing.values()) and any("vision has no adapters" in note for note in nothing.notes)
    with pytest.raises(RankError, match="bought no rank"):
        nothing.as_kwargs()


def test_what_a_card_has_room_for(tmp_path):
    task = benchmark.task("audio/timbre")
    items = task.train(seed=1)
    batch, model = task.collate([items[i] for i in range(8)]), task.load("nf4")

    def planned(ranks: Ranks, gpu: int) -> mm.Plan:
        settings = ranks.as_kwargs()
        return mm.plan(model, gpu=gpu, rank=settings.pop("r"), inputs=batch, optimizer="adamw_torch", **settings)

    rich = allocate_ranks(model, [batch], Budget(bytes=10**12), max_rank=32)
    needed = planned(rich, 10**12).process
    tight = Budget(gpu=needed - 5 * 2**20)
    poor = allocate_ranks(model, iter([batch]), tight, max_rank=32)
    assert planned(poor, tight.gpu).fits and 0 < poor.parameters < rich.parameters
    assert poor.notes[-1].startswith("A step takes") and all(poor[name] <= rich[name] for name in rich)
    poor.save(tmp_path / "ranks.json")
    assert Ranks.load(tmp_path / "ranks.json").budget == tight
    with pytest.raises(RankError, match=r"no room for adapters on gpu=1000: .* takes 0\.\d+ GiB"):
        allocate_ranks(model, [batch], Budget(gpu=1000))
    with pytest.raises(RankError, match="needs the model and its batches"):
        allocate_ranks(rich.calibration, budget=tight)
    with pytest.raises(mm.MMQLoRAError, match="'T5' is unknown; use one of T4"):
        allocate_ranks(model, [batch], Budget(gpu="T5"))


def test_activations_are_those_that_autograd_saves():
    """A chain of two towers, by hand: what is kept from a Linear on."""

    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x, labels=None):
            h = self.first(x).tanh()  # saves its result: rows x 16 floats
            y = self.second(h).tanh()  # rows x 8 floats; the frozen second saves nothing
            return type("Output", (), {"loss": (y * labels).sum()})  # labels are saved: rows x 8

    from mmqlora import calibration as module

    model = Chain().requires_grad_(False)
    rows = [Row("first", "vision", (16, 8), 144, 32, 576), Row("second", "text", (8, 16), 136, 32, 544)]
    batch = {"x": torch.randn(5, 8), "labels": torch.ones(5, 8)}
    layers = {"first": model.first, "second": model.second}
    kept, towers, order = module._kept(model, batch, rows, layers, torch.device("cpu"))
    assert towers == ("vision", "text") and order == ("first", "second")
    assert kept.tolist() == [[4 * 5 * 16, 4 * 5 * 8 * 2], [0, 4 * 5 * 8 * 2]]


# What PEFT reads


def test_peft_reads_the_ranks_as_they_are():
    task = benchmark.task("audio/timbre")
    items = task.train(seed=0)
    ranks = allocate_ranks(task.load(), [task.collate([items[i] for i in range(8)])], Budget(parameters=40_000))
    assert len(set(ranks.values())) > 3 and 0 in ranks.values()
    model = get_peft_model(task.load("nf4"), LoraConfig(**ranks.as_kwargs()))
    assert ranks.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    for name, rank in ranks.items():
        module = model.get_base_model().get_submodule(name)
        assert getattr(module, "r", {}).get("default", 0) == rank
        assert not rank or module.scaling["default"] == 2.0
    config = mm.TemporalLoraConfig(**ranks.as_kwargs(scaling=1.0))
    gated = get_peft_model(task.load("nf4"), config).get_base_model()
    assert gated.get_submodule("model.encoder.layers.0.fc1").scaling["default"] == 1.0


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.inner = nn.Module()
        self.inner.fc = nn.Linear(4, 4)
        self.inner.xfc = nn.Linear(4, 4)
        self.outer = nn.Module()
        self.outer.inner = nn.Module()
        self.outer.inner.fc = nn.Linear(4, 4)


@pytest.mark.parametrize(
    "wanted",
    [
        {"fc": 1},
        {"fc": 2, "inner.fc": 1},
        {"inner.fc": 3, "inner.xfc": 1, "fc": 2},
        {"fc": 1, "outer.inner.fc": 2},
    ],
)
def test_names_that_end_alike_are_kept_apart(wanted):
    rows = tuple(Row(name, "text", (4, 4), 20, 32, 80) for name in ("fc", "inner.fc", "inner.xfc", "outer.inner.fc"))
    ranks = Ranks({r.name: wanted.get(r.name, 0) for r in rows}, rows, "uniform", Budget(1), 0, {}, np.zeros((0, 2)))
    model = get_peft_model(Nested(), LoraConfig(**ranks.as_kwargs()))
    found = {n: m.r["default"] for n, m in model.get_base_model().named_modules() if hasattr(m, "lora_A")}
    assert found == wanted


def test_it_is_saved_and_reloaded(tmp_path):
    found = calibration([[4.0, 1.0], [2.0, 1.0]], [(4, 4), (4, 8)])
    ranks = allocate_ranks(found, budget=Budget(parameters=30), max_rank=2)
    ranks.save(tmp_path / "ranks.json")
    again = Ranks.load(tmp_path / "ranks.json")
    assert dict(again) == dict(ranks) == {"a": 2, "b": 1} and again.as_kwargs() == ranks.as_kwargs()
    assert again.table().equals(ranks.table()) and again.budget == ranks.budget
    assert again.curve.tolist() == ranks.curve.tolist() == [[0, 0], [8, 2], [20, 3], [28, 3.5]]
    for content in ("", "{}", '{"rows": 3}'):
        (tmp_path / "broken.json").write_text(content)
        with pytest.raises(RankError, match=r"broken\.json holds no ranks"):
            Ranks.load(tmp_path / "broken.json")
    with pytest.raises(RankError, match="holds no ranks"):
        Ranks.load(tmp_path / "missing.json")


# Methods and options


@pytest.fixture(scope="module")
def audio() -> Calibration:
    task = benchmark.task("audio/timbre")
    items = task.train(seed=0)
    return calibrate(task.load(), [task.collate([items[i] for i in range(8)])], directions=32, variances=True)


@pytest.mark.parametrize("method", sorted(set(GAINS) - {"error"}))
def test_every_method_spends_the_same(audio, method):
    ranks = allocate_ranks(audio, budget=Budget(parameters=60_000), method=method, max_rank=32, fill=True)
    assert 0.99 * 60_000 <= ranks.parameters <= 60_000
    again = allocate_ranks(audio, budget=Budget(parameters=60_000), method=method, max_rank=32, fill=True)
    assert dict(again) == dict(ranks)


def test_what_the_simple_methods_mean(audio):
    budget = {"budget": Budget(parameters=120_000), "max_rank": 32}
    rows = {row.name: row for row in audio.rows}
    uniform = allocate_ranks(audio, method="uniform", **budget)
    assert max(uniform.values()) - min(uniform.values()) <= 1
    wide = allocate_ranks(audio, method="width", **budget)
    sides = np.array([sum(rows[name].shape) for name in wide])
    assert np.corrcoef(sides, list(wide.values()))[0, 1] > 0.95
    connector = allocate_ranks(audio, method="connector", **budget)
    by = {r: [connector[n] for n, row in rows.items() if row.region == r] for r in ("fusion", "text")}
    assert np.mean(by["fusion"]) / np.mean(by["text"]) == pytest.approx(2, abs=0.5)
    ours, reverse = (allocate_ranks(audio, method=m, **budget) for m in ("gradient", "reversed"))
    assert np.corrcoef(list(ours.values()), list(reverse.values()))[0, 1] < -0.3
    one, other = (allocate_ranks(audio, method="random", seed=s, **budget) for s in (1, 2))
    assert dict(one) != dict(other)


def test_variance_orders_as_eva_does(audio):
    """Explained variances, largest first over all Linears, whatever a rank costs."""
    ranks = allocate_ranks(audio, budget=Budget(parameters=60_000), method="variance", max_rank=32)
    ratios = {n: s.variances for n, s in audio.spectra.items()}
    bought = min(ratios[name][rank - 1] for name, rank in ranks.items() if rank)
    left = max(ratios[name][rank] for name, rank in ranks.items() if rank < 32)
    assert bought >= left


def test_error_is_what_rounding_lost():
    task = benchmark.task("audio/timbre")
    model = task.load()
    ranks = allocate_ranks(model, budget=Budget(parameters=60_000), method="error", max_rank=16)
    name = max(ranks, key=ranks.get)
    weight = model.get_submodule(name).weight.detach()
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4")  # 192 or 512 wide: whole blocks
    values = torch.linalg.svdvals(weight - bnb.dequantize_4bit(packed, state)).square()
    assert ranks.gains[name] == pytest.approx(values[: ranks[name]].tolist(), rel=1e-3)
    with pytest.raises(RankError, match="has 4"):
        allocate_ranks(task.load("nf4"), budget=Budget(parameters=60_000), method="error")


def test_options_are_kept(audio):
    budget = Budget(parameters=60_000)
    least = allocate_ranks(audio, budget=budget, min_rank=1, max_rank=5)
    assert min(least.values()) == 1 and max(least.values()) == 5
    alike = allocate_ranks(audio, budget=budget, share=[r".*encoder\..*(q|k)_proj", r".*fc1"], max_rank=32)
    assert len({rank for name, rank in alike.items() if name.endswith("fc1")}) == 1
    assert len({alike[n] for n in alike if n.startswith("model.encoder") and n.endswith(("q_proj", "k_proj"))}) == 1
    capped = allocate_ranks(audio, budget=Budget(parameters=10**6), max_rank=64)
    assert max(capped.values()) == 32 and "have rank 32 because no more directions were calibrated" in capped.notes[0]
    assert not allocate_ranks(audio, budget=Budget(parameters=10**6), max_rank=32).notes
    held = allocate_ranks(audio, budget=budget, fixed={"text": 0, r".*fc2": 3}, max_rank=32)
    assert all(
        held[r.name] == 3 if r.name.endswith("fc2") else not (held[r.name] and r.region == "text") for r in audio.rows
    )
    assert held.by_region().loc["text", "share"] < 0.2 and held.parameters <= 60_000
    assert held.by_region()["uniform"].sum() == pytest.approx(1)


def test_mistakes_are_named(audio):
    budget = Budget(parameters=60_000)
    for wrong, message in (
        ({}, "no budget"),
        ({"budget": budget, "method": "gradeint"}, "did you mean 'gradient'"),
        ({"budget": budget, "min_rank": 3, "max_rank": 2}, "min_rank=3, max_rank=2"),
        ({"budget": Budget(parameters=10), "min_rank": 1}, r"10 parameters is less than the [\d,]+"),
        ({"budget": budget, "fixed": {"vision": 0}}, "fixed: 'vision' matches no Linear"),
        ({"budget": budget, "share": [r"encoder\.fc"]}, "share: .* matches no Linear"),
        ({"budget": budget, "share": [".*"], "fixed": {"text": 1}}, "share a rank, but fixed"),
        ({"budget": budget, "fixed": {"text": -1}}, "the rank -1"),
        ({"budget": Budget(bytes=10)}, "needs calibrate"),
        ({"budget": budget, "method": "error"}, "give the model itself"),
        ({"budget": budget, "exclude": ".*fc1"}, "give it to calibrate"),
    ):
        with pytest.raises(RankError, match=message):
            allocate_ranks(audio, **wrong)
    for wrong in ({}, {"parameters": 1, "bytes": 1}, {"parameters": 0}, {"gpu": 0}, {"bytes": 1, "optimizer": "sgd"}):
        with pytest.raises(RankError, match=r"Budget|optimizer"):
            Budget(**wrong)
    assert set(OPTIMIZER_BYTES) == {"adamw_torch", "paged_adamw_8bit"}


def test_the_map_shows_every_rank(audio):
    import matplotlib.pyplot as plt

    ranks = allocate_ranks(audio, budget=Budget(parameters=60_000), max_rank=32)
    figure = ranks.plot()
    shown = sum(float(text.get_text()) for axes in figure.axes for text in axes.texts)
    plt.close(figure)
    assert shown == sum(ranks.values())
