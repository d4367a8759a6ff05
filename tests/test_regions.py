"""Which Linear is vision, audio, fusion or text, as a person would say, and what nobody can say."""

from __future__ import annotations

import ast
import re
from fnmatch import fnmatchcase
from itertools import permutations

import pytest
import torch
import transformers as tf
from architectures import ARCHITECTURES, BERT, DECODER, PICTURE, TRANSFORMER
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from mmqlora.errors import RegionError
from mmqlora.regions import EXCEPTIONS, REGIONS, regions

# Written by hand from the models' source. The first pattern that matches a name decides.
LLAVA = {
    "model.vision_tower.*": "vision",
    "model.multi_modal_projector.*": "fusion",
    "model.language_model.*": "text",
    "lm_head": "text",
}
AUDIO_LLM = {
    "model.audio_tower.*": "audio",
    "model.multi_modal_projector.*": "fusion",
    "model.language_model.*": "text",
    "lm_head": "text",
}
SPEECH_SEQ2SEQ = {
    "model.encoder.*": "audio",
    "model.decoder.layers.*.encoder_attn.*": "fusion",
    "model.decoder.layers.*": "text",
    "proj_out": "text",
}
GEMMA = {
    "model.vision_tower.*": "vision",
    "model.audio_tower.*": "audio",
    "model.embed_vision.*": "fusion",
    "model.embed_audio.*": "fusion",
    "model.language_model.*": "text",
    "lm_head": "text",
}
EXPECTED = {
    "Whisper": SPEECH_SEQ2SEQ,
    "Moonshine": SPEECH_SEQ2SEQ,
    "Qwen2-Audio": AUDIO_LLM,
    "AudioFlamingo3": AUDIO_LLM,
    "Voxtral": AUDIO_LLM,
    "CLAP": {
        "audio_model.*": "audio",
        "text_model.*": "text",
        "audio_projection.*": "fusion",
        "text_projection.*": "fusion",
    },
    "wav2vec2 CTC": {"wav2vec2.*": "audio", "lm_head": "text"},
    "wav2vec2-conformer CTC": {"wav2vec2_conformer.*": "audio", "lm_head": "text"},
    "AST": {"audio_spectrogram_transformer.*": "audio", "classifier.dense": "audio"},
    "VideoMAE": {"videomae.*": "vision", "classifier": "vision"},
    "TimeSformer": {"timesformer.*": "vision", "classifier": "vision"},
    "CLIP": {
        "vision_model.*": "vision",
        "text_model.*": "text",
        "visual_projection": "fusion",
        "text_projection": "fusion",
    },
    "X-CLIP": {
        "vision_model.*.message_*": "vision",  # frames that exchange messages are still inside the vision tower
        "vision_model.*": "vision",
        "text_model.*": "text",
        "mit.*": "fusion",
        "prompts_generator.*": "fusion",
        "visual_projection": "fusion",
        "text_projection": "fusion",
    },
    "PE-video": {
        "video_encoder.embedder.vision_model.*": "vision",
        "video_encoder.*": "vision",
        "text_model.*": "text",
        "text_video_head.*": "fusion",
        "video_head.*": "fusion",
    },
    "PE-audio-video": {
        "text_model.*": "text",
        "audio_model.text_model.*": "text",
        "audio_model.audio_encoder.*": "audio",
        "audio_model.*_head.*": "fusion",
        "video_model.text_model.*": "text",
        "video_model.video_encoder.*": "vision",
        "video_model.*_head.*": "fusion",
        "audio_video_encoder.embedder.audio_encoder.*": "audio",
        "audio_video_encoder.embedder.video_encoder.*": "vision",
        "audio_video_encoder.*": "fusion",
        "*_head.*": "fusion",
    },
    "GIT": {
        "git.image_encoder.*": "vision",
        "git.visual_projection.*": "fusion",
        "git.encoder.*": "text",
        "output": "text",
    },
    "LLaVA": LLAVA,
    "LLaVA-Next-Video": LLAVA,
    "LLaVA-OneVision": LLAVA,
    "InternVL": LLAVA,
    "Video-LLaVA": {
        "model.video_tower.*": "vision",
        "model.image_tower.*": "vision",
        "model.multi_modal_projector.*": "fusion",
        "model.language_model.*": "text",
        "lm_head": "text",
    },
    "SmolVLM": {
        "model.vision_model.*": "vision",
        "model.connector.*": "fusion",
        "model.text_model.*": "text",
        "lm_head": "text",
    },
    "VideoLLaMA3": {
        "model.vision_model.*": "vision",
        "model.projector.*": "fusion",
        "model.language_model.*": "text",
        "lm_head": "text",
    },
    "InstructBLIP-video": {
        "vision_model.*": "vision",
        "qformer.*.crossattention.*": "fusion",
        "qformer.*": "fusion",
        "language_projection": "fusion",
        "language_model.lm_head": "text",
        "language_model.*": "text",
    },
    "Qwen2.5-VL": {
        "model.visual.blocks.*": "vision",
        "model.visual.merger.*": "fusion",
        "model.language_model.*": "text",
        "lm_head": "text",
    },
    "Qwen3-VL": {
        "model.visual.blocks.*": "vision",
        "model.visual.merger.*": "fusion",
        "model.visual.deepstack_merger_list.*": "fusion",
        "model.language_model.*": "text",
        "lm_head": "text",
    },
    "Qwen2.5-Omni thinker": {
        "model.audio_tower.proj": "fusion",
        "model.audio_tower.layers.*": "audio",
        "model.visual.blocks.*": "vision",
        "model.visual.merger.*": "fusion",
        "model.language_model.*": "text",
        "lm_head": "text",
    },
    "Qwen3-Omni thinker": {
        "model.audio_tower.proj1": "fusion",
        "model.audio_tower.proj2": "fusion",
        "model.audio_tower.conv_out": "audio",  # the last layer of the convolutional stem
        "model.audio_tower.layers.*": "audio",
        "model.visual.blocks.*": "vision",
        "model.visual.merger.*": "fusion",
        "model.visual.merger_list.*": "fusion",
        "model.language_model.*": "text",
        "lm_head": "text",
    },
    "Gemma3n": GEMMA,
    "Gemma4": GEMMA,
    "Llama": {"model.*": "text", "lm_head": "text"},
    "GPT-2": {"transformer.*": "text", "lm_head": "text"},
}
EXPERTS = "Qwen3-Omni thinker"


def build_on_meta(name: str) -> tf.PreTrainedModel:
    with torch.device("meta"):
        return ARCHITECTURES[name]()


def linear_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]


def build_for_peft(name: str) -> tf.PreTrainedModel:
    model = build_on_meta(name)
    if name == "PE-audio-video":
        # PEFT asks every model with tied weights for its token embedding, and this class does not implement the answer.
        model.get_input_embeddings = model.text_model.get_input_embeddings
    return model


def adapted_names(model: nn.Module, targets: str | list[str]) -> set[str]:
    """Let PEFT inject adapters, and return what it adapted."""
    wrapped = get_peft_model(model, LoraConfig(r=1, target_modules=targets), low_cpu_mem_usage=True)
    inside = wrapped.get_base_model().named_modules()
    return {name for name, module in inside if isinstance(module, BaseTunerLayer)}


def clip_vision() -> nn.Module:
    return tf.CLIPVisionModel(tf.CLIPVisionConfig(**PICTURE))


def clip_text() -> nn.Module:
    return tf.CLIPTextModel(tf.CLIPTextConfig(**BERT))


def llama() -> nn.Module:
    return tf.LlamaModel(tf.LlamaConfig(**DECODER))


def audio_encoder() -> nn.Module:
    return ARCHITECTURES["Whisper"]().model.encoder


def follow_printed_override(error: RegionError) -> dict[str, str]:
    """Return the overrides that the message of an error tells to type."""
    return ast.literal_eval(re.search(r"overrides=(\{.*\})\)", str(error)).group(1))


# The architectures


def test_every_architecture_has_an_expectation() -> None:
    assert ARCHITECTURES.keys() == EXPECTED.keys()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_regions_are_what_a_person_would_say(name: str) -> None:
    model = build_on_meta(name)
    found = regions(model)
    assert list(found) == linear_names(model)  # every one of them, once, in order
    used = set()
    for module, region in found.items():
        pattern = next((p for p in EXPECTED[name] if fnmatchcase(module, p)), None)
        assert pattern is not None, f"{module} is not expected at all"
        assert region == EXPECTED[name][pattern], module
        used.add(pattern)
    assert used == EXPECTED[name].keys()  # so that each region expected is really there


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_peft_adapts_exactly_the_region_and_changes_no_answer(name: str) -> None:
    plain = regions(build_for_peft(name))
    here = [region for region in REGIONS if plain.of(region)]
    targets = plain.pattern
    if name == EXPERTS:  # see the next test; PEFT maps the names of a dense MLP in the text to those of the experts
        here.remove("text")
        targets = plain.of
    for region in here:
        assert adapted_names(build_for_peft(name), targets(region)) == set(plain.of(region))
    wrapped = get_peft_model(build_for_peft(name), LoraConfig(r=1, target_modules=targets(*here)))
    assert regions(wrapped).rows == plain.rows


def test_peft_reduces_a_pattern_to_last_names_on_models_of_experts() -> None:
    # `Regions.pattern` says so and recommends the list; the day that PEFT honors the pattern, this fails.
    found = regions(build_on_meta(EXPERTS))
    assert adapted_names(build_on_meta(EXPERTS), found.pattern("audio")) > set(found.of("audio"))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_regions_partition_the_linears(name: str) -> None:
    model = build_on_meta(name)
    found = regions(model)
    parts = [found.of(region) for region in REGIONS]
    assert sorted(name for part in parts for name in part) == sorted(linear_names(model))
    parameters = sum(p.numel() for n in linear_names(model) for p in model.get_submodule(n).parameters())
    stored = sum(p.numel() * p.itemsize for n in linear_names(model) for p in model.get_submodule(n).parameters())
    table = found.summary()
    assert table["modules"].to_dict() == {
        region: len(part) for region, part in zip(REGIONS, parts, strict=True) if part
    }
    assert table["parameters"].sum() == parameters
    assert table["bytes"].sum() == stored
    assert table["share"].sum() == pytest.approx(1)


# Structure, not names


@settings(max_examples=30, deadline=None)
@given(names=st.lists(st.text("abcxyz_", min_size=1, max_size=8), min_size=4, max_size=4, unique=True))
def test_attribute_names_do_not_decide_about_towers(names: list[str]) -> None:
    model = nn.Module()
    with torch.device("meta"):
        towers = [clip_vision(), audio_encoder(), llama(), clip_text()]
    for name, tower in zip(names, towers, strict=True):
        model.add_module(name, tower)
    found = regions(model)
    for name, region in zip(names, ["vision", "audio", "text", "text"], strict=True):
        assert {r for module, r in found.items() if module.startswith(f"{name}.")} == {region}


@pytest.mark.parametrize("names", list(permutations(["vision_tower", "audio_tower", "language_model"])))
def test_misleading_names_do_not_mislead(names: tuple[str, ...]) -> None:
    with torch.device("meta"):
        model = nn.ModuleDict(dict(zip(names, [clip_vision(), audio_encoder(), llama()], strict=True)))
    found = regions(model)
    for name, region in zip(names, ["vision", "audio", "text"], strict=True):
        assert {r for module, r in found.items() if module.startswith(f"{name}.")} == {region}


def test_cross_attention_is_fusion_only_where_it_reads_another_tower() -> None:
    with torch.device("meta"):
        bart = tf.BartConfig(
            vocab_size=256,
            d_model=64,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_position_embeddings=32,
        )
        alone = tf.BartForConditionalGeneration(bart)
        # An encoder-decoder that is the language model of something larger reads its own encoder.
        inside = nn.ModuleDict({"eye": clip_vision(), "language": tf.BartForConditionalGeneration(bart)})
        reader = tf.VisionEncoderDecoderModel(
            encoder=tf.ViTModel(tf.ViTConfig(**PICTURE)), decoder=tf.BartForCausalLM(bart)
        )
    assert set(regions(alone).values()) == {"text"}
    assert {r for name, r in regions(inside).items() if name.startswith("language.")} == {"text"}
    found = regions(reader)
    decoder = {name: region for name, region in found.items() if name.startswith("decoder.")}
    assert {region for name, region in decoder.items() if ".encoder_attn." in name} == {"fusion"}
    assert {region for name, region in decoder.items() if ".encoder_attn." not in name} == {"text"}


def test_families_that_declare_the_same_for_encoder_and_decoder() -> None:
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    widths = {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 256}
    with torch.device("meta"):
        config = tf.Speech2TextConfig(**layers, **widths, d_model=64, conv_channels=64)
        speech2text = tf.Speech2TextForConditionalGeneration(config)
        config = tf.SpeechT5Config(
            **layers, **widths, hidden_size=64, conv_dim=(64,), conv_stride=(5,), conv_kernel=(10,)
        )
        speecht5 = tf.SpeechT5ForSpeechToText(config)
    for model, encoder, decoder in [
        (speech2text, "model.encoder.", "model.decoder."),
        (speecht5, "speecht5.encoder.", "speecht5.decoder."),
    ]:
        for name, region in regions(model).items():
            if name.startswith(encoder):
                assert region == "audio", name
            elif ".encoder_attn." in name:
                assert region == "fusion", name
            else:
                assert name.startswith(decoder) or name.endswith("lm_head")
                assert region == "text", name


def test_a_joint_may_be_a_model_that_declares_what_it_was_made_from() -> None:
    with torch.device("meta"):
        config = tf.Idefics2Config(
            vision_config=PICTURE,
            perceiver_config={"resampler_n_latents": 4, "resampler_depth": 1, "hidden_size": 64},
            text_config={"model_type": "mistral", **DECODER},
        )
        model = tf.Idefics2ForConditionalGeneration(config)
    found = regions(model)
    assert isinstance(model.model.connector.perceiver_resampler, tf.PreTrainedModel)
    assert {region for name, region in found.items() if ".connector." in name} == {"fusion"}


@pytest.mark.parametrize("pattern", [p for p in EXCEPTIONS if "Speech" not in p])
def test_every_exception_is_needed(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(EXCEPTIONS, pattern)

    def wrong(name: str) -> bool:
        try:
            return any(
                region != EXPECTED[name][next(p for p in EXPECTED[name] if fnmatchcase(module, p))]
                for module, region in regions(build_on_meta(name)).items()
            )
        except RegionError:
            return True

    assert any(wrong(name) for name in ARCHITECTURES)


def test_what_is_left_of_a_family_is_not_called_by_the_family() -> None:
    config = ARCHITECTURES["Whisper"]().config
    with torch.device("meta"):
        model = tf.WhisperForAudioClassification(config)
    assert set(regions(model).values()) == {"audio"}


def test_a_module_in_two_places_is_listed_once() -> None:
    with torch.device("meta"):
        tower = clip_vision()
    model = nn.ModuleDict({"teacher": nn.ModuleList([tower]), "student": nn.ModuleList([tower])})
    assert list(regions(model)) == linear_names(model)


# What nobody can say


class Mixed(nn.Module):
    """Two towers with a module between them whose name says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.eye = clip_vision()
        self.language = llama()
        # Inside of what has no name, a name means nothing: every attention has an output projection.
        self.stack = nn.ModuleDict({"fc": nn.Linear(64, 64), "output_projection": nn.Linear(64, 64)})
        self.score = nn.Linear(64, 64)


def test_unknown_modules_raise_with_the_override_to_type() -> None:
    with torch.device("meta"):
        model = Mixed()
    with pytest.raises(RegionError) as caught:
        regions(model)
    message = str(caught.value)
    assert message.startswith("This Mixed does not say where 3 of its ")
    assert 'mm.regions(model, overrides={r"stack\\..*": "fusion", r"score": "fusion"})' in message
    assert "eye" not in message and "language" not in message
    found = regions(model, overrides=follow_printed_override(caught.value))
    assert found.of("fusion") == ["stack.fc", "stack.output_projection", "score"]
    assert found["eye.encoder.layers.0.mlp.fc1"] == "vision"
    assert found["language.layers.0.mlp.up_proj"] == "text"


def test_a_module_of_which_a_part_is_placed_is_not_swallowed_by_the_printed_override() -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({"box": Mixed(), "plain": nn.Linear(64, 64)})
    with pytest.raises(RegionError) as caught:
        regions(model)
    printed = follow_printed_override(caught.value)
    assert list(printed) == [r"box\.stack\..*", r"box\.score", "plain"]
    assert regions(model, printed).of("vision")[0].startswith("box.eye.")


def test_a_linear_alone_has_no_region_until_it_is_given_one() -> None:
    with pytest.raises(RegionError) as caught:
        regions(nn.Linear(4, 4))
    assert regions(nn.Linear(4, 4), follow_printed_override(caught.value)) == {"": "fusion"}


def test_a_long_list_of_unknown_modules_is_cut() -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({f"part{i}": nn.Linear(64, 64) for i in range(30)})
    with pytest.raises(RegionError, match="and 18 more") as caught:
        regions(model)
    assert "part11" in str(caught.value) and "part12" not in str(caught.value)


class Undeclared(tf.PreTrainedModel):
    """A tower that says nothing; `PreTrainedModel` says "text" in its place."""

    config_class = tf.PreTrainedConfig

    def __init__(self, config: tf.PreTrainedConfig) -> None:
        super().__init__(config)
        self.patches = nn.Conv2d(3, 64, 8, 8)
        self.layer = nn.Linear(64, 64)


def test_a_tower_that_declares_nothing_is_not_text() -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({"first": Undeclared(tf.PreTrainedConfig()), "language": llama()})
    with pytest.raises(RegionError) as caught:
        regions(model)
    assert list(follow_printed_override(caught.value)) == [r"first\..*"]


def test_models_that_mix_inside_one_stack_or_read_pixels_bare_are_not_guessed() -> None:
    with torch.device("meta"):
        vilt = tf.ViltModel(tf.ViltConfig(**TRANSFORMER, image_size=16, patch_size=8, vocab_size=256))
        fuyu = tf.FuyuForCausalLM(
            tf.FuyuConfig(
                **TRANSFORMER, vocab_size=256, patch_size=8, text_config={"model_type": "persimmon", **TRANSFORMER}
            )
        )
    with pytest.raises(RegionError, match="This ViltModel does not say"):
        regions(vilt)
    with pytest.raises(RegionError, match="This FuyuForCausalLM does not say where 1 of its"):
        regions(fuyu)


def test_an_override_wins_over_the_rule_and_a_later_one_over_an_earlier() -> None:
    model = build_on_meta("LLaVA")
    tower = r"model\.vision_tower\..*"
    found = regions(model, overrides={tower: "audio", r".*\.fc1": "fusion"})
    assert found["model.vision_tower.encoder.layers.0.mlp.fc1"] == "fusion"
    assert found["model.vision_tower.encoder.layers.0.mlp.fc2"] == "audio"
    assert found["lm_head"] == "text"
    reverse = regions(model, overrides={r".*\.fc1": "fusion", tower: "audio"})
    assert reverse["model.vision_tower.encoder.layers.0.mlp.fc1"] == "audio"


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("vision_tower", "model.vision_tower.encoder.layers.0.self_attn.k_proj"),  # a part of names is not a name
        (r"lm_haed", "lm_head"),
        (r"model\.multi_modal_proj\.linear_1", "model.multi_modal_projector.linear_1"),
    ],
)
def test_an_override_that_matches_nothing_raises_with_near_names(pattern: str, near: str) -> None:
    with pytest.raises(RegionError, match="matches none of the") as caught:
        regions(build_on_meta("LLaVA"), overrides={pattern: "vision"})
    assert repr(pattern) in str(caught.value)
    assert repr(near) in str(caught.value)


def test_a_broken_pattern_and_an_unknown_region_raise() -> None:
    model = build_on_meta("LLaVA")
    with pytest.raises(RegionError, match="no regular expression"):
        regions(model, overrides={"*": "vision"})
    for ask in (lambda: regions(model, {".*": "visual"}), lambda: regions(model).of("visual")):
        with pytest.raises(RegionError, match=r"'visual' is no region.*'vision', 'audio', 'fusion', 'text'"):
            ask()


# Wrapped and quantized models


def test_peft_wrappers_of_whole_modules_are_seen_through() -> None:
    plain = regions(build_on_meta("LLaVA"))
    config = LoraConfig(r=1, target_modules="all-linear", modules_to_save=["lm_head", "multi_modal_projector"])
    wrapped = get_peft_model(build_on_meta("LLaVA"), config)
    assert regions(wrapped).rows == plain.rows
    wrapped.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]))
    assert regions(wrapped).rows == plain.rows


def test_bits_and_sizes_are_those_of_the_weight_before_packing() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = ARCHITECTURES["LLaVA"]().to(torch.bfloat16)
    before = {row.name: row for row in regions(model).rows}
    assert {row.bits for row in before.values()} == {16}
    up, down = "model.vision_tower.encoder.layers.0.mlp.fc1", "model.vision_tower.encoder.layers.0.mlp.fc2"
    model.set_submodule(up, bnb.nn.Linear4bit(64, 128, compute_dtype=torch.bfloat16, quant_type="nf4").to("cpu"))
    model.set_submodule(down, bnb.nn.Linear8bitLt(128, 64, has_fp16_weights=False))
    assert model.get_submodule(up).weight.shape == (64 * 128 // 2, 1)  # packed, or this test shows nothing
    table = regions(model)
    after = {row.name: row for row in table.rows}
    assert after[up][:5] == (up, "vision", (128, 64), 64 * 128 + 128, 4)
    assert after[up].bytes == 64 * 128 // 2 + 128 * model.get_submodule(up).bias.itemsize
    assert after[down].bits == 8
    assert {name for name in after if after[name] != before[name]} == {up, down}
    assert table.summary().loc["vision", "bits"] == "4/8/16"
    assert table.summary().loc["text", "bits"] == "16"


def test_conv1d_is_reported_as_outputs_by_inputs() -> None:
    rows = {row.name: row for row in regions(build_on_meta("GPT-2")).rows}
    assert rows["transformer.h.0.attn.c_attn"].shape == (3 * 64, 64)
    assert rows["transformer.h.0.attn.c_attn"].parameters == 3 * 64 * 64 + 3 * 64


# The table and the pattern


def test_the_table_prints_what_it_holds() -> None:
    found = regions(build_on_meta("SmolVLM"))
    for text in (str(found), repr(found), found._repr_html_()):
        assert re.findall(r"\b(?:vision|audio|fusion|text)\b(?!-)", text) == ["vision", "fusion", "text"]
        assert str(len(found.of("vision"))) in text
    assert "<table" in found._repr_html_()


def test_a_pattern_writes_layer_numbers_as_digits() -> None:
    pattern = regions(build_on_meta("Whisper")).pattern("fusion")
    names = "|".join(
        rf"model\.decoder\.layers\.\d+\.encoder_attn\.{p}" for p in ("k_proj", "v_proj", "q_proj", "out_proj")
    )
    assert pattern == names


def test_a_pattern_is_exact_where_digits_would_reach_another_region() -> None:
    def build() -> nn.Module:
        with torch.device("meta"):
            return nn.ModuleList([clip_vision(), clip_text()])  # the same names but for the first number

    found = regions(build())
    for region in ("vision", "text"):
        assert adapted_names(build(), found.pattern(region)) == set(found.of(region))


def test_a_pattern_is_exact_where_digits_would_reach_what_is_no_linear() -> None:
    def build() -> nn.Module:
        with torch.device("meta"):
            return nn.ModuleDict({"net": nn.Sequential(nn.Linear(64, 64), nn.Conv2d(3, 3, 1), nn.Linear(64, 64))})

    found = regions(build(), overrides={r"net\..*": "vision"})
    assert adapted_names(build(), found.pattern("vision")) == {"net.0", "net.2"}


def test_a_pattern_of_a_region_that_is_not_there_raises() -> None:
    found = regions(build_on_meta("LLaVA"))
    assert found.of("audio") == []
    with pytest.raises(RegionError, match="No module is audio; this model has: vision, fusion, text"):
        found.pattern("audio")
