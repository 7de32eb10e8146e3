"""Which settings fit real models into which GPUs, by the memory plan."""

import torch

from bench.models import REAL_MODELS, SHAPE
from nanotoolrl import lora
from nanotoolrl.commandline import parse
from nanotoolrl.gpu.memory import plan
from nanotoolrl.transformer import Architecture, Transformer

GPUS, SMALL_GPUS = (24, 40, 80), (8, 16, 24)  # GiB; small ones for adapters
RANK = 16  # of these
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


def memory_table(rank: int = 0) -> str:
    """Markdown: the flags with which the Qwen presets' settings fit a model into a GPU, by `memory.plan`.
    rank: of adapters, with which they fit into small ones."""
    sizes_of_gpus = SMALL_GPUS if rank else GPUS
    lines = ["| model | schedule | " + " | ".join(f"{size} GiB" for size in sizes_of_gpus) + " |"]
    lines.append("|---" * (2 + len(sizes_of_gpus)) + "|")
    for name, (architecture, *sizes) in REAL_MODELS.items():
        shape = dict(zip(SHAPE, sizes)) | {"tie_word_embeddings": True, "max_position_embeddings": 32_768}
        with torch.device("meta"):  # shapes only
            model = Transformer(Architecture.of(architecture(**shape))).to(torch.bfloat16)
            if rank:
                lora.add(model, rank, 0, name)
        for schedule, scheme in (("sync", "hint"), ("interleaved", "ets")):
            rooms = [TAKEN * size * 2**30 for size in sizes_of_gpus]
            fitting = [fitting_flags(model, scheme, room, rank) for room in rooms]
            lines.append(f"| {name} | {schedule} | {' | '.join(fitting)} |")
    return "\n".join(lines)


def fitting_flags(model: torch.nn.Module, scheme: str, room: float, rank: int = 0) -> str:
    """What a table says of a model and that many bytes: flags to add, and the plan's sum."""
    for flags in LADDER:
        command = ["--preset", "qwen0.5b", "--scheme", scheme, *flags.split(), "--lora", str(rank)]
        total = sum(plan(model, parse(command)[0]).values())
        if total <= room:
            return f"{f'`{flags}`' if flags else 'as it is'}, {total / 2**30:.0f} GiB"
    return "does not fit"
