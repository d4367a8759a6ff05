"""Pictures and sounds of `worlds`: from what happens to pixels and samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

RATE = 16000  # samples a second
RADIUS = 0.17  # of a shape, as a share of the picture's side

_PALETTE = np.array([(220, 40, 40), (40, 180, 60), (60, 90, 240), (240, 220, 50), (240, 110, 200), (245, 245, 245)])
# Each color close to another one's: no name keeps its meaning, and no two look alike.
_SHIFTED = np.array([(240, 170, 60), (40, 110, 220), (190, 70, 220), (90, 200, 80), (230, 60, 60), (120, 120, 130)])
_TONES = {"low": 220.0, "middle": 600.0, "high": 1500.0}
_LONGEST = {"tone": 0.25, "chirp": 0.3, "click": 0.06, "noise": 0.25}


def paint(
    tracks: Sequence[Any],
    count: int,
    size: int,
    shifts: Mapping[str, float],
    look: np.random.Generator,
    foreign: np.random.Generator,
    flashes: Sequence[int],
) -> np.ndarray:
    """Draw all frames at once: (F, H, W, 3) uint8."""
    texture, grain, blur = (shifts.get(name, 0.0) for name in ("texture", "grain", "blur"))
    palette = _PALETTE + shifts.get("palette", 0.0) * (_SHIFTED - _PALETTE)
    gray, phase, slant = float(look.integers(30, 71)), int(look.integers(6)), int(look.integers(1, 3))
    axis = np.arange(size, dtype=float)
    stripes = (((axis[:, None] + slant * axis[None, :] + phase) // 3) % 2)[..., None]  # (H, W, 1)
    frames = np.broadcast_to(gray + 70 * texture * stripes, (count, size, size, 3)).copy()
    for track in tracks:
        seen = np.flatnonzero(track.visible)
        if not len(seen):
            continue
        cover = _cover(track.shape, track.x[seen], track.y[seen], track.angle[seen], size)[..., None]
        color = palette[track.color[seen]][:, None, None, :] * (1 - 0.6 * texture * (1 - stripes))
        frames[seen] += cover * (color - frames[seen])
    for frame in flashes:
        frames[frame] = 200.0
        for _ in range(int(foreign.integers(1, 3))):
            place = foreign.uniform(0.2 * size, 0.8 * size, size=(2, 1))
            cover = _cover(int(foreign.integers(4)), place[0], place[1], foreign.integers(0, 3, size=1) * 1.0, size)
            frames[frame] += cover[0, ..., None] * (palette[foreign.integers(len(palette))] - frames[frame])
    for _ in range(round(6 * blur)):
        for side in (1, 2):
            frames = 0.5 * frames + 0.25 * (_slide(frames, side, 1) + _slide(frames, side, -1))
    if grain:
        frames += look.normal(0, 60 * grain, size=frames.shape)
    return np.rint(frames).clip(0, 255).astype(np.uint8)


def _slide(frames: np.ndarray, axis: int, step: int) -> np.ndarray:
    """Frames moved by a pixel, the edge repeated."""
    moved = np.roll(frames, step, axis)
    edge = 0 if step > 0 else -1
    index = [slice(None)] * frames.ndim
    index[axis] = edge
    moved[tuple(index)] = frames[tuple(index)]
    return moved


def _cover(shape: int, x: np.ndarray, y: np.ndarray, angle: np.ndarray, size: int) -> np.ndarray:
    """Share of every pixel that a shape covers, from its distance to the edge: (F, H, W)."""
    radius = RADIUS * size
    axis = np.arange(size, dtype=float)
    dx = axis[None, None, :] - x[:, None, None]
    dy = axis[None, :, None] - y[:, None, None]
    turn = angle[:, None, None] * np.pi / 4
    cos, sin = np.cos(turn), np.sin(turn)
    u, v = cos * dx + sin * dy, cos * dy - sin * dx
    if shape == 0:
        distance = np.sqrt(u * u + v * v) - radius
    elif shape == 1:
        distance = np.maximum(np.abs(u), np.abs(v)) - 0.85 * radius
    elif shape == 2:
        distance = np.maximum(v - 0.75 * radius, 0.87 * np.abs(u) - 0.5 * v - 0.55 * radius)
    else:
        wide, thick = 1.05 * radius, 0.36 * radius
        bars = (np.maximum(np.abs(a) - wide, np.abs(b) - thick) for a, b in ((u, v), (v, u)))
        distance = np.minimum(*bars)
    return (0.5 - distance).clip(0, 1)


def play(
    events: Sequence[Any],
    seconds: float,
    shifts: Mapping[str, float],
    sound: np.random.Generator,
    foreign: np.random.Generator,
    blips: Sequence[float],
) -> np.ndarray:
    """Sum all sounds: (S,) float32, on the grid of 16 bits, so that every machine rounds alike."""
    timbre, hiss, reverb = (shifts.get(name, 0.0) for name in ("timbre", "hiss", "reverb"))
    samples = np.zeros(round(seconds * RATE))
    for event in events:
        kind = event.subject.split()[1]
        twice = event.predicate == "twice"
        total = event.stop - event.start
        # "twice" is sound, pause, sound; how long each lasts follows from the event, which "faster" halves.
        scale = total / (2 * _LONGEST[kind] + 0.08) if twice else total / _LONGEST[kind]
        once = min(1.0, scale) * _LONGEST[kind]
        starts = [event.start, event.stop - once] if twice else [event.start]
        loud, pitch = 0.3 * (1 + 0.1 * sound.uniform(-1, 1)), 1 + 0.03 * sound.uniform(-1, 1)
        wave = loud * _wave(event.subject, round(once * RATE), pitch, timbre, sound)
        for start in starts:
            at = round(start * RATE)
            part = wave[: len(samples) - at]
            samples[at : at + len(part)] += part
    for second in blips:
        time = np.arange(round(0.05 * RATE)) / RATE
        at = round(second * RATE)
        samples[at : at + len(time)] += 0.3 * np.sign(np.sin(2 * np.pi * foreign.uniform(250, 1800) * time))
    if reverb:
        length = round(0.5 * RATE)
        tail = sound.normal(size=length) * np.exp(-np.arange(length) / (0.12 * RATE))
        tail *= 1.2 * reverb / np.sqrt((tail * tail).sum())
        width = len(samples) + length
        echo = np.fft.irfft(np.fft.rfft(samples, width) * np.fft.rfft(tail, width), width)[: len(samples)]
        samples += echo
        # Silence: what the transform leaves there has the sign that a processor gives it, and -0.0 is other bytes.
        samples[np.abs(samples) < 1e-9] = 0.0
    if hiss:
        samples += sound.normal(0, 0.02 * hiss, size=len(samples))
    return (np.rint(samples.clip(-0.999, 0.999) * 32767) / 32768).astype(np.float32)


def _wave(subject: str, length: int, pitch: float, timbre: float, rng: np.random.Generator) -> np.ndarray:
    """One sound at full scale, with soft edges of 5 ms."""
    adjective, kind = subject.split()
    time = np.arange(length) / RATE
    register = pitch * (1 + 0.45 * timbre)
    if kind == "noise":
        white = rng.normal(size=length + 8)
        # A sum of neighbors is dark, a difference bright; the shift moves both toward the middle.
        total = np.convolve(white, np.ones(8) / 2.8, "same")[4:-4]
        difference = np.diff(white)[3:-4] / 1.4
        low, high = (total, difference) if adjective == "low" else (difference, total)
        wave = 0.5 * (np.sqrt(1 - 0.5 * timbre) * low + np.sqrt(0.5 * timbre) * high)
    elif kind == "click":
        frequency = (400.0 if adjective == "low" else 2200.0) * register
        wave = np.sin(2 * np.pi * frequency * time) * np.exp(-time / (0.015 if adjective == "low" else 0.006)) * 1.5
    else:
        if kind == "tone":
            phase = 2 * np.pi * _TONES[adjective] * register * time
        else:
            low, high = (400.0 * register, 1600.0 * register)
            low, high = (low, high) if adjective == "rising" else (high, low)
            phase = 2 * np.pi * (low * time + (high - low) * time * time / (2 * time[-1]))
        wave = (1 - timbre) * np.sin(phase) + timbre * 0.7 * np.sign(np.sin(phase))
    edge = min(80, length // 2)
    ramp = np.minimum(1, np.arange(1, length + 1) / edge)
    return wave * ramp * ramp[::-1]
