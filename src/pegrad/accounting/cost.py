"""What an event or a ledger costs: epsilon for a delta."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pegrad.accounting.accountants import pld_epsilon, rdp_epsilon
from pegrad.accounting.events import Event, compose
from pegrad.accounting.extra import dp_accounting
from pegrad.accounting.ledger import Ledger, checked
from pegrad.accounting.samplers import dp_event
from pegrad.errors import ArgumentError

if TYPE_CHECKING:
    from dp_accounting import DpEvent


def ledger_event(ledger: Ledger) -> Event:
    """Describe what a ledger lists as events of dp-accounting.

    Guarantee:
        Every step that the ledger lists is charged with the noise multiplier and the sampler it was taken with; with
        adaptive clipping, gradients and counts as the one Gaussian mechanism that they are together. Tests:
        `test_the_ledger_pays_for_every_step`, `test_adaptive_steps_cost_what_dp_accounting_composes`.

    Args:
        ledger: of a state that `pegrad.dp_sgd` made, for runs on one data set.

    Raises:
        ArgumentError: an entry does not say how its batches were drawn, or was changed.
        MissingExtraError: dp-accounting is not installed.
    """
    entries = checked(ledger)
    return compose(*(dp_event(entry.joint_noise_multiplier, sampler, entry.steps) for entry, sampler in entries))


def epsilon(event: Event | Ledger | DpEvent | None, delta: float, accountant: Literal["pld", "rdp"] = "pld") -> float:
    """Compute the epsilon of an event at a delta, for its relation between neighbouring data sets.

    Args:
        event: what `dp_event` or `compose` returned, the ledger of a state, or any event of dp-accounting that the
            accountant supports.
        delta: δ in (0, 1).
        accountant: "pld" composes privacy loss distributions, discretised so that rounding never lowers epsilon, and
            Rényi divergences too, and takes the smaller of the two bounds; of subsets of a fixed size and balls-in-bins
            only the latter is known. "rdp" composes Rényi divergences alone: a looser bound.

    Returns:
        ε >= 0; `math.inf` for a run without noise.

    Raises:
        ArgumentError: `delta` is out of range, the accountant is unknown or does not support the event, batches
            overflow with a probability that is not below `delta`, or a ledger does not say all that is needed.
        MissingExtraError: dp-accounting is not installed.

    Source:
        PLD: Doroshenko et al., "Connect the dots: tighter discrete approximations of privacy loss distributions",
        2022. RDP: Mironov, Talwar and Zhang, "Rényi differential privacy of the sampled Gaussian mechanism", 2019.
        Truncated batches: arXiv 2508.15089. Subsets of a fixed size: Wang, Balle and Kasiviswanathan, "Subsampled Rényi
        differential privacy and analytical moments accountant", 2019, Theorem 27. Balls-in-bins:
        `pegrad.accounting.balls_in_bins`.

    Example:
        >>> from pegrad.sampling import PoissonSampler
        >>> sampler = PoissonSampler(num_examples=1000, sampling_rate=0.04)
        >>> round(epsilon(dp_event(1.5, sampler, steps=2250), delta=1e-5), 2)
        6.77
    """
    if not 0 < delta < 1:
        raise ArgumentError(f"Expected 0 < delta < 1, got delta={delta}.")
    if accountant not in ("pld", "rdp"):
        raise ArgumentError(f"Expected accountant 'pld' or 'rdp', got accountant={accountant!r}.")
    if event is None:
        raise ArgumentError(
            "Expected an event or a ledger, got None: a state without a ledger does not say what was released before."
        )
    dp = dp_accounting()
    event = ledger_event(event) if isinstance(event, Ledger) else event
    removal, addition, overflow, relation = event if isinstance(event, Event) else Event(event, event)
    if overflow >= delta:
        raise ArgumentError(
            f"The batches of this run are not the Poisson samples that are accounted with probability up to "
            f"{overflow:.1e}, since a draw may overflow, and that is not below delta={delta:g}. Leave max_batch_size "
            "at its default, raise it, or set on_overflow='truncate'."
        )
    bound = pld_epsilon if accountant == "pld" else rdp_epsilon
    pairs = [removal] if removal == addition else [removal, addition]
    try:
        return max(bound(dp, pair, delta - overflow, relation) for pair in pairs)
    except dp.UnsupportedEventError:
        raise ArgumentError(
            f"Accountant {accountant!r} does not support {event}. Truncated batches and users' records need 'pld'."
        ) from None
