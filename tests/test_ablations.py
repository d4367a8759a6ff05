"""The grid of the ablations: what its cells are, what they cost, and what is read from their records."""

from __future__ import annotations

import itertools
import json
import re
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

sys.path.append(str(Path(__file__).parents[1] / "book"))

from experiments import ablations, ablations_results, baselines, selection, tuning

from mmqlora import benchmark, methods
from mmqlora.regions import regions
from mmqlora.training import _elements

PLACES = [(name, task) for name, tasks in ablations.ABLATIONS.items() for task in tasks]


def key(config):
    return json.dumps(config, sort_keys=True)


@pytest.mark.parametrize(("name", "task"), PLACES)
def test_levels_differ_and_have_a_center(name, task):
    levels = ablations.levels(name, task)
    assert len({key(config) for config in levels.values()}) == len(levels) >= 2
    assert ablations.center(name, task) in levels
    assert {len(level) for level in levels} == {2 if name in ablations.CROSSINGS else 1}
    assert all(config["task"] == task for config in levels.values())


def test_each_ablation_turns_one_thing_and_each_grid_two():
    for name, task in PLACES:
        levels = ablations.levels(name, task)
        middle = levels[ablations.center(name, task)]
        for config in levels.values():
            turned = {k for k in {**config, **middle} if config.get(k) != middle.get(k)}
            turned -= {"alpha"} if "rank" in turned else set()  # alpha is twice the rank unless it is what is turned
            turned -= {"batches"} if "allocation" in turned else set()
            turned -= {"bits"} if "method" in turned else set()  # full fine-tuning has no 4 bits
            turned -= {"weights"} if "quantized" in turned or name == "quantized region" else set()
            assert len(turned) <= (2 if name in ablations.CROSSINGS else 1), (name, config)


def test_the_grid_is_what_was_promised():
    assert len(ablations.ABLATIONS) >= 8 and len(ablations.SEEDS) >= 6 and tuning.SEED not in ablations.SEEDS
    models = {task.split("/")[0] for task in ablations.ABLATIONS["bits"]}
    assert models == {"video", "audio", "retrieval", "speech"}
    table = ablations.bill()
    assert table["CPU hours"].sum() < 12
    for name in ablations.ABLATIONS:  # a shared run is counted once, so that parts cost as much as the whole or more
        own = ablations.bill([name])["CPU hours"].sum()
        assert own >= table[table["ablation"] == name]["CPU hours"].sum() - 1e-9


def test_no_run_is_there_twice_and_none_that_another_experiment_has():
    runs = ablations.wanted()
    assert len({(key(config), seed) for config, seed in runs}) == len(runs)
    assert not any(ablations.lent(config) for config, _ in ablations.wanted())
    both = ablations.wanted(twins=True)
    assert {(key(config), seed) for config, seed in runs} <= {(key(config), seed) for config, seed in both}


def test_what_is_read_from_other_experiments_is_the_same_run():
    for task in baselines.MAIN:
        for weights, bits in (("16", 16), ("nf4", 4)):
            config = ablations.cell(task, weights=weights)
            rate = ablations.rate(config)
            assert rate == baselines.best_rate(task, "lora")
            found = ablations.recorded({**config, "learning_rate": rate}, 1)
            asked = baselines.configuration(task, "lora", bits, rate)
            (own,) = [r for r in baselines_records() if r["config"] == asked and r["seed"] == 1]
            assert found == {**own, "config": {**config, "learning_rate": rate}}
    parts = {config["part"] for config in ablations.levels("selection budget", ablations.LONG).values()}
    recorded = [c for c in ablations.levels("selection budget", ablations.LONG).values() if ablations.lent(c)]
    assert {1, *selection.PARTS} == {config["part"] for config in recorded} < parts
    for config in recorded:
        assert ablations.recorded({**config, "learning_rate": ablations.rate(config)}, 6)


def baselines_records():
    return ablations.read_records(baselines.RECORDS / "baselines.jsonl")


@pytest.mark.parametrize("task", baselines.MAIN)
def test_the_center_starts_where_the_run_of_the_baselines_does(task):
    ours, _ = ablations.build(ablations.cell(task), seed=3)
    theirs = methods.adapt(benchmark.task(task).load(), "lora", quant_type="nf4", seed=3)
    one, other = ours.state_dict(), theirs.state_dict()
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("task", baselines.MAIN)
def test_placements_cover_what_they_say_and_no_more(task):
    model = benchmark.task(task).load()
    parts = regions(model)
    found = {place: set(ablations.targets(model, place)) for place in ablations.PLACEMENTS}
    assert found["tower"] | found["fusion"] | found["text"] == found["all"]
    assert not found["attention"] & found["mlp"] and found["attention"] | found["mlp"] < found["all"] | {""}
    assert all(found.values()) and "lm_head" not in found["all"] | found["text"]
    for place in ("tower", "fusion", "text"):
        assert {parts[name] for name in found[place]} <= set(ablations.inside(place))
        adapted, _ = ablations.build(ablations.cell(task, placement=place), seed=1)
        layers = adapted.get_base_model().named_modules()
        assert {name for name, module in layers if isinstance(module, BaseTunerLayer)} == found[place]


def buildable():
    """A configuration for every level that builds a model of its own; of HQQ's bits one for each region."""
    once = {}
    for name, task in PLACES:
        for level, config in ablations.levels(name, task).items():
            if "selector" not in config and "method" not in config and task != ablations.SPEECH:
                once.setdefault(key(config), pytest.param(config, id=f"{name}: {' '.join(level)}, {task}"))
    return list(once.values())


@pytest.mark.parametrize("config", buildable())
def test_every_level_builds_a_model_that_learns(config, monkeypatch):
    monkeypatch.setattr(benchmark.Task, "items", 16, raising=False)
    task = benchmark.task(config["task"])
    model, error = ablations.build({**config, **({"batches": 1} if "batches" in config else {})}, seed=1)
    batch = task.collate([task.train(1)[i] for i in range(2)])
    model(**batch).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(map(_elements, trained)) < sum(map(_elements, model.parameters()))
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    expected = {"16": 0.0, "int8": 0.01, "nf4": 0.1, "fp4": 0.13, "hqq 4": 0.1, "hqq 3": 0.2, "hqq 2": 0.45}
    assert error == pytest.approx(expected[config["weights"]], rel=0.35)


@pytest.mark.parametrize("part", ["all", *ablations.QUANTIZED])
def test_hqq_takes_the_linears_that_nf4_takes(part):
    def taken(weights):
        model = benchmark.task(ablations.CROSSED).load()
        ablations.quantize(model, ablations.cell(ablations.CROSSED, weights=weights, quantized=part))
        kinds = {name: type(module).__name__ for name, module in model.named_modules()}
        return {name for name, kind in kinds.items() if kind in ("HQQLinear", "Linear4bit")}

    assert taken("hqq 2") == taken("nf4") != set()


def test_a_rate_is_chosen_for_what_moves_it_and_borrowed_elsewhere():
    task = ablations.CROSSED
    for changes in ({"weights": "fp4"}, {"double_quant": False}, {"quantized": "text"}, {"weights": "16"}):
        assert ablations.tuned_as(ablations.cell(task, **changes)) == ablations.cell(task)
    for changes in ({"rank": 32}, {"alpha": 4}, {"placement": "text"}, {"weights": "hqq 2"}):
        assert ablations.tuned_as(ablations.cell(task, **changes)) == ablations.cell(task, **changes)
    assert ablations.middle(ablations.cell(task, alpha=64)) < ablations.middle(ablations.cell(task))
    assert ablations.middle(ablations.cell(task, alpha=4)) > ablations.middle(ablations.cell(task))
    arms = ablations.arms(ablations.cells())
    assert ablations.cell(task) not in arms and ablations.cell(task, placement="mlp") in arms
    full = ablations.levels("learning rate", task)
    assert ablations.rate(full["full", "higher"]) == tuning.rate_at(1, baselines.best_rate(task, "full"))


# --- Results, on records that are made up


def made_up(config, seed):
    """A record whose score is the sum of what its settings are worth, so that every effect is known."""
    rng = np.random.default_rng([seed, len(key(config))])
    score = 0.7 + 0.02 * np.log2(config.get("rank", 8)) + 0.01 * seed
    score -= 0.05 * (config.get("placement") == "text") + 0.04 * (config.get("weights") == "hqq 2")
    score += 0.03 * (config.get("placement") == "text") * (config.get("rank") == 32)
    score += {("full", -1): 0.06, ("lora", -1): -0.1, ("rslora", 1): -0.3}.get(
        (config.get("method"), config.get("step")), 0
    )
    items = np.clip(score + 0.05 * rng.standard_normal(50), 0, 1)
    name = ablations.primary(config["task"])
    return {
        "config": {**config, "learning_rate": 3e-3},
        "seed": seed,
        "metrics": {name: float(items.mean())},
        "items": {name: items.tolist()},
    }


@pytest.fixture(scope="module")
def results():
    return ablations_results.Results(made_up)


def test_effects_are_those_that_were_put_in(results):
    table = results.against("placement", ablations.CROSSED).table.set_index("arm")
    assert table.loc["text", "difference"] == pytest.approx(-0.05, abs=0.02)
    assert table.loc["text", "verdict"] == "worse" and (table["n_seeds"] == 6).all()
    assert re.fullmatch(
        r"-\d\.\d points \(-\d\.\d to -\d\.\d\)", results.effect("placement", "audio/timbre", ("text",))
    )
    found = results.interaction("rank and placement", ablations.CROSSED, ("all", "text"), ("8", "32"))
    assert found["seeds"] == 6 and found["low"] < found["difference"] < found["high"]
    assert found["difference"] == pytest.approx(0.03, abs=0.03)
    said = results.takeaway("placement")
    assert re.search(
        r"On \*audio/timbre\*, against the center \(all\): (.*; )?text is worse with -\d\.\d points \(-", said
    ), said
    assert "Not measured" not in said and said.count(", against the center (all): ") == 3
    lessons = results.lessons()
    assert len(lessons) == 5 and lessons[2].startswith("**The text decoder alone against all regions: worse.** -")
    assert lessons[2].count(" points (") == 3
    assert re.match(r"What moves the score: .*the text decoder alone against all regions \(-", results.answer())
    rates = results.rates(ablations.CROSSED)
    assert re.search(r"below the rate that was chosen costs up to 1\d\.\d points \(lora\)", rates)
    assert re.search(r"above up to (29|3\d)\.\d points \(rslora\)", rates)
    assert "for full, a rate half a decade lower is better, by +" in rates and rates.count("is better") == 1
    rows = results.summary()
    assert len(rows) == len(PLACES) and (rows["range"] >= 0).all()


@pytest.mark.parametrize("name", ablations.ABLATIONS)
def test_every_ablation_has_its_table_and_figures(results, name):
    assert results.tasks(name) == list(ablations.ABLATIONS[name])
    for task in results.tasks(name):
        assert len(results.table(name, task)) == len(ablations.levels(name, task))
    figures = [results.plot_effects(name), results.plot_levels(name)]
    if name in ablations.CROSSINGS:
        figures += [results.plot_heat(name, task) for task in results.tasks(name)]
        figures += [results.plot_interaction(name, task) for task in results.tasks(name)]
        labels = [text.get_text() for text in figures[-1].axes[0].get_xticklabels()]
        assert labels == list(dict.fromkeys(level[1] for level in results.of(name, results.tasks(name)[0])))
    for figure in figures:
        figure.canvas.draw()
        plt.close(figure)


def test_results_leave_out_what_is_not_recorded_yet():
    half = ablations_results.Results(
        lambda config, seed: None if config.get("rank") == 32 or seed > 3 else made_up(config, seed)
    )
    assert ("32",) not in half.of("rank", ablations.CROSSED)
    assert set(half.table("rank", ablations.CROSSED)["seeds"]) == {3}
    assert ablations_results.Results(lambda config, seed: None).tasks("rank") == []
    assert half.measured("rank") == [] and "Not measured to the end" in half.takeaway("rank")
    empty = ablations_results.Results(lambda config, seed: None)
    task = ablations.CROSSED
    figures = [empty.plot_effects("rank"), empty.plot_levels("rank"), empty.plot_heat("bits and rank", task)]
    figures += [empty.plot_interaction("bits and rank", task)]
    assert all(len(figure.axes[0].texts) == 1 for figure in figures)
    assert not empty.state()["recorded"].any() and len(empty.state()) == len(PLACES)
    plt.close("all")


def test_recorded_runs_are_cells_of_the_grid():
    path = ablations.RECORDS / "ablations.jsonl"
    records = ablations.read_records(path) if path.exists() else []
    cells = [key(config) for config in ablations.cells()]
    for record in records:
        own = {name: value for name, value in record["config"].items() if name != "learning_rate"}
        assert key(own) in cells and record["seed"] in ablations.SEEDS


def test_the_list_is_printed_without_running_anything(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ablations", "--list", "--only", "rank"])
    monkeypatch.setattr(ablations, "run_grid", lambda *a, **k: pytest.fail("nothing should run"))
    ablations.main()
    said = capsys.readouterr().out
    assert "CPU hours" in said and all(f"rank, {task}: 1; 2; 8; 32" in said for task in baselines.MAIN)


def test_pairs_of_factors_are_complete():
    for name in ("bits and rank", "rank and placement"):
        levels = ablations.levels(name, ablations.CROSSED)
        rows, columns = (list(dict.fromkeys(level[i] for level in levels)) for i in (0, 1))
        assert set(levels) == set(itertools.product(rows, columns)) and len(rows) >= 3 and len(columns) >= 3
