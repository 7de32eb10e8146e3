"""The page of what replicates: what it says of studies that are there, and of those that are not."""

import shutil

from nanotoolrl.look import replication
from nanotoolrl.look.intervals import Share
from nanotoolrl.look.results import WAYS


def test_a_study_has_a_section_once_it_has_a_table(tmp_path, monkeypatch):
    committed = replication.RESULTS / "main.csv"
    monkeypatch.setattr(replication, "RESULTS", tmp_path)
    shutil.copy(committed, tmp_path / "main.csv")
    without = replication.page()
    assert "| `lr` | 0 | 36 |  |  |  |" in without and "## Learning rates" not in without
    shutil.copy(committed, tmp_path / "lr.csv")
    page = replication.page()
    assert page.count("| hint | ") == 2 * without.count("| hint | ")
    assert page.index("## Other formats") < page.index("## Learning rates") < page.index("## What this does")


def test_claims_are_counted():
    """Of two seeds of each method, one of which fell and collapsed."""
    rows = [{"fall": "", "collapsed": "0", "sampled_end": "0.3"}, {"fall": "9", "collapsed": "1"}]
    names = ("exact", "grpo", "sft", "sft-foreign", "sft_rl", "sft_rl-foreign", "ops", "hint", "ets", "prs")
    names += ("restart", "bursts")
    arms = dict.fromkeys(names, rows)
    said = {claim: found for claim, *found in replication.claims(arms, {"ets": rows}, {"prs": rows})}
    assert "`exact` 1 of 2, `grpo` 1 of 2 seeds" in said["RL alone collapses"][1]
    assert said["RL alone collapses"][1].endswith("falls at step 9"), "of the other base nothing is known"
    fell = (
        "fell: `ets` 1 of 2, `prs` 1 of 2; with half the rollouts `ets` 1 of 2. From another base, with half "
        "the rollouts, fell: `prs` 1 of 2. Collapsed: "
    )
    assert fell in said["SFT on failures or on reflections, interleaved, does"][1]
    unknown = "not measured yet; without RL, not measured yet"
    assert said["Interleaving costs accuracy out of distribution, too"] == ["open", unknown]
    assert said["RL gains from it"][0] == "open"
    assert sum(verdict == replication.MIXED for verdict, _ in said.values()) == 4


def test_claims_are_judged():
    """Where every seed says the same, and where an interval lies on one side of 0."""
    solved = {"digits closing": "t" + "1" * 12, "digits python ood": "t" + "1" * 12}
    failed = {"digits closing": "t" + "0" * 12, "digits python ood": "t" + "0" * 12}
    down = [{"fall": "9", "collapsed": "1"} | failed] * 2
    up = [{"fall": "", "collapsed": "0"} | solved] * 2
    names = ("grpo", "sft", "sft-foreign", "sft_rl", "sft_rl-foreign", "ops", "hint", "restart")
    stands = {"fall": "", "collapsed": "0"} | failed
    arms = dict.fromkeys(names, down) | dict.fromkeys(("exact", "bursts", "untrained"), up)
    arms |= dict.fromkeys(("ets", "prs"), [stands] * 2)
    found = list(replication.claims(arms, arms, arms))
    assert [verdict for _, verdict, _ in found] == [
        "not if trained as sampled; with the break it does",
        "it does not",
        "they do not",
        "no run falls",
        "no: with the break it costs",
        "less of it at the end, in 1 of 1 cells",
        "it does, in 2 of 2 cells",
        "it does, in 2 of 2 cells",
    ]


def test_what_a_method_keeps():
    """Of three seeds no loss is seen where none falls and no interval lies below 0; two say nothing."""
    level, lower = Share(0.0, -0.1, 0.1, 12), Share(-0.2, -0.3, -0.1, 12)
    stands = [{"fall": ""} | {f"digits {way}": "t1" for way in WAYS}] * 3
    assert replication.kept(stands, [level, level]) == "no loss is seen"
    assert replication.kept(stands, [level, lower]) == "it loses"
    assert replication.kept([*stands, {"fall": "9"}], [level, level]) == "it falls"
    fewer = [*stands[:2], {"fall": ""}]
    assert replication.kept(fewer, [level, level]) == "open", "elsewhere only two seeds were played"
    assert replication.kept(stands, [level, None]) == replication.kept(stands[:2], [level]) == "open"
