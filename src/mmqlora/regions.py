"""The parts of a multimodal model: which Linear is vision, audio, fusion or text.

The rule, which runs nothing and reads no weights:

1.  A model is made of models, and each says what it eats: by transformers' ``input_modalities`` or
    ``main_input_name``, or by a token embedding. One that eats a single thing is a **tower**, and all that is in it is
    ``vision``, ``audio`` or ``text``.
2.  What lies between towers and is named like a joint (projector, connector, Q-Former, ...) is ``fusion``, and so is
    the cross attention by which a text decoder reads another tower. The output embedding is ``text``.
3.  `EXCEPTIONS` holds the few places where that is not what a person would say. Whatever is still without a region
    is an error that shows the override to type, never a guess.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import pandas as pd
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .errors import RegionError

REGIONS = ("vision", "audio", "fusion", "text")

# What `input_modalities` and `main_input_name` may say. The latter is matched from its start: `pixel_values_videos`.
EATS = {"image": "vision", "video": "vision", "audio": "audio", "text": "text"}
EATS_INPUT = {"pixel_values": "vision", "input_features": "audio", "input_values": "audio", "input_ids": "text"}
# Read only where that does not settle it: Gemma 4's and Qwen2.5-VL's towers repeat what their whole family eats.
CALLED = {"vision": r"vision|image|video", "audio": r"audio|speech", "text": r"text"}

JOINT = re.compile(r"project(or|ion)|connector|resampler|q_?former|aligner|adapt[eo]r", re.I)
JOINT_CLASS = re.compile(rf"{JOINT.pattern}|modalembedder|contrastivehead", re.I)
CROSS_ATTENTION = re.compile(r"encoder_attn|cross_?attn|cross_?attention|encoder_decoder_attention", re.I)

# "Class of the owner.attribute" -> region, where the rule has no answer, or another one than a person's.
EXCEPTIONS = {
    # Qwen-VL and its kin keep the projector inside the vision tower, Qwen-Omni another inside the audio tower.
    r"\w+\.(deepstack_)?merger(_list)?": "fusion",
    r"Qwen\w+AudioEncoder\.proj[12]?": "fusion",
    # Attention over frames, and frames that rewrite the text's features.
    r"XCLIPModel\.(mit|prompts_generator)": "fusion",
    # A transformer over audio and video side by side.
    r"PeAudioVideoEncoder\.(embedder|layers|output)": "fusion",
    # The language model is no model of its own, but lies in the open beside the vision tower.
    r"GitModel\.encoder": "text",
    # Encoder and decoder declare what their whole family eats.
    r"Speech2TextModel\.encoder": "audio",
    r"Speech2TextModel\.decoder|SpeechT5DecoderWithTextPrenet\.wrapped_decoder": "text",
}


class Row(NamedTuple):
    """One Linear: its full name, its region, (outputs, inputs), parameters with the bias, bits per weight, bytes.

    The bytes are those of weight and bias, without the scales that quantization adds.
    """

    name: str
    region: str
    shape: tuple[int, int]
    parameters: int
    bits: int
    bytes: int


class Regions(Mapping[str, str]):
    """The table that `regions` returns: a mapping from module name to region that prints as a table.

    Example:
        >>> parts = mm.regions(model)  # doctest: +SKIP
        >>> parts["model.vision_tower.encoder.layers.0.mlp.fc1"]  # doctest: +SKIP
        'vision'
        >>> parts.of("fusion")  # doctest: +SKIP
        ['model.multi_modal_projector.linear_1', 'model.multi_modal_projector.linear_2']
        >>> LoraConfig(target_modules=parts.pattern("vision", "fusion"))  # doctest: +SKIP

    Attributes:
        rows: one `Row` per Linear, in the model's order; ``pd.DataFrame(parts.rows)`` is the full table.
    """

    def __init__(self, rows: list[Row], other_names: frozenset[str] = frozenset()) -> None:
        """Take the rows, and the names of all modules that are not Linears, which a pattern must not match."""
        self.rows = rows
        self._regions = {row.name: row.region for row in rows}
        self._other_names = other_names

    def __getitem__(self, name: str) -> str:
        """Return the region of one module, by its full name without PEFT's prefixes."""
        return self._regions[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over module names in the model's order."""
        return iter(self._regions)

    def __len__(self) -> int:
        """Return the number of Linears."""
        return len(self._regions)

    def of(self, *names: str) -> list[str]:
        """Return the modules of one region or of several.

        Example:
            >>> parts.of("audio")  # doctest: +SKIP

        Args:
            names: one or more of ``"vision"``, ``"audio"``, ``"fusion"``, ``"text"``.

        Returns:
            Full module names in the model's order; empty where the model has no such region.

        Raises:
            RegionError: a name that is no region.
        """
        for name in names:
            _check_region(name)
        return [module for module, region in self.items() if region in names]

    def pattern(self, *names: str) -> str:
        """Return a regular expression that matches exactly the modules of some regions, for ``target_modules``.

        Example:
            >>> LoraConfig(target_modules=parts.pattern("audio"), exclude_modules="lm_head")  # doctest: +SKIP

        A list of names would not do: PEFT reads those as suffixes, so that ``encoder.layers.0.fc1`` also adapts
        ``decoder.encoder.layers.0.fc1``. The output embedding is part of ``"text"``; exclude it where it is tied.
        Models of experts (such as Qwen3-Omni) are the other way round: there PEFT 0.21 keeps only the last part of the
        names that a pattern matches, and adapts other regions too. Give it the list, ``parts.of("audio")``.

        Args:
            names: one or more regions.

        Returns:
            An expression for `re.fullmatch`, as PEFT uses it, with layer numbers written as ``\\d+`` where they can be.

        Raises:
            RegionError: a name that is no region, or regions without a single module.
        """
        wanted = self.of(*names)
        if not wanted:
            there = ", ".join(region for region in REGIONS if region in self._regions.values())
            raise RegionError(
                f"No module is {' or '.join(names) or 'asked for'}; this model has: {there or 'nothing'}."
            )
        return exact_pattern(wanted, (self.keys() - set(wanted)) | self._other_names)

    def summary(self) -> pd.DataFrame:
        """Return the table by region.

        Example:
            >>> mm.regions(model).summary()  # doctest: +SKIP
                    modules  parameters     bytes bits  share
            region
            vision       72    84934656  42467328    4   0.19
            fusion        1    11796480  23592960   16   0.03
            text        225   354418688 177209344    4   0.78

        Returns:
            One line per region that the model has: the number of Linears, their parameters and bytes, the bits per
            weight (``4/16`` where a region has both), and the share of all these parameters.
        """
        table = pd.DataFrame(self.rows, columns=Row._fields)
        table = table.groupby("region").agg(
            modules=("name", "size"),
            parameters=("parameters", "sum"),
            bytes=("bytes", "sum"),
            bits=("bits", lambda bits: "/".join(map(str, sorted(set(bits))))),
        )
        table["share"] = table["parameters"] / table["parameters"].sum()
        return table.loc[[region for region in REGIONS if region in table.index]]

    def __str__(self) -> str:
        """Return the summary as text."""
        return self.summary().to_string(float_format="{:.2f}".format)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self.summary().to_html(float_format="{:.2f}".format)


def regions(model: nn.Module, overrides: Mapping[str, str] | None = None) -> Regions:
    """Say which Linear of a model is vision, audio, fusion or text.

    Example:
        >>> import mmqlora as mm
        >>> from transformers import AutoModel, LlavaConfig
        >>> mm.regions(model)  # doctest: +SKIP
        >>> mm.regions(model, overrides={r"my_tower\\..*": "vision"})  # doctest: +SKIP

    It works the same on the meta device, on a quantized model and on one that PEFT has wrapped. Convolutions,
    embeddings and experts that are kept as one stacked parameter are no Linears and are not listed.

    What is a matter of taste: the projections after the two towers of a dual encoder (CLIP's ``visual_projection`` and
    ``text_projection``) are fusion, unless the model has one tower only; a classifier on a single tower belongs to it.

    Args:
        model: any model of transformers, or a module made of some.
        overrides: regular expression -> region. It must match whole names of Linears (without PEFT's
            ``base_model.model.``) and wins over the rule; of two that match, the later one wins.

    Returns:
        A `Regions` table with every `torch.nn.Linear` and every `Conv1D` of transformers (as in GPT-2) in it.

    Raises:
        RegionError: Linears without a region, with the override to type; an override that matches nothing.
    """
    if hasattr(model, "get_base_model"):  # a PeftModel
        model = model.get_base_model()
    found = list(_walk(model, "", _only(_eats(model)), heads=_heads(model), seen=set()))
    linears = {name: module for name, module, _ in found if isinstance(module, nn.Linear | Conv1D)}
    placed = {name: region for name, _, region in found if name in linears}
    for pattern, region in (overrides or {}).items():
        _check_region(region)
        matched = [name for name in linears if _match(pattern, name)]
        if not matched:
            raise RegionError(_unmatched(pattern, list(linears)))
        placed.update(dict.fromkeys(matched, region))
    if None in placed.values():
        raise RegionError(_unplaced(model, placed))
    rows = [_row(name, placed[name], linear) for name, linear in linears.items()]
    return Regions(rows, frozenset(name for name, _, _ in found if name not in linears))


def exact_pattern(names: Iterable[str], others: Iterable[str]) -> str:
    """Return a regular expression for `re.fullmatch` that matches all of some names and none of others.

    Example:
        >>> print(exact_pattern(["layers.0.fc", "layers.1.fc"], ["layers.0.norm", "head"]))
        layers\\.\\d+\\.fc

    Args:
        names: what it matches; layer numbers are written as ``\\d+`` where that matches no other name.
        others: what it must not match.
    """
    elsewhere = {_any_number(name) for name in others}
    choices = ((_any_number(name), re.escape(name)) for name in names)
    return "|".join(dict.fromkeys(exact if general in elsewhere else general for general, exact in choices))


def _walk(
    module: nn.Module, name: str, region: str | None, heads: set[int], seen: set[int], reads: bool = False
) -> Iterator[tuple[str, nn.Module, str | None]]:
    """Yield (name, module, region) of a module whose region is known, then decide about what is below it.

    `reads` says that we are in a text decoder that has no encoder of its own: its cross attention reads another tower.
    """
    if id(module) in seen:  # one module in two places is listed once, as `named_modules` does
        return
    seen.add(id(module))
    yield name, module, region
    between = region == "fusion" or (region is None and (not name or isinstance(module, PreTrainedModel)))
    for attribute, child in module.named_children():
        child, below, child_reads = _unwrap(child), region, reads
        eats = _eats(child)
        if id(child) in heads:
            below = "text"
        elif exception := _exception(f"{type(module).__name__}.{attribute}"):
            below = exception
        elif between and (JOINT.search(attribute) or (not eats and JOINT_CLASS.search(type(child).__name__))):
            below = "fusion"
        elif eats:
            below = _only(eats)
        elif reads and region == "text" and CROSS_ATTENTION.search(attribute):
            below = "fusion"
        if region is None and below == "text":
            child_reads = not _has_encoder(child)
        yield from _walk(child, f"{name}.{attribute}".strip("."), below, heads, seen, child_reads)


def _eats(module: nn.Module) -> set[str]:
    """Return the regions that a model and the models in it are made for; empty where nothing says so."""
    if not isinstance(module, PreTrainedModel):
        return set()
    inner = set().union(*(_eats(model) for model in _inner_models(module)))
    # A language model is not always a model of its own (GIT): the token embedding gives it away.
    tokens = {"text"} if _embeds_tokens(module) else set()
    eats = inner | tokens | _declared(type(module))
    if len(eats) == 1 or len(inner) > 1:
        return eats
    called = f"{type(module).__name__} {type(module.config).__name__}"
    hints = {region for region, words in CALLED.items() if re.search(words, called, re.I)}
    return hints if len(hints) == 1 and inner | tokens <= hints else eats


def _declared(model_class: type) -> set[str]:
    """Return what the nearest class that says anything says; `PreTrainedModel` itself says "text" for everybody."""
    for family in model_class.__mro__[: model_class.__mro__.index(PreTrainedModel)]:
        modalities = vars(family).get("input_modalities", ())
        modalities = (modalities,) if isinstance(modalities, str) else modalities
        main = vars(family).get("main_input_name", "")
        said = {EATS[modality] for modality in modalities if modality in EATS}
        said = said or {region for prefix, region in EATS_INPUT.items() if main.startswith(prefix)}
        if said:
            return said
    return set()


def _inner_models(module: nn.Module) -> Iterator[PreTrainedModel]:
    """Yield the models right below a module, not the models in those."""
    for child in map(_unwrap, module.children()):
        if isinstance(child, PreTrainedModel):
            yield child
        else:
            yield from _inner_models(child)


def _embeds_tokens(model: PreTrainedModel) -> bool:
    try:
        return isinstance(_unwrap(model.get_input_embeddings()), nn.Embedding)
    except (NotImplementedError, AttributeError):  # transformers' way to say that there is none
        return False


def _has_encoder(model: nn.Module) -> bool:
    return any(
        isinstance(module, PreTrainedModel) and name.endswith("encoder") for name, module in model.named_modules()
    )


def _heads(model: nn.Module) -> set[int]:
    """Return the ids of all output embeddings."""
    heads = set()
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            # Speech recognizers with a CTC head do not call it an output embedding.
            for head in (module.get_output_embeddings(), getattr(module, "lm_head", None)):
                if head is not None:
                    heads.add(id(_unwrap(head)))
    return heads


def _exception(place: str) -> str | None:
    return next((region for pattern, region in EXCEPTIONS.items() if re.fullmatch(pattern, place)), None)


def _only(eats: set[str]) -> str | None:
    return next(iter(eats)) if len(eats) == 1 else None


def _unwrap(module: nn.Module | None) -> nn.Module | None:
    """Return the module that PEFT's wrappers (of any adapter, or of modules to save) stand for."""
    for attribute in ("base_layer", "original_module"):
        if isinstance(getattr(module, attribute, None), nn.Module):
            return _unwrap(getattr(module, attribute))
    return module


def _row(name: str, region: str, linear: nn.Module) -> Row:
    if isinstance(linear, Conv1D):
        inputs, outputs = linear.weight.shape
    else:
        # Not the weight's shape: bitsandbytes packs it.
        outputs, inputs = linear.out_features, linear.in_features
    # By name, so that models without any such layer need no bitsandbytes.
    classes = {family.__name__ for family in type(linear).__mro__}
    bits = 4 if "Linear4bit" in classes else 8 if "Linear8bitLt" in classes else linear.weight.dtype.itemsize * 8
    bias = linear.bias
    return Row(
        name=name,
        region=region,
        shape=(outputs, inputs),
        parameters=inputs * outputs + (bias.numel() if bias is not None else 0),
        bits=bits,
        bytes=inputs * outputs * bits // 8 + (bias.numel() * bias.element_size() if bias is not None else 0),
    )


def _any_number(name: str) -> str:
    return r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in name.split("."))


def _check_region(region: str) -> None:
    if region not in REGIONS:
        raise RegionError(f"{region!r} is no region; a region is one of {', '.join(map(repr, REGIONS))}.")


def _match(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise RegionError(f"The override {pattern!r} is no regular expression: {error}.") from None


def _unmatched(pattern: str, names: list[str]) -> str:
    near = [name for name in names if re.search(pattern, name)]
    near = near or difflib.get_close_matches(re.sub(r"\\(.)", r"\1", pattern), names, n=3, cutoff=0.3)
    return (
        f"The override {pattern!r} matches none of the {len(names)} Linears. A pattern must match a whole name, such "
        f"as {', '.join(map(repr, near[:3] or names[:3]))}."
    )


def _unplaced(model: nn.Module, placed: Mapping[str, str | None], limit: int = 12) -> str:
    """Write the error for Linears without a region, by the highest modules that hold nothing else."""
    # Every prefix of a placed name, and the root: what a group must not swallow.
    taken = {""} | {p for name, region in placed.items() if region is not None for p in _prefixes(name)}
    groups: dict[str, list[str]] = {}
    for name, region in placed.items():
        if region is None:
            groups.setdefault(next((p for p in _prefixes(name) if p not in taken), name), []).append(name)
    lines, overrides = [], []
    for prefix, names in list(groups.items())[:limit]:
        lines.append(f"    {prefix}  ({len(names)}, such as {names[0]})")
        below = "" if names == [prefix] else r"\..*"
        overrides.append(f'r"{re.escape(prefix)}{below}": "fusion"')
    more = f"\n    and {len(groups) - limit} more" if len(groups) > limit else ""
    total = sum(map(len, groups.values()))
    return (
        f"This {type(model).__name__} does not say where {total} of its {len(placed)} Linears belong:\n"
        + "\n".join(lines)
        + more
        + "\nSay so, with vision, audio, fusion or text for each, as in:\n"
        + f"    mm.regions(model, overrides={{{', '.join(overrides)}}})"
    )


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]
