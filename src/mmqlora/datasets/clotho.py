"""Clotho: sounds of 15-30 s from Freesound, 5 captions each."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import MediaError
from .clips import Clip, Clips, find_file, one_of, read_table, read_text

CAPTIONS = ("caption_1", "caption_2", "caption_3", "caption_4", "caption_5")

SPLITS = {"development": 3839, "validation": 1045, "evaluation": 1045}


class Clotho(Clips):
    """Clotho v2.1 from its CSV files and the folders that its archives unpack to.

    Example:
        >>> sounds = Clotho("clotho", "evaluation")  # doctest: +SKIP
        >>> sounds  # doctest: +SKIP
        Clotho('evaluation', 1045 clips, 5225 texts; published: 1045)
        >>> sounds[0].known["license"]  # doctest: +SKIP
        'http://creativecommons.org/licenses/by/3.0/'

    ===============  =====  ===============================
    split            clips  named in
    ===============  =====  ===============================
    ``development``  3,839  clotho_captions_development.csv
    ``validation``   1,045  clotho_captions_validation.csv
    ``evaluation``   1,045  clotho_captions_evaluation.csv
    ===============  =====  ===============================

    Files are at 44.1 kHz. What ``clotho_metadata_*.csv`` says of a sound, such as its keywords and license, is in
    `Clip.known`, where that file lies beside the captions. Captions are in UTF-8, metadata in ISO-8859-1.

    Args:
        folder: where the CSV files lie, here or in folders below.
        split: one of the table.
        media: the folder of the split's sounds; the default is the one folder below `folder` named as the split.
        transform: applied to a clip when it is read.

    Raises:
        MediaError: no such split, captions or sounds that are absent, or a malformed line.

    Source: Drossos et al., Clotho: an Audio Captioning Dataset, 2020; version 2.1 is Zenodo's record 4783391.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        split: str,
        media: str | os.PathLike[str] | None = None,
        transform: Callable[[Clip], Any] | None = None,
    ) -> None:
        published = one_of(split, SPLITS)
        path = find_file(folder, f"clotho_captions_{split}.csv")
        sounds = _folder(Path(folder), split) if media is None else Path(media)
        known = _metadata(path.with_name(f"clotho_metadata_{split}.csv"))
        clips = []
        for row in read_table(path, ("file_name", *CAPTIONS)):
            name, texts = row["file_name"], tuple(row[column] for column in CAPTIONS)
            clips.append(Clip(name, sounds / name, texts, known=known.get(name, {})))
        protocol = "every caption is a query; from sound to text the best rank of a sound's captions counts"
        super().__init__(clips, split, protocol, published, transform)


def _metadata(path: Path) -> dict[str, dict[str, Any]]:
    """What is known of each sound. It is nice to have, so a line that is not as it should be stops nobody."""
    if not path.is_file():
        return {}
    rows = csv.DictReader(io.StringIO(read_text(path, "iso-8859-1"), newline=""))
    return {row["file_name"]: row for row in rows if row.get("file_name")}


def _folder(folder: Path, split: str) -> Path:
    found = sorted(path for path in folder.rglob(split) if path.is_dir())
    if len(found) != 1:
        raise MediaError(f"{folder}: {len(found)} folders named {split!r} below it, expected one; give it as media.")
    return found[0]
