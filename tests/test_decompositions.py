"""Operations for which a copy of a parameter for each example would be large, in hostile shapes, against the oracle."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import oracle
import pegrad
from pegrad.reductions.guarded import Magnitudes
from pegrad.rules import gram
from pegrad.rules.blocks import BlockWeights
from test_rules import Largest

TRACED = ("ghost", "book_keeping", "auto")
B = 4


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def r(*shape):
    return torch.randn(shape, dtype=torch.float64)


def tokens(*shape):
    return torch.randint(0, 5, (B, *shape))


def varied(y):
    """Reduce to a scalar in which no two numbers play the same part."""
    return (y.sin() * torch.linspace(1, 2, y.numel(), dtype=y.dtype).reshape(y.shape)).sum()


class Use:
    """One loss: what it calls, its parameters, its batch, and which operations it is recorded as."""

    def __init__(self, function, params, batch, recorded):
        self.loss = lambda p, x: varied(function(p, x))
        self.params, self.batch, self.recorded = params, batch, recorded


def bags(**options):
    return lambda p, x: F.embedding_bag(x, p, **options)


USES = {
    # batched products
    "bmm": Use(lambda p, x: torch.bmm(x, p), r(3, 4, 5), r(B, 3, 2, 4), ["matmul"]),
    "bmm, parameter first": Use(lambda p, x: p.bmm(x), r(3, 5, 4), r(B, 3, 4, 2), ["matmul"]),
    "bmm, transposed": Use(lambda p, x: torch.bmm(x, p.mT), r(3, 5, 4), r(B, 3, 2, 4), ["matmul"]),
    "bmm, expanded": Use(lambda p, x: torch.bmm(x, p.expand(3, 4, 5)), r(4, 5), r(B, 3, 2, 4), ["matmul"]),
    "bmm, one row": Use(lambda p, x: torch.bmm(x, p), r(3, 4, 5), r(B, 3, 1, 4), ["matmul"]),
    "matmul": Use(lambda p, x: x @ p, r(3, 4, 5), r(B, 3, 2, 4), ["matmul"]),
    "matmul, one matrix": Use(lambda p, x: x @ p, r(3, 4, 5), r(B, 2, 4), ["linear"]),
    "matmul, more axes": Use(lambda p, x: x @ p, r(3, 4, 5), r(B, 2, 3, 2, 4), ["matmul"]),
    "matmul, fewer axes": Use(lambda p, x: x @ p, r(2, 3, 4, 5), r(B, 3, 2, 4), ["matmul"]),
    "matmul, vector": Use(lambda p, x: x @ p, r(3, 4, 5), r(B, 4), ["linear"]),
    "matmul, parameter first": Use(lambda p, x: p @ x, r(3, 5, 4), r(B, 2, 3, 4, 2), ["matmul"]),
    "matmul, parameter first, vector": Use(lambda p, x: p @ x, r(3, 5, 4), r(B, 4), ["linear"]),
    "matmul, parameter broadcast": Use(lambda p, x: x @ p, r(1, 4, 5), r(B, 3, 2, 4), ["linear"]),
    "matmul, both broadcast": Use(lambda p, x: x @ p, r(1, 3, 4, 5), r(B, 2, 1, 2, 4), ["linear"]),
    "baddbmm": Use(
        lambda p, x: torch.baddbmm(p["b"], x, p["w"], beta=0.5, alpha=3.0),
        {"w": r(3, 4, 5), "b": r(3, 1, 5)},
        r(B, 3, 2, 4),
        ["matmul", "addmm"],
    ),
    "baddbmm, no beta": Use(
        lambda p, x: x.new_full((5,), torch.nan).baddbmm(x, p, beta=0), r(3, 4, 5), r(B, 3, 2, 4), ["matmul"]
    ),
    "baddbmm to a parameter": Use(
        lambda p, x: torch.baddbmm(p, x, torch.ones(3, 4, 5).double()), r(3, 1, 5), r(B, 3, 2, 4), ["baddbmm"]
    ),
    "addmm, fused": Use(
        lambda p, x: torch.addmm(p["b"], x, p["w"]), {"w": r(4, 5), "b": r(5)}, r(B, 2, 4), ["linear", "linear bias"]
    ),
    "addmm, broadcast": Use(
        lambda p, x: torch.addmm(p["b"], x, p["w"]), {"w": r(4, 5), "b": r(1)}, r(B, 2, 4), ["linear", "addmm"]
    ),
    "experts": Use(
        lambda p, x: torch.bmm(F.silu(torch.bmm(x.expand(3, -1, -1), p["up"])), p["down"]),
        {"up": r(3, 4, 6), "down": r(3, 6, 4)},
        r(B, 5, 4),
        ["matmul", "matmul"],
    ),
    "used on both sides": Use(lambda p, x: (x @ p) @ p.mT @ p, r(3, 4, 5), r(B, 3, 2, 4), ["matmul"] * 3),
    "bmm of no rows": Use(lambda p, x: torch.bmm(x, p) + p.sum(), r(3, 4, 5), r(B, 3, 0, 4), ["bmm", "add"]),
    "matmul of no blocks": Use(
        lambda p, x: (x @ p["a"]).sum() + p["b"] * x.new_ones(2),
        {"a": r(0, 4, 5), "b": r()},
        r(B, 0, 2, 4),
        ["matmul", "mul"],
    ),
    "matmul of nothing shared": Use(
        lambda p, x: (x @ p["a"]) + p["b"], {"a": r(3, 0, 5), "b": r(5)}, r(B, 3, 2, 0), ["matmul", "add"]
    ),
    # einsum
    "einsum, blocks": Use(lambda p, x: torch.einsum("eij,eti->tej", p, x), r(3, 4, 5), r(B, 3, 2, 4), ["einsum"]),
    "einsum, two kept": Use(
        lambda p, x: torch.einsum("tabi,abij->btja", x, p), r(2, 3, 4, 5), r(B, 6, 2, 3, 4), ["einsum"]
    ),
    "einsum, diagonal": Use(lambda p, x: torch.einsum("ti,i->ti", x, p), r(4), r(B, 3, 4), ["einsum"]),
    "einsum, ellipsis": Use(lambda p, x: torch.einsum("...i,ij->...j", x, p), r(4, 5), r(B, 3, 2, 4), ["linear"]),
    "einsum, two ellipses": Use(
        lambda p, x: torch.einsum("...ti,...ij->...jt", x, p), r(3, 4, 5), r(B, 3, 3, 2, 4), ["einsum"]
    ),
    "einsum, implicit": Use(lambda p, x: torch.einsum("ba,bc", x, p), r(4, 5), r(B, 4, 3), ["linear"]),
    "einsum, implicit with ellipsis": Use(
        lambda p, x: torch.einsum("...zb,bA", x, p), r(4, 5), r(B, 2, 3, 4), ["linear"]
    ),
    "einsum, summed over": Use(lambda p, x: torch.einsum("tis,ijk->tj", x, p), r(4, 5, 2), r(B, 3, 4, 2), ["linear"]),
    "einsum, nothing shared": Use(lambda p, x: torch.einsum("t,j->tj", x, p), r(4), r(B, 3), ["linear"]),
    "einsum, repeated": Use(lambda p, x: torch.einsum("ti,ii->ti", x, p), r(4, 4), r(B, 3, 4), ["einsum"]),
    "einsum, broadcast": Use(lambda p, x: torch.einsum("ti,ij->tj", x, p), r(4, 5), r(B, 3, 1), ["einsum"]),
    "einsum, three": Use(lambda p, x: torch.einsum("ti,ij,tj->t", x, p, x), r(4, 4), r(B, 3, 4), ["einsum"]),
    "einsum, sublists": Use(
        lambda p, x: torch.einsum(x, [0, 1, 2], p, [0, 2, 3], [3, 0, 1]), r(3, 4, 5), r(B, 3, 2, 4), ["einsum"]
    ),
    "tensordot": Use(lambda p, x: torch.tensordot(x, p), r(3, 4, 5), r(B, 2, 3, 4), ["linear"]),
    "tensordot, axes": Use(
        lambda p, x: torch.tensordot(p, x, ([2, 0], [-2, 0])), r(3, 4, 5), r(B, 3, 5, 2), ["linear"]
    ),
    "tensordot, outer": Use(lambda p, x: torch.tensordot(p, x, 0), r(3, 4), r(B, 5), ["linear"]),
    # bilinear
    "bilinear, few outputs": Use(
        lambda p, x: F.bilinear(x[0], x[1], p["w"], p["b"]),
        {"w": r(2, 4, 4), "b": r(2)},
        r(B, 2, 3, 4),
        ["linear", "bilinear"],
    ),
    "bilinear, many outputs": Use(lambda p, x: F.bilinear(x[0], x[1], p), r(20, 4, 4), r(B, 2, 3, 4), ["linear"]),
    "bilinear, narrow first": Use(lambda p, x: F.bilinear(x[..., :1], x, p), r(3, 1, 4), r(B, 3, 4), ["linear"]),
    "bilinear, narrow second": Use(lambda p, x: F.bilinear(x, x[..., :1], p), r(3, 4, 1), r(B, 3, 4), ["linear"]),
    "bilinear, vectors": Use(lambda p, x: F.bilinear(x[0], x[1], p), r(3, 4, 4), r(B, 2, 4), ["linear"]),
    "bilinear with a constant": Use(
        lambda p, x: F.bilinear(torch.ones(3, 2).double(), x, p), r(9, 2, 4), r(B, 3, 4), ["linear"]
    ),
    "bilinear, parameters alone": Use(
        lambda p, x: F.bilinear(p["x"], x, p["w"]), {"x": r(3, 2), "w": r(3, 2, 4)}, r(B, 3, 4), ["linear", "bilinear"]
    ),
    "bilinear of a parameter": Use(
        lambda p, x: F.bilinear(p, x, torch.ones(3, 2, 4).double()), r(3, 2), r(B, 3, 4), ["bilinear"]
    ),
    "bilinear by weights of each example": Use(
        lambda p, x: F.bilinear(x[0], x[1], x[2], p), r(3), (r(B, 5, 2), r(B, 5, 4), r(B, 3, 2, 4)), ["bilinear"]
    ),
    "bilinear of no rows": Use(
        lambda p, x: F.bilinear(x, x, p).sum() + p.sum(), r(2, 4, 4), r(B, 0, 4), ["bilinear", "add"]
    ),
    # bags
    "bags": Use(bags(), r(5, 3), tokens(2, 4), ["embedding"]),
    "bags, sum": Use(bags(mode="sum"), r(5, 3), tokens(2, 4), ["embedding"]),
    "bags, padding": Use(bags(padding_idx=1), r(5, 3), tokens(6, 3), ["embedding"]),
    "bags, padding from the end": Use(bags(mode="sum", padding_idx=-2), r(5, 3), tokens(2, 4), ["embedding"]),
    "bags of padding": Use(bags(padding_idx=0), r(5, 3), torch.zeros(B, 2, 4).long(), ["embedding"]),
    "bags, max": Use(bags(mode="max"), r(5, 3), tokens(2, 4), ["embedding"]),
    "bags, max, padding": Use(bags(mode="max", padding_idx=1), r(5, 3), tokens(9, 2), ["embedding"]),
    "bags by offsets": Use(
        lambda p, x: F.embedding_bag(x, p, torch.tensor([0, 3, 3]), padding_idx=1), r(5, 3), tokens(7), ["embedding"]
    ),
    "bags by offsets of each example": Use(
        lambda p, x: F.embedding_bag(x[0], p, x[1], mode="sum", per_sample_weights=x[2], include_last_offset=True),
        r(5, 3),
        (tokens(7), torch.tensor([[0, 3, 7], [0, 0, 7], [0, 7, 7], [0, 2, 7]]), r(B, 7)),
        ["embedding"],
    ),
    "bags, weighted": Use(
        lambda p, x: F.embedding_bag(x[0], p, mode="sum", per_sample_weights=x[1], padding_idx=2),
        r(5, 3),
        (tokens(2, 4), r(B, 2, 4)),
        ["embedding"],
    ),
    "bags of the same tokens": Use(
        lambda p, x: F.embedding_bag(torch.tensor([[0, 1, 1], [3, 0, 2]]), p, mode="sum", per_sample_weights=x),
        r(5, 3),
        r(B, 2, 3),
        ["embedding_bag"],
    ),
    "bags of an example's own table": Use(
        lambda p, x: F.embedding_bag(x[0], x[1] * p, padding_idx=2), r(3), (tokens(2, 4), r(B, 5, 3)), ["mul"]
    ),
    "bags, weighted by a parameter": Use(
        lambda p, x: F.embedding_bag(x, p["w"], mode="sum", per_sample_weights=p["s"], padding_idx=2),
        {"w": r(5, 3), "s": r(2, 4)},
        tokens(2, 4),
        ["embedding", "embedding_bag"],
    ),
    # normalisation
    "frozen batch norm": Use(
        lambda p, x: F.batch_norm(x[None], torch.ones(3).double(), 2 * torch.ones(3).double(), p["w"], p["b"]),
        {"w": r(3), "b": r(3)},
        r(B, 3, 4, 5),
        ["batch norm scale", "batch norm shift"],
    ),
    "frozen batch norm, several images": Use(
        lambda p, x: F.batch_norm(x, torch.ones(3).double(), 2 * torch.ones(3).double(), p, eps=0.5),
        r(3),
        r(B, 2, 3, 4),
        ["batch norm scale"],
    ),
    "frozen batch norm, vectors": Use(
        lambda p, x: F.batch_norm(x, torch.ones(3).double(), 2 * torch.ones(3).double(), None, p),
        r(3),
        r(B, 2, 3),
        ["batch norm shift"],
    ),
    "batch norm by statistics of its own": Use(
        lambda p, x: F.batch_norm(x, x.mean(0), x.square().mean(0), p), r(3), r(B, 2, 3), ["batch_norm"]
    ),
    "layer norm by a view": Use(
        lambda p, x: F.layer_norm(x, (3,), p[1], p[0]), r(2, 3), r(B, 4, 3), ["layer norm scale", "layer norm shift"]
    ),
    "rms norm by a strided view": Use(
        lambda p, x: F.rms_norm(x, (3,), p[:, 1]), r(3, 2), r(B, 4, 3), ["rms norm scale"]
    ),
    "rms norm by an expanded view": Use(
        lambda p, x: F.rms_norm(x, (3,), p.expand(3)), r(1), r(B, 4, 3), ["rms norm scale"]
    ),
}
if hasattr(F, "linear_cross_entropy"):
    USES |= {
        "linear cross entropy": Use(
            lambda p, x: F.linear_cross_entropy(
                x[0], p["w"], x[1], linear_bias=p["b"], ignore_index=2, label_smoothing=0.1
            ),
            {"w": r(5, 3), "b": r(5)},
            (r(B, 6, 3), tokens(6)),
            ["linear", "linear bias"],
        ),
        "linear cross entropy, weighted": Use(
            lambda p, x: F.linear_cross_entropy(x[0], p, x[1], weight=torch.arange(1, 6).double(), reduction="none"),
            r(5, 3),
            (r(B, 6, 3), tokens(6)),
            ["linear"],
        ),
        "linear cross entropy, one row": Use(
            lambda p, x: F.linear_cross_entropy(x[0], p, x[1]), r(5, 3), (r(B, 3), tokens()), ["linear"]
        ),
        "linear cross entropy, more axes": Use(
            lambda p, x: F.linear_cross_entropy(x[0], p["w"], x[1], linear_bias=p["b"], reduction="sum"),
            {"w": r(5, 2, 4, 3), "b": r(5, 2, 4)},
            (r(B, 6, 3), tokens(6, 2, 4)),
            ["linear", "linear bias"],
        ),
        "linear cross entropy, probabilities": Use(
            lambda p, x: F.linear_cross_entropy(x[0], p, x[1]),
            r(5, 3),
            (r(B, 6, 3), r(B, 6, 5).softmax(-1)),
            ["linear"],
        ),
    }


@pytest.mark.parametrize("name", USES)
def test_every_use_is_exact(name):
    """Catches: an axis taken for another, an option forgotten, a contribution lost."""
    use = USES[name]
    expected = oracle.per_example_grads(use.loss, use.params, use.batch)
    norms = oracle.norms(expected)
    for strategy in TRACED:
        grads = pegrad.per_example_grad(use.loss, strategy=strategy)(use.params, use.batch)
        oracle.assert_close(grads, expected)
        for clip_norm in (max(norms.median().item(), 1e-3), 1e9):
            out = pegrad.clipped_grad(use.loss, clip_norm=clip_norm, strategy=strategy)(use.params, use.batch)
            oracle.assert_close(out.norms, [norms])
            oracle.assert_close(out.grads, oracle.clipped_sum(expected, clip_norm))


def test_every_kernel_of_side_by_side_maps_agrees_and_bounds_its_terms(monkeypatch):
    """Catches: blocks that interfere, positions that do not; a kernel that the cost model never picks."""
    x, g = r(B, 3, 7, 4), r(B, 3, 7, 5)
    site = BlockWeights(r(3, 5, 4), "matmul")
    shapes = tuple(x.shape), tuple(g.shape)
    exact = torch.einsum("betp,betd->bepd", g, x)
    (stacked,) = (kernel.run(x, g) for kernel in site.stacking(*shapes).values())
    oracle.assert_close([stacked, site.summing(*shapes).run(x, g)], [exact, exact.sum(0)])
    for block in (1, 1 << 20):
        monkeypatch.setattr(gram, "BLOCK", block)
        (found,) = (kernel.run(x, g) for kernel in site.norming(*shapes).values())
        terms = (x.square().sum(3) * g.square().sum(3)).sum((1, 2))
        inputs, outputs = x.square().sum((1, 2, 3)), g.square().sum((1, 2, 3))
        oracle.assert_close(list(found), [exact.flatten(1).square().sum(1), terms, inputs, outputs])
    magnitudes = Magnitudes(site, x, g)
    assert magnitudes.positions == 7
    assert (exact.flatten(1).norm(dim=1) <= site.amplitude(*magnitudes.bounds, magnitudes.positions)).all()
    oracle.assert_close([site.apply(x, site.source)], [torch.einsum("betd,epd->betp", x, site.source)])


@pytest.mark.parametrize("strategy", TRACED)
@pytest.mark.parametrize("wide", [True, False])
def test_neither_copies_nor_stacked_gradients_of_experts_are_held(wide, strategy):
    """Catches: B times the parameters in memory, in the forward pass or in the backward pass."""
    params = {"up": torch.randn(4, 64, 96), "down": torch.randn(4, 96, 64), "form": torch.randn(64, 32, 32)}

    def loss(p, x):
        y = torch.bmm(torch.bmm(x, p["up"]).relu(), p["down"]) if wide else torch.einsum("eti,eij->etj", x, p["up"])
        return y.square().sum() + F.bilinear(x[0, :, :32], x[1, :, 32:], p["form"]).sum()

    with Largest() as largest:
        pegrad.clipped_grad(loss, clip_norm=1.0, strategy=strategy)(params, torch.randn(16, 4, 3, 64))
    assert largest.numbers <= 2 * params["form"].numel()  # copied, or stacked: 16 times


@pytest.mark.parametrize("strategy", TRACED)
@pytest.mark.parametrize("form", [lambda x, w: w * x, lambda x, w: x + w, lambda x, w: x / (1 + w)])
def test_written_out_scales_and_shifts_hold_no_more_than_activations(form, strategy):
    """Catches: a copy of a scale for each example that is laid out in memory, or has a gradient for each position."""
    params, batch = torch.randn(64), torch.randn(8, 50, 64)
    with Largest() as largest:
        pegrad.clipped_grad(lambda p, x: form(x, p).sin().sum(), clip_norm=1.0, strategy=strategy)(params, batch)
    assert largest.numbers <= batch.numel()


MODULES = {
    "EmbeddingBag": (nn.EmbeddingBag(5, 3, padding_idx=1), lambda: (tokens(2, 4),)),
    "EmbeddingBag, max": (nn.EmbeddingBag(5, 3, mode="max"), lambda: (tokens(2, 4),)),
    "Bilinear": (nn.Bilinear(4, 3, 6), lambda: (r(B, 2, 4), r(B, 2, 3))),
    "BatchNorm2d": (nn.BatchNorm2d(3).eval(), lambda: (r(B, 2, 3, 4, 4),)),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules(name):
    """Catches: a module whose parameters are copied for each example."""
    module, make = MODULES[name]
    module, batch = module.double(), make()
    params = {key: p.detach() for key, p in module.named_parameters()}
    loss = lambda p, x: varied(functional_call(module, p, x))  # noqa: E731
    expected = oracle.per_example_grads(loss, params, batch)
    for strategy in TRACED:
        out = pegrad.clipped_grad(loss, clip_norm=1.0, strategy=strategy)(params, batch)
        oracle.assert_close(out.norms, [oracle.norms(expected)])
        oracle.assert_close(out.grads, oracle.clipped_sum(expected, 1.0))
    copied = [use for use in pegrad.explain(loss, params, batch).uses if use.norm == "copies"]
    assert all("bias" in use.leaves for use in copied)


def test_mixed_precision_keeps_float32_sums_of_blocks():
    """Catches: a sum of many examples rounded to the eight bits of a cast parameter."""
    loss = lambda p, x: torch.bmm(x.bfloat16(), p.bfloat16()).float().sum()  # noqa: E731
    for strategy in TRACED:
        out = pegrad.clipped_grad(loss, clip_norm=100.0, strategy=strategy)(
            torch.zeros(2, 4, 3), torch.ones(300, 2, 1, 4)
        )
        assert torch.equal(out.grads, torch.full((2, 4, 3), 300.0))


HALF = {
    "bmm": lambda p, x: torch.bmm(x[None].expand(3, 2, 4), p),
    "einsum": lambda p, x: torch.einsum("ti,eij->tej", x, p),
    "bilinear": lambda p, x: F.bilinear(x, x, p[:, :, :4]),
    "frozen batch norm": lambda p, x: F.batch_norm(x, p.new_ones(4), 2 * p.new_ones(4), 0.3 * p[0, :, 0], p[0, :, 1]),
    "bags": lambda p, x: F.embedding_bag((x > 0).long(), p[0], padding_idx=3),
}


@pytest.mark.parametrize("strategy", TRACED)
@pytest.mark.parametrize("name", HALF)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, name, strategy):
    """Catches: what is widened meeting what is not."""
    loss = lambda p, x: varied(HALF[name](p, x).float())  # noqa: E731
    params, batch = r(3, 4, 5).to(dtype), r(B, 2, 4).to(dtype)
    expected = oracle.per_example_grads(loss, params, batch)
    out = pegrad.clipped_grad(loss, clip_norm=1e9, strategy=strategy)(params, batch)
    oracle.assert_close(out.norms.double(), [oracle.norms(expected)], relative=0.05)
    oracle.assert_close(out.grads.double(), [grad.sum(0) for grad in expected], relative=0.05)


@pytest.mark.parametrize("options", [{"scale_grad_by_freq": True}, {"max_norm": 1.0}])
@pytest.mark.parametrize("strategy", TRACED)
def test_bags_whose_gradient_depends_on_more_are_refused_or_right(options, strategy):
    """Catches: gradients by the frequency of tokens that are gradients without."""
    table, batch = r(5, 3), torch.tensor([[[0, 1, 1, 1]], [[1, 2, 3, 4]]])
    loss = lambda p, x: varied(F.embedding_bag(x, p, mode="sum", **options))  # noqa: E731
    function = pegrad.per_example_grad(loss, strategy=strategy)
    if "max_norm" in options:
        with pytest.raises(pegrad.LossError, match="in place"):
            function(table, batch)
    else:
        oracle.assert_close(function(table, batch), oracle.per_example_grads(loss, table, batch))


@pytest.mark.parametrize("name", USES)
def test_every_use_is_recorded_as_what_it_is(name):
    """Catches: a rule that is never asked, or that declines what it could do: the copies would be right as well."""
    use = USES[name]
    trace = pegrad.BookKeeping().trace(pegrad.call.Call.of(use.loss, use.params, use.batch, None).problem)
    recorded = [site.operation for tapped in trace.tapped for site in tapped.sites]
    assert recorded + [copies.operation for copies in trace.copies] == use.recorded
