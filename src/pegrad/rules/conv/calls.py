"""PyTorch's convolution functions, their arguments read into one form."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pegrad.errors import ArgumentError
from pegrad.rules.conv.geometry import Geometry, pad

Ints = int | Sequence[int]


class Convolution(NamedTuple):
    """One call of a convolution function.

    Args:
        input: `(N, channels, *spatial)`, without N if the call's input had none; padded where the call's padding is
            not the same on both sides.
        weight: `(D, C/groups, *kernel)`; for a transposed convolution D are the input's channels.
        bias: over the output's channels, or None.
        geometry: for a transposed convolution, that of the convolution whose input gradient it is.
        size: spatial size of what the geometry takes for the input: the output's, if transposed.
        transposed: whether the call was one of `F.conv_transpose*`.
        unbatched: whether the input has no axis N.
    """

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    geometry: Geometry
    size: tuple[int, ...]
    transposed: bool
    unbatched: bool

    def numel(self) -> int:
        """Count multiplied numbers: 0 where there is nothing to convolve, which a kernel need not know of."""
        return self.input.numel() * self.weight.numel()

    def autocast(self) -> "Convolution":
        """Cast the tensors as PyTorch's own function would: what is saved then has the dtype of the output."""
        device = self.input.device.type
        if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
            return self

        def cast(t: Tensor) -> Tensor:
            eligible = t.is_floating_point() and t.dtype != torch.float64
            return t.to(torch.get_autocast_dtype(device)) if eligible else t

        bias = None if self.bias is None else cast(self.bias)
        return self._replace(input=cast(self.input), weight=cast(self.weight), bias=bias)

    def offset(self, bias: Tensor) -> Tensor:
        """Lay a bias beside the output."""
        return bias.reshape(-1, *[1] * self.geometry.ndim)


def _read_plain(nd: int) -> Callable[..., Convolution]:
    def read(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Ints = 1,
        padding: str | Ints = 0,
        dilation: Ints = 1,
        groups: int = 1,
    ) -> Convolution:
        kernel, stride, dilation = tuple(weight.shape[2:]), _each(stride, nd), _each(dilation, nd)
        x, pad = _resolve_padding(input, padding, kernel, stride, dilation)
        geometry = Geometry(kernel, stride, pad, dilation, groups)
        return Convolution(x, weight, bias, geometry, tuple(x.shape[-nd:]), False, x.dim() == nd + 1)

    return read


def _read_transposed(nd: int) -> Callable[..., Convolution]:
    def read(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Ints = 1,
        padding: Ints = 0,
        output_padding: Ints = 0,
        groups: int = 1,
        dilation: Ints = 1,
    ) -> Convolution:
        g = input
        kernel = tuple(weight.shape[2:])
        geometry = Geometry(kernel, _each(stride, nd), _each(padding, nd), _each(dilation, nd), groups)
        size = geometry.transposed_size(g.shape[-nd:], _each(output_padding, nd))
        # With an output padding of a stride or more, `size` has room for outputs that the input lacks: they are zero.
        lacking = [o - n for o, n in zip(geometry.output_size(size), g.shape[-nd:], strict=True)]
        g = pad(g, [width for n in reversed(lacking) for width in (0, n)])
        return Convolution(g, weight, bias, geometry, size, True, g.dim() == nd + 1)

    return read


READERS: dict[Callable, Callable[..., Convolution]] = {
    torch.conv1d: _read_plain(1),
    torch.conv2d: _read_plain(2),
    torch.conv3d: _read_plain(3),
    F.conv_transpose1d: _read_transposed(1),
    F.conv_transpose2d: _read_transposed(2),
    F.conv_transpose3d: _read_transposed(3),
}
"""For each of PyTorch's convolution functions, one that takes its arguments and reads them."""


def _resolve_padding(
    x: Tensor, padding: str | Ints, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[Tensor, tuple[int, ...]]:
    """Turn 'same' and 'valid' into numbers; what 'same' adds on one side only is padded here and now."""
    if padding == "valid":
        return x, (0,) * len(kernel)
    if not isinstance(padding, str):
        return x, _each(padding, len(kernel))
    if padding != "same" or any(s != 1 for s in stride):
        raise ArgumentError(
            f"Expected numbers, 'valid', or 'same' with stride 1, got padding={padding!r} with stride={stride}"
        )
    totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    x = pad(x, [width for total in reversed(totals) for width in (0, total % 2)])
    return x, tuple(total // 2 for total in totals)


def _each(value: Ints, nd: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * nd if len(values) == 1 else values
