"""Batched multi-turn rollouts: who is fed when.

Each row of the batch is one episode. Rows are never left-padded (position = length) and do not wait for the
end of each other's turns. Only tokens that are not in the cache yet pass through the model: one new token per
row in a decode step, the ids of an observation after a tool call, a prompt once for all rows that share it.
What a row samples depends on its own noise stream and its own tokens alone.

The forward passes and the choice of tokens are in decode.py. Here is the loop around them, in four stages:
`_admit` gives slots to waiting episodes, `_prefill` reads prompts and feeds rows with several ids pending,
`_decode` feeds those with one, `_answer` hands a finished message to its episode. Live rows have the first
slots: where one is over, the last takes its place. An example of four episodes on three slots, two of them of
one task (* is a stop token):

    stage      slot 0              slot 1              slot 2                 waiting
    admit      episode 0, task A   episode 1, task A   episode 2, task B      episode 3
    prefill    prompt A -> token   prompt A -> token   prompt B -> token
    decode     token               token *             token
    answer     -                   the episode is over -
    leave      episode 0           episode 2           -
    admit      episode 0           episode 2           episode 3, task C
    prefill    -                   -                   prompt C -> token
    decode     token *             token               token
    answer     8 ids pending       -                   -
    prefill    8 ids -> token      -                   -
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from nanotoolrl.calls import FORMATS, Call, message_state, render_calls
from nanotoolrl.decode import Decoder, Feed
from nanotoolrl.env import FULL, OUR_LIMITS, Episode
from nanotoolrl.gpu import distributed
from nanotoolrl.logprob import HAS_TRITON
from nanotoolrl.model import Policy, by_length
from nanotoolrl.places import Structure
from nanotoolrl.trajectory import Trajectory

PREFILL_TOKENS = 8192  # most tokens in one prefill forward, padding included
LEAST_TEMPERATURE = 0.01  # logits over less leave the range of fp32; 0 is greedy
SLOTS = 128  # episodes sampled at a time
WAITING_SHARE = 0.2  # of live rows before a prefill is made, and of free slots before rows come in


@dataclass
class Prompt:
    """A prompt that live rows share."""

    ids: list[int]
    place: int  # in the cache
    end: Tensor | None = None  # the hidden state [D] after it, once it is read
    rows: int = 0  # that share it


@dataclass
class Row:
    """A live episode: its trajectory, and where the model is with it."""

    episode: Episode
    trajectory: Trajectory
    seen: list[int]  # the prompt that the model sees
    stream: int  # of its noise
    prompt: Prompt = field(init=False)  # from its admission on, as is its slot
    slot: int = field(init=False)
    pending: list[int] = field(default_factory=list)  # ids not yet in the cache
    cached: int = 0  # how many ids after the prompt are in its slot
    message: list[int] = field(default_factory=list)  # being written
    pieces: list[list[int]] = field(default_factory=list)  # of it that are still to be given
    chooses: bool = True  # whether the next token is the model's to choose, where pieces are left

    @property
    def waits(self) -> bool:
        """Whether it is not for the next decode step."""
        return self.prompt.end is None or len(self.pending) != 1

    @property
    def length(self) -> int:
        """Tokens that the model sees of it."""
        return len(self.seen) + self.cached + len(self.pending)

    @property
    def key(self) -> tuple[int, int]:
        """(stream, place) of the noise of its next token."""
        return self.stream, len(self.trajectory.tokens)


class Sampler:
    """Plays episodes with a policy.

    max_new_tokens: tokens of one assistant message; a longer one is cut, and its task fails. context: tokens
    of a whole episode (default: what the model was made for). slots: rows decoded at a time. seed: of the
    noise. kept: (top_p, min_p) of what is sampled among, see `kept_logprobs`. copy_of: a policy whose weights
    this one takes over before every rollout, rounded to its own dtype.
    """

    def __init__(
        self,
        policy: Policy,
        max_new_tokens: int = OUR_LIMITS.max_new_tokens,
        context: int | None = None,
        slots: int = SLOTS,
        seed: int = 0,
        kept: tuple[float, float] = (1.0, 0.0),
        copy_of: Policy | None = None,
    ) -> None:
        self.policy, self.chat = policy, policy.chat
        self.max_new_tokens, self.slots, self.copy_of = max_new_tokens, slots, copy_of
        self.structure = cache(partial(Structure, policy.chat))  # of a format
        self.context = min(context or policy.context, policy.context)
        fast = policy.device.type == "cuda" and HAS_TRITON
        self.decoder = Decoder(policy, seed, fast, *kept)

    @torch.inference_mode()
    def rollout(
        self,
        episodes: Sequence[Episode],
        hints: Sequence[str] | None = None,
        temperature: float = 1.0,
        stream: int = 0,
        force_prefix: bool = False,
        force_skeleton: bool = False,
    ) -> list[Trajectory]:
        """Play the episodes to their end and return their trajectories in the same order.

        hints: a text per episode for the system prompt ("" for none). temperature 0 is greedy (log-probs are
        then those of temperature 1). stream: together with the seed and the episode's index it keys the
        noise; give every call of a run its own. force_prefix: write the canonical prefix of a call (unmasked)
        at the start of every message for which the turn's ground truth still has calls. force_skeleton: write
        (unmasked) all of the ground truth's messages but the values in their calls, which the model writes; a
        token that is no word ends a value.
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
        if self.copy_of:
            self.policy.model.load_state_dict(self.copy_of.model.state_dict())
        mine = distributed.share(len(episodes))
        forced = "skeleton" if force_skeleton else "prefix" if force_prefix else ""
        queue = [self._new_row(episodes[i], hints[i], (stream << 32) + i, forced) for i in reversed(mine)]
        live: list[Row] = []  # by slot
        prompts: dict[tuple, Prompt] = {}  # of live rows, by their ids
        done: dict[int, Trajectory] = {}  # by noise stream
        self.decoder.open(min(self.slots, max(1, len(queue))), self.context)
        while queue or live:
            self._admit(live, prompts, queue)
            waiting = [row for row in live if row.waits]
            if len(waiting) == len(live) or len(waiting) >= WAITING_SHARE * len(live):
                ended = self._prefill(waiting, temperature)
            else:
                ended = self._decode([row for row in live if not row.waits], temperature)
            for row in ended:
                self._answer(row, forced)
                if row.episode.done:
                    row.trajectory.end(row.episode)
                    done[row.stream] = row.trajectory
            if over := [row for row in ended if row.episode.done]:
                self._leave(live, prompts, over)
        return distributed.gathered([done[(stream << 32) + i] for i in mine])

    # ---- admit and leave
    def _admit(self, live: list[Row], prompts: dict[tuple, Prompt], queue: list[Row]) -> None:
        """Give free slots to waiting rows: all at the end, else some at a time, which share a prefill."""
        room = min(self.slots - len(live), len(queue))
        if not room or (live and room < WAITING_SHARE * self.slots and room < len(queue)):
            return
        for _ in range(room):
            row = queue.pop()
            key = tuple(row.seen)
            if key not in prompts:
                taken = {prompt.place for prompt in prompts.values()}
                free = next(place for place in itertools.count() if place not in taken)
                prompts[key] = Prompt(row.seen, free)
            row.prompt, row.slot = prompts[key], len(live)
            row.prompt.rows += 1
            live.append(row)

    def _leave(self, live: list[Row], prompts: dict[tuple, Prompt], over: list[Row]) -> None:
        """Free the slots of rows that are over, and the places of prompts that nobody shares any more."""
        for row in sorted(over, key=lambda row: row.slot, reverse=True):
            last = live.pop()
            if last is not row:
                live[row.slot] = last
            row.prompt.rows -= 1
            if not row.prompt.rows:
                del prompts[tuple(row.seen)]
        for slot, row in enumerate(live):
            if row.slot != slot and row.cached:
                self.decoder.cache.own.move(row.slot, slot, row.cached)
            row.slot = slot

    def _new_row(self, episode: Episode, hint: str, stream: int, forced: str) -> Row:
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
        row = Row(episode, trajectory, list(seen), stream)
        self._open_message(row, forced)
        return row

    def _open_message(self, row: Row, forced: str) -> None:
        row.message, row.pieces, row.chooses = [], [], True
        row.trajectory.open_message(row.episode)
        format, truth = row.episode.format, row.episode.truth
        if forced == "prefix" and row.episode.calls_left:
            row.pieces = [self.chat.assistant_ids(FORMATS[format].prefix, format)[:-1]]
        elif forced == "skeleton":
            if isinstance(truth, Call):
                ids = self.chat.assistant_ids(render_calls([truth], format), format)
                row.pieces = self.structure(format).skeleton(ids)
            else:
                *ids, stop = self.chat.assistant_ids(truth, format)
                row.pieces, row.chooses = [ids, [stop]], False  # one token is sampled, and dropped
        if row.pieces and not self._give_piece(row):
            row.pieces, row.chooses = [], True

    def _give_piece(self, row: Row) -> bool:
        """Write the next piece of a message; returns whether there was room for it."""
        ids = row.pieces[0]
        if row.length + len(ids) >= self.context or len(row.message) + len(ids) >= self.max_new_tokens:
            return False
        row.message += ids
        self._give(row, ids)
        del row.pieces[0]
        return True

    def _give(self, row: Row, ids: list[int]) -> None:
        row.trajectory.append(ids, sampled=False)
        row.pending = row.pending + ids

    # ---- feed
    def _prefill(self, waiting: list[Row], temperature: float) -> list[Row]:
        """Read the prompts of waiting rows, feed what they have pending, and sample a token for each.

        Returns the rows whose message ended.
        """
        unread = list({row.prompt.place: row.prompt for row in waiting if row.prompt.end is None}.values())
        for batch in by_length([len(prompt.ids) for prompt in unread], PREFILL_TOKENS):
            part = [unread[i] for i in batch]
            found = self.decoder.read([prompt.place for prompt in part], [prompt.ids for prompt in part])
            for prompt, end in zip(part, found, strict=True):
                prompt.end = end
        ends: dict[int, Any] = {row.slot: row.prompt.end for row in waiting}
        answered = [row for row in waiting if row.pending]
        for batch in by_length([len(row.pending) for row in answered], PREFILL_TOKENS):
            rows = [answered[i] for i in batch]
            found = self.decoder.extend([self._feed(row) for row in rows], [row.pending for row in rows])
            for row, end in zip(rows, found, strict=True):
                row.cached, row.pending = row.cached + len(row.pending), []
                ends[row.slot] = end
        hidden = torch.stack([ends[row.slot] for row in waiting])  # [B, D]
        streams, places = torch.tensor([row.key for row in waiting]).T.to(self.policy.device)  # [B]
        ids, logprobs = self.decoder.choose(hidden, streams, places, temperature)  # [B]
        sampled = zip(waiting, ids.tolist(), logprobs.tolist(), strict=True)
        return [row for row, token, logprob in sampled if self._take(row, token, logprob)]

    def _decode(self, ready: list[Row], temperature: float) -> list[Row]:
        """Feed the one pending token of each of these rows, for as many steps as the decoder makes at a time.
        Returns the rows whose message ended."""
        found = self.decoder.decode([self._feed(row) for row in ready], temperature)  # each [steps][B]
        ended = []
        for column, row in enumerate(ready):
            scripted = bool(row.pieces)  # what follows its first token may not be what it gets
            for ids, logprobs in zip(*found, strict=True):
                row.cached, row.pending = row.cached + 1, []
                if over := self._take(row, ids[column], logprobs[column]):
                    ended.append(row)
                if over or scripted:
                    break
        return ended

    def _feed(self, row: Row) -> Feed:
        at = row.slot, row.pending[0], row.cached, self._left(row)
        return Feed(*at, *row.key, row.prompt.place, len(row.seen))

    def _left(self, row: Row) -> int:
        """How many more tokens the row may sample in its message."""
        return min(self.max_new_tokens - len(row.message), self.context - row.length)

    def _take(self, row: Row, token: int, logprob: float) -> bool:
        """Append a sampled token, or the piece that stands there; returns whether the message ended."""
        if row.pieces:
            goes_on = self.structure(row.episode.format).goes_on(token, row.pieces[0])
            if not (row.chooses and goes_on):
                return not self._give_piece(row) or not row.pieces
        row.trajectory.append([token], sampled=True, logprobs=[logprob])
        row.pending.append(token)
        row.message.append(token)
        return token in self.chat.stop_ids or self._left(row) <= 0

    # ---- answer
    def _answer(self, row: Row, forced: str) -> None:
        """Hand the finished message to the episode and queue what answers it."""
        stop_id = row.message[-1]
        stopped = stop_id in self.chat.stop_ids
        text = self.chat.decode(row.message[:-1] if stopped else row.message)
        row.trajectory.states.append(message_state(text, row.episode.format, overlong=not stopped))
        answer = row.episode.step(text, overlong=not stopped)
        if answer is None:
            return
        ids = self.chat.extend_ids(answer, stop_id)
        if row.length + len(ids) + 1 >= self.context:
            row.episode.abort(FULL)
            return
        self._give(row, ids)
        self._open_message(row, forced)
