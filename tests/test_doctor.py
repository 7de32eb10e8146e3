"""The doctor's sentences, its page, and the states of conversations logged elsewhere."""

import dataclasses
import json
import math

import pytest

from nanotoolrl.files import finite
from nanotoolrl.look.doctor import FORCED, Checkup, lost_of, page, read_transcripts, transcripts_page, verdict

CALL = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'


def numbers(after_prefix, due=0.0, spurious=1e-4):
    more = {"required": 0.9, "start_call": 0.5, "start_reply": 0.1, "growth": 1.0}
    return more | {"after_prefix": after_prefix, "due_after_prefix": due, "spurious": spurious}


def checkup(name, hermes, python=0.3, forced=0.4, states=None, after=(0.99, 0.01)):
    shares = {"hermes": hermes, "python": python, FORCED: forced}
    success = {key: (x, max(0.0, x - 0.05), min(1.0, x + 0.05), 400) for key, x in shares.items()}
    tokens = {'{"': numbers(after[0], due=1.0), "<|im_end|>": numbers(after[1], spurious=after[1])}
    return Checkup(name, "hermes", success, states or {"call": 90, "reply": 10}, tokens)


def few(name, low, high):
    """One that played so few tasks that its success may be anything between."""
    found = checkup(name, (low + high) / 2 if low else 0.0, states=BARE)
    found.success["hermes"] = (found.success["hermes"][0], low, high, 8)
    return found


BARE = {"bare": 85, "malformed": 13, "reply": 2}
START = checkup("nano", 0.35)


@pytest.mark.parametrize(
    ("model", "reference", "said"),
    [
        (checkup("m", 0.33), START, ["no collapse in hermes: 33.0 %", "35.0 %", "0.0% of messages"]),
        (
            checkup("m", 0.0, 0.25, states=BARE, after=(0.02, 0.95)),
            START,
            [
                "collapsed in hermes: 0.0 %",
                "98.0% of messages are broken, most of them bare",
                '`<tool_call>` is followed by `<|im_end|>` (p 0.95), not `{"`',
                "skill intact: 40.0 % [35.0, 45.0] with forced prefix, 40.0 %",
            ],
        ),
        (checkup("m", 0.0, 0.02, 0.03, BARE), START, ["collapsed", "the skill went with it: 2.0 %"]),
        (checkup("m", 0.2, 0.1, 0.1), START, ["worse in hermes: 20.0 %", "the skill went with it"]),
        (
            checkup("m", 0.2, 0.29, 0.1),
            START,
            ["worse in hermes", "skill intact: 29.0 % [24.0, 34.0] with python"],
        ),
        (
            checkup("m", 0.0, 0.29, states={"call": 97, "reply": 3}),
            START,
            ["collapsed in hermes", "structure is broken", "3.0% are replies, 10.0% before", "skill intact"],
        ),
        (
            checkup("m", 0.33, states={"bare": 95, "reply": 5}),
            START,
            ["success holds in hermes", "structure is broken in hermes: 95.0% of messages"],
        ),
        (
            checkup("m", 0.0, 0.02, 0.03, {"call": 88, "malformed": 2, "reply": 10}),
            START,
            ["collapsed in hermes", "structure is healthy in hermes: 2.0%", "the skill went with it"],
        ),
        (few("m", 0.0, 0.33), few("nano", 0.2, 0.6), ["too few tasks to tell in hermes: 0.0 %"]),
        (checkup("m", 0.3), None, ["structure is healthy in hermes: 0.0%", "30.0 %"]),
        (
            checkup("m", 0.0, states=BARE),
            None,
            ["structure is broken in hermes: 98.0%", "30.0 % [25.0, 35.0] with python"],
        ),
    ],
)
def test_verdict(model, reference, said):
    sentence = verdict(model, reference)
    assert all(part in sentence for part in said), sentence


def test_skill_that_was_never_there_is_not_intact():
    """A format in which the start solved nothing proves nothing."""
    start = checkup("nano", 0.35, python=0.0, forced=0.4)
    assert "skill went with it" in verdict(checkup("m", 0.0, python=0.0, forced=0.1), start)


@pytest.mark.parametrize(
    ("structure", "values", "lost"),
    [
        (0.02, 0.34, "structure"),
        (0.34, 0.02, "values"),
        (0.1, 0.1, "both"),
        (0.3, 0.3, "nothing"),
        (0.1, 0.3, "part"),
    ],
)
def test_what_was_lost(structure, values, lost):
    """Of 35 %: a quarter is 8.75 %, two thirds are 23.3 %."""
    model = checkup("m", 0.0, states=BARE)
    assert lost_of(model, START) == ""
    model.success |= {"its structure": (structure, 0, 1, 400), "its values": (values, 0, 1, 400)}
    assert lost_of(model, START) == lost
    sentence = verdict(model, START)
    assert f"its structure solves {100 * structure / 0.35:.0f} % of that" in sentence
    assert "with its" not in sentence, "a swap is no way around a broken structure"


def test_page_shows_what_the_verdict_rests_on():
    model = checkup("m", 0.0, states=BARE, after=(0.02, 0.95))
    model.tokens['{"']["required"] = math.nan
    text = page(model, START)
    assert text.startswith("verdict: collapsed")
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    assert lines["bare"] == ["bare", "85.0", "0.0"]
    assert lines["'<|im_end|>'"][1:4] == ["0.9", "0.95", "95"], "required, spurious, growth"
    assert lines["'{\"'"][1] == "-", "never next: not 0"
    assert "growth" not in page(model, None)


# --------------------------------------------------------------------------------------- logged conversations
def written(tmp_path, *conversations):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in conversations))
    return path


def said(*texts):
    return [{"role": "user", "content": "do"}] + [{"role": "assistant", "content": text} for text in texts]


def test_transcripts_by_hand(tmp_path):
    structured = {"function": {"name": "f", "arguments": '{"a": 1}'}}
    path = written(
        tmp_path,
        said(CALL, "Done."),
        {"messages": said(CALL, "<tool_call>\n", "<tool_call>\n")},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [structured]}]},
        [{"role": "assistant", "content": [{"type": "text", "text": ""}]}],
        [{"role": "assistant", "content": "and so on", "finish_reason": "length"}],
    )
    found = read_transcripts(path, "hermes")
    assert found.conversations == 5
    assert found.states == {"call": 3, "reply": 1, "bare": 2, "empty": 1, "overlong": 1}
    assert found.first_broken == "line 2, assistant message 2: bare: '<tool_call>\\n'"
    assert found.breakages["bare", "<tool_call>"] == 2 and found.broken_at == {2: 1, 1: 2}
    text = transcripts_page(found)
    assert text.startswith("verdict: structure is broken: 4 of 8 assistant messages in 5 conversations")
    assert "2 x bare: '<tool_call>'" in text


@pytest.mark.parametrize(
    ("message", "state"),
    [
        ({"content": "Let me look.", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}, "call"),
        ({"content": "<tool_call>", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}, "bare"),
        ({"content": None, "function_call": {"name": "f", "arguments": "{}"}}, "call"),
        ({"tool_calls": [{"name": "f", "arguments": {"x": 1}}]}, "call"),
        ({"content": "Fine.", "tool_calls": []}, "reply"),
        ({"content": "Fine.", "tool_calls": None}, "reply"),
    ],
)
def test_structured_calls_and_the_text_beside_them(tmp_path, message, state):
    path = written(tmp_path, [{"role": "assistant"} | message])
    assert read_transcripts(path, "hermes").states == {state: 1}


def test_nasty_text_is_escaped_and_a_byte_order_mark_is_no_error(tmp_path):
    line = json.dumps([{"role": "assistant", "content": "<tool_call>\ud800\x1b[31m\x07"}])
    (tmp_path / "log.jsonl").write_bytes(b"\xef\xbb\xbf" + line.encode())
    text = transcripts_page(read_transcripts(tmp_path / "log.jsonl", "hermes"))
    assert "\x1b" not in text and "\\x1b[31m" in text
    text.encode()


@pytest.mark.parametrize(
    "call",
    [
        {"function": {"name": "f", "arguments": "{"}},
        {"function": {"name": 3}},
        "call",
        {"function": None},
        None,
    ],
)
def test_unreadable_structured_calls_are_broken_not_errors(tmp_path, call):
    path = written(tmp_path, [{"role": "assistant", "content": None, "tool_calls": [call]}])
    states = read_transcripts(path, "hermes").states
    assert sum(states.values()) == 1 and "call" not in states and "reply" not in states


def test_healthy_transcripts_have_no_list_of_breakages(tmp_path):
    text = transcripts_page(read_transcripts(written(tmp_path, said(CALL, "Done.")), "hermes"))
    assert text.startswith("verdict: structure is healthy: 0 of 2") and "frequent" not in text


def test_one_is_one_and_two_are_two(tmp_path):
    def page_of(*conversations):
        return transcripts_page(read_transcripts(written(tmp_path, *conversations), "hermes"))

    assert "1 of 1 assistant message in 1 conversation is broken (100.0%)" in page_of(said("<tool_call>"))
    assert "0 of 2 assistant messages in 1 conversation are broken" in page_of(said(CALL, "Done."))
    assert "2 of 2 assistant messages in 2 conversations are" in page_of(said(""), said(""))


NASTY = "\x1b]0;title\x07\x9b31m\r\u202e\U000e0001\ud800" * 20


def test_a_page_about_logs_has_80_columns_and_nothing_that_a_terminal_obeys(tmp_path):
    calls = [{"name": NASTY, "arguments": "{"}, {"name": "f", "arguments": f'{{"{NASTY}'}]
    broken = [{"role": "assistant", "content": None, "tool_calls": [call]} for call in calls]
    path = written(tmp_path, said(f"<tool_call>{NASTY}", "<tool_call>\n" * 99), *([one] for one in broken))
    verdict, *lines = transcripts_page(read_transcripts(path, "hermes")).splitlines()
    assert "4 of 4 assistant messages" in verdict and max(map(len, lines)) <= 80
    assert all(line.isprintable() for line in lines)


def test_a_page_about_a_model_has_80_columns_and_nothing_that_a_terminal_obeys():
    """Names of models and tokens are somebody's text, too; a prefix that no call begins with is no news."""
    model, start = (
        checkup(f"runs/{NASTY}", 0.0, 1.0, states=BARE, after=(0.02, 0.95)),
        checkup("nano", 1.0, 1.0),
    )
    for one in (model, start):
        one.tokens |= {NASTY[:3]: numbers(0.97, spurious=1.234e-5), "</tool_response>": numbers(0.0)}
    lines = page(model, start).splitlines()
    assert r"is followed by `\x1b]0` (p 0.97)" in lines[0]
    assert max(map(len, lines[1:])) <= 80 and all(line.isprintable() for line in lines)
    growth = next(line for line in lines if line.startswith("'</tool_response>'")).split()
    assert growth == ["'</tool_response>'", "0.9", "0.0001", "1", "0.5", "0.1", "0"]
    for row in model.tokens.values():
        row["due_after_prefix"] = row["after_prefix"] = math.nan
    assert "followed" not in verdict(model, start)
    model.tokens = {}
    assert "followed" not in verdict(model, start)


def test_numbers_that_were_not_measured_are_null_in_json():
    model = checkup("m", 0.3)
    model.tokens['{"']["required"] = math.nan
    stored = json.loads(json.dumps(finite(dataclasses.asdict(model))), parse_constant=pytest.fail)
    assert stored["tokens"]['{"']["required"] is None and stored["success"]["hermes"] == [
        0.3,
        0.25,
        0.35,
        400,
    ]
