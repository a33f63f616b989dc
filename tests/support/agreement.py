"""What the interpreted tests share: the same call on the Triton kernels and on the reference."""

from __future__ import annotations

import functools

from .cases import Case, common, run
from .helpers import assert_all_same, poison

# One masked tile; a whole tile and one of a single element; rows that are tiles of their own where they lie apart.
SHAPES = [(31,), (4097,), (3, 5, 2, 2)]


def agree(case: Case) -> None:
    """The kernels leave the very bits of the reference, in the memory around the tensors too."""
    assert_all_same(run(case, "triton"), run(case, "reference"))


def dense(*arguments, out: bool = False, **changes) -> Case:
    """A call of ``dense_perturb_``, its arguments those of ``cases.common``."""

    def build() -> dict:
        built = common(*arguments) | changes
        return built | ({"out": poison(built["weights"])} if out else {})

    return Case("dense_perturb_", functools.partial(build), ("weights", "out") if out else ("weights",))
