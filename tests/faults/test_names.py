"""Names of parameters: any that a weight has is taken, and what matches nothing is refused with near names."""

from __future__ import annotations

import functools
import re

import pytest
from support.recipes import Net, Tagger, seeded, tagging_loss, take_steps

from pgap_kernels.optim import HELENE, LOZO, PGAP, DiZO, MeZO

pytestmark = pytest.mark.filterwarnings("error")


@pytest.mark.parametrize("tied", ["", "parameter", "memory"])
@pytest.mark.parametrize("given", ["model", "named"])
def test_excluding_a_weight_by_any_of_its_names(tied, given):
    containers = list, tuple, set, dict.fromkeys, iter
    patterns = "*words*", "words.weight", "*head*", "head.weight", "?ead.*"
    for container, pattern in zip(containers, patterns, strict=True):
        model = seeded(Tagger, tied)
        named = list(model.named_parameters(remove_duplicate=False)) if tied == "memory" else None
        for method, options in ((PGAP, {"window": 2, "probes": 1}), (LOZO, {"window": 2})):
            params = model if given == "model" or named is None else named
            optimizer = method(params, rank=2, exclude=container([pattern]), **options)
            both = ["layer.weight"]
            one = ["layer.weight", "head.weight"] if "word" in pattern else ["words.weight", "layer.weight"]
            assert [w.name for w in optimizer.matrices()] == (both if tied else one)
            in_dry_run = optimizer.cost().state_bytes
            take_steps(optimizer, model, 2, tagging_loss)
            assert optimizer.cost().state_bytes == in_dry_run
            chosen = {w.name for w in optimizer.weights() if optimizer.state.get(w.tensor)}
            assert chosen == {w.name for w in optimizer.matrices()}


UNKNOWN_PATTERNS = {
    "head": r"'\*head\*' matches 'head\.weight'\)",
    "*HEAD*": r"'\*head\*' matches 'head\.weight'\)",
    "*wrods.weight": r"near names: '[a-z]+\.weight'",
    "nothing": r"(near names|names are like) ",
    "": r"names are like 'words\.weight'",
}


@pytest.mark.parametrize("pattern", UNKNOWN_PATTERNS)
def test_excluding_a_name_that_no_weight_has(pattern):
    near = UNKNOWN_PATTERNS[pattern]
    for tied in ("", "parameter"):
        model = seeded(Tagger, tied)
        for method, name, value in (
            (PGAP, "exclude", ["*words*", pattern]),
            (LOZO, "exclude", [pattern]),
            (DiZO, "select", [pattern]),
            (functools.partial(HELENE, batch_size=4), "floors", {pattern: 1.0}),
        ):
            with pytest.raises(ValueError, match=rf"^{name}: {re.escape(repr(pattern))} matches no parameter") as error:
                method(model, **{name: value})
            if tied == "":
                assert re.search(near, str(error.value))
            assert str(error.value).count("'head.weight'") <= 1 + (pattern == "head.weight")


def test_naming_a_parameter_that_is_not_there():
    with pytest.raises(ValueError, match=r"^tensor_ids: got 'first.wieght'; .*near names: 'first.weight'"):
        MeZO(seeded(Net), tensor_ids={"first.wieght": 3})
    for method, name in ((PGAP, "exclude"), (LOZO, "exclude"), (DiZO, "select")):
        with pytest.raises(TypeError, match=rf"^{name}: got the string 'head'; accepted: a list"):
            method(seeded(Tagger), **{name: "head"})
    with pytest.raises(TypeError, match=r"^exclude: got 3; accepted: name patterns"):
        PGAP(seeded(Tagger), exclude=[3])


def test_excluding_a_weight_that_is_frozen_for_now():
    model = seeded(Tagger)
    model.words.requires_grad_(False)
    optimizer = PGAP(model, rank=2, exclude=["words.*"], window=2)
    take_steps(optimizer, model, 1, tagging_loss)
    model.words.requires_grad_(True)
    take_steps(optimizer, model, 1, tagging_loss)
    assert [w.name for w in optimizer.matrices()] == ["layer.weight", "head.weight"]


def test_parameters_without_names_are_told_of_once():
    model = seeded(Net)
    with pytest.warns(UserWarning, match=r"^params: parameters without names") as warned:
        optimizer = MeZO(model.parameters(), model=model)
    assert [w.filename for w in warned] == [__file__]
    take_steps(optimizer, model)
    model.first.requires_grad_(False)
    take_steps(optimizer, model)
    optimizer.load_state_dict(optimizer.state_dict())
