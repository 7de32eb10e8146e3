"""`python walk.py RUN`: one step of `hint` into the directory RUN. RUN/walk.json then has the chains of the
core's files in which one called the next. A process of its own: all of it is watched."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from nanotoolrl.commandline import resolve  # noqa: E402

CORE = {str(path): path.name for path in [ROOT / "train.py", *(ROOT / "nanotoolrl").glob("*.py")]}
TINY = {"prompts": 2, "group": 2, "probe_tasks": 2, "max_messages": 4, "eval_count": 0, "threads": 1}
TINY["entropy"] = 0.01  # so that rows without contrast are trained, too


def main(out: str) -> None:
    chains = set()

    def note(frame, event, argument):
        if event != "call" or frame.f_code.co_filename not in CORE:
            return
        chain = []
        while frame:
            name = CORE.get(frame.f_code.co_filename)
            if name and chain[-1:] != [name]:
                chain.append(name)
            frame = frame.f_back
        chains.add(tuple(reversed(chain)))

    config = resolve({"preset": "smoke", "scheme": "hint", "steps": 1, "out": out} | TINY)
    sys.setprofile(note)
    try:
        assert train.train(config, False, set()) == 0
    finally:
        sys.setprofile(None)
    Path(out, "walk.json").write_text(json.dumps(sorted(chains)), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
