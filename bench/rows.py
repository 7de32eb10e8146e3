"""Every performance row, beside its peers, in one run: `python -m nanotoolrl.bench kernel|sampler|step`.
`parts` shows where a decode step's time goes, `growth` how a step's time grows, `before` what a revision took
for the same runs. `busy` times a whole run beside other work. `memory` is arithmetic: which settings fit real
models into which GPUs.

Each builds its workload, checks every result before its speed is looked at, runs the peers that are installed
in turns, and prints medians with their spread, peak memory, error, and the share of a limit that is measured
in the same run. It exits with 1 if a result is wrong, however fast. `--json FILE` writes it down; the tables
of docs/speed.md are made from such files by `markdown`.

Peers: TRL, Liger and cut-cross-entropy if installed, and what one would write without them.
"""

import argparse
import csv
import ctypes
import functools
import gc
import importlib.metadata
import importlib.util
import inspect
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LogitsProcessorList,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from bench.parts import Parts, decode_parts, parts_table
from bench.replay import ReplayDecoder, ReplayProcessor, ReplaySampler
from nanotoolrl.cli import MOST_THREADS, available_cores, command, cpu_threads, number
from nanotoolrl.commandline import parse
from nanotoolrl.config import Config
from nanotoolrl.decode import Feed
from nanotoolrl.env import Episode, Task
from nanotoolrl.files import check_writable, finite
from nanotoolrl.gpu.memory import plan
from nanotoolrl.loading import BUILT_IN, DTYPES, ModelError, load
from nanotoolrl.logprob import token_logprob
from nanotoolrl.model import Policy, pad
from nanotoolrl.run import Run, group_advantages, rollout
from nanotoolrl.sampler import Sampler
from nanotoolrl.trajectory import Trajectory
from nanotoolrl.transformer import Architecture, Transformer
from nanotoolrl.updates import policy_update
from nanotoolrl.world.tasks import load_tasks

MODEL_VOCABULARY = 151_936  # of Qwen2.5
SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SHAPE += ("num_key_value_heads", "head_dim", "vocab_size")
REAL_MODELS = {  # architecture, SHAPE
    "Qwen2.5-0.5B": (Qwen2Config, 896, 4864, 24, 14, 2, 64, MODEL_VOCABULARY),
    "Qwen2.5-1.5B": (Qwen2Config, 1536, 8960, 28, 12, 2, 128, MODEL_VOCABULARY),
    "Qwen3-0.6B": (Qwen3Config, 1024, 3072, 28, 16, 8, 128, MODEL_VOCABULARY),
    "Qwen3-1.7B": (Qwen3Config, 2048, 6144, 28, 16, 8, 128, MODEL_VOCABULARY),
    "Llama-3.2-1B": (LlamaConfig, 2048, 8192, 16, 32, 8, 64, 128_256),
}
OURS = "nanotoolrl"
LIBGOMP_SPINS = "300000"  # what libgomp takes where no variable says anything
ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Arm:
    """One implementation of a row, and what was measured of it."""

    name: str
    seconds: list[float] = field(default_factory=list)
    work: float = 0.0  # tokens per run; 0: seconds say it all
    peak_mb: float | None = None  # beyond inputs and returned gradients
    error: float | None = None
    tolerance: float | None = None
    gradient_error: float | None = None  # as a share of the largest gradient
    gradient_tolerance: float | None = None
    note: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def wrong(self) -> bool:
        """Whether an error is known and not within its tolerance (nan is not)."""
        pairs = ((self.error, self.tolerance), (self.gradient_error, self.gradient_tolerance))
        return any(None not in pair and not pair[0] <= pair[1] for pair in pairs)


@dataclass
class Row:
    """One line of work: its arms, ours first, and the limit in seconds that this machine allows."""

    name: str
    arms: list[Arm]
    limit: float | None = None
    error_of: str = "log-prob, nats"
    missing: list[str] = field(default_factory=list)  # how to install the peers that are not there
    length: float | None = None  # mean tokens of the rollouts
    axis: str = ""  # what grows from row to row, and how much of it is here
    at: float = 0.0


# ----------------------------------------------------------------------------------------------- measurements
def timed(
    row: Row,
    runs: dict[str, Callable[[], object]],
    repeats: int,
    device: torch.device,
    warm_up: bool = True,
) -> None:
    """Time every arm in turns, after one warm-up each. A run that returns a float has timed itself."""
    arms = {arm.name: arm for arm in row.arms}
    for turn in tqdm(range(1 - warm_up, repeats + 1), row.name, unit="turn", leave=False, disable=None):
        for name, run in runs.items():
            gc.collect()
            _synchronize(device)
            started = time.perf_counter()
            own = run()
            _synchronize(device)
            if turn:
                seconds = own if isinstance(own, float) else time.perf_counter() - started
                arms[name].seconds.append(seconds)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


@contextmanager
def peak_memory(arm: Arm, device: torch.device, returned: int) -> Iterator[None]:
    """Measure the memory a block takes on top of what there is, less `returned` bytes that it gives back."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # memory that was freed but kept would hide what the block takes
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield
        arm.peak_mb = (torch.cuda.max_memory_allocated() - before - returned) / 2**20
        return
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not os.access(clear, os.W_OK):  # not Linux
        yield
        return

    def read(key: str) -> int:
        return next(
            int(line.split()[1])
            for line in status.read_text(encoding="utf-8").splitlines()
            if line.startswith(key)
        )

    clear.write_text("5", encoding="utf-8")  # the high-water mark starts anew
    before = read("VmRSS")
    yield
    arm.peak_mb = (read("VmHWM") - before) / 2**10 - returned / 2**20


def installed(module: str, package: str, missing: list[str]) -> str | None:
    """Version of a package, or None, with how to get it noted."""
    if importlib.util.find_spec(module):
        return importlib.metadata.version(package)
    missing.append(f"{package}: not installed (pip install {package})")
    return None


# ----------------------------------------------------------------------------------------------------- kernel
def kernel(device: torch.device, repeats: int, small: bool) -> list[Row]:
    """Log-prob and entropy of given tokens from hidden states, forward and backward (rows 1, 3, 4)."""
    if device.type == "cuda":
        shapes = [(8192, 896, MODEL_VOCABULARY), (8192, 1536, MODEL_VOCABULARY)]
    else:
        shapes = [(64, 32, 5000) if small else (1024, 256, MODEL_VOCABULARY)]
    return [kernel_row(device, repeats, *shape) for shape in shapes]


def kernel_row(device: torch.device, repeats: int, N: int, D: int, V: int) -> Row:
    dtype, temperature = torch.bfloat16 if device.type == "cuda" else torch.float32, 0.7
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator).to(device, dtype).requires_grad_()
    weight = (torch.randn(V, D, generator=generator) * 3 / D**0.5).to(device, dtype).requires_grad_()
    ids = torch.randint(V, (N,), generator=generator).to(device)
    g, h = torch.randn(2, N, generator=generator).to(device)
    name = f"linear log-prob + entropy, N {N}, D {D}, V {V}, {str(dtype)[6:]}"
    row = Row(name, [], error_of="log-prob in nats, gradient as a share of its largest")
    runs, notes = kernel_runs(hidden, weight, ids, temperature, g, h, row.missing)
    returned = (hidden.numel() + weight.numel()) * hidden.element_size()
    check = _exact(hidden.detach(), weight.detach(), ids, temperature, g, h)
    for name, run in runs.items():
        arm = Arm(name, note=notes.get(name, ""))
        run()
        with peak_memory(arm, device, returned):
            found = run()
        if found[0] is not None:
            full, ours = dtype == torch.float32, name.startswith(OURS)
            arm.tolerance, arm.gradient_tolerance = (1e-4 if full or ours else 0.2), (1e-4 if full else 0.05)
            arm.error, arm.gradient_error = check(*found, "no entropy" not in name + arm.note)
        del found
        row.arms.append(arm)
    timed(row, runs, repeats, device)
    row.limit = 4 * _product_seconds(hidden.detach(), weight.detach(), device)
    return row


def kernel_runs(
    hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float, g: Tensor, h: Tensor, missing: list[str]
) -> tuple[dict[str, Callable[[], tuple[Tensor | None, ...]]], dict[str, str]]:
    """(run by arm, note by arm). A run returns log-probs, if it has any, and the gradients of hidden and
    weight, with upstream weights g and h [N] of log-probs and entropies."""

    def naive() -> tuple[Tensor, Tensor]:
        logp = torch.log_softmax(hidden @ weight.T / temperature, -1)
        return logp.gather(1, ids[:, None])[:, 0], -(logp.exp() * logp).sum(-1)

    def both_ways(forward: Callable) -> Callable[[], tuple[Tensor | None, ...]]:
        def run() -> tuple[Tensor | None, ...]:
            logprobs, entropy = forward()
            loss = (g * logprobs).sum() + (0 if entropy is None else (h * entropy).sum())
            return logprobs.detach(), *torch.autograd.grad(loss, (hidden, weight))

        return run

    inputs, notes = (hidden, weight, ids, temperature), {}
    runs = {OURS: both_ways(lambda: token_logprob(*inputs, True))}
    runs |= {f"{OURS}, no entropy": both_ways(lambda: token_logprob(*inputs)), "naive": both_ways(naive)}
    if hidden.is_cuda:
        runs["torch.compile of naive"] = both_ways(torch.compile(naive))
    if hasattr(F, "linear_cross_entropy"):  # since torch 2.13
        name, options = "torch linear_cross_entropy", torch.nn.LinearCrossEntropyOptions()
        chunked = functools.partial(F.linear_cross_entropy, reduction="none", options=options)
        runs[name] = both_ways(lambda: (-chunked(hidden / temperature, weight, ids), None))
        notes[name] = "no entropy"
    if version := installed("trl", "trl", missing):
        from trl.kernels import ChunkedLogProbFunction
        from trl.trainer import utils as trl_utils

        extra = (temperature, trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("entropy",))
        trl = ChunkedLogProbFunction.apply
        runs[f"TRL {version}"] = both_ways(lambda: trl(hidden, weight, None, ids, *extra)[:2])
    if version := installed("liger_kernel", "liger-kernel", missing):
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
        from liger_kernel.chunked_loss import fused_linear_ppo as liger

        loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, temperature=temperature)

        def grpo_loss() -> tuple[Tensor | None, ...]:
            tokens = ids.view(8, -1)
            states = hidden.view(8, -1, hidden.shape[1])
            value = loss(states, weight, tokens, torch.ones_like(tokens), g[:8])[0]
            return None, *torch.autograd.grad(value, (hidden, weight))

        name, inner = f"Liger {version} GRPO loss", f"Liger {version} inner function"
        call, chunk = liger._ChunkedSelectiveLogProbFunction.apply, liger._SELECTIVE_LOGPROB_VOCAB_CHUNK_SIZE
        runs[name] = grpo_loss
        if hidden.is_cuda:
            from liger_kernel.functional import fused_linear_cross_entropy as frontend

            fused = f"Liger {version} cross-entropy"
            plain = functools.partial(frontend, reduction="none")
            runs[fused] = both_ways(lambda: (-plain(hidden / temperature, weight, ids)[0], None))
            notes[fused] = "no entropy"
        else:
            missing.append(f"liger-kernel {version}: its fused cross-entropy needs a GPU")
        runs[inner] = both_ways(lambda: (call(hidden, weight, ids, None, temperature, chunk), None))
        notes |= {name: "what it offers to users; no entropy, no log-probs", inner: "private; no entropy"}
    if version := installed("cut_cross_entropy", "cut-cross-entropy", missing):
        if hidden.is_cuda:
            from cut_cross_entropy import linear_cross_entropy as cce

            name = f"CCE {version}"
            runs[name] = both_ways(lambda: (-cce(hidden / temperature, weight, ids, reduction="none"), None))
            notes[name] = "no entropy; leaves small gradients out"
        else:
            missing.append(f"cut-cross-entropy {version}: its kernel needs a GPU")
    return runs, notes


@torch.no_grad()
def _exact(
    hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float, g: Tensor, h: Tensor
) -> Callable[..., tuple[float, float]]:
    """A function that compares with fp64: (largest error of the log-probs, largest error of the gradients of
    all hidden states and of 64 rows of the weight, as a share of the largest gradient)."""
    some = torch.linspace(0, len(weight) - 1, 64, device=ids.device).long()
    chosen, d_hidden, d_some = [], {True: [], False: []}, {True: 0.0, False: 0.0}
    wide = weight.double()
    for x, i, a, b in zip(*(t.split(128) for t in (hidden, ids, g, h)), strict=True):
        logp = (x.double() @ wide.T / temperature).log_softmax(-1)  # [128, V]
        p = logp.exp()
        chosen.append(logp.gather(1, i[:, None])[:, 0])
        entropy = -(p * logp).sum(-1, keepdim=True)
        for with_entropy in (True, False):
            d = -a[:, None] * p
            d[torch.arange(len(i)), i] += a
            if with_entropy:
                d -= b[:, None] * p * (logp + entropy)
            d /= temperature
            d_hidden[with_entropy].append(d @ wide)
            d_some[with_entropy] += d[:, some].T @ x.double()
    chosen = torch.cat(chosen)
    d_hidden = {key: torch.cat(parts) for key, parts in d_hidden.items()}

    def compare(logprobs: Tensor, of_hidden: Tensor, of_weight: Tensor, entropy: bool) -> tuple[float, float]:
        pairs = ((of_hidden, d_hidden[entropy]), (of_weight[some], d_some[entropy]))
        shares = [((x.double() - y).abs().max() / y.abs().max()).item() for x, y in pairs]
        return (logprobs.double() - chosen).abs().max().item(), max(shares)

    return compare


def _product_seconds(hidden: Tensor, weight: Tensor, device: torch.device) -> float:
    """Seconds of hidden @ weight.T: one of the four products that the row must make."""
    room = torch.empty(len(hidden), 2048, dtype=hidden.dtype, device=device)

    def product() -> None:
        for tile in weight.split(2048):
            torch.mm(hidden, tile.T, out=room[:, : len(tile)])

    return _best_seconds(product, device)


def _best_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Of 5 runs."""
    best = float("inf")
    for _ in range(5):
        _synchronize(device)
        started = time.perf_counter()
        run()
        _synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best


# ---------------------------------------------------------------------------------------------------- sampler
def seeded_policy(device: torch.device, small: bool) -> Policy:
    """A model of seeded random weights with the built-in tokenizer: 5 M parameters on a CPU, the shapes of
    Qwen2.5-0.5B on a GPU. Its embeddings are large, so that its distribution is peaked."""
    tokenizer = load(BUILT_IN, device="cpu").tokenizer
    sizes = (256, 768, 6, 8, 4, 32, len(tokenizer))
    if small:
        sizes = (64, 64, 2, 8, 4, 8, len(tokenizer))
    elif device.type == "cuda":
        sizes = REAL_MODELS["Qwen2.5-0.5B"][1:]
    config = Qwen2Config(**dict(zip(SHAPE, sizes)), tie_word_embeddings=True, max_position_embeddings=8192)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.get_input_embeddings().weight.data.mul_(10)
    return Policy(model.to(device).eval(), tokenizer)


def transformers_model(policy: Policy) -> PreTrainedModel:
    """A copy of the policy as transformers' own model, for the peers."""
    like = {"dtype": policy.dtype, "attn_implementation": "sdpa"}
    model = AutoModelForCausalLM.from_config(policy.config, **like)
    model.load_state_dict(policy.model.state_dict())
    return model.to(policy.device).eval()


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
    tasks = _grouped(tasks, group)
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
    row.limit = steps * sum(x.numel() * x.element_size() for x in read) / _bytes_per_second(device)
    return row


def _bytes_per_second(device: torch.device) -> float:
    """Of a large copy, reads and writes."""
    source = torch.ones(2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * len(source) / _best_seconds(lambda: target.copy_(source), device)


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


# ------------------------------------------------------------------------------------------------------- step
def step(device: torch.device, repeats: int, small: bool, model: str = BUILT_IN) -> list[Row]:
    """One whole GRPO step, rollout and update, on the same tokens (row 8)."""
    config = Config(scheme="grpo", prompts=2 if small else 8, group=4 if small else 8, model=model, warmup=0)
    name = f"GRPO step, {config.prompts} x {config.group} rollouts, {model}"
    tasks = load_tasks("train")[: config.prompts]
    return [step_row(name, config, tasks, lambda: load(model, device=str(device)), repeats)]


def step_row(
    name: str,
    config: Config,
    tasks: list[Task],
    policy_of: Callable[[], Policy],
    repeats: int,
    writer: Policy | None = None,
    warm_up: bool = True,
) -> Row:
    """Whole steps of a policy, on rollouts that `writer` (by default another of its kind) has sampled."""
    trajectories = rollout(new_run(config, writer or policy_of()), tasks)
    run, found = new_run(config, policy_of()), []
    player = ReplaySampler(run.policy, trajectories, context=config.context)

    def ours(every_row: bool = False) -> None:
        initial = {name: value.clone() for name, value in run.policy.model.state_dict().items()}
        episodes = [Episode(row, config.format, config.max_messages) for row in _grouped(tasks, config.group)]
        rows = player.rollout(episodes, temperature=config.temperature)
        metrics = policy_update(run, rows, group_advantages(run, rows), every_row=every_row)
        found.append((metrics["grad_norm"], metrics["forward_tokens"]))
        run.policy.model.load_state_dict(initial)

    row = Row(name, [], error_of="gradient norm")
    every = f"{OURS}, every row"
    row.arms = [Arm(OURS, note="rows without advantage left out"), Arm(every)]
    runs = {OURS: ours, every: lambda: ours(every_row=True)}
    if version := installed("trl", "trl", row.missing):
        from bench.trl import TrlStep

        policy = policy_of()
        theirs = TrlStep(config, tasks, trajectories, policy, transformers_model(policy))
        row.arms.append(Arm(f"TRL {version}", note="GRPOTrainer, rollout_func, generate for every message"))
        runs[row.arms[-1].name] = theirs
    for arm in row.arms:
        arm.work = sum(r.sampled_tokens for r in trajectories)
    timed(row, runs, repeats, run.policy.device, warm_up)
    row.length = sum(len(r.tokens) for r in trajectories) / len(trajectories)
    own = dict(zip(runs, found[-2:]))  # of the last turn
    norm = own[every][0]
    for arm in row.arms:
        value = own[arm.name][0] if arm.name in own else theirs.grad_norm
        arm.error, arm.tolerance = abs(value / norm - 1) if norm else abs(value), 1e-3
        if arm.name in own:
            arm.note = ", ".join(filter(None, [arm.note, f"{own[arm.name][1]} tokens through the model"]))
    return row


def _grouped(tasks: list[Task], group: int) -> list[Task]:
    return [task for task in tasks for _ in range(group)]


def new_run(config: Config, policy: Policy) -> Run:
    """A `Run` in its first step."""
    run = Run.begin(config, policy)
    run.next_step()
    return run


# ----------------------------------------------------------------------------------------------------- growth
GROWTH = {  # what grows, and the other two as they then are
    "rollouts": (16, 32, 64, 128, 256, 512),  # of the built-in model, on prompts as they are
    "tokens of a prompt": (250, 500, 1000, 2000, 3500),  # 16 rollouts of the built-in model, few messages
    "million parameters": (1, 5, 25),  # 32 rollouts, those of the built-in model
}
SIZES = {5: (256, 768, 6, 8, 4, 32), 25: (512, 1536, 8, 8, 4, 64)}  # SHAPE but for the vocabulary


def growth(device: torch.device, repeats: int, small: bool) -> list[Row]:
    """How the time of a whole step grows with what it holds; `slopes` fits powers. Each arm runs once, cold:
    with a warm-up TRL's part would take hours."""
    tasks, writer, rows = load_tasks("train"), load(BUILT_IN, device=str(device)), []
    for axis, values in GROWTH.items():
        for value in values[:1] if small else values:
            prompts = {"rollouts": value // 8, "tokens of a prompt": 2}.get(axis, 4)
            config = Config(scheme="grpo", prompts=prompts, warmup=0, group=4 if small else 8)
            some, policy_of = tasks[::5][:prompts], functools.partial(sized_policy, 1, device)
            if axis == "tokens of a prompt":
                config = config.but(context=4096, max_messages=6)
                some = [lengthened(writer, task, value) for task in some]
            elif axis == "million parameters":
                policy_of = functools.partial(sized_policy, value, device)
            name = f"{value} {axis}"
            rows.append(step_row(name, config, some, policy_of, repeats, writer, warm_up=False))
            rows[-1].axis, rows[-1].at = axis, value
    return rows


def sized_policy(millions: int, device: torch.device) -> Policy:
    """The built-in model (1), or one of seeded random weights with its tokenizer."""
    policy = load(BUILT_IN, device=str(device))
    if millions == 1:
        return policy
    sizes = dict(zip(SHAPE, (*SIZES[millions], len(policy.tokenizer))))
    config = Qwen2Config(**sizes, tie_word_embeddings=True, max_position_embeddings=4096)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return Policy(model.to(device).eval(), policy.tokenizer)


def lengthened(policy: Policy, task: Task, length: int) -> Task:
    """The task with words before its first message, up to a prompt of `length` tokens."""
    first, *others = task.turns
    words = 0
    while True:
        longer = replace(task, turns=[replace(first, user="Well, " * words + first.user), *others])
        missing = length - len(policy.chat.prompt_ids(*Episode(longer).prompt(), "hermes"))
        if missing <= 0:
            return longer
        words += max(1, missing // 4)


def slopes(rows: list[Row]) -> dict[str, dict[str, float]]:
    """Exponent of the time of every arm, by what grew: 1 where twice as much takes twice as long."""
    found: dict[str, dict[str, float]] = {}
    for axis in dict.fromkeys(row.axis for row in rows):
        points = [row for row in rows if row.axis == axis]
        for arm in points[0].arms if len(points) > 1 else ():
            name = arm.name
            times = [next(a.median for a in row.arms if a.name == name) for row in points]
            fit = statistics.linear_regression(
                [math.log(row.at) for row in points], [math.log(seconds) for seconds in times]
            )
            found.setdefault(axis, {})[name] = fit.slope
    return found


# ------------------------------------------------------------------------------------------------------ parts
def parts(device: torch.device, small: bool) -> list[Parts]:
    """Decode steps of the built-in model: one row, the tail of a rollout, its middle, its beginning. Raises
    ValueError on a GPU, where a clock in Python sees nothing."""
    if device.type != "cpu":
        raise ValueError("parts are timed on a CPU; on a GPU torch's profiler shows kernels (bench/gpu.sh)")
    square = torch.ones(1024, 1024)
    product = 2 * 1024**3 / _best_seconds(lambda: square @ square, device)
    copy = _bytes_per_second(device)
    shapes = [(2, 2, 16, 4)] if small else [(1, 1, 180, 100), (16, 4, 180, 500), (64, 8, 180, 200)]
    shapes += [] if small else [(128, 8, 180, 20)]
    return [decode_parts(load(BUILT_IN, device="cpu"), *shape, copy, product) for shape in shapes]


# ------------------------------------------------------------------------------------------------------- busy
def busy(device: torch.device, repeats: int, small: bool) -> list[Row]:
    """The default run as a command, alone and beside other work: one busy process for every core. And a short
    run with the ways in which torch's threads can wait for each other (nanotoolrl/__init__.py)."""
    whole, short, collapse = "--scheme hint", "--scheme hint --steps 3 --eval-count 0", "--preset collapse"
    if small:
        whole, short = "--preset smoke", "--preset smoke --steps 1 --eval-count 0"
        collapse = f"{short} --lr 1e-3"
    cores = available_cores()
    unset = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}

    def run(flags: str, busy_processes: int = 0, after: float = 0, **waiting: str) -> None:
        wait = f"import time; time.sleep({after})\nwhile True: pass"
        loops = [subprocess.Popen([sys.executable, "-c", wait]) for _ in range(busy_processes)]
        try:
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, "train.py", *flags.split(), "--out", f"{folder}/run"]
                subprocess.run(command, cwd=ROOT, env=unset | waiting, check=True, capture_output=True)
        finally:
            for loop in loops:
                loop.kill()

    beside = f"beside {cores} busy processes"
    ways = {
        whole: {OURS: {}, beside: {"busy_processes": cores}},
        short: {
            OURS: {},
            "waiting as libgomp does by itself": {"GOMP_SPINCOUNT": LIBGOMP_SPINS},
            "asleep at once": {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"},
            f"{beside} that begin 5 s later": {"busy_processes": cores, "after": 5},
        },
        collapse: {OURS: {}},
    }
    rows = []
    for flags, arms in ways.items():
        rows.append(Row(f"python train.py {flags}", [Arm(name) for name in arms]))
        works = {name: functools.partial(run, flags, **how) for name, how in arms.items()}
        times = 3 * repeats if flags == short and not small else repeats
        timed(rows[-1], works, times, device, warm_up=False)
    return rows


# ----------------------------------------------------------------------------------------------------- before
def before(device: torch.device, repeats: int, small: bool, revision: str) -> list[Row]:
    """Short runs of the present source and of an older revision, in turns: the whole command, and the tokens
    a second of its sampling. Raises ValueError where git does not know the revision."""
    works = ["--scheme hint --steps 3 --lr 2e-4", "--preset collapse --steps 12"]
    if small:
        works = ["--preset smoke --steps 1"]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        add = ["git", "worktree", "add", "--detach", str(tree), revision]
        made = subprocess.run(add, cwd=ROOT, capture_output=True, text=True)
        if made.returncode:
            raise ValueError(f"no revision {revision}: {made.stderr.strip()}")
        try:
            for flags in works:
                rows += before_rows(f"{flags} --eval-count 0", {OURS: ROOT, revision: tree}, repeats, device)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)
    return rows


def before_rows(flags: str, trees: dict[str, Path], repeats: int, device: torch.device) -> list[Row]:
    """(the whole command, its sampling) in each of the source trees."""
    whole, sampling = (
        Row(name, [Arm(tree) for tree in trees]) for name in (f"train.py {flags}", "its sampling")
    )

    def run(name: str, arm: Arm) -> None:
        with tempfile.TemporaryDirectory() as out:
            command = [sys.executable, "train.py", *flags.split(), "--out", f"{out}/run"]
            subprocess.run(command, cwd=trees[name], check=True, capture_output=True)
            with open(f"{out}/run/metrics.csv", encoding="utf-8") as file:
                steps = list(csv.DictReader(file))
        arm.seconds.append(sum(float(step["sample_seconds"]) for step in steps))
        arm.work = sum(int(step["tokens"]) for step in steps)

    works = {arm.name: functools.partial(run, arm.name, arm) for arm in sampling.arms}
    timed(whole, works, repeats, device)
    for arm in sampling.arms:
        arm.seconds = arm.seconds[1:]  # without the warm-up
    return [whole, sampling]


# ----------------------------------------------------------------------------------------------------- parity
@dataclass
class Parity:
    """How far the trainer's log-probs of a sampled token are from the sampler's, over N tokens: 99th
    percentile and maximum of the absolute difference in nats, share of ratios outside [0.9, 1.1]. `itself`:
    the largest difference of the trainer's, 8 rows at a time, from its own, row by row: what no sampler can
    be blamed for."""

    N: int
    p99: float
    largest: float
    outside: float
    itself: float

    def __str__(self) -> str:
        return (
            f"{self.N} sampled tokens: |trainer - sampler| p99 {self.p99:.1e}, max {self.largest:.1e} nats, "
            f"{self.outside:.3%} of the ratios outside [0.9, 1.1];\n"
            f"|trainer - trainer in other micro-batches| max {self.itself:.1e} nats"
        )

    def wrong(self, dtype: torch.dtype) -> bool:
        """Whether rounding in this dtype cannot be the reason: a wrong mask or position is far beyond it."""
        return not (self.largest <= 1e-4 if dtype == torch.float32 else self.outside <= 0.05)


@torch.no_grad()
def check_parity(policy: Policy, tasks: list[Task], group: int = 4, temperature: float = 1.0) -> Parity:
    """Roll out ragged episodes, run them through the trainer's forward, and compare."""
    episodes = [Episode(task) for task in _grouped(tasks, group)]
    rows = Sampler(policy).rollout(episodes, temperature=temperature)

    def trained(size: int) -> Tensor:
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        batches = [pad([(row.tokens, row.loss_mask) for row in part], policy.device) for part in parts]
        return torch.cat([policy.logprobs(*batch, temperature)[0] for batch in batches]).cpu().double()

    sampled = [x for row in rows for x, flag in zip(row.logprobs, row.loss_mask) if flag]
    together = trained(8)
    gap = together - torch.tensor(sampled, dtype=torch.float64)
    size, outside = gap.abs(), ((gap.exp() - 1).abs() > 0.1).double().mean().item()
    itself = (together - trained(1)).abs().max().item()
    return Parity(len(gap), size.quantile(0.99).item(), size.max().item(), outside, itself)


# ----------------------------------------------------------------------------------------------------- memory
GPUS = (24, 40, 80)  # GiB
TAKEN = 0.9  # share of a GPU that a plan may take; the rest is for the allocator and the CUDA context
# What is added to a preset until it fits: what costs time before what changes the method.
LADDER = (
    "",
    "--slots 16",
    "--slots 8",
    "--slots 8 --tokens-at-once 8192",
    "--slots 4 --tokens-at-once 8192",
    "--slots 4 --tokens-at-once 8192 --kl 0",
)


def memory_table() -> str:
    """Markdown: the flags with which the Qwen presets' settings fit a model into a GPU, by `memory.plan`."""
    lines = ["| model | schedule | " + " | ".join(f"{size} GiB" for size in GPUS) + " |"]
    lines.append("|---" * (2 + len(GPUS)) + "|")
    for name, (architecture, *sizes) in REAL_MODELS.items():
        shape = dict(zip(SHAPE, sizes)) | {"tie_word_embeddings": True, "max_position_embeddings": 32_768}
        with torch.device("meta"):  # shapes only
            model = Transformer(Architecture.of(architecture(**shape))).to(torch.bfloat16)
        for schedule, scheme in (("sync", "hint"), ("interleaved", "ets")):
            fitting = [fitting_flags(model, scheme, TAKEN * size * 2**30) for size in GPUS]
            lines.append(f"| {name} | {schedule} | {' | '.join(fitting)} |")
    return "\n".join(lines)


def fitting_flags(model: torch.nn.Module, scheme: str, room: float) -> str:
    """What a table says of a model and that many bytes: flags to add, and the plan's sum."""
    for flags in LADDER:
        command = ["--preset", "qwen0.5b", "--scheme", scheme, *flags.split()]
        total = sum(plan(model, parse(command)[0]).values())
        if total <= room:
            return f"{f'`{flags}`' if flags else 'as it is'}, {total / 2**30:.0f} GiB"
    return "does not fit"


# ----------------------------------------------------------------------------------------------------- report
def machine(device: torch.device) -> dict[str, str]:
    """What a result was measured on."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [
            line
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if "model name" in line
        ]
        cpu = names[0].split(":")[1].strip() if names else cpu
    facts = {"cpu": cpu, "cores": str(os.cpu_count()), "threads": str(torch.get_num_threads())}
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return facts | versions | {"python": platform.python_version()}


def cells(row: Row, arm: Arm) -> list[str]:
    """What a table says of an arm: name, seconds with spread, against ours, limit, memory, error, note."""
    ours, spread = row.arms[0].median, f"{min(arm.seconds):.2f} to {max(arm.seconds):.2f}"
    time_or_rate = f"{arm.median:.2f} s ({spread})"
    if arm.work:
        time_or_rate += f", {arm.work / arm.median:.0f} tok/s"
    return [
        arm.name,
        time_or_rate,
        f"{arm.median / ours:.2f}x",
        f"{row.limit / arm.median:.0%}" if row.limit else "",
        f"{arm.peak_mb:.0f} MB" if arm.peak_mb is not None else "",
        ", ".join(f"{x:.0e}" for x in (arm.error, arm.gradient_error) if x is not None)
        + " WRONG" * arm.wrong,
        arm.note,
    ]


COMMANDS = {
    "kernel": kernel,
    "sampler": sampler,
    "step": step,
    "growth": growth,
    "before": before,
    "busy": busy,
}
HEADER = ["", "median (range)", "time, ours = 1", "of the limit", "peak memory", "error", ""]


def table(rows: list[Row]) -> str:
    """The rows for a terminal."""
    lines = []
    for row in rows:
        body = [HEADER, *(cells(row, arm) for arm in row.arms)]
        widths = [max(len(line[k]) for line in body) for k in range(len(HEADER))]
        lines += [f"{row.name} (error: {row.error_of})"]
        lines += ["  " + "  ".join(cell.ljust(n) for cell, n in zip(line, widths)).rstrip() for line in body]
        lines += [f"  {text}" for text in row.missing]
    return "\n".join(lines)


def markdown(result: dict) -> str:
    """The table of a result file for docs/speed.md."""
    lines = ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    for raw in result["rows"]:
        row = Row(**raw | {"arms": [Arm(**arm) for arm in raw["arms"]]})
        lines.append(f"| **{row.name}** |" + " |" * (len(HEADER) - 1))
        lines += ["| " + " | ".join(cells(row, arm)) + " |" for arm in row.arms]
    return "\n".join(lines)


def slopes_table(found: dict[str, dict[str, float]]) -> str:
    """Markdown: exponents, an arm to a column."""
    names = list(next(iter(found.values()), {}))
    lines = ["| time grows as | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    for axis, by_arm in found.items():
        lines.append(
            f"| {axis} to the power of | " + " | ".join(f"{by_arm[name]:.2f}" for name in names) + " |"
        )
    return "\n".join(lines)


# (result file, how its row begins, what is looked at: times as fast as the fastest peer, share of the limit,
# or seconds; goal)
GOALS = (
    ("kernel", "linear log-prob", "fastest peer", 1.0),
    ("kernel", "linear log-prob", "limit", 0.8),
    ("sampler", "decode, 1 row", "fastest peer", 1.5),
    ("sampler", "decode, 64 rows", "fastest peer", 1.5),
    ("sampler", "(a)", "fastest peer", 12.0),
    ("sampler", "(b)", "fastest peer", 12.0),
    ("step", "GRPO step", "fastest peer", 10.0),
    ("before", "python train.py --scheme hint", "fastest peer", 2.0),
    ("before", "its sampling", "fastest peer", 2.5),
    ("busy", "python train.py --scheme hint", "seconds", 150.0),
    ("busy", "python train.py --preset collapse", "seconds", 180.0),
)


def goals(results: dict[str, dict]) -> str:
    """Markdown: what was aimed at and what was measured, by the names of result files."""
    lines = ["| what | goal | measured | |", "|---|---|---|---|"]
    for file, start, kind, goal in GOALS:
        raw = next(row for row in results[file]["rows"] if row["name"].startswith(start))
        row = Row(**raw | {"arms": [Arm(**arm) for arm in raw["arms"]]})
        ours, *others = row.arms
        peers = [arm for arm in others if not arm.name.startswith(OURS)]
        if kind == "seconds":
            aim, value, met = f"at most {goal:.0f} s", f"{ours.median:.0f} s", ours.median <= goal
        elif kind == "limit":
            share = row.limit / ours.median
            aim, value, met = f"{goal:.0%} of the limit", f"{share:.0%}", share >= goal
        else:
            peer = min(peers, key=lambda arm: arm.median)
            ratio = peer.median / ours.median
            aim, value, met = f"{goal:g}x {peer.name}", f"{ratio:.2f}x", ratio >= goal
        lines.append(f"| {row.name} | {aim} | {value} | {'met' if met else 'not met'} |")
    return "\n".join(lines)


@command
def main(argv: list[str] | None = None) -> int:
    """The command: returns 0, 1 if a result is wrong, 2 if it cannot run."""
    parser = argparse.ArgumentParser(prog="python -m nanotoolrl.bench", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "what", choices=("kernel", "sampler", "step", "growth", "parts", "before", "busy", "memory")
    )
    parser.add_argument(
        "--repeats",
        type=number(int, above=0),
        help="timed runs of every arm (default: 5 on a CPU, 20 on a GPU; of growth and busy 1, of busy's "
        "short runs 3)",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    threads = number(int, above=0, most=MOST_THREADS)
    parser.add_argument("--threads", type=threads, default=cpu_threads(), help="CPU threads")
    parser.add_argument("--model", default=BUILT_IN, help="of step (default: %(default)s)")
    parser.add_argument("--parity", action="store_true", help="step: only compare sampler and trainer")
    parser.add_argument(
        "--dtype", default="auto", choices=tuple(DTYPES), help="of the weights, with --parity"
    )
    parser.add_argument("--revision", default="6a21ee6", help="of before (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to see that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result down")
    args = parser.parse_args(argv)
    if args.what == "memory":
        print(memory_table())
        return 0
    torch.set_num_threads(args.threads)
    try:
        device = torch.empty(0, device=args.device).device
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            check_writable(args.json)
    except (OSError, RuntimeError, AssertionError) as error:  # the last: no CUDA
        parser.error(str(error))
    try:
        once = args.what in ("busy", "growth")
        repeats = args.repeats or (1 if once else 20 if device.type == "cuda" else 5)
        if args.parity:
            policy = load(args.model, device=args.device, dtype=DTYPES[args.dtype])
            parity = check_parity(policy, load_tasks("train")[::19])
            print(parity)
            good, body = not parity.wrong(policy.dtype), {"parity": asdict(parity)}
        elif args.what == "parts":
            found = parts(device, args.small)
            print(parts_table(found))
            good, body = True, {"parts": [asdict(one) for one in found]}
        else:
            extra = {"step": {"model": args.model}, "before": {"revision": args.revision}}.get(args.what, {})
            rows = COMMANDS[args.what](device, repeats, args.small, **extra)
            print(table(rows))
            good = not any(arm.wrong for row in rows for arm in row.arms)
            body = {"rows": [asdict(row) for row in rows]}
            if args.what == "growth":
                body["slopes"] = slopes(rows)
                print(slopes_table(body["slopes"]))
    except (ModelError, ValueError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    if args.json:
        given = [x for x in argv or sys.argv[1:] if x not in ("--json", str(args.json))]
        line = "python -m nanotoolrl.bench " + " ".join(given)
        args.json.write_text(
            json.dumps(finite({"command": line, "machine": machine(device)} | body), indent=1) + "\n",
            encoding="utf-8",
        )
    if not good:
        print("bench: a result is wrong, see above", file=sys.stderr)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
