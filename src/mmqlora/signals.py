"""What changes over time, in a few cheap numbers per time step: motion, novelty, keyframes; flux, speech, onsets.

Example:
    >>> from mmqlora.datasets.worlds import World
    >>> clip = World("clips", count=10, seed=1)[6]
    >>> frames = torch.from_numpy(clip.frames).permute(0, 3, 1, 2)[None]  # (B, T, C, H, W)
    >>> motion = video_signals(frames, names=["motion"])[0, :, 0]
    >>> [event.start * clip.rate for event in clip.events], motion.topk(2).indices.sort().values.tolist()
    ([3.0, 10.0], [3, 10])

The signals need no model and no training, so a gate, a plot and a selection of frames can share them. Each depends on
what a clip shows, not on how it was normalized: ``a * x + b``, with one a and b for the whole clip, gives the same
signals (a > 0 for sound). Each is standardized over the clip, to mean 0 and deviation 1, and is exactly 0 where it
can't be told: in padding, in still or silent clips, in clips of one step, and, if it tells of a change, at the first
step, before which there is nothing.

With c_t the thumbnail of frame t (8 x 8 cells) less its mean, in units of the clip's contrast, and z_t the log mel::

    motion    |soft(c_t - g c_{t-1}, 2 sigma)|        g fits the exposure, sigma is the noise of the stillest frames
    novelty   min_{1<=s<=8} 1 - cos(c_t, c_{t-s})     less what sigma alone gives
    flux      mean over bands of relu(z_t - z_{t-1})
    energy    log sum over bands of exp(3 z_t), over 3
    speech    sigmoid(loudness) times the spread over bands of what stands out of the background
    keyframe, onset    relu(l_t - mean of the last 8 l)      l = log(1 + novelty or flux, over its mean)
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import SignalError
from .media import Audio, Video, log_mel

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "SIGNALS",
    "Signals",
    "audio_signals",
    "pool_steps",
    "signals",
    "thumbnail_signals",
    "thumbnails",
    "video_signals",
]

SIGNALS = MappingProxyType(
    {
        "motion": ("video", "what changed since the frame before, but for exposure and sensor noise"),
        "novelty": ("video", "how unlike all of the last 8 frames the frame is"),
        "keyframe": ("video", "rise of novelty above its recent past: a shot or an event begins"),
        "flux": ("audio", "how much the bands grew louder since the step before"),
        "energy": ("audio", "how loud the step is, on a log scale"),
        "speech": ("audio", "how likely someone speaks: loud, and unevenly so over the bands"),
        "onset": ("audio", "rise of flux above its recent past: a sound begins"),
        "time1": ("both", "place in the clip, no content: sin(pi t/T)"),
        "time2": ("both", "place in the clip, no content: cos(pi t/T)"),
        "time3": ("both", "place in the clip, no content: sin(3 pi t/T)"),
        "time4": ("both", "place in the clip, no content: cos(3 pi t/T)"),
    }
)

RECENT = 8  # steps of the past that novelty, keyframes and onsets look at
SIDE = 8  # cells of a thumbnail's side
SAMPLES = 8  # fewest pixels of a large cell's side that are looked at: a mean of 64 hardly gains from more
FLAT = 1e-5  # a clip with less contrast, relative to its largest value, holds nothing but rounding
LOUDEST = 0.25  # noise takes at most this share of the contrast; where all frames are unlike, it's no noise
STILL = 1e-3  # changes below this share of the clip's contrast are none: 1 level of 1 pixel in a cell of 4 x 4


@dataclass(frozen=True, eq=False)
class Signals:
    """Signals of one clip with their times, as `signals` returns them.

    Example:
        >>> sound = signals(Audio(np.sin(np.arange(16000) ** 1.5 / 999).astype(np.float32), rate=16000))
        >>> sound.table().columns.tolist()
        ['flux', 'energy', 'speech', 'onset']

    Attributes:
        values: (T, m) float32, standardized.
        names: m names, keys of `SIGNALS`.
        times: (T,) float64, seconds.
    """

    values: np.ndarray
    names: tuple[str, ...]
    times: np.ndarray

    def table(self) -> pd.DataFrame:
        """Give a column for each signal and a row for each time step, indexed by its second."""
        import pandas as pd

        return pd.DataFrame(self.values, index=pd.Index(self.times, name="seconds"), columns=list(self.names))


def signals(media: Video | Audio, names: str | Sequence[str] | None = None) -> Signals:
    """Compute the signals of a video or a sound that was read with `read_video` or `read_audio`.

    Example:
        >>> sound = signals(Audio(np.zeros(16000, np.float32), rate=16000), names=["flux", "speech"])
        >>> sound.values.shape, sound.times[:3].round(2).tolist(), float(sound.values.max())
        ((101, 2), [0.0, 0.01, 0.02], 0.0)

    Args:
        media: decoded frames, or samples; the steps are the frames, or those of `log_mel`: 160 samples each.
        names: keys of `SIGNALS`; None for all content signals that fit.

    Returns:
        A `Signals`. Sound below -80 dB counts as silent.

    Raises:
        SignalError: neither video nor audio, no frame or sample, an unknown name, or one that does not fit.
    """
    if isinstance(media, Video):
        chosen = _check_names(names, "video")
        if not len(media):
            raise SignalError("the video holds no frames")
        small = thumbnails(torch.from_numpy(media.frames).permute(0, 3, 1, 2)[None])
        return Signals(thumbnail_signals(small, names=chosen)[0].numpy(), chosen, media.times)
    if isinstance(media, Audio):
        chosen = _check_names(names, "audio")
        if not len(media.samples):
            raise SignalError("the audio holds no samples")
        mel, times = log_mel(media)
        # What a converter hums is far from constant in decibels, and tells nothing.
        mel = torch.from_numpy(mel) * (not media.is_silent)
        return Signals(audio_signals(mel[None], names=chosen)[0].numpy(), chosen, times)
    raise SignalError(f"signals are of a Video or an Audio, as read_video and read_audio give; not {type(media)}")


@torch.no_grad()
def video_signals(
    frames: Tensor,
    valid: Tensor | None = None,
    names: str | Sequence[str] | None = None,
    standardize: bool = True,
) -> Tensor:
    """Compute signals of batched, padded clips; usable inside a forward pass.

    Example:
        >>> video_signals(torch.rand(2, 12, 3, 32, 32), names=["motion", "keyframe"]).shape
        torch.Size([2, 12, 2])

    Args:
        frames: (B, T, C, H, W), any real dtype, with one affine normalization for each clip.
        valid: (B, T) bool, or 0 and 1: which steps are frames; padding may be anywhere and hold anything. None: all.
        names: m keys of `SIGNALS`; None for motion, novelty and keyframe.
        standardize: False leaves the signals in units of the clip's contrast (motion) or as they are.

    Returns:
        (B, T, m) float32, on the device of the frames, with no graph attached.

    Raises:
        SignalError: another shape, an unknown name or one for sound, or valid frames that aren't finite.
    """
    chosen = _check_names(names, "video")
    return thumbnail_signals(thumbnails(frames), valid, chosen, standardize, _rounding(frames))


@torch.no_grad()
def thumbnails(frames: Tensor, side: int = SIDE) -> Tensor:
    """Shrink frames to a few cells each.

    Example:
        >>> thumbnails(torch.zeros(2, 12, 3, 224, 224, dtype=torch.uint8)).shape
        torch.Size([2, 12, 192])

    Args:
        frames: (B, T, C, H, W), any real dtype.
        side: cells of a side. Of a cell of 16 x 16 pixels and more every other one is read, or fewer, down to 8 x 8.

    Returns:
        (B, T, C * side * side) float32, the mean of each cell.

    Raises:
        SignalError: another shape.
    """
    if frames.ndim != 5 or 0 in frames.shape[2:]:
        raise SignalError(f"frames of shape {tuple(frames.shape)}; expected (B, T, C, H, W)")
    strides = [max(1, size // (SAMPLES * side)) for size in frames.shape[-2:]]
    # Sampled before they become floats: to average every pixel of a large frame costs as much as to decode it.
    picked = frames[..., strides[0] // 2 :: strides[0], strides[1] // 2 :: strides[1]].flatten(0, 1)
    picked = picked.to(torch.float32, memory_format=torch.contiguous_format)  # pooling is slow where channels are last
    return F.adaptive_avg_pool2d(picked, side).reshape(*frames.shape[:2], frames.shape[2] * side * side)


@torch.no_grad()
def thumbnail_signals(
    thumbnails: Tensor,
    valid: Tensor | None = None,
    names: str | Sequence[str] | None = None,
    standardize: bool = True,
    rounding: float = FLAT,
) -> Tensor:
    """Compute signals of frames that come as thumbnails, such as the mean of each patch of a Qwen-VL video.

    Example:
        >>> thumbnail_signals(torch.rand(2, 12, 64), names="novelty").shape
        torch.Size([2, 12, 1])

    Args:
        thumbnails: (B, T, D), a few dozen numbers for each frame: means of cells, all channels.
        valid: (B, T), as in `video_signals`.
        names: m keys of `SIGNALS`; None for motion, novelty and keyframe.
        standardize: as in `video_signals`.
        rounding: contrast, relative to the largest value, up to which a clip is taken for blank.

    Returns:
        (B, T, m) float32.

    Raises:
        SignalError: another shape, an unknown name or one for sound, or valid values that aren't finite.
    """
    chosen = _check_names(names, "video")
    clips = _Clips(thumbnails, valid, "thumbnails", "(B, T, D)", least=1)
    x = clips.normalized(max(rounding, _rounding(thumbnails)), within_step=True)
    raw: dict[str, tuple[Tensor, Tensor]] = clips.places()
    if not {"motion", "novelty", "keyframe"}.isdisjoint(chosen) and x.shape[1] > 1:
        residual, sigma = _residuals(x, clips)
        threshold = (2 * sigma).clamp(min=STILL)[:, None, None]
        motion = (residual.abs() - threshold).clamp(min=0).square().mean(-1).sqrt()
        raw["motion"] = (F.pad(motion, (1, 0)), clips.later)
        if not {"novelty", "keyframe"}.isdisjoint(chosen):
            raw["novelty"] = (novelty := _novelty(x, sigma, clips), clips.later)
            raw["keyframe"] = (_rises(novelty, clips), clips.later)
    return clips.collect(raw, chosen, standardize)


@torch.no_grad()
def audio_signals(
    mel: Tensor,
    valid: Tensor | None = None,
    names: str | Sequence[str] | None = None,
    standardize: bool = True,
) -> Tensor:
    """Compute signals of batched, padded log-mel spectrograms; usable inside a forward pass.

    Example:
        >>> from mmqlora.media import Audio, log_mel
        >>> samples = np.zeros(16000, np.float32)
        >>> samples[8000:12000] = np.sin(np.arange(4000) / 3)  # from 0.5 to 0.75 s
        >>> mel, times = log_mel(Audio(samples, rate=16000))
        >>> onset = audio_signals(torch.from_numpy(mel)[None], names="onset")[0, :, 0]
        >>> round(float(times[onset.argmax()]), 2)
        0.49

    Args:
        mel: (B, T, D), the log of a mel spectrogram to any base, scaled and shifted at will, as Whisper does (which has
            (B, D, T): transpose it). Speech and onsets are meant for steps of 10 to 40 ms.
        valid: (B, T), as in `video_signals`.
        names: m keys of `SIGNALS`; None for flux, energy, speech and onset.
        standardize: False leaves the signals in units of the clip's deviation (flux, energy), from 0 to 1 (speech), or
            as they are.

    Returns:
        (B, T, m) float32, on the device of the spectrogram, with no graph attached.

    Raises:
        SignalError: another shape, an unknown name or one for frames, or valid values that aren't finite.

    Source: flux and onsets: Bello et al., A Tutorial on Onset Detection in Music Signals, 2005. Speech from energy and
        spectral flatness: Moattar and Homayounpour, A Simple but Efficient Real-Time Voice Activity Detection
        Algorithm, 2009; the background: Martin, Noise Power Spectral Density Estimation Based on Optimal Smoothing and
        Minimum Statistics, 2001.
    """
    chosen = _check_names(names, "audio")
    clips = _Clips(mel, valid, "mel", "(B, T, D)", least=1)
    z = clips.normalized(max(FLAT, _rounding(mel)), within_step=False)
    raw: dict[str, tuple[Tensor, Tensor]] = clips.places()
    if not {"flux", "onset"}.isdisjoint(chosen):
        change = z[:, 1:] - z[:, :-1]
        # As for frames: the quietest steps change by noise alone, and noise has flux of its own in every band.
        sigma = 1.2533 * clips.quantile(change.abs().mean(-1), clips.later[:, 1:], 0.25)
        threshold = (2 * sigma).clamp(min=STILL)[:, None, None]
        flux = F.pad((change - threshold).clamp(min=0).mean(-1), (1, 0))
        raw["flux"] = (flux, clips.later)
        if "onset" in chosen:
            raw["onset"] = (_rises(flux, clips), clips.later)
    if not {"energy", "speech"}.isdisjoint(chosen):
        energy = torch.logsumexp(3 * z, -1) / 3
        energy = (energy - clips.quantile(energy, clips.mask, 0.0)[:, None]) * clips.mask
        raw["energy"] = (energy, clips.mask)
        if "speech" in chosen:
            raw["speech"] = (_speech(z, energy, clips), clips.mask)
    return clips.collect(raw, chosen, standardize)


@torch.no_grad()
def pool_steps(signals: Tensor, steps: int | Sequence[int] | Tensor, valid: Tensor | None = None) -> Tensor:
    """Resample signals to other numbers of time steps in proportion, such as those of a tower that merges frames.

    Example:
        >>> pool_steps(torch.tensor([[[0.0], [2.0], [4.0], [6.0]]]), 2).flatten().tolist()
        [1.0, 5.0]
        >>> pool_steps(torch.tensor([[[0.0], [2.0]]]), 4).flatten().tolist()
        [0.0, 0.0, 2.0, 2.0]

    Args:
        signals: (B, T, m), of any meaning.
        steps: S, at least 1, or one for each clip, 0 or more.
        valid: (B, T), as in `video_signals`; only valid steps are pooled.

    Returns:
        (B, S, m) float32, or the largest S with zeros after the end of shorter clips. Each is the mean over an equal
        share of the clip, a step that lies in two shares counting in part, so that the mean over the clip stays. A
        mean varies less than what it is taken of: the deviation falls below 1.

    Raises:
        SignalError: another shape, or steps that don't fit.
    """
    clips = _Clips(signals, valid, "signals", "(B, T, m)")
    x, count = clips.x, clips.count
    if isinstance(steps, int):
        if steps < 1:
            raise SignalError(f"steps={steps}; expected at least 1")
        return _pooled(x, count, steps)
    wanted = torch.as_tensor(steps)
    if wanted.shape != count.shape or wanted.is_floating_point() or (wanted < 0).any():
        raise SignalError(f"steps={steps}; expected an int or {len(count)} ints of 0 or more, one for each clip")
    numbers = wanted.tolist()
    out = x.new_zeros(len(x), max(numbers, default=0), x.shape[2])
    # Clips of one number at a time: beside a clip of few steps, each of many, one of many would need as wide ones.
    for number in sorted(set(numbers) - {0}):
        rows = [row for row, other in enumerate(numbers) if other == number]
        out[rows, :number] = _pooled(x[rows], count[rows], number)
    return out


def _pooled(x: Tensor, count: Tensor, steps: int) -> Tensor:
    """The first `count` of the T steps of each clip as `steps` means, (B, T, m) to (B, S, m)."""
    # In units of 1/(S T) of the clip, step i is [i S, (i + 1) S) and bin j is [j T, (j + 1) T): integers, so exact.
    low = torch.arange(steps, device=x.device)[None] * count[:, None]
    high = low + count[:, None]
    reach = torch.arange(-(-x.shape[1] // steps) + 1, device=x.device)
    index = (low // steps)[..., None] + reach  # (B, S, K), the few steps that a bin can touch
    overlap = torch.minimum(high[..., None], (index + 1) * steps) - torch.maximum(low[..., None], index * steps)
    weight = overlap.clamp(min=0) / count.clamp(min=1)[:, None, None]
    rows = torch.arange(len(x), device=x.device)[:, None, None]
    return (x[rows, index.clamp(max=max(0, x.shape[1] - 1))] * weight[..., None]).sum(2)


class _Clips:
    """A batch of clips whose valid steps were moved to the front, and what all signals need of it."""

    def __init__(self, x: Tensor, valid: Tensor | None, name: str, shape: str, least: int = 0) -> None:
        if x.ndim != 3 or not x.shape[1] or x.shape[2] < least or x.is_complex():
            above = "T and D above 0" if least else "T above 0"
            raise SignalError(f"{name} of shape {tuple(x.shape)} and type {x.dtype}; expected real {shape}, {above}")
        if valid is not None and valid.shape != x.shape[:2]:
            raise SignalError(f"valid of shape {tuple(valid.shape)} for {name} {tuple(x.shape)}; expected (B, T)")
        x = x.detach().float()
        self.order = None
        if valid is not None:
            valid = valid.to(x.device).bool()
            # A stable sort moves padding behind: on the left, on the right and in between become the same case.
            self.order = (~valid).to(torch.uint8).argsort(dim=1, stable=True)
            x = x.masked_fill(~valid[..., None], 0).gather(1, self.order[..., None].expand_as(x))
            self.count = valid.sum(1)
        else:
            self.count = torch.full(x.shape[:1], x.shape[1], device=x.device)
        if not torch.compiler.is_compiling() and not torch.isfinite(x).all():  # a graph can't look at values
            bad = (~torch.isfinite(x)).flatten(1).any(1).nonzero().flatten().tolist()
            raise SignalError(f"{name}: clips {bad} of {len(x)} hold NaN or infinite values in valid steps")
        step = torch.arange(x.shape[1], device=x.device)
        self.x = x
        self.mask = step < self.count[:, None]  # (B, T)
        self.later = self.mask & (step > 0)  # steps that have one before them

    def normalized(self, rounding: float, within_step: bool) -> Tensor:
        """Take out what a clip's scale and offset are: mean 0, contrast 1; a clip without contrast becomes 0.

        Contrast is the deviation within a step (of frames: what is left when exposure changes) or over the clip.
        """
        mask = self.mask[..., None]
        # First to 1, as the squares of very large or small values leave the range of float32.
        peak = self.x.abs().amax((1, 2), keepdim=True)
        x = self.x / peak.clamp(min=torch.finfo(torch.float32).tiny)
        total = self.count.clamp(min=1)[:, None, None]
        x = (x - x.mean(-1, keepdim=True).sum(1, keepdim=True) / total) * mask
        around = x - x.mean(-1, keepdim=True) if within_step else x
        contrast = (around.square().mean(-1, keepdim=True).sum(1, keepdim=True) / total).sqrt()
        return torch.where(contrast > rounding, x / contrast.clamp(min=1e-30), 0.0)

    def quantile(self, values: Tensor, known: Tensor, q: float) -> Tensor:
        """Give a quantile over the known steps, (B, T) to (B,); 0 where none is known."""
        number = known.sum(1, keepdim=True)
        if not values.shape[1]:
            return values.new_zeros(len(values))
        ordered = values.masked_fill(~known, torch.inf).sort(1).values
        picked = ordered.gather(1, ((number - 1) * q).long().clamp(min=0))
        return torch.where(number > 0, picked, 0.0)[:, 0]

    def places(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Give the features of time alone: sines and cosines of the place in the clip."""
        place = (torch.arange(self.x.shape[1], device=self.x.device) + 0.5) / self.count.clamp(min=1)[:, None]
        angle = math.pi * place
        # Half turns, so that the end is not the start again; 3 of them, as sin(a) and cos(2 a) are nearly one.
        waves = (angle.sin(), angle.cos(), (3 * angle).sin(), (3 * angle).cos())
        return {f"time{i}": (wave, self.mask) for i, wave in enumerate(waves, 1)}

    def collect(self, raw: dict[str, tuple[Tensor, Tensor]], names: Sequence[str], standardize: bool) -> Tensor:
        """Stack signals in the order of the names, standardized, with every step back in its place: (B, T, m)."""
        if not names:
            return self.x.new_zeros(*self.mask.shape, 0)
        nothing = (torch.zeros_like(self.mask, dtype=torch.float32), self.mask)
        # (m, B, T): sums run over the last dimension, so that a signal does not depend on what it is computed with.
        values, known = (torch.stack(parts) for parts in zip(*(raw.get(name, nothing) for name in names), strict=True))
        values = values * known
        if standardize:
            number, total = known.sum(-1, keepdim=True).clamp(min=1), self.count.clamp(min=1)[:, None]
            around = (values - values.sum(-1, keepdim=True) / number) * known
            # Once more, for what rounding left of the mean of a signal that hardly varies.
            around = (around - around.sum(-1, keepdim=True) / number) * known
            # Unknown steps get the mean, which is 0, and count: so the deviation over all valid steps is 1.
            deviation = (around.square().sum(-1, keepdim=True) / total).sqrt()
            least = STILL * values.abs().amax(-1, keepdim=True)
            values = torch.where(deviation > least, around / deviation.clamp(min=1e-30), 0.0)
        values = values.movedim(0, -1)
        if self.order is not None:
            values = values.gather(1, self.order.argsort(1)[..., None].expand_as(values))
        return values


def _residuals(x: Tensor, clips: _Clips) -> tuple[Tensor, Tensor]:
    """What of each frame another exposure of the one before does not explain, (B, T-1, D), and its noise (B,)."""
    before, after = (part - part.mean(-1, keepdim=True) for part in (x[:, :-1], x[:, 1:]))
    # Least squares for the gain; the offset went with the mean. A weak prior of 1 keeps frames that are nearly blank
    # from being blown up.
    ridge = 0.01
    gain = (before * after).mean(-1, keepdim=True) + ridge
    residual = after - gain / (before.square().mean(-1, keepdim=True) + ridge) * before
    # Half of the cells of a frame hardly change even when something moves, and some frames hardly do: what they change
    # by is noise. In a clip that never rests a low quantile takes the least motion for noise, not all of it.
    middle = 1.4826 * residual.abs().kthvalue(residual.shape[-1] // 2 + 1).values
    return residual, clips.quantile(middle, clips.later[:, 1:], 0.25).clamp(max=LOUDEST)


def _novelty(x: Tensor, sigma: Tensor, clips: _Clips) -> Tensor:
    """1 - highest cosine to the last frames, less what noise of `sigma` gives: (B, T)."""
    centered = x - x.mean(-1, keepdim=True)
    # A cell that never changes makes two blank frames alike, and a blank one unlike others.
    blank = (sigma.square() / 2).clamp(min=0.05**2)[:, None]
    power = centered.square().mean(-1) + blank
    unit = torch.cat([centered / math.sqrt(x.shape[-1]), blank.sqrt()[..., None].expand(*x.shape[:2], 1)], -1)
    unit = unit / power.sqrt()[..., None]
    least = torch.full_like(power, torch.inf)
    for lag in range(1, min(RECENT, x.shape[1] - 1) + 1):
        # As half the squared distance: 1 - cos rounds to nothing where frames are nearly the same.
        apart = (unit[:, lag:] - unit[:, :-lag]).square().sum(-1) / 2
        least[:, lag:] = torch.minimum(least[:, lag:], apart)
    noise = (sigma.square()[:, None] / 2).clamp(min=STILL**2) / power
    return ((least - noise).clamp(min=0)).masked_fill(~clips.later, 0)


def _rises(change: Tensor, clips: _Clips) -> Tensor:
    """How far a change stands above its recent past, (B, T), whatever its unit."""
    known = clips.later
    change = change * known
    mean = change.sum(1, keepdim=True) / known.sum(1, keepdim=True).clamp(min=1)
    # The log, so that one cut does not make all else vanish.
    level = torch.log1p(change / mean.clamp(min=1e-30)) * known
    # The median stands in for one step of the past: near the start there is little or none.
    usual = clips.quantile(level, known, 0.5)[:, None]
    past = F.pad(torch.stack([level, known.float()]), (RECENT, 0)).unfold(2, RECENT, 1)[:, :, :-1].sum(-1)
    return (level - (past[0] + usual) / (past[1] + 1)).clamp(min=0) * known


def _speech(z: Tensor, energy: Tensor, clips: _Clips) -> Tensor:
    """Loud, and with a spectrum that is uneven where it stands out of the background: (B, T), 0 to 1."""
    mask = clips.mask.float()[:, None]
    smooth = F.avg_pool1d((z * clips.mask[..., None]).mT, 5, 1, 2, count_include_pad=False)
    smooth = smooth / F.avg_pool1d(mask, 5, 1, 2, count_include_pad=False).clamp(min=0.2)
    # The background of a band is its quietest stretch.
    quiet = smooth.masked_fill(mask == 0, torch.inf).amin(2, keepdim=True)
    above = (smooth - quiet).clamp(min=0) * mask
    uneven = (above - above.mean(1, keepdim=True)).square().mean(1).sqrt()
    uneven = uneven / uneven.amax(1, keepdim=True).clamp(min=1e-6)
    low, high = clips.quantile(energy, clips.mask, 0.1)[:, None], energy.amax(1, keepdim=True)
    loud = torch.sigmoid(8 * ((energy - low) / (high - low).clamp(min=STILL) - 0.4))
    return torch.where(high - low > STILL, loud * uneven, 0.0) * clips.mask


def _rounding(x: Tensor) -> float:
    """The contrast that rounding alone can give, relative to the largest value."""
    return max(FLAT, torch.finfo(x.dtype).eps) if x.is_floating_point() else FLAT


def _check_names(names: str | Sequence[str] | None, modality: str) -> tuple[str, ...]:
    """Resolve names of signals, or say which would fit."""
    fitting = [name for name, (kind, _) in SIGNALS.items() if kind in (modality, "both")]
    if names is None:
        return tuple(name for name in fitting if SIGNALS[name][0] == modality)
    names = (names,) if isinstance(names, str) else tuple(names)
    for name in names:
        if name not in SIGNALS:
            close = difflib.get_close_matches(str(name), SIGNALS)
            hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(SIGNALS)}"
            raise SignalError(f"no signal is called {name!r}; {hint}")
        if name not in fitting:
            raise SignalError(f"{name!r} is a signal of {SIGNALS[name][0]}; {modality} has {', '.join(fitting)}")
    return names
