"""Figures, the page with the rollout viewer, and the terminal's summary; the page also in a real browser."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers.runs import OTHERS, run
from matplotlib.figure import Figure

from nanotoolrl.chat import control_tokens
from nanotoolrl.env import oracle
from nanotoolrl.loading import NANO, load_chat
from nanotoolrl.look import report
from nanotoolrl.look.figures import FIGURES, smooth
from nanotoolrl.look.report import main, messages_of, rollouts_of, screen, spark
from nanotoolrl.look.runfiles import Unreadable, read_run, tell_apart
from nanotoolrl.look.viewer import TEMPLATE
from nanotoolrl.trajectory import demonstration
from nanotoolrl.world.tasks import load_tasks

EVIL = '</script><script>document.title = "run"</script><img src=x onerror="document.title = \'run\'">'
DOCS = Path(__file__).resolve().parent.parent / "docs"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of three steps with an evaluation, one of whose trajectories holds hostile text."""
    out = tmp_path_factory.mktemp("report") / "first"
    flags = (
        "--scheme hint --hint-count 1 --steps 3 --probe-every 1 --eval-count 4 --eval-part 2 --eval-every 2 "
        f"--eval-tasks {OTHERS} --tasks train"
    )
    assert run(*flags.split(), out=out) == 0
    chat, path = load_chat(NANO), out / "rollouts.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    row, evil = lines[1], chat.encode(EVIL)
    row["tokens"] += evil
    row["loss_mask"] += [1] * len(evil)
    row["logprobs"] += [-0.5] * len(evil)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return out


@pytest.fixture(scope="module")
def page(finished):
    """The report of that run, beside one of a run without rollouts."""
    sft = finished.parent / "sft"
    flags = ["--scheme", "sft", "--steps", 2, "--sft-batch", 2]
    assert run(*flags, out=sft) == 0
    assert main([str(sft), str(finished), "--out", str(finished.parent / "both")]) == 0
    return finished.parent / "both" / "report.html"


def embedded(page):
    """The data inside the page, found as a browser finds it."""

    class Reader(HTMLParser):
        inside, text = False, ""

        def handle_starttag(self, tag, attributes):
            self.inside = tag == "script" and dict(attributes).get("id") == "data"

        def handle_endtag(self, tag):
            self.inside = False

        def handle_data(self, data):
            self.text += data if self.inside else ""

    reader = Reader()
    reader.feed(page.read_text())
    return json.loads(reader.text)


@pytest.mark.slow
def test_figures_are_written_for_one_run_and_for_several(finished, page, capsys):
    assert main([str(finished)]) == 0
    printed = capsys.readouterr().out
    assert "NLL control" in printed and "report.html" in printed and any(c in printed for c in "▁█")
    for folder in (finished / "report", page.parent):
        sizes = [(folder / f"{title.replace(' ', '_')}.png").stat().st_size for title in FIGURES]
        assert len(sizes) == len(FIGURES) and min(sizes) > 3000


@pytest.mark.parametrize("title", FIGURES)
def test_every_figure_has_lines_a_legend_and_units(finished, title):
    """Of a whole run each panel shows something; of a run that measured nothing each says so or is empty."""
    axes = Figure().subplots()
    FIGURES[title](axes, [read_run(finished)])
    assert axes.get_ylabel()
    assert axes.lines or axes.collections
    assert axes.get_legend_handles_labels()[1]


def test_several_runs_are_told_apart(finished):
    other = finished.parent / "second"
    shutil.copytree(finished, other, dirs_exist_ok=True)
    runs = [read_run(finished), read_run(other)]
    for title, draw in FIGURES.items():
        axes = Figure().subplots()
        draw(axes, runs)
        labels = axes.get_legend_handles_labels()[1]
        assert {name for name in ("first", "second") if any(name in x for x in labels)} == {"first", "second"}
        assert len({line.get_color() for line in axes.lines if line.get_label() in labels}) >= 2, title


def test_the_page_holds_what_the_log_holds(finished, page):
    data = embedded(page)
    assert len(data["figures"]) == len(FIGURES) and data["sampled"] == ""
    sft, first = data["runs"]
    assert sft["steps"] == []
    assert [step["step"] for step in first["steps"]] == [1, 2, 3]
    shown = [one for step in first["steps"] for group in step["groups"] for one in group["rollouts"]]
    logged = [json.loads(line) for line in (finished / "rollouts.jsonl").read_text().splitlines()]
    assert len(shown) == len(logged) == 3 * 2 * 2
    chat = load_chat(NANO)
    for one, row in zip(shown, logged, strict=True):
        assert one["tokens"] == row["tokens"] and one["advantage"] == row["advantage"]
        assert one["mask"] == "".join(map(str, row["loss_mask"]))
        assert len(one["verdicts"]) == len(row["verdicts"])
        assert [m["state"] for m in one["messages"] if m["state"]] == row["states"]
        text = "".join(first["vocabulary"][str(token)] for token in one["tokens"])
        assert text == chat.decode(one["tokens"]) or "\ufffd" in text


def test_model_text_cannot_leave_its_element(page):
    source = page.read_text()
    assert EVIL not in source and source.count("</script>") == 2
    first = embedded(page)["runs"][1]
    hostile = first["steps"][0]["groups"][0]["rollouts"][1]
    assert "".join(first["vocabulary"][str(token)] for token in hostile["tokens"]).endswith(EVIL)
    assert not re.search(r'(?:src|href)="?https?:|@import|fetch\(|XMLHttpRequest', source), (
        "it needs no network"
    )


def test_messages_of_a_ground_truth():
    """Roles in order; every assistant message has its state; a sampled <|im_start|> opens no message."""
    chat = load_chat(NANO)
    task = load_tasks("train")[0]
    row = demonstration(chat, task, "hermes")
    found = messages_of(row.tokens, row.loss_mask, row.states, chat)
    roles = ["system", *(m["role"] for m in oracle(task, "hermes") if m["role"] != "system")]
    assert [message["role"] for message in found] == roles
    assert [m["state"] for m in found if m["role"] == "assistant"] == row.states
    assert found[0]["start"] == 0 and all(a["end"] == b["start"] for a, b in zip(found, found[1:]))
    begin = control_tokens(chat, "hermes")["<|im_start|>"]
    row.append([begin], sampled=True)
    assert len(messages_of(row.tokens, row.loss_mask, row.states, chat)) == len(found)


def test_long_runs_are_thinned_and_say_so(finished, tmp_path):
    run = read_run(finished)
    line = json.loads((finished / "rollouts.jsonl").read_text().splitlines()[0])
    long = tmp_path / "long"
    shutil.copytree(finished, long)
    with (long / "rollouts.jsonl").open("w") as file:
        for step in range(1, 101):
            file.write(json.dumps(line | {"step": step}) + "\n")
    size = (long / "rollouts.jsonl").stat().st_size // 2
    steps, _, total = rollouts_of(read_run(long), -(-size // 4))
    numbers = [step["step"] for step in steps]
    assert total == 100 and len(numbers) == 25 and numbers[0] == 1 and numbers[-1] == 100
    assert len(set(numbers)) == len(numbers)
    page = report.build([read_run(long)], tmp_path, -(-size // 4) / 1e6)
    assert "long: 25 of the 100 logged steps" in embedded(page)["sampled"]
    assert rollouts_of(run, 10**9)[2] == 3


def test_the_page_is_opened_where_there_is_a_screen(finished, monkeypatch, tmp_path, capsys):
    opened = []
    monkeypatch.setattr(report.webbrowser, "open", lambda address: opened.append(address) or True)
    monkeypatch.setattr(report.sys, "platform", "linux")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    for display, said in (("", True), (":0", False)):
        monkeypatch.setenv("DISPLAY", display)
        assert report.main([str(finished), "--out", str(tmp_path), "--open"]) == 0
        assert ("no browser to show it here" in capsys.readouterr().out) == said
    assert opened == [(tmp_path / "report.html").as_uri()]


def test_a_line_that_is_half_written_is_left_out(finished, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(finished, broken)
    for name in ("rollouts.jsonl", "probes.jsonl"):
        with (broken / name).open("a") as file:
            file.write('{"step": 4, "ha')
    assert len(read_run(broken).probes) == 4 and rollouts_of(read_run(broken), 10**9)[2] == 3


def test_names_tell_runs_apart(finished, tmp_path):
    paths = [tmp_path / name / "seed0" for name in ("a", "b")] + [tmp_path / "_hidden"]
    for path in paths:
        shutil.copytree(finished, path)
    runs = [read_run(path) for path in paths]
    tell_apart(runs)
    assert [run.name for run in runs] == ["a/seed0", "b/seed0", "hidden"]


def test_the_start_is_step_0_and_bad_cells_are_empty(finished, tmp_path):
    run = read_run(finished)
    assert run.series("nll_control")[0] == [0, 1, 2, 3] and run.series("reward")[0] == [1, 2, 3]
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    lines = (copy / "metrics.csv").read_text().splitlines()
    place = lines[0].split(",").index("entropy")
    cells = lines[2].split(",")
    lines[2] = ",".join([*cells[:place], "nan", *cells[place + 1 :]])
    (copy / "metrics.csv").write_text("\n".join(lines) + "\n")
    assert read_run(copy).metrics["entropy"][1] is None


def test_ground_truth_has_no_probabilities(finished):
    row = json.loads((finished / "rollouts.jsonl").read_text().splitlines()[0])
    chat = load_chat(NANO)
    assert report._rollout(row | {"source": "oracle"}, chat)["logprobs"] == []
    assert len(report._rollout(row, chat)["logprobs"]) == len(row["tokens"])


@pytest.mark.slow
def test_what_is_no_run_is_refused_by_name(tmp_path, capsys, finished):
    with pytest.raises(Unreadable, match="config.json"):
        read_run(tmp_path)
    assert main([str(tmp_path / "nothing")]) == 2
    assert "nothing" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "metrics.csv").write_text("step,reward\n")
    assert main([str(tmp_path)]) == 2, "a run without any step"
    gone = tmp_path / "gone"
    shutil.copytree(finished, gone)
    config = json.loads((gone / "config.json").read_text()) | {"model": str(tmp_path / "no-model")}
    (gone / "config.json").write_text(json.dumps(config))
    assert main([str(gone)]) == 0, "a run that was copied to another machine is read with its own model"
    assert "no-model" in capsys.readouterr().err
    shutil.rmtree(gone / "model")
    assert main([str(gone)]) == 2 and "no-model" in capsys.readouterr().err
    bad = tmp_path / "bad"
    shutil.copytree(finished, bad)
    (bad / "rollouts.jsonl").write_text('{"step": 1}\n')
    assert main([str(bad)]) == 2 and "rollouts.jsonl cannot be read" in capsys.readouterr().err


def test_smoothing_by_hand():
    assert smooth([1, 3, 5, 7], 2) == [1, 2, 4, 6] and smooth([1, 3], 1) == [1, 3]


def test_sparkline_by_hand():
    assert spark([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert spark([5, 5]) == "▁▁" and spark([]) == ""
    assert spark(list(range(80)), 8) == "▁▂▃▄▅▆▇█"


def test_screen_fits_a_terminal(finished):
    lines = screen([read_run(finished)]).splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 84
    assert any("spikes at the end" in line for line in lines)


def seen_in_a_browser(page, tmp_path):
    """(what the page wrote down as it went through every step, task and shading by itself; its DOM)"""
    flags = (
        "--headless --no-sandbox --disable-gpu --enable-logging=stderr --virtual-time-budget=60000 --dump-dom"
    )
    command = [BROWSER, *flags.split(), f"--user-data-dir={tmp_path}", f"{page.as_uri()}#selftest"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    found = re.search(r'<pre id="selftest">(.*?)</pre>', done.stdout)
    assert found, done.stderr[-2000:]
    seen = json.loads(found[1])
    assert seen["errors"] == [] and "CONSOLE" not in done.stderr
    return seen, done.stdout


@pytest.mark.skipif(BROWSER is None, reason="no chromium: apt-get install chromium")
def test_the_page_in_a_browser(page, tmp_path):
    seen, dom = seen_in_a_browser(page, tmp_path)
    logged = (page.parent.parent / "first" / "rollouts.jsonl").read_text().splitlines()
    assert (seen["steps"], seen["tasks"], seen["rollouts"]) == (3, 3 * 2, len(logged))
    assert seen["shadings"] == 3 and seen["images"] == len(FIGURES) and seen["scripts"] == 0
    assert seen["states"] == sum(len(json.loads(line)["states"]) for line in logged)
    assert "<title>nanotoolrl report</title>" in dom, "hostile text was run"


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium: apt-get install chromium")
@pytest.mark.parametrize("name, steps", [("collapse", 20), ("demo", 2 * 16)])
def test_the_committed_pages_in_a_browser(name, steps, tmp_path):
    """They are of the present template, hold every step of their runs, and open without an error."""
    page = DOCS / f"{name}.html"
    seen, _ = seen_in_a_browser(page, tmp_path)
    assert seen["steps"] == steps and seen["shadings"] == 3 and seen["images"] == len(FIGURES)
    text = page.read_text(encoding="utf-8")
    template = TEMPLATE.read_text(encoding="utf-8")
    assert all(template.split(f"<{tag}>")[1].split(f"</{tag}>")[0] in text for tag in ("style", "script"))
    assert page.stat().st_size < 5e6
