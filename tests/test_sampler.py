"""The batched, cached sampler against the slow obvious way: a full uncached forward for every token."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.models import Script, ScriptedModel, tiny_policy, whole_logits
from helpers.rollouts import (
    CALL,
    HINT,
    check_against_full_forward,
    check_layout,
    ragged_episodes,
    same_rows,
    sampled,
    scripted,
    small_task,
    uniform,
)
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from bench.replay import ReplaySampler
from nanotoolrl import cache, decode
from nanotoolrl import sampler as sampler_module
from nanotoolrl.calls import FORMATS
from nanotoolrl.env import Episode
from nanotoolrl.model import Policy
from nanotoolrl.sampler import Sampler
from nanotoolrl.supervise import hint_text
from nanotoolrl.trajectory import Trajectory
from nanotoolrl.world.tasks import load_tasks


@pytest.fixture(scope="module")
def tiny(policy):
    return tiny_policy(policy.tokenizer)


@pytest.fixture(scope="module")
def train():
    return load_tasks("train")


def slow_greedy(policy, episode, max_new_tokens, context=2048):
    """(tokens, mask) of an episode played greedily, each token from a full forward over all tokens so far."""
    chat = policy.chat
    tokens = chat.prompt_ids(*episode.prompt(), episode.format)
    mask, message = [False] * len(tokens), []
    while not episode.done:
        with torch.no_grad():
            token = whole_logits(policy, torch.tensor([tokens]))[0, -1].argmax().item()
        tokens, mask, message = [*tokens, token], [*mask, True], [*message, token]
        stopped = token in chat.stop_ids
        if not stopped and len(message) < max_new_tokens and len(tokens) < context:
            continue
        answer = episode.step(chat.decode(message[:-1] if stopped else message), overlong=not stopped)
        observation = [] if answer is None else chat.extend_ids(answer, token)
        tokens, mask, message = tokens + observation, mask + [False] * len(observation), []
    return tokens, mask


# -------------------------------------------------------------------------------- cached = uncached = batched
@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen2Config, Qwen3Config])
def test_greedy_equals_uncached(policy, config_class):
    model = tiny_policy(policy.tokenizer, config_class=config_class, stop=0.01, close=0.01)
    player = Sampler(model, max_new_tokens=12)
    endless = player.rollout(ragged_episodes()[:6], temperature=0)
    model.chat.stop_ids += {row.tokens[row.prompt_length + 2] for row in endless}  # so that messages do end
    rows = player.rollout(ragged_episodes()[:6], temperature=0)
    for row, episode in zip(rows, ragged_episodes()[:6], strict=True):
        assert (row.tokens, row.loss_mask) == slow_greedy(model, episode, max_new_tokens=12)
    assert min(len(row.states) for row in rows) > 1 and len({len(row.tokens) for row in rows}) > 3


def test_greedy_equals_uncached_in_the_builtin_model(policy, train):

    def episodes():
        return [Episode(task, max_messages=3) for task in train[:2]]

    rows = Sampler(policy, max_new_tokens=12).rollout(episodes(), temperature=0)
    for row, episode in zip(rows, episodes(), strict=True):
        assert (row.tokens, row.loss_mask) == slow_greedy(policy, episode, max_new_tokens=12)
        check_against_full_forward(policy, row, None, temperature=0)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("slots", [3, 64])
def test_every_token_against_a_full_forward(tiny, temperature, slots):
    player = Sampler(tiny, max_new_tokens=24, slots=slots, seed=5)
    rows = player.rollout(ragged_episodes(), temperature=temperature, stream=9)
    for place, row in enumerate(rows):
        check_against_full_forward(tiny, row, place, temperature, seed=5, stream=9)


def test_every_token_of_the_builtin_model_against_a_full_forward(policy, train):
    episodes = [Episode(task, max_messages=4) for task in train[:40:5]]
    rows = Sampler(policy, max_new_tokens=16, slots=5).rollout(episodes)
    for place, row in enumerate(rows):
        check_against_full_forward(policy, row, place, 1.0)


def test_trainer_sees_the_same_logprobs(tiny):
    rows = Sampler(tiny, max_new_tokens=24).rollout(ragged_episodes(), temperature=0.7)
    for row in rows:
        ids, mask = torch.tensor([row.tokens]), torch.tensor([row.loss_mask])
        with torch.no_grad():
            trained = tiny.logprobs(ids, mask, temperature=0.7)[0]
        own = [x for x, mask in zip(row.logprobs, row.loss_mask, strict=True) if mask]
        assert trained.tolist() == pytest.approx(own, abs=2e-5)


def test_temperature_zero_reports_the_logprobs_of_temperature_one(tiny):
    row = Sampler(tiny, max_new_tokens=8).rollout([Episode(small_task())], temperature=0)[0]
    with torch.no_grad():
        logprobs = torch.log_softmax(whole_logits(tiny, torch.tensor([row.tokens]))[0], -1)
    first = row.prompt_length
    assert row.logprobs[first] == pytest.approx(logprobs[first - 1].max().item(), abs=2e-5)
    assert -10 < row.logprobs[first] < 0


def test_one_row_at_a_time(tiny):
    """A row alone, in a full batch, in a queue for three slots: the same tokens."""
    together = Sampler(tiny, max_new_tokens=24).rollout(ragged_episodes())
    for slots in (1, 3, 9):
        same_rows(Sampler(tiny, max_new_tokens=24, slots=slots).rollout(ragged_episodes()), together)
    same_rows(Sampler(tiny, max_new_tokens=24).rollout(ragged_episodes()[:1]), together[:1])
    assert len({len(row.tokens) for row in together}) > 5, "the batch is not ragged"


@pytest.fixture(scope="module")
def usual(tiny):
    return Sampler(tiny, max_new_tokens=16).rollout(ragged_episodes(), temperature=0.7)


@pytest.mark.parametrize("slots", [3, 64])
@pytest.mark.parametrize("prefill", [1e-9, 2.0])
def test_scheduling_changes_nothing(tiny, usual, monkeypatch, slots, prefill):
    """Prefill as soon as one row waits or only when all wait."""
    monkeypatch.setattr(sampler_module, "WAITING_SHARE", prefill)
    player = Sampler(tiny, max_new_tokens=16, slots=slots)
    same_rows(player.rollout(ragged_episodes(), temperature=0.7), usual)


@pytest.mark.parametrize("limit, step", [(1, 1), (150, 7), (10**9, 4096)])
def test_memory_settings_change_nothing(tiny, usual, monkeypatch, limit, step):
    """One row per prefill forward or all; a cache that grows at every token or never."""
    monkeypatch.setattr(sampler_module, "PREFILL_TOKENS", limit)
    monkeypatch.setattr(decode, "CAPACITY_STEP", step)
    same_rows(Sampler(tiny, max_new_tokens=16).rollout(ragged_episodes(), temperature=0.7), usual)


@pytest.mark.parametrize("slots, prefill, window", [(10, 0.2, 8), (3, 0.01, 3)])
def test_the_fast_way_changes_nothing(tiny, monkeypatch, slots, prefill, window):
    """What a GPU does, but for the recording of graphs: rows found through their slots, attention by the
    kernel, tokens read back every few steps; here in Triton's interpreter."""
    pytest.importorskip("triton", reason="Triton is for Linux only")
    monkeypatch.setattr(sampler_module, "WAITING_SHARE", prefill)
    monkeypatch.setattr(decode, "WINDOW", window)
    plain = Sampler(tiny, max_new_tokens=6).rollout(ragged_episodes())
    sampler = Sampler(tiny, max_new_tokens=6, slots=slots)
    sampler.decoder = decode.Decoder(tiny, 0, fast=True)
    rows = sampler.rollout(ragged_episodes())
    same_rows(rows, plain)
    loops = dict(sampler.decoder.loops)
    same_rows(sampler.rollout(ragged_episodes()[:2]), plain[:2])  # nothing is left of the rollout before
    assert loops.items() <= sampler.decoder.loops.items()  # graphs are kept


def test_a_graph_never_outlives_the_cache_it_was_recorded_on(tiny, monkeypatch):
    pytest.importorskip("triton", reason="Triton is for Linux only")
    recorded, runs = {}, []
    run = decode._Loop.run

    def watched(loop, *arguments):
        addresses = [store.data_ptr() for layer in loop.decoder.cache.layers for store in layer]
        runs.append(recorded.setdefault(loop, addresses) == addresses)
        return run(loop, *arguments)

    monkeypatch.setattr(decode._Loop, "run", watched)
    monkeypatch.setattr(sampler_module, "WAITING_SHARE", 0.01)
    tasks = [small_task("a " * (60 * (n % 2)) + str(n)) for n in range(8)]  # long prompts beside long rows
    sampler = Sampler(tiny, max_new_tokens=40, slots=3)
    sampler.decoder = decode.Decoder(tiny, 0, fast=True)
    rows = sampler.rollout([Episode(task, max_messages=3) for task in tasks])
    assert len(recorded) > 2 and all(runs)
    longest = max(len(row.tokens) for row in rows)
    assert longest <= sampler.decoder.cache.capacity <= 2 * longest + cache.CAPACITY_STEP


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


def test_replay(tiny):
    """Forced tokens come out as they went in, with the policy's log-probs; then rows go on by themselves."""
    sampler = Sampler(tiny, max_new_tokens=16)
    rows = sampler.rollout(ragged_episodes())
    spoken = [sampled(row) for row in rows]
    same_rows(ReplaySampler(tiny, rows, max_new_tokens=16).rollout(ragged_episodes(), stream=5), rows)
    halves = [ids[: len(ids) // 2] for ids in spoken]
    places = [[t for t, mask in enumerate(row.loss_mask) if mask] for row in rows]
    shown = [
        replace(row, loss_mask=[t in own[: len(half)] for t in range(len(row.tokens))])
        for row, own, half in zip(rows, places, halves, strict=True)
    ]
    others = ReplaySampler(tiny, shown, max_new_tokens=16).rollout(ragged_episodes(), stream=5)
    assert all(sampled(row)[: len(half)] == half for row, half in zip(others, halves))
    assert any(sampled(row) != ids for row, ids in zip(others, spoken))
    for place, row in enumerate(others):
        ids, mask = torch.tensor([row.tokens]), torch.tensor([row.loss_mask])
        with torch.no_grad():
            trained = tiny.logprobs(ids, mask)[0]
        own = [x for x, flag in zip(row.logprobs, row.loss_mask) if flag]
        assert own == pytest.approx(trained.tolist(), abs=2e-5), place


def test_group_members_differ(tiny):
    rows = Sampler(tiny, max_new_tokens=16).rollout([Episode(small_task()) for _ in range(8)])
    assert len({row.tokens[row.prompt_length] for row in rows}) > 2
    assert len({tuple(row.tokens) for row in rows}) == 8


def test_seed_and_stream_key_the_noise(tiny):
    def play(seed, stream):
        rows = Sampler(tiny, max_new_tokens=16, seed=seed).rollout(ragged_episodes()[:4], stream=stream)
        return [row.tokens for row in rows]

    assert play(0, 0) == play(0, 0)
    assert len({str(play(*key)) for key in ((0, 0), (1, 0), (0, 1), (1, 1))}) == 4


def test_a_rollout_leaves_the_model_as_it_was(tiny):
    before = {name: tensor.clone() for name, tensor in tiny.model.state_dict().items()}
    Sampler(tiny, max_new_tokens=8).rollout(ragged_episodes()[:2])
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny.model.state_dict().items())
    ids = torch.tensor([[1, 2, 3]])
    tiny.logprobs(ids, torch.tensor([[False, True, True]]))[0].sum().backward()  # still trains
    tiny.model.zero_grad()


def test_no_episodes(tiny):
    assert Sampler(tiny).rollout([]) == []


# -------------------------------------------------------------------------------------------- trajectories
@pytest.mark.parametrize("format", FORMATS)
def test_layout(tiny, train, format):
    tasks = train[:16:2]
    player = Sampler(tiny, max_new_tokens=24, slots=5)
    rows = player.rollout([Episode(task, format, max_messages=4) for task in tasks])
    for row, task in zip(rows, tasks, strict=True):
        episode = check_layout(tiny, row, task, max_messages=4)
        assert (row.task_id, row.category, row.format) == (task.id, task.category, format)
        assert (row.reward, row.verdicts) == (episode.reward, episode.turn_verdicts)
        assert row.source == "policy" and row.sampled_prompt is None and row.with_sampled_prompt() is row
        assert row.sampled_tokens == len(sampled(row))
    assert max(len(row.states) for row in rows) > 1


def test_stop_tokens_are_trained_in_every_turn(tiny):
    """As many sampled stop tokens as messages that stopped, each with mask and log-prob."""
    rows = Sampler(tiny, max_new_tokens=24).rollout(ragged_episodes())
    for row in rows:
        stops = [i for i, token in enumerate(row.tokens) if token in tiny.chat.stop_ids and row.loss_mask[i]]
        assert len(stops) == sum(state != "overlong" for state in row.states)
        assert all(row.logprobs[i] < 0 for i in stops)
    assert sum(len(row.states) for row in rows) > 2 * len(rows)


def test_sampled_ids_are_never_encoded_again(tiny):
    """A random model writes ids that no tokenizer would: they are kept, in every turn."""
    rows = Sampler(tiny, max_new_tokens=24).rollout(ragged_episodes())
    odd = 0
    for row, episode in zip(rows, ragged_episodes(), strict=True):
        check_layout(tiny, row, episode.task)
        check_against_full_forward(tiny, row, rows.index(row), 1.0)
        text = tiny.chat.decode(sampled(row))
        odd += tiny.chat.encode(text) != sampled(row) and "\ufffd" in text
    assert odd > 0


def test_other_stop_token(policy):
    """<|endoftext|> ends a message too; the layout is repaired by an unmasked <|im_end|>."""
    model = tiny_policy(policy.tokenizer, stop=1e-6)
    text_end = model.chat.special_ids["<|endoftext|>"]
    with torch.no_grad():
        model.head[text_end] = 0
        model.head[text_end, 0] = 100.0
    row = Sampler(model, max_new_tokens=8).rollout([Episode(small_task(turns=2))])[0]
    check_layout(model, row, small_task(turns=2))
    at = row.prompt_length
    assert row.tokens[at : at + 2] == [text_end, model.chat.end_id]
    assert row.loss_mask[at : at + 2] == [True, False]
    assert row.states == ["empty", "empty"] and row.tokens[-1] == text_end


def test_reward_of_an_episode(policy, tiny):
    """A model that says nothing passes the turns without calls and fails the last one."""
    silent = tiny_policy(policy.tokenizer, stop=1e9)
    row = Sampler(silent, max_new_tokens=4).rollout([Episode(small_task(turns=3))])[0]
    assert [verdict.passed for verdict in row.verdicts] == [True, True, False]
    assert row.reward == 0.0 and row.states == ["empty"] * 3


# -------------------------------------------------------------------------------------------------- scripts


def test_a_solved_episode(policy):
    task = small_task(turns=2)
    ids, mask = scripted(policy, task, ["What?", CALL, "b."])
    row = Sampler(Script(policy, ids)).rollout([Episode(task)])[0]
    assert (row.tokens, row.loss_mask) == (ids, mask)
    assert row.reward == 1.0 and row.states == ["reply", "call", "reply"]
    assert [verdict.passed for verdict in row.verdicts] == [True, True]
    assert row.logprobs == [0.0] * len(ids)  # certain


# --------------------------------------------------------------------------------------------------- hints
def test_hinted_rollout(tiny):
    episodes, chat = ragged_episodes(), tiny.chat
    hints = [HINT if n % 2 else "" for n in range(len(episodes))]
    rows = Sampler(tiny, max_new_tokens=24, slots=4).rollout(episodes, hints)
    for place, (row, episode, hint) in enumerate(zip(rows, ragged_episodes(), hints, strict=True)):
        messages, tools = episode.prompt()
        check_layout(tiny, row, episode.task)  # tokens hold the prompt without the hint
        assert "Hint:" not in chat.decode(row.tokens)
        assert row.source == ("hint" if hint else "policy") and bool(row.sampled_prompt) == bool(hint)
        if hint:
            assert row.sampled_prompt == chat.prompt_ids(messages, tools, "hermes", HINT)
            assert HINT in chat.decode(row.sampled_prompt)
        check_against_full_forward(tiny, row, place, 1.0)


def test_hint_is_seen(tiny):
    """Greedily, so that nothing else differs: the hinted row gets other log-probs."""
    episodes = [Episode(small_task()), Episode(small_task())]
    rows = Sampler(tiny, max_new_tokens=8).rollout(episodes, ["", HINT], temperature=0)
    plain, hinted = [row.logprobs[row.prompt_length] for row in rows]
    assert plain != pytest.approx(hinted, abs=1e-4)


def test_with_sampled_prompt(tiny):
    row = Sampler(tiny, max_new_tokens=24).rollout([Episode(small_task())], [HINT])[0]
    kept, own = row.with_sampled_prompt(), row.prompt_length
    assert kept.tokens == row.sampled_prompt + row.tokens[own:]
    assert kept.loss_mask == [False] * len(row.sampled_prompt) + row.loss_mask[own:]
    assert kept.logprobs == [0.0] * len(row.sampled_prompt) + row.logprobs[own:]
    assert kept.prompt_length == len(row.sampled_prompt) > own and kept.sampled_prompt is None
    assert sampled(kept) == sampled(row) and kept.sampled_tokens == row.sampled_tokens
    assert (kept.reward, kept.states, kept.source) == (row.reward, row.states, "hint")
    with torch.no_grad():
        trained = tiny.logprobs(torch.tensor([kept.tokens]), torch.tensor([kept.loss_mask]))[0]
    own = [x for x, mask in zip(kept.logprobs, kept.loss_mask, strict=True) if mask]
    assert trained.tolist() == pytest.approx(own, abs=2e-5)


def test_hints_must_match_the_episodes(tiny):
    with pytest.raises(ValueError):
        Sampler(tiny).rollout(ragged_episodes(), [HINT])


def test_trajectory_example():
    """The three-token example of the docstring."""
    row = Trajectory("t", "base", "hermes", [], [], [], 2)
    row.append([5, 6], sampled=False)
    row.append([7], sampled=True, logprobs=[-0.5])
    row.append([1], sampled=True, logprobs=[-0.25])
    row.append([8], sampled=False)
    row.append([1], sampled=True, logprobs=[-0.125])
    assert row.tokens == [5, 6, 7, 1, 8, 1]
    assert row.loss_mask == [False, False, True, True, False, True]
    assert row.logprobs == [0.0, 0.0, -0.5, -0.25, 0.0, -0.125] and row.sampled_tokens == 3


# -------------------------------------------------------------------------------------------------- limits
def test_overlong_message(policy):
    endless = tiny_policy(policy.tokenizer, stop=1e-9)
    rows = Sampler(endless, max_new_tokens=5).rollout([Episode(small_task()) for _ in range(3)])
    for row in rows:
        assert row.states == ["overlong"] and row.reward == 0.0
        assert len(row.tokens) == row.prompt_length + 5 and row.sampled_tokens == 5
        assert not set(sampled(row)) & set(endless.chat.stop_ids)
        assert not row.verdicts[-1].passed and "token limit" in row.verdicts[-1].reason


def test_message_of_exactly_the_limit(policy):
    """A message whose last allowed token is its stop token is whole."""
    task = small_task(turns=2)
    ids, mask = scripted(policy, task, ["What?", CALL, "b."])
    longest = max(len(policy.chat.assistant_ids(text, "hermes")) for text in ("What?", CALL, "b."))
    assert Sampler(Script(policy, ids), longest).rollout([Episode(task)])[0].reward == 1.0
    cut = Sampler(Script(policy, ids), longest - 1).rollout([Episode(task)])[0]
    assert cut.states == ["reply", "overlong"] and cut.reward == 0.0


def test_context_is_full_at_an_observation(policy):
    """The next user message does not fit: the episode ends after the stop token."""
    silent, task = tiny_policy(policy.tokenizer, stop=1e9), small_task(turns=3)
    prompt = len(silent.chat.prompt_ids(*Episode(task).prompt(), "hermes"))
    row = Sampler(silent, context=prompt + 10).rollout([Episode(task)])[0]
    assert len(row.tokens) == prompt + 1 and row.tokens[-1] == silent.chat.end_id and row.loss_mask[-1]
    assert row.states == ["empty"] and row.reward == 0.0
    assert [verdict.passed for verdict in row.verdicts] == [True, False]
    assert row.verdicts[-1].reason == "the context is full"


def test_context_is_full_in_a_message(policy):
    endless, task = tiny_policy(policy.tokenizer, stop=1e-9), small_task()
    prompt = len(endless.chat.prompt_ids(*Episode(task).prompt(), "hermes"))
    row = Sampler(endless, max_new_tokens=50, context=prompt + 7).rollout([Episode(task)])[0]
    assert len(row.tokens) == prompt + 7 and row.states == ["overlong"] and row.reward == 0.0


@pytest.mark.parametrize("hint", ["", HINT])
@pytest.mark.parametrize("force_prefix", [False, True])
def test_context_is_never_exceeded(policy, hint, force_prefix):
    """However little room is left, for a message, an observation or a forced prefix."""
    silent, task = tiny_policy(policy.tokenizer, stop=1e9), small_task(turns=1)
    task.turns *= 2  # calls are expected in both
    prefix = silent.chat.assistant_ids(FORMATS["hermes"].prefix, "hermes") if force_prefix else []
    prompt = len(silent.chat.prompt_ids(*Episode(task).prompt(), "hermes", hint)) + len(prefix)
    lengths = []
    for context in range(prompt + 1, prompt + 40):
        player = Sampler(silent, context=context)
        row = player.rollout([Episode(task)], [hint], force_prefix=force_prefix)[0].with_sampled_prompt()
        assert len(row.tokens) <= context and row.loss_mask[-1]
        lengths.append(len(row.states))
    assert set(lengths) == {1, 2}


def test_context_of_the_model_is_the_limit(policy):
    short = tiny_policy(policy.tokenizer, stop=1e-9, max_position_embeddings=256)
    row = Sampler(short, max_new_tokens=1000, context=1000).rollout([Episode(small_task())])[0]
    assert len(row.tokens) == 256 and row.states == ["overlong"]


def test_prompt_too_long(tiny):
    task = small_task("long-name")
    prompt = len(tiny.chat.prompt_ids(*Episode(task).prompt(), "hermes"))
    with pytest.raises(ValueError, match=f"task long-name: a prompt of {prompt} tokens leaves no room in"):
        Sampler(tiny, context=prompt).rollout([Episode(small_task("a")), Episode(task)])
    row = Sampler(tiny, context=prompt + 1).rollout([Episode(task)])[0]
    assert row.sampled_tokens == 1


def test_hinted_prompt_too_long(tiny):
    """The prompt fits, the hint does not."""
    prompt = len(tiny.chat.prompt_ids(*Episode(small_task()).prompt(), "hermes"))
    with pytest.raises(ValueError, match="task small: a prompt of"):
        Sampler(tiny, context=prompt + 2).rollout([Episode(small_task())], [HINT])


# -------------------------------------------------------------------------------------------- forced prefix
@pytest.mark.parametrize("format", FORMATS)
def test_forced_prefix(tiny, train, format):
    """The prefix of a call stands, unmasked, at the start of a message exactly where calls are left."""
    tasks = [*train[:6], small_task(turns=2)]
    episodes = [Episode(task, format, max_messages=4) for task in tasks]
    rows = Sampler(tiny, max_new_tokens=24).rollout(episodes, temperature=0.7, force_prefix=True)
    prefix = tiny.chat.assistant_ids(FORMATS[format].prefix, format)[:-1]
    assert tiny.chat.decode(prefix) == FORMATS[format].prefix
    for place, (row, task) in enumerate(zip(rows, tasks, strict=True)):
        episode, t, messages = Episode(task, format, max_messages=4), row.prompt_length, 0
        while True:
            forced = prefix if episode.calls_left else []
            assert row.tokens[t : t + len(forced)] == forced and not any(row.loss_mask[t : t + len(forced)])
            start, t = t, t + len(forced)
            assert row.loss_mask[t]
            while t < len(row.tokens) and row.loss_mask[t] and row.tokens[t] not in tiny.chat.stop_ids:
                t += 1
            stopped = t < len(row.tokens) and row.loss_mask[t]
            messages += 1
            text = tiny.chat.decode(row.tokens[start:t])
            answer = episode.step(text, overlong=not stopped)
            if answer is None:
                break
            ids = tiny.chat.extend_ids(answer, row.tokens[t])
            assert row.tokens[t + 1 : t + 1 + len(ids)] == ids
            t += 1 + len(ids)
        assert messages == len(row.states) and len(row.tokens) == t + stopped
        check_against_full_forward(tiny, row, place, 0.7)


# -------------------------------------------------------------------------------- another implementation
@pytest.mark.parametrize("config_class", [Qwen2Config, Qwen3Config, LlamaConfig])
@pytest.mark.parametrize("tied", [False, True])
def test_greedy_equals_generate(policy, train, config_class, tied):
    """The first message of several tasks in one batch against transformers' own `generate`, row by row."""
    torch.manual_seed(1)
    tokenizer, stop_ids = policy.tokenizer, policy.chat.stop_ids
    config = config_class(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.3,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=stop_ids,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()
    rows = Sampler(Policy(model, tokenizer), max_new_tokens=16).rollout(
        [Episode(task, max_messages=1) for task in train[:24:6]], temperature=0
    )
    for row in rows:
        prompt = torch.tensor([row.tokens[: row.prompt_length]])
        everything = torch.ones_like(prompt)
        theirs = model.generate(prompt, attention_mask=everything, do_sample=False, max_new_tokens=16)
        assert row.tokens == theirs[0].tolist()


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


def test_hint_texts_of_real_tasks_stay_outside(tiny, train):
    tasks = train[:6]
    hints = [hint_text(task, "hermes") for task in tasks]
    rows = Sampler(tiny, max_new_tokens=8).rollout([Episode(task, max_messages=2) for task in tasks], hints)
    for row, task, hint in zip(rows, tasks, hints, strict=True):
        check_layout(tiny, row, task, max_messages=2)
        assert hint[:40] in tiny.chat.decode(row.sampled_prompt)
        assert hint[:40] not in tiny.chat.decode(row.tokens)
