"""Random batches as pure functions of a key and a step, padded to one size.

A sampler says which rows of the data set make up the batch of a step. Every batch has the same number of rows, so
compiled code and memory never change size; a mask tells examples from padding. The accountant of
`pegrad.accounting` derives its event from the sampler. `batches` feeds a `torch.utils.data.DataLoader` with the draws.
"""

from pegrad.sampling.allocation import BallsInBinsSampler, CyclicPoissonSampler
from pegrad.sampling.draws import Draw, UserDraw, gather
from pegrad.sampling.fixed import FixedSizeSampler, ShuffledSampler
from pegrad.sampling.loading import Batches, ByUser, batches
from pegrad.sampling.poisson import PoissonSampler
from pegrad.sampling.sizes import OVERFLOW_PROBABILITY, binomial_tail
from pegrad.sampling.users import RecordSampler, UserSampler

Sampler = RecordSampler | UserSampler | ShuffledSampler

__all__ = [
    "OVERFLOW_PROBABILITY",
    "BallsInBinsSampler",
    "Batches",
    "ByUser",
    "CyclicPoissonSampler",
    "Draw",
    "FixedSizeSampler",
    "PoissonSampler",
    "RecordSampler",
    "Sampler",
    "ShuffledSampler",
    "UserDraw",
    "UserSampler",
    "batches",
    "binomial_tail",
    "gather",
]
