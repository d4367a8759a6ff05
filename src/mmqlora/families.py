"""Where time is in each architecture: the table behind `timeline`.

A family says how to read the media of a forward pass and which rule places the rows of which Linear. Each that is in
the conformance table was checked by perturbation: noise on one step of one clip changes most the rows that the rule
gives to that step, in the first Linear of every part (`tests/conformance.py`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from .errors import TimelineError
from .timeline import (
    Arguments,
    Calls,
    Family,
    Folded,
    Frames,
    Joined,
    Nothing,
    Packed,
    Padded,
    Positions,
    Rule,
    Series,
    Stream,
    Tokens,
    family,
    frames,
    mel,
    packed,
    patches,
    stills,
    waves,
)

AUDIO, VIDEO, BOTH, SEEN = ("audio",), ("video",), ("video", "audio"), ("image", "video")
TEXT = Nothing()


def _id(config: Any, name: str) -> int:
    """The id of the tokens of a medium, which has two names in transformers."""
    value = getattr(config, f"{name}_token_id", None)
    return getattr(config, f"{name}_token_index", None) if value is None else value


# Audio


@family("whisper")
def _whisper(config: Any, **_: Any) -> Family:
    heard = Positions(AUDIO)
    return Family(
        {"audio": mel()},
        [(r"model\.encoder\.", heard), (r".*\.encoder_attn\.[kv]_proj$", heard), ("", TEXT)],
        entries=["model.encoder"],
    )


@family("moonshine")
def _moonshine(config: Any, **_: Any) -> Family:
    heard = Positions(AUDIO)
    return Family(
        {"audio": waves(64 * 3 * 2)},
        [(r"model\.encoder\.", heard), (r".*\.encoder_attn\.[kv]_proj$", heard), ("", TEXT)],
        entries=["model.encoder"],
    )


@family("wav2vec2", "wav2vec2-conformer", "hubert", "wavlm")
def _wav2vec2(config: Any, **_: Any) -> Family:
    place = Nothing(why="distances between positions, not positions")
    return Family(
        {"audio": waves(math.prod(config.conv_stride))}, [(r".*\.linear_pos$", place), ("", Positions(AUDIO))]
    )


@family("audio-spectrogram-transformer")
def _ast(config: Any, **_: Any) -> Family:
    steps = (config.max_length - config.patch_size) // config.time_stride + 1
    heard = Positions(AUDIO, steps=steps, before=2, inner=True)
    return Family(
        {"audio": mel("input_values", bands=2)}, [(r"(?!classifier)", heard), ("", Nothing(why="the pooled clip"))]
    )


@family("clap")
def _clap(config: Any, **_: Any) -> Family:
    audio = config.audio_config
    windows = Nothing(why="windows of an image into which time is folded")
    return Family(
        {"audio": mel(bands=3)},
        [
            (r"audio_model\..*\.(attention\.|downsample\.)", windows),
            (r"audio_model\.", Folded(AUDIO, pieces=audio.spec_size // audio.num_mel_bins)),
            (r"audio_projection\.", Nothing(why="the pooled clip")),
            ("", TEXT),
        ],
        entries=["audio_model"],
    )


@family("qwen2_audio", "audioflamingo3", "voxtral")
def _audio_language_model(config: Any, **_: Any) -> Family:
    mask = {"qwen2_audio": "feature_attention_mask", "audioflamingo3": "input_features_mask"}
    return Family(
        {"audio": mel(mask=mask.get(config.model_type, ""))},
        [
            (r"model\.(audio_tower|multi_modal_projector)\.", Positions(AUDIO)),
            (r"model\.language_model\.", Tokens(AUDIO, ids=(_id(config, "audio"),), runs=AUDIO)),
            ("lm_head", TEXT),
        ],
    )


# Video


@family("videomae", "vivit")
def _tubelets(config: Any, **_: Any) -> Family:
    tubelet = config.tubelet_size
    plain = config.model_type == "videomae"
    seen = Positions(VIDEO, stride=tubelet if plain else tubelet[0], before=0 if plain else 1)
    return Family({"video": frames()}, [(r"(?!classifier|.*pooler)", seen), ("", Nothing(why="the pooled clip"))])


@family("timesformer")
def _timesformer(config: Any, **_: Any) -> Family:
    block = r"timesformer\.encoder\.layer\.\d+\."
    return Family(
        {"video": frames()},
        [
            (block + r"attention\.", Frames(VIDEO)),
            (block + r"temporal_attention\.", Series(VIDEO)),
            (block + "temporal_dense", Positions(VIDEO, stride=1, inner=True)),
            (block, Positions(VIDEO, stride=1, before=1, inner=True)),
            ("", Nothing(why="the pooled clip")),
        ],
    )


@family("clip", "siglip")
def _clip(config: Any, clip_frames: int | None = None, **_: Any) -> Family:
    return Family(
        {"video": frames(clip=clip_frames or 0)},
        [(r"(vision_model|visual_projection)\b", Frames(VIDEO)), ("", TEXT)],
        entries=["vision_model"],
        methods=["get_image_features"],
    )


@family("xclip")
def _xclip(config: Any, **_: Any) -> Family:
    across = Positions(VIDEO, stride=1)
    return Family(
        {"video": frames()},
        [
            (r"vision_model\..*\.message_attn\.", across),
            (r"(vision_model|visual_projection)\b", Frames(VIDEO)),
            (r"mit\.", across),
            (
                r"prompts_generator\.",
                Nothing(why="in the generator of prompts: words, and patches that are averaged over the frames"),
            ),
            ("", TEXT),
        ],
        methods=["get_video_features"],
    )


@family("vision-text-dual-encoder")
def _dual_encoder(config: Any, **_: Any) -> Family:
    vision = config.vision_config
    if vision.model_type != "vivit":
        raise TimelineError(f"a dual encoder with {vision.model_type} has no known time; expected vivit")
    return Family(
        {"video": frames()},
        [(r"vision_model\.(?!pooler)", Positions(VIDEO, stride=vision.tubelet_size[0], before=1)), ("", TEXT)],
        entries=["vision_model"],
    )


@family("pe_video")
def _pe_video(config: Any, **_: Any) -> Family:
    return Family({"video": frames("pixel_values_videos")}, [*_pe_frames("video_encoder."), ("", TEXT)])


@family("pe_audio_video")
def _pe_audio_video(config: Any, **_: Any) -> Family:
    inside = "audio_video_encoder.embedder."
    dac = config.audio_video_config.audio_config.dac_config
    other = Nothing(why="a model that this one does not call")
    return Family(
        {
            "video": frames("pixel_values_videos"),
            "audio": waves(math.prod(dac.downsampling_ratios), mask="padding_mask"),
        },
        [
            (r"(audio|video)_model\.(text_model|audio_encoder|video_encoder)\.", other),
            *_pe_frames(inside + "video_encoder."),
            (re.escape(inside) + r"audio_encoder\.embedder\.", Positions(AUDIO)),
            (re.escape(inside) + r"audio_encoder\.", Positions(AUDIO, before=1)),
            (re.escape(inside), Positions(AUDIO)),  # frames are stretched to the steps of the sound
            (r"audio_video_encoder\.", Positions(AUDIO, before=1)),
            ("", TEXT),
        ],
    )


def _pe_frames(prefix: str) -> list[tuple[str, Rule]]:
    prefix = re.escape(prefix)
    return [
        (prefix + r"embedder\.vision_model\.", Padded(VIDEO)),
        (prefix + r"embedder\.", Positions(VIDEO, stride=1)),
        (prefix, Positions(VIDEO, stride=1, before=1)),
    ]


# Video and text


@family("git")
def _git(config: Any, **_: Any) -> Family:
    vision, tower = config.vision_config, "git.image_encoder"
    each = (vision.image_size // vision.patch_size) ** 2 + 1
    return Family(
        {"video": frames()},
        [
            (r"git\.image_encoder\.", Calls(VIDEO, tower)),
            (r"git\.visual_projection\.", Positions(VIDEO, stride=1)),
            (r"git\.encoder\.", Positions(VIDEO, each=each)),
            ("", TEXT),
        ],
        towers=[tower],
    )


@family("llava", "internvl")
def _images_as_frames(config: Any, **_: Any) -> Family:
    token = _id(config, "image")
    return Family(
        {"video": frames(token=token)},
        [
            (r"model\.(vision_tower|multi_modal_projector)\.", Frames(VIDEO)),
            (r"model\.language_model\.", Tokens(VIDEO, ids=(token,))),
            ("lm_head", TEXT),
        ],
    )


@family("smolvlm")
def _smolvlm(config: Any, **_: Any) -> Family:
    return Family(
        {"video": frames(drop_zeros=True)},
        [
            (r"model\.(vision_model|connector)\.", Frames(VIDEO)),
            (r"model\.text_model\.", Tokens(VIDEO, ids=(_id(config, "image"),))),
            ("lm_head", TEXT),
        ],
    )


@family("llava_onevision", "llava_next_video", "video_llava")
def _llava_video(config: Any, **_: Any) -> Family:
    kind = config.model_type
    towers = ["model.vision_tower", "model.multi_modal_projector"]
    after = 1 if kind == "llava_onevision" else 0  # a newline ends each video
    rules = [(rf"{re.escape(tower)}\.", Frames(SEEN, tower)) for tower in towers]
    images = "pixel_values"
    if kind == "video_llava":
        towers, images = towers[1:], "pixel_values_images"
        rules = [
            (r"model\.video_tower\.", Frames(VIDEO)),
            (r"model\.image_tower\.", Nothing(why="in the tower for images")),
            rules[1],
        ]
    return Family(
        {"image": stills(images), "video": frames("pixel_values_videos")},
        [
            *rules,
            (r"model\.language_model\.", Tokens(VIDEO, ids=(_id(config, "video"),), after=after)),
            ("lm_head", TEXT),
        ],
        towers=towers,
    )


@family("instructblipvideo")
def _instructblip_video(config: Any, **_: Any) -> Family:
    return Family(
        {"video": frames()},
        [
            (r"(vision_model|qformer|language_projection)\b", Frames(VIDEO)),
            (r".*lm_head", TEXT),
            (r"language_model\.", Tokens(VIDEO, ids=(_id(config, "video"),))),
        ],
    )


@family("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
def _qwen_vl(config: Any, **_: Any) -> Family:
    return Family(
        {"image": stills("pixel_values"), "video": packed()},
        [
            *_qwen_vision(config.vision_config),
            (
                r"model\.language_model\.",
                Tokens(VIDEO, ids=(_id(config, "video"),), merge=config.vision_config.spatial_merge_size**2),
            ),
            ("lm_head", TEXT),
        ],
        towers=["model.visual"],
    )


def _qwen_vision(vision: Any) -> list[tuple[str, Rule]]:
    tower, merge = "model.visual", vision.spatial_merge_size**2
    return [
        (r"model\.visual\.(deepstack_)?merger", Packed(SEEN, tower, merge=merge)),
        (r"model\.visual\.", Packed(SEEN, tower)),
    ]


@family("video_llama_3")
def _video_llama3(config: Any, **_: Any) -> Family:
    towers = ["model.vision_model", "model.projector"]

    def merged(arguments: Arguments, names: Sequence[str]) -> Stream | None:
        sizes = arguments.get("video_merge_sizes")
        if sizes is not None and bool((sizes != 2).any()):
            raise TimelineError(f"video_merge_sizes are {sizes.tolist()}; expected 2 for every video")
        return packed()(arguments, names)

    return Family(
        {"image": stills("pixel_values"), "video": merged},
        [
            (r"model\.vision_model\.", Packed(SEEN, towers[0])),
            (r"model\.projector\.", Packed(SEEN, towers[1], merge=4)),
            (r"model\.language_model\.", Tokens(VIDEO, ids=(_id(config, "video"),), merge=4)),
            ("lm_head", TEXT),
        ],
        towers=towers,
    )


# Video, audio and text


def _half(frames: int) -> int:
    return (frames - 1) // 2 + 1


def _quarter(frames: int) -> int:
    return (_half(frames) - 2) // 2 + 1


def _eighth(frames: int) -> int:
    return frames // 100 * 13 + -(-(frames % 100) // 8)


@family("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker")
def _omni(config: Any, **_: Any) -> Family:
    heard = [
        (r"model\.audio_tower\.proj$", Joined(AUDIO, rows=_quarter)),
        (r"model\.audio_tower\.", Joined(AUDIO, rows=_half)),
    ]
    if config.model_type == "qwen3_omni_moe_thinker":
        chunks = Nothing(why="chunks of 100 frames, padded")
        heard = [(r"model\.audio_tower\.conv_out$", chunks), (r"model\.audio_tower\.", Joined(AUDIO, rows=_eighth))]
    ids, merge = (_id(config, "video"), _id(config, "audio")), config.vision_config.spatial_merge_size**2
    return Family(
        {
            "image": stills("pixel_values"),
            "video": packed(),
            "audio": mel(mask="feature_attention_mask"),
        },
        [
            *heard,
            *_qwen_vision(config.vision_config),
            (r"model\.language_model\.", Tokens(BOTH, ids=ids, runs=AUDIO, merge=merge)),
            ("lm_head", TEXT),
        ],
        towers=["model.visual"],
    )


@family("gemma3n")
def _gemma3n(config: Any, **_: Any) -> Family:
    ids = (_id(config, "image"), _id(config, "audio"))
    return Family(
        {"video": frames(token=ids[0]), "audio": mel(bands=2, mask="input_features_mask")},
        [
            (r"model\.vision_tower\.", Frames(VIDEO)),
            (r"model\.audio_tower\..*\.pos_proj$", Nothing(why="distances between positions, not positions")),
            (r"model\.audio_tower\.", Positions(AUDIO)),
            (r"model\.embed_(vision|audio)\.", Nothing(why="also called for tokens that stand for no frame")),
            # As many tokens for every sound, most of which stand for nothing in a short one.
            (
                r"model\.language_model\.",
                Tokens(BOTH, ids=ids, runs=AUDIO, stride=_gemma3n_stride(config.audio_config)),
            ),
            ("lm_head", TEXT),
        ],
    )


def _gemma3n_stride(audio: Any) -> int:
    return math.prod(time for time, _ in audio.sscp_conv_stride_size) * audio.conf_reduction_factor


@family("gemma4")
def _gemma4(config: Any, **_: Any) -> Family:
    towers = ["model.vision_tower", "model.embed_vision"]
    ids = (_id(config, "video"), _id(config, "audio"))
    return Family(
        {
            "image": stills("pixel_values"),
            "video": patches("pixel_values_videos", "num_frames_per_video"),
            "audio": mel(bands=2, mask="input_features_mask"),
        },
        [
            (r"model\.vision_tower\.", Frames(SEEN, towers[0])),
            (r"model\.embed_vision\.", Frames(SEEN, towers[1], flat=True)),
            (r"model\.audio_tower\..*\.relative_k_proj$", Nothing(why="distances between positions, not positions")),
            (r"model\.(audio_tower|embed_audio)\.", Positions(AUDIO)),
            (r"model\.language_model\.", Tokens(BOTH, ids=ids, runs=AUDIO)),
            ("lm_head", TEXT),
        ],
        towers=towers,
    )
