"""The device's side of sampling: prompts, decode steps for all rows at once, the choice of a token.

On a GPU (`fast`) gpu/graphs.py makes several steps between two looks at what was sampled.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nanotoolrl.attention import Rows
from nanotoolrl.cache import Cache, Store
from nanotoolrl.logprob import HAS_TRITON
from nanotoolrl.model import Policy
from nanotoolrl.noise import uniform


class Feed(NamedTuple):
    """A row of a decode step: what it is fed, and where it stands."""

    slot: int = 0  # in the cache
    token: int = 0  # to feed
    length: int = 0  # how many tokens its slot holds
    left: int = 0  # most tokens to sample
    stream: int = 0  # of its noise
    place: int = 0  # in that stream
    prompt: int = 0  # where its prompt is stored
    prompt_length: int = 0


def kept_logprobs(logprobs: Tensor, top_p: float, min_p: float) -> Tensor:
    """Log-probs [B, V] with -inf where a token is not sampled. top_p: kept are the likeliest tokens whose
    likelier ones have less probability than that (arXiv 1904.09751). min_p: kept are tokens at least so
    likely as that share of the likeliest (arXiv 2407.01082). The likeliest token is always kept."""
    sorted_logprobs, order = logprobs.sort(dim=-1, descending=True)
    p = sorted_logprobs.exp()
    left_out = (p.cumsum(-1) - p >= top_p) | (p < min_p * p[:, :1])
    left_out[:, 0] = False
    return logprobs.masked_fill(torch.zeros_like(left_out).scatter(1, order, left_out), float("-inf"))


class Decoder:
    """Feeds tokens to a policy and samples what follows. `seed` is of the noise; `fast`: the GPU's way;
    `top_p` and `min_p`: see `kept_logprobs`."""

    def __init__(self, policy: Policy, seed: int, fast: bool, top_p: float = 1.0, min_p: float = 0.0) -> None:
        self.policy, self.seed = policy, seed
        self.top_p, self.min_p = top_p, min_p
        self.context = 0
        self.cache, self.graphs = Cache(policy, fast), None
        if fast:
            from nanotoolrl.gpu.graphs import Graphs

            self.graphs = Graphs(self.step, policy, self.cache.own)

    def open(self, slots: int, context: int) -> None:
        """Start a rollout of at most `slots` rows and `context` positions."""
        self.context = context
        self.cache.prompts.clear()
        self.cache.own.clear()
        self.reserve(self.cache.prompts, slots if self.graphs else 1, 1)
        if self.graphs:
            self.reserve(self.cache.own, slots + 1, 1)  # the last one is scratch

    def reserve(self, store: Store, size: int, capacity: int) -> None:
        """Make room for that many places and positions: for twice as many positions as before, as all are
        copied. On a GPU graphs hold their addresses and must be recorded again."""
        if size > store.size or capacity > store.capacity:
            capacity = max(capacity, min(self.context, 2 * store.capacity))
            if self.graphs:
                self.graphs.forget()
        store.grow(size, capacity)

    def read(self, places: Sequence[int], prompts: Sequence[Sequence[int]]) -> Tensor:
        """Store prompts; returns the hidden states [prompts, D] after the last token of each."""
        device, widest = self.policy.device, max(map(len, prompts))
        ids = torch.tensor([[*prompt, *[0] * (widest - len(prompt))] for prompt in prompts], device=device)
        positions = torch.arange(widest, device=device).expand(len(prompts), -1)
        self.reserve(self.cache.prompts, max(places) + 1, widest)
        attend = self.cache.prompting(torch.tensor(places, device=device), positions)
        ends = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
        return self.policy.model(ids, positions, attend)[torch.arange(len(prompts), device=device), ends]

    def extend(self, rows: Sequence[Feed], pending: Sequence[Sequence[int]]) -> Tensor:
        """Append the pending ids to rows; returns the hidden states [rows, D] after the last of them."""
        device, stand = self.policy.device, Rows.of(rows)
        counts = torch.tensor([len(ids) for ids in pending])
        widest, ends = int(counts.max()), stand.lengths + counts
        # Padding is the row's last token once more, in its own place: it writes what stands there already.
        ids = torch.tensor([[*new, *[new[-1]] * (widest - len(new))] for new in pending])  # [rows, T]
        positions = torch.minimum(stand.lengths[:, None] + torch.arange(widest), ends[:, None] - 1)
        self.reserve(self.cache.own, int(stand.slots.max()) + 1, int(ends.max()))
        stand, positions = Rows(*(x.to(device) for x in stand)), positions.to(device)
        attend = self.cache.extending(stand, positions)
        hidden = self.policy.model(ids.to(device), positions + stand.prompt_lengths[:, None], attend)
        return hidden[torch.arange(len(rows), device=device), (counts - 1).to(device)]

    def choose(
        self, hidden: Tensor, streams: Tensor, places: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """(ids [B], log-probs [B]) sampled from hidden states [B, D].

        The noise of a row is keyed by the seed, its stream and its place. temperature 0: greedy, with the
        log-probs of temperature 1.
        """
        logits = self.policy.logits(hidden)  # [B, V], never rounded to half
        noise = uniform(self.seed, streams, places) if temperature else None  # [B]
        return self.draw(logits, noise, temperature or 1.0)

    def draw(self, logits: Tensor, noise: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
        """(ids [B], log-probs [B]): the id in which each row's noise falls, the likeliest without noise."""
        whole = self.top_p == 1 and self.min_p == 0
        if logits.is_cuda and HAS_TRITON and whole:
            from nanotoolrl.gpu.kernels import pick  # needs Triton

            return pick(logits, noise, None, temperature)
        logprobs = torch.log_softmax(logits / temperature, dim=-1)  # [B, V]
        if noise is None:
            ids = logprobs.argmax(-1)
        else:
            kept = logprobs if whole else kept_logprobs(logprobs, self.top_p, self.min_p)
            cumulated = kept.double().exp().cumsum(-1)
            ids = torch.searchsorted(cumulated, noise[:, None] * cumulated[:, -1:], right=True)[:, 0]
            ids = ids.clamp(max=logprobs.shape[1] - 1)
        return ids, logprobs.gather(1, ids[:, None])[:, 0]

    def decode(self, rows: Sequence[Feed], temperature: float) -> tuple[list[list[int]], list[list[float]]]:
        """(ids, log-probs), each [steps][rows], of one decode step; on a GPU of up to `WINDOW`.

        The slots of the rows rise. What is sampled behind a row's stop token or last token means nothing.
        """
        steps = min(self.graphs.window, max(row.left for row in rows)) if self.graphs else 1
        longest = max(row.length + min(steps, row.left) for row in rows)
        self.reserve(self.cache.own, max(row.slot for row in rows) + 1, longest)
        if self.graphs:
            return self.graphs.run(rows, steps, temperature)
        state = torch.tensor(rows, device=self.policy.device).T  # [8, B]: a row for each field of `Feed`
        ids, logprobs = self.step(state, temperature)
        return [ids.tolist()], [logprobs.tolist()]

    def step(self, state: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """(ids [B], log-probs [B]) that are sampled when rows are fed as their columns of `state` say."""
        return self.choose(self.feed(state), state[4], state[5], temperature)

    def feed(self, state: Tensor) -> Tensor:
        """Hidden states [B, D] after the tokens that rows are fed; a column of `state` is a `Feed`."""
        slot, token, length, _, _, _, prompt, prompt_length = state
        attend = self.cache.stepping(Rows(slot, length, prompt, prompt_length))
        return self.policy.model(token[:, None], (prompt_length + length)[:, None], attend)[:, 0]
