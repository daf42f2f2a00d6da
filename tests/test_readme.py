"""The README's code runs, block after block, as a reader would type it."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parent.parent / "README.md"
SAMPLING = README.parent / "docs" / "sampling.md"
DISTRIBUTED = README.parent / "docs" / "distributed.md"


def test_the_readmes_code_runs(capsys):
    torch.manual_seed(0)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 3
    names: dict = {}
    steps = []
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
        steps.append(names["state"].step if "state" in names else 0)
    assert names["grads"]["filters"].shape == (32, 8, 1, 3, 3)
    assert names["norms"].shape == (32,)
    assert {3, 1, 2} <= set(steps)  # three steps in one piece; then one of micro-batches, and one for torch.optim
    assert names["state"].ledger.steps == names["state"].step == 1  # many processes begin anew
    assert names["epsilon"] > 0
    assert "gram" in capsys.readouterr().out


def test_the_code_of_the_page_on_sampling_runs():
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", SAMPLING.read_text(), re.DOTALL):
        exec(compile(block, str(SAMPLING), "exec"), names)
    assert names["state"].step == 10
    assert names["mask"].shape == names["norms"].shape
    assert names["epsilon"] > 1


def test_the_code_of_the_page_on_many_processes_runs():
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", DISTRIBUTED.read_text(), re.DOTALL):
        exec(compile(block, str(DISTRIBUTED), "exec"), names)
    assert names["state"].step == 3


@pytest.mark.parametrize("page", [SAMPLING, DISTRIBUTED], ids=lambda page: page.stem)
def test_a_page_names_tests_that_exist(page):
    defined = "".join(path.read_text() for path in Path(__file__).parent.rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", page.read_text())
    assert named
    assert all(f"def {name}(" in defined for name in named)
