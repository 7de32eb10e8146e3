"""Batched multi-turn rollouts: who is fed when.

Each row of the batch is one episode. Rows are never left-padded (position = length) and do not wait for the
end of each other's turns. Only tokens that are not in the cache yet pass through the model: one new token per
row in a decode step, the ids of an observation after a tool call, the prompt once per group. What a row
samples depends on its own noise stream and its own tokens alone.

The forward passes and the choice of tokens are in decode.py. Here is the loop around them, in four stages:
`_admit` gives free slots to waiting episodes, `_prefill` feeds rows with several ids pending and `_decode`
those with one, `_answer` hands a finished message to its episode. An example of four episodes on three slots,
two of them of one task (* is a stop token):

    stage      slot 0              slot 1              slot 2             waiting
    admit      episode 0, task A   episode 1, task A   episode 2, task B  episode 3
    prefill    prompt A -> token   copy of 0 -> token  prompt B -> token
    decode     token               token               token
    decode     token *             token               token *
    answer     8 ids pending       -                   the episode is over
    admit      8 ids pending       -                   episode 3, task C
    prefill    8 ids -> token      -                   prompt C -> token
    decode     token               token *             token
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nanotoolrl.calls import FORMATS, message_state
from nanotoolrl.decode import Decoder, Feed
from nanotoolrl.env import OUR_LIMITS, Episode
from nanotoolrl.gpu import distributed
from nanotoolrl.logprob import HAS_TRITON
from nanotoolrl.model import Policy
from nanotoolrl.trajectory import Trajectory

PREFILL_TOKENS = 8192  # most tokens in one prefill forward
LEAST_TEMPERATURE = 0.01  # logits over less leave the range of fp32; 0 is greedy
SLOTS = 128  # episodes sampled at a time
WAITING_SHARE = 0.2  # of live rows before a prefill is made, and of free slots before rows come in


@dataclass
class Row:
    """A live episode: its trajectory, and where the model is with it."""

    episode: Episode
    trajectory: Trajectory
    context: list[int]  # the ids the model sees: the trajectory under its sampled prompt
    pending: list[int]  # the last of them, not yet in the cache
    stream: int  # of its noise
    cached: int = 0  # how many of them are in the cache
    message: list[int] = field(default_factory=list)  # being written

    @property
    def key(self) -> tuple[int, int]:
        """(stream, place) of the noise of its next token."""
        return self.stream, len(self.trajectory.tokens)


class Sampler:
    """Plays episodes with a policy.

    max_new_tokens: tokens of one assistant message; a longer one is cut, and its task fails. context: tokens
    of a whole episode (default: what the model was made for). slots: rows decoded at a time. seed: of the
    noise.
    """

    def __init__(
        self,
        policy: Policy,
        max_new_tokens: int = OUR_LIMITS.max_new_tokens,
        context: int | None = None,
        slots: int = SLOTS,
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
    ) -> list[Trajectory]:
        """Play the episodes to their end and return their trajectories in the same order.

        hints: a text per episode for the system prompt ("" for none). temperature 0 is greedy (log-probs are
        then those of temperature 1). stream: together with the seed and the episode's index it keys the
        noise; give every call of a run its own. force_prefix: write the canonical prefix of a call (unmasked)
        at the start of every message for which the turn's ground truth still has calls.
        Under torchrun each process plays its share of the episodes and all get all trajectories.
        Raises ValueError if a prompt leaves no room in the context, or for a temperature that is none.
        """
        if temperature != 0 and not LEAST_TEMPERATURE <= temperature < math.inf:
            raise ValueError(
                f"the temperature is 0 (greedy) or at least {LEAST_TEMPERATURE}, not {temperature}"
            )
        hints = hints or [""] * len(episodes)
        if len(episodes) != len(hints):
            raise ValueError("there must be as many hints as episodes")
        mine = distributed.share(len(episodes))
        queue = [
            self._new_row(episodes[i], hints[i], (stream << 32) + i, force_prefix) for i in reversed(mine)
        ]
        live: dict[int, Row] = {}  # by slot
        done: dict[int, Trajectory] = {}  # by noise stream
        self.decoder.open(min(self.slots, max(1, len(queue))), self.context)
        while queue or live:
            self._admit(live, queue)
            waiting = [slot for slot, row in sorted(live.items()) if len(row.pending) > 1]
            if len(waiting) == len(live) or len(waiting) >= WAITING_SHARE * len(live):
                ended = self._prefill(live, waiting, temperature)
            else:
                ended = self._decode(live, temperature)
            for slot in ended:
                row = live[slot]
                self._answer(row, force_prefix)
                if row.episode.done:
                    row.trajectory.end(row.episode)
                    done[row.stream] = row.trajectory
                    del live[slot]
        return distributed.gathered([done[(stream << 32) + i] for i in mine])

    # ---- admit
    def _admit(self, live: dict[int, Row], queue: list[Row]) -> None:
        """Give free slots to waiting rows: all at the end, else some at a time, which share a prefill."""
        room = min(self.slots - len(live), len(queue))
        if room and (not live or room >= WAITING_SHARE * self.slots or room == len(queue)):
            free = (slot for slot in range(self.slots) if slot not in live)
            live |= {next(free): queue.pop() for _ in range(room)}

    def _new_row(self, episode: Episode, hint: str, stream: int, force_prefix: bool) -> Row:
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
        row = Row(episode, trajectory, list(seen), list(seen), stream)
        self._open_message(row, force_prefix)
        return row

    def _open_message(self, row: Row, force_prefix: bool) -> None:
        row.message = []
        if not (force_prefix and row.episode.calls_left):
            return
        prefix = FORMATS[row.episode.format].prefix
        ids = self.chat.assistant_ids(prefix, row.episode.format)[:-1]
        if len(row.context) + len(ids) < self.context:
            row.message = list(ids)
            self._give(row, ids)

    def _give(self, row: Row, ids: list[int]) -> None:
        row.trajectory.append(ids, sampled=False)
        row.context = row.context + ids
        row.pending = row.pending + ids

    # ---- feed
    def _prefill(self, live: dict[int, Row], waiting: list[int], temperature: float) -> list[int]:
        """Feed the pending ids of the waiting rows and sample a token for each.

        Rows that start with the same ids are fed once, and the cache is copied. Returns the slots whose
        message ended.
        """
        groups: dict[tuple, list[int]] = {}
        for slot in waiting:
            same = tuple(live[slot].pending) if live[slot].cached == 0 else (-1, slot)
            groups.setdefault(same, []).append(slot)
        leaders = {members[0]: members[1:] for members in groups.values()}
        fed: list[int] = []
        hidden: list[Tensor] = []  # [D] of each
        for batch in self._prefill_batches(live, list(leaders)):
            rows = [live[slot] for slot in batch]
            states = self.decoder.feed(batch, [row.cached for row in rows], [row.pending for row in rows])
            for leader, state in zip(batch, states, strict=True):
                width, followers = live[leader].cached + len(live[leader].pending), leaders[leader]
                if followers:
                    self.decoder.reserve(max(live) + 1, width)
                    self.decoder.cache.copy_row(leader, followers, width)
                for slot in (leader, *followers):
                    live[slot].cached, live[slot].pending = width, []
                    fed.append(slot)
                    hidden.append(state)
        streams, places = torch.tensor([live[slot].key for slot in fed]).T.to(self.policy.device)  # [B]
        ids, logprobs = self.decoder.choose(torch.stack(hidden), streams, places, temperature)  # [B]
        sampled = zip(fed, ids.tolist(), logprobs.tolist(), strict=True)
        return [slot for slot, token, logprob in sampled if self._take(live[slot], token, logprob)]

    def _prefill_batches(self, live: dict[int, Row], slots: list[int]) -> list[list[int]]:
        """Slots in batches of similar length: at most PREFILL_TOKENS padded ids each, at least one row."""
        batches: list[list[int]] = []
        for slot in sorted(slots, key=lambda slot: len(live[slot].pending)):
            width = len(live[slot].pending)
            if batches and (len(batches[-1]) + 1) * width <= PREFILL_TOKENS:
                batches[-1].append(slot)
            else:
                batches.append([slot])
        return batches

    def _decode(self, live: dict[int, Row], temperature: float) -> list[int]:
        """Feed one token to every row that has exactly one pending, for as many steps as the decoder makes at
        a time. Returns the slots whose message ended."""
        ready = [slot for slot, row in sorted(live.items()) if len(row.pending) == 1]
        feeds = []
        for slot in ready:
            row = live[slot]
            feeds.append(Feed(slot, row.pending[0], row.cached, self._left(row), *row.key))
        found = self.decoder.decode(feeds, temperature)  # ids and log-probs, each [steps][B]
        ended = []
        for column, slot in enumerate(ready):
            row = live[slot]
            for ids, logprobs in zip(*found, strict=True):
                row.cached, row.pending = row.cached + 1, []
                if self._take(row, ids[column], logprobs[column]):
                    ended.append(slot)
                    break
        return ended

    def _left(self, row: Row) -> int:
        """How many more tokens the row may sample in its message."""
        return min(self.max_new_tokens - len(row.message), self.context - len(row.context))

    def _take(self, row: Row, token: int, logprob: float) -> bool:
        """Append a sampled token; returns whether the message ended."""
        row.trajectory.append([token], sampled=True, logprobs=[logprob])
        row.context.append(token)
        row.pending.append(token)
        row.message.append(token)
        return token in self.chat.stop_ids or self._left(row) <= 0

    # ---- answer
    def _answer(self, row: Row, force_prefix: bool) -> None:
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
