"""``python -m mmqlora plan MODEL --gpu T4 --frames 16``: does it fit, and if not, what would."""

from __future__ import annotations

import argparse
import sys
import warnings

from .errors import MMQLoRAError
from .methods import METHODS
from .planner import GPUS, plan
from .rehearsal import OPTIMIZERS


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return 0 where the plan fits or no card was named, 1 where it does not, 2 after an error."""
    parser = argparse.ArgumentParser(prog="python -m mmqlora", description="Less is more: multimodal QLoRA.")
    commands = parser.add_subparsers(required=True)
    say = commands.add_parser(
        "plan", help="predict the memory of a fine-tuning run", description=plan.__doc__.split("\n")[0]
    )
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
    given = vars(parser.parse_args(arguments))
    gpu, quant_type = given.pop("gpu"), given.pop("quant_type")
    warnings.simplefilter("ignore")
    try:
        found = plan(
            given.pop("model"),
            gpu=int(float(gpu)) if gpu and gpu[0].isdigit() else gpu,
            quant_type=None if quant_type == "none" or given["method"] == "full" else quant_type,
            **{**given, "frozen": tuple(given["frozen"])},
        )
        print(f"{found.model}: {found}\n\nGiB at the peak\n{(found.table() / 2**30).round(3).to_string()}")
        if found.fits is False:
            less = found.fit()
            told = {key: value for key, value in less.settings.items() if value != found.settings[key]}
            print("\nWith " + ", ".join(f"{key}={value!r}" for key, value in told.items()) + f"\n{less}")
    except MMQLoRAError as error:
        print(error, file=sys.stderr)
        return 2
    return int(found.fits is False)


if __name__ == "__main__":
    sys.exit(main())
