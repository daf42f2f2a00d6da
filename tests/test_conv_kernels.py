"""Every convolution kernel, over every geometry, against the oracle."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
import pegrad
from pegrad.rules import gram
from pegrad.rules.conv import norms
from pegrad.rules.conv.cost import gramming, stacking
from pegrad.rules.conv.geometry import Geometry

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")

KERNELS = [*pegrad.KERNELS, None]
CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
MODE = {"zeros": "constant", "reflect": "reflect", "circular": "circular", "replicate": "replicate"}


@st.composite
def convolutions(draw, max_ndim: int = 3):
    """Draw the loss of one convolution, plain or transposed, with parameters and a batch that fit it."""
    nd = draw(st.integers(1, max_ndim))
    axis = st.tuples(*[st.integers(1, 3)] * nd)
    kernel, stride, dilation = draw(axis), draw(axis), draw(axis)
    groups = draw(st.integers(1, 3))
    depth, per_group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    batch = draw(st.integers(1, 3))
    bias = draw(st.booleans())
    transposed = draw(st.booleans())
    images = draw(st.sampled_from([0, 1, 1, 2, 3]))  # 0: no axis for them
    torch.manual_seed(draw(st.integers(0, 2**16)))
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    if transposed:
        padding = tuple(draw(st.integers(0, (n - 1) // 2)) for n in reach)
        extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
        size = [draw(st.integers(1, 4)) for _ in range(nd)]
        weight = torch.randn(groups * depth, per_group, *kernel, dtype=torch.float64)
        arguments = {"stride": stride, "padding": padding, "output_padding": extra}
        function, mode = CONV_TRANSPOSE[nd], "zeros"
    else:
        mode = draw(st.sampled_from(list(MODE)))
        padding = draw(st.one_of(st.just("valid"), st.just("same"), st.tuples(*[st.integers(0, 2)] * nd)))
        if padding == "same":
            stride = (1,) * nd
        pads = padding if isinstance(padding, tuple) else (0,) * nd
        least = [max(n - 2 * p, p + 1, 1) for n, p in zip(reach, pads, strict=True)]
        size = [draw(st.integers(n, n + 3)) for n in least]
        weight = torch.randn(groups * per_group, depth, *kernel, dtype=torch.float64)
        arguments = {"stride": stride, "padding": padding}
        if mode != "zeros":
            arguments["padding"] = 0
        function = CONV[nd]
    arguments |= {"dilation": dilation, "groups": groups}
    params = {"w": weight}
    if bias:
        params["b"] = torch.randn(groups * per_group, dtype=torch.float64)
    batch_x = torch.randn(batch, *[images] * (images > 0), groups * depth, *size, dtype=torch.float64)

    def loss(params, x):
        if mode != "zeros" and isinstance(padding, tuple):
            widths = [p for n in reversed(padding) for p in (n, n)]
            x = F.pad(x, widths, mode=MODE[mode]) if images else F.pad(x[None], widths, mode=MODE[mode])[0]
        return function(x, params["w"], params.get("b"), **arguments).sin().sum()

    return loss, params, batch_x


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(convolutions())
def test_every_kernel_on_every_geometry(kernel, problem):
    """Catches: stride and dilation exchanged, groups cut along the wrong axis, a tail of the input read or dropped."""
    loss, params, batch = problem
    if kernel == "grouped" and params["w"].dim() == 5:
        kernel = "unfold"  # test_grouped_kernel_says_that_there_is_no_conv4d
    grads = pegrad.per_example_grad(loss, strategy=pegrad.GroupedConv(kernel))(params, batch)
    oracle.assert_close(grads, oracle.per_example_grads(loss, params, batch))


@pytest.mark.parametrize("strategy", [*pegrad.STRATEGIES])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(convolutions())
def test_every_strategy_on_every_geometry(strategy, problem):
    """Catches: a norm or a clipped sum that is right for square, dense, undilated convolutions only."""
    loss, params, batch = problem
    expected = oracle.per_example_grads(loss, params, batch)
    clip_norm = oracle.norms(expected).mean().item() + 1e-3
    out = pegrad.clipped_grad(loss, clip_norm=clip_norm, strategy=strategy)(params, batch)
    oracle.assert_close(out.norms, [oracle.norms(expected)])
    oracle.assert_close(out.grads, oracle.clipped_sum(expected, clip_norm))


@st.composite
def several_images(draw):
    """Draw a convolution, and input and output gradient of two examples of several images each."""
    nd = draw(st.integers(1, 3))
    axis = st.tuples(*[st.integers(1, 3)] * nd)
    kernel, stride, dilation = draw(axis), draw(axis), draw(axis)
    padding = draw(st.tuples(*[st.integers(0, 2)] * nd))
    geometry = Geometry(kernel, stride, padding, dilation, draw(st.integers(1, 2)))
    size = [d * (k - 1) + 1 + draw(st.integers(0, 3)) for k, d in zip(kernel, dilation, strict=True)]
    images = draw(st.integers(1, 4))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    x = torch.randn(2 * images, 2 * geometry.groups, *size, dtype=torch.float64)
    g = torch.randn(2 * images, 3 * geometry.groups, *geometry.output_size(size), dtype=torch.float64)
    return geometry, images, x, g


@settings(max_examples=100, deadline=None, derandomize=True)
@given(several_images(), st.sampled_from([1, 300, 1 << 21]))
def test_every_kernel_and_every_norm_over_several_images(problem, block):
    """Catches: images of one example that do not interfere, that go to other examples, or are cut from their own."""
    geometry, images, x, g = problem
    apart = zip(x.split(images), g.split(images), strict=True)
    exact = torch.stack([geometry.weight_gradient(*example) for example in apart])
    for name, kernel in pegrad.KERNELS.items():
        if name != "grouped" or geometry.ndim < 3:
            oracle.assert_close([kernel(x, g, geometry, images)], [exact])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(norms, "BLOCK", block)
        patch.setattr(gram, "BLOCK", block)
        found = [tuple(kernel(x, g, geometry, images)) for kernel in (norms.gram_box, norms.gram_unfolded)]
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-10)
    oracle.assert_close([found[0][0]], [exact.flatten(1).square().sum(1)])


def test_the_work_over_several_images_is_counted():
    """Catches: a cost model that takes the images of one example for examples."""
    geometry = Geometry((3, 3), (1, 1), (1, 1), (1, 1), 1)
    one, four = ((n * 8, 16, 8, 8) for n in (1, 4))
    for name, work in gramming(four, four, geometry, 4).items():
        ratio = work.multiply_adds / gramming(one, one, geometry)[name].multiply_adds
        assert ratio == {"gram_unfolded": 16, "gram_box": 10}[name]  # 4² pairs of images, or 4 · 5 / 2
    for name, work in stacking(four, four, geometry, 4).items():
        assert work.written == stacking(one, one, geometry)[name].written
        assert work.multiply_adds == 4 * stacking(one, one, geometry)[name].multiply_adds


def test_grouped_kernel_says_that_there_is_no_conv4d():
    x, g = torch.zeros(1, 1, 2, 2, 2), torch.zeros(1, 1, 1, 1, 1)
    geometry = Geometry((2,) * 3, (1,) * 3, (0,) * 3, (1,) * 3, 1)
    with pytest.raises(pegrad.ArgumentError, match="no conv4d"):
        pegrad.KERNELS["grouped"](x, g, geometry)
    assert "grouped" not in stacking(x.shape, g.shape, geometry)


def test_an_unknown_kernel_is_refused():
    with pytest.raises(pegrad.ArgumentError, match="'fft'"):
        pegrad.GroupedConv("fft")


def test_same_padding_refuses_a_stride():
    def loss(params, x):
        return F.conv1d(x, params, stride=2, padding="same").sum()

    with pytest.raises(pegrad.ArgumentError, match="'same' with stride 1"):
        pegrad.per_example_grad(loss, strategy="grouped_conv")(torch.zeros(1, 1, 3), torch.zeros(2, 1, 8))
