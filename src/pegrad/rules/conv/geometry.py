"""The geometry of one convolution call, and the three linear maps that a convolution consists of."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_CONV = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class Geometry(NamedTuple):
    """Everything about a convolution but its tensors: one entry for each spatial axis.

    A convolution is bilinear in input and weight. Its value and its two derivatives are the methods below; each
    is differentiable in turn, so that the rule can be differentiated as often as one likes.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def ndim(self) -> int:
        """Number of spatial axes."""
        return len(self.kernel)

    def output_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """Spatial size of the output for an input of spatial size `size`."""
        return tuple(
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        )

    def transposed_size(self, size: Sequence[int], output_padding: Sequence[int]) -> tuple[int, ...]:
        """Spatial size of the transposed convolution's output, for an input of spatial size `size`."""
        sizes = zip(size, output_padding, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple((n - 1) * s - 2 * p + d * (k - 1) + extra + 1 for n, extra, k, s, p, d in sizes)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Convolve `x` `(N, C, *size)` with `weight` `(D, C/groups, *kernel)`: `(N, D, *output_size)`."""
        conv = _CONV[self.ndim]
        return conv(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def input_gradient(self, g: Tensor, weight: Tensor, size: Sequence[int], bias: Tensor | None = None) -> Tensor:
        """Adjoint of `forward` in `x`: `(N, D, *output_size)` back to `(N, C, *size)`, size as given."""
        sizes = zip(size, g.shape[2:], self.kernel, self.stride, self.padding, self.dilation, strict=True)
        # A stride that does not divide leaves a tail of the input unread: there the adjoint is zero.
        unread = [n - ((o - 1) * s - 2 * p + d * (k - 1) + 1) for n, o, k, s, p, d in sizes]
        conv_transpose = _CONV_TRANSPOSE[self.ndim]
        return conv_transpose(g, weight, bias, self.stride, self.padding, unread, self.groups, self.dilation)

    def weight_gradient(self, x: Tensor, g: Tensor) -> Tensor:
        """Adjoint of `forward` in `weight`, summed over `N`: `(D, C/groups, *kernel)`, natively computed."""
        weight = x.new_empty(()).expand(g.shape[1], x.shape[1] // self.groups, *self.kernel)
        zeros = [0] * self.ndim
        return torch.ops.aten.convolution_backward(
            g, x, weight, None, self.stride, self.padding, self.dilation, False, zeros, self.groups,
            [False, True, False],
        )[1]  # fmt: skip


def pad(t: Tensor, widths: Sequence[int]) -> Tensor:
    """Put zeros around, as `F.pad`, which makes a copy even where there are none to put."""
    return F.pad(t, list(widths)) if any(widths) else t
