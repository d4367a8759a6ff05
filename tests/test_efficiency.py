"""The chapter *Efficiency*: its experiment runs, and what it reads from records is what they say."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import nn

sys.path.append(str(Path(__file__).parents[1] / "book"))

from experiments import efficiency
from experiments.baselines import MAIN
from experiments.efficiency_results import (
    NOT_YET,
    Layer,
    Results,
    crossing,
    exponent,
    first_time,
    middle,
    reached,
    said,
)

from mmqlora import methods
from mmqlora.errors import QuantizationError, RecordError
from mmqlora.ledger import Ledger
from mmqlora.records import append_record, make_record, read_records

times = st.floats(1e-6, 1e3)

# What is computed from records


@given(st.lists(times, min_size=1, max_size=30, unique=True))
def test_a_median_lies_in_its_interval_which_is_the_shortest_that_covers(values):
    center, low, high = middle(values)
    assert low <= center <= high and center == pytest.approx(np.median(values))
    ordered, count = sorted(values), len(values)
    outside = ordered.index(low)  # values below, and as many above
    assert ordered[::-1].index(high) == outside
    if count >= 6:
        assert 1 - 2 * stats.binom.cdf(outside, count, 0.5) >= 0.95
        assert 1 - 2 * stats.binom.cdf(outside + 1, count, 0.5) < 0.95
    else:
        assert outside == 0


def test_intervals_of_medians_cover():
    draws = np.random.default_rng(0).exponential(size=(400, 9))
    inside = [low <= math.log(2) <= high for _, low, high in map(middle, draws)]
    assert 0.92 < np.mean(inside) < 0.99  # 96.1% by arithmetic


def test_what_never_arrives_has_no_number():
    center, low, high = middle([1.0, math.inf, math.inf, 2.0])
    assert (center, low, high) == (math.inf, 1.0, math.inf)
    assert said((center, low, high)) == "never (1.00 to never)"
    assert said((2.0, 2.0, 2.0)) == "2.00"


@given(st.floats(-3, 3), times)
def test_a_power_law_has_its_exponent_and_no_doubt_about_it(power, scale):
    x = np.array([1.0, 2.0, 5.0, 20.0])
    found, low, high = exponent(x, scale * x**power)
    assert found == pytest.approx(power, abs=1e-6) and high - low < 1e-5
    bent = exponent(x, scale * (x**power + x ** (power - 1)))
    assert bent[2] - bent[1] > 0.1


def test_an_exponent_needs_three_points():
    with pytest.raises(RecordError, match="three at least"):
        exponent(np.array([1.0, 2.0]), np.array([1.0, 2.0]))


@given(st.floats(1.5, 900), st.floats(0.2, 2))
def test_a_crossing_of_powers_is_found_between_points(place, power):
    rows = np.array([1, 4, 16, 64, 256, 1024])
    rising = rows.astype(float) ** power
    assert crossing(rows, rising, np.full(6, place**power)) == pytest.approx(place, rel=1e-6)


def test_what_does_not_cross_lies_at_an_end():
    rows, flat = np.array([1, 10, 100]), np.ones(3)
    assert crossing(rows, 2 * flat, flat) == 1
    assert crossing(rows, flat, 2 * flat) == math.inf


def test_a_loss_is_reached_when_the_mean_of_the_last_steps_is_there():
    losses = [4.0, 3.0, 2.0, 1.0, 1.0]
    assert reached(losses, 1.0, window=2) == 5
    assert reached(losses, 1.5, window=2) == 4
    assert reached(losses, 0.5, window=2) == reached(losses[:1], 9.0, window=2) == math.inf


def test_a_score_is_reached_between_the_points_of_its_course():
    course = [(0.0, 0.2), (10.0, 0.6), (20.0, 0.5), (30.0, 0.9)]
    assert first_time(course, 0.4) == 5 and first_time(course, 0.1) == 0
    assert first_time(course, 0.7) == 25 and first_time(course, 1.0) == math.inf


def layer(dequantize: float, rate: float, width: int = 64) -> Layer:
    """The record of a machine that does exactly what the formulas say."""
    rows = [1, 4, 16, 64, 256]
    multiply = {n: 2 * n * width**2 / rate for n in rows}
    items = {"copy": [1.0] * 7, "product": [2 * 8**3 / rate] * 7, "dequantize": [dequantize] * 7}
    for n in rows:
        items[f"multiply {n}"] = [multiply[n]] * 7
        items[f"layer {n}"] = [multiply[n] + dequantize] * 7
        items[f"frozen {n}"] = [2 * multiply[n] + 2 * dequantize] * 7
        items[f"trained {n}"] = [3 * multiply[n]] * 7
    config = {"width": width, "rows": rows, "product": 8, "dtype": "float32", "device": "cpu"}
    return Layer({"config": config, "metrics": {"stored_bytes": 2304, "copied_bytes": 1e9}, "items": items})


@given(st.floats(2, 100), st.floats(1e6, 1e12))
def test_the_crossover_is_where_the_formula_has_it_and_break_even_at_twice_that(place, rate):
    found = layer(place * 2 * 64**2 / rate, rate)
    assert found.predicted() == pytest.approx(place, rel=1e-6)
    assert found.crossover()[0] == pytest.approx(place, rel=1e-6)
    # Straight lines between logarithms bend what is a line plus a constant.
    assert found.break_even()[0] == pytest.approx(2 * place, rel=0.5)

    # One second for the copy of 1e9 bytes, so at least as many nanoseconds as bytes are read and written.
    moved = 4 * (64 * 64 + 2 * 5 * 64) * 1e-9
    assert found.least(np.array([5]))[0] == pytest.approx(max(2 * 5 * 64**2 / rate, moved))


# The experiment


def test_every_arm_runs_once_a_round_and_warming_up_does_not_count():
    calls: dict[str, list[int]] = {"a": [], "b": []}
    seconds = efficiency.interleaved({name: calls[name].append for name in calls}, 3, "cpu", "test")
    assert {name: len(taken) for name, taken in seconds.items()} == {"a": 3, "b": 3}
    assert calls == {"a": [-1, 0, 1, 2], "b": [-1, 0, 1, 2]}


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("records")
    efficiency.main(["--quick", "--records", str(folder)])
    return folder


def test_the_experiment_writes_records_that_the_chapter_reads(quick):
    results = Results(quick)
    assert results.models == [MAIN[0]]
    assert set(results.table(MAIN[0])["bits"]) == {4, 16} and len(results.table(MAIN[0])) == 3
    assert middle(results.ratios(MAIN[0])["lora", 16]) == (1, 1, 1)
    assert results.widths() == [64] and results.layer(64).dequantize > 0
    rows = {(r["config"]["axis"], r["config"]["method"]) for r in results.of["scaling"]}
    assert ("rank", "full") not in rows and len(rows) == 5
    for draw in (results.plot_steps, results.plot_roofline, results.plot_scaling):
        assert draw().axes
    assert (results.gpu().iloc[:, 2:] == NOT_YET).all(axis=None)


def test_memory_and_storage_are_those_of_the_arithmetic(quick):
    held, names = Results(quick).held(MAIN[0]), {}
    for record in read_records(quick / "efficiency_hold.jsonl"):
        names[record["config"]["method"], record["config"]["bits"]] = record["parameters"]
    assert held["lora", 4]["peak_bytes"] < held["lora", 16]["peak_bytes"] < held["full", 16]["peak_bytes"]
    assert held["full", 16]["peak_bytes"] > 16 * names["full", 16]["total"]  # weights, gradients, two states
    for arm in (("lora", 16), ("lora", 4)):
        assert held[arm]["stored_bytes"] == pytest.approx(4 * names[arm]["trainable"], rel=0.1)
    assert held["full", 16]["stored_bytes"] == pytest.approx(4 * names["full", 16]["total"], rel=0.1)


def test_a_peak_is_that_of_a_ledger_and_falls_with_fewer_bits():
    found = {}
    for arm in efficiency.SCALED:
        model, batch = efficiency.sized(frames=2, rank=4, width=64, arm=arm, device="cpu")
        size = sum(p.numel() for p in model.parameters() if p.requires_grad)
        found[arm] = efficiency.peak(model, efficiency.optimizer_of(model, "adamw_torch"), batch)
        assert found[arm] > 16 * size
    assert found["lora", 4] < found["lora", 16] < found["full", 16]


def test_records_of_another_device_stay(tmp_path):
    path = tmp_path / "efficiency_steps.jsonl"

    def records(device: str, number: int):
        config = {"device": device, "number": number}
        yield make_record("efficiency", config, 0, data="", measured={})

    append_record(path, next(records("cuda", 1)))
    efficiency.replace(path, records("cpu", 2))
    efficiency.replace(path, records("cpu", 3))
    assert [(r["config"]["device"], r["config"]["number"]) for r in read_records(path)] == [("cuda", 1), ("cpu", 3)]
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ".lock"] == [path.name]


def test_what_is_measured_on_a_gpu_stands_in_its_columns(quick, tmp_path):
    folder = tmp_path / "records"
    folder.mkdir()
    for part in efficiency.PARTS:
        for record in read_records(quick / f"efficiency_{part}.jsonl"):
            config = {**record["config"], "device": "cuda"}
            measured = {key: record[key] for key in ("metrics", "items", "parameters") if key in record}
            append_record(folder / f"efficiency_{part}.jsonl", make_record("x", config, 0, data="", measured=measured))
    results = Results(folder, device="cuda")
    table = results.gpu().set_index(["model", "method"]).loc[MAIN[0]]
    assert (table["step time, AdamW"] != NOT_YET).all() and (table["peak (MB), AdamW"] != NOT_YET).all()
    assert (table["step time, paged, 8 bits"] == NOT_YET).all()
    assert Results(folder).models == []


def test_whisper_is_left_out_where_it_is_not(monkeypatch, capsys):
    def nowhere(*_, **__):
        raise QuantizationError("can't load it")

    monkeypatch.setattr(efficiency, "load", nowhere)
    assert not efficiency.at_hand(efficiency.WHISPER) and efficiency.at_hand(MAIN[0])
    assert "is left out: can't load it" in capsys.readouterr().err


def test_a_gpu_that_is_not_there_is_an_error_in_words(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        efficiency.main(["--device", "cuda"])
    assert "PyTorch sees no GPU" in capsys.readouterr().err


def test_a_watched_run_is_judged_at_its_points_and_judging_takes_none_of_its_time():
    class State:
        global_step = 0

    judged = []
    watch = efficiency.Watch(lambda model: judged.append(sum(range(10**6))) or {"score": 1.0, "items": []}, [1, 3])
    watch.on_train_begin(None, None, None)
    for State.global_step in (1, 2, 3):
        watch.on_step_end(None, State, None, model=nn.Linear(1, 1))
    assert [point["step"] for point in watch.course] == [1, 3] and len(judged) == 2
    assert all("items" not in point and point["score"] == 1.0 for point in watch.course)
    assert watch.course[-1]["cpu_s"] < watch.judging


def test_a_step_with_a_frozen_base_gives_its_weights_no_gradient():
    layer_4bit = methods.adapt(
        efficiency.sized(frames=1, rank=2, width=64, arm=("full", 16), device="cpu")[0], "lora", quant_type="nf4"
    )
    with Ledger(layer_4bit, regions={}) as ledger:
        _, batch = efficiency.sized(frames=1, rank=2, width=64, arm=("full", 16), device="cpu")
        layer_4bit(**batch).loss.backward()
    trained = sum(4 * p.numel() for p in layer_4bit.parameters() if p.requires_grad)
    assert sum(size for (kind, _), size in ledger.at_peak.items() if kind == "gradients") <= trained
