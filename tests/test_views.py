"""Two or three views of one parameter, each used by some operation: drawn at random, against the loop."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import oracle
import pegrad

View = Callable[[Tensor], Tensor]

# What a loss may make of a parameter before it uses it: isometries, parts, parts that overlap, and more than those.
VIEWS: dict[str, View] = {
    "itself": lambda w: w,
    "transpose": lambda w: w.mT,
    "clone": lambda w: w.clone(),
    "first rows": lambda w: w[: w.shape[0] // 2 or 1],
    "last rows": lambda w: w[w.shape[0] // 2 :],
    "all but a row": lambda w: w[1:] if w.shape[0] > 1 else w,
    "first columns": lambda w: w[:, : w.shape[1] // 2 or 1],
    "last columns": lambda w: w[:, w.shape[1] // 2 :],
    "every other row": lambda w: w[::2],
    "halved and laid side by side": lambda w: w.reshape(w.shape[0], 2, -1).flatten(1) if w.shape[1] % 2 == 0 else w,
    "other axes": lambda w: w.reshape(w.shape[1], w.shape[0], *w.shape[2:]),
    "two rows as one": lambda w: w.reshape(w.shape[0] // 2, -1, *w.shape[2:]) if w.shape[0] % 2 == 0 else w,
    "upside down": lambda w: w.flip(0),
    "turned": lambda w: w.permute(1, 0, *range(2, w.dim())),
    "scaled": lambda w: 0.5 * w,
    "a row for all": lambda w: w[:1].expand_as(w),
    "and upside down": lambda w: w + w.flip(0),
}


def used(w: Tensor, x: Tensor, how: int) -> Tensor:
    """Use a matrix or a kernel: by a product, from either side, a table, or an operation that has no rule."""
    if w.dim() == 4:
        image = x[: 2 * w.shape[1] * 25].reshape(-1, w.shape[1], 5, 5)
        return (F.conv2d(image, w, padding=1) if how % 2 else F.conv2d(image, w, stride=2)).sin().sum()
    rows = x[: 3 * w.shape[1]].reshape(3, -1)
    if how == 0:
        return F.linear(rows, w).sin().sum()
    if how == 1:
        return (x[: 3 * w.shape[0]].reshape(3, -1) @ w).sin().sum()
    if how == 2:
        return F.embedding((x[:4] * 100).long().abs() % w.shape[0], w).sin().sum()
    return torch.cumsum(w * x[: w.shape[1]], 0).sin().sum()


SHAPES = [(4, 6), (6, 6), (5, 4), (2, 4, 3, 3), (4, 4, 3, 3)]
CHAINS = st.lists(
    st.tuples(st.lists(st.sampled_from(sorted(VIEWS)), max_size=2), st.integers(0, 3)), min_size=2, max_size=3
)


def check(shape: tuple[int, ...], chains: list[tuple[list[str], int]], strategy: str) -> None:
    """Compare norms and clipped sum with the loop's."""
    torch.manual_seed(0)

    def loss(params: Tensor, x: Tensor) -> Tensor:
        total = x.new_zeros(())
        for k, (names, how) in enumerate(chains):
            w = params
            for name in names:
                w = VIEWS[name](w)
            total = total + used(w, x.roll(k), how) * (k + 1)
        return total

    params = torch.randn(shape, dtype=torch.float64)
    batch = torch.randn(3, 400, dtype=torch.float64)
    grads = oracle.per_example_grads(loss, params, batch)
    norms = oracle.norms(grads)
    clip = float(norms.median()) or 1.0
    clipped = pegrad.clipped_grad(loss, clip_norm=clip, strategy=strategy)(params, batch)
    oracle.assert_close(clipped.norms, [norms])
    oracle.assert_close(clipped.grads, oracle.clipped_sum(grads, clip))


@pytest.mark.parametrize("strategy", ["book_keeping", "ghost"])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(shape=st.sampled_from(SHAPES), chains=CHAINS)
def test_views_of_one_parameter(strategy, shape, chains):
    """Catches: gradients of two views added as they lie, where one lays the numbers out otherwise."""
    check(shape, chains, strategy)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["book_keeping", "ghost"])
@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(shape=st.sampled_from(SHAPES), chains=CHAINS)
def test_more_views_of_one_parameter(strategy, shape, chains):
    """Catches: the same, thousands of them, and other ones every time."""
    check(shape, chains, strategy)
