"""Fine-tune a model: a thin layer on `transformers.Trainer`.

It adds what a run needs to be trusted: one seed for everything, a loss that is no longer finite stops the run, a
checkpoint is only kept whole and finite, a killed run goes on where it was, and what comes back is a run record.
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from .errors import TrainingError
from .memory import measure
from .quantization import close_cpu_traps, prefers_bf16
from .records import make_record

logger = logging.getLogger("mmqlora")


def fine_tune(
    model: torch.nn.Module,
    train: Dataset,
    evaluate: Dataset | Callable[[torch.nn.Module], Mapping[str, Any]] | None = None,
    *,
    collate: Callable[[list[Any]], dict[str, torch.Tensor]] | None = None,
    loss: Callable[..., torch.Tensor] | None = None,
    seed: int = 0,
    steps: int = 100,
    batch_size: int = 8,
    accumulate: int = 1,
    learning_rate: float = 1e-3,
    warmup: float = 0.1,
    weight_decay: float = 0.0,
    bf16: bool | None = None,
    gradient_checkpointing: bool = False,
    optimizer: str | None = None,
    workers: int = 0,
    output: str | Path | None = None,
    save_every: int | None = None,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    experiment: str = "fine_tune",
    config: Mapping[str, Any] | None = None,
    data: str = "",
    progress: bool = True,
) -> dict[str, Any]:
    """Fine-tune a model and return the record of the run.

    Example:
        >>> model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))  # doctest: +SKIP
        >>> record = fine_tune(model, train, evaluate, seed=0, steps=100)  # doctest: +SKIP
        >>> record["metrics"], record["peak_bytes"]  # doctest: +SKIP

    With several processes the call goes into a script:

        >>> record = fine_tune(model, train, evaluate, batch_size=8)  # doctest: +SKIP
        >>> if accelerate.PartialState().is_main_process:  # doctest: +SKIP
        ...     append_record("records.jsonl", record)

    ``accelerate launch --multi_gpu --num_processes 2 script.py`` starts it twice, also on CPUs (with ``--cpu``
    accelerate starts it once, unless mpirun does). Two processes with ``batch_size=8`` train as one with 16 does, as
    losses are weighted by labels. What differs: dropout; losses that are not a mean over the labels other than -100,
    such as contrastive ones, whose negatives are the items of the same process; and, without integer labels, the last
    step of an epoch, which items of its start fill up.

    FSDP (``--use_fsdp``) is for GPUs, and has not been run there yet. To shard 4-bit weights it needs them in the type
    of the other weights: ``quantize(model, quant_storage=torch.bfloat16)``.

    Args:
        model: a transformers model, with or without PEFT adapters. What requires a gradient is trained.
        train: a map-style data set.
        evaluate: a data set, on which the mean loss is measured, or a function from the model (in evaluation mode) to
            a dictionary of metrics; a key ``items`` in it holds scores by item and is kept apart. Every process calls
            the function, and what the main one gets counts.
        collate: from a list of items to a batch; the default is that of `transformers.Trainer`.
        loss: from the model's outputs and the labels to a mean over these, called as the Trainer calls its
            ``compute_loss_func``; the default is the model's own.
        seed: order of the data and dropout. Adapters are initialized before: call `transformers.set_seed` first.
        steps: optimizer steps.
        batch_size: items of a forward pass in each process; ``accumulate`` of them make a step.
        accumulate: forward passes of a step.
        learning_rate: the peak; it rises over ``warmup`` and falls linearly to zero.
        warmup: share of the steps, 0 to 1.
        weight_decay: AdamW's.
        bf16: compute in bfloat16 under autocast, wherever the weights are of another type; the default is
            `quantization.prefers_bf16`: on a GPU, and where the processor multiplies bfloat16 in hardware.
        gradient_checkpointing: recompute activations in the backward pass instead of keeping them.
        optimizer: a name that `TrainingArguments` knows; the default is paged 8-bit AdamW on CUDA and AdamW elsewhere.
        workers: processes that load data.
        output: folder for checkpoints; the default is a temporary one, gone with the run.
        save_every: steps between checkpoints; the default is none.
        resume: go on from the newest whole checkpoint in ``output``, from the start where there is none.
        callbacks: what to call during the run, such as `methods.callbacks` of a model; see
            `transformers.TrainerCallback`.
        experiment: name of the experiment in the record.
        config: configuration in the record; the default is the training options.
        data: `records.fingerprint` of the data, for the record.
        progress: show a progress bar.

    Returns:
        A run record (see `records.make_record`): ``metrics``, ``items``, ``losses`` (one a step), ``wall_s``,
        ``cpu_s`` (of the training alone), ``peak_bytes``, ``start_bytes``, ``memory`` (its timeline), ``parameters``.
        It is that of the main process, memory and times included, and all processes return it.

    Raises:
        TrainingError: nothing to train, no data, an option out of range, a loss or a weight that is not finite, or a
            checkpoint that can't be written. The message names the newest good checkpoint.
    """
    cpu = not torch.cuda.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    options = {
        "steps": steps,
        "batch_size": batch_size,
        "accumulate": accumulate,
        "learning_rate": learning_rate,
        "warmup": warmup,
        "weight_decay": weight_decay,
        "bf16": prefers_bf16(model) if bf16 is None else bf16,
        "gradient_checkpointing": gradient_checkpointing,
        "optimizer": optimizer or ("adamw_torch" if cpu else "paged_adamw_8bit"),
    }
    _check(model, train, options, output, save_every, resume)
    close_cpu_traps(model)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(output or scratch)
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=batch_size,
            gradient_accumulation_steps=accumulate,
            learning_rate=learning_rate,
            warmup_steps=math.ceil(warmup * steps),
            weight_decay=weight_decay,
            bf16=options["bf16"],
            **({"gradient_checkpointing": True} if gradient_checkpointing else {}),  # naming it warns, even if False
            optim=options["optimizer"],
            save_strategy="steps" if save_every else "no",
            save_steps=save_every or steps,
            save_total_limit=2,
            logging_strategy="steps",
            logging_steps=1,
            logging_nan_inf_filter=False,  # it would hide what must stop the run
            report_to="none",
            remove_unused_columns=False,
            dataloader_num_workers=workers,
            disable_tqdm=not progress,
            use_cpu=cpu,
            seed=seed,
            average_tokens_across_devices=False,  # _Trainer does
        )
        if arguments.world_size > 1:  # one process leaves it out, so that the names of its runs stay
            options["processes"] = arguments.world_size
        trainer = _Trainer(
            model=model,
            args=arguments,
            train_dataset=train,
            eval_dataset=evaluate if isinstance(evaluate, Dataset) else None,
            data_collator=collate,
            compute_loss_func=loss,
            callbacks=list(callbacks),
        )
        trainer.remove_callback(PrinterCallback)
        if parse_flag_from_env("ACCELERATE_USE_FSDP") and not trainer.is_fsdp_enabled:
            raise TrainingError(
                f"FSDP was asked for on {arguments.device} in processes={arguments.world_size}; accelerate shards "
                "models in several processes on GPUs only. Launch with --multi_gpu in place of --use_fsdp, which gives "
                "each process a whole copy."
            )
        start = newest_checkpoint(folder) if resume else None
        wall, busy = time.perf_counter(), time.process_time()
        with measure() as memory:
            try:
                trainer.train(resume_from_checkpoint=str(start) if start else None)
            except OSError as error:
                raise TrainingError(
                    f"Stopped at step {trainer.state.global_step}: a file could not be read or written ({error}). "
                    f"{_advice(folder)}"
                ) from error
        wall, busy = time.perf_counter() - wall, time.process_time() - busy
        model.eval()
        metrics = dict(_evaluate(trainer, model, evaluate))
        # The Trainer leaves autocast around the model: it would say something else than the same model reloaded.
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    items = metrics.pop("items", None)
    counts = [(p.requires_grad, _elements(p)) for p in model.parameters()]
    measured = {
        "metrics": metrics,
        "losses": [round(row["loss"], 5) for row in trainer.state.log_history if "loss" in row],
        "wall_s": round(wall, 3),
        "cpu_s": round(busy, 3),
        "resumed_from_step": int(start.name.split("-")[-1]) if start else 0,
        "start_bytes": memory.start_bytes,
        "peak_bytes": memory.peak_bytes,
        "memory": memory.timeline,
        "parameters": {"trainable": sum(n for grad, n in counts if grad), "total": sum(n for _, n in counts)},
        "training": options,
    }
    if items is not None:
        measured["items"] = items
    record = make_record(experiment, config if config is not None else options, seed, data=data, measured=measured)
    return broadcast_object_list([record])[0]


def newest_checkpoint(folder: str | Path) -> Path | None:
    """The newest whole checkpoint of a folder, or None.

    Example:
        >>> newest_checkpoint("runs/1")  # doctest: +SKIP
        PosixPath('runs/1/checkpoint-50')

    Args:
        folder: where `fine_tune` was told to write.

    Returns:
        The folder of a checkpoint. One whose writing was cut short has no readable ``trainer_state.json``, which the
        Trainer writes last, and does not count.
    """
    found = sorted(Path(folder).glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[-1]), reverse=True)
    for checkpoint in found:
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())
            return checkpoint
        except (OSError, ValueError):
            logger.warning("%s is not a whole checkpoint; left out", checkpoint)
    return None


class _Trainer(Trainer):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # compute_loss weights the loss itself, of every model: some take the number of labels of a step and ignore it
        # (Whisper). That they "accept" it makes the Trainer count labels, and leave the weight alone.
        self.model_accepts_loss_kwargs = True

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], torch.Tensor | None]:
        batches, count = super().get_batch_samples(*args, **kwargs)
        state, processes = self.accelerator.gradient_state, self.accelerator.num_processes
        if processes > 1 and batches and state.end_of_dataloader and state.remainder > 0:
            # The epoch's last step is filled up with items of its start, which one process would not see again.
            labels = batches[-1].get("labels")
            if isinstance(labels, torch.Tensor) and not labels.is_floating_point():
                own = state.remainder - self.accelerator.process_index * self.args.per_device_train_batch_size
                kept = torch.arange(len(labels), device=labels.device) < own
                labels = labels.where(kept.view(-1, *[1] * (labels.ndim - 1)), -100)  # a copy: these may be the data's
                batches[-1] = {**batches[-1], "labels": labels}
                count = self._get_num_items_in_batch(batches, self.args.device)
        return batches, count

    def _get_num_items_in_batch(self, batches: list[Any], device: torch.device) -> torch.Tensor | None:
        """Labels of these batches, on all processes."""
        own = super()._get_num_items_in_batch(batches, device)
        return None if own is None else self.accelerator.reduce(own, "sum")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The mean over the labels of a batch, times their share in the labels of the whole step."""
        # Counted before: where the loss is ours, the Trainer takes the labels out of the batch.
        own = None if num_items_in_batch is None else super()._get_num_items_in_batch([inputs], self.args.device)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        if own is not None:
            # Gradients and losses are averaged over processes, and a mean over no labels at all is NaN.
            share = own * self.accelerator.num_processes / num_items_in_batch
            loss = loss * share if own or not num_items_in_batch else loss.nan_to_num() * 0
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        total = self.accelerator.reduce(loss, "mean")  # so that all processes stop where one has to
        if not torch.isfinite(total).all():
            # A checkpoint of this very step holds the weights that gave the loss; it is no place to go on from.
            spoiled = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            if self.accelerator.is_main_process and spoiled.exists():
                spoiled.rename(spoiled.with_name(f"diverged-{self.state.global_step}"))
            self.accelerator.wait_for_everyone()
            raise TrainingError(
                f"The loss is {total.item()} at step {self.state.global_step + 1}. Try a lower learning rate than "
                f"{self.args.learning_rate:g}, or look for inputs or labels that are not finite. "
                f"{_advice(self.args.output_dir)}"
            )
        return loss

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        bad = [name for name, p in self.model.named_parameters() if p.requires_grad and not torch.isfinite(p).all()]
        if bad:
            raise TrainingError(
                f"{len(bad)} trained weights are no longer finite after step {self.state.global_step}, the first "
                f"{bad[0]}. {_advice(self.args.output_dir)}"
            )
        super()._save_checkpoint(*args, **kwargs)


def _advice(folder: str | Path) -> str:
    checkpoint = newest_checkpoint(folder)
    if checkpoint:
        return f"The newest good checkpoint is {checkpoint}; fine_tune(..., resume=True) goes on from it."
    return "No checkpoint had been saved; save_every=50 and an output folder keep some."


def _check(model, train, options, output, save_every, resume) -> None:
    problems = [
        f"{name}={options[name]}, expected at least 1"
        for name in ("steps", "batch_size", "accumulate")
        if options[name] < 1
    ]
    if not (math.isfinite(options["learning_rate"]) and options["learning_rate"] > 0):
        problems.append(f"learning_rate={options['learning_rate']}, expected a positive number such as 1e-3")
    if not 0 <= options["warmup"] <= 1:
        problems.append(f"warmup={options['warmup']}, expected a share of the steps, 0 to 1")
    if (save_every or resume) and output is None:
        problems.append("save_every and resume need output, a folder that outlives the run")
    if not any(p.requires_grad for p in model.parameters()):
        problems.append("no parameter requires a gradient; add an adapter with peft.get_peft_model(model, config)")
    if len(train) == 0:  # type: ignore[arg-type]
        problems.append("the training set is empty")
    if problems:
        raise TrainingError("The run can't start: " + "; ".join(problems) + ".")


def _evaluate(trainer: Trainer, model: torch.nn.Module, evaluate: Any) -> Mapping[str, Any]:
    if evaluate is None:
        return {}
    if isinstance(evaluate, Dataset):
        return {"loss": float(trainer.evaluate()["eval_loss"])}
    with torch.no_grad():
        return evaluate(model)


def _elements(parameter: torch.nn.Parameter) -> int:
    """Weights in a parameter; a 4-bit one holds two in each stored byte."""
    state = getattr(parameter, "quant_state", None)
    return math.prod(state.shape) if state is not None else parameter.numel()
