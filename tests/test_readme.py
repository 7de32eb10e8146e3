"""The README's promises: its examples run, its numbers come from data/results, its names exist."""

import ast
import csv
import json
import re
from pathlib import Path

import train
from bench import rows as bench
from nanotoolrl import env, schemes
from nanotoolrl.commandline import PRESETS, parse
from nanotoolrl.config import SETTINGS, Config
from nanotoolrl.look import study
from nanotoolrl.look.evaluate import Scores, states_table, table
from nanotoolrl.look.metrics import metrics
from nanotoolrl.world.observe import call_tool

ROOT = Path(train.__file__).parent
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "data" / "results"
COLLAPSE_STATES = ("call", "reply", "malformed", "polluted", "overlong", "bare")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_the_two_commands_stand_where_ci_looks():
    lines = README.splitlines()
    assert "pip install -r requirements.txt && python train.py --scheme hint" in lines
    assert (
        "pip install -r requirements.txt pytest pytest-xdist hypothesis && python -m pytest -n auto" in lines
    )


def test_add_a_tool(classes):
    code = next(block for block in blocks("python") if "(API)" in block)
    exec(code, {"__name__": "nanotoolrl.world.domains.weather"})
    line = {"id": "w", "category": "base", "state": {"Weather": {"rain": {"Oslo": 3}}}, "tools": ["get_rain"]}
    turn = {
        "user": "Rain in Oslo?",
        "calls": [{"name": "get_rain", "arguments": {"city": "Oslo"}}],
        "reply": "3.",
    }
    task = env.Task.from_json(json.dumps(line | {"turns": [turn]}))
    assert env.replay(task, [[env.Call("get_rain", {"city": "Oslo"})]]) == 1
    assert "there is Oslo" in str(call_tool(task.new_world(), env.Call("get_rain", {"city": "Rome"})))


def test_add_a_scheme(monkeypatch, tmp_path):
    code = next(block for block in blocks("python") if "@scheme" in block)
    table_copy = dict(schemes.SCHEMES)
    monkeypatch.setattr(schemes, "SCHEMES", table_copy)
    monkeypatch.setattr(train, "SCHEMES", table_copy)
    exec(code, vars(schemes))
    config = Config(**PRESETS["smoke"], scheme="good_news", out=str(tmp_path / "run"), threads=1)
    config.eval_count, config.steps = 0, 1
    assert train.train(config, resume=False, given=set()) == 0


def stored_run(scheme):
    """Directory of the committed default run of a scheme with seed 0."""
    return RESULTS / "hint" / "seed0" if scheme == "hint" else RESULTS / "schemes" / scheme


def stored(seed, name):
    return json.loads((RESULTS / "hint" / f"seed{seed}" / name).read_text())


def test_the_results_table_is_made_from_the_committed_results():
    results = [stored(seed, "result.json") for seed in range(3)]
    columns = {"before": Scores(**results[0]["before"])}
    columns |= {f"after, seed {seed}": Scores(**result["after"]) for seed, result in enumerate(results)}
    assert table(columns) in README
    assert all(result["before"]["rewards"] == results[0]["before"]["rewards"] for result in results)
    greedy = json.loads((RESULTS / "base" / "greedy.json").read_text())["scores"]["hermes"]
    assert greedy["states"] == results[0]["before"]["states"]


def test_the_speed_tables_are_made_from_the_committed_results():
    for path in sorted((RESULTS / "bench").glob("*.json")):
        result = json.loads(path.read_text())
        if path.stem != "parity":
            assert bench.markdown(result) in README
            assert result["command"] == f"python -m nanotoolrl.bench {path.stem}"
    parity = json.loads((RESULTS / "bench" / "parity.json").read_text())["parity"]
    assert str(bench.Parity(**parity)) in README


def test_the_memory_table_is_made_by_its_command():
    assert bench.memory_table() in README


def test_the_sampled_table_is_made_from_the_committed_results():
    start = json.loads((RESULTS / "base" / "sampled.json").read_text())
    ends = [stored(seed, "sampled.json") for seed in range(3)]
    columns = {"before": Scores(**start["scores"]["hermes"])}
    columns |= {f"after, seed {seed}": Scores(**end["scores"]["hermes"]) for seed, end in enumerate(ends)}
    assert table(columns) in README
    same = {"tasks", "count", "temperature", "hint", "seed", "context", "max_messages"}
    assert all(end["arguments"][name] == start["arguments"][name] for end in ends for name in same)


def test_the_scheme_table_is_made_from_the_registry_and_the_committed_results():
    lines = []
    for name, scheme in schemes.SCHEMES.items():
        scores = Scores(**json.loads((stored_run(name) / "result.json").read_text())["after"])
        share, low, high, n = scores.of("all")
        success = f"{100 * share:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
        lines.append(f"| `{name}` | {scheme.about} | `python train.py --scheme {name}` | {success} |")
        assert n == 400
    assert "\n".join(lines) in README, "\n".join(lines)


def test_the_table_of_the_collapse_is_made_from_the_committed_study():
    with (RESULTS / "collapse.csv").open() as file:
        seeds = list(csv.DictReader(file))
    assert [row["run"] for row in seeds] == [f"seed{n}" for n in range(5)]
    for row in seeds:
        greedy = [f"{100 * float(row[f'greedy_{when}']):.1f}" for when in ("before", "best", "after")]
        ratios = [
            f"{float(row[f'{when}nll_control']):.1f} / {float(row[f'{when}nll_content']):.1f}"
            for when in ("halved_", "")
        ]
        shares = [f"{100 * float(row[f'end_{state}']):.0f}" for state in COLLAPSE_STATES]
        cells = [row["run"][4:], *greedy, row["halved_step"], *ratios]
        cells += [f"{float(row['spike']):.0f} `{row['spike_token']}`", *shares]
        assert f"| {' | '.join(cells)} |" in README, " | ".join(cells)


def test_the_formats_after_the_collapse_are_those_of_the_committed_scores():
    def shown(share):
        return f"{100 * share[0]:.1f} [{100 * share[1]:.1f}, {100 * share[2]:.1f}]"

    def line(name, success):
        cells = [shown(success[key]) for key in ("hermes", "forced prefix", "python", "xml")]
        return f"| {name} | {' | '.join(cells)} |"

    def scores(name):
        stored = json.loads((RESULTS / "collapse" / f"{name}.json").read_text())["scores"]
        return {format: Scores(**values).of("all") for format, values in stored.items()}

    doctor = json.loads((RESULTS / "collapse" / "doctor-seed1.json").read_text())
    assert line("before", doctor["reference"]["success"]) in README
    assert line(1, doctor["model"]["success"]) in README
    for seed in (0, 2, 3, 4):
        success = scores(f"formats-seed{seed}") | {"forced prefix": scores(f"forced-seed{seed}")["hermes"]}
        assert line(seed, success) in README
        assert all(share[3] == 400 for share in success.values())


def test_the_search_is_whole():
    """Every run of the study has a row in the committed table."""
    with (RESULTS / "collapse_search.csv").open() as file:
        assert {row["run"] for row in csv.DictReader(file)} == set(study.COLLAPSE_SEARCH)


def test_the_model_card_is_made_from_the_committed_scores():
    card = (ROOT / "data" / "nano" / "README.md").read_text()
    for name in ("greedy", "sampled", "hinted"):
        scores = json.loads((RESULTS / "base" / f"{name}.json").read_text())["scores"]
        columns = {format: Scores(**values) for format, values in scores.items()}
        assert table(columns) in card
        assert states_table(columns) in card or name != "sampled"


def test_every_metric_is_explained():
    columns = re.findall(r"`(\w+\*?)`", README.split("## Metrics")[1].split("## Speed")[0])
    explained = {
        name for name in metrics() if name in columns or "state_*" in columns and name.startswith("state_")
    }
    assert set(metrics()) - explained - {"step"} == set()


def test_files_and_flags_named_in_the_readme_exist():
    for name in re.findall(r"`((?:nanotoolrl|data|tests)/[\w./]+|\w+\.py)`", README):
        assert any((ROOT / place / name).exists() for place in ("", "nanotoolrl", "data")), name
    known = {"--" + name.replace("_", "-") for name in SETTINGS}
    known |= {
        "--no-adv-std",
        "--resume",
        "--list",
        "--chat",
        "--oracle",
        "--task",
        "--index-url",
        "--no-deps",
    }
    known |= {"--nproc", "--shutdown-timeout"}  # the first with _per_node
    for name in ("evaluate", "report", "study", "bench", "bfcl", "world/tasks"):
        known |= set(re.findall(r'"(--[a-z-]+)"', (ROOT / "nanotoolrl" / f"{name}.py").read_text()))
    assert set(re.findall(r"--[a-z][a-z-]+", README)) <= known


def test_imports_point_downwards():
    """In the order that the README gives, which names every module."""
    order = re.search(r"Imports point downwards only: (.*?)\.\n\n", README, re.DOTALL)[1].split(",")
    order = [name.strip() for name in order]
    files = {path.stem: path for path in (ROOT / "nanotoolrl").glob("*.py") if path.stem != "__init__"}
    files |= {path.stem: path for path in (ROOT / "train.py", ROOT / "sample.py")}
    assert sorted(order) == sorted(files)
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            used = []
            if isinstance(node, ast.ImportFrom) and node.module == "nanotoolrl":
                used = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nanotoolrl."):
                used = [node.module.split(".")[1]]
            elif isinstance(node, ast.Import):
                used = [alias.name for alias in node.names if alias.name in files]
            assert all(order.index(other) > order.index(name) for other in used), (name, used)


def test_committed_runs_are_whole_and_made_with_the_present_defaults():
    runs = {RESULTS / "hint" / f"seed{seed}": ("hint", seed) for seed in range(3)}
    runs |= {stored_run(name): (name, 0) for name in schemes.SCHEMES}
    for folder, (name, seed) in runs.items():
        config = json.loads((folder / "config.json").read_text())
        with (folder / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [int(row["step"]) for row in rows] == list(range(1, config["steps"] + 1))
        now = vars(parse(["--scheme", name, "--seed", str(seed)])[0])
        same = set(now) & set(config) - {"out", "threads", "show_every"}  # others came later
        assert {key: config[key] for key in same} == {key: now[key] for key in same}
