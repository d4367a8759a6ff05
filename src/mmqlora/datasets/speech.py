"""Speech with transcripts: a folder of audio files and a manifest."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ..errors import MediaError
from ..media import read_audio
from ..records import fingerprint


class Speech(Dataset):
    """Utterances of a folder whose ``manifest.jsonl`` names a ``path``, a ``text`` and whatever else is known.

    Example:
        >>> train = Speech("speech/synthetic", keep=lambda item: item["split"] == "train")  # doctest: +SKIP
        >>> train[0]["samples"].shape, train[0]["text"]  # doctest: +SKIP

    Args:
        folder: where ``manifest.jsonl`` lies; paths in it are relative to this folder.
        keep: which lines of the manifest to keep; the default is all.
        rate: samples a second that items are resampled to.

    Raises:
        MediaError: no manifest, a line that is none, or nothing left after ``keep``. Reading an item whose audio is
            missing or damaged raises it as well.
    """

    def __init__(
        self, folder: str | os.PathLike[str], keep: Callable[[dict[str, Any]], bool] | None = None, rate: int = 16000
    ) -> None:
        self.folder, self.rate = Path(folder), rate
        manifest = self.folder / "manifest.jsonl"
        if not manifest.is_file():
            raise MediaError(f"{manifest}: no such file; expected one JSON line an utterance, with path and text.")
        self.rows: list[dict[str, Any]] = []
        for number, line in enumerate(manifest.read_text(encoding="utf-8").splitlines(), 1):
            try:
                row = json.loads(line)
                row["path"], row["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise MediaError(
                    f'{manifest}, line {number}: {error!r}; expected {{"path": ..., "text": ...}}.'
                ) from error
            if keep is None or keep(row):
                self.rows.append(row)
        if not self.rows:
            raise MediaError(f"{manifest}: none of its {number} lines was kept.")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One utterance: what the manifest says, and ``samples``, float32 (N,)."""
        row = self.rows[index]
        return {**row, "samples": read_audio(self.folder / row["path"], rate=self.rate).samples}

    @property
    def texts(self) -> list[str]:
        """The transcripts, in order."""
        return [row["text"] for row in self.rows]

    def fingerprint(self) -> str:
        """A hash of the transcripts and of every audio file."""
        return fingerprint(*(part for row in self.rows for part in (row["text"], self.folder / row["path"])))

    def __repr__(self) -> str:
        seconds = np.sum([row.get("duration", np.nan) for row in self.rows])
        length = f", {seconds / 60:.1f} minutes" if np.isfinite(seconds) else ""
        return f"Speech({self.folder.name!r}, {len(self)} utterances{length})"
