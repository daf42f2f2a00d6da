"""ChaCha20 against its RFC and another implementation, and draws inside of graphs: traced, compiled, never baked in."""

import os
import subprocess
import sys

import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher as Reference
from cryptography.hazmat.primitives.ciphers import algorithms
from torch.fx.experimental.proxy_tensor import make_fx

from pegrad import random
from pegrad.errors import ArgumentError
from pegrad.random import Cipher, chacha
from pegrad.random.box_muller import precision_of

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
COUNTING = bytes(range(32))
SUNSCREEN = (
    b"Ladies and Gentlemen of the class of '99: "
    b"If I could offer you only one tip for the future, sunscreen would be it."
)
# RFC 8439: key, counter, nonce, first bytes of the keystream.
VECTORS = {
    "2.3.2": (
        COUNTING,
        1,
        "000000090000004a00000000",
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
        "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e",
    ),
    "A.1 #1": (
        bytes(32),
        0,
        "000000000000000000000000",
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586",
    ),
    "A.1 #2": (
        bytes(32),
        1,
        "000000000000000000000000",
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f",
    ),
    "A.1 #3": (
        bytes(31) + b"\x01",
        1,
        "000000000000000000000000",
        "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a"
        "8eca00bbb4a73bdad192b5c42f73f2fd4e273644c8b36125a64addeb006c13a0",
    ),
    "A.1 #4": (
        b"\x00\xff" + bytes(30),
        2,
        "000000000000000000000000",
        "72d54dfbf12ec44b362692df94137f328fea8da73990265ec1bbbea1ae9af0ca"
        "13b25aa26cb4a648cb9b9d1be65b2c0924a66c54d545ec1b7374f4872e99f096",
    ),
    "A.1 #5": (
        bytes(32),
        0,
        "000000000000000000000002",
        "c2c64d378cd536374ae204b9ef933fcd1a8b2288b3dfa49672ab765b54ee27c7"
        "8a970e0e955c14f3a88e741b97c286f75f8fc299e8148362fa198a39531bed6d",
    ),
    "2.4.2": (
        COUNTING,
        1,
        "000000000000004a00000000",
        bytes(
            a ^ b
            for a, b in zip(
                SUNSCREEN,
                bytes.fromhex(
                    "6e2e359a2568f98041ba0728dd0d6981e97e7aec1d4360c20a27afccfd9fae0b"
                    "f91b65c5524733ab8f593dabcd62b3571639d624e65152ab8f530c359f0861d8"
                    "07ca0dbf500d6a6156a38e088a22b65e52bc514d16ccf806818ce91ab7793736"
                    "5af90bbf74a35be6b40b8eedf2785e42874d"
                ),
                strict=True,
            )
        ).hex(),
    ),
}
PLACES = 4  # how far a compiled normal may be from the eager one, in units of 2^-23 (float64: 2^-52) of its size
INDUCTOR = pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # of torch's own, as it is loaded
LEAVES = [torch.zeros(3, 4), torch.zeros(25), torch.zeros(0), torch.zeros(1001)]
PARTS = [None, random.Part(50, 13, 38)]


def words_of(key: bytes) -> torch.Tensor:
    return chacha.key_words(torch.tensor(list(key), dtype=torch.uint8))


def stream(key: bytes, first: int, blocks: int, nonce: bytes = bytes(8), device: str = "cpu") -> bytes:
    """Our keystream: the counter has 64 bits, the nonce 8 bytes."""
    numbers = (int.from_bytes(nonce[:4], "little", signed=True), int.from_bytes(nonce[4:], "little", signed=True))
    made = chacha.keystream(words_of(key).to(device), first + torch.arange(blocks, device=device), numbers)
    return made.t().contiguous().cpu().numpy().tobytes()


def reference(key: bytes, first: int, blocks: int, nonce: bytes = bytes(8)) -> bytes:
    """The same, by another implementation, whose counter has 32 bits, one block at a time where that overflows."""
    made = b""
    for number in [first] if first + blocks < 2**32 else range(first, first + blocks):
        encryptor = Reference(algorithms.ChaCha20(key, number.to_bytes(8, "little") + nonce), None).encryptor()
        made += encryptor.update(bytes(64 * (blocks if first + blocks < 2**32 else 1)))
    return made


# The cipher


@pytest.mark.parametrize("name", VECTORS)
def test_blocks_of_the_rfc(name):
    """Catches: another number of rounds, rotation, constant, order of words or bytes."""
    key, counter, nonce, expected = VECTORS[name]
    first = counter | int.from_bytes(bytes.fromhex(nonce)[:4], "little") << 32
    made = stream(key, first, 2, bytes.fromhex(nonce)[4:]).hex()
    assert made[: len(expected)] == expected


@pytest.mark.parametrize("device", DEVICES)
def test_keystream_of_random_keys(device):
    """Catches: an addition that does not wrap, or a shift that repeats the sign, in vectors or in what is left over."""
    for blocks in [*range(1, 40), 1003]:
        key = bytes(random.fold_in(random.key(1), blocks).tolist())
        nonce = bytes(random.fold_in(random.key(2), blocks).tolist()[:8])
        assert stream(key, blocks, blocks, nonce, device) == reference(key, blocks, blocks, nonce)


@pytest.mark.parametrize("first", [2**31 - 2, 2**32 - 2, 2**33 - 2, 2**63 - 5])
def test_the_counter_carries(first):
    """Catches: a stream that begins again after 2^32 blocks, or a sign that runs over into the upper half."""
    assert stream(COUNTING, first, 4) == reference(COUNTING, first, 4)


def test_normals_beyond_32_bits_of_the_counter_are_others():
    """Catches: a shard far into a large tensor that gets the noise of its beginning."""
    draws = [
        random.normal_slice(random.key(1), 2**60, start, start + 20, dtype=torch.float64, cipher=Cipher.CHACHA20)
        for start in (0, 8 * 2**32, 16 * 2**32)
    ]
    assert len(torch.cat(draws).unique()) == 60


def test_many_streams_at_once_are_each_alone():
    """Catches: a block that is made under another stream's key, or from another's counter."""
    keys = torch.stack([random.fold_in(random.key(1), index) for index in range(4)])
    spans = [(0, 3), (7, 7), (2**40, 2**40 + 31), (9, 11)]
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        words = chacha.key_words(keys)
        together = chacha.each_normal(words, spans, dtype)
        for own, (start, stop), drawn in zip(words, spans, together, strict=True):
            assert torch.equal(drawn, chacha.normals(own, stop - start, start, dtype))


# In graphs


def draw(cipher):
    """A function for a graph: of derived keys to noise."""
    return lambda derived: random.each_normal_from(derived, LEAVES, PARTS, cipher=cipher)


def eager(key, cipher):
    return list(random.each_normal(key, LEAVES, PARTS, cipher=cipher))


def same(some, others):
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("cipher", Cipher)
def test_a_traced_draw_is_the_eager_one(cipher, mode):
    """Catches: a graph that has other numbers, or the same for every key."""
    first, second = random.key(1), random.key(2)
    graph = make_fx(draw(cipher), tracing_mode=mode)(random.leaf_keys(first, LEAVES, cipher=cipher))
    for key in (first, second):
        assert same(graph(random.leaf_keys(key, LEAVES, cipher=cipher)), eager(key, cipher))
    namespaces = {node.target.namespace for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
    assert namespaces == ({"aten"} if cipher is Cipher.CHACHA20 else {"aten", "pegrad"})
    if cipher is Cipher.CHACHA20:
        assert len(graph.graph.nodes) < 700  # whatever the number of leaves is


@pytest.mark.parametrize("cipher", Cipher)
def test_one_derived_key_draws_a_slice(cipher):
    rows = random.leaf_keys(random.key(1), LEAVES, cipher=cipher)
    leaf, part = torch.zeros(200, dtype=torch.float64), random.Part(1001, 500, 700)
    drawn = random.each_normal_from(rows[3:], [leaf], [part], cipher=cipher)[0]
    key = random.fold_in(random.key(1), 3)
    assert torch.equal(drawn, random.normal_slice(key, 1001, 500, 700, dtype=torch.float64, cipher=cipher))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("cipher", Cipher)
def test_no_key_is_baked_into_a_graph(cipher, mode):
    """Catches: a graph that draws the same noise at every run."""
    key = random.key(1)
    rows = random.leaf_keys(key, LEAVES, cipher=cipher)
    bad = [
        lambda x: x + random.normal(key, (10,), cipher=cipher),
        lambda x: x + random.uniform(key, (10,), cipher=cipher),
        lambda x: random.fold_in(key, 1),
        lambda x: random.split(key),
        lambda x: random.permutation(key, 10),
        lambda x: random.leaf_keys(key, LEAVES, cipher=cipher),
        lambda x: random.each_normal_from(rows, LEAVES, cipher=cipher),
        lambda x: x + random.each_normal_from(row, [x], [random.Part(100, 50, 60)], cipher=cipher)[0],
    ]
    if mode == "real":  # otherwise torch refuses what is real in a graph
        bad.append(lambda x: random.each_normal_from(rows + 0, LEAVES, cipher=cipher))
        bad.append(lambda x: random.each_normal_from(rows + x[:1].to(torch.uint8), LEAVES, cipher=cipher))
    row = rows[3:]
    for function in bad:
        with pytest.raises(ArgumentError, match="at every run"):
            make_fx(function, tracing_mode=mode)(torch.zeros(10))


@pytest.mark.parametrize("cipher", Cipher)
def test_a_compiled_function_draws_anew_for_every_key(cipher):
    """Catches: noise that dynamo takes for a constant, from keys that are arguments or lie outside."""

    def outer(key, x):
        return x + random.normal(key, (10,), cipher=cipher)

    compiled = torch.compile(outer, backend="eager")
    for seed in range(3):
        key = random.key(seed)
        assert torch.equal(compiled(key, torch.zeros(10)), random.normal(key, (10,), cipher=cipher))


def test_the_operations_of_aes_are_sound():
    """Catches: a schema or a fake that does not say what an operation does."""
    derived = random.leaf_keys(random.key(1), [torch.zeros(1)] * 2, cipher=Cipher.AES)
    for dtype in (torch.float64, torch.bfloat16):
        arguments = (derived[0], 300, 10, 200, dtype, torch.device("cpu"))
        torch.library.opcheck(torch.ops.pegrad.aes_normal.default, arguments)
        torch.library.opcheck(torch.ops.pegrad.each_aes_normal.default, (derived, [3, 0], dtype, torch.device("cpu")))


@INDUCTOR
def test_aes_compiled_has_the_same_bits():
    key = random.key(1)
    compiled = torch.compile(draw(Cipher.AES), fullgraph=True)
    assert same(compiled(random.leaf_keys(key, LEAVES, cipher=Cipher.AES)), eager(key, Cipher.AES))
    key = random.key(2)
    assert same(compiled(random.leaf_keys(key, LEAVES, cipher=Cipher.AES)), eager(key, Cipher.AES))


@INDUCTOR
@pytest.mark.slow
@pytest.mark.parametrize("double_rounds", [1, 10])
@pytest.mark.parametrize("device", DEVICES)
def test_compiled_words_are_the_eager_ones(monkeypatch, double_rounds, device):
    """Catches: an addition that a compiler takes for one that cannot overflow, a shift or a conversion of another kind,
    in vectors or in what is left over; and normals of other words, or off by more than a compiler's own functions are.
    """
    monkeypatch.setattr(chacha, "_DOUBLE_ROUNDS", double_rounds)

    def drawn(words, counter):
        blocks = chacha.keystream(words, counter)
        return blocks, *(chacha._normals_of(blocks, precision_of(dtype)) for dtype in (torch.float32, torch.float64))

    compiled = torch.compile(drawn, fullgraph=True, dynamic=False)
    counter = 2**32 - 500 + torch.arange(1003, device=device)
    for seed in range(2):
        words = words_of(bytes(random.key(seed).tolist())).to(device)
        blocks, *normals = compiled(words, counter)
        eager_blocks, *eager_normals = drawn(words, counter)
        assert torch.equal(blocks, eager_blocks)
        for some, others in zip(normals, eager_normals, strict=True):
            torch.testing.assert_close(some, others, rtol=PLACES * torch.finfo(some.dtype).eps, atol=0)


@INDUCTOR
@pytest.mark.slow
def test_compiled_noise_of_many_leaves_is_the_eager_one(monkeypatch):
    """Catches: a compiled draw that gives a leaf another's numbers, or the numbers of the key it was compiled with."""
    monkeypatch.setattr(chacha, "_DOUBLE_ROUNDS", 1)
    compiled = torch.compile(draw(Cipher.CHACHA20), fullgraph=True, dynamic=False)
    for seed in range(2):
        made = compiled(random.leaf_keys(random.key(seed), LEAVES, cipher=Cipher.CHACHA20))
        for some, others in zip(made, eager(random.key(seed), Cipher.CHACHA20), strict=True):
            torch.testing.assert_close(some, others, rtol=PLACES * torch.finfo(some.dtype).eps, atol=0)


def test_importing_does_not_load_dynamo():
    """Catches: an operation whose registration costs everyone the import of a compiler."""
    code = "import sys, pegrad; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
