"""The probe set against whole softmax tables, and its layout against a rollout that says the ground truth."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers.models import Script, tiny_policy, whole_logits

from nanotoolrl.calls import FORMATS, Call
from nanotoolrl.chat import control_tokens
from nanotoolrl.env import Episode, Task, Turn, Verdict, oracle
from nanotoolrl.places import CLASSES, PLACES, Structure
from nanotoolrl.probes import (
    ProbeSet,
    advantage_mass,
    control_probabilities,
    displacement_own,
    growth,
    logit_gradient,
    placed_gradient,
    survival,
)
from nanotoolrl.sampler import Sampler
from nanotoolrl.trajectory import Trajectory, demonstration
from nanotoolrl.world.tasks import load_tasks

COLUMNS = "kl spurious_control required_control nll_control nll_content"
COLUMNS += " nll_structure nll_value nll_opener nll_text spurious_growth displacement_truth"


@pytest.fixture
def tiny(policy):
    return tiny_policy(policy.tokenizer)


@pytest.fixture(scope="module")
def tasks():
    """Two tasks of every category."""
    every = load_tasks("train")
    categories = dict.fromkeys(task.category for task in every)
    return [task for name in categories for task in [task for task in every if task.category == name][:2]]


def laid_out(policy, task, format):
    """(ids, mask, where messages begin) of a demonstration."""
    row = demonstration(policy.chat, task, format)
    starts = [t for t in range(1, len(row.tokens)) if row.loss_mask[t] and not row.loss_mask[t - 1]]
    return row.tokens, row.loss_mask, starts


@pytest.mark.parametrize("format", FORMATS)
def test_layout_is_that_of_a_rollout(policy, tasks, format):
    """A model that says the ground truth is rolled out to exactly these ids and this mask, and rewarded."""
    for task in tasks:
        ids, mask, starts = laid_out(policy, task, format)
        speaker = Script(policy, ids, context=len(ids) + 1)
        row = Sampler(speaker, max_new_tokens=500).rollout([Episode(task, format)], temperature=0)[0]
        assert (row.tokens, row.loss_mask) == (ids, mask)
        shown = demonstration(policy.chat, task, format)
        assert (row.reward, row.states, row.verdicts) == (shown.reward, shown.states, shown.verdicts)
        said = [message["content"] for message in oracle(task, format) if message["role"] == "assistant"]
        assert row.messages(policy.chat) == [(text, True) for text in said]
        assert row.reward == 1.0 and set(row.states) <= {"call", "reply"}
        assert len(starts) == len(row.states)


@pytest.mark.parametrize("format", FORMATS)
def test_mask_covers_the_assistants_messages(policy, tasks, format):
    end = policy.chat.end_id
    for task in tasks:
        ids, mask, starts = laid_out(policy, task, format)
        said = [message["content"] for message in oracle(task, format) if message["role"] == "assistant"]
        assert len(ids) == len(mask) and len(starts) == len(said)
        assert sum(mask) == sum(len(policy.chat.assistant_ids(text, format)) for text in said)
        for start, text in zip(starts, said, strict=True):
            stop = ids.index(end, start)
            assert policy.chat.decode(ids[start:stop]) == text
            assert not mask[start - 1] and all(mask[start : stop + 1]) and not any(mask[stop + 1 : stop + 2])
            assert policy.chat.decode(ids[:start]).endswith("<|im_start|>assistant\n")


# ------------------------------------------------------------------------------------------------- columns
CLOSERS = {"hermes": {"}}", '"}}'}, "python": {")]", '")]'}, "xml": {">"}}


def plain(policy, start, tasks, format):
    """(columns, numbers by control token), from whole [N, V] tables, position by position."""
    control = control_tokens(policy.chat, format)
    opening = policy.chat.encode(FORMATS[format].prefix)
    stop = policy.chat.end_id
    places = []
    for task in tasks:
        row = demonstration(policy.chat, task, format)
        ids, mask, starts = laid_out(policy, task, format)
        with torch.no_grad():
            ours, theirs = (
                torch.log_softmax(whole_logits(p, torch.tensor([ids]))[0], -1) for p in (policy, start)
            )
        for begin, state in zip(starts, row.states, strict=True):
            end = ids.index(stop, begin)
            for t in range(begin, end + 1):
                after_prefix = state == "call" and t == begin + len(opening)
                places.append((ours[t - 1], theirs[t - 1], ids[t], t == begin, t == end, state, after_prefix))
        assert sum(mask) == sum(ids.index(stop, t) - t + 1 for t in starts)

    def mean(values):
        return sum(values) / len(values) if values else math.nan

    tokens = {}
    for name, token in control.items():

        def honest(due, first, last, state, name=name, token=token):
            if token == opening[0]:
                return first or (state == "call" and last)
            if name in CLOSERS[format]:
                return state == "call" and not first and due not in control.values()
            return token == stop and state == "reply" and not first

        found = [(ours[token].exp().item(), *rest) for ours, _, *rest in places]
        wrong = [p for p, due, *where, _ in found if due != token and not honest(due, *where)]
        tokens[name] = {
            "required": mean([p for p, is_id, *_ in found if is_id == token]),
            "spurious": mean(wrong),
            "start_call": mean([p for p, _, first, _, s, _ in found if first and s == "call"]),
            "start_reply": mean([p for p, _, first, _, s, _ in found if first and s == "reply"]),
            "after_prefix": mean([p for p, *_, after in found if after]),
            "due_after_prefix": mean([is_id == token for _, is_id, *_, after in found if after]),
        }
    begun = tokens if policy is start else plain(start, start, tasks, format)[1]
    for name, values in tokens.items():
        values["growth"] = max(values["spurious"], 1e-6) / max(begun[name]["spurious"], 1e-6)
    nll = [(-ours[token].item(), token in control.values()) for ours, _, token, *_ in places]
    structure = Structure(start.chat, format)
    said = [demonstration(start.chat, task, format).spoken_ids() for task in tasks]
    classes = [c for row in said for ids in row for c in structure.classes(ids)]

    def by_class(name):
        return mean([x for (x, _), c in zip(nll, classes, strict=True) if CLASSES[c] == name])

    columns = {
        "kl": mean([(ours.exp() * (ours - theirs)).sum().item() for ours, theirs, *_ in places]),
        "spurious_control": mean([values["spurious"] for values in tokens.values()]),
        "required_control": mean([v["required"] for v in tokens.values() if not math.isnan(v["required"])]),
        "nll_control": mean([x for x, is_control in nll if is_control]),
        "nll_content": mean([x for x, is_control in nll if not is_control]),
        **{f"nll_{name}": by_class(name) for name in CLASSES},
        "spurious_growth": max(values["growth"] for values in tokens.values()),
        "displacement_truth": mean([(ours[t] - theirs[t]).item() for ours, theirs, t, *_ in places]),
    }
    return columns, tokens


def perturb(policy, size, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("at_once", [7, 100_000])
def test_measurement_equals_whole_tables(policy, tiny, tasks, monkeypatch, format, at_once):
    monkeypatch.setattr("nanotoolrl.probes.ROWS_AT_ONCE", at_once)
    probes = ProbeSet(tiny, tasks[:4], format)
    perturb(tiny, 0.02)
    found = probes.measure(tiny)
    columns, tokens = plain(tiny, tiny_policy(policy.tokenizer), tasks[:4], format)
    assert list(found.columns) == COLUMNS.split()
    assert found.columns == pytest.approx(columns, rel=1e-3, abs=1e-7)
    assert columns["kl"] > 1e-3 and columns["spurious_control"] > 0 and columns["required_control"] > 0
    assert list(found.tokens) == list(tokens)
    for name, values in tokens.items():
        assert found.tokens[name] == pytest.approx(values, rel=1e-3, abs=1e-7, nan_ok=True)


def test_measurement_of_the_builtin_model(policy, tasks):
    found = ProbeSet(policy, tasks[:3], "hermes").measure(policy)
    columns, tokens = plain(policy, policy, tasks[:3], "hermes")
    assert found.columns == pytest.approx(columns, rel=1e-3, abs=1e-6)
    assert found.tokens['{"']["due_after_prefix"] == 1.0 and found.tokens['{"']["after_prefix"] > 0.9
    assert found.tokens["<tool_call>"] == pytest.approx(tokens["<tool_call>"], rel=1e-3, abs=1e-6)


def test_nothing_moved(tiny, tasks):
    """At the start the divergence is 0 and nothing has grown; measuring changes nothing."""
    probes = ProbeSet(tiny, tasks, "hermes")
    first, second = probes.measure(tiny), probes.measure(tiny)
    assert first.columns["kl"] == first.columns["displacement_truth"] == 0.0
    assert first.columns["spurious_growth"] == 1.0 and first.columns == second.columns
    assert all(math.isfinite(value) for value in first.columns.values())


def test_divergence_grows_with_the_change(tiny, tasks):
    """The start is kept by value: training in place must not move it along."""
    probes, seen = ProbeSet(tiny, tasks[:3], "hermes"), []
    for size in (0.003, 0.01, 0.03):
        perturb(tiny, size)
        seen.append(probes.measure(tiny).columns["kl"])
    assert 0 < seen[0] < seen[1] < seen[2]


def test_set_is_frozen(policy, tiny, tasks):
    """Another model is compared with the start as well: it is not the object that is remembered."""
    probes = ProbeSet(tiny, tasks[:3], "hermes")
    other = tiny_policy(policy.tokenizer, seed=1)
    expected, _ = plain(other, tiny, tasks[:3], "hermes")
    assert probes.measure(other).columns["kl"] == pytest.approx(expected["kl"], rel=1e-3)


# --------------------------------------------------------------------------------------------------- growth
@pytest.mark.parametrize("name", ["<tool_call>", "<|im_start|>", "</tool_response>"])
def test_growth_names_the_token_that_is_pushed(tiny, tasks, name):
    probes = ProbeSet(tiny, tasks[:3], "hermes")
    before = probes.measure(tiny).columns
    with torch.no_grad():
        tiny.head[tiny.chat.special_ids[name], 0] += (
            50.0  # dimension 0 of the hidden state is always positive
        )
    found = probes.measure(tiny)
    assert max(found.tokens, key=lambda token: found.tokens[token]["growth"]) == name
    assert found.columns["spurious_growth"] >= 10
    assert found.columns["spurious_control"] > before["spurious_control"]


def test_growth_ignores_what_stays_tiny():
    assert growth(9e-7, 1e-9) == 1.0 and growth(3e-5, 1e-9) == pytest.approx(30)
    assert growth(1e-9, 1e-3) == pytest.approx(1e-3) and growth(0.3, 0.1) == pytest.approx(3)


# ------------------------------------------------------------------------------------------ logit gradients
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logit_gradient_equals_autograd(temperature):
    """Self and other are the loss's gradient at the logits, at the positions where the token was sampled and
    at the others."""
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(n, 5, generator=generator) for n in (40, 11))
    ids, control = torch.randint(11, (40,), generator=generator), torch.tensor([7, 0, 3])
    push = torch.randn(40, generator=generator)
    logits = (hidden @ head.T).requires_grad_()
    logprobs = torch.log_softmax(logits / temperature, -1).gather(1, ids[:, None])[:, 0]
    gradient = torch.autograd.grad((push * logprobs).sum(), logits)[0][:, control]  # [N, C]
    p = control_probabilities(hidden, head, ids, logprobs.detach(), control, temperature)
    torch.testing.assert_close(p, torch.softmax(logits / temperature, -1)[:, control].detach())
    own, other = logit_gradient(push, ids, p, control) / temperature
    sampled = ids[:, None] == control
    torch.testing.assert_close(own, (gradient * sampled).sum(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(other, (gradient * ~sampled).sum(0), atol=1e-5, rtol=1e-5)


def test_a_negative_advantage_pushes_what_nobody_sampled():
    """One token, p = 0.5 for itself and 0.3 for the control token: -1 pushes that up by 0.3."""
    gradient = logit_gradient(
        torch.tensor([-1.0]), torch.tensor([4]), torch.tensor([[0.3, 0.5]]), torch.tensor([2, 4])
    )
    torch.testing.assert_close(gradient, torch.tensor([[0.0, -0.5], [0.3, 0.0]]))


# --------------------------------------------------------------------------------------- a step's rollouts
def rolled(passed, turns, reward=0.0, tokens=(), mask=()):
    verdicts = [Verdict(flag) for flag in passed]
    more = {"reward": reward, "verdicts": verdicts, "turns": turns}
    return Trajectory("t", "base", "hermes", list(tokens), list(mask), [0.0] * len(tokens), 0, **more)


def test_placed_gradient_adds_up_to_both_sides():
    """By hand for one token, and summed over places and signs the two sides of `logit_gradient`."""
    generator = torch.Generator().manual_seed(0)
    control, ids = torch.tensor([4, 7]), torch.tensor([4, 5, 7, 4])
    push, p = torch.tensor([2.0, -1.0, 0.5, -0.5]), torch.rand(4, 2, generator=generator)
    place = torch.tensor([0, 3, 3, 6])
    found = placed_gradient(push, ids, p, control, place)
    assert found.shape == (len(PLACES), 2, 2)
    assert found[0, 0].tolist() == pytest.approx([2 * (1 - p[0, 0].item()), -2 * p[0, 1].item()])
    assert found[3, 1].tolist() == pytest.approx(p[1].tolist()), "nobody sampled these: up"
    assert found[6, 1, 0].item() == pytest.approx(-0.5 * (1 - p[3, 0].item()))
    torch.testing.assert_close(found.sum((0, 1)), logit_gradient(push, ids, p, control).sum(0))


def test_survival_by_hand():
    """Turn 2 passed after turn 1 failed does not count; fewer turns and help stay out."""
    rows = [rolled([1, 1], 2), rolled([0, 1], 2), rolled([1], 2), rolled([1], 1), rolled([], 3)]
    rows += [replace(rolled([1, 1], 2), source=source) for source in ("hint", "oracle")]
    assert survival(rows) == [3 / 5, 1 / 4, 0.0]
    assert survival([]) == []


def test_advantage_mass_by_hand():
    """Control tokens 8 and 9; 2 of the 3 sampled tokens of row 1, 1 of the 2 of row 2; 5 in all."""
    first = rolled([], 1, tokens=[9, 8, 5, 9], mask=[False, True, True, True])
    second = rolled([], 1, tokens=[8, 5, 9], mask=[True, True, False])
    kinds = SimpleNamespace(control_ids={8, 9}, classes=lambda ids: [{8: 0, 9: 0, 5: 1}[i] for i in ids])
    mass = advantage_mass([first, second], torch.tensor([2.0, -1.0]), kinds)
    expected = {"control_positive": 0.8, "control_negative": -0.2}
    expected |= {"content_positive": 0.4, "content_negative": -0.2}
    expected |= {"structure_positive": 0.8, "structure_negative": -0.2}
    expected |= {"value_positive": 0.4, "value_negative": -0.2}
    assert {name: x for name, x in mass.items() if x} == pytest.approx(expected)
    assert list(mass)[-4:] == ["opener_positive", "opener_negative", "text_positive", "text_negative"]


def test_displacement_of_own_successes(policy):
    tiny = tiny_policy(policy.tokenizer)
    task = load_tasks("train")[0]
    rows = Sampler(tiny, max_new_tokens=8).rollout([Episode(task, "hermes", 2) for _ in range(3)])
    assert math.isnan(displacement_own(tiny, rows, 1.0)), "no success"
    rows[1].reward = 1.0
    assert displacement_own(tiny, rows, 1.0) == pytest.approx(0, abs=1e-5)
    perturb(tiny, 0.02)
    ids, mask = torch.tensor([rows[1].tokens]), torch.tensor([rows[1].loss_mask])
    now = tiny.logprobs(ids, mask)[0]
    then = torch.tensor(rows[1].logprobs)[mask[0]]
    assert displacement_own(tiny, rows, 1.0) == pytest.approx((now - then).mean().item(), abs=1e-5)


def test_the_table_in_the_docstring_is_what_the_code_does(policy):
    """The example of `ProbeSet`, read and compared token by token."""
    files = {"Files": {"folders": {"docs": {"b": "x"}}}}
    turn = Turn("List docs.", [Call("list_files", {"folder": "docs"})], "Done.")
    probes = ProbeSet(policy, [Task("t", "base", files, ["list_files"], [turn])], "hermes")
    head, *lines = ProbeSet.__doc__.split("next token")[1].strip().splitlines()
    columns, table = head.split(), [line.replace("\\n", "newline").split() for line in lines]
    written = [policy.chat.decode([i]) for i in probes.targets.tolist()]
    content = written[3:12]
    assert content[0] == "name" and content[-1] == "docs"
    names = [*(row[0].replace("newline", "\n") for row in table)]
    assert written == [*names[:3], *content, *names[4:]]
    rows = [*table[:3], *[table[3]] * len(content), *table[4:]]
    for place, row in enumerate(rows):
        right = dict(zip(columns, row[1:], strict=True))
        for c, token in enumerate(probes.control):
            found = "R" if probes.is_next[place, c] else "s" if probes.wrong[place, c] else "c"
            assert found == right.get(token, "s"), (row[0], token)
