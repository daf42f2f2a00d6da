"""The two ciphers that noise is made by, and which of them a device gets. A key gives other numbers by each.

AES-256 in counter mode, for the CPU: a processor has instructions for it. Asked for on an accelerator, its keystream is
made on the CPU and copied block by block. ChaCha20, for accelerators: it is plain integer arithmetic, runs where the
noise is needed, copies nothing but the key, and compiles.

ChaCha20 has been measured on a CPU alone, where AES is the faster: some ten times, operation by operation, and several
times over many numbers when compiled (`benchmarks/noise.py`). On a GPU it is expected to be bound by the launches of
its some 600 kernels where there are few numbers, and by memory where there are many; compiled, by memory, in twenty
or so, since compilers do not fuse over the rotations of the state. None of that has been measured.

Under either, the bits are the same on every device; the floating-point results may differ in the last places, as each
device, and each compiler, has its own `log`, `cos` and `sin`. What Inductor compiles for a CPU has the same words, and
normals within four units of 2^-23 (float64: 2^-52) of their size (`test_compiled_words_are_the_eager_ones`).
"""

from enum import Enum

import torch

from pegrad.errors import ArgumentError


class Cipher(Enum):
    """What makes a keystream of a derived key."""

    AES = "AES-256-CTR"
    """On the CPU, by its own instructions: see `pegrad.random.aes`."""
    CHACHA20 = "ChaCha20"
    """On any device, by integer operations of torch: see `pegrad.random.chacha`."""


# Personalisations of BLAKE2b: no two purposes, and no two ciphers, share a derived key.
NORMAL = {Cipher.AES: b"pegrad normal", Cipher.CHACHA20: b"chacha20 normal"}
UNIFORM = {Cipher.AES: b"pegrad uniform", Cipher.CHACHA20: b"chacha20 uniform"}


def chosen(cipher: Cipher | None, device: torch.device) -> Cipher:
    """Return the cipher that is asked for, or that of the device.

    Raises:
        ArgumentError: it is neither a `Cipher` nor None.
    """
    if cipher is None:
        return Cipher.AES if device.type in ("cpu", "meta") else Cipher.CHACHA20
    if not isinstance(cipher, Cipher):
        raise ArgumentError(f"Expected cipher to be a pegrad.random.Cipher or None, got {type(cipher).__name__}.")
    return cipher
