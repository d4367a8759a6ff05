"""Two processes train as one does. Run as a script by `accelerate launch`, this file is one of the processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from peft import LoraConfig, get_peft_model
from test_training import OPTIONS, Pairs, model, weights
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import Subset
from transformers import set_seed

import mmqlora as mm
from mmqlora import TrainingError, benchmark
from mmqlora.records import append_record, read_records
from mmqlora.training import fine_tune, newest_checkpoint

RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
RUNS = {
    "video/palette": {"gradient_checkpointing": True},
    "audio/timbre": {"accumulate": 2},  # its loss ignores the number of labels that the Trainer counts
}


def launch(role: str, folder: Path) -> None:
    """Run one of the functions below in two processes; port 0 is any that is free."""
    command = [sys.executable, "-W", "ignore", "-m", "accelerate.commands.launch", "--multi_gpu"]
    command += ["--num_processes", "2", "--main_process_port", "0", __file__, role, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def adapted(name: str, **how):
    base = benchmark.task(name).load()
    mm.quantize(base, **how)
    set_seed(1)
    return get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))


def trained(m) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in m.named_parameters() if p.requires_grad}


def apart(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


def adapt(name: str):
    """Four items a step, of unequal numbers of labels; the ten of an epoch leave its last step half empty."""
    task, m = benchmark.task(name), adapted(name)
    items = Subset(task.train(seed=0), range(10))
    assert len({int((item["labels"] != -100).sum()) for item in items}) > 1
    options = {**OPTIONS, **RUNS[name], "steps": 4, "batch_size": 4 // PROCESSES, "learning_rate": 3e-4}
    judge = {"evaluate": lambda m: {"rank": RANK}, "experiment": name}
    record = fine_tune(m, items, collate=task.collate, **judge, **options)
    return trained(m), record


def regress(m, data=None, **changes):
    options = {**OPTIONS, "steps": 10, "batch_size": 8 // PROCESSES, **changes}
    return fine_tune(m, data or Pairs(), Pairs(), **options)


def without_dropout():
    m = model()
    m.dropout.p = 0.0
    return m


def agree(folder: Path) -> None:
    for name in RUNS:
        kind = name.partition("/")[0]
        adapters, record = adapt(name)
        (folder / f"{kind} {RANK}.json").write_text(json.dumps(record))
        if PartialState().is_main_process:
            torch.save(adapters, folder / f"{kind}.pt")
            append_record(folder / "records.jsonl", record)
    m = without_dropout()
    loss = regress(m)["metrics"]["loss"]
    torch.save({"weights": weights(m), "loss": loss}, folder / f"line {RANK}.pt")


def test_two_processes_train_as_one_does(tmp_path):
    launch("agree", tmp_path)
    assert len((tmp_path / "records.jsonl").read_text().splitlines()) == len(RUNS)
    for both in read_records(tmp_path / "records.jsonl"):
        name = both["experiment"]
        kind = name.partition("/")[0]
        adapters, record = adapt(name)
        assert apart(torch.load(tmp_path / f"{kind}.pt"), adapters) <= 1e-5
        assert both["losses"] == pytest.approx(record["losses"], abs=2e-5)
        assert both["training"]["processes"] == 2 and "processes" not in record["training"]
        assert both["metrics"] == {"rank": 0}
        assert [json.loads((tmp_path / f"{kind} {rank}.json").read_text()) for rank in (0, 1)] == [both, both]
    m = without_dropout()
    loss = regress(m)["metrics"]["loss"]
    for rank in (0, 1):
        saved = torch.load(tmp_path / f"line {rank}.pt")
        assert (saved["weights"] - weights(m)).abs().max() <= 1e-6
        assert saved["loss"] == pytest.approx(loss, rel=1e-5)


def stop(folder: Path) -> None:
    with pytest.raises(TrainingError) as error:
        regress(model(), Pairs(bad=5), output=folder / "bad", save_every=1, steps=20)
    (folder / f"error {RANK}").write_text(str(error.value))
    whole, resumed = model(), model()
    regress(whole, output=folder / "good", save_every=5)
    if PartialState().is_main_process:
        shutil.rmtree(folder / "good" / "checkpoint-10")
    PartialState().wait_for_everyone()
    record = regress(resumed, output=folder / "good", save_every=5, resume=True)
    assert record["resumed_from_step"] == 5 and torch.equal(weights(resumed), weights(whole))


def test_a_bad_label_in_one_process_stops_both_and_a_stopped_run_goes_on(tmp_path):
    launch("stop", tmp_path)
    errors = [(tmp_path / f"error {rank}").read_text() for rank in (0, 1)]
    assert errors[0] == errors[1]
    step = int(errors[0].partition("at step ")[2].partition(".")[0])
    assert step > 2 and [path.name for path in (tmp_path / "bad").glob("diverged-*")] == [f"diverged-{step - 1}"]
    assert newest_checkpoint(tmp_path / "bad").name == f"checkpoint-{step - 2}"


def shard(folder: Path) -> None:
    """What FSDP does to a model on GPUs. accelerate doesn't on a CPU, torch does."""
    dist.init_process_group("gloo")
    task = benchmark.task("audio/timbre")
    batch = task.collate([task.train(seed=0)[i] for i in range(2)])
    whole, sharded = (adapted(task.name, quant_storage=torch.float32) for _ in range(2))
    layers = sharded.get_base_model().model
    for part in (*layers.encoder.layers, *layers.decoder.layers, sharded):
        fully_shard(part, mesh=init_device_mesh("cpu", (2,)))
    codes = [layers.encoder.layers[0].fc1.base_layer.weight, whole.get_base_model().model.encoder.layers[0].fc1.weight]
    assert codes[0].to_local().numel() * 2 == codes[1].numel()
    for m in (whole, sharded):
        optimizer = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 0.1)
        for _ in range(3):
            m(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert apart({name: p.full_tensor() for name, p in trained(sharded).items()}, trained(whole)) <= 1e-6
    dist.destroy_process_group()


def test_sharded_4_bit_weights_train_as_whole_ones_do(tmp_path):
    launch("shard", tmp_path)


def test_sharding_where_accelerate_does_not_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(TrainingError, match=r"on GPUs only.*--multi_gpu"):
        fine_tune(model(), Pairs(), **OPTIONS)


if __name__ == "__main__":
    {"agree": agree, "stop": stop, "shard": shard}[sys.argv[1]](Path(sys.argv[2]))
