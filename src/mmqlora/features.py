"""What frames and sounds are compared by when some are selected: thumbnails and mel statistics, which need no model.

Example:
    >>> thumbnail_features("clip.mp4").values.shape  # doctest: +SKIP
    (132, 192)

The features of a model's own encoder cost more; see `mmqlora.noise`.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .errors import SelectionError
from .media import Audio, Video, _decoder, _incomplete, _Refused, _timeline, log_mel, read_video
from .signals import SIDE, thumbnails

__all__ = ["Features", "mel_features", "thumbnail_features"]

READ = 256  # small frames that are in memory at once
HOPS = 8192  # steps of a mel spectrogram that are computed at once
MEL_RANGE = 60.0  # decibels below the loudest band that still count


@dataclass(frozen=True, eq=False)
class Features:
    """What frames are compared by, with their times.

    Example:
        >>> Features(np.zeros((12, 192))).times is None
        True

    Attributes:
        values: (F, D) float, a row for each frame or step.
        times: (F,) float64, seconds; None where they are unknown.
    """

    values: np.ndarray
    times: np.ndarray | None = None

    def __len__(self) -> int:
        """Give the number of frames."""
        return len(self.values)


def thumbnail_features(
    media: Video | str | os.PathLike[str] | np.ndarray | Tensor,
    side: int = SIDE,
    progress: bool = False,
    timeout: float = 20.0,
) -> Features:
    """Shrink frames to a few cells each; a file streams through, decoded once and small.

    Example:
        >>> thumbnail_features(np.zeros((12, 48, 64, 3), np.uint8)).values.shape
        (12, 192)
        >>> thumbnail_features("an-hour.mp4", progress=True)  # doctest: +SKIP

    Args:
        media: a video file, a `Video`, or frames (F, H, W, 3) uint8.
        side: cells of a side.
        progress: show a progress bar while a file is decoded.
        timeout: seconds for each 256 frames of a file, on average, after which the decoder is ended.

    Returns:
        `Features` (F, 3 * side * side) float32, the mean of each cell, 0 to 255. Of a file no more than 256 small
        frames are in memory at once, beside the features: 69 MB for an hour at 25 frames a second. The decoder, a
        process of its own, may hold what it has read of the file and not decoded yet, all of it at most.

    Raises:
        SelectionError: frames of another shape, or none.
        MediaError: the file can't be decoded, all of it.
    """
    if isinstance(media, (str, os.PathLike)):
        return _streamed(media, side, progress, timeout)
    frames, times = (media.frames, media.times) if isinstance(media, Video) else (media, None)
    frames = torch.as_tensor(frames)
    if frames.ndim != 4 or frames.shape[-1] != 3 or not frames.numel():
        raise SelectionError(f"frames of shape {tuple(frames.shape)}; expected (F, H, W, 3) with at least one frame")
    return Features(_small(frames, side), times)


def _small(frames: Tensor, side: int) -> np.ndarray:
    return thumbnails(frames.permute(0, 3, 1, 2)[None], side)[0].numpy()


def _streamed(path: str | os.PathLike[str], side: int, progress: bool, timeout: float) -> Features:
    """Thumbnails of a file, a few frames at a time through one decoder that never goes back."""
    # A cell of 8 x 8 pixels: what a scaler makes of a large frame is already a mean.
    size = (8 * side, 8 * side)
    total = read_video(path, frames=[0], size=size, timeout=timeout).count
    name, notes = os.fspath(path), []
    with _decoder().session(name, timeout * math.ceil(1 + total / READ)) as decoder:
        head = decoder.ask({"open": name, "size": list(size)})
        count, promised = head["count"], head["announced"] or head["count"]
        shown = decoder.receive(np.empty((count, 2)))
        if head["cut"] and promised > count:
            raise _incomplete(decoder, name, promised, timeout, "the file was cut short")
        values = np.empty((count, 3 * side * side), np.float32)
        with tqdm(total=count, desc="frames", unit="frame", disable=not progress) as bar:
            for start in range(0, count, READ):
                places = np.arange(start, min(count, start + READ))
                try:
                    values[places] = _small(torch.from_numpy(decoder.read(places)), side)
                except _Refused as error:
                    raise _incomplete(decoder, name, count, timeout, decoder.reason(str(error))) from None
                bar.update(len(places))
    return Features(values, _timeline(name, shown, head["rate"], notes)[0])


def mel_features(audio: Audio, step: float = 0.1, bands: int = 40) -> Features:
    """Describe each tenth of a second of sound by the mean and the deviation of its mel bands.

    Example:
        >>> mel_features(Audio(np.zeros(16000, np.float32), rate=16000)).values.shape
        (10, 80)

    Args:
        audio: samples with their rate, at least one.
        step: seconds, rounded to hundredths.
        bands: mel bands, D/2.

    Returns:
        `Features` (T, D) float32, in decibels, no lower than 60 below the loudest band; the times are those at which
        steps begin. The last step may be shorter.

    Raises:
        SelectionError: no samples, or a step below a hundredth of a second.
    """
    per = round(step * 100)
    if not len(audio.samples) or per < 1:
        raise SelectionError(f"{len(audio.samples)} samples, step={step}; expected some, and at least 0.01 s")
    hop, count = max(1, round(audio.rate / 100)), math.ceil(len(audio.samples) / max(1, round(audio.rate / 100)))
    mel = np.empty((count, bands), np.float32)
    margin = 2  # hops around, into which windows reach
    for a in range(0, count, HOPS):
        b, first = min(count, a + HOPS), max(0, a - margin)
        part = Audio(audio.samples[first * hop : (b + margin) * hop], audio.rate)
        mel[a:b] = log_mel(part, bands, window=round(audio.rate / 40), hop=hop)[0][a - first : b - first]
    mel = np.maximum(mel, mel.max() - MEL_RANGE)
    mel = np.pad(mel, ((0, -count % per), (0, 0)), mode="edge").reshape(-1, per, bands)
    times = audio.start + np.arange(len(mel)) * per * hop / audio.rate
    return Features(np.concatenate([mel.mean(1), mel.std(1)], axis=1), times)
