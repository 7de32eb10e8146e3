import math

import pytest
import torch
from helpers.logprobs import agree, case, gradients
from torch.utils._python_dispatch import TorchDispatchMode

from nanotoolrl import logprob
from nanotoolrl.logprob import TILE, reference_logprob, token_logprob

SIZES = [1, 7, 1187, 2048, 2049, 5000]


@pytest.mark.parametrize("v", SIZES)
@pytest.mark.parametrize("temperature", [0.25, 0.7, 1.0, 3.0])
def test_equals_reference(v, temperature):
    agree(*case(9, v), temperature, atol=2e-5)


@pytest.mark.parametrize("n", [0, 1, 2, 300])
def test_number_of_rows(n):
    agree(*case(n, 2049), atol=3e-5)


@pytest.mark.parametrize("v", SIZES)
def test_without_entropy(v):
    hidden, weight, ids = case(9, v)
    g = torch.linspace(-2, 3, 9)
    logprobs, entropy = token_logprob(hidden, weight, ids)
    assert entropy is None
    expected = reference_logprob(hidden, weight, ids)[0]
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=1e-5)
    ours = torch.autograd.grad((g * logprobs).sum(), (hidden, weight))
    plain = torch.autograd.grad((g * expected).sum(), (hidden, weight))
    torch.testing.assert_close(ours, plain, atol=2e-5, rtol=1e-5)


def test_ids_at_every_edge_of_a_tile():
    hidden, weight, _ = case(6, 2 * TILE + 1)
    agree(hidden, weight, torch.tensor([0, TILE - 1, TILE, 2 * TILE - 1, 2 * TILE, 1]), atol=2e-5)


def test_known_values():
    weight = torch.tensor([[0.0], [math.log(3.0)]])
    hidden = torch.tensor([[1.0], [0.0]])
    logprobs, entropy = token_logprob(hidden, weight, torch.tensor([1, 0]), want_entropy=True)
    skewed = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert logprobs.tolist() == pytest.approx([math.log(0.75), math.log(0.5)], abs=1e-6)
    assert entropy.tolist() == pytest.approx([skewed, math.log(2)], abs=1e-6)
    halved = token_logprob(hidden, weight, torch.tensor([1, 0]), temperature=0.5)[0]
    assert halved.tolist() == pytest.approx([math.log(0.9), math.log(0.5)], abs=1e-6)


def test_one_column_has_no_choice():
    hidden, weight, ids = case(5, 1)
    logprobs, entropy = token_logprob(hidden * 100, weight, ids, want_entropy=True)
    assert logprobs.tolist() == entropy.tolist() == [0.0] * 5


@pytest.mark.parametrize("offset", [-1e4, 1e4])
@pytest.mark.parametrize("v", [1, 7, 2049])
def test_far_from_zero(offset, v):
    """Every logit is exact in fp32 here, so the reference is exact to the last bits: ours must not lose any
    by adding a small logarithm to a large maximum."""
    weight = (offset + torch.arange(v).remainder(40) / 8)[:, None].requires_grad_()
    hidden = torch.ones(4, 1, requires_grad=True)
    ids = torch.tensor([0, v // 2, v - 1, v - 1])
    logprobs, entropy = token_logprob(hidden, weight, ids, want_entropy=True)
    expected, expected_entropy = reference_logprob(hidden, weight, ids, want_entropy=True)
    torch.testing.assert_close(logprobs, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(entropy, expected_entropy, atol=1e-4, rtol=0)
    (d_weight,) = torch.autograd.grad(logprobs.sum(), weight)
    (plain,) = torch.autograd.grad(expected.sum(), weight)
    torch.testing.assert_close(d_weight, plain, atol=1e-4, rtol=0)


@pytest.mark.parametrize("scale", [1e2, 1e4, 1e8])
def test_huge_logits_stay_finite(scale):
    hidden, weight, ids = case(9, 2049)
    big = (hidden * scale).detach().requires_grad_()
    values = gradients(token_logprob, big, weight, ids, 1.0, torch.ones(9), torch.ones(9))
    assert all(value.isfinite().all() for value in values)
    expected, entropy = reference_logprob(big, weight, ids, want_entropy=True)
    torch.testing.assert_close(values[0], expected, atol=0, rtol=1e-5)
    assert values[1].min() > -1e-4


def test_maximum_in_a_later_tile():
    """The running sums must be rescaled when the maximum grows or stays: rising, falling, and equal tiles."""
    for levels in ([-50, 0, 50], [50, 0, -50], [3, 3, 3], [-50, 50, 0]):
        weight = torch.cat([torch.full((TILE, 1), float(x)) for x in levels]).requires_grad_()
        hidden = torch.tensor([[1.0], [-1.0], [0.5]], requires_grad=True)
        agree(hidden, weight, torch.tensor([0, TILE, 3 * TILE - 1]), atol=1e-3)


def test_non_contiguous_inputs():
    hidden, weight, ids = case(20, 2049, d=16)
    wide, turned = hidden.detach()[:, ::2].requires_grad_(), weight.detach()[:, :8].T.contiguous().T
    every_second = torch.stack([ids, ids], 1).flatten()[::2]
    assert not wide.is_contiguous() and not turned.is_contiguous() and not every_second.is_contiguous()
    agree(wide, turned.requires_grad_(), every_second, atol=3e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_in_fp32(dtype):
    hidden, weight, ids = case(300, 2049, dtype=dtype)
    g, h = torch.randn(2, 300, generator=torch.Generator().manual_seed(1))
    logprobs, entropy, d_hidden, d_weight = gradients(token_logprob, hidden, weight, ids, 0.7, g, h)
    full = [x.detach().float().requires_grad_() for x in (hidden, weight)]
    expected = gradients(reference_logprob, *full, ids, 0.7, g, h)
    assert logprobs.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logprobs, expected[0], atol=3e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, expected[1], atol=3e-5, rtol=1e-5)
    half_a_unit = torch.finfo(dtype).eps / 2  # the only rounding is the last one
    for ours, plain in ((d_hidden, expected[2]), (d_weight, expected[3])):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.float(), plain, atol=3e-5, rtol=1.01 * half_a_unit)


@pytest.mark.parametrize("which", ["hidden", "weight"])
def test_central_differences(which):
    hidden, weight, ids = case(3, 5, d=4)
    g, h, step = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.3, 1.0, -1.0]), 1e-2

    def loss(moved):
        inputs = {"hidden": hidden.detach(), "weight": weight.detach()} | {which: moved}
        logprobs, entropy = token_logprob(inputs["hidden"], inputs["weight"], ids, 0.8, want_entropy=True)
        return ((g * logprobs).sum() + (h * entropy).sum()).item()

    point = {"hidden": hidden, "weight": weight}[which].detach()
    gradient = gradients(token_logprob, hidden, weight, ids, 0.8, g, h)[{"hidden": 2, "weight": 3}[which]]
    for k in range(point.numel()):
        shift = torch.zeros(point.numel())
        shift[k] = step
        shift = shift.view_as(point)
        slope = (loss(point + shift) - loss(point - shift)) / (2 * step)
        assert gradient.flatten()[k].item() == pytest.approx(slope, abs=2e-3)


def test_tied_weight_gets_both_gradients():
    """Input and output embedding are one parameter, as in the built-in model."""
    _, weight, ids = case(9, 1187)

    def gradient(function):
        hidden = weight[ids.roll(1)].sin()
        logprobs, entropy = function(hidden, weight, ids, want_entropy=True)
        return torch.autograd.grad((logprobs * torch.arange(9)).sum() + entropy.sum(), weight)[0]

    torch.testing.assert_close(gradient(token_logprob), gradient(reference_logprob), atol=5e-5, rtol=1e-5)


def test_only_one_input_needs_a_gradient():
    hidden, weight, ids = case(9, 1187)
    both = torch.autograd.grad(token_logprob(hidden, weight, ids)[0].sum(), (hidden, weight))
    frozen_weight = torch.autograd.grad(token_logprob(hidden, weight.detach(), ids)[0].sum(), hidden)
    frozen_hidden = torch.autograd.grad(token_logprob(hidden.detach(), weight, ids)[0].sum(), weight)
    assert torch.equal(both[0], frozen_weight[0]) and torch.equal(both[1], frozen_hidden[0])


@pytest.mark.parametrize(
    "hidden, weight, ids",
    [((3, 4), (5, 6), (3,)), ((3,), (5, 4), (3,)), ((3, 4), (5, 4, 1), (3,)), ((1, 3, 4), (5, 4), (3,))],
)
def test_bad_shapes(hidden, weight, ids):
    with pytest.raises(ValueError, match=r"hidden is \[N, D\], weight \[V, D\]; got \(") as error:
        token_logprob(torch.zeros(hidden), torch.zeros(weight), torch.zeros(ids, dtype=torch.long))
    assert str(hidden) in str(error.value) and str(weight) in str(error.value)


@pytest.mark.parametrize("ids", [(2,), (3, 1), ()])
def test_bad_ids(ids):
    with pytest.raises(ValueError, match=r"ids must have shape \(3,\), not"):
        token_logprob(torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(ids, dtype=torch.long))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_bad_temperature(temperature):
    hidden, weight, ids = case(3, 5)
    with pytest.raises(ValueError, match=f"temperature must be positive, not {temperature}"):
        token_logprob(hidden, weight, ids, temperature)


class Largest(TorchDispatchMode):
    """Records the largest tensor any operation returns, in elements."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            self.numel = max(self.numel, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
        return result


def test_logits_never_exist_at_once():
    n, v, d = 64, 50_000, 8
    hidden, weight, ids = case(n, v, d)

    def largest(function):
        with Largest() as mode:
            logprobs, entropy = function(hidden, weight, ids, want_entropy=True)
            torch.autograd.grad(logprobs.sum() + entropy.sum(), (hidden, weight))
        return mode.numel

    assert largest(reference_logprob) >= n * v  # the meter sees what it should see
    assert largest(token_logprob) <= max(n * TILE, v * d) < n * v / 4


def test_triton_is_refused_where_it_cannot_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="needs a CUDA device"):
        logprob.check_backend("triton")
