"""Whole runs, and the promise that an interrupted run ends like any other."""

import json
import re
import signal

import pytest
import torch
from helpers.models import MODELS, policy_like
from helpers.runs import FEW, OTHERS, TINY, rows, run, run_and_copy, same_run, sent, some_tasks, weights

import sample
import train
from nanotoolrl import schemes
from nanotoolrl.config import Config, flag
from nanotoolrl.env import Episode
from nanotoolrl.judge import Judge
from nanotoolrl.loading import NANO, load
from nanotoolrl.look import report
from nanotoolrl.look.evaluate import MOST_NAMED, Scores, prompt_length
from nanotoolrl.run import Step, rollout
from nanotoolrl.signals import SCHEMES
from nanotoolrl.supervise import hint_text
from nanotoolrl.trajectory import demonstration
from nanotoolrl.world.tasks import load_tasks

ALL = [(name, schedule) for name, one in SCHEMES.items() for schedule in one.schedules or ("",)]


@pytest.mark.slow
@pytest.mark.parametrize("scheme, schedule", ALL)
def test_every_scheme_runs_with_evaluation(scheme, schedule, tmp_path, capsys):
    out = tmp_path / "run"
    flags = ["--scheme", scheme, "--eval-count", 4, "--eval-tasks", OTHERS, "--show-every", 1]
    flags += ["--eval-trained", 2]
    flags += ["--max-messages", 4, "--max-new-tokens", 48, "--eval-every", 0]
    flags += ["--schedule", schedule] if schedule else []
    assert run(*flags, out=out) == 0
    printed = capsys.readouterr().out
    assert "2 prompts x 2 rollouts = 4 trajectories, 2 updates" in printed
    assert "before" in printed and "after" in printed and "difference, paired" in printed
    assert ("assistant |" in printed and "turns:" in printed) or (scheme, schedule) == ("sft", "none")
    result = json.loads((out / "result.json").read_text())
    ways = ["held out, greedy", "held out, sampled", "trained on, greedy", "trained on, sampled"]
    assert [*result["after"]] == [*result["before"]] == ways
    counts = [sum(map(len, scores["rewards"].values())) for scores in result["after"].values()]
    assert counts == [4, 4, 2, 2]
    stored = json.loads((out / "config.json").read_text())
    assert stored["scheme"] == scheme and stored["versions"]["torch"] == torch.__version__
    made, start = (json.loads((path / "config.json").read_text()) for path in (out / "model", NANO))
    assert made | {"transformers_version": ""} == start | {"transformers_version": ""}


@pytest.mark.slow
def test_greedy_evaluation_on_a_part_every_few_steps(tmp_path):
    flags = ["--scheme", "grpo", "--steps", 2, "--eval-count", 4, "--eval-part", 3]
    flags += ["--eval-tasks", OTHERS]
    assert run(*flags, "--eval-every", 2, out=tmp_path / "run") == 0
    assert [row["eval_success"] != "" for row in rows(tmp_path / "run")] == [False, True]
    lines = [json.loads(line) for line in (tmp_path / "run" / "probes.jsonl").read_text().splitlines()]
    assert sum(lines[2]["greedy_states"].values()) >= 3 and "greedy_states" not in lines[1]
    result = json.loads((tmp_path / "run" / "result.json").read_text())["after"]
    assert Scores(**result["held out, greedy"]).of("all").n == 4
    assert run(*flags, "--eval-every", 0, out=tmp_path / "off") == 0
    assert all(row["eval_success"] == "" for row in rows(tmp_path / "off"))
    assert all(torch.equal(weights(tmp_path / "run")[k], v) for k, v in weights(tmp_path / "off").items())


@pytest.mark.slow
def test_same_command_same_bits(four, tmp_path):
    assert run("--scheme", "hint", "--steps", 4, out=tmp_path / "again") == 0
    same_run(four, tmp_path / "again")


@pytest.mark.slow
def test_two_steps_and_resume_equal_four(four, tmp_path):
    out = tmp_path / "run"
    assert run("--scheme", "hint", "--steps", 2, out=out) == 0
    assert train.main(["--resume", "--out", str(out), "--steps", "4"]) == 0
    same_run(four, out)


@pytest.mark.slow
def test_half_precision_resumes_to_the_bit(tmp_path):
    """Weights in bf16 with their fp32 masters."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_and_copy(1, "--scheme", "grpo", "--steps", 2, "--dtype", "bf16", out=whole, copy=parts)
    assert train.main(["--resume", "--out", str(parts)]) == 0
    same_run(whole, parts)
    assert all(tensor.dtype == torch.bfloat16 for tensor in weights(whole).values())


@pytest.mark.slow
def test_reference_log_probs_train_the_same(tmp_path):
    for name in ("auto", "reference", "tiled"):
        assert run("--scheme", "grpo", "--steps", 1, "--logprob", name, out=tmp_path / name) == 0
    losses = [float(rows(tmp_path / name)[0]["loss"]) for name in ("auto", "reference", "tiled")]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-5) and losses[0] != 0


@pytest.mark.slow
def test_interrupt_before_the_first_step_loses_nothing(tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    out, evaluated = tmp_path / "run", ("--eval-count", 4, "--eval-tasks", OTHERS)
    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", interrupted)
        assert run("--scheme", "hint", *evaluated, out=out) == 130
    assert "--resume goes on" in capsys.readouterr().err
    assert load(out).context, "a model to look at, even here"
    assert run("--scheme", "hint", *evaluated, "--resume", out=out) == 0
    assert len(rows(out)) == 2 and (out / "result.json").is_file()


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("scheme", STATEFUL)
def test_resume_of_what_is_kept_across_steps(scheme, tmp_path):
    """The pool of examples, healthy weights, a decaying share: all of it goes on after a stop."""
    flags = ["--scheme", scheme, "--probe-every", 1, "--lr", 3e-3, "--seed", 0]
    own = {"round_steps": 2, "sft_window": 2, "sentinel_limit": 1.001, "chord_steps": 4}
    for name in own.keys() & SCHEMES[scheme].settings:
        flags += [flag(name), own[name]]
    flags += ["--max-messages", 4, "--max-new-tokens", 64]
    run_and_copy(2, *flags, "--steps", 4, out=tmp_path / "whole", copy=tmp_path / "parts")
    assert train.main(["--resume", "--out", str(tmp_path / "parts")]) == 0
    same_run(tmp_path / "whole", tmp_path / "parts")
    columns = {"chord": "chord_mu", "sentinel": "rollbacks"}
    assert any(row[columns.get(scheme, "sft_loss")] for row in rows(tmp_path / "parts"))


@pytest.mark.slow
def test_kl_of_sft_rl_pulls_to_the_sft_checkpoint(tmp_path):
    """Also after a resume, where it can only come from the checkpoint."""
    flags = ["--scheme", "sft_rl", "--kl", 0.5, "--sft-lr", 3e-3]
    run_and_copy(1, *flags, "--steps", 2, out=tmp_path / "whole", copy=tmp_path / "parts")
    assert train.main(["--resume", "--out", str(tmp_path / "parts")]) == 0
    same_run(tmp_path / "whole", tmp_path / "parts")
    saved = torch.load(tmp_path / "parts" / "checkpoint.pt", weights_only=True)["saved"]["state"]["reference"]
    start = load(NANO).model.state_dict()
    assert any(not torch.equal(saved[name], start[name]) for name in start)


@pytest.mark.slow
def test_foreign_source(tmp_path):
    assert run("--scheme", "sft", "--sft-source", "foreign", out=tmp_path / "foreign") == 0
    assert run("--scheme", "sft", out=tmp_path / "own") == 0
    assert rows(tmp_path / "own")[0]["sft_loss"] != rows(tmp_path / "foreign")[0]["sft_loss"]
    assert rows(tmp_path / "own")[0]["reward"] == "", "nothing was rolled out"


def test_a_judge_that_is_not_there_is_refused_or_counted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("nanotoolrl.judge.BACK_OFF", (0.0, 0.0, 0.0))
    flags = ["--scheme", "prs", "--judge", "http://127.0.0.1:9/v1", "--steps", 1]
    assert run(*flags, out=tmp_path / "run") == 2
    assert "127.0.0.1:9" in capsys.readouterr().err and not (tmp_path / "run").exists()
    monkeypatch.setattr(Judge, "check", lambda judge: None)  # it answers, and then goes away
    assert run(*flags, out=tmp_path / "run") == 0
    assert (tmp_path / "run" / "config.json").stat().st_mode & 0o077 == 0
    row = rows(tmp_path / "run")[0]
    assert int(row["judge_fallbacks"]) == int(row["failed_tasks"]) > 0


def test_bad_paths_are_refused_by_name(tmp_path, capsys):
    broken = tmp_path / "bad.jsonl"
    broken.write_text("{}\n")
    for flags, said in [
        (["--model", tmp_path / "no"], "config.json"),
        (["--tasks", "trian"], "train, val, test, foreign, ood"),
        (["--tasks", broken], "bad.jsonl, line 1"),
        (["--context", "140"], "fewer than --prompts"),
        (["--min-turns", "9"], "0 tasks with --min-turns 9 can be solved within the limits, fewer than"),
    ]:
        assert run(*flags, out=tmp_path / "run") == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_three_bad_updates_in_a_row_stop_with_the_last_good_state(tmp_path, monkeypatch, capsys):
    scheme = SCHEMES["grpo"]

    def poisoning(run, tasks):
        trajectories = rollout(run, tasks)
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [["--lr", 1e308], ["--lr", 1e308, "--entropy", 0.01], ["--lr", 1e38], ["--lr", 1e30]],  # the last: finite
)
def test_weights_that_are_not_finite_end_the_run_with_the_last_that_were(flags, tmp_path, capsys):
    """Adam steps far out of fp32: the run stops at once, keeps its last sound checkpoint and model, writes
    no NaN, and its advice can be followed."""
    out = tmp_path / "run"
    flags = ["--scheme", "grpo", "--group", 6, "--updates", 1, *flags]
    assert run(*flags, "--steps", 9, "--save-every", 1, out=out) == 1
    said = capsys.readouterr().err
    assert "are not finite. Start anew with lower rates (--lr, --sft-lr)" in said
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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_before_the_first_step_leaves_a_run_to_go_on_with(name, tmp_path):
    out, number = tmp_path / "run", getattr(signal, name)
    flags = ["--scheme", "grpo", "--eval-count", 60, "--eval-tasks", some_tasks("test", 60), "--steps", 1]
    code, errors = sent(number, "evaluating before", *flags, out=out)
    assert code == 128 + number, errors
    assert "--resume goes on from the last checkpoint" in errors and "Traceback" not in errors
    assert load(out).context


@pytest.mark.slow
def test_sigkill_loses_nothing_that_was_saved(four, tmp_path):
    """A real process, killed at its second step."""
    out = tmp_path / "run"
    flags = ["--scheme", "hint", "--steps", 4, "--show-every", 1, "--save-every", 1]
    assert sent(signal.SIGKILL, "--- step 2", *flags, out=out)[0] == -signal.SIGKILL
    assert train.main(["--resume", "--out", str(out)]) == 0
    same_run(four, out)


@pytest.mark.slow
def test_tools_are_given_up_after_the_set_time(tmp_path, monkeypatch):
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
        "--steps",
        1,
        "--eval-count",
        2,
        "--eval-trained",
        0,
        "--eval-tasks",
        OTHERS,
        "--tool-seconds",
        7,
        "--eval-every",
        0,
    ]
    assert run(*flags, out=tmp_path / "run") == 0
    assert seen.count(7.0) == 2 * 2 + 2 * (2 + 2)  # rollouts, and two evaluations, greedy and sampled


@pytest.mark.slow
def test_long_prompts_are_named_skipped_and_counted(tmp_path, capsys):
    out = tmp_path / "run"
    assert run("--context", 500, "--tasks", "train", "--steps", 1, out=out) == 0
    said = capsys.readouterr().out
    assert said.count("skipped: task train-") == MOST_NAMED
    more = int(re.search(r"skipped: (\d+) more such tasks", said)[1])
    assert 20 < more < 280
    assert rows(out)[0]["skipped_tasks"] == str(MOST_NAMED + more)


@pytest.mark.slow
def test_a_task_that_fits_is_trained_on(policy, tmp_path, capsys):
    """Room for its ground truth, and its prompt with a hint, is enough, whatever a message may have."""
    tasks, chat = load_tasks(str(FEW)), policy.chat
    whole = [len(demonstration(chat, task, "hermes").tokens) for task in tasks]
    hinted = [prompt_length(chat, task, "hermes", hint_text(task, "hermes")) for task in tasks]
    lengths = list(map(max, whole, hinted))
    flags = ["--tasks", FEW, "--scheme", "grpo", "--prompts", 1, "--updates", 1, "--steps", 1]
    assert run(*flags, "--context", min(lengths) + 1, out=tmp_path / "fits") == 0
    assert f"1 steps on {lengths.count(min(lengths))} tasks" in capsys.readouterr().out
    assert run(*flags, "--context", min(lengths), out=tmp_path / "not") == 2
    assert "0 tasks" in capsys.readouterr().err


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


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_layout_of_a_real_model_trains(name, tmp_path, capsys):
    """From a directory, layers computed again, and back: what is saved loads and is sampled from."""
    policy_like(name).save(tmp_path / "model")
    flags = ["--scheme", "ets", "--schedule", "sync", "--steps", 1, "--max-new-tokens", 64]
    flags += ["--model", tmp_path / "model", "--checkpointing", "--context", 4096]
    assert run(*flags, out=tmp_path / "run") == 0
    assert "memory plan: weights" in capsys.readouterr().out
    assert float(rows(tmp_path / "run")[0]["sft_loss"]) > 0
    start, end = (load(tmp_path / one).model.state_dict() for one in ("model", "run/model"))
    assert any(not torch.equal(start[name], end[name]) for name in start)
    assert sample.main(["--model", str(tmp_path / "run" / "model"), "--tasks", str(FEW)]) == 0


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_fall_is_kept_over_a_resume(tmp_path, monkeypatch):
    """Success .4 .4 .02 | resume | .02: the checkpoint knows all steps, the fall is that of the log."""
    shares = iter([0.4, 0.4, 0.02, 0.02])
    honest = train.measures
    monkeypatch.setattr(train, "measures", lambda run, step: honest(run, step) | {"success": next(shares)})
    out = tmp_path / "run"
    flags = [*TINY.split(), "--scheme", "grpo", "--keep-fall", "--out", str(out)]
    assert train.main([*flags, "--steps", "3"]) == 0
    assert {path.name for path in (out / "models").iterdir()} == {"before-fall"}
    assert train.main(["--resume", "--out", str(out), "--steps", "4"]) == 0
    assert {path.name for path in (out / "models").iterdir()} == {"before-fall", "fall"}
    saved = torch.load(out / "checkpoint.pt", weights_only=True)["saved"]
    assert saved["state"]["successes"] == [0.4, 0.4, 0.02, 0.02]
