"""Batched multi-turn rollouts.

Each row of the batch is one episode. Rows are never left-padded (position = length), never wait for each
other's turns, and only tokens that are not in the cache yet pass through the model: one new token per row in
a decode step, the ids of an observation after a tool call, the prompt once per group. What a row samples
depends on its own noise stream and its own tokens alone. Who is fed when is decided here; the forward passes
and the choice of tokens are in decode.py.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from nanotoolrl.calls import FORMATS, message_state
from nanotoolrl.decode import FREE, Decoder
from nanotoolrl.env import Episode
from nanotoolrl.gpu import distributed
from nanotoolrl.logprob import HAS_TRITON
from nanotoolrl.model import Policy
from nanotoolrl.trajectory import Trajectory

PREFILL_TOKENS = 8192  # most tokens in one prefill forward
LEAST_TEMPERATURE = 0.01  # logits over less leave the range of fp32; 0 is greedy
PREFILL_SHARE = 0.2  # rows that wait for a prefill before one is made; the others decode on


@dataclass
class _Row:
    """A live episode: its trajectory, the ids not yet in the cache, the message being written."""

    episode: Episode
    trajectory: Trajectory
    context: list[int]  # the ids the model sees: the trajectory under its sampled prompt
    pending: list[int]
    stream: int
    forced: Sequence[int]
    taken: int = 0  # of `forced`
    message: list[int] = field(default_factory=list)
    cached: int = 0

    @property
    def key(self) -> tuple[int, int]:
        """(stream, place) of the noise of its next token."""
        return self.stream, len(self.trajectory.tokens)

    def next_forced(self, count: int) -> list[int]:
        """The next `count` tokens it shall sample, filled up with FREE."""
        some = list(self.forced[self.taken : self.taken + count])
        return some + [FREE] * (count - len(some))


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
        self.max_new_tokens, self.slots = max_new_tokens, slots
        self.context = min(context or policy.context, policy.context)
        self.decoder = Decoder(policy, seed, fast=policy.device.type == "cuda" and HAS_TRITON)

    @torch.inference_mode()
    def rollout(
        self,
        episodes: Sequence[Episode],
        hints: Sequence[str] | None = None,
        temperature: float = 1.0,
        stream: int = 0,
        force_prefix: bool = False,
        forced: Sequence[Sequence[int]] | None = None,
    ) -> list[Trajectory]:
        """Play the episodes to their end and return their trajectories in the same order.

        hints: a text per episode for the system prompt ("" for none). temperature 0 is greedy (log-probs are
        then those of temperature 1). stream: together with the seed and the episode's index it keys the
        noise; give every call of a run its own. force_prefix: write the canonical prefix of a call (unmasked)
        at the start of every message for which the turn's ground truth still has calls. forced: per episode,
        the tokens it shall sample, as long as they last: a replay, whose log-probs are still the policy's.
        Under torchrun each process plays its share of the episodes and all get all trajectories.
        Raises ValueError if a prompt leaves no room in the context, or for a temperature that is none.
        """
        if temperature != 0 and not LEAST_TEMPERATURE <= temperature < math.inf:
            raise ValueError(
                f"the temperature is 0 (greedy) or at least {LEAST_TEMPERATURE}, not {temperature}"
            )
        hints, wanted = hints or [""] * len(episodes), forced or [()] * len(episodes)
        if not len(episodes) == len(hints) == len(wanted):
            raise ValueError("there must be as many hints and forced rows as episodes")
        mine = distributed.share(len(episodes))
        queue = [
            self._new_row(episodes[i], hints[i], (stream << 32) + i, force_prefix, wanted[i])
            for i in reversed(mine)
        ]
        rows: list[_Row | None] = []
        live: list[_Row] = []
        done = {}
        self.decoder.open(min(self.slots, max(1, len(queue))), self.context)
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
            live = [row for row in rows if row is not None]
            waiting = [i for i, row in enumerate(rows) if row is not None and len(row.pending) > 1]
            if len(waiting) == len(live) or len(waiting) >= PREFILL_SHARE * len(live):
                ended = self._prefill(rows, waiting, temperature, forced is not None)
            else:
                ended = self._decode(rows, temperature, forced is not None)
            for i in ended:
                self._end_message(rows[i], force_prefix)
                if rows[i].episode.done:
                    rows[i].trajectory.end(rows[i].episode)
                    done[rows[i].stream] = rows[i].trajectory
                    rows[i] = None
            live = [row for row in rows if row is not None]
        return distributed.gathered([done[(stream << 32) + i] for i in mine])

    def _new_row(
        self, episode: Episode, hint: str, stream: int, force_prefix: bool, forced: Sequence[int]
    ) -> _Row:
        messages, tools = episode.prompt()
        prompt = self.chat.prompt_ids(messages, tools, episode.format)
        seen = self.chat.prompt_ids(messages, tools, episode.format, hint) if hint else prompt
        if len(seen) >= self.context:
            raise ValueError(
                f"task {episode.task.id}: a prompt of {len(seen)} tokens leaves no room in {self.context}"
            )
        trajectory = Trajectory.begin(episode, prompt)
        if hint:
            trajectory.source, trajectory.sampled_prompt = "hint", list(seen)
        row = _Row(episode, trajectory, list(seen), list(seen), stream, forced)
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

    def _prefill(
        self, rows: list[_Row | None], waiting: list[int], temperature: float, forced: bool
    ) -> list[int]:
        """Feed the pending ids of the waiting rows and sample a token for each; returns the rows whose
        message ended. Rows that start with the same ids are fed once."""
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
            states = self.decoder.feed(part, [rows[i].cached for i in part], [rows[i].pending for i in part])
            for leader, state in zip(part, states, strict=True):
                width = rows[leader].cached + len(rows[leader].pending)
                if followers[leader]:
                    self.decoder.reserve(len(rows), width)
                    self.decoder.cache.copy_row(leader, followers[leader], width)
                for i in [leader, *followers[leader]]:
                    rows[i].cached, rows[i].pending = width, []
                    order.append(i)
                    hidden.append(state)
        keys = torch.tensor([rows[i].key for i in order]).T
        wanted = torch.tensor([rows[i].next_forced(1)[0] for i in order]) if forced else None
        keys, wanted = (x if x is None else x.to(self.policy.device) for x in (keys, wanted))
        ids, logprobs = self.decoder.choose(torch.stack(hidden), *keys, temperature, wanted)
        sampled = zip(order, ids.tolist(), logprobs.tolist(), strict=True)
        return [i for i, token, logprob in sampled if self._take(rows[i], token, logprob)]

    def _decode(self, rows: list[_Row | None], temperature: float, forced: bool) -> list[int]:
        """Feed one token to every row that has exactly one pending, and go on for as many steps as the
        decoder makes at a time; returns the rows whose message ended."""
        ready = [i for i, row in enumerate(rows) if row is not None and len(row.pending) == 1]
        states = [(i, rows[i].pending[0], rows[i].cached, self._left(rows[i]), *rows[i].key) for i in ready]
        wanted = [rows[i].next_forced(self.decoder.window) for i in ready] if forced else None
        found = self.decoder.decode(states, temperature, wanted)
        ended = []
        for column, i in enumerate(ready):
            for ids, logprobs in zip(*found, strict=True):
                rows[i].cached, rows[i].pending = rows[i].cached + 1, []
                if self._take(rows[i], ids[column], logprobs[column]):
                    ended.append(i)
                    break
        return ended

    def _left(self, row: _Row) -> int:
        """How many more tokens the row may sample in its message."""
        return min(self.max_new_tokens - len(row.message), self.context - len(row.context))

    def _take(self, row: _Row, token: int, logprob: float) -> bool:
        """Append a sampled token; returns whether the message ended."""
        row.trajectory.append([token], sampled=True, logprobs=[logprob])
        row.context.append(token)
        row.pending.append(token)
        row.message.append(token)
        row.taken += 1
        return token in self.chat.stop_ids or self._left(row) <= 0

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
