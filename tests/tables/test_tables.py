"""Every strategy on PyTorch's own tables: what the plain loop can do comes out right or fails with an error of ours."""

import pytest

from tables.run import bad, entries, listed, names

ONCE_BAD = [
    "select_scatter", "nn_functional_linear_cross_entropy_chunked", "nn_LinearCrossEntropyLoss", "half", "bfloat16",
    "chalf", "as_strided", "as_strided_copy", "as_strided_partial_views", "as_strided_scatter", "column_stack", "cov",
    "fft_ifft", "index_put", "index_reduce_prod", "masked_select", "mm", "narrow", "native_group_norm", "tensor_split",
    "linalg_pinv_singular", "to", "to_sparse", "nn_functional_embedding", "nn_functional_group_norm",
    "nn_functional_gaussian_nll_loss", "nn_functional_linear", "nn_functional_pad_circular", "nn_functional_rrelu",
    "nn_CTCLoss", "nn_GRU", "nn_LSTMCell", "nn_InstanceNorm2d",
]  # fmt: skip
"""What was wrong, or failed with a raw error, once: all samples."""

SPREAD = [
    "addmm", "baddbmm", "cat", "cholesky", "cumprod", "einsum", "gather", "index_add", "kthvalue", "linalg_solve",
    "logsumexp", "masked_scatter", "max_binary", "norm", "prod", "scatter_add", "sort", "stft", "take_along_dim",
    "trapezoid", "where", "nn_functional_bilinear", "nn_functional_conv2d", "nn_functional_conv_transpose1d",
    "nn_functional_cross_entropy", "nn_functional_ctc_loss", "nn_functional_dropout", "nn_functional_embedding_bag",
    "nn_functional_grid_sample", "nn_functional_instance_norm", "nn_functional_interpolate_bicubic",
    "nn_functional_layer_norm", "nn_functional_max_pool2d", "nn_functional_prelu", "nn_functional_rms_norm",
    "nn_functional_scaled_dot_product_attention", "nn_BatchNorm1d", "nn_Bilinear", "nn_Conv3d", "nn_Embedding",
    "nn_MultiheadAttention", "nn_TransformerEncoderLayer", "bmm", "matmul", "tensordot", "nn_functional_batch_norm",
]  # fmt: skip
"""Some of the rest: one sample."""


@pytest.mark.parametrize("name", ONCE_BAD + SPREAD)
def test_some(name):
    """Catches: a wrong number, or an error that is not pegrad's, first of all where one was found before."""
    found = entries(name, samples=1 if name in SPREAD else None)
    assert found
    assert not bad(found), listed(bad(found))


@pytest.mark.slow
@pytest.mark.parametrize("name", names())
def test_all(name):
    """Catches: the same in any operation or module that PyTorch has samples of."""
    found = bad(entries(name))
    assert not found, listed(found)


def test_the_harness_sees_wrong_numbers(monkeypatch):
    """Catches: a comparison that nothing can fail."""
    import pegrad
    from pegrad.strategies import Vmap

    class Doubled(Vmap):
        def stacked(self, problem):
            grads, values = super().stacked(problem)
            return [2 * g for g in grads], values

    class Broken(Vmap):
        def stacked(self, problem):
            raise RuntimeError

    monkeypatch.setitem(pegrad.STRATEGIES, "doubled", Doubled())
    monkeypatch.setitem(pegrad.STRATEGIES, "broken", Broken())
    found = entries("cumprod", samples=1)
    assert {e.strategy: e.kind.value for e in found if e.strategy in ("doubled", "broken", "vmap")} == {
        "vmap": "right",
        "doubled": "WRONG",
        "broken": "typed error",
    }
