"""Open a video or audio file: frames or samples, each with its index and time, or a clear error.

Example:
    >>> import numpy as np, tempfile, os
    >>> path = os.path.join(tempfile.mkdtemp(), "clip.avi")
    >>> write_video(path, np.zeros((50, 48, 64, 3), np.uint8), rate=25)
    >>> video = read_video(path, frames=4)
    >>> video.frames.shape, video.indices.tolist(), video.times.round(2).tolist()
    ((4, 48, 64, 3), [6, 18, 31, 43], [0.24, 0.72, 1.24, 1.72])

Video comes through decord, audio through soundfile. A frame that was asked for is decoded, or the call says why not:
nothing is padded, repeated or skipped in silence. What no reader can see is damage *inside* frames: a few hundred
flipped bytes give wrong pixels and no error. Where the decoder at least complained, `Video.notes` says so.

Decoding happens in a child process, one per calling process, started at the first use. So a decoder that hangs is
ended after `timeout` seconds, one that crashes is a `MediaError`, and a data set is safe in DataLoader workers:
decord deadlocks when a reader is shared between processes (decord#220, #251, #294), and here none ever is.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import warnings
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Subset

from .errors import MediaError

__all__ = [
    "Audio",
    "SkipBroken",
    "Video",
    "log_mel",
    "read_audio",
    "read_video",
    "uniform_indices",
    "write_audio",
    "write_video",
]

LATEST_SECOND = 1e7  # 116 days: a later time is a missing one, which decoders write as a huge number
SILENCE = 1e-4  # -80 dB of full scale, about 3 steps of 16-bit audio


@dataclass(frozen=True, eq=False)
class Video:
    """Decoded frames with their times, as `read_video` returns them.

    Example:
        >>> video = read_video("clip.mp4", frames=8)  # doctest: +SKIP
        >>> video.frames[3], video.times[3], video.indices[3]  # doctest: +SKIP

    Attributes:
        frames: (F, H, W, 3) uint8, RGB.
        times: (F,) float64, the second at which each frame is first shown.
        indices: (F,) int64, each frame's place in the file, from 0.
        rate: Average frames per second. Times, not the rate, say when a frame is shown: the rate may vary.
        count: Frames in the file.
        duration: Seconds, to the end of the last frame.
        path: The file.
        notes: What was odd, in words; empty for a sound file. Each was also given as a warning.
    """

    frames: np.ndarray
    times: np.ndarray
    indices: np.ndarray
    rate: float
    count: int
    duration: float
    path: str
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Give the number of frames that were decoded."""
        return len(self.frames)


@dataclass(frozen=True, eq=False)
class Audio:
    """Samples of one channel with their rate and start, as `read_audio` returns them.

    Example:
        >>> Audio(np.zeros(8000, np.float32), rate=16000).duration
        0.5

    Attributes:
        samples: (S,) float32, one channel, full scale is 1.
        rate: Samples per second.
        start: The second of the file at which the first sample lies.
        path: The file, or an empty string.
    """

    samples: np.ndarray
    rate: int
    start: float = 0.0
    path: str = ""

    @property
    def duration(self) -> float:
        """Seconds."""
        return len(self.samples) / self.rate

    @property
    def times(self) -> np.ndarray:
        """(S,) float64, the second of every sample."""
        return self.start + np.arange(len(self.samples)) / self.rate

    @property
    def is_silent(self) -> bool:
        """Whether no sample is above -80 dB. Silence is valid audio, but rarely what a caption describes."""
        return bool(np.abs(self.samples).max(initial=0.0) < SILENCE)


def uniform_indices(total: int, count: int) -> np.ndarray:
    """Choose `count` of `total` frames evenly: the midpoints of `count` equal segments.

    Example:
        >>> uniform_indices(100, 4).tolist()
        [12, 37, 62, 87]

    Args:
        total: Frames to choose from.
        count: Frames to choose, F. More than `total` repeats some.

    Returns:
        (F,) int64, in order.

    Raises:
        MediaError: If either is below 1.
    """
    if total < 1 or count < 1:
        raise MediaError(f"can't choose {count} of {total} frames; both must be at least 1")
    return (2 * np.arange(count, dtype=np.int64) + 1) * total // (2 * count)


def read_video(
    path: str | os.PathLike[str],
    frames: int | Sequence[int] | np.ndarray | None = None,
    size: tuple[int, int] | None = None,
    timeout: float = 20.0,
    start: float = 0.0,
    stop: float | None = None,
) -> Video:
    """Decode all frames of a video or of a span of it, a number of them evenly spread, or those with given indices.

    Example:
        >>> read_video("clip.mp4", frames=8)  # doctest: +SKIP
        >>> read_video("clip.mp4", frames=[0, 10, 20], size=(36, 64))  # doctest: +SKIP
        >>> read_video("whole.mp4", frames=8, start=122, stop=132)  # doctest: +SKIP

    A file that was cut short holds fewer frames than it announces. All of it, or a number of frames, is then an error
    that says how many can be decoded; indices among those can still be read. Right before damaged data decord loses
    sound frames by chance, on a busy machine more of them: then the number is "at least", and a second try may succeed.
    MP4 and AVI files announce their frames; of others, such as MKV, a cut between two frames goes unseen.

    Args:
        path: A video file; the container and codec may be any that decord's FFmpeg knows.
        frames: None for all; F for `uniform_indices(count, F)`; or the indices themselves, in any order.
        size: (height, width) to scale to while decoding, much faster than scaling afterwards; None keeps the file's.
        timeout: Seconds for the whole call, after which the decoder is ended.
        start: Second at which the span starts: its frames are those first shown from `start` on and before `stop`.
        stop: Second at which the span stops; None, or later than the end, goes to the end. Neither changes what
            `times` and `indices` count from, and indices that are given in `frames` take no span.

    Returns:
        Frames uint8 (F, H, W, 3), with times in seconds, indices, rate and duration.

    Raises:
        MediaError: If the file is missing, is no video, is damaged where it was asked for, holds no frame in the span,
            or takes too long.
    """
    name = _regular_file(path)
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise MediaError(f"size must be (height, width) of at least 1 pixel each, not {size!r}")
    with _decoder().session(name, timeout) as decoder:
        head = decoder.ask({"open": name, "size": size and [int(side) for side in size]})
        count, promised = head["count"], head["announced"] or head["count"]
        total = promised if head["cut"] else count  # in a whole file, an announced number that differs is a wrong one
        shown = decoder.receive(np.empty((count, 2)))
        clock: list[str] = []  # what is odd about the times
        times, rate, duration = _timeline(name, shown, head["rate"], clock)
        first, last = np.searchsorted(times, [start, np.inf if stop is None else stop])
        whole = frames is None or isinstance(frames, (int, np.integer))
        if whole and total > count and last == count:
            raise _incomplete(decoder, name, total, timeout, "the file was cut short")
        if whole and not (start >= 0 and first < last):
            span = f"{start:g} to {'the end' if stop is None else f'{stop:g}'} s"
            raise MediaError(f"{name}: no frames in {span}; the file holds {duration:g} s")
        if frames is None:
            indices = np.arange(first, last)
        elif whole:
            indices = first + uniform_indices(last - first, int(frames))
        elif (start, stop) != (0.0, None):
            raise MediaError(f"{name}: a span ({start:g} to {stop} s) goes with a number of frames, not with indices")
        else:
            indices = np.asarray(frames)
            if indices.ndim != 1 or (indices.size and indices.dtype.kind not in "iu"):
                raise MediaError(f"frames must be None, an int or a list of ints, not {frames!r}")
            if indices.size and not 0 <= indices.min() <= indices.max() < count:
                raise MediaError(f"{name}: frames 0 to {count - 1} exist, not {indices.min()} to {indices.max()}")
        try:
            # An empty choice decodes one frame all the same: only the decoder knows the size of a rotated one.
            pixels = decoder.read(indices if indices.size else np.array([0]))[: len(indices)]
        except _Refused as error:
            raise _incomplete(decoder, name, total, timeout, decoder.reason(str(error))) from None
        notes = decoder.complaints()
    if promised != count:
        notes.append(f"the container announces {promised} frames and holds {count}")
    notes += clock
    for note in notes:
        warnings.warn(f"{name}: {note}", stacklevel=2)
    return Video(
        pixels, times[indices.astype(np.int64)], indices.astype(np.int64), rate, count, duration, name, tuple(notes)
    )


def read_audio(
    path: str | os.PathLike[str], rate: int | None = 16000, start: float = 0.0, stop: float | None = None
) -> Audio:
    """Read audio, or a span of it, as one channel at one rate.

    Example:
        >>> read_audio("speech.flac", start=2.0, stop=4.5).samples.shape  # doctest: +SKIP
        (40000,)

    Args:
        path: An audio file that libsndfile knows: WAV, FLAC, Ogg, MP3 and more, but no video container.
        rate: Samples per second to resample to; None keeps the file's.
        start: Second at which to start.
        stop: Second at which to stop; None, or later than the end, reads to the end. Of a file that was cut short, what
            is left can be read by giving a `stop` within it.

    Returns:
        Samples float32 (S,), the mean of the channels, with their rate and start.

    Raises:
        MediaError: If the file is missing, is no audio, is damaged or cut short, holds no sample in the span, or
            holds samples that aren't finite.
    """
    import soundfile

    name = _regular_file(path)
    try:
        with soundfile.SoundFile(name) as file:
            native, total, log = file.samplerate, file.frames, file.extra_info
            first = round(start * native)
            last = total if stop is None else min(total, round(stop * native))
            # libsndfile mends the length of a WAV file that was cut short, and says so only in its log.
            cut = "data : " in log and "(should be " in log.split("data : ")[1].splitlines()[0]
            if cut and (stop is None or round(stop * native) > total):
                left = total * 1000 // native / 1000
                raise MediaError(f"{name}: the file was cut short, {left} s are left; stop={left} reads those")
            if not 0 <= first < last:
                span = f"{start:g} to {'the end' if stop is None else f'{stop:g}'} s"
                raise MediaError(f"{name}: no samples in {span}; the file holds {total / native:g} s")
            file.seek(first)
            samples = file.read(last - first, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError) as error:
        why = getattr(error, "error_string", error)
        raise MediaError(f"{name}: can't read this as audio ({why}); WAV, FLAC, Ogg and MP3 can be read") from None
    if len(samples) < last - first:
        raise MediaError(f"{name}: {len(samples)} of {last - first} samples can be decoded")
    mono = samples.mean(axis=1)
    bad = int(np.count_nonzero(~np.isfinite(mono)))
    if bad:
        raise MediaError(f"{name}: {bad} of {len(mono)} samples are NaN or infinite")
    if rate is not None and rate != native:
        mono = _resample(mono, native, rate)
    return Audio(np.ascontiguousarray(mono, dtype=np.float32), rate or native, first / native, name)


def log_mel(audio: Audio, bands: int = 80, window: int = 400, hop: int = 160) -> tuple[np.ndarray, np.ndarray]:
    """Compute a mel spectrogram in decibels, and the time of each of its steps.

    Example:
        >>> mel, times = log_mel(Audio(np.ones(16000, np.float32), rate=16000))
        >>> mel.shape, times[:3].round(2).tolist()
        ((101, 80), [0.0, 0.01, 0.02])

    Args:
        audio: Samples with their rate, at least one.
        bands: Mel bands D, from 0 Hz to half the rate, on Slaney's scale.
        window: Samples a step looks at, under a Hann window.
        hop: Samples from one step to the next.

    Returns:
        The spectrogram, float32 (T, D), 10 log10 of power, and no lower than -100; and the centre of each step,
        float64 (T,), in seconds of the file.
    """
    import torch
    from torchaudio.transforms import MelSpectrogram

    # Padding with zeros, because mirroring fails on a clip shorter than half a window.
    transform = MelSpectrogram(
        audio.rate, window, hop_length=hop, n_mels=bands, norm="slaney", mel_scale="slaney", pad_mode="constant"
    )
    power = transform(torch.from_numpy(audio.samples)).clamp_(min=1e-10)
    mel = power.log10_().mul_(10).T.contiguous().numpy()
    return mel, audio.start + np.arange(len(mel)) * hop / audio.rate


def write_video(path: str | os.PathLike[str], frames: np.ndarray, rate: float) -> None:
    """Write frames as an uncompressed AVI file, which `read_video` gives back exactly.

    Example:
        >>> write_video("clip.avi", np.zeros((10, 48, 64, 3), np.uint8), rate=25)  # doctest: +SKIP

    Args:
        path: Where to; the name should end in .avi.
        frames: (F, H, W, 3) uint8, RGB.
        rate: Frames per second.

    Raises:
        MediaError: If the frames have another shape or type, or take more than 1 GB.
    """
    frames = np.asarray(frames)
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8 or not frames.size or not rate > 0:
        raise MediaError(f"{path}: need uint8 (F, H, W, 3) and a rate, not {frames.dtype} {frames.shape} at {rate}")
    count, height, width, _ = frames.shape
    if frames.nbytes > 1e9:
        raise MediaError(f"{path}: frames may take 1 GB, not {frames.nbytes / 1e9:.1f}; an AVI file ends at 2")
    row = (3 * width + 3) // 4 * 4  # rows begin at multiples of 4 bytes
    # Chunks: a name, a length, and the picture from the bottom row up, blue first.
    movie = np.zeros((count, 8 + height * row), np.uint8)
    movie[:, :8] = np.frombuffer(b"00db" + struct.pack("<I", height * row), np.uint8)
    pixels = movie[:, 8:].reshape(count, height, row)[:, :, : 3 * width]
    pixels[:] = frames[:, ::-1, :, ::-1].reshape(count, height, 3 * width)
    index = np.zeros((count, 4), "<u4")
    index[:, 0], index[:, 1], index[:, 3] = np.frombuffer(b"00db", "<u4"), 0x10, height * row  # 0x10: a keyframe
    index[:, 2] = 4 + np.arange(count) * movie.shape[1]

    def chunk(kind: bytes, body: bytes) -> bytes:
        return kind + struct.pack("<I", len(body)) + body

    speed = Fraction(rate).limit_denominator(1001)
    per, steps = speed.denominator, speed.numerator
    avih = struct.pack("<14I", round(1e6 / rate), 0, 0, 0x10, count, 0, 1, height * row, width, height, 0, 0, 0, 0)
    strh = struct.pack(
        "<4s4s8IiI4H", b"vids", b"DIB ", 0, 0, 0, per, steps, 0, count, height * row, -1, 0, 0, 0, width, height
    )
    strf = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, height * row, 0, 0, 0, 0)
    stream = chunk(b"LIST", b"strl" + chunk(b"strh", strh) + chunk(b"strf", strf))
    body = b"AVI " + chunk(b"LIST", b"hdrl" + chunk(b"avih", avih) + stream)
    body += chunk(b"LIST", b"movi" + movie.tobytes()) + chunk(b"idx1", index.tobytes())
    Path(path).write_bytes(chunk(b"RIFF", body))


def write_audio(path: str | os.PathLike[str], samples: np.ndarray, rate: int) -> None:
    """Write one channel of samples in the format that the name's ending says.

    Example:
        >>> write_audio("tone.wav", np.sin(np.arange(16000) / 6).astype(np.float32), rate=16000)  # doctest: +SKIP

    Args:
        path: Where to, such as .wav (float32, which `read_audio` gives back exactly) or .flac (16 bits).
        samples: (S,) float; full scale is 1.
        rate: Samples per second.

    Raises:
        MediaError: If the samples aren't one channel of finite numbers, or the ending is of no known format.
    """
    import soundfile

    samples = np.asarray(samples)
    if samples.ndim != 1 or not samples.size or samples.dtype.kind != "f" or not np.isfinite(samples).all():
        raise MediaError(f"{path}: need finite float samples (S,), not {samples.dtype} {samples.shape}")
    try:
        soundfile.write(path, samples, rate, subtype="FLOAT" if Path(path).suffix.lower() == ".wav" else None)
    except (soundfile.SoundFileError, TypeError, ValueError) as error:
        raise MediaError(f"{path}: can't write this ({error}); .wav and .flac can be written") from None


class SkipBroken(Dataset):
    """A data set whose unreadable items don't end a run: the next readable item takes the place of a broken one.

    Example:
        >>> clips = SkipBroken(dataset)  # doctest: +SKIP
        >>> loader = DataLoader(clips, batch_size=8, num_workers=2)  # doctest: +SKIP
        >>> clips.broken  # doctest: +SKIP
        {17: 'clips/0017.mp4: 54 of 132 frames can be decoded'}

    For training. In an evaluation a stand-in would be counted twice: use `readable()` there, which leaves broken items
    out. An item is broken if it raises `MediaError`; any other error passes through. A broken item is tried once, in
    whichever worker meets it, and its stand-in is always the same. When the wrapper goes, a warning says how many
    items were skipped and names a few.

    Args:
        dataset: A map-style data set; its `__getitem__` opens the media, for example with `read_video`.

    Raises:
        MediaError: From an item, if this one and the 31 next unknown ones are all broken, or no item is readable.
    """

    PATIENCE = 32  # new failures in a row: at 20 s each, a run that can only hang ends after 11 minutes

    def __init__(self, dataset: Dataset) -> None:
        """See the class."""
        self.dataset = dataset
        # A file, because every worker of every epoch can add to it and see what the others found.
        handle, self._log = tempfile.mkstemp(prefix="mmqlora-broken-", suffix=".jsonl")
        os.close(handle)
        self._seen: dict[int, str] = {}
        self._read = 0
        weakref.finalize(self, _say_skipped, self._log, len(dataset), os.getpid())

    @property
    def broken(self) -> dict[int, str]:
        """The items found broken so far, by every worker: index to reason."""
        if os.path.getsize(self._log) > self._read:
            with open(self._log, "rb") as file:
                file.seek(self._read)
                lines = file.read()
            lines = lines[: lines.rfind(b"\n") + 1]
            self._read += len(lines)
            self._seen.update(json.loads(line) for line in lines.splitlines())
        return self._seen

    def __len__(self) -> int:
        """Give the number of items, broken ones included."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        """Give an item, or the next readable one."""
        total, failures = len(self), 0
        if not -total <= index < total:
            raise IndexError(f"item {index} of {total}")
        for place in ((index + step) % total for step in range(total)):
            if place not in self.broken:
                good, item = self._attempt(place)
                if good:
                    return item
                failures += 1
                if failures == self.PATIENCE:
                    raise MediaError(f"{failures} items in a row can't be read: {_few(self.broken)}")
        raise MediaError(f"none of {total} items can be read: {_few(self.broken)}")

    def readable(self, workers: int = 0) -> Subset:
        """Read every item once, with a progress bar, and return the subset that can be read.

        Args:
            workers: Processes to read with.

        Raises:
            MediaError: If no item can be read.
        """
        from torch.utils.data import DataLoader
        from tqdm.auto import tqdm

        loader = DataLoader(_Attempts(self), batch_size=None, num_workers=workers)
        for _ in tqdm(loader, total=len(self), desc="Reading", unit="item"):
            pass
        kept = [index for index in range(len(self)) if index not in self.broken]
        if not kept:
            raise MediaError(f"none of {len(self)} items can be read: {_few(self.broken)}")
        return Subset(self.dataset, kept)

    def _attempt(self, index: int) -> tuple[bool, Any]:
        try:
            return True, self.dataset[index]
        except MediaError as error:
            with open(self._log, "ab", buffering=0) as file:  # one write of one line: appended whole
                file.write(json.dumps([index, str(error)]).encode() + b"\n")
            return False, None


class _Attempts(Dataset):
    """Loads every item and gives nothing: what `readable` iterates over, so that no frames travel."""

    def __init__(self, parent: SkipBroken) -> None:
        self.parent = parent

    def __len__(self) -> int:
        return len(self.parent)

    def __getitem__(self, index: int) -> int:
        if index not in self.parent.broken:
            self.parent._attempt(index)
        return index


def _few(broken: dict[int, str], limit: int = 3) -> str:
    more = f"; and {len(broken) - limit} more" if len(broken) > limit else ""
    return "; ".join(broken[index] for index in sorted(broken)[:limit]) + more


def _say_skipped(log: str, total: int, owner: int) -> None:
    if os.getpid() != owner:
        return  # a worker's copy
    broken = dict(json.loads(line) for line in Path(log).read_bytes().splitlines())
    os.unlink(log)
    if broken:
        warnings.warn(f"{len(broken)} of {total} items could not be read: {_few(broken)}", stacklevel=2)


def _regular_file(path: str | os.PathLike[str]) -> str:
    """Check that a path is a file with something in it: opening a pipe or a device would wait for ever."""
    name = os.fspath(path)
    try:
        status = os.stat(name)
    except (OSError, ValueError) as error:
        raise MediaError(f"{name}: can't open ({getattr(error, 'strerror', None) or error})") from None
    if not stat.S_ISREG(status.st_mode):
        raise MediaError(f"{name}: is a {'folder' if stat.S_ISDIR(status.st_mode) else 'device or pipe'}, not a file")
    if not status.st_size:
        raise MediaError(f"{name}: is empty (0 bytes)")
    return name


def _timeline(name: str, shown: np.ndarray, rate: float, notes: list[str]) -> tuple[np.ndarray, float, float]:
    """Check starts and ends of frames (N, 2); where they make no sense, take times from the rate and add a note."""
    starts, ends = shown.T
    good = (
        np.isfinite(shown).all() and (shown >= 0).all() and shown.max() < LATEST_SECOND and (np.diff(starts) >= 0).all()
    )
    if good:
        duration = round(float(ends.max()), 6)
        # decord gives 32-bit numbers: rounding takes 0.31999999 back to 0.32.
        return starts.round(6), rate if rate > 0 else len(starts) / duration, duration
    if not rate > 0:
        raise MediaError(f"{name}: has neither times that make sense (first {starts[0]:g} s) nor a frame rate")
    notes.append(f"its times make no sense (first {starts[0]:g} s); they are taken from its {rate:g} frames a second")
    return np.arange(len(starts)) / rate, rate, len(starts) / rate


def _resample(mono: np.ndarray, native: int, rate: int) -> np.ndarray:
    import torch
    from torchaudio.functional import resample

    return resample(torch.from_numpy(mono), native, rate).numpy()


class _Refused(Exception):
    """The decoder said no; it is ready for the next request."""


def _incomplete(decoder: _Decoder, name: str, total: int, timeout: float, why: str) -> MediaError:
    """Count the frames that can be decoded, and put it into words."""
    found = decoder.ask({"decodable": timeout / 2})
    good = found["decodable"]
    if good >= total:  # not one bad frame when read in order
        return MediaError(f"{name}: {why}")
    remedy = f"; frames=range({good}) reads those" if good else ""
    least = "" if found["sure"] else "at least "
    return MediaError(f"{name}: {least}{good} of {total} frames can be decoded ({why}){remedy}")


class _Decoder:
    """The child process that runs `_decode.py`, and what is left to do when it hangs or dies."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.log = tempfile.TemporaryFile(
            buffering=0
        )  # what the decoder prints; a pipe that nobody empties would block it

    @contextlib.contextmanager
    def session(self, name: str, timeout: float) -> Iterator[_Decoder]:
        """Hold the decoder for one file and a limited time."""
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                self.start()
            self.log.truncate(0)
            self.log.seek(0)  # for the child too: it shares the file's position
            assert self.process is not None
            expired = threading.Event()

            def expire(process: subprocess.Popen[bytes] = self.process) -> None:
                expired.set()
                process.kill()

            timer = threading.Timer(timeout, expire)
            timer.daemon = True
            timer.start()
            clean = False
            try:
                yield self
                clean = True
            except _Refused as error:
                clean = True
                why = self.reason(str(error))
                raise MediaError(
                    f"{name}: can't read this as video ({why}); use a whole MP4, AVI, MKV or WebM"
                ) from None
            except MediaError:
                clean = True
                raise
            except (OSError, EOFError):
                if expired.is_set():
                    raise MediaError(f"{name}: the decoder did not finish in {timeout:g} s and was ended") from None
                code = self.process.wait()
                raise MediaError(f"{name}: the decoder crashed (exit status {code}){self.last_words()}") from None
            finally:
                timer.cancel()
                timer.join()  # so that a timer that fires now can't end the process under the next call
                if expired.is_set() or not clean:
                    self.stop()

    def start(self) -> None:
        self.process = subprocess.Popen(
            # -P: this folder has modules whose names others could mean.
            [sys.executable, "-P", SCRIPT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            pipesize=1 << 20,  # a frame in few turns
        )

    def stop(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self.process is not None and self.process.stdin is not None
        self.process.stdin.write(json.dumps(message).encode() + b"\n")
        self.process.stdin.flush()
        return self.reply()

    def reply(self) -> dict[str, Any]:
        assert self.process is not None and self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.endswith(b"\n"):
            raise EOFError
        message = json.loads(line)
        if "error" in message:
            raise _Refused(message["error"])
        return message

    def receive(self, array: np.ndarray) -> np.ndarray:
        """Fill an array from the pipe, without a copy."""
        assert self.process is not None and self.process.stdout is not None
        if self.process.stdout.readinto(array.reshape(-1).view(np.uint8).data) < array.nbytes:
            raise EOFError
        return array

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Decode frames (F, H, W, 3)."""
        message = self.ask({"read": indices.tolist()})
        frames = np.empty((len(indices), *message["shape"][1:]), np.uint8)
        done = 0
        while True:
            self.receive(frames[done : done + message["shape"][0]])
            done += message["shape"][0]
            if done == len(frames):
                return frames
            message = self.reply()

    def printed(self) -> list[str]:
        """What the decoder printed for this file, without addresses and source lines."""
        self.log.seek(0)
        lines = (self.log.read(1 << 20) or b"").decode(errors="replace").splitlines()
        return [
            text
            for line in lines
            if (text := re.sub(r"^\[[^]]*\] (/github/\S+ )?(ERROR opening: .*, )?", "", line).strip())
        ]

    def reason(self, error: str) -> str:
        """Put the decoder's error into words: what it printed says more than decord's own 'Error reading'."""
        if "cannot find video stream" in error:
            return "it has no video stream"
        if "Error sending packet" in error:
            return "the next is damaged"
        if "Error reading" in error and (printed := self.printed()):
            return printed[0]
        return re.sub(r"\[[\d:]+\] |/github/\S+ |^DECORDError: ", "", error)

    def last_words(self) -> str:
        """The last line that the decoder printed."""
        return f": {printed[-1]}" if (printed := self.printed()) else ""

    def complaints(self) -> list[str]:
        """What the codec said, in one note; a sound file says nothing."""
        printed = self.printed()
        return [f"the decoder complained ({len(printed)} lines, first: {printed[0]})"] if printed else []


SCRIPT = str(Path(__file__).with_name("_decode.py"))
_decoders: dict[int, _Decoder] = {}


def _decoder() -> _Decoder:
    """Give the calling process its decoder. A forked worker must not talk to its parent's, hence the key."""
    pid = os.getpid()
    return _decoders.get(pid) or _decoders.setdefault(pid, _Decoder())


@atexit.register
def _stop() -> None:
    if os.getpid() in _decoders:
        decoder = _decoders[os.getpid()]
        decoder.stop()
        decoder.log.close()
