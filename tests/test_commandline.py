"""Flags: what a setting gets where several places say something, and what is refused."""

import pytest
from helpers.runs import run

import train
from nanotoolrl.commandline import PRESETS, parse, resolve
from nanotoolrl.config import SETTINGS, Refused
from nanotoolrl.signals import SCHEMES


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--scheme", "nope"], "'hint'"),
        (["--preset", "nope"], "'smoke'"),
        (["--format", "nope"], "'hermes'"),
        (["--stepz", "3"], "did you mean --steps?"),
        (["--group", "0"], "--group must be at least 2; it is 0"),
        (["--hint-count", "9"], "--hint-count must be at most 2, as --group says; it is 9"),
        (["--updates", "99"], "--updates must be at most 2, as --prompts says; it is 99"),
        (["--steps", "many"], "--steps"),
        (["--lr", "nan"], "--lr must be positive"),
        (["--scheme", "grpo", "--schedule", "sync"], "grpo takes no --schedule"),
        (["--scheme", "ets", "--schedule", "always"], "'interleaved'"),
        (
            ["--scheme", "ops", "--oracle-count", "9"],
            "--oracle-count must be below 2, as --group says; it is 9",
        ),
        (["--scheme", "chord", "--chord-mu", "1.5"], "--chord-mu must be from 0 to 1"),
        (["--scheme", "ets", "--void-weight", "0.5"], "ets has no --void-weight, which is of void"),
        (["--scheme", "ops", "--hint-count", "1"], "ops has no --hint-count, which is of hint, ghpo"),
        (["--scheme", "guard", "--guard", "3"], "--guard must be from 0 to 1"),
        (["--group", "1"], "--group must be at least 2"),
        (["--scheme", "grpo", "--refill", "128"], "--refill must be at most 127; it is 128"),
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


def test_help_says_what_a_plain_run_has(capsys):
    """The settings of the preset that is taken where none is named, and who else has other ones."""
    with pytest.raises(SystemExit):
        parse(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    plain = resolve({"scheme": "grpo"})
    for name, value in PRESETS[plain.preset].items():
        assert f"{SETTINGS[name].default}; {value} in the preset {plain.preset}" in said, name
        assert getattr(plain, name) == value
    assert "(default: 1; 2 in the preset first; 4 in llds)" in said


def test_bfcl_is_trained_under_its_own_limits():
    config = parse(["--tasks", "bfcl"])[0]
    assert (config.max_new_tokens, config.max_messages, config.context) == (1024, 30, 8192)
    assert parse(["--tasks", "bfcl", "--max-new-tokens", "64"])[0].max_new_tokens == 64


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


def test_another_setting_bounds_only_what_the_scheme_has():
    assert resolve({"group": 4}, {"scheme": "grpo", "hint_count": 5}).hint_count == 5
    assert resolve({"group": 4}, {"scheme": "hint", "oracle_count": 4}).oracle_count == 4
    with pytest.raises(SystemExit):
        parse(["--scheme", "ops", "--group", "4", "--oracle-count", "4"])


def test_an_empty_schedule_is_none():
    assert parse(["--scheme", "grpo", "--schedule", ""])[0] == parse(["--scheme", "grpo"])[0]


def test_flags_go_before_what_is_stored_before_the_scheme_before_the_preset():
    stored = vars(resolve({"scheme": "llds", "prompts": 7, "updates": 3}))
    assert resolve({"scheme": "llds"}).updates == 4 != resolve({"scheme": "grpo"}).updates
    assert resolve({"scheme": "llds", "preset": "paper"}).updates == 4, "the scheme's before the preset's"
    assert resolve({"scheme": "grpo", "preset": "paper"}).updates == PRESETS["paper"]["updates"]
    assert resolve({}, stored).prompts == 7 and resolve({}, stored).updates == 3
    assert resolve({"updates": 2}, stored).updates == 2
    with pytest.raises(Refused, match="--scheme must be one of"):
        resolve({"scheme": "nope"})
