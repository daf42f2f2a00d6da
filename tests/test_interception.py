"""Functions put in the place of PyTorch's, by a mode of their own or inside another mode."""

import pytest
import torch
from torch import Tensor

from pegrad.tracing.interception import Intercepted, Interception, on


class Seeing(Intercepted):
    """Takes note of the calls that come through."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def call(self, func, args, kwargs):
        self.seen.append(func.__name__)
        return func(*args, **kwargs)


def sine_twice(x):
    return torch.sin(torch.sin(x))


def test_what_takes_a_place_is_seen_and_may_call_what_it_replaces():
    """Catches: a function that is replaced again inside its own replacement, or runs out of the mode's sight."""
    x = torch.ones(3)
    with Seeing() as mode, on(Interception({torch.sin: sine_twice})):
        y = torch.cos(torch.sin(x))
    assert mode.seen == ["sin", "sin", "cos"]
    torch.testing.assert_close(y, x.sin().sin().cos())


def test_without_such_a_mode_the_interception_is_one_itself():
    x = torch.ones(3)
    with on(Interception({torch.sin: sine_twice})):
        y = torch.sin(x)
    torch.testing.assert_close(y, x.sin().sin())
    torch.testing.assert_close(torch.sin(x), x.sin())


def test_errors_are_noted_by_every_interception_around_them():
    """Catches: an inner block that takes the outer one's place for good, or keeps its errors to itself."""
    inner, outer = Interception({}), Interception({})

    def fail():
        with pytest.raises(RuntimeError) as raised:
            torch.mm(torch.ones(2, 2), torch.ones(3, 3))
        assert raised.value.pegrad_operation == "mm"
        return raised.value

    with Seeing(), on(outer):
        with on(inner):
            first = fail()
        second = fail()
    assert inner.raised == [first]
    assert outer.raised == [first, second]


def test_the_interception_stays_for_what_runs_again():
    """Catches: in the backward pass, a function that was replaced in the forward pass and is no more."""
    x = torch.ones(3)
    mode = Seeing()
    with mode, on(Interception({Tensor.sin: lambda x: x * 2})):
        pass
    with mode:
        torch.testing.assert_close(x.sin(), 2 * x)
