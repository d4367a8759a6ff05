"""The embedded benchmark: three small base models, the shifts that they must adapt to, and how that is judged.

Example:
    >>> import mmqlora as mm
    >>> task = mm.benchmark.TASKS["video/palette"]
    >>> model = mm.adapt(task.load(quant_type="nf4"), "lora", rank=8)  # doctest: +SKIP
    >>> record = mm.fine_tune(model, task.train(seed=1), task.judge(), collate=task.collate, steps=task.steps,
    ...                       batch_size=task.batch_size)  # doctest: +SKIP
    >>> record["metrics"]["word_accuracy"], record["metrics"]["exact_match"]  # doctest: +SKIP

=====================  ===========================  ============================  ==============================
model                  class                        reads                         does
=====================  ===========================  ============================  ==============================
``mmqlora/video``      SmolVLM                      each frame as one token       tells what happens, answers
``mmqlora/audio``      Whisper                      six seconds of mel steps      tells what sounds, answers
``mmqlora/retrieval``  ViViT and CLIP's text model  24 frames, four to a token    finds captions and clips
=====================  ===========================  ============================  ==============================

They were trained on the unshifted world (`datasets.worlds`). A task is a model and a shift of that world: the model's
score falls, and fine-tuning on a thousand shifted items should bring it back. Training items differ by seed; the items
that a run is judged on are the same for all runs, and those that learning rates are chosen on are others again.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerFast, WhisperFeatureExtractor

from .datasets.worlds import WORDS, Item, Question, World
from .errors import MMQLoRAError
from .media import uniform_indices
from .metrics import word_error_rate
from .quantization import load

# <eos> is not 2: there CLIP pools at the largest token id, as its first release did, and not at the end.
SPECIALS = ("<pad>", "<bos>", "<unk>", "<image>", "<eos>")
PAD, BOS, UNK, IMAGE, EOS = range(5)
IDS = {word: index for index, word in enumerate([*SPECIALS, *WORDS])}
PROMPT = "describe"
CLIP_FRAMES = 24  # frames that the retrieval model reads, however many the clip has
POOL = 100  # captions, or clips, among which retrieval has to find the right one
WINDOW = 6  # seconds that the audio model reads
TEST, VALIDATION = 1, 2  # seeds of the worlds that runs are judged on
TRAIN = 1000  # plus the seed of the run
# What a run on each model is: 30 to 90 seconds on one core.
RUNS = {
    "video": {"steps": 100, "batch_size": 16},
    "audio": {"steps": 120, "batch_size": 16},
    "retrieval": {"steps": 100, "batch_size": 32},
}

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Task:
    """A base model, a shift of its world, and what a run on it costs.

    Attributes:
        model: "video", "audio" or "retrieval".
        shifts: name of a shift to its strength (see `datasets.worlds.SHIFTS`); empty is the control.
        steps: optimizer steps of a run.
        batch_size: items of a step.
        items: training items.
        tests: items that a run is judged on.
    """

    model: str
    shifts: Mapping[str, float] = field(default_factory=dict)
    steps: int = 120
    batch_size: int = 16
    items: int = 1000
    tests: int = 500

    @property
    def name(self) -> str:
        """Such as "video/palette", "video/palette+words", "audio/hiss 0.5", "video/none"."""
        parts = (name if strength == 1 else f"{name} {strength:g}" for name, strength in self.shifts.items())
        return f"{self.model}/{'+'.join(parts) or 'none'}"

    @property
    def reader(self) -> Reader:
        """How items become what the model reads, and its output a score."""
        return READERS[self.model]

    @property
    def collate(self) -> Callable[[Sequence[Batch]], Batch]:
        """From encoded items to a batch, for `fine_tune`."""
        return self.reader.collate

    def load(self, quant_type: str | None = None, **kwargs: Any) -> PreTrainedModel:
        """The base model, through `mmqlora.load`.

        Example:
            >>> TASKS["audio/none"].load().config.d_model
            192

        Args:
            quant_type: as in `mmqlora.load`, but not quantized by default.
            kwargs: as in `mmqlora.load`.

        Returns:
            The model, in evaluation mode.
        """
        return load(f"mmqlora/{self.model}", quant_type=quant_type, **kwargs)[0]

    def train(self, seed: int) -> Examples:
        """The training items of a run, encoded.

        Example:
            >>> len(TASKS["audio/hiss"].train(seed=3))
            1000

        Args:
            seed: of the run; each has its own items.

        Returns:
            A map-style data set for `fine_tune`.
        """
        return Examples(self._world(TRAIN + seed, self.items), self.reader)

    def judge(self, validation: bool = False, count: int | None = None) -> Callable[[torch.nn.Module], dict[str, Any]]:
        """What to hand to `fine_tune` as ``evaluate``.

        Example:
            >>> scores = TASKS["video/palette"].judge()(model)  # doctest: +SKIP

        Args:
            validation: judge on the items that are set aside for choosing learning rates.
            count: how many of them; the default is ``tests``.

        Returns:
            A function from a model to its scores, which are means over items, with ``items``, the score of each.
        """
        world = self._world(VALIDATION if validation else TEST, count or self.tests)
        return functools.partial(evaluate, reader=self.reader, items=list(world))

    def _world(self, seed: int, count: int) -> World:
        return World(self.reader.kind, count, seed, self.shifts)


class Examples(Dataset):
    """Items of a world, encoded when they are first asked for and then kept.

    Args:
        world: the items.
        reader: one of `READERS`.
    """

    def __init__(self, world: World, reader: Reader) -> None:
        self.world, self.reader = world, reader
        self._kept: dict[int, Batch] = {}

    def __len__(self) -> int:
        return len(self.world)

    def __getitem__(self, index: int) -> Batch:
        if index not in self._kept:
            self._kept[index] = self.reader.encode(self.world[index])
        return self._kept[index]

    def fingerprint(self) -> str:
        """`World.fingerprint`."""
        return self.world.fingerprint()


class Reader:
    """How items become what a model reads, and its output a score: one for each base model."""

    kind = "clips"

    def encode(self, item: Item, prompt: str = PROMPT, answer: str | None = None) -> Batch:
        """One item as tensors; the answer is the caption unless one is given."""
        raise NotImplementedError

    def collate(self, examples: Sequence[Batch]) -> Batch:
        """Examples of unequal length as one batch."""
        raise NotImplementedError

    def answers(self, model: Any, items: Sequence[Item], prompts: Sequence[str] | None = None) -> list[str]:
        """What the model says, greedily, one text an item."""
        raise MMQLoRAError("the retrieval model finds captions, it says nothing; video and audio models do")

    def losses(self, model: Any, examples: Sequence[Batch]) -> torch.Tensor:
        """Mean nats a word of each example: (B,) float32."""
        batch = self.collate(examples)
        labels = batch.pop("labels")
        logits = model(**batch).logits.float()
        logits, labels = self._aligned(logits, labels)
        loss = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")
        return loss.sum(1) / (labels != -100).sum(1)

    def _aligned(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return logits, labels


class VideoReader(Reader):
    """A token a frame, the prompt, and what to say; padding lies on the left, where generation does not go on."""

    def encode(self, item: Item, prompt: str = PROMPT, answer: str | None = None) -> Batch:
        """``input_ids`` (L,), ``labels`` (L,), ``pixel_values`` (F, 3, H, W)."""
        head = [*[IMAGE] * len(item.frames), BOS, *ids(prompt)]
        tail = [*ids(item.caption if answer is None else answer), EOS]
        return {
            "input_ids": torch.tensor(head + tail),
            "labels": torch.tensor([-100] * len(head) + tail),
            "pixel_values": pixels(item.frames),
        }

    def collate(self, examples: Sequence[Batch]) -> Batch:
        """Left padded; frames that a clip lacks are zeros, which SmolVLM leaves out."""
        batch = {
            name: pad_sequence([e[name] for e in examples], True, value, "left")
            for name, value in (("input_ids", PAD), ("labels", -100))
        }
        batch["attention_mask"] = (batch["input_ids"] != PAD).long()
        batch["pixel_values"] = pad_sequence([e["pixel_values"] for e in examples], True)
        return batch

    def answers(self, model: Any, items: Sequence[Item], prompts: Sequence[str] | None = None) -> list[str]:
        """Texts, one an item."""
        examples = [
            self.encode(item, prompt, "") for item, prompt in zip(items, prompts or [PROMPT] * len(items), strict=True)
        ]
        for example in examples:
            example["input_ids"] = example["input_ids"][:-1]  # what is to be said ends in <eos>; this is not said yet
            example["labels"] = example["labels"][:-1]
        batch = self.collate(examples)
        del batch["labels"]
        said = model.generate(**batch, max_new_tokens=32, do_sample=False)
        return [words(row) for row in said[:, batch["input_ids"].shape[1] :].tolist()]

    def _aligned(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = logits[:, -labels.shape[1] :]  # virtual tokens of a soft prompt come first
        return logits[:, :-1], labels[:, 1:]


class AudioReader(Reader):
    """Six seconds of mel steps for the encoder; prompt and answer for the decoder."""

    kind = "sounds"

    def encode(self, item: Item, prompt: str = PROMPT, answer: str | None = None) -> Batch:
        """``input_features`` (64, 300), ``decoder_input_ids`` (L,), ``labels`` (L,)."""
        head, tail = [BOS, *ids(prompt)], [*ids(item.caption if answer is None else answer), EOS]
        if item.audio.duration > WINDOW:
            raise MMQLoRAError(f"item {item.index} lasts {item.audio.duration:g} s; the audio model reads {WINDOW} s")
        mel = feature_extractor()(item.audio.samples, sampling_rate=item.audio.rate, return_tensors="pt")
        return {
            "input_features": mel.input_features[0],
            "decoder_input_ids": torch.tensor((head + tail)[:-1]),
            "labels": torch.tensor([-100] * (len(head) - 1) + tail),
        }

    def collate(self, examples: Sequence[Batch]) -> Batch:
        """Padded on the right."""
        batch = {
            name: pad_sequence([e[name] for e in examples], True, value)
            for name, value in (("decoder_input_ids", PAD), ("labels", -100))
        }
        return {**batch, "input_features": torch.stack([e["input_features"] for e in examples])}

    def answers(self, model: Any, items: Sequence[Item], prompts: Sequence[str] | None = None) -> list[str]:
        """Texts, one an item. Prompts must be of one length."""
        features = torch.stack([self.encode(item)["input_features"] for item in items])
        start = torch.tensor([[BOS, *ids(prompt)] for prompt in prompts or [PROMPT] * len(items)])
        said = model.generate(input_features=features, decoder_input_ids=start, max_new_tokens=32, do_sample=False)
        # Whisper gives back what it generated with or without the start, as its options say.
        skip = start.shape[1] if torch.equal(said[:, : start.shape[1]], start) else 0
        return [words(row) for row in said[:, skip:].tolist()]


class RetrievalReader(Reader):
    """24 frames of the clip, evenly spread, and a text."""

    def encode(self, item: Item, prompt: str = PROMPT, answer: str | None = None) -> Batch:
        """``pixel_values`` (24, 3, H, W), ``input_ids`` (L,)."""
        frames = item.frames[uniform_indices(len(item.frames), CLIP_FRAMES)]
        text = item.caption if answer is None else answer
        return {"pixel_values": pixels(frames), "input_ids": torch.tensor([BOS, *ids(text), EOS])}

    def collate(self, examples: Sequence[Batch]) -> Batch:
        """Texts padded on the right; the model is told to return its contrastive loss."""
        text = pad_sequence([e["input_ids"] for e in examples], True, PAD)
        return {
            "pixel_values": torch.stack([e["pixel_values"] for e in examples]),
            "input_ids": text,
            "attention_mask": (text != PAD).long(),
            "return_loss": True,
        }


READERS: dict[str, Reader] = {"video": VideoReader(), "audio": AudioReader(), "retrieval": RetrievalReader()}


@torch.no_grad()
def evaluate(model: Any, reader: Reader, items: Sequence[Item], batch_size: int = 50) -> dict[str, Any]:
    """Score a model on items.

    Example:
        >>> evaluate(model, READERS["video"], list(World("clips", 100, seed=1)))  # doctest: +SKIP

    Args:
        model: a base model of the benchmark, adapted or not.
        reader: the one of its kind.
        items: for retrieval a multiple of 100.
        batch_size: items at a time.

    Returns:
        Means over items, and the score of each under ``items``. Video and audio: ``word_accuracy``, 1 - word errors
        over words of the caption, at least 0; ``exact_match``; ``loss``, nats a word of the right caption. Retrieval,
        among 100, mean of both directions: ``reciprocal_rank``; ``recall_at_1``; ``order``, whether a caption that is
        nearly right scores less. Captions that are equal don't compete; a tie counts against the right one.
    """
    model.eval()
    if isinstance(reader, RetrievalReader):
        scores = _retrieve(model, reader, items)
    else:
        said, losses = [], []
        for start in range(0, len(items), batch_size):
            part = items[start : start + batch_size]
            said += reader.answers(model, part)
            losses.append(reader.losses(model, [reader.encode(item) for item in part]))
        captions = [item.caption for item in items]
        errors = word_error_rate(captions, said)
        scores = {
            "word_accuracy": np.maximum(0, 1 - errors.edits / errors.lengths),
            "exact_match": np.array([a == b for a, b in zip(said, captions, strict=True)], float),
            "loss": torch.cat(losses).numpy(),
        }
    means = {name: float(values.mean()) for name, values in scores.items()}
    return {**means, "items": {name: np.round(values, 4).tolist() for name, values in scores.items()}}


@torch.no_grad()
def answer_questions(model: Any, reader: Reader, items: Sequence[Item]) -> dict[str, float]:
    """Share of questions answered exactly, by sort ("what", "when", "how many", "order").

    Example:
        >>> answer_questions(model, READERS["video"], list(World("clips", 100, seed=1)))  # doctest: +SKIP

    Args:
        model: a video or audio model of the benchmark.
        reader: the one of its kind.
        items: whose questions are asked.

    Returns:
        Sort to share.
    """
    model.eval()

    def length(pair: tuple[Item, Question]) -> int:
        return len(ids(pair[1].text))

    # Prompts of a batch are of one length, as the audio model pads none.
    asked = sorted(((item, question) for item in items for question in item.questions), key=length)
    right: dict[str, list[bool]] = {}
    for _, group in itertools.groupby(asked, key=length):
        pairs = list(group)
        for start in range(0, len(pairs), 50):
            part = pairs[start : start + 50]
            said = reader.answers(model, [item for item, _ in part], [question.text for _, question in part])
            for text, (_, question) in zip(said, part, strict=True):
                right.setdefault(question.sort, []).append(text == question.answer)
    return {sort: float(np.mean(values)) for sort, values in sorted(right.items())}


def _retrieve(model: Any, reader: RetrievalReader, items: Sequence[Item]) -> dict[str, np.ndarray]:
    if len(items) % POOL:
        raise MMQLoRAError(f"{len(items)} items; retrieval is judged among {POOL}, so give a multiple of that")
    ranks, order = [], []
    for start in range(0, len(items), POOL):
        part = items[start : start + POOL]
        out = model(**{**reader.collate([reader.encode(item) for item in part]), "return_loss": False})
        scores = out.image_embeds.float() @ out.text_embeds.float().T
        wrong = [reader.encode(item, answer=item.negatives[0]) for item in part]
        near = model(**{**reader.collate(wrong), "return_loss": False}).text_embeds.float()
        right = scores.diagonal()
        order.append(right > (out.image_embeds.float() * near).sum(1))
        captions = np.array([item.caption for item in part])
        same = torch.from_numpy((captions[:, None] == captions[None]) & ~np.eye(len(part), dtype=bool))
        scores = scores.masked_fill(same, -torch.inf)
        both = [(side >= right[:, None]).sum(1) for side in (scores, scores.T)]
        ranks.append(torch.stack(both, 1))
    rank = torch.cat(ranks).double()
    return {
        "reciprocal_rank": (1 / rank).mean(1).numpy(),
        "recall_at_1": (rank == 1).double().mean(1).numpy(),
        "order": torch.cat(order).double().numpy(),
    }


def ids(text: str) -> list[int]:
    """Token ids of a text of the world's words.

    Example:
        >>> ids("red circle turns")
        [5, 11, 17]
    """
    return [IDS[word] for word in text.split()]


def words(row: Sequence[int]) -> str:
    """Text of token ids, up to the end token.

    Example:
        >>> words([5, 11, 17, EOS, PAD])
        'red circle turns'
    """
    names = [*SPECIALS, *WORDS]
    # Whisper takes the end token off and leaves the padding behind it.
    ended = itertools.takewhile(lambda index: index not in (EOS, PAD), row)
    return " ".join(names[index] for index in ended)


def pixels(frames: np.ndarray) -> torch.Tensor:
    """(F, H, W, 3) uint8 to (F, 3, H, W) float32 from -1 to 1. None is exactly 0, which SmolVLM takes for padding."""
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


@functools.cache
def feature_extractor() -> WhisperFeatureExtractor:
    """Mel steps of the audio model: 64 bands, 50 a second, at 16 kHz."""
    return WhisperFeatureExtractor(feature_size=64, sampling_rate=16000, hop_length=320, n_fft=512, chunk_length=WINDOW)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each of `worlds.WORDS`, as it is saved beside the base models."""
    core = Tokenizer(models.WordLevel(IDS, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
    )


# A shift at full strength unless said. Retrieval has those that hurt it: a bag of words finds a caption among 100. Of
# the video model's words half are replaced: when all are, full fine-tuning brings back less than half of the cost.
_TIMES = ("reversed", "longer", "faster", "flashes")
_SHIFTS: dict[str, tuple[str, ...]] = {
    "video": ("palette", "texture", "grain", "blur", "words 0.5", "syntax", *_TIMES, "palette+flashes", "palette 0.5"),
    "audio": ("timbre", "hiss", "reverb", "words", "syntax", *_TIMES, "timbre+flashes", "timbre 0.5"),
    "retrieval": ("palette", "texture", "grain", "words", "flashes", "palette+flashes", "palette 0.5"),
}


def task(name: str) -> Task:
    """Make a task from its name, whether `TASKS` lists it or not.

    Example:
        >>> task("video/palette 0.5+words").shifts
        {'palette': 0.5, 'words': 1.0}

    Args:
        name: model, slash, and shifts joined by plus signs, each with its strength unless that is 1; or "none".

    Returns:
        The task, with its model's steps and batch size.

    Raises:
        MMQLoRAError: the model is none of the three. A shift is checked when the items are made.
    """
    model, _, shifts = name.partition("/")
    if model not in RUNS:
        raise MMQLoRAError(f"task {name!r}: the models are {', '.join(RUNS)}, as in 'video/palette'")
    parts = (part.partition(" ") for part in shifts.split("+") if part not in ("", "none"))
    return Task(model, {shift: float(strength or 1) for shift, _, strength in parts}, **RUNS[model])


_NAMES = [f"{model}/{shifts}" for model, many in _SHIFTS.items() for shifts in ("none", *many)]
TASKS = {name: task(name) for name in _NAMES}
