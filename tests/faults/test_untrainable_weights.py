"""Weights that are no plain tensors in memory, and groups that are refused: named, and nothing has changed."""

from __future__ import annotations

import socket

import pytest
import torch
from support.models import assert_same_weights
from support.recipes import EVERY_MODE, HOOKED, INPUTS, Net, make, refused, seeded, take_steps
from support.selection import cycled
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.two_tensor import TwoTensor

from pgap_kernels.optim import MeZO

pytestmark = pytest.mark.filterwarnings("error")


WEIGHTS = {
    "meta": (lambda: torch.empty(2, 2, device="meta"), ValueError, r"got 'odd\.weight' on the meta device"),
    "sparse": (lambda: torch.eye(3).to_sparse(), TypeError, r"got 'odd\.weight' with layout torch\.sparse_coo"),
    "wrapping": (lambda: TwoTensor(torch.ones(2), torch.ones(2)), TypeError, r"got 'odd\.weight', a TwoTensor"),
    "float64": (lambda: torch.ones(2, dtype=torch.float64), TypeError, r"got 'odd\.weight' with dtype torch\.float64"),
    "complex": (lambda: torch.ones(2, dtype=torch.complex64), TypeError, r"got 'odd\.weight' with dtype"),
    "float8": (lambda: torch.ones(2).to(torch.float8_e4m3fn), TypeError, r"got 'odd\.weight' with dtype"),
    "expanded": (lambda: torch.ones(1).expand(3), ValueError, r"\('odd\.weight'\): got shape \(3,\) with"),
    "transposed": (lambda: torch.ones(3, 4).T, ValueError, r"\('odd\.weight'\): got shape \(4, 3\)"),
    "mkldnn": (lambda: torch.ones(3).to_mkldnn(), TypeError, r"got 'odd\.weight' with layout"),
}


@pytest.mark.parametrize("kind, case", cycled([*WEIGHTS], EVERY_MODE))  # refused before there is a mode
def test_weights_that_cannot_be_trained(kind, case):
    """Named where they are to be trained, left alone where they are frozen, and named when somebody thaws them."""
    value, error, message = WEIGHTS[kind]
    model = seeded(Net)
    model.odd = nn.Module()
    model.odd.weight = nn.Parameter(value())
    with pytest.raises(error, match=rf"^params:? {message}"):
        make(case, model)
    model.odd.weight.requires_grad_(False)
    optimizer = make(case, model)
    take_steps(optimizer, model, 2)
    model.odd.weight.requires_grad_(True)
    refused(error, rf"^params:? {message}", lambda: take_steps(optimizer, model))


def test_plain_tensors_that_cannot_be_trained():
    with pytest.raises(TypeError, match=r"^params: got 'w' with dtype torch\.int64; accepted: torch\.float32"):
        MeZO([("w", torch.zeros(3, dtype=torch.int64))])


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_weights_of_a_lazy_module():
    model = nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(2))
    with pytest.raises(ValueError, match=r"^params: got '1\.weight' of a lazy module"):
        MeZO(model)
    model(INPUTS)
    take_steps(MeZO(model), model, 2)


def test_weights_that_are_sharded():
    port = socket.create_server(("127.0.0.1", 0))
    address = f"tcp://127.0.0.1:{port.getsockname()[1]}"
    port.close()
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, init_method=address)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = seeded(Net)
        optimizers = [make(case, model) for case in ("mezo-inplace", "mezo-scratch")]
        fully_shard(model, mesh=mesh)
        with pytest.raises(
            ValueError, match=r"^params: got a DTensor, 'first\.weight', sharded over \(Shard\(dim=0\),\)"
        ):
            MeZO(model)
        for optimizer in optimizers:
            message = r"^model: '\w+\.\w+' is not one of its parameters any more"
            refused(RuntimeError, message, lambda o=optimizer: take_steps(o, model))
        model.requires_grad_(False)
        model.extra = nn.Linear(2, 2)
        for mode in ("inplace", "scratch"):
            MeZO(model, mode=mode, allow_unused=mode == "scratch")
    finally:
        torch.distributed.destroy_process_group()


BAD_GROUPS = {
    "float64": [("x", nn.Parameter(torch.zeros(2, dtype=torch.float64)))],
    "meta": [("x", nn.Parameter(torch.zeros(2, device="meta")))],
    "of_another_model": [("x", nn.Parameter(torch.zeros(2)))],
    "negative_rate": None,
}


# Refused by the base class, but for parameters of another model: in place nobody asks whose they are.
GROUPS = cycled(EVERY_MODE, ["float64", "meta", "negative_rate"])
GROUPS += [(case, "of_another_model") for case in ("pgap-two_pass", *HOOKED)]


@pytest.mark.parametrize("case, bad", GROUPS)
def test_adding_a_group_that_is_refused(case, bad):
    models = [seeded(Net) for _ in range(2)]
    optimizers = [make(case, list(model.named_parameters())[:-2], model=model) for model in models]
    for o, model in zip(optimizers, models, strict=True):
        take_steps(o, model, 2)
        o.merge()
    group = {"params": BAD_GROUPS[bad] or list(models[0].named_parameters())[-2:]} | (
        {} if BAD_GROUPS[bad] else {"lr": -1}
    )
    refused((TypeError, ValueError), r"(params|lr|mode|model): ", lambda: optimizers[0].add_param_group(group))
    assert len(optimizers[0].param_groups) == 1
    for o, model in zip(optimizers, models, strict=True):
        take_steps(o, model, 2)
        o.add_param_group({"params": list(model.named_parameters())[-2:]})
        take_steps(o, model, 2)
        o.merge()
    assert_same_weights(*models)
