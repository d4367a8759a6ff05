"""Inputs for the tiny models of `architectures`: clips in time, with the step of every part of them known.

    model = ARCHITECTURES["Qwen2.5-VL"]()
    one = batch("Qwen2.5-VL", sizes=(4, 2))       # two samples: four frames, and two
    loss = model(**one.inputs).loss
    other = model(**one.perturb(0, 3)).loss       # only the last frame of the first sample is another

No processor is used: every tensor is built by hand, small, and the same for the same seed. A *step* is the finest unit
of time that a model is given: a video frame, a mel frame, or as many samples of a waveform as the convolutions stride.
A *size* is what `batch` counts clips in: one video frame, or as many steps of audio as the builder says, so that
``sizes=(4, 4)`` fills the fixed windows of models such as Whisper.

Left out are Llama and GPT-2, which read text only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from architectures import AUDIO, IMAGE, VIDEO
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Inputs = dict[str, Any]
Spot = Callable[[Tensor, int, int], Tensor]  # (input, sample, step) -> the view of the input that holds that step

PAD, BOS, EOS = 0, 1, 2
AUDIO_END, AUDIO_START, VISION_START, VISION_END = 246, 247, 248, 249
FIRST_WORD, LAST_WORD = 5, 200  # what words are drawn from; ids from 224 on stand for something else in some model
MEL_BINS = 16


@dataclass(frozen=True)
class Batch:
    """Keyword arguments of a model, and where in them every step of every sample lies.

    Attributes:
        inputs: for ``model(**inputs)``; the result has a ``loss``.
        lengths: "video" or "audio" to the number of steps of each sample, at the model's input resolution.
        spots: the same keys to the name of the input that holds the steps, and the view of one of them.
    """

    inputs: Inputs
    lengths: dict[str, list[int]]
    spots: dict[str, tuple[str, Spot]]

    @property
    def media(self) -> str:
        """Such as "video", "audio" or "video+audio"."""
        return "+".join(self.lengths)

    @property
    def steps(self) -> list[int]:
        """The number of steps of each sample, of the first medium if there are two."""
        return next(iter(self.lengths.values()))

    def perturb(self, sample: int, step: int, medium: str | None = None) -> Inputs:
        """A copy of the inputs with noise on one step of one sample; the medium is the first one by default."""
        medium = medium or next(iter(self.lengths))
        if not 0 <= step < self.lengths[medium][sample]:
            raise IndexError(f"sample {sample} has {self.lengths[medium][sample]} steps of {medium}, no step {step}")
        name, view = self.spots[medium]
        changed = self.inputs[name].clone()
        spot = view(changed, sample, step)
        noise = torch.Generator().manual_seed(1000 * sample + step)
        spot += 3 * torch.randn(spot.shape, generator=noise)
        return {**self.inputs, name: changed}


@dataclass
class Request:
    """What a builder is asked for, and the random numbers and texts to make it of."""

    sizes: tuple[int, ...]
    seed: int = 0
    mixed: bool = False
    prompt: bool = False  # nothing after the prompt, and no labels: for `generate`
    random: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.random = torch.Generator().manual_seed(self.seed)

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random)

    def words(self, count: int, last: int = LAST_WORD) -> list[int]:
        return torch.randint(FIRST_WORD, last, (count,), generator=self.random).tolist()

    def clips(self, side: int = 16) -> list[Tensor]:
        """The frames of every sample: (F, 3, side, side)."""
        return [self.noise(size, 3, side, side) for size in self.sizes]

    def stacked(self, side: int = 16) -> Tensor:
        """Clips as (B, F, 3, side, side); those without any frame are left out."""
        return torch.stack([clip for clip in self.clips(side) if len(clip)])

    def mels(self, unit: int) -> list[Tensor]:
        """The mel frames of every sample: (T, M)."""
        return [self.noise(size * unit, MEL_BINS) for size in self.sizes]

    def text(self, media: Sequence[Sequence[int]]) -> Inputs:
        """Tokens: the media of each sample, a prompt, an answer that is trained; the samples are of unequal length."""
        ids, labels = [], []
        for index, tokens in enumerate(media):
            if self.mixed and index % 2:  # here the image follows the video; elsewhere it is the other way round
                prompt = [BOS, *self.words(2 + 2 * index), *tokens, *self.words(1)]
            else:
                prompt = [BOS, *tokens, *self.words(2 + 2 * index)]
            answer = [] if self.prompt else [*self.words(3 + index), EOS]
            ids.append(torch.tensor(prompt + answer))
            labels.append(torch.tensor([-100] * len(prompt) + answer))
        side = "left" if self.prompt else "right"
        mask = pad_sequence([torch.ones_like(row) for row in ids], True, 0, side)
        inputs = {"input_ids": pad_sequence(ids, True, PAD, side), "attention_mask": mask}
        return inputs if self.prompt else {**inputs, "labels": pad_sequence(labels, True, -100, side)}

    def captions(self, count: int | None = None) -> Inputs:
        """One text a sample (or ``count`` texts), of unequal length, for a contrastive loss."""
        rows = [torch.tensor([BOS, *self.words(3 + i % 3), EOS]) for i in range(count or len(self.sizes))]
        mask = pad_sequence([torch.ones_like(row) for row in rows], True)
        return {"input_ids": pad_sequence(rows, True, PAD), "attention_mask": mask, "return_loss": True}

    def spoken(self) -> Inputs:
        """What the decoder of a speech recognizer reads and should say."""
        if self.prompt:
            return {}
        heads = [[BOS, *self.words(1 + i)] for i in range(len(self.sizes))]
        tails = [[*self.words(3 + i), EOS] for i in range(len(self.sizes))]
        both = list(zip(heads, tails, strict=True))
        decoder = [torch.tensor((head + tail)[:-1]) for head, tail in both]
        labels = [torch.tensor([-100] * (len(head) - 1) + tail) for head, tail in both]
        mask = pad_sequence([torch.ones_like(row) for row in decoder], True)
        return {
            "decoder_input_ids": pad_sequence(decoder, True, PAD),
            "decoder_attention_mask": mask,
            "labels": pad_sequence(labels, True, -100),
        }

    def classes(self, count: int = 64) -> Inputs:
        return {"labels": torch.randint(count, (len(self.sizes),), generator=self.random)}


Builder = Callable[[Request], Batch]
BATCHES: dict[str, Callable[..., Batch]] = {}
GENERATIVE: set[str] = set()
UNEQUAL: set[str] = set()  # clips of unequal length in one batch
MIXED: set[str] = set()  # images beside videos


def batches(
    name: str,
    *,
    unequal: bool = False,
    mixed: bool = False,
    generates: bool = False,
    fixed: int | None = None,
    most: int | None = None,
    even: bool = False,
) -> Callable[[Builder], Builder]:
    """Register the builder of an architecture's batches, and what may be asked of it.

    Args:
        name: as in `ARCHITECTURES`.
        unequal: clips may differ in length.
        mixed: images may lie beside videos.
        generates: the model has a ``generate`` that reads the media.
        fixed: the only size there is.
        most: the largest size.
        even: sizes are multiples of 2.
    """
    GENERATIVE.update([name] if generates else [])
    UNEQUAL.update([name] if unequal else [])
    MIXED.update([name] if mixed else [])

    def register(build: Builder) -> Builder:
        @functools.wraps(build)
        def checked(
            *, sizes: Sequence[int] = (4, 4), seed: int = 0, mixed: bool = False, prompt: bool = False
        ) -> Batch:
            if mixed and name not in MIXED:
                raise ValueError(f"{name} takes no images beside videos")
            clips = [size for size in sizes if size or not mixed]
            if not clips or min(clips) < 1:
                raise ValueError(f"sizes={tuple(sizes)}: expected at least 1 (0 is no video, in a mixed batch)")
            if name not in UNEQUAL and len(set(clips)) > 1:
                raise ValueError(f"{name} takes no clips of unequal length in one batch, sizes={tuple(sizes)}")
            if fixed and set(clips) != {fixed}:
                raise ValueError(f"{name} takes clips of size {fixed} only, sizes={tuple(sizes)}")
            if most and max(clips) > most:
                raise ValueError(f"{name} takes clips of size {most} at most, sizes={tuple(sizes)}")
            if even and any(size % 2 for size in clips):
                raise ValueError(f"{name} reads frames in pairs, sizes={tuple(sizes)}")
            return build(Request(tuple(sizes), seed, mixed, prompt))

        BATCHES[name] = checked
        return build

    return register


def batch(name: str, *, sizes: Sequence[int] = (4, 4), seed: int = 0, mixed: bool = False) -> Batch:
    """A batch for one architecture, with a loss.

    Args:
        name: a key of `BATCHES`.
        sizes: of the clip of each sample; see the top of this file.
        seed: the same seed, the same batch.
        mixed: put an image into every sample too, before the video or behind it. A size of 0 is then no video at all.

    Raises:
        ValueError: the family does not allow these sizes, or no images beside videos.
    """
    return BATCHES[name](sizes=sizes, seed=seed, mixed=mixed)


def generate_inputs(name: str, *, sizes: Sequence[int] = (4, 4), seed: int = 0) -> Inputs | None:
    """Arguments for ``model.generate``: media and a prompt, padded on the left; None where nothing is generated."""
    if name not in GENERATIVE:
        return None
    inputs = BATCHES[name](sizes=sizes, seed=seed, prompt=True).inputs
    return {**inputs, "max_new_tokens": 4, "do_sample": False}


# Where a step lies. `rows` are those of an input in which samples follow each other without padding.


def padded(tensor: Tensor, sample: int, step: int) -> Tensor:
    """(B, T, ...)."""
    return tensor[sample, step]


def columns(tensor: Tensor, sample: int, step: int) -> Tensor:
    """(B, M, T)."""
    return tensor[sample, :, step]


def one_channel(tensor: Tensor, sample: int, step: int) -> Tensor:
    """(B, 1, T, M)."""
    return tensor[sample, 0, step]


def waveform(stride: int) -> Spot:
    """(..., samples), as many to a step as the convolutions stride."""

    def view(tensor: Tensor, sample: int, step: int) -> Tensor:
        return tensor[sample, ..., step * stride : (step + 1) * stride]

    return view


def concatenated(sizes: Sequence[int]) -> Spot:
    """(sum of F, ...)."""
    return lambda tensor, sample, step: tensor[sum(sizes[:sample]) + step]


def stacked_without_empty(sizes: Sequence[int]) -> Spot:
    """(B, F, ...), of the samples that have a clip."""
    return lambda tensor, sample, step: tensor[sum(size > 0 for size in sizes[:sample]), step]


def lengths_mask(lengths: Sequence[int]) -> Tensor:
    """1 where a sample has something, 0 behind it."""
    return pad_sequence([torch.ones(length, dtype=torch.long) for length in lengths], True)


# Audio


@batches("Whisper", fixed=4, generates=True)
def whisper(ask: Request) -> Batch:
    mels = ask.mels(10)
    inputs = {"input_features": torch.stack(mels).transpose(1, 2), **ask.spoken()}
    return Batch(inputs, {"audio": [len(mel) for mel in mels]}, {"audio": ("input_features", columns)})


def waves(ask: Request, stride: int, unit: int = 4) -> tuple[Inputs, dict[str, list[int]], dict[str, tuple[str, Spot]]]:
    """Waveforms of ``unit`` steps a size, with their mask; the parts of a `Batch`."""
    steps = [size * unit for size in ask.sizes]
    clips = [ask.noise(count * stride) for count in steps]
    inputs = {
        "input_values": pad_sequence(clips, True),
        "attention_mask": lengths_mask([len(clip) for clip in clips]),
    }
    return inputs, {"audio": steps}, {"audio": ("input_values", waveform(stride))}


@batches("Moonshine", unequal=True, generates=True)
def moonshine(ask: Request) -> Batch:
    inputs, lengths, spots = waves(ask, stride=64 * 3 * 2)
    return Batch({**inputs, **ask.spoken()}, lengths, spots)


@batches("wav2vec2 CTC", unequal=True)
@batches("wav2vec2-conformer CTC", unequal=True)
def wav2vec2(ask: Request) -> Batch:
    inputs, lengths, spots = waves(ask, stride=5 * 2)
    labels = [torch.tensor([10 + i, *range(20, 22 + i % 2)]) for i in range(len(ask.sizes))]  # no two alike in a row
    return Batch({**inputs, "labels": pad_sequence(labels, True, -100)}, lengths, spots)


@batches("AST", fixed=4)
def ast(ask: Request) -> Batch:
    mels = ask.mels(8)
    inputs = {"input_values": torch.stack(mels), **ask.classes()}
    return Batch(inputs, {"audio": [len(mel) for mel in mels]}, {"audio": ("input_values", padded)})


@batches("CLAP", most=4)
def clap(ask: Request) -> Batch:
    """Four quarters of 64 mel frames, which the model folds into a picture, one above another."""
    mels = ask.mels(64)
    inputs = {"input_features": torch.stack(mels)[:, None], **ask.captions()}
    return Batch(inputs, {"audio": [len(mel) for mel in mels]}, {"audio": ("input_features", one_channel)})


# Audio and text. Each of these towers halves the mel frames, and then again, or stacks four.


@batches("Qwen2-Audio", unequal=True, most=4, generates=True)
def qwen2_audio(ask: Request) -> Batch:
    return heard(ask, "feature_attention_mask", tokens=lambda length: ((length - 1) // 2 + 1 - 2) // 2 + 1)


@batches("AudioFlamingo3", unequal=True, most=4, generates=True)
def audio_flamingo3(ask: Request) -> Batch:
    return heard(ask, "input_features_mask", tokens=lambda length: ((length - 1) // 2 + 1 - 2) // 2 + 1)


@batches("Voxtral", fixed=4, generates=True)
def voxtral(ask: Request) -> Batch:
    return heard(ask, None, tokens=lambda length: length // 8)


def heard(ask: Request, mask: str | None, tokens: Callable[[int], int]) -> Batch:
    """A window of 40 mel frames, the first of which are real, and a token for some of them each."""
    mels = ask.mels(10)
    lengths = [len(mel) for mel in mels]
    features = torch.zeros(len(mels), MEL_BINS, 40)
    for row, mel in zip(features, mels, strict=True):
        row[:, : len(mel)] = mel.T
    inputs = {"input_features": features, **ask.text([[AUDIO] * tokens(length) for length in lengths])}
    if mask:
        inputs[mask] = (torch.arange(40) < torch.tensor(lengths)[:, None]).long()
    return Batch(inputs, {"audio": lengths}, {"audio": ("input_features", columns)})


# Vision


@batches("VideoMAE", fixed=4)
@batches("TimeSformer", fixed=4)
def video_classifier(ask: Request) -> Batch:
    inputs = {"pixel_values": ask.stacked(), **ask.classes()}
    return Batch(inputs, {"video": list(ask.sizes)}, {"video": ("pixel_values", padded)})


# Vision and text: dual encoders


@batches("CLIP", unequal=True)
def clip(ask: Request) -> Batch:
    """Frames are images, each with a caption; only the caller knows which of them are one clip."""
    inputs = {"pixel_values": torch.cat(ask.clips()), **ask.captions(sum(ask.sizes))}
    return Batch(inputs, {"video": list(ask.sizes)}, {"video": ("pixel_values", concatenated(ask.sizes))})


@batches("X-CLIP", fixed=4)
def xclip(ask: Request) -> Batch:
    inputs = {"pixel_values": ask.stacked(), **ask.captions()}
    return Batch(inputs, {"video": list(ask.sizes)}, {"video": ("pixel_values", padded)})


@batches("PE-video", unequal=True)
def pe_video(ask: Request) -> Batch:
    inputs = {
        "pixel_values_videos": pad_sequence(ask.clips(), True),
        "padding_mask_videos": lengths_mask(ask.sizes),
        **ask.captions(),
    }
    return Batch(inputs, {"video": list(ask.sizes)}, {"video": ("pixel_values_videos", padded)})


@batches("PE-audio-video", unequal=True)
def pe_audio_video(ask: Request) -> Batch:
    video = pe_video(ask)
    audio, lengths, spots = waves(ask, stride=2 * 2)
    inputs = {**video.inputs, "input_values": audio["input_values"][:, None], "padding_mask": audio["attention_mask"]}
    return Batch(inputs, {**video.lengths, **lengths}, {**video.spots, **spots})


# Vision and text: language models to which every frame is an image


@batches("GIT", fixed=4, generates=True)
def git(ask: Request) -> Batch:
    """The frames stand before the text without any token for them in it."""
    inputs = {"pixel_values": ask.stacked(), **ask.text([[]] * len(ask.sizes))}
    return Batch(inputs, {"video": list(ask.sizes)}, {"video": ("pixel_values", padded)})


@batches("LLaVA", unequal=True, generates=True)
@batches("InternVL", unequal=True, generates=True)
def frames_as_images(ask: Request) -> Batch:
    inputs = {"pixel_values": torch.cat(ask.clips()), **ask.text([[IMAGE] * 4 * size for size in ask.sizes])}
    return Batch(inputs, {"video": list(ask.sizes)}, {"video": ("pixel_values", concatenated(ask.sizes))})


@batches("SmolVLM", unequal=True, generates=True)
def smolvlm(ask: Request) -> Batch:
    """Frames that a clip lacks are zeros, which the model drops before its tower."""
    inputs = {
        "pixel_values": pad_sequence(ask.clips(side=32), True),
        **ask.text([[IMAGE] * 4 * size for size in ask.sizes]),
    }
    return Batch(inputs, {"video": list(ask.sizes)}, {"video": ("pixel_values", padded)})


# Vision and text: language models that know videos


def seen(ask: Request, frame: int, end: int = 0, image: int = 0) -> tuple[Inputs, list[list[int]]]:
    """Stacked videos, and the tokens of each sample: ``frame`` a frame, ``end`` a video, ``image`` an image."""
    media = []
    for index, size in enumerate(ask.sizes):
        video = [VIDEO] * (frame * size + end if size else 0)
        picture = [IMAGE] * image * ask.mixed
        media.append([*video, *picture] if index % 2 else [*picture, *video])
    return {"pixel_values_videos": ask.stacked()}, media


def stacked_videos(ask: Request, inputs: Inputs) -> Batch:
    return Batch(
        inputs,
        {"video": list(ask.sizes)},
        {"video": ("pixel_values_videos", stacked_without_empty(ask.sizes))},
    )


@batches("LLaVA-Next-Video", mixed=True, generates=True)
def llava_next_video(ask: Request) -> Batch:
    inputs, media = seen(ask, frame=1, image=4 + 2 * (2 + 1))  # the whole image, then its tile with newlines
    return stacked_videos(ask, {**inputs, **anyres_images(ask), **ask.text(media)})


@batches("LLaVA-OneVision", mixed=True, generates=True)
def llava_onevision(ask: Request) -> Batch:
    inputs, media = seen(ask, frame=1, end=1, image=4 + 2 * (2 + 1))
    return stacked_videos(ask, {**inputs, **anyres_images(ask), **ask.text(media)})


def anyres_images(ask: Request) -> Inputs:
    """One image a sample, as a whole and as its only tile."""
    if not ask.mixed:
        return {}
    count = len(ask.sizes)
    return {"pixel_values": ask.noise(count, 2, 3, 16, 16), "image_sizes": torch.tensor([[16, 16]] * count)}


@batches("Video-LLaVA", mixed=True, generates=True)
def video_llava(ask: Request) -> Batch:
    inputs, media = seen(ask, frame=5, image=4)  # a video keeps the class token of each frame, an image does not
    if ask.mixed:
        inputs["pixel_values_images"] = ask.noise(len(ask.sizes), 3, 16, 16)
    return stacked_videos(ask, {**inputs, **ask.text(media)})


@batches("InstructBLIP-video", generates=True)
def instructblip_video(ask: Request) -> Batch:
    question = ask.captions()
    inputs = {
        "pixel_values": ask.stacked(),
        "qformer_input_ids": question["input_ids"],
        "qformer_attention_mask": question["attention_mask"],
        **ask.text([[VIDEO] * 4 * size for size in ask.sizes]),
    }
    return Batch(inputs, {"video": list(ask.sizes)}, {"video": ("pixel_values", padded)})


# Vision and text: models that read patches of all clips in one long row

HEIGHT, WIDTH = 4, 8  # patches; a frame of two windows, which Qwen2.5-VL sorts its patches by
TOKENS = HEIGHT * WIDTH // 4  # patches are merged two by two


def packed(ask: Request, pair: int) -> tuple[Inputs, Spot]:
    """Patches of 8 by 8 pixels of all clips, ``pair`` frames to a patch, with their grids; images, too, if mixed."""
    grids = [[size // pair, HEIGHT, WIDTH] for size in ask.sizes if size]
    patches = sum(size // pair for size in ask.sizes) * HEIGHT * WIDTH
    inputs: Inputs = {
        "pixel_values_videos": ask.noise(patches, 3 * pair * 64),
        "video_grid_thw": torch.tensor(grids),
    }
    if ask.mixed:
        inputs["pixel_values"] = ask.noise(len(ask.sizes) * HEIGHT * WIDTH, 3 * pair * 64)
        inputs["image_grid_thw"] = torch.tensor([[1, HEIGHT, WIDTH]] * len(ask.sizes))

    def view(tensor: Tensor, sample: int, step: int) -> Tensor:
        first = (sum(ask.sizes[:sample]) + step) // pair * HEIGHT * WIDTH
        return tensor[first : first + HEIGHT * WIDTH].view(-1, 3, pair, 64)[:, :, step % pair]

    return inputs, view


def wrapped(
    ask: Request, video: Callable[[int], list[int]], audio: Sequence[Sequence[int]] | None = None
) -> list[list[int]]:
    """The media tokens of every sample, images and videos between their start and end, audio behind them."""
    media = []
    for index, size in enumerate(ask.sizes):
        picture = [VISION_START, *[IMAGE] * TOKENS, VISION_END] if ask.mixed else []
        clip = video(size) if size else []
        media.append([*clip, *picture] if index % 2 else [*picture, *clip])
        if audio:
            media[-1] += [AUDIO_START, *audio[index], AUDIO_END]
    return media


def token_types(ids: Tensor) -> Inputs:
    """1 for an image, 2 for a video, 3 for audio."""
    types = torch.zeros_like(ids)
    for kind, token in enumerate((IMAGE, VIDEO, AUDIO), start=1):
        types[ids == token] = kind
    return {"mm_token_type_ids": types}


def one_block(tokens_a_frame: int, pair: int = 1) -> Callable[[int], list[int]]:
    return lambda size: [VISION_START, *[VIDEO] * (size // pair * tokens_a_frame), VISION_END]


@batches("VideoLLaMA3", unequal=True, mixed=True, generates=True)
def video_llama3(ask: Request) -> Batch:
    inputs, spot = packed(ask, pair=1)
    for kind in ("video", "image"):
        if f"{kind}_grid_thw" in inputs:
            inputs[f"{kind}_merge_sizes"] = torch.full((len(inputs[f"{kind}_grid_thw"]),), 2)
    inputs |= ask.text(wrapped(ask, one_block(TOKENS)))
    return Batch(inputs, {"video": list(ask.sizes)}, {"video": ("pixel_values_videos", spot)})


@batches("Qwen2.5-VL", unequal=True, mixed=True, generates=True, even=True)
def qwen2_5_vl(ask: Request) -> Batch:
    inputs, spot = packed(ask, pair=2)
    inputs |= ask.text(wrapped(ask, one_block(TOKENS, pair=2)))
    inputs |= {**token_types(inputs["input_ids"]), "second_per_grid_ts": torch.ones(len(inputs["video_grid_thw"]))}
    return Batch(inputs, {"video": list(ask.sizes)}, {"video": ("pixel_values_videos", spot)})


@batches("Qwen3-VL", unequal=True, mixed=True, generates=True, even=True)
def qwen3_vl(ask: Request) -> Batch:
    """A timestamp, here one word, before the tokens of every pair of frames."""
    inputs, spot = packed(ask, pair=2)

    def blocks(size: int) -> list[int]:
        block = [VISION_START, *[VIDEO] * TOKENS, VISION_END]
        return [token for _ in range(size // 2) for token in [*ask.words(1), *block]]

    inputs |= ask.text(wrapped(ask, blocks))
    inputs |= token_types(inputs["input_ids"])
    return Batch(inputs, {"video": list(ask.sizes)}, {"video": ("pixel_values_videos", spot)})


# Vision, audio and text: every sample has a video and a sound


@batches("Qwen2.5-Omni thinker", unequal=True, mixed=True, generates=True, even=True)
def qwen2_5_omni(ask: Request) -> Batch:
    """Chunks of 20 mel frames, the last one shorter."""
    return omni(ask, mel_unit=12, tokens=lambda length: ((length - 1) // 2 + 1 - 2) // 2 + 1)


@batches("Qwen3-Omni thinker", unequal=True, mixed=True, generates=True, even=True)
def qwen3_omni(ask: Request) -> Batch:
    """Chunks of 100 mel frames, the last one shorter."""
    return omni(ask, mel_unit=30, tokens=lambda length: length // 100 * 13 + -(-(length % 100) // 8))


def omni(ask: Request, mel_unit: int, tokens: Callable[[int], int]) -> Batch:
    inputs, spot = packed(ask, pair=2)
    mels = [ask.noise(max(size, 2) * mel_unit, MEL_BINS) for size in ask.sizes]
    lengths = [len(mel) for mel in mels]
    inputs |= {
        "input_features": pad_sequence(mels, True).transpose(1, 2),
        "feature_attention_mask": lengths_mask(lengths),
        "video_second_per_grid": torch.ones(len(inputs["video_grid_thw"])),
    }
    sounds = [[AUDIO] * tokens(length) for length in lengths]
    inputs |= ask.text(wrapped(ask, one_block(TOKENS, pair=2), sounds))
    return Batch(
        inputs,
        {"video": list(ask.sizes), "audio": lengths},
        {"video": ("pixel_values_videos", spot), "audio": ("input_features", columns)},
    )


def sounds(ask: Request, less: int = 0) -> tuple[Inputs, list[int]]:
    """Sixteen mel frames a size, ``less`` so many in all, padded, as the Gemmas take them."""
    mels = [ask.noise(max(size, 1) * 16 - less, MEL_BINS) for size in ask.sizes]
    lengths = [len(mel) for mel in mels]
    return {"input_features": pad_sequence(mels, True), "input_features_mask": lengths_mask(lengths).bool()}, lengths


@batches("Gemma3n", unequal=True, most=4, generates=True)
def gemma3n(ask: Request) -> Batch:
    """Every frame is an image; sounds always have 4 tokens, the last of which may stand for nothing.

    Of four rows of its audio tower the first is kept, and none looks ahead. With 12 mel frames less the last row is a
    kept one; elsewhere nothing would depend on the last frames.
    """
    inputs, lengths = sounds(ask, less=12)
    inputs |= {
        "pixel_values": torch.cat(ask.clips()),
        **ask.text([[IMAGE] * 4 * size + [AUDIO] * 4 for size in ask.sizes]),
    }
    return Batch(
        inputs,
        {"video": list(ask.sizes), "audio": lengths},
        {"video": ("pixel_values", concatenated(ask.sizes)), "audio": ("input_features", padded)},
    )


@batches("Gemma4", unequal=True, mixed=True, generates=True)
def gemma4(ask: Request) -> Batch:
    """Frames of 4 by 4 patches one after another, averaged two by two; a token for every 4 mel frames."""
    inputs, lengths = sounds(ask)
    rows, cols = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    positions = torch.stack([cols.flatten(), rows.flatten()], dim=-1)
    frames = sum(ask.sizes)
    inputs |= {
        "pixel_values_videos": ask.noise(frames, 16, 3 * 64),
        "video_position_ids": positions.expand(frames, 16, 2),
        "num_frames_per_video": torch.tensor([size for size in ask.sizes if size]),
    }
    if ask.mixed:
        inputs["pixel_values"] = ask.noise(len(ask.sizes), 16, 3 * 64)
        inputs["image_position_ids"] = positions.expand(len(ask.sizes), 16, 2)
    media = []
    for index, (size, length) in enumerate(zip(ask.sizes, lengths, strict=True)):
        picture = [VISION_START, *[IMAGE] * 4, VISION_END] if ask.mixed else []
        clip = [token for _ in range(size) for token in [VISION_START, *[VIDEO] * 4, VISION_END]]
        sound = [AUDIO_END, *[AUDIO] * -(-length // 4), AUDIO_START]  # numbered the other way round there
        media.append([*clip, *picture, *sound] if index % 2 else [*picture, *clip, *sound])
    inputs |= ask.text(media)
    inputs |= token_types(inputs["input_ids"])
    return Batch(
        inputs,
        {"video": list(ask.sizes), "audio": lengths},
        {"video": ("pixel_values_videos", concatenated(ask.sizes)), "audio": ("input_features", padded)},
    )
