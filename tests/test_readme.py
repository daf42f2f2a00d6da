"""The README's code runs, block after block, as a reader would type it."""

import re
from pathlib import Path

import torch

README = Path(__file__).parent.parent / "README.md"


def test_the_readmes_code_runs(capsys):
    torch.manual_seed(0)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 3
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert names["grads"]["filters"].shape == (32, 8, 1, 3, 3)
    assert names["norms"].shape == (32,)
    assert names["state"].step == 3
    assert names["epsilon"] > 0
    assert "gram" in capsys.readouterr().out
