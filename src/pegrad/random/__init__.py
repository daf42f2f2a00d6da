"""Stateless random numbers for privacy: 256-bit keys, a cipher's keystream, Box–Muller normals.

A key is a `torch.uint8` tensor of shape (32,) that prints as `key(…)`, so a training state that carries one is tensors
and numbers. It is for one use: derive a fresh one for each with `fold_in` or `split`. Derivation is BLAKE2b keyed with
the parent and personalised by purpose, so no two purposes ever meet in one derived key. Numbers come from the keystream
of a `Cipher` under a derived key; torch does the arithmetic.

What must stay secret, for as long as what was made with it is to stay private: every key, the seed that a key was made
from, and whatever a key is derived from. Whoever has the key of a run can make its noise again and subtract it. A key
lies in the state of a run, so a checkpoint that is published must be one without the state.

Not guaranteed: a float is a rounded real, so the low bits of a noisy value can betray what the noise was
added to (Mironov, "On significance of the least significant bits for differential privacy", CCS 2012); the
time that a call takes is not hidden; keys lie in ordinary memory and are not wiped.
"""

from pegrad.random.ciphers import Cipher
from pegrad.random.draws import normal, normal_slice, permutation, uniform
from pegrad.random.generators import torch_generators
from pegrad.random.keys import Key, check_key, fold_in, key, split
from pegrad.random.leaves import Part, each_normal, each_normal_from, leaf_keys, tree_normal

__all__ = [
    "Cipher",
    "Key",
    "Part",
    "check_key",
    "each_normal",
    "each_normal_from",
    "fold_in",
    "key",
    "leaf_keys",
    "normal",
    "normal_slice",
    "permutation",
    "split",
    "torch_generators",
    "tree_normal",
    "uniform",
]
