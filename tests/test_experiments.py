"""What the book's experiments share, and the controls that their claims hang on."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).parents[1] / "book"))

from experiments import baselines, ranks, selection, temporal, temporal_speech, together, tuning
from experiments.ranks_scores import AIM, OURS, Scores
from experiments.together_results import METRIC, Results

from mmqlora import benchmark
from mmqlora.datasets.worlds import World
from mmqlora.gates import timekeeper
from mmqlora.records import read_records
from mmqlora.timeline import Level, Placement, Stream


@given(st.integers(-6, 6), st.sampled_from([1e-3, 3e-3, 1e-1]))
def test_rates_are_tried_until_the_best_lies_between_two_others_or_five_were(peak, middle):
    def score(rate):
        return -abs(torch.tensor(rate / middle).log10().item() * 2 - peak)

    scores: dict[float, float] = {}
    while rates := tuning.wanted(scores, middle):
        assert not set(rates) & set(scores)
        scores |= {rate: score(rate) for rate in rates}
    assert len(scores) == 3 + min(abs(peak), tuning.MOST - 3)
    best = max(scores, key=scores.get)
    if abs(peak) < 2:
        assert min(scores) < best < max(scores)
        assert best == tuning.rate_at(peak, middle)


def test_every_baseline_was_tuned_by_the_rule():
    scores = tuning.tried(baselines.RECORDS / "baselines_tuning.jsonl", baselines.score)
    for config, middle in baselines.tuned_arms(baselines.MAIN, list(baselines.RATES)):
        assert tuning.wanted(scores[tuning.arm(config)], middle) == []


@pytest.mark.parametrize("module", [temporal, temporal_speech])
def test_temporal_arms_run_at_the_rate_that_the_rule_chose(module):
    name = module.__name__.split(".")[-1]
    for scores in tuning.tried(module.RECORDS / f"{name}_tuning.jsonl", module.score).values():
        assert tuning.wanted(scores, module.MIDDLE) == []
    rates = module.rates()
    for record in read_records(module.RECORDS / f"{name}.jsonl"):
        config = record["config"]
        key = (config["task"].split("/")[0], config["arm"]) if "task" in config else config["arm"]
        assert config["learning_rate"] == rates[key]


def test_ranks_run_at_the_rate_that_the_rule_chose_with_equal_parameters():
    rates, trained = ranks.rates(), {}
    for record in read_records(ranks.RECORDS / "ranks.jsonl"):
        task, arm, budget = (record["config"][name] for name in ("task", "arm", "budget"))
        assert record["config"]["learning_rate"] == rates[task, arm, budget]
        if arm != "AdaLoRA":  # which has more at the start
            trained.setdefault((task, budget), {})[arm] = record["parameters"]["trainable"]
    for found in trained.values():
        assert all(0.99 * found["uniform"] < count <= found["uniform"] for count in found.values())


def test_shuffled_signals_stay_within_their_clip_and_leave_padding_alone():
    valid = torch.arange(30) < torch.tensor([[30], [7], [1]])
    signals = torch.arange(90.0).view(3, 30, 1) * valid[..., None]
    stream = temporal.shuffled(lambda arguments, names: Stream(signals, valid))({}, ())
    assert torch.equal(stream.signals.sort(1).values, signals.sort(1).values)
    assert not stream.signals[~valid].any()
    assert not torch.equal(stream.signals, signals)


def test_a_shuffled_state_is_that_of_another_step_of_the_clip():
    place = Placement(Level((20, 4), torch.zeros(25, 1)))
    h = torch.arange(24.0)[:, None, None].expand(24, 3, 2)
    plain, mixed = place.mean(h), temporal.shuffled_mean(place, h)
    assert not torch.equal(mixed, plain)
    for own in (slice(0, 20), slice(20, 24)):
        assert torch.equal(mixed[own].sort(0).values, plain[own])


@pytest.mark.parametrize("arm", temporal.ARMS)
def test_each_arm_starts_at_the_base_and_shuffles_only_what_it_says(arm):
    task = benchmark.TASKS["retrieval/flashes"]
    model = temporal.build(task, arm)
    batch = task.collate([task.train(1)[i] for i in range(2)])
    with torch.no_grad():
        assert torch.equal(model(**batch).loss, task.load(quant_type="nf4")(**batch).loss)
    if arm not in temporal.PLAIN:
        read = timekeeper(model.get_base_model()).family.media["video"]
        wanted = ("motion", "novelty")
        again = [read(batch, wanted).signals for _ in range(2)]
        assert torch.equal(*again) == (arm != "gate, signals shuffled")


@pytest.mark.parametrize("arm", ["uniform", "gradient, spectral start", "whitened", "EVA"])
def test_arms_of_ranks_start_at_the_base_with_equal_parameters(arm, monkeypatch):
    monkeypatch.setattr(benchmark.Task, "items", ranks.BATCHES * ranks.ITEMS, raising=False)
    task = benchmark.task("audio/timbre")
    train = task.train(1)
    model, shares = ranks.build({"arm": arm, "budget": 2}, task.load, ranks.first(train, task.collate), 1, steps=10)
    batch = task.collate([train[i] for i in range(2)])
    with torch.no_grad():
        assert torch.equal(model(**batch).loss, task.load(quant_type="nf4")(**batch).loss)
    modules = task.load().named_modules()
    linears = [m for name, m in modules if isinstance(m, torch.nn.Linear) and name != "proj_out"]
    uniform = 2 * sum(linear.in_features + linear.out_features for linear in linears)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert 0.99 * uniform < trained <= uniform and (trained == uniform or arm != "uniform")
    assert sum(shares.values()) == pytest.approx(1)


def test_states_and_events_share_out_the_frames_of_a_clip():
    for item in World("clips", 20, seed=5, frames=selection.FRAMES):
        spans = sorted(selection.states(item) + selection.happening(item))
        assert [b for _, b in spans[:-1]] == [a for a, _ in spans[1:]]
        assert spans[0][0] == 0 and spans[-1][1] == len(item.frames)


def test_truth_of_a_choice_on_a_known_clip():
    item = World("clips", 10, seed=1)[6]  # events in frames 3 and 10, of 23
    assert selection.happening(item) == [(3, 4), (10, 11)]
    every, first, events = np.arange(23), np.array([0]), np.array([3, 10])
    found = selection.truth([item] * 3, [every, first, events])
    assert found["coverage"] == pytest.approx([1, 1 / 3, 0]) and found["recall"] == [1, 0, 1]
    assert np.isnan(found["collisions"]).all()  # there is none


@pytest.mark.parametrize("bits", [8, 6, 4, 3, 2])
def test_stored_numbers_are_whole_multiples_of_a_scale_as_near_as_can_be(bits):
    x = torch.randn(5, 2 * selection.BLOCK)
    y = selection.rounded(x, bits)
    rows, back = x.view(-1, selection.BLOCK), y.view(-1, selection.BLOCK)
    scale = rows.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    assert ((back - rows).abs() <= scale * (0.5 + 1e-5)).all()
    steps = back / scale
    assert torch.allclose(steps, steps.round(), atol=1e-4) and len(steps.round().unique()) <= 2**bits - 1
    assert torch.equal(selection.rounded(x, 16), x)


@pytest.mark.parametrize("part", ["frames", "sounds", "floors", "heights", "prices", "cache", "trained"])
def test_no_run_of_the_selection_is_missing(part):
    records = read_records(selection.RECORDS / f"selection_{part}.jsonl")
    found = [(tuple(sorted(r["config"].items(), key=str)), r["seed"]) for r in records]
    wanted = [(tuple(sorted(config.items(), key=str)), seed) for config, seed in selection.wanted(part)]
    assert len(set(found)) == len(found) and set(wanted) <= set(found)


@pytest.mark.parametrize("arm", together.ARMS)
def test_each_combination_runs_within_one_budget_and_starts_at_the_base(arm):
    parts, task = together.ARMS[arm], benchmark.task(together.TASK)
    train = together.Clips(together.world(1, 64), together.chosen if "selection" in parts else together.spread)
    model = together.build(parts, train, seed=1)
    batch = task.collate([train[i] for i in range(4)])
    assert batch["pixel_values"].shape[1] == together.FRAMES
    with torch.no_grad():
        assert torch.equal(model(**batch).loss, task.load(quant_type="nf4")(**batch).loss)
    trained = sum(p.numel() for n, p in model.named_parameters() if ".lora_A." in n or ".lora_B." in n)
    plain = together.build((), train, seed=1)
    budget = sum(p.numel() for p in plain.parameters() if p.requires_grad)
    gates = sum(p.numel() for p in model.parameters() if p.requires_grad) - trained
    assert 0.98 * budget < trained <= budget
    assert bool(gates) == ("gates" in parts) and gates < 0.02 * budget


def test_a_run_of_all_together_is_a_record():
    config = {"task": together.TASK, "arm": "gates + ranks + selection", "learning_rate": 3e-3}
    config |= {"steps": 1, "items": 64, "tests": 100, "validation": True}
    record = together.run(config, seed=0)
    assert record["experiment"] == "together" and record["config"] == config
    assert len(record["items"][METRIC]) == 100 and 0 < record["metrics"][METRIC] < 1


def test_the_eight_arms_are_every_combination():
    assert len(together.ARMS) == 8 and together.ARMS["none"] == () and len(together.SEEDS) >= 6
    assert {frozenset(parts) for parts in together.ARMS.values()} == {
        frozenset(part for part, on in zip(together.PARTS, bits, strict=True) if on) for bits in np.ndindex(2, 2, 2)
    }


def test_effects_are_those_that_were_put_in():
    rng = np.random.default_rng(0)
    hard = rng.uniform(0.3, 0.5, 40)
    records = []
    for seed in range(1, 7):
        noise = rng.normal(0, 0.002)
        for arm, parts in together.ARMS.items():
            gain = 0.05 * ("gates" in parts) + 0.02 * ("selection" in parts)
            gain -= 0.03 * ({"gates", "selection"} <= set(parts))
            items = hard + noise + gain + rng.normal(0, 0.002, 40)
            records.append(
                {
                    "config": {"arm": arm},
                    "seed": seed,
                    "metrics": {METRIC: items.mean()},
                    "items": {METRIC: list(items)},
                }
            )
    results = Results(records)
    found = results.effects()
    assert results.finished and len(found) == 7
    # A main effect is the mean over the arms with and without the other: half of the interaction is in it.
    for name, truth in {
        "gates": 3.5,
        "ranks": 0,
        "selection": 0.5,
        "gates x selection": -3,
        "gates x ranks": 0,
    }.items():
        assert found.loc[name, "difference"] == pytest.approx(truth, abs=0.15), name
        assert found.loc[name, "low"] - 0.1 <= truth <= found.loc[name, "high"] + 0.1
    assert found.loc["gates x ranks x selection", "difference"] == pytest.approx(0, abs=0.3)
    assert float(results.beyond().split()[0]) == pytest.approx(-3, abs=0.3)  # 4 of all three, less 5 and 2


def test_a_seed_that_lacks_an_arm_is_left_out():
    records = [
        {"config": {"arm": arm}, "seed": seed, "metrics": {METRIC: 0.5}, "items": {METRIC: [0.5]}}
        for seed in (1, 2)
        for arm in together.ARMS
    ]
    results = Results(records[:-1])
    assert list(results.whole) == [1] and not results.finished and "not finished" in results.progress()
    assert not Results([]).shows and "0 of 48 runs" in Results([]).progress()


def ranks_records(gain, seeds=ranks.SEEDS, arms=ranks.MAIN, task="audio/timbre"):
    """Runs of arms whose exact match, word accuracy and (negative) loss are those of uniform ranks and a gain."""
    rng = np.random.default_rng(0)
    hard = rng.uniform(0.2, 0.6, 200)
    records = []
    for seed in seeds:
        noise = rng.normal(0, 0.002)
        for arm in arms:
            items = hard + noise + gain(arm) + rng.normal(0, 0.002, 200)
            scores = {"exact_match": items, "word_accuracy": items, "loss": 1 - items}
            records.append(
                {
                    "config": {"task": task, "arm": arm, "budget": 2, "learning_rate": 1e-3},
                    "seed": seed,
                    "metrics": {**{name: own.mean() for name, own in scores.items()}, "share audio": 0.5},
                    "items": {name: own.tolist() for name, own in scores.items()},
                }
            )
    return records


def test_ranks_and_start_are_told_apart():
    def gain(arm):
        return 0.03 * arm.startswith("gradient") + 0.02 * arm.endswith("spectral start") + 0.01 * (arm == "EVA")

    scores = Scores(ranks_records(gain))
    found = {name: float(text.split()[0]) for name, text in scores.crossed()["audio/timbre"].items()}
    for start in ("random", "spectral"):
        assert found[f"gradient ranks, {start} start"] == pytest.approx(3, abs=0.2)
        assert found[f"whitened ranks, {start} start"] == pytest.approx(0, abs=0.2)
    for name in ("uniform", "gradient", "whitened"):
        assert found[f"spectral start, {name} ranks"] == pytest.approx(2, abs=0.2)
    assert found["gradient ranks and spectral start, over neither"] == pytest.approx(5, abs=0.2)
    aim = scores.aim().set_index("measure")
    assert set(aim.index) == set(AIM) and set(aim["best of the others"]) == {"EVA"} and set(aim["reached"]) == {"yes"}
    assert aim["gain"].tolist() == pytest.approx([0.04, 0.04], abs=0.003)
    assert (aim["low"] <= aim["gain"]).all() and (aim["gain"] <= aim["high"]).all()
    shown = scores.aimed().set_index("measure")
    assert shown["gain"]["exact match (points)"].startswith("+4.0 (+") and shown["aim"]["exact match (points)"] == "3"
    assert shown["gain"]["loss (nats)"].startswith("+0.040 (+0.0") and shown["aim"]["loss (nats)"] == "0.025"
    gains = scores.over_budgets()
    assert list(gains) == ["budget 2"] and list(gains.index) == [arm for arm in ranks.MAIN if arm != "uniform"]
    assert float(gains["budget 2"][OURS].split()[0]) == pytest.approx(5, abs=0.2)


def test_an_aim_is_not_reached_by_less_nor_by_a_loss_that_rises():
    worse = Scores(ranks_records(lambda arm: -0.05 * (arm == OURS))).aim()
    assert set(worse["reached"]) == {"no"} and (worse["high"] < 0).all()
    little = Scores(ranks_records(lambda arm: 0.02 * (arm == OURS))).aim()
    assert set(little["reached"]) == {"no"} and (little["low"] > 0).all()


def test_the_control_says_whether_nothing_differs():
    for gain, verdict in ((0.0, "equivalent within 0.02"), (0.05, "better")):
        said = Scores(ranks_records(lambda arm, g=gain: g * (arm == OURS), task="audio/none")).control()
        assert "*audio/none*" in said and said.endswith(f": {verdict}.")
    assert "no run" in Scores([]).control()


def test_an_arm_counts_with_all_its_seeds():
    records = ranks_records(lambda arm: 0.0)
    last = [record for record in records if (record["config"]["arm"], record["seed"]) != ("EVA", 6)]
    assert "EVA" in Scores(records).table("audio/timbre").index
    assert "EVA" not in Scores(last).table("audio/timbre").index and Scores(last).aim().empty
    assert "47 of 780 runs" in Scores(last).progress() and Scores([]).tasks == []
    without = [record for record in records if record["config"]["arm"] != "uniform"]
    assert Scores(without).tasks == []
    spoken = copy.deepcopy(records)  # the records of speech have no task
    for record in spoken:
        del record["config"]["task"]
    assert Scores([*records, *spoken]).tasks == ["audio/timbre", "speech/voices"]
