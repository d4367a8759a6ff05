"""Generated clips and sounds whose every event is known, with shifts of one region at a time.

Example:
    >>> world = World("clips", count=100, seed=1)
    >>> clip = world[6]
    >>> clip.frames.shape, clip.caption
    ((23, 32, 32, 3), 'white square becomes yellow then red square appears')

One grammar for all kinds::

    caption  := event (" then " event)*            told in order of time
    event    := adjective noun predicate
    clips       red | green | blue | yellow | pink | white   circle | square | triangle | cross
                appears | disappears | turns | becomes ADJECTIVE | hits ADJECTIVE NOUN
    sounds      low | middle | high | rising | falling        tone | chirp | click | noise
                once | twice

``World("both")`` gives each event of a clip its sound; in half of the clips the sounds are those of other events, and
the caption ends in "sound agrees" or "sound differs".

A shift changes one thing and nothing else: the same seed and index give the same events, and the same pixels but for
what the shift touches. Strength 1 is what the benchmark uses; 0 changes nothing. Syntax, reversed and faster have no
halves: any strength above 0 is all of it. "words" and "flashes" grow word by word and flash by flash.

======  ========  ===================================================================================
region  shift     what changes
======  ========  ===================================================================================
vision  palette   what color a color's name means: all hues move
vision  texture   stripes on shapes and background
vision  grain     noise in every pixel of every frame
vision  blur      a soft focus
audio   timbre    wave form and register
audio   hiss      white noise over everything
audio   reverb    an echoing room
text    words     other words for the same things
text    syntax    the predicate comes first
time    reversed  events are told from the last to the first, joined by "after"
time    longer    up to twice the frames or seconds, at most 64 frames, for the same events
time    faster    events are shorter and follow each other without a still frame; sounds, 40 ms apart
time    flashes   foreign frames or blips that don't count
======  ========  ===================================================================================
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ..errors import MediaError
from ..media import Audio, read_audio, read_video, write_audio, write_video
from ..records import fingerprint
from . import _worlds_media as media

KINDS = ("clips", "sounds", "both")
PACES = ("sparse", "dense", "bursty")
SHIFTS = {
    "palette": "vision",
    "texture": "vision",
    "grain": "vision",
    "blur": "vision",
    "timbre": "audio",
    "hiss": "audio",
    "reverb": "audio",
    "words": "text",
    "syntax": "text",
    "reversed": "time",
    "longer": "time",
    "faster": "time",
    "flashes": "time",
}
FRAME_RATE = 8  # frames a second
MOST_FRAMES = 64

COLORS = ("red", "green", "blue", "yellow", "pink", "white")
SHAPES = ("circle", "square", "triangle", "cross")
VERBS = ("appears", "disappears", "turns", "becomes", "hits")
SOUNDS = (
    "low tone",
    "middle tone",
    "high tone",
    "rising chirp",
    "falling chirp",
    "low click",
    "high click",
    "low noise",
    "high noise",
)
MANNERS = ("once", "twice")
VERB_SOUNDS = {
    "appears": "rising chirp",
    "disappears": "falling chirp",
    "turns": "high noise",
    "becomes": "middle tone",
    "hits": "low click",
}
# In the order in which "words" replaces them as it grows stronger.
SYNONYMS = {
    "red": "crimson",
    "green": "emerald",
    "blue": "azure",
    "yellow": "golden",
    "pink": "rosy",
    "white": "pale",
    "low": "deep",
    "middle": "medium",
    "high": "shrill",
    "rising": "climbing",
    "falling": "sinking",
    "circle": "disc",
    "square": "box",
    "triangle": "wedge",
    "cross": "plus",
    "tone": "whistle",
    "chirp": "sweep",
    "click": "tap",
    "noise": "rustle",
}
NUMBERS = ("zero", "one", "two", "three", "four", "five")
ORDINALS = ("first", "second", "third", "fourth", "fifth")
THIRDS = ("early", "midway", "late")
# Every word that a caption, a question or an answer can hold.
_OTHERS = "then after sound agrees differs describe what happens last when how many events is before yes no ?"
_SAID = (*COLORS, *SHAPES, *VERBS, *SOUNDS, *MANNERS, *SYNONYMS.values(), *NUMBERS, *ORDINALS, *THIRDS, _OTHERS)
WORDS = tuple(dict.fromkeys(" ".join(_SAID).split()))

_SPANS = {"appears": 1, "disappears": 1, "becomes": 1, "turns": 2, "hits": 3}  # frames an event takes
_QUICK = {"tone": 0.25, "chirp": 0.3, "click": 0.06, "noise": 0.25}  # seconds a sound takes, once
_PAUSE = 0.08  # seconds between the two of "twice"


@dataclass(frozen=True)
class Event:
    """What happens, to whom, and when.

    Example:
        >>> Event("red circle", "becomes blue", start=0.5, stop=0.625).phrase
        'red circle becomes blue'

    Attributes:
        subject: adjective and noun, such as "red circle".
        predicate: verb with its complement ("becomes blue", "hits green cross"), or "once" or "twice".
        start: the second at which it begins; for clips that of the first frame that shows it.
        stop: the second at which it has ended.
    """

    subject: str
    predicate: str
    start: float
    stop: float

    @property
    def phrase(self) -> str:
        """Subject and predicate."""
        return f"{self.subject} {self.predicate}"


@dataclass(frozen=True)
class Question:
    """A question, its answer, and its sort: "what", "when", "how many" or "order".

    Example:
        >>> Question("how many events ?", "two", "how many").answer
        'two'

    Attributes:
        text: in the world's words and word order.
        answer: a phrase ("what"), "early", "midway" or "late" (the third of the clip in which the event starts), a
            number, or "yes" or "no".
        sort: what is asked for.
    """

    text: str
    answer: str
    sort: str


@dataclass(frozen=True, eq=False)
class Track:
    """One shape over the frames of a clip: the truth behind the pixels.

    Example:
        >>> [SHAPES[track.shape] for track in World("clips", count=10, seed=1)[6].tracks]
        ['square', 'square']

    Attributes:
        shape: index into `SHAPES`.
        cell: the quarter of the picture it lives in, 0 to 3, row by row.
        color: (F,) index into `COLORS`.
        visible: (F,) bool.
        angle: (F,) eighths of a turn, halves in between.
        x, y: (F,) pixels.
    """

    shape: int
    cell: int
    color: np.ndarray
    visible: np.ndarray
    angle: np.ndarray
    x: np.ndarray
    y: np.ndarray


@dataclass(frozen=True, eq=False)
class Item:
    """A clip, a sound or both, with what is true of it.

    Example:
        >>> item = World("both", count=10, seed=1)[6]
        >>> item.events[0].phrase, item.events[0].start, item.heard[0].phrase
        ('white square becomes yellow', 0.375, 'middle tone once')

    Attributes:
        index: its place in the world.
        caption: what happens, in order.
        events: the `Event` objects, in order of time.
        questions: `Question` objects.
        negatives: captions that are nearly right: two events swapped, or one word changed. They tell the events
            alone, without the clause on the sound.
        frames: (F, H, W, 3) uint8, or None for sounds.
        audio: `media.Audio`, or None for clips.
        rate: frames a second.
        heard: of a clip with sound, the sound of each event; it may last past the end of the event, or of the clip.
        key_frames: for each event the frame that shows it best; none for sounds.
        flashes: what must be ignored: the frames shown for one frame, or the seconds at which blips of 0.05 s start.
        tracks: the shapes behind the pixels; not written to files.
        shifts: name to strength.
        regions: regions that the shifts touch.
    """

    index: int
    caption: str
    events: tuple[Event, ...]
    questions: tuple[Question, ...]
    negatives: tuple[str, ...]
    frames: np.ndarray | None = None
    audio: Audio | None = None
    rate: float = FRAME_RATE
    heard: tuple[Event, ...] = ()
    key_frames: tuple[int, ...] = ()
    flashes: tuple[float, ...] = ()
    tracks: tuple[Track, ...] = ()
    shifts: Mapping[str, float] = field(default_factory=dict)
    regions: tuple[str, ...] = ()


class World(Dataset):
    """A data set of generated items; the same arguments give the same bytes everywhere.

    Example:
        >>> World("sounds", count=10, seed=1)[2].caption
        'high tone twice then high noise once then low tone once'
        >>> World("clips", count=10, seed=1, shifts={"palette": 1.0, "flashes": 0.5})[3].regions
        ('time', 'vision')

    Args:
        kind: "clips", "sounds" or "both".
        count: number of items.
        seed: 0 or more; worlds of different seeds share nothing but chance.
        shifts: name of a shift (see `SHIFTS`) to its strength, 0 to 1; none is the control.
        frames: fewest and most frames of a clip, within 16 to 64, at 8 a second. Sounds last as long.
        pace: "sparse" (1-2 events), "dense" (3-5, spread) or "bursty" (2-4 in a row, stillness around), or as many
            as fit: long sounds fill two seconds sooner; None mixes.
        size: pixels of a side.

    Raises:
        MediaError: an unknown kind, shift or pace, or a number out of range.
    """

    def __init__(
        self,
        kind: str = "clips",
        count: int = 1000,
        seed: int = 0,
        shifts: Mapping[str, float] | None = None,
        frames: tuple[int, int] = (16, 24),
        pace: str | None = None,
        size: int = 32,
    ) -> None:
        self.kind, self.count, self.seed, self.size = kind, count, seed, size
        self.shifts, self.frames, self.pace = dict(shifts or {}), tuple(frames), pace
        if kind not in KINDS:
            raise MediaError(f"kind={kind!r}; the worlds are {', '.join(KINDS)}")
        if pace not in (None, *PACES):
            raise MediaError(f"pace={pace!r}; expected None or one of {', '.join(PACES)}")
        if unknown := sorted(set(self.shifts) - set(SHIFTS)):
            raise MediaError(f"no shift is called {', '.join(unknown)}; there are {', '.join(SHIFTS)}")
        if any(not 0 <= strength <= 1 for strength in self.shifts.values()):
            raise MediaError(f"shifts={self.shifts}; a strength lies between 0 and 1")
        if len(self.frames) != 2 or not 16 <= self.frames[0] <= self.frames[1] <= MOST_FRAMES:
            raise MediaError(f"frames={self.frames}; expected the fewest and the most, within 16 to {MOST_FRAMES}")
        if count < 1 or size < 16 or seed < 0:
            raise MediaError(
                f"count={count}, size={size}, seed={seed}; expected at least 1 item, 16 pixels and a seed of 0"
            )

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Item:
        """Generate one item, with media."""
        if not -self.count <= index < self.count:
            raise IndexError(f"item {index} of {self.count}")
        index = int(index) % self.count
        # Streams of their own, so that a shift of one region leaves the chances of all others alone.
        streams = np.random.SeedSequence([self.seed, index]).spawn(5)
        story, look, sound, foreign, talk = (np.random.default_rng(stream) for stream in streams)
        script = self._clip(story) if self.kind != "sounds" else self._sounds(story)
        events, count = script["events"], script["frames"]
        flashes: tuple[float, ...] = ()
        heard: list[Event] = []
        frames = audio = None
        agrees: bool | None = None
        if self.kind != "sounds":
            chosen = _still_frames(foreign, script["busy"], self._strength("flashes"))
            frames = media.paint(script["tracks"], count, self.size, self.shifts, look, foreign, chosen)
            flashes = tuple(chosen)
        if self.kind == "sounds":
            blips = _still_seconds(foreign, events, count / FRAME_RATE, self._strength("flashes"))
            samples = media.play(events, count / FRAME_RATE, self.shifts, sound, foreign, blips)
            audio, flashes = Audio(samples, media.RATE), tuple(blips)
        elif self.kind == "both":
            agrees = bool(talk.integers(2))
            heard = _accompany(events, agrees, talk)
            audio = Audio(media.play(heard, count / FRAME_RATE, self.shifts, sound, foreign, []), media.RATE)
        caption = self._tell([event.phrase for event in events])
        if agrees is not None:
            caption += self._say(f" then sound {'agrees' if agrees else 'differs'}")
        return Item(
            index=index,
            caption=caption,
            events=tuple(events),
            questions=self._ask(events, count / FRAME_RATE, talk),
            negatives=self._negatives(events, caption, talk),
            frames=frames,
            audio=audio,
            heard=tuple(heard),
            key_frames=tuple(script.get("keys", ())),
            flashes=flashes,
            tracks=tuple(script.get("tracks", ())),
            shifts=dict(self.shifts),
            regions=tuple(sorted({SHIFTS[name] for name, strength in self.shifts.items() if strength})),
        )

    def __repr__(self) -> str:
        shifts = ", ".join(f"{name} {strength:g}" for name, strength in self.shifts.items()) or "no shift"
        return f"World({self.kind!r}, {self.count} items, seed {self.seed}, {shifts})"

    def fingerprint(self) -> str:
        """A short hash of the arguments and of the first eight items as they come out, media included."""
        arguments = [self.kind, self.count, self.seed, sorted(self.shifts.items()), self.frames, self.pace, self.size]
        parts: list[bytes | str] = [json.dumps(arguments)]
        for index in range(min(8, self.count)):
            item = self[index]
            parts.append(item.caption)
            parts += [] if item.frames is None else [item.frames.tobytes()]
            parts += [] if item.audio is None else [item.audio.samples.tobytes()]
        return fingerprint(*parts)

    def write(self, folder: str | os.PathLike[str], progress: bool = True) -> Path:
        """Write all items as media files with a manifest, as a data set lies on a disk.

        Example:
            >>> World("both", count=20).write("worlds/both")  # doctest: +SKIP
            PosixPath('worlds/both')

        Args:
            folder: made where missing. Clips are uncompressed AVI, sounds are WAV; ``manifest.jsonl`` has the rest. It
                comes last: a folder that has one is whole.
            progress: show a progress bar.

        Returns:
            The folder, for `read_world`.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # What is true of an older world's files is not true of these.
        (folder / "manifest.jsonl").unlink(missing_ok=True)
        lines = []
        for item in tqdm(self, total=len(self), desc="write", leave=False, disable=not progress):
            row = {name: getattr(item, name) for name in _WRITTEN}
            row["events"] = [asdict(event) for event in item.events]
            row["heard"] = [asdict(event) for event in item.heard]
            row["questions"] = [asdict(question) for question in item.questions]
            if item.frames is not None:
                row["video"] = f"{item.index:06}.avi"
                write_video(folder / row["video"], item.frames, item.rate)
            if item.audio is not None:
                row["audio"] = f"{item.index:06}.wav"
                write_audio(folder / row["audio"], item.audio.samples, item.audio.rate)
            lines.append(json.dumps(row) + "\n")
        (folder / "manifest.jsonl").write_text("".join(lines), encoding="utf-8")
        return folder

    def _strength(self, shift: str) -> float:
        return self.shifts.get(shift, 0.0)

    def _length(self, rng: np.random.Generator) -> tuple[int, int]:
        """Frames of the story, which say how much can happen, and frames shown."""
        count = int(rng.integers(self.frames[0], self.frames[1] + 1))
        return count, min(MOST_FRAMES, round(count * (1 + self._strength("longer"))))

    def _pace(self, rng: np.random.Generator) -> tuple[str, int]:
        pace = PACES[rng.integers(len(PACES))]  # drawn even if it is fixed, so that all else stays the same
        pace = self.pace or pace
        low, high = {"sparse": (1, 2), "dense": (3, 5), "bursty": (2, 4)}[pace]
        return pace, int(rng.integers(low, high + 1))

    def _clip(self, rng: np.random.Generator) -> dict[str, Any]:
        """Draw shapes and events, place the events in time, and follow every shape through the frames."""
        faster = self._strength("faster") > 0
        (room, count), (pace, wanted) = self._length(rng), self._pace(rng)
        cells = rng.permutation(4)
        jitter = rng.integers(-1, 2, size=(4, 2))
        shapes = [(int(rng.integers(len(COLORS))), int(rng.integers(len(SHAPES))))]
        if rng.integers(2):
            shapes.append(_new(rng, shapes))
        # The story first, in symbols: who is there, what each looks like, what may happen to whom.
        present: dict[int, tuple[int, int]] = dict(enumerate(shapes))
        first, born, steps = dict(present), dict.fromkeys(present, 0), []
        for _ in range(wanted):
            verbs = ["becomes"] + (["appears"] if len(present) < 3 and len(born) < 4 else [])
            verbs += ["disappears"] * (len(present) > 1) + ["hits"] * (len(present) > 1)
            turning = [i for i, (_, shape) in present.items() if SHAPES[shape] != "circle"]
            verbs += ["turns"] * bool(turning)
            verb = verbs[rng.integers(len(verbs))]
            who = list(present)[rng.integers(len(present))]
            after: Any = None
            if verb == "appears":
                who, after = len(born), _new(rng, present.values())
                present[who] = first[who] = after
                born[who] = -1
            elif verb == "turns":
                who = turning[rng.integers(len(turning))]
            elif verb == "becomes":
                free = [c for c in range(len(COLORS)) if (c, present[who][1]) not in present.values()]
                after = free[rng.integers(len(free))]
            elif verb == "hits":
                others = [i for i in present if i != who]
                after = others[rng.integers(len(others))]
            steps.append((verb, who, after, dict(present)))
            if verb == "disappears":
                del present[who]
            elif verb == "becomes":
                present[who] = (after, present[who][1])
        steps = steps[: _fitting([_SPANS[verb] for verb, *_ in steps], 1, room - 2)]
        # A fast collision is there and back: with one frame, two of the same pair in a row would look like one.
        spans = [1 + (verb == "hits") if faster else _SPANS[verb] for verb, *_ in steps]
        starts = 1 + _place(rng, spans, 0 if faster else 1, count - 2, "bursty" if faster else pace)
        # Then every shape through the frames.
        busy = np.zeros(count, bool)
        tracks = [_track(first[i], born[i] == 0, int(cells[i]), jitter[i], count, self.size) for i in born]
        events, keys = [], []
        for (verb, who, after, known), start, span in zip(steps, starts, spans, strict=True):
            track, stop = tracks[who], start + span
            busy[start - 1 : stop + 1] = True
            predicate, key = verb, start
            if verb == "appears":
                track.visible[start:] = True
            elif verb == "disappears":
                track.visible[start:] = False
            elif verb == "becomes":
                track.color[start:] = after
                predicate = f"becomes {COLORS[after]}"
            elif verb == "turns":
                track.angle[start:stop] += 1 if faster else np.array([0.5, 1])
                track.angle[stop:] += 1
                key = stop - 1
            else:
                _collide(track, tracks[after], start, faster, self.size)
                predicate = f"hits {_name(known[after])}"
                key = start if faster else start + 1
            events.append(Event(_name(known[who]), predicate, float(start / FRAME_RATE), float(stop / FRAME_RATE)))
            keys.append(int(key))
        return {"frames": count, "tracks": tracks, "events": events, "keys": keys, "busy": busy}

    def _sounds(self, rng: np.random.Generator) -> dict[str, Any]:
        """Draw sounds and place them in time, in steps of 10 ms."""
        faster = self._strength("faster") > 0
        (room, count), (pace, wanted) = self._length(rng), self._pace(rng)
        steps = [(SOUNDS[rng.integers(len(SOUNDS))], MANNERS[rng.integers(2)]) for _ in range(wanted)]
        spans = []
        for sound, manner in steps:
            once = _QUICK[sound.split()[1]]
            spans.append(round(100 * (once if manner == "once" else 2 * once + _PAUSE)))
        steps = steps[: _fitting(spans, 15, round(100 * room / FRAME_RATE) - 20)]
        spans = [span // 2 if faster else span for span in spans[: len(steps)]]
        total = round(100 * count / FRAME_RATE) - 20
        starts = 10 + _place(rng, spans, 4 if faster else 15, total, "bursty" if faster else pace)
        events = [
            Event(sound, manner, float(start / 100), float((start + span) / 100))
            for (sound, manner), start, span in zip(steps, starts, spans, strict=True)
        ]
        return {"frames": count, "events": events}

    def _say(self, text: str) -> str:
        """Put words in the world's vocabulary."""
        mine = [w for w in SYNONYMS if (w in COLORS or w in SHAPES) == (self.kind != "sounds")]
        replaced = set(mine[: round(self._strength("words") * len(mine))])
        return " ".join(SYNONYMS[word] if word in replaced else word for word in text.split(" "))

    def _phrase(self, phrase: str) -> str:
        """One event in the world's word order and vocabulary."""
        if self._strength("syntax"):
            adjective, noun, predicate, *rest = phrase.split()
            phrase = " ".join([predicate, adjective, noun, *rest])
        return self._say(phrase)

    def _tell(self, phrases: Sequence[str]) -> str:
        if self._strength("reversed"):
            return " after ".join(self._phrase(phrase) for phrase in reversed(phrases))
        return " then ".join(self._phrase(phrase) for phrase in phrases)

    def _ask(self, events: Sequence[Event], seconds: float, rng: np.random.Generator) -> tuple[Question, ...]:
        which = int(rng.integers(len(events)))
        where = "last" if which == len(events) - 1 and rng.integers(2) else ORDINALS[which]
        questions = [
            Question(f"what happens {where} ?", self._phrase(events[which].phrase), "what"),
            Question("how many events ?", NUMBERS[len(events)], "how many"),
        ]
        once = [event for event in events if sum(event.phrase == other.phrase for other in events) == 1]
        if once:
            asked = once[rng.integers(len(once))]
            third = THIRDS[min(2, int(3 * asked.start / seconds))]
            questions.append(Question(f"when {self._phrase(asked.phrase)} ?", third, "when"))
        if len(once) > 1:
            one, other = (once[i] for i in rng.permutation(len(once))[:2])
            text = f"is {self._phrase(one.phrase)} before {self._phrase(other.phrase)} ?"
            questions.append(Question(text, "yes" if one.start < other.start else "no", "order"))
        return tuple(questions)

    def _negatives(self, events: Sequence[Event], caption: str, rng: np.random.Generator) -> tuple[str, ...]:
        phrases = [event.phrase for event in events]
        wrong = []
        if len(events) > 1:
            i = int(rng.integers(len(events) - 1))
            wrong.append([*phrases[:i], phrases[i + 1], phrases[i], *phrases[i + 2 :]])
        i = int(rng.integers(len(events)))
        adjective, *rest = phrases[i].split()
        others = COLORS if adjective in COLORS else [s.split()[0] for s in SOUNDS if s.split()[1] == rest[0]]
        others = [other for other in others if other != adjective]
        wrong.append([*phrases[:i], " ".join([others[rng.integers(len(others))], *rest]), *phrases[i + 1 :]])
        return tuple(text for text in map(self._tell, wrong) if text != caption)


_WRITTEN = ("index", "caption", "negatives", "rate", "key_frames", "flashes", "shifts", "regions")


def read_world(folder: str | os.PathLike[str]) -> list[Item]:
    """Read what `World.write` wrote, through `media.read_video` and `media.read_audio`.

    Example:
        >>> items = read_world("worlds/both")  # doctest: +SKIP

    Args:
        folder: with a ``manifest.jsonl``.

    Returns:
        The items, without ``tracks``.

    Raises:
        MediaError: no manifest, a line that is none, or a media file that is missing or damaged.
    """
    folder = Path(folder)
    manifest = folder / "manifest.jsonl"
    if not manifest.is_file():
        raise MediaError(f"{manifest}: no such file; World.write makes one")
    items = []
    for number, line in enumerate(manifest.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            video, audio = row.pop("video", None), row.pop("audio", None)
            for name in ("events", "heard"):
                row[name] = tuple(Event(**event) for event in row[name])
            row["questions"] = tuple(Question(**question) for question in row["questions"])
            for name in ("negatives", "key_frames", "flashes", "regions"):
                row[name] = tuple(row[name])
            item = Item(**row)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise MediaError(f"{manifest}, line {number}: {error!r}; expected what World.write writes") from error
        frames = read_video(folder / video).frames if video else None
        items.append(replace(item, frames=frames, audio=read_audio(folder / audio, rate=None) if audio else None))
    return items


def _name(look: tuple[int, int]) -> str:
    return f"{COLORS[look[0]]} {SHAPES[look[1]]}"


def _new(rng: np.random.Generator, taken: Any) -> tuple[int, int]:
    """A color and a shape that no other has, so that its name says who is meant."""
    free = [(c, s) for c in range(len(COLORS)) for s in range(len(SHAPES)) if (c, s) not in taken]
    return free[rng.integers(len(free))]


def _fitting(spans: Sequence[int], gap: int, total: int) -> int:
    """How many events, from the first, fit into so many steps; always one."""
    ends = np.cumsum(spans) + gap * np.arange(len(spans))
    return max(1, int((ends <= total).sum()))


def _place(rng: np.random.Generator, spans: Sequence[int], gap: int, total: int, pace: str) -> np.ndarray:
    """Starts of events that take `spans` steps each, at least `gap` apart, within `total` steps."""
    slack = total - sum(spans) - gap * (len(spans) - 1)
    cuts = np.sort(rng.integers(0, slack + 1, size=len(spans)))
    if pace == "bursty":
        cuts[:] = cuts[0] if rng.integers(2) else cuts[-1]
    return cuts + np.concatenate([[0], np.cumsum(spans)[:-1]]).astype(int) + gap * np.arange(len(spans))


def _track(look: tuple[int, int], visible: bool, cell: int, jitter: np.ndarray, count: int, size: int) -> Track:
    x, y = (size * (0.25 + 0.5 * place) - 0.5 for place in (cell % 2, cell // 2))
    return Track(
        shape=look[1],
        cell=cell,
        color=np.full(count, look[0]),
        visible=np.full(count, visible),
        angle=np.zeros(count),
        x=np.full(count, x + jitter[0]),
        y=np.full(count, y + jitter[1]),
    )


def _collide(one: Track, other: Track, start: int, faster: bool, size: int) -> None:
    """Move one shape to another until they touch, and back. Who moves is who hits."""
    dx, dy = other.x[start] - one.x[start], other.y[start] - one.y[start]
    reach = max(0.0, 1 - 2 * media.RADIUS * size / np.sqrt(dx * dx + dy * dy))
    way = reach * np.array([1.0] if faster else [0.5, 1, 0.5])
    span = slice(start, start + len(way))
    one.x[span] += way * dx
    one.y[span] += way * dy


def _still_frames(rng: np.random.Generator, busy: np.ndarray, strength: float) -> list[int]:
    """Frames for flashes: none where something happens, no two side by side."""
    chosen: list[int] = []
    for frame in rng.permutation(np.flatnonzero(~busy)):
        if len(chosen) < round(3 * strength) and all(abs(frame - other) > 1 for other in chosen):
            chosen.append(int(frame))
    return sorted(chosen)


def _still_seconds(rng: np.random.Generator, events: Sequence[Event], seconds: float, strength: float) -> list[float]:
    """Seconds for blips, where nothing sounds."""
    free = np.arange(0.02, seconds - 0.08, 0.02)
    for event in events:
        free = free[(free + 0.1 < event.start) | (free > event.stop + 0.04)]
    chosen: list[float] = []
    for second in rng.permutation(free):
        if len(chosen) < round(3 * strength) and all(abs(second - other) > 0.1 for other in chosen):
            chosen.append(round(float(second), 2))
    return sorted(chosen)


def _accompany(events: Sequence[Event], agrees: bool, rng: np.random.Generator) -> list[Event]:
    """The sound of each event of a clip, or that of another verb."""
    heard = []
    for event in events:
        verbs = list(VERB_SOUNDS)
        verb = event.predicate.split()[0]
        if not agrees:
            verbs.remove(verb)
            verb = verbs[rng.integers(len(verbs))]
        sound = VERB_SOUNDS[verb]
        heard.append(Event(sound, "once", event.start, event.start + _QUICK[sound.split()[1]]))
    return heard
