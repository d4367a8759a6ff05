"""Media: real decoders, real files, and every way in which a file can be wrong."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import warnings
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from mmqlora import media
from mmqlora.errors import MediaError
from mmqlora.media import (
    Audio,
    SkipBroken,
    log_mel,
    read_audio,
    read_video,
    uniform_indices,
    write_audio,
    write_video,
)


@pytest.fixture(scope="session")
def real_media_dir() -> Path:
    folder = Path(os.environ.get("MMQLORA_REAL", Path(__file__).parents[2] / "shared" / "real"))
    if not (folder / "video").is_dir():
        pytest.skip("no real media: set MMQLORA_REAL to a folder with video/, speech/ and broken/")
    return folder


def noise(count: int = 20, height: int = 36, width: int = 64, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


@pytest.fixture
def clip(tmp_path: Path) -> tuple[Path, np.ndarray]:
    path, frames = tmp_path / "clip.avi", noise()
    write_video(path, frames, rate=25)
    return path, frames


def mjpeg(path: Path, frames: np.ndarray, damaged: int | None = None) -> None:
    """Turn an uncompressed AVI into one of JPEG pictures, the simplest codec that can fail on a frame."""
    pictures = []
    for frame in frames:
        picture = io.BytesIO()
        Image.fromarray(frame).save(picture, "JPEG")
        pictures.append(picture.getvalue())
    if damaged is not None:
        pictures[damaged] = bytes(len(pictures[damaged]))
    write_video(path, frames, rate=25)
    head = path.read_bytes()
    head = head[: head.index(b"movi") - 8].replace(b"DIB ", b"MJPG")
    form = head.index(b"strf") + 8 + 16
    head = head[:form] + b"MJPG" + head[form + 4 :]
    movie = b"".join(b"00dc" + struct.pack("<I", len(p)) + p + bytes(len(p) % 2) for p in pictures)
    body = head[8:] + b"LIST" + struct.pack("<I", len(movie) + 4) + b"movi" + movie
    path.write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)


# Choosing frames


@given(total=st.integers(1, 10**7), count=st.integers(1, 300))
@settings(max_examples=200, deadline=None)
def test_uniform_indices_are_midpoints_of_equal_segments(total: int, count: int) -> None:
    indices = uniform_indices(total, count)
    assert len(indices) == count and indices.dtype == np.int64
    assert 0 <= indices[0] and indices[-1] < total and (np.diff(indices) >= 0).all()
    middles = (np.arange(count) + 0.5) * total / count
    assert (np.abs(indices + 0.5 - middles) <= 0.5 + 1e-6).all()  # the frame that is shown at the midpoint
    if count <= total:
        assert len(set(indices.tolist())) == count
    assert abs((indices + 0.5).mean() - total / 2) <= 0.5  # neither end is favored


@pytest.mark.parametrize(("total", "count"), [(0, 4), (4, 0), (4, -1)])
def test_uniform_indices_refuses_nothing(total: int, count: int) -> None:
    with pytest.raises(MediaError, match="at least 1"):
        uniform_indices(total, count)


# Video


@pytest.mark.parametrize("size", [(36, 64), (33, 45), (20, 48), (9, 24), (5, 8), (1, 1), (270, 481)])
@pytest.mark.parametrize("rate", [25, 29.97, 10 / 3])
def test_video_comes_back_exactly(tmp_path: Path, size: tuple[int, int], rate: float) -> None:
    frames = noise(5, *size)
    write_video(tmp_path / "v.avi", frames, rate)
    video = read_video(tmp_path / "v.avi")
    assert (video.frames == frames).all() and video.frames.dtype == np.uint8
    assert video.count == len(video) == 5 and video.notes == ()
    np.testing.assert_allclose(video.times, np.arange(5) / rate, atol=1e-3)
    assert video.rate == pytest.approx(rate, rel=1e-3) and video.duration == pytest.approx(5 / rate, rel=1e-3)


def test_frames_can_be_a_number_or_indices_in_any_order(clip: tuple[Path, np.ndarray]) -> None:
    path, frames = clip
    few = read_video(path, frames=4)
    assert few.indices.tolist() == [2, 7, 12, 17] and (few.frames == frames[few.indices]).all()
    np.testing.assert_allclose(few.times, few.indices / 25)
    chosen = read_video(path, frames=[19, 0, 7, 7])
    assert (chosen.frames == frames[[19, 0, 7, 7]]).all() and chosen.times.tolist() == [0.76, 0.0, 0.28, 0.28]
    none = read_video(path, frames=[])
    assert none.frames.shape == (0, 36, 64, 3) and none.count == 20 and none.duration == 0.8
    assert len(read_video(path, frames=30)) == 30  # more than there are repeats some


@pytest.mark.parametrize("size", [(18, 32), (27, 48), (6, 8), (100, 10)])
def test_size_scales_while_decoding(tmp_path: Path, size: tuple[int, int]) -> None:
    ramp = np.linspace(0, 255, 64).astype(np.uint8)
    write_video(tmp_path / "v.avi", np.broadcast_to(ramp[None, None, :, None], (3, 36, 64, 3)), rate=5)
    frames = read_video(tmp_path / "v.avi", size=size).frames
    assert frames.shape == (3, *size, 3)
    expected = np.interp((np.arange(size[1]) + 0.5) * 64 / size[1] - 0.5, np.arange(64), ramp)
    assert np.abs(frames.mean((0, 1, 3)) - expected).max() < 8


@pytest.mark.parametrize(
    ("frames", "says"),
    [
        ([20], "0 to 19 exist"),
        ([-1], "0 to 19 exist"),
        ([0.5], "list of ints"),
        ([[1]], "list of ints"),
        (0, "0 of 20"),
    ],
)
def test_frames_that_do_not_exist(clip: tuple[Path, np.ndarray], frames: object, says: str) -> None:
    with pytest.raises(MediaError, match=says):
        read_video(clip[0], frames=frames)
    assert len(read_video(clip[0])) == 20  # the decoder is still in step


def test_long_reads_come_in_chunks(tmp_path: Path) -> None:
    frames = noise(60, 500, 640)  # 58 MB, more than a chunk
    write_video(tmp_path / "v.avi", frames, rate=25)
    assert (read_video(tmp_path / "v.avi").frames == frames).all()


def test_write_video_refuses_what_it_cannot_write(tmp_path: Path) -> None:
    for wrong in (np.zeros((2, 8, 8, 3)), np.zeros((8, 8, 3), np.uint8), np.zeros((0, 8, 8, 3), np.uint8)):
        with pytest.raises(MediaError, match=r"uint8 \(F, H, W, 3\)"):
            write_video(tmp_path / "v.avi", wrong, rate=25)
    with pytest.raises(MediaError, match="1 GB"):
        write_video(tmp_path / "v.avi", np.broadcast_to(np.uint8(0), (2000, 500, 500, 3)), rate=25)


# Files that are wrong


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "empty"), (b"just text, " * 90, "as video"), (bytes(5000), "as video"), (None, "No such file")],
)
@pytest.mark.parametrize("read", [read_video, read_audio])
def test_files_that_are_no_media(tmp_path: Path, content: bytes | None, says: str, read: object) -> None:
    path = tmp_path / "file.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(
        MediaError, match=f"file.mp4: .*{says if read is read_video else says.replace('video', 'audio')}"
    ):
        read(path)


@pytest.mark.parametrize("read", [read_video, read_audio])
def test_what_is_not_a_file_is_not_opened(tmp_path: Path, read: object) -> None:
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    with pytest.raises(MediaError, match="pipe"):
        read(tmp_path / "pipe")
    with pytest.raises(MediaError, match="folder"):
        read(tmp_path)


def test_cut_short_is_an_error_that_counts_and_the_rest_can_be_read(clip: tuple[Path, np.ndarray]) -> None:
    path, frames = clip
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"movi") + 4 + 12 * (8 + 36 * 64 * 3)])
    for ask in (None, 4):
        with pytest.raises(MediaError, match=r"12 of 20 frames .*cut short.*range\(12\)"):
            read_video(path, ask)
    with pytest.warns(UserWarning, match="announces 20 frames and holds 12"):
        video = read_video(path, range(12))
    assert (video.frames == frames[:12]).all() and len(video.notes) == 1


def test_a_span_of_a_video_is_read_by_its_times(clip: tuple[Path, np.ndarray]) -> None:
    path, frames = clip
    video = read_video(path, start=0.2, stop=0.4)  # 25 frames a second: frame 5 is first shown at 0.2 s
    assert video.indices.tolist() == [5, 6, 7, 8, 9] and (video.frames == frames[5:10]).all()
    assert video.times[0] == 0.2 and video.count == 20
    assert read_video(path, 2, start=0.2, stop=0.4).indices.tolist() == [6, 8]
    assert read_video(path, start=0.7, stop=9).indices.tolist() == [18, 19]
    for start, stop in ((0.8, None), (0.4, 0.4), (0.21, 0.23), (-1, 0.4)):
        with pytest.raises(MediaError, match=r"no frames in .*holds 0\.8 s"):
            read_video(path, 4, start=start, stop=stop)
    with pytest.raises(MediaError, match="not with indices"):
        read_video(path, [3], start=0.2)


@pytest.mark.filterwarnings("ignore:.*announces")
def test_a_span_before_the_cut_of_a_video_can_be_read_and_one_beyond_it_can_not(clip: tuple[Path, np.ndarray]) -> None:
    path, frames = clip
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"movi") + 4 + 12 * (8 + 36 * 64 * 3)])
    assert (read_video(path, start=0.2, stop=0.4).frames == frames[5:10]).all()
    for start, stop in ((0.4, 0.6), (0.4, None), (0.6, 0.7)):
        with pytest.raises(MediaError, match=r"12 of 20 frames .*cut short"):
            read_video(path, start=start, stop=stop)


@pytest.mark.filterwarnings("ignore:.*complained")  # decord reads ahead, now and then as far as the damage
def test_a_damaged_frame_is_named_and_the_rest_can_be_read(tmp_path: Path) -> None:
    smooth = np.broadcast_to(np.arange(20, dtype=np.uint8)[:, None, None, None] * 10, (20, 48, 64, 3))
    mjpeg(tmp_path / "good.avi", smooth)
    assert np.abs(read_video(tmp_path / "good.avi").frames.astype(int) - smooth).max() <= 2
    mjpeg(tmp_path / "bad.avi", smooth, damaged=5)
    with pytest.raises(MediaError, match=r"at least [0-5] of 20 frames can be decoded \(the next is damaged\)"):
        read_video(tmp_path / "bad.avi")
    with pytest.raises(MediaError, match="damaged"):
        read_video(tmp_path / "bad.avi", [5])
    for _ in range(5):  # decord may lose frames right before the damage, but never gives wrong ones
        with contextlib.suppress(MediaError):
            video = read_video(tmp_path / "bad.avi", range(5))
            break
    assert np.abs(video.frames.astype(int) - smooth[:5]).max() <= 2
    assert read_video(tmp_path / "bad.avi", [12]).frames[0, 0, 0].tolist() == pytest.approx([120] * 3, abs=2)


def test_a_wrong_count_in_the_header_of_a_whole_file_is_a_note(clip: tuple[Path, np.ndarray]) -> None:
    path, frames = clip
    data = bytearray(path.read_bytes())
    field = data.index(b"strh") + 8 + 32
    assert struct.unpack("<I", data[field : field + 4]) == (20,)
    data[field : field + 4] = struct.pack("<I", 200)
    path.write_bytes(data)
    with pytest.warns(UserWarning, match="announces 200"):
        assert (read_video(path).frames == frames).all()


@pytest.mark.parametrize(
    "starts", [[-3.8e17, 0.04, 0.08], [0.0, np.nan, 0.08], [0.0, 0.08, 0.04], [-0.04, 0.0, 0.04], [0.0, 0.04, 3.8e17]]
)
def test_absurd_times_are_taken_from_the_rate(starts: list[float]) -> None:
    notes: list[str] = []
    shown = np.array([starts, np.add(starts, 0.04)]).T
    times, rate, duration = media._timeline("old.avi", shown, 25.0, notes)
    np.testing.assert_allclose(times, [0, 0.04, 0.08])
    assert rate == 25 and duration == pytest.approx(0.12) and "make no sense" in notes[0]
    with pytest.raises(MediaError, match="neither"):
        media._timeline("old.avi", shown, 0.0, notes)


def test_sane_times_stay_as_they_are() -> None:
    shown = np.array([[0.0, 0.04], [0.04, 0.08], [0.04, 0.5], [1.5, 1.54]])  # variable rate, two at once
    notes: list[str] = []
    times, rate, duration = media._timeline("phone.mp4", shown, 0.0, notes)
    assert times.tolist() == [0, 0.04, 0.04, 1.5] and duration == 1.54 and rate == pytest.approx(4 / 1.54) and not notes


# The decoder's process


@pytest.fixture
def other_decoder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> object:
    """Put another script in the decoder's place; the real one afterwards."""
    media._stop()
    media._decoders.clear()

    def use(source: str) -> None:
        script = tmp_path / "decoder.py"
        script.write_text(source)
        monkeypatch.setattr(media, "SCRIPT", str(script))

    yield use
    media._decoders.pop(os.getpid()).stop()


def test_a_decoder_that_hangs_is_ended(
    clip: tuple[Path, np.ndarray], other_decoder: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = media.SCRIPT
    other_decoder("import time; time.sleep(1000)")
    began = time.monotonic()
    with pytest.raises(MediaError, match=r"clip.avi: the decoder did not finish in 0.5 s"):
        read_video(clip[0], timeout=0.5)
    assert time.monotonic() - began < 3
    monkeypatch.setattr(media, "SCRIPT", real)
    assert (read_video(clip[0]).frames == clip[1]).all()  # and a new one takes its place


def test_a_decoder_that_crashes_is_an_error(clip: tuple[Path, np.ndarray], other_decoder: object) -> None:
    other_decoder("import os, signal, sys; print('last words', file=sys.stderr); os.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(MediaError, match=r"clip.avi: the decoder crashed \(exit status -11\): last words"):
        read_video(clip[0])


def test_a_decoder_that_crashes_between_reads_is_replaced(clip: tuple[Path, np.ndarray]) -> None:
    read_video(clip[0])
    process = media._decoders[os.getpid()].process
    process.kill()
    process.wait()
    assert (read_video(clip[0]).frames == clip[1]).all()


def test_a_stuck_decoder_goes_with_its_parent(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    process = subprocess.Popen([sys.executable, "-P", media.SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdin.write(json.dumps({"open": str(tmp_path / "pipe"), "size": None}).encode() + b"\n")
    process.stdin.flush()
    with pytest.raises(subprocess.TimeoutExpired):  # it does hang: FFmpeg waits for a writer
        process.wait(1.0)
    process.stdin.close()
    assert process.wait(5) == 0
    process.stdout.close()


def read_and_end(path: Path, pipe: Connection, ending: str) -> None:
    read_video(path)
    pipe.send(media._decoders[os.getpid()].process.pid)
    if ending == "killed":
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("ending", ["killed", "forked worker", "interpreter"])
def test_no_decoder_outlives_its_process(clip: tuple[Path, np.ndarray], ending: str) -> None:
    # Spawned, a process ends as an interpreter does; forked, as a DataLoader worker does: without clearing up.
    context = multiprocessing.get_context("spawn" if ending == "interpreter" else "fork")
    here, there = context.Pipe()
    process = context.Process(target=read_and_end, args=(clip[0], there, ending))
    process.start()
    decoder = here.recv()
    process.join(30)
    for _ in range(100):
        if not Path(f"/proc/{decoder}").exists() or " Z " in Path(f"/proc/{decoder}/stat").read_text():
            return
        time.sleep(0.05)
    os.kill(decoder, signal.SIGKILL)
    pytest.fail(f"the decoder is still there after its process ended: {ending}")


def test_threads_take_turns(clip: tuple[Path, np.ndarray]) -> None:
    path, frames = clip
    good = []

    def read(index: int) -> None:
        good.append((read_video(path, [index]).frames[0] == frames[index]).all())

    threads = [threading.Thread(target=read, args=(index,)) for index in range(20)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(good) == 20 and all(good)


# Audio


def tone(rate: int = 16000, seconds: float = 1.0, pitch: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * pitch * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


def test_audio_comes_back_exactly(tmp_path: Path) -> None:
    write_audio(tmp_path / "a.wav", tone(), 16000)
    audio = read_audio(tmp_path / "a.wav")
    assert (audio.samples == tone()).all() and audio.rate == 16000 and audio.duration == 1.0 and not audio.is_silent
    write_audio(tmp_path / "a.flac", tone(), 16000)
    np.testing.assert_allclose(read_audio(tmp_path / "a.flac").samples, tone(), atol=2**-15)


@pytest.mark.parametrize("native", [8000, 16000, 44100, 96000])
@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT"])
@pytest.mark.parametrize("channels", [1, 2])
def test_any_rate_depth_and_channels_become_mono_at_one_rate(
    tmp_path: Path, native: int, subtype: str, channels: int
) -> None:
    left = tone(native)
    soundfile.write(tmp_path / "a.wav", np.stack([left, 0 * left][:channels], axis=1), native, subtype=subtype)
    audio = read_audio(tmp_path / "a.wav")
    assert audio.samples.dtype == np.float32 and audio.samples.shape == (16000,)
    inner = slice(500, -500)  # the filter rings at the ends
    np.testing.assert_allclose(audio.samples[inner], tone()[inner] / channels, atol=5e-3)
    assert read_audio(tmp_path / "a.wav", rate=None).rate == native


def test_a_span_of_audio_knows_when_it_is(tmp_path: Path) -> None:
    write_audio(tmp_path / "a.wav", tone(), 16000)
    audio = read_audio(tmp_path / "a.wav", start=0.25, stop=0.5)
    assert (audio.samples == tone()[4000:8000]).all()
    assert audio.times[0] == 0.25 and audio.times[-1] == pytest.approx(0.5 - 1 / 16000)
    assert len(read_audio(tmp_path / "a.wav", start=0.75, stop=9).samples) == 4000
    for start, stop in ((1.0, None), (2.0, 3.0), (0.5, 0.5), (-1.0, None)):
        with pytest.raises(MediaError, match="holds 1 s"):
            read_audio(tmp_path / "a.wav", start=start, stop=stop)


def test_silence_is_audio_and_nothing_is_not(tmp_path: Path) -> None:
    write_audio(tmp_path / "silent.wav", np.zeros(1600, np.float32), 16000)
    audio = read_audio(tmp_path / "silent.wav")
    assert audio.is_silent and audio.duration == 0.1
    mel, _ = log_mel(audio)
    assert np.isfinite(mel).all()
    soundfile.write(tmp_path / "nothing.wav", np.zeros(0, np.float32), 16000)
    with pytest.raises(MediaError, match="holds 0 s"):
        read_audio(tmp_path / "nothing.wav")


def test_samples_that_are_no_numbers(tmp_path: Path) -> None:
    samples = tone()
    samples[[5, 7]] = np.nan, np.inf
    soundfile.write(tmp_path / "a.wav", samples, 16000, subtype="FLOAT")
    with pytest.raises(MediaError, match="2 of 16000 samples are NaN or infinite"):
        read_audio(tmp_path / "a.wav")
    assert len(read_audio(tmp_path / "a.wav", start=0.5).samples) == 8000
    with pytest.raises(MediaError, match="finite"):
        write_audio(tmp_path / "b.wav", samples, 16000)
    with pytest.raises(MediaError, match=r"b.xyz: can't write"):
        write_audio(tmp_path / "b.xyz", tone(), 16000)


@pytest.mark.parametrize("ending", ["wav", "flac", "ogg", "mp3"])
def test_audio_cut_short_is_an_error(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    soundfile.write(path, tone(), 16000)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(MediaError, match=f"a.{ending}: "):
        read_audio(path)
    if ending != "ogg":  # whose half does not even open
        assert (read_audio(path, stop=0.1).samples == np.float32(soundfile.read(path, frames=1600)[0])).all()


@pytest.mark.parametrize("pitch", [300.0, 1000.0, 3000.0])
def test_log_mel_shows_a_tone_where_and_when_it_is(pitch: float) -> None:
    samples = np.concatenate([np.zeros(8000, np.float32), tone(pitch=pitch)])
    mel, times = log_mel(Audio(samples, 16000, start=2.0), bands=64)
    assert mel.shape == (151, 64) and times[0] == 2.0 and times[-1] == pytest.approx(3.5)
    assert mel.min() >= -100 and (mel[times < 2.48] == -100).all() and (mel[times > 2.52].max(axis=1) > -40).all()
    # Slaney's scale: linear to 1 kHz (15 units), then 27 units for each factor of 6.4.
    units = np.array([h * 3 / 200 if h < 1000 else 15 + 27 * np.log(h / 1000) / np.log(6.4) for h in (pitch, 8000)])
    assert abs(mel[times > 2.6].mean(0).argmax() - (units[0] / units[1] * 65 - 1)) <= 1


def test_log_mel_of_almost_nothing() -> None:
    mel, times = log_mel(Audio(np.ones(1, np.float32), 16000))
    assert mel.shape == (1, 80) and times.tolist() == [0.0]


# Skipping broken items


class Clips(Dataset):
    """Items whose value is their index, some of them broken."""

    def __init__(self, folder: Path, broken: set[int], total: int = 12) -> None:
        self.paths = [folder / f"{index:03}.avi" for index in range(total)]
        for index, path in enumerate(self.paths):
            if index in broken:
                path.write_text("not a video")
            else:
                write_video(path, np.full((4, 8, 32, 3), index, np.uint8), rate=4)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(read_video(self.paths[index], frames=1).frames)


def values(loader: DataLoader) -> list[int]:
    return torch.cat([batch[:, 0, 0, 0, 0] for batch in loader]).tolist()


@pytest.mark.parametrize(("workers", "start"), [(0, None), (2, "fork"), (1, "spawn")])
def test_the_next_readable_item_stands_in(tmp_path: Path, workers: int, start: str | None) -> None:
    clips = SkipBroken(Clips(tmp_path, {3, 4, 11}))
    loader = DataLoader(
        clips, batch_size=2, num_workers=workers, multiprocessing_context=start, persistent_workers=workers > 0
    )
    for _ in range(2):
        assert values(loader) == [0, 1, 2, 5, 5, 5, 6, 7, 8, 9, 10, 0]
    assert sorted(clips.broken) == [3, 4, 11] and "003.avi" in clips.broken[3]
    with pytest.warns(UserWarning, match=r"3 of 12 items could not be read: .*003.avi.*004.avi.*011.avi"):
        del loader, clips


def test_a_broken_item_is_tried_once(tmp_path: Path) -> None:
    clips = SkipBroken(Clips(tmp_path, {3}))
    assert clips[3].unique().tolist() == [4] and clips[-9].unique().tolist() == [4]
    clips.dataset.paths[3] = clips.dataset.paths[0]  # would be readable now
    assert clips[3].unique().tolist() == [4]
    with pytest.raises(IndexError):
        clips[12]
    with pytest.warns(UserWarning, match="1 of 12"):
        del clips


@pytest.mark.parametrize("workers", [0, 2])
def test_readable_leaves_broken_items_out(tmp_path: Path, workers: int) -> None:
    clips = SkipBroken(Clips(tmp_path, {3, 4, 11}))
    subset = clips.readable(workers=workers)
    assert values(DataLoader(subset, batch_size=4)) == [0, 1, 2, 5, 6, 7, 8, 9, 10]
    with pytest.warns(UserWarning, match="3 of 12"):
        del clips


@pytest.mark.filterwarnings("ignore:.*items could not be read")
def test_everything_broken_is_an_error(tmp_path: Path) -> None:
    clips = SkipBroken(Clips(tmp_path, set(range(12))))
    with pytest.raises(MediaError, match=r"none of 12 items .*000.avi.*and 9 more"):
        clips.readable()
    with pytest.raises(MediaError, match="none of 12 items"):
        clips[5]
    many = SkipBroken(Clips(tmp_path, set(range(40)), total=41))
    with pytest.raises(MediaError, match="32 items in a row"):
        many[0]
    assert len(many.broken) == 32


def test_other_errors_pass_and_good_data_says_nothing(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clips = SkipBroken(Clips(tmp_path, set()))
        assert values(DataLoader(clips, batch_size=4)) == list(range(12))
        clips.dataset.paths[2] = 7  # a mistake in the data set, not a broken file
        with pytest.raises(TypeError):
            clips[2]
        del clips


# Real files


EXPECTED = {
    "audio_only.mp4": "no video stream",
    "bitflips.mp4": (132, "complained"),
    "empty.mp4": "empty",
    "garbage.mp4": "as video",
    "oneframe.mp4": (1, ""),
    "rotated90.mp4": (52, ""),
    "text.mp4": "as video",
    "truncated50.mp4": "as video",
    "truncated50_faststart.mp4": "at least 5[0-3] of 132 frames",
    "truncated_vtest.avi": "259 of 795 frames",
    "vfr.mp4": (16, ""),
}


@pytest.mark.parametrize("name", sorted(EXPECTED))
@pytest.mark.filterwarnings("ignore:.*complained")
def test_broken_files(real_media_dir: Path, name: str) -> None:
    expected = EXPECTED[name]
    path = real_media_dir / "broken" / name
    if isinstance(expected, str):
        with pytest.raises(MediaError, match=f"{name}: .*{expected}"):
            read_video(path, size=(36, 64), timeout=100)  # a busy machine is no failure
    else:
        video = read_video(path, size=(36, 64), timeout=100)
        assert len(video) == expected[0] and video.frames.std() > 0
        assert (np.diff(video.times) > 0).all() and expected[1] in " ".join(video.notes)
        assert bool(video.notes) == bool(expected[1])
    with pytest.raises(MediaError, match=r"as audio|empty"):
        read_audio(path)


@pytest.mark.parametrize("name", sorted(EXPECTED))
@pytest.mark.filterwarnings("ignore:.*complained")
def test_a_broken_file_holds_nobody_up_for_more_than_the_limit(real_media_dir: Path, name: str) -> None:
    start = time.monotonic()
    with contextlib.suppress(MediaError):  # that, too, is an answer in time
        read_video(real_media_dir / "broken" / name)
    assert time.monotonic() - start < 21


@pytest.mark.filterwarnings("ignore:.*complained")
def test_what_is_left_of_a_real_file_can_be_read(real_media_dir: Path) -> None:
    with pytest.warns(UserWarning, match="132"):
        left = read_video(real_media_dir / "broken" / "truncated50_faststart.mp4", range(45), size=(90, 160))
    whole = read_video(real_media_dir / "video" / "bigbuckbunny.mp4", range(45), size=(90, 160))
    assert (left.frames == whole.frames).all()


def test_variable_rate_and_rotation(real_media_dir: Path) -> None:
    video = read_video(real_media_dir / "broken" / "vfr.mp4")
    gaps = np.diff(video.times)
    assert gaps.max() > 5 * gaps.min()
    upright = read_video(real_media_dir / "broken" / "rotated90.mp4", [10])
    assert upright.frames.shape == (1, 640, 272, 3)
    small = read_video(real_media_dir / "broken" / "rotated90.mp4", [10], size=(160, 68)).frames[0]
    by_hand = np.asarray(Image.fromarray(upright.frames[0]).resize((68, 160), Image.BICUBIC))
    assert np.abs(small.astype(int) - by_hand).mean() < 3


@pytest.mark.parametrize("name", ["bikes.mp4", "carphone_pristine.mp4"])
def test_chosen_frames_are_the_frames_of_the_whole(real_media_dir: Path, name: str) -> None:
    path = real_media_dir / "video" / name
    whole = read_video(path, size=(68, 160))
    order = np.random.default_rng(0).permutation(whole.count)[:20]
    some = read_video(path, order, size=(68, 160))
    assert (some.frames == whole.frames[order]).all() and (some.times == whole.times[order]).all()


def test_real_speech(real_media_dir: Path) -> None:
    folder = real_media_dir / "speech" / "librivox"
    items = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    for item in items:
        audio = read_audio(folder / Path(item["path"]).name)
        assert audio.duration == pytest.approx(item["duration"], abs=0.01) and not audio.is_silent
