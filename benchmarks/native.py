"""The workloads' networks as ordinary modules: for the non-private gradient, and for peers that want a module.

Each builder declares its parameters in the order in which its counterpart in `pegrad.papers.models` does, so that a
module can be given that one's parameters.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pegrad.trees import PyTree


class Residual(nn.Module):
    """The sum of a skip and a branch."""

    def __init__(self, skip: nn.Module, branch: nn.Module) -> None:
        super().__init__()
        self.skip, self.branch = skip, branch

    def forward(self, x: Tensor) -> Tensor:
        """Add the two."""
        return self.skip(x) + self.branch(x)


class Embedding(nn.Module):
    """From a grid `(B, d, H, W)` to tokens `(B, 1 + H*W, d)`: a class token first, positions added."""

    def __init__(self, patches: int, dim: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, dim))
        self.positions = nn.Parameter(torch.zeros(patches + 1, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Put the class token before the patches."""
        tokens = x.flatten(2).transpose(1, 2)
        return torch.cat([self.token.expand(len(tokens), 1, -1), tokens], 1) + self.positions


class Attend(nn.Module):
    """Attention, from queries, keys and values side by side `(B, T, 3d)` to `(B, T, d)`."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        queries, keys, values = x.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2)


class ClassToken(nn.Module):
    """The first of the tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """Take it."""
        return x[:, 0]


class MeanPool(nn.Module):
    """The mean over all positions."""

    def forward(self, x: Tensor) -> Tensor:
        """Average."""
        return x.mean((2, 3))


def small_cnn() -> nn.Sequential:
    """See `pegrad.papers.models.small_cnn`."""
    layers: list[nn.Module] = []
    for before, after in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.Tanh()]
        layers += [nn.Conv2d(after, after, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2048, 128), nn.Tanh(), nn.Linear(128, 10))


def alexnet() -> nn.Sequential:
    """See `pegrad.papers.models.alexnet`."""
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.AdaptiveAvgPool2d(6), nn.Flatten(), nn.Linear(9216, 4096), nn.ReLU()),
        *(nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 1000)),
    )


def vgg(depth: int) -> nn.Sequential:
    """See `pegrad.papers.models.vgg`."""
    return nn.Sequential(*_vgg_features(depth), nn.Flatten(), nn.Linear(512, 10))


def vgg_imagenet(depth: int) -> nn.Sequential:
    """See `pegrad.papers.models.vgg_imagenet`."""
    return nn.Sequential(
        *(*_vgg_features(depth), nn.AdaptiveAvgPool2d(7), nn.Flatten(), nn.Linear(25088, 4096), nn.ReLU()),
        *(nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 1000)),
    )


def _vgg_features(depth: int) -> Iterator[nn.Module]:
    before = 3
    for count, after in zip(_VGG_CONVOLUTIONS[depth], (64, 128, 256, 512, 512), strict=True):
        for _ in range(count):
            yield nn.Conv2d(before, after, 3, padding=1)
            yield nn.ReLU()
            before = after
        yield nn.MaxPool2d(2)


_VGG_CONVOLUTIONS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


def resnet(depth: int) -> nn.Sequential:
    """See `pegrad.papers.models.resnet`; 18, 34 and 50 layers."""
    conv, norm = partial(nn.Conv2d, bias=False), partial(nn.GroupNorm, 32)
    bottlenecks = depth >= 50

    def branch(before: int, width: int, stride: int) -> tuple[nn.Module, ...]:
        if bottlenecks:
            return (
                *(conv(before, width, 1), norm(width), nn.ReLU()),
                *(conv(width, width, 3, stride=stride, padding=1), norm(width), nn.ReLU()),
                *(conv(width, 4 * width, 1), norm(4 * width)),
            )
        return (
            *(conv(before, width, 3, stride=stride, padding=1), norm(width), nn.ReLU()),
            *(conv(width, width, 3, padding=1), norm(width)),
        )

    layers: list[nn.Module] = [conv(3, 64, 3, padding=1), norm(64), nn.ReLU()]
    before = 64
    for stage, count in enumerate(_RESNET_BLOCKS[depth]):
        width = 64 << stage
        after = 4 * width if bottlenecks else width
        for stride in (1 if stage == 0 else 2, *[1] * (count - 1)):
            narrow = nn.Sequential(conv(before, after, 1, stride=stride), norm(after))
            skip = nn.Identity() if before == after else narrow
            layers += [Residual(skip, nn.Sequential(*branch(before, width, stride))), nn.ReLU()]
            before = after
    return nn.Sequential(*layers, MeanPool(), nn.Linear(before, 10))


_RESNET_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}


def wrn(depth: int, width: int) -> nn.Sequential:
    """See `pegrad.papers.models.wrn`; without weight standardisation."""

    def unit(before: int, after: int, kernel_size: int, stride: int) -> tuple[nn.Module, ...]:
        convolution = nn.Conv2d(before, after, kernel_size, stride, kernel_size // 2)
        return nn.ReLU(), nn.GroupNorm(16, before), convolution

    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1)]
    before = 16
    for stage in range(3):
        after = (16 << stage) * width
        for index in range((depth - 4) // 6):
            stride = 2 if stage > 0 and index == 0 else 1
            skip = nn.Sequential(*unit(before, after, 1, stride)) if index == 0 else nn.Identity()
            layers += [Residual(skip, nn.Sequential(*unit(before, after, 3, stride), *unit(after, after, 3, 1)))]
            before = after
    return nn.Sequential(*layers, nn.ReLU(), nn.GroupNorm(16, before), MeanPool(), nn.Linear(before, 10))


def vit() -> nn.Sequential:
    """See `pegrad.papers.models.vit`."""
    dim, heads, patches = 192, 3, 64
    layers: list[nn.Module] = [nn.Conv2d(3, dim, 4, 4), Embedding(patches, dim)]
    for _ in range(6):
        attention = nn.Linear(dim, 3 * dim), Attend(heads), nn.Linear(dim, dim)
        mlp = nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)
        layers += [Residual(nn.Identity(), nn.Sequential(nn.LayerNorm(dim), *branch)) for branch in (attention, mlp)]
    return nn.Sequential(*layers, nn.LayerNorm(dim), ClassToken(), nn.Linear(dim, 10))


def twin(build: Callable[[], nn.Module], params: PyTree) -> nn.Module:
    """Build a module around the tensors of `params` themselves, not copies.

    Args:
        build: one of the functions above.
        params: what the model of the same name in `pegrad.papers.models` has for parameters: nested dicts.

    Returns:
        The module, in training mode.
    """
    with torch.device("meta"):
        module = build()
    names = [name for name, _ in module.named_parameters()]
    module.load_state_dict(dict(zip(names, declared(params), strict=True)), assign=True)
    return module


def trained(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that require a gradient, in the order of their declaration."""
    return (parameter for parameter in module.parameters() if parameter.requires_grad)


def declared(params: PyTree) -> Iterator[Tensor]:
    """The tensors of nested dicts in the order of their declaration, which is a module's; optree's is another."""
    for value in params.values():
        if isinstance(value, dict):
            yield from declared(value)
        else:
            yield value


def restored(params: PyTree, tensors: Iterator[Tensor]) -> PyTree:
    """The inverse of `declared`: nested dicts like `params`, of the tensors in the order of their declaration."""
    return {
        name: restored(value, tensors) if isinstance(value, dict) else next(tensors) for name, value in params.items()
    }
