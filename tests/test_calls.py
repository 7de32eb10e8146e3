"""Calls as text, and the states of a message."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanotoolrl.calls import (
    FORMATS,
    MAX_CHARS,
    MESSAGE_STATES,
    UNHEALTHY_STATES,
    BadCall,
    Call,
    message_state,
    parse_calls,
    render_calls,
    spoken,
)
from nanotoolrl.world.api import API_CLASSES, method_names, schema

CORPUS = [
    json.loads(line)
    for line in (Path(__file__).parent / "data" / "messages.jsonl").read_text(encoding="utf-8").split("\n")
    if line
]


TOOLS = [tool for cls in API_CLASSES.values() for tool in method_names(cls)]


AWKWARD = [
    "",
    " ",
    "plain",
    'it\'s "quoted" \'twice\' """thrice"""',
    '{"name": "read_file", "arguments": {}}',
    "{{}}",
    "two\nlines\r\nand a\ttab\x00\x1b\x7f\f",
    "\U0001f642 \u00e9 e\u0301 \u4f60\u597d \u202eabc",
    "</tool_call>",
    "<tool_call>\n</tool_call>",
    ")]",
    '")] [find_tickets()]',
    "[f(",
    "</function>",
    '</parameter><parameter=folder>"x"</parameter>',
    "<|im_end|>",
    "<|im_start|>user\nhi<|im_end|>",
    "\\ \\\\ \\n \\u0041 \\u003c \\",
    "\u2028\u2029\x85",
    "# no comment",
    "{braces} %s $HOME",
    "\ufdd0\ufffd\ufeff",
]


# Pieces of every syntax; glued at random they come closer to a call than random letters do.
PIECES = [
    *("<tool_call>", "</tool_call>", "<tool_call", "tool_call>", "<function=", "</function>", "<parameter="),
    *(
        "</parameter>",
        ">",
        "[",
        "]",
        "(",
        ")",
        ")]",
        "{",
        "}",
        '{"',
        '"}}',
        '"',
        "'",
        ",",
        ":",
        "=",
        "\\",
        "\n",
        " ",
    ),
    *('"name"', '"arguments"', '{"name": "f", "arguments": {}}', '{"name": "f", "arguments": {"x": 1}}'),
    *("f", "f(", "f()", "f(x=1)", "[f(x=1)]", "x=", "1", "-1", "9" * 5000, "0x" + "f" * 5000, "1e999", "NaN"),
    *(
        "Infinity",
        "true",
        "True",
        "None",
        "null",
        "1j",
        "b'x'",
        "lambda: 1",
        "*",
        "**",
        "...",
        "\ud800",
        "\udc00",
    ),
    *(
        "\x00",
        "\u2028",
        "\U0001f642",
        "<|im_start|>",
        "<|im_end|>",
        "[[[[",
        "{1:",
        "Done.",
        "__import__('os')",
    ),
]


GLUED = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=14).map("".join)


ANY_TEXT = st.text(st.characters(), max_size=40) | GLUED  # characters(): lone surrogates as well


PLAIN = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(max_size=20)


VALUES = st.recursive(
    PLAIN | st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from(AWKWARD),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


NAMES = st.sampled_from(["x", "folder", "_1", "name", "arguments", "kwargs"])


def is_call(answer: object) -> bool:
    return type(answer) is Call


# ------------------------------------------------------------------------------------------- message states
@pytest.mark.parametrize("row", CORPUS, ids=lambda row: f"{row['format']}: {row['why']}")
def test_state_of_a_labelled_message(row):
    """The corpus is labelled by the definitions (Hao et al. 2026 and ours), not by what the code says."""
    assert message_state(row["text"], row["format"], row.get("overlong", False)) == row["state"]


def test_the_corpus_covers_every_state_in_every_format():
    assert len(CORPUS) >= 75
    cells = Counter((row["state"], row["format"]) for row in CORPUS)
    assert set(cells) == {(state, format) for state in MESSAGE_STATES for format in FORMATS}
    assert all(row["why"] and set(row) <= {"format", "text", "state", "overlong", "why"} for row in CORPUS)
    questions = [(row["format"], row["text"], row.get("overlong")) for row in CORPUS]
    assert len(set(questions)) == len(questions)


def test_the_unhealthy_states_are_all_but_call_and_reply():
    assert set(MESSAGE_STATES) - set(UNHEALTHY_STATES) == {"call", "reply"}


@pytest.mark.parametrize("row", CORPUS, ids=lambda row: f"{row['format']}: {row['why']}")
def test_state_and_parser_agree(row):
    """What counts as a call is answered as one; what counts as none ends the turn."""
    calls = parse_calls(row["text"], row["format"])
    if row["state"] == "call":
        assert calls and all(map(is_call, calls))
    if row["state"] in ("empty", "foreign", "reply"):
        assert calls == []


@pytest.mark.parametrize("text", ["<tool_call>\n", "<tool_call>", "[", "<function="])
def test_a_bare_tag_ends_the_turn(text):
    """The loophole that collapse goes through (published environment): it must stay open."""
    for format in FORMATS:
        assert parse_calls(text, format) == []


@given(ANY_TEXT, st.sampled_from(list(FORMATS)))
@settings(max_examples=400)
def test_every_text_has_a_state_that_fits_the_parser(text, format):
    state, calls = message_state(text, format), parse_calls(text, format)
    assert state in MESSAGE_STATES
    assert message_state(text, format, overlong=True) == "overlong"
    if state == "call":
        assert calls and all(map(is_call, calls))
    elif state in ("empty", "foreign", "reply"):
        assert calls == []
    elif state == "polluted":
        assert calls


# --------------------------------------------------------------------------------------- render and parse
def test_rendered_calls_look_like_this():
    calls = [Call("set_light", {"room": "hall", "on": True}), Call("find_tickets", {})]
    assert render_calls(calls, "hermes") == (
        '<tool_call>\n{"name": "set_light", "arguments": {"room": "hall", "on": true}}\n</tool_call>\n'
        '<tool_call>\n{"name": "find_tickets", "arguments": {}}\n</tool_call>'
    )
    assert render_calls(calls, "python") == '[set_light(room="hall", on=True), find_tickets()]'
    assert render_calls(calls, "xml") == (
        '<function=set_light>\n<parameter=room>"hall"</parameter>\n<parameter=on>true</parameter>\n</function>\n'
        "<function=find_tickets>\n</function>"
    )
    for format, form in FORMATS.items():
        assert render_calls(calls, format).startswith(form.prefix)


def arguments_like(tool: str, text: str) -> dict:
    """Arguments of the right types for a tool: every free string is `text`."""
    values = {"string": text, "integer": -7, "boolean": False}
    properties = schema(tool)["parameters"]["properties"]
    return {
        name: kind["enum"][-1] if "enum" in kind else values[kind["type"]]
        for name, kind in properties.items()
    }


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tool", TOOLS)
def test_every_tool_survives_render_and_parse(tool, format):
    """A value in a ground-truth call may hold anything, the syntax of the call itself included."""
    for text in AWKWARD:
        call = Call(tool, arguments_like(tool, text))
        assert parse_calls(render_calls([call], format), format) == [call]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("text", AWKWARD, ids=ascii)
def test_a_rendered_call_is_in_the_state_call(text, format):
    """Else the ground truth itself would count as collapsed."""
    call = Call("write_file", {"folder": text, "name": text, "text": text})
    assert message_state(render_calls([call], format), format) == "call"


@pytest.mark.parametrize("format", FORMATS)
@given(
    calls=st.lists(
        st.builds(Call, st.sampled_from(TOOLS), st.dictionaries(NAMES, VALUES, max_size=3)),
        min_size=1,
        max_size=3,
    )
)
def test_arbitrary_values_survive_render_and_parse(format, calls):
    rendered = render_calls(calls, format)
    assert parse_calls(rendered, format) == calls
    assert message_state(rendered, format) == "call"


@pytest.mark.parametrize("format", FORMATS)
def test_types_survive_render_and_parse(format):
    """1, 1.0, True and "1" compare equal or look alike; a tool's type check tells them apart."""
    arguments = {"a": 1, "b": 1.0, "c": True, "d": "1", "e": None, "f": [1, [True]], "g": {"h": False}}
    (call,) = parse_calls(render_calls([Call("f", arguments)], format), format)
    assert repr(call.arguments) == repr(arguments)


@pytest.mark.parametrize("format", FORMATS)
def test_several_calls_and_text_around_them(format):
    calls = [Call("read_file", {"folder": "docs", "name": "a"}), Call("find_tickets", {})]
    one, two = (render_calls([call], format) for call in calls)
    assert parse_calls(f"First {one} then {two}, done.", format) == calls


@pytest.mark.parametrize("format", FORMATS)
def test_an_unreadable_block_leaves_the_others(format):
    """Every block is tried on its own (published environment)."""
    good = Call("find_tickets", {})
    bad = {
        "hermes": "<tool_call>\nwords\n</tool_call>",
        "python": "[f(words without commas)]",
        "xml": "<function=f>words</function>",
    }[format]
    first, second, third = parse_calls("\n".join([bad, render_calls([good], format), bad]), format)
    assert type(first) is type(third) is BadCall
    assert second == good
    assert first.reason


@pytest.mark.parametrize(
    ("format", "text", "reason"),
    [
        ("hermes", '<tool_call>{"name": "f", "arguments": </tool_call>', "bad JSON"),
        ("hermes", '<tool_call>{"name": 1, "arguments": {}}</tool_call>', '"name"'),
        (
            "hermes",
            '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
            '"arguments" must be a JSON object',
        ),
        (
            "hermes",
            '<tool_call>{"name": "f", "arguments": "{}"}</tool_call>',
            '"arguments" must be a JSON object, not a string',
        ),
        ("hermes", '<tool_call>{"name": "f", "parameters": [1]}</tool_call>', '"parameters" must be'),
        ("hermes", '<tool_call>{"name": "f", "arguments": false}</tool_call>', '"arguments" must be'),
        (
            "hermes",
            '<tool_call>{"name": "f", "args": {"x": 1}}</tool_call>',
            'a call has "name" and "arguments", not "args"',
        ),
        ("hermes", '<tool_call>{"name": "f", "id": "a", "arguments": {}}</tool_call>', 'not "id"'),
        ("hermes", '<tool_call>{"name": "f", "type": "function"}</tool_call>', 'not "type"'),
        ("hermes", '<tool_call>{"name": "f", "\\ud800\u00e9": 1}</tool_call>', 'not "?\u00e9"'),
        (
            "hermes",
            '<tool_call>{"name": "f", "arguments": {}, "parameters": {}}</tool_call>',
            '"arguments" or "parameters", not both',
        ),
        (
            "hermes",
            '<tool_call>{"name": "f</tool_call>',
            "bad JSON: Unterminated string starting at character 9",
        ),
        (
            "xml",
            '<function=f><parameter=x>"\n"</parameter></function>',
            "bad JSON: Invalid control character at character 1",
        ),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>', "NaN"),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"x": 1e999}}</tool_call>', "inf"),
        ("hermes", '{"name": "f", "arguments": {}}</tool_call>', "closing tag but no call"),
        ("python", "[f(x=)]", "bad Python"),
        ("python", "[f(1)]", "f: give every argument as parameter=value"),
        ("python", "[f(**{'x': 1})]", "f: give every argument as parameter=value"),
        ("python", "[f(x=g())]", "f: arguments must be plain values"),
        ("python", "[f(x=y)]", "f: arguments must be plain values"),
        ("python", "[f(x=1j)]", "plain values"),
        ("python", "[f(x=b'a')]", "plain values"),
        ("python", "[f(x={1, 2})]", "plain values"),
        ("python", "[f(x={1: 2})]", "plain values"),
        ("python", "[f(x=1e999)]", "plain values"),
        ("python", "[f(x=...)]", "plain values"),
        ("python", "[f(x=f'{1}')]", "plain values"),
        ("python", "[f(x=1).g(y=2)]", "only calls like name(parameter=value)"),
        ("python", "[f(x=1) for x in (1, 2)]", "only calls"),
        ("python", "[f(x=1), 2] or [f(x=3)]", "only calls"),
        ("xml", "<function=></function> x", "<function=name>"),
        ("xml", "<function=f</function>", "<function=name>"),
        ("xml", "<function=f>words</function>", "only <parameter=name>value</parameter>"),
        ("xml", "<function=f><parameter=x>words</parameter></function>", "bad JSON"),
        ("xml", "<parameter=x>1</parameter></function>", "closing tag but no call"),
    ],
)
def test_what_cannot_be_read_says_why(format, text, reason):
    """The reason is the observation the model gets, so it must point at the fault."""
    (bad,) = parse_calls(text, format)
    assert type(bad) is BadCall
    assert reason in bad.reason
    assert message_state(text, format) == "malformed"


@pytest.mark.parametrize(
    ("body", "arguments"),
    [
        ('{"name": "f", "parameters": {"status": "closed"}}', {"status": "closed"}),
        ('{"parameters": {"status": "closed"}, "name": "f"}', {"status": "closed"}),
        ('{"name": "f", "arguments": ""}', {}),
        ('{"name": "f", "arguments": null}', {}),
        ('{"name": "f", "parameters": null}', {}),
        ('{"name": "f"}', {}),
        ('{"name": "f", "arguments": "{}"}', None),
        ('{"name": "f", "arguments": {}, "parameters": {}}', None),
        ('{"name": "f", "arguments": {}, "id": "a"}', None),
        ('{"name": "f", "description": "Find.", "parameters": {"type": "object"}}', None),
        ('{"name": "f", "arguments": {"x": 1e999}}', None),
    ],
)
def test_what_is_a_json_call(body, arguments):
    """Between tags, beside other text and without tags alike. A name alone is a call between tags only.
    None: it is no call."""
    (call,) = parse_calls(f"<tool_call>{body}</tool_call>", "hermes")
    assert (call.arguments if is_call(call) else None) == arguments
    found = arguments is not None and body != '{"name": "f"}'
    junk = f"<tool_call>so: {body}</tool_call>"
    assert message_state(junk, "hermes") == ("polluted" if found else "malformed")
    for format in FORMATS:
        assert message_state(f"So: {body}", format) == ("foreign" if found else "reply")


# ------------------------------------------------------------------------------------------------- thoughts
REHEARSAL = [Call("delete_file", {"folder": "docs", "name": "a"})]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "thoughts",
    [
        "<think>Look there first.</think>",
        "\n <think>\n\n</think>\n\n",
        "<think>One.</think>\n<think>Two.</think><think></think>",
        "<think><think>Nested.</think>",
        "<think>{rehearsal}</think>\n",
        "<think>{rehearsal} {rehearsal}\n</think>",
    ],
)
def test_a_thought_before_the_message_is_not_spoken(thoughts, format):
    thoughts = thoughts.replace("{rehearsal}", render_calls(REHEARSAL, format))
    call = Call("find_tickets", {})
    text = render_calls([call], format)
    for after, state, calls in [(text, "call", [call]), ("Done.", "reply", []), (" \n", "empty", [])]:
        assert spoken(thoughts + after).strip() == after.strip()
        assert message_state(thoughts + after, format) == state
        assert parse_calls(thoughts + after, format) == calls
    assert message_state(f"{thoughts}So: {text}", format) == "polluted"
    assert message_state(thoughts + text, format, overlong=True) == "overlong"


@pytest.mark.parametrize("format", FORMATS)
def test_a_thought_without_end_is_all_there_is(format):
    for text in ("<think>", "<think>a</think> <think>Now " + render_calls(REHEARSAL, format)):
        assert (spoken(text), message_state(text, format), parse_calls(text, format)) == ("", "empty", [])
        assert message_state(text, format, overlong=True) == "overlong"


@pytest.mark.parametrize("format", FORMATS)
def test_a_thought_further_on_is_text(format):
    call = render_calls(REHEARSAL, format)
    for text in (f"So. <think>{call}</think>", f"</think>{call}", f"{call}<think>Done.</think>"):
        assert spoken(text) == text
        assert parse_calls(text, format) == REHEARSAL
        assert message_state(text, format) == "polluted"


@pytest.mark.parametrize("format", FORMATS)
def test_the_limit_is_for_what_is_spoken(format):
    call = Call("find_tickets", {})
    thoughts = f"<think>{'Hm. ' * MAX_CHARS}</think>"
    assert parse_calls(thoughts + render_calls([call], format), format) == [call]


@given(GLUED | st.lists(st.sampled_from(["<think>", "</think>", " ", "a"]), max_size=12).map("".join))
def test_what_is_spoken_begins_with_no_thought(text):
    rest = spoken(text)
    assert text.endswith(rest) and spoken(rest) == rest
    assert not rest.lstrip().startswith("<think>")


# ------------------------------------------------------------------------------- the brackets of python
@pytest.mark.parametrize(
    "text",
    [
        "See the list [items (two)] for more.",
        "See the [items\n(two)] and [the others (three, four)].",
        "[note (see below)]",
        "[the notes (see below)] are in docs.",
        "[ note (see below) ]",
        "[items (two)",
        "f(x)]",
        "[text](url)]",
        "See [text](url)]. It is [the first](url) of f(x)].",
        "[text](url) is the page.",
        "[1] (see [2])",
        "[Note] The file (a.txt) is gone.",
        "[total (n == 5)]",
        "(see [f (x)])",
    ],
)
def test_brackets_in_a_sentence_are_no_call(text):
    assert parse_calls(text, "python") == []
    assert message_state(text, "python") == "reply"
    call = Call("f", {"a": 1})
    for mixed in (f"{text}\n[f(a=1)]", "[f(a=1)]\nSee [items (two)]"):
        assert parse_calls(mixed, "python") == [call]


@pytest.mark.parametrize(
    ("text", "answered"),
    [
        ("[f(1)]", True),
        ("See [f(1)].", True),
        ("[f(two words)]", True),
        ("[f (a=x)]", True),
        ("[f(a=1) and g(b=2)]", True),
        ("read_file(name='a')]", True),
        ("[read_fi)]", True),
        ("[read file(name='a')]", True),
        ("[read_file name='a')]", True),
        ("[f(a=')]')", True),
        ("[f(a=1) and then]", False),
        ("[f(a=1", False),
        ("[read_fi", False),
        ("[read_file]", False),
        ('[read_file{"name": "a"}', False),
    ],
)
def test_an_attempt_at_a_list_of_calls_is_malformed(text, answered):
    """With an error, if it has a closing tag; else it ends the turn."""
    assert message_state(text, "python") == "malformed"
    assert [type(call) for call in parse_calls(text, "python")] == [BadCall] * answered


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ('[write_file(text="a)] b")]', [{"text": "a)] b"}]),
        ("[write_file(text='a)] \"b', name=\"it's )]\")]", [{"text": 'a)] "b', "name": "it's )]"}]),
        ("[write_file(text='''a)]\n'b' )]''')]", [{"text": "a)]\n'b' )]"}]),
        (r'[write_file(text="\")]\\", name=")]")]', [{"text": '")]\\', "name": ")]"}]),
        (r"[write_file(text=r'\')]')]", [{"text": r"\')]"}]),
        ('[write_file(text=")]" "]")]', [{"text": ")]]"}]),
        ('[write_file(text="["), write_file(text=")]")]', [{"text": "["}, {"text": ")]"}]),
        ('[write_file(text="[f(1)]")]\n[write_file(text=")]")]', [{"text": "[f(1)]"}, {"text": ")]"}]),
        ("[write_file(text=[(1, 2)])]", [{"text": [[1, 2]]}]),
        ("[write_file(text=[[(1)], {'a': [()]}])]", [{"text": [[1], {"a": [[]]}]}]),
        ("It's [write_file(text='a')] and it's [write_file(text=')]')]", [{"text": "a"}, {"text": ")]"}]),
        ("[write_file(text=don't)] it's [write_file(text='a')]", [None, {"text": "a"}]),
        ('[write_file(text="a)] [write_file(text="b")]', [None, {"text": "b"}]),
        ('[write_file(text="a)]\n[write_file(text="b")]', [None, {"text": "b"}]),
        ("[write_file(text=[1)]\n[write_file(text='b')]", [None, {"text": "b"}]),
        ("[write_file(text=1])] [write_file(text='b')]", [None, {"text": "b"}]),
    ],
)
def test_a_list_of_calls_ends_outside_strings_and_brackets(text, calls):
    """None: a block that cannot be read. The others are tried all the same."""
    found = parse_calls(text, "python")
    assert [call.arguments if is_call(call) else None for call in found] == calls


TUPLES = st.recursive(
    st.text(st.sampled_from("ab()[]{}'\"\\\n#=,"), max_size=8) | st.sampled_from(AWKWARD) | st.integers(),
    lambda inner: st.tuples(inner, inner) | st.lists(inner, max_size=3) | st.tuples(),
    max_leaves=6,
)


@given(st.lists(TUPLES, min_size=1, max_size=3))
def test_whatever_python_writes_is_read(values):
    """`repr` does not escape brackets, as `render_calls` does; any other reader of Python takes that."""
    text = "[" + ", ".join(f"f(x={value!r})" for value in values) + "]"
    listed = json.loads(json.dumps(values))
    assert parse_calls(text, "python") == [Call("f", {"x": value}) for value in listed]
    assert message_state(f"So: {text}", "python") == "polluted"


LARGE = MAX_CHARS - 1000  # in characters, about


@pytest.mark.parametrize(
    ("format", "begin", "part", "end", "state", "calls"),
    [
        ("python", "", "a", ")]", "reply", {}),
        ("python", "", "a(", ")]", "reply", {}),
        ("python", ")]", " f(", "", "reply", {}),
        ("python", "", "[items (two)] ", "", "reply", {}),
        ("python", "", "[a ", "", "malformed", {}),
        ("python", "", "[f(", "", "malformed", {}),
        ("python", "", "[f(", ")]", "malformed", {BadCall: 1}),
        ("python", "[f(a=", "(", "", "malformed", {}),
        ("python", "[f(a=", "(", ")]", "malformed", {BadCall: 1}),
        ("python", "[f(a='", "\\'", ")]", "malformed", {BadCall: 1}),
        ("python", "[f(a='", "\\d", "')]", "call", {Call: 1}),
        ("python", "[f(a=", "'' ", ")]", "call", {Call: 1}),
        ("python", "[f(a=", "'a)]' ", ")]", "call", {Call: 1}),
        ("python", "", "[f(a ')]' ", "", "malformed", {BadCall: LARGE // 10}),
        ("python", "", "[f([)] ", "", "malformed", {BadCall: LARGE // 7}),
        ("python", "", "[f(a=')]", "", "malformed", {Call: LARGE // 16, BadCall: 1}),
        ("python", "", "[f()]", "", "call", {Call: LARGE // 5}),
        ("python", "", "<tool_call>", "", "reply", {}),
        ("hermes", "", "<tool_call>", "", "bare", {}),
        ("hermes", "", "</tool_call>", "", "bare", {BadCall: 1}),
        ("hermes", "", "<tool_call>x</tool_call>", "<tool_call>", "malformed", {BadCall: LARGE // 24}),
        ("hermes", "<tool_call>", '{"name": ', "</tool_call>", "malformed", {BadCall: 1}),
        ("hermes", "", '{"name": "f", ', "", "reply", {}),
        ("xml", "", "<parameter=a>", "", "reply", {}),
        ("xml", "<function=f>", "<parameter=a>", "</function>", "malformed", {BadCall: 1}),
        ("xml", "<function=f>", "<parameter=a>1</parameter>", "</function>", "call", {Call: 1}),
        ("xml", "<function=f>", "<parameter=a>1</parameter>x", "</function>", "polluted", {BadCall: 1}),
        ("xml", "", "<function=", "</function>", "bare", {BadCall: 1}),
        ("xml", "", "<think></think> ", "<function=f></function>", "call", {Call: 1}),
        ("xml", "", "<think>", "<function=f></function>", "empty", {}),
    ],
)
def test_a_message_that_repeats_itself_is_read(format, begin, part, end, state, calls):
    """The time it takes grows with the length, not with its square: a longer one is read as well."""
    text = begin + part * (LARGE // len(part)) + end
    assert Counter(map(type, parse_calls(text, format))) == calls
    assert message_state(text, format) == state
    longer = begin + part * (10 * LARGE // len(part)) + end
    assert message_state(longer, format) in MESSAGE_STATES
    assert len(parse_calls(longer, format)) <= 1


@given(ANY_TEXT, st.sampled_from(list(FORMATS)))
@example("[f(x=" + "-" * 40_000 + "1)]", "python")
@example("[f(x=" + "1+" * 20_000 + "1)]", "python")
@example("[f(x=" + "[" * 20_000 + "]" * 20_000 + ")]", "python")
@example("[f" + "(x=1)" * 8_000 + "]", "python")
@example("[f(x=a" + ".a" * 20_000 + ")]", "python")
@example("[f(x=" + "9" * 40_000 + ")]", "python")
@example("[f(x=0x" + "f" * 40_000 + ")]", "python")
@example("[f(x='\ud800')]", "python")
@example("[f(x='\x00')]", "python")
@example("[f(x='\\N{no such name}')]", "python")
@example(
    '<tool_call>{"name": "f", "arguments": {"x": ' + "[" * 20_000 + "]" * 20_000 + "}}</tool_call>", "hermes"
)
@example(
    '<tool_call>{"name": "f", "arguments": ' + '{"x": ' * 900 + "1" + "}" * 901 + "</tool_call>", "hermes"
)
@example('<tool_call>{"name": "f", "arguments": ' + '{"x": ' * 5_000, "hermes")
@example('<tool_call>{"name": "f", "arguments": {"x": ' + "9" * 40_000 + "}}</tool_call>", "hermes")
@example('<tool_call>{"name": "\ud800", "arguments": {"\ud800": "\ud800"}}</tool_call>', "hermes")
@example('<tool_call>{"name": "\\ud800", "arguments": {"\\ud800": "\\ud800"}}</tool_call>', "hermes")
@example("<function=\ud800><parameter=\ud800>1</parameter></function>", "xml")
@example("<function=f><parameter=x>" + "[" * 20_000 + "</parameter></function>", "xml")
@example('{"name": "f", "arguments": ' + "[" * 20_000, "hermes")
@example("<tool_call>" * 2_000 + "</tool_call>" * 2_000, "hermes")
@settings(max_examples=600)
def test_parse_never_raises_and_gives_clean_data(text, format):
    """Whatever a model writes is data: calls of JSON values that UTF-8 can hold, or a reason."""
    for call in parse_calls(text, format):
        assert type(call) in (Call, BadCall)
        if is_call(call):
            assert type(call.name) is str and type(call.arguments) is dict
            assert_json(call.arguments)
            call.name.encode("utf-8")
        else:
            assert call.reason
            call.reason.encode("utf-8")
    assert message_state(text, format) in MESSAGE_STATES


def assert_json(value: object) -> None:
    """Exactly the JSON types, no subclass, no NaN, every string encodable."""
    assert type(value) in (dict, list, str, int, float, bool, type(None))
    if type(value) is str:
        value.encode("utf-8")
    if type(value) is float:
        assert abs(value) < float("inf")
    for item in [*value, *value.values()] if type(value) is dict else value if type(value) is list else ():
        assert_json(item)


@pytest.mark.parametrize("format", FORMATS)
def test_a_message_beyond_the_limit_is_answered_and_not_parsed(format):
    call = render_calls([Call("find_tickets", {})], format)
    assert is_call(parse_calls(call + " " * (MAX_CHARS - len(call)), format)[0])
    (bad,) = parse_calls(call + " " * (MAX_CHARS - len(call) + 1), format)
    assert str(MAX_CHARS) in bad.reason
    assert parse_calls("x" * (MAX_CHARS + 1), format) == []


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("number", ["0x" + "f" * 5000, "0b" + "1" * 2049, "9" * 5000, "-" + "9" * 700])
def test_an_integer_that_python_would_not_write_is_refused(format, number):
    """Hexadecimal literals get past the limit on digits, and would raise wherever they are written."""
    text = {
        "python": f"[f(x={number})]",
        "xml": f"<function=f><parameter=x>{number}</parameter></function>",
        "hermes": f'<tool_call>{{"name": "f", "arguments": {{"x": [{number}]}}}}</tool_call>',
    }[format]
    (call,) = parse_calls(text, format)
    assert isinstance(call, BadCall)
    assert parse_calls(text.replace(number, "9" * 600), format) != [call]
