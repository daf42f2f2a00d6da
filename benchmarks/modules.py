"""The shapes that people train, as modules, beside Opacus: transformers, LoRA, recurrent networks, augmentation.

    python benchmarks/modules.py [--scale smoke|cpu|full] [--only WORKLOAD ...]

Rows of `clipped_grad.py` by fewer contestants, in a file of their own; and its ViT at 32², for comparison.
"""

from collections.abc import Sequence

import clipped_grad
import runner
from workloads import SCALES, SHAPES

CONTESTANTS = "non-private", "auto", "ghost", "Opacus", "Opacus ghost"
_ROWS = [*SHAPES, "vit"]
ROWS = {"smoke": ["tiny"], "cpu": _ROWS, "full": _ROWS}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing, then show all of it."""
    parser = runner.parser("The shapes that people train, beside Opacus.", clipped_grad.EFFORTS)
    parser.add_argument("--only", nargs="+", metavar="WORKLOAD", help="these workloads; all of the scale's")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=[*CONTESTANTS], help="these; all")
    parser.set_defaults(points="modules", picture="modules", optimizers=(), compiled=False)
    options = runner.parse(parser, argv)
    options.only = options.only or ROWS[options.scale]
    if unknown := set(options.only) - set(SCALES[options.scale]):
        parser.error(f"no workload {', '.join(sorted(unknown))} at scale {options.scale}")
    clipped_grad.compare(options)


if __name__ == "__main__":
    main()
