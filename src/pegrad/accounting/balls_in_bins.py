"""Rényi divergences of balls-in-bins sampling, which dp-accounting 0.6.0 does not know.

An example is in one of the b sums of an epoch, at a place drawn uniformly. In units of the sensitivity an epoch's sums
are, in the worst case, P = the mean over t of N(e_t, σ²I) with the example and Q = N(0, σ²I) without it. Their ratio is
the mean of b independent Y = exp(z/σ - 1/(2σ²)), z standard normal under Q. Both directions have a closed form:

- E_Q[(mean Y)^α] for whole α is α!/b^α times a coefficient of a power series, all of whose terms are positive:
  [z^α] (Σ_k exp(k(k-1)/(2σ²)) z^k / k!)^b. Between whole numbers its logarithm is convex.
- E_Q[(mean Y)^-λ], λ = α - 1, is an integral of one dimension: 1/Γ(λ) ∫ s^(λ-1) E[exp(-sY/b)]^b ds.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Whole orders up to here are worked out; beyond, the bound is that of an example whose place is known.
_MOST_ORDER = 256

# The integral's grid in log s, the depth below its peak at which it ends, and the depth to which its factors are right.
_STEP, _DEPTH, _RELIABLE = 0.02, 50.0, -60.0

# Below, a grid would be long and epsilon is no use.
_LEAST_SIGMA = 0.25

# Rounding of logarithms: what is charged for it, over their size.
_ROUNDING = 1e-11


@dataclass(frozen=True)
class BallsInBinsEvent:
    """One epoch of balls-in-bins sampling with the Gaussian mechanism, among dp-accounting's events."""

    noise_multiplier: float
    bins: int


@functools.lru_cache(maxsize=64)
def divergences(noise_multiplier: float, bins: int, orders: tuple[float, ...]) -> Array:
    """Bound the Rényi divergences of one epoch, for adding and for removing an example.

    Guarantee:
        Each is at least both D_α(P‖Q) and D_α(Q‖P), for adaptive steps too, whose worst case is the same pair. Tests:
        `test_balls_in_bins_divergences_are_the_exact_ones`, `test_balls_in_bins_divergences_of_few_bins`.

    Args:
        noise_multiplier: σ > 0.
        bins: b, the number of steps of an epoch.
        orders: α > 1.

    Returns:
        An array like `orders`.

    Source:
        Feldman and Shenfeld, "Privacy amplification by random allocation", 2025: the pair, and whole orders. Chua et
        al., "Balls-and-bins sampling for DP-SGD", 2024: the pair is the worst for adaptive steps.
    """
    alphas = np.array(orders)
    place_known = alphas / (2 * noise_multiplier**2)
    removal = _removal(noise_multiplier, bins, alphas)
    addition = _addition(noise_multiplier, bins, alphas)
    return np.minimum(place_known, np.maximum(removal, addition))


def _removal(sigma: float, bins: int, alphas: Array) -> Array:
    """D_α(P‖Q), by the power series; infinite beyond the orders that are worked out."""
    moments = _log_moments(sigma, bins)
    orders = np.arange(_MOST_ORDER + 1)
    moments += _ROUNDING * (1 + orders**2 / (2 * sigma**2) + orders * math.log(bins))
    moments[1] = 0
    inside = np.interp(alphas, orders, moments) / (alphas - 1)
    return np.where(alphas <= _MOST_ORDER, inside, math.inf)


def _log_moments(sigma: float, bins: int) -> Array:
    """Work out log E_Q[(mean Y)^k], k = 0, ..., by squaring the power series, in logarithms."""
    k = np.arange(_MOST_ORDER + 1)
    log_factorials = np.array([math.lgamma(order + 1) for order in k])
    square = k * (k - 1) / (2 * sigma**2) - log_factorials
    power = np.where(k == 0, 0.0, -math.inf)
    remaining = bins
    while remaining:
        if remaining & 1:
            power = _log_product(power, square)
        remaining >>= 1
        if remaining:
            square = _log_product(square, square)
    return power + log_factorials - k * math.log(bins)


def _log_product(a: Array, b: Array) -> Array:
    return np.array([np.logaddexp.reduce(a[: k + 1] + b[k::-1]) for k in range(len(a))])


def _addition(sigma: float, bins: int, alphas: Array) -> Array:
    """D_α(Q‖P): the integral where its grid reaches, else by the geometric mean, which is below the mean."""
    by_geometric_mean = 1 / (2 * sigma**2) + (alphas - 1) / (2 * bins * sigma**2)
    if sigma < _LEAST_SIGMA:
        return by_geometric_mean
    w, log_factor = _log_laplace(sigma, bins)
    reached = log_factor > _RELIABLE
    w, log_factor = w[reached], log_factor[reached]
    bounds = []
    for lam in alphas - 1:
        values = lam * w + bins * log_factor
        peak = values.max()
        if values[-1] > peak - _DEPTH:
            bounds.append(math.inf)
            continue
        # On the left the factor is at most 1; the last term is what the trapezoid rule lacks at that end.
        first = math.exp(lam * w[0] - peak)
        trapezoid = _STEP * (np.exp(values - peak).sum() - 0.5 * math.exp(values[0] - peak))
        total = trapezoid + first / lam + first * lam * _STEP**2 / 12
        moment = lam * math.log(bins) - math.lgamma(lam) + peak + math.log(total)
        bounds.append((moment + _ROUNDING * (1 + abs(peak) + lam * math.log(bins))) / lam)
    return np.minimum(bounds, by_geometric_mean)


def _log_laplace(sigma: float, bins: int) -> tuple[Array, Array]:
    """A grid of w, and log E[exp(-e^w Y)] there, by the trapezoid rule over the normal."""
    step = min(0.2, sigma / 8)
    z = np.arange(-14, 14 + step, step)
    log_weights = -(z**2) / 2 + math.log(step / math.sqrt(2 * math.pi))
    log_y = z / sigma - 1 / (2 * sigma**2)
    w = np.arange(-math.log(bins) - 21, 1 / (2 * sigma**2) + 13 / sigma + 6, _STEP)
    parts = np.array_split(w, max(1, len(w) // 1000))
    with np.errstate(over="ignore"):
        logs = [np.logaddexp.reduce(log_weights - np.exp(part[:, None] + log_y), axis=1) for part in parts]
    return w, np.minimum(np.concatenate(logs), 0)
