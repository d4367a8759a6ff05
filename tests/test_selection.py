"""Selection: cuts as good as brute force finds, what must not matter, and what real and generated clips must keep."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from unittest import mock

import numpy as np
import pytest
import torch
from batches import batch
from conformance import build
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import mmqlora as mm
from mmqlora import features as features_module
from mmqlora import noise as noise_module
from mmqlora import segmentation
from mmqlora.datasets.worlds import Item, World
from mmqlora.errors import MediaError, SelectionError
from mmqlora.features import Features, mel_features, thumbnail_features
from mmqlora.media import Audio, Video, log_mel, read_audio, read_video, uniform_indices, write_video
from mmqlora.noise import encoder_features, quantization_noise
from mmqlora.segmentation import EVEN, cut
from mmqlora.selection import SELECTORS, Noise, Selector, _Kernel, _representatives, clip_noise, select_frames
from mmqlora.spans import Spans, select_segments

GREEDY = ("logdet", "logdet-no-noise", "kcenter")
value = st.floats(-10, 10).map(lambda number: round(number, 3))


@st.composite
def clips(draw, frames: tuple[int, int] = (1, 9), width: int = 2) -> np.ndarray:
    return draw(arrays(np.float64, (draw(st.integers(*frames)), width), elements=value))


def walk(frames: int, width: int = 3, seed: int = 0) -> np.ndarray:
    """Features that move a little all the time: no two are alike."""
    return np.random.default_rng(seed).normal(size=(frames, width)).cumsum(0)


def within(x: np.ndarray, bounds, weights: np.ndarray | None = None) -> float:
    """The error of a cut, by its definition."""
    weights, total = np.ones(len(x)) if weights is None else weights, 0.0
    for a, b in itertools.pairwise(bounds):
        if weights[a:b].sum() > 0:
            mean = np.average(x[a:b], axis=0, weights=weights[a:b])
            total += float((weights[a:b] * np.square(x[a:b] - mean).sum(1)).sum())
    return total


def all_cuts(length: int, count: int, shortest: int = 1):
    for inner in itertools.combinations(range(1, length), count - 1):
        bounds = (0, *inner, length)
        if np.diff(bounds).min() >= shortest:
            yield bounds


def scenes(lengths, width: int = 8, noise: float = 0.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Still scenes one after the other: features, and which scene each frame is of."""
    rng = np.random.default_rng(seed)
    which = np.repeat(np.arange(len(lengths)), lengths)
    return rng.normal(size=(len(lengths), width))[which] + noise * rng.normal(size=(len(which), width)), which


# Segmentation


@given(clips(), st.integers(1, 9), st.integers(1, 3), st.data())
def test_a_cut_is_as_good_as_any(x, count, shortest, data):
    weights = data.draw(arrays(np.float64, len(x), elements=st.sampled_from([0.0, 0.5, 1.0, 3.0])))
    found = cut(x, count, weights=weights, shortest=shortest)
    shortest = min(shortest, len(x))
    count = min(count, len(x) // shortest)
    assert len(found.bounds) == count + 1 and np.diff(found.bounds).min() >= shortest
    assert found.error == pytest.approx(within(x, found.bounds, weights), abs=1e-9)
    best = min(within(x, bounds, weights) for bounds in all_cuts(len(x), count, shortest))
    assert best - 1e-9 <= found.error <= best + EVEN


@given(clips(), st.floats(0.01, 300), st.integers(1, 9), st.integers(1, 3))
def test_a_priced_cut_is_as_good_as_any(x, price, most, shortest):
    found = cut(x, most, price, shortest=shortest)
    shortest = min(shortest, len(x))
    best = min(
        within(x, bounds) + price * count
        for count in range(1, min(most, len(x) // shortest) + 1)
        for bounds in all_cuts(len(x), count, shortest)
    )
    assert found.objective == pytest.approx(best, abs=1e-8)
    assert len(found.bounds) - 1 <= most and np.diff(found.bounds).min() >= shortest


@given(clips((1, 40)), st.floats(0.01, 100))
def test_leaving_out_starts_changes_nothing(x, price):
    costs = segmentation._Costs.of(x, np.ones(len(x)))
    one = segmentation._priced(costs, None, price, 1)
    other = segmentation._priced(costs, costs.table(1), price, 1)
    objectives = [within(x, bounds) + price * (len(bounds) - 1) for bounds in (one, other)]
    assert objectives[0] == pytest.approx(objectives[1], abs=1e-8)


@given(st.integers(0, 2**32 - 1), st.integers(20, 90), st.sampled_from([(3, 0.0), (6, 0.0), (None, 1.0), (None, 30.0)]))
def test_two_rounds_keep_their_guarantee(seed, length, how):
    count, price = how
    x = np.random.default_rng(seed).normal(size=(length, 2)) + walk(length, 2, seed)
    with mock.patch.object(segmentation, "PIECES", 1):
        found = cut(x, count, price, chunk=16)
        exact = cut(x, count, price, chunk=length)
    assert exact.lower == exact.objective
    assert exact.objective - EVEN <= found.objective <= 5 * exact.objective
    assert found.lower <= exact.objective + EVEN
    assert found.error == pytest.approx(within(x, found.bounds))


def test_a_long_clip_is_cut_where_its_scenes_change():
    lengths = np.random.default_rng(0).integers(50, 400, 40)
    x, which = scenes(lengths, noise=0.05)
    borders = np.append(np.flatnonzero(np.diff(which, prepend=-1)), len(x)).tolist()
    assert len(x) > 5 * segmentation.CHUNK
    found = cut(x.astype(np.float32), 40)
    assert found.bounds.tolist() == borders
    assert found.error - found.lower < 0.1 * found.error  # far from the factor of 5
    assert cut(x, price=8 * 0.05**2 * 10).bounds.tolist() == borders


@given(st.integers(0, 2**32 - 1), st.integers(1, 3))
def test_borders_are_moved_to_where_they_are_better_and_never_worse(seed, shortest):
    x = walk(40, 2, seed)
    rough = np.array([0, 9, 17, 30, 40])
    fine = segmentation._polished(rough, x, x.mean(0), np.ones(40), shortest)
    assert within(x, fine) <= within(x, rough) + 1e-9 and np.diff(fine).min() >= shortest
    still, _ = scenes([10, 20])
    assert segmentation._polished(np.array([0, 15, 30]), still, 0.0, np.ones(30), 1).tolist() == [0, 10, 30]


def test_a_count_that_needs_too_much_memory_says_what_fits():
    with pytest.raises(SelectionError, match="expected at most 83"):
        cut(np.zeros((200_000, 1), np.float32), 300)


@pytest.mark.parametrize("x, how", [(np.zeros((0, 2)), {"count": 1}), (np.zeros(3), {"count": 1}), (np.eye(3), {})])
def test_nothing_to_cut_or_nothing_to_cut_by(x, how):
    with pytest.raises(SelectionError, match="can't cut"):
        cut(x, **how)


# The frame that stands for a segment


@given(clips((2, 12)), st.integers(1, 4), st.integers(1, 4))
def test_representatives_are_nearest_to_the_means_that_spacing_allows(x, count, spacing):
    spacing = min(spacing, len(x))
    count = min(count, len(x) // spacing)
    bounds = np.linspace(0, len(x), count + 1).astype(int)
    assume(np.diff(bounds).min() >= spacing)
    found = _representatives(x, bounds, np.ones(len(x)), spacing)
    assert all(a <= t < b for t, a, b in zip(found, bounds, bounds[1:], strict=False))
    assert len(found) == 1 or np.diff(found).min() >= spacing
    means = [x[a:b].mean(0) for a, b in itertools.pairwise(bounds)]

    def away(choice) -> float:
        return sum(np.square(x[t] - mean).sum() for t, mean in zip(choice, means, strict=True))

    every = itertools.product(*(range(a, b) for a, b in itertools.pairwise(bounds)))
    best = min(away(choice) for choice in every if len(choice) == 1 or np.diff(choice).min() >= spacing)
    assert away(found) == pytest.approx(best, rel=1e-6, abs=1e-6)


# Log det


def kernel_of(x: np.ndarray, noise: float, query: np.ndarray) -> tuple[np.ndarray, float]:
    """The whole kernel and the noise in its space, by the definitions."""
    scale = np.square(x[:, None] - x[None]).sum(-1).mean()
    query = query / query.mean()
    kernel = np.outer(query, query) * np.exp(-np.square(x[:, None] - x[None]).sum(-1) / scale)
    return kernel, 2 * (1 - math.exp(-(noise**2) * x.shape[1] / scale))


def information(kernel: np.ndarray, floor: float, chosen) -> float:
    chosen = list(chosen)
    return 0.5 * np.linalg.slogdet(np.eye(len(chosen)) + kernel[np.ix_(chosen, chosen)] / floor)[1]


@given(st.integers(0, 2**32 - 1), st.floats(0.05, 2))
def test_log_det_is_greedy_as_determinants_say(seed, noise):
    rng = np.random.default_rng(seed)
    x, query = rng.normal(size=(14, 3)), rng.uniform(0.5, 2, 14)
    found = select_frames(x, 7, "logdet", noise=noise, query=query)
    kernel, floor = kernel_of(x, noise, query)
    chosen: list[int] = []
    for _ in range(7):
        left = [t for t in range(14) if t not in chosen]
        chosen.append(max(left, key=lambda t: information(kernel, floor, [*chosen, t])))
    assert found.order.tolist() == chosen
    assert found.gains.sum() == pytest.approx(information(kernel, floor, chosen), abs=1e-8)
    assert (np.diff(found.gains) <= 1e-12).all() and found.gains.min() > 0


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.floats(0.05, 2))
def test_log_det_reaches_its_share_of_the_best(seed, count, noise):
    x = np.random.default_rng(seed).normal(size=(9, 2))
    kernel, floor = kernel_of(x, noise, np.ones(9))
    best = max(information(kernel, floor, chosen) for chosen in itertools.combinations(range(9), count))
    assert select_frames(x, count, "logdet", noise=noise).gains.sum() >= (1 - 1 / math.e) * best


def test_log_det_without_noise_multiplies_determinants():
    x = np.random.default_rng(0).normal(size=(10, 3))
    found = select_frames(x, 5, "logdet-no-noise")
    kernel = kernel_of(x, 1.0, np.ones(10))[0]
    chosen = found.order.tolist()
    assert found.gains.sum() == pytest.approx(0.5 * np.linalg.slogdet(kernel[np.ix_(chosen, chosen)])[1], abs=1e-8)
    column = _Kernel(x - x.mean(0), np.square(x[:, None] - x[None]).sum(-1).mean(), np.ones(10)).column(3)
    np.testing.assert_allclose(column, kernel[3], atol=1e-12)


def test_noise_of_a_frame_makes_log_det_avoid_it():
    x = np.random.default_rng(1).normal(size=(12, 3))
    noise = np.full((12, 1), 0.1)
    first = select_frames(x, 1, "logdet", noise=noise)[0]
    noise[first] = 10.0
    assert select_frames(x, 1, "logdet", noise=noise)[0] != first


# Properties of all methods


@given(st.integers(1, 60), st.integers(1, 70), st.integers(1, 9), st.sampled_from(sorted(SELECTORS)), st.booleans())
def test_a_selection_is_in_order_and_within_its_budget(frames, budget, spacing, method, still):
    x = np.zeros((frames, 4)) if still else walk(frames, 4, seed=frames)
    found = select_frames(x, budget, method, spacing=spacing)
    assert 1 <= len(found) <= min(budget, frames)
    assert (np.diff(found.indices) >= spacing).all()
    assert found.indices.min() >= 0 and found.indices.max() < frames
    if spacing == 1:
        assert len(found) == min(budget, frames)
    assert sorted(found) == list(found) == np.asarray(found).tolist() == found.indices.tolist()
    assert list(select_frames(x, budget, method, spacing=spacing)) == list(found)  # chance is seeded


@pytest.mark.parametrize("method", sorted(set(SELECTORS) - {"random"}))
@pytest.mark.parametrize("frames", [np.zeros((12, 32, 32, 3), np.uint8), np.full((12, 5), 3.7)], ids=["black", "still"])
def test_where_nothing_changes_frames_are_spread(method, frames):
    found = select_frames(frames, 4, method)
    assert np.diff([-1.5, *found, 12.5]).max() <= 5 and len(found) == 4
    if method in ("segments", "uniform"):
        assert list(found) == uniform_indices(12, 4).tolist()


@pytest.mark.parametrize("method", sorted(SELECTORS))
def test_a_single_frame_is_chosen(method):
    assert list(select_frames(np.ones((1, 3)), 5, method)) == [0]
    assert list(select_frames(np.zeros((1, 16, 16, 3), np.uint8), 1, method)) == [0]


@given(st.integers(0, 2**32 - 1), st.integers(2, 12), st.sampled_from(GREEDY))
def test_greedy_methods_follow_their_frames_wherever_these_are(seed, budget, method):
    rng = np.random.default_rng(seed)
    x, order = rng.normal(size=(20, 4)), rng.permutation(20)
    noise = {"noise": 0.3} if method == "logdet" else {}  # that of the clip itself is that of neighbors
    found = select_frames(x[order], budget, method, **noise)
    assert set(order[found.indices]) == set(select_frames(x, budget, method, **noise))


@given(clips((1, 9)), st.integers(1, 5))
def test_a_film_may_run_backwards(x, budget):
    one, other = (select_frames(film, budget, noise=1.0) for film in (x, x[::-1]))
    assert one.error == pytest.approx(other.error, abs=2 * EVEN)


@given(st.permutations(range(5)), st.lists(st.integers(1, 6), min_size=5, max_size=5), st.integers(1, 5))
def test_no_scene_is_shown_twice_before_all_were_shown(order, lengths, budget):
    x, which = scenes(lengths)
    for method in (*GREEDY, "segments"):
        noise = {"noise": 0.01} if method in ("segments", "logdet") else {}
        assert len(set(which[select_frames(x, budget, method, **noise).indices])) == budget, method
    # Those that don't cut the clip need no frames in a row.
    mixed = np.random.default_rng(list(order)).permutation(len(x))
    for method in GREEDY:
        noise = {"noise": 0.01} if method == "logdet" else {}
        found = select_frames(x[mixed], budget, method, **noise)
        assert len(set(which[mixed][found.indices])) == budget, method


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 30))
def test_second_looks_are_shared_out_equally(lengths, budget):
    x, which = scenes(lengths)
    keep = select_frames(x, budget, noise=0.01)
    assert len(keep) == min(budget, len(x)) == len(set(keep))
    assert keep.bounds[0] == 0 and keep.bounds[-1] == len(x)
    assert (keep.bounds[:-1] <= keep.indices).all() and (keep.indices < keep.bounds[1:]).all()
    if budget >= len(lengths):
        looks = np.bincount(which[keep.indices], minlength=len(lengths))
        full = looks == np.array(lengths)
        assert looks.min(initial=99, where=~full) >= looks.max() - 1  # all but those that have no more frames


def test_second_looks_go_where_the_query_is():
    x, which = scenes([30, 30])
    keep = select_frames(x, 8, noise=0.01, query=np.where(which == 0, 3.0, 1.0))
    assert np.bincount(which[keep.indices]).tolist() == [6, 2]
    most = select_frames(x, 8, noise=0.01, query=np.where(which == 1, 1.0, 1e-3))
    assert np.bincount(which[most.indices]).tolist() == [1, 7]


@given(clips((1, 30)), st.floats(0.05, 5), st.floats(1, 10), st.one_of(st.none(), st.integers(1, 10)))
def test_more_noise_never_keeps_more(x, noise, factor, budget):
    quiet, loud = (select_frames(x, budget, adaptive=True, noise=level) for level in (noise, noise * factor))
    assert len(loud) <= len(quiet) <= (budget or len(x))


@given(clips((1, 30)), st.floats(0.05, 5), st.floats(1, 10))
def test_a_higher_price_never_keeps_more(x, noise, factor):
    assert len(select_frames(x, noise=noise, price=factor)) <= len(select_frames(x, noise=noise))


@given(st.integers(0, 2**32 - 1), st.integers(1, 12))
def test_a_coarser_budget_never_covers_more(seed, budget):
    x = walk(30, seed=seed)
    few, many = (select_frames(x, number, noise=1.0) for number in (budget, budget + 1))
    assert many.error <= few.error + EVEN
    for method in GREEDY:
        few, many = (select_frames(x, number, method) for number in (budget, budget + 1))
        assert many.order[:budget].tolist() == few.order.tolist()  # so that what was covered stays covered


@given(st.floats(1e-3, 1e3), st.floats(-100, 100), st.sampled_from(sorted(SELECTORS)))
def test_units_do_not_matter(scale, offset, method):
    x = walk(40, 6)
    assert list(select_frames(scale * (x + offset), 6, method)) == list(select_frames(x, 6, method))


def test_types_of_features_do_not_matter():
    x = walk(40, 6).round(2)
    kept = list(select_frames(x, 6))
    for other in (x.astype(np.float32), torch.from_numpy(x), torch.from_numpy(x).float().requires_grad_(), Features(x)):
        assert list(select_frames(other, 6)) == kept
    halves = torch.from_numpy(x).bfloat16()
    assert list(select_frames(halves, 6)) == list(select_frames(halves.float(), 6))


def test_chance_differs_by_seed_and_takes_all_frames_equally():
    drawn = np.concatenate([select_frames(np.zeros((10, 1)), 3, "random", seed=seed) for seed in range(400)])
    counts = np.bincount(drawn, minlength=10)
    assert counts.min() > 80 and counts.max() < 165
    spaced = [tuple(select_frames(np.zeros((5, 1)), 2, "random", seed=seed, spacing=3)) for seed in range(60)]
    assert set(spaced) == {(0, 3), (0, 4), (1, 4)}


def test_aks_takes_peaks_where_they_stand_out_and_splits_elsewhere():
    peak = np.full(64, 0.01)
    peak[[40, 42, 44, 46]] = 1.0
    assert list(select_frames(np.zeros((64, 1)), 4, "aks", query=peak)) == [40, 42, 44, 46]
    slope = 1 + np.arange(64) / 64
    found = select_frames(np.zeros((64, 1)), 4, "aks", query=slope)
    assert (found.indices // 16).tolist() == [0, 1, 2, 3]  # a frame in every quarter
    assert len(select_frames(np.zeros((64, 1)), 3, "aks", query=slope)) == 3  # no frame is lost to rounding


def test_difference_and_keyframes_take_what_changes():
    x, which = scenes([9, 4, 12, 6])
    changes = np.flatnonzero(np.diff(which)) + 1
    assert list(select_frames(x, 3, "difference")) == changes.tolist()
    assert set(changes[1:]) <= set(select_frames(x, 3, "keyframes"))


@pytest.mark.parametrize("method", ["segments", "logdet", "logdet-no-noise", "aks"])
def test_a_query_draws_frames_to_what_it_asks_for(method):
    x, query = walk(60, 4), np.ones(60)
    query[40:] = 50.0
    plain = {"query": np.ones(60)} if method == "aks" else {}
    asked, other = select_frames(x, 6, method, query=query), select_frames(x, 6, method, **plain)
    assert (asked.indices >= 40).sum() > (other.indices >= 40).sum()


# How many frames are worth keeping


@pytest.mark.parametrize("frames", [2, 3, 10, 100])
@pytest.mark.parametrize("width", [1, 5, 50])
def test_noise_alone_is_one_segment(frames, width):
    rng = np.random.default_rng(frames * width)
    kept = [len(select_frames(3 * rng.normal(size=(frames, width)), noise=3.0)) for _ in range(100)]
    assert np.mean(np.array(kept) > 1) <= 0.05


def test_noise_that_moves_everything_together_is_noise_too():
    """A light that flickers has one dimension: its tail is heavier than that of as much noise in every feature."""
    rng = np.random.default_rng(0)
    kept = {1.0: [], 50.0: []}
    for _ in range(20):
        flicker = rng.normal(size=(200, 1)) * np.ones(50)
        for dimensions, counts in kept.items():
            counts.append(len(select_frames(flicker, noise=Noise(np.ones(50), dimensions))))
    assert max(kept[1.0]) == 1 < np.mean(kept[50.0])


@pytest.mark.parametrize("shift, share", [({}, 1.0), ({"grain": 0.3}, 0.9)])
def test_as_many_frames_are_kept_as_there_are_states(shift, share):
    right = []
    for item in World("clips", count=40, seed=5, shifts=shift):
        right.append(len(select_frames(item.frames)) == len(set(states(item))))
    assert np.mean(right) >= share


@pytest.mark.parametrize("options, count", [({}, 50), ({"budget": 30, "adaptive": True}, 30), ({"budget": 50}, 50)])
def test_a_long_video_is_chosen_from_as_a_short_one(options, count):
    x, which = scenes([100] * 50, noise=0.1)
    assert len(x) > 4 * segmentation.CHUNK
    found = select_frames(x.astype(np.float32), **options)
    assert len(set(which[found.indices])) == len(found) == count
    assert 0 <= found.excess < 0.2 * (found.error + found.price * count) or count == 30
    assert select_frames(x[:1000]).excess == 0


def test_noise_of_a_clip_is_that_of_its_still_frames():
    x, _ = scenes([60, 60, 60, 60], width=40, noise=0.2)
    found = clip_noise(x)
    assert 0.18 < found.deviation[0] < 0.22 and 25 < found.dimensions <= 40
    flicker = np.random.default_rng(1).normal(size=(400, 2)) @ np.random.default_rng(2).normal(size=(2, 40))
    assert 1 < clip_noise(flicker).dimensions < 3
    # Motion for a third of the time is no noise.
    x[80:160] += walk(80, 40)
    assert clip_noise(x).deviation[0] == pytest.approx(found.deviation[0], rel=0.1)
    assert clip_noise(np.zeros((5, 3))).deviation.tolist() == [1.0, 1.0, 1.0]
    assert clip_noise(np.ones((1, 3))).deviation.min() > 0


@pytest.mark.parametrize("width", [1, 4, 30])
def test_noise_of_a_clip_is_not_too_small(width):
    x = np.random.default_rng(width).normal(0, 3, (2000, width))
    assert clip_noise(x).deviation == pytest.approx(3, rel=0.1)
    assert clip_noise(x).dimensions == pytest.approx(width, rel=0.15)


def test_noises_add_up():
    one = Noise(np.array([3.0, 3.0]), 1.0, np.array([0.1, 0.1]))
    two = Noise(np.array([4.0, 4.0]), 2.0, np.array([0.2, 0.2]))
    both = one + two
    assert both.deviation.tolist() == [5.0, 5.0] and 1 < both.dimensions < 2
    assert both.error == pytest.approx([math.hypot(0.3, 0.8) / 5] * 2)
    assert (one + Noise(np.array([1e-6, 1e-6]))).dimensions == pytest.approx(1)
    white = Noise(np.full(30, 2.0)) + Noise(np.full(30, 1.0))
    assert white.dimensions == pytest.approx(30)


# Covering what there is


def states(item: Item) -> np.ndarray:
    """Which state of the scene each frame shows: a new one begins where anything changes."""
    shown = np.concatenate(
        [np.stack([track.color, track.angle, track.x, track.y]) * track.visible for track in item.tracks]
    )
    return np.concatenate([[0], np.cumsum((np.diff(shown) != 0).any(0))])


@pytest.mark.parametrize("pace", ["sparse", "dense", "bursty"])
def test_every_state_of_a_generated_clip_is_kept(pace):
    for item in World("clips", count=20, seed=7, pace=pace):
        which = states(item)
        keep = select_frames(item.frames, len(set(which)))
        assert sorted(which[keep.indices]) == sorted(set(which))


def joined(real, lengths: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """Shots of real videos, one after the other."""
    shots = [
        read_video(real / "video" / name, frames=range(count), size=(64, 64)).frames for name, count in lengths.items()
    ]
    return np.concatenate(shots), np.repeat(np.arange(len(shots)), list(lengths.values()))


SHOTS = {"vtest.avi": 90, "bigbuckbunny.mp4": 12, "carphone_pristine.mp4": 60, "bikes.mp4": 7}


@pytest.mark.parametrize("budget", [4, 6, 10, None])
def test_every_shot_of_joined_real_videos_is_kept(real, budget):
    frames, which = joined(real, SHOTS)
    keep = select_frames(frames, budget)
    assert set(which[keep.indices]) == {0, 1, 2, 3}
    if budget == 4:
        assert keep.bounds.tolist() == [0, *np.cumsum(list(SHOTS.values()))]
        assert len(set(which[select_frames(frames, 4, "uniform").indices])) < 4


# Options and refusals


@pytest.mark.parametrize(
    "x, options, why",
    [
        (np.zeros((0, 4)), {"budget": 2}, "no frame"),
        (np.zeros((0, 16, 16, 3), np.uint8), {"budget": 2}, "at least one frame"),
        (np.full((4, 2), np.nan), {"budget": 2}, "4 of 4 frames are NaN"),
        (np.array([[0.0], [np.inf], [1.0]]), {"budget": 2}, r"1 of 3 frames are NaN or infinite, the first at \[1\]"),
        (np.zeros(7), {"budget": 2}, r"shape \(7,\)"),
        (np.zeros((4, 0)), {"budget": 2}, "expected real"),
        (np.array([["a"]]), {"budget": 2}, "expected real"),
        (np.zeros((4, 2)), {"budget": 0}, "at least 1"),
        (np.zeros((4, 2)), {"budget": 1.5}, "at least 1"),
        (np.zeros((4, 2)), {"budget": 2, "method": "segmnts"}, "did you mean 'segments'"),
        (np.zeros((4, 2)), {"budget": None, "method": "uniform"}, "needs a budget"),
        (np.zeros((4, 2)), {"budget": 2, "method": "kcenter", "adaptive": True}, "needs a budget"),
        (np.zeros((4, 2)), {"budget": 2, "method": "kcenter", "noise": 1.0}, "no use for noise"),
        (np.zeros((4, 2)), {"budget": 2, "method": "uniform", "query": np.ones(4)}, "no use for a query"),
        (np.zeros((4, 2)), {"budget": 2, "query": np.ones(3)}, r"query of shape \(3,\) for 4 frames"),
        (np.zeros((4, 2)), {"budget": 2, "query": -np.ones(4)}, "0 or more"),
        (np.zeros((4, 2)), {"budget": 2, "query": np.zeros(4)}, "not all 0"),
        (np.zeros((4, 2)), {"budget": 2, "noise": np.ones(3)}, r"\(3,\) for features \(4, 2\).*\(2,\) or \(4, 1\)"),
        (np.zeros((4, 2)), {"budget": 2, "noise": 0.0}, "above 0"),
        (np.zeros((4, 2)), {"budget": 2, "noise": math.nan}, "finite"),
        (np.zeros((4, 2)), {"budget": 2, "spacing": 0}, "at least 1 frame"),
        (np.zeros((4, 2)), {"budget": 2, "price": 0.0}, "more than 0"),
    ],
)
def test_what_cannot_be_is_refused(x, options, why):
    with pytest.raises(SelectionError, match=why):
        select_frames(x, **options)


def test_an_empty_video_is_refused():
    nothing = Video(np.zeros((0, 8, 8, 3), np.uint8), np.zeros(0), np.zeros(0, np.int64), 8.0, 0, 0.0, "")
    with pytest.raises(SelectionError, match="at least one frame"):
        select_frames(nothing, 3)


def test_a_table_says_what_each_frame_stands_for():
    clip = World("clips", count=10, seed=1)[6]
    table = select_frames(Features(thumbnail_features(clip.frames).values, np.arange(23) / 8), 3).table()
    assert table["first"].tolist() == [0, 3, 10] and table["last"].tolist() == [2, 9, 22]
    assert (table["seconds"] == table["index"] / 8).all()


# Files


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """A file of 300 frames: 6 scenes of noise, each still."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (6, 12, 16, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    path = tmp_path_factory.mktemp("film") / "film.avi"
    write_video(path, pictures.repeat(50, 0), rate=25)
    return path


def test_a_file_streams_through_in_few_frames_at_once(film, monkeypatch):
    whole = read_video(film, size=(64, 64))
    expected = thumbnail_features(whole)
    seen = []
    shrink = features_module._small
    monkeypatch.setattr(
        features_module, "_small", lambda frames, side: seen.append(len(frames)) or shrink(frames, side)
    )
    monkeypatch.setattr(features_module, "READ", 64)
    found = thumbnail_features(film)
    assert seen == [64, 64, 64, 64, 44]
    np.testing.assert_array_equal(found.values, expected.values)
    np.testing.assert_array_equal(found.times, whole.times)


def test_frames_of_a_file_are_chosen_with_their_times(film):
    keep = select_frames(film, 6)
    assert keep.bounds.tolist() == [0, 50, 100, 150, 200, 250, 300]
    assert keep.times == pytest.approx(keep.indices / 25)
    assert read_video(film, frames=keep).indices.tolist() == list(keep)
    assert len(select_frames(film)) == 6


@pytest.mark.filterwarnings("ignore:.*announces 795 frames")
def test_a_file_that_was_cut_short_is_an_error(real):
    with pytest.raises(MediaError, match="can be decoded"):
        thumbnail_features(real / "broken" / "truncated_vtest.avi")


def test_thumbnails_of_real_files_are_those_of_their_frames(real):
    path = real / "video" / "carphone_pristine.mp4"
    streamed, whole = thumbnail_features(path), thumbnail_features(read_video(path))
    np.testing.assert_array_equal(streamed.times, whole.times)
    # Two ways to shrink a frame: by the decoder, and by every other pixel.
    assert np.abs(streamed.values - whole.values).mean() < 3
    assert np.corrcoef(streamed.values.ravel(), whole.values.ravel())[0, 1] > 0.998


def test_a_selector_works_in_transformers(film):
    from transformers.video_utils import load_video

    selector = Selector(budget=6, spacing=5)
    expected = list(select_frames(film, 6, spacing=5))
    for options in ({"sample_indices_fn": selector.on(film)}, {"sample_indices_fn": selector, "path": film}):
        frames, metadata = load_video(str(film), backend="decord", **options)
        assert list(metadata.frames_indices) == expected
        np.testing.assert_array_equal(frames, read_video(film, frames=expected).frames)
    with pytest.raises(SelectionError, match=r"selector\.on\(path\)"):
        load_video(str(film), backend="decord", sample_indices_fn=selector)
    blind = Selector(budget=6, method="uniform")
    assert len(load_video(str(film), backend="decord", sample_indices_fn=blind)[0]) == 6


def test_a_selector_serves_data_sets(film):
    selector = pickle.loads(pickle.dumps(Selector(budget=6)))
    video = selector.read(film, size=(48, 64))
    assert video.frames.shape == (6, 48, 64, 3) and (np.diff(video.indices) > 0).all()
    assert video.times == pytest.approx(video.indices / 25)
    some = read_video(film, frames=range(0, 300, 10))
    taken = selector.take(some)
    assert set(taken.indices // 50) == {0, 1, 2, 3, 4, 5} and (taken.indices % 10 == 0).all()
    assert taken.times == pytest.approx(taken.indices / 25)
    with pytest.raises(SelectionError, match="unknown"):
        Selector(budget=3, method="best")


# Sound


@given(st.lists(st.floats(0.05, 3), min_size=2, max_size=12), st.floats(0, 50), st.floats(0, 1))
def test_times_of_spans_go_there_and_back(gaps, start, share):
    edges = (start + np.cumsum(gaps[: len(gaps) // 2 * 2])).reshape(-1, 2)
    spans = Spans(edges, start, float(edges.max()) + 1 - start)
    times = share * spans.kept
    assert spans.selected(spans.original(times)) == pytest.approx(times, abs=1e-6)
    between = edges[:-1, 1] + 0.5 * (edges[1:, 0] - edges[:-1, 1])
    assert np.isnan(spans.selected(between)).all() and np.isnan(spans.selected(start + 0.0))
    with pytest.raises(SelectionError, match="were kept"):
        spans.original(spans.kept + 0.1)


def sounds(**options) -> World:
    return World("sounds", count=25, seed=3, **options)


def heard(item: Item, spans: Spans) -> list[float]:
    """The share of each event that was kept."""
    grid = [np.linspace(event.start + 0.02, event.stop - 0.02, 20) for event in item.events]
    return [float(np.isfinite(spans.selected(times)).mean()) for times in grid]


@pytest.mark.parametrize("shift", [{}, {"timbre": 1.0}], ids=["clean", "timbre"])
def test_sounds_are_kept_and_silence_is_not(shift):
    shares, kept = [], []
    for item in sounds(shifts=shift):
        spans = select_segments(item.audio, repeats=True)
        shares += heard(item, spans)
        sounding = sum(event.stop - event.start for event in item.events)
        kept.append((spans.kept - sounding) / len(item.events))
        assert spans.repeated == 0 and spans.kept + 0.5 * spans.silent < item.audio.duration + 0.2
    assert np.mean(shares) > 0.9  # the pause between the two sounds of an event is silent
    assert max(kept) < 0.35  # margins of 0.05 s, and what is left of steps of 0.1 s, on both sides


def test_what_was_heard_before_is_left_out_and_what_is_new_is_not():
    for item in sounds():
        spans = select_segments(item.audio)
        names = [event.subject for event in item.events]
        new = [index for index, name in enumerate(names) if name not in names[:index]]
        assert min(heard(item, spans)[index] for index in new) > 0
    rng, still = np.random.default_rng(0), np.zeros(4800)
    rise = np.clip(np.minimum(np.arange(4800), 4800 - np.arange(4800)) / 800, 0, 1)
    tones = [rise * np.sin(np.arange(4800) * step + start) for start in (0.0, 0.7) for step in (0.1, 0.9)]
    parts = [part for tone in tones for part in (tone + 1e-3 * rng.normal(size=4800), still)]
    audio = Audio(np.concatenate(parts).astype(np.float32), 16000)
    spans = select_segments(audio, margin=0.0)
    assert spans.seconds.round(6).tolist() == [[0.0, 0.3], [0.6, 0.9]]
    assert spans.repeated == pytest.approx(0.6) and spans.silent == pytest.approx(1.2)
    assert select_segments(audio, margin=0.0, repeats=True).kept == pytest.approx(1.2)


@given(
    st.floats(0.1, 3), st.sampled_from(["segments", "uniform", "random", "kcenter", "difference"]), st.integers(0, 24)
)
def test_a_budget_of_seconds_is_kept(budget, method, index):
    audio = sounds()[index].audio
    spans = select_segments(audio, budget, method, margin=0.0)
    assert 0 < spans.kept <= budget + 1e-6
    assert (np.diff(spans.seconds.ravel()) > 0).all()
    assert spans.seconds.min() >= 0 and spans.seconds.max() <= audio.duration


def test_a_budget_keeps_a_part_of_every_sound():
    checked = 0
    for item in sounds(pace="dense"):
        if len({event.subject for event in item.events}) == len(item.events):
            tight = select_segments(item.audio, 0.3 * len(item.events), margin=0.0)
            assert min(heard(item, tight)) > 0
            checked += 1
    assert checked > 5


def test_what_is_cut_is_what_was_heard_there():
    item = sounds()[2]
    spans = select_segments(item.audio, repeats=True)
    short = spans.cut(item.audio, fade=0.0)
    assert short.duration == pytest.approx(spans.kept)
    places = np.arange(5, len(short.samples) - 5, 97)
    origin = np.rint(spans.original(places / 16000) * 16000).astype(int)
    np.testing.assert_array_equal(short.samples[places], item.audio.samples[origin])


def test_joints_fade():
    whole = Audio(np.ones(16000, np.float32), 16000)
    joined = Spans(np.array([[0.0, 0.25], [0.5, 0.75]]), 0.0, 1.0).cut(whole, fade=0.01).samples
    assert joined[:3800].min() == joined[4200:7800].min() == 1  # the whole begins as it did
    assert joined[4000] == 0 and 0.4 < joined[4080] < 0.6 and joined[-1] == 0


def test_a_span_of_a_file_keeps_its_times():
    item = sounds()[2]
    later = Audio(item.audio.samples, item.audio.rate, start=12.5)
    one, other = select_segments(item.audio), select_segments(later)
    np.testing.assert_allclose(other.seconds, one.seconds + 12.5)
    np.testing.assert_allclose(other.cut(later).samples, one.cut(item.audio).samples)


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_silence_leaves_nothing(rate):
    spans = select_segments(Audio(np.zeros(2 * rate, np.float32), rate))
    assert len(spans) == 0 and spans.kept == 0 and spans.silent == pytest.approx(2.0)
    assert np.isnan(spans.selected([0.0, 1.0])).all()
    with pytest.raises(SelectionError, match="silent"):
        spans.cut(Audio(np.zeros(2 * rate, np.float32), rate))


def test_a_hum_far_below_the_loudest_is_silence():
    hum = 1e-3 * np.random.default_rng(0).normal(size=48000)
    hum[16000:24000] += np.sin(np.arange(8000) / 3)
    spans = select_segments(Audio(hum.astype(np.float32), 16000), repeats=True, margin=0.0)
    assert spans.seconds.tolist() == [[1.0, 1.5]] and spans.silent == pytest.approx(2.5)


@pytest.mark.parametrize("length", [1, 100, 1599, 1601, 3200])
def test_short_sounds_are_kept(length):
    sound = Audio(np.sin(np.arange(length) / 3).astype(np.float32) + 0.1, 16000)
    spans = select_segments(sound)
    assert spans.seconds.tolist() == [[0.0, length / 16000]]


def test_speech_is_kept_and_pauses_are_not(real):
    path = next(iter(sorted((real / "speech" / "prompts").glob("*.flac"))))
    said = read_audio(path).samples
    said = said[: len(said) // 1600 * 1600]
    length, pause = len(said) / 16000, np.zeros(32000, np.float32)
    audio = Audio(np.concatenate([pause, said, pause, said, pause]), 16000)
    both, once = select_segments(audio, repeats=True), select_segments(audio)
    assert 2 * length - 0.4 < both.kept < 2 * length + 0.4
    times = np.linspace(2, 2 + length, 50)
    assert (np.isfinite(once.selected(times)) == np.isfinite(both.selected(times))).all()
    assert np.isnan(once.selected(times + 2 + length)).mean() > 0.9  # what falls into the same steps is known


def test_long_sounds_have_the_features_of_their_parts(monkeypatch):
    audio = sounds(shifts={"hiss": 1.0})[4].audio
    whole = mel_features(audio)
    mel = log_mel(audio, 40)[0][: len(whole) * 10]
    mel = np.maximum(mel, mel.max() - 60)[: len(mel) // 10 * 10].reshape(-1, 10, 40)
    np.testing.assert_allclose(whole.values[: len(mel), :40], mel.mean(1), atol=1e-3)
    np.testing.assert_allclose(whole.values[: len(mel), 40:], mel.std(1), atol=1e-3)
    monkeypatch.setattr(features_module, "HOPS", 37)
    np.testing.assert_allclose(mel_features(audio).values, whole.values, atol=1e-3)
    assert whole.times[1] - whole.times[0] == pytest.approx(0.1)


@pytest.mark.parametrize(
    "audio, options, why",
    [
        (Audio(np.zeros(0, np.float32), 16000), {}, "0 samples"),
        (Audio(np.full(16000, np.nan, np.float32), 16000), {}, "NaN"),
        (np.zeros(16000, np.float32), {}, "of an Audio"),
        (Audio(np.ones(16000, np.float32), 16000), {"budget": 0.01}, "at least a step"),
        (Audio(np.ones(16000, np.float32), 16000), {"step": 0.001}, "0.01 s"),
        (Audio(np.ones(16000, np.float32), 16000), {"method": "uniform"}, "needs a budget"),
        (Audio(np.ones(16000, np.float32), 16000), {"method": "loudest"}, "unknown"),
    ],
)
def test_sounds_that_cannot_be_are_refused(audio, options, why):
    with pytest.raises(SelectionError, match=why):
        select_segments(audio, **options)


# Noise of quantization

SEEN = ["SmolVLM", "Qwen2.5-VL", "LLaVA-OneVision", "InstructBLIP-video", "VideoMAE", "TimeSformer", "X-CLIP", "CLIP"]
HEARD = ["Whisper", "AST", "wav2vec2 CTC", "Qwen2-Audio", "CLAP"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name, medium", [*((n, "video") for n in SEEN), *((n, "audio") for n in HEARD)])
def test_features_of_a_step_are_those_of_its_frames(name, medium):
    model, given = build(name, quantize=False), batch(name)
    options = {"region": "vision" if medium == "video" else "audio", "layer": 1}
    options |= {"clip_frames": 4} if name == "CLIP" else {}
    length = given.lengths[medium][1]
    before = encoder_features(model, given.inputs, **options)
    assert len(before) == 2 and not hasattr(model, "_mmqlora_time")
    for step in (0, length // 2, length - 1):
        after = encoder_features(model, given.perturb(1, step, medium), **options)
        changes = [np.linalg.norm(a.values - b.values, axis=1) for a, b in zip(before, after, strict=True)]
        assert not changes[0].any() and changes[1].any()
        near = 0 if medium == "video" else 3  # convolutions blur a sound
        assert abs(int(changes[1].argmax()) - step * len(changes[1]) // length) <= near


@pytest.fixture(scope="module")
def video_model():
    return mm.benchmark.task("video/none").load("nf4")


@pytest.fixture(scope="module")
def video_batches() -> list:
    task = mm.benchmark.task("video/none")
    examples = task.train(seed=1)
    return [task.collate([examples[i] for i in places]) for places in ([0, 1, 2], [3, 4])]


def blocks_of(model):
    return model.model.vision_model.encoder.layers


def test_no_layer_behind_is_computed_and_the_model_is_left_as_it_was(video_model, video_batches):
    ran = []
    hooks = [
        block.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, block in enumerate(blocks_of(video_model))
    ]
    video_model.train()
    try:
        early = encoder_features(video_model, video_batches[0], layer=1)
        assert ran == [0] and all(module.training for module in video_model.modules())
        full = encoder_features(video_model, video_batches[0])
        assert ran == [0, 0, 1, 2] and "_mmqlora_time" not in video_model.__dict__
        assert [len(one) for one in early] == [len(one) for one in full]
        assert not np.allclose(early[0].values, full[0].values)
        assert all(len(block._forward_hooks) == 1 for block in blocks_of(video_model))
    finally:
        video_model.eval()
        for hook in hooks:
            hook.remove()


def test_clips_of_a_batch_don_t_mix(video_model, video_batches):
    task = mm.benchmark.task("video/none")
    alone = encoder_features(video_model, task.collate([task.train(seed=1)[1]]))
    np.testing.assert_allclose(alone[0].values, encoder_features(video_model, video_batches[0])[1].values, atol=1e-4)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
def test_adapters_are_switched_off(video_batches):
    plain = mm.benchmark.task("video/none").load()
    expected = encoder_features(plain, video_batches[0])[0].values
    adapted = mm.adapt(plain, "lora", rank=4)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    np.testing.assert_allclose(encoder_features(adapted, video_batches[0])[0].values, expected, atol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(
            adapted(**video_batches[0]).logits, mm.benchmark.task("video/none").load()(**video_batches[0]).logits
        )


def test_noise_is_what_the_definitions_say(video_model, video_batches):
    reference = mm.benchmark.task("video/none").load()
    noise = quantization_noise(video_model, video_batches, reference, layer=2)
    errors, sizes = [], []
    for inputs in video_batches:
        pairs = (encoder_features(model, inputs, layer=2) for model in (video_model, reference))
        for noisy, clean in zip(*pairs, strict=True):
            errors.append(noisy.values.astype(float) - clean.values)
            sizes.append(np.square(clean.values).mean())
    half = np.stack([np.square(np.diff(error, axis=0)).mean(0) / 2 for error in errors])
    np.testing.assert_allclose(noise.deviation, np.sqrt(half.mean(0)), rtol=1e-3)
    spread = half.std(0, ddof=1) / math.sqrt(5) / (2 * np.sqrt(half.mean(0)))
    np.testing.assert_allclose(noise.error, spread, rtol=1e-2)
    np.testing.assert_allclose(noise.bias, np.mean([error.mean(0) for error in errors], 0), rtol=1e-2, atol=1e-6)
    size = math.sqrt(np.mean(sizes))
    row = noise.layers.loc[2]
    assert row["size"] == pytest.approx(size, rel=1e-4)
    assert row["error"] == pytest.approx(
        np.sqrt(np.mean([np.square(error).mean() for error in errors])) / size, rel=1e-3
    )
    assert row["difference"] == pytest.approx(np.sqrt(half.mean()) / size, rel=1e-3)
    assert len(noise.layers) == 2 and [len(step) for step in noise.steps] == [len(error) for error in errors]
    # The finding that the choice of frames hangs on: most of the error is the same in neighbors, and cancels.
    assert (noise.layers["difference"] < 0.4 * noise.layers["error"]).all()


def test_fewer_bits_make_more_noise(video_batches):
    task = mm.benchmark.task("video/none")
    levels = {}
    for bits in ("nf4", "int8"):
        levels[bits] = quantization_noise(task.load(bits), video_batches)  # its twin is loaded from where it came from
    assert np.median(levels["nf4"].deviation) > 3 * np.median(levels["int8"].deviation)
    features = encoder_features(task.load("nf4"), video_batches[0])[0]
    kept = [len(select_frames(features, noise=noise)) for noise in levels.values()]
    assert 1 <= kept[0] <= kept[1]


def test_a_model_that_is_its_own_twin_has_next_to_no_noise(video_model, video_batches):
    noise = quantization_noise(video_model, video_batches[:1], video_model)
    assert 0 < noise.deviation.max() < 1e-5 and noise.layers["error"].max() == 0
    assert np.isfinite(noise.error).all()
    task = mm.benchmark.task("video/none")
    one = quantization_noise(video_model, [task.collate([task.train(seed=1)[0]])], video_model)
    assert np.isnan(one.error).all()  # one clip tells nothing of others


def test_an_error_that_never_changes_is_no_noise_of_differences(video_model, video_batches):
    with torch.no_grad():
        hook = blocks_of(video_model)[-1].register_forward_hook(lambda module, args, output: output + 0.5)
        shifted = copy.deepcopy(video_model)
        hook.remove()
    noise = quantization_noise(shifted, video_batches, video_model)
    np.testing.assert_allclose(noise.errors, 0.5, rtol=1e-3)
    np.testing.assert_allclose(noise.bias, 0.5, rtol=1e-3)
    assert noise.deviation.max() < 1e-3


def test_noise_of_thumbnails_is_what_moves_features_as_far():
    """Of features that are thumbnails, turned and four times as large, it is a quarter."""
    rng = np.random.default_rng(0)
    turn = 4 * np.linalg.qr(rng.normal(size=(6, 6)))[0]
    small = [rng.normal(size=(20, 6)) for _ in range(3)]
    own = [{1: noise_module._Clip(x @ turn, x @ turn)} for x in small]
    deviation, error = noise_module._through(small, own, 1, np.full(6, 0.8), np.full(6, 0.08))
    np.testing.assert_allclose(deviation, 0.2, rtol=1e-5)
    np.testing.assert_allclose(error, 0.02 / math.sqrt(6), rtol=1e-5)


def test_noise_of_thumbnails_has_their_shape(video_model, video_batches):
    world = mm.benchmark.task("video/none").train(seed=1).world
    small = [thumbnail_features(world[index].frames) for index in range(5)]
    noise = quantization_noise(video_model, video_batches, thumbnails=small)
    assert noise.deviation.shape == (192,) and 0 < noise.deviation[0] < 20 and noise.error[0] < noise.deviation[0]
    assert noise.errors.shape == (128,)
    assert 1 <= len(select_frames(world[0].frames, noise=noise + clip_noise(small[0]))) <= len(world[0].frames)
    with pytest.raises(SelectionError, match="thumbnails of 4 clips for 5"):
        quantization_noise(video_model, video_batches, thumbnails=small[:4])


def test_models_and_clips_that_tell_nothing_are_refused(video_model, video_batches):
    audio = mm.benchmark.task("audio/none").load()
    with pytest.raises(SelectionError, match="layer=4; the vision encoder has layers 1 to 3"):
        encoder_features(video_model, video_batches[0], layer=4)
    with pytest.raises(SelectionError, match="no layers whose rows"):
        encoder_features(audio, {}, region="vision")
    with pytest.raises(SelectionError, match="0 clips"):
        quantization_noise(video_model, [])
    with pytest.raises(SelectionError, match="name the region"):
        encoder_features(build("Qwen2.5-Omni thinker", quantize=False), {})
    nameless = copy.deepcopy(video_model)
    nameless.config._name_or_path = ""
    with pytest.raises(SelectionError, match="give its twin as reference"):
        quantization_noise(nameless, video_batches)


def test_the_api_is_what_it_says():
    assert {"select_frames", "select_segments", "Selector", "quantization_noise", "encoder_features"} <= set(mm.__all__)
