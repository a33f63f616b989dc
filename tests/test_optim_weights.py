"""Which tensors an optimizer trains, under which names and ids, and what 16-bit weights get."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from optim_contract import (
    METHODS,
    SMALL_PGAP,
    Net,
    Recorder,
    assert_same_bits,
    dense_direction,
    loss_of,
    make,
    pass_error,
    snapshot,
    subspace_direction,
)
from torch import nn

from pgap_kernels import noise, ops
from pgap_kernels.noise import Role
from pgap_kernels.optim import PGAP, MeZO

# ---- which tensors, under which names -------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self, alias=False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(7, 5), nn.Linear(5, 7)
        self.head.weight = nn.Parameter(self.embed.weight.data) if alias else self.embed.weight

    def forward(self, x):
        return self.head(self.embed(torch.arange(8) % 7))[:, :4]


@pytest.mark.parametrize("alias", [False, True])
@pytest.mark.parametrize("method, options", METHODS)
def test_tied_weights_move_once_under_their_first_name(method, options, alias):
    model, opt = make(method, options, Tied(alias), lr=0.0)
    assert [w.name for w in opt.weights()] == ["embed.weight", "head.bias"]
    assert opt.weights()[0].id == noise.tensor_id("embed.weight")
    clean, closure = snapshot(model), Recorder(model)
    opt.step(closure)
    name = "embed.weight"
    role = Role.DENSE if method is MeZO else Role.PROBE
    z = dense_direction(clean[name].shape, 11, 0, name, role)
    plus = closure.points[0][name]
    assert ((plus - clean[name] - 1e-3 * z.value).abs() <= pass_error(plus, (1e-3, z))).all()
    if alias:
        assert all(torch.equal(point["head.weight"], point[name]) for point in closure.points)


@pytest.mark.parametrize("method, options", METHODS)
def test_frozen_parameters_are_untouched(method, options):
    model = Net()
    model.inner.requires_grad_(False)
    before = snapshot(model)
    closure = Recorder(model)
    make(method, options, model)[1].step(closure)
    for point in [*closure.points, snapshot(model)]:
        moved = {name for name in before if not torch.equal(point[name], before[name])}
        assert moved == {name for name in before if not name.startswith("inner")}


def test_frozen_parameters_are_untouched_if_given_by_name():
    model = Net()
    model.inner.requires_grad_(False)
    before = snapshot(model)
    MeZO(model.named_parameters(), lr=0.05, mode="inplace").step(lambda: loss_of(model))
    after = snapshot(model)
    assert all(torch.equal(after[name], before[name]) for name in before if name.startswith("inner"))


@pytest.mark.parametrize("method, options", METHODS)
def test_empty_parameters_are_fine(method, options):
    model = Net()
    model.nothing, model.none = nn.Parameter(torch.empty(0, 4)), nn.Parameter(torch.empty(0))
    (_, opt), (_, plain) = make(method, options, model), make(method, options)
    closure, same = Recorder(model), Recorder(plain.model)
    for _ in range(3):
        opt.step(closure)
        plain.step(same)
    assert closure.losses == same.losses


@pytest.mark.parametrize("method, options", METHODS)
def test_order_and_form_of_params_do_not_matter(method, options):
    runs = []
    for form in ("model", "named", "reversed", "groups"):
        model = Net()
        named = list(model.named_parameters())
        params = {"model": model, "named": named, "reversed": named[::-1],
                  "groups": [{"params": named[:3]}, {"params": named[3:]}]}[form]  # fmt: skip
        opt = method(params, lr=0.05, seed=11, **options, mode="inplace")
        for _ in range(3):
            opt.step(lambda model=model: loss_of(model))
        runs.append(snapshot(model))
    for run in runs[1:]:
        assert_same_bits(runs[0], run)


def test_a_subset_takes_the_same_directions():
    whole, part = Net(), Net()
    subset = [(n, p) for n, p in part.named_parameters() if n.startswith("outer")]
    a, b = Recorder(whole), Recorder(part)
    MeZO(whole, seed=9, mode="inplace").step(a)
    MeZO(subset, seed=9, mode="inplace").step(b)
    for at_whole, at_part in zip(a.points, b.points, strict=True):
        for name, _ in subset:
            assert torch.equal(at_whole[name], at_part[name])
        assert torch.equal(at_part["inner.weight"], snapshot(Net())["inner.weight"])


def test_wrapper_prefixes_do_not_change_the_noise():
    plain, wrapped = Net(), Net()
    MeZO(plain, seed=9, lr=0.05, mode="inplace").step(lambda: loss_of(plain))
    named = [("module._orig_mod." + n, p) for n, p in wrapped.named_parameters()]
    MeZO(named, seed=9, lr=0.05, mode="inplace").step(lambda: loss_of(wrapped))
    assert_same_bits(snapshot(plain), snapshot(wrapped))


def test_nameless_tensors_are_named_by_index_with_a_warning():
    tensors = [torch.zeros(3, 2), torch.zeros(4)]
    with pytest.warns(UserWarning, match="parameters without names"):
        opt = MeZO(tensors, lr=0.0, eps=1e-3, seed=2, mode="inplace")
    seen = []
    opt.step(lambda: seen.append([t.clone() for t in tensors]) or 0.0)
    for i, tensor in enumerate(seen[0]):
        z = dense_direction(tensor.shape, 2, 0, str(i)).value
        assert torch.equal(tensor, (torch.tensor(1e-3) * z.float()))


COLLIDING = ("blocks.44.expert87226.w8", "blocks.40.expert27505.w0")


def test_names_with_one_id_are_refused_and_can_be_told_apart():
    assert noise.tensor_id(COLLIDING[0]) == noise.tensor_id(COLLIDING[1])
    named = [(name, torch.zeros(4)) for name in COLLIDING]
    with pytest.raises(ValueError, match=r"(?s)^tensor_ids: .*expert87226.*expert27505.*same id 0xc95c5a2d"):
        MeZO(named, mode="inplace")
    opt = MeZO(named, tensor_ids={COLLIDING[1]: 7}, mode="inplace")
    assert [w.id for w in opt.weights()] == [0xC95C5A2D, 7]
    with pytest.raises(ValueError, match=r"^tensor_ids\['a'\]: got -1"):
        MeZO([("a", torch.zeros(2))], tensor_ids={"a": -1}, mode="inplace")


def test_add_param_group():
    model, opt = make(MeZO, {})
    extra = nn.Parameter(torch.ones(5))
    for bad in ({"lr": -1.0}, {"eps": 0.0}, {"weight_decay": math.nan}):
        with pytest.raises(ValueError, match=f"^{next(iter(bad))}: got"):
            opt.add_param_group({"params": [("extra", extra)]} | bad)
        assert len(opt.param_groups) == 1 and "extra" not in {w.name for w in opt.weights()}
    with pytest.raises(ValueError, match=r"^tensor_ids: "):
        opt.add_param_group({"params": [("gain", extra)]})
    assert len(opt.param_groups) == 1
    opt.add_param_group({"params": [("extra", extra)], "eps": 0.5})
    seen = []
    opt.step(lambda: seen.append(extra.clone()) or loss_of(model))
    z = dense_direction(extra.shape, 11, 0, "extra")
    assert ((seen[0] - 1 - 0.5 * z.value).abs() <= pass_error(seen[0].double(), (0.5, z))).all()


def test_pgap_takes_a_matrix_added_within_a_window():
    model, opt = make(PGAP, SMALL_PGAP, window=100)
    opt.step(lambda: loss_of(model))
    opt.add_param_group({"params": [("extra", nn.Parameter(torch.ones(4, 4)))]})
    opt.step(lambda: loss_of(model))


# ---- 16-bit weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("probes", [1, 2])
def test_16_bit_mezo_is_its_passes_with_a_stochastic_landing(dtype, probes):
    with pytest.warns(UserWarning, match="16-bit weights") as caught:
        model, opt = make(MeZO, {"probes": probes}, Net().to(dtype), weight_decay=0.1)
    assert len([w for w in caught if "16-bit" in str(w.message)]) == 1
    expected = {n: p.detach().clone() for n, p in model.named_parameters()}
    ids = [noise.tensor_id(n) for n in expected]
    decay = [0.05 * 0.1 if p.dim() > 1 else 0.0 for p in expected.values()]
    for step in range(2):
        closure = Recorder(model)
        opt.step(closure)
        keys = [noise.derive(11, step, Role.DENSE, j) for j in range(probes)]
        weights = list(expected.values())
        rho = [(p - m) / 2e-3 for p, m in zip(closure.losses[::2], closure.losses[1::2], strict=True)]
        for j, key in enumerate(keys):
            leave = [(keys[j - 1], 1e-3)] if j else []
            ops.dense_perturb_(weights, [*leave, (key, 1e-3)], tensor_ids=ids)
            ops.dense_perturb_(weights, [(key, -2e-3)], tensor_ids=ids)
        draws = [(key, -0.05 / probes * r) for key, r in zip(keys, rho, strict=True)]
        last = [draws[-1][1] + (1 - d) * 1e-3 for d in decay]
        ops.dense_perturb_(weights, [*draws[:-1], (keys[-1], last)], tensor_ids=ids, decay=decay, rounding="stochastic",
                           rounding_key=noise.derive(11, step, Role.ROUNDING, 2 * probes))  # fmt: skip
        assert_same_bits({n: p.detach() for n, p in model.named_parameters()}, expected)


@pytest.mark.filterwarnings("ignore:16-bit weights")
@pytest.mark.parametrize("method, options", [(MeZO, {}), (PGAP, {"rank": 4, "window": 9, "probes": 1})])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_steps_below_half_an_ulp_arrive_on_average(method, options, dtype):
    """The slope of the update along its direction is the step's, within 5 sigma of its own scatter."""
    model = nn.Module()
    model.w = nn.Parameter((1 + ops.draw((128, 128), 3, 3).abs() / 8).to(dtype))  # above 1: an ulp is eps of dtype
    half_ulp = torch.finfo(dtype).eps / 2
    eps, size = 4 * half_ulp, half_ulp / 4
    opt = method(model, lr=1.0, eps=eps, seed=6, **options, mode="inplace")
    if method is PGAP:
        losses = iter([1.0, 0.0, 0.0, 0.0])  # refresh; no update
        opt.step(lambda: next(losses))
    clean = model.w.detach().double().clone()
    losses = iter([2 * eps * size, 0.0])
    opt.step(lambda: next(losses))
    moved = (model.w.detach().double() - clean).flatten()
    direction = (
        dense_direction((128, 128), 6, 0, "w").value
        if method is MeZO
        else subspace_direction(opt, 1, "w", (128, 128), 2.0).value
    ).flatten()
    slope = (moved @ direction) / (direction @ direction)
    scatter = (moved - slope * direction).std() / direction.norm()
    assert abs(slope + size) <= 5 * scatter
    assert abs(slope) > 5 * scatter


@pytest.mark.filterwarnings("ignore:16-bit weights")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_loss_warns_once(dtype):
    model, opt = make(MeZO, {})
    with pytest.warns(UserWarning, match=r"^closure: returned a torch.*16 loss"):
        opt.step(lambda: loss_of(model).to(dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step(lambda: loss_of(model).to(dtype))


@pytest.mark.parametrize("loss", [0.5, torch.tensor(0.5), torch.tensor([0.5]), torch.tensor([[0.5]]), 1])
def test_a_loss_may_be_a_number_or_any_tensor_of_one(loss):
    _, opt = make(MeZO, {})
    assert opt.step(lambda: loss) == float(loss)


def test_a_float64_loss_keeps_its_digits():
    model, opt = make(MeZO, {})
    before = snapshot(model)
    calls = iter([1e8 + 1e-3, 1e8])  # in float32 their difference is 0 or 8
    opt.step(lambda: torch.tensor(next(calls), dtype=torch.float64))
    step = snapshot(model)["inner.weight"] - before["inner.weight"]
    z = dense_direction(step.shape, 11, 0, "inner.weight").value
    torch.testing.assert_close(step, -0.05 * 0.5 * z, rtol=1e-3, atol=1e-6)


def test_an_override_for_no_parameter_is_refused():
    with pytest.raises(ValueError, match=r"^tensor_ids: got 'wieght'"):
        MeZO(nn.Linear(3, 2), tensor_ids={"wieght": 5}, mode="inplace")
