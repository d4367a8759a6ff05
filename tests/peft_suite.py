"""PEFT's own tests of custom models, with `TemporalLoraConfig` in the place of `LoraConfig`.

    python tests/peft_suite.py PEFT             # a checkout of huggingface/peft; into book/records/peft_suite.jsonl

They run three times, in processes of their own:

    lora    as they are
    gates   with our configuration; gates begin closed, as always
    open    the same, but where a test asks for weights by chance (init_lora_weights=False), gates get some as well

Only tests of LoRA count: those whose parameters hold no other method's configuration, or that have none and speak of
LoRA alone. Those of variants that our configuration refuses (DoRA and kin) are left out of all runs.

This file is the command and, in those processes, the pytest plugin (``-p peft_suite``). It gives all models a family:
the rows of the first input are the steps of one clip, and so are those of every Linear. Where a test lists the
parameters that have to be trainable, it expects the gates among them.
"""

from __future__ import annotations

import importlib.machinery
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
import types
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from mmqlora import timeline
from mmqlora.gates import OTHER_VARIANTS, TemporalLora, TemporalLoraConfig
from mmqlora.records import append_record, fingerprint, make_record
from mmqlora.signals import thumbnail_signals
from mmqlora.timeline import Clock, Family, Placement, Rule, Stream

RUNS = ("lora", "gates", "open")
TESTS = "tests/test_custom_models.py"
# What gates can't do, by what the error says.
REFUSED = {
    "merging open gates": "can't be merged into a weight",
    "adding up adapters with open gates": "can't be added up",
    # PEFT's list of methods for it is closed, and it makes their layers itself; it takes no quantized ones.
    "methods mixed in a model": "not compatible with the `PeftMixedModel`",
}
# It holds all that may be trainable against a list of names of its own.
LISTS = "test_loading_model_requires_grad_set_correctly_switch_inference_mode"
RUN, OUTPUT = os.environ.get("MMQLORA_PEFT_RUN"), os.environ.get("MMQLORA_PEFT_OUTPUT")

# --- The plugin ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows(Rule):
    """Every row of the first dimension is a step."""

    def place(self, clock: Clock, stream: Stream, shape: tuple[int, ...]) -> Placement | str:
        return Placement(stream.level(steps=shape[0])) if shape else clock.nowhere(stream.signals.device)


def _rows(arguments: Mapping[str, Any], names: Sequence[str]) -> Stream | None:
    first = next((value for value in arguments.values() if isinstance(value, torch.Tensor)), None)
    if first is None:
        return None
    known = [number for number, name in enumerate(names) if name in ("motion", "novelty", "keyframe")]
    signals = torch.zeros(1, len(first), len(names), device=first.device)
    # PEFT's inputs count upward, at a steady rate; their sines do not. In its model with attention all rows are alike,
    # and gates would have nothing to learn from standardized signals, whose mean is zero.
    values = first.reshape(1, len(first), -1).float().sin()
    signals[..., known] = thumbnail_signals(values, names=[names[number] for number in known], standardize=False)
    return Stream(signals)


class _AnyModel(dict):
    """Families, of which there is one for all models: they have no configuration, or one that a test made up."""

    def get(self, *_: Any) -> Any:
        return lambda config, **_: Family({"video": _rows}, [("", Rows(("video",)))])


outcomes: dict[str, list[str]] = {}  # test: outcome, last line of the error
left_out: Counter[str] = Counter()
gates: list[torch.nn.Parameter] = []  # of the test that runs
made, trained = Counter(), Counter()  # gates by test


def _install() -> None:
    """Before PEFT's tests are imported."""
    # They import one name of each, for models and data that these tests do not touch.
    for module, name in (("diffusers", "StableDiffusionPipeline"), ("datasets", "load_dataset")):
        stub = sys.modules[module] = types.ModuleType(module)
        stub.__spec__ = importlib.machinery.ModuleSpec(module, None)
        setattr(stub, name, type(name, (), {}))
    if RUN == "lora":
        return
    peft.LoraConfig = TemporalLoraConfig
    timeline.FAMILIES = _AnyModel()
    init = TemporalLora.init

    def watched(self: TemporalLora, module: Any, adapter_name: str, **settings: Any) -> None:
        init(self, module, adapter_name, **settings)
        gate = module.lora_gate[adapter_name]
        gates.append(gate)
        if RUN == "open" and self.config.init_lora_weights is False:
            with torch.no_grad():
                gate.normal_(std=0.1)

    TemporalLora.init = watched


def _configurations(values: Sequence[Any]) -> list[Any]:
    """Classes and instances of PEFT's configurations among the parameters of a test."""
    kinds = [value if isinstance(value, type) else type(value) for value in values]
    return [value for value, kind in zip(values, kinds, strict=True) if issubclass(kind, peft.PeftConfig)]


def _sort(item: pytest.Item) -> str:
    """Whether a test is of LoRA alone, "lora"; of one of its "variants"; or of "other" methods."""
    values = list(item.callspec.params.values()) if hasattr(item, "callspec") else []
    found = _configurations(values)
    if found:
        lora = {peft.LoraConfig, TemporalLoraConfig}
        if not all((value if isinstance(value, type) else type(value)) in lora for value in found):
            return "other"
        settings = [value for value in values if isinstance(value, dict)] + [
            vars(value) for value in found if not isinstance(value, type)
        ]
        return "variants" if any(each.get(name) for each in settings for name in OTHER_VARIANTS) else "lora"
    fixtures = [defs[-1].func for name, defs in item._fixtureinfo.name2fixturedefs.items() if name in item.fixturenames]
    own = [function for function in fixtures if "test_custom_models" in function.__module__]
    source = "".join(inspect.getsource(function) for function in (item.function, *own))
    used = set(re.findall(r"\b(\w*Config)\(", source))
    if "LoraConfig" not in used or used - {"LoraConfig"}:
        return "other"
    return "variants" if any(name in source for name in OTHER_VARIANTS) else "lora"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    sorts = {item: _sort(item) for item in items}
    left_out.update(sort for sort in sorts.values() if sort != "lora")
    config.hook.pytest_deselected(items=[item for item in items if sorts[item] != "lora"])
    items[:] = [item for item in items if sorts[item] == "lora"]
    cases = items[0].module.TestRequiresGrad
    check = cases.check_requires_grad

    def with_gates(self: Any, model: torch.nn.Module, *expected: str) -> None:
        names = {name for name, _ in model.named_parameters()}
        beside = {name.replace(".lora_A.", ".lora_gate.").removesuffix(".weight") for name in expected}
        check(self, model, *dict.fromkeys((*expected, *sorted(beside & names))))

    cases.check_requires_grad = with_gates


def _name(nodeid: str) -> str:
    return nodeid.split("::", 1)[1].replace("TemporalLoraConfig", "LoraConfig")


def _as_beside(self: torch.nn.Module, **options: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """All parameters but gates that are trainable where their A is, or not where it is not."""
    named = dict(torch.nn.Module.named_parameters(self, **options))
    for name, parameter in named.items():
        beside = named.get(name.replace(".lora_gate.", ".lora_A.") + ".weight")
        if beside is None or beside.requires_grad != parameter.requires_grad:
            yield name, parameter


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    gates.clear()
    with pytest.MonkeyPatch.context() as patch:
        if RUN != "lora" and item.name.startswith(LISTS):
            patch.setattr(peft.PeftModel, "named_parameters", _as_beside)
        try:
            yield
        finally:
            made[_name(item.nodeid)] = len(gates)
            trained[_name(item.nodeid)] = sum(gate.grad is not None and bool(gate.grad.any()) for gate in gates)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    name = _name(report.nodeid)
    if report.when == "call" or report.outcome != "passed":
        crash = getattr(report.longrepr, "reprcrash", None)
        lines = (crash.message if crash else str(report.longrepr or "")).strip().splitlines() or [""]
        error = lines[0] if crash else lines[-1]
        if outcomes.get(name, ["passed"])[0] != "failed":
            outcomes[name] = [report.outcome, re.sub(r"0x[0-9a-f]+", "0x", error)[:300]]


def pytest_sessionfinish() -> None:
    if OUTPUT:
        both = {"outcomes": outcomes, "left_out": left_out, "made": made, "trained": trained}
        Path(OUTPUT).write_text(json.dumps(both))


if RUN:
    _install()

# --- The command ------------------------------------------------------------------------------------------------------


def run(folder: Path, name: str, *options: str) -> dict[str, Any]:
    """Outcomes of all tests of one run."""
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "outcomes.json"
        path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        about = {"MMQLORA_PEFT_RUN": name, "MMQLORA_PEFT_OUTPUT": str(output), "HF_HUB_OFFLINE": "1"}
        flags = (
            "-p peft_suite -p no:cacheprovider -p no:xdist -o addopts= --timeout=120 --runxfail --tb=short -q".split()
        )
        command = [sys.executable, "-W", "ignore", "-m", "pytest", *flags, TESTS, *options]
        environment = {**os.environ, **about, "PYTHONPATH": path}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if not output.exists() or not (found := json.loads(output.read_text()))["outcomes"]:
            raise SystemExit(f"{name}: {done.stdout[-3000:]}{done.stderr[-3000:]}")
    return found


def failures(found: Mapping[str, Any], lora: Mapping[str, Any] | None = None) -> dict[str, list[str]]:
    """Tests that fail, by what gates can't do or else by the error; with LoRA's run, those that pass there."""
    groups: dict[str, list[str]] = {}
    for name, (outcome, error) in found["outcomes"].items():
        if outcome == "failed" if lora is None else outcome != "passed" and lora["outcomes"][name][0] == "passed":
            reason = next((why for why, text in REFUSED.items() if text in error), None)
            groups.setdefault(reason or f"{outcome}: {error}", []).append(name)
    return groups


def main() -> None:
    """Run everything and keep the outcome."""
    folder, options = Path(sys.argv[1]), sys.argv[2:]
    records = Path(__file__).parent.parent / "book" / "records" / "peft_suite.jsonl"
    found = {}
    for name in RUNS:
        found[name] = run(folder, name, *options)
        measured = {"counts": dict(Counter(outcome for outcome, _ in found[name]["outcomes"].values()))}
        measured["left_out"] = found[name]["left_out"]
        for what in ("made", "trained"):
            counts = found[name][what].values()
            measured[f"gates_{what}"] = {"gates": sum(counts), "tests": sum(map(bool, counts))}
        if name == "lora":
            measured["failures"] = failures(found[name])
        else:
            assert found[name]["outcomes"].keys() == found["lora"]["outcomes"].keys()
            measured["worse_than_lora"] = failures(found[name], found["lora"])
        print(name, json.dumps(measured, indent=1), flush=True)
        if not options:  # all of the tests
            data = fingerprint(*(folder / "tests" / file for file in ("test_custom_models.py", "testing_common.py")))
            append_record(records, make_record("peft_suite", {"run": name}, 0, data=data, measured=measured))


if __name__ == "__main__":
    main()
