"""Decode steps on a GPU: one CUDA graph per batch size, from the embedding to the sampled token and whether
it stops. Tokens are read back every `WINDOW` steps. The optimiser updates weights in place, so graphs outlive
training steps.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nanotoolrl.cache import Store
from nanotoolrl.model import Policy

WINDOW = 8  # decode steps between two looks at what was sampled
BUCKETS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256)  # batch sizes of CUDA graphs; then multiples of 128
FIELDS = 8  # of `decode.Feed`

# (state [FIELDS, B], temperature) -> (ids [B], log-probs [B]): `Decoder.step`
Step = Callable[[Tensor, float], tuple[Tensor, Tensor]]


class Graphs:
    """The loops of a decoder, by batch size and temperature."""

    def __init__(self, step: Step, policy: Policy, own: Store) -> None:
        self.step, self.own, self.window = step, own, WINDOW
        self.stop_ids = torch.tensor(policy.chat.stop_ids, device=policy.device)
        self.pool = torch.cuda.graph_pool_handle() if policy.device.type == "cuda" else None
        self.loops: dict[tuple, Loop] = {}

    def forget(self) -> None:
        """Drop all graphs: the cache moves, and they hold its addresses."""
        self.loops.clear()

    def run(
        self, rows: Sequence[Sequence[int]], steps: int, temperature: float
    ) -> tuple[list[list[int]], list[list[float]]]:
        """(ids, log-probs), each [steps][rows], of `decode.Feed` rows; idle ones fill the batch up."""
        batch = next((size for size in BUCKETS if size >= len(rows)), -(-len(rows) // 128) * 128)
        idle = (self.own.size - 1, *[0] * (FIELDS - 1))  # in the scratch slot, the last
        loop = self.loops.get((batch, temperature))
        if loop is None:
            loop = self.loops[batch, temperature] = Loop(self, idle, batch, temperature)
        return loop.run([*rows, *[idle] * (batch - len(rows))], steps)


class Loop:
    """Decode steps of a fixed batch size over state that stays on the device."""

    def __init__(self, graphs: Graphs, idle: Sequence[int], batch: int, temperature: float) -> None:
        self.graphs, self.temperature = graphs, temperature
        device = graphs.stop_ids.device
        self.state = torch.tensor([idle] * batch).T.contiguous().to(device)  # [FIELDS, batch]
        self.ids = torch.zeros(graphs.window, batch, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(graphs.window, batch, device=device)
        self.at = torch.zeros(1, dtype=torch.long, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None

    def run(self, rows: Sequence[Sequence[int]], steps: int) -> tuple[list[list[int]], list[list[float]]]:
        """See `Graphs.run`."""
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
        _, token, length, left, _, place, _, _ = self.state
        ids, logprobs = self.graphs.step(self.state, self.temperature)
        self.ids.index_copy_(0, self.at, ids[None])
        self.logprobs.index_copy_(0, self.at, logprobs[None])
        self.at += 1
        going = left > 0
        token.copy_(ids)
        length += going
        place += going
        left -= going.long()
        left *= (ids[:, None] != self.graphs.stop_ids).all(1)

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
        with torch.cuda.graph(graph, pool=self.graphs.pool):  # one runs at a time
            self.step()
        self.graph = graph
