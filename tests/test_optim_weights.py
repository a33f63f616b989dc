"""Which tensors an optimizer trains, under which names and ids, and what 16-bit weights and losses get."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from support.contract import build
from support.counted import UNIT
from support.methods import METHODS, ROWS
from support.models import Losses, Words, assert_same_weights, snapshot
from support.selection import cycled
from torch import nn

from pgap_kernels import draw, noise, notices, ops
from pgap_kernels.noise import Role
from pgap_kernels.optim import LOZO, MeZO

ROW = {row.id: row for row in ROWS}


def z(name: str, shape, seed: int = 13, step: int = 0, probe: int = 0) -> torch.Tensor:
    """The contract's dense noise."""
    return draw(shape, noise.derive(seed, step, Role.DENSE, probe), noise.tensor_id(name))


def mezo(params, **options) -> MeZO:
    return MeZO(params, **{"lr": 0.05, "eps": 1e-3, "seed": 13, "mode": "inplace"} | options)


# ---- which tensors, under which names -------------------------------------------------------------------------------


def alias(model: Words) -> Words:
    """Tied by memory: two Parameters of the same elements."""
    model.head.weight = nn.Parameter(model.embed.weight.data)
    return model


@pytest.mark.parametrize("row, mode", cycled(METHODS, ["inplace", "scratch"]))
def test_weights_that_share_memory_are_tied(row, mode):
    """They move once, under their first name, as one Parameter in both places does."""
    model, opt, closure = build(row, mode, alias(Words()))
    same, plain, its = build(row, mode)
    assert [w.name for w in opt.weights()] == [w.name for w in plain.weights()]
    for _ in range(3):
        opt.step(closure)
        plain.step(its)
    assert closure.seen == its.seen and model.head.weight.data_ptr() == model.embed.weight.data_ptr()
    assert_same_weights({n: p for n, p in snapshot(model).items() if n != "head.weight"}, same)


@pytest.mark.parametrize("row, form", cycled(METHODS, ["model", "named"]))
def test_frozen_parameters_are_untouched(row, form):
    model, seen = Words(), []
    model.up.requires_grad_(False)
    model.norm.requires_grad_(False)
    before = snapshot(model)
    options = {**row.options, **({"select": ["down.weight"]} if row.id == "dizo" else {})}
    params = model if form == "model" else list(model.named_parameters())
    opt = row.make(params, model=model, **options, mode="inplace")
    closure = Losses(model, at=lambda call: seen.append(snapshot(model)))
    opt.step(closure)
    frozen = {"up.weight", "norm.weight", "norm.bias"}
    assert not frozen & {w.name for w in opt.weights()}
    seen += [] if row.id == "pizo-greedy" else [snapshot(model)]
    for point in seen[1:] if row.id in ("agzo", "fzoo", "hizoo", "zo-muon") else seen:  # whose first forward sees W
        unmoved = {name for name in before if torch.equal(point[name], before[name])}
        assert unmoved >= frozen if row.id in ("lezo", "adalezo") else unmoved == frozen


@pytest.mark.parametrize("row", [ROW["mezo-3"], ROW["pgap"]])
def test_empty_parameters_are_fine(row):
    model = Words()
    model.up.nothing, model.up.none = nn.Parameter(torch.empty(0, 4)), nn.Parameter(torch.empty(0))
    _, opt, closure = build(row, "inplace", model)
    _, plain, its = build(row, "inplace")
    for _ in range(row.period + 1):
        opt.step(closure)
        plain.step(its)
    assert closure.seen == its.seen


@pytest.mark.parametrize("row", METHODS)
def test_order_and_form_of_params_do_not_matter(row):
    runs = []
    for form in ("model", "named", "reversed", "groups"):
        model = Words()
        named = list(model.named_parameters())
        params = {"model": model, "named": named, "reversed": named[::-1],
                  "groups": [{"params": named[:3]}, {"params": named[3:]}]}[form]  # fmt: skip
        opt, closure = row.make(params, model=model, **row.options, mode="inplace"), Losses(model)
        for _ in range(3):
            opt.step(closure)
        runs.append(model)
    for run in runs[1:]:
        assert_same_weights(runs[0], run)


def points_of(model, params) -> list[dict]:
    seen = []
    mezo(params).step(Losses(model, at=lambda call: seen.append(snapshot(model))))
    return seen


def test_a_subset_takes_the_same_directions():
    whole, part = Words(), Words()
    subset = [(n, p) for n, p in part.named_parameters() if n.startswith("down")]
    for at_whole, at_part in zip(points_of(whole, whole), points_of(part, subset), strict=True):
        assert all(torch.equal(at_whole[name], at_part[name]) for name, _ in subset)
        assert torch.equal(at_part["up.weight"], snapshot(Words())["up.weight"])


def test_wrapper_prefixes_do_not_change_the_noise():
    plain, wrapped = Words(), Words()
    named = [("module._orig_mod." + n, p) for n, p in wrapped.named_parameters()]
    for left, right in zip(points_of(plain, plain), points_of(wrapped, named), strict=True):
        assert_same_weights(left, right)


def test_nameless_tensors_are_named_by_index_with_a_warning():
    tensors = [torch.zeros(3, 2), torch.zeros(4)]
    with pytest.warns(UserWarning, match="parameters without names"):
        opt = mezo(tensors, lr=0.0)
    seen = []
    opt.step(lambda: seen.append([t.clone() for t in tensors]) or 0.0)
    for i, tensor in enumerate(seen[0]):
        assert torch.equal(tensor, torch.tensor(1e-3) * z(str(i), tensor.shape))


COLLIDING = ("blocks.44.expert87226.w8", "blocks.40.expert27505.w0")


def test_parameters_that_come_to_the_model_later_are_named():
    model = Words()
    opt = mezo(model)
    model.later = nn.Linear(2, 2)
    with pytest.warns(UserWarning, match=r"^params: 'later.weight' and 1 more trainable parameters came"):
        opt.step(Losses(model))
    subset = mezo([("up.weight", model.up.weight)], model=model)
    model.latest = nn.Linear(2, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        subset.step(Losses(model))


@pytest.mark.parametrize("name", ["_fsdp_wrapped_module.layer.weight", "layer._flat_param"])
def test_sharded_models_are_refused(name):
    with pytest.raises(ValueError, match=r"^params: got '.*', of a model in FullyShardedDataParallel"):
        mezo([(name, nn.Parameter(torch.ones(2, 2)))])


def test_several_processes_without_a_mean_are_told(monkeypatch):
    from pgap_kernels.optim import base

    notices.warn_once.cache_clear()
    monkeypatch.setattr(base, "in_several_processes", lambda: True)
    model = Words()
    opt = mezo(model)
    with pytest.warns(UserWarning, match="^closure: there are several processes, whose losses nobody"):
        opt.step(Losses(model))
    notices.warn_once.cache_clear()
    opt.reduce_losses = lambda losses: losses
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step(Losses(model))


def test_names_with_one_id_are_refused_and_can_be_told_apart():
    assert noise.tensor_id(COLLIDING[0]) == noise.tensor_id(COLLIDING[1])
    named = [(name, torch.zeros(4)) for name in COLLIDING]
    with pytest.raises(ValueError, match=r"(?s)^tensor_ids: .*expert87226.*expert27505.*same id 0xc95c5a2d"):
        mezo(named)
    opt = mezo(named, tensor_ids={COLLIDING[1]: 7})
    assert [w.id for w in opt.weights()] == [0xC95C5A2D, 7]
    with pytest.raises(ValueError, match=r"^tensor_ids\['a'\]: got -1"):
        mezo([("a", torch.zeros(2))], tensor_ids={"a": -1})
    with pytest.raises(ValueError, match=r"^tensor_ids: got 'wieght'"):
        mezo(nn.Linear(3, 2), tensor_ids={"wieght": 5})


def test_add_param_group():
    model = Words()
    opt, extra = mezo(model), nn.Parameter(torch.ones(5))
    for bad in ({"lr": -1.0}, {"eps": 0.0}, {"weight_decay": math.nan}):
        with pytest.raises(ValueError, match=f"^{next(iter(bad))}: got"):
            opt.add_param_group({"params": [("extra", extra)]} | bad)
        assert len(opt.param_groups) == 1 and "extra" not in {w.name for w in opt.weights()}
    with pytest.raises(ValueError, match=r"^tensor_ids: "):
        opt.add_param_group({"params": [("affine.gain", extra)]})
    assert len(opt.param_groups) == 1
    opt.add_param_group({"params": [("extra", extra)], "eps": 0.5})
    seen = []
    opt.step(Losses(model, at=lambda call: seen.append(extra.clone())))
    assert torch.allclose(seen[0], 1 + 0.5 * z("extra", (5,)), rtol=4 * UNIT, atol=4 * UNIT)


@pytest.mark.parametrize("method", [LOZO, MeZO])
def test_a_parameter_is_of_the_group_that_has_it_now(method):
    model = Words()
    moving, *rest = model.named_parameters()
    opt = method([{"params": [moving]}, {"params": rest, "lr": 0.0}], model=model, lr=0.1, mode="scratch")
    opt.step(Losses(model))
    before = snapshot(model)
    first, second = opt.param_groups
    for key in ("params", "param_names"):
        second[key].insert(0, first[key].pop())
    opt.step(Losses(model))
    assert_same_weights(model, before)


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_what_a_schedule_may_not_make_of_an_option(name):
    model = Words()
    opt, before = mezo(model), snapshot(model)
    opt.param_groups[0][name] = -1e-20  # what a schedule that ends at 0 may come to
    opt.step(Losses(model))
    before = snapshot(model)
    opt.param_groups[0][name] = -1e-3
    with pytest.raises(ValueError, match=rf"^{name}: got -0.001; accepted: "):
        opt.step(Losses(model))
    assert_same_weights(model, before)


# ---- 16-bit weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("probes", [1, 2])
def test_16_bit_mezo_is_its_passes_with_a_stochastic_update(dtype, probes):
    with pytest.warns(UserWarning, match="16-bit weights") as caught:
        model, opt, closure = build(
            ROW["mezo"], "inplace", Words().to(dtype), weight_decay=0.1, probes=probes, eps=1e-3
        )
    assert len([w for w in caught if "16-bit" in str(w.message)]) == 1
    expected = snapshot(model)
    ids = [noise.tensor_id(n) for n in expected]
    decay = [0.05 * 0.1 if p.dim() > 1 else 0.0 for p in expected.values()]
    for step in range(2):
        del closure.seen[:]
        opt.step(closure)
        keys = [noise.derive(13, step, Role.DENSE, j) for j in range(probes)]
        weights = list(expected.values())
        rho = [(p - m) / 2e-3 for p, m in zip(closure.seen[::2], closure.seen[1::2], strict=True)]
        for j, key in enumerate(keys):
            leave = [(keys[j - 1], 1e-3)] if j else []
            ops.dense_perturb_(weights, [*leave, (key, 1e-3)], tensor_ids=ids)
            ops.dense_perturb_(weights, [(key, -2e-3)], tensor_ids=ids)
        draws = [(key, -0.05 / probes * r) for key, r in zip(keys, rho, strict=True)]
        last = [draws[-1][1] + (1 - d) * 1e-3 for d in decay]
        ops.dense_perturb_(weights, [*draws[:-1], (keys[-1], last)], tensor_ids=ids, decay=decay, rounding="stochastic",
                           rounding_key=noise.derive(13, step, Role.ROUNDING, 2 * probes))  # fmt: skip
        assert_same_weights(model, expected)


@pytest.mark.filterwarnings("ignore:16-bit weights")
@pytest.mark.parametrize("row", [ROW["mezo-3"], ROW["pgap"], ROW["lozo"]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_steps_below_half_an_ulp_arrive_on_average(row, dtype):
    """The slope of the update along its direction is the step's, within 5 sigma of its own scatter.

    The losses are the test's, so the direction can be read off the points of another run, whose weights are float32.
    """
    half_ulp = torch.finfo(dtype).eps / 2
    eps, size = 4 * half_ulp, half_ulp / 4
    own = {"probes": 1} if "probes" in row.options else {}
    refreshes = [1.0, 0.0] if row.id == "pgap" else []
    moves, directions = [], []
    for kind in (dtype, torch.float32):
        model = nn.Module()
        model.w = nn.Parameter((1 + draw((128, 128), 3, 3).abs() / 8).to(kind))  # above 1: an ulp is eps of dtype
        opt = row.make(model, **{**row.options, **own, "lr": 1.0, "eps": eps, "weight_decay": 0.0}, mode="inplace")
        losses, points = iter([*refreshes, 2 * eps * size, 0.0]), []
        before = model.w.detach().double().clone()
        opt.step(lambda losses=losses, points=points, m=model: points.append(m.w.detach().double()) or next(losses))
        moves.append((model.w.detach().double() - before).flatten())
        directions.append(((points[-2] - points[-1]) / (2 * eps)).flatten())
    moved, direction = moves[0], directions[1]
    # In float32 the step is exact to some ulps of 1: what in place rounds away of a refresh's probes is below that.
    slope = (moved @ direction) / (direction @ direction)
    scatter = (moved - slope * direction).std() / direction.norm()
    assert abs(slope + size) <= 5 * scatter
    assert abs(slope) > 5 * scatter


# ---- losses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_loss_warns_once(dtype):
    model = Words()
    opt = mezo(model)
    with pytest.warns(UserWarning, match=r"^closure: returned a torch.*16 loss"):
        opt.step(lambda: Losses(model)()[0].to(dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step(lambda: Losses(model)()[0].to(dtype))


@pytest.mark.parametrize("loss", [0.5, torch.tensor(0.5), torch.tensor([0.5]), torch.tensor([[0.5]]), 1])
def test_a_loss_may_be_a_number_or_any_tensor_of_one(loss):
    assert mezo(Words()).step(lambda: loss) == float(loss)


@pytest.mark.parametrize("big", [1e8, 1.0])
@pytest.mark.parametrize("kind", [float, lambda x: torch.tensor(x, dtype=torch.float64)])
def test_a_loss_keeps_its_digits(kind, big):
    """Differences that float32 does not have."""
    model, before = Words(), snapshot(Words())
    difference = 1e-3 if big > 1 else 3e-8
    losses = iter([kind(big + difference), kind(big)])
    mezo(model, lr=0.05 * 1e-3 / difference).step(lambda: next(losses))
    step = model.up.weight.detach() - before["up.weight"]
    torch.testing.assert_close(step, -0.05 * 0.5 * z("up.weight", (9, 6)), rtol=1e-3, atol=1e-6)
