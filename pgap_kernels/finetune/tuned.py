"""Options that were chosen by trying them on the built-in model: docs/finetune.md has what came of each.

The methods' own learning rates are their papers', for models a hundred times larger. Methods of other packages keep
theirs, which stay constant.
"""

from __future__ import annotations

from typing import Any

#: What this task changes of a method's own defaults.
OVERRIDES: dict[str, dict[str, Any]] = {
    "mezo": {"lr": 2.4e-4},
    # Rank 16 learns more slowly, and 128, the paper's smallest, is most of the rank of matrices with 192 rows.
    "pgap": {"lr": 2.4e-4, "rank": 64},
    "adalezo": {"lr": 2.4e-4},
    "agzo": {"lr": 1e-2},
    "dizo": {"lr": 2.4e-4},
    # Its rate times eps is what others call a learning rate.
    "eggroll": {"lr": 0.48},
    # Its step is divided by the spread of the losses.
    "fzoo": {"lr": 1.6e-2},
    # The curvature begins at (1 - beta2) B rho^2 z^2, about 100 z^2 as rho begins near 25: above a floor of 1 hardly a
    # weight is divided by the same as the next, and nothing is learnt.
    "helene": {"lr": 4.8e-3, "floor": 100.0},
    # Twice as much was a little better in 50 steps; it is what MeZO and P-GAP diverge with in 100.
    "hizoo": {"lr": 2.4e-4},
    "svd-0": {"lr": 2.4e-4},
    # A quarter of the layers moves in a step, so each may move as far as all would together.
    "lezo": {"lr": 9.6e-4},
    # Its momentum adds up ten steps, as that of mezo-momentum.
    "loren": {"lr": 6e-5},
    "lozo": {"lr": 1.2e-4},
    "lozo-m": {"lr": 1.2e-4},
    "mezo-adam": {"lr": 4e-3},
    "mezo-momentum": {"lr": 4.8e-5},
    "pizo": {"lr": 2.4e-4},
    "pizo-subzero": {"lr": 1.2e-4},
    "sparse-mezo": {"lr": 4.8e-4},
    "subzero": {"lr": 2.4e-4},
    "tezo": {"lr": 2.4e-4},
    "zo-adamu": {"lr": 2.4e-4},
    # Its steps have orthogonal columns, of one size each.
    "zo-muon": {"lr": 0.16},
}

#: Tasks with larger losses, and so larger slopes: half of that learning rate, as the whole diverges. So do more labels
#: than `FEW`.
HALVED = ("choice", "generation")
FEW = 2

#: What adapters take times as much of: they have few weights, which begin at 0. MeZO's authors have 50 and 10.
ADAPTER_FACTORS = {"lr": 12.5, "eps": 10.0}

#: The methods that were tried with it. SubZero diverges, and LOZO learns little.
WITH_ADAPTERS = ("mezo", "pgap")

#: The learning rate's course, as it was tried; constant for methods that were not.
SCHEDULE = "linear"


def schedule_of(method: str) -> str:
    """The course of a method's learning rate."""
    return SCHEDULE if method in OVERRIDES else "constant"


def scaled(method: str, options: dict[str, Any], large_losses: bool, adapter: bool) -> dict[str, Any]:
    """A method's defaults for a task with large losses, and for an adapter if it is one that is tuned."""
    found = dict(options)
    if method in OVERRIDES and large_losses:
        found["lr"] /= 2
    if adapter and method in WITH_ADAPTERS:
        found |= {name: found[name] * factor for name, factor in ADAPTER_FACTORS.items()}
    return found
