"""Arms of a study: grouped, averaged over seeds, drawn."""

from nanotoolrl.look.arms import arms_of, draw, falls_table, read_arms, shown, spread_of, table_of

ROWS = [
    {"run": f"{arm}-seed{seed}", "fall": fall, "sampled_best": 0.4, "sampled_end": end, "lost": lost}
    | {"net <tool_call>": 0.1 * seed, 'net "}}': 1.0, "net <|im_end|>": ""}
    for arm, seed, fall, end, lost in (
        ("guard0", 0, "", 0.3, ""),
        ("guard0", 1, "", 0.5, ""),
        ("guard1", 0, 15, 0.0, "structure"),
        ("guard1", 1, 17, 0.0, "structure"),
    )
]


def test_cells():
    assert shown([0.3, 0.5], 100, 0) == "40 ± 127" and shown([], 1, 1) == ""
    assert spread_of([17, 15]) == "15 to 17" and spread_of([3, 3]) == "3" and spread_of([]) == ""


def test_arms_and_their_table(tmp_path):
    arms = arms_of([*ROWS, {"run": "lr4e-4"}])
    assert list(arms) == ["guard0", "guard1"] and [len(rows) for rows in arms.values()] == [2, 2]
    lines = table_of(arms).splitlines()
    assert lines[2].startswith("| guard0 | 2 | 0 |  | 40 ± 0 | 40 ± 127 |")
    assert lines[3].startswith("| guard1 | 2 | 2 | 15 to 17 |") and lines[3].endswith("| structure 2 |")
    draw(arms, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000


def test_a_table_is_read_back(tmp_path):
    (tmp_path / "t.csv").write_text("run,fall\na-seed0,3\na-seed1,\n")
    assert table_of(read_arms(tmp_path / "t.csv")).splitlines()[2].startswith("| a | 2 | 1 | 3 |")


def test_the_table_of_falls():
    """Runs that were judged; what was not measured is empty; one without a fall has no line."""
    judged = {"verdict": "v", "broken": 0.5, "replies": 0.1, "worst_state": "bare", "before hermes": 0.332}
    judged |= {"judged hermes": 0.0, "judged hermes low": 0.0, "judged hermes high": "0.01"}
    lines = falls_table([ROWS[0] | judged, ROWS[2] | judged, ROWS[3]]).splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("| before | 0 | 33.2 |  |")
    assert lines[3].startswith("| guard1-seed0 | 15 | 0.0 [0.0, 1.0] |  |")
    assert lines[3].endswith("| 50.0 | 10.0 | bare |")
