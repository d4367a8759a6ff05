"""The first experiment of the chapter *Temporal adapters*: does the content say when the update should act?

    cd book && python -m experiments.temporal_mechanism

A plain QLoRA adapter is trained on a task. Then each rank j of each layer gets a factor g_tj = 1 for every time step t,
and the gradient of the loss with respect to it is taken on items that the adapter has not seen::

    ∂L/∂g_tj = s Σ_rows of t <b_j, ∂L/∂y> <a_j, x>

It says whether this rank should do more or less at this step. A gate 1 + tanh(U φ_t) can learn just that part of it
which is a function of the signals φ_t and not the same for all steps. Two measures, each on all layers of a region:

R²      the gradient regressed on the signals, by ridge regression with an intercept, on half of the items; the share of
        its variance that is explained on the other half
cosine  between the gradients with respect to U, which are Σ_t φ_t ∂L/∂g_t, of the two halves: whether other clips would
        move the gates the same way. Without a pattern it is 0, and it does not drown in what single clips add

Beside the content: signals that are shuffled over the steps of a clip, and the place in the clip alone. For the cosine
also "constant": the gradient with respect to a factor that is the same at all steps, which plain LoRA can follow too.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model

from experiments.baselines import best_rate, main_of
from mmqlora import benchmark
from mmqlora.gates import TemporalLoraConfig, timekeeper
from mmqlora.grids import run_grid
from mmqlora.records import make_record
from mmqlora.regions import regions
from mmqlora.training import fine_tune

RECORDS = Path(__file__).parent.parent / "records"
TASKS = (
    "video/palette",
    "video/flashes",
    "video/longer",
    "audio/timbre",
    "audio/flashes",
    "audio/longer",
    "retrieval/palette",
    "retrieval/flashes",
)
SEEDS = range(1, 7)
ITEMS = 400
STEPS = 20  # of the optimizer: while there is still something to learn
RIDGE = 1e-3  # of the mean square of a signal
CONTENT = {"video": ("motion", "novelty", "keyframe"), "audio": ("flux", "energy", "speech", "onset")}
TIME = ("time1", "time2", "time3", "time4")


def run(config: dict[str, Any], seed: int) -> dict[str, Any]:
    """Train, take the gradients, regress."""
    task = benchmark.task(config["task"])
    content = CONTENT["audio" if task.model == "audio" else "video"]
    train, model = task.train(seed), task.load(quant_type="nf4")
    names = {name: region for name, region in regions(model).items()}
    torch.manual_seed(seed)
    adapter = TemporalLoraConfig(r=8, lora_alpha=16, target_modules="all-linear", signals=(*content, *TIME))
    model = get_peft_model(model, adapter)
    gates = [p for name, p in model.named_parameters() if "lora_gate" in name]
    for gate in gates:
        gate.requires_grad_(False)  # all gates stay 1: this is plain QLoRA
    options = {"seed": seed, "steps": config["steps"], "batch_size": task.batch_size, "progress": False}
    trained = fine_tune(
        model, train, None, collate=task.collate, learning_rate=config["learning_rate"], bf16=False, **options
    )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for gate in gates:
        gate.requires_grad_(True)
    steps = gradients(model, task, seed, config["items"])
    metrics = {}
    for region in dict.fromkeys(names.values()):
        layers = [layer for layer in steps if names[layer] == region]
        if layers:
            metrics |= {f"{region} {key}": value for key, value in explained(steps, layers, content, seed).items()}
    measured = {"metrics": metrics, "losses": trained["losses"], "cpu_s": trained["cpu_s"]}
    return make_record("temporal_mechanism", config, seed, data=train.fingerprint(), measured=measured)


def gradients(model: torch.nn.Module, task: benchmark.Task, seed: int, items: int) -> dict[str, Any]:
    """Signals, gradients and items of every step, by layer."""
    base = model.get_base_model()
    keeper, fresh = timekeeper(base), task.train(seed + 50)  # items of a run that is not made
    collected: dict[str, list[Any]] = {}
    model.eval()
    for start in range(0, items, task.batch_size):
        keeper.record = []
        batch = task.collate([fresh[i] for i in range(start, min(start + task.batch_size, items))])
        loss = model(**batch).loss
        for *_, gate in keeper.record:
            gate.retain_grad()
        loss.backward()
        for name, _, level, gate in keeper.record:
            item = torch.arange(start, start + len(level.counts)).repeat_interleave(torch.tensor(level.counts))
            collected.setdefault(name, []).append((level.signals[:-1], gate.grad[: level.steps], item))
        keeper.record = None
        model.zero_grad()
    return {name: [torch.cat(part) for part in zip(*parts, strict=True)] for name, parts in collected.items()}


def explained(steps: dict[str, Any], layers: list[str], content: tuple[str, ...], seed: int) -> dict[str, float]:
    """Held-out R² over all layers of a region, by kind of signal."""
    generator = torch.Generator().manual_seed(seed)
    own = len(content)
    wrong: dict[str, float] = {"content": 0.0, "shuffled": 0.0, "time": 0.0, "both": 0.0}
    pulls: dict[str, list[torch.Tensor]] = {"content": [], "shuffled": [], "time": [], "constant": []}
    total = 0.0
    for layer in layers:
        signals, gradient, item = steps[layer]
        order = (item.double() + torch.rand(len(item), generator=generator, dtype=torch.double)).argsort()
        kinds = {
            "content": signals[:, :own],
            "shuffled": signals[order, :own],
            "time": signals[:, own:],
            "both": signals,
        }
        fit = item % 2 == 0
        total += float((gradient[~fit] - gradient[fit].mean(0)).square().sum())
        for kind, values in kinds.items():
            wrong[kind] += _squares(values.double(), gradient.double(), fit)
        kinds["constant"] = torch.ones(len(item), 1)
        for kind, found in pulls.items():
            halves = [kinds[kind][half].T @ gradient[half] for half in (fit, ~fit)]
            found.append(torch.stack(halves).flatten(1))
    scores = {f"R2 {kind}": 1 - value / total for kind, value in wrong.items()}
    for kind, found in pulls.items():
        one, other = torch.cat(found, 1)
        scores[f"cosine {kind}"] = float(torch.cosine_similarity(one, other, dim=0))
    return scores


def _squares(signals: torch.Tensor, gradient: torch.Tensor, fit: torch.Tensor) -> float:
    """Sum of squares that a ridge regression leaves on what it was not fitted to."""
    mean, center = signals[fit].mean(0), gradient[fit].mean(0)
    x, y = signals[fit] - mean, gradient[fit] - center
    penalty = RIDGE * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    weights = torch.linalg.solve(x.T @ x + penalty, x.T @ y)
    return float((gradient[~fit] - center - (signals[~fit] - mean) @ weights).square().sum())


def main() -> None:
    """Run what is not in the records yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", action="append", help="only this task; may be given again")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    runs = []
    for seed in SEEDS:
        for name in arguments.task or TASKS:
            rate = best_rate(main_of(name), "lora")
            runs.append(({"task": name, "steps": STEPS, "learning_rate": rate, "items": ITEMS}, seed))
    grid = run_grid(
        "experiments.temporal_mechanism:run",
        runs,
        RECORDS / "temporal_mechanism.jsonl",
        processes=arguments.processes,
        timeout=1800,
    )
    for failure in grid.failures:
        print(failure.config, failure.seed, failure.error[-500:], file=sys.stderr)


if __name__ == "__main__":
    main()
