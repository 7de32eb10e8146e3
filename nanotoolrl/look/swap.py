"""Two models that write one message: one its structure, the other the words. Which of them broke?

Of a start and a broken model there are four pairs. Where structure of the broken model ruins success and its
words do not, the structure is what broke; and the other way round.
"""

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from nanotoolrl.calls import FORMATS
from nanotoolrl.decode import Decoder, Feed
from nanotoolrl.model import Policy
from nanotoolrl.noise import uniform
from nanotoolrl.places import Structure
from nanotoolrl.sampler import Sampler


def structural(policy: Policy, format: str) -> Tensor:
    """[V], True on tokens that make structure wherever they stand: control tokens, tokens without a word
    character, and the words of the skeleton (a parameter called `name`, say, counts as such)."""
    structure, skeleton = Structure(policy.chat, format), FORMATS[format].words
    ids = range(len(policy.head))
    found = [not structure.is_word(token) or structure.text_of(token) in skeleton for token in ids]
    return torch.tensor(found, device=policy.device)


class SwapDecoder:
    """Stands where a `Decoder` does. At every place the first model chooses; if its token is structure it
    stands, else the second one chooses among all tokens that are none. Greedily or with the same noise."""

    graphs = None

    def __init__(self, first: Decoder, second: Decoder, structure: Tensor) -> None:
        self.pair, self.structure = (first, second), structure
        own = SimpleNamespace(move=self._move)
        self.cache = SimpleNamespace(own=own)

    def _move(self, *where: int) -> None:
        for one in self.pair:
            one.cache.own.move(*where)

    def open(self, slots: int, context: int) -> None:
        for decoder in self.pair:
            decoder.open(slots, context)

    def read(self, places: Sequence[int], prompts: Sequence[Sequence[int]]) -> Tensor:
        return torch.cat([one.read(places, prompts) for one in self.pair], 1)  # [prompts, D + D]

    def extend(self, rows: Sequence[Feed], pending: Sequence[Sequence[int]]) -> Tensor:
        return torch.cat([one.extend(rows, pending) for one in self.pair], 1)  # [rows, D + D]

    def choose(
        self, hidden: Tensor, streams: Tensor, places: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """(ids [B], log-probs [B]) from hidden states [B, D + D] of both models, side by side."""
        first, second = self.pair
        ours, theirs = hidden.split([one.policy.head.shape[1] for one in self.pair], 1)
        noise = uniform(first.seed, streams, places) if temperature else None
        heat = temperature or 1.0
        ids, logprobs = first.draw(first.policy.logits(ours), noise, heat)
        words = second.policy.logits(theirs).masked_fill(self.structure, float("-inf"))
        other_ids, other_logprobs = second.draw(words, noise, heat)
        stands = self.structure[ids]
        return torch.where(stands, ids, other_ids), torch.where(stands, logprobs, other_logprobs)

    def decode(self, rows: Sequence[Feed], temperature: float) -> tuple[list[list[int]], list[list[float]]]:
        for one in self.pair:
            one.reserve(one.cache.own, max(row.slot for row in rows) + 1, max(row.length for row in rows) + 1)
        state = torch.tensor(rows, device=self.structure.device).T  # [8, B]: a row for each field of `Feed`
        hidden = torch.cat([one.feed(state) for one in self.pair], 1)  # [B, D + D]
        ids, logprobs = self.choose(hidden, state[4], state[5], temperature)
        return [ids.tolist()], [logprobs.tolist()]


def swapped(like: Sampler, structure: Policy, words: Policy, format: str) -> Sampler:
    """A sampler with the limits of another one, for which one policy writes structure and one the words.

    Raises ValueError for models whose tokenizers differ.
    """
    if structure.tokenizer.get_vocab() != words.tokenizer.get_vocab():
        raise ValueError("two models can only write one message if they have the same tokens")
    slots = max(1, like.slots // 2)  # each has two caches
    sampler = Sampler(structure, like.max_new_tokens, min(like.context, words.context), slots)
    pair = [Decoder(policy, like.decoder.seed, fast=False) for policy in (structure, words)]
    sampler.decoder = SwapDecoder(*pair, structural(structure, format))
    return sampler
