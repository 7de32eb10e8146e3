"""fp32 masters of half-precision weights."""

import pytest
import torch
from helpers.models import tiny_policy
from helpers.updates import made_up, make_run, parameters_of

from nanotoolrl.gpu.masters import CALM, FP16_SCALE, Masters
from nanotoolrl.run import new_optimizer, roll_back, snapshot
from nanotoolrl.updates import optimizer_step, policy_update


def half_run(policy, dtype, **changes):
    """(run on half-precision weights, its masters), with the fused optimiser."""
    tiny = tiny_policy(policy.tokenizer)
    tiny.model.to(dtype)
    run = make_run(tiny, **changes)
    run.optimizer = new_optimizer(run.masters, run.config.lr, 0.0)
    return run


def test_fp32_weights_are_their_own_masters(policy):
    model = tiny_policy(policy.tokenizer).model
    masters = Masters(model)
    assert all(a is b for a, b in zip(masters.tensors, model.parameters(), strict=True))
    assert masters.state() == {} and masters.scale == 1.0 and not masters.lower_scale()


@pytest.mark.parametrize("before", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("after", [torch.float32, torch.bfloat16, torch.float16])
def test_a_run_goes_on_in_another_dtype(policy, before, after):
    """What was trained is what is trained on, with gradients of the right size."""
    trained, run = half_run(policy, before), half_run(policy, after)
    trained.masters.scale = 256.0 if before == torch.float16 else 1.0
    with torch.no_grad():
        for tensor in trained.masters.tensors:
            tensor += 0.01 * torch.randn_like(tensor)
    trained.masters.publish()
    run.policy.model.load_state_dict(trained.policy.model.state_dict())
    run.masters.load(trained.masters.state())
    expected = [weight.float() for weight in trained.masters.weights]
    rows, scores = made_up(tiny_policy(policy.tokenizer))
    run.config.lr = 1e-9
    norm = policy_update(run, rows, scores)["grad_norm"]
    for weight, right in zip(run.masters.weights, expected, strict=True):
        assert (weight.float() - right).abs().max() < 0.02 * right.abs().max()
    full = half_run(policy, torch.float32)
    with torch.no_grad():
        torch._foreach_copy_(full.masters.weights, expected)
    assert norm == pytest.approx(policy_update(full, rows, scores)["grad_norm"], rel=0.3)
    scales = {torch.float32: FP16_SCALE, torch.bfloat16: 1.0, torch.float16: 256.0}
    assert run.masters.scale == (scales[before] if after == torch.float16 else 1.0)


def test_the_scale_rises_again(policy):
    run = half_run(policy, torch.float16)
    run.masters.lower_scale()
    for _ in range(CALM):
        optimizer_step(run, 0.0, run.optimizer, 0.0)
    assert run.masters.scale == FP16_SCALE / 8
    for _ in range(5 * CALM):
        optimizer_step(run, 0.0, run.optimizer, 0.0)
    assert run.masters.scale == FP16_SCALE


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_steps_add_up(policy, dtype):
    """Steps far below a rounding step of the weights: alone each is lost, in the masters they add up."""
    run = half_run(policy, dtype)
    weight, master = run.masters.weights[0], run.masters.tensors[0]
    start, lone = weight.detach().clone(), weight.detach().clone()
    tiny_step = 1e-5
    for _ in range(2000):
        run.masters.tensors[0].grad.fill_(1.0)
        optimizer_step(run, 0.0, torch.optim.SGD([master], lr=1.0), tiny_step)
        lone -= tiny_step
    moved = (start.float() - weight.float()).mean().item()
    assert moved == pytest.approx(0.02, rel=0.05)
    assert (start.float() - lone.float()).mean().item() < 0.015


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_of_an_update(policy, dtype):
    """Summed over micro-batches in fp32, with the scale taken out again: the fp32 model's, rounded."""
    run = half_run(policy, dtype, tokens_at_once=60)
    exact = tiny_policy(policy.tokenizer)
    with torch.no_grad():
        for a, b in zip(exact.model.parameters(), run.masters.weights, strict=True):
            a.copy_(b.float())
    rows, scores = made_up(exact)
    metrics = policy_update(run, rows, scores)
    expected = policy_update(make_run(exact), rows, scores)
    assert run.masters.scale == (FP16_SCALE if dtype == torch.float16 else 1.0)
    near = 0.1 if dtype == torch.bfloat16 else 0.02
    assert metrics["grad_norm"] == pytest.approx(expected["grad_norm"], rel=near)
    assert metrics["logit_gradient"][0] == pytest.approx(expected["logit_gradient"][0], abs=2e-2)
    assert all(weight.grad is None for weight in run.masters.weights)


def test_an_overflow_lowers_the_scale(policy):
    run = half_run(policy, torch.float16, lr=1e-2)
    before = parameters_of(run.policy)
    for scale in (FP16_SCALE / 16, FP16_SCALE / 256, 1.0):
        run.masters.tensors[0].grad.fill_(float("inf"))
        assert optimizer_step(run, 0.0, run.optimizer, 1e-2) is None
        assert run.masters.scale == scale and not run.stuck
    for _ in range(3):  # now nothing is left to cure it
        run.masters.tensors[0].grad.fill_(float("inf"))
        optimizer_step(run, 0.0, run.optimizer, 1e-2)
    assert run.stuck and run.skipped_updates == 6
    assert all(torch.equal(a, b) for a, b in zip(before, parameters_of(run.policy), strict=True))


def test_snapshot_holds_the_masters(policy):
    run = half_run(policy, torch.bfloat16, lr=1e-3)
    rows, scores = made_up(tiny_policy(policy.tokenizer))
    policy_update(run, rows, scores)
    saved, masters = snapshot(run), [x.detach().clone() for x in run.masters.tensors]
    policy_update(run, rows, scores)
    assert any(not torch.equal(a, b) for a, b in zip(masters, run.masters.tensors, strict=True))
    roll_back(run, saved)
    assert all(torch.equal(a, b) for a, b in zip(masters, run.masters.tensors, strict=True))
    assert all(
        torch.equal(w, m.to(w.dtype)) for w, m in zip(run.masters.weights, run.masters.tensors, strict=True)
    )
