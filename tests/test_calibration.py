"""Gradient spectra against autograd's own, and a model that is left as it was."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from batches import BATCHES
from conformance import build, inputs
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.utils.incremental_pca import IncrementalPCA
from torch import nn
from transformers import AlbertConfig, AlbertForMaskedLM

import mmqlora as mm
from mmqlora import benchmark
from mmqlora.calibration import calibrate
from mmqlora.errors import RankError

# PEFT's, of every model that it wraps.
pytestmark = pytest.mark.filterwarnings("ignore:`\\w*gradient_checkpointing\\w*` is deprecated")

TASKS = ("video/palette", "audio/timbre", "retrieval/palette")


def batches_of(task: benchmark.Task, *sizes: int) -> list[dict]:
    items, found, start = task.train(seed=0), [], 0
    for size in sizes:
        found.append(task.collate([items[i] for i in range(start, start + size)]))
        start += size
    return found


def weight_gradients(model: nn.Module, batches: list[dict]) -> dict[str, torch.Tensor]:
    """Autograd's own, for batches that weigh as many as they have labels."""
    model.requires_grad_(True)
    weights = [1.0]
    if len(batches) > 1:
        weights = [float((b["labels"] != -100).sum()) if "labels" in b else float(len(b["input_ids"])) for b in batches]
    for batch, weight in zip(batches, weights, strict=True):
        (model(**batch).loss * weight / sum(weights)).backward()
    linears = {n: m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    return {n: weight.grad.double() for n, weight in linears.items() if weight.grad is not None}


def assert_autograds(found: mm.Calibration, true: dict[str, torch.Tensor]) -> None:
    for layer, spectrum in found.spectra.items():
        energies = torch.linalg.svdvals(true[layer])[: len(spectrum.energies)].square().numpy()
        assert np.abs(spectrum.energies - energies).max() <= 1e-4 * energies.max(), layer


def assert_alike(one: mm.Calibration, other: mm.Calibration, tolerance: float = 1e-4) -> None:
    assert one.spectra.keys() == other.spectra.keys()
    for name, spectrum in one.spectra.items():
        theirs = other.spectra[name].energies
        assert np.abs(spectrum.energies - theirs).max() <= tolerance * theirs.max(), name


@pytest.mark.parametrize("name", TASKS)
def test_spectra_are_those_of_autograd(name):
    task = benchmark.task(name)
    given = batches_of(task, 8, 4)
    true = weight_gradients(task.load(), given)
    found = calibrate(task.load(), given, directions=128)  # so many that all is exact
    assert len(found.spectra) >= 39
    for layer, spectrum in found.spectra.items():
        _, values, right = torch.linalg.svd(true[layer], full_matrices=False)
        energies = values[:128].square().numpy()
        assert np.abs(spectrum.energies - energies).max() < 1e-4 * energies.max(), layer
        # The first direction, where it is no tie with the second.
        if energies[1] < 0.5 * energies[0]:
            assert abs(float(spectrum.directions[0].double() @ right[0])) > 0.999, layer


def calibrated(name: str, **options) -> tuple[nn.Module, mm.Calibration]:
    """A tiny model and what is found for those of its Linears that it calls."""
    model, given = build(name, options.pop("quantize", True)), [inputs(name).inputs]
    try:
        return model, calibrate(model, given, **options)
    except RankError as error:
        pattern = re.search(r'exclude=r"(.+)"\.$', str(error))[1]
        assert name in ("LLaVA", "LLaVA-Next-Video", "Video-LLaVA", "PE-audio-video")
        return model, calibrate(model, given, exclude=pattern, **options)


@pytest.mark.parametrize("name", BATCHES)
def test_spectra_are_those_of_autograd_on_every_architecture(name):
    """Whose patches are packed or padded, and whose towers are called once for each frame."""
    _, found = calibrated(name, quantize=False, directions=128)
    true = weight_gradients(build(name, quantize=False), [inputs(name).inputs])
    assert len(found.spectra) >= 10
    assert_autograds(found, true)


def test_linears_that_are_called_twice_have_one_gradient():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "embedding_size": 8}
    torch.manual_seed(0)
    model = AlbertForMaskedLM(AlbertConfig(vocab_size=20, num_hidden_layers=3, **sizes)).eval()  # all of one layer
    ids = torch.randint(20, (2, 7))
    given = {"input_ids": ids, "labels": ids}
    found = calibrate(model, [given])
    name = "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn"
    assert found.spectra[name].rows == 3 * 2 * 7
    assert_autograds(found, weight_gradients(model, [given]))


@pytest.mark.parametrize("name", TASKS)
def test_sketches_come_near(name):
    task = benchmark.task(name)
    given = batches_of(task, 16)
    exact = calibrate(task.load(), given, directions=128)
    sketched = calibrate(task.load(), given, directions=32)
    sketches = 0
    for layer, spectrum in sketched.spectra.items():
        true = exact.spectra[layer].energies[:32]
        sketches += not np.allclose(spectrum.energies, true, rtol=1e-6, atol=0)
        assert abs(spectrum.energies.sum() - true.sum()) < 0.02 * true.sum(), layer
        large = true > 0.03 * true[0]  # smaller ones are no more than 10 to 20% off, the smallest more
        assert np.allclose(spectrum.energies[large], true[large], rtol=0.02, atol=0), layer
    assert sketches >= 6


def test_variances_are_those_of_the_inputs():
    task = benchmark.task("audio/timbre")
    given = batches_of(task, 4)
    model, seen = task.load(), []
    handle = model.model.encoder.layers[0].fc1.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    model(**given[0])
    handle.remove()
    x = torch.cat(seen).flatten(0, -2).double()
    true = torch.linalg.svdvals(x - x.mean(0)).square().detach().numpy()
    true /= true.sum()
    peft = IncrementalPCA(n_components=8)  # what EVA orders by
    peft.partial_fit(x.detach().clone(), check_input=False)
    assert np.allclose(peft.explained_variance_ratio_, true[:8], rtol=1e-3)
    for directions, within in ((128, 1e-4), (16, 0.03)):
        found = calibrate(model, given, directions=directions, variances=True)
        spectrum = found.spectra["model.encoder.layers.0.fc1"]
        assert spectrum.rows == len(x)
        assert np.abs(spectrum.variances[:8] - true[:8]).max() < within * true.max()


@pytest.mark.parametrize("name", ["video/palette", "audio/timbre"])
def test_cutting_batches_changes_nothing(name):
    task = benchmark.task(name)
    whole = batches_of(task, 8)[0]
    parts = [
        {k: v[rows] if isinstance(v, torch.Tensor) else v for k, v in whole.items()}
        for rows in (slice(0, 3), slice(3, 8))
    ]
    one, other = calibrate(task.load(), [whole]), calibrate(task.load(), parts)
    assert_alike(one, other)
    assert one.loss == pytest.approx(other.loss, rel=1e-5)


def test_padding_changes_nothing():
    task = benchmark.task("video/palette")
    batch = batches_of(task, 4)[0]
    more = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    wider = {k: nn.functional.pad(v, (0, 5), value=more[k]) if k in more else v for k, v in batch.items()}
    assert_alike(calibrate(task.load(), [batch]), calibrate(task.load(), [wider]))


WORKER = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[3])
from test_calibration import batches_of, benchmark, calibrate
import mmqlora as mm
torch.set_num_threads(1)
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
task = benchmark.task("audio/timbre")
both = batches_of(task, 3, 3)
ranks = mm.allocate_ranks(task.load(), [both[rank]], mm.Budget(parameters=30_000))
# Budgets in bytes, too, must give both the same adapters.
kept = [None, None]
dist.all_gather_object(kept, calibrate(task.load(), batches_of(task, 3 - rank), activations=True).kept)
assert kept[0].sum() > 0 and (kept[0] == kept[1]).all()
dist.destroy_process_group()
expected = mm.allocate_ranks(task.load(), both, mm.Budget(parameters=30_000))
assert dict(ranks) == dict(expected), (dict(ranks), dict(expected))
"""


def test_two_processes_find_what_one_finds(tmp_path):
    store, here = str(tmp_path / "store"), str(Path(__file__).parent)
    command = [sys.executable, "-W", "ignore", "-c", WORKER]
    workers = [subprocess.Popen([*command, str(rank), store, here], stderr=subprocess.PIPE) for rank in (0, 1)]
    for worker in workers:
        error = worker.communicate(timeout=240)[1]
        assert worker.returncode == 0, error.decode()[-2000:]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(reentrant):
    task = benchmark.task("video/palette")
    given = batches_of(task, 4)
    expected = calibrate(task.load(), given)
    model = task.load("nf4")
    plain = calibrate(model, given)
    model = prepare_model_for_kbit_training(model, True, {"use_reentrant": reentrant}).train()
    functions = [m._gradient_checkpointing_func for m in model.modules() if hasattr(m, "_gradient_checkpointing_func")]
    assert_alike(calibrate(model, given), plain)
    after = [m._gradient_checkpointing_func for m in model.modules() if hasattr(m, "_gradient_checkpointing_func")]
    assert functions and functions == after
    assert model.get_input_embeddings()._forward_hooks  # for inputs that require a gradient
    # Four bits move the gradient, but not to another model's.
    one, other = (np.log([s.energies.sum() for s in c.spectra.values()]) for c in (plain, expected))
    assert np.corrcoef(one, other)[0, 1] > 0.99


def test_the_model_is_left_as_it_was():
    task = benchmark.task("retrieval/palette")
    model = task.load().train()
    model.requires_grad_(False).text_model.requires_grad_(True)
    first = next(model.text_model.parameters())
    first.grad = torch.ones_like(first)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    random, asked = torch.get_rng_state(), [p.requires_grad for p in model.parameters()]
    calibrate(model, batches_of(task, 4), activations=True)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert asked == [p.requires_grad for p in model.parameters()] and model.training
    assert first.grad.eq(1).all() and sum(p.grad is not None for p in model.parameters()) == 1
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules() if isinstance(m, nn.Linear))
    assert torch.equal(random, torch.get_rng_state())


@pytest.mark.parametrize("prepared", [False, True])
def test_what_comes_before_keeps_nothing(prepared):
    task = benchmark.task("video/palette")
    model, given = task.load("nf4"), batches_of(task, 4)
    if prepared:  # inputs require gradients then, and a frozen tower keeps its graph
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=True).train()
    seen = []
    handle = model.model.vision_model.register_forward_hook(
        lambda module, args, output: seen.append(output.last_hidden_state.requires_grad)
    )
    calibrate(model, given, exclude=r".*vision_model.*|.*connector.*")
    handle.remove()
    assert seen == [False]


def test_memory_is_bounded_for_any_size():
    wide = nn.Module()
    wide.big = nn.Linear(3000, 5000)
    from mmqlora.calibration import _Sketches, _Sum

    sketches = _Sketches(2 * 16, seed=0, device=torch.device("cpu"))
    found = _Sum((5000, 3000), sketches, variances=False)
    for _ in range(3):
        found.add(torch.randn(10, 3000), torch.randn(10, 5000))
    assert sum(part.numel() for part in found.parts.values()) <= 2 * 16 * (5000 + 2 * 3000) + 3000


@pytest.mark.parametrize("name", BATCHES)
def test_it_runs_on_every_architecture(name):
    model, found = calibrated(name, activations=True)
    assert set(found.order) == set(found.spectra) and found.kept.sum(1).min() > 0
    ranks = mm.allocate_ranks(found, budget=mm.Budget(parameters=3000))
    assert 0 < ranks.parameters <= 3000
    if name != "PE-audio-video":  # which PEFT can't take
        adapted = get_peft_model(model, LoraConfig(**ranks.as_kwargs()))
        assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == ranks.parameters
        assert found.start(adapted) == sum(rank > 0 for rank in ranks.values())


def test_what_can_not_be_calibrated():
    task = benchmark.task("audio/timbre")
    model, given = task.load(), batches_of(task, 2)
    with pytest.raises(RankError, match="no batches"):
        calibrate(model, [])
    with pytest.raises(RankError, match=r"no loss.*labels"):
        calibrate(
            model, [{"input_features": given[0]["input_features"], "decoder_input_ids": given[0]["labels"].clamp(0)}]
        )
    with pytest.raises(RankError, match=r"matches no Linear.*model\.encoder"):
        calibrate(model, given, exclude="encodr")
    with pytest.raises(RankError, match="matches every Linear"):
        calibrate(model, given, exclude=".*")
    with pytest.raises(RankError, match="loss of a batch is nan"):
        calibrate(model, [{**given[0], "input_features": given[0]["input_features"] * float("nan")}])
    words = benchmark.task("video/none")
    item = words.train(0)[0]
    said = {name: item[name][item["input_ids"] != benchmark.IMAGE][None] for name in ("input_ids", "labels")}
    with pytest.raises(RankError, match="activations of vision, which the first batch has to reach"):
        calibrate(words.load(), [said], activations=True)
    with pytest.raises(RankError, match="adapters already"):
        calibrate(get_peft_model(task.load(), LoraConfig(target_modules=["fc1"])), given)
    broken = task.load()
    broken.model.encoder.layers[1].fc1.register_full_backward_hook(lambda m, gi, go: (gi[0] * float("inf"),))
    with pytest.raises(RankError, match=r"not finite in model\.encoder\.layers\.0"):
        calibrate(broken, given)


def test_a_start_along_the_gradient_is_the_base_model(tmp_path):
    task = benchmark.task("retrieval/palette")
    given = batches_of(task, 8)
    base = task.load("nf4")
    with torch.no_grad():
        expected = base(**given[0]).loss
    found = calibrate(base, given)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["fc1", "q_proj"], rank_pattern={"fc1": 8}))
    random = {n: p.norm(dim=1).mean().item() for n, p in model.named_parameters() if "lora_A" in n}
    assert found.start(model) == len(random) > 5
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(**given[0]).loss, expected)
    for name, weight in model.named_parameters():
        if "lora_A" in name:
            layer = name.removeprefix("base_model.model.").split(".lora_A")[0]
            rows = weight / weight.norm(dim=1, keepdim=True)
            torch.testing.assert_close(rows, found.spectra[layer].directions[: len(rows)], rtol=0, atol=1e-5)
            assert weight.norm(dim=1).mean().item() == pytest.approx(random[name], rel=0.15)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(task.load("nf4"), tmp_path)
    state = dict(again.named_parameters())
    assert all(torch.equal(p, state[n]) for n, p in model.named_parameters() if "lora_A" in n)
    with pytest.raises(RankError, match="none of the model's adapters"):
        found.start(get_peft_model(build("Whisper"), LoraConfig(target_modules=["fc1"])))
