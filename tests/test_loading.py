"""Models from directories: loaded, saved, and refused by name where they are not what they should be."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from helpers.models import tiny_policy, whole_logits
from helpers.runs import ROOT, run
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

import sample
from nanotoolrl import evaluate
from nanotoolrl.loading import COLLAPSED, NANO, ModelError, load, load_chat, set_template, tokenizer_of


@pytest.fixture(scope="module")
def tiny(policy):
    return tiny_policy(policy.tokenizer)


def test_the_collapsed_model_is_the_one_of_the_page(capsys):
    """By its name, and small; it plays what the model of the run's fall played, from which it was rounded."""
    assert sum(path.stat().st_size for path in COLLAPSED.iterdir()) <= 4e6
    assert sample.main(["--model", "collapsed", "--task", "test-005-base"]) == 0
    expected = ROOT / "data" / "results" / "spike" / "step-14.txt"
    assert capsys.readouterr().out == expected.read_text(encoding="utf-8")


@pytest.mark.slow
def test_no_network_is_needed():
    """The default model is a directory of the repository; loading it asks no hub."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    code = "from nanotoolrl.loading import NANO, load; load(NANO, device='cpu')"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=120)


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

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", refuse)
    with pytest.raises(ModelError, match="cannot load meta-llama/Llama-3.2-1B-Instruct") as error:
        load("meta-llama/Llama-3.2-1B-Instruct")
    assert advice in str(error.value)


@pytest.mark.slow
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


# A chat template as many models have it: ChatML, and nothing of tools.
WITHOUT_TOOLS = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.fixture
def stranger(tmp_path):
    """A chat model that knows no tools: its template lists none, and its tokenizer has no tokens of calls."""
    text = (NANO / "tokenizer.json").read_text(encoding="utf-8")
    for i, name in enumerate(("tool_call>", "/tool_call>", "tool_response>", "/tool_response>")):
        text = text.replace(json.dumps(f"<{name}"), json.dumps(f"<|extra_{i}|>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text), eos_token="<|im_end|>")
    tokenizer.chat_template = WITHOUT_TOOLS
    made = tiny_policy(tokenizer_of(str(NANO), "own")[0])  # its weights; the vocabulary is as large
    made.save(tmp_path / "stranger")
    tokenizer.save_pretrained(tmp_path / "stranger")
    return tmp_path / "stranger"


def test_where_a_template_lists_no_tools_ours_takes_its_place(stranger, tmp_path):
    loaded = load(stranger, device="cpu")
    assert loaded.template == "nano" and "<tool_call>" not in loaded.chat.special_ids
    prompt = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    tools = [{"name": "look", "description": "Look.", "parameters": {"properties": {}}}]
    assert "look(): Look." in loaded.chat.decode(loaded.chat.prompt_ids(prompt, tools, "hermes"))
    loaded.save(tmp_path / "again")
    again = load(tmp_path / "again", device="cpu")
    assert again.template == "own" and again.tokenizer.chat_template == loaded.tokenizer.chat_template
    with pytest.raises(ModelError, match="--chat-template takes another"):
        load(stranger, device="cpu", chat_template="own")


def test_the_chat_template_can_be_chosen(stranger, tmp_path):
    own = tokenizer_of(str(NANO), "own")[0]
    assert set_template(own, "auto") == "own"
    own.chat_template = None
    assert set_template(own, "auto") == "nano" and "# Tools" in own.chat_template
    file = tmp_path / "mine.jinja"
    file.write_text((NANO / "chat_template.jinja").read_text().replace("# Tools", "# What you can call"))
    assert load(stranger, device="cpu", chat_template=str(file)).template == str(file)
    assert load_chat(stranger, str(file)).tokenizer.chat_template == file.read_text()
    with pytest.raises(ModelError, match="no chat template in 'qwen': give auto, own, nano or a file"):
        load(stranger, device="cpu", chat_template="qwen")


@pytest.mark.slow
def test_a_model_that_knows_no_tools_is_trained(stranger, tmp_path, capsys):
    """Where the tag of a call is several tokens: rollouts, updates, probes, a checkpoint; all of it says so
    once, and goes on with the same template."""
    flags = ("--scheme", "ets", "--model", stranger, "--max-new-tokens", "40", "--eval-count", "2")
    assert run(*flags, "--steps", "1", out=tmp_path / "run") == 0
    assert capsys.readouterr().out.count("chat template: nano, in place of the model's own") == 1
    assert run(*flags, "--steps", "2", "--resume", out=tmp_path / "run") == 0
    assert load(tmp_path / "run", device="cpu").template == "own"
    assert evaluate.main(["--model", str(tmp_path / "run"), "--count", "2", "--force-prefix"]) == 0
