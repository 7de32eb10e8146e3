"""The models that are measured, and transformers' own copies of them."""

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from nanotoolrl.loading import BUILT_IN, load
from nanotoolrl.model import Policy

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


SIZES = {5: (256, 768, 6, 8, 4, 32), 25: (512, 1536, 8, 8, 4, 64)}  # SHAPE but for the vocabulary


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


def transformers_model(policy: Policy) -> PreTrainedModel:
    """A copy of the policy as transformers' own model, for the peers."""
    like = {"dtype": policy.dtype, "attn_implementation": "sdpa"}
    model = AutoModelForCausalLM.from_config(policy.config, **like)
    model.load_state_dict(policy.model.state_dict())
    return model.to(policy.device).eval()
