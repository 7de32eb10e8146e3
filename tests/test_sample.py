"""sample.py: what a person sees."""

import pytest

import sample


def test_plays_a_task_readably(capsys):
    assert sample.main(["--task", "test-003-miss_func"]) == 0
    printed = capsys.readouterr().out
    for part in ("task test-003-miss_func", "user |", "assistant |", "message states:", "turn 1:", "reward"):
        assert part in printed
    assert "<|im_start|>" not in printed


@pytest.mark.parametrize("format", ["hermes", "python", "xml"])
def test_oracle_and_forced_prefix(format, capsys):
    assert sample.main(["--oracle", "--format", format]) == 0
    assert sample.main(["--force-prefix", "--format", format, "--temperature", "1"]) == 0
    assert "assistant |" in capsys.readouterr().out


def test_chat_answers_a_person_with_live_tools(monkeypatch, capsys):
    said = iter(["Hello!", "What is on Monday?", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(said))
    assert sample.main(["--chat"]) == 0
    assert "its tools:" in capsys.readouterr().out
    assert next(said, None) is None, "every line was asked for"


def test_end_of_input_ends_the_chat(monkeypatch):
    def end(_):
        raise EOFError

    monkeypatch.setattr("builtins.input", end)
    assert sample.main(["--chat"]) == 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--task", "nope"], "test-000-base"),
        (["--tasks", "nope"], "train, val, test, foreign, ood"),
        (["--model", "data/nan0"], "data/nan0"),
        (["--temperature", "-1"], "--temperature"),
        (["--chat", "--max-messages", "3"], "--max-messages says nothing with --chat"),
        (["--chat", "--strict-empty-turn"], "--strict-empty-turn says nothing with --chat"),
        (["--oracle", "--tool-seconds", "3"], "--tool-seconds says nothing with --oracle"),
        (["--oracle", "--chat"], "--chat says nothing with --oracle"),
    ],
)
def test_bad_input_is_refused_by_name(flags, said, capsys):
    try:
        code = sample.main(flags)
    except SystemExit as stop:  # of argparse
        code = stop.code
    assert code == 2 and said in capsys.readouterr().err
