"""The batched, cached sampler against the slow obvious way: a full uncached forward for every token."""

from dataclasses import replace

import pytest
import torch
from helpers.models import Script, tiny_policy, whole_logits
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
)
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from bench.replay import ReplaySampler
from nanotoolrl import sampler as sampler_module
from nanotoolrl.calls import FORMATS, render_calls
from nanotoolrl.env import Episode
from nanotoolrl.loading import load
from nanotoolrl.model import Policy
from nanotoolrl.places import Structure
from nanotoolrl.sampler import Sampler
from nanotoolrl.supervise import hint_text


@pytest.fixture(scope="module")
def tiny(policy):
    return tiny_policy(policy.tokenizer)


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


def test_hint_texts_of_real_tasks_stay_outside(tiny, train):
    tasks = train[:6]
    hints = [hint_text(task, "hermes") for task in tasks]
    rows = Sampler(tiny, max_new_tokens=8).rollout([Episode(task, max_messages=2) for task in tasks], hints)
    for row, task, hint in zip(rows, tasks, hints, strict=True):
        check_layout(tiny, row, task, max_messages=2)
        assert hint[:40] in tiny.chat.decode(row.sampled_prompt)
        assert hint[:40] not in tiny.chat.decode(row.tokens)


def test_hints_must_match_the_episodes(tiny):
    with pytest.raises(ValueError):
        Sampler(tiny).rollout(ragged_episodes(), [HINT])


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
    assert cut.states == ["reply", "overlong"] and cut.reward == 0.0 and cut.cut


def test_context_is_full_at_an_observation(policy):
    """The next user message does not fit: the episode ends after the stop token."""
    silent, task = tiny_policy(policy.tokenizer, stop=1e9), small_task(turns=3)
    prompt = len(silent.chat.prompt_ids(*Episode(task).prompt(), "hermes"))
    row = Sampler(silent, context=prompt + 10).rollout([Episode(task)])[0]
    assert len(row.tokens) == prompt + 1 and row.tokens[-1] == silent.chat.end_id and row.loss_mask[-1]
    assert row.states == ["empty"] and row.reward == 0.0
    assert [verdict.passed for verdict in row.verdicts] == [True, False]
    assert row.verdicts[-1].reason == "the context is full" and row.cut


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


# ------------------------------------------------------------------------------------------ forced skeleton
@pytest.mark.parametrize("format", FORMATS)
def test_forced_skeleton(tiny, train, format):
    """All of the ground truth's messages but the values in their calls, whatever the model is."""
    episodes = [Episode(task, format) for task in train[:24]]
    rows = Sampler(tiny, max_new_tokens=300).rollout(episodes, temperature=0.7, force_skeleton=True)
    structure, checked = Structure(tiny.chat, format), 0
    for row, task in zip(rows, train, strict=False):
        assert set(row.states) <= {"call", "reply", "overlong", "polluted", "malformed"}
        if "overlong" in row.states:
            continue  # there was no room for what should stand there
        sampled = [t for t, on in zip(row.tokens, row.loss_mask) if on]
        checked += 1
        assert sampled and all(structure.is_word(t) or not tiny.chat.decode([t]).strip() for t in sampled)
        episode = Episode(task, format)
        for text, stopped in spoken(tiny.chat, row)[: len(row.states)]:
            assert stopped
            if isinstance(episode.truth, str):
                assert text == episode.truth
            else:
                wanted = tiny.chat.assistant_ids(render_calls([episode.truth], format), format)
                at = 0
                for piece in structure.skeleton(wanted):
                    part = tiny.chat.decode(piece).removesuffix(tiny.chat.decode([tiny.chat.end_id]))
                    at = text.index(part, at) + len(part)
                assert at == len(text)
            episode.step(text)
        assert episode.messages == len(row.states)
    assert checked


def spoken(chat, row):
    """(text, whether it stopped) of every assistant message, forced tokens included."""
    text = chat.decode(row.tokens[row.prompt_length :])
    parts = (chat.opening + text).split(chat.opening)[1:]
    end = chat.decode([chat.end_id])
    return [(part.split(end)[0], end in part) for part in parts]


def test_a_model_that_knows_is_right_behind_a_skeleton(train):
    """The built-in model solves more with the skeleton given than without."""
    policy = load("nano")
    found = [
        sum(row.reward for row in Sampler(policy).rollout(episodes_of(train[:24]), temperature=0, **how))
        for how in ({}, {"force_skeleton": True})
    ]
    assert found[1] > found[0] > 0


def episodes_of(tasks):
    return [Episode(task) for task in tasks]
