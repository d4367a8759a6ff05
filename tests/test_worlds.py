from __future__ import annotations

import hashlib
import itertools
import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmqlora import MediaError, read_audio, read_video
from mmqlora.datasets import _worlds_media
from mmqlora.datasets.worlds import (
    COLORS,
    KINDS,
    MOST_FRAMES,
    NUMBERS,
    ORDINALS,
    PACES,
    SHAPES,
    SHIFTS,
    SOUNDS,
    SYNONYMS,
    THIRDS,
    VERB_SOUNDS,
    VERBS,
    WORDS,
    Item,
    World,
    read_world,
)

VISION = [name for name, region in SHIFTS.items() if region == "vision"]
AUDIO = [name for name, region in SHIFTS.items() if region == "audio"]
RATE = 16000


def truth(item: Item) -> list:
    """All that is said of an item, but for its tracks."""
    return [
        item.index, item.caption, item.events, item.heard, item.questions, item.negatives, item.rate, item.key_frames,
        item.flashes, item.shifts, item.regions,
    ]  # fmt: skip


def media(item: Item) -> list[bytes]:
    frames = [] if item.frames is None else [item.frames.tobytes()]
    return frames + ([] if item.audio is None else [item.audio.samples.tobytes()])


def digest(items: list[Item]) -> str:
    said = json.dumps([[item.caption, item.negatives, [vars(q) for q in item.questions]] for item in items])
    when = json.dumps([[(e.phrase, e.start, e.stop) for e in item.events] for item in items])
    parts = [said.encode(), when.encode(), *itertools.chain.from_iterable(map(media, items))]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:12]


# The same bytes -------------------------------------------------------------------------------------------------------

GOLDEN = {
    ("clips",): "5456d4dc19e0",
    ("clips", "palette"): "615f8b7f169e",
    ("clips", "texture"): "69a3b7c06bc6",
    ("clips", "grain"): "f2748d2e1b8d",
    ("clips", "blur"): "3e104c685952",
    ("clips", "words"): "43036388856c",
    ("clips", "syntax"): "5e658a88bd75",
    ("clips", "reversed"): "8426a8f8639d",
    ("clips", "longer"): "207c4bfbae77",
    ("clips", "faster"): "28030c20c011",
    ("clips", "flashes"): "4fea66caf45a",
    ("sounds",): "87a25223a566",
    ("sounds", "timbre"): "fb6c7c72011f",
    ("sounds", "hiss"): "b033b2be16cf",
    ("sounds", "reverb"): "b1fb42b72f87",
    ("sounds", "words"): "068409214496",
    ("sounds", "syntax"): "aa6e836e8c59",
    ("sounds", "reversed"): "6b4346b4203c",
    ("sounds", "longer"): "8a4d151bb5ad",
    ("sounds", "faster"): "0632d66c2d98",
    ("sounds", "flashes"): "a4ed3746d77b",
    ("both",): "7ba21c25668b",
    ("both", "palette", "hiss"): "558bcbb73e69",
    ("both", "reverb", "longer"): "0bd67b40e74b",
    ("both", *SHIFTS): "6e54c9d93e4d",
}


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: " ".join(case[:3]))
def test_the_same_seed_gives_the_same_bytes_on_every_machine(case):
    kind, *shifts = case
    assert digest(list(World(kind, count=3, seed=4, shifts=dict.fromkeys(shifts, 1.0)))) == GOLDEN[case]


@pytest.mark.parametrize("kind", KINDS)
def test_an_item_does_not_depend_on_which_others_were_read_nor_on_their_number(kind):
    forward = list(World(kind, count=4, seed=3))
    world = World(kind, count=400, seed=3)
    for index in (2, 0, 3, 1):
        assert truth(world[index]) == truth(forward[index]) and media(world[index]) == media(forward[index])
    assert len({item.caption for item in forward}) > 1
    assert media(World(kind, count=4, seed=5)[0]) != media(forward[0])


def test_an_index_counts_from_the_end_and_has_an_end():
    world = World("clips", count=3)
    assert truth(world[-1]) == truth(world[2]) and world[-1].index == 2
    assert truth(world[np.int64(1)]) == truth(world[1])
    assert len(list(world)) == len(world) == 3
    for index in (3, -4):
        with pytest.raises(IndexError, match="of 3"):
            world[index]


def test_the_fingerprint_sees_every_argument():
    worlds = [
        World(), World("sounds"), World(count=2), World(seed=1), World(shifts={"blur": 1}), World(shifts={"blur": 0.5}),
        World(frames=(16, 32)), World(pace="dense"), World(size=48),
    ]  # fmt: skip
    assert len({world.fingerprint() for world in worlds}) == len(worlds)
    assert World().fingerprint() == World().fingerprint()


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Worlds as they were generated, and as their files give them back."""
    pairs = {}
    for kind in KINDS:
        shifts = {"flashes": 1.0} if kind != "both" else {}
        world = World(kind, count=20, seed=7, shifts=shifts)
        folder = world.write(tmp_path_factory.mktemp(kind), progress=False)
        pairs[kind] = list(zip(world, read_world(folder), strict=True))
    return pairs


@pytest.mark.parametrize("kind", KINDS)
def test_files_give_back_what_was_generated(written, kind):
    for made, read in written[kind]:
        assert truth(read) == truth(made)
        if kind != "sounds":
            assert np.array_equal(read.frames, made.frames)
            assert read.frames.dtype == np.uint8 and read.frames.shape == made.frames.shape
        if kind != "clips":
            assert np.array_equal(read.audio.samples, made.audio.samples)
            assert read.audio.samples.dtype == np.float32 and read.audio.rate == made.audio.rate == RATE


def test_files_are_plain_media(tmp_path):
    item = World("both", count=1).write(tmp_path / "a" / "b", progress=False)
    video, audio = read_video(item / "000000.avi"), read_audio(item / "000000.wav")
    assert video.rate == 8 and video.duration == pytest.approx(audio.duration)


def test_a_new_world_replaces_the_old_one_in_a_folder(tmp_path, monkeypatch):
    World("clips", count=3).write(tmp_path, progress=False)
    World("sounds", count=2, seed=1).write(tmp_path, progress=False)
    assert [truth(item) for item in read_world(tmp_path)] == [truth(item) for item in World("sounds", 2, seed=1)]
    # One that was stopped half way leaves nothing that could be taken for a whole one.
    monkeypatch.setattr("mmqlora.datasets.worlds.write_audio", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        World("sounds", count=2, seed=2).write(tmp_path, progress=False)
    with pytest.raises(MediaError, match="no such file"):
        read_world(tmp_path)


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"index": 0}', '{"events": [{"subject": "red circle"}]}'])
def test_a_damaged_manifest_is_an_error_that_names_the_line(tmp_path, line):
    World("clips", count=1).write(tmp_path, progress=False)
    with open(tmp_path / "manifest.jsonl", "a") as file:
        file.write(line + "\n")
    with pytest.raises(MediaError, match=r"manifest\.jsonl, line 2"):
        read_world(tmp_path)


def test_missing_files_are_errors_that_name_them(tmp_path):
    with pytest.raises(MediaError, match=r"manifest\.jsonl: no such file"):
        read_world(tmp_path)
    World("both", count=1).write(tmp_path, progress=False)
    (tmp_path / "000000.wav").unlink()
    with pytest.raises(MediaError, match=r"000000\.wav"):
        read_world(tmp_path)


# What the files show is what the truth says ---------------------------------------------------------------------------


def changes(frames: np.ndarray) -> np.ndarray:
    """Pixels that differ from the frame before: (F,), 0 for the first."""
    return np.concatenate([[0], (np.diff(frames.astype(int), axis=0) != 0).any(-1).sum((1, 2))])


def pixels(frame: np.ndarray, color: str) -> int:
    """Pixels of a color, edges not counted."""
    wanted = _worlds_media._PALETTE[COLORS.index(color)]
    return int((np.abs(frame.astype(int) - wanted).max(-1) < 20).sum())


def first(event) -> int:
    return round(8 * event.start)


def test_frames_change_where_events_and_flashes_are_and_nowhere_else(written):
    flashed = 0
    for kind in ("clips", "both"):
        for _, item in written[kind]:
            moving = {frame for event in item.events for frame in range(first(event), round(8 * event.stop))}
            # A collision ends with the step back to where both were.
            moving |= {round(8 * event.stop) for event in item.events if event.predicate.startswith("hits")}
            moving |= {frame + step for frame in item.flashes for step in (0, 1)}
            changed = changes(item.frames)
            assert set(np.flatnonzero(changed)) == moving - {0, len(item.frames)}, item.caption
            for frame in item.flashes:
                assert min(changed[max(frame, 1)], changed[min(frame + 1, len(changed) - 1)]) > 500
                flashed += 1
            assert all(changed[first(event)] >= 8 for event in item.events)
    assert flashed > 20


def test_colors_of_pixels_follow_the_events(written):
    seen = set()
    for made, item in written["clips"] + written["both"]:
        for event, key in zip(item.events, item.key_frames, strict=True):
            color = event.subject.split()[0]
            verb, *rest = event.predicate.split()
            before, start = item.frames[first(event) - 1], item.frames[first(event)]
            seen.add(verb)
            assert key in range(first(event), round(8 * event.stop))
            if verb == "appears":
                assert pixels(start, color) > pixels(before, color) + 10
            elif verb == "disappears":
                assert pixels(start, color) < pixels(before, color) - 10
            elif verb == "becomes":
                assert pixels(start, color) < pixels(before, color) - 10
                assert pixels(start, rest[0]) > pixels(before, rest[0]) + 10
            elif verb == "turns":
                # As many pixels, at other places.
                assert abs(pixels(start, color) - pixels(before, color)) < 30
            else:
                at = {frame: distance(made, event, frame) for frame in range(first(event) - 1, round(8 * event.stop))}
                assert at[key] == min(at.values()) and at[key] == pytest.approx(2 * _worlds_media.RADIUS * 32)
                assert gap(item.frames[key], color, rest[0]) <= 3 < gap(before, color, rest[0]) or color == rest[0]
    assert seen == set(VERBS)


def distance(item: Item, event, frame: int) -> float:
    """Between the centers of the two shapes of a collision."""
    names = {event.subject, event.predicate.removeprefix("hits ")}
    one, other = (
        track
        for track in item.tracks
        if track.visible[frame] and f"{COLORS[track.color[frame]]} {SHAPES[track.shape]}" in names
    )
    return float(np.hypot(one.x[frame] - other.x[frame], one.y[frame] - other.y[frame]))


def gap(frame: np.ndarray, one: str, other: str) -> float:
    """Pixels between the nearest of two colors; a shape ends on an edge that is half its color."""
    places = [
        np.argwhere(np.abs(frame.astype(int) - _worlds_media._PALETTE[COLORS.index(color)]).max(-1) < 20)
        for color in (one, other)
    ]
    apart = np.abs(places[0][:, None] - places[1][None])
    return float(np.sqrt((apart**2).sum(-1)).min()) - 1


def loud(samples: np.ndarray) -> np.ndarray:
    """Whether something sounds, in steps of 5 ms."""
    return np.abs(samples[: len(samples) // 80 * 80].reshape(-1, 80)).max(1) > 3e-4


def spans(samples: np.ndarray, pause: float = 0.03) -> list[tuple[float, float]]:
    """Seconds from where to where something sounds; zero crossings of low tones are no pauses."""
    steps = np.flatnonzero(loud(samples))
    if not len(steps):
        return []
    cuts = np.flatnonzero(np.diff(steps) > pause / 0.005)
    starts, stops = steps[[0, *(cuts + 1)]], steps[[*cuts, len(steps) - 1]] + 1
    return [(start * 0.005, stop * 0.005) for start, stop in zip(starts, stops, strict=True)]


def test_sounds_begin_and_end_where_events_and_blips_do_and_nothing_else_sounds(written):
    blips = 0
    for _, item in written["sounds"]:
        wanted = [(second, second + 0.05) for second in item.flashes]
        blips += len(wanted)
        for event in item.events:
            if event.predicate == "once":
                wanted.append((event.start, event.stop))
            else:
                once = (event.stop - event.start - 0.08) / 2
                wanted += [(event.start, event.start + once), (event.stop - once, event.stop)]
        heard = spans(item.audio.samples)
        assert len(heard) == len(wanted), item.caption
        clicks = [event for event in item.events if "click" in event.subject]
        for (start, stop), (on, off) in zip(heard, sorted(wanted), strict=True):
            assert start == pytest.approx(on, abs=0.02)
            # A click has died away before it is over.
            fades = any(event.start <= on < event.stop for event in clicks)
            assert stop == pytest.approx(off, abs=0.02) or (fades and on < stop < off)
    assert blips > 20


def test_each_event_of_a_clip_has_its_sound_or_that_of_another_verb(written):
    agreeing = set()
    for _, item in written["both"]:
        agrees = item.caption.endswith(" then sound agrees")
        assert agrees or item.caption.endswith(" then sound differs")
        agreeing.add(agrees)
        busy = np.zeros(len(item.audio.samples), bool)
        for event, sound in zip(item.events, item.heard, strict=True):
            own = VERB_SOUNDS[event.predicate.split()[0]]
            assert sound.start == event.start and sound.predicate == "once"
            assert (sound.subject == own) == agrees and sound.subject in VERB_SOUNDS.values()
            at = round(RATE * sound.start)
            busy[at : round(RATE * sound.stop)] = True
            assert loud(item.audio.samples[at : at + 320]).any()
        assert not item.audio.samples[~busy].any()
    assert agreeing == {True, False}


# Grammar --------------------------------------------------------------------------------------------------------------


def parse(item: Item) -> list[str]:
    """The phrases of a caption in the world's own words and order, from the grammar alone."""
    text = item.caption.removesuffix(" then sound agrees").removesuffix(" then sound differs")
    meaning = {new: old for old, new in SYNONYMS.items()}
    text = " ".join(meaning.get(word, word) for word in text.split())
    if item.shifts.get("reversed"):
        phrases = text.split(" after ")[::-1]
    else:
        phrases = text.split(" then ")
    return [plain(phrase, item) for phrase in phrases]


def plain(phrase: str, item: Item) -> str:
    words = phrase.split()
    if item.shifts.get("syntax"):
        words = [*words[1:3], words[0], *words[3:]]
    adjective, noun, predicate, *rest = words
    if predicate in ("once", "twice"):
        assert f"{adjective} {noun}" in SOUNDS and not rest
    else:
        assert adjective in COLORS and noun in SHAPES and predicate in VERBS
        kinds = {"becomes": (COLORS,), "hits": (COLORS, SHAPES)}.get(predicate, ())
        assert len(rest) == len(kinds) and all(word in kind for word, kind in zip(rest, kinds, strict=True))
    return " ".join(words)


TELLINGS = [{}, {"syntax": 1}, {"words": 1}, {"reversed": 1}, {"words": 0.5, "syntax": 1, "reversed": 1}]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shifts", TELLINGS, ids=lambda shifts: " ".join(shifts) or "default")
def test_captions_say_the_events_and_all_is_said_in_known_words(kind, shifts):
    for item in World(kind, count=40, seed=11, shifts=shifts):
        assert parse(item) == [event.phrase for event in item.events]
        texts = [item.caption, *item.negatives]
        texts += itertools.chain.from_iterable((question.text, question.answer) for question in item.questions)
        assert {word for text in texts for word in text.split()} <= set(WORDS)
        assert item.caption not in item.negatives and len(set(item.negatives)) == len(item.negatives) >= 1


def test_words_replaces_every_word_at_full_strength_and_some_at_half():
    for kind in KINDS:
        items = [list(World(kind, count=30, seed=2, shifts={"words": strength})) for strength in (0, 0.5, 1)]
        old, half, new = (set(" ".join(item.caption for item in world).split()) for world in items)
        assert not new & set(SYNONYMS) and old & set(SYNONYMS) and not old & set(SYNONYMS.values())
        assert half & set(SYNONYMS) and half & set(SYNONYMS.values())
    assert len(WORDS) == len(set(WORDS)) and not set(SYNONYMS) & set(SYNONYMS.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shifts", TELLINGS[:1] + TELLINGS[-1:], ids=["default", "all"])
def test_answers_are_right(kind, shifts):
    sorts = set()
    for item in World(kind, count=60, seed=12, shifts=shifts):
        meaning = {new: old for old, new in SYNONYMS.items()}
        seconds = len(item.frames) / 8 if item.frames is not None else item.audio.duration
        phrases = [event.phrase for event in item.events]

        def understood(text: str, item=item, meaning=meaning) -> str:
            return plain(" ".join(meaning.get(word, word) for word in text.split()), item)

        for question in item.questions:
            sorts.add(question.sort)
            assert question.text.endswith(" ?")
            asked = question.text.removesuffix(" ?")
            if question.sort == "what":
                where = asked.removeprefix("what happens ")
                which = -1 if where == "last" else ORDINALS.index(where)
                assert understood(question.answer) == phrases[which]
            elif question.sort == "how many":
                assert question.answer == NUMBERS[len(phrases)]
            elif question.sort == "when":
                phrase = understood(asked.removeprefix("when "))
                assert phrases.count(phrase) == 1
                start = item.events[phrases.index(phrase)].start
                assert THIRDS.index(question.answer) == next(n for n in range(3) if start < (n + 1) * seconds / 3)
            else:
                one, other = (understood(part) for part in asked.removeprefix("is ").split(" before "))
                assert phrases.count(one) == phrases.count(other) == 1
                assert question.answer == ("yes" if phrases.index(one) < phrases.index(other) else "no")
    assert sorts == {"what", "how many", "when", "order"}


def test_a_name_means_one_shape_at_every_moment():
    for item in World("clips", count=100, seed=13):
        for frame in range(len(item.frames)):
            looks = [(track.color[frame], track.shape) for track in item.tracks if track.visible[frame]]
            assert len(set(looks)) == len(looks) >= 1
            assert len({track.cell for track in item.tracks}) == len(item.tracks)


def test_negatives_differ_by_a_swap_or_a_word():
    for kind in ("clips", "sounds"):
        for item in World(kind, count=60, seed=14):
            right = item.caption.split(" then ")
            for negative in item.negatives:
                wrong = negative.split(" then ")
                places = [i for i, (one, other) in enumerate(zip(right, wrong, strict=True)) if one != other]
                if len(places) == 2:
                    i, j = places
                    assert j == i + 1 and wrong[i] == right[j] and wrong[j] == right[i]
                else:
                    (i,) = places
                    pairs = zip(right[i].split(), wrong[i].split(), strict=True)
                    assert [one == other for one, other in pairs][:2] == [False, True]


# Shifts ---------------------------------------------------------------------------------------------------------------


def same_story(one: Item, other: Item) -> bool:
    return [event.phrase for event in one.events] == [event.phrase for event in other.events]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shift", SHIFTS)
def test_a_shift_changes_what_it_says_and_nothing_else(kind, shift):
    changed = set()
    for plain_, shifted in zip(World(kind, 6, seed=5), World(kind, 6, seed=5, shifts={shift: 1.0}), strict=True):
        assert shifted.regions == (SHIFTS[shift],) and same_story(plain_, shifted)
        texts = [[item.caption, item.questions, item.negatives] for item in (plain_, shifted)]
        differs = {
            "text": texts[0] != texts[1],
            "vision": kind != "sounds" and plain_.frames.tobytes() != shifted.frames.tobytes(),
            "audio": kind != "clips" and media(plain_)[-1] != media(shifted)[-1],
            "time": plain_.events != shifted.events or plain_.key_frames != shifted.key_frames,
            "flashes": plain_.flashes != shifted.flashes,
        }
        changed |= {name for name, is_so in differs.items() if is_so}
    there = {"clips": {"vision"}, "sounds": {"audio"}, "both": {"vision", "audio"}}[kind]
    if shift in VISION or shift in AUDIO:
        assert changed == {SHIFTS[shift]} & there
    elif shift in ("words", "syntax", "reversed"):
        assert changed == {"text"}
    elif shift == "flashes":
        assert changed == {"flashes", "audio" if kind == "sounds" else "vision"}
    else:
        # Only the answers to "when" may differ.
        assert changed - {"text"} == {"time"} | there


@pytest.mark.parametrize("kind", KINDS)
def test_strength_0_is_no_shift(kind):
    control = [(truth(item), media(item)) for item in World(kind, 4, seed=6)]
    for shifts in [{name: 0.0} for name in SHIFTS] + [dict.fromkeys(SHIFTS, 0)]:
        for item, (said, shown) in zip(World(kind, 4, seed=6, shifts=shifts), control, strict=True):
            said[-2] = shifts
            assert truth(item) == said and media(item) == shown


@pytest.mark.parametrize("kind", KINDS)
def test_regions_are_those_of_the_shifts(kind):
    def regions(**shifts: float) -> tuple[str, ...]:
        return World(kind, 1, shifts=shifts)[0].regions

    assert regions() == () and regions(blur=0, hiss=0.5) == ("audio",)
    assert regions(palette=1, blur=1, words=0.2, faster=1) == ("text", "time", "vision")


def test_palette_keeps_geometry_and_gives_every_color_another_look():
    for plain_, shifted in zip(World(count=20, seed=8), World(count=20, seed=8, shifts={"palette": 1.0}), strict=True):
        still = [(frames != frames[:, :1, :1]).any(-1) for frames in (plain_.frames, shifted.frames)]
        assert (still[0] == still[1]).mean() > 0.999
        for one, other in zip(plain_.tracks, shifted.tracks, strict=True):
            assert all(np.array_equal(getattr(one, name), getattr(other, name)) for name in vars(one))
    apart = np.abs(_worlds_media._PALETTE[:, None] - _worlds_media._SHIFTED[None]).sum(-1)
    assert apart.min() >= 50


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_longer_keeps_the_number_and_order_of_events(kind, strength):
    longer = World(kind, 20, seed=9, shifts={"longer": strength})
    for plain_, shifted in zip(World(kind, 20, seed=9), longer, strict=True):
        assert same_story(plain_, shifted)
        lengths = [len(item.frames) if kind != "sounds" else item.audio.duration * 8 for item in (plain_, shifted)]
        assert lengths[1] == round(lengths[0] * (1 + strength))
        # Each event takes as long as before.
        took = [[event.stop - event.start for event in item.events] for item in (plain_, shifted)]
        assert took[0] == pytest.approx(took[1])
    assert len(World("clips", 1, frames=(60, 64), shifts={"longer": 1.0})[0].frames) == MOST_FRAMES


@pytest.mark.parametrize("pace", [None, *PACES])
def test_faster_leaves_no_still_frame_and_no_pause_between_events(pace):
    for plain_, item in zip(World(count=20, pace=pace), World(count=20, pace=pace, shifts={"faster": 1}), strict=True):
        assert same_story(plain_, item)
        assert all(one.stop == other.start for one, other in itertools.pairwise(item.events))
        assert all(8 * (event.stop - event.start) == 1 + ("hits" in event.phrase) for event in item.events)
        assert changes(item.frames)[first(item.events[0]) : round(8 * item.events[-1].stop)].min() > 0
    for plain_, item in zip(
        World("sounds", 20, pace=pace), World("sounds", 20, pace=pace, shifts={"faster": 1}), strict=True
    ):
        assert same_story(plain_, item)
        pauses = [other.start - one.stop for one, other in itertools.pairwise(item.events)]
        assert pauses == pytest.approx([0.04] * len(pauses))
        for one, other in zip(plain_.events, item.events, strict=True):
            assert other.stop - other.start == pytest.approx((one.stop - one.start) / 2, abs=0.01)


def test_grain_hiss_and_texture_grow_with_their_strength():
    for kind, shift in (("clips", "grain"), ("clips", "texture"), ("clips", "blur"), ("sounds", "hiss")):
        control = World(kind, 1)[0]
        off = []
        for strength in (0.25, 0.5, 1.0):
            item = World(kind, 1, shifts={shift: strength})[0]
            one, other = (np.frombuffer(media(x)[0], np.uint8 if kind == "clips" else "f4") for x in (control, item))
            off.append(np.abs(one.astype(float) - other).mean())
        assert 0 < off[0] < off[1] < off[2]


@given(
    seed=st.integers(0, 2**32),
    kind=st.sampled_from(KINDS),
    shifts=st.dictionaries(st.sampled_from(list(SHIFTS)), st.floats(0, 1), max_size=4),
    frames=st.tuples(st.integers(16, 64), st.integers(16, 64)).map(sorted),
    pace=st.sampled_from([None, *PACES]),
    size=st.sampled_from([16, 32, 40]),
)
@settings(max_examples=60)
def test_what_holds_for_every_item(seed, kind, shifts, frames, pace, size):
    item = World(kind, count=3, seed=seed, shifts=shifts, frames=tuple(frames), pace=pace, size=size)[1]
    if kind != "sounds":
        assert item.frames.dtype == np.uint8 and item.frames.shape[1:] == (size, size, 3)
        assert frames[0] <= len(item.frames) <= min(64, 2 * frames[1])
        for event, key in zip(item.events, item.key_frames, strict=True):
            assert first(event) == 8 * event.start and first(event) <= key < round(8 * event.stop)
        assert all(0 <= frame < len(item.frames) for frame in item.flashes)
    if kind != "clips":
        samples = item.audio.samples
        assert samples.dtype == np.float32 and np.isfinite(samples).all() and np.abs(samples).max() <= 1
        assert len(samples) % 2000 == 0 and (item.frames is None or len(samples) == 2000 * len(item.frames))
        assert not item.audio.is_silent
    seconds = len(item.frames) / 8 if item.frames is not None else item.audio.duration
    assert 1 <= len(item.events) <= 5
    assert 0 < item.events[0].start and item.events[-1].stop < seconds
    assert all(event.start < event.stop for event in item.events)
    assert all(one.stop <= other.start for one, other in itertools.pairwise(item.events))
    end = seconds if item.frames is None else len(item.frames)
    assert all(0 <= flash < end for flash in item.flashes) and sorted(item.flashes) == list(item.flashes)
    assert parse(item) == [event.phrase for event in item.events]
    assert all(item.negatives) and all(question.answer for question in item.questions)


@pytest.mark.parametrize("kind", KINDS)
def test_paces(kind):
    counts = {pace: [item.events for item in World(kind, 60, pace=pace, frames=(24, 32))] for pace in PACES}
    assert {len(events) for events in counts["sparse"]} == {1, 2}
    assert {len(events) for events in counts["dense"]} == {3, 4, 5}
    assert {len(events) for events in counts["bursty"]} == {2, 3, 4}
    pause = 0.15 if kind == "sounds" else 1 / 8
    for events in counts["bursty"]:
        assert all(other.start - one.stop == pytest.approx(pause) for one, other in itertools.pairwise(events))


# Cost and errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_items_take_less_than_a_minute(kind):
    start = time.process_time()
    for item in World(kind, count=50):
        assert item.events
    assert time.process_time() - start < 50 * 0.06


@pytest.mark.parametrize(
    "arguments, says",
    [
        ({"kind": "film"}, "kind='film'; the worlds are clips, sounds, both"),
        ({"pace": "slow"}, "pace='slow'; expected None or one of sparse, dense, bursty"),
        ({"shifts": {"hue": 1.0}}, "no shift is called hue; there are palette"),
        ({"shifts": {"blur": 1.5}}, "between 0 and 1"),
        ({"shifts": {"blur": -0.1}}, "between 0 and 1"),
        ({"shifts": {"blur": float("nan")}}, "between 0 and 1"),
        ({"frames": (8, 24)}, "within 16 to 64"),
        ({"frames": (16, 65)}, "within 16 to 64"),
        ({"frames": (24, 16)}, "the fewest and the most"),
        ({"frames": (16, 20, 24)}, "the fewest and the most"),
        ({"count": 0}, "at least 1 item"),
        ({"size": 8}, "16 pixels"),
        ({"seed": -1}, "a seed of 0"),
    ],
    ids=str,
)
def test_an_argument_that_does_not_fit_is_an_error_that_says_what_fits(arguments, says):
    with pytest.raises(MediaError, match=says):
        World(**arguments)
