"""Decode steps and tool rollouts, beside transformers."""

import inspect
from dataclasses import dataclass

import torch
import transformers
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
)

from bench.measure import OURS, Arm, Row, bytes_per_second, timed
from bench.models import seeded_policy, transformers_model
from bench.replay import ReplayDecoder, ReplayProcessor, ReplaySampler
from bench.steps import grouped
from nanotoolrl.decode import Feed
from nanotoolrl.env import Episode, Task
from nanotoolrl.loading import BUILT_IN, load
from nanotoolrl.model import Policy
from nanotoolrl.sampler import Sampler
from nanotoolrl.trajectory import Trajectory
from nanotoolrl.world.tasks import load_tasks


@dataclass
class Workload:
    """Rollouts that every arm replays, token by token: the built-in model's, sampled with a fixed seed."""

    name: str
    tasks: list[Task]
    hints: list[str]
    rows: list[Trajectory]

    @property
    def tokens(self) -> int:
        return sum(row.sampled_tokens for row in self.rows)


def workload(name: str, tasks: list[Task], group: int, prompt: int) -> Workload:
    """`group` rollouts of each task; a text in the system prompt fills prompts up to `prompt` tokens."""
    policy = load(BUILT_IN, device="cpu")
    tasks = grouped(tasks, group)
    hints = [_filler(policy, task, prompt) for task in tasks]
    rows = Sampler(policy, seed=0).rollout([Episode(task) for task in tasks], hints)
    return Workload(name, tasks, hints, rows)


def _filler(policy: Policy, task: Task, prompt: int) -> str:
    messages, tools = Episode(task).prompt()
    text = ""
    while len(policy.chat.prompt_ids(messages, tools, "hermes", text)) < prompt:
        text += " Be brief."
    return text.strip()


def sampler(device: torch.device, repeats: int, small: bool) -> list[Row]:
    """Multi-turn tool rollouts (rows 2 and 6)."""
    train, policy = load_tasks("train"), seeded_policy(device, small)
    short = [task for task in train if len(task.turns) <= 3]
    long = [task for task in train if len(task.turns) >= 3]
    if device.type == "cuda":
        loads = [workload("32 x 8 tool rollouts, 3 to 4 user turns, prompt 512", long[:32], 8, 512)]
    elif small:
        loads = [workload("2 x 2 tool rollouts", short[:2], 2, 0)]
    else:
        loads = [
            workload("(a) 8 x 8 tool rollouts, 1 to 3 user turns, prompt 200", short[:8], 8, 200),
            workload("(b) 8 x 8 tool rollouts, 3 to 4 user turns, prompt 400", long[:8], 8, 400),
        ]
    shapes = [(1, 512), (256, 1024)] if device.type == "cuda" else [(1, 512), (64, 512)]
    rows = [decode_row(policy, *shape, repeats) for shape in ([(2, 16)] if small else shapes)]
    return rows + [sampler_row(policy, load, repeats) for load in loads]


@torch.inference_mode()
def decode_row(policy: Policy, B: int, length: int, repeats: int, steps: int = 64) -> Row:
    """Decode steps alone, for B rows that start with `length` tokens of noise (row 5)."""
    device, model = policy.device, transformers_model(policy)
    generator = torch.Generator().manual_seed(0)
    top = min(policy.chat.stop_ids)  # no row stops
    ids = torch.randint(top, (B, length + steps), generator=generator)
    decoder = ReplayDecoder(policy, ids, fast=device.type == "cuda")
    decoder.open(B, length + steps)
    theirs = DynamicCache()
    # Its name changed in transformers 5.24.
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    for part in torch.arange(B).split(16):
        decoder.extend([Feed(slot) for slot in part.tolist()], ids[part, : length - 1].tolist())
    model.model(ids[:, : length - 1].to(device), **{name: theirs})
    logprobs: dict[str, list] = {}

    def ours() -> None:
        logprobs[OURS] = []
        for t in range(length, length + steps, (decoder.graphs.window if decoder.graphs else 1)):
            rows = [Feed(i, int(ids[i, t - 1]), t - 1, length + steps - t, i, t) for i in range(B)]
            logprobs[OURS] += decoder.decode(rows, 1.0)[1]

    def plain() -> None:
        logprobs[eager], on_device = [], ids.to(device)
        for t in range(length, length + steps):
            logits = model(on_device[:, t - 1, None], **{name: theirs}).logits[:, 0].float()
            logp = logits.log_softmax(-1)
            logp.exp().multinomial(1).tolist()  # a sampler must see the token
            logprobs[eager].append(logp.gather(1, on_device[:, t, None])[:, 0].tolist())
        theirs.crop(-steps)

    eager = f"transformers {transformers.__version__} forward, eager"
    row = Row(f"decode, {B} row{'s' * (B > 1)} at length {length}", [Arm(OURS), Arm(eager)])
    timed(row, {OURS: ours, eager: plain}, repeats, device)
    mask = [False] * length + [True] * steps
    for arm in row.arms:
        arm.work = B * steps
        columns = [[0.0] * length + [*column] for column in zip(*logprobs[arm.name])]
        some = [Trajectory("", "", "", ids[i].tolist(), mask, x, length) for i, x in enumerate(columns[:8])]
        arm.error = _exact_error(policy, some)
        arm.tolerance = 1e-4 if device.type == "cpu" else 0.5  # bf16
    read = [*model.parameters(), *(x for layer in theirs.layers for x in (layer.keys, layer.values))]
    row.limit = steps * sum(x.numel() * x.element_size() for x in read) / bytes_per_second(device)
    return row


def sampler_row(policy: Policy, load: Workload, repeats: int) -> Row:
    player, device = ReplaySampler(policy, load.rows), policy.device
    found: dict[str, list] = {}

    def ours() -> None:
        episodes = [Episode(task) for task in load.tasks]
        found[OURS] = player.rollout(episodes, load.hints)

    def generate() -> None:
        found["generate"] = generate_rollout(policy, load)

    version = transformers.__version__
    row = Row(load.name, [Arm(OURS, note="with log-probs"), Arm(f"transformers {version} generate")])
    row.arms[1].note = "as TRL calls it: all rows prefilled anew for every message; no log-probs"
    for arm in row.arms:
        arm.work = load.tokens
    timed(row, {row.arms[0].name: ours, row.arms[1].name: generate}, repeats, device)
    replayed = [row.with_sampled_prompt().tokens for row in found[OURS]]
    same = replayed == found["generate"] == [row.with_sampled_prompt().tokens for row in load.rows]
    row.arms[0].error, row.arms[0].tolerance = _exact_error(policy, found[OURS][:8]), 1e-4
    if device.type == "cuda":
        row.arms[0].tolerance = None  # bf16: `bench step --parity` says how far sampler and trainer are apart
    if not same:
        row.arms[0].error, row.arms[0].tolerance = float("nan"), 0.0
    return row


@torch.no_grad()
def _exact_error(policy: Policy, rows: list[Trajectory]) -> float:
    """Largest difference of the rows' log-probs from those of one full forward in fp64."""
    exact = transformers_model(policy).double()
    worst = 0.0
    for row in (row.with_sampled_prompt() for row in rows):
        logits = exact(torch.tensor([row.tokens], device=policy.device)).logits[0]
        at = torch.tensor(row.loss_mask).nonzero()[:, 0]
        ids = torch.tensor(row.tokens)[at].to(policy.device)
        logp = logits[at - 1].log_softmax(-1).gather(1, ids[:, None])[:, 0]
        worst = max(worst, (logp.cpu() - torch.tensor(row.logprobs)[at]).abs().max().item())
    return worst


@torch.inference_mode()
def generate_rollout(policy: Policy, load: Workload) -> list[list[int]]:
    """The rollouts with transformers' generate, the way TRL calls it: in every turn all rows that still play
    are left-padded, prefilled from their first token, and wait for the longest message. Returns all ids."""
    chat, device, model = policy.chat, policy.device, transformers_model(policy)
    settings = GenerationConfig(
        max_new_tokens=128,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=chat.stop_ids,
        pad_token_id=policy.tokenizer.pad_token_id,
    )
    episodes = [Episode(task) for task in load.tasks]
    ids = [
        chat.prompt_ids(*episode.prompt(), "hermes", hint)
        for episode, hint in zip(episodes, load.hints, strict=True)
    ]
    scripts = [row.spoken_ids() for row in load.rows]
    live, turn = list(range(len(ids))), 0
    while live:
        wanted = [scripts[i][turn] for i in live]
        width = max(len(ids[i]) for i in live)
        padding = [width - len(ids[i]) for i in live]
        batch = torch.tensor([[settings.pad_token_id] * n + ids[i] for n, i in zip(padding, live)])
        mask = torch.tensor([[0] * n + [1] * (width - n) for n in padding])
        replay = ReplayProcessor(wanted, width, chat.end_id)
        model.generate(
            input_ids=batch.to(device),
            attention_mask=mask.to(device),
            generation_config=settings,
            logits_processor=LogitsProcessorList([replay]),
        )
        still = []
        for i, message in zip(live, wanted, strict=True):
            ids[i] = ids[i] + message
            stopped = message[-1] in chat.stop_ids
            answer = episodes[i].step(chat.decode(message[:-1] if stopped else message), overlong=not stopped)
            if answer is not None:
                ids[i] = ids[i] + chat.extend_ids(answer, message[-1])
                still.append(i)
        live, turn = still, turn + 1
    return ids
