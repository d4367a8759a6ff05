"""MSVD: 1,970 short videos from YouTube, about 40 captions each."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from ..errors import MediaError
from .clips import VIDEO, Clip, Clips, Media, find_file, one_of, read_text

SPLITS = {"train": 1200, "val": 100, "test": 670}


class MSVD(Clips):
    """MSVD, the Microsoft Research Video Description Corpus, from ``YouTubeClips`` and ``AllVideoDescriptions.txt``.

    Example:
        >>> MSVD("msvd", "test")  # doctest: +SKIP
        MSVD('test', 670 clips, ... texts; published: 670)

    ``train_list.txt``, ``val_list.txt`` and ``test_list.txt`` name 1,200, 100 and 670 videos, one a line. The captions
    are read as people wrote them, from the text file: ``raw-captions.pkl``, which many repositories pass on, is a
    pickle and can run code.

    Args:
        folder: where captions and lists lie, here or in folders below.
        split: ``train``, ``val`` or ``test``.
        media: where the videos lie; the default is `folder`.
        transform: applied to a clip when it is read.

    Raises:
        MediaError: no such split, captions or lists that are absent or malformed, or no video at all.

    Source: Chen and Dolan, Collecting Highly Parallel Data for Paraphrase Evaluation, 2011; the split is from
    Venugopalan et al., Sequence to Sequence - Video to Text, 2015.
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
        path = find_file(folder, "AllVideoDescriptions.txt")
        captions: dict[str, list[str]] = {}
        for number, line in enumerate(read_text(path).split("\n"), 1):
            if not line.strip() or line.startswith("#"):  # the file begins with what it is and how to cite it
                continue
            id, _, text = line.strip().partition(" ")
            if id.count("_") < 2:
                raise MediaError(
                    f"{path}, line {number}: {line[:80]!r}; expected an id and a caption, such as "
                    "'-4wsuPCjDBc_5_15 a squirrel is eating a peanut'."
                )
            captions.setdefault(id, []).append(text)
        names = read_text(find_file(folder, f"{split}_list.txt")).split()
        clips = [Clip(id, files.find(id), tuple(captions.get(id, ()))) for id in names]
        protocol = "every caption of a video is a query; from video to text the best rank of its captions counts"
        super().__init__(clips, split, protocol, published, transform)
