from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import rankdata
from torch.utils._python_dispatch import TorchDispatchMode

import mmqlora as mm
from mmqlora import SignalError
from mmqlora.datasets.worlds import Item, World
from mmqlora.media import Audio, log_mel, read_audio
from mmqlora.signals import (
    SIGNALS,
    audio_signals,
    pool_steps,
    signals,
    thumbnail_signals,
    thumbnails,
    video_signals,
)

VIDEO = [name for name, (kind, _) in SIGNALS.items() if kind in ("video", "both")]
AUDIO = [name for name, (kind, _) in SIGNALS.items() if kind in ("audio", "both")]


def auc(scores: np.ndarray, truth: np.ndarray) -> float:
    """How often a step where it is true scores higher than one where it isn't; ties count half."""
    ranks, hits = rankdata(scores.round(5)), truth.sum()
    return (ranks[truth].sum() - hits * (hits + 1) / 2) / (hits * (~truth).sum())


def frames_of(item: Item) -> torch.Tensor:
    return torch.from_numpy(item.frames).permute(0, 3, 1, 2)[None]


def moving(item: Item) -> np.ndarray:
    """Frames that differ from the one before, from the tracks behind the pixels."""
    changed = np.zeros(len(item.frames), bool)
    for track in item.tracks:
        shown = np.stack([track.color, track.angle, track.x, track.y]) * track.visible
        changed[1:] |= (np.diff(shown) != 0).any(0) | np.diff(track.visible)
    return changed


def starting(item: Item) -> np.ndarray:
    starts = np.zeros(len(item.frames), bool)
    starts[[round(event.start * item.rate) for event in item.events]] = True
    return starts


def flicker(item: Item) -> torch.Tensor:
    """The frames under a light that goes up and down, as a camera writes them: rounded and clipped."""
    rng, count = np.random.default_rng(item.index), len(item.frames)
    gain = np.exp(rng.normal(0, 0.15, (count, 1, 1, 1)))
    frames = np.rint(item.frames * gain + rng.normal(0, 10, (count, 1, 1, 1))).clip(0, 255).astype(np.uint8)
    return torch.from_numpy(frames).permute(0, 3, 1, 2)[None]


def pooled_auc(world: World, name: str, truth, frames=frames_of) -> float:
    scores = [video_signals(frames(item), names=name)[0, 1:, 0].numpy() for item in world]
    return auc(np.concatenate(scores), np.concatenate([truth(item)[1:] for item in world]))


@pytest.fixture(scope="module")
def clip() -> torch.Tensor:
    return frames_of(World("clips", count=10, seed=3, pace="dense")[4])


@pytest.fixture(scope="module")
def mel() -> torch.Tensor:
    return torch.from_numpy(log_mel(World("sounds", count=10, seed=3, pace="dense")[4].audio)[0])[None]


# What they tell


@pytest.mark.parametrize(
    "shift, frames, least",
    [
        ({}, frames_of, 0.97),
        ({"texture": 1.0}, frames_of, 0.97),
        ({"blur": 1.0}, frames_of, 0.93),
        ({"grain": 1.0}, frames_of, 0.85),
        ({}, flicker, 0.95),
        ({"grain": 0.5}, flicker, 0.9),
    ],
    ids=["clean", "texture", "blur", "grain", "flicker", "grain and flicker"],
)
def test_motion_finds_the_frames_in_which_something_moves(shift, frames, least):
    assert pooled_auc(World("clips", count=60, seed=5, shifts=shift), "motion", moving, frames) > least


@pytest.mark.parametrize("name, least", [("novelty", 0.9), ("keyframe", 0.88)])
@pytest.mark.parametrize("frames", [frames_of, flicker])
def test_novelty_and_keyframes_find_where_events_start(name, least, frames):
    assert pooled_auc(World("clips", count=60, seed=5), name, starting, frames) > least


def test_what_comes_back_moves_but_is_not_new():
    there, back = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    clip = torch.stack([there] * 4 + [back] * 2 + [there] * 4)[None]
    motion, novelty = video_signals(clip, names=["motion", "novelty"])[0].T
    assert set(motion.topk(2).indices.tolist()) == {4, 6}
    assert novelty.argmax() == 4 and novelty[6] == novelty[7] == novelty[5]


def test_what_was_last_shown_long_ago_is_new_again():
    there, back = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    novelty = video_signals(torch.stack([there] * 3 + [back] * 9 + [there] * 3)[None], names="novelty")[0, :, 0]
    assert set(novelty.topk(2).indices.tolist()) == {3, 12}


def test_a_cut_is_a_keyframe_and_what_goes_on_after_it_is_none():
    generator = torch.Generator().manual_seed(0)
    shots = torch.rand(2, 3, 32, 32, generator=generator)
    pan = torch.stack([shots[step // 10].roll(step, -1) for step in range(20)])[None]
    keyframe = video_signals(pan, names="keyframe")[0, :, 0]
    assert keyframe.argmax() == 10
    others = torch.cat([keyframe[1:10], keyframe[11:]])
    assert keyframe[10] > 3 * others.max().clamp(min=0.5)


def test_a_start_counts_and_what_goes_on_does_not():
    generator = torch.Generator().manual_seed(0)
    still, busy = torch.rand(1, 3, 16, 16, generator=generator), torch.rand(10, 3, 16, 16, generator=generator)
    novelty, keyframe = video_signals(torch.cat([still.expand(10, -1, -1, -1), busy])[None], names=VIDEO[1:3])[0].T
    assert novelty[14:].min() > 0.5 * novelty[10]  # still as new
    assert keyframe.argmax() == 10 and keyframe[14] < 0.5 * keyframe[10] and keyframe[18] == keyframe.min()
    # A clip that is as busy from its first frame on starts nothing.
    always = video_signals(busy[None], names="keyframe", standardize=False)
    assert always.max() < 0.3


@pytest.mark.parametrize("shift, least", [({}, 0.95), ({"hiss": 1.0}, 0.95), ({"reverb": 1.0}, 0.85)])
@pytest.mark.parametrize("name", ["flux", "onset"])
def test_flux_and_onset_peak_where_sounds_start(shift, least, name):
    scores, truth = [], []
    for item in World("sounds", count=30, seed=3, shifts=shift):
        sound = signals(item.audio, names=name)
        starts = np.array([time for event in item.events for time in onsets(event)])
        apart = np.abs(sound.times[:, None] - starts).min(1)
        # The highest within 20 ms: a window of 25 ms touches a sound before it starts.
        near = np.lib.stride_tricks.sliding_window_view(np.pad(sound.values[:, 0], 2, mode="edge"), 5).max(1)
        clear = (apart < 0.0051) | (apart > 0.06)
        scores.append(near[clear])
        truth.append(apart[clear] < 0.0051)
    assert auc(np.concatenate(scores), np.concatenate(truth)) > least


def onsets(event) -> list[float]:
    """Both starts of a sound that is heard twice: sound, a pause of 80 ms, sound, if nothing hurries it."""
    if event.predicate == "once":
        return [event.start]
    return [event.start, event.start + (event.stop - event.start - 0.08) / 2 + 0.08]


@pytest.mark.parametrize("name", ["energy", "speech"])
@pytest.mark.parametrize("shift", [{}, {"hiss": 1.0}, {"timbre": 1.0}], ids=["clean", "hiss", "timbre"])
def test_energy_and_activity_last_as_long_as_sounds(name, shift):
    scores, truth = [], []
    for item in World("sounds", count=30, seed=3, shifts=shift):
        sound = signals(item.audio, names=name)
        scores.append(sound.values[:, 0])
        truth.append(np.any([(event.start <= sound.times) & (sound.times < event.stop) for event in item.events], 0))
    assert auc(np.concatenate(scores), np.concatenate(truth)) > 0.88


@pytest.mark.parametrize("folder", ["librivox", "prompts", "synthetic"])
def test_speech_is_told_from_noise_better_than_by_energy(real, folder):
    rng, rate, areas = np.random.default_rng(0), 16000, []
    for line in (real / "speech" / folder / "manifest.jsonl").read_text().splitlines()[:8]:
        said = read_audio(real / "speech" / folder / json.loads(line)["path"], stop=4.0).samples
        level = np.sqrt(np.square(said).mean())
        samples = np.concatenate([np.zeros(rate), said, np.zeros(rate)])
        samples += 0.01 * level * rng.normal(size=len(samples))
        samples[3000:9000] += level * rng.normal(size=6000)  # a burst of noise as loud as the voice
        sound = signals(Audio(samples.astype(np.float32), rate), names=["speech", "energy"])
        spoken = (sound.times >= 1) & (sound.times < 1 + len(said) / rate)
        areas.append([auc(column, spoken) for column in sound.values.T])
    speech, energy = np.mean(areas, 0)
    assert speech > 0.88 and speech > energy + 0.03


def test_speech_is_a_share_before_it_is_standardized(mel):
    speech = audio_signals(mel, names="speech", standardize=False)
    assert speech.min() >= 0 and 0.3 < speech.max() <= 1


# What they don't depend on


def both(clip: torch.Tensor, mel: torch.Tensor) -> list:
    return [(clip.float(), video_signals, VIDEO), (mel, audio_signals, AUDIO)]


@given(scale=st.floats(0.01, 100), offset=st.floats(-5, 5))
def test_normalization_changes_nothing(clip, mel, scale, offset):
    for x, compute, names in both(clip, mel):
        moved = scale * (x / 255 + offset)  # offsets of up to 5 times the range
        torch.testing.assert_close(compute(moved, names=names), compute(x, names=names), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("factor", [1e-30, 1e-6, 1e30])
def test_neither_tiny_nor_huge_values_get_lost(clip, mel, factor):
    for x, compute, names in both(clip, mel):
        torch.testing.assert_close(compute(x * factor, names=names), compute(x, names=names), atol=1e-4, rtol=1e-4)


def test_a_negative_of_a_film_moves_alike(clip):
    torch.testing.assert_close(video_signals(255 - clip), video_signals(clip), atol=1e-4, rtol=1e-4)


@given(st.integers(1, 23), st.sampled_from(["left", "right", "between"]), st.integers(0, 2**32 - 1))
def test_padding_changes_nothing_and_holds_zeros(clip, mel, length, where, seed):
    rng = np.random.default_rng(seed)
    for x, compute, names in both(clip, mel):
        x = x[:, :length]
        valid = np.zeros(length + 7, bool)
        places = {"left": np.arange(7, length + 7), "right": np.arange(x.shape[1])}
        valid[places.get(where, np.sort(rng.choice(length + 7, x.shape[1], replace=False)))[: x.shape[1]]] = True
        padded = torch.full((2, len(valid), *x.shape[2:]), torch.nan)
        padded[0, valid] = x[0]
        padded[1] = torch.from_numpy(rng.random(padded.shape[1:], np.float32))
        mask = torch.from_numpy(np.stack([valid, np.ones_like(valid)]))
        out = compute(padded, mask, names)
        torch.testing.assert_close(out[:1, valid], compute(x, names=names), atol=1e-5, rtol=1e-5)
        assert (out[0, ~valid] == 0).all()
        assert torch.equal(out, compute(padded, mask.long(), names))  # as tokenizers and processors write masks


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32])
def test_types_of_fewer_bits_hardly_matter(clip, mel, dtype):
    for x, compute, names in both(clip, mel.round()):
        out = compute(x.to(dtype), names=names)
        assert out.dtype == torch.float32
        torch.testing.assert_close(out, compute(x, names=names), atol=1e-4, rtol=1e-4)  # 0 to 255 are exact in all


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_normalized_frames_of_fewer_bits_give_nearly_the_same(clip, dtype):
    x = clip / 127.5 - 1
    assert (video_signals(x.to(dtype)) - video_signals(x)).abs().max() < 0.1


def test_bytes_give_what_floats_give(clip):
    assert clip.dtype == torch.uint8
    assert torch.equal(video_signals(clip), video_signals(clip.float()))


def test_autocast_changes_nothing(clip, mel):
    for x, compute, names in both(clip, mel):
        with torch.autocast("cpu", torch.bfloat16):
            cast = compute(x, names=names)
        assert torch.equal(cast, compute(x, names=names))


def test_they_are_the_same_each_time_and_attach_no_graph(clip, mel):
    for x, compute, names in both(clip, mel):
        once = compute(x.clone().requires_grad_(), names=names)
        assert not once.requires_grad and once.grad_fn is None
        with torch.inference_mode():
            again = compute(x.clone(), names=names)
        assert torch.equal(once, again)


def test_the_input_is_left_as_it_is(clip, mel):
    for x, compute, names in both(clip, mel):
        before, valid = x.clone(), torch.arange(x.shape[1])[None] < 9
        compute(x, valid, names)
        assert torch.equal(x, before)


def test_order_and_number_of_names_are_free(clip, mel):
    for x, compute, names in both(clip, mel):
        everything = compute(x, names=names)
        for place, name in enumerate(names):
            assert torch.equal(compute(x, names=name)[..., 0], everything[..., place])
        assert torch.equal(compute(x, names=names[::-1]), everything.flip(-1))
        assert compute(x, names=[]).shape == (*x.shape[:2], 0)


# Where they can't be told


@given(st.integers(2, 20), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 1e-7, 1e-6, 1e-5]))
def test_signals_are_standardized_or_zero(count, seed, still):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(2, count, 3, 8, 8, generator=generator)
    x[1] = x[1, :1] + still * torch.randn(x[1].shape, generator=generator)
    for out in (video_signals(x, names=VIDEO), audio_signals(x.flatten(2), names=AUDIO)):
        assert out.isfinite().all()
        mean, deviation = out.mean(1), out.std(1, correction=0)
        assert (mean.abs() < 1e-5).all()
        constant = (out == 0).all(1)
        torch.testing.assert_close(deviation[~constant], torch.ones_like(deviation[~constant]), atol=1e-4, rtol=0)
    assert (video_signals(x)[1] == 0).all()
    if count > 4:
        assert not (video_signals(x, names=["motion", "novelty"])[0] == 0).all(0).any()


BLANK = [0.0, 1.0, -3.5, 1e-20, 1e20]


@pytest.mark.parametrize("value", BLANK)
@pytest.mark.parametrize("noise", [0.0, 1e-7, 1e-6])
def test_blank_frames_and_silence_give_zeros(value, noise):
    x = value * (1 + noise * torch.randn(2, 30, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert (video_signals(x) == 0).all()
    assert (audio_signals(x.flatten(2)) == 0).all()


def test_a_still_clip_gives_zeros_in_every_type(clip):
    still = clip[:, :1].expand(-1, 12, -1, -1, -1)
    for x in (still, still / 255, (still / 255).half(), (still / 127.5 - 1).bfloat16()):
        assert (video_signals(x) == 0).all()


def test_fading_is_exposure_and_no_motion(clip):
    picture = clip[:, :1].expand(-1, 12, -1, -1, -1)
    faded = picture * torch.linspace(0.5, 1.5, 12).view(1, -1, 1, 1, 1) - torch.linspace(0, 9, 12).view(1, -1, 1, 1, 1)
    raw = video_signals(torch.cat([faded, clip[:, :12].float()]), names="motion", standardize=False)[..., 0]
    assert raw[0].max() < 0.02 < 0.2 < raw[1].max()


def test_a_sound_below_80_decibels_is_silent():
    hum = np.random.default_rng(0).normal(0, 1e-5, 16000).astype(np.float32)
    assert (signals(Audio(hum, 16000)).values == 0).all()
    assert not (signals(Audio(1000 * hum, 16000)).values == 0).all()


@pytest.mark.parametrize("steps", [0, 1])
def test_a_clip_of_one_step_or_none_gives_zeros(clip, mel, steps):
    for x, compute, names in both(clip, mel):
        valid = torch.arange(x.shape[1])[None] < steps
        assert (compute(x, valid, names) == 0).all()
        assert (compute(x[:, :1], names=names) == 0).all()


def test_the_first_step_tells_of_no_change(clip, mel):
    assert (video_signals(clip)[:, 0] == 0).all()
    assert (audio_signals(mel, names=["flux", "onset"])[:, 0] == 0).all()


def test_time_is_told_by_four_waves_that_carry_no_content(clip):
    waves = video_signals(clip, names=["time1", "time2", "time3", "time4"])
    assert torch.equal(
        waves, audio_signals(torch.rand(1, clip.shape[1], 5), names=["time1", "time2", "time3", "time4"])
    )
    assert (waves[0, :, 1].diff() < 0).all()  # one of them tells the start from the end
    place = torch.corrcoef(waves[0].T)
    assert (place - torch.eye(4)).abs().max() < 0.8  # and none repeats another


# What is refused


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_refused(clip, mel, bad):
    for x, compute, _ in both(clip, mel):
        x = torch.cat([x, x])
        x[1, 3].flatten()[0] = bad
        with pytest.raises(SignalError, match=r"clips \[1\] of 2"):
            compute(x)
        valid = torch.ones(x.shape[:2], dtype=torch.bool)
        valid[1, 3] = False
        assert compute(x, valid).isfinite().all()


@pytest.mark.parametrize(
    "compute, name, message",
    [
        (video_signals, "moton", "did you mean motion"),
        (video_signals, "xyz", "there are motion, novelty"),
        (video_signals, "speech", "'speech' is a signal of audio; video has motion"),
        (audio_signals, "novelty", "'novelty' is a signal of video; audio has flux"),
        (audio_signals, "onsett", "did you mean onset"),
    ],
)
def test_unknown_names_are_refused_with_what_would_fit(compute, name, message):
    with pytest.raises(SignalError, match=message):
        compute(torch.rand(1, 4, 3, 8, 8) if compute is video_signals else torch.rand(1, 4, 8), names=[name])


@pytest.mark.parametrize(
    "call",
    [
        lambda: video_signals(torch.rand(4, 3, 8, 8)),
        lambda: video_signals(torch.rand(1, 4, 3, 8, 0)),
        lambda: audio_signals(torch.rand(80, 100)),
        lambda: audio_signals(torch.rand(1, 0, 80)),
        lambda: audio_signals(torch.rand(1, 4, 0)),
        lambda: video_signals(torch.rand(1, 0, 3, 8, 8)),
        lambda: thumbnail_signals(torch.rand(1, 4, 0)),
        lambda: thumbnail_signals(torch.rand(2, 4, 8), torch.ones(2, 5)),
        lambda: pool_steps(torch.rand(2, 4, 3), 0),
        lambda: pool_steps(torch.rand(2, 4, 3), [1, 2, 3]),
        lambda: pool_steps(torch.rand(2, 4, 3), [1, -2]),
        lambda: pool_steps(torch.rand(2, 4, 3), torch.tensor([1.0, 2.0])),
        lambda: signals(np.zeros(16000)),
        lambda: signals(Audio(np.zeros(0, np.float32), 16000)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(call):
    with pytest.raises(SignalError, match=r"expected|no samples|not <class"):
        call()


# Resampling


@given(st.integers(1, 30), st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_pooling_keeps_the_mean_and_takes_equal_shares(count, steps, seed):
    x = torch.randn(2, count, 3, generator=torch.Generator().manual_seed(seed))
    out = pool_steps(x, steps)
    assert out.shape == (2, steps, 3)
    torch.testing.assert_close(out.mean(1), x.mean(1), atol=1e-5, rtol=1e-5)
    # A fine grid that both divide: every new step is the plain mean of its part.
    fine = x.double().repeat_interleave(steps, 1).unflatten(1, (steps, count)).mean(2)
    torch.testing.assert_close(out.double(), fine, atol=1e-5, rtol=1e-5)


@given(st.integers(1, 30), st.integers(1, 5))
def test_pooling_to_as_many_or_a_multiple_repeats(count, times):
    x = torch.randn(1, count, 2)
    assert torch.equal(pool_steps(x, count * times), x.repeat_interleave(times, 1))


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 30)), min_size=1, max_size=4))
def test_pooling_takes_clips_of_their_own_lengths_to_their_own_steps(sizes):
    lengths, wanted = (torch.tensor(numbers) for numbers in zip(*sizes, strict=True))
    x = torch.randn(len(sizes), 12, 2)
    out = pool_steps(x, wanted, torch.arange(12) < lengths[:, None])
    assert out.shape == (len(sizes), max(wanted), 2)
    for row, clip, length, steps in zip(out, x, lengths, wanted, strict=True):
        if length and steps:
            torch.testing.assert_close(row[:steps], pool_steps(clip[None, :length], int(steps))[0])
        assert (row[steps if length else 0 :] == 0).all()
    assert torch.equal(out, pool_steps(x, wanted.tolist(), torch.arange(12) < lengths[:, None]))


def test_a_clip_of_one_step_costs_no_more_beside_one_of_many():
    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            self.size = max(self.size, out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    x = torch.rand(2, 3000, 2)
    with Largest() as made:
        out = pool_steps(x, [1, 750])
    assert made.size <= 2 * x.numel()
    torch.testing.assert_close(out[0, 0], x[0].mean(0))
    torch.testing.assert_close(out[1], x[1].unflatten(0, (750, 4)).mean(1))


# For people


def test_signals_of_a_file_have_its_times(tmp_path):
    item = World("both", count=10, seed=1)[6]
    mm.write_video(tmp_path / "clip.avi", item.frames, item.rate)
    video = mm.read_video(tmp_path / "clip.avi")
    seen = signals(video)
    assert seen.names == ("motion", "novelty", "keyframe") and seen.values.dtype == np.float32
    np.testing.assert_array_equal(seen.values, video_signals(frames_of(item))[0].numpy())
    table = mm.signals(video, names="motion").table()
    assert table.index.name == "seconds" and list(table.index) == list(video.times)
    first = table["motion"].nlargest(2).index
    assert all(any(event.start <= time <= event.stop for event in item.events) for time in first)
    heard = signals(item.audio, names=["energy", "time2"])
    assert heard.values.shape == (len(heard.times), 2) and heard.times[1] == pytest.approx(0.01)


def test_large_frames_are_sampled_and_shrink_to_the_means_of_cells():
    ramp = torch.arange(512.0).view(1, 1, 1, 1, -1).expand(1, 2, 3, 256, -1)
    small = thumbnails(ramp).view(2, 3, 8, 8)
    torch.testing.assert_close(small[0, 0, 0], torch.arange(31.5, 512, 64), atol=4, rtol=0)
    exact = thumbnails(ramp[..., :32:, :32]).view(2, 3, 8, 8)
    assert torch.equal(exact[1, 2, 5], torch.arange(1.5, 32, 4))


def test_every_name_is_described_and_computed():
    assert set(VIDEO) | set(AUDIO) == set(SIGNALS) == set(mm.SIGNALS)
    assert all(text for _, text in SIGNALS.values())
    with pytest.raises(TypeError):
        SIGNALS["mine"] = ("video", "")  # type: ignore[index]
