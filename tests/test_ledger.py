"""The ledger: what a run has released is written down as it happens, and paid for whatever happens to the run."""

import io
import math

import pytest
import torch

import pegrad
from pegrad import accounting, optim, random, trees
from pegrad.accounting.ledger import Entry, Ledger, recorded
from pegrad.sampling import PoissonSampler, ShuffledSampler

SAMPLER = PoissonSampler(1000, 0.01)
PARAMS = {"w": torch.zeros(3)}
BATCH = torch.ones(2, 3)


def loss(params, x):
    return (params["w"] * x).sum()


def make(sigma=1.0, sampler=SAMPLER, **changes):
    arguments = {"clip_norm": 1.0, "noise_multiplier": sigma, "expected_batch_size": 10, "sampler": sampler}
    return pegrad.dp_sgd(loss, changes.pop("optimizer", optim.adam(0.1)), **(arguments | changes))


def run(step, params, state, steps):
    for _ in range(steps):
        params, state, _ = step(params, state, BATCH)
    return params, state


def saved_and_loaded(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_the_ledger_pays_for_every_step():
    """Catches: a resumed run that is accounted as if its last σ had been its only one."""
    first, second = make(2.0), make(0.7, PoissonSampler(1000, 0.02))
    params, state = run(first, PARAMS, first.init(PARAMS, random.key(0)), 5)
    params, state = saved_and_loaded((params, state))
    _, state = run(second, params, state, 3)
    assert [(entry.noise_multiplier, entry.steps) for entry in state.ledger.entries] == [(2.0, 5), (0.7, 3)]
    assert state.ledger.steps == state.step == 8
    events = [accounting.dp_event(2.0, SAMPLER, 5), accounting.dp_event(0.7, PoissonSampler(1000, 0.02), 3)]
    for accountant in ("rdp", "pld"):
        expected = accounting.epsilon(accounting.compose(*events), 1e-5, accountant)
        assert accounting.epsilon(state.ledger, 1e-5, accountant) == expected
        assert expected > accounting.epsilon(events[1], 1e-5, accountant)


def test_a_million_steps_are_one_entry():
    """Catches: a state that grows with every step."""
    entry = Entry(SAMPLER, 1.0, None, "Flat", 1)
    ledger = Ledger()
    for _ in range(1000):
        ledger = recorded(ledger, entry)
    assert ledger == Ledger((entry._replace(steps=1000),))
    ledger = recorded(Ledger((entry._replace(steps=10**6),)), entry)
    assert ledger.entries == (entry._replace(steps=10**6 + 1),)
    other = Entry(SAMPLER, 2.0, None, "Flat", 1)
    mixed = recorded(recorded(ledger, other), entry)
    assert [each.steps for each in mixed.entries] == [10**6 + 1, 1, 1]


@pytest.mark.parametrize(
    "change",
    [
        {"sampler": PoissonSampler(1000, 0.02)},
        {"sampler": None},
        {"noise_multiplier": 1.1},
        {"count_noise_multiplier": 5.0},
        {"clipping": "Adaptive"},
    ],
)
def test_what_differs_is_an_entry_of_its_own(change):
    """Catches: steps run together that were not alike."""
    entry = Entry(SAMPLER, 1.0, None, "Flat", 4)
    assert recorded(Ledger((entry,)), entry._replace(steps=1, **change)).entries == (
        entry,
        entry._replace(steps=1, **change),
    )


def test_a_step_that_is_repeated_is_one_entry():
    """Catches: a ledger kept outside the state, which counts the same release twice."""
    step = make()
    params, state = run(step, PARAMS, step.init(PARAMS, random.key(0)), 2)
    once, twice = step(params, state, BATCH), step(params, state, BATCH)
    assert once.state.ledger == twice.state.ledger == Ledger((Entry(SAMPLER, 1.0, None, "Flat", 3),))
    assert state.ledger.steps == 2


@pytest.mark.parametrize("clip_norm", [1.0, pegrad.Adaptive(1.0, count_noise_multiplier=8.0)])
def test_a_state_comes_back_bit_for_bit(clip_norm):
    """Catches: samplers or bounds that torch.load refuses; a bound that is rounded; a run that goes on otherwise."""
    step = make(clip_norm=clip_norm)
    _ = SAMPLER.rows, SAMPLER.overflow_probability  # what a sampler has computed is not part of what it is
    params, state = run(step, PARAMS, step.init(PARAMS, random.key(0)), 3)
    loaded = saved_and_loaded((params, state))
    assert trees.flatten(loaded)[1] == trees.flatten((params, state))[1]
    for ours, theirs in zip(trees.leaves(loaded), trees.leaves((params, state)), strict=True):
        assert type(ours) is type(theirs)
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
    straight, resumed = run(step, params, state, 3), run(step, *loaded, 3)
    assert torch.equal(straight[0]["w"], resumed[0]["w"])
    assert straight[1].bounds == resumed[1].bounds
    assert straight[1].ledger == resumed[1].ledger
    assert accounting.epsilon(resumed[1].ledger, 1e-5, "rdp") > 0


def test_no_sampler_no_epsilon():
    """Catches: an epsilon without amplification, or with that of another run, for batches drawn nobody knows how."""
    step = make(sampler=None)
    params, state = run(step, PARAMS, step.init(PARAMS, random.key(0)), 2)
    _, state = run(make(), params, state, 2)
    with pytest.raises(pegrad.ArgumentError, match=r"Entry 0 of the ledger, 2 steps.*sampler=sampler"):
        accounting.epsilon(state.ledger, 1e-5)


def test_shuffled_batches_are_refused_at_the_end_too():
    """Catches: a ledger that lets in what dp_event refuses."""
    step = make(sampler=ShuffledSampler(1000, 10))
    _, state = run(step, PARAMS, step.init(PARAMS, random.key(0)), 1)
    with pytest.raises(pegrad.ArgumentError, match="ShuffledSampler"):
        accounting.epsilon(state.ledger, 1e-5)


def test_what_is_not_known_stays_unknown():
    """Catches: a state of an older version, or of a run without privacy, taken for one that released nothing."""
    step = make()
    old = pegrad.State(random.key(0), 0, step.init_optimizer(PARAMS))
    _, state = run(step, PARAMS, old, 2)
    assert state.ledger is None
    with pytest.raises(pegrad.ArgumentError, match="without a ledger"):
        accounting.epsilon(state.ledger, 1e-5)


def test_before_the_first_step_nothing_is_spent_and_without_noise_everything():
    """Catches: an empty composition that fails; σ = 0 that divides."""
    step = make(0.0)
    state = step.init(PARAMS, random.key(0))
    assert accounting.epsilon(state.ledger, 1e-5) == 0
    _, state = run(step, PARAMS, state, 1)
    assert accounting.epsilon(state.ledger, 1e-5) == math.inf


class Lookalike:
    num_examples, sampling_rate, max_batch_size, on_overflow = 10**9, 1e-9, None, "error"


def bent(**fields):
    sampler = PoissonSampler(1000, 0.01)
    vars(sampler).update(fields)
    return sampler


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("steps", -3),
        ("steps", 2.0),
        ("steps", True),
        ("steps", torch.tensor(2)),
        ("noise_multiplier", "1.0"),
        ("noise_multiplier", float("nan")),
        ("noise_multiplier", float("inf")),
        ("noise_multiplier", -1.0),
        ("noise_multiplier", torch.tensor(5.0)),
        ("noise_multiplier", None),
        ("count_noise_multiplier", "x"),
        ("count_noise_multiplier", -1.0),
        ("sampler", Lookalike()),
        ("sampler", "PoissonSampler"),
        ("sampler", bent(sampling_rate=2.0)),
        ("sampler", bent(sampling_rate="0.1")),
        ("sampler", bent(num_examples=0)),
        ("sampler", bent(on_overflow="ignore")),
    ],
)
def test_a_ledger_that_was_tampered_with_is_refused(field, value):
    """Catches: numbers of a file that are believed as they are, and errors that name no entry."""
    good = Entry(SAMPLER, 1.0, None, "Flat", 2)
    ledger = Ledger((good, good._replace(**{field: value})))
    with pytest.raises(
        pegrad.ArgumentError, match=r"Entry 1 of the ledger|got (sampling_rate|num_examples)|on_overflow"
    ):
        accounting.epsilon(ledger, 1e-5)


def test_what_a_sampler_once_computed_is_not_believed():
    """Catches: a file whose sampler says that its batches are larger, or never overflow."""
    honest = PoissonSampler(100, 0.5, max_batch_size=40, on_overflow="truncate")
    forged = PoissonSampler(100, 0.5, max_batch_size=40, on_overflow="truncate")
    vars(forged).update(rows=90, overflow_probability=0.0)
    spent = [accounting.epsilon(Ledger((Entry(each, 2.0, None, "Flat", 1),)), 1e-5) for each in (honest, forged)]
    assert spent[0] == spent[1]


@pytest.mark.parametrize("ledger", [(), [], "ledger", Ledger(["x"]), 3])
def test_a_step_writes_into_no_other_type(ledger):
    """Catches: an entry that is lost because what came before was no ledger."""
    step = make()
    state = step.init(PARAMS, random.key(0))._replace(ledger=ledger)
    with pytest.raises(pegrad.ArgumentError, match=r"state\.ledger"):
        step(PARAMS, state, BATCH)


@pytest.mark.parametrize("entries", [["x"], ("x",), None])
def test_entries_of_other_types_are_refused(entries):
    """Catches: an AttributeError from inside."""
    with pytest.raises(pegrad.ArgumentError, match="ledger"):
        accounting.epsilon(Ledger(entries), 1e-5)
