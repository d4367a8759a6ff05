r"""A fine-tuning run from one file: which model, which data, which adapter, how long, and how it is judged.

Example:
    >>> recipe = read_recipe("whisper_librispeech")
    >>> record = run_recipe(recipe, data="LibriSpeech", output="runs/whisper")  # doctest: +SKIP
    >>> record["metrics"]["wer"], record["before"]["wer"]  # doctest: +SKIP

or ``python -m mmqlora run whisper_librispeech --data LibriSpeech --output runs/whisper``, or the same behind
``accelerate launch -m``. A recipe is a TOML file; some lie beside this one. Its sections are the arguments of the
functions that it calls::

    title = "Whisper small on LibriSpeech"
    published = "what others got, where, and how"

    [model]                  # mmqlora.load, or of the model_class that is named here
    name_or_path = "openai/whisper-small.en"
    quant_type = "nf4"
    [data]                   # name: a reader of mmqlora.datasets; train, test: its arguments
    name = "librispeech"
    train = { subset = "train-clean-100" }
    test = { subset = "test-clean" }
    [task]                   # name: one of mmqlora.tasks; the rest: its arguments
    name = "recognition"
    [adapter]                # mmqlora.adapt
    method = "lora"
    rank = 16
    [training]               # mmqlora.fine_tune
    steps = 2000
    learning_rate = 1e-3
    [evaluation]             # mmqlora.evaluate
    batch_size = 16
    [plan]                   # mmqlora.plan, beside what the sections above say
    tokens = 64

In the output folder a run leaves ``adapter``, the answers of the model before and after (`evaluation`), checkpoints
where ``training.save_every`` says so, and ``record.jsonl``. Started again after it was stopped, it goes on.
"""

from __future__ import annotations

import inspect
import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState

from .. import evaluation
from ..datasets.audiocaps import AudioCaps
from ..datasets.clips import Clips
from ..datasets.clotho import Clotho
from ..datasets.librispeech import LibriSpeech
from ..datasets.msrvtt import MSRVTT
from ..datasets.msvd import MSVD
from ..datasets.vatex import VATEX
from ..errors import RecipeError
from ..media import SkipBroken
from ..methods import adapt, callbacks
from ..planner import Plan, plan
from ..quantization import load
from ..records import append_record, read_records, run_id
from ..tasks import TASKS, Pairs
from ..training import fine_tune

__all__ = ["RECIPES", "Recipe", "plan_recipe", "read_recipe", "run_recipe"]

DATASETS: dict[str, type[Clips]] = {
    "audiocaps": AudioCaps,
    "clotho": Clotho,
    "librispeech": LibriSpeech,
    "msrvtt": MSRVTT,
    "msvd": MSVD,
    "vatex": VATEX,
}

RECIPES: dict[str, Path] = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.toml"))}
"""The recipes that come with the library, by name.

:meta hide-value:
"""


@dataclass(frozen=True)
class Recipe:
    """A recipe as it was read; see the top of this page for its sections.

    Attributes:
        title: what it is, in a line.
        published: the figures to compare with, and where they come from.
        model: arguments of `quantization.load`.
        data: ``name`` of a reader, and its arguments for ``train`` and ``test``.
        task: ``name`` of a task, and its arguments.
        adapter: arguments of `methods.adapt`.
        training: arguments of `training.fine_tune`.
        evaluation: arguments of `evaluation.evaluate`.
        plan: arguments of `planner.plan`.
    """

    title: str
    published: str
    model: Mapping[str, Any]
    data: Mapping[str, Any]
    task: Mapping[str, Any]
    adapter: Mapping[str, Any]
    training: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    plan: Mapping[str, Any]

    def but(self, **changes: Any) -> Recipe:
        """The same with other values, by section and name.

        Example:
            >>> recipe.but(**{"model.name_or_path": "whisper-tiny.en", "training.steps": 10})  # doctest: +SKIP

        Args:
            changes: ``section.name`` to value.

        Raises:
            RecipeError: no such section, or a name that the section's function does not take.
        """
        changed: dict[str, dict[str, Any]] = {}
        for key, value in changes.items():
            section, _, name = key.partition(".")
            if section not in _SECTIONS or not name:
                raise RecipeError(f"{key!r}: expected section.name, with a section of {', '.join(_SECTIONS)}.")
            changed.setdefault(section, dict(getattr(self, section)))[name] = value
        recipe = replace(self, **changed)
        _check(recipe, "the changed recipe")
        return recipe


_SECTIONS = ("model", "data", "task", "adapter", "training", "evaluation", "plan")


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Read a recipe, and check every name in it against the function that it is for.

    Example:
        >>> read_recipe("clip_msrvtt").task
        {'name': 'retrieval', 'frames': 12, 'size': [224, 224]}

    Args:
        path: a TOML file, or the name of one in `RECIPES`.

    Raises:
        RecipeError: there is no such file, it is no TOML, or a section or a name in it is missing or unknown.
    """
    path = RECIPES.get(str(path), Path(path))
    if not path.is_file():
        raise RecipeError(f"{path}: no such file; expected a TOML file, or one of {', '.join(RECIPES)}.")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"{path}: can't read this as a recipe ({error}); expected a TOML file.") from error
    needed = {"title", "published", *_SECTIONS[:5]}
    known = needed | set(_SECTIONS)
    if needed - set(content) or set(content) - known:
        raise RecipeError(
            f"{path}: lacks {sorted(needed - set(content))}, and nobody reads its {sorted(set(content) - known)}; "
            f"expected {sorted(needed)}, and if need be {sorted(known - needed)}."
        )
    recipe = Recipe(**{"evaluation": {}, "plan": {}, **content})
    _check(recipe, str(path))
    return recipe


def run_recipe(
    recipe: Recipe,
    data: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    media: str | os.PathLike[str] | None = None,
    seed: int = 0,
    before: bool = True,
    progress: bool = True,
) -> dict[str, Any]:
    """Load, judge, adapt, fine-tune, save, and judge again.

    Example:
        >>> run_recipe(read_recipe("clip_msrvtt"), "msrvtt", "runs/clip")["metrics"]  # doctest: +SKIP

    Under ``accelerate launch`` every process trains and answers its share, and the first one keeps the record.

    Args:
        recipe: what `read_recipe` gave.
        data: folder of the data set.
        output: folder of the run. What is there already is not done again.
        media: where the media lie, for readers that ask; the default is ``data``.
        seed: of the adapters, the order of the data, and dropout.
        before: judge the model before it is adapted, too.
        progress: show progress bars.

    Returns:
        The run's record, as `fine_tune` gives it: ``metrics`` and ``items`` of the adapted model, ``before``, the
        metrics of the model as it came, ``skipped``, how many test clips could not be read.

    Raises:
        RecipeError: the output folder holds the run of another recipe or seed.
        MMQLoRAError: what the parts raise: data that is not there, a model that does not fit, a loss of NaN.
    """
    output, state = Path(output), PartialState(cpu=not torch.cuda.is_available())
    config = {name: dict(getattr(recipe, name)) for name in _SECTIONS[:6]}
    done = output / "record.jsonl"
    if done.exists():
        return _done(done, config, seed)
    train, test = (_clips(recipe, split, data, media) for split in ("train", "test"))
    model, processor = load(**_model(recipe))
    settings = dict(recipe.task)
    task = TASKS[settings.pop("name")](processor, **settings)

    def judge(name: str) -> evaluation.Evaluation:
        shard = (state.process_index, state.num_processes)
        options = {**recipe.evaluation, "progress": progress and state.is_main_process}
        evaluation.predict(model, task, test, output / name, shard=shard, **options)
        state.wait_for_everyone()
        return evaluation.score(task, test, evaluation.predict(model, task, test, output / name, **options))

    was = judge("before").metrics if before else None
    training = dict(recipe.training)
    training.setdefault("save_every", training["steps"])  # so that a run that is stopped later does not train again
    model = adapt(model, seed=seed, steps=training["steps"], **recipe.adapter)
    record = fine_tune(
        model,
        SkipBroken(Pairs(train, task)),
        collate=task.collate,
        loss=task.loss,
        seed=seed,
        output=output / "checkpoints",
        resume=True,
        callbacks=callbacks(model),
        experiment="recipe",
        config=config,
        data=train.fingerprint(),
        progress=progress,
        **training,
    )
    if state.is_main_process:
        model.save_pretrained(str(output / "adapter"))
    now = judge("after")
    record |= {"title": recipe.title, "metrics": now.metrics, "items": now.items, "before": was}
    record |= {"skipped": len(now.skipped), "tested_on": test.fingerprint(), "clips": len(now.answers)}
    if state.is_main_process:
        append_record(done, record)
    return record


def plan_recipe(recipe: Recipe, gpu: str | int | None = None, config: Any = None) -> Plan:
    """The memory that a recipe will take; see `plan`.

    Example:
        >>> plan_recipe(read_recipe("clip_msrvtt"), gpu="T4").fits  # doctest: +SKIP
        True

    Args:
        recipe: what `read_recipe` gave.
        gpu: as in `plan`.
        config: the model's configuration; the default is read by the model's name.
    """
    training, adapter = recipe.training, recipe.adapter
    settings = {"frames": recipe.task.get("frames"), "rank": adapter.get("rank")}
    settings |= {name: training.get(name) for name in ("batch_size", "accumulate", "optimizer")}
    settings |= dict(recipe.plan)
    return plan(
        recipe.model["name_or_path"] if config is None else config,
        gpu=gpu,
        method=adapter["method"],
        quant_type=recipe.model.get("quant_type", "nf4"),
        checkpointing=training.get("gradient_checkpointing", False),
        **{name: value for name, value in settings.items() if value is not None},
    )


def _check(recipe: Recipe, where: str) -> None:
    """Every name must be one that its function takes, so that a slip of the pen does not run for a day."""
    for section, names in (("data", DATASETS), ("task", TASKS)):
        given = getattr(recipe, section).get("name")
        if given not in names:
            raise RecipeError(f"{where}: {section}.name is {given!r}; expected one of {', '.join(names)}.")
    if set(recipe.data) != {"name", "train", "test"}:
        raise RecipeError(f"{where}: [data] has {sorted(recipe.data)}; expected name, train and test.")
    reader, task = DATASETS[recipe.data["name"]], TASKS[recipe.task["name"]]
    ours = {"data", "progress", "seed", "output", "resume", "callbacks", "experiment", "config", "collate", "loss"}
    if "steps" not in recipe.training:
        raise RecipeError(f"{where}: [training] has no steps; a recipe says how long it trains.")
    called: list[tuple[str, Mapping[str, Any], Callable[..., Any], set[str]]] = [
        ("model", {k: v for k, v in recipe.model.items() if k != "model_class"}, load, set()),
        ("data.train", recipe.data["train"], reader, {"folder", "media", "transform"}),
        ("data.test", recipe.data["test"], reader, {"folder", "media", "transform"}),
        ("task", {k: v for k, v in recipe.task.items() if k != "name"}, task, {"processor"}),
        ("adapter", recipe.adapter, adapt, {"model", "quant_type", "seed", "steps", "batches"}),
        ("training", recipe.training, fine_tune, {"model", "train", "evaluate", *ours}),
        ("evaluation", recipe.evaluation, evaluation.evaluate, {"model", "task", "clips", "folder", "progress"}),
        ("plan", recipe.plan, plan, {"model", "gpu"}),
    ]
    for section, given, function, taken in called:
        parameters = inspect.signature(function).parameters.values()
        names = {p.name for p in parameters if p.kind != p.VAR_KEYWORD} - taken
        more = any(p.kind == p.VAR_KEYWORD for p in parameters)
        lacking = {p.name for p in parameters if p.default is p.empty and p.kind != p.VAR_KEYWORD} - taken - set(given)
        unknown = set(given) & taken if more else set(given) - names
        if unknown or lacking:
            raise RecipeError(
                f"{where}: [{section}] has {sorted(unknown)}, which can't be set there, and lacks {sorted(lacking)}; "
                f"expected of {sorted(names)}."
            )


def _model(recipe: Recipe) -> dict[str, Any]:
    given = dict(recipe.model)
    if name := given.get("model_class"):
        given["model_class"] = getattr(transformers, name, None)
        if given["model_class"] is None:
            raise RecipeError(
                f"transformers has no {name!r}; expected a class such as Qwen2_5_VLForConditionalGeneration."
            )
    return given


def _clips(recipe: Recipe, split: str, data: str | os.PathLike[str], media: str | os.PathLike[str] | None) -> Clips:
    reader = DATASETS[recipe.data["name"]]
    where = {"media": media} if media is not None else {}
    if where and "media" not in inspect.signature(reader).parameters:
        raise RecipeError(f"{recipe.data['name']} has media and texts in one folder; give that as data, and no media.")
    return reader(data, **recipe.data[split], **where)


def _done(path: Path, config: Mapping[str, Any], seed: int) -> dict[str, Any]:
    (record,) = read_records(path)
    if record["id"] != run_id("recipe", config, seed):
        raise RecipeError(f"{path} is the record of another recipe or seed; give this run an output folder of its own.")
    return record
