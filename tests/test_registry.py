"""Methods by name: every one with every option it says it has, and those that another package adds."""

from __future__ import annotations

import sys

import pytest
from support.models import Losses, Words, assert_same_weights, snapshot

from pgap_kernels.directions import Direction
from pgap_kernels.noise import Role
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


@pytest.mark.parametrize("params, given", [("gpt2", "gpt2"), (None, "NoneType"), ({}, "dict"), (Words, "type")])
def test_what_is_no_parameters(params, given):
    with pytest.raises(TypeError, match=rf"^params: got '{given}'; accepted: a model, its named_parameters\(\)"):
        make_optimizer("mezo", params)


class Own(ZOOptimizer):
    """What its author wrote is ``recipe``."""

    method, recipe = "Own", None

    def __init__(self, params, defaults, **options):
        super().__init__(params, defaults, **options)

    def estimate_and_update(self, evaluate):
        return self.recipe(evaluate, self.noise(self.key(Role.DENSE)))


RECIPES = {
    "amount": (lambda o, e, z: o.apply_update([(z, 0.5)]), r"^amounts: got 0.5; accepted: a number for each weight"),
    "radius": (lambda o, e, z: e.two_sided(z, 1e-3), "^amounts: got 0.001"),
    "points": (lambda o, e, z: e.population([z]), "^points: got .*; accepted: pairs of a Direction and an amount"),
    "loss": (lambda o, e, z: o.apply_update([(Direction(), o.rates())]), "^estimate_and_update: returned None"),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_method_of_ones_own_that_is_wrong(recipe, monkeypatch):
    run, match = RECIPES[recipe]
    monkeypatch.setattr(Own, "recipe", run)
    model = Words()
    optimizer, before = Own(model, {"lr": 0.1, "eps": 1e-3}), snapshot(model)
    with pytest.raises(TypeError, match=match):
        optimizer.step(Losses(model))
    assert_same_weights(model, before)


def test_a_method_of_ones_own_without_what_each_has():
    with pytest.raises(ValueError, match=r"^defaults: got no 'eps'; accepted: lr and eps"):
        Own(Words(), {"lr": 0.1})
    model = Words()
    with pytest.raises(NotImplementedError, match=r"^ZOOptimizer has to define estimate_and_update"):
        ZOOptimizer(model, {"lr": 0.1, "eps": 1e-3}).step(Losses(model))
