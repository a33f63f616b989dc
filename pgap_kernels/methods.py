"""``pgap-kernels methods``: every method, what it is, and what a step of it costs."""

from __future__ import annotations

import inspect
import json
from typing import Any, NamedTuple

import torch

from .optim import available_methods, make_optimizer, method_options
from .optim.registry import method_class
from .perturbation import MODES

_ROWS, _COLUMNS = 512, 512
# So many that the shares of layers that some methods move come out even.
_LAYERS = 20
# What some methods need beside their defaults, to run on matrices.
_NEEDED: dict[str, Any] = {"batch_size": 1, "select": ["*"]}
# With which AdaLeZO draws no layer twice, so that it moves the share that it is told to.
_SEED = 3


class Method(NamedTuple):
    """A row of the table.

    Attributes:
        forwards, passes: of a step with the default options, refreshes spread over their window; passes by mode.
        state: floats kept, over those of the weights: twenty layers of a 512 x 512 matrix each.
        summary: the first line of its docstring.
    """

    name: str
    cls: str
    forwards: float
    passes: dict[str, float]
    state: float
    summary: str


def method(name: str) -> Method:
    """A method with its default options."""
    cls, known = method_class(name), method_options(name)
    needed = {option: value for option, value in _NEEDED.items() if option in known}
    costs = {}
    for mode in MODES:
        if mode == "auto":
            continue
        try:
            costs[mode] = make_optimizer(name, _model(), mode=mode, seed=_SEED, **needed).cost()
        except ValueError:
            continue  # the mode is not one of the method's
    first = next(iter(costs.values()))
    summary = " ".join((inspect.getdoc(cls) or "").partition("\n\n")[0].split())
    passes = {mode: round(cost.weight_passes, 4) for mode, cost in costs.items()}
    state = round(first.state_bytes / (4 * _ROWS * _COLUMNS * _LAYERS), 4)
    return Method(name, cls.__name__, round(first.forwards, 4), passes, state, summary)


def _model() -> torch.nn.Module:
    """Layers with numbers in their names, as models of transformers have them; no random number is drawn."""
    with torch.device("meta"):
        layers = [torch.nn.Linear(_COLUMNS, _ROWS, bias=False) for _ in range(_LAYERS)]
    return torch.nn.ModuleDict({"layers": torch.nn.ModuleList(layers)}).to_empty(device="cpu")


def main(json_output: bool) -> int:
    """Print the table, or JSON."""
    found = [method(name) for name in available_methods()]
    if json_output:
        print(json.dumps([row._asdict() for row in found], indent=2))
        return 0
    modes = [mode for mode in MODES if mode != "auto"]
    heading: list[str] = ["method", "forwards", *modes, "state", "what it is"]
    rows: list[list[str]] = [heading]
    for one in found:
        cells = [f"{one.passes[mode]:g}" if mode in one.passes else "" for mode in modes]
        rows.append([one.name, f"{one.forwards:g}", *cells, f"{one.state:g}", one.summary])
    widths = [max(len(row[i]) for row in rows) for i in range(len(heading))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(
        "\nper step with default options, on twenty layers of a 512 x 512 matrix each: forwards, passes over the "
        "weights by mode, floats of state per weight.\npgap-kernels finetune --method NAME --help lists the options; "
        "docs/methods.md has papers, formulas, and what published code does instead."
    )
    return 0
