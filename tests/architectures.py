"""Tiny models of the real transformers classes, with random weights, built offline in a fraction of a second.

Each is the smallest configuration that still has every part of its architecture. Widths are multiples of 64 (one
bitsandbytes block) wherever the class allows it, so that every model here can also be quantized.

    for name, build in ARCHITECTURES.items():
        model = build()                       # on the CPU, in eval mode, the same weights every time
        with torch.device("meta"):
            skeleton = build()                # no weights at all

Inputs that fit a model belong right below its builder.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import transformers as tf
from transformers import PreTrainedModel

Build = Callable[[], PreTrainedModel]
ARCHITECTURES: dict[str, Build] = {}

VOCABULARY = 256
IMAGE, VIDEO, AUDIO = 250, 251, 252  # the token ids that stand for media


def architecture(name: str) -> Callable[[Build], Build]:
    """Register a builder; what it builds has seeded weights and is in eval mode."""

    def register(build: Build) -> Build:
        @functools.wraps(build)
        def seeded() -> PreTrainedModel:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                return build().eval()

        ARCHITECTURES[name] = seeded
        return seeded

    return register


# Parts that many architectures share. `layers` is spelled in each dialect that transformers has.

WIDTH = {"hidden_size": 64, "intermediate_size": 128}
TRANSFORMER = {**WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = {**TRANSFORMER, **SPECIAL, "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 512}
PICTURE = {**TRANSFORMER, "image_size": 16, "patch_size": 8}
BERT = {**TRANSFORMER, **SPECIAL, "vocab_size": VOCABULARY, "max_position_embeddings": 128}
WHISPER_ENCODER = {
    "d_model": 64,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 128,
    "num_mel_bins": 16,
    "max_source_positions": 20,
}
LOUD = 0.1  # standard deviation of weights; with 0.02 some losses depend on the media by less than float32 tells
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}


def qwen2(**kwargs: object) -> dict[str, object]:
    return {"model_type": "qwen2", **DECODER, **kwargs}


def llama(**kwargs: object) -> dict[str, object]:
    return {"model_type": "llama", **DECODER, **kwargs}


def clip_vision(**kwargs: object) -> dict[str, object]:
    return {"model_type": "clip_vision_model", **PICTURE, **kwargs}


def siglip_vision(**kwargs: object) -> dict[str, object]:
    return {"model_type": "siglip_vision_model", **PICTURE, "vision_use_head": False, **kwargs}


# Audio and text


@architecture("Whisper")
def whisper() -> PreTrainedModel:
    return tf.WhisperForConditionalGeneration(
        tf.WhisperConfig(
            **WHISPER_ENCODER,
            **SPECIAL,
            vocab_size=VOCABULARY,
            decoder_layers=2,
            decoder_attention_heads=2,
            decoder_ffn_dim=128,
            max_target_positions=32,
            decoder_start_token_id=1,
            init_std=LOUD,
        )
    )


@architecture("Moonshine")
def moonshine() -> PreTrainedModel:
    return tf.MoonshineForConditionalGeneration(
        tf.MoonshineConfig(
            **WIDTH,
            **SPECIAL,
            vocab_size=VOCABULARY,
            encoder_num_hidden_layers=2,
            decoder_num_hidden_layers=2,
            encoder_num_attention_heads=2,
            decoder_num_attention_heads=2,
        )
    )


@architecture("Qwen2-Audio")
def qwen2_audio() -> PreTrainedModel:
    return tf.Qwen2AudioForConditionalGeneration(
        tf.Qwen2AudioConfig(
            audio_config={"model_type": "qwen2_audio_encoder", **WHISPER_ENCODER},
            text_config=qwen2(),
            audio_token_index=AUDIO,
        )
    )


@architecture("AudioFlamingo3")
def audio_flamingo3() -> PreTrainedModel:
    return tf.AudioFlamingo3ForConditionalGeneration(
        tf.AudioFlamingo3Config(
            audio_config={
                "model_type": "audioflamingo3_encoder",
                **TRANSFORMER,
                "num_mel_bins": 16,
                "max_source_positions": 20,
            },
            text_config=qwen2(),
            audio_token_id=AUDIO,
        )
    )


@architecture("Voxtral")
def voxtral() -> PreTrainedModel:
    # The projector stacks 4 tokens of the encoder, so its input width is the encoder's intermediate size.
    return tf.VoxtralForConditionalGeneration(
        tf.VoxtralConfig(
            audio_config={
                "model_type": "voxtral_encoder",
                **TRANSFORMER,
                "intermediate_size": 256,
                "num_mel_bins": 16,
                "max_source_positions": 20,
            },
            text_config=llama(),
            audio_token_id=AUDIO,
        )
    )


@architecture("CLAP")
def clap() -> PreTrainedModel:
    return tf.ClapModel(
        tf.ClapConfig(
            text_config={**BERT, "projection_dim": 64},
            audio_config={
                "window_size": 4,
                "num_mel_bins": 16,
                "spec_size": 64,
                "patch_size": 4,
                "patch_stride": [4, 4],
                "patch_embeds_hidden_size": 64,
                "hidden_size": 128,  # the width doubles from each stage of a Swin tower to the next
                "depths": [2, 2],
                "num_attention_heads": [2, 4],
                "num_hidden_layers": 2,
                "projection_dim": 64,
            },
            projection_dim=64,
        )
    )


# Audio


def wav2vec2_widths() -> dict[str, object]:
    return {
        **TRANSFORMER,
        **SPECIAL,
        "vocab_size": 64,
        "conv_dim": (64, 64),
        "conv_kernel": (10, 3),
        "conv_stride": (5, 2),
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 2,
    }


@architecture("wav2vec2 CTC")
def wav2vec2_ctc() -> PreTrainedModel:
    return tf.Wav2Vec2ForCTC(tf.Wav2Vec2Config(**wav2vec2_widths()))


@architecture("wav2vec2-conformer CTC")
def wav2vec2_conformer_ctc() -> PreTrainedModel:
    return tf.Wav2Vec2ConformerForCTC(tf.Wav2Vec2ConformerConfig(**wav2vec2_widths(), conv_depthwise_kernel_size=7))


@architecture("AST")
def ast() -> PreTrainedModel:
    return tf.ASTForAudioClassification(
        tf.ASTConfig(
            **TRANSFORMER,
            patch_size=8,
            frequency_stride=8,
            time_stride=8,
            max_length=32,
            num_mel_bins=16,
            num_labels=64,
        )
    )


# Vision


@architecture("VideoMAE")
def videomae() -> PreTrainedModel:
    return tf.VideoMAEForVideoClassification(
        tf.VideoMAEConfig(**PICTURE, num_frames=4, tubelet_size=2, num_labels=64),
    )


@architecture("TimeSformer")
def timesformer() -> PreTrainedModel:
    return tf.TimesformerForVideoClassification(tf.TimesformerConfig(**PICTURE, num_frames=4, num_labels=64))


# Vision and text: dual encoders


@architecture("CLIP")
def clip() -> PreTrainedModel:
    return tf.CLIPModel(tf.CLIPConfig(text_config=BERT, vision_config=PICTURE, projection_dim=64))


@architecture("X-CLIP")
def xclip() -> PreTrainedModel:
    return tf.XCLIPModel(
        tf.XCLIPConfig(
            text_config=BERT,
            vision_config={
                **PICTURE,
                "mit_hidden_size": 64,
                "mit_intermediate_size": 128,
                "mit_num_attention_heads": 2,
                "num_frames": 4,
            },
            projection_dim=64,
            prompt_num_attention_heads=2,
        )
    )


PE_ENCODER = {**TRANSFORMER, "num_key_value_heads": 2, "head_dim": 32}
PE_TEXT = {
    "model_type": "modernbert",
    **TRANSFORMER,
    **SPECIAL,
    "cls_token_id": 3,
    "sep_token_id": 4,
    "vocab_size": 256,
}


def pe_video_encoder() -> dict[str, object]:
    vision = {
        "model_type": "timm_wrapper",
        "architecture": "vit_pe_core_tiny_patch16_384",
        "model_args": {"img_size": 16, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2},
        "num_labels": 64,
    }
    return {"model_type": "pe_video_encoder", "vision_config": vision, **PE_ENCODER}


def pe_audio_encoder() -> dict[str, object]:
    dac = {
        "model_type": "dac",
        "encoder_hidden_size": 16,
        "downsampling_ratios": [2, 2],
        "codebook_dim": 64,
        "decoder_hidden_size": 64,
        "n_codebooks": 2,
        "codebook_size": 64,
    }
    return {"model_type": "pe_audio_encoder", "dac_config": dac, **PE_ENCODER}


def with_scale(model: PreTrainedModel) -> PreTrainedModel:
    """Set the scales of similarities, which start at 0 and make the loss a constant."""
    for name, parameter in model.named_parameters():
        if name.endswith("logit_scale"):
            torch.nn.init.ones_(parameter)
    return model


@architecture("PE-video")
def pe_video() -> PreTrainedModel:
    return with_scale(tf.PeVideoModel(tf.PeVideoConfig(text_config=PE_TEXT, video_config=pe_video_encoder())))


@architecture("PE-audio-video")
def pe_audio_video() -> PreTrainedModel:
    return with_scale(
        tf.PeAudioVideoModel(
            tf.PeAudioVideoConfig(
                text_config=PE_TEXT,
                audio_video_config={
                    "model_type": "pe_audio_video_encoder",
                    "audio_config": pe_audio_encoder(),
                    "video_config": pe_video_encoder(),
                    **PE_ENCODER,
                },
            )
        )
    )


# Vision and text: language models that see


@architecture("GIT")
def git() -> PreTrainedModel:
    return tf.GitForCausalLM(tf.GitConfig(**BERT, vision_config=PICTURE, num_image_with_embedding=4))


@architecture("LLaVA")
def llava() -> PreTrainedModel:
    return tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(vision_config=clip_vision(), text_config=llama(), image_token_index=IMAGE, image_seq_length=4)
    )


@architecture("LLaVA-Next-Video")
def llava_next_video() -> PreTrainedModel:
    return tf.LlavaNextVideoForConditionalGeneration(
        tf.LlavaNextVideoConfig(
            vision_config=clip_vision(),
            text_config=llama(),
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            image_grid_pinpoints=[[16, 16]],
            image_seq_length=4,
            video_seq_length=1,
        )
    )


@architecture("LLaVA-OneVision")
def llava_onevision() -> PreTrainedModel:
    return tf.LlavaOnevisionForConditionalGeneration(
        tf.LlavaOnevisionConfig(
            vision_config=siglip_vision(),
            text_config=qwen2(),
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            image_grid_pinpoints=[[16, 16]],
        )
    )


@architecture("Video-LLaVA")
def video_llava() -> PreTrainedModel:
    return tf.VideoLlavaForConditionalGeneration(
        tf.VideoLlavaConfig(
            vision_config=clip_vision(),
            text_config=llama(),
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            image_seq_length=4,
        )
    )


@architecture("InternVL")
def internvl() -> PreTrainedModel:
    return tf.InternVLForConditionalGeneration(
        tf.InternVLConfig(
            vision_config={**PICTURE, "image_size": [16, 16], "patch_size": [4, 4]},
            text_config=qwen2(),
            image_token_id=IMAGE,
            image_seq_length=4,
        )
    )


@architecture("SmolVLM")
def smolvlm() -> PreTrainedModel:
    return tf.SmolVLMForConditionalGeneration(
        tf.SmolVLMConfig(
            vision_config={**PICTURE, "image_size": 32}, text_config=llama(), image_token_id=IMAGE, scale_factor=2
        )
    )


@architecture("VideoLLaMA3")
def video_llama3() -> PreTrainedModel:
    return tf.VideoLlama3ForConditionalGeneration(
        tf.VideoLlama3Config(
            vision_config={**TRANSFORMER, "patch_size": 8},
            text_config=qwen2(),
            image_token_id=IMAGE,
            video_token_id=VIDEO,
        )
    )


@architecture("InstructBLIP-video")
def instructblip_video() -> PreTrainedModel:
    return tf.InstructBlipVideoForConditionalGeneration(
        tf.InstructBlipVideoConfig(
            vision_config={**PICTURE, "initializer_range": LOUD},  # the default is 1e-10: it would see nothing
            qformer_config={**BERT, "encoder_hidden_size": 64},
            text_config={
                "model_type": "opt",
                **SPECIAL,
                "vocab_size": VOCABULARY,
                "hidden_size": 64,
                "word_embed_proj_dim": 64,
                "ffn_dim": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "max_position_embeddings": 128,
            },
            num_query_tokens=4,
            video_token_index=VIDEO,
        )
    )


QWEN_VISION = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": 8,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}


@architecture("Qwen2.5-VL")
def qwen2_5_vl() -> PreTrainedModel:
    return tf.Qwen2_5_VLForConditionalGeneration(
        tf.Qwen2_5_VLConfig(
            text_config={**DECODER, "rope_parameters": MROPE},
            vision_config={**QWEN_VISION, "window_size": 32, "fullatt_block_indexes": [1]},
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            vision_start_token_id=248,
            vision_end_token_id=249,
        )
    )


@architecture("Qwen3-VL")
def qwen3_vl() -> PreTrainedModel:
    return tf.Qwen3VLForConditionalGeneration(
        tf.Qwen3VLConfig(
            text_config={**DECODER, "head_dim": 32, "rope_parameters": MROPE},
            vision_config={**QWEN_VISION, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            vision_start_token_id=248,
            vision_end_token_id=249,
        )
    )


# Vision, audio and text


@architecture("Qwen2.5-Omni thinker")
def qwen2_5_omni_thinker() -> PreTrainedModel:
    return tf.Qwen2_5OmniThinkerForConditionalGeneration(
        tf.Qwen2_5OmniThinkerConfig(
            audio_config={**WHISPER_ENCODER, "n_window": 10, "output_dim": 64, "initializer_range": LOUD},
            vision_config={**QWEN_VISION, "window_size": 32, "fullatt_block_indexes": [1]},
            text_config={**DECODER, "rope_parameters": MROPE},
            audio_token_index=AUDIO,
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            audio_start_token_id=247,
            audio_end_token_id=246,
            vision_start_token_id=248,
            vision_end_token_id=249,
        )
    )


@architecture("Qwen3-Omni thinker")
def qwen3_omni_thinker() -> PreTrainedModel:
    return tf.Qwen3OmniMoeThinkerForConditionalGeneration(
        tf.Qwen3OmniMoeThinkerConfig(
            audio_config={
                **WHISPER_ENCODER,
                "n_window": 50,  # its lengths are computed for chunks of 100 mel frames, whatever the window is
                "output_dim": 64,
                "downsample_hidden_size": 32,
                "initializer_range": LOUD,
            },
            vision_config={**QWEN_VISION, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
            text_config={
                **DECODER,
                "head_dim": 32,
                "num_experts": 2,
                "num_experts_per_tok": 1,
                "moe_intermediate_size": 64,
                "mlp_only_layers": [0],  # one dense layer, one of experts
                "rope_parameters": MROPE,
            },
            audio_token_id=AUDIO,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            audio_start_token_id=247,
            vision_start_token_id=248,
            vision_end_token_id=249,
        )
    )


@architecture("Gemma3n")
def gemma3n() -> PreTrainedModel:
    return tf.Gemma3nForConditionalGeneration(
        tf.Gemma3nConfig(
            text_config={
                **DECODER,
                "intermediate_size": [128, 128],
                "head_dim": 32,
                "vocab_size_per_layer_input": VOCABULARY,
                "hidden_size_per_layer_input": 64,
                "num_kv_shared_layers": 0,
                "layer_types": ["sliding_attention", "full_attention"],
                "activation_sparsity_pattern": [0.0, 0.0],
            },
            vision_config={
                # The real tower, MobileNetV5, has 300M parameters and no smaller configuration.
                "architecture": "vit_pe_core_tiny_patch16_384",
                # It has no class token either: there must be as many tokens as patches.
                "model_args": {
                    "img_size": 16,
                    "patch_size": 8,
                    "embed_dim": 64,
                    "depth": 2,
                    "num_heads": 2,
                    "class_token": False,
                    "global_pool": "avg",
                },
                "hidden_size": 64,
                "vocab_offset": 224,  # each medium's tokens have a vocabulary of their own; the last ends the whole
                "vocab_size": AUDIO - 224,
            },
            audio_config={
                "hidden_size": 64,
                "input_feat_size": 16,
                "conf_num_attention_heads": 2,
                "conf_num_hidden_layers": 2,
                "sscp_conv_channel_size": [16, 16],
                "vocab_offset": AUDIO,
                "vocab_size": VOCABULARY - AUDIO,
            },
            image_token_id=IMAGE,
            audio_token_id=AUDIO,
            boi_token_id=248,
            eoi_token_id=249,
            boa_token_id=246,
            eoa_token_id=247,
            vision_soft_tokens_per_image=4,
            audio_soft_tokens_per_image=4,
        )
    )


@architecture("Gemma4")
def gemma4() -> PreTrainedModel:
    return tf.Gemma4ForConditionalGeneration(
        tf.Gemma4Config(
            text_config={
                **DECODER,
                "head_dim": 32,
                "vocab_size_per_layer_input": VOCABULARY,
                "hidden_size_per_layer_input": 64,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            vision_config={
                **TRANSFORMER,
                "num_key_value_heads": 2,
                "head_dim": 32,
                "patch_size": 8,
                "position_embedding_size": 64,
                "pooling_kernel_size": 2,
            },
            audio_config={
                "hidden_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "subsampling_conv_channels": [16, 16],
                "output_proj_dims": 64,
            },
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            audio_token_id=AUDIO,
            boi_token_id=248,
            eoi_token_id=249,
            boa_token_id=246,
            eoa_token_index=247,
        )
    )


# Text


@architecture("Llama")
def llama_text() -> PreTrainedModel:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER))


@architecture("GPT-2")
def gpt2() -> PreTrainedModel:
    # Its Linears are transformers' Conv1D, whose weight is the transpose.
    return tf.GPT2LMHeadModel(
        tf.GPT2Config(
            vocab_size=VOCABULARY, n_positions=128, n_embd=64, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2
        )
    )
