"""What runs on a GPU makes its tensors there: shown on a machine that has none (helpers/devices.py)."""

import pytest
import torch
from helpers.devices import two_devices
from helpers.models import tiny_policy
from helpers.runs import run
from helpers.updates import made_up, make_run

from nanotoolrl.decode import Decoder
from nanotoolrl.env import Episode
from nanotoolrl.look.swap import swapped
from nanotoolrl.sampler import Sampler
from nanotoolrl.updates import policy_update
from nanotoolrl.world.tasks import load_tasks


def test_two_devices():
    with two_devices():
        host, there = torch.zeros(3), torch.zeros(3, device="cpu")
        with pytest.raises(RuntimeError, match="add: its tensors are on two devices"):
            host + there
        with pytest.raises(RuntimeError, match="two devices"):
            torch.cat([there, host + 1])
        assert (host.to("cpu") + there + host.to(there) + torch.tensor(1.0)).tolist() == [1.0] * 3
        with pytest.raises(RuntimeError, match="two devices"):
            there + host.to(torch.float64)
        assert there[torch.arange(2)].shape == (2,)


def test_rollouts(tiny, policy):
    """Two rows of each prompt, of one policy and of two that write one message, without Triton."""
    episodes = [task for task in load_tasks("train")[:4] for _ in range(2)]
    sampler = Sampler(tiny, max_new_tokens=12)
    sampler.decoder = Decoder(tiny, 0, fast=False)
    with two_devices():
        for one in (sampler, swapped(sampler, tiny, policy, "hermes")):
            assert all(row.sampled_tokens for row in one.rollout([Episode(task) for task in episodes]))


@pytest.mark.parametrize(
    "settings",
    [
        {"kl": 0.1, "guard_kl": 1.0, "guard": 0.5, "gtpo": 1.0, "updates": 2},
        {"loss": "gspo", "spare_passed": 1.0, "rare": 0.3, "silence": 0.01, "filter": 0.5},
        {"loss": "cispo", "record": "text", "mask_overlong": True, "entropy": 0.01, "loss_agg": "sequence"},
    ],
    ids=lambda settings: settings.get("loss", "ppo"),
)
def test_updates(policy, settings):
    tiny = tiny_policy(policy.tokenizer)
    rows, advantages = made_up(tiny)
    prepared = make_run(tiny, **settings)
    with two_devices():
        assert policy_update(prepared, rows, advantages)["grad_norm"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["prs", "ops", "selfdistil", "sft", "llds", "sentinel", "chord"])
def test_runs(scheme, tmp_path):
    """Whole ones, with their probes, evaluations and what they save."""
    with two_devices():
        assert run("--scheme", scheme, "--steps", 1, "--updates", 2, out=tmp_path / "run") == 0
