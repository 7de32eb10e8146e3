"""The benchmark at tiny sizes: what it measures is right, what is wrong is called wrong."""

import json
from types import SimpleNamespace

import pytest
import torch
from helpers.rollouts import ragged_episodes, sampled, small_task

from bench import command as bench
from bench import kernel, measure, runs, sampling, steps
from bench.measure import Arm, Row, markdown, table
from bench.models import seeded_policy
from bench.parity import check_parity
from bench.parts import REST, Parts, parts_table
from bench.replay import ReplayProcessor
from nanotoolrl.env import Episode
from nanotoolrl.loading import load
from nanotoolrl.sampler import Sampler
from nanotoolrl.world.tasks import load_tasks

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["kernel", "sampler", "step"])
def test_command(what, tmp_path, capsys):
    """Runs with the peers that are installed, names the others, writes what docs/speed.md needs."""
    path = tmp_path / "deep" / "out.json"
    assert bench.main([what, "--small", "--repeats", "1", "--device", "cpu", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    result = json.loads(path.read_text())
    assert result["command"] == f"python -m nanotoolrl.bench {what} --small --repeats 1 --device cpu"
    assert {"cpu", "threads", "torch", "transformers", "python"} <= set(result["machine"])
    for row in result["rows"]:
        assert row["name"] in out and row["arms"][0]["name"] == "nanotoolrl"
        assert all(len(arm["seconds"]) == 1 for arm in row["arms"])
        assert all(line in out for line in row["missing"])
        assert row["arms"][0]["error"] <= row["arms"][0]["tolerance"]
        assert row["limit"] is None or row["limit"] > 0
    assert markdown(result).count("\n") == 1 + sum(1 + len(row["arms"]) for row in result["rows"])


@pytest.mark.slow
def test_growth_has_a_point_on_every_axis(tmp_path, monkeypatch, capsys):
    """Also where no peer is installed; two points of an axis have a slope."""
    monkeypatch.setattr(measure.importlib.util, "find_spec", lambda name: None)
    path = tmp_path / "growth.json"
    figure = tmp_path / "growth.png"
    files = ["--json", str(path), "--figure", str(figure)]
    assert bench.main(["growth", "--small", "--device", "cpu", *files]) == 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    result = json.loads(path.read_text())
    assert [row["axis"] for row in result["rows"]] == list(steps.GROWTH)
    assert [row["at"] for row in result["rows"]] == [values[0] for values in steps.GROWTH.values()]
    assert markdown(result) and "16 rollouts" in capsys.readouterr().out


def test_slopes_by_hand():
    """Twice the rows take four times as long in one arm, as long in the other."""
    rows = [
        Row("", [Arm("nanotoolrl", [at**2]), Arm("other", [3.0])], axis="rows", at=at)
        for at in (2.0, 4.0, 8.0)
    ]
    assert steps.slopes(rows) == {"rows": {"nanotoolrl": pytest.approx(2), "other": pytest.approx(0)}}
    assert "| rows to the power of | 2.00 | 0.00 |" in steps.slopes_table(steps.slopes(rows))
    assert steps.slopes(rows[:1]) == {}


def test_a_task_is_lengthened(policy):
    task = load_tasks("train")[0]
    longer = steps.lengthened(policy, task, 700)
    length = len(policy.chat.prompt_ids(*Episode(longer).prompt(), "hermes"))
    assert 700 <= length <= 705 and longer.turns[1:] == task.turns[1:]
    assert longer.turns[0].user.endswith(task.turns[0].user)


@pytest.mark.slow
def test_the_parts_of_a_step_make_it_up(tmp_path, capsys):
    path = tmp_path / "parts.json"
    assert bench.main(["parts", "--small", "--device", "cpu", "--json", str(path)]) == 0
    (found,) = [Parts(**one) for one in json.loads(path.read_text())["parts"]]
    assert {"attention", "MLP", "head", "choice", "norms", "projections", REST} <= set(found.parts)
    assert found.limit == max(found.read, found.compute) > 0
    assert parts_table([found]) in capsys.readouterr().out
    assert bench.main(["parts", "--device", "meta"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["auto", "bf16"])
def test_parity_command(monkeypatch, tmp_path, dtype):
    monkeypatch.setattr(bench, "load_tasks", lambda name: [small_task()] * 20)
    path = tmp_path / "parity.json"
    assert bench.main(["step", "--parity", "--device", "cpu", "--dtype", dtype, "--json", str(path)]) == 0
    assert json.loads(path.read_text())["parity"]["N"] > 0


@pytest.mark.slow
def test_missing_peers_are_named(monkeypatch, capsys):
    monkeypatch.setattr(measure.importlib.util, "find_spec", lambda name: None)
    bench.main(["kernel", "--small", "--repeats", "1", "--device", "cpu"])
    out = capsys.readouterr().out
    for package in ("trl", "liger-kernel", "cut-cross-entropy"):
        assert f"{package}: not installed (pip install {package})" in out


@pytest.mark.slow
def test_a_wrong_result_fails_however_fast(monkeypatch, capsys):
    right = kernel.token_logprob

    def wrong(*arguments):
        logprob, entropy = right(*arguments)
        return logprob + 1e-3, entropy

    monkeypatch.setattr(kernel, "token_logprob", wrong)
    assert bench.main(["kernel", "--small", "--repeats", "1", "--device", "cpu"]) == 1
    said = capsys.readouterr()
    assert "WRONG" in said.out and "a result is wrong" in said.err


@pytest.mark.parametrize(
    "error, wrong", [(1e-5, False), (1e-4, False), (2e-4, True), (float("nan"), True), (None, False)]
)
def test_what_is_wrong(error, wrong):
    assert Arm("x", [1.0], error=error, tolerance=1e-4).wrong == wrong


def test_table_of_known_numbers():
    ours = Arm("nanotoolrl", [2.0, 1.0, 4.0], work=100, peak_mb=12.4, error=1e-6, tolerance=1e-4)
    other = Arm("other", [6.0], note="slow")
    text = table([Row("work", [ours, other], limit=1.0, missing=["x: not installed"])])
    assert "2.00 s (1.00 to 4.00), 50 tok/s  1.00x           50%           12 MB        1e-06" in text
    assert "3.00x" in text and "slow" in text and "x: not installed" in text


def test_unknown_model_is_refused(capsys):
    assert bench.main(["step", "--parity", "--device", "cpu", "--model", "data/nan0"]) == 2
    assert "data/nan0" in capsys.readouterr().err


def test_parity(policy, capsys):
    """Sampler and trainer agree; a trainer that reads other weights does not go unnoticed."""
    assert check_parity(policy, [small_task()], group=2).largest <= 2e-5
    other = load("nano", device="cpu")
    honest = other.logprobs
    other.logprobs = lambda *arguments: (honest(*arguments)[0] + 0.2, None)
    parity = check_parity(other, [small_task()], group=2)
    assert parity.largest == pytest.approx(0.2, abs=1e-3) and parity.outside == 1.0
    assert "100.000% of the ratios" in str(parity)
    assert parity.itself <= 2e-5
    assert parity.wrong(torch.float32) and parity.wrong(torch.bfloat16)


def test_bad_flags_are_refused(capsys):
    for flags in (["--device", "nope"], ["--device", "cuda:99"]):
        with pytest.raises(SystemExit) as stop:
            bench.main(["kernel", *flags])
        assert stop.value.code == 2 and "bench: error: " in capsys.readouterr().err


@pytest.mark.slow
def test_busy_runs_what_it_says(monkeypatch):
    """Processes are only noted: which command, in which environment, beside how many others."""
    monkeypatch.setenv("GOMP_SPINCOUNT", "5")
    monkeypatch.setattr(runs, "available_cores", lambda: 3)
    going, ran = [], []

    def start(command):
        going.append(command)
        return SimpleNamespace(kill=going.pop)

    def run(command, env, **_):
        named = {name: env[name] for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT") if name in env}
        ran.append((command[1:4], named, len(going)))

    monkeypatch.setattr(runs, "subprocess", SimpleNamespace(Popen=start, run=run))
    (row,) = runs.busy(CPU, repeats=2, small=False)
    assert not going and {tuple(command) for command, *_ in ran} == {("train.py", "--scheme", "hint")}
    asleep = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
    ways = [({}, 0), ({}, 3), ({"GOMP_SPINCOUNT": "300000"}, 0), (asleep, 0), ({}, 3)]
    assert [(named, beside) for _, named, beside in ran] == ways * 2
    assert [len(arm.seconds) for arm in row.arms] == [2] * 5
    ran.clear()
    default, collapse = runs.whole(CPU, repeats=1, small=False)
    assert [command for command, *_ in ran] == [
        ["train.py", "--scheme", "hint"],
        ["train.py", "--preset", "collapse"],
    ]
    assert len(default.arms) == len(collapse.arms) == 1


def test_messages_of(policy):
    rows = Sampler(policy, max_new_tokens=8).rollout(ragged_episodes())
    for row in rows:
        spoken = row.spoken_ids()
        assert len(spoken) == len(row.states) and sum(spoken, []) == sampled(row)


def test_replay_leaves_one_token():
    replay = ReplayProcessor([[5, 7], [3]], prompt_width=4, fill=9)
    for width, expected in ((4, [5, 3]), (5, [7, 9])):
        scores = replay(torch.zeros(2, width, dtype=torch.long), torch.randn(2, 12))
        assert scores.argmax(1).tolist() == expected and (scores > -1).sum() == 2


@pytest.mark.slow
def test_a_wrong_replay_is_wrong_on_every_device(monkeypatch):
    policy = seeded_policy(CPU, small=True)
    monkeypatch.setattr(sampling, "generate_rollout", lambda *_: [[0]])
    work = sampling.workload("x", load_tasks("train")[:1], 2, 0)
    assert sampling.sampler_row(policy, work, repeats=1).arms[0].wrong
