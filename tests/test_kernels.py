"""The Triton kernels: in the interpreter where there is no GPU, on the GPU where there is one.

The same cases as the tiled path (test_logprob.py), so that the two and the reference agree.
"""

import pytest
import torch
from test_logprob import agree, case, gradients

from nanotoolrl import logprob
from nanotoolrl.logprob import reference_logprob, token_logprob

triton = pytest.importorskip("triton", reason="Triton is for Linux only")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def kernels():
    """Run `token_logprob` on the kernels, wherever its inputs are."""
    logprob.use("triton")
    yield
    logprob.use("auto")


def on_device(*tensors):
    return [x.detach().to(DEVICE).requires_grad_(x.requires_grad) for x in tensors]


def compare(hidden, weight, ids, temperature=1.0, want_entropy=True, rtol=2e-5):
    """Log-probs, entropy and gradients of the kernels are the fp64 reference's, with per-token weights.

    Values to 3e-5 whatever the dtype; gradients to one rounding of the logits' gradient to the dtype.
    """
    generator = torch.Generator().manual_seed(1)
    g, h = torch.randn(2, len(ids), generator=generator).to(DEVICE)
    h = h if want_entropy else h * 0
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    logits = exact[0] @ exact[1].T / temperature
    logp = logits.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    loss = (g * logp.gather(1, ids[:, None])[:, 0]).sum() + (h * entropy).sum()
    expected = torch.autograd.grad(loss, exact)
    found = token_logprob(hidden, weight, ids, temperature, want_entropy)
    loss = (g * found[0]).sum() + (h * (found[1] if want_entropy else 0)).sum()
    ours = torch.autograd.grad(loss, (hidden, weight))
    assert found[0].dtype == torch.float32
    chosen = logp.gather(1, ids[:, None])[:, 0]
    torch.testing.assert_close(found[0].double(), chosen, atol=3e-5, rtol=rtol)
    if want_entropy:
        torch.testing.assert_close(found[1].double(), entropy, atol=5e-5, rtol=rtol)
    unit = torch.finfo(hidden.dtype).eps
    for mine, exactly, scale in zip(ours, expected, (weight, hidden), strict=True):
        assert mine.dtype == hidden.dtype
        room = 4 * unit * scale.detach().abs().max() * (g.abs().max() + h.abs().max()) / temperature
        torch.testing.assert_close(mine.double(), exactly, atol=max(3e-5, room.item()), rtol=4 * unit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("want_entropy", [False, True])
@pytest.mark.parametrize("n, d, v", [(1, 8, 7), (2, 16, 64), (65, 40, 1187), (130, 33, 300), (9, 8, 1)])
def test_equals_fp64(n, d, v, dtype, want_entropy):
    """Ragged in every dimension; ids at 0 and V - 1; other upstream gradients per token."""
    hidden, weight, ids = on_device(*case(n, v, d, dtype))
    compare(hidden, weight, ids, 0.7, want_entropy)


def test_vocabulary_of_a_real_model():
    """151,936 is no multiple of 1,024: columns between it and the next one must not count."""
    hidden, weight, ids = on_device(*case(3, 151_936, 2))
    compare(hidden, weight, ids)


@pytest.mark.parametrize("temperature", [0.25, 1.0, 3.0])
def test_equals_reference(temperature):
    agree(*on_device(*case(70, 1187)), temperature, atol=5e-5)


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_far_from_zero(offset):
    """All logits very negative, or very large: a maximum that starts at 0 would make NaN of the former."""
    weight = (offset + torch.arange(300).remainder(40) / 8)[:, None].to(DEVICE).requires_grad_()
    hidden = torch.ones(4, 1, device=DEVICE, requires_grad=True)
    ids = torch.tensor([0, 150, 299, 299], device=DEVICE)
    logprobs, entropy = token_logprob(hidden, weight, ids, want_entropy=True)
    expected, expected_entropy = reference_logprob(hidden, weight, ids, want_entropy=True)
    # One fp32 rounding of a logit of 1e4 * log2(e) is 1e-3.
    torch.testing.assert_close(logprobs, expected, atol=4e-3, rtol=0)
    torch.testing.assert_close(entropy, expected_entropy, atol=4e-3, rtol=0)


def test_more_rows_than_a_grid_axis_holds():
    hidden, weight, ids = on_device(*case(70_000, 3, 2))
    agree(hidden, weight, ids, atol=0.02)  # d_weight sums 70,000 terms


def test_no_rows_and_rows_without_gradient():
    agree(*on_device(*case(0, 70)))
    hidden, weight, ids = on_device(*case(9, 70))
    g = torch.tensor([0.0, 1, 0, 0, -2, 0, 0, 0, 3], device=DEVICE)
    plain = gradients(reference_logprob, hidden, weight, ids, 1.0, g, g * 0)
    ours = gradients(token_logprob, hidden, weight, ids, 1.0, g, g * 0)
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    assert (ours[2][g == 0] == 0).all()


def test_tied_weight_and_non_contiguous_inputs():
    _, weight, ids = on_device(*case(9, 300))

    def gradient(function):
        hidden = weight[ids.roll(1)].sin()
        logprobs, entropy = function(hidden, weight, ids, want_entropy=True)
        upstream = torch.arange(9, device=DEVICE)
        return torch.autograd.grad((logprobs * upstream).sum() + entropy.sum(), weight)[0]

    torch.testing.assert_close(gradient(token_logprob), gradient(reference_logprob), atol=5e-5, rtol=1e-5)
    hidden, weight, ids = on_device(*case(20, 300, d=16))
    wide, turned = hidden.detach()[:, ::2].requires_grad_(), weight.detach()[:, :8].T.contiguous().T
    assert not wide.is_contiguous() and not turned.is_contiguous()
    agree(wide, turned.requires_grad_(), ids, atol=3e-5)


def test_many_splits_and_slabs(monkeypatch):
    """The vocabulary in several splits (forward) and slabs (backward): the same numbers."""
    from nanotoolrl import kernels

    monkeypatch.setattr(kernels, "_processors", lambda device: 5)
    monkeypatch.setattr(logprob, "SLAB_BYTES", 9 * 512 * 4)
    agree(*on_device(*case(9, 1187)), 0.7, atol=5e-5)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("n, d, v", [(1, 64, 151_936), (1000, 896, 151_936), (77, 1536, 129_920)])
def test_gpu_equals_fp64(n, d, v, dtype):
    hidden, weight, ids = case(n, v, d, dtype)
    hidden, weight, ids = on_device(hidden, (weight.detach() / d**0.5).requires_grad_(), ids)
    compare(hidden, weight, ids, 0.7)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_gpu_more_than_two_to_the_31_logits():
    hidden, weight, ids = on_device(*case(20_000, 151_936, 64, torch.bfloat16))
    logprobs, _ = token_logprob(hidden, weight, ids, want_entropy=True)
    part = slice(19_900, 20_000)
    expected, _ = reference_logprob(hidden[part], weight, ids[part])
    torch.testing.assert_close(logprobs[part], expected, atol=1e-4, rtol=1e-5)
    logprobs.sum().backward()
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()
