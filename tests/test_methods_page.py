"""docs/methods.md is true: costs are those that are counted, options and defaults those of the signatures."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch

from pgap_kernels import methods
from pgap_kernels.optim import LowRankOptimizer, ZOOptimizer, available_methods, make_optimizer, method_options
from pgap_kernels.optim.registry import method_class

PAGE = (Path(__file__).parents[1] / "docs" / "methods.md").read_text(encoding="utf-8")
ROWS, COLUMNS, RANK = 24, 16, 3
LOWRANK = {"rank": RANK, "window": 4}
# Options, and the symbols of the page's formulas.
SMALL = {
    "mezo": ({"probes": 3}, {"q": 3}),
    "pgap": ({**LOWRANK, "probes": 5, "directions": 2}, {"q": 2, "h": 5, "k": 4}),
    "lozo": ({**LOWRANK, "directions": 3}, {"q": 3, "k": 4}),
    "lozo-m": (LOWRANK, {"k": 4}),
    "pizo": ({"pool": 5}, {"M": 5}),
    "helene": ({"batch_size": 2}, {}),
    "dizo": ({"select": ["*"], "kappa": 3, "iterations": 4}, {"κ": 3, "J": 4}),
    "agzo": ({"rank": RANK, "basis_interval": 5}, {"k": 5}),
    "loren": ({"probes": 3}, {"K": 3}),
    "eggroll": ({"rank": RANK, "population": 6}, {"N": 6}),
    "mezo-momentum": ({"probes": 2}, {"q": 2}),
    "mezo-adam": ({"probes": 2}, {"q": 2}),
    "subzero": ({**LOWRANK, "directions": 3}, {"q": 3, "k": 4}),
    "pizo-subzero": ({**LOWRANK, "pool": 5}, {"M": 5, "k": 4}),
    "svd-0": ({**LOWRANK, "probes": 5, "directions": 2}, {"q": 2, "h": 5, "k": 4}),
    "hizoo": ({}, {}),
    "sparse-mezo": ({"probes": 3}, {"q": 3}),
    "fzoo": ({"probes": 5}, {"N": 5}),
    "tezo": ({"rank": RANK}, {}),
    "zo-muon": ({**LOWRANK, "directions": 3}, {"N": 3}),
    "lezo": ({}, {"s": 1}),
    "zo-adamu": ({}, {}),
    "adalezo": ({}, {"s": 1}),
}
MODES = ({"mode": "inplace"}, {"mode": "scratch"}, {"mode": "folded"}, {"mode": "folded", "merge": "window"})


def table(text: str) -> list[list[str]]:
    """The rows of the first table in a text, without its head."""
    lines = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def section(title: str) -> str:
    return re.search(rf"^(#+) {re.escape(title)}\n(.*?)(?=^#|\Z)", PAGE, re.MULTILINE | re.DOTALL)[2]


def value(formula: str, symbols: dict) -> float:
    """Of a formula with products as people write them."""
    written = re.sub(r"(?<=[\w)])(?=[^\W\d]|\()", "*", formula.replace("−", "-"))
    return eval(written, {"m": ROWS, "n": COLUMNS, "r": RANK, **symbols})


def test_every_method_has_its_rows():
    names = [f"`{name}`" for name in available_methods()]
    assert sorted(row[0] for row in table(PAGE)) == sorted(row[0] for row in table(section("Cost"))) == sorted(names)
    for name, cls, *_ in table(PAGE):
        assert method_class(name.strip("`")).__name__ == cls.strip("`")


@pytest.mark.parametrize("row", table(section("Cost")), ids=lambda row: row[0].strip("`"))
def test_costs_are_counted(row):
    name, forwards, *passes, state = row
    options, symbols = SMALL[name.strip("`")]
    for formula, mode in zip(passes, MODES, strict=True):
        model = torch.nn.Sequential(torch.nn.Linear(COLUMNS, ROWS, bias=False))
        if not formula:
            with pytest.raises(ValueError, match="mode: got 'folded'"):
                make_optimizer(name.strip("`"), model, **options, **mode)
            continue
        cost = make_optimizer(name.strip("`"), model, **options, **mode).cost()
        assert cost.forwards == pytest.approx(value(forwards, symbols))
        assert cost.weight_passes == pytest.approx(value(formula, symbols))
        if mode["mode"] == "inplace":
            assert cost.state_bytes == 4 * value(state, symbols)


def test_the_command_counts_methods_that_move_some_layers_on_several():
    """By their default shares, a quarter and a fifth of three passes."""
    for name, passes in (("lezo", 0.75), ("adalezo", 0.6)):
        assert methods.method(name).passes == {"inplace": passes, "scratch": passes}


def test_what_a_method_takes():
    rows = {
        name.strip("`"): cells
        for names, *cells in table(PAGE[PAGE.index("| | two_pass") :])
        for name in names.split(", ")
    }
    assert sorted(rows) == sorted(available_methods())
    for name, cells in rows.items():
        cls, own = method_class(name), method_options(name)
        folds = issubclass(cls, LowRankOptimizer)
        assert [bool(cell) for cell in cells] == [
            cls.plans_ahead, cls.takes_groups, "baseline" in own, cls.takes_residual, folds
        ], name  # fmt: skip


@pytest.mark.parametrize("name", available_methods())
def test_options_and_defaults_are_those_of_the_signature(name):
    of_all = inspect.signature(ZOOptimizer.__init__).parameters
    own = {n: p.default for n, p in method_options(name).items() if n not in of_all}
    found = {}
    for names, defaults, _ in table(section(f"`{name}`")):
        names = [n.strip("` ") for n in names.split(",")]
        values = eval(f"[{defaults}]") if defaults else [inspect.Parameter.empty]
        found |= zip(names, values, strict=True)
    if name == "lozo-m":
        found = {n: p.default for n, p in method_options("lozo").items() if n in own} | found
    assert found == own
