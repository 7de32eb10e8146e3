"""The memory plan: by hand, beside what autograd keeps, and beside what gradient checkpointing saves."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from helpers.models import MODELS, policy_like
from transformers import Qwen2Config

from bench import memory as bench
from nanotoolrl.commandline import parse
from nanotoolrl.gpu.memory import available, describe, evaluation_slots, plan
from nanotoolrl.model import Policy
from nanotoolrl.run import first_model
from nanotoolrl.signals import SCHEMES
from nanotoolrl.transformer import Architecture, Transformer

GIB = 2**30
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def qwen():
    """Qwen2.5-0.5B in bf16, without its weights."""
    shape = dict(zip(bench.SHAPE, bench.REAL_MODELS["Qwen2.5-0.5B"][1:]))
    config = Qwen2Config(**shape, tie_word_embeddings=True, max_position_embeddings=32_768)
    with torch.device("meta"):
        return Transformer(Architecture.of(config)).to(torch.bfloat16)


def config_of(*flags):
    return parse(["--preset", "qwen0.5b", *flags])[0]


def test_plan_by_hand(qwen):
    """494,032,768 parameters; 24 layers x 2 key/value heads x 64 x 2 numbers x 2 bytes a cached token."""
    parts = plan(qwen, config_of("--scheme", "hint"))
    parameters = 494_032_768
    assert parts["weights"] == parts["reference"] == 2 * parameters
    assert parts["masters"] == parts["gradients"] == 4 * parameters
    assert parts["optimiser"] == 8 * parameters and "burst optimiser" not in parts
    assert parts["KV cache"] == 32 * 8192 * 24 * 2 * 64 * 2 * 2
    layer = 2 * 4 * 896 + 2 * 14 * 64 + 2 * 2 * 64 + 4 * 4864
    assert parts["activations"] == 16384 * (24 * 896 + layer + 4 * 896) * 2  # layers are computed again
    assert sum(parts.values()) / GIB == pytest.approx(14.51, abs=0.01)


@pytest.mark.parametrize(
    "flags, part, factor",
    [
        (["--kl", "0"], "reference", 0),
        (["--slots", "16"], "KV cache", 1 / 2),
        (["--slots", "9999"], "KV cache", 800 / 32),  # no more than the rollouts of an evaluation
        (["--slots", "9999", "--eval-samples", "0"], "KV cache", 480 / 32),  # ... of a step
        (["--context", "4096"], "KV cache", 1 / 2),
        (["--context", "99999"], "KV cache", 4),  # no longer than the model's own
        (["--tokens-at-once", "8192"], "activations", 1 / 2),
        (["--tokens-at-once", "2048"], "activations", 1 / 2),  # no less than one row
        (["--slots", "1"], "activations", 1),
    ],
)
def test_what_a_setting_changes(flags, part, factor, qwen):
    before, after = (plan(qwen, config_of("--scheme", "hint", *more)) for more in ([], flags))
    assert after.get(part, 0) == factor * before[part]


def test_bursts_have_an_optimiser_and_fp32_weights_no_masters(qwen):
    for scheme in ("ets", "sft_rl", "sentinel", "bursts"):
        parts = plan(qwen, config_of("--scheme", scheme), SCHEMES[scheme].memory)
        assert parts["burst optimiser"] == parts["optimiser"]
    parts = plan(qwen, config_of("--scheme", "guard-kl", "--kl", "0"), SCHEMES["guard-kl"].memory)
    assert parts["reference"] == parts["weights"] and "burst optimiser" not in parts
    assert "masters" not in plan(copy.deepcopy(qwen).to(torch.float32), config_of())


def kept_bytes(policy: Policy, forward: Callable[[], torch.Tensor]) -> int:
    """Memory that `forward` keeps for the backward pass, weights left out."""
    weights = {weight.untyped_storage().data_ptr() for weight in policy.model.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = tensor  # alive, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = forward()
    assert hidden.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_activations_are_what_autograd_keeps(name, dtype):
    policy, ids = policy_like(name), torch.randint(100, (8, 64))
    policy.model.to(dtype)
    config = config_of().but(tokens_at_once=ids.numel(), context=64, checkpointing=False)
    whole = kept_bytes(policy, lambda: policy.model(ids))
    assert plan(policy.model, config)["activations"] == pytest.approx(whole, rel=0.05)
    policy.model.checkpointing = True
    inputs = kept_bytes(policy, lambda: policy.model(ids))
    assert inputs < whole / 5
    less = plan(policy.model, config.but(checkpointing=True))["activations"]
    layers = policy.model.shape.layers
    assert less == pytest.approx(inputs + whole / layers, rel=0.05)  # one layer at a time is computed again


def test_activations_beside_adapters():
    """What is frozen keeps its inputs still, as they are those of the adapters; but no norm its output."""
    pytest.importorskip("peft", reason="adapters are those of the package peft")
    adapted = first_model(config_of("--model", "nano", "--lora", "2"), "fp32")
    ids = torch.randint(100, (8, 64))
    config = config_of("--lora", "2").but(tokens_at_once=ids.numel(), context=64, checkpointing=False)
    kept = kept_bytes(adapted, lambda: adapted.model(ids))
    assert plan(adapted.model, config)["activations"] == pytest.approx(kept, rel=0.05)


def test_describe():
    parts = {"weights": 1.0 * GIB, "KV cache": 3.0 * GIB, "reference": 0.5 * GIB}
    assert describe(parts, 8 * GIB) == (
        "memory plan: weights 1.0 + KV cache 3.0 + reference 0.5 = 4.5 of 8 GiB"
    )
    small = {"weights": 3.0 * 2**20, "head": 0.6 * 2**20}
    assert describe(small, 8 * GIB) == "memory plan: weights 3 + head 1 = 4 of 8192 MiB"
    line, advice = describe(parts, 4 * GIB).splitlines()
    assert line.endswith("= 4.5 of 4 GiB")
    said = "this will hardly fit; lower --slots or --context (KV cache); --kl 0 --guard-kl 0 (reference)"
    assert advice == said
    assert describe(parts, 4 * GIB, ["reference"]).endswith("lower --slots or --context (KV cache)")


def test_available():
    assert GIB < available(CPU) < 2**50


@pytest.mark.parametrize(
    ("group", "file", "limit", "expected"),
    [
        ("0::/a/b", "a/b/memory.max", "500000000", 5e8),
        ("0::/a/b", "a/memory.max", "500000000", 5e8),
        ("0::/a/b", "memory.max", "500000000", 5e8),
        ("0::/a/b", "a/b/memory.max", "max", math.inf),
        ("5:memory:/d", "memory/d/memory.limit_in_bytes", "500000000", 5e8),
        ("5:cpu,memory:/d", "cpu,memory/d/memory.limit_in_bytes", "500000000", 5e8),
        ("5:cpu:/d", "memory/d/memory.limit_in_bytes", "500000000", math.inf),
        ("5:memory:/d", "memory/d/memory.limit_in_bytes", "9223372036854771712", math.inf),
    ],
)
def test_main_memory_is_what_control_groups_allow(group, file, limit, expected, tmp_path):
    """Both versions, nested, without a limit."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"{group}\n")
    path = tmp_path / "sys/fs/cgroup" / file
    path.parent.mkdir(parents=True)
    path.write_text(f"{limit}\n")
    assert available(CPU, tmp_path) == min(expected, available(CPU, tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("memory", "context", "slots"),
    [(1e15, 2048, 128), (4 * GIB, 2048, 56), (4 * GIB, 4096, 28), (9, 2048, 1)],
)
def test_an_evaluation_has_as_many_slots_as_fit(memory, context, slots, qwen, monkeypatch):
    """A third of 4 GiB; 24 layers x 2 key/value heads x 64 x 2 numbers x 2 bytes a token are 24 MiB a row."""
    monkeypatch.setattr("nanotoolrl.gpu.memory.available", lambda device: memory)
    assert evaluation_slots(qwen, context, CPU) == slots


def test_every_fitting_line_fits():
    """Each cell of the table in docs/real-models.md is the first rung of the ladder that fits."""
    check_table(bench.memory_table(), bench.GPUS)


def test_every_fitting_line_with_adapters_fits():
    pytest.importorskip("peft", reason="adapters are those of the package peft")
    check_table(bench.memory_table(bench.RANK), bench.SMALL_GPUS)


def check_table(table, gpus):
    rows = [row.strip("| ").split(" | ") for row in table.splitlines()]
    assert len(rows) == 2 + 2 * len(bench.REAL_MODELS)
    for row in rows[2:]:
        for cell, size in zip(row[2:], gpus, strict=True):
            assert cell == "does not fit" or float(cell.split(", ")[1].split()[0]) <= bench.TAKEN * size + 0.5
