"""Which time step every row that a Linear sees belongs to.

A tower gets frames stacked on top of each other, or packed patches, or a sequence that is half as long as its mel
frames; a decoder gets tokens of which some stand for frames. Yet an adapter that is to act when something happens has
to know, for every row, when that row was. `families` says it for each architecture, by rules::

    Frames      x[i] is frame i of the batch: (frames, ..., D)
    Packed      the patches of all frames in a row: (patches, D); so many a frame
    Positions   each item has its own steps: (items, positions, D); one position a step, or more
    Tokens      the decoder: (items, tokens, D); tokens that stand for media have their time, words have none
    Calls       the tower is called once for each frame: (items, ..., D)
    Nothing     words only

and a few more for single architectures.

What can't be placed is refused with the name and the shapes; nothing is guessed. A model that is not in the list can
be added by its ``config.model_type``, with the decorator `family`.

`Timekeeper` sits on a model. When a forward pass starts, it reads the signals of the media (`signals`) into a `Clock`,
and the adapters ask the clock where their rows belong.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from .errors import TimelineError
from .signals import SIGNALS, audio_signals, pool_steps, thumbnail_signals, video_signals

# --- The time of one forward pass ------------------------------------------------------------------------------------


class Level:
    """The steps of all items of a stream at one resolution, one after another.

    Args:
        counts: steps of each item, N in all.
        signals: (N + 1, m) float32; the last row, all zeros, is that of rows without time.
        valid: (N,) bool, False where a step is padding; None if none is.
    """

    def __init__(self, counts: tuple[int, ...], signals: torch.Tensor, valid: torch.Tensor | None = None) -> None:
        self.counts, self.signals, self.valid = counts, signals, valid
        self.steps = len(signals) - 1
        self.same = len(set(counts)) == 1
        self._around: dict[int, torch.Tensor] = {}

    def around(self, width: int) -> torch.Tensor:
        """The steps around each step, (N, width) int64; N before the clip begins and where it has ended."""
        if width not in self._around:
            device = self.signals.device
            counts = torch.tensor(self.counts, device=device)
            item = torch.arange(len(counts), device=device).repeat_interleave(counts, output_size=self.steps)
            index = torch.arange(self.steps, device=device)[:, None] + torch.arange(width, device=device) - width // 2
            inside = (index >= 0) & (index < self.steps)
            index = index.clamp(0, max(0, self.steps - 1))
            if self.valid is not None:
                inside &= self.valid[index]
            self._around[width] = torch.where(inside & (item[index] == item[:, None]), index, self.steps)
        return self._around[width]


@dataclass
class Stream:
    """Media of one sort in a forward pass.

    Args:
        signals: (items, T, m) float32, zero where padded.
        valid: (items, T) bool.
        rows: patches of a frame, for each item, where the frames come packed.
        still: images, which have no time.
    """

    signals: torch.Tensor
    valid: torch.Tensor | None = None
    rows: tuple[int, ...] | None = None
    still: bool = False
    _levels: dict[Any, Level] = field(default_factory=dict)

    @property
    def items(self) -> int:
        """Clips in the batch."""
        return len(self.signals)

    @property
    def counts(self) -> tuple[int, ...]:
        """Steps of each clip, as they come."""
        if self.valid is None:
            return (self.signals.shape[1],) * self.items
        return tuple(self.valid.sum(1).tolist())

    def level(self, steps: int | None = None) -> Level:
        """All steps at one resolution.

        Args:
            steps: so many for each item, padding included, which is what padded sequences have. None: the valid ones,
                as they come.
        """
        if steps not in self._levels:
            self._levels[steps] = self._make(steps)
        return self._levels[steps]

    def _make(self, steps: int | None) -> Level:
        if steps is None:
            flat = self.signals.flatten(0, 1) if self.valid is None else self.signals[self.valid]
            return Level(self.counts, nn.functional.pad(flat, (0, 0, 0, 1)))
        flat = pool_steps(self.signals, steps).flatten(0, 1)
        valid = None if self.valid is None else pool_steps(self.valid[..., None], steps).flatten() > 0
        return Level((steps,) * self.items, nn.functional.pad(flat, (0, 0, 0, 1)), valid)


@dataclass
class Placement:
    """Where the rows of one Linear's input belong.

    Args:
        level: the steps.
        index: int64, broadcasts to the input's shape without its last dimension; ``level.steps`` is 'no time'. None if
            the first dimension is the steps, in order.
        rows: rows of each step where ``index`` is given, (N + 1,) float32.
    """

    level: Level
    index: torch.Tensor | None = None
    rows: torch.Tensor | None = None

    @property
    def signals(self) -> torch.Tensor:
        """Signals of the steps, (N, m) without an index, and with one (N + 1, m), the last row that of no time."""
        return self.level.signals[:-1] if self.index is None else self.level.signals

    def part(self, own: torch.Tensor, shape: Sequence[int]) -> Placement:
        """Of some entries of the input's first dimension.

        Args:
            own: (entries,) bool.
            shape: of the whole input.
        """
        if self.index is None:
            return Placement(self.level, own.nonzero().view(-1, *[1] * (len(shape) - 2)))
        return Placement(self.level, self.index.expand(shape[:-1])[own])

    def padded(self, values: torch.Tensor) -> torch.Tensor:
        """Values of all steps, (N, R), with a row of zeros for what has no time, where there is such."""
        return values if self.index is None else nn.functional.pad(values, (0, 0, 0, 1))

    def spread(self, table: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """From values like ``signals`` to one for each row: broadcasts to ``(*shape[:-1], R)``."""
        if self.index is None:
            return table.view(-1, *[1] * (len(shape) - 2), table.shape[-1])
        return nn.functional.embedding(self.index, table)  # its backward is faster than that of indexing

    def mean(self, h: torch.Tensor) -> torch.Tensor:
        """From a value for each row, (..., R), to the mean of each step, (N, R)."""
        if self.index is None:
            return h.flatten(1, -2).mean(1) if h.dim() > 2 else h
        # Many rows of 16 bits, added up in 16 bits, lose what is small beside their sum.
        flat = h.reshape(-1, h.shape[-1]).to(torch.promote_types(h.dtype, torch.float32))
        index = self.index.expand(h.shape[:-1]).reshape(-1)
        if self.rows is None:
            self.rows = torch.zeros(self.level.steps + 1, device=h.device).index_add_(
                0, index, torch.ones_like(index, dtype=torch.float32)
            )
        total = flat.new_zeros(self.level.steps + 1, flat.shape[-1]).index_add(0, index, flat)
        return (total / self.rows.clamp(min=1)[:, None])[:-1].to(h.dtype)


class Clock:
    """The time of one forward pass: its streams, its tokens, and where rows belong.

    Args:
        streams: media by name.
        ids: (B, L) tokens of the decoder.
        width: m, the number of signals.
        beams: how often each item was repeated.
        generating: the tokens are those that ``generate`` was called with; what a decoder sees may be the next ones.
    """

    def __init__(
        self,
        streams: dict[str, Stream],
        ids: torch.Tensor | None = None,
        width: int = 0,
        beams: int = 1,
        generating: bool = False,
    ) -> None:
        self.streams, self.ids, self.width, self.beams, self.generating = streams, ids, width, beams, generating
        self.calls: dict[str, int] = {}  # how often a tower was entered
        self.tables: dict[Any, Any] = {}  # what the adapters keep here for the length of the pass
        self.recomputed = False  # inside a checkpointed block, where nothing may be kept
        self._places: dict[Any, Placement] = {}

    def copy(self) -> Clock:
        """As it is now, for a block that will run again in the backward pass."""
        other = Clock(self.streams, self.ids, self.width, self.beams, self.generating)
        other.calls, other._places, other.recomputed = dict(self.calls), self._places, True
        return other

    def place(self, rule: Rule, name: str, shape: Sequence[int]) -> Placement:
        """Where the rows of an input of this shape belong.

        Raises:
            TimelineError: the shape does not fit the media of this forward pass.
        """
        key = (rule, tuple(shape[:-1]), self.calls.get(rule.tower, 0))
        if key not in self._places:
            stream, placed = self._stream(rule), None
            if isinstance(stream, Stream) and stream.still:
                placed = self.nowhere(stream.signals.device)
            else:
                placed = stream if isinstance(stream, str) else rule.place(self, stream, tuple(shape[:-1]))
            if isinstance(placed, str):
                raise TimelineError(f"{name}: an input of shape {tuple(shape)} has no place in time: {placed}.")
            self._places[key] = placed
        return self._places[key]

    def nowhere(self, device: torch.device) -> Placement:
        """The placement of rows of which none has a time."""
        level = Level((), torch.zeros(1, self.width, device=device))
        return Placement(level, torch.zeros(1, dtype=torch.long, device=device))

    def _stream(self, rule: Rule) -> Stream | str | None:
        """The stream that a rule is about, by the call of its tower; or what is wrong; or None where it asks itself."""
        if isinstance(rule, Tokens):
            return None
        present = [self.streams[name] for name in rule.streams if name in self.streams]
        if not present:
            if isinstance(rule, Positions) and rule.each:
                return Stream(torch.zeros(0, 0, self.width), still=True)  # words that follow a prefix of frames
            return f"no {' or '.join(rule.streams)} came with this forward pass"
        return present[min(max(0, self.calls.get(rule.tower, 1) - 1), len(present) - 1)]


# --- Rules -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """How the rows of some Linears belong to steps.

    Args:
        streams: names of the streams that the tower reads, in the order in which it is called for them.
        tower: the module whose calls tell which stream it is, where there is more than one.
    """

    streams: tuple[str, ...] = ()
    tower: str = ""

    def place(self, clock: Clock, stream: Any, shape: tuple[int, ...]) -> Placement | str:
        """The placement of rows of this shape, without the last dimension, or why there is none."""
        raise NotImplementedError

    @property
    def modalities(self) -> tuple[str, ...]:
        """What sort of signals its steps have: "video", "audio", or both."""
        return tuple(dict.fromkeys("audio" if stream == "audio" else "video" for stream in self.streams))


@dataclass(frozen=True)
class Nothing(Rule):
    """No row has a time.

    Args:
        why: the reason, where there are media behind the rows; empty for words.
    """

    why: str = ""


@dataclass(frozen=True)
class Frames(Rule):
    """Frames along the first dimension.

    Args:
        flat: the patches of a frame lie along it too.
    """

    flat: bool = False

    def place(self, clock: Clock, stream: Stream, shape: tuple[int, ...]) -> Placement | str:
        """See `Rule.place`."""
        level = stream.level()
        if self.flat and level.steps and shape[0] % level.steps == 0:
            index = torch.arange(level.steps, device=level.signals.device)
            return Placement(level, index.repeat_interleave(shape[0] // level.steps).view(-1, *[1] * (len(shape) - 1)))
        if shape[0] != level.steps:
            return f"{level.steps} frames along the first dimension were expected"
        return Placement(level)


@dataclass(frozen=True)
class Padded(Rule):
    """Frames along the first dimension, those of padding included."""

    def place(self, clock: Clock, stream: Stream, shape: tuple[int, ...]) -> Placement | str:
        """See `Rule.place`."""
        level = stream.level(steps=stream.signals.shape[1])
        return Placement(level) if shape[0] == level.steps else f"{level.steps} frames, with padding, were expected"


@dataclass(frozen=True)
class Packed(Rule):
    """The patches of all frames in a row, as Qwen-VL has them.

    Args:
        merge: patches merged into one.
    """

    merge: int = 1

    def place(self, clock: Clock, stream: Stream, shape: tuple[int, ...]) -> Placement | str:
        """See `Rule.place`."""
        level = stream.level()
        device = level.signals.device
        each = torch.tensor([row // self.merge for row in stream.rows or ()], device=device)
        each = each.repeat_interleave(torch.tensor(level.counts, device=device))
        index = torch.arange(level.steps, device=device).repeat_interleave(each)
        if torch.Size(shape).numel() != len(index):
            return f"{len(index)} rows of patches were expected"
        return Placement(level, index.view(shape), nn.functional.pad(each.float(), (0, 1)))


@dataclass(frozen=True)
class Joined(Rule):
    """The steps of all items in a row.

    Args:
        rows: from the input steps of an item to its rows.
    """

    rows: Callable[[int], int] = int

    def place(self, clock: Clock, stream: Stream, shape: tuple[int, ...]) -> Placement | str:
        """See `Rule.place`."""
        rows = tuple(self.rows(count) for count in stream.counts)
        if torch.Size(shape).numel() != sum(rows) * clock.beams:
            return f"{sum(rows) * clock.beams} rows were expected"
        items = torch.arange(sum(rows), device=stream.signals.device).split(rows)
        index = torch.cat([item.repeat(clock.beams) for item in items])
        return Placement(_resampled(stream, rows), index.view(shape))


@dataclass(frozen=True)
class Positions(Rule):
    """Every item has a row of positions: (items, positions).

    Args:
        stride: input steps merged into one step of the tower, which has one or more positions. 0: every position is a
            step of its own, however many there are.
        steps: how many steps there are, where the input's length does not tell.
        each: positions of a step, where words follow the last one.
        before: positions ahead of the first step, such as a class token; they have no time.
        inner: steps change fastest, as where positions run through the frequencies first.
    """

    stride: int = 0
    steps: int = 0
    each: int = 0
    before: int = 0
    inner: bool = False

    def place(self, clock: Clock, stream: Stream, shape: tuple[int, ...]) -> Placement | str:
        """See `Rule.place`."""
        items, numel = stream.items * clock.beams, torch.Size(shape).numel()
        if not items or numel % items or (len(shape) > 1 and shape[0] != items):
            return f"{items} sequences were expected"
        positions = numel // items - self.before
        steps, after = positions, 0
        if self.stride or self.steps or self.each:
            steps = self.steps or -(-stream.signals.shape[1] // (self.stride or 1))
        if self.each:
            after = positions - steps * self.each
            if positions == 1:
                return clock.nowhere(stream.signals.device)  # a next word for each
        if positions < 1 or after < 0 or (positions - after) % steps:
            return f"a whole number of positions for each of {steps} steps was expected"
        level = stream.level(steps=steps)
        device = level.signals.device
        index, each = torch.arange(steps, device=device), (positions - after) // steps
        index = index.repeat(each) if self.inner else index.repeat_interleave(each)
        index = index + steps * torch.arange(stream.items, device=device)[:, None]
        index = nn.functional.pad(index, (self.before, after), value=level.steps)
        if clock.beams > 1:
            index = index.repeat_interleave(clock.beams, 0)
        return Placement(level, index.reshape(shape))


@dataclass(frozen=True)
class Series(Rule):
    """Every patch of every item has a row of steps: (items x patches, steps)."""

    def place(self, clock: Clock, stream: Stream, shape: tuple[int, ...]) -> Placement | str:
        """See `Rule.place`."""
        level = stream.level()
        if not level.same or shape[0] % stream.items or shape[1:] != (level.counts[0],):
            return f"rows of {level.counts[0]} steps, for each of {stream.items} items as many, were expected"
        item = torch.arange(stream.items, device=level.signals.device).repeat_interleave(shape[0] // stream.items)
        return Placement(level, item[:, None] * shape[1] + torch.arange(shape[1], device=item.device))


@dataclass(frozen=True)
class Folded(Rule):
    """A spectrogram that is cut in time, the pieces stacked into a square image: (items, height x width), as in CLAP.

    Args:
        pieces: how many.
    """

    pieces: int = 4

    def place(self, clock: Clock, stream: Stream, shape: tuple[int, ...]) -> Placement | str:
        """See `Rule.place`."""
        side = math.isqrt(shape[1]) if len(shape) == 2 else 0
        if not side or side * side != shape[1] or side % self.pieces or shape[0] != stream.items:
            return f"{stream.items} square images of {self.pieces} pieces were expected"
        level = stream.level(steps=self.pieces * side)
        place = torch.arange(side, device=level.signals.device)
        index = (place // (side // self.pieces) * side)[:, None] + place
        return Placement(
            level, index.flatten() + level.counts[0] * torch.arange(stream.items, device=place.device)[:, None]
        )


@dataclass(frozen=True)
class Calls(Rule):
    """The tower is called once a frame, with that frame of all items."""

    def place(self, clock: Clock, stream: Stream, shape: tuple[int, ...]) -> Placement | str:
        """See `Rule.place`."""
        level, step = stream.level(), clock.calls[self.tower] - 1
        if shape[0] != stream.items * clock.beams or not level.same or step >= level.counts[0]:
            return f"{stream.items} items, of {level.counts[0]} frames each, were expected, a frame at a time"
        index = step + level.counts[0] * torch.arange(stream.items, device=level.signals.device)
        return Placement(level, index.repeat_interleave(clock.beams).view(-1, *[1] * (len(shape) - 1)))


@dataclass(frozen=True)
class Tokens(Rule):
    """A decoder's tokens: ids that stand for media, and words. Tokens that stand for images count as words.

    Args:
        ids: the id of each stream's tokens.
        runs: streams whose tokens lie in one unbroken run an item, a step each, however many there are.
        merge: patches merged into one token, where frames come packed.
        after: tokens without a time behind the last step of every item.
        stride: input steps of a token in a run, where runs may be longer than their media; what lies behind has no
            time. 0: a run is as long as its media.
    """

    ids: tuple[int, ...] = ()
    runs: tuple[str, ...] = ()
    merge: int = 1
    after: int = 0
    stride: int = 0

    def place(self, clock: Clock, stream: None, shape: tuple[int, ...]) -> Placement | str:
        """See `Rule.place`."""
        ids, numel = clock.ids, torch.Size(shape).numel()
        if ids is None:
            return "the tokens are not known, as input_ids did not come with this forward pass"
        beams = clock.beams
        if clock.generating:  # these are the tokens of the start
            if numel < ids.numel() and numel % len(ids) == 0:
                return clock.nowhere(ids.device)  # a next word for each
            beams = max(1, numel // ids.numel())
        else:
            ids = ids[::beams]  # beams begin as copies
        if numel != ids.numel() * beams:
            return f"{ids.numel() * beams} tokens were expected"
        levels, at = [], torch.full_like(ids, -1)
        for name, token in zip(self.streams, self.ids, strict=True):
            where = ids == token
            stream = clock.streams.get(name)
            # What depends on values can't be looked at while a graph is compiled.
            if not torch.compiler.is_compiling():
                if not bool(where.any()):
                    continue
                if stream is None:
                    return f"there are {name} tokens, but no {name} came with this forward pass"
            if stream is None:
                continue
            found = self._steps(stream, where, name)
            if isinstance(found, str):
                return found
            level, index = found
            at = torch.where(where & (index >= 0), index + sum(other.steps for other in levels), at)
            levels.append(level)
        if not levels:
            return clock.nowhere(ids.device)
        last = levels[0].signals[-1:]
        signals = torch.cat([*(level.signals[:-1] for level in levels), last])
        level = Level(tuple(count for level in levels for count in level.counts), signals)
        index = torch.where(at < 0, level.steps, at)
        return Placement(level, index.repeat_interleave(beams, 0).view(shape))

    def _steps(self, stream: Stream, where: torch.Tensor, name: str) -> tuple[Level, torch.Tensor] | str:
        """The level of a stream, and the step of each token where it is one of the stream's; -1 for none."""
        rank = where.reshape(-1).cumsum(0).view_as(where) - 1  # which one it is of the stream's tokens
        if name in self.runs:
            runs = _runs(where)
            if len(runs) != stream.items:
                return f"{len(runs)} runs of {name} tokens, but {stream.items} items; one run for each was expected"
            steps = runs
            if self.stride:
                steps = [min(run, -(-count // self.stride)) for run, count in zip(runs, stream.counts, strict=True)]
            length, first = torch.tensor(runs, device=where.device), torch.tensor(steps, device=where.device)
            stops, firsts = length.cumsum(0), first.cumsum(0) - first
            item = torch.searchsorted(stops, rank.contiguous(), right=True).clamp(max=len(runs) - 1)
            place = rank - (stops - length)[item]
            return _resampled(stream, tuple(steps)), torch.where(place < first[item], firsts[item] + place, -1)
        level, device = stream.level(), where.device
        if stream.rows is None:
            each = (where.sum() - self.after * stream.items) // max(1, level.steps)
            widths = each.expand(level.steps)
        else:
            rows = torch.tensor([row // self.merge for row in stream.rows], device=device)
            widths = rows.repeat_interleave(torch.tensor(level.counts, device=device), output_size=level.steps)
        steps = torch.arange(level.steps, device=device)
        if self.after:  # a step that is none behind every item
            ends = torch.tensor(level.counts).cumsum(0).tolist()
            steps = torch.cat([nn.functional.pad(steps[i:j], (0, 1), value=-1) for i, j in _pairs(ends)])
            widths = torch.cat([nn.functional.pad(widths[i:j], (0, 1), value=self.after) for i, j in _pairs(ends)])
        stops = widths.cumsum(0)
        if not torch.compiler.is_compiling() and (int(stops[-1]) != int(where.sum()) or not bool((widths > 0).all())):
            return f"{int(where.sum())} {name} tokens do not fit {level.steps} steps of {stream.items} items"
        found = torch.searchsorted(stops, rank.contiguous(), right=True).clamp(max=len(steps) - 1)
        return level, steps[found]


def _pairs(ends: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _resampled(stream: Stream, steps: tuple[int, ...]) -> Level:
    """A level with so many steps for each item, whatever its length."""
    longest = pool_steps(stream.signals, steps, stream.valid)
    flat = torch.cat([row[:count] for row, count in zip(longest, steps, strict=True)])
    return Level(steps, nn.functional.pad(flat, (0, 0, 0, 1)))


def _runs(where: torch.Tensor) -> list[int]:
    """Lengths of unbroken runs, row by row, of (B, L) bool."""
    edges = nn.functional.pad(where.int(), (1, 1)).diff(dim=1)
    starts, stops = (edges == 1).nonzero(), (edges == -1).nonzero()
    return (stops - starts)[:, 1].tolist()


# --- Media -----------------------------------------------------------------------------------------------------------

Arguments = Mapping[str, Any]
Reader = Callable[[Arguments, Sequence[str]], "Stream | None"]


def _columns(names: Sequence[str], modality: str, compute: Callable[..., torch.Tensor]) -> torch.Tensor:
    """Signals of these names, (items, T, m), where those of the other modality are zero."""
    own = [number for number, name in enumerate(names) if SIGNALS[name][0] in (modality, "both")]
    values = compute(names=[names[number] for number in own])
    if len(own) == len(names):
        return values
    return values.new_zeros(*values.shape[:2], len(names)).index_copy_(
        2, torch.tensor(own, device=values.device), values
    )


def frames(
    argument: str = "pixel_values", drop_zeros: bool = False, clip: int | None = None, token: int | None = None
) -> Reader:
    """Read frames of shape (items, F, C, H, W), or (N, C, H, W) where something tells which are one clip.

    Args:
        argument: name of the argument of the model's ``forward``.
        drop_zeros: leave out frames that are all zeros, as SmolVLM does.
        clip: frames of every clip; 0 where ``clip_frames`` is yet to tell, None where it can't.
        token: the id of the tokens of a frame: the frames of a sample are one clip.
    """

    def read(arguments: Arguments, names: Sequence[str]) -> Stream | None:
        pixels, valid = arguments.get(argument), None
        if pixels is None:
            return None
        if pixels.dim() == 4 and token is not None:
            pixels, valid = _by_clip(pixels, _images(arguments.get("input_ids"), token, len(pixels), argument))
        elif pixels.dim() == 4:
            if not clip or len(pixels) % clip:
                told = f", or TemporalLoraConfig(clip_frames=...) with a number that divides {len(pixels)}"
                raise TimelineError(
                    f"{argument} has the shape {tuple(pixels.shape)}: frames of which clips? Expected (clips, frames, "
                    f"C, H, W){'' if clip is None else told}."
                )
            pixels = pixels.unflatten(0, (-1, clip))
        if drop_zeros:
            valid = (pixels != 0).flatten(2).any(2)
            valid[0, 0] |= ~valid.any()  # SmolVLM keeps the first
        valid = None if valid is None or bool(valid.all()) else valid
        return Stream(_columns(names, "video", partial(video_signals, pixels, valid)), valid)

    return read


def patches(argument: str, counts: str) -> Reader:
    """Read frames as patches, (N, P, D) of three colors each, with the number of frames of each clip."""

    def read(arguments: Arguments, names: Sequence[str]) -> Stream | None:
        pixels, each = arguments.get(argument), arguments.get(counts)
        if pixels is None or each is None:
            return None
        small = pixels.float().unflatten(-1, (-1, 3)).mean(2).transpose(1, 2)
        small = nn.functional.adaptive_avg_pool1d(small, min(64, small.shape[2])).flatten(1)
        clips, valid = _by_clip(small, each.tolist())
        return Stream(_columns(names, "video", partial(thumbnail_signals, clips, valid)), valid)

    return read


def packed(argument: str = "pixel_values_videos", grid: str = "video_grid_thw") -> Reader:
    """Read patches of all frames in a row, with the (time, height, width) of each clip in patches."""

    def read(arguments: Arguments, names: Sequence[str]) -> Stream | None:
        pixels, sizes = arguments.get(argument), arguments.get(grid)
        if pixels is None or sizes is None:
            return None
        shapes = [tuple(size) for size in sizes.tolist()]
        colors = pixels.unflatten(-1, (3, -1)).float().mean(-1)  # a patch is (C, time, height, width)
        # Patches lie in the same order in every frame, so bins of neighbors will do for a thumbnail.
        small = [
            nn.functional.adaptive_avg_pool1d(clip.view(t, h * w, 3).transpose(1, 2), 64).flatten(1)
            for clip, (t, h, w) in zip(colors.split([t * h * w for t, h, w in shapes]), shapes, strict=True)
        ]
        clips, valid = _by_clip(torch.cat(small), [t for t, _, _ in shapes])
        signals = _columns(names, "video", partial(thumbnail_signals, clips, valid))
        return Stream(signals, valid, tuple(h * w for _, h, w in shapes))

    return read


def stills(argument: str) -> Reader:
    """Read images beside videos: no time."""

    def read(arguments: Arguments, names: Sequence[str]) -> Stream | None:
        pixels = arguments.get(argument)
        return None if pixels is None else Stream(pixels.new_zeros(0, 0, len(names), dtype=torch.float32), still=True)

    return read


def mel(argument: str = "input_features", bands: int = 1, mask: str = "") -> Reader:
    """Read log-mel frames.

    Args:
        argument: name of the argument.
        bands: the dimension of the mel bands, 1 in (items, bands, T); that of time is the other one.
        mask: name of the argument that says which frames count, (items, T).
    """

    def read(arguments: Arguments, names: Sequence[str]) -> Stream | None:
        features = arguments.get(argument)
        if features is None:
            return None
        features = features.movedim(bands, -1)
        features = features.reshape(len(features), -1, features.shape[-1])
        return _sound(features, arguments.get(mask), names)

    return read


def waves(stride: int, argument: str = "input_values", mask: str = "attention_mask") -> Reader:
    """Read samples, (items, samples) or (items, 1, samples); a step has ``stride`` of them."""

    def read(arguments: Arguments, names: Sequence[str]) -> Stream | None:
        samples = arguments.get(argument)
        if samples is None:
            return None
        samples = samples.flatten(1).float()
        pieces = nn.functional.pad(samples, (0, -samples.shape[1] % stride)).unflatten(1, (-1, stride))
        power = torch.fft.rfft(pieces * torch.hann_window(stride, periodic=False, device=samples.device)).abs().square()
        features = (nn.functional.adaptive_avg_pool1d(power, min(40, power.shape[2])) + 1e-10).log()
        valid = arguments.get(mask)
        if valid is not None:
            valid = nn.functional.pad(valid, (0, -valid.shape[1] % stride)).unflatten(1, (-1, stride)).bool().any(2)
        return _sound(features, valid, names)

    return read


def _sound(features: torch.Tensor, valid: torch.Tensor | None, names: Sequence[str]) -> Stream:
    if valid is not None:
        valid = None if not torch.compiler.is_compiling() and bool(valid.all()) else valid.bool()
    return Stream(_columns(names, "audio", partial(audio_signals, features, valid)), valid)


def _by_clip(frames: torch.Tensor, counts: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """From frames one after another to padded clips, with what is valid in them; None if all is."""
    if len(set(counts)) == 1:
        return frames.unflatten(0, (len(counts), -1)), None
    clips = nn.utils.rnn.pad_sequence(frames.split(list(counts)), batch_first=True)
    return clips, torch.arange(clips.shape[1], device=clips.device) < torch.tensor(counts, device=clips.device)[:, None]


def _images(ids: torch.Tensor | None, token: int, images: int, argument: str) -> list[int]:
    """How many images each sample has, by its tokens; samples without any are left out."""
    if ids is None:
        raise TimelineError(f"{argument} came without input_ids, so nothing tells which of the {images} are one clip")
    tokens = [count for count in (ids == token).sum(1).tolist() if count]
    each = sum(tokens) // images
    if not each or any(count % each for count in tokens) or sum(tokens) != each * images:
        raise TimelineError(
            f"{sum(tokens)} tokens ({tokens} a sample) stand for {images} images; expected as many for each"
        )
    return [count // each for count in tokens]


# --- Architectures ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """Where time is in one architecture.

    Args:
        media: how to read each stream, by its name: "video", "image" or "audio".
        rules: pairs of a regular expression, which the full name of a Linear has to begin with, and its rule. The
            first one that matches counts.
        towers: modules whose calls are counted.
        entries: modules that may be called without the model around them, as ``generate`` calls encoders.
        methods: names of methods that run parts of the model outside its ``forward``.
    """

    media: Mapping[str, Reader]
    rules: Sequence[tuple[str, Rule]]
    towers: Sequence[str] = ()
    entries: Sequence[str] = ()
    methods: Sequence[str] = ()

    def rule(self, name: str) -> Rule | None:
        """The rule of a Linear, by its full name; None if there is none."""
        return next((rule for pattern, rule in self.rules if re.match(pattern, name)), None)


FAMILIES: dict[str, Callable[..., Family]] = {}


def family(*names: str) -> Callable[[Callable[..., Family]], Callable[..., Family]]:
    """Register what makes the `Family` of a model, under its ``config.model_type``.

    Example:
        >>> @family("my-model")
        ... def my_model(config, clip_frames=None):
        ...     return Family({"video": frames()}, [("encoder", Frames(("video",))), ("", Nothing())])
        >>> FAMILIES.pop("my-model").__name__
        'my_model'

    Args:
        names: values of ``config.model_type``.

    Returns:
        A decorator of a function from the configuration, and ``clip_frames``, to the family.
    """

    def register(make: Callable[..., Family]) -> Callable[..., Family]:
        FAMILIES.update(dict.fromkeys(names, make))
        return make

    return register


# --- On a model ------------------------------------------------------------------------------------------------------


class Timekeeper:
    """Keeps the clock of a model: reads the media of every forward pass before it starts.

    Args:
        model: a model of transformers.
        family: where time is in it.
    """

    def __init__(self, model: nn.Module, family: Family) -> None:
        self.family = family
        self.clip_frames: int | None = None
        self.names: tuple[str, ...] = ()  # signals that are read
        self.clock = Clock({})
        self.groups: dict[Any, list[nn.Module]] = {}  # layers by adapter and rule
        self.adapters: Sequence[str] | None = None  # of each item, where a batch mixes them
        self.record: list[Any] | None = None  # where layers leave what they did, when somebody asks
        self._inside = 0  # forward passes that are under way, the model's or an entry's
        self._around: Clock | None = None  # of the call of `generate` that is under way
        self._encoded: tuple[torch.Tensor, Clock] | None = None  # what an entry gave when it was called alone
        self._blocks = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
        # Families name parts as they are called where a head is on top. Alone, or with another head, a model may have
        # them without the first name.
        below = any(pattern.startswith(r"model\.") for pattern, _ in family.rules)
        self._lacks = "model." if below and not hasattr(model, "model") else ""
        parts = {path: self._part(model, path) for path in (*family.entries, *family.towers)}  # or refuse the model
        self._handles = self._listen(model, self._start, self._stop)
        for path in family.entries:
            self._handles += self._listen(parts[path], self._enter, self._leave)
        for path in family.towers:
            self._handles.append(parts[path].register_forward_pre_hook(partial(self._count, path)))
        if hasattr(model, "generate") and not family.entries:
            model.__dict__["generate"] = _Method(model.generate, self, self.generating)
        for name in family.methods:
            if hasattr(model, name):
                model.__dict__[name] = _Method(getattr(model, name), self, self.outside)

    def _part(self, model: nn.Module, path: str) -> nn.Module:
        try:
            return model.get_submodule(path.removeprefix(self._lacks))
        except AttributeError:
            raise TimelineError(
                f"{type(model).__name__} has no {path}, where models of type {model.config.model_type!r} have their "
                "media; expected the class that such models are trained and published in, such as one for generation."
            ) from None

    def rule(self, name: str) -> Rule | None:
        """The rule of a Linear of the model, by its full name."""
        return self.family.rule(self._lacks + name)

    def _listen(self, module: nn.Module, start: Callable[..., None], stop: Callable[..., None]) -> list[Any]:
        order = list(inspect.signature(module.forward).parameters)
        return [
            module.register_forward_pre_hook(partial(start, order), with_kwargs=True),
            module.register_forward_hook(stop, always_call=True),
        ]

    def remove(self, model: nn.Module) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()
        for name in ("generate", *self.family.methods, "_mmqlora_time"):
            model.__dict__.pop(name, None)
        for block in self._blocks:
            if isinstance(function := block.__dict__.get("_gradient_checkpointing_func"), _Remembering):
                block._gradient_checkpointing_func = function.function

    def own(self, adapter: str, count: int) -> torch.Tensor | None:
        """Which entries of a batch are an adapter's, (entries,) bool; None where they all are.

        Args:
            adapter: its name.
            count: how many are; a multiple where beams repeat each item.
        """
        if self.adapters is None:
            return None
        own = torch.tensor([name == adapter for name in self.adapters])
        return own.repeat_interleave(count // int(own.sum()))

    def want(self, names: Sequence[str]) -> None:
        """Read these signals, too."""
        self.names = tuple(dict.fromkeys((*self.names, *names)))

    @contextmanager
    def at(self, clock: Clock) -> Iterator[None]:
        """Set the clock for a while."""
        before, self.clock = self.clock, clock
        try:
            yield
        finally:
            self.clock = before

    @contextmanager
    def generating(self, arguments: Arguments) -> Iterator[None]:
        """Keep the media for all passes of ``generate``, which runs towers before and outside the model's forward."""
        ids = arguments.get("input_ids", arguments.get("inputs"))
        around = Clock(self._read({**arguments, "input_ids": ids}), ids, len(self.names), generating=True)
        before, self._around = self._around, around
        try:
            with self.at(around):
                yield
        finally:
            self._around = before

    @contextmanager
    def outside(self, arguments: Arguments) -> Iterator[None]:
        """Keep the media for one of the family's methods, whose towers and projections then belong to one pass."""
        clock = Clock(self._read(arguments), width=len(self.names))
        self._inside = 1
        self._remember()
        try:
            with self.at(clock):
                yield
        finally:
            self._inside = 0

    def _read(self, arguments: Arguments) -> dict[str, Stream]:
        with torch.no_grad():
            streams = {name: read(arguments, self.names) for name, read in self.family.media.items()}
        return {name: stream for name, stream in streams.items() if stream is not None}

    def _start(self, order: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: Arguments) -> None:
        self._inside += 1
        arguments = {**dict(zip(order, args, strict=False)), **kwargs}
        around, ids, beams = self._around, arguments.get("input_ids"), 1
        if around is not None and around.streams and ids is not None:
            streams = around.streams
            # Without a prompt `generate` begins one of its own, for each item.
            items, start = next(iter(streams.values())).items, 0
            if around.ids is not None:
                items, start = around.ids.shape
            beams = max(1, len(ids) // max(1, items))
            cached = getattr(arguments.get("past_key_values"), "get_seq_length", int)()
            if cached + ids.shape[1] < start:
                raise TimelineError(
                    f"generate gave the model {ids.shape[1]} tokens of a prompt of {start}; expected all that are not "
                    "cached at once. Leave prefill_chunk_size out."
                )
            # What was said since is words, whatever it is.
            said = cached + torch.arange(ids.shape[1], device=ids.device) >= start
            ids = ids.masked_fill(said, -1)
        else:
            streams = self._read(arguments)
            if not streams and arguments.get("encoder_outputs") is not None:
                streams, beams = self._carried(arguments["encoder_outputs"][0])
        self.clock = Clock(streams, ids, len(self.names), beams)
        if module.training:
            self._remember()

    def _remember(self) -> None:
        for block in self._blocks:
            function = block.__dict__.get("_gradient_checkpointing_func")
            if function is not None and not isinstance(function, _Remembering):
                block._gradient_checkpointing_func = _Remembering(function, self)

    def _stop(self, *_: Any) -> None:
        self._inside = 0
        # No other pass may take this one's time for its own.
        self.clock = self._around or Clock({}, width=len(self.names))

    def _enter(self, order: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: Arguments) -> None:
        if not self._inside:
            arguments = {**dict(zip(order, args, strict=False)), **kwargs}
            self.clock = Clock(self._read(arguments), width=len(self.names))
        self._inside += 1

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._inside = max(0, self._inside - 1)
        if not self._inside:
            first = output if isinstance(output, torch.Tensor) or output is None else output[0]
            self._encoded = (first.detach(), self.clock) if isinstance(first, torch.Tensor) else None
            self.clock = Clock({}, width=len(self.names))

    def _count(self, path: str, *_: Any) -> None:
        self.clock.calls[path] = self.clock.calls.get(path, 0) + 1

    def _carried(self, encoded: torch.Tensor) -> tuple[dict[str, Stream], int]:
        """The streams of an encoder's earlier run, and how often its output was repeated for beams."""
        if self._encoded is not None:
            own, clock = self._encoded
            beams = len(encoded) // max(1, len(own))
            if encoded.shape == (beams * len(own), *own.shape[1:]) and (
                encoded.data_ptr() == own.data_ptr() or torch.equal(encoded[::beams], own)
            ):
                return clock.streams, beams
        raise TimelineError(
            f"encoder_outputs of shape {tuple(encoded.shape)} came without their media, and are not those of the "
            "encoder's last run. Expected the media as well, or the output of the encoder called right before."
        )


class _Method:
    """A method of a model, with the clock set to its media. A class, as a function would not follow a deep copy."""

    def __init__(self, function: Callable[..., Any], keeper: Timekeeper, during: Callable[..., Any]) -> None:
        self.function, self.keeper, self.during = function, keeper, during
        self.__signature__ = inspect.signature(function)
        self.__doc__, self.__name__ = function.__doc__, function.__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.keeper._inside:  # a forward pass, which has read the media
            return self.function(*args, **kwargs)
        bound = self.__signature__.bind_partial(*args, **kwargs).arguments
        extra = bound.pop("kwargs", {}) | bound.pop("generate_kwargs", {})
        with self.during({**bound, **extra}):
            return self.function(*args, **kwargs)


class _Remembering:
    """A checkpointing function whose blocks see, when they run again, the clock that they saw the first time."""

    def __init__(self, function: Callable[..., Any], keeper: Timekeeper) -> None:
        self.function, self.keeper = function, keeper

    def __call__(self, block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        clock = self.keeper.clock.copy()

        def at_that_time(*inputs: Any, **more: Any) -> Any:
            with self.keeper.at(clock):
                return block(*inputs, **more)

        return self.function(at_that_time, *args, **kwargs)


def timekeeper(model: nn.Module, clip_frames: int | None = None) -> Timekeeper:
    """The timekeeper of a model, which gets one if it has none.

    Args:
        model: a model of transformers.
        clip_frames: frames in every clip, for models that take frames without a dimension of their own.

    Raises:
        TimelineError: its architecture is not in `FAMILIES`, or it was told of other clips before.
    """
    keeper = model.__dict__.get("_mmqlora_time")
    if keeper is None:
        config = getattr(model, "config", None)
        make = FAMILIES.get(getattr(config, "model_type", ""))
        if make is None:
            raise TimelineError(
                f"{type(model).__name__} has no known time: nothing is registered for model_type "
                f"{getattr(config, 'model_type', None)!r}. Known are {', '.join(sorted(FAMILIES))}; add another with "
                "mmqlora.timeline.family."
            )
        if clip_frames is not None and "clip_frames" not in inspect.signature(make).parameters:
            raise TimelineError(
                f"clip_frames={clip_frames}, but models of type {config.model_type!r} get clips with a dimension for "
                "frames, or say where one ends; leave it out."
            )
        keeper = model.__dict__["_mmqlora_time"] = Timekeeper(model, make(config, clip_frames=clip_frames))
        keeper.clip_frames = clip_frames
    elif clip_frames not in (None, keeper.clip_frames):
        raise TimelineError(f"clip_frames={clip_frames}, but another adapter of this model has {keeper.clip_frames}")
    return keeper
