"""Decoding: the noise, the choice of a token, and the ways to run a step, which change nothing."""

import numpy as np
import pytest
import torch
from helpers.models import Script, ScriptedModel, tiny_policy, whole_logits
from helpers.rollouts import same_rows, sampled, small_task, uniform

from nanotoolrl import decode
from nanotoolrl import sampler as sampler_module
from nanotoolrl.env import Episode
from nanotoolrl.gpu import graphs
from nanotoolrl.sampler import Sampler


@pytest.fixture(scope="module")
def tiny(policy):
    return tiny_policy(policy.tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("slots, prefill, window", [(10, 0.2, 8), (3, 0.01, 3)])
def test_the_fast_way_changes_nothing(tiny, monkeypatch, slots, prefill, window):
    """What a GPU does, but for the recording of graphs: rows found through their slots, attention by the
    kernel, tokens read back every few steps; here in Triton's interpreter."""
    pytest.importorskip("triton", reason="Triton is for Linux only")
    monkeypatch.setattr(sampler_module, "WAITING_SHARE", prefill)
    monkeypatch.setattr(graphs, "WINDOW", window)

    def episodes():
        return [Episode(small_task("a " * (5 * n) + str(n)), max_messages=3) for n in range(6)]

    plain = Sampler(tiny, max_new_tokens=6).rollout(episodes())
    sampler = Sampler(tiny, max_new_tokens=6, slots=slots)
    sampler.decoder = decode.Decoder(tiny, 0, fast=True)
    rows = sampler.rollout(episodes())
    same_rows(rows, plain)
    assert len({len(row.tokens) for row in rows}) > 3, "the batch is not ragged"
    loops = dict(sampler.decoder.graphs.loops)
    same_rows(sampler.rollout(episodes()[:2]), plain[:2])  # nothing is left of the rollout before
    assert loops.items() <= sampler.decoder.graphs.loops.items()  # graphs are kept


# --------------------------------------------------------------------------------------------------- noise
def grid(seed=0, streams=64, places=64):
    stream, place = np.meshgrid(np.arange(streams, dtype=np.uint64), np.arange(places, dtype=np.uint64))
    return uniform(seed, stream.ravel(), place.ravel())


def chi_square(counts, expected):
    """Standardised: about normal with mean 0 and deviation 1 where the counts follow the expectation."""
    counts, expected = np.asarray(counts, float), np.asarray(expected, float)
    degrees = len(counts) - 1
    return (((counts - expected) ** 2 / expected).sum() - degrees) / (2 * degrees) ** 0.5


def test_uniform_is_in_range_and_uniform():
    for seed in (0, 1, -1, 2**63):
        noise = grid(seed)
        assert noise.min() >= 0 and noise.max() < 1 and len(np.unique(noise)) == len(noise)
        even = np.full(64, len(noise) / 64)
        low_bits = (noise * 2**53).astype(np.uint64) % np.uint64(64)
        assert abs(chi_square(np.histogram(noise, 64, (0, 1))[0], even)) < 4
        assert abs(chi_square(np.bincount(low_bits.astype(int), minlength=64), even)) < 4


def test_uniform_is_splitmix64():
    """Against the same arithmetic in Python's integers."""

    def mix(x):
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    keys = [(0, 0, 0), (1, 2, 3), (2**63 - 1, (5 << 32) + 7, 4095), (2**63, 2**40, 1), (-1, 2**62, 0)]
    for seed, stream, place in keys:
        key = 0
        for part in (seed % 2**64, stream, place):
            key = mix(((key ^ part) * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % 2**64)
        assert uniform(seed, np.array([stream]), np.array([place])).tolist() == [(key >> 11) / 2**53]


def test_uniform_depends_on_every_key():
    one = np.array([7], np.uint64)
    base = uniform(3, one, one)[0]
    assert uniform(3, one, one)[0] == base
    assert len({base, uniform(4, one, one)[0], uniform(3, one + 1, one)[0], uniform(3, one, one + 1)[0]}) == 4
    assert uniform(3, one + 1, one)[0] != uniform(3, one, one + 1)[0]  # the keys are not summed
    high = np.array([7 + (1 << 32)], np.uint64)  # the stream of another step
    assert uniform(3, high, one)[0] != base


def test_uniform_neighbours_are_independent():
    noise, other_seed = grid(0).reshape(64, 64), grid(1).reshape(64, 64)
    above = np.triu_indices(64, 1)
    pairs = {
        "next place": (noise[1:], noise[:-1]),
        "next stream": (noise[:, 1:], noise[:, :-1]),
        "next seed": (noise, other_seed),
        "stream and place exchanged": (noise[above], noise.T[above]),
    }
    for name, (a, b) in pairs.items():
        a, b = a.ravel(), b.ravel()
        counts = np.histogram2d(a, b, 8, [(0, 1), (0, 1)])[0].ravel()
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / len(a) ** 0.5, name
        assert abs(chi_square(counts, np.full(64, len(a) / 64))) < 5, name


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_frequencies_are_the_models_probabilities(tiny, temperature):
    n, task = 1000, small_task(turns=1)
    episodes = [Episode(task) for _ in range(n)]
    rows = Sampler(tiny, max_new_tokens=1, slots=250).rollout(episodes, temperature=temperature)
    prompt = rows[0].prompt_length
    with torch.no_grad():
        logits = whole_logits(tiny, torch.tensor([rows[0].tokens[:prompt]]))[0, -1].double()
    p = torch.softmax(logits / temperature, -1).numpy()
    counts = np.bincount([row.tokens[prompt] for row in rows], minlength=len(p))
    common = np.flatnonzero(n * p >= 8)
    assert len(common) >= 10
    rest = np.setdiff1d(np.arange(len(p)), common)
    bins, expected = [*counts[common], counts[rest].sum()], [*(n * p[common]), n * p[rest].sum()]
    assert abs(chi_square(bins, expected)) < 4


@pytest.mark.parametrize("noise", [0.0, 2.0**-53, 0.5, 1 - 2.0**-53])
def test_impossible_tokens_are_never_sampled(policy, monkeypatch, noise):
    """Whatever the noise: also where the first and the last ids of the vocabulary are impossible."""
    monkeypatch.setattr(
        decode, "uniform", lambda seed, streams, places: torch.full(streams.shape, noise, dtype=torch.float64)
    )
    vocabulary = len(policy.tokenizer)
    possible = [5, 100, 101, vocabulary - 60]
    logits = torch.full((vocabulary,), -3000.0)
    logits[possible] = torch.tensor([0.0, -1.0, 2.0, -30.0])

    class Fixed(ScriptedModel):
        def __call__(self, ids, positions, attend):
            return logits.expand(*ids.shape, -1)

    fixed = Script(policy, [0])
    fixed.model = Fixed(fixed)
    row = Sampler(fixed, max_new_tokens=6).rollout([Episode(small_task())])[0]
    expected = {0.0: 5, 2.0**-53: 5, 0.5: 101, 1 - 2.0**-53: vocabulary - 60}[noise]
    assert sampled(row) == [expected] * 6
    normal = torch.log_softmax(logits, -1)[expected].item()
    assert sum(row.logprobs) == pytest.approx(6 * normal, abs=1e-4)


def test_half_precision_weights(policy):
    """Log-probs come from fp32 logits also where the weights are bf16: they are what the trainer computes
    from the same hidden state, not that rounded to three digits."""
    half = tiny_policy(policy.tokenizer)
    half.model.to(torch.bfloat16)
    for row in Sampler(half, max_new_tokens=1).rollout([Episode(small_task(turns=1)) for _ in range(6)]):
        ids, mask = torch.tensor([row.tokens]), torch.tensor([row.loss_mask])
        with torch.no_grad():
            trained = half.logprobs(ids, mask)[0]
        assert row.logprobs[-1] == pytest.approx(trained.item(), abs=1e-4)


def test_kept_logprobs_by_hand():
    """0.5, 0.3, 0.15, 0.05, out of order; the likeliest is always kept."""
    p = torch.tensor([[0.15, 0.5, 0.05, 0.3]])

    def kept(top_p, min_p):
        return torch.isfinite(decode.kept_logprobs(p.log(), top_p, min_p))[0].tolist()

    assert kept(1.0, 0.0) == [True] * 4
    assert kept(0.6, 0.0) == [False, True, False, True], "0.5 is less than 0.6, 0.8 is not"
    assert kept(0.01, 0.0) == kept(1.0, 0.99) == [False, True, False, False]
    assert kept(1.0, 0.2) == [True, True, False, True]


def test_truncated_sampling_keeps_the_whole_log_probs(tiny):
    """What is sampled is among the kept, and has the log-prob of the whole distribution."""
    whole, cut = decode.Decoder(tiny, 0, fast=False), decode.Decoder(tiny, 0, fast=False, min_p=0.5)
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(1))
    noise = torch.rand(64, generator=torch.Generator().manual_seed(2))
    ids, logprobs = cut.draw(logits, noise, 1.0)
    table = torch.log_softmax(logits, -1)
    assert (table.gather(1, ids[:, None])[:, 0] == logprobs).all()
    assert (logprobs.exp() >= 0.5 * table.exp().max(1).values - 1e-6).all()
    assert (whole.draw(logits, noise, 1.0)[0] != ids).any()
