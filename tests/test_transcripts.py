"""Logged conversations in the ways people log them, and what is refused."""

import gzip
import json
from collections import Counter

import pytest

from nanotoolrl.calls import FORMATS
from nanotoolrl.loading import NANO, load_chat
from nanotoolrl.look.doctor import read_transcripts
from nanotoolrl.look.transcripts import conversations
from nanotoolrl.trajectory import demonstration
from nanotoolrl.world.tasks import load_tasks

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
NO_ARGUMENTS = CALL.replace('{"a": 1}', "{}")
USER = {"role": "user", "content": "do"}
PROMPT = [("system", "You are an assistant."), ("user", "do")]
PLAYED = [("user", "<tool_response>\n[1]\n</tool_response>"), ("assistant", "Done.")]
BOTH = [(CALL, "call"), ("Done.", "reply")]
OPEN = "<|im_start|>assistant\n"
LLAMA_OPEN = "<|start_header_id|>assistant<|end_header_id|>\n\n"


def chatml(*turns):
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)


def llama(*turns):
    return "".join(f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>" for role, text in turns)


def stripped(*turns):
    return "".join(f"{role}\n{text}\n" for role, text in turns)


def read(tmp_path, data, format="hermes"):
    """[(text, state)] of every conversation in a file with this content."""
    path = tmp_path / "log"
    path.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
    return [[(one.text, one.state) for one in said] for _, said in conversations(path, format)]


SHAREGPT = [
    {"from": "system", "value": "x"},
    {"from": "human", "value": "do"},
    {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
    {"from": "observation", "value": "[1]"},
    {"from": "gpt", "value": "Done."},
    {"from": "tool", "value": [1]},
    {"from": "function", "value": "x"},
    {"from": "gpt", "value": CALL},
]


@pytest.mark.parametrize(
    ("conversation", "said"),
    [
        ([USER, {"role": "assistant", "content": CALL}, {"role": "assistant", "content": "Done."}], BOTH),
        ({"messages": [USER, {"role": "assistant", "content": "Done."}], "tools": []}, BOTH[1:]),
        ({"messages": []}, []),
        ({"conversations": SHAREGPT}, [*BOTH, BOTH[0]]),
        ({"conversation": [{"from": "function_call", "value": "f()"}]}, [("None f()", "malformed")]),
        ([{"from": "function_call", "value": {"name": "f", "parameters": {"a": 1}}}], BOTH[:1]),
        # TRL and verifiers; what stands in the prompt was given
        ({"prompt": "do", "completion": "Done."}, BOTH[1:]),
        ({"prompt": "do", "completion": ""}, [("", "empty")]),
        ({"prompt": [USER, {"role": "assistant", "content": "<tool_call>"}], "completion": CALL}, BOTH[:1]),
        ({"prompt": [USER], "completion": [{"role": "assistant", "content": CALL}, USER]}, BOTH[:1]),
        ({"prompt": chatml(*PROMPT, ("assistant", "<tool_call>")) + OPEN, "completion": ""}, [("", "empty")]),
        ({"prompt": chatml(*PROMPT, ("assistant", "<tool_call>")), "completion": "Done."}, BOTH[1:]),
        # verl, with the layout's tokens
        (
            {
                "input": chatml(*PROMPT) + OPEN,
                "output": f"{CALL}<|im_end|>\n{chatml(*PLAYED)}<|endoftext|><|endoftext|>",
                "score": 1.0,
            },
            BOTH,
        ),
        ({"input": chatml(*PROMPT), "output": chatml(("assistant", CALL), *PLAYED) + OPEN}, BOTH),
        (
            {
                "input": llama(*PROMPT) + LLAMA_OPEN,
                "output": f"{CALL}<|eot_id|>{llama(('ipython', '[1]'), ('assistant', 'Done.'))}",
            },
            BOTH,
        ),
        ({"input": chatml(*PROMPT) + f"{OPEN}<tool_call>\n", "output": CALL[12:]}, BOTH[:1]),
        (
            {"input": chatml(*PROMPT) + OPEN, "output": f"<|im_end|>\n{chatml(*PLAYED)}"},
            [("", "empty"), BOTH[1]],
        ),
        # and without
        (
            {"input": stripped(*PROMPT) + "assistant\n", "output": f"{CALL}\n{stripped(*PLAYED)}"},
            [(f"{CALL}\n", "call"), ("Done.\n", "reply")],
        ),
        (
            {"input": stripped(*PROMPT) + "assistant\n", "output": "\nuser\nx\nassistant\nDone."},
            [("\n", "empty"), BOTH[1]],
        ),
        # a token that begins no header is text: a model sampled it
        ({"input": OPEN, "output": "a<|im_start|>bot\nb"}, [("a<|im_start|>bot\nb", "reply")]),
        ({"text": chatml(*PROMPT, ("assistant", CALL), *PLAYED)}, BOTH),
        ({"text": llama(*PROMPT, ("assistant", CALL), ("ipython", "[1]"), ("assistant", "Done."))}, BOTH),
        ({"text": chatml(*PROMPT) + OPEN}, []),
        (
            {"text": chatml(("assistant", "So I"), ("assistant", "Done.")), "states": ["overlong", "reply"]},
            [("So I", "overlong"), BOTH[1]],
        ),
    ],
)
def test_a_conversation(tmp_path, conversation, said):
    """The same alone in a file, and pretty-printed in an array."""
    assert read(tmp_path, conversation) == [said]
    assert read(tmp_path, json.dumps([conversation, conversation], indent=2).encode()) == [said, said]


F = {"name": "f"}


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"content": None}, ("", "empty")),
        ({"content": []}, ("", "empty")),
        ({"content": None, "refusal": "No."}, ("No.", "reply")),
        ({"content": "So", "finish_reason": "length"}, ("So", "overlong")),
        ({"content": [{"type": "text", "text": "So"}], "stop_reason": "max_tokens"}, ("So", "overlong")),
        # stop tokens and an opening are the layout's
        ({"content": f"{CALL}<|im_end|>"}, (CALL, "call")),
        ({"content": f"{OPEN}{CALL}<|im_end|>\n"}, (CALL, "call")),
        ({"content": f"{LLAMA_OPEN}{CALL}<|eot_id|>"}, (CALL, "call")),
        ({"content": f"{CALL}</s>"}, (CALL, "call")),
        ({"content": f"{CALL}<|im_end|>{'<|endoftext|> ' * 9999}"}, (CALL, "call")),
        ({"content": "<|im_end|>"}, ("", "empty")),
        ({"content": f"<|im_end|>{CALL}"}, (f"<|im_end|>{CALL}", "polluted")),
        # OpenAI
        *(
            ({"content": None, "tool_calls": [{"id": "1", "type": "function", "function": F | more}]}, said)
            for more, said in [
                ({"arguments": '{"a": 1}'}, (CALL, "call")),
                ({"arguments": {"a": 1}}, (CALL, "call")),
                ({"arguments": ""}, (NO_ARGUMENTS, "call")),
                ({"arguments": " "}, (NO_ARGUMENTS, "call")),
                ({"arguments": None}, (NO_ARGUMENTS, "call")),
                ({"arguments": "null"}, (NO_ARGUMENTS, "call")),
                ({"arguments": "{}"}, (NO_ARGUMENTS, "call")),
                ({}, (NO_ARGUMENTS, "call")),
                ({"arguments": None, "input": {"a": 1}, "args": None}, (CALL, "call")),
                ({"arguments": "[1]"}, ("f [1]", "malformed")),
                ({"arguments": 3}, ("f 3", "malformed")),
                ({"arguments": '{"a": 1}}\n</tool_call>'}, ('f {"a": 1}}\n</tool_call>', "malformed")),
                ({"name": "", "arguments": f"}}{CALL}"}, (f" }}{CALL}", "malformed")),
            ]
        ),
        ({"tool_calls": [F | {"arguments": {"a": 1}}]}, (CALL, "call")),
        ({"tool_calls": F | {"arguments": {"a": 1}}}, (CALL, "call")),
        ({"tool_calls": [{"function": F, "arguments": {"a": 1}}]}, (CALL, "call")),
        ({"tool_calls": json.dumps([{"function": F | {"arguments": '{"a": 1}'}}])}, (CALL, "call")),
        ({"tool_calls": [json.dumps({"function": F | {"arguments": '{"a": 1}'}})]}, (CALL, "call")),
        ({"content": "Done.", "tool_calls": "[]", "function_call": None}, BOTH[1]),
        ({"content": "Done.", "tool_calls": "", "function_call": {}}, BOTH[1]),
        ({"content": None, "function_call": F | {"arguments": '{"a": 1}'}}, (CALL, "call")),
        ({"content": None, "tool_calls": [], "function_call": json.dumps(F)}, (NO_ARGUMENTS, "call")),
        ({"content": "</tool_call>", "tool_calls": [F]}, ("</tool_call>", "bare")),
        # Anthropic
        (
            {
                "content": [
                    {"type": "thinking", "thinking": "hm"},
                    {"type": "text", "text": "Let me look."},
                    {"type": "tool_use", "id": "1", "name": "f", "input": {"a": 1}},
                ]
            },
            (CALL, "call"),
        ),
        ({"content": [{"type": "tool_use", "name": "f", "input": {}}]}, (NO_ARGUMENTS, "call")),
        ({"content": [{"type": "tool_use", "name": "f", "input": '{"a'}]}, ('f {"a', "malformed")),
        ({"content": ["Do", {"type": "text", "text": "ne."}]}, BOTH[1]),
    ],
)
def test_a_message(tmp_path, message, said):
    given = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "[1]"}]}
    assert read(tmp_path, [given, {"role": "assistant"} | message]) == [[said]]


@pytest.mark.parametrize("format", FORMATS)
def test_structured_calls_are_of_the_format(tmp_path, format):
    calls = [{"function": F | {"arguments": '{"a": "</tool_call>)]"}'}}, {"function": F}]
    assert (
        read(tmp_path, [{"role": "assistant", "content": "", "tool_calls": calls}], format)[0][0][1] == "call"
    )


@pytest.mark.parametrize("format", FORMATS)
def test_our_own_rollouts(tmp_path, format):
    chat = load_chat(NANO)
    rows = [demonstration(chat, task, format) for task in load_tasks("train")[:20]]
    lines = [json.dumps({"step": 1, "text": chat.decode(row.tokens), "states": row.states}) for row in rows]
    (tmp_path / "rollouts.jsonl").write_text("\n".join(lines))
    found = read_transcripts(tmp_path / "rollouts.jsonl", format)
    assert found.states == Counter(state for row in rows for state in row.states)


ONE = {"messages": [{"role": "assistant", "content": "Dóne."}]}
LINE = json.dumps(ONE, ensure_ascii=False)
SAID = [("Dóne.", "reply")]


def zipped(text: str, encoding: str = "utf-8") -> bytes:
    """Without the time of day: it would be in the tests' names, and two workers would collect two suites."""
    return gzip.compress(text.encode(encoding), mtime=0)


@pytest.mark.parametrize(
    ("data", "many"),
    [
        (f"{LINE}\n{LINE}\n".encode(), 2),
        (f"\n  \n{LINE}\r\n\r\n{LINE}".encode(), 2),
        (json.dumps(ONE, indent=2).encode() * 3, 3),
        (json.dumps([ONE, ONE["messages"]]).encode(), 2),
        (json.dumps(ONE["messages"], indent=1).encode(), 1),
        (f"\ufeff{LINE}".encode(), 1),
        (f"{LINE}\n{LINE}\n".encode("utf-16"), 2),
        (f"\ufeff{LINE}".encode("utf-16-be"), 1),
        (zipped(LINE), 1),
        (zipped(f"{LINE}\n", "utf-16"), 1),
        (zipped(LINE) * 2, 2),
    ],
)
def test_a_file(tmp_path, data, many):
    assert read(tmp_path, data) == [SAID] * many


def test_bytes_that_are_no_text_are_replaced(tmp_path):
    assert read(tmp_path, LINE.encode("latin-1")) == [[("D\ufffdne.", "reply")]]


def test_places_are_lines_and_conversations(tmp_path):
    (tmp_path / "log").write_text(f"{json.dumps([ONE, ONE], indent=1)}\n\n{LINE}\n")
    lines = json.dumps([ONE, ONE], indent=1).count("\n") + 3
    places = [place for place, _ in conversations(tmp_path / "log", "hermes")]
    assert places == ["line 1, conversation 1", "line 1, conversation 2", f"line {lines}"]


ASSISTANT = {"role": "assistant"}
CALLING = ASSISTANT | {"content": None}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        # no JSON
        (b"", "no message of role assistant"),
        (b" \n\n", "no message of role assistant"),
        (b"{", "line 1, column 2: no JSON"),
        (b"Hello.\n", "line 1, column 1: no JSON"),
        (f"{LINE}\n{LINE[:-9]}".encode(), "line 2, column"),
        (f"{LINE}\n{LINE[:-1]}\n{LINE}\n".encode(), "the value begins on line 2"),
        (f"{LINE}\n{LINE},".encode(), "line 2"),
        (b"\x00\x01\x02", "line 1"),
        (b"\xff", "line 1"),
        (b"PAR1\x15\x04\x15", "line 1"),
        ('{"a": 1}'.encode("utf-16-le"), "line 1"),
        (b"[" * 100_000, "line 1: the JSON is nested too deeply"),
        (b'{"messages":' * 100_000, "nested too deeply"),
        (b"[" * 500 + b"]" * 500, "message 1"),
        (b"1" * 10_000, "line 1: Exceeds the limit"),
        (zipped(LINE)[:-3], "cannot be read"),
        (zipped(LINE)[:5], "cannot be read"),
        (b"\x1f\x8b", "cannot be read"),
        (b"\x1f\x8b\x08" + b"x" * 99, "cannot be read"),
        # no conversation
        (b"null\n", "found null"),
        (b"3\n", "found a number"),
        (b"true\n", "found true or false"),
        (b'"Hello."\n', "found text"),
        (b"NaN\n", "found a number"),
        ([], "no message of role assistant"),
        ({}, "an object without keys"),
        ([3], "conversation 1: expected a list of messages"),
        ([[3]], "conversation 1: message 1"),
        ([[[ASSISTANT]]], "conversation 1: message 1"),
        ([ONE, None], "line 1, conversation 2"),
        ({"data": [ONE]}, "'data'"),
        ({"chosen": [], "rejected": []}, "'chosen', 'rejected'"),
        ({str(i): i for i in range(20)}, "and 12 more"),
        ({"\x1b[31m": 1}, r"'\x1b[31m'"),
        ({"messages": None}, "found null"),
        ({"messages": "[]"}, "found text"),
        ({"messages": 3}, "found a number"),
        ({"messages": {"0": USER}}, "found an object with the keys '0'"),
        ({"completion": "Done."}, "'completion'"),
        ({"prompt": None, "completion": "Done."}, "null and text"),
        ({"prompt": "do", "completion": {"role": "assistant"}}, "text and an object"),
        ({"input": 3, "output": "Done."}, "a number and text"),
        ({"text": "Done."}, "'text'"),
        ({"text": "<|im_start|>bot\nDone.<|im_end|>"}, "'text'"),
        ({"text": 3}, "'text'"),
        # no message
        ([USER], "no message of role assistant"),
        ([USER, 3], "message 2"),
        ([USER, None], "message 2"),
        ([USER, [USER]], "message 2"),
        ([{"content": "no role"}], "message 1"),
        ([{"role": "bot", "content": "Done."}], "unknown role 'bot'"),
        ([{"role": "Assistant", "content": "Done."}], "unknown role 'Assistant'"),
        ([{"from": "chatgpt", "value": "Done."}], "unknown from 'chatgpt'"),
        ([{"role": None, "content": "Done."}], "unknown role None"),
        ([{"role": 3, "content": "Done."}], "unknown role 3"),
        ([{"role": ["assistant"], "content": "Done."}], "unknown role ['assistant']"),
        ([{"role": "\x1b[31m", "content": "Done."}], r"'\x1b[31m'"),
        ([ASSISTANT], "message 1: expected a message"),
        ([{"role": "user"}], "message 1: expected a message"),
        ([{"from": "function_call"}], "message 1: expected a message"),
        ([ASSISTANT | {"tool_calls": []}], "'role', 'tool_calls'"),
        ([ASSISTANT | {"text": "Done."}], "'role', 'text'"),
        ([ASSISTANT | {"content": 3}], "found a number"),
        ([ASSISTANT | {"content": False}], "found true or false"),
        ([ASSISTANT | {"content": {"text": "Done."}}], "'text'"),
        ([ASSISTANT | {"content": [3]}], "found a number, of type None"),
        ([ASSISTANT | {"content": [{"type": "text"}]}], "of type 'text'"),
        ([ASSISTANT | {"content": [{"type": "text", "text": 3}]}], "of type 'text'"),
        ([ASSISTANT | {"content": [{"type": "image_url", "image_url": "x"}]}], "of type 'image_url'"),
        ([{"from": "gpt", "value": 3}], "found a number"),
        ([{"from": "function_call", "value": 3}], "expected a list of calls"),
        # no calls
        ([CALLING | {"tool_calls": 3}], "expected a list of calls; found a number"),
        ([CALLING | {"tool_calls": 0}], "expected a list of calls; found a number"),
        ([CALLING | {"tool_calls": "f()"}], "expected a list of calls; found text"),
        ([CALLING | {"tool_calls": [F | {"args": {"a": 1}}]}], "'name', 'args'"),
        ([CALLING | {"tool_calls": [{"function": F, "args": "{}"}]}], "'args', 'name'"),
        ([CALLING | {"tool_calls": [{"function": F | {"kwargs": {}}}]}], "'kwargs'"),
        ([CALLING | {"function_call": F | {"args": {"a": 1}}}], "'name', 'args'"),
        ([{"from": "function_call", "value": '{"name": "f", "args": {}}'}], "'name', 'args'"),
        ([ASSISTANT | {"content": [{"type": "tool_use", "name": "f", "args": {}}]}], "'args'"),
    ],
)
def test_what_is_no_conversation_is_refused_by_name(tmp_path, data, said):
    path = tmp_path / "log"
    path.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
    with pytest.raises(ValueError) as refused:
        read_transcripts(path, "hermes")
    assert said in str(refused.value) and str(path) in str(refused.value)
    assert str(refused.value).isprintable()


def test_what_is_no_file_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="nothing cannot be read: No such file"):
        read_transcripts(tmp_path / "nothing", "hermes")
    with pytest.raises(ValueError, match=f"{tmp_path.name} cannot be read: Is a directory"):
        read_transcripts(tmp_path, "hermes")


DEEP = 700  # JSON can be read so deep, and hardly be written


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "message",
    [
        {"content": "\ud800"},
        {"content": None, "tool_calls": [F | {"arguments": '{"\\ud800": NaN}'}]},
        {"content": None, "tool_calls": [F | {"arguments": '{"a": ' + "1" * 5000 + "}"}]},
        {"content": None, "tool_calls": [F | {"arguments": "[" * 100_000}]},
        {"content": None, "tool_calls": [F | {"arguments": '{"a": ' * DEEP + "1" + "}" * DEEP}]},
        {
            "content": None,
            "tool_calls": [{"name": "\ud800 [<", "arguments": {"[": "\ud800"}}, [[]], 3, None, {}],
        },
        {"content": "<tool_call>" * 30_000},
        {"content": "[a(" * 30_000},
        {"content": " " * 300_000 + "x" + "</s>" * 30_000},
    ],
    ids=range(9),
)
def test_odd_messages_have_a_state(tmp_path, format, message):
    ((said,),) = read(tmp_path, [ASSISTANT | message], format)
    assert said[1] in ("call", "reply", "bare", "malformed", "polluted", "foreign")
    read_transcripts(tmp_path / "log", format)


def test_the_reading_takes_time_in_proportion_to_the_file(tmp_path):
    """Many lines, and many tokens of a layout in a text: answered at all, with the right value."""
    assert len(read(tmp_path, f"{LINE}\n\n".encode() * 20_000)) == 20_000
    text = OPEN + "<|im_start|>" * 100_000 + "user\n" * 100_000
    assert [len(said) for said in read(tmp_path, {"input": text, "output": text + OPEN + "Done."})] == [2]
