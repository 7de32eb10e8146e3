"""The command line, the run directory, and the promise that an interrupted run ends like any other."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers.models import MODELS, policy_like
from helpers.runs import ROOT, TINY, rows, run, same_run, sent, weights

import sample
import train
from nanotoolrl import env, schemes
from nanotoolrl.calls import UNHEALTHY_STATES
from nanotoolrl.chat import control_tokens
from nanotoolrl.commandline import PRESETS, parse
from nanotoolrl.config import SETTINGS, Config
from nanotoolrl.env import Episode, Task
from nanotoolrl.judge import Judge
from nanotoolrl.loading import NANO, load
from nanotoolrl.look import evaluate, report
from nanotoolrl.look.evaluate import MOST_NAMED, Scores
from nanotoolrl.look.rundir import checksum
from nanotoolrl.look.screen import alarm
from nanotoolrl.run import Step
from nanotoolrl.signals import SCHEMES
from nanotoolrl.world.tasks import load_tasks


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """A run of four steps, the yardstick of the resume tests."""
    out = tmp_path_factory.mktemp("four") / "run"
    assert run("--scheme", "hint", "--steps", 4, out=out) == 0
    return out


ALL = [(name, schedule) for name, one in SCHEMES.items() for schedule in one.schedules or ("",)]


@pytest.mark.parametrize("scheme, schedule", ALL)
def test_every_scheme_runs_with_evaluation(scheme, schedule, few, tmp_path, capsys):
    out = tmp_path / "run"
    flags = ["--scheme", scheme, "--eval-count", 4, "--eval-tasks", "ood", "--show-every", 1, "--tasks", few]
    flags += ["--schedule", schedule] if schedule else []
    assert run(*flags, out=out) == 0
    printed = capsys.readouterr().out
    assert "2 prompts x 2 rollouts = 4 trajectories, 2 updates" in printed
    assert "before" in printed and "after" in printed and "long_context" in printed
    assert ("assistant |" in printed and "turns:" in printed) or (scheme, schedule) == ("sft", "none")
    result = json.loads((out / "result.json").read_text())
    assert sum(len(rewards) for rewards in result["after"]["rewards"].values()) == 4
    stored = json.loads((out / "config.json").read_text())
    assert stored["scheme"] == scheme and stored["versions"]["torch"] == torch.__version__
    made, start = (load(path).config.to_diff_dict() for path in (out / "model", NANO))
    assert made | {"transformers_version": ""} == start | {"transformers_version": ""}


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
        assert mass["control_negative"] <= 0 <= mass["control_positive"] and len(mass) == 4
        assert set(line.get("logit_gradient", control)) == control
    assert any("logit_gradient" in line for line in lines)
    for row, line in zip(rows(four), lines, strict=True):
        assert (row["displacement_truth"] != "") == ("tokens" in line)
        assert 0 < float(row["probe_seconds"]) < float(row["seconds"])
        if "tokens" in line:
            worst = max(values["growth"] for values in line["tokens"].values())
            assert float(row["spurious_growth"]) == pytest.approx(worst, rel=1e-4)


def test_greedy_evaluation_on_a_part_every_few_steps(few, tmp_path):
    flags = ["--scheme", "grpo", "--tasks", few, "--steps", 2, "--eval-count", 4, "--eval-part", 3]
    assert run(*flags, "--eval-every", 2, out=tmp_path / "run") == 0
    assert [row["eval_success"] != "" for row in rows(tmp_path / "run")] == [False, True]
    lines = [json.loads(line) for line in (tmp_path / "run" / "probes.jsonl").read_text().splitlines()]
    assert sum(lines[2]["greedy_states"].values()) >= 3 and "greedy_states" not in lines[1]
    part = Scores(**json.loads((tmp_path / "run" / "result.json").read_text())["after"])
    assert len(sum(part.rewards.values(), [])) == 4
    assert run(*flags, "--eval-every", 0, out=tmp_path / "off") == 0
    assert all(row["eval_success"] == "" for row in rows(tmp_path / "off"))
    assert all(torch.equal(weights(tmp_path / "run")[k], v) for k, v in weights(tmp_path / "off").items())


def test_same_command_same_bits(four, tmp_path):
    assert run("--scheme", "hint", "--steps", 4, out=tmp_path / "again") == 0
    same_run(four, tmp_path / "again")


def test_two_steps_and_resume_equal_four(four, tmp_path):
    out = tmp_path / "run"
    assert run("--scheme", "hint", "--steps", 2, out=out) == 0
    assert train.main(["--resume", "--out", str(out), "--steps", "4"]) == 0
    same_run(four, out)


@pytest.mark.parametrize("flags", ["--dtype bf16", "--share-prompt --updates 1"])
def test_other_ways_to_train_resume_to_the_bit(tmp_path, flags):
    """Half-precision weights with their fp32 masters; a group's rows as one sequence."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run("--scheme", "grpo", "--steps", 2, *flags.split(), out=whole) == 0
    assert run("--scheme", "grpo", "--steps", 1, *flags.split(), out=parts) == 0
    assert train.main(["--resume", "--out", str(parts), "--steps", "2"]) == 0
    same_run(whole, parts)
    kind = torch.bfloat16 if "bf16" in flags else torch.float32
    assert all(tensor.dtype == kind for tensor in weights(whole).values())


def test_reference_log_probs_train_the_same(tmp_path):
    for name in ("auto", "reference", "tiled"):
        assert run("--scheme", "grpo", "--steps", 1, "--logprob", name, out=tmp_path / name) == 0
    losses = [float(rows(tmp_path / name)[0]["loss"]) for name in ("auto", "reference", "tiled")]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-5)


def test_interrupt_before_the_first_step_loses_nothing(tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    out, evaluated = tmp_path / "run", ("--eval-count", 4)
    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", interrupted)
        assert run("--scheme", "hint", *evaluated, out=out) == 130
    assert "--resume goes on" in capsys.readouterr().err
    assert load(out).context, "a model to look at, even here"
    assert run("--scheme", "hint", *evaluated, "--resume", out=out) == 0
    assert len(rows(out)) == 2 and (out / "result.json").is_file()


def test_kill_between_checkpoints_and_resume(four, tmp_path, monkeypatch):
    """Dies in step 4 after a checkpoint at step 2: row 3 is written, cut on resume, and made again."""
    out = tmp_path / "run"
    scheme = SCHEMES["hint"]

    def dies(run, tasks):
        if run.step == 4:
            raise ZeroDivisionError
        return scheme.step(run, tasks)

    monkeypatch.setitem(SCHEMES, "hint", type(scheme)(**{**vars(scheme), "step": dies}))
    with pytest.raises(ZeroDivisionError):
        run("--scheme", "hint", "--steps", 4, "--save-every", 2, out=out)
    monkeypatch.undo()
    assert len(rows(out)) == 3
    for name in ("rollouts.jsonl", "probes.jsonl"):
        with (out / name).open("a") as file:
            file.write('{"step": 4, "half')
    assert train.main(["--resume", "--out", str(out)]) == 0
    same_run(four, out)


def test_ctrl_c_saves_and_exits_130_and_resumes(four, tmp_path):
    """A real process and a real signal."""
    out = tmp_path / "run"
    flags = ["--scheme", "hint", "--steps", 4, "--show-every", 1]
    code, errors = sent(signal.SIGINT, "--- step 1", *flags, out=out)
    assert code == 130, errors
    assert "--resume" in errors
    assert len(rows(out)) < 4
    assert train.main(["--resume", "--out", str(out)]) == 0
    same_run(four, out)


STATEFUL = ["ets", "prs", "ctrl_sft", "selfrepair", "bursts", "chord", "sentinel", "sft", "sft_rl"]


@pytest.mark.parametrize("scheme", STATEFUL)
def test_resume_of_what_is_kept_across_steps(scheme, few, tmp_path):
    """The pool of examples, healthy weights, a decaying share: all of it goes on after a stop."""
    flags = ["--scheme", scheme, "--tasks", few, "--round-steps", 2, "--sft-window", 2, "--probe-every", 1]
    flags += ["--sentinel-limit", 1.001, "--chord-steps", 4, "--lr", 3e-3]
    assert run(*flags, "--steps", 4, out=tmp_path / "whole") == 0
    assert run(*flags, "--steps", 2, out=tmp_path / "parts") == 0
    assert train.main(["--resume", "--out", str(tmp_path / "parts"), "--steps", "4"]) == 0
    same_run(tmp_path / "whole", tmp_path / "parts")
    columns = {"chord": "chord_mu", "sentinel": "rollbacks"}
    assert any(row[columns.get(scheme, "sft_loss")] for row in rows(tmp_path / "parts"))


def test_kl_of_sft_rl_pulls_to_the_sft_checkpoint(few, tmp_path):
    """Also after a resume, where it can only come from the checkpoint."""
    flags = ["--scheme", "sft_rl", "--tasks", few, "--kl", 0.5, "--sft-lr", 3e-3]
    assert run(*flags, "--steps", 2, out=tmp_path / "whole") == 0
    assert run(*flags, "--steps", 1, out=tmp_path / "parts") == 0
    assert train.main(["--resume", "--out", str(tmp_path / "parts"), "--steps", "2"]) == 0
    same_run(tmp_path / "whole", tmp_path / "parts")
    saved = torch.load(tmp_path / "parts" / "checkpoint.pt", weights_only=True)["saved"]["state"]["reference"]
    start = load(NANO).model.state_dict()
    assert any(not torch.equal(saved[name], start[name]) for name in start)


def test_foreign_source(few, tmp_path):
    assert run("--scheme", "sft", "--sft-source", "foreign", "--tasks", few, out=tmp_path / "foreign") == 0
    assert run("--scheme", "sft", "--tasks", few, out=tmp_path / "own") == 0
    assert rows(tmp_path / "own")[0]["sft_loss"] != rows(tmp_path / "foreign")[0]["sft_loss"]
    assert rows(tmp_path / "own")[0]["reward"] == "", "nothing was rolled out"


def test_a_judge_that_is_not_there_is_refused_or_counted(few, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("nanotoolrl.judge.BACK_OFF", (0.0, 0.0, 0.0))
    flags = ["--scheme", "prs", "--tasks", few, "--judge", "http://127.0.0.1:9/v1", "--steps", 1]
    assert run(*flags, out=tmp_path / "run") == 2
    assert "127.0.0.1:9" in capsys.readouterr().err and not (tmp_path / "run").exists()
    monkeypatch.setattr(Judge, "check", lambda judge: None)  # it answers, and then goes away
    assert run(*flags, out=tmp_path / "run") == 0
    assert (tmp_path / "run" / "config.json").stat().st_mode & 0o077 == 0
    row = rows(tmp_path / "run")[0]
    assert int(row["judge_fallbacks"]) == int(row["failed_tasks"]) > 0


def test_existing_directory_is_refused_not_overwritten(four, capsys):
    before = (four / "metrics.csv").read_bytes()
    assert run("--scheme", "grpo", out=four) == 2
    assert "--resume" in capsys.readouterr().err
    assert (four / "metrics.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--scheme", "nope"], "'hint'"),
        (["--preset", "nope"], "'smoke'"),
        (["--format", "nope"], "'hermes'"),
        (["--stepz", "3"], "did you mean --steps?"),
        (["--group", "0"], "--group must be positive"),
        (["--hint-count", "9"], "--hint-count 9 is more than --group"),
        (["--updates", "99"], "--updates 99"),
        (["--steps", "many"], "--steps"),
        (["--lr", "nan"], "--lr must be positive"),
        (["--scheme", "grpo", "--schedule", "sync"], "grpo takes no --schedule"),
        (["--scheme", "ets", "--schedule", "always"], "'interleaved'"),
        (["--scheme", "ops", "--oracle-count", "9"], "--oracle-count 9 leaves no rollout"),
        (["--chord-mu", "1.5"], "--chord-mu must be from 0 to 1"),
        (["--scheme", "guard", "--guard-weight", "3"], "--guard-weight must be from 0 to 1"),
        (["--group", "1"], "--group must be at least 2"),
        (["--seed", str(2**63)], "--seed must be at most 9223372036854775807"),
        (["--judge", "ftp://x"], "--judge"),
    ],
)
def test_bad_flags_are_refused_with_the_valid_ones(flags, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(*flags, out=tmp_path / "run")
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_scheme_keeps_its_own_settings_under_every_preset(scheme, preset):
    config = vars(parse(["--scheme", scheme, "--preset", preset])[0])
    own = dict(SCHEMES[scheme].defaults)
    assert {name: config[name] for name in own} == own


def test_bad_paths_are_refused_by_name(tmp_path, capsys):
    broken = tmp_path / "bad.jsonl"
    broken.write_text("{}\n")
    for flags, said in [
        (["--model", tmp_path / "no"], "config.json"),
        (["--tasks", "trian"], "train, test, foreign, ood"),
        (["--tasks", broken], "bad.jsonl, line 1"),
        (["--context", "140"], "fewer than --prompts"),
        (["--min-turns", "9"], "0 tasks with --min-turns 9 can be solved within the limits, fewer than"),
    ]:
        assert run(*flags, out=tmp_path / "run") == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


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


def test_three_bad_updates_in_a_row_stop_with_the_last_good_state(tmp_path, monkeypatch, capsys):
    scheme = SCHEMES["grpo"]

    def poisoning(run, tasks):
        trajectories = schemes.rollout(run, tasks)
        scores = torch.full((len(trajectories),), float("nan"))
        return Step(
            trajectories, torch.zeros(len(trajectories)), schemes.policy_update(run, trajectories, scores)
        )

    monkeypatch.setitem(SCHEMES, "grpo", type(scheme)(**{**vars(scheme), "step": poisoning}))
    out = tmp_path / "run"
    assert run("--scheme", "grpo", "--steps", 5, out=out) == 1
    assert "three updates in a row" in capsys.readouterr().err
    left = load(out).model.state_dict()
    assert all(torch.equal(left[name], tensor) for name, tensor in weights(out).items())
    start = load(NANO).model.state_dict()
    assert all(torch.equal(tensor, start[name]) for name, tensor in weights(out).items())
    assert [row["skipped_updates"] for row in rows(out)] == ["2", "2"]


@pytest.mark.parametrize(
    "flags",
    [["--lr", 1e308], ["--lr", 1e308, "--entropy", 0.01], ["--lr", 1e38], ["--lr", 1e30]],  # the last: finite
)
def test_weights_that_are_not_finite_end_the_run_with_the_last_that_were(flags, few, tmp_path, capsys):
    """Adam steps far out of fp32: the run stops at once, keeps its last sound checkpoint and model, writes
    no NaN, and its advice can be followed."""
    out = tmp_path / "run"
    flags = ["--scheme", "grpo", "--tasks", few, "--group", 6, "--updates", 1, *flags]
    assert run(*flags, "--steps", 9, "--save-every", 1, out=out) == 1
    said = capsys.readouterr().err
    assert "are not finite. Start anew with a lower --lr" in said
    assert all(tensor.isfinite().all() for tensor in weights(out).values())
    kept = load(out).model.state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in weights(out).items())
    table = rows(out)
    assert 0 < len(table) < 9 and torch.load(out / "checkpoint.pt")["saved"]["step"] == len(table) - 1
    for name in ("rollouts.jsonl", "probes.jsonl", "metrics.csv"):
        assert "nan" not in (out / name).read_text().lower() and "inf" not in (out / name).read_text()
    assert report.main([str(out), "--out", str(tmp_path / "page")]) == 0
    flags[flags.index("--lr") + 1] = 1e-4
    assert run(*flags, "--steps", 1, out=tmp_path / "lower") == 0


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_other_signals_save_too(name, four, tmp_path):
    """Slurm, docker stop, a closed terminal: saved, resumable, with a model to evaluate."""
    out, number = tmp_path / "run", getattr(signal, name)
    flags = ["--scheme", "hint", "--steps", 4, "--show-every", 1]
    code, errors = sent(number, "--- step 1", *flags, out=out)
    assert code == 128 + number, errors
    assert f"Stopped: {name}. Go on with --resume." in errors and len(rows(out)) < 4
    assert load(out).context
    assert train.main(["--resume", "--out", str(out)]) == 0
    same_run(four, out)


def test_what_was_ignored_stays_ignored():
    """nohup python train.py ..."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with train.StopSignal():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_models_are_kept_on_the_way(few, tmp_path, capsys):
    out = tmp_path / "run"
    flags = ["--scheme", "grpo", "--tasks", few, "--steps", 3, "--max-new-tokens", 90, "--format", "xml"]
    assert run(*flags, "--keep-every", 2, out=out) == 0
    assert [path.name for path in (out / "models").iterdir()] == ["step-2"]
    kept, end = (load(path).model.state_dict() for path in (out / "models" / "step-2", out))
    assert any(not torch.equal(kept[name], end[name]) for name in kept)
    assert evaluate.run_settings(str(out / "models" / "step-2"))["max_new_tokens"] == 90


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


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_before_the_first_step_leaves_a_run_to_go_on_with(name, tmp_path):
    out, number = tmp_path / "run", getattr(signal, name)
    flags = ["--scheme", "grpo", "--eval-count", 400, "--steps", 1]
    code, errors = sent(number, "evaluating before", *flags, out=out)
    assert code == 128 + number, errors
    assert "--resume goes on from the last checkpoint" in errors and "Traceback" not in errors
    assert load(out).context


def test_sigkill_loses_nothing_that_was_saved(four, tmp_path):
    """A real process, killed at its second step."""
    out = tmp_path / "run"
    flags = ["--scheme", "hint", "--steps", 4, "--show-every", 1, "--save-every", 1]
    assert sent(signal.SIGKILL, "--- step 2", *flags, out=out)[0] == -signal.SIGKILL
    assert train.main(["--resume", "--out", str(out)]) == 0
    same_run(four, out)


def test_evaluation_is_under_the_limits_of_training(tmp_path, capsys):
    """A run that cut messages at 24 tokens is scored as it scored itself, by evaluate and by the doctor."""
    out, stored = tmp_path / "run", tmp_path / "scores.json"
    flags = f"--preset smoke --steps 1 --scheme grpo --max-new-tokens 24 --eval-count 16 --out {out}"
    assert train.main(flags.split()) == 0
    assert "cannot be solved: task test-" in capsys.readouterr().err
    shown = ["--doctor", "--count", "16", "--model", str(out), "--json", str(stored)]
    assert evaluate.main(shown) == 0
    assert "cannot be solved: task test-" in capsys.readouterr().err
    after = json.loads((out / "result.json").read_text())["after"]
    page = json.loads(stored.read_text())
    assert page["model"]["states"] == after["states"] and page["arguments"]["max_new_tokens"] == 24
    command = ["--count", "16", "--format", "hermes", "--model", str(out), "--json", str(stored)]
    assert evaluate.main(command) == 0
    assert "cannot be solved: task test-" in capsys.readouterr().err
    again = json.loads(stored.read_text())
    assert again["scores"]["hermes"]["rewards"] == after["rewards"]
    assert again["scores"]["hermes"]["states"] == after["states"]
    assert again["arguments"]["max_new_tokens"] == 24
    assert evaluate.main([*command, "--max-new-tokens", "128"]) == 0
    assert json.loads(stored.read_text())["scores"]["hermes"]["states"] != after["states"]
    assert sample.main(["--model", str(out)]) == 0
    assert "overlong" in capsys.readouterr().out


def test_limits_come_from_flags_then_the_run_then_the_kind_of_tasks(tmp_path):
    (tmp_path / "model").mkdir()

    def limits(*flags, **settings):
        settings = {"scheme": "hint", "format": "xml", "tasks": "train"} | settings
        (tmp_path / "config.json").write_text(json.dumps(settings))
        args = evaluate.command_line().parse_args(["--model", str(tmp_path / "model"), *flags])
        return evaluate.chosen_limits(args)

    assert limits() == limits("--tasks", "ood") == evaluate.OUR_LIMITS
    assert limits("--tasks", "bfcl:test") == evaluate.BFCL_LIMITS
    run = {"tasks": "train", "max_new_tokens": 50, "max_messages": 9, "context": 700, "tool_seconds": 3.0}
    found = limits(**run, strict_empty_turn=True)
    assert (found.max_new_tokens, found.max_messages, found.context) == (50, 9, 700)
    assert found.strict_empty_turn and found.tool_seconds == 3.0
    other = limits("--tasks", "bfcl", **run)
    assert other == evaluate.BFCL_LIMITS, "the run's tasks were of another kind: the larger holds"
    trained = limits(tasks="bfcl:train", **dataclasses.asdict(evaluate.BFCL_LIMITS))
    assert trained == evaluate.BFCL_LIMITS, "on tasks of ours, too"
    assert limits("--tasks", "bfcl", **run | {"tasks": "bfcl:train"}).max_new_tokens == 50
    assert limits(tool_seconds=0.0).tool_seconds == 0, "never is a limit, too"
    assert limits("--context", "900", "--no-strict-empty-turn", **run, strict_empty_turn=True).context == 900
    assert evaluate.run_settings("nano") == {}, "wherever one stands"


def test_bfcl_is_trained_under_its_own_limits():
    config = parse(["--tasks", "bfcl"])[0]
    assert (config.max_new_tokens, config.max_messages, config.context) == (1024, 30, 8192)
    assert parse(["--tasks", "bfcl", "--max-new-tokens", "64"])[0].max_new_tokens == 64


def test_tools_are_given_up_after_the_set_time(few, tmp_path, monkeypatch):
    """The setting reaches every episode, of training and of evaluation."""
    seen = []
    init = Episode.__init__

    def noting(episode, *arguments, **settings):
        seen.append(settings.get("tool_seconds"))
        init(episode, *arguments, **settings)

    monkeypatch.setattr(Episode, "__init__", noting)
    flags = [
        "--scheme",
        "grpo",
        "--tasks",
        few,
        "--steps",
        1,
        "--eval-count",
        2,
        "--tool-seconds",
        7,
        "--eval-every",
        0,
    ]
    assert run(*flags, out=tmp_path / "run") == 0
    assert seen.count(7.0) == 2 * 2 + 2 * 2  # rollouts, and two evaluations


def test_the_ground_truth_may_take_longer_than_a_call_usually_may(monkeypatch):
    """A slow tool of somebody: its task loads, and is solved where a run gives it the time."""
    task = load_tasks("train")[0]
    carry_out = env.carry_out
    monkeypatch.setattr(env, "carry_out", lambda *what: (time.sleep(0.05), carry_out(*what))[1])
    monkeypatch.setattr(env, "TOOL_SECONDS", 0.01)
    again = Task.from_json(task.to_json())
    for seconds, reward in ((5.0, 1.0), (0.01, 0.0)):
        episode = Episode(again, tool_seconds=seconds)
        for message in env.oracle(again):
            if message["role"] == "assistant":
                episode.step(message["content"])
        assert episode.reward == reward


def test_long_prompts_are_named_skipped_and_counted(tmp_path, capsys):
    out = tmp_path / "run"
    assert run("--context", 500, "--steps", 1, out=out) == 0
    said = capsys.readouterr().out
    assert said.count("skipped: task train-") == MOST_NAMED
    more = int(re.search(r"skipped: (\d+) more such tasks", said)[1])
    assert 20 < more < 280
    assert rows(out)[0]["skipped_tasks"] == str(MOST_NAMED + more)


def test_out_of_memory_names_two_settings(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    scheme = SCHEMES["grpo"]
    monkeypatch.setitem(SCHEMES, "grpo", type(scheme)(**{**vars(scheme), "step": full}))
    assert run("--scheme", "grpo", out=tmp_path / "run") == 1
    assert "--tokens-at-once" in capsys.readouterr().err


def test_epochs_visit_every_task_once():
    config = Config(prompts=7, seed=3)
    tasks = list(range(35))
    order = [task for step in range(1, 11) for task in train.tasks_of_step(config, tasks, step)]
    assert sorted(order[:35]) == sorted(order[35:]) == tasks
    assert order[:35] != order[35:] != tasks


def test_alarm_names_token_and_state():
    calm = {f"state_{state}": 0.0 for state in UNHEALTHY_STATES}
    quiet = {"<tool_call>": {"growth": 9.9}, "<|im_end|>": {"growth": 1.0}}
    assert alarm(calm, calm, quiet) == alarm({}, {}, {}) == ""
    spiking = quiet | {"<tool_call>": {"growth": 12.0}, '{"': {"growth": 40.0}}
    loud = alarm(calm | {"state_bare": 0.5}, calm, spiking)
    assert "bare 50%" in loud and "<tool_call> x12" in loud and '{" x40' in loud and "im_end" not in loud


def test_list_and_help_show_everything(capsys):
    for flag in ("--list", "--help"):
        with pytest.raises(SystemExit) as stop:
            train.main([flag])
        assert stop.value.code == 0
    printed = capsys.readouterr().out
    for name in SCHEMES:
        assert name in printed
    for name in SETTINGS:
        assert "--" + name.replace("_", "-") in printed


@pytest.mark.parametrize("name", ["qwen0.5b", "qwen1.5b", "qwen3-1.7b"])
def test_presets_of_real_models_are_the_papers(name):
    config = parse(["--preset", name])[0]
    assert (config.tasks, config.eval_tasks, config.context) == ("bfcl:train", "bfcl:test", 8192)
    assert (config.steps, config.prompts, config.group, config.updates) == (300, 60, 8, 3)
    assert (config.lr, config.kl, config.max_new_tokens, config.max_messages) == (1e-6, 1e-4, 1024, 30)
    assert config.checkpointing and config.model.startswith("Qwen/Qwen")
    others = parse(["--preset", name, "--tasks", "train", "--context", "4096"])[0]
    assert (others.tasks, others.eval_tasks, others.context) == ("train", "test", 4096)


@pytest.mark.parametrize("name", MODELS)
def test_the_layout_of_a_real_model_trains(name, few, tmp_path, capsys):
    """From a directory, layers computed again, and back: what is saved loads and is sampled from."""
    policy_like(name).save(tmp_path / "model")
    flags = ["--scheme", "ets", "--schedule", "sync", "--steps", 1, "--max-new-tokens", 64]
    flags += ["--tasks", few, "--model", tmp_path / "model", "--checkpointing", "--context", 4096]
    assert run(*flags, out=tmp_path / "run") == 0
    assert "memory plan: weights" in capsys.readouterr().out
    assert float(rows(tmp_path / "run")[0]["sft_loss"]) > 0
    start, end = (load(tmp_path / one).model.state_dict() for one in ("model", "run/model"))
    assert any(not torch.equal(start[name], end[name]) for name in start)
    assert sample.main(["--model", str(tmp_path / "run" / "model"), "--tasks", str(few)]) == 0


def test_bfcl_trains(tmp_path, capsys):
    """`--preset smoke --tasks bfcl` with the built-in model, smaller: it fails every task, and is helped."""
    pytest.importorskip("bfcl_eval", reason="pip install --no-deps bfcl-eval mpmath")
    flags = ["--scheme", "ets", "--schedule", "sync", "--tasks", "bfcl", "--steps", 1, "--max-messages", 7]
    assert run(*flags, "--eval-count", 4, out=tmp_path / "run") == 0
    said = capsys.readouterr().out
    assert re.search(r"skipped: \d+ more such tasks", said) and "after" in said
    (row,) = rows(tmp_path / "run")
    assert float(row["success"]) == 0 and int(row["failed_tasks"]) == 2 and int(row["sft_tokens"]) > 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["tasks"], config["eval_tasks"], config["context"]) == ("bfcl:train", "bfcl:test", 8192)


def test_no_network_is_needed():
    """The default model is a directory of the repository; loading it asks no hub."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    code = "from nanotoolrl.loading import NANO, load; load(NANO, device='cpu')"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=120)
