"""Table 1 of Rochette et al. 2019: AlexNet (B=16) and VGG16 (B=8) on images of 3×224×224 by every strategy.

    python benchmarks/table1.py [--scale smoke|cpu|full]

Rows of `clipped_grad.py`, by the paper's strategies: naive, `vmap` (multi), `grouped_conv` (crb); and ours. What
`clipped_grad.py` has measured is not measured again.
"""

from collections.abc import Sequence

import clipped_grad
import runner

CONTESTANTS = "non-private", "naive", "vmap", "grouped_conv", "ghost", "auto"
ROWS = {"smoke": ["tiny"], "cpu": ["alexnet_224", "vgg16_224"], "full": ["alexnet_224", "vgg16_224"]}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing of the paper's two networks, then show it."""
    parser = runner.parser("Table 1 of Rochette et al. 2019.", clipped_grad.EFFORTS)
    parser.set_defaults(points="clipped_grad", picture="table1", contestants=CONTESTANTS, optimizers=(), compiled=False)
    options = runner.parse(parser, argv)
    options.only = ROWS[options.scale]
    clipped_grad.compare(options)


if __name__ == "__main__":
    main()
