"""Sentences of a ground truth that nothing shows: by hand, in the benchmark, and none in our own tasks."""

from pathlib import Path

import pytest

from nanotoolrl.bfcl import load_bfcl
from nanotoolrl.calls import Call
from nanotoolrl.env import Task, Turn
from nanotoolrl.look.evaluate import Scores, unshown_table
from nanotoolrl.look.wording import is_new, unshown, words
from nanotoolrl.world.tasks import SPLITS, load_tasks


def writing(user, text, before=()):
    """A task: write a text into a file."""
    state = {"Files": {"folders": {"docs": {"note": "the cat sat on the mat"}}}}
    call = Call("write_file", {"folder": "docs", "name": "b", "text": text})
    return Task("t", "base", state, ["write_file", "read_file"], [Turn(user, [*before, call], "Done.")])


def test_words():
    assert words('Sort "report.txt"!') == " sort report txt "
    assert words(r'"a\nb"') == " a b ", "the line ends of JSON are no letters"
    assert words("Ünïcode_x 3.5") == " ünïcode x 3 5 "


def test_what_is_new():
    shown = [words("Write 'The distance to Rome is X km.'"), words("it is 750.0")]
    assert not is_new("The distance to Rome is 750.0 km.", shown), "a form that is filled in"
    assert is_new("The distance to Rome is 751 km.", shown), "a number that nobody gave"
    assert is_new("The way to Rome is 750.0 km.", shown), "other words"
    assert is_new("Rome is the distance to.", shown), "another order"
    assert not is_new("Quite new words", shown), "three words may be hit"
    assert is_new("abc1 def2 ghi3 jkl4", shown), "codes"
    assert not is_new("Write: the distance, to Ro me is X km", shown), "blanks and signs"


def test_by_hand():
    wanted = "all is well that ends"
    assert unshown(writing("Write that something ended well.", wanted)) == [wanted]
    assert not unshown(writing(f"Write '{wanted}'!", wanted))
    read = Call("read_file", {"folder": "docs", "name": "note"})
    copied = "the cat sat on the mat"
    assert unshown(writing("Copy it.", copied)) == [copied]
    assert not unshown(writing("Copy it.", copied, [read])), "a tool showed it"


def test_a_wording_that_does_not_matter_does_not_count(monkeypatch):
    monkeypatch.setattr("nanotoolrl.look.wording.replay", lambda task, calls: 1.0)
    assert not unshown(writing("Write that something ended well.", "all is well that ends"))


@pytest.mark.parametrize("split", SPLITS)
def test_our_own_tasks_show_all(split):
    assert not [task.id for task in load_tasks(split) if unshown(task)]


@pytest.mark.slow
def test_the_bfcl_tasks_that_show_less_than_they_ask_for():
    pytest.importorskip("bfcl_eval", reason="the benchmark's package")
    tasks = load_bfcl("bfcl")
    found = {task.id: unshown(task) for task in tasks if unshown(task)}
    assert found["multi_turn_base_4"] == ["Initial report content More unsorted data Unsorted data"]
    assert "2023" in found["multi_turn_base_176"][0], "its user says 2026"
    assert "multi_turn_base_62" not in found, "a form that is filled in"
    for task in (task for task in tasks if task.id in found):  # none stands in an earlier result, JSON read
        results = ""
        for turn, (_, given) in zip(task.turns, task.expected, strict=True):
            for call, result in zip(turn.calls, given, strict=True):
                wanted = [text for text in found[task.id] if text in call.arguments.values()]
                assert not any(text in results for text in wanted), task.id
                results += result + result.encode("latin-1", "backslashreplace").decode("unicode_escape")
    page = (Path(__file__).parent.parent / "docs" / "real-models.md").read_text(encoding="utf-8")
    assert f"The ground truth of {len(found)} of the {len(tasks)} tasks" in page
    columns = {"hermes": Scores({task.category: {} for task in tasks})}
    for task in tasks:
        columns["hermes"].rewards[task.category][task.id] = float(task.id not in found)
    text, names = unshown_table(columns, tasks)
    assert set(names) == found.keys() and "100.0" in text and str(len(found)) in text
    assert columns["hermes"].success < 1


def test_without():
    scores = Scores({"base": {"a": 1.0, "b": 0.0}, "miss_func": {"c": 0.0}})
    assert scores.without(["b", "c"]).success == 1.0 and scores.success == pytest.approx(1 / 3)
    assert unshown_table({"hermes": scores}, []) == ("", [])
