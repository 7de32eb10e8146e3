"""Where a decode step's time goes: `python -m nanotoolrl.bench parts`."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from bench.measure import best_seconds, bytes_per_second
from nanotoolrl.config import Refused
from nanotoolrl.decode import Decoder, Feed
from nanotoolrl.loading import BUILT_IN, load
from nanotoolrl.model import Policy
from nanotoolrl.transformer import MLP, RMSNorm

STEPS = 60  # decode steps that are timed, after WARM_UP
WARM_UP = 5
REST = "rotary positions, additions, Python"


@dataclass
class Parts:
    """Median seconds of a decode step and of its parts, and what bounds it: the bytes that it must read at
    the speed of a large copy, the products that it must make at the speed of a large one."""

    name: str
    step: float
    parts: dict[str, float] = field(default_factory=dict)
    read: float = 0.0  # seconds
    compute: float = 0.0  # seconds

    @property
    def limit(self) -> float:
        return max(self.read, self.compute)


class Clock:
    """Adds up the time that is spent in functions and modules, by name. On a CPU, where calls end when their
    work does."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.started: list[float] = []

    def begin(self, *_: Any) -> None:
        self.started.append(time.perf_counter())

    def end(self, name: str) -> None:
        spent = time.perf_counter() - self.started.pop()
        self.seconds[name] = self.seconds.get(name, 0.0) + spent

    def watch(self, name: str, module: nn.Module) -> None:
        """Time the calls of a module."""
        module.register_forward_pre_hook(self.begin)
        module.register_forward_hook(lambda *_: self.end(name))

    def watched(self, name: str, function: Callable) -> Callable:
        """The function, its calls timed."""

        def call(*arguments: Any) -> Any:
            self.begin()
            try:
                return function(*arguments)
            finally:
                self.end(name)

        return call


def watch_parts(decoder: Decoder, clock: Clock) -> None:
    """Time the parts of a decoder's steps; `choice` holds the head, which is taken off in `decode_parts`."""
    model = decoder.policy.model
    clock.watch("embedding", model.model.embed_tokens)
    for name, module in model.model.named_modules():
        if isinstance(module, RMSNorm):
            clock.watch("norms", module)
        elif isinstance(module, MLP):
            clock.watch("MLP", module)
        elif name.endswith(("q_proj", "k_proj", "v_proj", "o_proj")):
            clock.watch("projections", module)
    stepping = clock.watched("masks and places", decoder.cache.stepping)
    decoder.cache.stepping = lambda rows: clock.watched("attention", stepping(rows))
    decoder.policy.logits = clock.watched("head", decoder.policy.logits)
    decoder.choose = clock.watched("choice", decoder.choose)


@torch.inference_mode()
def decode_parts(
    policy: Policy, B: int, group: int, prompt: int, own: int, copy_speed: float, product_speed: float
) -> Parts:
    """The parts of a step of B rows, `group` to a prompt of so many tokens, with `own` to 2 x `own` tokens
    after it. copy_speed: bytes a second. product_speed: operations a second."""
    decoder, clock = Decoder(policy, 0, fast=False), Clock()
    prompts, top = -(-B // group), min(policy.chat.stop_ids)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(own, 2 * own + 1, (B,), generator=generator).tolist()
    decoder.open(B, prompt + 4 * own + STEPS + WARM_UP)
    decoder.read(range(prompts), torch.randint(top, (prompts, prompt), generator=generator).tolist())
    for row, length in enumerate(lengths):
        ids = torch.randint(top, (length,), generator=generator).tolist()
        decoder.extend([Feed(row, prompt=row // group, prompt_length=prompt)], [ids])

    def step(at: int) -> float:
        rows = [Feed(b, 1, n + at, 9, b, at, b // group, prompt) for b, n in enumerate(lengths)]
        started = time.perf_counter()
        decoder.decode(rows, 1.0)
        return time.perf_counter() - started

    for at in range(WARM_UP):
        step(at)
    whole = statistics.median(step(WARM_UP + at) for at in range(STEPS))  # without a clock's own time
    watch_parts(decoder, clock)
    rounds = []
    for at in range(STEPS):
        clock.seconds.clear()
        total = step(WARM_UP + at)
        rounds.append(clock.seconds | {REST: total})
    parts = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
    parts["choice"] -= parts["head"]
    parts[REST] -= sum(seconds for name, seconds in parts.items() if name != REST)
    shape = policy.model.shape
    weights = sum(weight.numel() for weight in policy.model.parameters())
    cached = shape.layers * 2 * shape.kv_heads * shape.head_width * (prompts * prompt + sum(lengths))
    attended = 4 * shape.layers * shape.heads * shape.head_width * (B * prompt + sum(lengths))
    name = f"{B} rows, {prompts} prompts of {prompt}, then {own} to {2 * own} tokens"
    read = (weights + cached) * policy.head.element_size() / copy_speed
    return Parts(name, whole, parts, read, (2 * weights * B + attended) / product_speed)


def parts(device: torch.device, small: bool) -> list[Parts]:
    """Decode steps of the built-in model: one row, the tail of a rollout, its middle, its beginning. Raises
    Refused on a GPU, where a clock in Python sees nothing."""
    if device.type != "cpu":
        raise Refused("parts are timed on a CPU; on a GPU torch's profiler shows kernels (bench/gpu.sh)")
    square = torch.ones(1024, 1024)
    product = 2 * 1024**3 / best_seconds(lambda: square @ square, device)
    copy = bytes_per_second(device)
    shapes = [(2, 2, 16, 4)] if small else [(1, 1, 180, 100), (16, 4, 180, 500), (64, 8, 180, 200)]
    shapes += [] if small else [(128, 8, 180, 20)]
    return [decode_parts(load(BUILT_IN, device="cpu"), *shape, copy, product) for shape in shapes]


def parts_table(found: list[Parts]) -> str:
    """Markdown: milliseconds of every part, and the limit."""
    lines = ["| ms | " + " | ".join(one.name for one in found) + " |", "|---" * (1 + len(found)) + "|"]
    for part in found[0].parts:
        lines.append(f"| {part} | " + " | ".join(f"{1e3 * one.parts[part]:.2f}" for one in found) + " |")
    for title, value in (
        ("a step, without the clock", lambda one: f"{1e3 * one.step:.2f}"),
        ("to read weights and cache once", lambda one: f"{1e3 * one.read:.2f}"),
        ("to make the products", lambda one: f"{1e3 * one.compute:.2f}"),
        ("of the limit", lambda one: f"{one.limit / one.step:.0%}"),
    ):
        lines.append(f"| {title} | " + " | ".join(map(value, found)) + " |")
    return "\n".join(lines)
