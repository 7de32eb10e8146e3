"""Classes and places of the tokens of a message: hand-made cases in every format."""

import pytest

from nanotoolrl.calls import FORMATS, Call, render_calls
from nanotoolrl.places import CLASSES, PLACES, Structure

ONE = [Call("assign_ticket", {"ticket_id": 49, "name": "Frida Lo"})]
TWO = [*ONE, Call("f", {"a": ["x", "y"], "b": True})]


@pytest.fixture
def chat(policy):
    return policy.chat


def classified(chat, text, format="hermes"):
    """{class: texts of its tokens}, each token once more joined to what was there."""
    ids = chat.assistant_ids(text, format)
    kinds = Structure(chat, format).classes(ids)
    assert len(kinds) == len(ids)
    return {name: [chat.decode([i]) for i, k in zip(ids, kinds) if CLASSES[k] == name] for name in CLASSES}


@pytest.mark.parametrize("format", FORMATS)
def test_values_are_what_the_caller_chose(chat, format):
    """`name` is a value where it is a parameter, and structure where every call has it."""
    found = classified(chat, render_calls(ONE, format), format)
    assert "".join(found["value"]) == "assign_ticket" + "ticket_id" + "49" + "name" + "FridaLo"
    assert not found["opener"] and not found["text"]
    found = classified(chat, render_calls(TWO, format), format)
    true = "True" if format == "python" else "true"
    assert "".join(found["value"]).endswith("faxyb" + true)
    assert not found["opener"] and not found["text"], "nor between two calls"


def test_replies(chat):
    found = classified(chat, "Assigned. Well, ok")
    assert found["opener"] == ["Assigned"] and "".join(found["text"]) == ". Well, ok"
    assert found["structure"] == ["<|im_end|>"] and not found["value"]


@pytest.mark.parametrize("text", ["<tool_call>", "<tool_call>.", '<tool_call>\n{"', "</tool_call>"])
def test_broken_messages_are_structure(chat, text):
    found = classified(chat, text)
    assert not found["value"] and not found["opener"] and not found["text"]


def test_text_beside_a_call(chat):
    call = render_calls([Call("name", {})], "hermes")
    found = classified(chat, f"Look: {call} done")
    assert found["opener"] == ["L"] or found["opener"] == ["Look"]
    assert found["value"] == ["name"], "the tool's name, behind the word of the skeleton"
    assert "".join(found["text"]).endswith("done")


def placed(chat, text, due=True, format="hermes"):
    ids = chat.assistant_ids(text, format)
    return [(chat.decode([i]), PLACES[p]) for i, p in zip(ids, Structure(chat, format).places(ids, due))]


def test_places_of_a_call(chat):
    found = placed(chat, render_calls([Call("f", {"a": "x"})], "hermes"))
    assert found[:3] == [("<tool_call>", "start_call"), ("\n", "behind_tag"), ('{"', "behind_tag")]
    assert {place for _, place in found[3:-3]} == {"in_call"} and found[-4][0] == '"}}'
    assert found[-3:] == [
        ("\n", "behind_body"),
        ("</tool_call>", "behind_body"),
        ("<|im_end|>", "behind_call"),
    ]
    two = placed(chat, render_calls(TWO, "hermes"))
    assert ("<tool_call>", "behind_call") in two and two.count(('{"', "behind_tag")) == 2


@pytest.mark.parametrize("format", FORMATS)
def test_places_look_back_only(chat, format):
    """What stands before a token decides: cutting a message changes no place before the cut."""
    ids = chat.assistant_ids(render_calls(TWO, format) + " so", format)
    structure = Structure(chat, format)
    whole = structure.places(ids, False)
    assert whole[0] == PLACES.index("start_reply") and whole[-1] == PLACES.index("behind_call")
    assert all(structure.places(ids[:n], False) == whole[:n] for n in range(len(ids)))


@pytest.mark.parametrize("format", FORMATS)
def test_thoughts_are_text_whatever_they_rehearse(chat, format):
    call = render_calls(ONE, format)
    thought = f"<think>\nI could say {call} or not.\n</think>\n\n"
    found = classified(chat, thought + call, format)
    assert "".join(found["value"]) == "assign_ticket" + "ticket_id" + "49" + "name" + "FridaLo", "once"
    ids, structure = chat.assistant_ids(thought + call, format), Structure(chat, format)
    alone, both = (
        structure.places(chat.assistant_ids(text, format), True) for text in (call, thought + call)
    )
    first = len(both) - len(alone)
    assert both[first:] == alone, "a message begins behind its thought"
    blanks = len(chat.encode("\n\n"))
    assert set(both[1 : first - blanks]) == {PLACES.index("in_reply")}
    assert all(structure.places(ids[:n], True) == both[:n] for n in range(first - blanks, len(ids)))
    endless = structure.places(chat.assistant_ids(f"<think>{call}", format), True)
    assert set(endless[1:]) == {PLACES.index("in_reply")}


def test_a_reply_opens_behind_the_thought(chat):
    found = classified(chat, "<think>It is done.</think>\n\nAssigned. Well")
    assert found["opener"] == ["Assigned"]
    places = placed(chat, "<think>It is done.</think>\n\nAssigned. Well", due=False)
    assert ("Assigned", "start_reply") in places and places[-1] == ("<|im_end|>", "in_reply")


def test_a_stop_behind_the_tag(chat):
    assert placed(chat, "<tool_call>", due=False) == [
        ("<tool_call>", "start_reply"),
        ("<|im_end|>", "behind_tag"),
    ]
    assert {place for _, place in placed(chat, "Ok. Yes", due=False)[1:]} == {"in_reply"}


def test_named_sets(chat):
    structure = Structure(chat, "hermes")
    names = {name: {chat.decode([i]) for i in structure.named(name)} for name in ("paper", "opener", "stop")}
    assert names == {
        "paper": {"<tool_call>", '{"', "<|im_end|>"},
        "opener": {"<tool_call>"},
        "stop": {"<|im_end|>", "<|endoftext|>"},
    }
    assert structure.named("control") == structure.control_ids


@pytest.mark.parametrize("format", FORMATS)
def test_skeleton_and_values_make_the_message(chat, format):
    ids = chat.assistant_ids(render_calls(ONE, format), format)
    pieces = Structure(chat, format).skeleton(ids)
    left = chat.decode(ids)
    for piece, value in zip(
        pieces, ["assign_ticket", "ticket_id", "49", "name", "Frida Lo", ""], strict=True
    ):
        text = chat.decode(piece)
        assert left.startswith(text + value)
        left = left[len(text + value) :]
    assert left == "" and pieces[-1][-1] == chat.end_id


def test_blanks_beside_punctuation_are_the_piece_s(chat):
    """A value may hold "Lunch & learn": a blank goes on only where the piece behind it has none."""
    structure = Structure(chat, "hermes")
    ids = chat.assistant_ids(render_calls([Call("f", {"a": "Lunch & learn it"})], "hermes"), "hermes")
    pieces = structure.skeleton(ids)
    blank = chat.encode(" ")
    assert len(blank) == 1
    behind = next(piece for piece in pieces if chat.decode(piece).startswith(" &"))
    assert not structure.goes_on(blank[0], behind) and structure.goes_on(blank[0], pieces[-1])
    assert structure.goes_on(chat.encode("it")[0], behind) and not structure.goes_on(chat.end_id, behind)


def test_letters_of_several_tokens_are_words(chat):
    found = classified(chat, render_calls([Call("f", {"a": "日本 Zoë"})], "hermes"))
    assert len(found["value"]) > 6, "a and what writes the letters, byte by byte"
    assert "\ufffd" in "".join(found["value"]) and "\ufffd" not in "".join(found["structure"])


def test_all_stops_and_special_tokens_are_structure(chat):
    structure, other = Structure(chat, "hermes"), chat.special_ids["<|endoftext|>"]
    for text in ("Done", '<tool_call>\n{"name": "f'):
        ids = [*chat.encode(text), other]
        assert CLASSES[structure.classes(ids)[-1]] == "structure"
    assert not structure.is_word(other) and other in structure.named("stop")


@pytest.mark.parametrize("arguments", [{}, {"a": [1]}, {"a": ["x"]}, {"a": {"b": 1}}, {"a": None}])
def test_a_body_ends_whatever_its_last_value(chat, arguments):
    found = placed(chat, render_calls([Call("f", arguments)], "hermes"))
    assert [place for _, place in found[-3:]] == ["behind_body", "behind_body", "behind_call"]
