"""What the chapter *First QLoRA run* claims, held against its records; and that its stand-in can be learned."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

BOOK = Path(__file__).parents[1] / "book"
sys.path.insert(0, str(BOOK))

from experiments import first_qlora_run as experiment  # noqa: E402
from experiments import stand_in  # noqa: E402
from experiments.first_qlora_results import Results  # noqa: E402

from mmqlora import quantize  # noqa: E402
from mmqlora.metrics import word_error_rate  # noqa: E402
from mmqlora.records import run_id  # noqa: E402
from mmqlora.whisper import prepare, transcribe  # noqa: E402


@pytest.fixture(scope="module")
def results() -> Results:
    return Results()


def test_every_run_of_the_experiment_is_recorded_and_none_besides(results):
    for tuning, records in ((True, results.tuned), (False, results.records)):
        wanted = {run_id(experiment.NAME, config, seed) for config, seed in experiment.wanted(tuning)}
        assert {record["id"] for record in records} == wanted


def test_reported_seeds_are_six_and_not_the_one_that_chose_learning_rates(results):
    for arm in experiment.ARMS:
        assert [record["seed"] for record in results.of(arm)] == [1, 2, 3, 4, 5, 6]
    assert {record["seed"] for record in results.tuned} == {0}


def test_records_agree_on_data_and_come_from_committed_code(results):
    for records in (results.records, results.tuned):
        assert len({record["data"] for record in records if record["config"]["arm"] != "windows"}) == 1
        assert not any(record["commit"] is None or record["commit"].endswith("+") for record in records)


def test_metrics_in_a_record_are_those_of_its_items(results):
    for record in results.records:
        for window in {item[1] for item in record["items"]}:
            chosen = np.array([i[3:] for i in record["items"] if i[0].startswith("synthetic") and i[1] == window])
            if len(chosen):
                rate = chosen[:, 0].sum() / chosen[:, 1].sum()
                assert record["metrics"][f"wer/synthetic/{window:g}s"] == pytest.approx(rate)


def test_the_learning_rate_is_the_best_of_those_that_forget_little(monkeypatch):
    def tuned(arm, rate, voices, prompts):
        metrics = {"wer/voices/30s": voices, "wer/prompts/30s": prompts}
        return {"config": {"arm": arm, "learning_rate": rate}, "metrics": metrics}

    careful, bold, wild = (1, 0.3, 0.06), (2, 0.2, 0.065), (3, 0.1, 0.2)
    runs = [tuned(arm, *run) for arm in ("full", "lora") for run in (careful, bold, wild)]
    monkeypatch.setattr(experiment, "read_records", lambda path: [tuned("zero-shot", None, 0.5, 0.05), *runs])
    assert experiment.best_learning_rate("full") == 2
    assert experiment.best_learning_rate("qlora") == experiment.best_learning_rate("lora") == 2
    runs[:] = [tuned("full", *wild), tuned("full", 4, 0.05, 0.3)]
    assert experiment.best_learning_rate("full") == 3  # all forget much: the least


@pytest.mark.parametrize("part", ["synthetic/lines", "synthetic/lines-unseen-voices"])
def test_qlora_has_four_fifths_of_the_gain_of_full_fine_tuning(results, part):
    assert results.share(part)[0] >= 0.8


def test_qlora_forgets_at_most_two_points_and_trains_under_three_percent(results):
    assert results.change("prompts", "qlora")[0] <= 0.02
    assert results.trainable("qlora") < 0.03


def test_an_interval_holds_its_estimate_and_is_none_where_nothing_varies(results):
    share, low, high = results.share("synthetic/lines")
    assert low <= share <= high and high - low > 0.01
    change, low, high = results.change("prompts", "zero-shot")
    assert (change, low, high) == (0.0, 0.0, 0.0)


def test_the_stand_in_learns_its_voice_and_survives_four_bits():
    model, processor, test = stand_in.model(), stand_in.processor(), stand_in.Melodies(32, seed=9)
    quantize(model)
    texts = transcribe(model, processor, prepare(test, processor, stand_in.WINDOW, progress=False), bf16=False)
    assert word_error_rate([row["text"] for row in test.rows], texts).rate < 0.2
