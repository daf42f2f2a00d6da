"""Rules and their kernels: every one against the stacked gradient; blocks; memory; a rule of one's own."""

import gc
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import oracle
import pegrad
from pegrad import random
from pegrad.call import Call
from pegrad.papers import models
from pegrad.plan.parts import Part
from pegrad.reductions.guarded import Found, Magnitudes, guarded
from pegrad.rules import gram
from pegrad.rules.conv import kernels, norms
from pegrad.rules.conv.geometry import Geometry
from pegrad.rules.costs import Work
from pegrad.rules.gram import SharedGram, gram_norm
from pegrad.rules.linear import LinearWeight


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def r(*shape):
    return torch.randn(shape, dtype=torch.float64)


def everything(params, example):
    """Meets each rule once."""
    image, tokens = example
    x = F.conv2d(image, params["conv"], stride=2, padding=1, dilation=2, groups=2)
    x = F.conv_transpose2d(x, params["back"], stride=2)
    x = F.group_norm(x[None], 2, params["scale"], params["shift"])[0].tanh()
    y = F.linear(x.flatten(1).T, params["weight"], params["bias"])
    z = F.embedding(tokens, params["table"], padding_idx=0) @ params["matrix"]
    return (y.sum(0) * z.cos()).sum()


PARAMS = {
    "conv": r(6, 2, 3, 2),
    "back": r(6, 4, 2, 3),
    "scale": r(4),
    "shift": r(4),
    "weight": r(5, 4),
    "bias": r(5),
    "table": r(7, 3),
    "matrix": r(3, 5),
}
BATCH = (r(4, 4, 8, 7), torch.randint(0, 7, (4, 6)))


def test_every_kernel_of_every_site_agrees_with_the_stacked_gradient():
    """Catches: any kernel that is wrong but never the cheapest, and so never chosen by the other tests."""
    trace = pegrad.BookKeeping().trace(Call.of(everything, PARAMS, BATCH, None).problem)
    seen = []

    def receive(tapped, x, g):
        for site in tapped.sites:
            shapes = tuple(x.shape), tuple(g.shape)
            stacks = {name: kernel.run(x, g) for name, kernel in site.stacking(*shapes).items()}
            first = next(iter(stacks.values()))
            for leaf, rows in zip(trace.params, expected, strict=True):
                if site.source is leaf:
                    torch.testing.assert_close(first, rows, rtol=1e-10, atol=1e-12)
            for rows in stacks.values():
                torch.testing.assert_close(rows, first, rtol=1e-10, atol=1e-12)
            for kernel in site.norming(*shapes).values():
                squares, terms, inputs, outputs = kernel.run(x, g)
                torch.testing.assert_close(squares, first.flatten(1).square().sum(1), rtol=1e-10, atol=1e-12)
                assert (squares <= terms * site.positions(*shapes) * (1 + 1e-9)).all()  # as Cauchy and Schwarz say
                assert (squares <= inputs * outputs * (1 + 1e-9)).all()
            if site.bounded:
                magnitudes = Magnitudes(site, x, g)
                positions, amplitude = magnitudes.positions, site.amplitude(*magnitudes.bounds, magnitudes.positions)
                assert (first.flatten(1).norm(dim=1) <= amplitude).all()
                assert (site.exact(x, g) - first).abs().max() <= 1e-12 * amplitude.max()
                assert positions >= 1
            native = site.summing(*shapes)
            if native:
                torch.testing.assert_close(native.run(x, g), first.sum(0), rtol=1e-10, atol=1e-12)
            seen.extend([site.operation, *stacks, *site.norming(*shapes)])

    expected = oracle.per_example_grads(everything, dict(sorted(PARAMS.items())), BATCH)
    trace.backward(receive)
    assert {"conv2d", "conv_transpose2d", "group norm scale", "linear", "gram_box", "segments"} <= set(seen)


OPTIONS = {
    "a constant bias": lambda p, x: F.linear(x[0, 0], p["w"], torch.arange(3.0).double()),
    "addmm by alpha and beta": lambda p, x: torch.addmm(p["b"], x[0, 0], p["w"].T, beta=0.5, alpha=3.0),
    "addmm to a constant": lambda p, x: torch.addmm(torch.ones(3).double(), x[0, 0], p["w"].T, beta=0.5, alpha=3.0),
    "padding from the end": lambda p, x: F.embedding(tokens(x), p["w"], padding_idx=-1),
    "padding": lambda p, x: F.embedding(tokens(x), p["w"], padding_idx=1),
    "gradients by frequency": lambda p, x: F.embedding(tokens(x), p["w"], scale_grad_by_freq=True),
    "group norm": lambda p, x: F.group_norm(x, 1, p["s"], p["s"], eps=0.5),
    "instance norm": lambda p, x: F.instance_norm(x, weight=p["s"], bias=p["s"], eps=0.5),
    "layer norm": lambda p, x: F.layer_norm(x, (5,), p["v"], p["v"], eps=0.5),
    "rms norm": lambda p, x: F.rms_norm(x, (5,), p["v"], eps=0.5),
    "a bias over several images": lambda p, x: F.conv2d(x, p["k"], p["b"]),
    "a transposed one's bias": lambda p, x: F.conv_transpose2d(x, p["k"].mT.transpose(0, 1), p["b"]),
}


def tokens(x):
    return (x[0, 0, 0] > 0).long() + (x[0, 0, 0] > 1)


@pytest.mark.parametrize("strategy", pegrad.STRATEGIES)
@pytest.mark.parametrize("name", OPTIONS)
def test_options_and_constants(name, strategy):
    """Catches: an argument that a rule reads and forgets; several images whose gradients go to other examples."""

    def loss(params, x):
        y = OPTIONS[name](params, x)
        return (y + torch.arange(y.numel()).view(y.shape)).sin().sum()  # no two positions alike

    params = {"w": r(3, 5), "v": r(5), "k": r(3, 2, 2, 2), "b": r(3), "s": r(2)}
    batch = r(4, 3, 2, 4, 5)
    expected = oracle.per_example_grads(loss, params, batch)
    out = pegrad.clipped_grad(loss, clip_norm=oracle.norms(expected).median().item(), strategy=strategy)(params, batch)
    oracle.assert_close(out.grads, oracle.clipped_sum(expected, oracle.norms(expected).median().item()))
    oracle.assert_close(out.norms, [oracle.norms(expected)])
    oracle.assert_close(out.losses, [torch.stack([loss(params, x) for x in batch])])


@pytest.mark.parametrize("strategy", ["ghost", "book_keeping"])
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("operation", ["convolution", "norm", "linear", "tied", "made"])
@pytest.mark.parametrize("block", [4, 200])
def test_gradients_stacked_in_parts(operation, images, strategy, block, monkeypatch):
    """Catches: an example of several images cut in two, a last part lost, a part weighed by another's weights."""
    monkeypatch.setattr("pegrad.reductions.native.BLOCK", block)
    monkeypatch.setattr("pegrad.reductions.native.FEW", 2)
    monkeypatch.setattr("pegrad.numerics.BLOCK", 200)
    params = {"k": r(3, 2, 2, 2), "b": r(3), "w": r(4, 4), "c": r(4)}

    def loss(params, x):
        if operation == "convolution":
            return F.conv2d(x, params["k"], params["b"]).sin().sum()
        if operation == "norm":
            return F.layer_norm(x, (4,), params["c"]).sin().sum()
        if operation == "made":
            return F.conv2d(x, params["k"] / params["k"].norm()).sin().sum()
        y = F.linear(x, params["w"], params["c"]).sin()
        return (F.linear(y, params["w"]) if operation == "tied" else y).square().sum()

    batch = r(7, images, 2, 4, 4)
    expected = oracle.per_example_grads(loss, params, batch)
    for clip_norm in (oracle.norms(expected).median().item(), 1e9):
        out = pegrad.clipped_grad(loss, clip_norm=clip_norm, strategy=strategy)(params, batch)
        oracle.assert_close(out.norms, [oracle.norms(expected)])
        oracle.assert_close(out.grads, oracle.clipped_sum(expected, clip_norm))
    oracle.assert_close(pegrad.per_example_norm(loss, strategy=strategy)(params, batch), [oracle.norms(expected)])


@pytest.mark.parametrize("strategy", ["ghost", "book_keeping"])
def test_several_images_whose_gradients_cancel(strategy):
    """Catches: an example that is made again in float64 from the images of others."""
    x, g = torch.rand(6, 2, 64, 4, 4), torch.rand(6, 2, 64, 4, 4)
    x[3] = x[3, :1] + torch.tensor([0.0, 1e-5])[:, None, None, None]
    g[3] = 1e4 * g[3, :1] * torch.tensor([1.0, -1.0])[:, None, None, None]

    def loss(params, example):
        return (F.conv2d(example[0], params, padding=1) * example[1]).sum()

    params = torch.zeros(64, 64, 3, 3)
    expected = oracle.per_example_grads(loss, params, (x, g))
    out = pegrad.clipped_grad(loss, clip_norm=100.0, strategy=strategy)(params, (x, g))
    oracle.assert_close(out.norms.double(), [oracle.norms(expected)], relative=1e-5)
    oracle.assert_close(out.grads.double(), oracle.clipped_sum(expected, 100.0), relative=1e-4)


def test_bounds_are_reached():
    """Catches: a bound on a site's terms that random data stay below, but not a constant image or a repeated token."""

    def loss(params, example):
        image, tokens, x = example
        y = F.conv2d(image, params["conv"]).sum() + F.embedding(tokens, params["table"]).sum()
        y = y + F.conv_transpose2d(image.expand(4, -1, -1, -1), params["back"])[:, :, 2:-2, 2:-2].sum()
        return y + F.linear(x, params["weight"]).sum() + torch.bmm(x[None], params["block"]).sum()

    params = {"conv": r(2, 1, 3, 3), "back": r(1, 2, 3, 3), "table": r(4, 3), "weight": r(2, 3), "block": r(1, 3, 2)}
    batch = torch.ones(2, 1, 40, 40).double(), torch.ones(2, 9).long(), torch.ones(2, 5, 3).double()
    ratios = {}

    def receive(tapped, x, g):
        for site in tapped.sites:
            exact = site.exact(x, g).flatten(1).norm(dim=1)
            ratios[site.operation] = float(
                (exact / site.amplitude(*Magnitudes(site, x, g).bounds, Magnitudes(site, x, g).positions)).max()
            )

    pegrad.BookKeeping().trace(Call.of(loss, params, batch, None).problem).backward(receive)
    assert ratios.keys() == {"conv2d", "conv_transpose2d", "embedding", "linear", "matmul"}
    assert all(0.9 < ratio <= 1 for ratio in ratios.values())


@pytest.mark.parametrize("positions", [23, 65])
@pytest.mark.parametrize("block", [1, 40, 1000, 1 << 24])
def test_blocked_and_unblocked_gram_kernels_agree(block, positions, monkeypatch):
    """Catches: a last block cut short, an off-diagonal block counted once, a block without the kernel's reach."""
    x, g = r(3, positions, 4), r(3, positions, 5)
    exact = (g.mT @ x).flatten(1).square().sum(1)
    terms = (g.square().sum(2) * x.square().sum(2)).sum(1)
    inputs, outputs = x.square().sum((1, 2)), g.square().sum((1, 2))
    torch.testing.assert_close(tuple(gram_norm(x, g, block)), (exact, terms, inputs, outputs), rtol=1e-10, atol=0)
    monkeypatch.setattr(norms, "BLOCK", block)
    monkeypatch.setattr(gram, "BLOCK", block)
    for stride, dilation, groups in [(1, 1, 1), (2, 1, 2), (1, 2, 2), (3, 2, 1)]:
        geometry = Geometry((3, 2), (stride, 1), (1, 2), (dilation, 1), groups)
        image = r(3, 4, 11, 9)
        out = r(3, 6, *geometry.output_size((11, 9)))
        exact = pegrad.KERNELS["loop"](image, out, geometry).flatten(1).square().sum(1)
        windows = kernels.windows(image.unflatten(1, (groups, -1)).flatten(0, 1), geometry)
        lengths = windows.square().sum((1, 4, 5)) * out.unflatten(1, (groups, -1)).flatten(0, 1).square().sum(1)
        terms = lengths.reshape(3, -1).sum(1)
        inputs, outputs = windows.square().reshape(3, -1).sum(1), out.square().sum((1, 2, 3))
        for kernel in (norms.gram_box, norms.gram_unfolded):
            found = tuple(kernel(image, out, geometry))
            torch.testing.assert_close(found, (exact, terms, inputs, outputs), rtol=1e-10, atol=0)


@pytest.mark.parametrize("positions", [3, 60])
def test_a_gram_matrix_that_two_weights_share_is_of_the_gradient_that_both_met(positions, monkeypatch):
    """Catches: that of an earlier gradient, or of one changed since; one made twice, kept for nobody, or too large."""
    x, y, g = r(2, positions, 4), r(2, positions, 5), r(2, positions, 6)
    made = []
    product, shared = gram.gram, SharedGram()
    monkeypatch.setattr(gram, "gram", lambda rows, *columns: (made.append(rows), product(rows, *columns))[1])

    def check(x, g):
        made.clear()
        exact = (g.mT @ x).flatten(1).square().sum(1)
        torch.testing.assert_close(gram_norm(x, g, gram_of_g=shared).norms, exact, rtol=1e-10, atol=0)
        return sum(rows is g for rows in made)

    first = check(x, g)
    assert check(y, g) == 0
    assert not shared._blocks
    assert check(x, g) == first
    assert check(y, 2 * g) == first
    assert check(x, g) == first
    g.mul_(3)
    assert check(y, g) == first
    monkeypatch.setattr(gram, "BLOCK", 1)
    check(x, g.clone())
    assert not shared._blocks


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes, views of smaller ones apart."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor):
                self.numbers = max(self.numbers, t.untyped_storage().nbytes() // t.element_size())
        return out


def test_gram_memory_is_bounded_whatever_the_number_of_positions(monkeypatch):
    """Catches: a T x T matrix."""
    block = 1 << 14
    monkeypatch.setattr(norms, "BLOCK", block)
    x, g = torch.randn(2, 1500, 3), torch.randn(2, 1500, 3)
    with Largest() as largest:
        gram_norm(x, g, block)
    assert largest.numbers <= block
    geometry = Geometry((3, 3), (1, 1), (1, 1), (1, 1), 1)
    image, out = torch.randn(1, 2, 40, 40), torch.randn(1, 2, 40, 40)
    with Largest() as largest:
        norms.gram_box(image, out, geometry)
    one_row = 3 * 42 * 42 * 42  # three input rows against the whole padded input
    assert largest.numbers <= max(block, one_row) < 1600**2 / 5


@pytest.mark.parametrize("strategy", ["ghost", "book_keeping"])
def test_stacked_gradients_are_never_held_where_they_would_be_large(strategy):
    """Catches: B x parameters numbers in memory for a wide layer, a large vocabulary, or a wide convolution."""
    params = {"table": torch.randn(5000, 8), "wide": torch.randn(400, 288), "conv": torch.randn(64, 32, 3, 3)}

    def loss(params, example):
        image, tokens = example
        x = F.conv2d(image, params["conv"], padding=1).relu()
        x = F.adaptive_avg_pool2d(x[:32], 3).flatten()
        return F.linear(x, params["wide"]).sum() + F.embedding(tokens, params["table"]).square().sum()

    batch = torch.randn(8, 32, 6, 6), torch.randint(0, 5000, (8, 9))
    with Largest() as largest:
        pegrad.clipped_grad(loss, clip_norm=1.0, strategy=strategy)(params, batch)
    assert largest.numbers <= 5 * max(leaf.numel() for leaf in params.values())  # stacked: 8 times


def test_stacked_gradients_are_not_kept_even_where_that_would_be_fastest():
    """Catches: a cost model, or a clock, that decides over memory as well."""
    params, batch = torch.randn(400, 288), torch.randn(8, 288)

    def loss(params, x):
        return F.linear(x, params).sin().sum()

    tuned = pegrad.autotune(loss, params, batch, strategy="book_keeping", repeats=1)
    slow = {key: 1e15 if key.endswith("native") else 1.0 for key in tuned.timings}
    with Largest() as largest:
        pegrad.clipped_grad(loss, clip_norm=1.0, strategy=replace(tuned, timings=slow))(params, batch)
    assert largest.numbers <= 2 * params.numel()  # stacked: 8 times


def small_leaves(params, x):
    for i in range(3):
        x = F.layer_norm(F.linear(x, params[f"w{i}"], params[f"b{i}"]).to(params[f"scale{i}"].dtype), (4,)).sin()
        x = (x * params[f"scale{i}"]).double()
    return x.square().sum() + 0 * params["loose"].sum()


@pytest.mark.parametrize("block", [1, 1 << 21])
@pytest.mark.parametrize("clip_norm", [0.5, pegrad.clipping.PerLayer(0.5)], ids=["flat", "per layer"])
def test_small_leaves_are_measured_together(block, clip_norm, monkeypatch):
    """Catches: the rows of one taken for another's; one left out, or added twice; the groups of clipping mixed."""
    monkeypatch.setattr("pegrad.reductions.kept.BLOCK", block)
    params = {"loose": r(2)}
    for i in range(3):
        dtype = torch.float32 if i == 1 else torch.float64
        params |= {f"w{i}": r(4, 4), f"b{i}": r(4), f"scale{i}": r(4).to(dtype)}
    batch = r(6, 5, 4)
    clipped = pegrad.clipped_grad(small_leaves, clip_norm=clip_norm)
    out = clipped(params, batch)
    grads = oracle.per_example_grads(small_leaves, params, batch)
    if clip_norm == 0.5:
        exact = oracle.clipped_sum(grads, 0.5)
    else:
        bound = 0.5 / len(clipped.groups(params)) ** 0.5
        exact = [oracle.clipped_sum([grad], bound)[0] for grad in grads]
    oracle.assert_close(out.grads, exact, 1e-5)
    storages = {leaf.untyped_storage().data_ptr() for leaf in out.grads.values()}
    assert len(storages) == len(params)  # a leaf's gradient is no part of all leaves'


def order_of_sums(monkeypatch):
    """Note the sizes of leaves in the order in which they are summed."""
    order = []
    add = pegrad.reductions.kept.LeafSums.add
    monkeypatch.setattr(
        pegrad.reductions.kept.LeafSums,
        "add",
        lambda sums, leaf, total: (order.append(leaf.numel()), add(sums, leaf, total)),
    )
    return order


def test_what_makes_room_is_summed_first(monkeypatch):
    """Catches: a sum as large as its leaf, made while what others keep is still there."""
    order = order_of_sums(monkeypatch)
    params = {"first": r(80, 60), "middle": r(80, 80), "last": r(90, 8)}

    def loss(params, x):
        x = F.linear(F.linear(x, params["first"]).tanh(), params["middle"]).tanh()
        return F.linear(x.unflatten(0, (10, 8)), params["last"]).square().sum()

    pegrad.clipped_grad(loss, clip_norm=1.0)(params, r(3, 60))
    assert order == [90 * 8, 80 * 60, 80 * 80]


def test_of_what_makes_room_the_last_is_summed_first(monkeypatch):
    """Catches: one that has long left the cache, because it was the larger."""
    order = order_of_sums(monkeypatch)
    params = [r(70, 60), r(80, 70), r(90, 80)]

    def loss(params, x):
        for weight in params:
            x = F.linear(x, weight).tanh()
        return x.square().sum()

    pegrad.clipped_grad(loss, clip_norm=1.0)(params, r(9, 10, 60))
    assert order == [weight.numel() for weight in params]  # a backward pass meets the first last


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norms_are_looked_at_together_and_made_again_one_by_one(dtype):
    """Catches: a norm made again from another use's gradients, or not at all; bounds of few terms for many."""
    found = []
    for positions in (2, 2, 900, 2):
        x, g = r(3, positions, 4).to(dtype), r(3, positions, 5).to(dtype)
        if len(found) == 1:  # terms that cancel but for a little
            x[1], g[1] = torch.stack([x[1, 0], -x[1, 0] * (1 + 1e-5)]) * 1e3, g[1, :1]
        part = Part(LinearWeight(r(5, 4).to(dtype), "linear"), x, g)
        (kernel,) = part.site.norming(*part.shapes).values()
        found.append(Found([part], [kernel.run(x, g)]))
    assert len({each.kind for each in found}) == 2
    answers = guarded(found, 3, 1e-3)
    for each, (squares, (share,)) in zip(found, answers, strict=True):
        (part,) = each.parts
        exact = part.g.double().mT @ part.x.double()
        torch.testing.assert_close(squares, exact.flatten(1).square().sum(1), rtol=1e-5, atol=0)
        torch.testing.assert_close(share, Magnitudes(part.site, part.x, part.g).share_errors(), rtol=1e-2, atol=0)


@pytest.mark.parametrize("wide", [3, 7])
@pytest.mark.parametrize("positions", [255, 256])
def test_sums_of_many_rows_with_the_wider_first_are_the_same(positions, wide):
    """Catches: a sum that is transposed, or lies so in memory."""
    x, g = r(8, positions, wide), r(8, positions, 5)
    site = LinearWeight(r(5, wide), "linear")
    total = site.summing(tuple(x.shape), tuple(g.shape)).run(x, g)
    torch.testing.assert_close(total, torch.einsum("btp,btd->pd", g, x), rtol=1e-10, atol=1e-12)
    assert total.is_contiguous()


def test_ghost_never_stacks_a_whole_batch(monkeypatch):
    """Catches: gradients that are stacked for the norms, and held as if the sum were to be taken from them."""
    monkeypatch.setattr("pegrad.reductions.native.BLOCK", 1 << 14)
    params = {"conv": torch.randn(32, 32, 3, 3)}

    def loss(params, image):
        return F.conv2d(image, params["conv"], padding=1).square().sum()

    batch = torch.randn(64, 32, 12, 12)
    (use,) = pegrad.explain(loss, params, batch, strategy="ghost").uses
    assert use.sum == "native"
    assert not use.norm.startswith("gram")
    for function in (
        pegrad.clipped_grad(loss, clip_norm=1.0, strategy="ghost"),
        pegrad.per_example_norm(loss, strategy="ghost"),
    ):
        with Largest() as largest:
            function(params, batch)
        assert largest.numbers <= batch.numel() < 64 * params["conv"].numel() / 1.9


@pytest.mark.parametrize("strategy", pegrad.STRATEGIES)
def test_nothing_waits_for_the_garbage_collector(strategy):
    """Catches: a circle of references that holds a step's activations until the collector comes by."""
    function = pegrad.clipped_grad(everything, clip_norm=1.0, strategy=strategy)

    def tensors():
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    function(PARAMS, BATCH)
    gc.collect()
    gc.disable()
    try:
        before = tensors()
        for _ in range(3):
            function(PARAMS, BATCH)
        assert tensors() == before
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["small_cnn", "vgg11", "resnet18", "wrn16_4", "vit"])
def test_the_benchmark_models_run_without_a_warning_and_copy_only_small_parameters(name):
    """Catches: an operation whose batching rule is missing (warnings are errors), a leaf that loses its rule."""
    model = models.MODELS[name](image_size=32)
    params = model.init(random.key(0))

    def loss(params, example):
        return F.cross_entropy(model.apply(params, example[0]), example[1])

    batch = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    uses = pegrad.explain(loss, params, batch).uses
    copied = [use for use in uses if use.norm == "copies"]
    assert sum(use.numbers for use in copied) <= 0.01 * sum(p.numel() for p in pegrad.trees.leaves(params)) * 2
    exact = pegrad.per_example_norm(loss, strategy="naive")(params, batch)
    for strategy in ("ghost", "book_keeping", "auto"):
        norms = pegrad.per_example_norm(loss, strategy=strategy)(params, batch)
        torch.testing.assert_close(norms, exact, rtol=1e-3, atol=0)


class TestARuleOfOnesOwn:
    """Catches: a rule that is not asked, or whose answers are not used."""

    @staticmethod
    @pegrad.operation
    def scaled(x, scale):
        return x * scale.exp()

    def test_without_a_rule_it_is_right(self):
        loss = lambda p, x: self.scaled(x, p).sin().sum()  # noqa: E731
        x, p = r(3, 4), r(4)
        grads = pegrad.per_example_grad(loss, strategy="book_keeping")(p, x)
        oracle.assert_close(grads, oracle.per_example_grads(loss, p, x))

    def test_with_a_rule_it_is_asked(self):
        asked = []

        @dataclass(frozen=True, eq=False)
        class Scale(pegrad.Site):
            def stacking(self, x, g):
                asked.append(self.operation)
                return {"product": pegrad.Kernel("reduce", Work(0, moved=x[0]), lambda x, g: g * x * self.source.exp())}

        def rule(trace, x, scale):
            if not trace.is_parameter(scale) or not trace.is_batched(x):
                return NotImplemented
            return trace.record(lambda x, tap: tap(x * scale.detach().exp(), x, [Scale(scale, "scaled")]), x)

        loss = lambda p, x: self.scaled(x, p).sin().sum()  # noqa: E731
        x, p = r(3, 4), r(4)
        strategy = pegrad.BookKeeping(rules={self.scaled: rule})
        expected = oracle.per_example_grads(loss, p, x)
        oracle.assert_close(pegrad.per_example_grad(loss, strategy=strategy)(p, x), expected)
        out = pegrad.clipped_grad(loss, clip_norm=0.3, strategy=strategy)(p, x)
        oracle.assert_close(out.grads, oracle.clipped_sum(expected, 0.3))
        assert asked


class TestExplain:
    def test_it_says_what_each_use_is(self):
        params = PARAMS | {"unused": r(2), "token": r(1, 5), "tied": r(5, 5)}

        def loss(params, example):
            value = everything(params, example)
            rows = torch.cat([params["token"], example[0].reshape(-1, 5)[:3] @ params["tied"]])
            return value + (rows @ params["tied"]).sum()

        batch = (r(4, 4, 8, 10), BATCH[1])
        explanation = pegrad.explain(loss, params, batch)
        uses = {(use.leaves, use.operation): use for use in explanation.uses}
        conv = uses["params['conv']", "conv2d"]
        assert conv.x == (4, 4, 8, 10)
        assert conv.why == ""
        assert {c.norm for c in conv.candidates} >= {"gram_box", "gram_unfolded", *pegrad.KERNELS}
        assert conv.norm == conv.candidates[0].norm
        assert uses["params['tied']", "linear"].why == "2 uses as one"
        assert "no rule for cat" in uses["params['token']", "cat"].why
        assert explanation.unused == ("params['unused']",)
        text = str(explanation)
        for path in ("params['conv']", "params['unused']  not used", "conv_transpose2d", "no rule for cat"):
            assert path in text
        assert explanation._repr_html_().count("<tr>") == 1 + len(explanation.uses) + 1

    def test_it_refuses_a_strategy_that_does_not_choose(self):
        with pytest.raises(pegrad.ArgumentError, match="'vmap'"):
            pegrad.explain(everything, PARAMS, BATCH, strategy="vmap")

    @pytest.mark.parametrize("strategy", ["ghost", "book_keeping"])
    def test_autotune_obeys_the_clock(self, strategy):
        """Catches: measurements that are taken but not used."""
        tuned = pegrad.autotune(everything, PARAMS, BATCH, strategy=strategy, repeats=1)
        out = pegrad.clipped_grad(everything, clip_norm=0.1, strategy=tuned)(PARAMS, BATCH)
        expected = oracle.per_example_grads(everything, PARAMS, BATCH)
        oracle.assert_close(out.grads, oracle.clipped_sum(expected, 0.1))
        for favourite in ("loop", "gram_unfolded", "unfold"):
            rigged = {key: 1.0 if key.endswith(favourite) else 1e12 for key in tuned.timings}
            uses = pegrad.explain(everything, PARAMS, BATCH, strategy=replace(tuned, timings=rigged)).uses
            assert next(use for use in uses if use.operation == "conv2d").norm == favourite


def test_a_loss_may_take_another_path_each_time():
    """Catches: a plan kept from the first run."""
    params = {"a": r(3, 3), "b": r(3, 3)}
    function = pegrad.per_example_norm(lambda p, x: loss(p, x), strategy="book_keeping")
    for path in ("a", "b", "both"):

        def loss(p, x, path=path):
            if path == "both":
                return (x @ p["a"] @ p["b"]).square().sum()
            return (x @ p[path] * p[path].norm()).sum()

        x = r(4, 3)
        oracle.assert_close(function(params, x), [oracle.norms(oracle.per_example_grads(loss, params, x))])


class Square(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, w):
        return x * w * w

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * w * w, 2 * g * x * w


@pytest.mark.parametrize("strategy", ["ghost", "book_keeping"])
@pytest.mark.parametrize(
    "loss",
    [
        lambda p, x: (Square.apply(x, p["w"]) @ p["v"]).sin().sum(),
        lambda p, x: (torch.ops.aten.mul(x, p["w"]) @ p["v"]).sin().sum(),
        lambda p, x: p["w"].square().sum() * p["v"].sum(),
        lambda p, x: F.dropout(p["w"], 0.0).sum() + (x @ p["v"]).sin().sum(),
    ],
    ids=["custom autograd function", "operator without a torch function", "no example", "dropout of a parameter"],
)
def test_a_use_out_of_the_traces_sight_is_noticed_and_planned_again(loss, strategy):
    """Catches: a contribution dropped in silence where a parameter reaches the loss past all rules."""
    params, x = {"w": r(3), "v": r(3, 2)}, r(4, 3)
    expected = oracle.per_example_grads(loss, params, x)
    out = pegrad.clipped_grad(loss, clip_norm=0.5, strategy=strategy)(params, x)
    oracle.assert_close(out.grads, oracle.clipped_sum(expected, 0.5))
    oracle.assert_close(out.norms, [oracle.norms(expected)])


@pytest.mark.parametrize("strategy", ["ghost", "book_keeping"])
def test_mixed_precision_keeps_float32_sums(strategy):
    """Catches: a sum of many examples rounded to the eight bits of a cast parameter."""

    def loss(params, x):
        return F.linear(x.bfloat16(), params["w"].to(torch.bfloat16)).float().sum()

    params, x = {"w": torch.zeros(3, 4)}, torch.ones(300, 4)
    out = pegrad.clipped_grad(loss, clip_norm=100.0, strategy=strategy)(params, x)
    assert torch.equal(out.grads["w"], torch.full((3, 4), 300.0) + 0)
    x[:1] = 1 + 2**-7
    out = pegrad.clipped_grad(loss, clip_norm=100.0, strategy=strategy)(params, x)
    assert torch.equal(out.grads["w"], torch.full((3, 4), 300 + 2**-7))


def test_changing_an_operations_input_in_place_afterwards_is_an_error_as_in_pytorch():
    """Catches: a gradient computed from values that are no longer those of the forward pass."""

    def loss(params, x):
        hidden = x * 2
        y = hidden @ params
        hidden.mul_(3)
        return y.sum() + hidden.sum()

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        pegrad.clipped_grad(loss, clip_norm=1.0, strategy="book_keeping")(r(3, 2), r(4, 3))


@pytest.mark.parametrize("strategy", ["ghost", "book_keeping"])
def test_they_refuse_to_run_under_a_transform_and_auto_knows(strategy):
    """Catches: gradients of norms that are silently zero."""

    def total(params, strategy):
        return pegrad.per_example_norm(lambda p, x: (p * x).sin().sum(), strategy=strategy)(params, r(3, 4)).sum()

    with pytest.raises(pegrad.ArgumentError, match="'grouped_conv'"):
        torch.func.grad(total)(r(4), strategy)
    assert torch.func.grad(total)(r(4), "auto").shape == (4,)
