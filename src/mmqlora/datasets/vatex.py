"""VATEX: clips of 10 s from YouTube, 10 English captions each."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import MediaError
from .clips import VIDEO, Clip, Clips, Media, find_file, one_of, read_json, read_text

FILES = {
    "train": "vatex_training_v1.0.json",
    "validation": "vatex_validation_v1.0.json",
    "test": "vatex_public_test_english_v1.1.json",
}

SPLITS = {"train": 25991, "validation": 3000, "test": 6000}


class VATEX(Clips):
    """VATEX from its JSON files and whatever clips could still be downloaded.

    Example:
        >>> VATEX("vatex", "validation", ids="vatex/tst_names.txt")  # doctest: +SKIP
        VATEX('validation, 1500 ids', 1402 clips, 14020 texts, 98 missing)
        >>> VATEX("vatex", "train", media="youtube", cut=False)[0].span  # doctest: +SKIP
        (122.0, 132.0)

    ==============  ======  ===================================
    split           clips   named in
    ==============  ======  ===================================
    ``train``       25,991  vatex_training_v1.0.json
    ``validation``  3,000   vatex_validation_v1.0.json
    ``test``        6,000   vatex_public_test_english_v1.1.json
    ==============  ======  ===================================

    Retrieval is by custom 25,991 / 1,500 / 1,500: halves of ``validation``, drawn once at random by Chen et al. (2020)
    and published as lists with their code (cshizhe/hgr_v2t). Give the list of a half as `ids`: another half is
    another test.

    Args:
        folder: where the JSON files lie, here or in folders below.
        split: one of the table.
        media: where the videos lie; the default is `folder`.
        ids: ids to keep, or a text file with one on each line; None keeps all.
        cut: whether a file holds the clip alone and is named by the clip's id, such as
            ``Ptf_2VRj-V0_000122_000132.mp4``; False where it is the whole video, ``Ptf_2VRj-V0.mp4``, of which the span
            is read.
        transform: applied to a clip when it is read.

    Raises:
        MediaError: no such split, annotations that are absent or malformed, ids that are not in the split, or no video
            at all.

    Source: Wang et al., VATEX: A Large-Scale, High-Quality Multilingual Dataset for Video-and-Language Research, 2019;
    Chen et al., Fine-grained Video-Text Retrieval with Hierarchical Graph Reasoning, 2020.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        split: str,
        media: str | os.PathLike[str] | None = None,
        ids: Sequence[str] | str | os.PathLike[str] | None = None,
        cut: bool = True,
        transform: Callable[[Clip], Any] | None = None,
    ) -> None:
        published = one_of(split, SPLITS)
        files = Media(media or folder, VIDEO)
        path = find_file(folder, FILES[split])
        data = read_json(path)
        clips = []
        for number, row in enumerate(data if isinstance(data, list) else [data]):
            try:
                id, texts = row["videoID"], tuple(row["enCap"])
                found = re.fullmatch(r"(.{11})_(\d{6})_(\d{6})", id)
                if not cut and not found:
                    raise TypeError(f"videoID {id!r} names no span")
                if not all(isinstance(text, str) for text in texts) or isinstance(row["enCap"], str):
                    raise TypeError(f"enCap is {row['enCap']!r}")
            except (KeyError, TypeError) as error:
                raise MediaError(
                    f'{path}, entry {number}: {error!r}; expected {{"videoID": "Ptf_2VRj-V0_000122_000132", '
                    f'"enCap": [texts], ...}}, not {str(row)[:80]}.'
                ) from None
            if cut:
                clips.append(Clip(id, files.find(id), texts))
            else:
                source, start, stop = found.groups()
                clips.append(Clip(id, files.find(source), texts, (float(start), float(stop))))
        if ids is not None:
            clips = _keep(clips, ids, path)
            split, published = f"{split}, {len(clips)} ids", None
        protocol = "every English caption is a query; from video to text the best rank of a video's captions counts"
        super().__init__(clips, split, protocol, published, transform)


def _keep(clips: list[Clip], ids: Sequence[str] | str | os.PathLike[str], path: Path) -> list[Clip]:
    """The clips with these ids, in the order of the ids."""
    if isinstance(ids, (str, os.PathLike)):
        ids = read_text(Path(ids)).split()
    by_id = {clip.id: clip for clip in clips}
    unknown = [id for id in ids if id not in by_id]
    twice = [id for id, count in Counter(ids).items() if count > 1]
    if unknown or twice or not len(ids):
        raise MediaError(
            f"{len(unknown)} of {len(ids)} ids are not in {path}, such as {unknown[:3]}; {len(twice)} occur more than "
            f"once, such as {twice[:3]}. Expected ids such as {clips[0].id if clips else None}, each once."
        )
    return [by_id[id] for id in ids]
