"""The pitfalls page speaks of what there is."""

import re
from functools import reduce
from pathlib import Path

import pegrad

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "pitfalls.md").read_text()


def test_every_test_that_stands_guard_exists():
    """Catches: a guard that was renamed or taken away."""
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    defined = set(re.findall(r"def (test_\w+)", "".join(p.read_text() for p in (ROOT / "tests").rglob("test_*.py"))))
    assert len(named) > 10
    assert not named - defined


def test_every_name_of_the_library_exists():
    """Catches: advice to call what is gone."""
    for name in set(re.findall(r"`pegrad\.([\w.]+)", PAGE)):
        reduce(getattr, name.split("."), pegrad)


def test_each_pitfall_says_what_happens_what_guards_and_what_to_do():
    """Catches: a pitfall without a way out."""
    pitfalls = re.split(r"\n(?=\*\*)", PAGE)[1:]
    assert len(pitfalls) > 20
    for pitfall in pitfalls:
        assert re.match(r"\*\*.+?\*\* .+?\n\*Guard:\* .+?\n\*Do:\* ", pitfall, re.DOTALL), pitfall
