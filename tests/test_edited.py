# ruff: noqa: E501 (tables have long lines)
"""Run directories, model directories and flags as people and accidents leave them: a sentence, no traceback.

Every case runs the commands that would read it. Task files have their own list in test_tasks.py.
"""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.models import policy_like
from helpers.runs import FEW
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file

import sample
import train
from nanotoolrl.commandline import stored_config
from nanotoolrl.config import Refused
from nanotoolrl.loading import ModelError, load, load_chat
from nanotoolrl.look import evaluate, report
from nanotoolrl.look.metrics import metrics
from nanotoolrl.look.rundir import RunDirectory, checksum

SMALL = f"--preset smoke --scheme grpo --eval-count 0 --prompts 2 --group 2 --probe-tasks 2 --max-messages 4 --threads 1 --tasks {FEW}"
HUGE = "[" * 100_000
ROOT = Path(train.__file__).parent


def said_by(main, flags, capsys):
    """(exit code, stderr) of a command; whatever it raises but SystemExit fails the test."""
    capsys.readouterr()
    try:
        code = main([str(flag) for flag in flags])
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr().err


@pytest.fixture(autouse=True)
def small_figures(monkeypatch):
    """Figures are drawn once and small: here it is enough that they can be drawn."""
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: save(figure, path, dpi=20))


# -------------------------------------------------------------------------------------------- run directories
@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of three steps that went to its end, and another one with another learning rate."""
    home = tmp_path_factory.mktemp("made")
    for name, lr in (("run", "2e-4"), ("other", "1e-4")):
        flags = f"{SMALL} --steps 3 --save-every 2 --rollout-groups 1 --lr {lr} --out {home / name}"
        assert train.main(flags.split()) == 0
    return home


def setting(name, value):
    """Edit one setting of config.json."""

    def edit(run):
        settings = json.loads((run / "config.json").read_text(encoding="utf-8"))
        settings[name] = value
        (run / "config.json").write_text(json.dumps(settings), encoding="utf-8")

    return edit


def without(name):
    def edit(run):
        settings = json.loads((run / "config.json").read_text(encoding="utf-8"))
        del settings[name]
        (run / "config.json").write_text(json.dumps(settings), encoding="utf-8")

    return edit


def written(file, content):
    """Replace a file's content (text or bytes)."""
    content = content.encode() if isinstance(content, str) else content
    return lambda run: (run / file).write_bytes(content)


def changed(file, change):
    """Change the lines of a file."""

    def edit(run):
        lines = (run / file).read_text(encoding="utf-8").splitlines(keepends=True)
        (run / file).write_text("".join(change(lines)), encoding="utf-8")

    return edit


def gone(file):
    return lambda run: (run / file).unlink()


def a_directory(file):
    return lambda run: ((run / file).unlink(), (run / file).mkdir())


def checkpoint(change, sound=False):
    """Change what the checkpoint holds, as a whole file: `sound`, with the checksum that belongs to it."""

    def edit(run):
        found = torch.load(run / "checkpoint.pt", weights_only=True)
        change(found["saved"])
        torch.save(found | ({"checksum": checksum(found["saved"])} if sound else {}), run / "checkpoint.pt")

    return edit


def flipped(run):
    """One bit in the middle of the weights."""
    content = bytearray((run / "checkpoint.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (run / "checkpoint.pt").write_bytes(content)


def nan_weights(saved):
    next(iter(saved["model"].values()))[0] = float("nan")


def other_moments(saved):
    for moments in saved["optimizer"]["state"].values():
        moments["exp_avg"] = moments["exp_avg"].reshape(-1)[:1]


def scalar_moments(saved):
    for moments in saved["optimizer"]["state"].values():
        moments["exp_avg"] = moments["exp_avg"].reshape(-1)[0]


def no_moments(saved):
    for moments in saved["optimizer"]["state"].values():
        del moments["exp_avg_sq"]


def runs_code(run):
    torch.save({"saved": Pickled(run), "checksum": 0}, run / "checkpoint.pt")


def row(number, cell, column=0):
    """Change one cell of metrics.csv."""

    def change(lines):
        cells = lines[number].rstrip("\n").split(",")
        cells[column] = cell
        return [*lines[:number], ",".join(cells) + "\n", *lines[number + 1 :]]

    return changed("metrics.csv", change)


# What no run can go on from.
REFUSED = {
    **{f"{file} is gone": gone(file) for file in ("config.json", "metrics.csv", "probes.jsonl", "checkpoint.pt")},
    **{f"{file} is empty": written(file, "") for file in ("config.json", "metrics.csv", "probes.jsonl", "checkpoint.pt")},
    **{
        f"{file} is a directory": a_directory(file)
        for file in ("config.json", "metrics.csv", "probes.jsonl", "rollouts.jsonl", "checkpoint.pt")
    },
    **{
        f"{file} is binary": written(file, bytes(range(256)))
        for file in ("config.json", "metrics.csv", "probes.jsonl", "rollouts.jsonl", "checkpoint.pt")
    },
    "config is a list": written("config.json", "[]"),
    "config is null": written("config.json", "null"),
    "config is a number": written("config.json", "3"),
    "config is half": changed("config.json", lambda lines: lines[: len(lines) // 2]),
    "config is nested": written("config.json", HUGE),
    "another seed": setting("seed", 7),
    "another lr": setting("lr", 1e-3),
    "another scheme": setting("scheme", "hint"),
    "another group": setting("group", 4),
    "another model": setting("model", "data/nan0"),
    "a model that is a number": setting("model", 5),
    "an unknown scheme": setting("scheme", "nope"),
    "an unknown format": setting("format", "yaml"),
    "an unknown preset": setting("preset", "tiny"),
    "an lr that is text": setting("lr", "fast"),
    "an lr of null": setting("lr", None),
    "an lr that is not finite": setting("lr", float("nan")),
    "a seed that is a float": setting("seed", 0.5),
    "a seed that is true": setting("seed", True),
    "negative steps": setting("steps", -3),
    "steps that are text": setting("steps", "3"),
    "a group of one": setting("group", 1),
    "a switch that is a number": setting("adv_std", 1),
    "a list of tasks": setting("tasks", ["train"]),
    "no tasks of that name": setting("tasks", "nope"),
    "threads without end": setting("threads", 2**40),
    "no lr": without("lr"),
    "no keep_every (an older version)": without("keep_every"),
    "checkpoint is half": lambda run: os.truncate(run / "checkpoint.pt", 100_000),
    "checkpoint is text": written("checkpoint.pt", "weights"),
    "checkpoint has a flipped bit": flipped,
    "checkpoint is a tensor": lambda run: torch.save(torch.zeros(3), run / "checkpoint.pt"),
    "checkpoint is an empty dict": lambda run: torch.save({}, run / "checkpoint.pt"),
    "checkpoint of another run": lambda run: shutil.copy(run.parent / "other" / "checkpoint.pt", run),
    "weights are NaN": checkpoint(nan_weights),
    "weights are gone": checkpoint(lambda saved: saved["model"].popitem()),
    "weights are a list": checkpoint(lambda saved: saved.update(model=[])),
    "moments of another shape": checkpoint(other_moments),
    "moments of another shape, made on purpose": checkpoint(other_moments, sound=True),
    "moments that are numbers, made on purpose": checkpoint(scalar_moments, sound=True),
    "moments that are missing, made on purpose": checkpoint(no_moments, sound=True),
    "checkpoint that brings code": runs_code,
    "weights that are NaN, made on purpose": checkpoint(nan_weights, sound=True),
    "weights that are gone, made on purpose": checkpoint(lambda saved: saved["model"].popitem(), sound=True),
    "a learning rate of the optimiser": checkpoint(lambda saved: saved["optimizer"]["param_groups"][0].update(lr=1.0)),
    "moments are gone": checkpoint(lambda saved: saved["optimizer"].update(state={})),
    "optimiser without groups": checkpoint(lambda saved: saved["optimizer"].update(param_groups=[])),
    "optimiser is null": checkpoint(lambda saved: saved.update(optimizer=None)),
    "state is null": checkpoint(lambda saved: saved.update(state=None)),
    "step is text": checkpoint(lambda saved: saved.update(step="3")),
    "step is negative": checkpoint(lambda saved: saved.update(step=-1)),
    "step is beyond the logs": checkpoint(lambda saved: saved.update(step=5)),
    "scores are a list": checkpoint(lambda saved: saved.update(before=[1])),
    "random state of another size": checkpoint(lambda saved: saved.update(torch_rng=torch.zeros(3))),
    "settings are gone": checkpoint(lambda saved: saved.pop("settings")),
    "metrics: a blank line": changed("metrics.csv", lambda lines: [*lines[:2], "\n", *lines[2:]]),
    "metrics: a blank line at the top": changed("metrics.csv", lambda lines: ["\n", *lines]),
    "metrics: a step in quotes twice": row(2, '""2""'),
    "metrics: 2.0": row(2, "2.0"),
    "metrics: a step that is text": row(2, "two"),
    "metrics: an empty step": row(2, ""),
    "metrics: a negative step": row(2, "-2"),
    "metrics: a step twice": changed("metrics.csv", lambda lines: [*lines[:2], *lines[1:]]),
    "metrics: a step missing": changed("metrics.csv", lambda lines: [*lines[:2], *lines[3:]]),
    "metrics: steps in another order": changed("metrics.csv", lambda lines: [lines[0], *lines[:0:-1]]),
    "metrics: the last end is missing": changed("metrics.csv", lambda lines: [*lines[:-1], lines[-1].strip()]),
    "metrics: a column is missing": changed("metrics.csv", lambda lines: [x.rpartition(",")[0] + "\n" for x in lines]),
    "metrics: a cell too many": row(2, "2,2"),
    "metrics: no header": changed("metrics.csv", lambda lines: lines[1:]),
    "metrics: another header": row(0, "number"),
    "metrics: an open quote": row(2, '"2'),
    "probes: {}": changed("probes.jsonl", lambda lines: [*lines[:2], "{}\n", *lines[3:]]),
    "probes: a blank line": changed("probes.jsonl", lambda lines: [*lines[:2], "\n", *lines[2:]]),
    "probes: a list": changed("probes.jsonl", lambda lines: [*lines[:2], "[]\n", *lines[3:]]),
    "probes: the start is missing": changed("probes.jsonl", lambda lines: lines[1:]),
    "probes: a step twice": changed("probes.jsonl", lambda lines: [*lines[:2], *lines[1:]]),
    "probes: half a line": changed("probes.jsonl", lambda lines: [*lines[:2], lines[2][:9] + "\n", *lines[3:]]),
    "rollouts: {}": changed("rollouts.jsonl", lambda lines: ["{}\n", *lines]),
    "rollouts: a number": changed("rollouts.jsonl", lambda lines: [*lines[:1], "3\n", *lines[1:]]),
    "rollouts: a step that is text": changed("rollouts.jsonl", lambda lines: ['{"step": "1"}\n', *lines]),
    "rollouts: a step that is true": changed("rollouts.jsonl", lambda lines: ['{"step": true}\n', *lines]),
    "rollouts: in another order": changed("rollouts.jsonl", lambda lines: lines[::-1]),
    "rollouts: nested": changed("rollouts.jsonl", lambda lines: [HUGE + "\n", *lines]),
}  # fmt: skip
# What it can.
FINE = {
    "nothing": lambda run: None,
    "rollouts were deleted": gone("rollouts.jsonl"),
    "rollouts are empty": written("rollouts.jsonl", ""),
    "metrics: a step in quotes": row(2, '"2"'),
    "a row of a step to come": changed("metrics.csv", lambda lines: [*lines, lines[-1].replace("3", "4", 1)]),
    "half a row of a step to come": changed("metrics.csv", lambda lines: [*lines, "4,0.1"]),
    "half a line of probes to come": changed("probes.jsonl", lambda lines: [*lines, '{"step": 4, "sur']),
    "half a line of rollouts to come": changed("rollouts.jsonl", lambda lines: [*lines, '{"step": 4']),
    "an old half-written checkpoint": written("checkpoint.pt.tmp", "x"),
    "a file of somebody": written("notes.txt", "mine"),
    "no model": lambda run: shutil.rmtree(run / "model"),
    "no result": lambda run: (run / "result.json").unlink(missing_ok=True),
    "a lock that nobody holds": written("run.lock", "1"),
    "an lr written as text of the same number": changed("config.json", lambda lines: [x.replace("0.0002", "2e-4") for x in lines]),
}  # fmt: skip


def copied(made, tmp_path):
    for name in ("run", "other"):
        shutil.copytree(
            made / name, tmp_path / name, copy_function=os.link if name == "other" else shutil.copy2
        )
    return tmp_path / "run"


def snapshot(run):
    return {
        path: path.read_bytes()
        for path in sorted(run.rglob("*"))
        if path.is_file() and path.name != "run.lock"
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_a_run_that_cannot_go_on_says_so_and_loses_nothing(name, made, tmp_path, capsys):
    run = copied(made, tmp_path)
    REFUSED[name](run)
    before = snapshot(run)
    code, said = said_by(train.main, ["--resume", "--out", run], capsys)
    assert code == 2 and "Traceback" not in said and said.strip()
    assert snapshot(run) == before and not (run / "ran").exists()
    code, said = said_by(report.main, [run, "--out", tmp_path / "page"], capsys)
    assert code in (0, 2) and (code == 0 or said.startswith("report: "))


LIMIT_EDITS = {
    "max_new_tokens": (-5, 0, 2**40, "many", 1.5, None),
    "max_messages": (-3, 0, "4"),
    "context": (-1, 0, True),
    "tool_seconds": (-1.0, 1e9, float("nan"), "1"),
    "strict_empty_turn": (1, "no"),
    "format": ("yaml", 3),
    "tasks": (["train"], None),
    "model": (5,),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in LIMIT_EDITS.items() for value in values]
)
def test_no_model_is_scored_under_limits_that_no_run_has(name, value, made, tmp_path, capsys):
    run = copied(made, tmp_path)
    setting(name, value)(run)
    for model in (run, run / "model"):
        for main in (evaluate.main, sample.main):
            code, said = said_by(main, ["--model", model], capsys)
            assert code == 2 and f"{run / 'config.json'}: {name} must " in said


@pytest.mark.slow
@pytest.mark.parametrize("name", FINE)
def test_a_run_goes_on_from_what_is_whole(name, made, tmp_path, capsys):
    run = copied(made, tmp_path)
    FINE[name](run)
    code, said = said_by(train.main, ["--resume", "--out", run, "--steps", 4], capsys)
    assert code == 0, said
    lines = (run / "metrics.csv").read_text(encoding="utf-8").splitlines()
    assert [next(csv.reader([line]))[0] for line in lines] == ["step", "1", "2", "3", "4"]
    assert [next(csv.reader([line])) for line in lines[:4]] == [
        line.split(",") for line in (made / "run" / "metrics.csv").read_text(encoding="utf-8").splitlines()
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "file", ["metrics.csv", "probes.jsonl", "rollouts.jsonl", "config.json", "result.json"]
)
@pytest.mark.parametrize(
    "content", ["{}", "[]", "\n\n", "step\n1\n", '{"step": 1}\n', "null\n", "NaN\n", HUGE]
)
def test_the_report_of_an_edited_run(file, content, made, tmp_path, capsys):
    run = copied(made, tmp_path)
    (run / file).write_text(content, encoding="utf-8")
    code, said = said_by(report.main, [run, "--out", tmp_path / "page"], capsys)
    assert code in (0, 2) and (code == 0 or said.startswith("report: "))


@pytest.mark.slow
def test_one_run_owns_a_directory(made, tmp_path, capsys):
    """Neither a second --resume nor a new start; the refusal names the process."""
    run = copied(made, tmp_path)
    owner = RunDirectory(run)
    owner.take()
    before = snapshot(run)
    code, said = said_by(train.main, ["--resume", "--out", run, "--steps", 4], capsys)
    assert code == 2 and f"process {os.getpid()}" in said
    command = [sys.executable, "train.py", "--resume", "--out", str(run), "--steps", "4"]
    other = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert other.returncode == 2 and f"process {os.getpid()}" in other.stderr
    code, said = said_by(train.main, [*SMALL.split(), "--out", run], capsys)
    assert code == 2 and "exists" in said
    assert snapshot(run) == before
    owner.release()
    assert train.main(["--resume", "--out", str(run)]) == 0


def test_a_directory_of_somebody_is_left_as_it_is(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("x")
    code, said = said_by(train.main, [*SMALL.split(), "--out", tmp_path], capsys)
    assert code == 2 and "exists: choose another --out" in said and "--resume" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint(made, tmp_path, capsys):
    """A new start points to --resume, and --resume makes the run."""
    run = copied(made, tmp_path)
    for path in list(run.iterdir()):
        if path.name != "config.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "config.json.tmp").write_text("{")  # killed even before that: a new start is all it takes
    assert train.main([*SMALL.split(), "--steps", "1", "--out", str(begun)]) == 0
    code, said = said_by(train.main, [*SMALL.split(), "--out", run], capsys)
    assert code == 2 and "--resume" in said
    assert train.main(["--resume", "--out", str(run)]) == 0
    same = ("metrics.csv", "rollouts.jsonl")
    assert (run / same[1]).read_bytes() == (made / "run" / same[1]).read_bytes()


def test_stored_settings_are_read_as_they_were_written(made, tmp_path):
    stored = stored_config(made / "run" / "config.json")
    assert (stored.scheme, stored.steps, stored.lr) == ("grpo", 3, 2e-4)
    with pytest.raises(Refused, match="no config.json"):
        stored_config(tmp_path / "config.json")
    assert (made / "run" / "metrics.csv").read_text(encoding="utf-8").startswith(",".join(metrics()))


# ------------------------------------------------------------------------------------------ model directories
@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Two layers of random weights in the layout of Qwen2.5."""
    path = tmp_path_factory.mktemp("model") / "model"
    policy_like("qwen2.5").save(path)
    return path


def key(file, name, value):
    """Set a key of a JSON file; None: take it away."""

    def edit(path):
        content = json.loads((path / file).read_text(encoding="utf-8"))
        content[name] = value
        if value is None:
            del content[name]
        (path / file).write_text(json.dumps(content), encoding="utf-8")

    return edit


def weights(change):
    """Change the weights."""

    def edit(path):
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        (path / "model.safetensors").unlink()
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})

    return edit


def filled(number, name="model.layers.1.mlp.up_proj.weight"):
    return weights(lambda tensors: tensors[name].view(-1)[:1].fill_(number))


def config(name, value):
    return key("config.json", name, value)


def remote(path):
    """A model of an unknown type that brings code of its own."""
    config("model_type", "mine")(path)
    config("auto_map", {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"})(path)
    (path / "code.py").write_text(f"open({str(path / 'ran')!r}, 'w')\n", encoding="utf-8")


def remote_tokenizer(path):
    key("tokenizer_config.json", "auto_map", {"AutoTokenizer": ["code.Tokenizer", None]})(path)
    key("tokenizer_config.json", "tokenizer_class", "Tokenizer")(path)
    (path / "code.py").write_text(f"open({str(path / 'ran')!r}, 'w')\n", encoding="utf-8")


class Pickled:
    """Runs code when it is unpickled by somebody who lets it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path / "ran"), "w"))


def pickled(path):
    (path / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Pickled(path)}, path / "pytorch_model.bin")


def template(text):
    return lambda path: (
        (path / "chat_template.jinja").unlink(),
        (path / "chat_template.jinja").write_text(text),
    )


def null_tokens(path):
    """A tokenizer that says it has no end of text; where the key is missing, transformers would make one."""
    content = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
    content |= {"eos_token": None, "pad_token": None}
    (path / "tokenizer_config.json").write_text(json.dumps(content), encoding="utf-8")


BROKEN_MODELS = {
    **{f"{name} is gone": gone(name) for name in ("config.json", "model.safetensors", "tokenizer.json")},
    **{f"{name} is empty": written(name, "") for name in ("config.json", "model.safetensors", "tokenizer.json")},
    **{f"{name} is binary": written(name, bytes(range(256))) for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")},
    **{f"{name} is a list": written(name, "[1]") for name in ("config.json", "tokenizer.json", "tokenizer_config.json")},
    "config is null": written("config.json", "null"),
    "config is nested": written("config.json", HUGE),
    "fewer layers than weights": config("num_hidden_layers", 1),
    "more layers than weights": config("num_hidden_layers", 3),
    "layers that are text": config("num_hidden_layers", "two"),
    "negative layers": config("num_hidden_layers", -1),
    "another width": config("hidden_size", 32),
    "width null": config("hidden_size", None),
    "width 0": config("hidden_size", 0),
    "three heads": config("num_attention_heads", 3),
    "no heads": config("num_attention_heads", 0),
    "three key heads": config("num_key_value_heads", 3),
    "a smaller vocabulary": config("vocab_size", 100),
    "a negative vocabulary": config("vocab_size", -5),
    "an unknown model type": config("model_type", "mine"),
    "no model type": config("model_type", None),
    "a model type that is a number": config("model_type", 3),
    "a model of pictures": config("model_type", "vit"),
    "an unknown activation": config("hidden_act", "nope"),
    "context of 0": config("max_position_embeddings", 0),
    "context of text": config("max_position_embeddings", "long"),
    "negative context": config("max_position_embeddings", -1),
    "eps that is text": config("rms_norm_eps", "small"),
    "eps that is not finite": config("rms_norm_eps", float("nan")),
    "dtype of nothing": config("dtype", "float7"),
    "a window": config("layer_types", ["sliding_attention", "full_attention"]),
    "rope that grows": config("rope_parameters", {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
    "rope of an unknown kind": config("rope_parameters", {"rope_type": "mine"}),
    "rope that is a list": config("rope_parameters", [1]),
    "quantised": config("quantization_config", {"quant_method": "gptq", "bits": 4}),
    "code of its own": remote,
    "weights are half": lambda path: written("model.safetensors", (path / "model.safetensors").read_bytes()[:5000])(path),
    "a pickle": pickled,
    "an index of files that are not there": lambda path: (
        (path / "model.safetensors").unlink(),
        written("model.safetensors.index.json", '{"weight_map": {"a": "b.safetensors"}}')(path),
    ),
    "one NaN": filled(float("nan")),
    "one infinity": filled(float("inf")),
    "one NaN in an embedding": filled(float("nan"), "model.embed_tokens.weight"),
    "a tensor is gone": weights(lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight")),
    "a tensor of another shape": weights(lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)})),
    "a layer too many": weights(lambda tensors: tensors.update({"model.layers.9.mlp.up_proj.weight": torch.ones(3)})),
    "weights that are integers": weights(lambda tensors: tensors.update({"model.norm.weight": torch.ones(64, dtype=torch.int64), "model.layers.0.input_layernorm.weight": torch.ones(3)})),
    "a template that does not parse": template("{% for %}"),
    "a template that raises": template("{{ raise_exception('no') }}"),
    "a template of another layout": template("{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"),
    "a template that looks around": template("{{ ''.__class__.__mro__ }}"),
    "a template that divides by 0": template("{{ 1 / 0 }}"),
    "no control tokens": lambda path: (key("tokenizer.json", "added_tokens", [])(path), key("tokenizer_config.json", "eos_token", None)(path), key("tokenizer_config.json", "extra_special_tokens", None)(path)),
    "an unknown tokenizer": key("tokenizer.json", "model", {"type": "Mine"}),
}  # fmt: skip
FINE_MODELS = {
    "nothing": lambda path: None,
    "no end of text": null_tokens,
    "half precision": weights(lambda tensors: tensors.update({k: v.half() for k, v in tensors.items()})),
    "a key nobody knows": config("mine", 1),
    "a tokenizer with code of its own": remote_tokenizer,
    "no generation config": lambda path: (path / "generation_config.json").unlink(missing_ok=True),
    "no chat template": gone("chat_template.jinja"),  # the built-in model's takes its place
    "an empty chat template": written("chat_template.jinja", ""),
}


@pytest.fixture
def edited(model, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # to "run the custom code?"
    shutil.copytree(model, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("name", BROKEN_MODELS)
def test_a_broken_model_is_refused_by_name(name, edited, capsys):
    BROKEN_MODELS[name](edited)
    with pytest.raises(ModelError) as refused:
        load(edited)
    assert str(edited) in str(refused.value)
    assert not (edited / "ran").exists(), "nothing that was downloaded is executed"
    code, said = said_by(evaluate.main, ["--model", edited, "--count", 1, "--format", "hermes"], capsys)
    assert code == 2 and said.startswith("evaluate: ")


@pytest.mark.parametrize("name", FINE_MODELS)
def test_a_model_that_lacks_nothing_it_needs(name, edited):
    FINE_MODELS[name](edited)
    assert load(edited).chat.stop_ids
    assert not (edited / "ran").exists(), "nothing that was downloaded is executed"


def test_a_tokenizer_without_an_end_of_text_plays(edited):
    null_tokens(edited)
    assert load(edited).tokenizer.eos_token_id is None
    assert sample.main(["--model", str(edited), "--max-new-tokens", "3", "--max-messages", "2"]) == 0


def test_a_report_runs_no_code_of_a_model(edited, made, tmp_path, capsys):
    remote_tokenizer(edited)
    run = copied(made, tmp_path)
    setting("model", str(edited))(run)
    shutil.rmtree(run / "model")
    code, said = said_by(report.main, [run, "--out", tmp_path / "page"], capsys)
    assert code == 0, said
    assert load_chat(edited).stop_ids and not (edited / "ran").exists()


def test_why_weights_that_are_not_finite_are_refused(edited):
    filled(float("nan"))(edited)
    with pytest.raises(ModelError, match="its logits are not finite"):
        load(edited)


def test_a_run_directory_is_its_model(made, tmp_path, capsys):
    run = copied(made, tmp_path)
    assert load(run).context == load(run / "model").context
    shutil.rmtree(run / "model")
    code, said = said_by(sample.main, ["--model", run], capsys)
    assert code == 2 and "left no model" in said


# ------------------------------------------------------------------------------------------------------ flags
TRAIN = [
    "--lr inf", "--lr -inf", "--lr nan", "--lr -1", "--lr x", "--lr", "--kl inf", "--entropy nan", "--clip inf",
    "--temperature 0", "--temperature -1", "--temperature inf", "--temperature 1e-300", "--temperature nan",
    "--threads 2147483648", "--threads -1", "--threads 1e3", "--sft-batch 99999999999999999999", "--sft-batch 0",
    "--steps 0", "--steps 99999999999999999999", "--steps 1.5", "--group 99999999999", "--group 1", "--prompts 0",
    "--seed -1", "--seed 9223372036854775808", "--save-every 0", "--keep-every -1", "--context -1", "--context 0",
    "--max-messages 0", "--max-new-tokens 0", "--max-new-tokens 99999999999", "--tool-seconds -1",
    "--tool-seconds inf", "--judge-timeout inf", "--judge-timeout 0", "--min-turns 0", "--eval-count -1",
    "--tag-penalty -1", "--grad-clip 0", "--weight-decay inf", "--slots 0", "--tokens-at-once 0",
    "--chord-mu 2", "--guard-weight -0.1", "--sft-warmup nan", "--format yaml", "--dtype int8", "--scheme",
    "--scheme no", "--preset no", "--schedule sync", "--no-such", "--steps=", "extra", "--tasks", "--judge no",
    "--judge http://", "--model data/nan0", "--tasks nope", "--eval-tasks nope --eval-count 1", "--out /dev/null/x",
    "--out /dev/null", "--model /dev/null", "--tasks /dev/null", "--tasks data", "--min-turns 99",
    "--context 9", "--prompts 9999", "--updates 99", "--resume", "--resume --out /dev/null",
]  # fmt: skip
EVALUATE = [
    "--temperature nan", "--temperature -1", "--temperature inf", "--temperature 1e-9", "--temperature x",
    "--context -1", "--context 0", "--context x", "--max-messages 0", "--max-messages -1", "--max-new-tokens 0",
    "--count -1", "--count 1.5", "--samples 0", "--samples -1", "--samples 2", "--seed -1", "--seed 1e3",
    "--tool-seconds nan", "--format no", "--tasks nope", "--tasks /dev/null", "--model /dev/null", "--json data",
    "--json /nowhere/x.json", "--json /dev/full/x", "--grid --doctor", "--doctor --temperature 1", "--grid --tasks train",
    "--transcripts /dev/null", "--transcripts data", "--transcripts nope", "--compare data/nano",
    "--doctor --compare data/nan0", "--bfcl-official", "--no-such",
]  # fmt: skip
SAMPLE = [
    "--temperature nan", "--temperature -1", "--temperature 1e-9", "--seed -1", "--max-new-tokens 0", "--context -1",
    "--max-messages 0", "--task nope", "--tasks nope", "--model data/nan0", "--format no", "--no-such",
]  # fmt: skip


@pytest.mark.parametrize("flags", TRAIN)
def test_train_refuses(flags, tmp_path, monkeypatch, capsys):
    out = [] if "--out" in flags else ["--out", tmp_path / "run"]
    code, said = said_by(train.main, [*SMALL.split(), *out, *flags.split()], capsys)
    assert code == 2 and ("error: " in said or said.startswith("train.py: ")), said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", EVALUATE)
def test_evaluate_refuses(flags, capsys):
    code, said = said_by(evaluate.main, flags.split(), capsys)
    assert code == 2 and ("error: " in said or "evaluate: " in said)


@pytest.mark.parametrize("flags", SAMPLE)
def test_sample_refuses(flags, capsys):
    code, said = said_by(sample.main, flags.split(), capsys)
    assert code == 2 and ("error: " in said or said.startswith("sample.py: "))
