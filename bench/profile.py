"""A decode step, or with `--step` one GRPO step, of a model with the shapes of Qwen2.5-0.5B under torch's
profiler: `python -m bench.profile FOLDER` writes a table of operations and a trace (chrome://tracing)."""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from bench.models import seeded_policy
from bench.steps import new_run
from nanotoolrl.config import Config
from nanotoolrl.decode import Decoder, Feed
from nanotoolrl.run import group_advantages, rollout
from nanotoolrl.updates import policy_update
from nanotoolrl.world.tasks import load_tasks

TOP = 40  # operations in the table


def decode_steps(device: torch.device, small: bool) -> Callable[[], object]:
    """A call of the decoder for many rows that share prompts: one step on a CPU, a window on a GPU."""
    policy, rows, prompt = seeded_policy(device, small), (4 if small else 256), (16 if small else 512)
    decoder = Decoder(policy, 0, fast=device.type == "cuda")
    decoder.open(rows, 4 * prompt)
    top = min(policy.chat.stop_ids)
    decoder.read(range(rows // 4), torch.randint(top, (rows // 4, prompt)).tolist())
    for first in range(0, rows, 16):
        some = range(first, min(rows, first + 16))
        feeds = [Feed(row, prompt=row // 4, prompt_length=prompt) for row in some]
        decoder.extend(feeds, torch.randint(top, (len(some), prompt)).tolist())
    feeds = [Feed(row, 1, prompt, 64, row, 0, row // 4, prompt) for row in range(rows)]
    return lambda: decoder.decode(feeds, 1.0)


def grpo_step(device: torch.device, small: bool) -> Callable[[], object]:
    """Rollouts and update of 8 x 8 rollouts; every row is trained, whatever an untrained model earns."""
    config = Config(scheme="grpo", prompts=2 if small else 8, group=2 if small else 8, warmup=0)
    run, tasks = new_run(config, seeded_policy(device, small)), load_tasks("train")[: config.prompts]

    def step() -> None:
        with torch.inference_mode():
            rows = rollout(run, tasks)
        started = time.perf_counter()
        metrics = policy_update(run, rows, group_advantages(run, rows), every_row=True)
        print(
            f"{len(rows)} rollouts, {run.sampled_tokens} tokens in {run.sample_seconds:.2f} s; update of "
            f"{metrics['forward_tokens']} tokens in {time.perf_counter() - started:.2f} s"
        )
        run.next_step()

    return step


def main(argv: list[str] | None = None) -> int:
    """The command; returns 0."""
    parser = argparse.ArgumentParser(prog="python -m bench.profile", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--step", action="store_true", help="a whole GRPO step instead of decode steps")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to see that it runs")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    work = (grpo_step if args.step else decode_steps)(device, args.small)
    work()  # compiles and records what there is to be
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=kinds) as found:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    name = "qwen-step" if args.step else "decode"
    args.folder.mkdir(parents=True, exist_ok=True)
    text = found.key_averages().table(sort_by=order, row_limit=TOP)
    (args.folder / f"{name}-operations.txt").write_text(text, encoding="utf-8")
    found.export_chrome_trace(str(args.folder / f"{name}-trace.json.gz"))
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
