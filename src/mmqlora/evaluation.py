"""Ask a model about every clip of a data set, in batches, and score what it says; a stopped evaluation goes on.

Example:
    >>> result = evaluate(model, task, MSRVTT("msrvtt", "test"), "runs/smolvlm/test")  # doctest: +SKIP
    >>> result.metrics["cider_d"], result.items["cider_d"][:3], result.skipped  # doctest: +SKIP

Answers are kept by clip, one line of JSON each, as soon as they are there. So a killed evaluation loses a batch at
most, and several processes can share the clips of one folder: each answers its share, whoever is last scores them all.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from .datasets.clips import Clip, Clips
from .errors import MediaError, TaskError
from .records import append_record, fingerprint, read_records
from .tasks import Batch, Task

__all__ = ["Evaluation", "evaluate", "predict"]


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` returns.

    Attributes:
        metrics: name to value, of the clips that could be read.
        items: name to one value a clip, or a text; see `tasks.Task.score`.
        answers: id of a clip to what the model said of it.
        skipped: id of a clip to why it could not be read. It counts in no metric: say how many there were.
    """

    metrics: dict[str, float]
    items: dict[str, list[float]]
    answers: dict[str, Any]
    skipped: dict[str, str]


def evaluate(
    model: nn.Module,
    task: Task,
    clips: Clips,
    folder: str | os.PathLike[str] | None = None,
    *,
    batch_size: int = 8,
    workers: int = 0,
    progress: bool = True,
) -> Evaluation:
    """Ask about every clip, and score the answers.

    Example:
        >>> evaluate(model, Recognition(processor), LibriSpeech("LibriSpeech", "test-clean"))  # doctest: +SKIP

    Args:
        model: the model, adapted or not.
        task: what it is asked; see `tasks`.
        clips: the data set.
        folder: where answers are kept, of this model and this data set. Answers that are there already are not asked
            for again. None keeps them in memory.
        batch_size: clips at a time.
        workers: processes that decode media.
        progress: show a progress bar.

    Returns:
        An `Evaluation`.

    Raises:
        TaskError: no clip can be read, or the folder has answers of another model, task or data set.
    """
    kept = predict(model, task, clips, folder, batch_size=batch_size, workers=workers, progress=progress)
    return score(task, clips, kept)


def score(task: Task, clips: Clips, kept: Mapping[str, Mapping[str, Any]]) -> Evaluation:
    """Score what `predict` returned, once every clip is there.

    Example:
        >>> score(task, clips, predict(model, task, clips, "answers", shard=(1, 2)))  # doctest: +SKIP

    Args:
        task: as for `predict`.
        clips: as for `predict`.
        kept: what it returned.

    Returns:
        An `Evaluation`.

    Raises:
        TaskError: clips are missing, or none could be read.
    """
    missing = [clip.id for clip in clips.clips if clip.id not in kept]
    if missing:
        raise TaskError(
            f"{len(missing)} of {len(clips)} clips have no answer, such as {missing[:3]}: another process is at them, "
            "or its share was never run. Run predict for every share of the clips first."
        )
    skipped = {clip.id: kept[clip.id]["skipped"] for clip in clips.clips if "skipped" in kept[clip.id]}
    read = [clip for clip in clips.clips if clip.id not in skipped]
    if not read:
        raise TaskError(f"none of {len(clips)} clips could be read: {dict(list(skipped.items())[:3])}.")
    answers = {clip.id: kept[clip.id]["answer"] for clip in read}
    scores = task.score(read, list(answers.values()))
    return Evaluation(scores.metrics, scores.items, answers, skipped)


def predict(
    model: nn.Module,
    task: Task,
    clips: Clips,
    folder: str | os.PathLike[str] | None = None,
    *,
    shard: tuple[int, int] = (0, 1),
    batch_size: int = 8,
    workers: int = 0,
    progress: bool = True,
) -> dict[str, dict[str, Any]]:
    """Ask about a share of the clips, and keep the answers. For `Retrieval` these are vectors, so it extracts features.

    Example:
        >>> for number in range(2):  # each in a process of its own, on a machine of its own  # doctest: +SKIP
        ...     predict(model, task, clips, "runs/answers", shard=(number, 2))

    Args:
        model: as all that are not named here, see `evaluate`.
        task: the same.
        clips: the same.
        folder: the same. Shares need one that all processes see.
        shard: (which, of how many): every n-th clip, from this one on.
        batch_size: as in `evaluate`.
        workers: the same.
        progress: the same.

    Returns:
        Id to ``{"answer": ...}``, or to ``{"skipped": reason}`` where the media is broken; of every clip that the
        folder now has.

    Raises:
        TaskError: the share is none, or the folder has answers of another model, task or data set.
        RecordError: the disk refused an answer, or a file of the folder is damaged.
    """
    which, count = shard
    if not 0 <= which < count:
        raise TaskError(f"shard={shard}; expected (which, of how many), such as (0, 2) and (1, 2).")
    if count > 1 and folder is None:
        raise TaskError("a share of the clips needs a folder, where the other shares are kept as well.")
    made = {"model": _identity(model), "task": _settings(task), "data": clips.fingerprint()}
    kept = _kept(Path(folder), made) if folder is not None else {}
    todo = [clip for clip in clips.clips[which::count] if clip.id not in kept]
    path = None if folder is None else Path(folder) / f"answers-{which}-of-{count}.jsonl"
    bar = tqdm(total=len(clips.clips[which::count]), desc="evaluate", unit="clip", leave=False, disable=not progress)
    bar.update(bar.total - len(todo))
    with bar:
        for batch in _asked(todo, task, batch_size, workers):
            good = [asked for _, asked in batch if not isinstance(asked, str)]
            said = iter(task.answer(model, good) if good else ())
            for clip, asked in batch:
                line = {"skipped": asked} if isinstance(asked, str) else {"answer": next(said)}
                kept[clip.id] = line
                if path is not None:
                    append_record(path, {"id": clip.id, **line, "made": fingerprint(*made.values())})
            bar.update(len(batch))
    return kept


class _Asked(Dataset):
    """What a task asks of clips; where the media is broken, the reason in words."""

    def __init__(self, clips: list[Clip], task: Task) -> None:
        self.clips, self.task = clips, task

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> tuple[Clip, Batch | str]:
        clip = self.clips[index]
        try:
            return clip, self.task.ask(clip)
        except MediaError as error:
            return clip, str(error)


def _asked(clips: list[Clip], task: Task, batch_size: int, workers: int) -> Iterator[list[tuple[Clip, Batch | str]]]:
    if clips:
        yield from DataLoader(_Asked(clips, task), batch_size, num_workers=workers, collate_fn=list)


def _kept(folder: Path, made: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    kept = {}
    for path in sorted(folder.glob("answers-*.jsonl")):
        for line in read_records(path):
            if line.pop("made", None) != fingerprint(*made.values()):
                raise TaskError(
                    f"{path} has answers of another model, task or data set; give these a folder of their own, or "
                    "delete that one."
                )
            kept[line.pop("id")] = line
    return kept


def _settings(task: Task) -> str:
    plain = {name: value for name, value in vars(task).items() if name != "processor"}
    return f"{type(task).__name__}({plain})"


def _identity(model: nn.Module) -> str:
    """Changes whenever the model was trained: a hash of the start of every parameter. All bytes of a large one take
    minutes."""
    parts = []
    for name, parameter in model.named_parameters():
        start = parameter.detach().flatten()[:64].cpu()
        parts += [name, bytes(start.view(torch.uint8).numpy())]
    return fingerprint(*parts)
