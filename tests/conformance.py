"""What temporal LoRA has to hold on every architecture: behind `test_conformance.py` and the book's table.

    cd tests && python conformance.py            # all of them, into book/records/conformance.jsonl

Each property is a function from the name of an architecture to None, or a few words on why it does not apply; it fails
by an AssertionError.
"""

from __future__ import annotations

import copy
import math
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from architectures import ARCHITECTURES, AUDIO, IMAGE, VIDEO
from batches import BATCHES, GENERATIVE, MIXED, UNEQUAL, Batch, batch, generate_inputs
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora import LoraLayer
from torch import nn

import mmqlora as mm
from mmqlora.errors import GateError
from mmqlora.gates import PARTS, TemporalLoraConfig
from mmqlora.records import append_record, make_record
from mmqlora.regions import regions
from mmqlora.timeline import Nothing, Tokens, timekeeper

# PEFT asks every model for its input embeddings, and this one has none to give; plain LoRA fails on it in the same way.
NOT_FOR_PEFT = ("PE-audio-video",)
NAMES = [name for name in BATCHES if name not in NOT_FOR_PEFT]
# What these get was mixed over time by an attention, without a path around it: noise tells nothing about their rows.
MIXED_BY_THEN = {"TimeSformer": [f"timesformer.encoder.layer.{n}.temporal_dense" for n in (0, 1)]}


def build(name: str, quantize: bool = True, **settings: Any) -> nn.Module:
    """A tiny model in 4 bits, without dropout."""
    model = ARCHITECTURES[name]()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for config in (model.config, *(getattr(model.config, name, None) for name in model.config.sub_configs)):
        for name, value in {"apply_spec_augment": False, "layerdrop": 0.0}.items():
            if hasattr(config, name):
                setattr(config, name, value)
    if quantize:
        mm.quantize(model, "nf4")
    return model


def linears(model: nn.Module) -> str:
    """A pattern of all Linears but the output head, which may be tied, and Gemma 3n's altup, which has to stay."""
    head = model.get_output_embeddings()
    left = [name for name, module in model.named_modules() if module is head or "altup" in name]
    return "|".join(re.escape(name) for name in regions(model) if name not in left)


def config(name: str, model: nn.Module, **settings: Any) -> TemporalLoraConfig:
    """Gates on all of them."""
    if name == "CLIP":
        settings["clip_frames"] = 4
    return TemporalLoraConfig(r=4, target_modules=linears(model), **settings)


def every_part(name: str) -> dict[str, Any]:
    """Settings of all that an adapter can do about time."""
    return {"hidden": True, "shift": True, "kernel": 0 if name == "GIT" else 3}  # GIT's tower sees a frame at a time


def adapted(name: str, moved: bool = False, quantize: bool = True) -> PeftModel:
    """The same with an adapter, at its start or moved by chance."""
    model = build(name, quantize)
    torch.manual_seed(0)
    model = get_peft_model(model, config(name, model)).eval()
    if moved:
        move(model)
    return model


def move(model: nn.Module, seed: int = 1, scale: float = 0.05) -> None:
    """Give every adapter weight a value by chance."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(scale * torch.randn(parameter.shape, generator=generator))


def inputs(name: str, long: bool = False) -> Batch:
    """The usual batch, or one of clips of eight frames where the architecture takes them."""
    try:
        return batch(name, sizes=(8, 8) if long else (4, 4))
    except ValueError:
        return batch(name)


def starts_at_the_base(name: str) -> str | None:
    """Loss and logits at the start are those of the 4-bit base, bit for bit."""
    model, given = build(name), inputs(name).inputs
    with torch.no_grad():
        base = model(**given)
        first = get_peft_model(model, config(name, model, **every_part(name))).eval()(**given)
    assert torch.equal(first.loss, base.loss)
    for key, value in base.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(first[key], value), key
    return None


def gates_get_gradients(name: str) -> str | None:
    """Every part of the gates of every layer of which a row that has a time reaches the loss; some in each region."""
    model = build(name)
    model = get_peft_model(model, config(name, model, **every_part(name))).eval()
    move(model)
    base, reached = model.get_base_model(), set()
    keeper, layers = timekeeper(base), {}
    for layer, module in base.named_modules():
        if (variant := getattr(module, "lora_variant", {}).get("default")) is not None:
            layers[layer] = module

            def look(module: nn.Module, args: Any, y: torch.Tensor, layer: str = layer, variant: Any = variant) -> None:
                place, x = keeper.clock.place(variant.rule, layer, args[0].shape), args[0].detach()
                timed = place.index is None or (place.index < place.level.steps).expand(x.shape[:-1])
                timed = timed & (x != 0).any(-1)  # of rows that are zero the gates see nothing

                def back(gradient: torch.Tensor) -> None:
                    if ((gradient != 0).any(-1) & timed).any():
                        reached.add(layer)

                y.register_hook(back)

            module.register_forward_hook(look)
    model(**inputs(name, long=True).inputs).loss.backward()
    for layer in reached:
        parts = [getattr(layers[layer], part)["default"] for part in PARTS if "default" in getattr(layers[layer], part)]
        assert parts and all(part.grad.any() for part in parts), layer
    region = regions(base)
    assert {region[layer] for layer in reached} == {region[layer] for layer in layers}
    return None


def all_that_sees_media_is_gated(name: str) -> str | None:
    """Every Linear but those that see words; where another is left plain, it is said why."""
    model, left = adapted(name, quantize=False), {}
    base = model.get_base_model()
    for layer, module in base.named_modules():
        if isinstance(module, LoraLayer):
            rule = timekeeper(base).rule(layer)
            assert isinstance(rule, Nothing) == ("default" not in getattr(module, "lora_gate", ())), layer
            if isinstance(rule, Nothing) and rule.why:
                left.setdefault(rule.why, layer.rpartition(".")[2])
    return "; ".join(f"not {leaf}: {why}" for why, leaf in left.items()) or None


def rows_have_their_time(name: str) -> str | None:
    """Noise on one step of one clip changes most the rows that the timeline gives to that step."""
    model, given = adapted(name), inputs(name)
    _check_rows(name, model, given)
    return None


def padded_batches(name: str) -> str | None:
    """The same in a batch of clips of unequal length, and beside images."""
    asked = [{"sizes": (4, 2)}] if name in UNEQUAL and name != "CLIP" else []
    asked += [{"mixed": True}, {"mixed": True, "sizes": (4, 0)}] if name in MIXED else []
    if not asked:
        return "clip_frames is one number for all" if name == "CLIP" else "takes clips of one length only"
    model = adapted(name)
    for request in asked:
        _check_rows(name, model, batch(name, **request))
    return None


def reloads(name: str) -> str | None:
    """Saved and read back by PEFT alone, every weight is equal bit for bit, and so is what comes out."""
    model, given = adapted(name, moved=True), inputs(name).inputs
    with torch.no_grad():
        expected = model(**given).loss
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, save_embedding_layers=False)  # wav2vec 2.0 has none to ask for
        other = PeftModel.from_pretrained(build(name), folder).eval()
        with torch.no_grad():
            again = other(**given).loss
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    # A product of strided rows depends on where in memory the weight lies, in the last bit.
    assert torch.allclose(again, expected, rtol=1e-6, atol=0)
    return None


def generates(name: str) -> str | None:
    """With a cache and without one the same is said, open gates and all; beams run."""
    if name not in GENERATIVE:
        return "generates nothing"
    model, asked = adapted(name, moved=True), generate_inputs(name)
    asked["suppress_tokens"] = [IMAGE, VIDEO, AUDIO]  # a random model may say them, which no model can read again
    said = model.generate(**asked)
    assert torch.equal(said, model.generate(**{**asked, "use_cache": False}))
    assert len(model.generate(**{**asked, "num_beams": 2})) == len(said)
    return None


def checkpointing(name: str) -> str | None:
    """Two passes before one backward give the gradients that they give without checkpointing, reentrant or not."""
    outcome = None
    for mode in ("plain", "reentrant", "kbit"):
        for exact in (False, True):  # in float64 where float32 leaves it open
            try:
                reference, found = _gradients(name, None, exact), _gradients(name, mode, exact)
            except (ValueError, RuntimeError, AttributeError) as error:
                try:
                    _gradients(name, mode, exact, plain=True)
                except type(error):
                    outcome = f"{mode}: fails on plain LoRA too"
                    break
                raise
            keys = [key for key in reference if key in found or reference[key].any()]
            if missing := [key for key in keys if key not in found]:
                also = _gradients(name, mode, exact, plain=True)
                assert not [
                    key for key in missing if key in also or re.sub("lora_gate.*", "lora_A.default.weight", key) in also
                ]
                outcome = f"{mode}: no gradient reaches the tower, with plain LoRA neither"
            error = torch.cat([(found[key] - reference[key]).flatten() for key in keys if key in found]).norm()
            size = torch.cat([reference[key].flatten() for key in keys if key in found]).norm()
            if error < 1e-5 * size:
                break
        else:
            raise AssertionError((mode, float(error / size)))
    return outcome


def merging(name: str) -> str | None:
    """Exact, up to rounding, while the gates are closed; refused once one has moved."""
    model, given = adapted(name, quantize=False), inputs(name).inputs
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    opened = copy.deepcopy(model)
    with torch.no_grad():
        expected = model(**given).loss
        merged = model.merge_and_unload()
        assert torch.allclose(merged(**given).loss, expected, rtol=1e-4, atol=1e-5)
        assert "_mmqlora_time" not in merged.__dict__
    move(opened)
    try:
        opened.merge_and_unload()
    except GateError:
        return None
    raise AssertionError("open gates were merged")


PROPERTIES: dict[str, Callable[[str], str | None]] = {
    "starts at the base": starts_at_the_base,
    "gradient in every gate": gates_get_gradients,
    "all that sees media": all_that_sees_media_is_gated,
    "rows have their time": rows_have_their_time,
    "padded and mixed batches": padded_batches,
    "saves and reloads": reloads,
    "generates": generates,
    "checkpointing": checkpointing,
    "merging": merging,
}


def _gradients(name: str, mode: str | None, exact: bool, plain: bool = False) -> dict[str, torch.Tensor]:
    model = build(name, quantize=not exact)
    model = model.double() if exact else model
    if mode == "kbit":
        model = prepare_model_for_kbit_training(model)
    torch.manual_seed(0)
    # From a pattern PEFT makes one of its own for plain LoRA on experts.
    names = [name.replace("\\", "") for name in linears(model).split("|")]
    settings = LoraConfig(r=4, target_modules=names) if plain else config(name, model)
    model = get_peft_model(model, settings)
    move(model)
    model = model.double() if exact else model
    if mode in ("plain", "reentrant"):
        model.get_base_model().activation_checkpointing_enable({"use_reentrant": mode == "reentrant"})
    if mode == "reentrant":
        model.enable_input_require_grads()
    model.train()
    losses = []
    for seed in (0, 1):
        given = batch(name, seed=seed).inputs
        if exact:
            given = {
                k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in given.items()
            }
        losses.append(model(**given).loss)
    sum(losses).backward()
    return {
        key: parameter.grad
        for key, parameter in model.named_parameters()
        if "lora_" in key and parameter.grad is not None
    }


def _seen(model: PeftModel, given: dict[str, Any]) -> dict[str, list[tuple[torch.Tensor, Any, Any]]]:
    """What each gated layer gets, where its rows belong, and the layer's rule, call by call."""
    base, found, hooks = model.get_base_model(), {}, []
    keeper = timekeeper(base)
    for name, module in base.named_modules():
        variant = getattr(module, "lora_variant", {}).get("default")
        if variant is not None:

            def look(module: nn.Module, args: Any, name: str = name, variant: Any = variant) -> None:
                place = keeper.clock.place(variant.rule, name, args[0].shape)
                found.setdefault(name, []).append((args[0].clone(), place, variant.rule))

            hooks.append(module.register_forward_pre_hook(look))
    with torch.no_grad():
        model(**given)
    for hook in hooks:
        hook.remove()
    return found


def _check_rows(name: str, model: PeftModel, given: Batch) -> None:
    before, checked = _seen(model, given.inputs), set()
    for medium, lengths in given.lengths.items():
        for sample, length in enumerate(lengths):
            for step in sorted({0, length // 2, length - 1} if length else set()):
                after, seen = _seen(model, given.perturb(sample, step, medium)), set()
                for layer, calls in before.items():
                    rule = calls[0][2]
                    if rule in seen or medium not in rule.streams or layer in MIXED_BY_THEN.get(name, ()):
                        continue  # the first layer of a rule that sees the change
                    for (x, place, _), (y, _, _) in zip(calls, after[layer], strict=True):
                        change = (x - y).float().norm(dim=-1)
                        if change.any() and place.level.steps:
                            _check_change(change, place, rule, lengths, medium, sample, step, f"{name}, {layer}")
                            seen.add(rule)
                checked |= seen
    left = {calls[0][2] for layer, calls in before.items() if layer not in MIXED_BY_THEN.get(name, ())} - checked
    assert not left, f"no row changed under {left}"


def _check_change(
    change: torch.Tensor, place: Any, rule: Any, lengths: list[int], medium: str, sample: int, step: int, who: str
) -> None:
    index = torch.arange(place.level.steps).view(-1, *[1] * (change.dim() - 1)) if place.index is None else place.index
    index = index.expand(change.shape)
    largest = torch.zeros(place.level.steps + 1).scatter_reduce(0, index.flatten(), change.flatten(), "amax")
    present = [number for number, length in enumerate(lengths) if length]
    counts, clip = place.level.counts, present.index(sample)
    if isinstance(rule, Tokens) and medium == "audio" and "video" in rule.streams:
        clip += len(counts) - len(present)  # the sounds come behind the videos
    start, own, length = sum(counts[:clip]), counts[clip], lengths[sample]
    # Where every item has as many positions as the longest, padding counts, and is no place to look at.
    whole = max(lengths) if len(set(counts)) == 1 else length
    valid = math.ceil(own * length / whole)
    # Convolutions before the first Linear blur a sound by a few steps, and PE's frames; a tower's attention does more.
    near = 1 if medium == "video" and not who.startswith("PE") else 3
    found = start + int(largest[start : start + valid].argmax())
    wanted = start + step * own / whole
    who = f"{who}: {medium} {sample}, step {step} of {length}"
    assert largest[found] > 0, f"{who}: clip {clip}, steps {start} to {start + valid}, did not change"
    assert abs(found - wanted) < near, f"{who}: step {wanted} of {own} was expected, {found} changed most"
    if int((largest[:-1] > 0).sum()) == 1:
        assert largest[-1] == 0, f"{who}: rows without time changed"


def main() -> None:
    """Check everything and keep the outcome."""
    records = Path(__file__).parent.parent / "book" / "records" / "conformance.jsonl"
    records.unlink(missing_ok=True)
    for name in sys.argv[1:] or NAMES:
        start, outcome = time.process_time(), {}
        for title, check in PROPERTIES.items():
            try:
                outcome[title] = check(name) or "yes"
            except Exception as error:  # the table shows whatever is wrong
                outcome[title] = f"NO: {type(error).__name__}: {error}"
        measured = {"outcome": outcome, "cpu_s": round(time.process_time() - start, 2)}
        about = {"architecture": name, "class": type(ARCHITECTURES[name]()).__name__}
        append_record(records, make_record("conformance", about, 0, data="", measured=measured))
        print(name, outcome, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
