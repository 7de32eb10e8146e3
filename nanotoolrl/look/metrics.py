"""The one table of what is measured in a step, and the measuring of what all schemes share.

The table makes the header of metrics.csv, the end of `train.py --help` and docs/metrics.md, which
`python -m nanotoolrl.look.metrics` prints. What a scheme measures beyond it stands in its decorator.
"""

import math
import sys
import textwrap
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from nanotoolrl.calls import MESSAGE_STATES
from nanotoolrl.cli import printer
from nanotoolrl.gpu import distributed
from nanotoolrl.look.screen import SPURIOUS_JUMP, STATE_JUMP
from nanotoolrl.places import PLACES
from nanotoolrl.probes import ProbeSet, advantage_mass, displacement_own, survival
from nanotoolrl.run import Run, Step, trained_reward
from nanotoolrl.schemes import Scheme
from nanotoolrl.signals import SCHEMES


class Metric(NamedTuple):
    """A column: its unit and one line about it."""

    unit: str
    about: str


FIRST = {
    "step": Metric("count", "RL steps so far"),
    "reward": Metric(
        "mean", "reward of the step's rollouts, as trained (`--graded-reward`, `--tag-penalty`)"
    ),
    "success": Metric(
        "share",
        "solved tasks over the policy's own rollouts: without hinted and oracle ones (`ghpo`, `--refill`: "
        "before any is replaced; all else is of those that are trained on)",
    ),
    "contrast_groups": Metric(
        "count", "groups whose rewards differ: without a KL term, only these carry a gradient"
    ),
    "loss": Metric(
        "mean",
        "policy loss (with KL and entropy terms, if any) over sampled tokens, over the step's updates",
    ),
    "kl": Metric("nats", "mean KL(policy, start) on the probe set"),
    "entropy": Metric(
        "nats",
        "mean over the sampled tokens (ground truth left out) of the step's first update (without a KL term, "
        "of rows with an advantage)",
    ),
    "grad_norm": Metric("mean", "gradient norm before clipping"),
    "clip_fraction": Metric(
        "share", "over all updates: of the tokens that the policy sampled, those whose ratio was clipped"
    ),
    "tokens": Metric("count", "sampled tokens"),
    "sample_tok_s": Metric("1/s", "sampled tokens per second of sampling"),
    "train_tok_s": Metric("1/s", "tokens per second through the update"),
    "logprob_gap": Metric(
        "nats",
        "largest difference between the sampler's and the trainer's log-prob of a token, first update",
    ),
    **{
        f"state_{state}": Metric("share", f"assistant messages (ground truth left out) in the state {state}")
        for state in MESSAGE_STATES
    },
    "spurious_control": Metric(
        "probability",
        "of a control token where it is certainly wrong: mean over positions, then over tokens, on the probe "
        "set",
    ),
    "required_control": Metric(
        "probability", "of control tokens where they are next: mean over positions, then over tokens"
    ),
    "nll_control": Metric("nats", "mean negative log-likelihood of control tokens, on the probe set"),
    "nll_content": Metric("nats", "mean negative log-likelihood of the other tokens, on the probe set"),
    **{
        f"nll_{name}": Metric("nats", f"the same of {what}")
        for name, what in {
            "structure": "structure: control tokens and the skeleton of calls",
            "value": "values: the words in calls that the caller chose",
            "opener": "the first tokens of replies",
            "text": "the rest of replies, without the stop",
        }.items()
    },
    "spurious_growth": Metric(
        "ratio",
        "the largest spike: a control token's spurious probability to that at the start, both at least 1e-6",
    ),
    "displacement_truth": Metric(
        "nats", "mean change of the log-prob of a ground-truth token since the start, on the probe set"
    ),
    "displacement_own": Metric(
        "nats",
        "mean change of the log-prob of a token of the step's own successes (at most 16 rollouts) by the "
        "step's update",
    ),
    "probe_seconds": Metric("s", "spent on all of these and on `probes.jsonl`"),
    "eval_success": Metric(
        "share", "greedy success on the first `--eval-part` evaluation tasks, every `--eval-every` steps"
    ),
    "hinted_rows": Metric("share", "rollouts that saw a hint"),
    "oracle_rows": Metric("share", "rollouts that are the ground truth"),
}
LAST = {
    "sft_loss": Metric("nats", "mean of -w log p of the step's SFT (w is 1 but for `--chord-phi`)"),
    "sft_tokens": Metric(
        "count", "its trained tokens; a burst stands in the row of the step that follows it"
    ),
    "rewritten": Metric(
        "share", "messages whose recorded tokens are not those that were sampled (`--record`)"
    ),
    "skipped_updates": Metric("count", "updates left out because loss or gradient were not finite"),
    "skipped_tasks": Metric(
        "count", "training tasks left out because nobody can solve them within the limits of an episode"
    ),
    "forward_tokens": Metric("count", "tokens of the update that passed through the model, padding left out"),
    "sample_seconds": Metric("s", "of sampling"),
    "seconds": Metric("s", "of the whole step"),
}
NOT_COLUMNS = {"logit_gradient", "net_push"}  # what an update returns for probes.jsonl
PAGE = """\
# Metrics

`python -m nanotoolrl.look.metrics` prints this page. `python train.py --help` ends with its table.

A run writes one row of `metrics.csv` per step. A column that does not apply is empty, never 0. The last field
of the table says whose a column is: of all schemes, or of those that declare it in their decorator.

{table}

## The probe set

The probe set is a fixed sample of ground-truth conversations of training tasks (`--probe-tasks`). It is
measured every `--probe-every` steps.

A control token is required at a place where it is next. It is certainly wrong (spurious) at a place where it
is not next, but for these honest choices, which count as neither:

- what opens a call, at the start of a message and after a complete call
- what closes a call, within it
- the stop token, inside an answer

## `probes.jsonl`

The file has a line a step. The first line is step 0, the start, with `nll_control`, `nll_content` and
`tokens`. Each of the others has these fields, as far as they apply:

| field | what it is |
|---|---|
| `survival` | entry k: share of the policy's own rollouts, of tasks with so many turns, that passed the \
first k + 1 |
| `advantage_mass` | sums of positive and negative advantages on control and content tokens, and on each \
class of tokens, per sampled token |
| `net_push` | `self` and `other` of `logit_gradient` together, by place in the message and \
control token: from tokens with A > 0, from those with A < 0 |
| `logit_gradient` | how the policy loss pushes the logit of each control token, summed over the step's \
updates |
| `greedy_states` | message states of the evaluation, in steps that have one |
| `tokens` | the probes of each control token, in measured steps |

`logit_gradient` counts the push through the sampled tokens' log-probs: `self` comes from where the token was
sampled, `other` from everywhere else. Entropy and SFT terms are not in it. `net_push` is their sum. It counts
by the sign of the token's advantage, and by what stood before: the start of a message (a call or a reply is
due), behind the tag, in a call, behind its body, behind the call, in a reply (`nanotoolrl/places.py`).

`tokens` has these numbers of each control token:

| field | what it is |
|---|---|
| `required` | its mean probability where it is next |
| `spurious` | its mean probability where it is certainly wrong |
| `growth` | `spurious` in multiples of the start, both at least 1e-6 |
| `start_call` | its mean probability at the start of a message that should call |
| `start_reply` | its mean probability at the start of a message that should answer |
| `after_prefix` | its mean probability after the canonical prefix of a call |
| `due_after_prefix` | share of the places after the canonical prefix where it is next |

## The alarm

The progress bar raises an alarm when the spurious probability of a control token has grown {growth} times
since the start. It also does when the share of an unhealthy message state is more than {points} points above
that of the first step.
"""


def metrics(schemes: Mapping[str, Scheme] = SCHEMES) -> dict[str, Metric]:
    """Every column of metrics.csv, in order: shared ones, those that schemes declare, shared ones.

    Raises TypeError if a scheme declares a name that already means something else.
    """
    own: dict[str, Metric] = {}
    for scheme in schemes.values():
        for name, what in scheme.metrics.items():
            if name in FIRST | LAST or own.setdefault(name, Metric(*what)) != what:
                raise TypeError(f"{scheme.name} declares the metric {name}, which means something else")
    return FIRST | own | LAST


def columns_of(scheme: str) -> set[str]:
    """The columns that a run of a scheme can fill."""
    return {*FIRST, *SCHEMES[scheme].metrics, *LAST}


def metrics_table(width: int = 110) -> str:
    """The table for a terminal."""
    lines = []
    longest = max(map(len, metrics()))
    for name, (unit, about) in metrics().items():
        head = f"  {name:<{longest}}  {unit:<11}  "
        lines += textwrap.wrap(about, width, initial_indent=head, subsequent_indent=" " * len(head))
    return "\n".join(lines)


def metrics_page(schemes: Mapping[str, Scheme] = SCHEMES) -> str:
    """docs/metrics.md: every column and whose it is, what probes.jsonl holds, what raises the alarm."""
    lines = ["| column | unit | what it is | schemes |", "|---|---|---|---|"]
    for name, (unit, about) in metrics(schemes).items():
        owners = ", ".join(f"`{key}`" for key, one in schemes.items() if name in one.metrics)
        lines.append(f"| `{name}` | {unit} | {about} | {owners or 'all'} |")
    return PAGE.format(table="\n".join(lines), growth=SPURIOUS_JUMP, points=round(100 * STATE_JUMP))


# ------------------------------------------------------------------------------------------------ measuring
def measures(run: Run, step: Step) -> dict[str, Any]:
    """The metrics every scheme shares, from its trajectories; none without any."""
    rows = step.trajectories
    if not rows:
        return {}
    own = [row.reward for row in rows if row.source == "policy"]
    states = [state for row in rows if row.source != "oracle" for state in row.states]
    return {
        "reward": sum(trained_reward(run.config, row) for row in rows) / len(rows),
        "success": sum(own) / len(own) if own else math.nan,
        "contrast_groups": int((step.advantages.view(-1, run.config.group) != 0).any(1).sum()),
        "hinted_rows": sum(row.source == "hint" for row in rows) / len(rows),
        "oracle_rows": sum(row.source == "oracle" for row in rows) / len(rows),
        "tokens": run.sampled_tokens,
        "sample_tok_s": run.sampled_tokens / run.sample_seconds,
        "sample_seconds": run.sample_seconds,
        **{f"state_{state}": states.count(state) / len(states) for state in MESSAGE_STATES},
    }


def probe_step(run: Run, step: Step, probes: ProbeSet) -> tuple[dict[str, Any], dict[str, Any]]:
    """(columns of metrics.csv, line of probes.jsonl) of a step: what it did at the control tokens.

    Its rollouts and its update are looked at in every step. What the policy does there now is measured every
    `probe_every` steps, and kept in `run.state.probe`: a scheme may act on it.
    """
    columns: dict[str, Any] = {}
    details: dict[str, Any] = {"step": run.step}
    started = time.perf_counter()
    if step.trajectories:
        details["survival"] = survival(step.trajectories)
        details["advantage_mass"] = advantage_mass(step.trajectories, step.advantages, run.structure)
    if step.metrics.get("logit_gradient"):
        names = ("self", "other")
        pushes = zip(probes.control, *step.metrics["logit_gradient"], strict=True)
        details["logit_gradient"] = {token: dict(zip(names, push)) for token, *push in pushes}
    if step.metrics.get("net_push"):
        details["net_push"] = {
            place: {
                token: list(pair) for token, *pair in zip(probes.control, *both, strict=True) if any(pair)
            }
            for place, both in zip(PLACES, step.metrics["net_push"], strict=True)
        }
    if run.step % run.config.probe_every == 0:
        measured = distributed.from_first(lambda: probes.measure(run.policy))  # a scheme may act on it
        columns = dict(measured.columns)
        columns["displacement_own"] = displacement_own(run.policy, step.trajectories, run.config.temperature)
        details["tokens"] = measured.tokens
        run.state.probe = {"step": run.step} | measured.columns
    spent = time.perf_counter() - started
    return columns | {"probe_seconds": spent + step.metrics.get("probe_seconds", 0.0)}, details


# ------------------------------------------------------------------------------------------------ the command
main = printer(
    "nanotoolrl.look.metrics", "Print docs/metrics.md, the page of what is measured.", metrics_page
)


if __name__ == "__main__":
    sys.exit(main())
