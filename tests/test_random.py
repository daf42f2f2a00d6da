"""Keys, keystreams and the law of what comes out of them. Keys are fixed, so every statistic here is a constant."""

import copy
import io
import itertools
import math
import pickle
import sys
from types import SimpleNamespace

import pytest
import torch
from scipy import stats

from pegrad import random
from pegrad.errors import ArgumentError, LeafError
from pegrad.random import Cipher, aes, chacha, ciphers, draws
from pegrad.random.box_muller import box_muller, fill, precision_of
from pegrad.random.keys import derive_for

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
CIPHERS = pytest.mark.parametrize("cipher", Cipher)


# What key(0) means, from a first run; the hashes and the cipher are tested by their own libraries.
KEY_0 = "36a0795582644c59"
FOLD_0_7 = "fd077965615342bc"
SPLIT_0_1 = "b08c57aef188b253"
NORMAL_0 = [-0.211357, -0.102288, -1.108476, 1.788997]
CHACHA_NORMAL64_0 = [-1.0622651656537314, 0.5221474030711307, 0.6680078366927604]
CHACHA_UNIFORM64_0 = [0.9156857710937045, 0.6702756484063614]
NORMAL64_0 = [-0.06441492194288838, 1.7735014658627042, 1.126606040481039]
UNIFORM64_0 = [0.3893280277502681, 0.6471755700600537]
PERMUTATION_0 = [2, 3, 0, 1, 4, 5]


class _FakeStream:
    """A keystream that repeats one byte pattern, to reach words that no test would draw."""

    def __init__(self, pattern: bytes):
        self.pattern = pattern

    def update_into(self, zeros: bytes, buffer: bytearray) -> int:
        buffer[: len(zeros)] = self.pattern * (len(zeros) // len(self.pattern))
        return len(zeros)


def _fake(monkeypatch: pytest.MonkeyPatch, pattern: bytes) -> None:
    """Let either cipher make words of one byte pattern."""
    word = torch.frombuffer(bytearray(pattern), dtype=torch.int32)
    monkeypatch.setattr(aes, "keystream", lambda *_: _FakeStream(pattern))
    monkeypatch.setattr(chacha, "keystream", lambda words, counter: word.expand(16, len(counter)))


# Keys


def test_known_answers():
    """Catches any change of what a seed means: of hash, purpose, cipher, word order or Box–Muller."""
    key = random.key(0)
    assert bytes(key.tolist()[:8]).hex() == KEY_0
    assert bytes(random.fold_in(key, 7).tolist()[:8]).hex() == FOLD_0_7
    assert bytes(random.split(key)[1].tolist()[:8]).hex() == SPLIT_0_1
    torch.testing.assert_close(random.normal(key, (4,)), torch.tensor(NORMAL_0), rtol=1e-5, atol=1e-6)
    normal64 = torch.tensor(NORMAL64_0, dtype=torch.float64)
    torch.testing.assert_close(random.normal(key, (3,), dtype=torch.float64), normal64, rtol=1e-12, atol=0)
    assert random.uniform(key, (2,), dtype=torch.float64).tolist() == UNIFORM64_0
    assert random.permutation(key, 6).tolist() == PERMUTATION_0
    by_chacha = {"dtype": torch.float64, "cipher": Cipher.CHACHA20}
    normal64 = torch.tensor(CHACHA_NORMAL64_0, dtype=torch.float64)
    torch.testing.assert_close(random.normal(key, (3,), **by_chacha), normal64, rtol=1e-12, atol=0)
    assert random.uniform(key, (2,), **by_chacha).tolist() == CHACHA_UNIFORM64_0


def test_keys_are_tensors():
    for key in (random.key(), random.key(3), random.fold_in(random.key(3), 1), *random.split(random.key(3), 3)):
        assert isinstance(key, torch.Tensor)
        assert key.dtype == torch.uint8
        assert key.shape == (32,)
        assert key.device.type == "cpu"


def test_no_key_prints_its_bytes():
    """Catches: a key in a log, printed by itself, in what holds it, or as a copy, a slice or a stack of it."""
    key = random.key(3)
    holder = torch.nn.Module()
    holder.register_buffer("key", key)
    copies = [
        key,
        random.key(),
        random.fold_in(key, 1),
        random.split(key)[1],
        key.clone(),
        key.detach(),
        key.data,
        key.to("cpu", copy=True),
        key[:16],
        key.view(4, 8),
        torch.stack([key, key]),
        torch.stack([key, key])[0],
        key.unbind()[0],
        torch.empty_like(key).copy_(key),
        copy.copy(key),
        copy.deepcopy(key),
        pickle.loads(pickle.dumps(key)),
        holder.to("cpu").key,
    ]
    for each in copies:
        for shown in (repr(each), str(each), f"{each}", "%s" % each, f"{each!r}"):  # noqa: UP031
            assert shown == "key(…)"
    assert str({"key": key, "all": [copies[0]]}) == "{'key': key(…), 'all': [key(…)]}"
    assert "tensor(" not in str(key.max(0).values)
    assert str(holder.state_dict()["key"]) == "key(…)"


def test_a_key_that_was_saved_by_0_2_loads(monkeypatch):
    """Catches: a file that names the key's old place, `pegrad.keys`, and that is refused."""
    key, file = random.key(3), io.BytesIO()
    with monkeypatch.context() as before:
        before.setattr(random.Key, "__module__", "pegrad.keys")
        before.setitem(sys.modules, "pegrad.keys", SimpleNamespace(Key=random.Key))
        torch.save(key, file)
    file.seek(0)
    loaded = torch.load(file)
    assert isinstance(loaded, random.Key)
    assert torch.equal(loaded, key)


def test_what_is_no_longer_the_bytes_of_a_key_is_a_plain_tensor():
    """Catches: a type that spreads to whatever a key is compared or combined with, and hides it."""
    key = random.key(3)
    results = [key == key, key.sum(), key.double(), torch.where(key > 9, 1.0, 0.0), key.max(0).indices]
    assert all(type(result) is torch.Tensor for result in results)
    assert torch.equal(key, random.key(3))
    plain = torch.zeros(32, dtype=torch.uint8)
    assert plain.copy_(key).tolist() == key.tolist()
    mine = key.clone()
    assert mine.copy_(random.key(4)) is mine


def test_a_key_is_saved_and_loaded_as_what_it_is():
    """Catches: a key that torch.load refuses under its default settings, or returns as a tensor that prints."""
    key, file = random.key(3), io.BytesIO()
    torch.save({"key": key}, file)
    file.seek(0)
    loaded = torch.load(file)["key"]
    assert type(loaded) is type(key)
    assert torch.equal(loaded, key)
    assert copy.deepcopy([key, key])[0].tolist() == key.tolist()


def test_a_key_can_be_compiled_over():
    """Catches: a key whose base is a key, without end."""
    assert torch.compile(lambda key: key.double().sum(), backend="eager")(random.key(3)) == random.key(3).sum()


def test_a_plain_tensor_of_the_bytes_is_the_same_key():
    """Catches: keys of older files that are refused, or mean something else."""
    plain = torch.tensor(random.key(3).tolist(), dtype=torch.uint8)
    assert torch.equal(random.fold_in(plain, 5), random.fold_in(random.key(3), 5))
    assert torch.equal(random.normal(plain, (3,)), random.normal(random.key(3), (3,)))


def test_derived_keys_never_coincide():
    """Catches a purpose or a number left out of the hash, and numbers cut to 64 bits."""
    parent = random.key(5)
    numbers = [*range(100), 255, 256, 2**32, 2**64, 2**64 + 1, 2**300]
    keys = [parent, random.fold_in(random.key(6), 0), random.key(), random.key()]
    keys += [random.key(n) for n in numbers if n != 5]
    keys += [random.fold_in(parent, n) for n in numbers]
    keys += random.split(parent, 100)
    assert len({bytes(key.tolist()) for key in keys}) == len(keys)


def test_purposes_use_different_streams(monkeypatch):
    """Catches a uniform, a normal or a permutation that runs on the keystream of another, of the other cipher's, or on
    a child's key."""
    derived = []
    monkeypatch.setattr(draws, "derive_for", lambda *args: derived.append(derive_for(*args)) or derived[-1])
    key = random.key(1)
    keys = [key, random.fold_in(key, 0), random.split(key)[0]]
    for each in keys:
        for cipher in Cipher:
            random.uniform(each, (1,), cipher=cipher)
            random.normal(each, (1,), cipher=cipher)
        random.permutation(each, 1)
    assert len({*derived, *(bytes(each.tolist()) for each in keys)}) == 18


def test_numbers_may_be_integer_tensors():
    key = random.key(0)
    assert torch.equal(random.fold_in(key, torch.tensor(3)), random.fold_in(key, 3))


# Normals


@CIPHERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normal_follows_the_law(dtype, cipher):
    """Catches a wrong scale, radius or angle, and shows that the test could: other scales are rejected."""
    sample = random.normal(random.key(11), (200_000,), dtype=dtype, cipher=cipher).double().numpy()
    assert stats.kstest(sample, "norm").pvalue > 0.01
    for scale in (2 / 3, 3 / 2):
        assert stats.kstest(scale * sample, "norm").pvalue < 1e-100


@CIPHERS
def test_normal_tail(cipher):
    """Catches a radius of too few bits, of which the tail would be cut."""
    sample = random.normal(random.key(12), (8_000_000,), cipher=cipher).abs_()
    for threshold in (4.0, 4.5, 5.0):
        expected = len(sample) * 2 * stats.norm.sf(threshold)
        count = int((sample > threshold).sum())
        assert 0.001 < stats.poisson.cdf(count, expected) < 0.999


@CIPHERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_words_give_the_stated_bounds(monkeypatch, dtype, cipher):
    """Catches fewer bits in the radius, a logarithm of 0, and a radius above 1 before the logarithm."""
    key, largest = random.key(0), math.sqrt(128 * math.log(2))
    _fake(monkeypatch, bytes(4))
    assert random.normal(key, (1,), dtype=dtype, cipher=cipher).item() == pytest.approx(largest, rel=1e-6)
    _fake(monkeypatch, bytes([255] * 4))
    assert random.normal(key, (1,), dtype=dtype, cipher=cipher).item() == pytest.approx(largest, rel=1e-6)
    for pattern in (bytes([0, 0, 0, 128]), bytes([255, 255, 255, 127])):
        _fake(monkeypatch, pattern)
        assert random.normal(key, (5,), dtype=dtype, cipher=cipher).abs().max() < 1e-3


@pytest.mark.parametrize("dtype", FLOATS)
def test_both_forms_of_box_muller_agree(dtype):
    """Catches: a law that differs between the ciphers, one of which fills memory in place."""
    precision = precision_of(dtype)
    words = torch.randint(-(2**63), 2**63 - 1, (2, 501), generator=torch.Generator().manual_seed(0))
    radius, angle = words[0], words[1].to(precision.word)
    for numel in (1002, 1001):
        out = torch.empty(numel, dtype=precision.compute)
        fill(out, radius, angle, precision)
        assert torch.equal(out, torch.cat(box_muller(radius, angle, precision))[:numel])


def test_no_value_is_shared():
    """Catches noise that two leaves, steps, keys, ciphers or blocks of one stream have in common."""
    keys = [random.key(0), random.key(1), *random.split(random.key(0))]
    steps = [random.fold_in(key, step) for key in keys for step in range(3)]
    tree = {"a": torch.zeros(2000, dtype=torch.float64), "b": [torch.zeros(2, 1000, dtype=torch.float64)] * 2}
    noise = [random.tree_normal(key, tree, cipher=cipher) for key in steps for cipher in Cipher]
    values = [leaf.flatten() for each in noise for leaf in (each["a"], *each["b"])]
    for cipher in Cipher:
        values.append(random.normal(random.key(2), (3 * aes.BLOCK,), dtype=torch.float64, cipher=cipher))
    together = torch.cat(values)
    assert len(together.unique()) == len(together)


@CIPHERS
def test_normals_are_uncorrelated(cipher):
    """Catches a word used twice, and a cosine and sine of different angles or one radius in place of two."""
    n = 200_000
    sample = random.normal(random.key(13), (n,), dtype=torch.float64, cipher=cipher)
    for values in (sample, sample.square() - 1):
        unit = values / values.norm()
        for lag in (1, 2, 3, 4, 5, 8, 16, 1000, n // 2):
            assert abs(unit[:-lag] @ unit[lag:]) < 4 / math.sqrt(n)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (7,), (3, 5), (2, 3, 4)])
@pytest.mark.parametrize("dtype", FLOATS)
@CIPHERS
def test_every_shape_and_dtype(shape, dtype, cipher):
    """Catches an odd count that loses its last value, and a half precision that is not the float32 rounded."""
    for draw in (random.normal, random.uniform):
        sample = draw(random.key(0), shape, dtype=dtype, cipher=cipher)
        assert sample.shape == shape
        assert sample.dtype == dtype
        assert sample.isfinite().all()
        if dtype in (torch.bfloat16, torch.float16):
            assert torch.equal(sample, draw(random.key(0), shape, cipher=cipher).to(dtype))


@CIPHERS
def test_counts_around_the_block_size(cipher):
    """Catches a block that is skipped or left unfilled."""
    for count in (aes.BLOCK - 1, aes.BLOCK, aes.BLOCK + 1, 2 * aes.BLOCK + 3):
        sample = random.normal(random.key(4), (count,), dtype=torch.float64, cipher=cipher)
        assert len(sample.unique()) == count
        assert sample[-1000:].std() == pytest.approx(1, abs=0.15)


@CIPHERS
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_slice_is_that_of_the_whole(monkeypatch, dtype, cipher):
    """Catches a keystream that is entered at a wrong place, a last block taken for a full one, a part off by one."""
    monkeypatch.setattr(aes, "BLOCK", 32)
    monkeypatch.setattr(chacha, "_AT_ONCE_ON_CPU", 13)
    for numel in (0, 1, 31, 33, 65) if cipher is Cipher.AES else (0, 1, 23):
        whole = random.normal(random.key(5), (numel,), dtype=dtype, cipher=cipher)
        for start, stop in itertools.combinations_with_replacement(range(numel + 1), 2):
            part = random.normal_slice(random.key(5), numel, start, stop, dtype=dtype, cipher=cipher)
            assert torch.equal(part, whole[start:stop])


@CIPHERS
@pytest.mark.parametrize("dtype", FLOATS)
def test_slices_across_the_edges_of_real_blocks(dtype, cipher):
    block, numel = aes.BLOCK, 3 * aes.BLOCK + 7
    whole = random.normal(random.key(5), (numel,), dtype=dtype, cipher=cipher)
    cuts = [0, 3, block - 1, block + 1, 2 * block, 2 * block + 5, 3 * block + 2, numel]
    parts = [
        random.normal_slice(random.key(5), numel, *cut, dtype=dtype, cipher=cipher) for cut in itertools.pairwise(cuts)
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_a_slice_makes_no_more_than_its_blocks(monkeypatch):
    """Catches a stream that is read from its beginning: the last numbers of 10^15 would take years."""
    asked = []
    taken, blocks = aes.Room.taken, chacha.keystream
    monkeypatch.setattr(aes.Room, "taken", lambda room, stream, size: asked.append(size) or taken(room, stream, size))
    assert len(random.normal_slice(random.key(0), 10**15, 10**15 - 5, 10**15)) == 5
    assert 0 < sum(asked) <= 6 * aes.BLOCK + 12  # bytes: 8 for each radius, 4 for each angle
    made = []
    monkeypatch.setattr(chacha, "keystream", lambda key, counter: made.append(len(counter)) or blocks(key, counter))
    assert len(random.normal_slice(random.key(0), 10**15, 10**15 - 5, 10**15, cipher=Cipher.CHACHA20)) == 5
    assert made == [1]


@CIPHERS
@pytest.mark.parametrize("device", DEVICES)
def test_devices_agree(device, cipher):
    """Catches a generator that depends on the device."""
    for draw in (random.normal, random.uniform):
        sample = draw(random.key(0), (1001,), device=device, cipher=cipher)
        assert sample.device.type == device
        torch.testing.assert_close(sample.cpu(), draw(random.key(0), (1001,), device="cpu", cipher=cipher))
    with torch.device("meta"):
        assert random.normal(random.key(0), (3,), cipher=cipher).device.type == "meta"
        assert random.permutation(random.key(0), 3).device.type == "cpu"


def test_the_device_chooses_the_cipher():
    """Catches: a default that is not the documented one."""
    chosen = [ciphers.chosen(None, torch.device(device)) for device in ("cpu", "meta", "cuda", "mps")]
    assert chosen == [Cipher.AES, Cipher.AES, Cipher.CHACHA20, Cipher.CHACHA20]


@CIPHERS
def test_leaves_are_drawn_together_as_each_alone(monkeypatch, cipher):
    """Catches: a leaf that gets another's numbers, or other ones in company, and a part that is cut elsewhere."""
    sizes, dtypes = [0, 1, 10, 25, 3, 40, 7, 100], [torch.float32] * 5 + [torch.float64] * 2 + [torch.float32]
    leaves = [torch.zeros(size, dtype=dtype) for size, dtype in zip(sizes, dtypes, strict=True)]
    parts = [None, None, random.Part(1000, 13, 23), None, random.Part(9, 4, 7)]
    alone = [
        random.normal_slice(random.fold_in(random.key(3), index), *part, dtype=leaf.dtype, cipher=cipher)
        for index, (leaf, part) in enumerate(itertools.zip_longest(leaves, parts))
        for part in [part or random.Part(leaf.numel(), 0, leaf.numel())]
    ]
    for at_once in (1, 12, 1 << 16):
        monkeypatch.setattr(chacha, "_AT_ONCE_ON_CPU", at_once)
        monkeypatch.setattr(aes, "TOGETHER", at_once)
        together = list(random.each_normal(random.key(3), leaves, parts, cipher=cipher))
        assert all(torch.equal(one, other) for one, other in zip(together, alone, strict=True))
        assert all(
            noise.untyped_storage().nbytes() == noise.nbytes for noise in together if at_once > 100 and len(noise) > 9
        )


def test_small_leaves_are_drawn_together_past_large_ones(monkeypatch):
    """Catches: a draw of its own for each small leaf, which costs as much as thousands of numbers of a large one."""
    drawn, alone = [], aes.normals
    monkeypatch.setattr(aes, "normals", lambda *given: drawn.append(given[1]) or alone(*given))
    leaves = [torch.zeros(size) for size in (3, 20_000, 5, 0, 20_000, 7)]
    noise = list(random.each_normal(random.key(0), leaves))
    assert drawn == [20_000, 20_000]
    assert [len(each) for each in noise] == [3, 20_000, 5, 0, 20_000, 7]


def test_tree_normal_is_like_the_tree():
    tree = {"w": torch.ones(2, 3, dtype=torch.float64), "b": (torch.ones(4, dtype=torch.bfloat16), None)}
    noise = random.tree_normal(random.key(0), tree)
    assert noise["w"].shape == (2, 3)
    assert noise["w"].dtype == torch.float64
    assert noise["b"][0].shape == (4,)
    assert noise["b"][0].dtype == torch.bfloat16
    assert noise["b"][1] is None
    assert torch.equal(tree["w"], torch.ones(2, 3, dtype=torch.float64))


def test_draws_inside_a_loss_under_vmap_and_grad():
    """Catches buffers that torch.func wraps: a dropout mask may be drawn inside a loss."""
    key, params, batch = random.key(0), torch.ones(5), torch.ones(3, 5)

    def loss(params, example):
        keep = random.uniform(key, (5,)) <= 0.5
        return (params * example * keep + random.normal(key, (5,)) * params).sum()

    grads = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, batch)
    expected = (random.uniform(key, (5,)) <= 0.5) + random.normal(key, (5,))
    torch.testing.assert_close(grads, expected.expand(3, 5))


def test_no_global_state():
    """Catches use of torch's own generator, and a keystream that remembers earlier calls."""
    before = torch.get_rng_state()
    first = random.normal(random.key(0), (100,))
    random.permutation(random.key(0), 10)
    assert torch.equal(random.normal(random.key(0), (100,)), first)
    assert torch.equal(torch.get_rng_state(), before)


# Torch's generators


def test_torch_generators_run_from_the_key_and_come_back():
    """Catches: a global generator that is moved on or left seeded, and a key that is left out."""

    def draw(seed):
        with random.torch_generators(random.key(seed), [torch.ones(1)]):
            return torch.rand(5)

    before = torch.get_rng_state()
    first = draw(1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(draw(1), first)
    assert not torch.equal(draw(2), first)
    with pytest.raises(ZeroDivisionError), random.torch_generators(random.key(1)):
        raise ZeroDivisionError
    torch.set_rng_state(before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_torch_generators_of_a_gpu_run_from_the_key_and_come_back():
    """Catches: an accelerator's generator that is not forked."""

    def draw():
        with random.torch_generators(random.key(1), [torch.ones(1, device="cuda")]):
            return torch.rand(5, device="cuda")

    before = torch.cuda.get_rng_state()
    first = draw()
    assert torch.equal(torch.cuda.get_rng_state(), before)
    torch.rand(3, device="cuda")
    assert torch.equal(draw(), first)


def test_torch_generators_leave_other_devices_alone(monkeypatch):
    """Catches: torch.manual_seed, which seeds every accelerator, also those that are not put back."""
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    with random.torch_generators(random.key(1), [torch.ones(1)]):
        torch.rand(1)
    assert seeded == []


def test_the_seed_of_torch_is_no_part_of_the_keys_own_stream():
    """Catches: a seed that gives away bits of the key, or of what is drawn with it."""
    key = random.key(1)
    with random.torch_generators(key):
        seed = torch.initial_seed().to_bytes(8, "little", signed=torch.initial_seed() < 0)
    streams = [bytes(key.tolist())]
    streams += [bytes(other.tolist()) for other in (random.fold_in(key, 0), *random.split(key))]
    purposes = [*ciphers.NORMAL.values(), *ciphers.UNIFORM.values()]
    streams += [aes.keystream(derive_for(key, purpose)).update(bytes(64)) for purpose in purposes]
    assert all(seed not in stream for stream in streams)


# Uniforms


@CIPHERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_follows_the_law(dtype, cipher):
    """Catches a wrong scale and words that lose or repeat bits."""
    sample = random.uniform(random.key(21), (256_000,), dtype=dtype, cipher=cipher).double()
    assert sample.min() > 0
    assert sample.max() <= 1
    assert stats.kstest(sample.numpy(), "uniform").pvalue > 0.01
    for bits in (8, 16, 24):  # the last 8 bits of so many: all of them must be uniform
        digits = (sample * 2**bits - 1e-9).floor().long() % 256
        assert stats.chisquare(digits.bincount(minlength=256).numpy()).pvalue > 0.01


@CIPHERS
@pytest.mark.parametrize("dtype", FLOATS)
def test_uniform_is_never_zero(monkeypatch, dtype, cipher):
    """Catches k/2^r with k from 0, and k + 1 rounded above 1."""
    _fake(monkeypatch, bytes(4))
    assert random.uniform(random.key(0), (2,), dtype=dtype, cipher=cipher).min() > 0
    _fake(monkeypatch, bytes([255] * 4))
    assert random.uniform(random.key(0), (2,), dtype=dtype, cipher=cipher).max() == 1


# Permutations


def test_permutation_is_uniform():
    """Catches a biased shuffle: each of the 24 orders of 4 is equally likely."""
    counts = dict.fromkeys(itertools.permutations(range(4)), 0)
    for step in range(4800):
        counts[tuple(random.permutation(random.fold_in(random.key(31), step), 4).tolist())] += 1
    assert stats.chisquare(list(counts.values())).pvalue > 0.01


@pytest.mark.parametrize("n", [0, 1, 2, 1001])
def test_permutation_permutes(n):
    order = random.permutation(random.key(0), n)
    assert order.dtype == torch.int64
    assert order.sort().values.tolist() == list(range(n))


# Errors


@pytest.mark.parametrize(
    "key",
    [None, 0, b"0" * 32, torch.zeros(32), torch.zeros(31, dtype=torch.uint8), torch.zeros(1, 32, dtype=torch.uint8)],
)
def test_what_is_not_a_key_is_refused(key):
    calls = [
        lambda: random.check_key(key),
        lambda: random.fold_in(key, 0),
        lambda: random.split(key),
        lambda: random.uniform(key, (1,)),
        lambda: random.normal(key, (1,)),
        lambda: random.permutation(key, 2),
        lambda: random.tree_normal(key, [torch.zeros(1)]),
        lambda: random.leaf_keys(key, [torch.zeros(1)]),
    ]
    for call in calls:
        with pytest.raises(ArgumentError, match="Expected a key"):
            call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda key: random.key(-1), "seed >= 0, got seed=-1"),
        (lambda key: random.key(1.0), "seed to be an integer, got float"),
        (lambda key: random.fold_in(key, -1), "data >= 0, got data=-1"),
        (lambda key: random.fold_in(key, "a"), "data to be an integer, got str"),
        (lambda key: random.split(key, 0), "num >= 1"),
        (lambda key: random.split(key, -1), "num >= 0, got num=-1"),
        (lambda key: random.split(key, 1.5), "num to be an integer"),
        (lambda key: random.permutation(key, -1), "n >= 0, got n=-1"),
        (lambda key: random.normal(key, (2,), dtype=torch.int64), "dtype=torch.int64"),
        (lambda key: random.normal(key, (2,), dtype=torch.complex64), "dtype=torch.complex64"),
        (lambda key: random.uniform(key, (2,), dtype=torch.uint8), "dtype=torch.uint8"),
        (lambda key: random.normal(key, (-1,)), "shape >= 0, got shape=-1"),
        (lambda key: random.normal_slice(key, 5, 3, 2), "start <= stop <= numel, got start=3, stop=2, numel=5"),
        (lambda key: random.normal_slice(key, 5, 3, 6), "start <= stop <= numel, got start=3, stop=6, numel=5"),
        (lambda key: random.normal_slice(key, 5, -1, 2), "start >= 0, got start=-1"),
        (lambda key: random.normal(key, (2,), cipher="AES"), "cipher to be a pegrad.random.Cipher or None, got str"),
        (
            lambda key: random.each_normal_from(key[None], [torch.zeros(3)], [random.Part(5, 3, 6)]),
            "start <= stop <= numel, got start=3, stop=6, numel=5",
        ),
        (
            lambda key: random.each_normal_from(key, [torch.zeros(1)]),
            r"shape \(1, 32\), got torch.uint8 of shape \(32,\)",
        ),
        (lambda key: random.each_normal_from(None, [torch.zeros(1)]), r"shape \(1, 32\), got NoneType"),
        (lambda key: random.uniform(key, 3), "shape to be a sequence of integers, got int"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ArgumentError, match=message):
        call(random.key(0))


@pytest.mark.parametrize(("leaf", "kind"), [(torch.zeros(2, dtype=torch.int32), "torch.int32"), (1.0, "float")])
def test_tree_normal_names_the_leaf(leaf, kind):
    with pytest.raises(LeafError, match=rf"\['b'\]\[1\].*{kind}"):
        random.tree_normal(random.key(0), {"a": torch.zeros(1), "b": [torch.zeros(1), leaf]})
    with pytest.raises(LeafError, match=rf"\[0\].*{kind}"):
        random.each_normal_from(random.key(0)[None], [leaf])
