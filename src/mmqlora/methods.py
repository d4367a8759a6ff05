"""Every way of fine-tuning that the book compares, behind one function::

    model = adapt(model, "dora", quant_type="nf4", rank=8)

Each method is PEFT's own where PEFT has it, with PEFT's names for its settings. Two are put together from PEFT's
parts: ``head`` trains a copy of the output projection, and ``adapter`` bottlenecks that this file inserts. Methods
that change weight matrices go on all Linears of all regions, without the output head, so that they differ in how they
adapt and not in where.

A frozen weight W is adapted to::

    lora     Wx + s·BAx                 A (R, d_in), B (d_out, R) = 0        dora, rslora, eva, pissa: variants of it
    adalora  Wx + s·P diag(λ) Qx        λ = 0 at the start; the least important λ are pruned during training
    vera     Wx + b ⊙ B(d ⊙ Ax)         A and B random, frozen and shared by all layers; b = 0 and d are trained
    ia3      l ⊙ Wx, or W(l ⊙ x)        l = 1
    oft      WRx                        R a block-diagonal rotation, the identity at the start; boft: a product of such
    adapter  h + U relu(Dh), h = Wx     after the last Linear of every block; D (R, d_out), U (d_out, R) = 0
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import dataclass, field, fields
from functools import partial
from types import MappingProxyType
from typing import Any

import bitsandbytes as bnb
import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer, cast_adapter_dtype
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from .errors import MethodError
from .quantization import quantize
from .regions import regions
from .training import _elements

QUANTIZED = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)


@dataclass(frozen=True)
class Method:
    """One entry of `METHODS`.

    Args:
        description: what it trains, in a line.
        arxiv: identifier of the paper on arXiv; empty for what has none.
        config: PEFT's configuration, or None where no adapter is added.
        rank: what the argument ``rank`` of `adapt` sets, by PEFT's name; empty where a method has no size.
        default_rank: the rank if none is given.
        alpha: ``lora_alpha`` as a multiple of the rank; 0 where there is none.
        settings: what differs from PEFT's defaults.
        nf4: whether it works on a 4-bit base.
        identity: whether the adapted model starts as the base model. Virtual tokens don't.
        targets: "linears", "norms", "head", "blocks" (the last Linear of every block), or empty.
    """

    description: str
    arxiv: str = ""
    config: type[peft.PeftConfig] | None = None
    rank: str = ""
    default_rank: int = 8
    alpha: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    nf4: bool = True
    identity: bool = True
    targets: str = "linears"


_lora = partial(Method, config=peft.LoraConfig, rank="r", alpha=2)
_eva = {"init_lora_weights": "eva", "eva_config": peft.EvaConfig()}
_virtual = partial(
    Method,
    rank="num_virtual_tokens",
    default_rank=16,
    settings={"task_type": "CAUSAL_LM"},
    identity=False,
    targets="",
)

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "none": Method("nothing; the base model as it is", targets=""),
        "full": Method("all parameters", nf4=False, targets=""),
        "head": Method("a copy of the output head", "", peft.LoraConfig, targets="head"),
        "lora": _lora("a low-rank update of every weight", "2106.09685"),
        "rslora": _lora("LoRA scaled by 1/√rank", "2312.03732", settings={"use_rslora": True}),
        "dora": _lora("LoRA for directions, and a magnitude per output", "2402.09353", settings={"use_dora": True}),
        "adalora": _lora("LoRA, ranks pruned in training", "2303.10512", config=peft.AdaLoraConfig, rank="target_r"),
        "eva": _lora("LoRA from the SVD of activations", "2410.07170", settings=_eva),
        "pissa": _lora("LoRA from the SVD of weights", "2404.02948", settings={"init_lora_weights": "pissa"}, alpha=1),
        "ia3": Method("a factor per activation", "2205.05638", peft.IA3Config),
        "vera": Method("factors around shared random matrices", "2310.11454", peft.VeraConfig, "r", 256),
        "oft": Method("rotations of inputs, in blocks", "2306.07280", peft.OFTConfig, "oft_block_size", 32),
        "boft": Method("rotations of inputs, in butterflies", "2311.06243", peft.BOFTConfig, "boft_block_size", 4),
        "adapter": Method("a bottleneck in every block", "2005.00052", peft.LoraConfig, "rank", targets="blocks"),
        "ln-tuning": Method("the norms", "2312.11420", peft.LNTuningConfig, targets="norms"),
        "prefix": _virtual("virtual keys and values in every layer", "2101.00190", peft.PrefixTuningConfig),
        "prompt": _virtual("virtual tokens before the input", "2104.08691", peft.PromptTuningConfig),
        "p-tuning": _virtual("virtual tokens from a small network", "2103.10385", peft.PromptEncoderConfig),
    }
)
"""All methods by name: ``pd.DataFrame(vars(m) | {"name": n} for n, m in METHODS.items())`` is the table.

:meta hide-value:
"""


def adapt(
    model: PreTrainedModel,
    method: str,
    *,
    quant_type: str | None = None,
    rank: int | None = None,
    batches: Iterable[Mapping[str, Any]] | None = None,
    seed: int = 0,
    steps: int | None = None,
    **settings: Any,
) -> nn.Module:
    """Make a model ready for fine-tuning by one method: what the method trains requires a gradient, the rest does not.

    Example:
        >>> model, _ = mm.load("openai/whisper-tiny.en", quant_type=None)  # doctest: +SKIP
        >>> model = mm.adapt(model, "lora", quant_type="nf4", rank=8)  # doctest: +SKIP
        >>> mm.fine_tune(model, train, callbacks=callbacks(model))  # doctest: +SKIP
        >>> model.save_pretrained("adapter")  # doctest: +SKIP

    The model is changed in place. With `quant_type` the base is quantized by `quantize` before the adapters come,
    only ``pissa`` splits the weights first and quantizes what is left of them. New parameters are float32, whatever the
    base is; copies of the base's own (``head``, ``ln-tuning``) keep its type.

    All but ``none`` and ``full`` give a `peft.PeftModel`, which ``PeftModel.from_pretrained(base, folder)`` reloads on
    a base that is prepared the same way. Where the base itself was changed (``adapter``; ``pissa`` on 4 bits) that is
    ``adapt(base, ...)`` with the same arguments, then ``model.load_adapter(folder, "default")``.

    Worth knowing:

    - ``full``: parameters that come frozen while others don't, such as Whisper's fixed positions, stay frozen.
    - ``head``: the output embedding; of a dual encoder or a classifier, the Linears right below the model. PEFT trains
      a copy, so that a head tied to the input embeddings is untied, and those stay as they are.
    - ``adalora``: needs `steps`, and in the training loop `callbacks`. While training, the loss has the orthogonality
      term in it; in evaluation mode it has not.
    - ``ia3``: factors on outputs, and on inputs where a layer narrows (the second layer of a feed-forward). That is the
      paper's placement and the other Linears besides.
    - ``prefix``, ``prompt``, ``p-tuning``: decoder-only models only; `why_not` says why. ``prefix`` refuses gradient
      checkpointing.

    Args:
        model: a model of transformers without adapters, in 16 or 32 bits, or quantized already.
        method: a name in `METHODS`.
        quant_type: None to leave the weights as they are, "nf4" or "fp4" to quantize them.
        rank: the size of the method: rank (``adalora``: the mean at the end, and it starts at 1.5 times that), block
            size of ``oft`` and ``boft``, width of ``adapter``'s bottlenecks, number of virtual tokens. None takes the
            method's default, 8 for most.
        batches: for ``eva`` only: batches of model inputs, each with at least twice as many rows as `rank` in every
            Linear; the projections of a dual encoder see one row per item.
        seed: seed of the adapters' initialization. The global generator is left as it was.
        steps: for ``adalora`` only: optimizer steps of the run, over which ranks are pruned.
        settings: more settings by PEFT's names, such as ``lora_alpha``, ``lora_dropout``, ``target_modules``.

    Returns:
        A `peft.PeftModel` around the model, or the model itself for ``none`` and ``full``.

    Raises:
        MethodError: the method is unknown, does not fit the model or the bits, lacks `steps` or `batches`, or a
            setting or a target is unknown. The message says what would fit.

    Source:
        the paper of each method: ``METHODS[method].arxiv``.
    """
    if reason := why_not(model, method, quant_type):
        raise MethodError(f"{method} does not fit this {type(model).__name__}: {reason}.")
    entry = METHODS[method]
    rank = _rank(entry, method, rank)
    if method == "adalora" and not steps:
        raise MethodError(f"adalora prunes over a run, so it needs its length; got steps={steps!r}, try steps=100.")
    if method == "eva" and not (batches := list(batches or ())):
        raise MethodError("eva reads activations, so it needs batches of model inputs; got none, a few would do.")
    targets = _targets(model, entry)
    config = _config(model, method, rank, targets, steps, settings)
    # A dual encoder's projections would be quantized, and 4-bit weights can't be trained.
    kept = [f"^{name.replace('.', '[.]')}$" for name in targets] if entry.targets == "head" else ()
    if quant_type and method != "pissa":
        quantize(model, quant_type, exclude=kept)
    if config is None:
        return _trainable(model, everything=method == "full")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if method == "adapter":
            _insert_bottlenecks(model, targets, rank)
        adapted = _wrap(model, method, config, set() if "target_modules" in settings else set(targets))
        if method == "pissa" and quant_type:
            adapted = _quantized_rest(adapted, quant_type)
        elif method == "eva":
            _initialize_eva(adapted, batches)
        elif method == "adalora":
            hook = partial(_add_orthogonality, config.orth_reg_weight)
            adapted.get_base_model().register_forward_hook(hook)
    return adapted


def why_not(model: PreTrainedModel, method: str, quant_type: str | None = None) -> str:
    """Say why a method does not fit a model.

    Example:
        >>> why_not(whisper, "prefix")  # doctest: +SKIP
        'PEFT puts virtual tokens before input_ids, and this model starts from input_features'
        >>> [name for name in METHODS if not why_not(model, name, "nf4")]  # doctest: +SKIP

    Args:
        model: a model of transformers.
        method: a name in `METHODS`.
        quant_type: as in `adapt`.

    Returns:
        The reason, empty if the method fits.

    Raises:
        MethodError: `method` is unknown.
    """
    if method not in METHODS:
        near = difflib.get_close_matches(method, METHODS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise MethodError(f"method={method!r} is unknown; use one of {', '.join(METHODS)}{hint}")
    entry = METHODS[method]
    quantized = any(isinstance(module, QUANTIZED) for module in model.modules())
    fits = ", ".join(name for name, other in METHODS.items() if other.nf4)
    if quant_type not in (None, "nf4", "fp4"):
        return f"quant_type={quant_type!r} is none of None, 'nf4', 'fp4'"
    if isinstance(model, peft.PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        return "it has adapters already; start from the base model"
    if quant_type and quantized:
        return "it is quantized already; leave quant_type out"
    if quantized and method == "pissa":
        return "it splits weights in 16 or 32 bits; load the model with quant_type=None and give quant_type to adapt"
    if (quant_type or quantized) and not entry.nf4:
        return f"quantized weights can't be trained; on a quantized base use one of {fits}"
    if entry.targets == "head":
        head = [model.get_submodule(name) for name in _head(model)]
        if not head or any(isinstance(module, QUANTIZED) for module in head):
            return "it has neither an output embedding nor projections of its own, in 16 or 32 bits"
    if entry.targets == "blocks" and not _block_ends(model):
        return "it has no list of blocks with Linears in them"
    return _why_no_virtual_tokens(model, method) if entry.rank == "num_virtual_tokens" else ""


def callbacks(model: nn.Module) -> list[TrainerCallback]:
    """Return what a method has to do during training, for ``fine_tune(..., callbacks=...)`` or a `Trainer`.

    Example:
        >>> model = mm.adapt(model, "adalora", steps=100)  # doctest: +SKIP
        >>> mm.fine_tune(model, train, steps=100, callbacks=callbacks(model))  # doctest: +SKIP

    Args:
        model: a model from `adapt`.

    Returns:
        For ``adalora`` the callback that prunes ranks after every optimizer step; else nothing.

    Source:
        Zhang et al., AdaLoRA (arXiv 2303.10512), algorithm 1.
    """
    return [_Prune(model)] if isinstance(getattr(model, "base_model", None), peft.AdaLoraModel) else []


def trainable(model: nn.Module) -> dict[str, float]:
    """Count what is trained.

    Example:
        >>> trainable(Bottleneck(width=64, rank=8))
        {'trainable': 1096, 'total': 1096, 'percent': 100.0}

    Args:
        model: any model, such as one from `adapt`.

    Returns:
        ``trainable`` and ``total`` parameters, values and not bytes: a stored byte of 4-bit weights counts as two;
        ``percent`` is their ratio times 100. A tied parameter counts once. ``adalora`` counts as before pruning.
    """
    counts = [(parameter.requires_grad, _elements(parameter)) for parameter in model.parameters()]
    trained, total = sum(n for grad, n in counts if grad), sum(n for _, n in counts)
    return {"trainable": trained, "total": total, "percent": round(100 * trained / max(total, 1), 3)}


class Bottleneck(nn.Module):
    """Two Linears around a ReLU, with a skip: h + U relu(D h). It starts as the identity, as U is zero.

    Example:
        >>> Bottleneck(width=64, rank=8)(torch.ones(2, 64)).equal(torch.ones(2, 64))
        True

    Args:
        width: D, the features of the input.
        rank: R, the features in between.

    Source:
        Houlsby et al. (arXiv 1902.00751); one per block, as Pfeiffer et al. (arXiv 2005.00052) place it.
    """

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank)
        self.up = nn.Linear(rank, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map (..., D) to (..., D), of the same type."""
        update = self.up(torch.relu(self.down(hidden.to(self.down.weight.dtype))))
        return hidden + update.to(hidden.dtype)


class _Prune(TrainerCallback):
    def __init__(self, model: peft.PeftModel) -> None:
        self.model = model

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        planned = self.model.active_peft_config.total_step
        if state.max_steps != planned:
            raise MethodError(
                f"adalora was adapted with steps={planned} and the run has {state.max_steps}; give both the same."
            )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # After the step, so that it can't move a pruned λ from zero again; gradients are still there.
        self.model.base_model.update_and_allocate(state.global_step + 1)


def _rank(entry: Method, method: str, rank: int | None) -> int:
    if rank is None:
        return entry.default_rank
    if not entry.rank:
        raise MethodError(f"{method} has no rank; got rank={rank}, leave it out.")
    if rank < 1:
        raise MethodError(f"rank={rank} for {method}; expected at least 1, such as {entry.default_rank}.")
    return rank


def _targets(model: PreTrainedModel, entry: Method) -> list[str]:
    """Full names of the modules that a method acts on."""
    if entry.targets == "linears":
        head = set(_head_of_tokens(model))
        return [name for name in regions(model) if name not in head]
    if entry.targets == "norms":
        return [n for n, m in model.named_modules() if "norm" in type(m).__name__.lower() and hasattr(m, "weight")]
    return _head(model) if entry.targets == "head" else _block_ends(model) if entry.targets == "blocks" else []


def _head_of_tokens(model: PreTrainedModel) -> list[str]:
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if module is head and head is not None]


def _head(model: PreTrainedModel) -> list[str]:
    """The output embedding, or the Linears right below the model: a dual encoder's projections, a classifier."""
    return _head_of_tokens(model) or [name for name, module in model.named_children() if isinstance(module, nn.Linear)]


def _block_ends(model: nn.Module) -> list[str]:
    """The last Linear of every block, which is its feed-forward's output; a block is an entry of a ModuleList."""
    ends: dict[str, str] = {}
    for parent, blocks in model.named_modules():
        if isinstance(blocks, nn.ModuleList):
            for number, block in blocks.named_children():
                inside = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
                if inside and inside[-1]:  # an entry that is a Linear itself is no block
                    ends[f"{parent}.{number}"] = f"{parent}.{number}.{inside[-1]}"
    # Of lists within lists (experts) only the outermost are blocks.
    return [end for block, end in ends.items() if not any(block.startswith(f"{other}.") for other in ends)]


def _config(
    model: PreTrainedModel, method: str, rank: int, targets: list[str], steps: int | None, settings: dict[str, Any]
) -> peft.PeftConfig | None:
    entry = METHODS[method]
    known = {f.name for f in fields(entry.config)} if entry.config else set()
    if entry.targets in ("head", "blocks"):
        known = set()  # their configuration is made up of nothing but the modules to train
    for name in settings.keys() - known:
        near = difflib.get_close_matches(name, known, n=3) or sorted(known)[:5]
        fits = f"its settings are PEFT's, such as {', '.join(near)}" if known else "it has none"
        raise MethodError(f"{method} has no setting {name!r}; {fits}.")
    if entry.config is None:
        return None
    if entry.targets in ("head", "blocks"):
        trained = [f"{name}.bottleneck" for name in targets] if entry.targets == "blocks" else targets
        return peft.LoraConfig(target_modules=DUMMY_TARGET_MODULES, modules_to_save=trained)
    values = dict(entry.settings)
    if entry.rank:
        values[entry.rank] = rank
    if entry.alpha:
        values["lora_alpha"] = entry.alpha * rank
    if targets:
        values["target_modules"] = targets
    if method == "adalora":
        # The first sixth of the run at the initial ranks, the last third at the final ones.
        values |= {"init_r": rank + (rank + 1) // 2, "total_step": steps, "tinit": steps // 6, "tfinal": steps // 3}
    if method == "ia3":
        narrow = {row.name for row in regions(model).rows if row.shape[0] < row.shape[1]}
        values["feedforward_modules"] = [name for name in settings.get("target_modules", targets) if name in narrow]
    values |= settings
    if isinstance(values.get("target_modules"), list | set | tuple):
        _check_targets(model, method, values["target_modules"])
    try:
        return entry.config(**values)
    except (ValueError, TypeError) as error:
        raise MethodError(f"PEFT refuses the settings {settings or values} of {method}: {error}") from error


def _check_targets(model: nn.Module, method: str, targets: Iterable[str]) -> None:
    """PEFT passes over a target that matches nothing as long as another matches something."""
    names = [name for name, _ in model.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            ends = {part for name in names for part in (name, name.rpartition(".")[2])}
            near = difflib.get_close_matches(target, ends, n=3, cutoff=0.4) or _targets(model, METHODS[method])[:3]
            raise MethodError(f"target_modules: {target!r} matches no module of the model; what would: {near}.")


def _wrap(model: PreTrainedModel, method: str, config: peft.PeftConfig, expected: set[str]) -> peft.PeftModel:
    try:
        with warnings.catch_warnings():
            # Norms, which ln-tuning is for, and a way to load that models in memory can't take.
            warnings.filterwarnings("ignore", message="Unsupported layer type|lora with eva initialization")
            adapted = peft.get_peft_model(model, config)
    except (ValueError, TypeError) as error:
        raise MethodError(f"PEFT can't put {method} on this {type(model).__name__}: {error}") from error
    if METHODS[method].targets in ("linears", "norms") and expected:
        # PEFT reads names as suffixes, so that one might reach further than it says.
        layers = adapted.get_base_model().named_modules()
        wrong = expected ^ {name for name, module in layers if isinstance(module, BaseTunerLayer)}
        if wrong:
            raise MethodError(
                f"PEFT put {method} on other modules than asked, such as {min(wrong)}; give target_modules a pattern."
            )
    if method == "adapter":
        # A base without bottlenecks has no such modules: PEFT refuses to load onto it, and would else do so silently.
        config.target_modules = set(config.modules_to_save)
    return adapted


def _trainable(model: nn.Module, everything: bool) -> nn.Module:
    if everything and any(parameter.requires_grad for parameter in model.parameters()):
        return model  # what is frozen in a model that isn't is meant to be: Whisper's sinusoids
    return model.requires_grad_(everything)


def _insert_bottlenecks(model: nn.Module, names: list[str], rank: int) -> None:
    for name in names:
        linear = model.get_submodule(name)
        linear.bottleneck = Bottleneck(linear.out_features, rank).to(linear.weight.device)
        linear.register_forward_hook(_through_bottleneck)


def _through_bottleneck(linear: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
    return linear.bottleneck(output)


def _quantized_rest(adapted: peft.PeftModel, quant_type: str) -> peft.PeftModel:
    """Quantize what PiSSA left of the weights: take the adapter off, quantize, and put it on again."""
    config, state = adapted.active_peft_config, peft.get_peft_model_state_dict(adapted)
    base = adapted.unload()
    quantize(base, quant_type)
    plain = copy(config)
    plain.init_lora_weights = True
    adapted = peft.get_peft_model(base, plain)
    peft.set_peft_model_state_dict(adapted, state)
    # Saved with it, so that PEFT refuses to load the adapter onto 4-bit weights that were never split.
    plain.init_lora_weights = config.init_lora_weights
    return adapted


def _initialize_eva(adapted: peft.PeftModel, batches: list[Mapping[str, Any]]) -> None:
    config, device = adapted.active_peft_config, next(adapted.parameters()).device
    # PEFT looks ranks up by the names that its wrapper gives, which a pattern for the start of a name doesn't match.
    for name in ("rank_pattern", "alpha_pattern"):
        found = getattr(config, name).items()
        setattr(config, name, {re.sub(r"^\^", r"base_model\\.model\\.", key): value for key, value in found})
    # PEFT moves tensors, and warns of flags such as return_loss.
    tensors = [{k: v.to(device) for k, v in batch.items() if isinstance(v, torch.Tensor)} for batch in batches]
    flags = {k: v for k, v in batches[0].items() if not isinstance(v, torch.Tensor)}
    highest = max([config.r, *config.rank_pattern.values()])
    _check_rows(adapted, tensors[0] | flags, needed=round(highest * config.eva_config.rho))
    peft.initialize_lora_eva_weights(
        adapted,
        tensors,
        forward_fn=lambda model, inputs: model(**inputs, **flags),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=_rows,
        show_progress_bar=False,
    )
    cast_adapter_dtype(adapted, adapted.active_adapter)  # layers whose rank changed were made anew, in the base's type


def _rows(layer_input: Any, model_input: Any = None, layer_name: str = "") -> torch.Tensor:
    """(N, D) from what a Linear was called with, a tuple of a (..., D)."""
    return layer_input[0].reshape(-1, layer_input[0].shape[-1]).contiguous()


def _check_rows(adapted: peft.PeftModel, batch: Mapping[str, Any], needed: int) -> None:
    """PEFT's EVA waits for ever for a layer with fewer rows than components, and fails at one that is never called."""
    layers = {n: m for n, m in adapted.get_base_model().named_modules() if isinstance(m, BaseTunerLayer)}
    seen: dict[str, int] = dict.fromkeys(layers, 0)

    def note(name: str, module: nn.Module, args: tuple) -> None:
        seen[name] = max(seen[name], len(_rows(args)))

    handles = [module.register_forward_pre_hook(partial(note, name)) for name, module in layers.items()]
    try:
        with torch.no_grad():
            adapted(**batch)
    finally:
        for handle in handles:
            handle.remove()
    few = {name: rows for name, rows in seen.items() if rows < needed}
    if few:
        name, rows = min(few.items(), key=lambda item: item[1])
        raise MethodError(
            f"eva needs {needed} rows (twice the rank) in every Linear; {name} has {rows} in the first batch, and "
            f"{len(few) - 1} others have too few. Use larger batches, a lower rank, or target_modules without them."
        )


def _add_orthogonality(weight: float, base: nn.Module, args: tuple, output: Any) -> Any:
    """Add AdaLoRA's regularization to a training loss; PEFT does so for some task types only."""
    if base.training and getattr(output, "loss", None) is not None:
        terms = []
        for name, parameter in base.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                p = parameter if "lora_A" in name else parameter.T
                terms.append(torch.linalg.norm(p @ p.T - torch.eye(len(p), device=p.device)))
        output["loss"] = output["loss"] + weight * torch.stack(terms).mean()
    return output


def _why_no_virtual_tokens(model: PreTrainedModel, method: str) -> str:
    if model.main_input_name != "input_ids":
        return f"PEFT puts virtual tokens before input_ids, and this model starts from {model.main_input_name}"
    if not model.can_generate() or getattr(model.config, "is_encoder_decoder", False):
        return "PEFT needs a decoder-only language model for virtual tokens; this one has none"
    if method != "prefix":
        # PEFT takes the first parameter with as many rows as the vocabulary for the word embeddings.
        backbone = next((child for child in model.children() if isinstance(child, PreTrainedModel)), model)
        rows = model.config.get_text_config().vocab_size
        taken = next((item for item in backbone.named_parameters() if item[1].shape[:1] == (rows,)), ("nothing", None))
        if taken[1] is not model.get_input_embeddings().weight:
            return (
                f"PEFT would take {taken[0]} for the word embeddings, as it has {rows} rows like the vocabulary; "
                "use prefix, or another vocabulary size"
            )
    return ""
