"""Refusals of the timeline, and what it must not mix up; that rows have their time is checked in `conformance.py`."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from architectures import ARCHITECTURES, AUDIO, IMAGE, VIDEO
from batches import batch, generate_inputs
from conformance import adapted, build, config
from peft import get_peft_model

import mmqlora as mm
from mmqlora.errors import GateError, TimelineError
from mmqlora.gates import TemporalLoraConfig
from mmqlora.regions import regions
from mmqlora.timeline import FAMILIES, Clock, Frames, Nothing, Positions, Stream, timekeeper

pytestmark = pytest.mark.filterwarnings("ignore")


def test_every_linear_of_every_family_has_a_rule():
    for name, make in ARCHITECTURES.items():
        with torch.device("meta"):
            model = make()
        if model.config.model_type in FAMILIES:
            family = FAMILIES[model.config.model_type](model.config, clip_frames=4)
            assert not [linear for linear in regions(model) if family.rule(linear) is None], name
            assert not [rule for _, rule in family.rules if isinstance(rule, Nothing) and rule.streams], name


def test_towers_outside_a_forward_pass_are_refused():
    model = adapted("SmolVLM", moved=True)
    given = batch("SmolVLM").inputs
    with torch.no_grad():
        model(**given)
        with pytest.raises(TimelineError, match="no video came"):
            model.get_base_model().model.get_image_features(given["pixel_values"])


def test_media_that_do_not_come_are_missed():
    model = adapted("SmolVLM")
    given = batch("SmolVLM").inputs
    features = torch.zeros(32, 64)
    with pytest.raises(TimelineError, match="video tokens, but no video"), torch.no_grad():
        model(**{**given, "pixel_values": None, "image_hidden_states": features})


def test_words_alone_are_plain_lora():
    model = adapted("SmolVLM", moved=True)
    ids = torch.randint(5, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        said = model(input_ids=ids).logits
        for name, parameter in model.named_parameters():
            if "lora_gate" in name:
                parameter.zero_()
        assert torch.equal(model(input_ids=ids).logits, said)


def test_tokens_are_asked_for():
    model = adapted("SmolVLM")
    given = batch("SmolVLM").inputs
    embeddings = model.get_input_embeddings()(given["input_ids"])
    given = {**given, "inputs_embeds": embeddings, "input_ids": None}
    with pytest.raises(TimelineError, match="input_ids"), torch.no_grad():
        model(**given)


def test_frames_without_clips_are_refused():
    model = build("CLIP")
    model = get_peft_model(model, TemporalLoraConfig(target_modules=r"vision_model\..*q_proj"))
    with pytest.raises(TimelineError, match="clip_frames"), torch.no_grad():
        model(**batch("CLIP").inputs)
    model = get_peft_model(build("CLIP"), TemporalLoraConfig(target_modules=r"vision_model\..*q_proj", clip_frames=3))
    with pytest.raises(TimelineError, match="divides 8"), torch.no_grad():
        model(**batch("CLIP").inputs)
    with pytest.raises(TimelineError, match="another adapter of this model has 3"):
        model.add_adapter("other", TemporalLoraConfig(target_modules=r"vision_model\..*q_proj", clip_frames=4))


@pytest.mark.parametrize("name", ["GIT", "VideoMAE", "X-CLIP"])
def test_clip_frames_is_no_advice_where_it_is_not_read(name):
    model, given = adapted(name), batch(name).inputs
    with pytest.raises(TimelineError, match=r"which clips\? Expected \(clips, frames, C, H, W\)\.$"), torch.no_grad():
        model(**{**given, "pixel_values": given["pixel_values"].flatten(0, 1)})


@pytest.mark.parametrize("name", ["CLIP", "X-CLIP"])
def test_features_alone_are_those_of_the_whole(name):
    model, given = adapted(name, moved=True), batch(name).inputs
    look = model.get_video_features if name == "X-CLIP" else model.get_image_features
    whole = model(**given)
    embeds = whole.video_embeds if name == "X-CLIP" else whole.image_embeds
    alone = look(given["pixel_values"]).pooler_output
    assert torch.allclose(alone / alone.norm(dim=-1, keepdim=True), embeds, rtol=1e-5, atol=1e-6)
    said = {key: given[key] for key in ("input_ids", "attention_mask")}
    text = model.get_text_features(**said).pooler_output
    look(pixel_values=batch(name, seed=1).inputs["pixel_values"])
    assert torch.equal(look(pixel_values=given["pixel_values"]).pooler_output, alone)
    with pytest.raises(TimelineError, match="no video came"):  # what comes later has no time of its own
        model.get_base_model().visual_projection(torch.zeros(8, 64))
    with pytest.raises(TimelineError, match="which clips"):
        look(pixel_values=torch.zeros(3, 3, 16, 16))
    with pytest.raises(TimelineError, match="no video came"):
        model.get_base_model().visual_projection(torch.zeros(8, 64))
    for key, parameter in model.named_parameters():
        if "lora_gate" in key:
            parameter.data.zero_()
    assert torch.equal(model.get_text_features(**said).pooler_output, text)  # words are plain LoRA
    assert not torch.equal(look(pixel_values=given["pixel_values"]).pooler_output, alone)


def test_features_alone_are_trained_with_checkpointing():
    pixels, gradients = batch("CLIP").inputs["pixel_values"], []
    for checkpointing in (False, True):
        model = adapted("CLIP", moved=True).train()
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        features = [model.get_image_features(pixel_values=x).pooler_output for x in (pixels, 0.1 * pixels.flip(0) ** 2)]
        sum(part.square().sum() for part in features).backward()
        gates = {key: gate for key, gate in model.named_parameters() if "lora_gate" in key}
        gradients.append({key: gate.grad for key, gate in gates.items() if gate.grad is not None})
    assert gradients[0]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_a_decoder_takes_only_the_encoder_output_that_is_known():
    model = adapted("Whisper", moved=True)
    given, other = batch("Whisper").inputs, batch("Whisper", seed=1).inputs
    base = model.get_base_model()
    start = {"decoder_input_ids": given["decoder_input_ids"]}
    with torch.no_grad():
        whole = model(input_features=given["input_features"], **start).logits
        encoded = base.get_encoder()(given["input_features"])
        assert torch.equal(model(encoder_outputs=encoded, **start).logits, whole)
        base.get_encoder()(other["input_features"])
        with pytest.raises(TimelineError, match="encoder's last run"):
            model(encoder_outputs=encoded, **start)


def test_a_layer_without_a_rule_is_refused():
    model = build("Whisper")
    keeper = timekeeper(model)
    keeper.family = type(keeper.family)(keeper.family.media, [(r"model\.encoder\.", Positions(("audio",)))])
    with pytest.raises(GateError, match=r"model\.decoder.* has no rule"):
        get_peft_model(model, config("Whisper", model))


def test_shapes_that_do_not_fit_name_the_layer():
    clock = Clock({"video": Stream(torch.zeros(2, 4, 1))}, width=1)
    assert clock.place(Frames(("video",)), "a", (8, 5, 64)).level.counts == (4, 4)
    with pytest.raises(TimelineError, match=r"layer\.b: an input of shape \(7, 5, 64\).*8 frames"):
        clock.place(Frames(("video",)), "layer.b", (7, 5, 64))
    with pytest.raises(TimelineError, match=r"no audio came"):
        clock.place(Positions(("audio",)), "layer.c", (2, 5, 64))


def test_generation_leaves_nothing_behind():
    model = adapted("SmolVLM", moved=True)
    given = batch("SmolVLM", seed=3).inputs
    with torch.no_grad():
        before = model(**given).loss
        model.generate(**generate_inputs("SmolVLM"))
        assert torch.equal(model(**given).loss, before)


def test_videos_are_captioned_without_a_prompt():
    model = adapted("GIT", moved=True)
    pixels = batch("GIT").inputs["pixel_values"]
    start = torch.full((len(pixels), 1), model.config.bos_token_id)
    for more in ({}, {"num_beams": 2}):
        more = {**more, "pixel_values": pixels, "max_new_tokens": 4, "do_sample": False}
        asked = {**more, "input_ids": start, "attention_mask": torch.ones_like(start)}
        assert torch.equal(model.generate(**more), model.generate(**asked))


def test_merged_frames_take_the_mean_of_their_signals():
    """ViViT's tokens stand for four frames each; its class token for none."""
    task = mm.benchmark.TASKS["retrieval/none"]
    model = task.load()
    keeper = timekeeper(model)
    keeper.want(["motion"])
    given = task.collate([task.train(0)[i] for i in range(2)])
    stream = keeper._read({"pixel_values": given["pixel_values"]})["video"]
    clock = Clock({"video": stream}, width=1)
    rule = keeper.family.rule("vision_model.layers.0.attention.q_proj")
    place = clock.place(rule, "q", (2, 97, 192))
    assert place.level.counts == (6, 6)
    assert torch.allclose(place.level.signals[:-1], stream.signals.reshape(12, 4, 1).mean(1), atol=1e-6)
    index = place.index
    assert (index[:, 0] == 12).all() and index[1, 1] == 6 and index[1, 96] == 11 and index[0, 17] == 1


def test_a_whisper_with_another_head_has_the_gates_of_the_whole():
    whole = ARCHITECTURES["Whisper"]()
    other = tf.WhisperForAudioClassification(whole.config).eval()
    other.encoder.load_state_dict(whole.model.encoder.state_dict())
    names = ["encoder.layers.0.fc1", "encoder.layers.1.self_attn.q_proj"]
    told = {"r": 4, "signals": ("flux", "speech"), "init_lora_weights": True}
    models = {
        prefix: get_peft_model(model, TemporalLoraConfig(**told, target_modules=[prefix + name for name in names]))
        for prefix, model in (("model.", whole), ("", other))
    }
    torch.manual_seed(1)
    for name, parameter in models[""].named_parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.3)
            twin = name.replace("base_model.model.encoder", "base_model.model.model.encoder")
            models["model."].get_parameter(twin).data.copy_(parameter.data)
    features = batch("Whisper").inputs["input_features"]
    heard = models["model."](input_features=features, decoder_input_ids=torch.ones(len(features), 1, dtype=torch.long))
    encoded = heard.encoder_last_hidden_state
    pooled = other.projector(encoded).mean(1)
    assert torch.allclose(models[""](input_features=features).logits, other.classifier(pooled), atol=1e-6)


def test_a_class_without_the_part_that_hears_is_refused():
    decoder = tf.WhisperForCausalLM(ARCHITECTURES["Whisper"]().config)
    with pytest.raises(TimelineError, match=r"WhisperForCausalLM has no model.encoder"):
        get_peft_model(decoder, TemporalLoraConfig(target_modules="all-linear"))
    assert not decoder._forward_pre_hooks and not decoder._forward_hooks


@pytest.mark.parametrize("steps", [4, 2])
def test_padding_is_no_neighbor(steps):
    signals = torch.randn(2, 4, 1, generator=torch.Generator().manual_seed(0))
    valid = torch.tensor([[True] * 4, [True, True, False, False]])
    level = Stream(signals, valid).level(steps)
    none = level.steps  # of no time
    first, short = level.around(3)[:steps], level.around(3)[steps : steps + steps // 2]
    assert first[0].tolist() == [none, 0, 1] and first[-1].tolist() == [steps - 2, steps - 1, none]
    assert short[0, 0] == none and short[-1, 2] == none


def test_tokens_behind_a_short_sound_have_no_time():
    """Gemma 3n has as many tokens for every sound; here four, of which 4 and 36 mel frames fill one and three."""
    model, given = adapted("Gemma3n"), batch("Gemma3n", sizes=(1, 3)).inputs
    base, seen = model.get_base_model(), []
    layer = base.model.language_model.layers[0].self_attn.q_proj
    variant, keeper = layer.lora_variant["default"], timekeeper(base)
    layer.register_forward_hook(lambda m, args, y: seen.append(keeper.clock.place(variant.rule, "q", args[0].shape)))
    with torch.no_grad():
        model(**given)
    heard = given["input_ids"] == base.config.audio_token_id
    timed = [seen[0].index[row][heard[row]] < seen[0].level.steps for row in (0, 1)]
    assert [row.tolist() for row in timed] == [[True, False, False, False], [True, True, True, False]]


def test_a_prompt_in_chunks_is_refused_and_one_half_cached_is_not():
    model, asked = adapted("SmolVLM", moved=True), generate_inputs("SmolVLM")
    with pytest.raises(TimelineError, match="of a prompt of"):
        model.generate(**asked, prefill_chunk_size=4)
    one = {key: value[:1] for key, value in asked.items() if isinstance(value, torch.Tensor)}
    one = {**one, "do_sample": False, "max_new_tokens": 4, "suppress_tokens": [IMAGE, VIDEO, AUDIO]}
    words = torch.randint(5, 200, (1, 3), generator=torch.Generator().manual_seed(0))
    one["input_ids"] = torch.cat([words, one["input_ids"]], 1)
    one["attention_mask"] = torch.cat([torch.ones_like(words), one["attention_mask"]], 1)
    with torch.no_grad():
        said = model.generate(**one)
        cache = model(input_ids=words, use_cache=True).past_key_values
        assert torch.equal(model.generate(**one, past_key_values=cache), said)
