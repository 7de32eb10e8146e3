"""Adapters: what is trained, what is frozen, what is written; by hand and beside peft's own."""

import builtins
import copy
import json

import pytest
import torch
from helpers.runs import TINY
from helpers.updates import made_up, parameters_of, tasks
from transformers import AutoModelForCausalLM

from nanotoolrl import lora
from nanotoolrl.commandline import parse
from nanotoolrl.config import Config
from nanotoolrl.gpu.memory import plan
from nanotoolrl.loading import NANO, load
from nanotoolrl.run import Run, begin_anew, first_model, roll_back, rollout, snapshot
from nanotoolrl.signals import SCHEMES
from nanotoolrl.updates import policy_update, rescore
from train import main as train

IDS = torch.arange(3, 40)[None]
BEHIND = torch.ones_like(IDS, dtype=torch.bool).index_fill_(1, torch.tensor([0]), False)  # all but the first


@pytest.fixture(autouse=True)
def _peft():
    pytest.importorskip("peft", reason="adapters are those of the package peft")


def adapter_run(**settings) -> Run:
    """A run that trains adapters of rank 3 of the built-in model."""
    config = Config(scheme="grpo", prompts=2, group=4, updates=1, warmup=0, lr=1e-2, **{"lora": 3} | settings)
    return Run.begin(config, first_model(config, config.dtype))


def trained(run: Run) -> Run:
    """The same, after an update."""
    policy_update(run, *made_up(run.policy))
    return run


def logits(policy) -> torch.Tensor:
    with torch.no_grad():
        return policy.logits(policy.model(IDS)[0])


def test_before_training_it_is_the_model(policy):
    run = adapter_run()
    assert torch.equal(logits(run.policy), logits(policy)), "B is zero"
    assert {part.scaling[lora.NAME] for part in lora.adapted(run.policy.model).values()} == {lora.ALPHA / 3}
    matrices = [weight for name, weight in run.policy.model.named_parameters() if ".lora_A." in name]
    again = [w for name, w in adapter_run().policy.model.named_parameters() if ".lora_A." in name]
    other = [w for name, w in adapter_run(seed=1).policy.model.named_parameters() if ".lora_A." in name]
    assert all(map(torch.equal, matrices, again)) and not any(map(torch.equal, matrices, other))


def test_an_update_moves_adapters_alone(policy):
    run = trained(adapter_run())
    changed = policy.model.state_dict()
    for name, value in run.policy.model.state_dict().items():
        if ".lora_" not in name:
            assert torch.equal(value, changed[name.replace(".base_layer", "")]), name
    parts = lora.adapted(run.policy.model)
    assert len(parts) == 7 * policy.model.shape.layers
    assert all(part.lora_B[lora.NAME].weight.abs().sum() > 0 for part in parts.values())
    size = sum(3 * (part.in_features + part.out_features) for part in parts.values())
    assert sum(tensor.numel() for tensor in run.masters.tensors) == size
    assert (logits(run.policy) - logits(policy)).abs().max() > 0.1


def test_sampler_and_trainer_agree():
    run = trained(adapter_run())
    for row in rollout(run, tasks(2)):
        assert row.logprobs == pytest.approx(rescore(run.policy, row, 1.0), abs=1e-4)


def test_merged_is_the_sum_by_hand():
    run = trained(adapter_run())
    name, part = next(iter(lora.adapted(run.policy.model).items()))
    A, B = (matrix[lora.NAME].weight for matrix in (part.lora_A, part.lora_B))
    expected = part.get_base_layer().weight + 32 / 3 * (B @ A)
    found = lora.merged(run.policy.model)
    assert torch.allclose(found[f"{name}.weight"], expected, atol=1e-6)
    assert found.keys() == load("nano").model.state_dict().keys()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft's loading
def test_saved_models_are_the_policy(tmp_path, policy):
    """The merged model opens by itself, the adapter on its base in peft: both are the policy."""
    peft = pytest.importorskip("peft")
    run = trained(adapter_run())
    run.policy.save(tmp_path)
    expected = logits(run.policy)
    assert torch.allclose(logits(load(tmp_path)), expected, atol=1e-4)
    base = AutoModelForCausalLM.from_pretrained(NANO)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    with torch.no_grad():
        found = theirs(input_ids=IDS).logits[0, :, : policy.known_ids]
    assert torch.allclose(found, expected, atol=1e-4)
    described = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == "nano" and described["r"] == 3
    policy.save(tmp_path / "whole")
    assert not (tmp_path / "whole" / "adapter").exists()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_reference_is_the_policy_without_its_adapter(dtype, policy):
    """No second model is loaded; and looking at it changes neither the gradient nor what follows."""
    runs = [trained(adapter_run(dtype=dtype, kl=kl)) for kl in (0.0, 0.5)]
    for run in runs:
        start = first_model(run.config, dtype).logprobs(IDS, BEHIND)[0]
        now = run.policy.logprobs(IDS, BEHIND)[0]
        assert torch.equal(run.reference_logprobs(IDS, BEHIND), start)
        assert torch.equal(run.policy.logprobs(IDS, BEHIND)[0], now) and not torch.allclose(
            now, start, atol=1e-2
        )
        assert (now - start).abs().max() > 0.1 and "reference" not in vars(run)
        assert [p.requires_grad for p in run.policy.model.parameters()] == [
            ".lora_" in name for name, _ in run.policy.model.named_parameters()
        ]
    a, b = (parameters_of(run.policy) for run in runs)
    assert all(map(torch.equal, a, b)), "at the start k3 has no gradient"
    for run in runs:
        policy_update(run, *made_up(run.policy, seed=1))
    a, b = (parameters_of(run.policy) for run in runs)
    assert not all(map(torch.equal, a, b)), "then it has"


def test_kl_of_a_whole_model_and_of_an_adapter_are_one(policy):
    """The loss with a KL term is the one that a second model gives."""
    run = trained(adapter_run(kl=0.5))
    twin = copy.deepcopy(run.policy)
    second = Run.begin(run.config.but(), twin)
    second.state.reference = first_model(run.config, "fp32").model.state_dict()
    found = [policy_update(one, *made_up(one.policy, seed=1))["loss"] for one in (run, second)]
    assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_snapshots_restarts_and_rounded_copies():
    run = trained(adapter_run(kl=0.1, sampler_dtype="bf16"))
    saved, before = snapshot(run), [x.clone() for x in parameters_of(run.policy)]
    trained(run)
    roll_back(run, saved)
    assert all(map(torch.equal, parameters_of(run.policy), before))
    begin_anew(run)
    now = run.policy.logprobs(IDS, BEHIND)[0].detach()
    assert torch.allclose(run.reference_logprobs(IDS, BEHIND), now), "it pulls to the policy of the restart"
    rollout(run, tasks(1))
    rounded = run.sampler.policy.model.state_dict()
    assert all(torch.equal(rounded[k], v.bfloat16()) for k, v in run.policy.model.state_dict().items())


def test_the_memory_plan_counts_what_is_trained(policy):
    config, whole = (parse(["--kl", "0.1", *flags])[0] for flags in (["--lora", "3"], []))
    with_adapter = plan(first_model(config, "fp32").model, config)
    without = plan(policy.model, whole)
    parts = lora.adapted(adapter_run().policy.model).values()
    size = sum(3 * (part.in_features + part.out_features) for part in parts)
    assert with_adapter["optimiser"] == 8 * size and with_adapter["gradients"] == 4 * size
    assert with_adapter["weights"] == without["weights"] + 4 * size
    assert "reference" not in with_adapter and without["reference"] == without["weights"]
    adapted, needed = adapter_run().policy.model, SCHEMES["restart"].memory
    assert plan(adapted, config, needed)["reference"] == with_adapter["weights"], "a later model"
    assert "reference" not in plan(adapted, config.but(kl=0.0, guard_kl=0.0), needed)


@pytest.mark.slow
def test_a_run_with_adapters_goes_on(tmp_path, capsys):
    """Two steps, and one and one, are the same; each leaves a merged model and its adapter."""
    flags = f"{TINY} --scheme ets --lora 2 --lr 1e-3 --kl 0.01 --steps".split()
    assert train([*flags, "2", "--out", str(tmp_path / "whole")]) == 0
    assert train([*flags, "1", "--out", str(tmp_path / "parts")]) == 0
    assert train(["--resume", "--steps", "2", "--out", str(tmp_path / "parts")]) == 0
    read = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert read[0] == read[1]
    assert (tmp_path / "parts" / "model" / "adapter" / lora.FILE).is_file()


def test_without_the_package_it_is_refused(monkeypatch, tmp_path, capsys):
    found = builtins.__import__

    def absent(name, *rest, **named):
        if name == "peft":
            raise ImportError(name)
        return found(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", absent)
    assert train(["--preset", "smoke", "--lora", "2", "--out", str(tmp_path / "run")]) == 2
    assert lora.ABSENT in capsys.readouterr().err
