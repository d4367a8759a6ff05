"""What data sets of clips share: the item, finding its media, naming what is missing, and what retrieval is asked.

The readers beside this file take a data set as it lies on a disk, and give `Clips`::

    MSRVTT  VATEX  MSVD             videos with captions
    AudioCaps  Clotho               sounds with captions
    LibriSpeech                     speech with transcripts

Example:
    >>> from mmqlora.datasets.msrvtt import MSRVTT
    >>> test = MSRVTT("msrvtt", "1k-A")  # doctest: +SKIP
    >>> test  # doctest: +SKIP
    MSRVTT('1k-A', 998 clips, 998 texts, 2 missing; published: 1000)
    >>> clip = test[0]  # doctest: +SKIP
    >>> clip.id, clip.texts, clip.video(frames=8).frames.shape  # doctest: +SKIP
    ('video9770', ('a person is connecting something to system',), (8, 240, 320, 3))
"""

from __future__ import annotations

import csv
import io
import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ..errors import MediaError
from ..media import Audio, Video, _few, _regular_file, read_audio, read_video
from ..records import fingerprint

VIDEO = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".flv")
# soundfile can't open .m4a; its error says what it can open, which helps more than "no such file".
AUDIO = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a")


@dataclass(frozen=True)
class Clip:
    """One item of a data set: where its media lies and what was said of it. Nothing is decoded before it is asked for.

    Example:
        >>> clip = Clip("Ptf_2VRj-V0_000122_000132", Path("Ptf_2VRj-V0.mp4"), ("A man climbs.",), span=(122, 132))
        >>> clip.video(frames=8)  # doctest: +SKIP

    Attributes:
        id: what the data set calls it.
        path: the media file.
        texts: its captions, or its one transcript.
        span: seconds of the file from which and up to which the clip goes; None, the whole file is the clip.
        known: what else the data set says of it, by the names that it uses.
    """

    id: str
    path: Path
    texts: tuple[str, ...]
    span: tuple[float, float] | None = None
    known: Mapping[str, Any] = field(default_factory=dict)

    def video(self, frames: int | None = None, size: tuple[int, int] | None = None) -> Video:
        """Decode all frames, uint8 (F, H, W, 3), or a number of them; see `mmqlora.media.read_video`."""
        start, stop = self.span or (0.0, None)
        return read_video(self.path, frames, size, start=start, stop=stop)

    def audio(self, rate: int | None = 16000) -> Audio:
        """Read the samples, float32 (S,); see `mmqlora.media.read_audio`."""
        start, stop = self.span or (0.0, None)
        return read_audio(self.path, rate, start, stop)


class Clips(Dataset):
    """A split of a data set: its clips, those that are missing, and the retrieval protocol.

    Example:
        >>> clips = Clips([Clip("a", Path(__file__), ("one", "two"))], split="test", protocol="every caption")
        >>> clips, clips.queries, clips.answers.tolist()
        (Clips('test', 1 clip, 2 texts), ['one', 'two'], [0, 0])

    Items hold no media. For training, `transform` loads what is needed, and `mmqlora.SkipBroken` around the data set
    skips and names the items whose media is broken::

        MSRVTT(folder, "train-9k", transform=lambda clip: (clip.video(frames=8, size=(224, 224)).frames, clip.texts))

    Retrieval from text to clip asks each of `queries` for the clip `answers` names. From clip to text, the best rank of
    the clip's own texts counts. Fewer clips make retrieval easier: say how many there were.

    Args:
        clips: all clips of the split. Those whose file is absent or empty, or that have no text, go to `missing`.
        split: its name.
        protocol: which captions count, in words.
        published: clips that the split was published with; a warning says when `clips` are more or fewer. None where
            nothing says.
        transform: applied to a clip when it is read.

    Attributes:
        clips: the clips that are there.
        missing: those that are not, id to reason. A warning counts them and names a few.
        blank: texts of `clips` that were left out, as there was no word in them. A warning counts them.

    Raises:
        MediaError: an id occurs twice, or no clip is there. What `transform` decodes can raise it as well.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        split: str,
        protocol: str,
        published: int | None = None,
        transform: Callable[[Clip], Any] | None = None,
    ) -> None:
        self.split, self.protocol, self.published, self.transform = split, protocol, published, transform
        self.clips: list[Clip] = []
        self.missing: dict[str, str] = {}
        self.blank = 0
        name = f"{type(self).__name__}({split!r})"
        twice = [id for id, count in Counter(clip.id for clip in clips).items() if count > 1]
        if twice:
            raise MediaError(
                f"{name}: {len(twice)} ids occur more than once, such as {twice[:3]}; each names one clip."
            )
        for clip in clips:
            texts = tuple(text.strip() for text in clip.texts if text.strip())
            blank, clip = len(clip.texts) - len(texts), replace(clip, texts=texts)
            try:
                _regular_file(clip.path)  # absent or empty, as failed downloads are
                if not clip.texts:
                    raise MediaError(f"{clip.id}: has no text")
            except MediaError as error:
                self.missing[clip.id] = str(error)
            else:
                self.clips.append(clip)
                self.blank += blank
        few = _few(dict(enumerate(self.missing.values())))
        if not self.clips:
            raise MediaError(f"{name}: none of {len(clips)} clips is there: {few or 'the list is empty'}.")
        if self.missing:
            warnings.warn(f"{name}: {len(self.missing)} of {len(clips)} clips are missing: {few}", stacklevel=3)
        if published not in (None, len(clips)):
            listed = f"{_count(len(clips), 'clip')} listed, published with {published}"
            warnings.warn(f"{name}: {listed}; is the list whole? Published results are for all of them.", stacklevel=3)
        if self.blank:
            warnings.warn(f"{name}: {_count(self.blank, 'text')} without a word left out", stacklevel=3)

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> Any:
        """One `Clip`, or what `transform` makes of it."""
        clip = self.clips[index]
        return clip if self.transform is None else self.transform(clip)

    @property
    def queries(self) -> list[str]:
        """The texts of all clips, Q of them, in order."""
        return [text for clip in self.clips for text in clip.texts]

    @property
    def answers(self) -> np.ndarray:
        """(Q,) int64, the index of the clip that each of `queries` tells of."""
        return np.repeat(np.arange(len(self.clips)), [len(clip.texts) for clip in self.clips])

    def fingerprint(self) -> str:
        """A hash of ids, texts, spans, and the size of every file in bytes: to read them all can take hours."""
        lines = ([clip.id, clip.path.stat().st_size, clip.span, clip.texts] for clip in self.clips)
        return fingerprint(self.split, *map(json.dumps, lines))

    def __repr__(self) -> str:
        parts = [repr(self.split), _count(len(self), "clip"), _count(len(self.queries), "text")]
        parts += [f"{len(self.missing)} missing"] * bool(self.missing)
        published = f"; published: {self.published}" if self.published else ""
        return f"{type(self).__name__}({', '.join(parts)}{published})"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"


class Media:
    """The media files anywhere below a folder, by their names without ending.

    Example:
        >>> media = Media("msrvtt", VIDEO)  # doctest: +SKIP
        >>> media.find("video9770")  # doctest: +SKIP
        PosixPath('msrvtt/videos/all/video9770.mp4')

    Args:
        folder: where to look.
        endings: which files to look for, such as `VIDEO`.

    Raises:
        MediaError: there is no such folder.
    """

    def __init__(self, folder: str | os.PathLike[str], endings: Sequence[str]) -> None:
        self.folder, self.endings = Path(folder), endings
        self.paths: dict[str, list[Path]] = {}
        for path in _walk(self.folder):
            if path.suffix.lower() in endings:
                self.paths.setdefault(path.stem, []).append(path)

    def find(self, *names: str) -> Path:
        """The file of the first of these names that there is, or where a file of the first one was expected.

        Raises:
            MediaError: two files have the name.
        """
        for name in names:
            if name in self.paths:
                return _only(self.paths[name], "media")
        return self.folder / f"{names[0]}{self.endings[0]}"


def find_file(folder: str | os.PathLike[str], *names: str) -> Path:
    """The one file below a folder that has the first of these names that any file has.

    Example:
        >>> find_file("msrvtt", "MSRVTT_data.json")  # doctest: +SKIP
        PosixPath('msrvtt/annotation/MSRVTT_data.json')

    Raises:
        MediaError: there is none, or more than one.
    """
    found: dict[str, list[Path]] = {name: [] for name in names}
    for path in _walk(Path(folder)):
        if path.name in found:
            found[path.name].append(path)
    for paths in found.values():
        if paths:
            return _only(paths, "folder")
    raise MediaError(f"{folder}: no {' or '.join(names)} here or in a folder below; it comes with the data set.")


def _walk(folder: Path) -> Iterator[Path]:
    if not folder.is_dir():
        raise MediaError(f"{folder}: no such folder.")
    seen: set[str] = set()
    for parent, folders, files in os.walk(folder, followlinks=True):  # media often lie elsewhere, behind a link
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        real = os.path.realpath(parent)
        if real in seen:  # a link in a circle, or a second way to the same files
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(parent, name) for name in sorted(files))


def _only(paths: list[Path], argument: str) -> Path:
    if len(paths) > 1:
        both = " and ".join(str(path) for path in paths[:2])
        raise MediaError(f"{len(paths)} files are named alike: {both}; give the folder of one of them as {argument}.")
    return paths[0]


def read_text(path: Path, encoding: str = "utf-8-sig") -> str:
    """The text of a file, or an error that says that it is empty, or which line is not in its encoding."""
    _regular_file(path)
    data = path.read_bytes()
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise MediaError(
            f"{path}, line {line}: not UTF-8 ({data[error.start : error.start + 1]!r}); the published file is. "
            "Take that one, or save yours as UTF-8."
        ) from None


def read_json(path: Path) -> Any:
    """The content of a JSON file, or an error that says where it is none."""
    try:
        return json.loads(read_text(path))
    except ValueError as error:
        raise MediaError(f"{path}: no JSON ({error}); was the download cut short?") from None


def read_table(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a CSV file as dictionaries, or an error that names the line that is not as its header says.

    Args:
        path: the file.
        columns: columns that it must have; others are kept as well.
    """
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    rows = []
    try:
        header = reader.fieldnames or []
        if not set(columns) <= set(header):
            raise MediaError(f"{path}: has the columns {list(header)}; expected {list(columns)}, set apart by commas.")
        for row in reader:
            if None in row or None in row.values():
                fields = sum(value is not None for key, value in row.items() if key is not None)
                fields += len(row.get(None) or ())
                raise MediaError(
                    f"{path}, line {reader.line_num}: {fields} fields; expected {len(header)}, as in the header. "
                    "A comma in a text needs quotes around the text."
                )
            rows.append(row)
    except csv.Error as error:
        raise MediaError(f"{path}, from line {reader.line_num + 1} on: no CSV ({error}).") from None
    return rows


def one_of(split: str, splits: Mapping[str, int | None]) -> int | None:
    """The published size of a split, or an error that says which splits there are."""
    if split not in splits:
        raise MediaError(f"there is no split {split!r}; there are {', '.join(splits)}.")
    return splits[split]
