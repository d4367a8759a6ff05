"""AudioCaps: sounds of 10 s from YouTube with captions."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from ..errors import MediaError
from .clips import AUDIO, Clip, Clips, Media, find_file, one_of, read_table

SECONDS = 10  # that a clip lasts

# Clips. Papers count captions, five a clip in val and test. How many clips v2's train has is published nowhere.
SPLITS = {"v1 train": 49838, "v1 val": 495, "v1 test": 975, "v2 train": None, "v2 val": 495, "v2 test": 975}


class AudioCaps(Clips):
    """AudioCaps from its CSV files and whatever sounds could still be downloaded.

    Example:
        >>> AudioCaps("audiocaps/dataset", "test", media="audiocaps/audio")  # doctest: +SKIP
        AudioCaps('v1 test', 957 clips, 4785 texts, 18 missing; published: 975)

    =========  =======================  =======================  ==============================
    split      v1, folder ``dataset``   v2, ``dataset2.0``       captions a clip
    =========  =======================  =======================  ==============================
    ``train``  49,838 captions          91,256 captions          1
    ``val``    2,475, of 495 clips      2,475, of 495 clips      5: rows of one clip are joined
    ``test``   4,875, of 975 clips      4,875, of 975 clips      5
    =========  =======================  =======================  ==============================

    Both versions name their files alike, so say which yours is. ``train_v2.csv`` of aac-datasets is a mended v1 of
    49,810 captions.

    Args:
        folder: where ``train.csv``, ``val.csv`` and ``test.csv`` lie, here or in folders below.
        split: ``train``, ``val`` or ``test``.
        version: ``v1`` or ``v2``.
        media: where the sounds lie; the default is `folder`. Files are found by the names that downloaders give:
            youtube id and start, ``vfY_TJq7n_U_130.wav``; youtube id, with or without a ``Y`` before it; or
            audiocap id, ``97151.wav``.
        cut: whether files hold the 10 s alone; False where they are the sound of whole videos, named by youtube id, of
            which the span is read.
        transform: applied to a clip when it is read.

    Raises:
        MediaError: no such split, a CSV file that is absent or malformed, or no sound at all.

    Source: Kim et al., AudioCaps: Generating Captions for Audios in The Wild, 2019; cdjkim/audiocaps.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        split: str,
        version: str = "v1",
        media: str | os.PathLike[str] | None = None,
        cut: bool = True,
        transform: Callable[[Clip], Any] | None = None,
    ) -> None:
        published = one_of(f"{version} {split}", SPLITS)
        files = Media(media or folder, AUDIO)
        path = find_file(folder, f"{split}.csv")
        rows: dict[tuple[str, str], list[dict[str, str]]] = {}
        seen: set[str] = set()
        for row in read_table(path, ("audiocap_id", "youtube_id", "start_time", "caption")):
            if row["audiocap_id"] in seen:
                raise MediaError(
                    f"{path}: audiocap_id {row['audiocap_id']} occurs more than once; each names a caption."
                )
            if not row["start_time"].isdecimal():
                raise MediaError(
                    f"{path}: audiocap_id {row['audiocap_id']} starts at {row['start_time']!r}; expected whole seconds."
                )
            seen.add(row["audiocap_id"])
            rows.setdefault((row["youtube_id"], row["start_time"]), []).append(row)
        clips = []
        for (source, start), group in rows.items():
            numbers = [row["audiocap_id"] for row in group]
            names = [f"{source}_{start}", f"Y{source}", source, *numbers] if cut else [source, f"Y{source}"]
            span = None if cut else (float(start), float(start) + SECONDS)
            texts = tuple(row["caption"] for row in group)
            clips.append(Clip(f"{source}_{start}", files.find(*names), texts, span, {"audiocap_ids": numbers}))
        protocol = "every caption is a query; from sound to text the best rank of a sound's captions counts"
        super().__init__(clips, f"{version} {split}", protocol, published, transform)
