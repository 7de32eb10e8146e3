# ruff: noqa: E501 (templates have long lines)
"""What several test files use: stand-ins for real models, tiny policies, scripted ones, child processes.

A stand-in has the layout of conversations of a real model and tiny random weights. Its chat template is
written here; what it writes is what that of the real checkpoint writes, down to the blanks. `python -m pytest
-m hub` compares with the real files, where they are in the local cache.
"""

import copy
import json
import math
from types import SimpleNamespace

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen3Config

from nanotoolrl.loading import NANO, load
from nanotoolrl.model import Policy

_TOOLS = """\
{%- macro tool_list() -%}
{{ '# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\nYou are provided with '
~ 'function signatures within <tools></tools> XML tags:\\n<tools>' }}
{%- for tool in tools %}{{ '\\n' ~ (tool | tojson) }}{% endfor %}
{{- '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within '
~ '<tool_call></tool_call> XML tags:\\n<tool_call>\\n{"name": <function-name>, "arguments": '
~ '<args-json-object>}\\n</tool_call>' }}
{%- endmacro -%}
{%- macro result(message, before, after) -%}
{%- if not before or before.role != 'tool' %}{{ '<|im_start|>user' }}{% endif -%}
{{ '\\n<tool_response>\\n' ~ message.content ~ '\\n</tool_response>' }}
{%- if not after or after.role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif -%}
{%- endmacro -%}
"""

QWEN25 = (
    _TOOLS
    + """\
{%- set asked = messages[0].content if messages[0].role == 'system' else 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' -%}
{{ '<|im_start|>system\\n' ~ asked ~ ('\\n\\n' ~ tool_list() if tools else '') ~ '<|im_end|>\\n' }}
{%- for message in messages -%}
{%- if message.role == 'user' or (message.role == 'system' and not loop.first) or (message.role == 'assistant' and not message.tool_calls) -%}
{{ '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' }}
{%- elif message.role == 'assistant' -%}
{{ '<|im_start|>assistant' ~ ('\\n' ~ message.content if message.content else '') }}
{%- for one in message.tool_calls -%}
{{ '\\n<tool_call>\\n{"name": "' ~ one.function.name ~ '", "arguments": ' ~ (one.function.arguments | tojson) ~ '}\\n</tool_call>' }}
{%- endfor -%}
{{ '<|im_end|>\\n' }}
{%- elif message.role == 'tool' -%}
{{ result(message, loop.previtem, loop.nextitem) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
"""
)

# A message after the last question keeps its thoughts; older ones lose them.
QWEN3 = (
    _TOOLS
    + """\
{%- set asked = messages[0].content if messages[0].role == 'system' else '' -%}
{%- if tools -%}
{{ '<|im_start|>system\\n' ~ (asked ~ '\\n\\n' if asked else '') ~ tool_list() ~ '<|im_end|>\\n' }}
{%- elif asked -%}
{{ '<|im_start|>system\\n' ~ asked ~ '<|im_end|>\\n' }}
{%- endif -%}
{%- set last = namespace(question=messages | length - 1) -%}
{%- for message in messages if message.role == 'user' and not message.content.startswith('<tool_response>') -%}
{%- set last.question = messages.index(message) -%}
{%- endfor -%}
{%- for message in messages -%}
{%- if message.role == 'user' or (message.role == 'system' and not loop.first) -%}
{{ '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' }}
{%- elif message.role == 'assistant' -%}
{%- set said = message.content.split('</think>')[-1].lstrip('\\n') if '</think>' in message.content else message.content -%}
{{ '<|im_start|>assistant\\n' ~ ('<think>\\n\\n</think>\\n\\n' if loop.index0 > last.question and loop.last) ~ said }}
{%- for one in message.tool_calls or [] -%}
{{ ('\\n' if said or not loop.first) ~ '<tool_call>\\n{"name": "' ~ one.function.name ~ '", "arguments": ' ~ (one.function.arguments | tojson) ~ '}\\n</tool_call>' }}
{%- endfor -%}
{{ '<|im_end|>\\n' }}
{%- elif message.role == 'tool' -%}
{{ result(message, loop.previtem, loop.nextitem) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' ~ ('<think>\\n\\n</think>\\n\\n' if enable_thinking is defined and not enable_thinking) }}
{%- endif -%}
"""
)

LLAMA3 = """\
{{- bos_token ~ '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{%- if tools %}{{ 'Environment: ipython\\n' }}{% endif -%}
{{ 'Cutting Knowledge Date: December 2023\\nToday Date: ' ~ (date_string or '26 Jul 2024') ~ '\\n\\n' }}
{%- if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% endif -%}
{{ '<|eot_id|>' }}
{%- for message in (messages[1:] if messages[0].role == 'system' else messages) -%}
{%- if message.role in ('tool', 'ipython') -%}
{{ '<|start_header_id|>ipython<|end_header_id|>\\n\\n' ~ (message.content | tojson) ~ '<|eot_id|>' }}
{%- else -%}
{{ '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\\n\\n' ~ (message.content | trim) ~ '<|eot_id|>' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif -%}
"""

# What the built-in tokenizer's control tokens are called in Llama 3's.
_RENAMED = {
    "<|im_start|>": "<|start_header_id|>",
    "<|im_end|>": "<|eot_id|>",
    "<|endoftext|>": "<|end_of_text|>",
    "<tool_call>": "<|end_header_id|>",
    "</tool_call>": "<|begin_of_text|>",
    "<tool_response>": "<|eom_id|>",
    "</tool_response>": "<|python_tag|>",
}
MODELS = ("qwen2.5", "qwen3", "llama3")


def tokenizer_like(name: str) -> PreTrainedTokenizerFast:
    """The built-in tokenizer with the control tokens and the chat template of a real model."""
    tokenizer = copy.deepcopy(load(NANO, device="cpu").tokenizer)
    if name == "llama3":
        text = (NANO / "tokenizer.json").read_text(encoding="utf-8")
        for old, new in _RENAMED.items():
            text = text.replace(json.dumps(old), json.dumps(new))
        ends = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|end_of_text|>"}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text), **ends)
    if name == "qwen3":
        tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = {"qwen2.5": QWEN25, "qwen3": QWEN3, "llama3": LLAMA3}[name]
    return tokenizer


def whole_logits(policy: Policy, ids: Tensor) -> Tensor:
    """Logits [B, T, V] of `ids` [B, T], the plain way."""
    return policy.model.lm_head(policy.model(ids))


def policy_like(name: str) -> Policy:
    """Two layers of random weights in the architecture of a real model, with its layout."""
    tokenizer = tokenizer_like(name)
    config = {"qwen2.5": Qwen2Config, "qwen3": Qwen3Config, "llama3": LlamaConfig}[name](
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    return Policy(model.eval(), tokenizer)


def tiny_policy(tokenizer, seed=0, config_class=LlamaConfig, stop=0.1, close=0.05, **changes):
    """A random policy (2 layers, width 32). It writes one token in 20 of the vocabulary, ends messages with a
    probability of about `stop` per token and writes `</tool_call>` with about `close`, so that its episodes
    have several messages and observations."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 2048,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = config_class(**(settings | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()
    policy = Policy(model, tokenizer)
    with torch.no_grad():
        # Dimension 0 of the hidden state is always positive ...
        policy.model.model.embed_tokens.weight[:, 0] = 4
        for layer in policy.model.model.layers:
            layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0
        policy.head[torch.arange(len(tokenizer)) % 20 > 0, 0] = -20  # ... so that the head can lean on it
        hidden = policy.model(torch.randint(len(tokenizer), (1, 300)))[0]
        total = (hidden @ policy.head.T).logsumexp(-1).mean()
        for name, chance in (("<|im_end|>", stop), ("</tool_call>", close)):
            row = policy.head[policy.chat.special_ids[name]]
            row.zero_()[0] = (total + math.log(chance)) / hidden[:, 0].mean()
    return policy


class Script:
    """Stands in for a policy: after position t of a row comes `ids[t + 1]`, for certain. It looks at what it
    is fed."""

    def __init__(self, policy: Policy, ids: list[int], context: int = 2048) -> None:
        self.chat, self.device, self.context, self.dtype = policy.chat, policy.device, context, policy.dtype
        self.head, self.ids = torch.eye(len(policy.tokenizer)), torch.tensor([*ids, 0])
        self.model = ScriptedModel(self)

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden


class ScriptedModel:
    """The forward of a `Script`."""

    shape = SimpleNamespace(layers=0, kv_heads=0, head_width=0)

    def __init__(self, script: Script) -> None:
        self.script = script

    def __call__(self, ids: Tensor, positions: Tensor, attend: object) -> Tensor:
        script = self.script.ids
        places = positions.clamp(max=len(script) - 2)
        assert (ids == script[places])[positions < len(script)].all(), "not the script's ids"
        return 1000.0 * self.script.head[script[places + 1]]  # logits of what comes next
