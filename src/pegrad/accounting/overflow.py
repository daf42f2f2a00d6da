"""What it adds to δ that a draw may not fit into the batch."""

from dataclasses import replace

from pegrad.sampling import BallsInBinsSampler, CyclicPoissonSampler, PoissonSampler, binomial_tail


def overflow_probability(
    sampler: PoissonSampler | CyclicPoissonSampler | BallsInBinsSampler, others: int, more: int = 1
) -> float:
    """Bound what overflow adds to the delta of one step, between data sets of `others` examples and `more`, z.

    Let S be the draw of the others, which is the same on both data sets. Where S leaves a row free for each of z, the
    batch is the exact sample, with z or without, and the step is as private as exact sampling makes it, for every such
    S. Where S leaves less, an error or a truncation may tell whether z is there, and delta is at most 1. How many
    others are drawn depends neither on z nor on what earlier steps released, so by joint convexity the delta of a run
    is at most that of the exact run plus the probability that S leaves less in some step: T times P[Binomial(others,
    rate) > M - more]. No exp(ε) enters, as it would if the overflow of each data set were charged by itself. That steps
    may depend on each other, as those of an epoch dealt to bins do, takes nothing from the sum over them.
    """
    rows = replace(sampler, num_examples=others + more).rows  # by default the larger data set has the larger batch
    return binomial_tail(others, sampler.inclusion_rate, rows - more)
