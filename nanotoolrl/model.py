"""A language model as policy: hidden states, log-probs, and how it is saved.

The model itself is in transformer.py, and loading.py makes a policy of what is on the disk.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from nanotoolrl import lora
from nanotoolrl.chat import Chat
from nanotoolrl.logprob import check_backend, token_logprob
from nanotoolrl.transformer import Architecture, Transformer


class Policy:
    """A language model of ours (`.model`), its tokenizer (`.tokenizer`) and its `Chat` (`.chat`).

    `.template` says where its chat template is from: "own", or what took its place. It takes over the weights
    of a transformers model. backend: of its log-probs, one of `BACKENDS`. Raises
    ValueError for a model of another family, or a backend that cannot run.
    """

    def __init__(
        self,
        foreign: "transformers.PreTrainedModel",
        tokenizer: Any,
        backend: str = "auto",
        thinking: bool = False,
    ) -> None:
        check_backend(backend)
        self.backend = backend
        self.config, self.generation_config = foreign.config, foreign.generation_config
        with torch.device("meta"):  # no memory: the weights are there already
            self.model = Transformer(Architecture.of(foreign.config))
        self.model.load_state_dict(foreign.state_dict(), assign=True)
        self.model.tie()
        self.tokenizer, self.chat = tokenizer, Chat(tokenizer, thinking)
        self.template = "own"
        self.known_ids = 1 + max(tokenizer.get_vocab().values())

    @property
    def device(self) -> torch.device:
        return self.model.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.lm_head.weight.dtype

    @property
    def head(self) -> Tensor:
        """Output embedding [V, D] of the ids that the tokenizer knows. An embedding may have more rows, up
        to a round number (271 in Qwen2.5); their ids, which stand for no text, are never chosen."""
        weight = self.model.lm_head.weight
        return weight if len(weight) <= self.known_ids else weight[: self.known_ids]

    @property
    def context(self) -> int:
        """The longest sequence the model was made for, in tokens."""
        return self.model.shape.context

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [B, V] of hidden states [B, D], in fp32 whatever their dtype."""
        if hidden.is_cuda and hidden.dtype != torch.float32:
            return torch.mm(hidden, self.head.T, out_dtype=torch.float32)
        return hidden.float() @ self.head.float().T

    def trained_hidden(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Hidden states [N, D] that predict the tokens of `ids` [B, T] where `mask` [B, T] is True.

        Rows are right-padded. Attention is causal, so what stands in the padding reaches no real position.
        Raises ValueError for a mask that is True on a first token: nothing predicts it.
        """
        if mask[:, :1].any():
            raise ValueError("the first token of a row has no log-probability: mask[:, 0] must be False")
        return self.model(ids)[:, :-1][mask[:, 1:]]

    def logprobs(
        self,
        ids: Tensor,
        mask: Tensor,
        temperature: float = 1.0,
        want_entropy: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(log-prob [N], entropy [N] or None) of the tokens of `ids` [B, T] where `mask` [B, T] is True.

        Only those N positions pass through the head; see `trained_hidden`.
        """
        hidden = self.trained_hidden(ids, mask)  # [N, D]
        return self.token_logprob(hidden, ids[mask], temperature, want_entropy)

    def token_logprob(
        self, hidden: Tensor, ids: Tensor, temperature: float = 1.0, want_entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """(log-prob [N] of `ids` [N], entropy [N] or None) after hidden states [N, D]."""
        return token_logprob(hidden, self.head, ids, temperature, want_entropy, self.backend)

    def save(self, directory: str | os.PathLike) -> None:
        """Write a standard checkpoint directory (config, safetensors weights, tokenizer, chat template). An
        adapter is merged into its weights, rounded to their dtype, and is exact, alone, in `adapter/`."""
        with quiet():
            with torch.device("meta"):
                foreign = transformers.AutoModelForCausalLM.from_config(self.config, dtype=self.dtype)
            foreign.load_state_dict(lora.merged(self.model), assign=True)
            foreign.tie_weights()
            foreign.generation_config = self.generation_config
            foreign.save_pretrained(directory)
            self.tokenizer.save_pretrained(directory)
            lora.save(self.model, Path(directory) / "adapter")


@contextmanager
def quiet() -> Iterator[None]:
    """While it is open transformers says errors only."""
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(level)


def pad(rows: Sequence[tuple[Sequence[int], Sequence[bool]]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(ids [B, T], mask [B, T]) of B rows of (ids, mask), right-padded with 0 and False to the longest."""
    width = max(len(ids) for ids, _ in rows)
    padded = torch.zeros(len(rows), width, dtype=torch.long)
    masks = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, (ids, mask) in enumerate(rows):
        padded[i, : len(ids)], masks[i, : len(ids)] = torch.tensor(ids), torch.tensor(mask)
    return padded.to(device), masks.to(device)


def by_length(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, each of at most `budget` padded tokens (at least one row)."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    start = 0
    while start < len(order):
        end = start + 1
        while end < len(order) and (end + 1 - start) * lengths[order[end]] <= budget:
            end += 1
        yield order[start:end]
        start = end
