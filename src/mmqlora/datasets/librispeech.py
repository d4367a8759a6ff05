"""LibriSpeech: read English, with transcripts in capitals."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import MediaError
from .clips import Clip, Clips, one_of, read_text

SPLITS = {
    "dev-clean": 2703,
    "dev-other": 2864,
    "test-clean": 2620,
    "test-other": 2939,
    "train-clean-100": 28539,
    "train-clean-360": 104014,
    "train-other-500": 148688,
}


class LibriSpeech(Clips):
    """A subset of LibriSpeech from the folder that its archive unpacks to.

    Example:
        >>> speech = LibriSpeech("LibriSpeech", "test-clean")  # doctest: +SKIP
        >>> speech  # doctest: +SKIP
        LibriSpeech('test-clean', 2620 clips, 2620 texts; published: 2620)
        >>> speech[0].id, speech[0].texts, speech[0].known  # doctest: +SKIP
        ('1089-134686-0000', ('HE HOPED THERE WOULD BE STEW FOR DINNER ...',), {'speaker': '1089', 'chapter': '134686'})

    Transcripts are given as published: in capitals, without punctuation, numbers as words. Apply
    `mmqlora.english_normalizer` to transcript and output before counting errors.

    Args:
        folder: where the subset's folder lies, or the folder ``LibriSpeech`` that holds it.
        subset: ``dev-clean``, ``dev-other``, ``test-clean``, ``test-other``, ``train-clean-100``, ``train-clean-360``
            or ``train-other-500``.
        transform: applied to a clip when it is read.

    Raises:
        MediaError: no such subset, a chapter without transcripts, a malformed line, or no audio at all.

    Source: Panayotov et al., LibriSpeech: an ASR corpus based on public domain audio books, 2015.
    """

    def __init__(
        self, folder: str | os.PathLike[str], subset: str, transform: Callable[[Clip], Any] | None = None
    ) -> None:
        published = one_of(subset, SPLITS)
        places = [Path(folder, subset), Path(folder, "LibriSpeech", subset)]
        root = next((place for place in places if place.is_dir()), None)
        if root is None:
            raise MediaError(f"no folder {places[0]} or {places[1]}; unpack {subset}.tar.gz there.")
        clips = [clip for chapter in sorted(root.glob("*/*/")) if chapter.is_dir() for clip in _chapter(chapter)]
        protocol = "recognition: one transcript a clip, in capitals and without punctuation"
        super().__init__(clips, subset, protocol, published, transform)


def _chapter(folder: Path) -> list[Clip]:
    """The utterances of a chapter's transcripts, and those that only a file tells of."""
    known = {"speaker": folder.parent.name, "chapter": folder.name}
    prefix = f"{known['speaker']}-{known['chapter']}"
    path = folder / f"{prefix}.trans.txt"
    texts = {file.stem: "" for file in sorted(folder.glob("*.flac"))}
    listed: set[str] = set()
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        id, _, text = line.strip().partition(" ")
        if not id.startswith(f"{prefix}-") or id in listed:
            raise MediaError(
                f"{path}, line {number}: {line[:60]!r}; expected an id such as {prefix}-0000, each once, and its words."
            )
        listed.add(id)
        texts[id] = text
    return [Clip(id, folder / f"{id}.flac", (text,), known=known) for id, text in sorted(texts.items())]
