"""Every Python snippet of the README and of the pages in docs runs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPETS = {page.name: re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL) for page in PAGES}


def run(page, number):
    """What a snippet leaves behind."""
    code, names = SNIPPETS[page][number], {}
    exec(compile(code, f"{page}, snippet {number}", "exec"), names)
    return names


def test_there_are_snippets():
    assert len(SNIPPETS["README.md"]) >= 2 and SNIPPETS["own_method.md"] and SNIPPETS["modes.md"]


@pytest.mark.parametrize(("page", "number"), [(page, i) for page, found in SNIPPETS.items() for i in range(len(found))])
def test_snippet_runs(page, number, tmp_path, monkeypatch):
    if "transformers" in SNIPPETS[page][number]:
        pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    run(page, number)


def test_op_snippet_restores_its_weights():
    code, names = SNIPPETS["README.md"][0], {}
    exec(code.replace("torch.randn(1024, 1024)", "torch.ones(1024, 1024)"), names)
    assert (names["weights"]["layer.weight"] - 1).abs().max() <= 2 * 2.0**-23  # two roundings next to 1


def test_optimizer_snippet_learns():
    assert run("README.md", 1)["loss"] < 0.9 * 0.6931


def test_the_method_of_ones_own_learns_at_the_cost_it_states():
    names = run("own_method.md", 0)
    assert names["loss"] < 1  # of a target with variance 10
    assert names["optimizer"].cost()[:3] == pytest.approx((4, 5, 0))
    assert run("own_method.md", 1)["optimizer"].mode == "folded"
