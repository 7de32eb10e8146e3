import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.models import tiny_policy, whole_logits
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

from nanotoolrl.env import Episode
from nanotoolrl.loading import NANO, ModelError, load
from nanotoolrl.model import pad
from nanotoolrl.sampler import Sampler
from nanotoolrl.world.tasks import load_tasks

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tiny(policy):
    return tiny_policy(policy.tokenizer)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*arguments, **_):
        raise AssertionError(f"a connection was tried: {arguments}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize(
    "config_class, changes, said",
    [
        (MistralConfig, {"sliding_window": 64}, "its attention has a sliding window"),
        (
            Qwen2Config,
            {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1},
            "sliding_att",
        ),
        (
            LlamaConfig,
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            "are 'dynamic'",
        ),
        (CohereConfig, {"logit_scale": 0.5}, "its architecture is 'cohere'; there is llama"),
    ],
)
def test_models_that_would_be_wrong_are_refused(config_class, changes, said, policy, tmp_path):
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = config_class(vocab_size=len(policy.tokenizer), **small, **changes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    policy.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=said):
        load(tmp_path)


def test_a_model_that_comes_out_otherwise_is_refused(monkeypatch):
    """Whatever a config may say that is not known here: every loaded model is compared with transformers'."""
    monkeypatch.setattr("nanotoolrl.transformer.rotate", lambda x, turn: x)
    with pytest.raises(ModelError, match="its logits are not those of transformers"):
        load(NANO)


@pytest.mark.parametrize(
    "kind, advice",
    [
        (GatedRepoError, "The model is gated: accept its licence"),
        (RepositoryNotFoundError, "The hub knows no such model"),
        (LocalEntryNotFoundError, "run `hf download NAME --local-dir DIR`"),
    ],
)
def test_the_hubs_errors_say_what_to_do(kind, advice, monkeypatch):
    """transformers wraps them in an OSError of its own."""

    def refuse(*_, **__):
        raise OSError("some files are missing") from kind.__new__(kind)

    monkeypatch.setattr("nanotoolrl.model.AutoTokenizer.from_pretrained", refuse)
    with pytest.raises(ModelError, match="cannot load meta-llama/Llama-3.2-1B-Instruct") as error:
        load("meta-llama/Llama-3.2-1B-Instruct")
    assert advice in str(error.value)


def test_without_a_network_a_hub_name_is_explained():
    """In a process of its own: what transformers knows of the network it reads once."""
    code = "from nanotoolrl.loading import load; load('nobody/no-such-model')"
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=offline, cwd=ROOT)
    assert done.returncode == 1
    assert "cannot load nobody/no-such-model" in done.stderr and "hf download NAME" in done.stderr


@pytest.fixture
def checkpoint(tiny, tmp_path):
    tiny.save(tmp_path / "saved")
    return tmp_path / "saved"


# ------------------------------------------------------------------------------------------- load and save
@pytest.mark.parametrize("name", ["nothing", "no/such/parent", "a file", "empty"])
def test_no_model_there(name, tmp_path, no_network):
    (tmp_path / "a file").write_text("not a model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=re.escape(str(tmp_path / name))) as error:
        load(tmp_path / name)
    assert "expected a" in str(error.value)


def test_slip_in_a_relative_path(tmp_path, monkeypatch, no_network):
    """`data/nan0` could be a hub name; its parent is a directory here, so it is not asked for."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(ModelError, match="no model in data/nan0"):
        load("data/nan0")


def truncate_weights(path):
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


def drop_a_layer(path):
    tensors = load_file(path / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".layers.1." not in name}
    save_file(kept, path / "model.safetensors", metadata={"format": "pt"})


def other_width(path):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))


def no_chatml(path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).write_text((path / name).read_text().replace("<|im_start|>", "<|begin|>"))


DAMAGE = {
    "truncated weights": truncate_weights,
    "garbage weights": lambda path: (path / "model.safetensors").write_bytes(b"garbage" * 1000),
    "empty weights": lambda path: (path / "model.safetensors").write_bytes(b""),
    "no weights": lambda path: (path / "model.safetensors").unlink(),
    "weights of a layer missing": drop_a_layer,
    "weights of another shape": other_width,
    "broken config": lambda path: (path / "config.json").write_text("{"),
    "unknown architecture": lambda path: (path / "config.json").write_text('{"model_type": "nope"}'),
    "broken tokenizer": lambda path: (path / "tokenizer.json").write_text("{"),
    "tokenizer without ChatML": no_chatml,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint(damage, checkpoint, no_network):
    DAMAGE[damage](checkpoint)
    with pytest.raises(ModelError, match=re.escape(str(checkpoint))):
        load(checkpoint, device="cpu")


def test_saved_model_opens_with_transformers(tiny, tmp_path):
    tiny.save(tmp_path / "saved")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    ids = torch.randint(len(tiny.tokenizer), (2, 40))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, whole_logits(tiny, ids))
    text = "Hello <tool_call>\n{\"name\": 'é 12'}</tool_call><|im_end|>\n\U0001f600"
    assert tokenizer.encode(text) == tiny.tokenizer.encode(text)
    assert tokenizer.get_vocab() == tiny.tokenizer.get_vocab()
    assert tokenizer.chat_template == tiny.tokenizer.chat_template


def test_save_then_load(tiny, tmp_path):
    tiny.save(tmp_path / "saved")
    again = load(tmp_path / "saved", device="cpu")
    for (name, a), (other, b) in zip(
        tiny.model.state_dict().items(), again.model.state_dict().items(), strict=True
    ):
        assert name == other and a.dtype == b.dtype and torch.equal(a, b)
    assert again.chat.special_ids == tiny.chat.special_ids and again.chat.stop_ids == tiny.chat.stop_ids


def test_save_over_an_older_model(tiny, policy, tmp_path):
    tiny_policy(policy.tokenizer, seed=1).save(tmp_path / "saved")
    tiny.save(tmp_path / "saved")
    assert torch.equal(load(tmp_path / "saved", device="cpu").head, tiny.head)


def test_builtin_model(policy, tmp_path):
    """The built-in model survives a copy to another directory: nothing in it names its place."""
    policy.save(tmp_path / "saved")
    shutil.move(tmp_path / "saved", tmp_path / "moved")
    moved = load(tmp_path / "moved", device="cpu")
    assert torch.equal(moved.head, policy.head) and moved.context == policy.context
    assert policy.head.dtype == torch.float32 and policy.device == torch.device("cpu")


def test_dtype(checkpoint):
    half = load(checkpoint, device="cpu", dtype=torch.bfloat16)
    assert all(parameter.dtype == torch.bfloat16 for parameter in half.model.parameters())


# --------------------------------------------------------------------------------------------- log-probs
LENGTHS = (31, 7, 50, 2)


def ragged(tokenizer):
    """(ids [4, 50], mask [4, 50]) of rows of LENGTHS, padded with random ids, and random masks inside."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(len(tokenizer), (len(LENGTHS), max(LENGTHS)), generator=generator)
    mask = torch.rand(ids.shape, generator=generator) < 0.5
    mask[:, 0], mask[3, 1] = False, True
    for row, length in zip(mask, LENGTHS, strict=True):
        row[length:] = False
    return ids, mask


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_a_softmax_over_the_vocabulary(tiny, temperature):
    ids, mask = ragged(tiny.tokenizer)
    with torch.no_grad():
        logprobs, entropy = tiny.logprobs(ids, mask, temperature, want_entropy=True)
        plain = torch.log_softmax(whole_logits(tiny, ids) / temperature, -1)
    places = [(b, t) for b in range(len(ids)) for t in range(ids.shape[1]) if mask[b, t]]
    expected = [plain[b, t - 1, ids[b, t]].item() for b, t in places]
    entropies = [-(plain[b, t - 1].exp() * plain[b, t - 1]).sum().item() for b, t in places]
    assert logprobs.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-5)
    assert entropy.tolist() == pytest.approx(entropies, abs=1e-5)


@pytest.mark.parametrize("which", ["tiny", "policy"])
def test_padded_rows_equal_rows_alone(which, request):
    policy = request.getfixturevalue(which)
    ids, mask = ragged(policy.tokenizer)
    with torch.no_grad():
        together = policy.logprobs(ids, mask)[0]
        alone = [
            policy.logprobs(row[None, :length], keep[None, :length])[0]
            for row, keep, length in zip(ids, mask, LENGTHS, strict=True)
        ]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)


def test_padding_contents_do_not_matter(tiny):
    ids, mask = ragged(tiny.tokenizer)
    other = ids.clone()
    for row, length in zip(other, LENGTHS, strict=True):
        row[length:] = tiny.chat.end_id
    assert not torch.equal(ids, other)

    def result(rows):
        tiny.model.zero_grad()
        logprobs = tiny.logprobs(rows, mask)[0]
        logprobs.sum().backward()
        embedding = tiny.model.model.embed_tokens.weight
        return logprobs.detach(), tiny.head.grad.clone(), embedding.grad.clone()

    assert all(torch.equal(a, b) for a, b in zip(result(ids), result(other), strict=True))
    tiny.model.zero_grad()


def test_gradient_reaches_the_weights(tiny):
    ids, mask = ragged(tiny.tokenizer)
    parameters = list(tiny.model.parameters())
    ours = torch.autograd.grad(tiny.logprobs(ids, mask)[0].sum(), parameters)
    plain = torch.log_softmax(whole_logits(tiny, ids), -1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    expected = torch.autograd.grad(plain[mask[:, 1:]].sum(), parameters)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)


def test_hidden_states_of_rows_that_share_a_prompt(tiny):
    """Each row as if it stood alone, whatever its length; a row may train nothing, or its first token."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1400, (4, 30), generator=generator)
    ids[:, :11] = ids[0, :11]
    mask = torch.rand(4, 30, generator=generator) > 0.6
    mask[:, :11] = False
    mask[0, 11], mask[1, 20:], mask[2] = True, False, False
    together, alone = tiny.trained_hidden(ids, mask, 11), tiny.trained_hidden(ids, mask)
    assert len(together) == mask.sum()
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="mask"):
        tiny.trained_hidden(ids, mask, 12)


def test_nothing_to_score(tiny):
    ids, mask = ragged(tiny.tokenizer)
    logprobs, entropy = tiny.logprobs(ids, torch.zeros_like(mask), want_entropy=True)
    assert logprobs.shape == entropy.shape == (0,)
    assert tiny.logprobs(ids[:, :1], mask[:, :1])[0].shape == (0,)


def test_first_token_has_no_logprob(tiny):
    ids, mask = ragged(tiny.tokenizer)
    mask[2, 0] = True
    with pytest.raises(ValueError, match=r"mask\[:, 0\] must be False"):
        tiny.logprobs(ids, mask)


@pytest.mark.parametrize("shared", [0, 3])
def test_checkpointed_layers_give_the_same_loss_and_gradients(policy, shared):
    ids = torch.randint(len(policy.tokenizer), (2, 24))
    ids[1, :3] = ids[0, :3]
    mask = torch.zeros(2, 24, dtype=torch.bool)
    mask[:, 8:] = True
    found = []
    for again in (False, True):
        tiny = tiny_policy(policy.tokenizer, attention_dropout=0.1)  # here nothing is ever dropped
        tiny.model.checkpointing = again
        hidden = tiny.trained_hidden(ids, mask, shared)
        hidden.square().sum().backward()
        found.append([hidden.detach(), *(weight.grad for weight in tiny.model.parameters())])
    for before, after in zip(*found, strict=True):
        assert (before is None and after is None) or torch.equal(before, after)


def test_ids_beyond_the_tokenizer_are_never_chosen(policy):
    """Rows that fill an embedding up, here the likeliest of all: sampler and trainer share the known ids out
    among themselves, and what is saved keeps its rows."""
    wide = tiny_policy(policy.tokenizer, vocab_size=len(policy.tokenizer) + 271)
    with torch.no_grad():
        wide.model.lm_head.weight[len(policy.tokenizer) :] *= 100
    assert len(wide.head) == len(policy.tokenizer) < wide.model.shape.vocabulary
    rows = Sampler(wide, max_new_tokens=16).rollout([Episode(task) for task in load_tasks("test")[:4]])
    assert max(token for row in rows for token in row.tokens) < len(policy.tokenizer)
    for row in rows:
        ids, mask = pad([(row.tokens, row.loss_mask)], wide.device)
        sampled = torch.tensor(row.logprobs)[mask[0]]
        assert wide.logprobs(ids, mask)[0].sub(sampled).abs().max() < 2e-5
    wide.logprobs(ids, mask)[0].sum().backward()
    assert wide.model.lm_head.weight.grad.shape == (wide.model.shape.vocabulary, 32)
