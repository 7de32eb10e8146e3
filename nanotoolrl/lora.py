"""Low-rank adapters (LoRA, arXiv 2106.09685): `--lora RANK` trains two thin matrices beside every linear map
of attention and MLP, and nothing else.

    y = W x + ALPHA / rank * B (A x)        W [out, in] frozen, A [rank, in], B [out, rank], zero at the start

Less memory, as masters, gradients and moments are of A and B alone, and no reference model, as the policy
without its adapter is the one that RL started from (two schemes pull to a later one, `move_reference`). Few
directions to move in, too: a way to ask whether a collapse needs all of them. The adapters are those of the
package peft, which is imported here and nowhere else.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from nanotoolrl.transformer import Transformer

ALPHA = 32  # so that one learning rate does for all ranks; it is about ten times that of full training
MAPS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NAME = "default"  # of the adapter, as peft names an only one
FILE, PREFIX = "adapter_model.safetensors", "base_model.model."  # as peft reads them
ABSENT = "--lora needs the package peft: pip install peft"


def add(model: Transformer, rank: int, seed: int, base: str) -> None:
    """Put an adapter of that rank beside every linear map of the layers, in place, and freeze the rest.

    seed: of the random numbers in A. base: name of the model, for `save`. Raises ValueError if peft is not
    installed.
    """
    try:
        import peft
    except ImportError:
        raise ValueError(ABSENT) from None
    config = peft.LoraConfig(
        r=rank, lora_alpha=ALPHA, target_modules=list(MAPS), base_model_name_or_path=base
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, model, NAME)


def adapted(model: Transformer) -> dict[str, Any]:
    """The linear maps that have an adapter, by name."""
    return {name: part for name, part in model.named_modules() if hasattr(part, "lora_A")}


@contextmanager
def off(model: Transformer) -> Iterator[None]:
    """While it is open the model is the one without its adapter."""
    parts = adapted(model).values()
    for part in parts:
        part.enable_adapters(False)
    try:
        yield
    finally:
        for part in parts:
            part.enable_adapters(True)


@torch.no_grad()
def merged(model: Transformer) -> dict[str, Tensor]:
    """A state dict with the names of a model without adapters; its maps are W + ALPHA / rank B A, added in
    fp32 and rounded once. Of a model without adapters its own."""
    parts = adapted(model)
    state = {
        name.replace(".base_layer.", "."): value
        for name, value in model.state_dict().items()
        if ".lora_" not in name
    }
    for name, part in parts.items():
        A, B = (matrix[NAME].weight.float() for matrix in (part.lora_A, part.lora_B))
        W = part.get_base_layer().weight
        state[f"{name}.weight"] = (W.float() + part.scaling[NAME] * B @ A).to(W.dtype)
    return state


def save(model: Transformer, directory: Path) -> None:
    """Write the adapter alone, as `peft.PeftModel.from_pretrained(base, directory)` reads it; nothing for a
    model without one."""
    if not adapted(model):
        return
    import peft

    config: Any = model.peft_config
    config[NAME].save_pretrained(directory)
    weights = peft.get_peft_model_state_dict(model, save_embedding_layers=False)  # else it asks the hub
    save_file({PREFIX + name: value.contiguous() for name, value in weights.items()}, directory / FILE)
