"""The run directory: what its files hold, and that they are whole whatever happens."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from helpers.runs import ROOT, TINY, rows, run

import train
from nanotoolrl.chat import control_tokens
from nanotoolrl.commandline import stored_config
from nanotoolrl.loading import NANO, load
from nanotoolrl.look import evaluate
from nanotoolrl.look.rundir import RunDirectory, checksum, digest


def test_metrics_have_the_columns_of_the_contract(four):
    names = "step reward success contrast_groups loss kl entropy grad_norm clip_fraction tokens sample_tok_s"
    names += " train_tok_s logprob_gap spurious_control required_control nll_control nll_content"
    states = "overlong empty bare malformed polluted call foreign reply"
    table = rows(four)
    assert set(names.split()) | {f"state_{s}" for s in states.split()} <= set(table[0])
    assert [row["step"] for row in table] == ["1", "2", "3", "4"]
    assert table[0]["kl"] == "" and table[1]["kl"] != "", "columns that do not apply are empty, never 0"
    for row in table:
        assert sum(float(row[f"state_{s}"]) for s in states.split()) == pytest.approx(1)
        assert row["logprob_gap"] == "" or float(row["logprob_gap"]) < 2e-5


def test_rollouts_hold_what_a_viewer_needs(four):
    lines = [json.loads(line) for line in (four / "rollouts.jsonl").read_text().splitlines()]
    assert len(lines) == 4 * 2 * 2
    for line in lines:
        assert len(line["tokens"]) == len(line["loss_mask"]) == len(line["logprobs"])
        assert {"step", "group", "advantage", "text", "reward", "states", "verdicts", "source"} <= set(line)
    assert any(line["source"] == "hint" and line["sampled_prompt"] for line in lines)


def test_probes_hold_what_the_report_needs(four):
    """A line a step; control tokens in the steps that are probed, the rest in all of them."""
    lines = [json.loads(line) for line in (four / "probes.jsonl").read_text().splitlines()]
    start = lines.pop(0)
    assert start["step"] == 0 and start["nll_control"] > 0 < start["nll_content"]
    assert all(values["growth"] == 1 for values in start["tokens"].values())
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert ["tokens" in line for line in lines] == [False, True, False, True]
    control = set(control_tokens(load(NANO).chat, "hermes"))
    assert set(lines[1]["tokens"]) == control
    for line in lines:
        assert all(0 <= share <= 1 for share in line["survival"])
        mass = line["advantage_mass"]
        assert mass["control_negative"] <= 0 <= mass["control_positive"] and len(mass) == 12
        assert set(line.get("logit_gradient", control)) == control
    assert any("logit_gradient" in line for line in lines)
    for row, line in zip(rows(four), lines, strict=True):
        assert (row["displacement_truth"] != "") == ("tokens" in line)
        assert 0 < float(row["probe_seconds"]) < float(row["seconds"])
        if "tokens" in line:
            worst = max(values["growth"] for values in line["tokens"].values())
            assert float(row["spurious_growth"]) == pytest.approx(worst, rel=1e-4)


def test_existing_directory_is_refused_not_overwritten(four, capsys):
    before = (four / "metrics.csv").read_bytes()
    assert run("--scheme", "grpo", out=four) == 2
    assert "--resume" in capsys.readouterr().err
    assert (four / "metrics.csv").read_bytes() == before


def test_resume_refuses_what_it_cannot_continue(four, tmp_path, capsys):
    def refused(*flags, said, out):
        before = (
            {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} if out.exists() else {}
        )
        assert train.main(["--resume", "--out", str(out), *flags]) == 2
        assert said in capsys.readouterr().err
        assert all((out / name).read_bytes() == content for name, content in before.items())

    refused(said="config.json", out=tmp_path / "nothing")
    refused("--lr", "0.5", said="only --steps may change", out=four)
    refused("--scheme", "ets", "--schedule", "sync", said="only --steps may change", out=four)
    refused("--steps", "3", said="may only grow", out=four)
    copy = tmp_path / "copy"
    shutil.copytree(four, copy)
    good = (copy / "checkpoint.pt").read_bytes()
    for content in (good[: len(good) // 2], b"", b"not a checkpoint"):
        (copy / "checkpoint.pt").write_bytes(content)
        refused(said="half-written", out=copy)
    (copy / "checkpoint.pt").unlink()
    refused(said="no checkpoint.pt", out=copy)
    saved = torch.load(four / "checkpoint.pt", weights_only=True)["saved"]
    saved["model"] = {name: tensor[:1] for name, tensor in saved["model"].items()}
    torch.save({"saved": saved, "checksum": checksum(saved)}, copy / "checkpoint.pt")
    refused(said="does not fit the model", out=copy)


@pytest.mark.slow
def test_models_are_kept_on_the_way(tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    flags = ["--scheme", "grpo", "--steps", 3, "--max-new-tokens", 90, "--format", "xml"]
    assert run(*flags, "--keep-every", 2, out=out) == 0
    assert [path.name for path in (out / "models").iterdir()] == ["step-2"]
    kept, end = (load(path).model.state_dict() for path in (out / "models" / "step-2", out))
    assert any(not torch.equal(kept[name], end[name]) for name in kept)
    assert evaluate.run_settings(str(out / "models" / "step-2"))["max_new_tokens"] == 90
    monkeypatch.chdir(out / "models")
    assert evaluate.run_settings("step-2")["max_new_tokens"] == 90, "wherever one stands"


@pytest.mark.slow
def test_a_full_disk_is_said_and_leaves_the_last_checkpoint(tmp_path):
    """A limit on the size of files stands for it: the second checkpoint cannot be written."""
    out = tmp_path / "run"
    code = f"""
import resource, sys, train
from nanotoolrl.look.rundir import RunDirectory
save = RunDirectory.save
def full(directory, run, before):
    if run.step:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
    save(directory, run, before)
RunDirectory.save = full
sys.exit(train.main({[*TINY.split(), "--scheme", "grpo", "--steps", "1", "--out", str(out)]!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert f"train.py: cannot write {out / 'checkpoint.pt'}" in done.stderr
    assert not list(out.glob("*.tmp"))
    assert torch.load(out / "checkpoint.pt", weights_only=True)["saved"]["step"] == 0
    assert train.main(["--resume", "--out", str(out)]) == 0


@pytest.mark.slow
def test_a_disk_that_is_full_for_the_model_is_said(tmp_path):
    out = tmp_path / "run"
    code = f"""
import resource, signal, sys, train
save = train.RunDirectory.save_model
def full(self, *arguments):
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    save(self, *arguments)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
train.RunDirectory.save_model = full
sys.exit(train.main({[*TINY.split(), "--scheme", "grpo", "--steps", "1", "--out", str(out)]!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert f"train.py: cannot write {out / 'model'}" in done.stderr
    assert not list(out.glob("*.tmp")) and not (out / "model").exists()


@pytest.mark.slow
def test_a_run_that_was_stopped_before_it_measured_the_start_goes_on(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    flags = ["--scheme", "grpo", "--steps", 1]
    with monkeypatch.context() as patch:
        patch.setattr(train.ProbeSet, "measure", stop)
        assert run(*flags, out=tmp_path / "run") == 130
    assert (tmp_path / "run" / "probes.jsonl").read_text() == ""
    assert train.main(["--resume", "--out", str(tmp_path / "run")]) == 0
    assert len((tmp_path / "run" / "probes.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("nth", [1, 2])
def test_a_model_is_there_whenever_one_is_stopped(tiny, tmp_path, monkeypatch, nth):
    """At the first or at the second exchange of the old one and the new one; a link stays one."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "model").symlink_to(tmp_path / "disk")
    directory, exchange, seen = RunDirectory(tmp_path), os.replace, []
    directory.save_model(tiny)
    before = (tmp_path / "model" / "model.safetensors").stat().st_ino

    def replaced(old, new):
        seen.append(new)
        if len(seen) == nth:
            raise KeyboardInterrupt
        exchange(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replaced)
        with pytest.raises(KeyboardInterrupt):
            directory.save_model(tiny)
    assert (tmp_path / "model" / "model.safetensors").stat().st_ino == before
    directory.save_model(tiny)
    assert (tmp_path / "model" / "model.safetensors").stat().st_ino != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "model"]
    assert (tmp_path / "model").is_symlink()


@pytest.mark.slow
def test_what_is_written_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    """In that order: the new file, the exchange, the directory that tells of it."""
    seen, fsync, exchange = [], os.fsync, os.replace

    def noting(number):
        seen.append(os.readlink(f"/proc/self/fd/{number}"))
        fsync(number)

    def replacing(old, new):
        seen.append(f"{old} > {new}")
        exchange(old, new)

    monkeypatch.setattr(os, "fsync", noting)
    monkeypatch.setattr(os, "replace", replacing)
    out = tmp_path / "run"
    assert run("--scheme", "grpo", "--steps", 1, out=out) == 0
    for name in ("config.json", "metrics.csv", "checkpoint.pt", "model"):
        new, old = f"{out / name}.tmp", str(out / name)
        at = seen.index(f"{new} > {old}")
        assert new in seen[:at] and str(out) in seen[at:]
    assert f"{out}/model.tmp/model.safetensors" in seen


def copy_of(source, target):
    shutil.copytree(source, target)
    return target


def test_a_scheme_that_was_added_since_is_no_obstacle(four, tmp_path, capsys):
    """A run goes on with the settings and columns that it began with; its own must be there."""
    old = copy_of(four, tmp_path / "old")
    settings = json.loads((old / "config.json").read_text())
    del settings["void_weight"]
    (old / "config.json").write_text(json.dumps(settings))
    table = [line.split(",") for line in (old / "metrics.csv").read_text().splitlines()]
    place = table[0].index("dropped_rows")
    lines = [",".join(cells[:place] + cells[place + 1 :]) for cells in table]
    (old / "metrics.csv").write_text("\n".join(lines) + "\n")
    saved = torch.load(old / "checkpoint.pt", weights_only=True)["saved"]
    saved["settings"] = digest(stored_config(old / "config.json"), settings)
    torch.save({"saved": saved, "checksum": checksum(saved)}, old / "checkpoint.pt")
    assert train.main(["--resume", "--out", str(old), "--steps", "5"]) == 0
    assert "void_weight" not in json.loads((old / "config.json").read_text())
    assert "dropped_rows" not in rows(old)[0] and len(rows(old)) == 5
    settings.pop("hint_count")
    (old / "config.json").write_text(json.dumps(settings))
    assert train.main(["--resume", "--out", str(old)]) == 2
    assert "it lacks hint_count" in capsys.readouterr().err


@pytest.mark.parametrize("name, value", [("scheme", "foo"), ("schedule", "foo"), ("preset", "foo")])
def test_a_run_of_a_scheme_that_is_not_there_is_refused(four, tmp_path, capsys, name, value):
    old = copy_of(four, tmp_path / "old")
    settings = json.loads((old / "config.json").read_text())
    (old / "config.json").write_text(json.dumps(settings | {name: value}))
    (old / "checkpoint.pt").unlink()
    (old / "metrics.csv").write_text((old / "metrics.csv").read_text().splitlines()[0] + "\n")
    assert train.main(["--resume", "--out", str(old)]) == 2
    assert f"{value}" in capsys.readouterr().err


def test_a_header_that_is_not_whole_is_refused(four, tmp_path, capsys):
    old = copy_of(four, tmp_path / "old")
    saved = torch.load(old / "checkpoint.pt", weights_only=True)["saved"] | {"step": 0}
    torch.save({"saved": saved, "checksum": checksum(saved)}, old / "checkpoint.pt")
    header = (old / "metrics.csv").read_text().splitlines()[0]
    for text in (header, header.replace("step,reward", "reward,step") + "\n", header + ",seconds\n"):
        (old / "metrics.csv").write_text(text)
        assert train.main(["--resume", "--out", str(old)]) == 2
        assert "line 1: expected the columns" in capsys.readouterr().err
        assert (old / "metrics.csv").read_text() == text
