"""Make the collapsed model and the files of docs/2-one-collapse.md: `python data/make_collapsed.py`.

They come from one run of 6 minutes, `train.py --scheme grpo --preset spike` on one thread: data/results/spike
has its logs and what its model plays at five moments, data/collapsed its model at the fall, in bf16.
"""

import argparse
import contextlib
import io
import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import nanotoolrl  # noqa: E402, F401  (before torch)

# isort: split
import torch  # noqa: E402

import sample  # noqa: E402
import train  # noqa: E402
from nanotoolrl.loading import BUILT_IN, COLLAPSED, load  # noqa: E402

MOMENTS = (0, 6, 10, 14, 20)  # steps: before, held, on the way, the fall, the end
TASK = "test-005-base"  # the first of more than one turn in its category that the model solves before
LOGS = ("config.json", "metrics.csv", "probes.jsonl", "result.json")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/grpo-spike-s0"), help="directory of the run")
    args = parser.parse_args()
    flags = "--scheme grpo --preset spike --threads 1 --keep-every 1 --show-every 0 --out".split()
    if not (args.run / "result.json").exists():
        code = train.main([*flags, str(args.run), *(["--resume"] if args.run.exists() else [])])
        if code:
            return code
    results = ROOT / "data" / "results" / "spike"
    results.mkdir(parents=True, exist_ok=True)
    for name in LOGS:
        shutil.copyfile(args.run / name, results / name)
    for step in MOMENTS:
        model = str(args.run / "models" / f"step-{step}") if step else BUILT_IN
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            sample.main(["--model", model, "--task", TASK])
        (results / f"step-{step}.txt").write_text(said.getvalue(), encoding="utf-8")
    load(args.run / "models" / "fall", dtype=torch.bfloat16).save(COLLAPSED)
    config = json.loads((COLLAPSED / "config.json").read_text(encoding="utf-8"))
    print(f"{COLLAPSED}: {config['dtype']}; {results}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
