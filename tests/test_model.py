"""A policy: its log-probs, hidden states and gradients."""

import pytest
import torch
from helpers.models import tiny_policy, whole_logits

from nanotoolrl.env import Episode
from nanotoolrl.model import pad
from nanotoolrl.sampler import Sampler
from nanotoolrl.world.tasks import load_tasks


@pytest.fixture(scope="module")
def tiny(policy):
    return tiny_policy(policy.tokenizer)


LENGTHS = (31, 7, 50, 2)


def ragged(tokenizer):
    """(ids [4, 50], mask [4, 50]) of rows of LENGTHS, padded with random ids, and random masks inside."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(len(tokenizer), (len(LENGTHS), max(LENGTHS)), generator=generator)
    mask = torch.rand(ids.shape, generator=generator) < 0.5
    mask[:, 0], mask[3, 1] = False, True
    for row, length in zip(mask, LENGTHS, strict=True):
        row[length:] = False
    return ids, mask


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_a_softmax_over_the_vocabulary(tiny, temperature):
    ids, mask = ragged(tiny.tokenizer)
    with torch.no_grad():
        logprobs, entropy = tiny.logprobs(ids, mask, temperature, want_entropy=True)
        plain = torch.log_softmax(whole_logits(tiny, ids) / temperature, -1)
    places = [(b, t) for b in range(len(ids)) for t in range(ids.shape[1]) if mask[b, t]]
    expected = [plain[b, t - 1, ids[b, t]].item() for b, t in places]
    entropies = [-(plain[b, t - 1].exp() * plain[b, t - 1]).sum().item() for b, t in places]
    assert logprobs.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-5)
    assert entropy.tolist() == pytest.approx(entropies, abs=1e-5)


@pytest.mark.parametrize("which", ["tiny", "policy"])
def test_padded_rows_equal_rows_alone(which, request):
    policy = request.getfixturevalue(which)
    ids, mask = ragged(policy.tokenizer)
    with torch.no_grad():
        together = policy.logprobs(ids, mask)[0]
        alone = [
            policy.logprobs(row[None, :length], keep[None, :length])[0]
            for row, keep, length in zip(ids, mask, LENGTHS, strict=True)
        ]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)


def test_padding_contents_do_not_matter(tiny):
    ids, mask = ragged(tiny.tokenizer)
    other = ids.clone()
    for row, length in zip(other, LENGTHS, strict=True):
        row[length:] = tiny.chat.end_id
    assert not torch.equal(ids, other)

    def result(rows):
        tiny.model.zero_grad()
        logprobs = tiny.logprobs(rows, mask)[0]
        logprobs.sum().backward()
        embedding = tiny.model.model.embed_tokens.weight
        return logprobs.detach(), tiny.head.grad.clone(), embedding.grad.clone()

    assert all(torch.equal(a, b) for a, b in zip(result(ids), result(other), strict=True))
    tiny.model.zero_grad()


def test_gradient_reaches_the_weights(tiny):
    ids, mask = ragged(tiny.tokenizer)
    parameters = list(tiny.model.parameters())
    ours = torch.autograd.grad(tiny.logprobs(ids, mask)[0].sum(), parameters)
    plain = torch.log_softmax(whole_logits(tiny, ids), -1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    expected = torch.autograd.grad(plain[mask[:, 1:]].sum(), parameters)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)


def test_nothing_to_score(tiny):
    ids, mask = ragged(tiny.tokenizer)
    logprobs, entropy = tiny.logprobs(ids, torch.zeros_like(mask), want_entropy=True)
    assert logprobs.shape == entropy.shape == (0,)
    assert tiny.logprobs(ids[:, :1], mask[:, :1])[0].shape == (0,)


def test_first_token_has_no_logprob(tiny):
    ids, mask = ragged(tiny.tokenizer)
    mask[2, 0] = True
    with pytest.raises(ValueError, match=r"mask\[:, 0\] must be False"):
        tiny.logprobs(ids, mask)


def test_checkpointed_layers_give_the_same_loss_and_gradients(policy):
    ids = torch.randint(len(policy.tokenizer), (2, 24))
    mask = torch.zeros(2, 24, dtype=torch.bool)
    mask[:, 8:] = True
    found = []
    for again in (False, True):
        tiny = tiny_policy(policy.tokenizer, attention_dropout=0.1)  # here nothing is ever dropped
        tiny.model.checkpointing = again
        hidden = tiny.trained_hidden(ids, mask)
        hidden.square().sum().backward()
        found.append([hidden.detach(), *(weight.grad for weight in tiny.model.parameters())])
    for before, after in zip(*found, strict=True):
        assert (before is None and after is None) or torch.equal(before, after)


def test_ids_beyond_the_tokenizer_are_never_chosen(policy):
    """Rows that fill an embedding up, here the likeliest of all: sampler and trainer share the known ids out
    among themselves, and what is saved keeps its rows."""
    wide = tiny_policy(policy.tokenizer, vocab_size=len(policy.tokenizer) + 271)
    with torch.no_grad():
        wide.model.lm_head.weight[len(policy.tokenizer) :] *= 100
    assert len(wide.head) == len(policy.tokenizer) < wide.model.shape.vocabulary
    rows = Sampler(wide, max_new_tokens=16).rollout([Episode(task) for task in load_tasks("test")[:4]])
    assert max(token for row in rows for token in row.tokens) < len(policy.tokenizer)
    for row in rows:
        ids, mask = pad([(row.tokens, row.loss_mask)], wide.device)
        sampled = torch.tensor(row.logprobs)[mask[0]]
        assert wide.logprobs(ids, mask)[0].sub(sampled).abs().max() < 2e-5
    wide.logprobs(ids, mask)[0].sum().backward()
    assert wide.model.lm_head.weight.grad.shape == (wide.model.shape.vocabulary, 32)
