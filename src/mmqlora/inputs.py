"""A batch for a model that we have never seen, from what its forward pass asks for.

A model of transformers says by the names of its arguments how it takes frames and sounds, by its configuration how
large they are, and by ``get_image_features`` and its kin how many tokens they become. That is enough to make up a
batch of any size, without a processor, a file or a weight. Its numbers mean nothing.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .errors import PlanError

__all__ = ["Sizes", "make_inputs"]

SAMPLING_RATE = 16_000
STAMP = 7  # tokens of a time stamp such as "<12.5 seconds>", which some models put before their frames


@dataclass(frozen=True)
class Sizes:
    """How much there is to see, hear and read.

    Args:
        frames: F, of each video.
        pixels: height and width of a frame; None takes what the configuration says, or 448.
        seconds: of each sound; models with a window, such as Whisper, have that whatever is said.
        tokens: of text, prompt and answer, beside those that stand for media.
        batch_size: B.
    """

    frames: int = 8
    pixels: int | None = None
    seconds: float = 30.0
    tokens: int = 128
    batch_size: int = 1

    def __post_init__(self) -> None:
        for name, least in (("frames", 1), ("tokens", 1), ("batch_size", 1), ("pixels", 1)):
            value = getattr(self, name)
            if value is not None and (value < least or value != int(value)):
                raise PlanError(f"{name}={value!r}: expected a whole number from {least} on.")
        if not 0 < self.seconds < math.inf:
            raise PlanError(f"seconds={self.seconds!r}: expected more than 0.")


def make_inputs(model: nn.Module, sizes: Sizes, features: Callable[..., Any] | None = None) -> dict[str, Any]:
    """Make up a batch of a model's kind, with labels.

    Example:
        >>> inputs = make_inputs(model, Sizes(frames=16, batch_size=2))  # doctest: +SKIP
        >>> {name: tuple(value.shape) for name, value in inputs.items()}  # doctest: +SKIP
        {'pixel_values': (2, 16, 3, 512, 512), 'input_ids': (2, 1152), ...}

    Args:
        model: a model of transformers without adapters; nothing of it is run but, where there are media tokens to
            count, its towers.
        sizes: how much of everything.
        features: what calls a method of the model by its name, for a model that is run in a special way.

    Returns:
        Keyword arguments of its forward pass. Frames and sounds are on the meta device.

    Raises:
        PlanError: the names of its arguments are not known here; the message lists them.
    """
    asks = set(inspect.signature(model.forward).parameters)
    maker = _Maker(model, sizes, asks, features or partial(_call, model))
    media = [part for part in (maker.vision(), maker.audio()) if part]
    if not media and "input_ids" not in asks:
        raise PlanError(
            f"{type(model).__name__} takes {', '.join(sorted(asks))}, of which no video, sound or text could be made; "
            "give `inputs`, a dictionary for its forward pass."
        )
    inputs: dict[str, Any] = {}
    for part in media:
        inputs |= part
    return inputs | maker.text()


class _Maker:
    def __init__(self, model: nn.Module, sizes: Sizes, asks: set[str], features: Any) -> None:
        self.model, self.config, self.sizes, self.asks, self.features = model, model.config, sizes, asks, features
        self.encodes = model.config.is_encoder_decoder
        self.width = getattr(self.config.get_text_config(), "hidden_size", 0)
        self.word = _word(model.config)
        self.block: list[int] = []  # tokens of the media of a sample

    # Frames

    def vision(self) -> dict[str, Any]:
        asks, config = self.asks, getattr(self.config, "vision_config", self.config)
        config = getattr(self.config, "video_config", config)
        if not asks & {"pixel_values", "pixel_values_videos"}:
            return {}
        sizes, names = self.sizes, "pixel_values_videos" if "pixel_values_videos" in asks else "pixel_values"
        if "video_grid_thw" in asks:
            return self._packed(config)
        if "video_position_ids" in asks:
            return self._positioned(config)
        side = self._side(config)
        frames = getattr(config, "num_frames", None) or sizes.frames  # a model made for so many takes no others
        channels = getattr(config, "num_channels", 3)
        clip = (frames, channels, side, side)
        stacked = names == "pixel_values_videos" or "pixel_attention_mask" in asks or "qformer_input_ids" in asks
        if stacked or hasattr(config, "num_frames") or self.config.model_type == "git":
            shape: tuple[int, ...] = (sizes.batch_size, *clip)
        else:
            shape = (sizes.batch_size * frames, *clip[1:])
        inputs: dict[str, Any] = {names: _empty(*shape)}
        if "qformer_input_ids" in asks:
            ids = torch.full((sizes.batch_size, sizes.tokens), self.word)
            inputs |= {"qformer_input_ids": ids, "qformer_attention_mask": torch.ones_like(ids)}
        if "padding_mask_videos" in asks:
            inputs["padding_mask_videos"] = torch.ones(sizes.batch_size, frames, dtype=torch.long)
        kinds = ["image", "video"]
        if names == "pixel_values_videos" or "qformer_input_ids" in asks:
            kinds.reverse()
        self._stand_for(kinds, inputs)
        return inputs

    def _side(self, config: Any) -> int:
        found = self.sizes.pixels or getattr(config, "image_size", None)
        inner = getattr(config, "vision_config", config)
        if found is None and getattr(inner, "model_args", None):  # of a model of timm
            found = inner.model_args.get("img_size")
        return (found if isinstance(found, int) else max(found)) if found else 448

    def _packed(self, config: Any) -> dict[str, Any]:
        """Patches of all videos in one row."""
        patch, merge = config.patch_size, getattr(config, "spatial_merge_size", 2)
        pair = getattr(config, "temporal_patch_size", 1)
        side = max(merge, (self.sizes.pixels or 448) // patch // merge * merge)
        steps = math.ceil(self.sizes.frames / pair)
        batch = self.sizes.batch_size
        channels = getattr(config, "in_channels", getattr(config, "in_chans", getattr(config, "num_channels", 3)))
        inputs: dict[str, Any] = {
            "pixel_values_videos": _empty(batch * steps * side * side, channels * pair * patch**2),
            "video_grid_thw": torch.tensor([[steps, side, side]] * batch),
        }
        for name in ("second_per_grid_ts", "video_second_per_grid"):
            if name in self.asks:
                inputs[name] = torch.ones(batch)
        if "video_merge_sizes" in self.asks:
            inputs["video_merge_sizes"] = torch.full((batch,), merge)
        start, end = _token(self.config, "vision_start"), _token(self.config, "vision_end")
        video = [_token(self.config, "video")] * ((side // merge) ** 2)
        if hasattr(config, "deepstack_visual_indexes") and "audio_feature_lengths" not in self.asks:
            block = ([self.word] * STAMP + [start, *video, end]) * steps
        else:
            block = [start, *video * steps, end]
        self.block += [token for token in block if token is not None]
        return inputs

    def _positioned(self, config: Any) -> dict[str, Any]:
        """Patches of each frame in a row, with their places."""
        patch, pool, frames = config.patch_size, config.pooling_kernel_size, self.sizes.batch_size * self.sizes.frames
        side = max(pool, (self.sizes.pixels or 448) // patch // pool * pool)
        rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        places = torch.stack([columns.flatten(), rows.flatten()], dim=-1)
        inputs = {
            "pixel_values_videos": _empty(frames, side**2, 3 * patch**2),
            "video_position_ids": places.expand(frames, -1, 2),
            "num_frames_per_video": torch.full((self.sizes.batch_size,), self.sizes.frames),
        }
        self._stand_for(["video"], inputs)
        return inputs

    # Sounds

    def audio(self) -> dict[str, Any]:
        asks, sizes = self.asks, self.sizes
        config = getattr(self.config, "audio_config", self.config)
        batch = sizes.batch_size
        if "input_features" in asks:
            window = getattr(config, "max_source_positions", None)
            varies = hasattr(config, "n_window") or not window
            length = round(100 * sizes.seconds) if varies else 2 * window
            bins = next(
                (getattr(config, n) for n in ("num_mel_bins", "input_feat_size", "feature_size") if hasattr(config, n)),
                128,
            )
            if hasattr(config, "spec_size"):  # CLAP folds a spectrogram into a square
                length = config.spec_size**2 // bins
                return {"input_features": _empty(batch, 1, length, bins)}
            last = "input_features_mask" in asks and not window
            inputs = {"input_features": _empty(batch, length, bins) if last else _empty(batch, bins, length)}
            for name in asks & {"feature_attention_mask", "input_features_mask"}:
                mask = torch.zeros(batch, length, dtype=torch.long)
                mask[:, : min(length, round(100 * sizes.seconds))] = 1
                inputs[name] = mask.bool() if last else mask
            if "input_ids" in asks and not self.encodes:
                self._stand_for(["audio"], inputs)
            return inputs
        if "input_values" not in asks:
            return {}
        if hasattr(config, "max_length") and hasattr(config, "num_mel_bins") and hasattr(config, "time_stride"):
            return {"input_values": _empty(batch, config.max_length, config.num_mel_bins)}
        samples = round(SAMPLING_RATE * sizes.seconds)
        mask = torch.ones(batch, samples, dtype=torch.long)
        if "padding_mask" in asks:
            return {"input_values": _empty(batch, 1, samples), "padding_mask": mask}
        return {"input_values": _empty(batch, samples), "attention_mask": mask}

    # Text

    def _stand_for(self, kinds: list[str], media: Mapping[str, Any]) -> None:
        """Put as many tokens into the text as the media have features."""
        for kind in kinds:
            token = _token(self.config, kind)
            if token is None:
                continue
            if count := getattr(self.config, f"{kind}_soft_tokens_per_image", None) if kind == "audio" else None:
                self.block += [token] * count  # what a sound lacks is made up for
                return
            owners = (self.model, getattr(self.model, "model", None))
            if not any(hasattr(owner, f"get_{kind}_features") for owner in owners):
                # Qwen2-Audio and its kin halve the mel frames twice, of those that hold sound.
                mask = media.get("feature_attention_mask")
                length = int(media[next(iter(media))].shape[-1] if mask is None else mask[0].sum())
                self.block += [token] * (((length - 1) // 2 + 1 - 2) // 2 + 1)
                return
            rows = self._rows(f"get_{kind}_features", media)
            self.block += [token] * (rows // self.sizes.batch_size)
            return

    def _rows(self, method: str, media: Mapping[str, Any]) -> int:
        found = self.features(method, **media)
        for name in ("pooler_output", "last_hidden_state"):
            found = getattr(found, name, found) if not isinstance(found, (Tensor, tuple, list)) else found
        parts = found if isinstance(found, (tuple, list)) else [found]
        return sum(part.numel() for part in parts) // self.width

    def text(self) -> dict[str, Any]:
        asks, sizes, batch = self.asks, self.sizes, self.sizes.batch_size
        if self.encodes and "labels" in asks and "input_ids" not in asks:
            return {"labels": torch.full((batch, sizes.tokens), self.word)}
        if "input_ids" not in asks:
            if hasattr(self.config, "ctc_loss_reduction"):
                return {"labels": (torch.arange(sizes.tokens) % 30 + 1).expand(batch, -1)}
            return {"labels": torch.zeros(batch, dtype=torch.long)}
        rows = batch if "labels" in asks else self._texts()
        ids = torch.tensor([self.word] + self.block + [self.word] * max(1, sizes.tokens - 1)).expand(rows, -1).clone()
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "mm_token_type_ids" in asks:
            types = torch.zeros_like(ids)
            for number, kind in enumerate(("image", "video", "audio"), start=1):
                types[ids == _token(self.config, kind)] = number
            inputs["mm_token_type_ids"] = types
        if "token_type_ids" in asks and "mm_token_type_ids" not in asks and hasattr(self.config, "boi_token_index"):
            inputs["token_type_ids"] = (ids == _token(self.config, "image")).long()
        return inputs | ({"labels": ids.clone()} if "labels" in asks else {"return_loss": True})

    def _texts(self) -> int:
        """Captions of a dual encoder: one for each image, or for each clip where it knows clips."""
        config = getattr(self.config, "vision_config", None)
        clips = config is None or hasattr(config, "num_frames") or hasattr(self.config, "video_config")
        return self.sizes.batch_size * (1 if clips else self.sizes.frames)


def _word(config: Any) -> int:
    """A token that stands for nothing in particular."""
    taken = {0, 1, 2}
    for part in (config, config.get_text_config()):
        names = [name for name in vars(part) if re.search(r"_token_(id|index)$", name)]
        taken |= {value for name in names if isinstance(value := getattr(part, name), int)}
    return next(number for number in range(3, 3 + len(taken) + 1) if number not in taken)


def _call(model: nn.Module, method: str, **media: Any) -> Any:
    return getattr(model if hasattr(model, method) else model.model, method)(**media)


def _token(config: Any, kind: str) -> int | None:
    found = [getattr(config, f"{kind}_token_{ending}", None) for ending in ("id", "index")]
    return next((value for value in found if value is not None), None)


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")
