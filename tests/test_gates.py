"""Temporal LoRA: the layer against its formula, and PEFT's life around it. Architectures: `test_conformance.py`."""

from __future__ import annotations

import copy
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES
from batches import batch
from conformance import adapted, build, config, linears, move
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft_suite import REFUSED, RUNS
from torch import nn

import mmqlora as mm
from mmqlora import benchmark
from mmqlora.errors import GateError, SignalError, TimelineError
from mmqlora.gates import PARTS, TemporalLoraConfig, explain
from mmqlora.records import read_records
from mmqlora.signals import audio_signals, video_signals
from mmqlora.timeline import FAMILIES, Family, Frames, Nothing, Positions, family, frames, mel, timekeeper

pytestmark = pytest.mark.filterwarnings("ignore")
ALL = {"hidden": True, "shift": True, "kernel": 3}


class Toy(nn.Module):
    """One Linear over frames, one over the steps of a sound, one over words."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="toy")
        self.seen, self.heard, self.read = nn.Linear(12, 6), nn.Linear(5, 6), nn.Linear(6, 6)

    def forward(self, pixel_values=None, input_features=None):
        out = []
        if pixel_values is not None:
            out.append(self.seen(pixel_values.flatten(0, 1).flatten(2).transpose(1, 2)))  # (B F, P, 12)
        if input_features is not None:
            out.append(self.heard(input_features.transpose(1, 2)))
        return out


@pytest.fixture(autouse=True)
def toy_family():
    @family("toy")
    def make(config, **_):
        rules = [("seen", Frames(("video",))), ("heard", Positions(("audio",))), ("", Nothing())]
        return Family({"video": frames(), "audio": mel()}, rules)

    yield
    FAMILIES.pop("toy")


def toy(**settings) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(Toy(), TemporalLoraConfig(r=3, target_modules=["seen", "heard", "read"], **settings))
    move(model, scale=0.3)
    return model.double().eval()


def by_the_formula(layer, x, phi, shape):
    """y = Wx + s B[(1 + tanh(c (U phi + V h^))) * Ax + E phi + (k * h-bar)], row by row, for one item: x (T, P, D)."""
    get = {name: getattr(layer, name)["default"].detach().numpy() for name in shape}
    a, b = (getattr(layer, name)["default"].weight.detach().numpy() for name in ("lora_A", "lora_B"))
    weight, bias = (p.detach().numpy() for p in (layer.base_layer.weight, layer.base_layer.bias))
    h = np.einsum("tpd,rd->tpr", x, a)
    mean = h.mean(1)
    y = np.empty((*x.shape[:2], len(weight)))
    for t in range(len(x)):
        before = get["lora_gate"].T @ phi[t]
        if "lora_hidden" in get:
            before = before + get["lora_hidden"].T @ (mean[t] / np.sqrt((mean[t] ** 2).mean() + 1e-12))
        gate = 1 + np.tanh(10.0 * before)
        added = np.zeros(len(gate))
        if "lora_shift" in get:
            added += get["lora_shift"].T @ phi[t]
        if "lora_conv" in get:
            kernel = get["lora_conv"]
            for tap in range(kernel.shape[1]):
                source = t + tap - kernel.shape[1] // 2
                if 0 <= source < len(x):
                    added += kernel[:, tap] * mean[source]
        for p in range(x.shape[1]):
            update = b @ (gate * h[t, p] + added)
            y[t, p] = weight @ x[t, p] + bias + layer.scaling["default"] * update
    return y


@pytest.mark.parametrize("settings", [{}, {"hidden": True}, {"shift": True}, {"kernel": 3}, ALL], ids=str)
@pytest.mark.parametrize("kind", ["seen", "heard"])
def test_against_a_reference(kind, settings):
    parts = {"hidden": "lora_hidden", "shift": "lora_shift", "kernel": "lora_conv"}
    names = ["lora_gate", *(parts[key] for key in settings)]
    model = toy(signals=("motion", "novelty", "flux", "energy"), **settings)
    layer = getattr(model.get_base_model(), kind)
    generator = torch.Generator().manual_seed(4)
    if kind == "seen":
        given = torch.randn(2, 5, 12, 3, 3, generator=generator, dtype=torch.double)
        phi = video_signals(given, names=["motion", "novelty"])
        rows = given.flatten(3).transpose(2, 3)  # (B, F, P, 12)
        (found,) = model(pixel_values=given)
        found = found.view(2, 5, 9, 6)
    else:
        given = torch.randn(2, 5, 7, generator=generator, dtype=torch.double)
        phi = audio_signals(given.transpose(1, 2), names=["flux", "energy"])
        rows = given.transpose(1, 2)[:, :, None]
        (found,) = model(input_features=given)
        found = found[:, :, None]
    for item in range(2):
        expected = by_the_formula(layer, rows[item].numpy(), phi[item].double().numpy(), names)
        np.testing.assert_allclose(found[item].detach().numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("autocast", [False, True])
def test_over_eight_bits_and_in_sixteen(autocast):
    task = benchmark.task("audio/timbre")
    given = task.collate([task.train(0)[i] for i in range(2)])
    losses = []
    for moved in (None, False, True):
        model = task.load()
        mm.quantize(model, "int8")
        if moved is not None:
            model = get_peft_model(model, TemporalLoraConfig(r=4, target_modules=linears(model), **ALL)).eval()
            if moved:
                move(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses.append(model(**given).loss)
    assert torch.equal(losses[0], losses[1]) and not torch.equal(losses[1], losses[2]) and losses[2].isfinite()
    losses[2].backward()
    gates = [p for n, p in model.named_parameters() if any(part in n for part in PARTS)]
    assert gates and all(p.grad.isfinite().all() and p.grad.any() for p in gates)


def test_words_are_plain_lora():
    model = toy()
    layer = model.get_base_model().read
    assert not layer.lora_variant and not [name for name, _ in layer.named_parameters() if "gate" in name]


def test_weights_that_are_adapted_as_tensors_have_no_gates():
    settings = TemporalLoraConfig(r=3, target_modules=["seen"], target_parameters=["heard.weight"])
    names = [name for name, _ in get_peft_model(Toy(), settings).named_parameters() if "lora_gate" in name]
    assert len(names) == 1 and ".seen." in names[0]  # a gate that nothing reads would be trained in vain


def test_the_gate_learns_faster_by_its_scale():
    moved = {}
    for scale in (1.0, 10.0):
        model = toy(gate_scale=scale)
        gates = [p for name, p in model.named_parameters() if "lora_gate" in name]
        for gate in gates:
            gate.data.zero_()
        optimizer = torch.optim.Adam(gates, 1e-4)
        given = torch.randn(2, 5, 12, 3, 3, generator=torch.Generator().manual_seed(4), dtype=torch.double)
        model(pixel_values=given)[0].square().sum().backward()
        optimizer.step()
        table = explain(model, pixel_values=given)
        moved[scale] = (table["gate"] - 1).abs().mean()
    assert moved[10.0] / moved[1.0] == pytest.approx(10, rel=0.01)


def test_explain_tells_the_gates_by_step():
    model = toy(signals=("motion",))
    given = torch.randn(2, 5, 12, 3, 3, dtype=torch.double)
    table = explain(model, pixel_values=given)
    assert list(table.columns) == ["layer", "adapter", "item", "step", "gate", "low", "high"]
    assert len(table) == 10 and (table["low"] <= table["gate"]).all() and (table["gate"] <= table["high"]).all()
    first = table[table["step"] == 0]
    assert (first["gate"] == 1).all()  # before the first frame there is nothing to move from
    with pytest.raises(GateError, match="no gates"):
        explain(Toy(), pixel_values=given)
    for parts in ({"shift": True}, {"kernel": 3}):
        with pytest.raises(GateError, match="default: only a shift or a kernel"):
            explain(toy(gate=False, **parts), pixel_values=given)
    with model.disable_adapter():
        nothing = explain(model, pixel_values=given)
    assert not len(nothing) and list(nothing.columns) == list(table.columns)


def test_explain_tells_of_each_frame_what_the_call_for_it_did():
    model = build("GIT")
    model = get_peft_model(model, config("GIT", model, signals=("motion",), hidden=True)).eval()
    move(model)
    given = batch("GIT").inputs
    name = "git.image_encoder.vision_model.encoder.layers.0.self_attn.q_proj"
    layer, states = model.get_base_model().get_submodule(name), []
    layer.lora_A["default"].register_forward_hook(lambda module, args, h: states.append(h.mean(1)))
    table = explain(model, **given)
    assert not table.duplicated(["layer", "item", "step"]).any()
    mean = torch.stack(states, 1)  # (items, frames, R)
    unit = mean * torch.rsqrt(mean.square().mean(-1, keepdim=True) + 1e-12)
    phi = video_signals(given["pixel_values"], names="motion")
    gate = 1 + torch.tanh(10 * (phi @ layer.lora_gate["default"] + unit @ layer.lora_hidden["default"]))
    own = table[table["layer"] == name].sort_values(["item", "step"])
    np.testing.assert_allclose(own["gate"].to_numpy(), gate.mean(-1).flatten().detach().numpy(), rtol=1e-4)


# PEFT's life


@pytest.fixture
def whisper():
    return batch("Whisper").inputs


def test_reload_in_a_new_process(tmp_path):
    task = benchmark.TASKS["audio/none"]
    model = task.load(quant_type="nf4")
    model = get_peft_model(model, TemporalLoraConfig(r=4, target_modules=linears(model), **ALL)).eval()
    move(model)
    model.save_pretrained(tmp_path / "adapter")
    given = task.collate([task.train(0)[i] for i in range(3)])
    torch.save(given, tmp_path / "batch.pt")
    code = f"""
import torch, mmqlora as mm
from peft import PeftModel
torch.set_num_threads({torch.get_num_threads()})
model = PeftModel.from_pretrained(mm.load("mmqlora/audio")[0], r"{tmp_path / "adapter"}").eval()
with torch.no_grad():
    torch.save(model(**torch.load(r"{tmp_path / "batch.pt"}")).logits, r"{tmp_path / "logits.pt"}")
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), model(**given).logits)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_load_adapter_switch_and_disable(tmp_path, whisper, low_cpu_mem_usage):
    model = adapted("Whisper", moved=True)
    with torch.no_grad():
        base = build("Whisper").eval()(**whisper).logits
        first = model(**whisper).logits
        model.save_pretrained(tmp_path)
        model.load_adapter(str(tmp_path), "twin", low_cpu_mem_usage=low_cpu_mem_usage)
        model.add_adapter("other", config("Whisper", build("Whisper"), signals=("energy",)))
        model.set_adapter("twin")
        assert torch.equal(model(**whisper).logits, first)
        model.set_adapter("other")
        assert torch.equal(model(**whisper).logits, base)  # at its start
        model.base_model.set_adapter(["default", "other"])
        assert torch.equal(model(**whisper).logits, first)
        with model.disable_adapter():
            assert torch.equal(model(**whisper).logits, base)
        model.delete_adapter("twin")
        model.set_adapter("default")
        assert torch.equal(model(**whisper).logits, first)


def test_injected_without_a_peft_model(whisper):
    model = build("Whisper").eval()
    with torch.no_grad():
        base = model(**whisper).logits
        inject_adapter_in_model(config("Whisper", model), model)
        assert torch.equal(model(**whisper).logits, base)
        move(model)
        assert not torch.equal(model(**whisper).logits, base)


def test_transformers_loads_it_too(tmp_path, whisper):
    model = adapted("Whisper", moved=True)
    model.save_pretrained(tmp_path)
    plain = build("Whisper").eval()
    plain.load_adapter(str(tmp_path))
    with torch.no_grad():
        assert torch.equal(plain(**whisper).logits, model(**whisper).logits)


def test_a_deleted_adapter_leaves_no_gates():
    model, given = toy(), torch.randn(2, 5, 12, 3, 3, dtype=torch.double)
    before = explain(model, pixel_values=given)
    settings = model.peft_config["default"]
    for _ in range(2):
        model.delete_adapter("default")
        with pytest.raises(GateError, match="no gates"):
            explain(model, pixel_values=given)
        model.add_adapter("default", settings)
        model.set_adapter("default")
    groups = timekeeper(model.get_base_model()).groups
    assert all(len(layers) == 1 for layers in groups.values())  # or each forward pass would compute gates twice
    after = explain(model.double(), pixel_values=given)
    assert len(after) == len(before) and (after["gate"] == 1).all()


def test_pefts_own_tests_fail_only_where_gates_refuse():
    """What PEFT's tests of custom models gave, by `peft_suite.py`."""
    records = read_records(Path(__file__).parent.parent / "book" / "records" / "peft_suite.jsonl")
    runs = {record["config"]["run"]: record for record in records}
    assert set(runs) == set(RUNS)
    for name in ("gates", "open"):
        assert runs[name]["gates_made"]["tests"] > 800 and runs[name]["gates_trained"]["tests"] > 30
        assert set(runs[name]["worse_than_lora"]) <= set(REFUSED)
        assert runs[name]["data"] == runs["lora"]["data"] and runs[name]["left_out"] == runs["lora"]["left_out"]


def test_gates_are_trainable_where_their_adapter_is(tmp_path):
    adapted("Whisper").save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(build("Whisper"), tmp_path)
    assert not [name for name, p in model.named_parameters() if p.requires_grad]
    model.load_adapter(str(tmp_path), "other", is_trainable=True)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if ".other" in name}
    assert any("lora_gate" in name for name in trainable)


def test_rank_pattern_sizes_the_gates():
    model = build("Whisper")
    settings = config("Whisper", model, rank_pattern={"fc1": 2})
    sizes = {
        name: tuple(p.shape) for name, p in get_peft_model(model, settings).named_parameters() if "lora_gate" in name
    }
    assert {size for name, size in sizes.items() if ".fc1." in name} == {(3, 2)}
    assert {size for name, size in sizes.items() if ".fc1." not in name} == {(3, 4)}


def test_a_copy_keeps_its_own_time():
    model = adapted("SmolVLM", moved=True)
    other = copy.deepcopy(model)
    one, two = batch("SmolVLM").inputs, batch("SmolVLM", seed=5).inputs
    with torch.no_grad():
        alone = other(**two).loss
        model(**one)
        assert torch.equal(other(**two).loss, alone)
    base = other.get_base_model()
    assert base.generate.function.__self__ is base


def test_a_run_resumes(tmp_path):
    task = benchmark.TASKS["audio/timbre"]
    train = task.train(0)
    options = {"collate": task.collate, "steps": 6, "batch_size": 4, "bf16": False, "progress": False}

    def fresh():
        torch.manual_seed(0)
        model = task.load(quant_type="nf4")
        return get_peft_model(model, TemporalLoraConfig(r=4, target_modules=linears(model)))

    whole = fresh()
    mm.fine_tune(whole, train, output=tmp_path / "a", save_every=3, **options)
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "checkpoint-3").rename(tmp_path / "b" / "checkpoint-3")
    again = fresh()
    record = mm.fine_tune(again, train, output=tmp_path / "b", save_every=3, resume=True, **options)
    assert record["resumed_from_step"] == 3
    ours, theirs = (dict(model.named_parameters()) for model in (whole, again))
    gates = [name for name in ours if "lora_gate" in name]
    assert gates and any(ours[name].any() for name in gates)
    for name, parameter in ours.items():
        if parameter.requires_grad:
            assert torch.equal(parameter, theirs[name]), name


def test_compiles_without_a_graph_break():
    for name in ("Whisper", "LLaVA-OneVision"):
        model = adapted(name, moved=True, quantize=False)
        given = batch(name).inputs
        expected = model(**given).loss
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        loss = compiled(**given).loss
        loss.backward()
        assert torch.allclose(loss, expected, rtol=1e-5)
        assert any(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "lora_gate" in n)
        torch._dynamo.reset()


WORKER = """
import sys, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, sys.argv[3])
from batches import batch
from conformance import adapted
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=int(sys.argv[1]), world_size=2)
model = DistributedDataParallel(adapted("Whisper", moved=True).train())
optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-3)
for step in range(3):
    optimizer.zero_grad()
    model(**batch("Whisper", seed=10 * step + int(sys.argv[1])).inputs).loss.backward()
    optimizer.step()
flat = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
both = [torch.empty_like(flat) for _ in range(2)]
dist.all_gather(both, flat)
assert torch.equal(*both)
dist.destroy_process_group()
"""


def test_two_processes_stay_in_step(tmp_path):
    store, here = str(tmp_path / "store"), str(Path(__file__).parent)
    command = [sys.executable, "-W", "ignore", "-c", WORKER]
    workers = [subprocess.Popen([*command, str(rank), store, here], stderr=subprocess.PIPE) for rank in (0, 1)]
    for worker in workers:
        error = worker.communicate(timeout=240)[1]
        assert worker.returncode == 0, error.decode()[-2000:]


def test_eva_starts_it():
    from peft import EvaConfig, initialize_lora_eva_weights

    model = build("Whisper", quantize=False)
    given = batch("Whisper").inputs
    settings = config("Whisper", model, init_lora_weights="eva", eva_config=EvaConfig(rho=2.0))
    with torch.no_grad():
        base = model(**given).loss
    model = get_peft_model(model, settings)
    flat = {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": lambda x, *_: x[0].flatten(0, -2)}
    initialize_lora_eva_weights(model, [given] * 4, show_progress_bar=False, **flat)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(**given).loss, base)
    move(model)
    assert torch.isfinite(model(**given).loss)


# Refusals


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"signals": ("moton",)}, SignalError, "motion"),
        ({"kernel": 2}, GateError, "odd"),
        ({"gate": False}, GateError, "plain LoRA"),
        ({"signals": ()}, GateError, "need signals"),
        ({"use_dora": True}, GateError, "use_dora"),
    ],
)
def test_settings_that_make_no_sense(settings, error, message):
    with pytest.raises(error, match=message):
        TemporalLoraConfig(target_modules="all-linear", **settings)


def mixing(name: str, quantize: bool = True) -> PeftModel:
    """A model with three adapters, which PEFT can mix where the first dimension is the items; towers get frames."""
    model = build(name, quantize)
    targets = linears(model) if name != "SmolVLM" else r".*text_model\.layers\..*_proj"
    model = get_peft_model(model, TemporalLoraConfig(r=4, target_modules=targets, **ALL)).eval()
    model.add_adapter("other", TemporalLoraConfig(r=3, target_modules=targets, signals=("energy", "motion")))
    model.add_adapter("third", TemporalLoraConfig(r=2, target_modules=targets, gate=False, kernel=3))
    move(model, scale=0.2)
    return model


MIXED = ["third", "other", "__base__", "default", "other"]


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("name", ["Whisper", "wav2vec2 CTC", "SmolVLM"])
def test_adapters_mixed_in_a_batch(name, quantize):
    model, given = mixing(name, quantize), batch(name, sizes=(4,) * 5).inputs
    with torch.no_grad():
        mixed = model(**given, adapter_names=MIXED).logits
        for row, adapter in enumerate(MIXED):
            model.set_adapter("default" if adapter == "__base__" else adapter)
            with model.disable_adapter() if adapter == "__base__" else nullcontext():
                torch.testing.assert_close(mixed[row], model(**given).logits[row], atol=1e-4, rtol=1e-4)
        assert torch.equal(model(**given).logits, model(**given, adapter_names=["other"] * 5).logits)


def test_adapters_mixed_in_a_batch_that_generates():
    model, given = mixing("Whisper"), {"input_features": batch("Whisper", sizes=(4,) * 5).inputs["input_features"]}
    options = {"max_new_tokens": 8, "num_beams": 2, "do_sample": False}
    mixed, alone = model.generate(**given, **options, adapter_names=MIXED), {}
    for adapter in ("default", "other", "third"):
        model.set_adapter(adapter)
        alone[adapter] = model.generate(**given, **options)
    with model.disable_adapter():
        alone["__base__"] = model.generate(**given, **options)
    assert mixed.tolist() == [alone[adapter][row].tolist() for row, adapter in enumerate(MIXED)]
    assert len({str(said[0].tolist()) for said in alone.values()}) == 4


def test_updates_of_gates_are_not_added_up(whisper):
    model = adapted("Whisper", moved=True)
    with pytest.raises(GateError, match="added up"):
        model.add_weighted_adapter(["default"], [1.0], "sum")


def test_a_number_of_frames_that_nothing_reads_is_refused():
    model = build("Whisper")
    with pytest.raises(TimelineError, match="clip_frames=4"):
        get_peft_model(model, config("Whisper", model, clip_frames=4))


def test_a_tower_that_sees_one_frame_at_a_time_has_no_neighbors():
    model = build("GIT")
    with pytest.raises(GateError, match="one frame at a time"):
        get_peft_model(model, config("GIT", model, kernel=3))


def test_signals_that_no_layer_sees_are_refused():
    settings = {"r": 2, "target_modules": "all-linear", "signals": ("motion", "novelty")}
    with pytest.raises(GateError, match=r"fit none of the \d+ layers that see audio; expected some of flux, energy"):
        get_peft_model(ARCHITECTURES["Whisper"](), TemporalLoraConfig(**settings))
    get_peft_model(ARCHITECTURES["Whisper"](), TemporalLoraConfig(**settings, hidden=True))  # which needs no signals


def test_unknown_architectures_are_refused():
    with pytest.raises(TimelineError, match="gpt2"):
        get_peft_model(ARCHITECTURES["GPT-2"](), TemporalLoraConfig(target_modules=["c_attn"]))


def test_unloading_leaves_the_model_as_it_was():
    plain, model = build("SmolVLM"), adapted("SmolVLM")
    bare = model.unload()
    assert not [m for m in bare.modules() if m._forward_pre_hooks or m._forward_hooks]
    assert "generate" not in bare.__dict__ and set(bare.__dict__) <= {*plain.__dict__, "peft_config"}


def untouched(model: nn.Module) -> bool:
    hooks = [m for m in model.modules() if m._forward_pre_hooks or m._forward_hooks]
    return not hooks and not {"generate", "get_image_features", "_mmqlora_time"} & set(model.__dict__)


def test_the_last_adapter_takes_the_clock_with_it():
    base, given = build("CLIP").eval(), batch("CLIP").inputs
    queries = {"r": 2, "target_modules": r"vision_model\..*q_proj"}
    with torch.no_grad():
        expected = base(**given).loss
        model = get_peft_model(base, TemporalLoraConfig(**queries, clip_frames=4, hidden=True)).eval()
        model.add_adapter("other", TemporalLoraConfig(**queries, clip_frames=4))
        move(model)
        model.delete_adapter("default")
        assert not untouched(base) and not torch.equal(model(**given).loss, expected)  # the other keeps it
        model.delete_adapter("other")
        assert untouched(base) and torch.equal(base(**given).loss, expected)
        model.add_adapter("default", TemporalLoraConfig(**queries, clip_frames=2))
        move(model)
        model.set_adapter("default")
        assert len(explain(model, **given).query("layer == layer[0]").groupby("item")) == 4


def test_what_fails_leaves_the_model_as_it_was():
    base = build("CLIP")
    names = [name for name, _ in base.named_modules()]
    norms = {"r": 2, "target_modules": r"vision_model\..*(q_proj|layer_norm2)"}  # PEFT refuses the norm behind
    queries = {"r": 2, "target_modules": r"vision_model\..*q_proj"}
    with pytest.raises(ValueError, match="LayerNorm"):
        get_peft_model(base, TemporalLoraConfig(**norms, clip_frames=3))
    assert untouched(base) and [name for name, _ in base.named_modules()] == names
    model = get_peft_model(base, TemporalLoraConfig(**queries, clip_frames=4)).eval()
    move(model)
    with torch.no_grad():
        expected = model(**batch("CLIP").inputs).loss
        with pytest.raises(ValueError, match="LayerNorm"):
            model.add_adapter("other", TemporalLoraConfig(**norms))
        assert torch.equal(model(**batch("CLIP").inputs).loss, expected)
        assert list(model.peft_config) == ["default"] and not [n for n, _ in model.named_parameters() if "other" in n]


def test_one_signal_may_come_by_its_name_alone():
    assert TemporalLoraConfig(target_modules=[], signals="motion").signals == ("motion",)


def test_the_type_is_known_to_peft():
    assert isinstance(TemporalLoraConfig(target_modules=[]), LoraConfig)
    assert TemporalLoraConfig(target_modules=[]).peft_type.value == "TEMPORAL_LORA"


def test_on_real_speech(real):
    """At its start a real Whisper says what it says; its gates open where there is speech once they are told to."""
    from transformers import AutoProcessor

    from mmqlora.datasets.speech import Speech
    from mmqlora.whisper import collate, prepare, transcribe

    folder = real / "models" / "whisper-tiny.en"
    processor = AutoProcessor.from_pretrained(folder)
    speech = Speech(real / "speech" / "librivox")
    speech.rows = [row for row in speech.rows if "sense_and_sensibility" in row["path"]][:2]
    examples = prepare(speech, processor)
    model, _ = mm.load(folder)
    said = transcribe(model, processor, examples)
    with torch.no_grad():
        loss = model(**collate(examples)).loss
    settings = TemporalLoraConfig(r=4, target_modules=mm.regions(model).pattern("audio"), signals=("speech",))
    model = get_peft_model(model, settings).eval()
    with torch.no_grad():
        assert torch.equal(model(**collate(examples)).loss, loss)
    assert transcribe(model, processor, examples) == said
    for name, parameter in model.named_parameters():
        if "lora_gate" in name:
            parameter.data.fill_(0.03)
    table = explain(model, **collate(examples))
    first = table[table["layer"] == "model.encoder.layers.0.self_attn.q_proj"]
    for row, (_, steps) in zip(speech.rows, first.groupby("item"), strict=True):
        quiet = steps[steps["step"] > 50 * (row["duration"] + 1)]  # the window of 30 s ends in silence
        assert steps["gate"].max() > 1.2 and (quiet["gate"] < 1).all()
