"""The page of what replicates: what it says of studies that are there, and of those that are not."""

import shutil

from nanotoolrl.look import replication


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
    names = ("exact", "grpo", "sft_rl", "sft_rl-foreign", "ops", "hint", "ets", "prs", "restart", "bursts")
    said = dict(replication.claims(dict.fromkeys(names, rows)))
    assert "`exact` 1 of 2, `grpo` 1 of 2 seeds" in said["RL alone collapses"]
    assert said["RL alone collapses"].endswith("falls at step 9")
    assert "fell: `ets` 1, `prs` 1. " in said["SFT on failures or on reflections, interleaved, does"]
    assert said["Interleaving costs accuracy out of distribution"] == "not measured yet"
