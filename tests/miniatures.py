"""Tiny models of the recipes' classes, saved with processors of the real classes, as `mmqlora.load` finds them.

Their tokenizers read letters, so that no vocabulary has to be downloaded.
"""

from __future__ import annotations

import copy
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from architectures import ARCHITECTURES, AUDIO, IMAGE, VIDEO, VOCABULARY
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast

SPECIALS = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3}


def letters(named: dict[str, int], specials: dict[str, int] = SPECIALS, **settings: Any) -> PreTrainedTokenizerFast:
    """A token a letter, and those that are named."""
    vocabulary = {**specials, **named}
    free = (number for number in range(VOCABULARY) if number not in vocabulary.values())
    vocabulary |= {letter: next(free) for letter in string.printable[:96] + "\n"}
    vocabulary |= {f"<unused{number}>": number for number in free}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=list(named),
        **settings,
    )


def changed(name: str, change: Callable[[Any], None]) -> PreTrainedModel:
    """One of `ARCHITECTURES` with another configuration."""
    model = ARCHITECTURES[name]()
    config = copy.deepcopy(model.config)
    change(config)
    torch.manual_seed(0)
    return type(model)(config).eval()


def ending(**settings: Any) -> PreTrainedTokenizerFast:
    """Letters, the end token after them; as in OpenAI's own tokenizers, everything from it on is special."""
    end = {"<eos>": 200, "<bos>": 201, "<pad>": 202, "<unk>": 203}
    tokenizer = letters({}, end, **settings)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 201), ("<eos>", 200)]
    )
    return tokenizer


def whisper() -> tuple[PreTrainedModel, Any]:
    def change(config: Any) -> None:
        config.max_source_positions, config.max_target_positions = 1500, 64
        config.eos_token_id, config.pad_token_id = 200, 202
        config.bos_token_id = config.decoder_start_token_id = 201

    return changed("Whisper", change), tf.WhisperProcessor(tf.WhisperFeatureExtractor(feature_size=16), ending())


def qwen2_audio() -> tuple[PreTrainedModel, Any]:
    def change(config: Any) -> None:
        config.audio_config.max_source_positions = 100

    extractor = tf.WhisperFeatureExtractor(feature_size=16, chunk_length=2)
    named = {"<|AUDIO|>": AUDIO, "<|audio_bos|>": 248, "<|audio_eos|>": 249}
    return changed("Qwen2-Audio", change), tf.Qwen2AudioProcessor(extractor, letters(named))


def clap() -> tuple[PreTrainedModel, Any]:
    extractor = tf.ClapFeatureExtractor(
        feature_size=16,
        sampling_rate=8000,
        hop_length=80,
        max_length_s=2,
        fft_window_size=256,
        frequency_max=3500,
        truncation="rand_trunc",
    )
    return ARCHITECTURES["CLAP"](), tf.ClapProcessor(extractor, letters({}, model_max_length=64))


def clip() -> tuple[PreTrainedModel, Any]:
    def change(config: Any) -> None:
        config.text_config.eos_token_id = 200  # a text is what its end has seen

    pictures = tf.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return changed("CLIP", change), tf.CLIPProcessor(pictures, ending(model_max_length=64))


def smolvlm() -> tuple[PreTrainedModel, Any]:
    side = {"longest_edge": 32}
    named = {"<image>": IMAGE, "<fake_token_around_image>": 247, "<global-img>": 248, "<end_of_utterance>": 249}
    pictures = tf.SmolVLMImageProcessor(size=side, max_image_size=side)
    videos = tf.SmolVLMVideoProcessor(
        size=side, max_image_size=side, video_sampling={"max_frames": 8, "fps": 1, "video_size": side}
    )
    return ARCHITECTURES["SmolVLM"](), tf.SmolVLMProcessor(pictures, letters(named), videos, image_seq_len=4)


CHAT = (
    "{% for message in messages %}{{ message.role }}:"
    "{% for part in message.content %}"
    "{% if part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def qwen2_5_vl() -> tuple[PreTrainedModel, Any]:
    model = ARCHITECTURES["Qwen2.5-VL"]()
    vision = model.config.vision_config
    patches = {"patch_size": vision.patch_size, "temporal_patch_size": vision.temporal_patch_size}
    patches |= {"merge_size": vision.spatial_merge_size, "min_pixels": 16 * 16, "max_pixels": 64 * 64}
    named = {"<|image_pad|>": IMAGE, "<|video_pad|>": VIDEO, "<|vision_start|>": 248, "<|vision_end|>": 249}
    processor = tf.Qwen2_5_VLProcessor(
        tf.Qwen2VLImageProcessor(**patches), letters(named), tf.Qwen2VLVideoProcessor(**patches), chat_template=CHAT
    )
    return model, processor


def llava_onevision() -> tuple[PreTrainedModel, Any]:
    side = {"height": 16, "width": 16}
    processor = tf.LlavaOnevisionProcessor(
        tf.LlavaOnevisionImageProcessor(size=side, image_grid_pinpoints=[[16, 16]]),
        letters({"<image>": IMAGE, "<video>": VIDEO}),
        tf.LlavaOnevisionVideoProcessor(size=side),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=CHAT.replace("<|vision_start|><|video_pad|><|vision_end|>", "<video>"),
    )
    return ARCHITECTURES["LLaVA-OneVision"](), processor


MINIATURES: dict[str, Callable[[], tuple[PreTrainedModel, Any]]] = {
    "openai/whisper-small.en": whisper,
    "Qwen/Qwen2-Audio-7B-Instruct": qwen2_audio,
    "laion/clap-htsat-unfused": clap,
    "openai/clip-vit-base-patch32": clip,
    "HuggingFaceTB/SmolVLM2-500M-Video-Instruct": smolvlm,
    "Qwen/Qwen2.5-VL-7B-Instruct": qwen2_5_vl,
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": llava_onevision,
}


def save(name: str, folder: Path) -> Path:
    """Save the miniature of a model as the hub would give it."""
    model, processor = MINIATURES[name]()
    place = folder / name
    model.save_pretrained(place)
    processor.save_pretrained(place)
    return place
