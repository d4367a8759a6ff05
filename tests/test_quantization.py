"""Quantization: bit for bit what transformers does, without the two traps of bitsandbytes on a CPU."""

from __future__ import annotations

import copy
import math
import os
import weakref
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from architectures import ARCHITECTURES
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit
from torch import nn
from transformers import (
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.quantizers.quantizers_utils import should_convert_module

from mmqlora import quantization as q
from mmqlora.errors import QuantizationError

REAL = Path(os.environ.get("MMQLORA_REAL", Path(__file__).parents[2] / "shared" / "real"))
WHISPER_TINY = REAL / "models" / "whisper-tiny.en"


def seeded(cls, config):
    torch.manual_seed(0)
    return cls(config).eval()


def whisper(**changes):
    settings = dict(
        d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=128, decoder_ffn_dim=128, num_mel_bins=16, max_source_positions=20, max_target_positions=32,
        vocab_size=256, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    return seeded(WhisperForConditionalGeneration, WhisperConfig(**settings | changes))


def llama(**changes):
    settings = dict(
        hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return seeded(LlamaForCausalLM, LlamaConfig(**settings | changes))


def gpt2():
    return seeded(GPT2LMHeadModel, GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=256, n_positions=32))


def inputs(model):
    ids = torch.arange(3, 11).view(1, 8)
    if not isinstance(model, WhisperForConditionalGeneration):
        return {"input_ids": ids}
    frames = 2 * model.config.max_source_positions
    generator = torch.Generator().manual_seed(1)
    mel = torch.randn(1, model.config.num_mel_bins, frames, generator=generator)
    return {"input_features": mel, "decoder_input_ids": ids}


@torch.no_grad()
def logits(model):
    return model(**inputs(model)).logits


def four_bit(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}


def assert_same_state(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype and torch.equal(ours[name], value), name


def bnb_config(quant_type, double_quant=True, **skip):
    if quant_type == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, **skip)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=double_quant, **skip
    )


# In place = from_pretrained = load


@pytest.mark.parametrize(("quant_type", "double_quant"), [("nf4", True), ("nf4", False), ("fp4", True), ("int8", True)])
@pytest.mark.parametrize("build", [whisper, llama, gpt2])
def test_in_place_is_from_pretrained_is_load(build, quant_type, double_quant, tmp_path):
    original = build()
    original.save_pretrained(tmp_path / "m")
    theirs = type(original).from_pretrained(
        tmp_path / "m", dtype=torch.float32, quantization_config=bnb_config(quant_type, double_quant)
    )
    loaded, processor = q.load(tmp_path / "m", quant_type, double_quant)
    assert processor is None
    q.quantize(original, quant_type, double_quant)
    q.close_cpu_traps(theirs)
    expected = logits(theirs)
    for ours in (original, loaded):
        assert_same_state(ours, theirs)
        assert torch.equal(logits(ours), expected)
        for name in ("is_quantized", "quantization_method"):
            assert getattr(ours, name) == getattr(theirs, name)
        assert type(ours.hf_quantizer) is type(theirs.hf_quantizer)
        for name in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
            assert getattr(ours, name, False) == getattr(theirs, name, False)
        assert ours.num_parameters() == theirs.num_parameters()
        mine, other = ours.config.quantization_config.to_dict(), theirs.config.quantization_config.to_dict()
        assert {k: v for k, v in mine.items() if k != "llm_int8_skip_modules"} == {
            k: v for k, v in other.items() if k != "llm_int8_skip_modules"
        }
        trainable = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (ours, theirs)]
        # transformers itself forgets on reading that Whisper's sinusoids are frozen
        assert trainable[0] ^ trainable[1] <= {"model.encoder.embed_positions.weight"}


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
def test_codes_are_the_same_bytes_in_any_storage(storage, tmp_path):
    original = whisper()
    original.save_pretrained(tmp_path)
    plain, stored = copy.deepcopy(original), copy.deepcopy(original)
    reports = q.quantize(plain), q.quantize(stored, quant_storage=storage)
    loaded, _ = q.load(tmp_path, quant_storage=storage)
    hollow = WhisperForConditionalGeneration(original.config).to("meta")
    q.quantize(hollow, quant_storage=storage)
    for name, module in four_bit(plain).items():
        for model in (stored, loaded):
            weight = model.get_submodule(name).weight
            assert weight.dtype == storage and torch.equal(weight.view(torch.uint8).view(-1, 1), module.weight)
        assert hollow.get_submodule(name).weight.shape == weight.shape
    assert reports[0].table().equals(reports[1].table())
    assert torch.equal(logits(stored), logits(plain)) and torch.equal(logits(loaded), logits(plain))
    assert q.prefers_bf16(stored) == q.prefers_bf16(plain)


@pytest.mark.skipif(not WHISPER_TINY.is_dir(), reason="no real Whisper: set MMQLORA_REAL")
def test_in_place_is_from_pretrained_on_whisper_tiny():
    ours, processor = q.load(WHISPER_TINY, quant_type=None)
    assert ours.dtype == torch.float32  # the checkpoint is in fp16
    assert type(processor).__name__ == "WhisperProcessor"
    theirs = WhisperForConditionalGeneration.from_pretrained(
        WHISPER_TINY, dtype=torch.float32, quantization_config=bnb_config("nf4")
    )
    report = q.quantize(ours)
    assert_same_state(ours, theirs)
    table = report.table()
    assert (table["why"] == "").sum() == 64
    assert table["error"].max() < 0.15 and 0.08 < table.loc[table["why"] == "", "error"].mean() < 0.11


@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
@pytest.mark.parametrize("build", [whisper, llama, gpt2])
def test_saved_and_read_by_plain_from_pretrained(build, quant_type, tmp_path):
    model = build()
    q.quantize(model, quant_type, exclude=r"layers\.1\..*fc1$|layers\.1\.mlp\.up_proj|h\.1\.mlp\.c_fc")
    expected = logits(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float32)
    q.close_cpu_traps(again)
    assert_same_state(again, model)
    assert torch.equal(logits(again), expected)
    loaded, _ = q.load(tmp_path)  # a checkpoint that is quantized already stays what it is
    assert torch.equal(logits(loaded), expected)


def test_the_skip_list_names_one_layer_even_where_names_end_alike():
    model = nn.ModuleDict({"fc": nn.Linear(64, 64), "inner": nn.ModuleDict({"fc": nn.Linear(64, 64)})})
    for kept, other in (("fc", "inner.fc"), ("inner.fc", "fc")):
        skip = q._skip_list(model, [kept])
        assert not should_convert_module(kept, skip) and should_convert_module(other, skip)


def test_fp16_and_bf16_models_quantize_like_from_pretrained(tmp_path):
    for dtype in (torch.float16, torch.bfloat16):
        llama().to(dtype).save_pretrained(tmp_path)
        theirs = LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype, quantization_config=bnb_config("nf4"))
        ours = LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        q.quantize(ours)
        assert_same_state(ours, theirs)
        assert all(module.compute_dtype == torch.float32 for module in four_bit(ours).values())


# The first trap: AVX512-BF16 repacks weights in evaluation mode


def test_evaluation_changes_neither_output_nor_weights(tmp_path):
    llama().save_pretrained(tmp_path)
    in_place = llama()
    q.quantize(in_place)
    loaded, _ = q.load(tmp_path)
    for model in (in_place, loaded):
        assert four_bit(model) and not any(m.support_avx512bf16_for_cpu for m in four_bit(model).values())
        before = {name: value.clone() for name, value in model.state_dict().items()}
        first = logits(model)
        assert torch.equal(logits(model), first)
        model.train()
        model(**inputs(model)).logits.sum()  # raises after a repacking
        model.eval()
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]), name


@pytest.mark.skipif(not bnb.functional.has_avx512bf16(), reason="needs a CPU with AVX512-BF16 to show the fault")
def test_the_first_trap_is_there_when_the_flag_is_on():
    model = llama()
    q.quantize(model)
    before, expected = copy.deepcopy(model.state_dict()), logits(model)
    for module in four_bit(model).values():
        module.support_avx512bf16_for_cpu = True
    assert not torch.equal(logits(model), expected)
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.skipif(not bnb.functional.has_avx512bf16(), reason="needs a CPU with AVX512-BF16 to show the fault")
def test_a_repacked_model_is_refused():
    model = llama()
    q.quantize(model)
    for module in four_bit(model).values():
        module.support_avx512bf16_for_cpu = True
    logits(model)
    with pytest.raises(QuantizationError, match="repacked"):
        q.close_cpu_traps(model)


# The second trap: rows that are not whole blocks


def flat_reference(weight):
    """NF4 in blocks of 64 over the flattened matrix, as the paper and GPUs do it."""
    levels = bnb.functional.get_4bit_type("nf4", device="cpu")
    values = F.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64)
    scale = values.abs().amax(1, keepdim=True)
    nearest = (values / scale.clamp_min(1e-30)).unsqueeze(-1).sub(levels).abs().argmin(-1)
    return (levels[nearest] * scale).flatten()[: weight.numel()].view_as(weight)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 300),
    columns=st.one_of(st.integers(1, 330), st.sampled_from([64, 128, 192, 256, 320])),
    seed=st.integers(0, 9),
)
def test_every_round_trip_is_right_or_the_layer_is_left_alone(rows, columns, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(columns, rows), nn.Linear(rows, 64))
    weight = model[0].weight.detach().clone()
    report = q.quantize(model, double_quant=False)
    layer = report.layers[0]
    if layer.why:
        assert type(model[0]) is nn.Linear and torch.equal(model[0].weight, weight) and layer.error == 0
        assert columns % 64 and f"rows of {columns}" in layer.why
        return
    back = bnb.functional.dequantize_4bit(model[0].weight.data, model[0].weight.quant_state)
    assert torch.allclose(back, flat_reference(weight), atol=1e-6)
    error = float((back - weight).norm() / weight.norm())
    assert error < 0.1 and math.isclose(error, layer.error, rel_tol=1e-4, abs_tol=1e-6)


def test_whole_blocks_are_always_quantized_and_odd_widths_said_so(tmp_path):
    model = llama(intermediate_size=208)
    model.save_pretrained(tmp_path)
    loaded, _ = q.load(tmp_path)
    report = q.quantize(model)
    for done in (report, q.quantization_report(loaded)):
        why = {layer.name: layer.why for layer in done.layers}
        odd = [name for name in why if name.endswith("down_proj")]
        assert len(odd) == 2 and all("rows of 208" in why[name] for name in odd)
        assert [name for name in why if why[name]] == [*odd, "lm_head"]
    assert_same_state(loaded, model)


def test_odd_widths_quantized_elsewhere_are_read_rightly(tmp_path):
    """A checkpoint as a GPU writes it: flat blocks also where rows are not whole blocks."""
    original = llama(intermediate_size=208)
    original.save_pretrained(tmp_path / "16")
    stored = LlamaForCausalLM.from_pretrained(
        tmp_path / "16", dtype=torch.float32, quantization_config=bnb_config("nf4", double_quant=False)
    )
    stored.save_pretrained(tmp_path / "4")
    loaded, _ = q.load(tmp_path / "4")
    name = "model.layers.0.mlp.down_proj"
    weight = original.get_submodule(name).weight
    assert type(loaded.get_submodule(name)) is nn.Linear
    assert torch.allclose(loaded.get_submodule(name).weight, flat_reference(weight), atol=1e-6)
    assert "rows of 208" in {layer.name: layer.why for layer in q.quantization_report(loaded).layers}[name]


def test_a_model_freed_of_odd_widths_can_be_saved(tmp_path):
    llama(intermediate_size=208).save_pretrained(tmp_path / "16")
    model = LlamaForCausalLM.from_pretrained(
        tmp_path / "16", dtype=torch.float32, quantization_config=bnb_config("nf4", llm_int8_skip_modules=["lm_head"])
    )
    assert set(q.close_cpu_traps(model)) == {f"model.layers.{i}.mlp.down_proj" for i in (0, 1)}
    assert q.close_cpu_traps(model) == {}
    model.save_pretrained(tmp_path / "4")
    loaded, _ = q.load(tmp_path / "4")
    assert_same_state(loaded, model)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="needs AVX512 to show the fault")
@pytest.mark.parametrize("columns", [96, 4304])
def test_the_second_trap_is_there(columns):
    """When this fails, bitsandbytes has mended its kernel and the rule about widths can go."""
    weight = torch.randn(64, columns)
    back = bnb.functional.dequantize_4bit(*bnb.functional.quantize_4bit(weight, quant_type="nf4"))
    assert (back - weight).norm() / weight.norm() > 0.2
    assert (flat_reference(weight) - weight).norm() / weight.norm() < 0.1


# What a layer computes


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_forward_and_backward_are_those_of_the_dequantized_weight(quant_type):
    model = llama()
    q.quantize(model, quant_type)
    layer = model.model.layers[0].mlp.up_proj
    weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    x = torch.randn(5, layer.in_features, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    out, expected = layer(x), F.linear(y, weight)
    assert torch.equal(out, expected)
    out.sum().backward(), expected.sum().backward()
    assert torch.equal(x.grad, y.grad)


def test_quantization_lowers_precision_by_as_much_as_the_report_says():
    model = whisper()
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    report = q.quantize(model)
    for layer in report.layers:
        if layer.why:
            continue
        module, weight = model.get_submodule(layer.name), weights[f"{layer.name}.weight"]
        back = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        assert math.isclose(layer.error, float((back - weight).norm() / weight.norm()), rel_tol=1e-5)
        assert layer.error < 0.11  # the Gaussian limit is 0.09 at block 64; double quantization and size add a little


def test_bits_of_the_report_are_the_arithmetic():
    model = nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 8))
    for double_quant, bits in ((True, 4 + 8 / 64 + 32 / (64 * 256)), (False, 4 + 32 / 64)):
        layer = q.quantize(copy.deepcopy(model), double_quant=double_quant).layers[0]
        assert math.isclose(layer.bits, bits, abs_tol=1e-4)
        assert layer.bytes_before == 4 * 1024 * 1024
    assert q.quantize(copy.deepcopy(model), "int8").layers[0].bits == 8 + 32 / 1024


# What stays as it is


def test_head_embeddings_and_tied_weights_are_never_quantized():
    for tied in (True, False):
        model = llama(tie_word_embeddings=tied)
        q.quantize(model)
        assert type(model.lm_head) is nn.Linear and type(model.model.embed_tokens) is nn.Embedding
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    # transformers' own default takes this head for a layer like any other, because it has a bias
    ctc = seeded(
        Wav2Vec2ForCTC,
        Wav2Vec2Config(
            hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128, conv_dim=(64,),
            conv_stride=(4,), conv_kernel=(8,), num_conv_pos_embedding_groups=2, num_conv_pos_embeddings=4,
            vocab_size=64,
        ),
    )  # fmt: skip
    q.quantize(ctc)
    assert type(ctc.lm_head) is nn.Linear and four_bit(ctc)


def test_what_a_class_says_about_its_weights():
    class TwoNames(PreTrainedModel):
        config_class = LlamaConfig
        _tied_weights_keys = {"second.weight": "first.weight"}  # noqa: RUF012
        _keep_in_fp32_modules = ["exact"]  # noqa: RUF012

        def __init__(self, config):
            super().__init__(config)
            for name in ("first", "second", "exact", "plain", "last"):
                setattr(self, name, nn.Linear(64, 64))
            self.post_init()

    model = TwoNames(LlamaConfig(tie_word_embeddings=True))
    assert model.second.weight is model.first.weight
    q.quantize(model)
    assert list(four_bit(model)) == ["plain"]


def test_a_module_that_transformers_does_not_know():
    model = nn.ModuleDict(
        {"words": nn.Embedding(64, 64), "tied": nn.Linear(64, 64), "a": nn.Linear(64, 64), "b": nn.Linear(64, 8)}
    )
    model["tied"].weight = model["words"].weight
    report = q.quantize(model)
    assert list(four_bit(model)) == ["a"] and model.is_loaded_in_4bit
    assert {layer.name for layer in report.layers if layer.why} == {"tied", "b"}


def test_only_weights_of_linears_change():
    model = whisper()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    q.quantize(model)
    changed = {f"{name}.weight" for name in four_bit(model)}
    assert changed and all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n not in changed)


def test_exclude_by_pattern_and_by_region():
    model = whisper()
    report = q.quantize(model, exclude=r"\.1\.fc[12]")
    left = {layer.name for layer in report.layers if layer.why == r"excluded by '\\.1\\.fc[12]'"}
    assert left == {f"model.{side}.layers.1.fc{i}" for side in ("encoder", "decoder") for i in (1, 2)}
    assert left.isdisjoint(four_bit(model))

    model = whisper()
    report = q.quantize(model, exclude=("audio", "fusion"))
    assert {layer.region for layer in report.layers if not layer.why} == {"text"}
    done = four_bit(model)
    assert done and all(name.startswith("model.decoder.") and "encoder_attn" not in name for name in done)
    assert report.summary().loc["audio", "quantized"] == 0


def test_exclude_works_in_load(tmp_path):
    whisper().save_pretrained(tmp_path)
    ours = whisper()
    q.quantize(ours, exclude=("audio", "v_proj"))
    loaded, _ = q.load(tmp_path, exclude=("audio", "v_proj"))
    assert_same_state(loaded, ours)
    assert {n for n in four_bit(loaded) if "v_proj" in n or ".encoder." in n} == set()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quant_type": "nf3"}, "'nf3' is unknown; use one of 'nf4', 'fp4', 'int8'"),
        ({"exclude": "encoder_atn"}, "matches no Linear.*encoder_attn"),
        ({"exclude": "vision"}, "matches no Linear.*audio, fusion, text"),
        ({"exclude": "("}, "no regular expression"),
    ],
)
def test_errors_say_what_would_fit(arguments, message):
    model = whisper()
    with pytest.raises(QuantizationError, match=message):
        q.quantize(model, **arguments)
    assert not four_bit(model)


def test_weights_that_are_not_loaded():
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=1, vocab_size=64))
    with pytest.raises(QuantizationError, match="not loaded"):
        q.quantize(model, "int8")  # there is nothing to plan with
    model.model.layers[0].mlp.up_proj.to_empty(device="cpu")
    with pytest.raises(QuantizationError, match=r"not loaded .*q_proj"):
        q.quantize(model)


def test_no_second_quantization_and_none_over_adapters():
    model = llama()
    q.quantize(model)
    with pytest.raises(QuantizationError, match="quantized already"):
        q.quantize(model)
    adapted = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    for model in (adapted, adapted.get_base_model()):
        with pytest.raises(QuantizationError, match="before adding"):
            q.quantize(model)


# PEFT


def test_lora_on_a_model_quantized_in_place_trains_saves_and_reloads(tmp_path):
    model = llama()
    q.quantize(model)
    expected = logits(model)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    adapted = [module for module in model.modules() if isinstance(module, LoraLinear4bit)]
    assert len(adapted) == len(four_bit(model)) == 14
    assert torch.equal(logits(model), expected)
    report = q.quantization_report(model)
    assert len(report.layers) == 15 and not any(math.isnan(layer.error) for layer in report.layers)

    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batch = inputs(model)
    losses = []
    for _ in range(3):
        loss = model(**batch, labels=batch["input_ids"]).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    model.eval()
    trained = logits(model)
    model.save_pretrained(tmp_path)

    fresh = llama()
    q.quantize(fresh)
    assert torch.equal(logits(PeftModel.from_pretrained(fresh, tmp_path).eval()), trained)


# Where models are found


def test_lookup_order(tmp_path, monkeypatch, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    # One model per place, told apart by its size.
    places = [first / "org" / "name", first / "org--name", first / "name", second / "org" / "name"]
    for size, place in enumerate(places, start=1):
        llama(num_hidden_layers=size).save_pretrained(place)
    monkeypatch.setenv("MMQLORA_MODELS", os.pathsep.join([str(first), str(second)]))
    monkeypatch.chdir(tmp_path)
    for size, place in enumerate(places, start=1):
        model, _ = q.load("org/name", quant_type=None)
        assert model.config.num_hidden_layers == size
        printed = capsys.readouterr().out
        assert printed.startswith("org/name: the local copy") and str(tmp_path) not in printed
        (place / "config.json").unlink()
    # A folder that is given, or lies right here, comes before the variable.
    llama(num_hidden_layers=3).save_pretrained(tmp_path / "org" / "name")
    llama(num_hidden_layers=1).save_pretrained(first / "org" / "name")
    assert q.load("org/name", quant_type=None)[0].config.num_hidden_layers == 3
    assert "local copy" not in capsys.readouterr().out


def test_a_missing_model_says_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("MMQLORA_MODELS", str(tmp_path))
    with pytest.raises(QuantizationError) as caught:
        q.load("org/nothing-like-this", local_files_only=True)
    for part in ("org/nothing-like-this", str(tmp_path / "org--nothing-like-this"), "hub", "MMQLORA_MODELS"):
        assert part in str(caught.value)


def test_only_safetensors_and_no_remote_code(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(QuantizationError, match="safetensors"):
        q.load(tmp_path)
    with pytest.raises(QuantizationError, match="trust_remote_code"):
        q.load(tmp_path, trust_remote_code=True)


def test_an_unknown_class_asks_for_model_class(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text().replace("LlamaForCausalLM", "NoSuchModel")
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(QuantizationError, match=r"NoSuchModel.*model_class"):
        q.load(tmp_path)
    assert type(q.load(tmp_path, model_class=LlamaForCausalLM)[0]) is LlamaForCausalLM


# Reports


def test_report_of_a_model_that_others_quantized(tmp_path):
    llama().save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=bnb_config("nf4"))
    report = q.quantization_report(model)
    done = [layer for layer in report.layers if layer.stored == "nf4"]
    assert len(done) == 14 and all(math.isnan(layer.error) for layer in done)
    assert report.layers[-1].name == "lm_head" and report.layers[-1].why == "not recorded"


def test_report_adds_up_and_prints():
    model = whisper()
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    report = q.quantize(model)
    assert report.other_bytes + sum(layer.bytes_before for layer in report.layers) == total
    assert report.summary()["layers"].sum() == len(report.table()) == len(report.layers)
    assert report.left_alone()["layers"].sum() == 1
    assert "output head" in str(report) and "<table" in report._repr_html_() and "output head" in report._repr_html_()


def test_there_are_never_two_copies_of_a_model(monkeypatch):
    model = llama()
    old, alive, convert = [], [], q._converted

    def watched(module, config):
        alive.append(sum(weight() is not None for weight in old))
        old.append(weakref.ref(module.weight))
        return convert(module, config)

    monkeypatch.setattr(q, "_converted", watched)
    q.quantize(model)
    assert len(old) == 14 and not any(alive)  # when a layer's turn comes, the weights before it are gone


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_every_architecture_quantizes_in_place_and_on_loading(name, tmp_path):
    model = ARCHITECTURES[name]()
    model.save_pretrained(tmp_path)
    report = q.quantize(model)
    if not name.startswith("PE-"):  # transformers can't read what it saves of these: the size of timm's head is lost
        loaded, _ = q.load(tmp_path, model_class=type(model))
        assert_same_state(loaded, model)
    done = [layer for layer in report.layers if not layer.why]
    assert done and max(layer.error for layer in done) < 0.13
    assert all(layer.region in q.REGIONS for layer in report.layers)


def test_bf16_is_preferred_where_the_processor_multiplies_it_or_the_weights_have_it(monkeypatch):
    model = torch.nn.Linear(2, 2)
    for capabilities, there in (({"avx2": True, "avx512_bf16": False}, False), ({"amx_bf16": True}, True)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        assert q.multiplies_bf16("cpu") is there
        assert q.prefers_bf16(model) is (there or torch.cuda.is_available())
        assert q.prefers_bf16(torch.nn.Linear(2, 2, dtype=torch.bfloat16))
