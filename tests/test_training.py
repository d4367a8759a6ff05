from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import Subset, TensorDataset
from transformers import set_seed

from mmqlora import TrainingError, benchmark
from mmqlora.memory import measure
from mmqlora.training import fine_tune, newest_checkpoint


class Line(torch.nn.Module):
    """y = Wx, trained by least squares."""

    def __init__(self):
        super().__init__()
        self.map = torch.nn.Linear(4, 2)
        self.dropout = torch.nn.Dropout(0.1)

    def forward(self, x, labels):
        return {"loss": (self.map(self.dropout(x)) - labels).square().mean()}


class Pairs(torch.utils.data.Dataset):
    def __init__(self, bad: int | None = None):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(64, 4, generator=generator)
        self.y = self.x @ torch.randn(4, 2, generator=generator)
        if bad is not None:
            self.y[bad] = float("nan")

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"x": self.x[i], "labels": self.y[i]}


def model() -> Line:
    set_seed(1)
    return Line()


OPTIONS = dict(steps=20, batch_size=8, learning_rate=1e-2, bf16=False, progress=False)


def weights(m):
    return torch.cat([p.detach().flatten() for p in m.parameters()])


def test_it_learns_and_says_what_it_did():
    m, pairs = model(), Pairs()
    record = fine_tune(m, pairs, pairs, seed=3, data="abc", **{**OPTIONS, "steps": 100, "learning_rate": 0.1})
    assert len(record["losses"]) == 100
    assert record["metrics"]["loss"] < 0.2 * record["losses"][0]
    assert record["parameters"] == {"trainable": 10, "total": 10}
    assert record["seed"] == 3 and record["data"] == "abc" and record["training"]["steps"] == 100
    assert record["peak_bytes"] >= record["start_bytes"] > 0 and record["wall_s"] > 0


def test_the_seed_decides_everything():
    runs = []
    for seed in (1, 1, 2):
        m = model()
        losses = fine_tune(m, Pairs(), seed=seed, **OPTIONS)["losses"]
        runs.append((losses, weights(m)))
    assert runs[0][0] == runs[1][0] and torch.equal(runs[0][1], runs[1][1])
    assert runs[0][0] != runs[2][0]


def test_an_evaluation_function_gives_metrics_and_items():
    def evaluate(m):
        assert not m.training and not torch.is_grad_enabled()
        return {"score": 0.5, "items": [1, 0]}

    record = fine_tune(model(), Pairs(), evaluate, **OPTIONS)
    assert record["metrics"] == {"score": 0.5} and record["items"] == [1, 0]


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_last_good_checkpoint(tmp_path):
    m = model()
    with pytest.raises(TrainingError, match=r"loss is inf at step 3.*checkpoint-1; fine_tune"):
        # The first step of the warm-up has rate 0, the second overflows, and what it left is set aside.
        fine_tune(m, Pairs(), output=tmp_path, save_every=1, **{**OPTIONS, "learning_rate": 1e21})
    assert (tmp_path / "diverged-2").is_dir()
    saved = load_file(newest_checkpoint(tmp_path) / "model.safetensors")
    assert torch.equal(torch.cat([saved["map.weight"].flatten(), saved["map.bias"]]), weights(model()))


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    m = model()
    with torch.no_grad():
        m.map.bias[0] = float("inf")
    m.map.weight.requires_grad_(False)
    m.forward = lambda x, labels: {"loss": (m.map.bias[1] - labels).square().mean()}
    with pytest.raises(TrainingError, match=r"1 trained weights are no longer finite.*map\.bias"):
        fine_tune(m, Pairs(), output=tmp_path, save_every=1, **OPTIONS)
    assert newest_checkpoint(tmp_path) is None


def test_a_bad_label_stops_the_run_and_says_so_without_a_checkpoint():
    with pytest.raises(TrainingError, match="No checkpoint had been saved"):
        fine_tune(model(), Pairs(bad=5), **OPTIONS)


def test_a_killed_run_resumes_to_the_same_weights(tmp_path):
    whole = model()
    losses = fine_tune(whole, Pairs(), seed=5, **OPTIONS)["losses"]
    script = textwrap.dedent(
        f"""
        import os, signal, sys
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        from test_training import OPTIONS, Pairs, fine_tune, model
        class Killer(Pairs):
            left = 8 * 13
            def __getitem__(self, i):
                self.left -= 1
                if self.left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().__getitem__(i)
        fine_tune(model(), Killer(), seed=5, output={str(tmp_path)!r}, save_every=5, **OPTIONS)
        """
    )
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert newest_checkpoint(tmp_path).name == "checkpoint-10"
    (tmp_path / "checkpoint-15").mkdir()  # as if killed while it was written
    resumed = model()
    record = fine_tune(resumed, Pairs(), seed=5, output=tmp_path, save_every=5, resume=True, **OPTIONS)
    assert record["resumed_from_step"] == 10
    assert record["losses"] == losses
    assert torch.equal(weights(resumed), weights(whole))


def test_batches_of_a_step_count_by_their_labels():
    """Also where a model ignores how many labels the Trainer counts, as Whisper does."""
    task, adapters = benchmark.task("audio/none"), []
    items = Subset(task.train(seed=0), range(12))
    for size in (4, 2):
        m = task.load().requires_grad_(False)
        m.model.decoder.layers[0].fc1.requires_grad_(True)
        options = {**OPTIONS, "learning_rate": 1e-4, "steps": 3, "batch_size": size, "accumulate": 4 // size}
        record = fine_tune(m, items, collate=task.collate, **options)
        adapters.append((record["losses"], m.model.decoder.layers[0].fc1.weight))
    assert adapters[1][0] == pytest.approx(adapters[0][0], abs=2e-5)
    assert torch.allclose(adapters[1][1], adapters[0][1], atol=1e-5)


def test_no_labels_at_all_stop_the_run():
    task = benchmark.task("audio/none")

    def collate(items):
        batch = task.collate(items)
        return {**batch, "labels": torch.full_like(batch["labels"], -100)}

    with pytest.raises(TrainingError, match="loss is nan at step 1"):
        fine_tune(task.load(), Subset(task.train(seed=0), range(4)), collate=collate, **OPTIONS)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"steps": 0}, "steps=0"),
        ({"batch_size": -1}, "batch_size=-1"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"warmup": 2.0}, "warmup=2.0"),
        ({"resume": True}, "need output"),
    ],
)
def test_options_out_of_range_are_named(change, message):
    with pytest.raises(TrainingError, match=message):
        fine_tune(model(), Pairs(), **{**OPTIONS, **change})


def test_nothing_to_train_and_no_data_are_named():
    with pytest.raises(TrainingError, match="get_peft_model"):
        fine_tune(model().requires_grad_(False), Pairs(), **OPTIONS)
    with pytest.raises(TrainingError, match="training set is empty"):
        fine_tune(model(), TensorDataset(torch.zeros(0, 4)), **OPTIONS)


def test_the_peak_is_seen_after_it_has_passed():
    with measure() as memory:
        block = torch.ones(50_000_000)  # 200 MB
        block.sum()
        time.sleep(0.1)
        del block
    assert memory.peak_bytes - memory.start_bytes > 150e6


def test_a_timeline_keeps_peaks_in_few_points():
    with measure(every=0.001) as memory:
        time.sleep(0.3)
        block = torch.ones(50_000_000)
        time.sleep(0.1)
        del block
        time.sleep(0.3)
    seconds, used = zip(*memory.timeline, strict=True)
    assert 3 <= len(memory.timeline) <= 50
    assert seconds[0] == 0 and list(seconds) == sorted(seconds) and seconds[-1] >= 0.7
    assert used[0] == memory.start_bytes and max(used) == memory.peak_bytes
    assert used.index(max(used)) not in (0, len(used) - 1)


def test_a_trained_model_computes_as_the_same_model_reloaded_does():
    m, x = model(), Pairs()[0]
    fine_tune(m, Pairs(), **{**OPTIONS, "bf16": True})
    again = Line().eval()
    again.load_state_dict(m.state_dict())
    assert torch.equal(m(x["x"], x["labels"])["loss"], again(x["x"], x["labels"])["loss"])
