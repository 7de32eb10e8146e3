"""`Trajectory`: one episode as tokens, which all parts exchange."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from nanotoolrl.calls import message_state
from nanotoolrl.chat import Chat
from nanotoolrl.env import CAPPED, CUT, FULL, Episode, Task, Verdict, oracle


@dataclass
class Trajectory:
    """One episode as tokens. `tokens`, `loss_mask` and `logprobs` are equally long and append-only.

    In a rollout loss_mask is True exactly on sampled tokens, stop tokens included, in every turn; logprobs
    holds their log-probability (nats, under the policy, the temperature and the prompt they were sampled
    with) and 0.0 elsewhere. `tokens` as rolled out never holds a hint: the prompt it was sampled under is
    kept in `sampled_prompt`. A demonstration has its mask on what the assistant says; schemes may narrow it.

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
    due: list[bool] = field(default_factory=list)  # of each: whether a call was due when it began
    turn_of: list[int] = field(default_factory=list)  # of each: the turn that it belongs to
    verdicts: list[Verdict] = field(default_factory=list)  # one per finished turn
    turns: int = 1  # of the task
    source: str = "policy"  # who wrote it: "policy", "hint" (it saw one), "oracle", "reflection"
    sampled_prompt: list[int] | None = None
    rewritten: int = 0  # messages whose recorded tokens are not those that were sampled (`recorded`)

    @classmethod
    def begin(cls, episode: Episode, prompt: list[int]) -> "Trajectory":
        """That of an episode of which nothing but the prompt has been seen."""
        task = episode.task
        row = cls(task.id, task.category, episode.format, [], [], [], len(prompt), turns=len(task.turns))
        row.append(prompt, sampled=False)
        return row

    def open_message(self, episode: Episode) -> None:
        """Note where the episode is when an assistant message begins."""
        self.due.append(episode.calls_left > 0)
        self.turn_of.append(episode.turn)

    def end(self, episode: Episode) -> None:
        """Note how the episode went."""
        self.reward, self.verdicts = episode.reward, list(episode.turn_verdicts)

    def append(self, ids: Sequence[int], sampled: bool, logprobs: Sequence[float] | None = None) -> None:
        """Add tokens that were all sampled (with their log-probs) or all given."""
        self.tokens.extend(ids)
        self.loss_mask.extend([sampled] * len(ids))
        self.logprobs.extend(logprobs if logprobs is not None else [0.0] * len(ids))

    @property
    def sampled_tokens(self) -> int:
        """How many tokens are in the mask: of a rollout, those that the policy wrote."""
        return sum(self.loss_mask)

    @property
    def cut(self) -> bool:
        """Whether a limit ended the episode: of tokens, of messages or of the context."""
        return bool(self.verdicts) and self.verdicts[-1].reason in (CUT, CAPPED, FULL)

    @property
    def scored(self) -> bool:
        """Whether `logprobs` are the sampler's of these tokens under this very prompt; false for oracle,
        hinted and rewritten rows."""
        own = self.source in ("policy", "hint")
        return own and self.sampled_prompt is None and not self.rewritten

    def spoken_ids(self) -> list[list[int]]:
        """The sampled ids of every assistant message. Nothing may be forced."""
        found: list[list[int]] = []
        before = False
        for token, sampled in zip(self.tokens, self.loss_mask):
            if sampled:
                found = found if before else [*found, []]
                found[-1].append(token)
            before = sampled
        return found

    def spoken(self) -> list[tuple[list[int], bool]]:
        """(sampled ids, whether a call was due) of every assistant message; due, where nobody noted it."""
        return [(ids, i >= len(self.due) or self.due[i]) for i, ids in enumerate(self.spoken_ids())]

    def messages(self, chat: Chat) -> list[tuple[str, bool]]:
        """(text, whether it ended with a stop token) of every assistant message. Nothing may be forced."""
        texts = []
        for ids in self.spoken_ids():
            stopped = ids[-1] in chat.stop_ids
            texts.append((chat.decode(ids[:-1] if stopped else ids), stopped))
        return texts

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
        mask = list(self.loss_mask)
        n = len(prefix)
        for t in range(n, len(mask)):
            if mask[t] and not self.loss_mask[t - 1] and self.tokens[t - n : t] == prefix:
                mask[t - n : t] = [True] * n
        return replace(self, loss_mask=mask)


def demonstration(chat: Chat, task: Task, format: str) -> Trajectory:
    """The ground truth of a task played turn by turn through a live episode, laid out as a rollout is.

    `loss_mask` is True on what the assistant writes; `logprobs` are 0, nobody sampled it.
    """
    episode = Episode(task, format)
    row = Trajectory.begin(episode, chat.prompt_ids(*episode.prompt(), format))
    row.source = "oracle"
    for message in oracle(task, format):
        if message["role"] == "assistant":
            ids = chat.assistant_ids(message["content"], format)
            row.open_message(episode)
            row.append(ids, sampled=True)
            row.states.append(message_state(message["content"], format))
            answer = episode.step(message["content"])
            if answer is not None:
                row.append(chat.extend_ids(answer, ids[-1]), sampled=False)
    row.end(episode)
    return row
