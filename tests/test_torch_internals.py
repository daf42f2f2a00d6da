"""What PyTorch does not promise and pegrad uses: it is in one file, and does there what pegrad needs of it.

A version of PyTorch that changes one of these names fails here, with a sentence that names it.
"""

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import grad, jvp, vmap
from torch.overrides import TorchFunctionMode

from pegrad import torch_internals as internals
from pegrad.tracing.foreign import refuse_checkpoint

ROOT = Path(__file__).parents[1]
THE_FILE = ROOT / "src/pegrad/torch_internals.py"

NOT_PRIVATE = {
    *("_replace", "_asdict", "_fields"),  # of named tuples, whose fields may have any other name: documented
    "_SubParsersAction",  # of argparse, which has no other name for a type
    *("_version", "_parameters", "_buffers"),  # what PyTorch's own notes tell users to read; pinned below
}


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_names_of_torch(tree: ast.Module) -> Iterator[str]:
    """Yield the private names that a file takes from others: by attribute, import, or text."""
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    own |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    texts = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        mine = isinstance(node, ast.Attribute) and getattr(node.value, "id", "") in {"self", "cls"}
        if isinstance(node, ast.Attribute) and not mine and private(node.attr) and node.attr not in own | NOT_PRIVATE:
            yield f"line {node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None) or ""
            names = [f"{module}.{alias.name}" for alias in node.names]
            if any(name.strip(".").startswith("torch") and any(map(private, name.split("."))) for name in names):
                yield f"line {node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, ast.Constant) and id(node) not in texts and "torch._" in str(node.value):
            yield f"line {node.lineno}: {node.value!r}"
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in {"getattr", "hasattr", "setattr"}:
            named = node.args[1]
            if not isinstance(named, ast.Constant):
                if ast.unparse(node.args[0]).startswith("torch"):
                    yield f"line {node.lineno}: {ast.unparse(node)}"
            elif private(named.value) and named.value not in own | NOT_PRIVATE:
                yield f"line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("folder", ["src", "benchmarks", "examples"])
def test_private_names_of_pytorch_are_in_one_file(folder):
    """Catches: a name that the next PyTorch may take away, used where nobody looks for it."""
    found = [
        f"{path.relative_to(ROOT)}, {name}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path != THE_FILE
        for name in private_names_of_torch(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not found, "move these into pegrad/torch_internals.py, with a docstring and a pin here:\n" + "\n".join(found)


@pytest.mark.parametrize(
    "line",
    [
        "torch._C._functorch.is_batchedtensor(x)",
        "from torch.overrides import _get_current_function_mode_stack",
        "from torch._dynamo import reset",
        "import torch._dynamo",
        "'torch._dynamo' in sys.modules",
        "getattr(torch, '_pack_padded_sequence', None)",
        "getattr(torch, name, None)",
        "x._is_view()",
        "torch.ops.aten._unsafe_view(x, shape)",
    ],
)
def test_the_search_finds_private_names(line):
    """Catches: a search that would find nothing."""
    assert list(private_names_of_torch(ast.parse(line)))


PINNED: set[str] = {"VERSIONS"}  # which PyTorch has no part in


def pins(*names: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Say which names a test pins; where it fails, the sentence in its docstring is no longer true."""
    PINNED.update(names)

    def decorate(test: Callable[[], None]) -> Callable[[], None]:
        @functools.wraps(test)
        def run() -> None:
            try:
                test()
            except Exception as error:
                raise AssertionError(
                    f"torch {torch.__version__} has changed what pegrad/torch_internals.py takes from it as "
                    f"{', '.join(names)}. It is no longer so: {test.__doc__}"
                ) from error

        return run

    return decorate


def test_every_name_is_pinned():
    """Catches: a name of PyTorch's that is used and not pinned."""
    tree = ast.parse(THE_FILE.read_text(encoding="utf-8"))
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
    assert {name for name in names if not name.startswith("_")} == PINNED


def test_the_versions_are_the_same_everywhere():
    """Catches: a README, an environment and an error that speak of different versions of PyTorch."""
    oldest, newest = internals.VERSIONS.split(" to ")
    project, pins, readme = (ROOT / name for name in ("pyproject.toml", "constraints.txt", "README.md"))
    text = " ".join(readme.read_text(encoding="utf-8").split())
    pinned = re.search(r"^torch==(\S+)$", pins.read_text(encoding="utf-8"), re.MULTILINE)
    assert f'"torch>={oldest}"' in project.read_text(encoding="utf-8")
    assert f"PyTorch {oldest} or newer" in text
    assert pinned
    assert f"`make test` runs under {pinned[1]}," in text
    assert re.search(rf"ran under {oldest}\.\d+ and {newest}\.\d+\.", text)


def test_a_name_that_is_missing_is_said_so():
    """Catches: an AttributeError of PyTorch's, of which a user would not know whose fault it is."""
    with pytest.raises(ImportError, match=r"torch 2.* has no torch\._C\._gone, which pegrad needs: install torch 2\."):
        internals._needed("_C._gone")


def test_import_brings_no_compiler():
    """Catches: an `import pegrad` that takes as long as the compiler's import does."""
    program = "import sys, pegrad; print(*(name for name in sys.modules if name.startswith('torch._dynamo')))"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == ""


@pins("is_batched", "is_tracked", "is_wrapped")
def test_transforms_wrap_tensors():
    """A tensor tells whether `vmap` or `torch.func.grad` has wrapped it."""
    seen = {}

    def look(name: str, x: Tensor) -> Tensor:
        seen[name] = (internals.is_batched(x), internals.is_tracked(x), internals.is_wrapped(x))
        return x.sum()

    shared = torch.ones(2)
    look("plain", shared)
    vmap(lambda x: (look("vmap", x), look("shared", shared)))(torch.ones(3, 2))
    grad(lambda x: look("grad", x))(torch.ones(2))
    vmap(grad(lambda x: look("both", x)))(torch.ones(3, 2))
    look("parameter", nn.Parameter(shared))
    assert seen == {
        "plain": (False, False, False),
        "shared": (False, False, False),
        "parameter": (False, False, False),
        "vmap": (True, False, True),
        "grad": (False, True, True),
        "both": (False, True, True),  # the innermost counts
    }


@pins("is_wrapped", "is_tracked")
def test_tensors_outlive_transforms():
    """A tensor that escapes from a transform is still known as one of a transform's."""
    escaped = []
    vmap(lambda x: escaped.append(x) or x)(torch.ones(3, 2))
    grad(lambda x: escaped.append(x) or x.sum())(torch.ones(2))
    assert all(map(internals.is_wrapped, escaped))
    assert [internals.is_tracked(x) for x in escaped] == [False, True]


@pins("unwrapped", "hidden_axis", "level_of", "wrapped")
def test_transforms_are_peeled_off_and_put_back():
    """What `vmap` hides is an axis of the tensor below, which is the caller's, and may be hidden again."""
    batch = torch.arange(6.0).reshape(2, 3)
    seen = []

    def look(x: Tensor) -> Tensor:
        below = internals.unwrapped(x)
        seen.append((below is batch or below.data_ptr() == batch.data_ptr(), tuple(below.shape)))
        seen.append((internals.hidden_axis(x), internals.level_of(x)))
        again = internals.wrapped(below, 0, internals.level_of(x))
        seen.append((tuple(again.shape), internals.hidden_axis(again), internals.is_batched(again)))
        return again

    out = vmap(look, in_dims=1, out_dims=1)(batch)
    assert seen == [(True, (2, 3)), (1, 1), ((3,), 0, True)]
    assert out.shape == (3, 2)  # the axis that was hidden again is the one that comes back
    assert torch.equal(out, batch.mT)
    grad(lambda x: seen.append((internals.hidden_axis(x), internals.level_of(x))) or x.sum())(torch.ones(2))
    assert seen[-1] == (-1, 1)
    assert (internals.hidden_axis(batch), internals.level_of(batch)) == (-1, -1)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # by PyTorch's own jvp
@pins("level", "transformed", "differentiated", "vmaps", "innermost_vmap", "innermost_grad")
def test_transforms_that_run_are_known():
    """Whoever asks is told which transforms of torch.func run, how deep, and their batches."""
    seen = {}

    def look(name: str, x: Tensor) -> Tensor:
        seen[name] = (
            internals.level(),
            internals.transformed(),
            internals.differentiated(),
            internals.vmaps(),
            internals.innermost_grad(),
        )
        return x.sum()

    look("none", torch.ones(2))
    vmap(lambda x: look("vmap", x), randomness="different")(torch.ones(3, 2))
    grad(lambda x: look("grad", x))(torch.ones(2))
    vmap(grad(lambda x: look("inside", x)))(torch.ones(3, 2))
    jvp(lambda x: look("forward", x), (torch.ones(2),), (torch.ones(2),))
    vmap(vmap(lambda x: look("twice", x), randomness="same"))(torch.ones(3, 4, 2))
    assert seen == {
        "none": (None, False, False, [], None),
        "vmap": (1, True, False, [(3, "different")], None),
        "grad": (1, True, True, [], 1),
        "inside": (2, True, True, [(3, "error")], 2),
        "forward": (1, True, True, [], None),
        "twice": (2, True, False, [(3, "error"), (4, "same")], None),
    }
    batches = []
    vmap(vmap(lambda x: batches.append(internals.innermost_vmap()) or x))(torch.ones(3, 4, 2))
    assert batches == [(2, 4)]


@pins("lowered")
def test_transforms_can_be_left_for_a_block():
    """Below a level its transforms do not run, and they run again after the block, whatever happens in it."""
    seen = []

    def look(x: Tensor) -> Tensor:
        with internals.lowered(1):
            seen.append((internals.level(), internals.vmaps()))
        with internals.lowered(None):
            seen.append((internals.level(), internals.vmaps()))
        with pytest.raises(ZeroDivisionError), internals.lowered(None):
            _ = 1 / 0
        seen.append((internals.level(), internals.vmaps()))
        return x * 2

    doubled = vmap(vmap(look))(torch.ones(3, 4, 2))
    assert seen == [(1, [(3, "error")]), (None, []), (2, [(3, "error"), (4, "error")])]
    assert torch.equal(doubled, torch.full((3, 4, 2), 2.0))


@pins("entered")
def test_tensors_that_escaped_are_alive_under_another_vmap():
    """Under another `vmap` of its level and batch a tensor that escaped can be computed with, and gets its gradient."""
    leaf = torch.ones(3, 2, requires_grad=True)
    escaped = []
    vmap(lambda x: escaped.append(x.sin()) or x)(leaf)
    with internals.entered(3, "error"):
        assert internals.vmaps() == [(3, "error")]
        value = internals.unwrapped(escaped[0] * 2)
    assert internals.level() is None
    value.sum().backward()
    assert torch.allclose(leaf.grad, 2 * torch.ones(3, 2).cos())


@pins("changing_requires_grad")
def test_a_tensor_may_be_made_to_require_a_gradient():
    """`requires_grad_` is refused under `torch.func.grad`, and allowed inside the block."""

    def refused(x: Tensor) -> Tensor:
        return x.detach().requires_grad_().sum() * x.sum()

    def allowed(x: Tensor) -> Tensor:
        with internals.changing_requires_grad():
            y = x.detach().requires_grad_()
        assert y.requires_grad
        with pytest.raises(RuntimeError, match="requires_grad_"):  # as before
            x.detach().requires_grad_()
        return y.sum() * x.sum()

    with pytest.raises(RuntimeError, match="requires_grad_"):
        grad(refused)(torch.ones(2))
    assert torch.equal(grad(allowed)(torch.ones(2)), torch.full((2,), 2.0))


class Seen(TorchFunctionMode):
    """Note the names of the functions that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


class Own(Tensor):
    """A tensor that has a sine of its own."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return "own"


@pins("without_overrides", "function_modes")
def test_modes_are_known_and_can_be_left():
    """Modes are listed, the outermost first; inside the block none is asked, nor a subclass of tensors."""
    x, own = torch.ones(2), torch.ones(2).as_subclass(Own)
    with Seen() as outer, Seen() as inner:
        assert [mode is other for mode, other in zip(internals.function_modes(), (outer, inner), strict=True)]
        assert internals.function_modes() == [outer, inner]
        torch.sin(x)
        with internals.without_overrides():
            torch.cos(x)
            assert torch.sin(own) != "own"
    assert inner.names == outer.names == ["sin"]
    assert internals.function_modes() == []
    assert torch.sin(own) == "own"


@pins("saved_tensors_hooks")
def test_hooks_on_what_is_saved_are_known():
    """The innermost pair of hooks on what autograd saves is seen, and those of torch.utils.checkpoint are theirs."""
    assert not internals.saved_tensors_hooks()
    first, second = (lambda x: x), (lambda x: x + 0)
    with saved_tensors_hooks(first, second), saved_tensors_hooks(second, first):
        assert internals.saved_tensors_hooks() == (second, first)
    modules = []

    def look(x: Tensor) -> Tensor:
        modules.append(internals.saved_tensors_hooks()[0].__module__)
        return x.sin()

    torch.utils.checkpoint.checkpoint(look, torch.ones(2, requires_grad=True), use_reentrant=False)
    assert modules == ["torch.utils.checkpoint"]
    refuse_checkpoint()  # outside it raises nothing


@pins("SAVES_INPUTS")
def test_a_checkpoint_is_seen_under_vmap():
    """Under `vmap` torch.utils.checkpoint lets its hooks be seen, or fails by a function that is called so."""
    seen = []

    def look(x: Tensor) -> Tensor:
        seen.append(internals.saved_tensors_hooks()[0].__module__)
        return x.sin()

    try:
        vmap(lambda x: torch.utils.checkpoint.checkpoint(look, x, use_reentrant=False))(torch.ones(3, 2))
    except RuntimeError as error:
        seen.append(internals.SAVES_INPUTS in str(error))
    assert seen in (["torch.utils.checkpoint"], [True])


@pins("is_view", "unsafe_view")
def test_views_are_known_and_can_be_avoided():
    """`view` gives a view to autograd, `unsafe_view` the same numbers in the same memory, which are none to it."""
    x = torch.arange(6.0, requires_grad=True)
    y = x * 2
    viewed, free = y.view(2, 3), internals.unsafe_view(y, (2, 3))
    assert internals.is_view(viewed)
    assert not any(map(internals.is_view, (x, y, free, nn.Parameter(x.detach()))))
    assert free.data_ptr() == y.data_ptr()
    free.sin().sum().backward()
    assert torch.allclose(x.grad, 2 * (2 * x.detach()).cos())


@pins("shares_memory")
def test_who_lies_in_the_memory_of_a_tensor_is_counted():
    """A tensor that is alone in its memory is told from one that others lie in, be they no views."""
    alone = torch.zeros(3)
    assert not internals.shares_memory(alone)
    alone.untyped_storage()
    assert not internals.shares_memory(alone)  # to have asked for the storage is not to hold it
    assert not internals.shares_memory(torch.zeros(3) + 1)
    detached = alone.detach()
    assert internals.shares_memory(alone)
    del detached
    assert not internals.shares_memory(alone)
    array = alone.numpy()
    assert internals.shares_memory(alone)
    del array
    storage = alone.untyped_storage()
    del storage
    assert not internals.shares_memory(alone)
    assert internals.shares_memory(torch.zeros(3)[:2])
    lent = np.zeros(3)
    assert not internals.shares_memory(torch.from_numpy(lent))  # which is why `writes` knows these by their function


@pins("backward_node")
def test_nodes_of_a_function_of_ones_own_are_known():
    """A function of one's own leaves nodes of its own type in autograd's graph, and no other does."""

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, g):
            return 2 * g

    x = torch.ones(2, requires_grad=True)
    assert type(Double.apply(x).grad_fn) is internals.backward_node(Double)
    assert type((2 * x).grad_fn) is not internals.backward_node(Double)


@pins("PACK", "PAD")
def test_packing_is_seen():
    """What packs sequences calls `PACK`, and what unpacks them `PAD`, where a mode sees it."""
    with Seen() as packing:
        packed = nn.utils.rnn.pack_padded_sequence(torch.ones(2, 3, 1), [3, 2], batch_first=True)
    with Seen() as unpacking:
        nn.utils.rnn.pad_packed_sequence(packed)
    assert internals.PACK.__name__ in packing.names
    assert internals.PAD.__name__ in unpacking.names


@pins("ALIGNED")
def test_an_encoder_asks_whether_padding_lies_at_the_end():
    """`nn.TransformerEncoder` in evaluation calls `ALIGNED`, where a mode sees it, and takes no for an answer."""
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 1).eval()
    x, padding = torch.ones(2, 3, 4), torch.tensor([[False] * 3, [False, False, True]])
    asked = []

    class No(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is internals.ALIGNED:
                asked.append(func)
                return False
            assert "nested" not in func.__name__
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), No():
        encoder(x, src_key_padding_mask=padding)
    assert asked


@pins("BatchNorm", "InstanceNorm")
def test_normalisations_are_recognised():
    """Every batch normalisation of `torch.nn` is a `BatchNorm`, every instance normalisation an `InstanceNorm`."""
    batch = [nn.BatchNorm1d(2), nn.BatchNorm2d(2), nn.BatchNorm3d(2), nn.SyncBatchNorm(2), nn.LazyBatchNorm2d()]
    instance = [nn.InstanceNorm1d(2), nn.InstanceNorm2d(2), nn.InstanceNorm3d(2), nn.LazyInstanceNorm1d()]
    assert all(isinstance(norm, internals.BatchNorm) for norm in batch)
    assert all(isinstance(norm, internals.InstanceNorm) for norm in instance)
    others = nn.GroupNorm(1, 2), nn.LayerNorm(2), nn.RMSNorm(2)
    assert not any(isinstance(norm, internals.BatchNorm | internals.InstanceNorm) for norm in others)


@pins("DYNAMO")
def test_whoever_compiles_imports_the_compiler():
    """Running a compiled function imports `DYNAMO`; importing torch does not."""
    program = (
        "import sys, torch\n"
        f"assert {internals.DYNAMO!r} not in sys.modules\n"
        "torch.compile(lambda x: x + 1, backend='eager')(torch.ones(2))\n"
        f"assert {internals.DYNAMO!r} in sys.modules\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, timeout=300)


@pins("import_compiler", "compiler", "inductor_settings")
def test_backends_compile_graphs():
    """A backend turns a graph and example tensors into a function; Inductor's settings are set, and set back."""
    internals.import_compiler()
    assert internals.DYNAMO in sys.modules
    graph = torch.fx.symbolic_trace(lambda x: (x + 1,))
    run = internals.compiler("eager")(graph, [torch.ones(2)])
    assert torch.equal(run(torch.zeros(2))[0], torch.ones(2))
    with pytest.raises(Exception, match="no such"):
        internals.compiler("no such")
    from torch._inductor import config

    before = config.fallback_random, config.pattern_matcher
    with internals.inductor_settings({"fallback_random": True, "pattern_matcher": False}):
        assert (config.fallback_random, config.pattern_matcher) == (True, False)
    assert (config.fallback_random, config.pattern_matcher) == before


@pins("cpp_library")
def test_a_library_of_cpp():
    """C++ is compiled with OpenMP and PyTorch's vectors, and functions are called by their names."""
    source = """
        #include <ATen/cpu/vec/vec.h>
        #include <omp.h>
        extern "C" int64_t numbers() { return omp_get_max_threads() * at::vec::Vectorized<float>::size(); }
    """
    assert internals.cpp_library(source).numbers() >= 4
    with pytest.raises(Exception, match="error"):
        internals.cpp_library("no C++")


@pins("TorchDispatchMode", "Operation", "written", "returns_view", "in_place")
def test_a_mode_sees_operations():
    """A dispatch mode sees operations below autograd and `vmap`; their schemas say what they write to and alias.

    And of those that go by one name, that which writes over its first argument has an underscore.
    """
    seen = []

    class Seeing(internals.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append((func, getattr(args[0], "shape", None)))
            return func(*args, **(kwargs or {}))

    x = torch.ones(2, 3, requires_grad=True)
    with Seeing():
        vmap(torch.sin)(x)
    assert (torch.ops.aten.sin.default, (2, 3)) in seen
    assert all(isinstance(operation, internals.Operation) for operation, _ in seen)
    assert internals.written(torch.ops.aten.addmm.out) == [(5, "out")]
    assert internals.written(torch.ops.aten.add_.Tensor) == [(0, "self")]
    assert internals.written(torch.ops.aten.add.Tensor) == []
    assert internals.returns_view(torch.ops.aten.select.int)
    assert not internals.returns_view(torch.ops.aten.add_.Tensor)
    assert internals.in_place(torch.ops.aten.mul.Tensor) is torch.ops.aten.mul_.Tensor
    assert internals.in_place(torch.ops.aten.maximum.default) is None
    assert internals.in_place(torch.ops.pegrad.aes_normal.default) is None


@pins("without_subclasses")
def test_subclasses_are_taken_for_tensors():
    """What is computed of a subclass there is a plain tensor, and modes still see it."""

    class Mine(Tensor):
        pass

    seen = []

    class Seeing(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Seeing(), internals.without_subclasses():
        assert type(torch.ones(2).as_subclass(Mine).neg()) is Tensor
    assert Tensor.neg in seen


@pins()
def test_versions_and_what_modules_hold():
    """A tensor counts its changes in `_version`; a module's `_parameters` and `_buffers` are what it looks in."""
    x = torch.ones(2)
    before = x._version
    x.add_(1)
    assert x._version > before
    linear = nn.Linear(2, 2)
    other = {"weight": nn.Parameter(torch.zeros(2, 2)), "bias": nn.Parameter(torch.ones(2))}
    linear.__dict__.update(_parameters=other)
    assert linear.weight is other["weight"]
    assert torch.equal(linear(x), torch.ones(2))


@pins()
def test_nodes_of_the_graph_have_names():
    """The node of a leaf is called AccumulateGrad and has the leaf; a transposition's is called TBackward0."""
    x = torch.ones(2, 2, requires_grad=True)
    node = x.t().grad_fn
    leaf = node.next_functions[0][0]
    assert node.name() == "TBackward0"
    assert leaf.name() == "torch::autograd::AccumulateGrad"
    assert leaf.variable is x


@pins()
def test_functions_written_in_python_ask_whether_a_mode_wants_them():
    """`F.multi_head_attention_forward` is written in Python, and asks by `has_torch_function`."""
    assert "has_torch_function" in F.multi_head_attention_forward.__code__.co_names
