"""Methods by name: those of this package, and those that others add as entry points."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from importlib.metadata import entry_points
from typing import Any

from .agzo import AGZO
from .base import Params, ZOOptimizer
from .dizo import DiZO
from .eggroll import EGGROLL
from .fzoo import FZOO
from .gradient_subspace import GradientSubspaceOptimizer
from .helene import HELENE
from .hizoo import HiZOO
from .lezo import AdaLeZO, LeZO
from .loren import LOREN
from .lowrank import LowRankOptimizer
from .lozo import LOZO
from .lozo_m import LOZOM
from .mezo import MeZO
from .mezo_moments import MeZOAdam, MeZOMomentum
from .model import ModelOptimizer
from .pgap import PGAP
from .pizo import PIZO, PIZOSubZero
from .sparse_mezo import SparseMeZO
from .subzero import SubZero
from .svd0 import SVD0
from .tezo import TeZO
from .zo_adamu import ZOAdaMU
from .zo_muon import ZOMuon

_TRUNKS = (LowRankOptimizer, GradientSubspaceOptimizer)
# How many directions a step tries, as the methods' papers call it.
_DIRECTIONS = ("directions", "probes", "population", "pool")
ENTRY_POINTS = "pgap_kernels.methods"
_OWN: dict[str, type[ZOOptimizer]] = {
    "adalezo": AdaLeZO,
    "agzo": AGZO,
    "dizo": DiZO,
    "eggroll": EGGROLL,
    "fzoo": FZOO,
    "helene": HELENE,
    "hizoo": HiZOO,
    "lezo": LeZO,
    "loren": LOREN,
    "lozo": LOZO,
    "lozo-m": LOZOM,
    "mezo": MeZO,
    "mezo-adam": MeZOAdam,
    "mezo-momentum": MeZOMomentum,
    "pgap": PGAP,
    "pizo": PIZO,
    "pizo-subzero": PIZOSubZero,
    "sparse-mezo": SparseMeZO,
    "subzero": SubZero,
    "svd-0": SVD0,
    "tezo": TeZO,
    "zo-adamu": ZOAdaMU,
    "zo-muon": ZOMuon,
}


def available_methods() -> list[str]:
    """Names that ``make_optimizer`` takes: this package's methods, then those of installed packages that have an entry
    point in the group ``pgap_kernels.methods`` (its name, and a subclass of ``ZOOptimizer``)."""
    return [*_OWN, *sorted({point.name for point in entry_points(group=ENTRY_POINTS)} - {*_OWN})]


def method_classes() -> list[type[ZOOptimizer]]:
    """The classes of this package's methods."""
    return list(_OWN.values())


def method_name(cls: type[ZOOptimizer]) -> str:
    """The name of one of this package's methods."""
    return next(name for name, own in _OWN.items() if own is cls)


def method_class(name: str) -> type[ZOOptimizer]:
    """The class of a method.

    Raises:
        ValueError: there is no method of that name.
        TypeError: an entry point is something else than a subclass of ``ZOOptimizer``.
    """
    if name in _OWN:
        return _OWN[name]
    for point in entry_points(group=ENTRY_POINTS):
        if point.name == name:
            found = point.load()
            if not (isinstance(found, type) and issubclass(found, ZOOptimizer)):
                raise TypeError(f"{name}: the entry point {point.value!r} is {found!r}; accepted: a ZOOptimizer class")
            return found
    names = available_methods()
    hint = did_you_mean(str(name).lower().replace("_", "-"), names)
    raise ValueError(f"name: got {name!r}{hint}; accepted: {', '.join(names)}")


def did_you_mean(given: str, accepted: Iterable[str], shown: Callable[[str], str] = repr) -> str:
    """A hint, in brackets after a blank, at the name that somebody most likely meant; empty if none is near."""
    # "mezo-sgd" is MeZO, though "mezo-adam" has more letters in common with it.
    accepted = [*accepted]
    near = sorted((name for name in accepted if given.startswith(f"{name}-")), key=len)[-1:]
    near = near or get_close_matches(given, accepted, 1)
    if not near and given in _DIRECTIONS:
        near = [name for name in accepted if name in _DIRECTIONS]
    return f" (did you mean {' or '.join(map(shown, near))}?)" if near else ""


def method_options(name: str) -> dict[str, inspect.Parameter]:
    """The options of a method, its own and those of every method, with their defaults."""
    found: dict[str, inspect.Parameter] = {}
    for cls in method_class(name).__mro__:
        # What the trunk of low-rank methods takes is for their recipes to decide.
        if "__init__" in vars(cls) and issubclass(cls, ModelOptimizer) and cls not in _TRUNKS:
            own = inspect.signature(cls.__init__).parameters.values()
            found |= {p.name: p for p in own if p.name not in found and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
            if not any(p.kind is p.VAR_KEYWORD for p in own):
                break
    return {name: p for name, p in found.items() if name not in ("self", "params", "defaults")}


def make_optimizer(name: str, params: Params, **options: Any) -> ZOOptimizer:
    """An optimizer by its method's name.

    Args:
        name: one of ``available_methods``.
        params: as in ``ZOOptimizer``: a model, named parameters or param groups.
        **options: the method's, and those of every method.

    Raises:
        ValueError: there is no method of that name.
        TypeError: the method has no such option.
    """
    cls, accepted = method_class(name), method_options(name)
    unknown = sorted(set(options) - set(accepted))
    if unknown:
        hint = did_you_mean(unknown[0], accepted)
        raise TypeError(f"{unknown[0]}: {name!r} has no such option{hint}; accepted: {', '.join(sorted(accepted))}")
    return cls(params, **options)
