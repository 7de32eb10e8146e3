"""What the control tokens are doing.

Three looks at a run. `ProbeSet` measures a policy on a frozen set of ground-truth conversations;
`logit_gradient` says which way the policy loss of a step pushes each control token (Hao et al. 2026, §5);
`survival` and `advantage_mass` describe a step's rollouts.

Shapes: N assistant tokens, C control tokens, L places in a message, D width, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanotoolrl.calls import FORMATS
from nanotoolrl.chat import Chat, call_ends
from nanotoolrl.env import Task
from nanotoolrl.model import Policy, pad
from nanotoolrl.places import CLASSES, PLACES, Structure
from nanotoolrl.trajectory import Trajectory, demonstration

ROWS_AT_ONCE = 512  # probe positions whose whole distributions exist at a time
SPURIOUS_FLOOR = 1e-6  # smaller probabilities count as this one
OWN_ROWS = 16  # most successful rollouts of a step whose displacement is measured


def growth(probability: float, start: float) -> float:
    """A spike, the same everywhere: ratio of a spurious probability to that at the run's start, both at least
    1e-6."""
    return max(probability, SPURIOUS_FLOOR) / max(start, SPURIOUS_FLOOR)


@dataclass
class Measurement:
    """One look at a policy: `columns` of metrics.csv, and per control token (text -> numbers) `tokens`."""

    columns: dict[str, float]
    tokens: dict[str, dict[str, float]]


class ProbeSet:
    """Ground-truth conversations, what the assistant writes in them, and the model to compare with.

    Keeps the start's hidden states [N, D] and a copy of its head [V, D].

    A control token is *required* at a place where it is next, and *spurious* where it is certainly wrong.
    Where something else is next, three of them are honest choices and count as neither:

        where                                       what may come as well
        the first token of a message                what opens a call: to call or to answer is a choice
        inside an answer                            the stop token: the answer may end
        inside a call, where no control token is    what closes a call's body: a value may end
        after a whole call, where the stop is next  what opens a call: there may be another

    Example: the call and the answer `Done.` with the built-in model's tokens; R required, c choice, s
    spurious. `content` stands for `name` to `docs`. The other control tokens are spurious everywhere.

        next token    <tool_call>  {"  "}}  }}  </tool_call>  <|im_end|>
        <tool_call>   R            s   s    s   s            s
        \\n            s            s   c    c   s            s
        {"            s            R   s    s   s            s
        content       s            s   c    c   s            s
        "}}           s            s   R    s   s            s
        \\n            s            s   c    c   s            s
        </tool_call>  s            s   s    s   R            s
        <|im_end|>    c            s   s    s   s            R
        Done          c            s   s    s   s            s
        .             s            s   s    s   s            c
        <|im_end|>    s            s   s    s   s            R
    """

    def __init__(self, policy: Policy, tasks: Sequence[Task], format: str) -> None:
        chat = policy.chat
        structure = Structure(chat, format)
        self.control = structure.control
        self.control_ids = torch.tensor(list(self.control.values()), device=policy.device)  # [C]
        rows = [demonstration(chat, task, format) for task in tasks]
        self.ids, self.mask = pad([(row.tokens, row.loss_mask) for row in rows], policy.device)
        self.targets = self.ids[self.mask]  # [N]
        classes = [c for row in rows for ids in row.spoken_ids() for c in structure.classes(ids)]
        self.classes = torch.tensor(classes, device=policy.device)  # [N], an index into CLASSES
        self.first = (self.mask & ~self.mask.roll(1, 1))[self.mask]  # [N], a message begins
        message = self.first.cumsum(0) - 1  # [N], index of the message
        calls = torch.tensor([state == "call" for row in rows for state in row.states], device=policy.device)
        self.calls = calls[message]  # [N], inside a message that calls
        place = torch.arange(len(message), device=policy.device)
        starts = place[self.first][message]  # [N]
        prefix = chat.assistant_ids(FORMATS[format].prefix, format)[:-1]
        self.prefixed = self.calls & (place == starts + len(prefix))  # [N], right after the canonical prefix
        self.is_next = self.targets[:, None] == self.control_ids  # [N, C]
        self.wrong = ~self.is_next & ~self._choices(chat, format, prefix[0])  # [N, C]
        with torch.inference_mode():
            self.start_hidden, self.start_head = self._hidden(policy), policy.head.detach().clone()
            self.start_logprobs = policy.token_logprob(self.start_hidden, self.targets)[0]
            self.start_spurious = self._spurious(self.start_hidden, self.start_head, self.start_logprobs)

    def _choices(self, chat: Chat, format: str, opener: int) -> Tensor:
        """[N, C], True where a control token is an honest choice: the table above, row by row."""
        closers = torch.tensor(sorted(call_ends(chat, format)[1]), device=self.control_ids.device)
        stop_is_next = self.targets == chat.end_id
        control_is_next = self.is_next.any(1)  # [N]
        table = [
            (self.first, self.control_ids == opener),
            (~self.calls & ~self.first, self.control_ids == chat.end_id),
            (self.calls & ~self.first & ~control_is_next, torch.isin(self.control_ids, closers)),
            (self.calls & stop_is_next, self.control_ids == opener),
        ]
        choices = torch.zeros_like(self.is_next)
        for where, tokens in table:
            choices |= where[:, None] & tokens
        return choices

    def _hidden(self, policy: Policy) -> Tensor:
        rows = zip(self.ids, self.mask, strict=True)
        return torch.cat([policy.trained_hidden(i[None], m[None]) for i, m in rows])  # [N, D]

    def _spurious(self, hidden: Tensor, head: Tensor, logprobs: Tensor) -> Tensor:
        p = control_probabilities(hidden, head, self.targets, logprobs, self.control_ids)
        return _mean_where(p, self.wrong)  # [C]

    @torch.inference_mode()
    def measure(self, policy: Policy) -> Measurement:
        """Columns: kl, mean KL(policy || start) in nats over the assistant's positions; spurious_control and
        required_control, mean over control tokens of their mean probability where they are certainly wrong,
        and where they are next; spurious_growth, the largest spike; nll_control and nll_content, and
        nll_structure, nll_value, nll_opener and nll_text by class, mean negative log-likelihood in nats;
        displacement_truth, mean change of the ground truth's log-prob per
        token since the start.

        Per token: required, spurious, growth, and its mean probability at the start of a message that should
        call (start_call) and that should answer (start_reply), and after the canonical prefix (after_prefix;
        due_after_prefix is the share of those places where it is next).
        """
        hidden = self._hidden(policy)
        logprobs = policy.token_logprob(hidden, self.targets)[0]  # [N]
        p = control_probabilities(hidden, policy.head, self.targets, logprobs, self.control_ids)  # [N, C]
        places = {
            "required": self.is_next,
            "spurious": self.wrong,
            "start_call": (self.first & self.calls)[:, None],
            "start_reply": (self.first & ~self.calls)[:, None],
            "after_prefix": self.prefixed[:, None],
        }
        means = {name: _mean_where(p, where.expand_as(p)) for name, where in places.items()}
        tokens = {
            token: {name: values[c].item() for name, values in means.items()}
            | {
                "due_after_prefix": self.is_next[self.prefixed, c].float().mean().item(),
                "growth": growth(means["spurious"][c].item(), self.start_spurious[c].item()),
            }
            for c, token in enumerate(self.control)
        }
        control = self.is_next.any(1)
        kl = sum(
            _kl(hidden[i], policy.head, self.start_hidden[i], self.start_head) for i in _chunks(len(hidden))
        )
        columns = {
            "kl": kl / len(hidden),
            "spurious_control": means["spurious"].mean().item(),
            "required_control": means["required"].nanmean().item(),
            "nll_control": -logprobs[control].mean().item(),
            "nll_content": -logprobs[~control].mean().item(),
            **{f"nll_{name}": -logprobs[self.classes == c].mean().item() for c, name in enumerate(CLASSES)},
            "spurious_growth": max(values["growth"] for values in tokens.values()),
            "displacement_truth": (logprobs - self.start_logprobs).mean().item(),
        }
        return Measurement(columns, tokens)


def control_probabilities(
    hidden: Tensor, head: Tensor, ids: Tensor, logprobs: Tensor, control: Tensor, temperature: float = 1.0
) -> Tensor:
    """Probabilities [N, C] of the control ids [C] at positions with hidden states [N, D], whose given ids [N]
    have the log-probs [N] under the head [V, D]: the softmax's denominator is known from those."""
    own = (hidden.float() * head[ids].float()).sum(1) / temperature
    logits = hidden.float() @ head[control].float().T / temperature
    return (logits - (own - logprobs)[:, None]).exp()


def logit_gradient(push: Tensor, ids: Tensor, probabilities: Tensor, control: Tensor) -> Tensor:
    """How a loss pushes the logits of the control ids [C]: (self, other) stacked to [2, C].

    push [N] is -d loss / d log-prob of each trained token (its advantage over the number of tokens, where
    nothing is clipped), probabilities [N, C] those of the control ids there. As d log p_x / d z_k is
    1[k = x] - p_k, token k gets sum push (1 - p_k) where it was sampled itself, and -sum push p_k from all
    others: a negative advantage pushes mass onto tokens that nobody sampled (Hao et al. 2026, §5).
    """
    own = ids[:, None] == control  # [N, C]
    push = push[:, None]
    return torch.stack([(push * (1 - probabilities) * own).sum(0), (-push * probabilities * ~own).sum(0)])


def placed_gradient(
    push: Tensor, ids: Tensor, probabilities: Tensor, control: Tensor, place: Tensor
) -> Tensor:
    """The net push, self and other together, on the logits of the control ids [C] at each of L places, from
    tokens with a positive push (first) and from those with a negative one: [L, 2, C].

    Arguments as in `logit_gradient`; place: [N], an index into PLACES. With tokens exactly as sampled the
    expected net push on token k at a state is Cov(A, 1[k = x]). The sum over all places is the gradient on a
    single bias of token k. Over the whole vocabulary the net push is 0, so what is missing to 0 here is the
    push on all that are no control tokens.
    """
    net = push[:, None] * ((ids[:, None] == control).to(push) - probabilities)  # [N, C]
    found = net.new_zeros(2 * len(PLACES), len(control))
    return found.index_add_(0, 2 * place + (push < 0), net).view(len(PLACES), 2, len(control))


@torch.inference_mode()
def displacement_own(policy: Policy, trajectories: Sequence[Trajectory], temperature: float) -> float:
    """Mean change of log-prob per token, since they were sampled, of the step's successes (the policy's own,
    at most 16); nan if there are none. Negative: the update made them less likely (arXiv 2512.04220)."""
    rows = [row for row in trajectories if row.source == "policy" and row.reward == 1][:OWN_ROWS]
    changes = []
    for row in rows:
        ids, mask = pad([(row.tokens, row.loss_mask)], policy.device)
        before = torch.tensor(row.logprobs, device=policy.device)[mask[0]]
        changes += (policy.logprobs(ids, mask, temperature)[0] - before).tolist()
    return sum(changes) / len(changes) if changes else math.nan


def survival(trajectories: Sequence[Trajectory]) -> list[float]:
    """Entry k: share of the policy's own rollouts, among those of tasks with more than k turns, that passed
    turns 0 to k."""
    own = [row for row in trajectories if row.source == "policy"]
    shares = []
    for k in range(max((row.turns for row in own), default=0)):
        rows = [row for row in own if row.turns > k]
        passed = [len(row.verdicts) > k and all(v.passed for v in row.verdicts[: k + 1]) for row in rows]
        shares.append(sum(passed) / len(rows))
    return shares


def advantage_mass(
    trajectories: Sequence[Trajectory], advantages: Tensor, structure: Structure
) -> dict[str, float]:
    """Sums of positive and of negative advantages over control and over content tokens, and over each class
    of tokens, per sampled token."""
    kinds = ("control", "content", *CLASSES)
    mass = dict.fromkeys([f"{kind}_{sign}" for kind in kinds for sign in ("positive", "negative")], 0.0)
    total = sum(row.sampled_tokens for row in trajectories)
    for row, advantage in zip(trajectories, advantages.tolist(), strict=True):
        sign = "positive" if advantage > 0 else "negative"
        for ids in row.spoken_ids():
            control = sum(token in structure.control_ids for token in ids)
            counts = {"control": control, "content": len(ids) - control}
            classes = structure.classes(ids) if advantage else []
            counts |= {name: classes.count(c) for c, name in enumerate(CLASSES)}
            for kind, count in counts.items():
                mass[f"{kind}_{sign}"] += advantage * count / total
    return mass


def _mean_where(values: Tensor, where: Tensor) -> Tensor:
    """Column means [C] of `values` [N, C] over the rows where `where` [N, C] holds; nan where none does."""
    return (values * where).sum(0) / where.sum(0)


def _chunks(n: int) -> list[slice]:
    return [slice(i, i + ROWS_AT_ONCE) for i in range(0, n, ROWS_AT_ONCE)]


def _kl(hidden: Tensor, head: Tensor, other_hidden: Tensor, other_head: Tensor) -> float:
    """Sum over rows of KL between two models' next-token distributions."""
    logp = torch.log_softmax(hidden.float() @ head.float().T, -1)
    logq = torch.log_softmax(other_hidden.float() @ other_head.float().T, -1)
    return (logp.exp() * (logp - logq)).sum().item()
