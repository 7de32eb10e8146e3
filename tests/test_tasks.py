"""Task files: what they must hold, how they are written, and their export."""

import copy
import json

import pytest

from nanotoolrl.env import Call, Episode, replay
from nanotoolrl.world.tasks import load_tasks, main, save_tasks


def test_save_and_load_round_trip(tmp_path, splits):
    save_tasks(splits["ood"][:7], tmp_path / "some.jsonl")
    assert load_tasks(str(tmp_path / "some.jsonl")) == splits["ood"][:7]


# ------------------------------------------------------------------------------------------- files by hand
LEAVE_OUT = object()
READ = {"name": "read_file", "arguments": {"folder": "docs", "name": "a.txt"}}
LIGHT = {"name": "set_light", "arguments": {"room": "hall", "on": True}}
ONE = ("turns", 0)  # where edits go: the first turn, its call, and the call's arguments
CALL = (*ONE, "calls", 0)
ARGUMENTS = (*CALL, "arguments")


def by_hand() -> dict:
    """A task of three turns: it reads a file, lacks a tool, and gets it."""
    return copy.deepcopy(
        {
            "id": "t",
            "category": "miss_func",
            "state": {
                "Files": {"folders": {"docs": {"a.txt": "one"}}},
                "Home": {"rooms": {"hall": {"degrees": 20, "light": False}}},
                "Calendar": {"events": [{"id": 11, "day": "Monday", "hour": 9, "title": "tea"}]},
            },
            "tools": ["read_file", "set_heating", "list_events"],
            "turns": [
                {"user": "Read it.", "calls": [READ], "reply": "One.", "offers": []},
                {"user": "Light, please.", "calls": [], "reply": "I have no tool for that."},
                {"user": "Here is one.", "calls": [LIGHT], "reply": "Done.", "offers": ["set_light"]},
            ],
        }
    )


def edited(place: tuple, value: object) -> str:
    """The task by hand with another value in one place, as a line."""
    task = by_hand()
    *way, last = place
    inner = task
    for key in way:
        inner = inner[key]
    if value is LEAVE_OUT:
        del inner[last]
    elif isinstance(inner, list) and last == len(inner):
        inner.append(value)
    else:
        inner[last] = value
    return json.dumps(task)


def written(old: str, new: str) -> str:
    """The line of the task by hand with other text in it."""
    line = json.dumps(by_hand())
    assert old in line
    return line.replace(old, new, 1)


# line: what the refusal says
MALFORMED = {
    **{edited(("id",), value): "id must be of type string" for value in (None, 5, True, ["t"], {})},
    **{edited(("id",), value): "id must be a text that is not empty" for value in ("", " ")},
    edited(("id",), "\ud800"): "id holds half a surrogate pair",
    **{edited((key,), LEAVE_OUT): f"lacks {key}" for key in by_hand()},
    edited(("note",), 1): "has an unknown note",
    **{edited(("category",), value): "category must be of type string" for value in (None, 5, ["base"])},
    edited(("category",), "easy"): "unknown category 'easy'; known: base",
    **{edited(("state",), value): "state must be of type object" for value in (None, [], "Files")},
    edited(("state",), {}): "tool 'read_file' has no API object",
    edited(("state", "Moon"), {}): "unknown class 'Moon'; known: Files",
    **{edited(("state", "Files"), value): "state.Files must be an object" for value in (None, [], 5)},
    edited(("state", "Files", "drawers"), {}): "state.Files: no field 'drawers'; it has folders",
    **{
        edited(("state", "Files", "folders"), value): "state.Files.folders must be of type object"
        for value in (None, [], "docs", 5)
    },
    edited(("state", "Files", "folders", "docs"), []): "state.Files.folders['docs'] must be of type object",
    edited(("state", "Files", "folders", "docs", "b"), 5): "folders['docs']['b'] must be of type string",
    edited(("state", "Files", "folders", "docs", "b"), "\udfff"): "state.Files.folders.docs.b holds half",
    edited(("state", "Files", "folders", "\ud800"), {}): "a key of state.Files.folders holds half",
    edited(("state", "Calendar", "events"), {}): "state.Calendar.events must be of type array",
    edited(("state", "Calendar", "events", 1), "tea"): "state.Calendar.events[1] must be of type object",
    edited(("state", "Calendar", "events", 0, "id"), 2**53 + 1): "events[0].id must be a number from -2**53",
    edited(("state", "Calendar", "events", 0, "id"), -(2**53) - 1): "to 2**53",
    **{edited(("tools",), value): "tools must be of type array" for value in (None, "read_file", {})},
    **{edited(("tools", 0), value): "tools[0] must be of type string" for value in (None, 5, [], {})},
    edited(("tools", 0), "fly"): "tools[0]: tool 'fly' has no API object",
    edited(("tools", 0), "transfer"): "tools[0]: tool 'transfer' has no API object",
    edited(("tools", 3), "read_file"): "tools[3]: the tool 'read_file' is shown already",
    edited(("tools", 0), LEAVE_OUT): "turns[0].calls[0]: no tools or offers show 'read_file'",
    **{edited(("turns",), value): "turns must be of type array" for value in (None, {}, "text")},
    edited(("turns",), []): "at least one turn",
    edited(ONE, "text"): "turns[0] must be an object, not string",
    edited(ONE, []): "turns[0] must be an object, not array",
    **{edited((*ONE, key), LEAVE_OUT): f"turns[0] lacks {key}" for key in ("user", "calls", "reply")},
    edited((*ONE, "offer"), []): "turns[0] has an unknown offer; its keys are user, calls, reply, offers",
    **{edited((*ONE, "user"), value): "turns[0].user must be of type string" for value in (None, 5, [], {})},
    edited((*ONE, "user"), "\ud800"): "turns[0].user holds half",
    **{edited((*ONE, "reply"), value): "turns[0].reply must be of type string" for value in (None, 5, True)},
    edited((*ONE, "reply"), '<tool_call>{"name": "x", "arguments": {}}</tool_call>'): "reply makes a call",
    edited((*ONE, "reply"), "[x()]"): "turns[0].reply makes a call, in python",
    **{edited((*ONE, "offers"), value): "turns[0].offers must be of type array" for value in (None, "x", {})},
    edited((*ONE, "offers"), [5]): "turns[0].offers[0] must be of type string",
    edited((*ONE, "offers"), ["fly"]): "turns[0].offers[0]: tool 'fly' has no API object",
    edited((*ONE, "offers"), ["read_file"]): "turns[0].offers[0]: the tool 'read_file' is shown already",
    edited((*ONE, "offers"), ["set_door", "set_door"]): "turns[0].offers[1]: the tool 'set_door' is shown",
    edited(("turns", 2, "offers"), []): "turns[2].calls[0]: no tools or offers show 'set_light' by then",
    **{edited((*ONE, "calls"), value): "turns[0].calls must be of type array" for value in (None, {}, "x")},
    edited(CALL, "read_file"): "turns[0].calls[0] must be an object, not string",
    edited((*CALL, "id"), 1): "turns[0].calls[0] has an unknown id",
    **{edited((*CALL, key), LEAVE_OUT): f"turns[0].calls[0] lacks {key}" for key in READ},
    **{edited((*CALL, "name"), value): "calls[0].name must be of type string" for value in (None, 5, [], {})},
    edited((*CALL, "name"), "fly"): "turns[0].calls[0]: tool 'fly' has no API object",
    edited((*CALL, "name"), "set_light"): "turns[0].calls[0]: no tools or offers show 'set_light' by then",
    edited((*CALL, "name"), "list_files"): "no tools or offers show 'list_files'",
    **{edited(ARGUMENTS, value): "calls[0].arguments must be of type object" for value in (None, [], "docs")},
    edited((*ARGUMENTS, "foldr"), "docs"): "unknown argument 'foldr'; it takes folder, name",
    edited(ARGUMENTS, {"foldr": "docs", "name": "a.txt"}): "turns[0].calls[0], read_file, is answered with",
    edited((*ARGUMENTS, "name"), LEAVE_OUT): "missing argument name",
    edited((*ARGUMENTS, "name"), "gone.txt"): "no file 'gone.txt' in 'docs'",
    edited((*ARGUMENTS, "name"), 5): "argument 'name' must be of type string",
    edited((*ARGUMENTS, "name"), None): "argument 'name' must be of type string",
    edited((*ARGUMENTS, "name"), "\ud800"): "turns[0].calls[0].arguments.name holds half",
    edited((*ARGUMENTS, "name"), "x" * 60_000): "no file 'xxx",
    edited(("turns", 2, "calls", 0, "arguments", "on"), 1): "argument 'on' must be of type boolean",
    edited((*ONE, "calls"), [READ] * 500): "more than the 30 messages",
    edited(("turns",), by_hand()["turns"] + by_hand()["turns"][1:2] * 30): "more than the 30 messages",
    edited(("turns",), [{"user": "?", "calls": [], "reply": "!"}]): "one ground-truth call",
    **{written('"degrees": 20', f'"degrees": {number}'): "degrees must be a number" for number in (
        "NaN", "Infinity", "-Infinity", "1e999", "1e300", "9" * 400)},
    written('"degrees": 20', '"degrees": ' + "9" * 5000): "4300 digits",
    written('"degrees": 20', '"degrees": 20, "degrees": 21'): "the key 'degrees' stands twice",
    written('"id": "t"', '"id": "t", "id": "u"'): "the key 'id' stands twice",
    written('"degrees": 20', '"degrees": 020'): "bad JSON",
    written('"id": "t"', "'id': 't'"): "bad JSON",
    written("]}]}", "]}]"): "bad JSON",
    '{"id": "t': "bad JSON: Unterminated string starting at character 7",
    written("]}]}", "]}],}"): "bad JSON",
    written('"degrees": 20', '"degrees": ' + "[" * 100_000 + "]" * 100_000): "nested too deeply",
    json.dumps(by_hand()) * 2: "bad JSON: Extra data",
    **dict.fromkeys(("[]", "null", "true", "5", '"t"', "[{}]"), "the task must be an object"),
    "{}": "the task lacks id, category, state, tools, turns",
    "# tasks": "bad JSON",
    "\ufeff" + json.dumps(by_hand()): "bad JSON",
}  # fmt: skip

HARMLESS = [
    edited((*ONE, "offers"), LEAVE_OUT),
    edited((*ONE, "user"), ""),
    edited((*ONE, "reply"), ""),
    edited((*ONE, "reply"), "A tag, </tool_call>, and a list [1]."),
    edited(("id",), "\U0001f642 / \u2028"),
    edited(("category",), "base"),
    edited(("state", "Files", "folders", "work"), {}),
    edited(("state", "Bank"), {}),
    edited(("state", "Home", "doors"), {"front": "open"}),
    edited(("state", "Calendar", "events"), LEAVE_OUT),
    edited(("state", "Calendar", "events", 0, "id"), 2**53),
    edited(("state", "Calendar", "events", 0, "hour"), 9.5),
    edited(("state", "Calendar", "events", 0, "note"), None),
    edited(("tools",), ["set_heating", "read_file"]),
    edited((*ONE, "offers"), ["set_door"]),
    edited((*ONE, "calls"), [READ] * 40),
    edited((*ONE, "calls"), []),
    json.dumps(by_hand(), indent=None, separators=(",", ":"), sort_keys=True),
    "  " + json.dumps(by_hand()) + "  \r",
]


def refusal(path) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        load_tasks(str(path))
    return str(refused.value)


@pytest.mark.parametrize(("line", "said"), MALFORMED.items(), ids=range(len(MALFORMED)))
def test_a_malformed_task_is_refused_with_file_line_and_field(line, said, tmp_path, splits):
    path = tmp_path / "bad.jsonl"
    path.write_text(f"{splits['test'][0].to_json()}\n\n{line}\n", encoding="utf-8")
    text = refusal(path)
    assert text.startswith(f"{path}, line 3: ") and said in text


@pytest.mark.parametrize("line", [json.dumps(by_hand()), *HARMLESS], ids=range(len(HARMLESS) + 1))
def test_a_harmless_edit_is_accepted(line, tmp_path):
    path = tmp_path / "good.jsonl"
    path.write_text(line, encoding="utf-8")
    (task,) = load_tasks(str(path))
    assert replay(task, [turn.calls for turn in task.turns]) == 1
    assert json.loads(task.to_json())["id"] == json.loads(line)["id"]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\n\r\n"])
def test_what_editors_do_to_a_file_is_accepted(mark, end, tmp_path, splits):
    path, some = tmp_path / "some.jsonl", splits["ood"][:3]
    path.write_bytes(mark + end.join(task.to_json().encode() for task in some) + end)
    assert load_tasks(str(path)) == some


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (json.dumps(by_hand()).encode("utf-16"), "line 1: not UTF-8"),
        (json.dumps(by_hand()).encode("utf-16-le"), "line 1: not a task: bad JSON"),
        (json.dumps(by_hand()).encode("utf-32"), "line 1: not UTF-8"),
        (b'\n\n{"id": "caf\xe9"}', "line 3: not UTF-8"),
        (b"", "holds no task"),
        (b"\xef\xbb\xbf", "holds no task"),
        (b" \n\r\n\t\n", "holds no task"),
        (
            f"{json.dumps(by_hand())}\n\n{json.dumps(by_hand())}".encode(),
            "line 3: two tasks share an id, 't'",
        ),
    ],
)
def test_a_malformed_file_is_refused(content, said, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    text = refusal(path)
    assert text.startswith(str(path)) and said in text


@pytest.mark.parametrize("name", ["tests", ".", "", "a\0b", "x" * 5000, "train.jsonl"])
def test_what_is_no_file_is_refused_with_what_there_is(name):
    assert "give one of train, val, test, foreign, ood" in refusal(name)


def test_no_directory_to_write_to(tmp_path, splits):
    path = tmp_path / "missing" / "some.jsonl"
    with pytest.raises(FileNotFoundError, match=f"cannot write {path}: there is no directory {path.parent}"):
        save_tasks(splits["ood"][:1], path)
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        save_tasks(splits["ood"][:1], tmp_path)


def test_export(tmp_path, splits, capsys):
    """Every row stands by itself, and has the same columns of the same types."""
    path = tmp_path / "rows.jsonl"
    assert main(["--export", str(path), "--tasks", "foreign", "--format", "xml"]) == 0
    assert f"{len(splits['foreign'])} tasks in" in capsys.readouterr().out
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row, task in zip(rows, splits["foreign"], strict=True):
        assert row["prompt"] == Episode(task, "xml").prompt()[0]
        truth = json.loads(row["reward_model"]["ground_truth"])
        assert replay(task, [[Call(**call) for call in turn] for turn in truth]) == 1
        assert json.loads(row["extra_info"]["state"]) == task.state
        assert [turn["user"] for turn in json.loads(row["extra_info"]["turns"])] == [
            turn.user for turn in task.turns
        ]
    assert len({(*row, *row["extra_info"]) for row in rows}) == 1


@pytest.mark.parametrize("flags", [["--tasks", "nothing"], ["--export", "/no/such/place"]])
def test_export_is_refused_by_name(flags, tmp_path, capsys):
    assert main(["--export", str(tmp_path / "rows.jsonl"), *flags]) == 2
    assert flags[1] in capsys.readouterr().err
