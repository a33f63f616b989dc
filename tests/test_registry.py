"""Methods by name: every one with every option it says it has, and those that another package adds."""

from __future__ import annotations

import sys

import pytest
from support.models import Words

from pgap_kernels.optim import MeZO, ZOOptimizer, available_methods, make_optimizer
from pgap_kernels.optim.registry import ENTRY_POINTS, method_class, method_options

OWN = [
    "adalezo", "agzo", "dizo", "eggroll", "fzoo", "helene", "hizoo", "lezo", "loren", "lozo", "lozo-m", "mezo",
    "mezo-adam", "mezo-momentum", "pgap", "pizo", "pizo-subzero", "sparse-mezo", "subzero", "svd-0", "tezo",
    "zo-adamu", "zo-muon",
]  # fmt: skip
NEEDED = {"dizo": {"select": ["up.weight"]}, "helene": {"batch_size": 8}}


@pytest.fixture
def other_package(tmp_path, monkeypatch):
    """An installed package with a method, something that is none, and a name that is taken."""
    (tmp_path / "other_package.py").write_text(
        "from pgap_kernels.optim import MeZO\n\n\nclass Mine(MeZO):\n    method = 'Mine'\n\n\nnumber = 3\n"
    )
    folder = tmp_path / "other_package-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: other-package\nVersion: 1.0\n")
    points = {"mine": "Mine", "zero": "number", "mezo": "Mine"}
    lines = [f"{name} = other_package:{attribute}" for name, attribute in points.items()]
    (folder / "entry_points.txt").write_text("\n".join([f"[{ENTRY_POINTS}]", *lines]))
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("other_package", None)


@pytest.mark.parametrize("name", OWN)
def test_a_method_takes_the_options_that_it_is_said_to_have(name):
    """Each with its default; and its class is that of its own name."""
    options = {n: p.default for n, p in method_options(name).items() if p.default is not p.empty}
    optimizer = make_optimizer(name, Words(), **options | NEEDED.get(name, {}) | {"seed": 5})
    assert type(optimizer).__name__.lower() == name.replace("-", "") and optimizer.seed == 5
    assert {"lr", "eps", "mode", "members"} <= method_options(name).keys()


def test_another_packages_methods(other_package):
    assert ENTRY_POINTS == "pgap_kernels.methods"
    assert available_methods() == [*OWN, "mine", "zero"]
    optimizer = make_optimizer("mine", Words(), probes=3)
    assert type(optimizer).__name__ == "Mine" and isinstance(optimizer, ZOOptimizer)
    assert method_class("mezo") is MeZO
    assert method_options("mine").keys() == method_options("mezo").keys()
    with pytest.raises(TypeError, match=r"^zero: the entry point 'other_package:number' is 3; accepted: a ZOOptimizer"):
        make_optimizer("zero", Words())


@pytest.mark.parametrize(
    "name, option, error, match",
    [
        ("MEZO", "lr", ValueError, r"^name: got 'MEZO' \(did you mean 'mezo'\?\); accepted: adalezo, "),
        ("mezo", "probs", TypeError, r"^probs: 'mezo' has no such option \(did you mean 'probes'\?\); accepted: "),
        ("mezo-sgd", "lr", ValueError, r"^name: got 'mezo-sgd' \(did you mean 'mezo'\?\)"),
        ("lozo", "probes", TypeError, r"^probes: 'lozo' has no such option \(did you mean 'directions'\?\)"),
        ("lozo", "scale", TypeError, "^scale: 'lozo' has no such option"),  # of the trunk, and the recipe's to choose
    ],
)
def test_unknown_names_and_options(name, option, error, match):
    with pytest.raises(error, match=match):
        make_optimizer(name, Words(), **{option: 1})
