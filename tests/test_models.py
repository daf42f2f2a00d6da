"""One table of networks: each row holds the same network written with `torch.nn`, and both must agree.

Parameters are matched in the order in which both sides declare them, so a row also pins order and shapes.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pegrad import random, trees
from pegrad.errors import ArgumentError
from pegrad.papers import models
from pegrad.papers.models import MODELS, Model
from pegrad.papers.models.initialisers import kaiming_fan_out, normal, normal_fan_in, uniform_fan_in
from pegrad.papers.models.layers import conv, group_norm, linear, output_size, standardise


class Residual(nn.Module):
    def __init__(self, skip: nn.Module, branch: nn.Module) -> None:
        super().__init__()
        self.skip, self.branch = skip, branch

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.branch(x)


class StandardisedConv(nn.Conv2d):
    def __init__(self, *args: int, **options: int) -> None:
        super().__init__(*args, **options)
        self.gain = nn.Parameter(torch.ones(self.out_channels))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.flatten(1)
        variance, mean = torch.var_mean(rows, 1, correction=0, keepdim=True)
        rows = (rows - mean) / (variance * rows.shape[1]).sqrt() * self.gain[:, None]
        return F.conv2d(x, rows.view_as(self.weight), self.bias, self.stride, self.padding)


class Tokens(nn.Module):
    def __init__(self, patches: int, dim: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, dim))
        self.positions = nn.Parameter(torch.zeros(patches + 1, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).mT
        return torch.cat([self.token.expand(len(x), 1, -1), x], 1) + self.positions


class SelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


class Select(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0]


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def nn_toy(channels: int, rate: float, layers: int, kernel_size: int, image_size: int) -> nn.Module:
    widths = [3, *(int(channels * rate**index) for index in range(layers))]
    stack: list[nn.Module] = []
    for index in range(layers):
        stack += [nn.Conv2d(widths[index], widths[index + 1], kernel_size, padding=2), nn.ReLU()]
        stack += [nn.MaxPool2d(2)] if index in (1, 3, 5) else []
    size = image_size
    for index in range(layers):
        size = (size + 5 - kernel_size) // (2 if index in (1, 3, 5) else 1)
    return nn.Sequential(*stack, nn.Flatten(), nn.Linear(widths[-1] * size * size, 10))


def nn_mnist(features: int) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(features, 128), nn.ReLU(), nn.Linear(128, 10)),
    )


def nn_tanh() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 8, 2, 3), nn.Tanh(), nn.MaxPool2d(2, 1)),
        *(nn.Conv2d(16, 32, 4, 2), nn.Tanh(), nn.MaxPool2d(2, 1)),
        *(nn.Flatten(), nn.Linear(512, 32), nn.Tanh(), nn.Linear(32, 10)),
    )


def nn_small() -> nn.Module:
    stack: list[nn.Module] = []
    for before, after in ((3, 32), (32, 64), (64, 128)):
        stack += [nn.Conv2d(before, after, 3, padding=1), nn.Tanh()]
        stack += [nn.Conv2d(after, after, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2)]
    return nn.Sequential(*stack, nn.Flatten(), nn.Linear(2048, 128), nn.Tanh(), nn.Linear(128, 10))


def nn_alexnet(num_classes: int, hidden: int) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.AdaptiveAvgPool2d(6), nn.Flatten()),
        *(nn.Linear(9216, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, num_classes)),
    )


VGG_LAYERS = {
    11: "64 M 128 M 256 256 M 512 512 M 512 512 M",
    13: "64 64 M 128 128 M 256 256 M 512 512 M 512 512 M",
    16: "64 64 M 128 128 M 256 256 256 M 512 512 512 M 512 512 512 M",
    19: "64 64 M 128 128 M 256 256 256 256 M 512 512 512 512 M 512 512 512 512 M",
}


def nn_vgg(depth: int, *classifier: nn.Module) -> nn.Module:
    stack: list[nn.Module] = []
    before = 3
    for word in VGG_LAYERS[depth].split():
        if word == "M":
            stack += [nn.MaxPool2d(2)]
        else:
            stack += [nn.Conv2d(before, int(word), 3, padding=1), nn.ReLU()]
            before = int(word)
    return nn.Sequential(*stack, *classifier)


def nn_vgg_small(depth: int) -> nn.Module:
    return nn_vgg(depth, nn.Flatten(), nn.Linear(512, 10))


def nn_vgg_imagenet(depth: int, num_classes: int, hidden: int) -> nn.Module:
    hidden_layers = (nn.Linear(25088, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
    return nn_vgg(depth, nn.AdaptiveAvgPool2d(7), nn.Flatten(), *hidden_layers, nn.Linear(hidden, num_classes))


PlainConv = partial(nn.Conv2d, bias=False)


def nn_resnet(
    depth: int, imagenet: bool = False, num_classes: int = 10, groups: int = 32, conv: Callable = PlainConv
) -> nn.Module:
    norm = partial(nn.GroupNorm, groups)
    stem = [conv(3, 64, 7, stride=2, padding=3) if imagenet else conv(3, 64, 3, padding=1), norm(64), nn.ReLU()]
    stack: list[nn.Module] = [*stem, *([nn.MaxPool2d(3, 2, 1)] if imagenet else [])]
    expansion = 4 if depth == 50 else 1
    before = 64
    for stage, count in enumerate((2, 2, 2, 2) if depth == 18 else (3, 4, 6, 3)):
        for stride in (1 if stage == 0 else 2, *[1] * (count - 1)):
            width = 64 << stage
            after = width * expansion
            project = stride == 2 or before != after
            skip = nn.Sequential(conv(before, after, 1, stride=stride), norm(after)) if project else nn.Identity()
            if depth == 50:
                branch = nn.Sequential(
                    *(conv(before, width, 1), norm(width), nn.ReLU()),
                    *(conv(width, width, 3, stride=stride, padding=1), norm(width), nn.ReLU()),
                    *(conv(width, after, 1), norm(after)),
                )
            else:
                branch = nn.Sequential(
                    *(conv(before, width, 3, stride=stride, padding=1), norm(width), nn.ReLU()),
                    *(conv(width, width, 3, padding=1), norm(width)),
                )
            stack += [Residual(skip, branch), nn.ReLU()]
            before = after
    return nn.Sequential(*stack, Mean(), nn.Linear(before, num_classes))


def nn_wrn(depth: int, width: int, groups: int = 16, conv: Callable = nn.Conv2d) -> nn.Module:
    def unit(before: int, after: int, kernel_size: int, stride: int) -> nn.Module:
        convolution = conv(before, after, kernel_size, stride=stride, padding=kernel_size // 2)
        return nn.Sequential(nn.ReLU(), nn.GroupNorm(groups, before), convolution)

    stack: list[nn.Module] = [conv(3, 16, 3, padding=1)]
    before = 16
    for after, first_stride in ((16 * width, 1), (32 * width, 2), (64 * width, 2)):
        for index in range((depth - 4) // 6):
            stride = first_stride if index == 0 else 1
            skip = unit(before, after, 1, stride) if index == 0 else nn.Identity()
            stack += [Residual(skip, nn.Sequential(unit(before, after, 3, stride), unit(after, after, 3, 1)))]
            before = after
    return nn.Sequential(*stack, nn.ReLU(), nn.GroupNorm(groups, before), Mean(), nn.Linear(before, 10))


def nn_vit(patches: int, patch_size: int, dim: int, depth: int, heads: int, ratio: int) -> nn.Module:
    stack: list[nn.Module] = [nn.Conv2d(3, dim, patch_size, patch_size), Tokens(patches, dim)]
    for _ in range(depth):
        mlp = (nn.Linear(dim, ratio * dim), nn.GELU(), nn.Linear(ratio * dim, dim))
        stack += [Residual(nn.Identity(), nn.Sequential(nn.LayerNorm(dim), SelfAttention(dim, heads)))]
        stack += [Residual(nn.Identity(), nn.Sequential(nn.LayerNorm(dim), *mlp))]
    return nn.Sequential(*stack, nn.LayerNorm(dim), Select(), nn.Linear(dim, 10))


class Row(NamedTuple):
    """A network of ours, torch's, and the shape of an image."""

    ours: Callable[[], Model]
    theirs: Callable[[], nn.Module]
    image: tuple[int, int, int]


def toy_row(**options: float) -> Row:
    size = int(options["image_size"])
    return Row(partial(models.toy_cnn, **options), partial(nn_toy, **options), (3, size, size))


# Small enough to run in float64; every branch of every builder is taken.
ROWS = {
    "toy, 2 layers": toy_row(channels=4, rate=1.0, layers=2, kernel_size=5, image_size=16),
    "toy, 5 layers": toy_row(channels=3, rate=1.4, layers=5, kernel_size=3, image_size=13),
    "mnist": Row(models.mnist_cnn, partial(nn_mnist, 9216), (1, 28, 28)),
    "mnist on digits": Row(partial(models.mnist_cnn, image_size=8), partial(nn_mnist, 256), (1, 8, 8)),
    "tanh": Row(models.tanh_cnn, nn_tanh, (1, 28, 28)),
    "small": Row(models.small_cnn, nn_small, (3, 32, 32)),
    "alexnet": Row(
        partial(models.alexnet, image_size=70, num_classes=7, hidden_features=5),
        partial(nn_alexnet, 7, 5),
        (3, 70, 70),
    ),
    "vgg11": Row(partial(models.vgg, 11), partial(nn_vgg_small, 11), (3, 32, 32)),
    "vgg16": Row(partial(models.vgg, 16), partial(nn_vgg_small, 16), (3, 32, 32)),
    "vgg13 imagenet": Row(
        partial(models.vgg_imagenet, 13, image_size=32, num_classes=7, hidden_features=64),
        partial(nn_vgg_imagenet, 13, 7, 64),
        (3, 32, 32),
    ),
    "resnet18": Row(partial(models.resnet, 18, image_size=16), partial(nn_resnet, 18), (3, 16, 16)),
    "resnet18 standardised": Row(
        partial(models.resnet, 18, image_size=16, groups=4, weight_standardisation=True),
        partial(nn_resnet, 18, groups=4, conv=StandardisedConv),
        (3, 16, 16),
    ),
    "resnet50 imagenet": Row(
        partial(models.resnet_imagenet, 50, image_size=40, num_classes=7),
        partial(nn_resnet, 50, imagenet=True, num_classes=7),
        (3, 40, 40),
    ),
    "wrn": Row(partial(models.wrn, 16, 2, image_size=16), partial(nn_wrn, 16, 2), (3, 16, 16)),
    "wrn, standardised": Row(
        partial(models.wrn, 10, 1, image_size=16, groups=8, weight_standardisation=True),
        partial(nn_wrn, 10, 1, groups=8, conv=StandardisedConv),
        (3, 16, 16),
    ),
    "vit": Row(
        partial(models.vit, image_size=12, patch_size=3, dim=24, depth=2, heads=4, mlp_ratio=3),
        partial(nn_vit, 16, 3, 24, 2, 4, 3),
        (3, 12, 12),
    ),
}
every_row = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())


def declared(params: dict) -> Iterator[Tensor]:
    """The tensors of nested dicts in the order of their declaration, which optree does not keep."""
    for value in params.values():
        if isinstance(value, dict):
            yield from declared(value)
        else:
            yield value


def count(params: dict) -> int:
    return sum(leaf.numel() for leaf in trees.leaves(params))


def perturbed(params: dict) -> dict:
    """The same in float64, and with no weight or bias left at 0 or 1, where it could go unused unseen."""
    generator = torch.Generator().manual_seed(1)
    return trees.map(lambda p: p.double() + 0.1 * torch.randn(p.shape, generator=generator).double(), params)


def images(row: Row, batch: int) -> Tensor:
    return torch.randn(batch, *row.image, generator=torch.Generator().manual_seed(2)).double()


@every_row
def test_equals_torch_nn_and_a_loop(row: Row) -> None:
    """Catches: any layer, stride, padding or order that differs; an `apply` that couples the examples of a vmap."""
    model = row.ours()
    params = perturbed(model.init(random.key(0)))
    reference = row.theirs().double()
    ours, theirs = list(declared(params)), list(reference.parameters())
    assert [leaf.shape for leaf in ours] == [leaf.shape for leaf in theirs]
    with torch.no_grad():
        for source, target in zip(ours, theirs, strict=True):
            target.copy_(source)
        batch = images(row, 2)
        expected = reference(batch)
        vmapped = torch.func.vmap(model.apply, (None, 0))(params, batch)
        looped = torch.stack([model.apply(params, image) for image in batch])
    assert expected.std(0).min() > 0
    tolerance = 1e-10 * expected.abs().max().item()
    torch.testing.assert_close(vmapped, expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(looped, expected, rtol=0, atol=tolerance)


@pytest.fixture
def shapes_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Build parameters without numbers in them, to count those of networks that are too large to draw."""

    def empty(key: None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    monkeypatch.setattr(random, "uniform", empty)
    monkeypatch.setattr(random, "normal", empty)
    monkeypatch.setattr(random, "fold_in", lambda key, data: key)
    monkeypatch.setattr(random, "split", lambda key, num: (key,) * num)
    with torch.device("meta"):
        yield


@pytest.mark.usefixtures("shapes_only")
@pytest.mark.parametrize(
    ("name", "reference", "expected"),
    [
        ("toy_cnn", partial(nn_toy, 25, 1.0, 2, 5, 256), 4_113_560),
        ("mnist_cnn", partial(nn_mnist, 9216), 1_199_882),
        ("tanh_cnn", nn_tanh, 26_010),
        ("small_cnn", nn_small, 550_570),
        ("alexnet", partial(nn_alexnet, 1000, 4096), 61_100_840),
        ("vgg11_imagenet", partial(nn_vgg_imagenet, 11, 1000, 4096), 132_863_336),
        ("vgg13_imagenet", partial(nn_vgg_imagenet, 13, 1000, 4096), 133_047_848),
        ("vgg16_imagenet", partial(nn_vgg_imagenet, 16, 1000, 4096), 138_357_544),
        ("vgg19_imagenet", partial(nn_vgg_imagenet, 19, 1000, 4096), 143_667_240),
        ("vgg11", partial(nn_vgg_small, 11), 9_225_610),
        ("vgg13", partial(nn_vgg_small, 13), 9_410_122),
        ("vgg16", partial(nn_vgg_small, 16), 14_719_818),
        ("vgg19", partial(nn_vgg_small, 19), 20_029_514),
        ("resnet18_imagenet", partial(nn_resnet, 18, True, 1000), 11_689_512),
        ("resnet34_imagenet", partial(nn_resnet, 34, True, 1000), 21_797_672),
        ("resnet50_imagenet", partial(nn_resnet, 50, True, 1000), 25_557_032),
        ("resnet18", partial(nn_resnet, 18), 11_173_962),
        ("resnet34", partial(nn_resnet, 34), 21_282_122),
        ("resnet50", partial(nn_resnet, 50), 23_520_842),
        ("wrn16_4", partial(nn_wrn, 16, 4), 2_751_562),
        ("wrn40_4", partial(nn_wrn, 40, 4), 8_955_466),
        ("vit", partial(nn_vit, 64, 4, 192, 6, 3, 4), 2_693_578),
    ],
)
def test_default_sizes(name: str, reference: Callable[[], nn.Module], expected: int) -> None:
    """Catches: a default that is not the published network, whose parameter count is written here."""
    theirs = reference()
    params = MODELS[name]().init(None)
    assert [leaf.shape for leaf in declared(params)] == [leaf.shape for leaf in theirs.parameters()]
    assert count(params) == expected


@pytest.mark.usefixtures("shapes_only")
@pytest.mark.parametrize("name", MODELS)
def test_every_named_model_takes_size_channels_and_classes(name: str) -> None:
    """Catches: a builder that ignores one of the three, or one that is missing from the table's contract."""
    model = MODELS[name](image_size=64, in_channels=2, num_classes=7)
    params = model.init(None)
    assert model.apply(params, torch.empty(2, 64, 64)).shape == (7,)
    assert all(leaf.dtype == torch.float32 for leaf in trees.leaves(params))


@every_row
def test_init_is_a_function_of_the_key(row: Row) -> None:
    """Catches: a global generator, and one key used for two tensors."""
    init = row.ours().init
    first, again, other = init(random.key(0)), init(random.key(0)), init(random.key(1))
    heads = set()
    drawn = 0
    for left, same, different in zip(*(trees.leaves(params) for params in (first, again, other)), strict=True):
        assert torch.equal(left, same)
        if left.min() < left.max():
            assert not torch.equal(left, different)
            # The signs of a tensor survive the scale of its law, so equal keys would show here.
            heads.add(tuple(left.flatten()[:24].sign().tolist()) if left.numel() >= 24 else (drawn,))
            drawn += 1
    assert len(heads) == drawn > 0


@pytest.mark.parametrize(
    ("initialiser", "weight_std", "bias_bound"),
    [
        (uniform_fan_in, math.sqrt(1 / 3 / 180), math.sqrt(1 / 180)),
        (normal_fan_in, math.sqrt(1 / 180), 0),
        (kaiming_fan_out, math.sqrt(2 / 4500), 0),
        (normal(0.01), 0.01, 0),
    ],
    ids=["uniform_fan_in", "normal_fan_in", "kaiming_fan_out", "normal"],
)
def test_initialisers_follow_their_law(initialiser: Callable, weight_std: float, bias_bound: float) -> None:
    """Catches: fan_in for fan_out, a variance for a standard deviation, a law that is not centred."""
    params = initialiser(random.key(0), (500, 20, 3, 3))
    weight, bias = params["weight"], params["bias"]
    assert weight.std().item() == pytest.approx(weight_std, rel=0.02)
    assert abs(weight.mean().item()) < 5 * weight_std / math.sqrt(weight.numel())
    assert bias.shape == (500,)
    assert bias.abs().max() <= bias_bound
    assert bias.std().item() == pytest.approx(bias_bound / math.sqrt(3), rel=0.1)
    if initialiser is uniform_fan_in:
        assert weight.abs().max() <= bias_bound


@every_row
def test_a_fresh_network_neither_dies_nor_explodes(row: Row) -> None:
    """Catches: a law of the wrong scale in one of the networks, through which logits or gradients would vanish."""
    model = row.ours()
    params = model.init(random.key(0))
    image = images(row, 1)[0].float()

    def loss(params: dict) -> tuple[Tensor, Tensor]:
        logits = model.apply(params, image)
        return F.cross_entropy(logits, torch.tensor(3)), logits

    grads, logits = torch.func.grad(loss, has_aux=True)(params)
    assert 1e-3 < logits.abs().max() < 20
    assert all(leaf.any() for leaf in trees.leaves(grads))


def test_standardised_weights() -> None:
    """Catches: a variance that ignores the fan-in, statistics over all channels at once, NaN at a constant channel."""
    weight = 3 + 2 * torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(0)).double()
    rows = standardise(weight).flatten(1)
    torch.testing.assert_close(rows.mean(1), torch.zeros(5).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(rows.square().sum(1), torch.ones(5).double(), rtol=1e-12, atol=0)
    grad = torch.func.grad(lambda weight: standardise(weight).square().sum())(torch.ones(2, 1, 3, 3))
    assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("shape", [(2, 1, 28, 28), (28, 28), (3, 28, 28), (1, 8, 8)], ids=str)
def test_apply_refuses_what_is_not_one_image(shape: tuple[int, ...]) -> None:
    """Catches: a batch that convolutions take in silence and the linear layer then mixes."""
    model = models.mnist_cnn()
    with pytest.raises(ArgumentError, match=r"one image of shape \(1, 28, 28\), got shape .*vmap"):
        model.apply(model.init(random.key(0)), torch.zeros(shape))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: models.vgg(12), r"\[11, 13, 16, 19\], got depth=12"),
        (lambda: models.vgg_imagenet(12), r"\[11, 13, 16, 19\], got depth=12"),
        (lambda: models.resnet(20), r"\[18, 34, 50\], got depth=20"),
        (lambda: models.resnet(18, groups=48), r"64 channels of a layer, got groups=48"),
        (lambda: models.wrn(4), r"6n \+ 4.*got depth=4"),
        (lambda: models.wrn(18), r"6n \+ 4.*got depth=18"),
        (lambda: models.vit(image_size=30), r"patch_size=4 and image_size=30"),
        (lambda: models.vit(heads=5), r"heads=5 and dim=192"),
        (lambda: models.vit(patch_size=0), r"patch_size=0"),
        (lambda: models.toy_cnn(rate=0.01), r"out_channels=0"),
        (lambda: models.mnist_cnn(num_classes=0), r"out_features=0"),
        (lambda: models.mnist_cnn(image_size=5), r"image_size .* got 5"),
        (lambda: models.tanh_cnn(image_size=8), r"image_size .* got 8"),
        (lambda: models.small_cnn(image_size=7), r"image_size .* got 7"),
        (lambda: models.alexnet(image_size=62), r"image_size .* got 62"),
        (lambda: models.vgg(11, image_size=31), r"image_size .* got 31"),
        (lambda: models.vgg_imagenet(11, image_size=31), r"image_size .* got 31"),
        (lambda: models.resnet(18, in_channels=0), r"in_channels=0"),
        (lambda: conv(1, 1, 3, stride=0), r"stride=0"),
        (lambda: conv(1, 1, 3, padding=-1), r"padding=-1"),
        (lambda: linear(0, 1), r"in_features=0"),
        (lambda: group_norm(0, 4), r"groups=0"),
    ],
)
def test_bad_sizes_are_named(build: Callable[[], Model], words: str) -> None:
    """Catches: a bound that is missing, which would surface inside torch on the first image."""
    with pytest.raises(ArgumentError, match=words):
        build()


def test_smallest_images() -> None:
    """Catches: a bound in the documentation that is off by one."""
    for build, size in (
        (models.mnist_cnn, 6),
        (models.tanh_cnn, 14),
        (models.small_cnn, 8),
        (models.alexnet, 63),
        (partial(models.vgg, 11), 32),
    ):
        build(image_size=size)
        with pytest.raises(ArgumentError, match="image_size"):
            build(image_size=size - 1)
    assert output_size(7, (3, 2, 1), (2, 1, 0)) == 3
