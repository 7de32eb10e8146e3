"""The Triton kernels: in the interpreter where there is no GPU, on the GPU where there is one.

The same cases as the tiled path (test_logprob.py), so that the two and the reference agree.
"""

from functools import partial

import pytest
import torch
from helpers import logprobs
from helpers.attentions import attention_case, attention_row_by_row
from helpers.logprobs import case, gradients

from nanotoolrl import attention, logprob
from nanotoolrl.logprob import reference_logprob

triton = pytest.importorskip("triton", reason="Triton is for Linux only")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


token_logprob = partial(logprob.token_logprob, backend="triton")  # wherever its inputs are
agree = partial(logprobs.agree, function=token_logprob)


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
    """151,936 is no multiple of 1,024: columns between it and the next one must not count. Triton's
    interpreter, which needs a minute for so many, gets a vocabulary that ends in the same place of a tile."""
    hidden, weight, ids = on_device(*case(3, 151_936 if DEVICE == "cuda" else 151_936 % 8_192, 2))
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
    """A GPU's axis; the interpreter's have no end, and take a minute for so many."""
    hidden, weight, ids = on_device(*case(70_000 if DEVICE == "cuda" else 2000, 3, 2))
    agree(hidden, weight, ids, atol=0.02)  # d_weight sums as many terms


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
    from nanotoolrl.gpu import kernels

    monkeypatch.setattr(kernels, "_processors", lambda device: 5)
    monkeypatch.setattr(logprob, "SLAB_BYTES", 9 * 512 * 4)
    agree(*on_device(*case(9, 1187)), 0.7, atol=5e-5)


# -------------------------------------------------------------------------------------------------- sampling
@pytest.mark.parametrize("v", [1, 5, 1187, 5000])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_pick(v, temperature):
    """The id whose share of the cumulated probabilities holds the noise, and its log-prob."""
    from nanotoolrl.gpu.kernels import pick

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(12, v, generator=generator).mul_(4).to(DEVICE)
    noise = torch.rand(12, generator=generator).double().to(DEVICE)
    noise[0], noise[1] = 0.0, 1 - 2.0**-53
    logp = (logits.double() / temperature).log_softmax(-1)
    ids, logprobs = pick(logits, noise, None, temperature)
    torch.testing.assert_close(logprobs.double(), logp.gather(1, ids[:, None])[:, 0], atol=1e-5, rtol=1e-5)
    upper = logp.exp().cumsum(-1).gather(1, ids[:, None])[:, 0]
    lower = upper - logprobs.double().exp()
    assert ((lower - 1e-5 <= noise) & (noise <= upper + 1e-5)).all()
    likeliest, _ = pick(logits, None, None, temperature)
    assert torch.equal(likeliest, logits.argmax(-1))
    wanted = torch.full((12,), -1, device=DEVICE)
    wanted[3] = v - 1
    forced, logprobs = pick(logits, noise, wanted, temperature)
    assert forced[3] == v - 1 and torch.equal(forced[4:], ids[4:])
    assert logprobs[3].item() == pytest.approx(logp[3, -1].item(), abs=1e-5)


@pytest.mark.parametrize("noise", [0.0, 2.0**-53, 0.5, 1 - 2.0**-53])
def test_pick_never_takes_an_impossible_token(noise):
    from nanotoolrl.gpu.kernels import pick

    logits = torch.full((1, 9000), -3000.0, device=DEVICE)
    logits[0, [5, 4100, 4101, 8999 - 60]] = torch.tensor([0.0, -1.0, 2.0, -30.0], device=DEVICE)
    ids, logprobs = pick(logits, torch.tensor([noise], device=DEVICE).double(), None, 1.0)
    assert ids.item() == {0.0: 5, 2.0**-53: 5, 0.5: 4101, 1 - 2.0**-53: 4101}[noise]
    assert logprobs.item() == pytest.approx(logits[0].log_softmax(-1)[ids].item(), abs=1e-5)


# ------------------------------------------------------------------------------------------ decode attention
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.float16, 2e-3)])
@pytest.mark.parametrize("heads, kv_heads, dim", [(4, 4, 8), (14, 2, 64), (6, 2, 80)])
@pytest.mark.parametrize("processors", [1, 64])
def test_decode_attention(monkeypatch, dtype, atol, heads, kv_heads, dim, processors):
    """Against plain attention row by row; what stands behind a row's length, or in no row, is NaN."""
    from nanotoolrl.gpu import kernels

    monkeypatch.setattr(kernels, "_processors", lambda device: processors)  # 1: one split, 64: several
    rows = attention.Rows(*torch.tensor([[3, 0, 2], [1, 300, 511], [1, 1, 0], [260, 260, 0]]))
    query, prompts, own = attention_case(rows, heads, kv_heads, dim, behind=float("nan"))
    given = [x.to(DEVICE, dtype) for x in (query, prompts, own)]
    out = kernels.decode_attention(attention.Rows(*(x.to(DEVICE) for x in rows)), *given)
    assert out.dtype == dtype
    expected = attention_row_by_row(rows, *(x.to(dtype).double() for x in (query, prompts, own)))
    torch.testing.assert_close(out.double().cpu(), expected, atol=atol, rtol=atol)


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
