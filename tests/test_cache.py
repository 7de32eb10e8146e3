"""The cache: how it grows, and that nothing of what it held is left."""

import pytest
from helpers.models import tiny_policy
from helpers.rollouts import ragged_episodes, same_rows, small_task

from nanotoolrl import cache, decode
from nanotoolrl import sampler as sampler_module
from nanotoolrl.env import Episode
from nanotoolrl.gpu import graphs
from nanotoolrl.sampler import Sampler


@pytest.fixture(scope="module")
def tiny(policy):
    return tiny_policy(policy.tokenizer)


@pytest.fixture(scope="module")
def usual(tiny):
    return Sampler(tiny, max_new_tokens=16).rollout(ragged_episodes(), temperature=0.7)


@pytest.mark.parametrize("limit, step", [(1, 1), (150, 7), (10**9, 4096)])
def test_memory_settings_change_nothing(tiny, usual, monkeypatch, limit, step):
    """One row per prefill forward or all; a cache that grows at every token or never."""
    monkeypatch.setattr(sampler_module, "PREFILL_TOKENS", limit)
    monkeypatch.setattr(cache, "CAPACITY_STEP", step)
    same_rows(Sampler(tiny, max_new_tokens=16).rollout(ragged_episodes(), temperature=0.7), usual)


@pytest.mark.slow
def test_a_graph_never_outlives_the_cache_it_was_recorded_on(tiny, monkeypatch):
    pytest.importorskip("triton", reason="Triton is for Linux only")
    recorded, runs = {}, []
    run = graphs.Loop.run

    def watched(loop, *arguments):
        held = sampler.decoder.cache
        addresses = [layer.data_ptr() for store in (held.prompts, held.own) for layer in store.layers]
        runs.append(recorded.setdefault(loop, addresses) == addresses)
        return run(loop, *arguments)

    monkeypatch.setattr(graphs.Loop, "run", watched)
    monkeypatch.setattr(sampler_module, "WAITING_SHARE", 0.01)
    monkeypatch.setattr(cache, "CAPACITY_STEP", 16)
    tasks = [small_task("a " * (40 * n) + str(n)) for n in range(6)]  # longer prompts beside longer rows
    sampler = Sampler(tiny, max_new_tokens=4, slots=3)
    sampler.decoder = decode.Decoder(tiny, 0, fast=True)
    rows = sampler.rollout([Episode(task, max_messages=3) for task in tasks])
    assert len(recorded) > 2 and all(runs)
    longest = max(len(row.tokens) - row.prompt_length for row in rows)
    assert longest <= sampler.decoder.cache.own.capacity <= 2 * longest + cache.CAPACITY_STEP


def test_a_spoiled_rollout_leaves_nothing_behind(tiny):
    """NaN in the cache, from weights that were then rolled back, does not reach those that come after."""
    sampler = Sampler(tiny, max_new_tokens=16)
    usual = sampler.rollout(ragged_episodes())
    weight = tiny.model.model.layers[0].self_attn.v_proj.weight.data
    kept = weight[0, 0].item()
    weight[0, 0] = float("nan")
    sampler.rollout(ragged_episodes())
    weight[0, 0] = kept
    same_rows(sampler.rollout(ragged_episodes()), usual)
