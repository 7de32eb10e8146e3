"""Trajectories as a trainer has them that keeps texts in place of tokens: what one careless decode costs."""

import itertools
from dataclasses import replace

from nanotoolrl.chat import Chat
from nanotoolrl.trajectory import Trajectory


def recorded(row: Trajectory, chat: Chat, how: str) -> Trajectory:
    """The trajectory as a trainer would have it that keeps texts in place of tokens; itself if all agrees.

    how "text": every sampled message is decoded without special tokens, encoded anew, and gets the layout's
    stop, as in the published code of Hao et al. 2026. Its parts alone: "encode" (decoded and encoded, special
    tokens and the stop stay), "stop" (messages without that stop get it), "vanish" (special tokens that were
    sampled within a message are dropped). "exact": nothing changes. Log-probs of a row that changed are 0:
    nobody sampled these tokens.
    """
    if how == "exact":
        return row
    special = chat.tokenizer.all_special_ids
    tokens, mask, rewritten = list(row.tokens[: row.prompt_length]), [False] * row.prompt_length, 0
    stop_written = False  # though the message had another end, or none
    for sampled, part in itertools.groupby(
        range(row.prompt_length, len(row.tokens)), lambda t: row.loss_mask[t]
    ):
        ids = [row.tokens[t] for t in part]
        if sampled:
            written = _rewritten(ids, chat, how, special)
            stop_written = written[-1:] == [chat.end_id] != ids[-1:]
            rewritten += written != ids
            ids = written
        elif stop_written and ids[0] == chat.end_id:
            ids = ids[1:]  # what closed the message for the sampler
        tokens += ids
        mask += [sampled] * len(ids)
    if not rewritten:
        return row
    return replace(row, tokens=tokens, loss_mask=mask, logprobs=[0.0] * len(tokens), rewritten=rewritten)


def _rewritten(ids: list[int], chat: Chat, how: str, special: list[int]) -> list[int]:
    """The ids of one message, recorded as `how` says."""
    stop = ids[-1:] if ids[-1] in chat.stop_ids else []
    body = ids[: len(ids) - len(stop)]
    if how in ("text", "vanish"):
        body = [token for token in body if token not in special]
    if how in ("text", "encode"):
        body = chat.encode(chat.decode(body))
    return body + ([chat.end_id] if how in ("text", "stop") else stop)
