"""What is run from a shell: plans of memory, and recipes.

``python -m mmqlora plan MODEL --gpu T4 --frames 16``: does it fit, and if not, what would.

``python -m mmqlora run RECIPE --data FOLDER --output FOLDER``: fine-tune and judge, as a file says.
"""

from __future__ import annotations

import argparse
import sys
import tomllib
import warnings
from collections.abc import Sequence
from typing import Any

import pandas as pd
from accelerate import PartialState

from .errors import MMQLoRAError, RecipeError
from .methods import METHODS
from .planner import GPUS, plan
from .recipes import RECIPES, read_recipe, run_recipe
from .rehearsal import OPTIMIZERS


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return 0, 1 where a plan does not fit the card that was named, 2 after an error."""
    parser = argparse.ArgumentParser(prog="python -m mmqlora", description="Less is more: multimodal QLoRA.")
    commands = parser.add_subparsers(required=True)
    say = commands.add_parser(
        "plan", help="predict the memory of a fine-tuning run", description=plan.__doc__.split("\n")[0]
    )
    say.set_defaults(command=_plan)
    say.add_argument("model", help="a name or folder, as for mmqlora.load; only its configuration is read")
    say.add_argument("--gpu", help=f"{', '.join(GPUS)}, or bytes; a CPU if left out")
    say.add_argument("--method", default="lora", choices=[*METHODS], metavar="METHOD", help=", ".join(METHODS))
    say.add_argument("--quant-type", default="nf4", choices=["nf4", "fp4", "none"])
    say.add_argument("--rank", type=int)
    say.add_argument("--frames", type=int, default=8)
    say.add_argument("--pixels", type=int, help="height and width of a frame")
    say.add_argument("--seconds", type=float, default=30.0)
    say.add_argument("--tokens", type=int, default=128, help="of text, beside those that stand for media")
    say.add_argument("--batch-size", type=int, default=1)
    say.add_argument("--accumulate", type=int, default=1, help="forward passes of an optimizer step")
    say.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass")
    say.add_argument("--optimizer", choices=OPTIMIZERS)
    say.add_argument("--frozen", nargs="+", default=(), metavar="REGION", help="regions without adapters")
    say = commands.add_parser(
        "run", help="fine-tune and judge, as a recipe says", description=run_recipe.__doc__.split("\n")[0]
    )
    say.set_defaults(command=_run)
    say.add_argument("recipe", help=f"a TOML file, or one of {', '.join(RECIPES)}")
    say.add_argument("--data", required=True, help="folder of the data set")
    say.add_argument("--output", required=True, help="folder of the run; started again, it goes on there")
    say.add_argument("--media", help="where the media lie, if not in the folder of the data set")
    say.add_argument("--seed", type=int, default=0)
    say.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="SECTION.NAME=VALUE",
        help="other values than the recipe's, written as in it: training.steps=10 'model.name_or_path=\"folder\"'",
    )
    given = vars(parser.parse_args(arguments))
    warnings.simplefilter("ignore")
    try:
        return given.pop("command")(**given)
    except MMQLoRAError as error:
        print(error, file=sys.stderr)
        return 2


def _plan(model: str, gpu: str | None, quant_type: str, method: str, frozen: Sequence[str], **settings: Any) -> int:
    found = plan(
        model,
        method,
        gpu=int(float(gpu)) if gpu and gpu[0].isdigit() else gpu,
        quant_type=None if quant_type == "none" or method == "full" else quant_type,
        frozen=tuple(frozen),
        **settings,
    )
    print(f"{found.model}: {found}\n\nGiB at the peak\n{(found.table() / 2**30).round(3).to_string()}")
    if found.fits is False:
        less = found.fit()
        told = {key: value for key, value in less.settings.items() if value != found.settings[key]}
        print("\nWith " + ", ".join(f"{key}={value!r}" for key, value in told.items()) + f"\n{less}")
    return int(found.fits is False)


def _run(recipe: str, data: str, output: str, media: str | None, seed: int, set: Sequence[str]) -> int:
    read = read_recipe(recipe).but(**dict(map(_assignment, set)))
    record = run_recipe(read, data, output, media=media, seed=seed)
    if not PartialState().is_main_process:
        return 0
    table = pd.DataFrame({"before": record["before"], "after": record["metrics"]})
    print(f"{read.title}\n{table.round(4).to_string()}")
    print(f"{record['clips']} clips; {record['skipped']} could not be read. Published: {read.published}")
    return 0


def _assignment(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(
            f"--set {text}: {value!r} is no value of TOML ({error}); expected such as training.steps=10, or with "
            "quotes around what is text: 'adapter.method=\"dora\"'."
        ) from error


if __name__ == "__main__":
    sys.exit(main())
