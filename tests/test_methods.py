"""Every method on a tiny video-text, audio-text and dual-encoder model, at full precision and on NF4."""

from __future__ import annotations

import copy
import functools
import re

import bitsandbytes as bnb
import peft
import pytest
import torch
import transformers as tf
from torch import nn

import mmqlora as mm
from mmqlora.errors import MethodError
from mmqlora.methods import METHODS, adapt, callbacks, trainable, why_not
from mmqlora.training import fine_tune

# PEFT's own: what it says of tied heads, of norms and of the files of pruned ranks, and that it found no compiler.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "Model has `tie_word_embeddings=True`",
        "Unsupported layer type",
        "The following rank_pattern keys did not match",
        "Adapter 'default'. . LoRA tensor",
        "Failed to load the CUDA extension",
        "Setting boft_n_butterfly_factor",
        "Position ids are not supported",
        "`is_gradient_checkpointing` is deprecated",
    )
]

VOCABULARY = 80  # unlike any width: PEFT looks for the word embeddings by this number
ITEMS, FRAMES, STEPS = 8, 2, 5
TOWER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 1}
SPECIAL = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def video() -> tf.PreTrainedModel:
    return tf.SmolVLMForConditionalGeneration(
        tf.SmolVLMConfig(
            vision_config={**TOWER, "image_size": 32, "patch_size": 8},
            text_config={
                **TOWER,
                **SPECIAL,
                "model_type": "llama",
                "num_hidden_layers": 2,
                "num_key_value_heads": 1,
                "max_position_embeddings": 64,
                "tie_word_embeddings": True,
            },
            scale_factor=4,
            image_token_id=3,
            pad_token_id=0,
            tie_word_embeddings=True,
        )
    )


def audio() -> tf.PreTrainedModel:
    return tf.WhisperForConditionalGeneration(
        tf.WhisperConfig(
            **SPECIAL,
            decoder_start_token_id=1,
            num_mel_bins=64,
            d_model=64,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=1,
            decoder_attention_heads=1,
            encoder_ffn_dim=128,
            decoder_ffn_dim=128,
            max_source_positions=20,
            max_target_positions=32,
        )
    )


def dual() -> tf.PreTrainedModel:
    vision = tf.VivitConfig(**TOWER, image_size=32, num_frames=FRAMES, tubelet_size=[2, 8, 8])
    text = tf.CLIPTextConfig(**TOWER, **SPECIAL, max_position_embeddings=16)
    config = tf.VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=64)
    return tf.VisionTextDualEncoderModel(config)


MODELS = {"video": video, "audio": audio, "dual": dual}
HEADS = {"video": ["lm_head"], "audio": ["proj_out"], "dual": ["visual_projection", "text_projection"]}
BITS = [None, "nf4"]
CASES = [
    (method, kind, bits)
    for method in METHODS
    for kind in MODELS
    for bits in BITS
    if not (method == "full" and bits) and not (METHODS[method].rank == "num_virtual_tokens" and kind != "video")
]
TRAINED = [case for case in CASES if case[0] != "none"]


@functools.cache
def _built(kind: str) -> tf.PreTrainedModel:
    tf.set_seed(0)
    return MODELS[kind]().eval()


def build(kind: str) -> tf.PreTrainedModel:
    return copy.deepcopy(_built(kind))


@functools.cache
def batch(kind: str) -> dict:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, VOCABULARY, (ITEMS, 6), generator=generator)
    frames = torch.randn(ITEMS, FRAMES, 3, 32, 32, generator=generator)
    if kind == "audio":
        return {"input_features": torch.randn(ITEMS, 64, 40, generator=generator), "labels": ids}
    if kind == "dual":
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": frames, "return_loss": True}
    ids = torch.cat([torch.full((ITEMS, FRAMES), 3), ids], 1)
    labels = ids.masked_fill(ids == 3, -100)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": frames, "labels": labels}


def adapted(kind: str, method: str, bits: str | None, **settings) -> nn.Module:
    extra = {"adalora": {"steps": STEPS}, "eva": {"batches": [batch(kind)], "rank": 4}}.get(method, {})
    return adapt(build(kind), method, quant_type=bits, **{**extra, **settings})


def output(model: nn.Module, kind: str) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        out = model(**batch(kind))
    return out.logits_per_text if kind == "dual" else out.logits


def kept(kind: str, method: str) -> list[str]:
    return [f"^{name}$" for name in HEADS[kind]] if method == "head" else []


def base_output(kind: str, method: str, bits: str | None) -> torch.Tensor:
    model = build(kind)
    if bits:
        mm.quantize(model, bits, exclude=kept(kind, method))
    return output(model, kind)


def train(model: nn.Module, kind: str, steps: int = STEPS, learning_rate: float = 3e-3) -> list[float]:
    """Losses in evaluation mode before and after some steps on one batch."""
    with torch.no_grad():
        before = model.eval()(**batch(kind)).loss.item()
    items = torch.utils.data.TensorDataset(torch.arange(ITEMS * steps))
    fine_tune(
        model,
        items,
        collate=lambda _: dict(batch(kind)),
        steps=steps,
        batch_size=ITEMS,
        learning_rate=learning_rate,
        warmup=0.0,
        bf16=False,
        progress=False,
        callbacks=callbacks(model),
    )
    with torch.no_grad():
        return [before, model.eval()(**batch(kind)).loss.item()]


def names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# At the start


@pytest.mark.parametrize("method, kind, bits", CASES)
def test_it_starts_as_the_base_and_trains_what_it_says(method, kind, bits):
    model = adapted(kind, method, bits)
    before = base_output(kind, method, bits)
    if METHODS[method].identity and not (method == "pissa" and bits):
        assert torch.allclose(output(model, kind)[:, -before.shape[1] :], before, atol=2e-5)
    expected = {
        "none": "(?!)",
        "full": ".*",
        "head": r".*\.modules_to_save\.default\.weight",
        "adapter": r".*\.bottleneck\.modules_to_save\.default\.(up|down)\.(weight|bias)",
        "ia3": r".*\.ia3_l\.default",
        "vera": r".*\.vera_lambda_[bd]\.default",
        "oft": r".*\.oft_R\.default\.weight",
        "boft": r".*\.boft_[Rs]\.default",
        "ln-tuning": r".*\.ln_tuning_layers\.default\.(weight|bias)",
    }.get(method, r"prompt_encoder\..*" if METHODS[method].rank == "num_virtual_tokens" else r".*\.lora_\w+\.default.*")
    trained = names(model)
    assert all(re.fullmatch(expected, name) for name in trained)
    assert bool(trained) == (method != "none")
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    count = trainable(model)
    assert count["trainable"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    # Quantizing changes how values are stored, not how many there are.
    assert count["total"] >= trainable(build(kind))["total"]
    linears = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert bool(linears) == bool(bits)


@pytest.mark.parametrize("kind", MODELS)
def test_pissa_starts_nearer_to_the_base_than_nf4_alone(kind):
    whole = base_output(kind, "pissa", None)
    split = output(adapted(kind, "pissa", "nf4", rank=16), kind)
    assert (split - whole).norm() < (base_output(kind, "pissa", "nf4") - whole).norm()


@pytest.mark.parametrize("kind", MODELS)
def test_updates_go_on_all_linears_but_the_head(kind):
    model = adapted(kind, "lora", None)
    linears = {n for n, m in build(kind).named_modules() if type(m) is nn.Linear} - {"lm_head", "proj_out"}
    layers = {n for n, m in model.get_base_model().named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert layers == linears


def test_a_base_that_is_quantized_already_is_taken_as_it_is():
    model = build("audio")
    mm.quantize(model, "nf4")
    assert torch.allclose(output(adapt(model, "lora"), "audio"), base_output("audio", "lora", "nf4"))


@pytest.mark.parametrize("method", [m for m, entry in METHODS.items() if entry.identity and m not in ("none", "full")])
def test_a_16_bit_base_gets_adapters_in_32_bits(method):
    model = build("audio").bfloat16()
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch("audio").items()}
    extra = {"adalora": {"steps": STEPS}, "eva": {"batches": [inputs], "rank": 4}}.get(method, {})
    model = adapt(model, method, **extra)
    model(**inputs).loss.backward()
    own = {torch.bfloat16} if method in ("ln-tuning", "head") else {torch.float32}  # copies of the base's own
    assert {p.dtype for p in model.parameters() if p.requires_grad} == own


def test_the_seed_decides_the_start_and_touches_nothing_else():
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    states = [peft.get_peft_model_state_dict(adapted("audio", "lora", None, seed=seed)) for seed in (1, 1, 2)]
    assert torch.equal(torch.rand(1), expected)
    key = next(name for name in states[0] if "lora_A" in name)
    assert torch.equal(states[0][key], states[1][key]) and not torch.equal(states[0][key], states[2][key])


# Training, generating, reloading


def base_for(kind: str, method: str, bits: str | None) -> tf.PreTrainedModel:
    model = build(kind)
    if bits:
        mm.quantize(model, bits, exclude=kept(kind, method))
    return model


@pytest.mark.parametrize("method, kind, bits", TRAINED)
def test_it_learns_generates_and_reloads(method, kind, bits, tmp_path):
    model = adapted(kind, method, bits)
    trained = names(model)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad and "ranknum" not in n}
    before, after = train(model, kind, learning_rate=1e-2)
    assert after < before
    state = dict(model.named_parameters())
    assert all(torch.equal(state[name], value) for name, value in frozen.items())
    assert names(model) == trained
    if kind != "dual":
        inputs = {k: v for k, v in batch(kind).items() if k != "labels"}
        # The second and third token come through the cache; the first from scratch.
        tokens = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert tokens.shape[0] == ITEMS
    if method == "full":
        return
    model.save_pretrained(tmp_path)
    if method == "adapter" or (method == "pissa" and bits):
        again = adapted(kind, method, bits, seed=1)
        again.load_adapter(tmp_path, "default")
    else:
        again = peft.PeftModel.from_pretrained(base_for(kind, method, bits), tmp_path)
    assert torch.allclose(output(again, kind), output(model, kind), atol=2e-5)


@pytest.mark.parametrize("method", ["lora", "adapter", "prefix", "prompt", "p-tuning"])
def test_generating_with_a_cache_agrees_with_the_forward_pass(method):
    model = adapted("video", method, None)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.eval()
    inputs = {k: v for k, v in batch("video").items() if k != "labels"}
    tokens = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    ids = inputs["input_ids"]
    for _ in range(3):
        with torch.no_grad():
            out = model(**{**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)})
        logits = out.logits[:, -1].index_fill(1, torch.tensor(2), -torch.inf)
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(tokens, ids)


@pytest.mark.parametrize("kind", MODELS)
def test_adalora_prunes_to_the_rank_that_was_asked(kind, tmp_path):
    model = adapt(build(kind), "adalora", rank=2, steps=9)
    layers = sum("lora_A" in name for name in names(model))
    train(model, kind, steps=9, learning_rate=1e-2)
    ranks = [sum(mask) for mask in model.active_peft_config.rank_pattern.values()]
    assert len(ranks) == layers and sum(ranks) == 2 * layers and len(set(ranks)) > 1
    values = [p for name, p in model.named_parameters() if "lora_E" in name]
    assert sum(int((p != 0).sum()) for p in values) == 2 * layers
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(build(kind), tmp_path)
    assert torch.allclose(output(again, kind), output(model, kind), atol=2e-5)


def test_adalora_regularizes_the_training_loss_only():
    model = adapt(build("audio"), "adalora", steps=9)
    with torch.no_grad():
        plain = build("audio")(**batch("audio")).loss
        assert torch.isclose(model.eval()(**batch("audio")).loss, plain)
        grams = [
            (p @ p.T if "lora_A" in name else p.T @ p) - torch.eye(min(p.shape))
            for name, p in model.named_parameters()
            if "lora_A" in name or "lora_B" in name
        ]
        expected = plain + 0.5 * torch.stack([gram.norm() for gram in grams]).mean()
        assert torch.isclose(model.train()(**batch("audio")).loss, expected)


def test_adalora_needs_the_length_of_the_run():
    with pytest.raises(MethodError, match="steps=None, try"):
        adapt(build("audio"), "adalora")
    with pytest.raises(MethodError, match="steps=9 and the run has 2"):
        train(adapt(build("audio"), "adalora", steps=9), "audio", steps=2)
    assert callbacks(adapt(build("audio"), "lora")) == []


def test_eva_gives_layers_different_ranks_and_directions_of_their_inputs():
    model = adapted("video", "eva", None)
    layers = [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    ranks = [layer.r["default"] for layer in layers]
    linears = sum(type(m) is nn.Linear for m in build("video").modules()) - 1
    assert len(set(ranks)) > 1 and sum(ranks) == 4 * linears
    for layer in layers:
        a = layer.lora_A["default"].weight
        assert torch.allclose(a @ a.T, torch.eye(len(a)), atol=1e-4)


def test_eva_says_what_batches_it_needs():
    with pytest.raises(MethodError, match="needs batches of model inputs"):
        adapt(build("dual"), "eva")
    with pytest.raises(MethodError, match=r"needs 32 rows .* has 8 in the first batch.*lower rank"):
        adapt(build("dual"), "eva", rank=16, batches=[batch("dual")])


@pytest.mark.parametrize("kind", ["video", "audio"])
def test_a_tied_head_is_untied_and_the_embeddings_stay(kind):
    model = adapt(build(kind), "head")
    embeddings = model.get_base_model().get_input_embeddings().weight
    before = embeddings.detach().clone()
    train(model, kind)
    (name,) = names(model)
    head = model.get_parameter(name)
    assert torch.equal(embeddings, before) and not embeddings.requires_grad
    assert head is not embeddings and not torch.equal(head, before)


@pytest.mark.parametrize("kind", MODELS)
def test_adapters_come_after_every_feed_forward(kind):
    model = adapted(kind, "adapter", None)
    places = {name.split(".bottleneck")[0].removeprefix("base_model.model.") for name in names(model)}
    assert {name.rpartition(".")[2] for name in places} <= {"fc2", "down_proj"}
    assert len(places) == {"video": 3, "audio": 2, "dual": 2}[kind]
    model = adapt(build(kind), "adapter", rank=3)
    assert {p.shape[0] for n, p in model.named_parameters() if n.endswith("default.down.weight")} == {3}


def test_what_can_not_be_reloaded_on_a_plain_base_says_so(tmp_path):
    adapted("audio", "adapter", None).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="bottleneck"):
        peft.PeftModel.from_pretrained(build("audio"), tmp_path / "adapter")
    adapted("audio", "pissa", "nf4").save_pretrained(tmp_path / "pissa")
    with pytest.raises(TypeError, match="PiSSA"):
        peft.PeftModel.from_pretrained(base_for("audio", "pissa", "nf4"), tmp_path / "pissa")


# What does not fit


@pytest.mark.parametrize("method", ["prefix", "prompt", "p-tuning"])
def test_virtual_tokens_fit_decoders_only(method):
    assert why_not(build("video"), method) == ""
    with pytest.raises(MethodError, match="this model starts from input_features"):
        adapt(build("audio"), method)
    with pytest.raises(MethodError, match="decoder-only"):
        adapt(build("dual"), method)


def test_a_width_like_the_vocabulary_would_mislead_peft():
    config = copy.deepcopy(_built("video").config)
    config.text_config.vocab_size = 64  # as many as the vision tower has channels
    model = tf.SmolVLMForConditionalGeneration(config)
    assert "patch_embedding.weight for the word embeddings" in why_not(model, "prompt")
    assert why_not(model, "prefix") == ""


@pytest.mark.parametrize(
    "method, options, message",
    [
        ("lara", {}, "use one of none, full.*did you mean 'lora'"),
        ("full", {"quant_type": "nf4"}, "can't be trained; on a quantized base use one of none, head, lora"),
        ("lora", {"quant_type": "int4"}, "none of None, 'nf4', 'fp4'"),
        ("lora", {"rank": 0}, "rank=0 for lora; expected at least 1"),
        ("ia3", {"rank": 4}, "ia3 has no rank"),
        ("lora", {"lora_alfa": 4}, "no setting 'lora_alfa'.*such as lora_alpha"),
        ("adapter", {"lora_alpha": 4}, "adapter has no setting 'lora_alpha'; it has none"),
        ("full", {"lora_alpha": 4}, "it has none"),
        ("dora", {"target_modules": ["q_proj", "fc3"]}, r"'fc3' matches no module of the model; what would: \['fc"),
        ("oft", {"oft_block_size": 0}, "PEFT refuses the settings"),
    ],
)
def test_what_is_wrong_is_named_with_what_would_fit(method, options, message):
    with pytest.raises(MethodError, match=message):
        adapt(build("audio"), method, **options)


def test_what_was_adapted_or_quantized_before_is_named():
    model = adapt(build("audio"), "lora")
    assert "adapters already" in why_not(model, "dora") and "adapters already" in why_not(
        model.base_model.model, "dora"
    )
    model = build("dual")
    mm.quantize(model, "nf4")
    assert "leave quant_type out" in why_not(model, "lora", "nf4")
    assert "load the model with quant_type=None" in why_not(model, "pissa")
    assert "in 16 or 32 bits" in why_not(model, "head")
    assert "can't be trained" in why_not(model, "full")
    with pytest.raises(MethodError, match="no list of blocks"):
        adapt(nn.Linear(2, 2), "adapter")


def test_targets_can_be_named():
    model = adapt(build("audio"), "lora", target_modules=["q_proj", "v_proj"], lora_alpha=3, rank=2)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in names(model)} == {"q_proj", "v_proj"}
    assert model.active_peft_config.lora_alpha == 3
