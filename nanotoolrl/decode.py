"""The device's side of sampling: decode steps for all rows at once, the choice of a token, its noise.

A row keeps its slot in the cache (cache.py); a step feeds the live rows. On a CPU every token is read back
at once. On a GPU (`fast`) a step is one CUDA graph per batch size, from the
embedding to the sampled token and whether it stops, and tokens are read back every `WINDOW` steps. The
optimiser updates weights in place, so graphs outlive training steps.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nanotoolrl.cache import Cache
from nanotoolrl.logprob import HAS_TRITON
from nanotoolrl.model import Policy

WINDOW = 8  # decode steps between two looks at what was sampled, on a GPU
BUCKETS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256)  # batch sizes of CUDA graphs; then multiples of 128


class Feed(NamedTuple):
    """A row of a decode step: what it is fed, and where it stands."""

    slot: int = 0  # in the cache
    token: int = 0  # to feed
    length: int = 0  # how many are cached before it
    left: int = 0  # most tokens to sample
    stream: int = 0  # of its noise
    place: int = 0  # in that stream


class Decoder:
    """Feeds tokens to a policy and samples what follows. `seed` is of the noise; `fast`: the GPU's way."""

    def __init__(self, policy: Policy, seed: int, fast: bool) -> None:
        self.policy, self.seed, self.fast = policy, seed, fast
        self.context = 0
        self.window = WINDOW if fast else 1
        self.stop_ids = torch.tensor(policy.chat.stop_ids, device=policy.device)
        self.cache = Cache(policy, fast)
        self.loops: dict[tuple, _Loop] = {}
        self.pool = torch.cuda.graph_pool_handle() if policy.device.type == "cuda" else None

    def open(self, slots: int, context: int) -> None:
        """Start a rollout of at most `slots` rows and `context` positions."""
        self.context = context
        if self.fast:
            self.reserve(slots + 1, 0)  # the last one is scratch

    def reserve(self, slots: int, capacity: int) -> None:
        """Make room for that many rows and positions; on a GPU for twice as many positions as before, because
        graphs hold the addresses of the cache and must be recorded again."""
        if self.fast and (slots > self.cache.size or capacity > self.cache.capacity):
            self.loops.clear()
            capacity = max(capacity, min(self.context, 2 * self.cache.capacity))
        self.cache.grow(slots, capacity)

    def feed(self, rows: Sequence[int], cached: Sequence[int], pending: Sequence[Sequence[int]]) -> Tensor:
        """Append the pending ids to the given rows, which hold `cached` ids; returns the hidden states
        [rows, D] after the last of them."""
        device = self.policy.device
        counts, begins = torch.tensor([len(ids) for ids in pending]), torch.tensor(cached)
        widest, ends = int(counts.max()), begins + counts
        # Padding is the row's last token once more, in its own place: it writes what stands there already.
        ids = torch.tensor([[*new, *[new[-1]] * (widest - len(new))] for new in pending])  # [rows, T]
        positions = torch.minimum(begins[:, None] + torch.arange(widest), ends[:, None] - 1)  # [rows, T]
        behind = torch.arange(int(ends.max())) >= ends[:, None]  # [rows, width]
        self.reserve(max(rows) + 1, behind.shape[1])
        slots, positions, behind = torch.tensor(rows, device=device), positions.to(device), behind.to(device)
        attend = self.cache.extending(slots, positions, behind)
        hidden = self.policy.model(ids.to(device), positions, attend)  # [rows, T, D]
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
        if logits.is_cuda and HAS_TRITON:
            from nanotoolrl.gpu.kernels import pick  # needs Triton

            return pick(logits, noise, None, temperature)
        logprobs = torch.log_softmax(logits / temperature, dim=-1)  # [B, V]
        if noise is None:
            ids = logprobs.argmax(-1)
        else:
            cumulated = logprobs.double().exp().cumsum(-1)
            ids = torch.searchsorted(cumulated, noise[:, None] * cumulated[:, -1:], right=True)[:, 0]
            ids = ids.clamp(max=logprobs.shape[1] - 1)
        return ids, logprobs.gather(1, ids[:, None])[:, 0]

    def decode(self, rows: Sequence[Feed], temperature: float) -> tuple[list[list[int]], list[list[float]]]:
        """(ids, log-probs), each [steps][rows], of up to `window` decode steps.

        The slots of the rows rise. What is sampled past a row's stop token, or its most tokens, means
        nothing.
        """
        steps = min(self.window, max(row.left for row in rows))
        batch = len(rows)
        self.reserve(0, max(row.length + min(steps, row.left) for row in rows))
        if self.fast:
            batch = next((size for size in BUCKETS if size >= batch), -(-batch // 128) * 128)
            idle = Feed(slot=self.cache.size - 1)  # in the scratch slot
            rows = [*rows, *[idle] * (batch - len(rows))]
        loop = self.loops.get((batch, temperature)) or _Loop(self, batch, temperature)
        if self.fast:
            self.loops[batch, temperature] = loop
        return loop.run(rows, steps)

    def forward(self, token: Tensor, length: Tensor, slot: Tensor) -> Tensor:
        """Hidden states [B, D] of one token [B] per row, which stands at position `length` [B]."""
        return self.policy.model(token[:, None], length[:, None], self.cache.stepping(slot, length))[:, 0]


class _Loop:
    """Decode steps of a fixed batch size over state that stays on the device."""

    def __init__(self, decoder: Decoder, batch: int, temperature: float) -> None:
        self.decoder = decoder
        self.temperature = temperature
        device, window = decoder.policy.device, decoder.window
        idle = torch.tensor([Feed(slot=decoder.cache.size - 1)] * batch)
        self.state = idle.T.contiguous().to(device)  # [6, batch]: a row for each field of `Feed`
        self.ids = torch.zeros(window, batch, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(window, batch, device=device)
        self.at = torch.zeros(1, dtype=torch.long, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None

    def run(self, rows: Sequence[Feed], steps: int) -> tuple[list[list[int]], list[list[float]]]:
        """See `Decoder.decode`."""
        if self.graph is None and self.state.is_cuda:
            self._capture()
        self.state.copy_(torch.tensor(rows).T)
        self.at.zero_()
        for _ in range(steps):
            self.graph.replay() if self.graph else self.step()
        return self.ids[:steps].tolist(), self.logprobs[:steps].tolist()

    def step(self) -> None:
        """Feed each row's token, sample the next one, note it, and find out who stopped.

        A row that did stays at its length and goes on writing there; whoever continues it writes that
        position anew. The state changes in place: a graph holds its addresses.
        """
        slot, token, length, left, stream, place = self.state
        hidden = self.decoder.forward(token, length, slot)
        ids, logprobs = self.decoder.choose(hidden, stream, place, self.temperature)
        self.ids.index_copy_(0, self.at, ids[None])
        self.logprobs.index_copy_(0, self.at, logprobs[None])
        self.at += 1
        going = left > 0
        token.copy_(ids)
        length += going
        place += going
        left -= going.long()
        left *= (ids[:, None] != self.decoder.stop_ids).all(1)

    def _capture(self) -> None:
        """Record a step as a CUDA graph. While it is warmed up all rows idle in the scratch slot."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.step()
                self.at.zero_()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.decoder.pool):  # one runs at a time
            self.step()
        self.graph = graph


# ------------------------------------------------------------------------------------------------------ noise
def uniform(seed: int, streams: Tensor, places: Tensor) -> Tensor:
    """Random numbers in [0, 1), fp64, one per (seed, stream, place): a counter-based generator (splitmix64),
    so that a sequence's noise depends on nothing but its own key. int64 arithmetic wraps, as it should."""
    step, first, second = (_signed(x) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))

    def shifted(x: Tensor, bits: int) -> Tensor:
        return (x >> bits) & ((1 << (64 - bits)) - 1)  # zeros come in from the left

    def mix(x: Tensor) -> Tensor:
        x = (x ^ shifted(x, 30)) * first
        x = (x ^ shifted(x, 27)) * second
        return x ^ shifted(x, 31)

    key = mix(torch.full_like(streams, _signed(seed)) * step + step)
    key = mix((key ^ streams) * step + step)
    key = mix((key ^ places) * step + step)
    return shifted(key, 11).double() / 2.0**53


def _signed(x: int) -> int:
    """The int64 with the same bits as x modulo 2^64."""
    return (x + 2**63) % 2**64 - 2**63
