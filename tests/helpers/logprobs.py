"""Cases of log-probs, and the comparison with the reference."""

import torch

from nanotoolrl.logprob import reference_logprob, token_logprob


def case(n, v, d=8, dtype=torch.float32, seed=0):
    """Random (hidden [N, D], weight [V, D], ids [N]) with logits of a few units; ids hold 0 and V - 1."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(v, d, generator=generator).to(dtype).requires_grad_()
    ids = torch.randint(v, (n,), generator=generator)
    if n:
        ids[0], ids[-1] = 0, v - 1
    return hidden, weight, ids


def gradients(function, hidden, weight, ids, temperature, g, h):
    """(log-probs, entropy, gradients of sum g * logprob + h * entropy with respect to hidden and weight)"""
    logprobs, entropy = function(hidden, weight, ids, temperature, want_entropy=True)
    loss = (g * logprobs).sum() + (h * entropy).sum()
    return (logprobs.detach(), entropy.detach(), *torch.autograd.grad(loss, (hidden, weight)))


def agree(hidden, weight, ids, temperature=1.0, atol=1e-5, function=token_logprob):
    """Values and gradients are the reference's, with other upstream gradients per token."""
    g, h = torch.randn(2, len(ids), generator=torch.Generator().manual_seed(1))
    ours = gradients(function, hidden, weight, ids, temperature, g, h)
    plain = gradients(reference_logprob, hidden, weight, ids, temperature, g, h)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=1e-5)
