"""Every Python snippet of the README runs."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_there_are_snippets():
    assert len(SNIPPETS) >= 2


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippet_runs(number):
    exec(compile(SNIPPETS[number], f"README snippet {number}", "exec"), {})


def test_op_snippet_restores_its_weights_and_optimizer_snippet_learns():
    op, optimizer = {}, {}
    exec(SNIPPETS[0].replace("torch.randn(1024, 1024)", "torch.ones(1024, 1024)"), op)
    assert (op["weights"]["layer.weight"] - 1).abs().max() <= 2 * 2.0**-23  # two roundings next to 1
    exec(SNIPPETS[1], optimizer)
    assert optimizer["loss"] < 0.9 * 0.6931
