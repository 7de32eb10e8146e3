"""The built-in model: its directory, and the recipe that made it."""

import copy
import importlib.util
import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers.models import whole_logits
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanotoolrl.attention import causal
from nanotoolrl.calls import FORMATS, message_state, render_calls
from nanotoolrl.env import Episode
from nanotoolrl.loading import NANO
from nanotoolrl.world.tasks import SPLITS, load_tasks

spec = importlib.util.spec_from_file_location("make_base", NANO.parent / "make_base.py")
make_base = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_base)
NANO_RECIPE = make_base.RECIPES["nano"]


def test_directory_is_small_and_standard(policy):
    assert sum(file.stat().st_size for file in NANO.iterdir()) <= 8e6
    assert 0.5e6 <= sum(p.numel() for p in policy.model.parameters()) <= 1.5e6
    model = AutoModelForCausalLM.from_pretrained(NANO)
    tokenizer = AutoTokenizer.from_pretrained(NANO)
    ids = tokenizer("Move apple.txt from docs to work.", return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == "Move apple.txt from docs to work."
    with torch.no_grad():
        assert torch.equal(model(ids).logits, whole_logits(policy, ids))


@pytest.fixture(scope="module")
def fresh():
    """The model before its first step."""
    return make_base.new_policy(0, make_base.RECIPES["nano"])


@pytest.mark.slow
def test_tokenizer_is_made_again_from_its_seed(policy, fresh):
    again = fresh.tokenizer
    assert (
        json.loads(again.backend_tokenizer.to_str())["model"]
        == json.loads(policy.tokenizer.backend_tokenizer.to_str())["model"]
    )
    assert again.get_added_vocab() == policy.tokenizer.get_added_vocab()


GREEDY = NANO.parent / "results" / "base" / "greedy.json"


def test_scores_are_in_the_window_of_the_recipe():
    """The stopping rule, on the scores that evaluate.py wrote."""
    scores = json.loads(GREEDY.read_text())["scores"]
    success = {}
    for format in FORMATS:
        rewards = [x for tasks in scores[format]["rewards"].values() for x in tasks.values()]
        assert len(rewards) == 400
        success[format] = sum(rewards) / 400
    assert make_base.ready(success)


def test_training_names_exclude_every_committed_task():
    """Scenarios are seeded by name: no demonstration or tokenizer text has the name of a committed one."""
    for split in SPLITS:
        assert not any(task.id.startswith(("base-", "tokenizer-")) for task in load_tasks(split))


def test_demonstrations_hold_every_state_and_stay_aligned(policy):
    counts = Counter()
    rng = random.Random(0)
    for task in load_tasks("train")[::2]:
        format = rng.choice(list(FORMATS))
        ids, mask = make_base.demonstrate(policy.chat, task, format, rng, NANO_RECIPE)
        assert len(ids) == len(mask)
        prompt = len(policy.chat.prompt_ids(*Episode(task, format).prompt(), format))
        assert not any(mask[:prompt]) and mask[-1]
        message = []
        for token, own in zip([*ids, -1], [*mask, False], strict=True):
            if own:
                message.append(token)
            elif message:
                stopped = message[-1] == policy.chat.end_id
                text = policy.chat.decode(message[:-1] if stopped else message)
                counts[message_state(text, format, overlong=not stopped)] += 1
                message = []
    total = sum(counts.values())
    for state in ("empty", "bare", "malformed", "polluted", "foreign", "overlong"):
        assert 0.001 < counts[state] / total < 0.04, (state, counts)
    assert counts["call"] > counts["reply"] > 0.1 * total


def test_premature_calls_end_in_the_hidden_tool_and_change_nothing():
    found = 0
    for task in load_tasks("test"):
        episode = Episode(task)
        turn = next((i for i, turn in enumerate(task.turns) if not turn.calls), None)
        if turn is None:
            continue
        for earlier in task.turns[:turn]:
            for call in earlier.calls:
                episode.step(render_calls([call], "hermes"))
            episode.step(earlier.reply)
        before = copy.deepcopy(episode.world)
        calls = make_base.premature(episode)
        if task.category == "miss_param":
            assert calls == []
            continue
        found += bool(calls)
        for i, call in enumerate(calls):
            answer = episode.step(render_calls([call], "hermes"))[0]["content"]
            assert ("no tool" in answer) == (i == len(calls) - 1)
        assert episode.world == before
    assert found > 50


def test_demonstrations_and_copying_are_pure_functions(policy):
    weights = dict.fromkeys(FORMATS, 1.0)
    batches = [make_base.demonstrations(policy.chat, 0, 3, weights, NANO_RECIPE) for _ in range(2)]
    assert batches[0] == batches[1]
    for ids, mask in make_base.copying(100, 0, 1):
        assert len(ids) == len(mask) == 160 and any(mask)


def test_what_recipes_change(policy):
    """Free ends are bare tags behind a turn that passes, a late format waits; the nano recipe has neither."""
    tag = policy.chat.encode(FORMATS["hermes"].prefix.strip())
    ends = [*tag, policy.chat.end_id]

    def bare(recipe, step=400):
        weights = {"hermes": 1.0}
        rows = make_base.demonstrations(policy.chat, 0, step, weights, make_base.RECIPES[recipe])
        found = 0
        for ids, mask in rows:
            places = range(len(ids) - len(ends))
            found += sum(all(mask[i : i + 2]) and ids[i : i + 2] == ends for i in places)
        return found

    assert bare("free-end") > 2 * bare("nano")
    recipe = make_base.RECIPES["strong-shallow"]
    weights = dict.fromkeys(FORMATS, 1.0)

    def hermes(step):
        rows = make_base.demonstrations(policy.chat, 0, step, weights, recipe)
        return sum(tag[0] in [t for t, on in zip(ids, mask) if on] for ids, mask in rows)

    assert hermes(recipe.late_from - 1) <= 2 < hermes(recipe.late_from), "a foreign flaw at most"
    assert all(one.hypothesis for one in make_base.RECIPES.values())


@pytest.mark.slow
@pytest.mark.parametrize("offset", [1, 2])
def test_look_back_heads_look_back(offset, fresh):
    """The first head of a fresh model attends to the previous token, the second to the one before."""
    seen = []

    def attend(layer, query, key, value):
        seen.append(query @ key.transpose(2, 3))  # [1, H, T, T]
        return causal(layer, query, key, value)

    with torch.no_grad():
        fresh.model(torch.randint(0, 1000, (1, 40)), attend=attend)
    hidden = torch.ones(40, 40, dtype=torch.bool).triu(1)
    attention = seen[0][0, offset - 1].masked_fill(hidden, float("-inf"))  # [T, T]
    assert (attention.argmax(-1)[offset:] == torch.arange(40)[offset:] - offset).all()


def test_readme_of_the_model_exists():
    assert "seed 0" in Path(NANO / "README.md").read_text()
