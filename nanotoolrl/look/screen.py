"""What the terminal says of a step: the progress bar, its alarm, a conversation."""

import signal
import sys
from typing import Any

from tqdm import tqdm

from nanotoolrl.calls import UNHEALTHY_STATES
from nanotoolrl.chat import readable
from nanotoolrl.model import Policy
from nanotoolrl.run import Run, Step
from nanotoolrl.trajectory import Trajectory

STUCK, SPOILED = 1, 3  # why a run ends early, both with exit code 1; 128 + n: signal n
STATE_JUMP = 0.2  # a share of an unhealthy message state this far above the first step's raises the alarm
SPURIOUS_JUMP = 10  # so does this growth of a control token's spurious probability


def tell(run: Run, row: dict[str, Any], details: dict[str, Any], step: Step, bar: tqdm) -> None:
    """Count a step on the progress bar, and print a conversation every `show_every` steps.

    The message states of the first step are kept in the run's state: alarms compare with them.
    """
    shares = {name: share for name, share in row.items() if name.startswith("state_")}
    run.state.first = run.state.first or shares
    said = said_of(row) + alarm(row, run.state.first, details.get("tokens", {}))
    bar.set_postfix_str(said, refresh=False)
    bar.update()
    every = run.config.show_every
    if every and run.step % every == 0 and step.trajectories:
        tqdm.write(shown(run.policy, step.trajectories[-1], run.step))


def said_of(row: dict[str, Any]) -> str:
    """What the progress bar says of a step."""
    said = []
    if "reward" in row:
        said += [f"reward {row['reward']:.2f}", f"success {row['success']:.2f}"]
        said += [f"{row['sample_tok_s']:.0f} tok/s"]
    if row.get("sft_tokens"):
        said += [f"SFT loss {row['sft_loss']:.3f}"]
    if "eval_success" in row:
        said += [f"greedy {row['eval_success']:.2f}"]
    return " ".join(said)


def alarm(row: dict[str, Any], first: dict[str, float], tokens: dict[str, dict[str, float]]) -> str:
    """What the progress bar warns of: an unhealthy message state, or a control token, that jumped.

    first: shares of message states in the first step. tokens: what was measured of control tokens in this
    step, if anything was.
    """
    spikes = {token: values["growth"] for token, values in tokens.items()}
    warnings = [f"{token} x{spike:.0f}" for token, spike in spikes.items() if spike >= SPURIOUS_JUMP]
    for name in (f"state_{state}" for state in UNHEALTHY_STATES):
        if name in row and row[name] - first[name] > STATE_JUMP:
            warnings.append(f"{name.removeprefix('state_')} {row[name]:.0%}")
    return " ALARM " + ", ".join(warnings) if warnings else ""


def shown(policy: Policy, trajectory: Trajectory, step: int) -> str:
    """A trajectory for the terminal."""
    verdicts = ", ".join("pass" if v.passed else f"fail ({v.reason})" for v in trajectory.verdicts)
    head = f"--- step {step}, task {trajectory.task_id}, reward {trajectory.reward:.0f}; turns: {verdicts}"
    body = readable(policy.chat.decode(trajectory.tokens), color=sys.stdout.isatty())
    return f"{head}\n{body}\n---"


def why_ended(code: int, step: int, broken: str) -> str:
    """Why a run ended early after a step, and what can be done. broken: what is not finite, or ""."""
    if code > 128:
        name = signal.Signals(code - 128).name
        return f"{'Ctrl-C' if name == 'SIGINT' else name}. Go on with --resume."
    what = f"after step {step} the {broken} are not finite."
    if code == STUCK:
        what = "three updates in a row had a loss or gradient that is not finite."
    return f"{what} Start anew with lower rates (--lr, --sft-lr); this run would end in the same way again."
