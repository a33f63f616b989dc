"""The C++ ops guard memory whoever calls them: what they cannot index is refused, and nothing has been written."""

import pytest
import torch
from support.cases import ROWS, flat
from support.helpers import assert_all_same, clones, ops

from pgap_kernels import extension

pytestmark = pytest.mark.skipif(extension.unavailable is not None, reason="the C++ extension is not built")
NAMES = {
    "dense_perturb_": "dense",
    "masked_perturb_": "masked",
    "preconditioned_update_": "preconditioned",
    "anchor_affine_": "anchor",
    "lowrank_perturb_": "lowrank",
    "seeded_dot": "reduction",
    "squared_norms": "reduction",
    "lowrank_forward_": "forward",
}
FORMS = (
    *("dense", "masked threshold", "masked share", "masked bits", "momentum", "adam", "anchor own torch.float32"),
    *("low rank full", "low rank quotient", "dot", "norms torch.float32", "forward", "forward slices"),
)


class Call:
    """The call of a C++ op that a public function makes: its arguments by name."""

    def __init__(self, form: str, monkeypatch):
        row = ROWS[form]
        name = NAMES[row.op]
        self.op = getattr(torch.ops.pgap_kernels_cpu, name).default
        self.arguments: dict = {}
        with monkeypatch.context() as patched:
            patched.setattr(torch.ops.pgap_kernels_cpu, name, self)
            sizes = {"shapes": [(40, 40)] * 4} if "shapes" in dict(row.large) else {}
            getattr(ops, row.op)(**row.arguments(**sizes))

    def default(self, *args, **kwargs):
        names = [argument.name for argument in self.op._schema.arguments]
        self.arguments = dict(zip(names, args, strict=False)) | kwargs

    __call__ = default


def each(change):
    return lambda tensors: [change(t) for t in tensors]


def gappy(t):
    """The same values, every other element in memory."""
    return torch.stack([t, t], -1)[..., 0]


def clipped(t):
    return t.flatten()[:-1]


TENSORS = (each(gappy), each(torch.Tensor.long), lambda v: v[:-1])
COMPANIONS = (*TENSORS, each(clipped))
TABLE = (
    torch.flatten,
    lambda v: v.repeat(2, 1),
    lambda v: v.new_ones(len(v), 3),
    lambda v: v[:, :0],
    torch.Tensor.long,
)
KEY = (lambda v: v.repeat(2), torch.Tensor.int)
ROW = (lambda v: v.new_ones(3), lambda v: v[:0], torch.Tensor.double)
MATRIX = (clipped, gappy, torch.Tensor.double)
# By argument: what makes a bad value of a good one.
BAD = {
    **dict.fromkeys(("weights", "out", "tensors"), TENSORS),
    **dict.fromkeys(("state0", "state1", "anchors", "deltas", "mask_bits", "left", "right", "core"), COMPANIONS),
    **dict.fromkeys(("coefficients", "gradient", "restore", "scalars", "decay", "mask_level", "coefficient"), TABLE),
    **dict.fromkeys(("keys", "mask_key", "rounding_key", "rounding_keys"), KEY),
    "stages": (lambda v: [v[0] + 1], lambda v: [-1, v[0] + 1]),
    "tensor_ids": (lambda v: v[:-1], lambda v: [*v[:-1], 1 << 32], lambda v: [-1, *v[1:]]),
    "slices": (lambda v: [0], lambda v: [0, 39] * 4, lambda v: [(1 << 63) - 4, 40] * 4, lambda v: [-1, 40] * 4),
    **dict.fromkeys(("distribution", "mask", "rule", "core_kind"), (lambda v: v + "?",)),
    "rank": (lambda v: 0,),
    "totals": (lambda v: v[:-1], gappy, torch.Tensor.float),
    "cores": (lambda v: v * 2, *COMPANIONS[:2], COMPANIONS[3]),
    **dict.fromkeys(("outputs", "inputs"), MATRIX),
}
FORWARD = {
    **dict.fromkeys(("left", "right"), (lambda v: v * 3, each(gappy), each(torch.Tensor.double), each(clipped))),
    "coefficients": (lambda v: v * 3, each(torch.Tensor.double), each(lambda t: t.repeat(2))),
    "shape": (lambda v: v[:1], lambda v: [v[0] + 1, v[1]], lambda v: [v[0], v[1] + 1]),
    "rank": (lambda v: 0, lambda v: v + 1, lambda v: 513),
    "keys": (),  # nothing is drawn
}
# Where a form differs: what it does not read, rows instead of tables, tensors instead of lists.
OWN = {
    "masked threshold": {"mask_key": ()},
    "masked share": {"mask_level": (lambda v: v[:, :0], torch.Tensor.float)},
    "masked bits": {"mask_key": (), "mask_level": ()},
    "norms torch.float32": {"keys": ()},
    # A core's dtype is seen by a thread of the pool, whose message is lost.
    "low rank full": {"coefficient": ROW, "decay": ROW, "core": (COMPANIONS[0], *COMPANIONS[2:])},
    "low rank quotient": {
        **{"coefficient": ROW, "decay": ROW, "core": (COMPANIONS[0], *COMPANIONS[2:])},
        **{"below": (COMPANIONS[0], *COMPANIONS[2:]), "e": (*ROW, lambda v: None)},
    },
    "forward": FORWARD,
    "forward slices": FORWARD,
}


# What a refusal may name beside the argument itself: where lengths differ, either list.
SAID = {
    "keys": "coefficients gradient",
    "stages": "keys",
    "rounding_key": "rounding_keys",
    **dict.fromkeys(("left", "right", "core", "below"), "factors"),
    "e": "below",
    **dict.fromkeys(("out", "tensors"), "weights coefficient scalars totals"),
    **dict.fromkeys(("outputs", "inputs", "shape", "rank"), "outputs inputs left"),
}


@pytest.mark.parametrize("form", FORMS)
def test_what_cannot_be_indexed_is_refused(form, monkeypatch):
    good = Call(form, monkeypatch)
    tensors = flat(good.arguments)
    before = clones(tensors)
    for name, value in good.arguments.items():
        for spoil in {**BAD, **OWN.get(form, {})}.get(name, ()):
            if value == [] and name != "slices":  # a list that this form has not
                continue
            said = "|".join([name, *SAID.get(name, "").split()])
            with pytest.raises(RuntimeError, match=rf"({said})\b.*: accepted: "):
                good.op(**{**good.arguments, name: spoil(value)})
            assert_all_same(tensors, before)
    good.op(**good.arguments)
    assert any(not torch.equal(t, b) for t, b in zip(tensors, before, strict=True))
