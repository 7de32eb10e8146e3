"""Our forward is that of transformers, for every family; what is none of these is refused by name."""

import inspect
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

import nanotoolrl
from nanotoolrl.attention import causal, under_mask
from nanotoolrl.transformer import Architecture, Transformer

ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 = {"rope_parameters": ROPE | {"original_max_position_embeddings": 64, "rope_theta": 5000.0}}
LINEAR = {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}}
FAMILIES = {
    "llama": (LlamaConfig, {}),
    "llama, biased": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama, wide heads": (LlamaConfig, {"head_dim": 20}),
    "llama 3": (LlamaConfig, LLAMA3),
    "llama, linear rope": (LlamaConfig, LINEAR),
    "smollm": (LlamaConfig, {"num_attention_heads": 9, "num_key_value_heads": 3}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 16}),
    "qwen3, biased": (Qwen3Config, {"head_dim": 16, "attention_bias": True}),
}


def theirs(name, tied=False):
    """A transformers model of a family with random weights, norms and biases among them."""
    kind, changes = FAMILIES[name]
    settings = {
        "vocab_size": 211,
        "hidden_size": 72,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "pad_token_id": None,  # with one, transformers keeps its embedding from being trained
        "eos_token_id": 1,
        "bos_token_id": None,
        "tie_word_embeddings": tied,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**(settings | changes)), dtype=torch.float32).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:  # new ones are all 0 or all 1
                weight += 0.3 * torch.randn_like(weight)
    return model


def ours(model):
    made = Transformer(Architecture.of(model.config))
    made.load_state_dict(model.state_dict())
    return made


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_gradients_are_those_of_transformers(name, tied):
    model = theirs(name, tied)
    made = ours(model)
    assert (made.lm_head.weight is made.model.embed_tokens.weight) == tied
    names = [name for name, _ in made.named_parameters()]
    assert names == [name for name, _ in model.named_parameters()]  # an optimiser's state knows their order
    ids = torch.randint(211, (3, 200))
    expected, found = model(ids).logits, made.lm_head(made(ids))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    push = torch.randn_like(expected)
    for loss in ((expected * push).sum(), (found * push).sum()):
        loss.backward()
    for (name, one), other in zip(model.named_parameters(), made.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_token_sees_is_an_argument(name):
    """Two sequences in one row, neither of which sees the other, whose positions begin at 0 again."""
    made, lengths = ours(theirs(name)), [7, 12]
    ids = torch.randint(211, (1, 19))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    owner = torch.tensor([0] * 7 + [1] * 12)
    visible = (owner[:, None] == owner) & torch.ones(19, 19, dtype=torch.bool).tril()

    def attend(layer, query, key, value):
        return under_mask(query, key, value, visible)

    with torch.no_grad():
        packed = made(ids, positions, attend)[0].split(lengths)
        for part, alone in zip(packed, ids[0].split(lengths), strict=True):
            torch.testing.assert_close(part, made(alone[None])[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_checkpointing_changes_nothing_but_memory(name):
    made, ids, found = ours(theirs(name)), torch.randint(211, (2, 30)), []
    for made.checkpointing in (False, True):
        made.zero_grad()
        calls = []
        hidden = made(ids, attend=lambda *arguments, calls=calls: calls.append(0) or causal(*arguments))
        hidden.square().sum().backward()
        assert len(calls) == made.shape.layers * (1 + made.checkpointing)  # each is computed twice
        found.append(
            [hidden.detach(), *(weight.grad for weight in made.parameters() if weight.grad is not None)]
        )
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (CohereConfig(), "its architecture is 'cohere'; there is llama, mistral, qwen2, qwen3"),
        (GemmaConfig(), "its architecture is 'gemma'"),
        (Phi3Config(pad_token_id=0), "its architecture is 'phi3'"),
        (LlamaConfig(hidden_act="gelu"), "its activation is 'gelu'; there is silu"),
        (MistralConfig(sliding_window=64), "its attention has a sliding window"),
        (
            Qwen2Config(use_sliding_window=True, sliding_window=64, max_window_layers=1),
            "its attention has sliding_attention",
        ),
        (
            LlamaConfig(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
            "its rotary positions are 'dynamic'; there is default, linear, llama3",
        ),
        (
            LlamaConfig(rope_parameters={"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}),
            "its rotary positions are 'yarn'",
        ),
        (
            LlamaConfig(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
            "its rotary positions turn a part of each head only",
        ),
    ],
)
def test_what_is_not_ours_is_refused_by_name(config, said):
    with pytest.raises(ValueError, match=said):
        Architecture.of(config)


def test_the_package_stays_outside_of_transformers():
    """It uses the doors that transformers documents; two of the others broke within a week."""
    inside = "past_key_values _attn_implementation AttentionInterface DynamicCache gradient_checkpointing"
    for file in Path(inspect.getfile(nanotoolrl)).parent.rglob("*.py"):
        if "bench" not in file.name:
            text = file.read_text(encoding="utf-8")
            assert not [name for name in inside.split() if name in text], file


def test_half_precision_keeps_its_dtype():
    made = ours(theirs("qwen3")).to(torch.bfloat16)
    assert made(torch.randint(211, (2, 9))).dtype == torch.bfloat16
