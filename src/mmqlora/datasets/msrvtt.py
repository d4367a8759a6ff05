"""MSR-VTT: 10,000 web videos of 10-30 s, 20 captions each."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import MediaError
from .clips import VIDEO, Clip, Clips, Media, find_file, one_of, read_json, read_table

DATA = "MSRVTT_data.json"
PARTS = ("train_val_videodatainfo.json", "test_videodatainfo.json")  # as Microsoft published them; DATA is both in one

SPLITS = {"1k-A": 1000, "train-9k": 9000, "train-7k": 7010, "train": 6513, "validate": 497, "test": 2990}


class MSRVTT(Clips):
    """MSR-VTT from ``video*.mp4`` and the annotations of CLIP4Clip's ``msrvtt_data.zip`` or of Microsoft.

    Example:
        >>> MSRVTT("msrvtt", "train-9k")  # doctest: +SKIP
        MSRVTT('train-9k', 9000 clips, 180000 texts; published: 9000)

    ============  ======  ==========================================================================
    split         clips   named in
    ============  ======  ==========================================================================
    ``1k-A``      1,000   MSRVTT_JSFUSION_test.csv: the retrieval test, **one** caption a video
    ``train-9k``  9,000   MSRVTT_train.9k.csv: all that 1k-A leaves
    ``train-7k``  7,010   MSRVTT_train.7k.csv: the official train and validate
    ``train``     6,513   MSRVTT_data.json, or train_val_videodatainfo.json: the full split
    ``validate``  497     the same
    ``test``      2,990   MSRVTT_data.json, or test_videodatainfo.json; 1,990 of them are in train-9k
    ============  ======  ==========================================================================

    The files are cut already: ``start time`` and ``end time`` in `Clip.known` are seconds of the video on YouTube.

    Args:
        folder: where the annotations lie, here or in folders below.
        split: one of the table.
        media: where the videos lie; the default is `folder`.
        transform: applied to a clip when it is read.

    Raises:
        MediaError: no such split, annotations that are absent or malformed, or no video at all.

    Source: Xu et al., MSR-VTT: A Large Video Description Dataset for Bridging Video and Language, 2016; 1k-A is from
    Yu et al., A Joint Sequence Fusion Model for Video Question Answering and Retrieval, 2018.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        split: str,
        media: str | os.PathLike[str] | None = None,
        transform: Callable[[Clip], Any] | None = None,
    ) -> None:
        published = one_of(split, SPLITS)
        files = Media(media or folder, VIDEO)
        protocol = "every caption of a video is a query; from video to text the best rank of its captions counts"
        if split == "1k-A":
            table = read_table(
                find_file(folder, "MSRVTT_JSFUSION_test.csv"), ("key", "vid_key", "video_id", "sentence")
            )
            protocol = "1k-A: one caption a video, the one in MSRVTT_JSFUSION_test.csv"
            clips = [Clip(row["video_id"], files.find(row["video_id"]), (row["sentence"],), known=row) for row in table]
        else:
            videos, captions = _annotations(folder)
            if split.startswith("train-"):
                path = find_file(folder, f"MSRVTT_train.{split[-2:]}.csv")
                ids = [row["video_id"] for row in read_table(path, ("video_id",))]
                unknown = [id for id in ids if id not in videos]
                if unknown:
                    raise MediaError(f"{path}: {len(unknown)} videos are in no annotation, such as {unknown[:3]}.")
            else:
                ids = [id for id, video in videos.items() if video["split"] == split]
            clips = [Clip(id, files.find(id), tuple(captions.get(id, ())), known=videos[id]) for id in ids]
        super().__init__(clips, split, protocol, published, transform)


def _annotations(folder: str | os.PathLike[str]) -> tuple[dict[str, dict[str, Any]], dict[str, list[str]]]:
    """What is known of each video, and its captions."""
    first = find_file(folder, DATA, *PARTS)
    paths: list[Path] = [first] if first.name == DATA else [find_file(folder, part) for part in PARTS]
    videos: dict[str, dict[str, Any]] = {}
    captions: dict[str, list[str]] = {}
    for path in paths:
        data = read_json(path)
        try:
            for video in data["videos"]:
                if videos.setdefault(video["video_id"], video) is not video:
                    raise MediaError(f"{path}: {video['video_id']} is there more than once.")
                video["split"]  # so that a video without one is named here
            for number, sentence in enumerate(data["sentences"]):
                captions.setdefault(sentence["video_id"], []).append(_string(sentence["caption"], path, number))
        except (KeyError, TypeError) as error:
            raise MediaError(
                f'{path}: {error!r}; expected {{"videos": [{{"video_id", "split", ...}}], '
                '"sentences": [{"video_id", "caption", ...}]}.'
            ) from None
    return videos, captions


def _string(caption: Any, path: Path, number: int) -> str:
    if not isinstance(caption, str):
        raise MediaError(f"{path}: the caption of sentence {number} is {caption!r}; expected text.")
    return caption
