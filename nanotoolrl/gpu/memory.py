"""What a run needs of the device's memory, by arithmetic, before it is taken."""

import math
import os
from collections.abc import Collection
from pathlib import Path

import torch

from nanotoolrl.cli import control_groups
from nanotoolrl.config import Config
from nanotoolrl.gpu import distributed
from nanotoolrl.logprob import SLAB_BYTES
from nanotoolrl.sampler import SLOTS
from nanotoolrl.transformer import Transformer

CACHE_SHARE = 1 / 3  # of a device's memory, for the KV cache of an evaluation
# What to lower where a part is too large.
ADVICE = {
    "KV cache": "--slots or --context",
    "activations": "--tokens-at-once down to --context, or --checkpointing",
    "reference": "--kl 0 --guard-kl 0",
    "burst optimiser": "--schedule sync",
}


def plan(model: Transformer, config: Config, needed: Collection[str] = ()) -> dict[str, float]:
    """Bytes by part, of a run of a model with train.py's config; `needed`: parts that its scheme always has,
    and "moved reference" where its KL terms do not pull to the model of the start.

    fp32 masters and gradients, AdamW's two moments (twice while a burst of SFT has its own), a reference for
    KL terms, the KV cache of all slots at full length, the activations of one micro-batch, and what the head
    takes: logits of the rows that are sampled, one slab of the log-prob kernel, the head's gradient, and the
    probes' copy of it. An estimate: the allocator's own needs, a few percent, come on top.
    """
    shape, head = model.shape, model.lm_head.weight
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    size = head.element_size()  # of a weight
    V, D = head.shape
    attended = shape.heads * shape.head_width
    cached = 2 * shape.kv_heads * shape.head_width  # numbers of a token's keys and values in a layer
    context = min(config.context, shape.context)
    rows = config.prompts * config.group
    evaluated = max(config.eval_count, config.eval_trained) * max(1, config.eval_samples)
    slots = min(config.slots, -(-max(rows, evaluated) // distributed.world()))
    T = min(max(config.tokens_at_once, context), rows * context)  # tokens of a micro-batch, at least a row
    # Kept for the backward pass, by token: a norm's input in fp32, its output after the scale and, where that
    # is trained, before it; of a layer also query, key, value and what attention gives, and four of the MLP.
    norm = 4 / size + (1 if config.lora else 2)
    layer = 2 * norm * D + 2 * attended + cached + 4 * shape.mlp_width
    if shape.qk_norm:
        layer += (norm - 1) * (attended + cached / 2)
    kept = shape.layers * layer
    if config.checkpointing:
        kept = shape.layers * D + layer
    kept += norm * D
    pulled = config.kl > 0 or config.guard_kl > 0
    own = config.lora and "moved reference" not in needed  # the policy without its adapter is the reference
    reference = pulled and not own or "reference" in needed
    bursts = config.schedule == "interleaved" or "burst optimiser" in needed
    parts = {
        "weights": parameters * size,
        "masters": trained * 4 if size < 4 else 0,
        "gradients": trained * 4,
        "optimiser": trained * 8,
        "burst optimiser": trained * 8 * bursts,
        "reference": parameters * size * reference,
        "KV cache": slots * cache_bytes(model, context),
        "activations": T * kept * size,
        "head": 2 * slots * V * 4 + SLAB_BYTES + 2 * V * D * size,
    }
    return {name: float(count) for name, count in parts.items() if count}


def cache_bytes(model: Transformer, context: int) -> int:
    """Bytes of keys and values of a row of `context` tokens."""
    shape = model.shape
    numbers = 2 * shape.layers * shape.kv_heads * shape.head_width  # of a token
    return min(context, shape.context) * numbers * model.lm_head.weight.element_size()


def evaluation_slots(model: Transformer, context: int, device: torch.device) -> int:
    """Rows that an evaluation decodes at a time: `SLOTS`, or as many as keep the KV cache, at full length,
    within `CACHE_SHARE` of the device's memory."""
    return max(1, min(SLOTS, int(CACHE_SHARE * available(device) / cache_bytes(model, context))))


def describe(parts: dict[str, float], there: float, needed: Collection[str] = ()) -> str:
    """One line: every part, the sum, what the device has (bytes); a second one if that is not enough: what to
    lower, largest first, but for the parts that are `needed`."""
    total = sum(parts.values())
    unit, digits, name_of_unit = (2**30, 1, "GiB") if total >= 2**30 else (2**20, 0, "MiB")
    words = " + ".join(f"{name} {count / unit:.{digits}f}" for name, count in parts.items())
    line = f"memory plan: {words} = {total / unit:.{digits}f} of {there / unit:.0f} {name_of_unit}"
    if total <= there:
        return line
    large = sorted((parts.keys() & ADVICE.keys()) - set(needed), key=parts.get, reverse=True)
    lower = "; ".join(f"{ADVICE[name]} ({name})" for name in large)
    return f"{line}\nthis will hardly fit; lower {lower}"


def available(device: torch.device, root: Path = Path("/")) -> float:
    """Bytes of memory that the device has for a process; in main memory no more than control groups allow
    (docker --memory). root: where /proc and /sys are."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([there, *map(_limit_of, control_groups(root, "memory"))]) / distributed.neighbours()


def _limit_of(group: Path) -> float:
    """Memory limit of one control group, in bytes: version 2 has memory.max, version 1 another file."""
    for name in ("memory.max", "memory.limit_in_bytes"):
        try:
            return float((group / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # none there, or "max"
            continue
    return math.inf
