"""Which settings fit real models into which GPUs, by the memory plan."""

import torch

from bench.models import REAL_MODELS, SHAPE
from nanotoolrl.commandline import parse
from nanotoolrl.gpu.memory import plan
from nanotoolrl.transformer import Architecture, Transformer

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
