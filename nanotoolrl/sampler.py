"""Batched multi-turn rollouts with a KV cache of our own, and `Trajectory`, which all parts exchange.

Each row of the batch is one episode. Rows are never left-padded (position = length), never wait for each
other's turns, and only tokens that are not in the cache yet pass through the model: one new token per row in
a decode step, the ids of an observation after a tool call, the prompt once per group. What a row samples
depends on its own noise stream and its own tokens alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from nanotoolrl.chat import FORMATS, Chat, message_state
from nanotoolrl.env import Episode, Task, Verdict, oracle
from nanotoolrl.model import Policy

PREFILL_TOKENS = 8192  # most tokens in one prefill forward
PREFILL_SHARE = 0.2  # rows that wait for a prefill before one is made; the others decode on
COMPACT_SHARE = 0.8  # live rows under which the cache is compacted
CAPACITY_STEP = 128  # the cache grows by so many positions


@dataclass
class Trajectory:
    """One episode as tokens. `tokens`, `loss_mask` and `logprobs` are equally long and append-only.

    loss_mask is True exactly on sampled tokens, stop tokens included, in every turn; logprobs holds their
    log-probability (nats, under the policy, the temperature and the prompt they were sampled with) and 0.0
    elsewhere. `tokens` of a rollout never holds a hint: it keeps the prompt it was sampled under in
    `sampled_prompt`.

    Example, prompt [5, 6], sampled [7, stop], observation [8], sampled [stop]:
    tokens [5, 6, 7, stop, 8, stop], loss_mask [F, F, T, T, F, T].
    """

    task_id: str
    category: str
    format: str
    tokens: list[int]
    loss_mask: list[bool]
    logprobs: list[float]
    prompt_length: int
    reward: float = 0.0
    states: list[str] = field(default_factory=list)  # one message state per assistant message
    verdicts: list[Verdict] = field(default_factory=list)  # one per finished turn
    turns: int = 1  # of the task
    source: str = "policy"  # who wrote it: "policy", "hint" (it saw one), "oracle", "reflection"
    sampled_prompt: list[int] | None = None

    def append(self, ids: Sequence[int], sampled: bool, logprobs: Sequence[float] | None = None) -> None:
        """Add tokens that were all sampled (with their log-probs) or all given."""
        self.tokens.extend(ids)
        self.loss_mask.extend([sampled] * len(ids))
        self.logprobs.extend(logprobs if logprobs is not None else [0.0] * len(ids))

    @property
    def sampled_tokens(self) -> int:
        """How many tokens the policy wrote."""
        return sum(self.loss_mask)

    @property
    def scored(self) -> bool:
        """Whether `logprobs` are the sampler's under this very prompt; false for oracle and hinted rows."""
        return self.source in ("policy", "hint") and self.sampled_prompt is None

    def messages(self, chat: Chat) -> list[tuple[str, bool]]:
        """(text, whether it ended with a stop token) of every assistant message. Nothing may be forced."""
        spoken: list[list[int]] = []
        before = False
        for token, sampled in zip(self.tokens, self.loss_mask):
            if sampled:
                spoken = spoken if before else [*spoken, []]
                spoken[-1].append(token)
            before = sampled
        ends = [ids[-1] in chat.stop_ids for ids in spoken]
        return [(chat.decode(ids[:-1] if end else ids), end) for ids, end in zip(spoken, ends)]

    def with_sampled_prompt(self) -> "Trajectory":
        """The same trajectory under the prompt it was sampled with (the hint kept)."""
        if self.sampled_prompt is None:
            return self
        prompt, old = self.sampled_prompt, self.prompt_length
        return replace(
            self,
            tokens=prompt + self.tokens[old:],
            loss_mask=[False] * len(prompt) + self.loss_mask[old:],
            logprobs=[0.0] * len(prompt) + self.logprobs[old:],
            prompt_length=len(prompt),
            sampled_prompt=None,
        )

    def with_trained(self, prefix: list[int]) -> "Trajectory":
        """The same trajectory with a forced `prefix` trained too, wherever one opens a message."""
        mask, n = list(self.loss_mask), len(prefix)
        for t in range(n, len(mask)):
            if mask[t] and not self.loss_mask[t - 1] and self.tokens[t - n : t] == prefix:
                mask[t - n : t] = [True] * n
        return replace(self, loss_mask=mask)


class Cache:
    """Keys and values of all rows in preallocated memory, [rows, heads, capacity, head_dim] per layer.

    The transformers attention layers call `update`; `at` says which rows and positions the next forward
    writes, and that it reads the first `width` positions. Nothing else of transformers' cache classes is
    used.
    """

    def __init__(self) -> None:
        self.layers: list[list[Tensor]] = []
        self.rows: Tensor | None = None
        self.positions: Tensor | None = None
        self.width = self.size = self.capacity = 0

    def at(self, rows: Tensor | None, positions: Tensor, width: int, size: int) -> None:
        """Prepare a forward: `positions` [rows, T] of the given rows (None: all `size` rows in order)."""
        self.rows, self.positions, self.width = rows, positions, width
        if size > self.size or width > self.capacity:
            self.size = max(size, self.size)
            self.capacity = max(self.capacity, -(-width // CAPACITY_STEP) * CAPACITY_STEP)
            self.layers = [[self._grown(old) for old in layer] for layer in self.layers]

    def _grown(self, old: Tensor) -> Tensor:
        new = old.new_zeros(self.size, old.shape[1], self.capacity, old.shape[3])
        new[: old.shape[0], :, : old.shape[2]] = old
        return new

    def update(self, key: Tensor, value: Tensor, layer: int, *_: object) -> tuple[Tensor, Tensor]:
        """Write [rows, heads, T, head_dim] and return everything the rows may attend to."""
        if layer == len(self.layers):
            shape = (self.size, key.shape[1], self.capacity, key.shape[3])
            self.layers.append([key.new_zeros(shape), value.new_zeros(shape)])
        rows = torch.arange(len(key), device=key.device) if self.rows is None else self.rows
        found = []
        for store, new in zip(self.layers[layer], (key, value), strict=True):
            store[rows[:, None], :, self.positions] = new.transpose(1, 2)
            part = store[: len(key)] if self.rows is None else store[rows]
            found.append(part[:, :, : self.width])
        return found[0], found[1]

    def copy_rows(self, source: int, targets: list[int], width: int) -> None:
        """Give `targets` the first `width` positions of row `source`."""
        for layer in self.layers:
            for store in layer:
                store[targets, :, :width] = store[source, :, :width].clone()

    def keep_rows(self, rows: list[int]) -> None:
        """Drop all rows but these; row i becomes the i-th of them."""
        self.layers = [[store[rows] for store in layer] for layer in self.layers]
        self.size = len(rows)


@dataclass
class _Row:
    """A live episode: its trajectory, the ids not yet in the cache, the message being written."""

    episode: Episode
    trajectory: Trajectory
    context: list[int]  # the ids the model sees: the trajectory under its sampled prompt
    pending: list[int]
    stream: int
    message: list[int] = field(default_factory=list)
    cached: int = 0


class Sampler:
    """Plays episodes with a policy.

    max_new_tokens: tokens of one assistant message; a longer one is cut, and its task fails. context: tokens
    of a whole episode (default: what the model was made for). slots: rows decoded at a time. seed: of the
    noise.
    """

    def __init__(
        self,
        policy: Policy,
        max_new_tokens: int = 128,
        context: int | None = None,
        slots: int = 128,
        seed: int = 0,
    ) -> None:
        self.policy, self.chat = policy, policy.chat
        self.max_new_tokens, self.slots, self.seed = max_new_tokens, slots, seed
        self.context = min(context or policy.context, policy.context)

    @torch.inference_mode()
    def rollout(
        self,
        episodes: Sequence[Episode],
        hints: Sequence[str] | None = None,
        temperature: float = 1.0,
        stream: int = 0,
        force_prefix: bool = False,
    ) -> list[Trajectory]:
        """Play the episodes to their end and return their trajectories in the same order.

        hints: a text per episode for the system prompt ("" for none). temperature 0 is greedy (log-probs are
        then those of temperature 1). stream: together with the seed and the episode's index it keys the
        noise; give every call of a run its own. force_prefix: write the canonical prefix of a call (unmasked)
        at the start of every message for which the turn's ground truth still has calls. Raises ValueError if
        a prompt leaves no room in the context.
        """
        queue = []
        for i, (episode, hint) in enumerate(zip(episodes, hints or [""] * len(episodes), strict=True)):
            queue.append(self._new_row(episode, hint, (stream << 32) + i, force_prefix))
        queue.reverse()
        rows: list[_Row | None] = []
        live: list[_Row] = []
        cache, done = Cache(), {}
        while queue or live:
            free = [i for i, row in enumerate(rows) if row is None]
            room = min(self.slots - len(live), len(queue))
            if room and (not live or room >= PREFILL_SHARE * self.slots or room == len(queue)):
                for _ in range(room):
                    row = queue.pop()
                    if free:
                        rows[free.pop(0)] = row
                    else:
                        rows.append(row)
            elif not queue and len(live) < COMPACT_SHARE * len(rows):
                cache.keep_rows([i for i, row in enumerate(rows) if row is not None])
                rows = list(live)
            live = [row for row in rows if row is not None]
            waiting = [i for i, row in enumerate(rows) if row is not None and len(row.pending) > 1]
            if len(waiting) == len(live) or len(waiting) >= PREFILL_SHARE * len(live):
                fed = self._prefill(cache, rows, waiting)
            else:
                fed = self._decode(cache, rows)
            for i in self._sample(rows, *fed, temperature):
                self._end_message(rows[i], force_prefix)
                if rows[i].episode.done:
                    done[rows[i].stream] = self._finish(rows[i])
                    rows[i] = None
            live = [row for row in rows if row is not None]
        return [done[(stream << 32) + i] for i in range(len(episodes))]

    def _new_row(self, episode: Episode, hint: str, stream: int, force_prefix: bool) -> _Row:
        messages, tools = episode.prompt()
        prompt = self.chat.prompt_ids(messages, tools, episode.format)
        seen = self.chat.prompt_ids(messages, tools, episode.format, hint) if hint else prompt
        if len(seen) >= self.context:
            raise ValueError(
                f"task {episode.task.id}: a prompt of {len(seen)} tokens leaves no room in {self.context}"
            )
        trajectory = _opened(episode, prompt)
        if hint:
            trajectory.source, trajectory.sampled_prompt = "hint", list(seen)
        row = _Row(episode, trajectory, list(seen), list(seen), stream)
        self._open_message(row, force_prefix)
        return row

    def _open_message(self, row: _Row, force_prefix: bool) -> None:
        row.message = []
        if not (force_prefix and row.episode.calls_left):
            return
        prefix = FORMATS[row.episode.format].prefix
        ids = self.chat.assistant_ids(prefix, row.episode.format)[:-1]
        if len(row.context) + len(ids) < self.context:
            row.message = list(ids)
            self._give(row, ids)

    def _give(self, row: _Row, ids: list[int]) -> None:
        row.trajectory.append(ids, sampled=False)
        row.context = row.context + ids
        row.pending = row.pending + ids

    def _prefill(self, cache: Cache, rows: list[_Row | None], waiting: list[int]) -> tuple[list[int], Tensor]:
        """Feed the pending ids of the waiting rows; rows that start with the same ids are fed once."""
        groups: dict[tuple, list[int]] = {}
        for i in waiting:
            fresh = rows[i].cached == 0
            groups.setdefault(tuple(rows[i].pending) if fresh else (-1, i), []).append(i)
        leaders = sorted((members[0] for members in groups.values()), key=lambda i: len(rows[i].pending))
        followers = {members[0]: members[1:] for members in groups.values()}
        order, hidden = [], []
        while leaders:
            count = 1
            while count < len(leaders) and (count + 1) * len(rows[leaders[count]].pending) <= PREFILL_TOKENS:
                count += 1
            part, leaders = leaders[:count], leaders[count:]
            hidden_part = self._forward(cache, rows, part)
            for leader, state in zip(part, hidden_part, strict=True):
                if followers[leader]:
                    cache.copy_rows(leader, followers[leader], rows[leader].cached)
                for i in [leader, *followers[leader]]:
                    rows[i].cached, rows[i].pending = rows[leader].cached, []
                    order.append(i)
                    hidden.append(state)
        return order, torch.stack(hidden)

    def _forward(self, cache: Cache, rows: list[_Row | None], part: list[int]) -> Tensor:
        """Feed the pending ids of the rows `part`; returns the hidden states [len(part), D] after them."""
        device = self.policy.device
        counts = torch.tensor([len(rows[i].pending) for i in part], device=device)
        starts = torch.tensor([rows[i].cached for i in part], device=device)
        widest = int(counts.max())
        ids = torch.zeros(len(part), widest, dtype=torch.long)
        for k, i in enumerate(part):
            ids[k, : len(rows[i].pending)] = torch.tensor(rows[i].pending)
            rows[i].cached += len(rows[i].pending)
        # Padding writes behind the row's end; real tokens overwrite it before anything attends to it.
        positions = starts[:, None] + torch.arange(widest, device=device)  # [rows, T]
        cache.at(torch.tensor(part, device=device), positions, int(positions.max()) + 1, len(rows))
        hidden = self._backbone(ids.to(device), positions, cache)  # [rows, T, D]
        return hidden[torch.arange(len(part), device=device), counts - 1]

    def _decode(self, cache: Cache, rows: list[_Row | None]) -> tuple[list[int], Tensor]:
        """Feed one token to every row that has exactly one pending.

        All rows of the cache pass through the model, so that nothing is copied; what a waiting or empty row
        writes stands behind its end and is overwritten.
        """
        device = self.policy.device
        ready = [i for i, row in enumerate(rows) if row is not None and len(row.pending) == 1]
        ids = torch.tensor(
            [[row.pending[0] if row is not None and len(row.pending) == 1 else 0] for row in rows]
        )
        positions = torch.tensor([[row.cached if row is not None else 0] for row in rows])
        cache.at(None, positions.to(device), int(positions.max()) + 1, len(rows))
        hidden = self._backbone(ids.to(device), positions.to(device), cache)[:, 0]  # [rows, D]
        for i in ready:
            rows[i].cached, rows[i].pending = rows[i].cached + 1, []
        return ready, hidden[torch.tensor(ready, device=device)]

    def _backbone(self, ids: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        columns = torch.arange(cache.width, device=ids.device)
        mask = columns[None, None, None, :] <= positions[:, None, :, None]  # [rows, 1, T, width]
        return self.policy.model.model(
            input_ids=ids, position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=True
        ).last_hidden_state

    def _sample(
        self, rows: list[_Row | None], fed: list[int], hidden: Tensor, temperature: float
    ) -> list[int]:
        """Sample a token for each row in `fed` from its hidden state; returns rows whose message ended."""
        logits = hidden.float() @ self.policy.head.float().T  # [N, V], never rounded to half
        logprobs = torch.log_softmax(logits / (temperature or 1.0), dim=-1)
        if temperature == 0:
            ids = logprobs.argmax(-1)
        else:
            streams = np.array([rows[i].stream for i in fed], dtype=np.uint64)
            places = np.array([len(rows[i].trajectory.tokens) for i in fed], dtype=np.uint64)
            noise = torch.from_numpy(uniform(self.seed, streams, places)).to(logprobs.device)
            cumulated = logprobs.double().exp().cumsum(-1)
            ids = torch.searchsorted(cumulated, noise[:, None] * cumulated[:, -1:], right=True)[:, 0]
            ids = ids.clamp(max=logprobs.shape[1] - 1)
        chosen = logprobs.gather(1, ids[:, None])[:, 0].tolist()
        ended = []
        for i, token, logprob in zip(fed, ids.tolist(), chosen, strict=True):
            row = rows[i]
            row.trajectory.append([token], sampled=True, logprobs=[logprob])
            row.context.append(token)
            row.pending.append(token)
            row.message.append(token)
            full = len(row.message) >= self.max_new_tokens or len(row.context) >= self.context
            if token in self.chat.stop_ids or full:
                ended.append(i)
        return ended

    def _end_message(self, row: _Row, force_prefix: bool) -> None:
        """Hand the finished message to the episode and queue what answers it."""
        stop_id = row.message[-1]
        stopped = stop_id in self.chat.stop_ids
        text = self.chat.decode(row.message[:-1] if stopped else row.message)
        row.trajectory.states.append(message_state(text, row.episode.format, overlong=not stopped))
        answer = row.episode.step(text, overlong=not stopped)
        if answer is None:
            return
        ids = self.chat.extend_ids(answer, stop_id)
        if len(row.context) + len(ids) + 1 >= self.context:
            row.episode.abort("the context is full")
            return
        self._give(row, ids)
        self._open_message(row, force_prefix)

    def _finish(self, row: _Row) -> Trajectory:
        row.trajectory.reward, row.trajectory.verdicts = row.episode.reward, list(row.episode.turn_verdicts)
        return row.trajectory


def _opened(episode: Episode, prompt: list[int]) -> Trajectory:
    task = episode.task
    trajectory = Trajectory(task.id, task.category, episode.format, [], [], [], len(prompt))
    trajectory.turns = len(task.turns)
    trajectory.append(prompt, sampled=False)
    return trajectory


def demonstration(chat: Chat, task: Task, format: str) -> Trajectory:
    """The ground truth of a task played turn by turn through a live episode, laid out as a rollout is.

    `loss_mask` is True on what the assistant writes; `logprobs` are 0, nobody sampled it.
    """
    episode = Episode(task, format)
    row = _opened(episode, chat.prompt_ids(*episode.prompt(), format))
    row.source = "oracle"
    for message in oracle(task, format):
        if message["role"] == "assistant":
            ids = chat.assistant_ids(message["content"], format)
            row.append(ids, sampled=True)
            row.states.append(message_state(message["content"], format))
            answer = episode.step(message["content"])
            if answer is not None:
                row.append(chat.extend_ids(answer, ids[-1]), sampled=False)
    row.reward, row.verdicts = episode.reward, list(episode.turn_verdicts)
    return row


def uniform(seed: int, streams: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Random numbers in [0, 1), one per (seed, stream, place): a counter-based generator (splitmix64), so
    that a sequence's noise depends on nothing but its own key."""

    def mix(x: np.ndarray) -> np.ndarray:
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    step = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        key = mix(np.full_like(streams, seed % 2**64) * step + step)
        key = mix((key ^ streams) * step + step)
        key = mix((key ^ places) * step + step)
    return (key >> np.uint64(11)).astype(np.float64) / 2.0**53
