"""Models from files: a checkpoint directory, a run's, a hub's, or the built-in one.

transformers reads the files. The built-in model and a hub model take the same path.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from nanotoolrl.chat import LAYOUTS, Chat
from nanotoolrl.logprob import check_backend
from nanotoolrl.model import Policy, quiet

DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # by name
NANO = Path(__file__).resolve().parent.parent / "data" / "nano"
COLLAPSED = NANO.with_name("collapsed")  # nano at the fall of a run (docs/2-one-collapse.md)
BUILT_IN = "nano"
BY_NAME = {BUILT_IN: NANO, "collapsed": COLLAPSED}  # what `load` knows by name
BEGAN_FROM = {"collapsed": BUILT_IN}  # of these, what they were trained from

TEMPLATES = {BUILT_IN: NANO / "chat_template.jinja"}  # what a chat template may be by name

OFFLINE = (
    "There is no connection to the hub: run `hf download NAME --local-dir DIR` where there is, and give DIR."
)
HUB_ADVICE = {
    (
        "GatedRepoError",
    ): "The model is gated: accept its licence on its page and log in with `hf auth login`.",
    ("RepositoryNotFoundError",): "The hub knows no such model, or shows it to those who are logged in only.",
    ("OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectionError", "ConnectError"): OFFLINE,
}


class ModelError(Exception):
    """A model cannot be loaded; the text says which path or name, and what was expected."""


def load(
    name_or_dir: str | os.PathLike,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    chat_template: str = "auto",
    thinking: bool = False,
) -> Policy:
    """Load a checkpoint directory, a run directory (its model/), a hub name, or "nano", the built-in model,
    or "collapsed", what became of it.

    device: "cuda" where there is one, else "cpu". dtype: fp32 on the CPU, bf16 on a GPU that has it, else
    fp16. backend: of its log-probs; ValueError if it cannot run. chat_template: see `set_template`. thinking:
    see `Chat`. Raises ModelError, with the path or name and what was expected.
    """
    check_backend(backend)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if dtype is None:
        half = (
            torch.bfloat16 if device.startswith("cuda") and torch.cuda.is_bf16_supported() else torch.float16
        )
        dtype = half if device.startswith("cuda") else torch.float32
    with _checkpoint(name_or_dir) as name:
        tokenizer, used = tokenizer_of(name, chat_template)
        how: dict[str, Any] = {"dtype": dtype, "attn_implementation": "sdpa", "trust_remote_code": False}
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **how)
        foreign, info = loaded
        if info["missing_keys"]:
            raise ValueError(f"weights are missing: {', '.join(sorted(info['missing_keys'])[:3])}")
        if left_over := sorted(key for key in info["unexpected_keys"] if ".layers." in key):
            raise ValueError(f"there are weights of layers that its config does not have: {left_over[0]}")
        policy = Policy(foreign.to(device).eval(), tokenizer, backend, thinking)
        policy.template = used
        _refuse_what_is_different(policy, foreign)
        return policy


@torch.no_grad()
def _refuse_what_is_different(policy: Policy, foreign: "transformers.PreTrainedModel") -> None:
    """ValueError for a model whose logits are not finite, or not those that transformers makes of it."""
    rows = len(policy.model.lm_head.weight)
    if rows < policy.known_ids:
        raise ValueError(f"its tokenizer has {policy.known_ids} tokens, its embedding only {rows} rows")
    ids = some_ids(policy)
    expected = foreign(input_ids=ids, use_cache=False).logits.float()[..., : policy.known_ids]
    found = policy.logits(policy.model(ids)[0])
    if not finite_weights(policy.model):
        raise ValueError("its logits are not finite: the weights hold NaN or infinity")
    if not expected.isfinite().all():
        raise ValueError("its logits are not finite: the weights are too large")
    if (found - expected).abs().max() > 0.05 * expected.abs().max():
        raise ValueError("its logits are not those of transformers: its config has a setting unknown here")


def load_chat(name_or_dir: str | os.PathLike, chat_template: str = "auto") -> Chat:
    """The `Chat` of a model, without its weights. Raises ModelError like `load`."""
    with _checkpoint(name_or_dir) as name:
        return Chat(tokenizer_of(name, chat_template)[0])


def tokenizer_of(name: str, chat_template: str) -> tuple[Any, str]:
    """(the tokenizer of a checkpoint with the chat template it is to have, where that is from)."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    return tokenizer, set_template(tokenizer, chat_template)


def set_template(tokenizer: Any, choice: str) -> str:
    """Give a tokenizer the chat template it is to have, which is saved with it. Returns where that is from:
    "own", "nano" or a file.

    choice: "own"; "nano", the built-in model's, which lists tools and teaches no format; a file with one; or
    "auto": the tokenizer's own, but nano's where the layout is ChatML and its own lists no tools, or there is
    none. Whether a conversation can be laid out by it is seen by `Chat`. Raises ValueError for no file.
    """
    if choice == "auto":
        chat_ml = {LAYOUTS[0].begin, LAYOUTS[0].end} <= tokenizer.get_added_vocab().keys()
        choice = BUILT_IN if chat_ml and _knows_no_tools(tokenizer) else "own"
    if choice != "own":
        path = TEMPLATES.get(choice, Path(choice))
        if not path.is_file():
            raise ValueError(
                f"no chat template in {choice!r}: give auto, own, {', '.join(TEMPLATES)} or a file"
            )
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    return choice


def _knows_no_tools(tokenizer: Any) -> bool:
    """Whether a tokenizer has no chat template, or one that writes ChatML and lists no tools. One that is
    broken or writes something else is not replaced, but refused (by `Chat`)."""
    if not tokenizer.chat_template:
        return True
    said = [(role, f"{role} says") for role in ("system", "user", "assistant", "user")]
    try:
        written = tokenizer.apply_chat_template(
            [{"role": role, "content": text} for role, text in said], tokenize=False
        )
    except Exception:  # a template is a program that somebody wrote
        return False
    plain = written == "".join(LAYOUTS[0].message(role, text) for role, text in said)
    return plain and "tools" not in str(tokenizer.chat_template)


def finite_weights(model: torch.nn.Module) -> bool:
    """Whether no weight is NaN or infinite."""
    return bool(torch.stack([weight.isfinite().all() for weight in model.parameters()]).all())


@torch.no_grad()
def finite_logits(policy: Policy) -> bool:
    """Whether the model says anything: weights may be finite and too large to be multiplied."""
    return bool(policy.logits(policy.model(some_ids(policy))[0]).isfinite().all())


def some_ids(policy: Policy) -> torch.Tensor:
    """Any ids [1, 8], to see what a model makes of them."""
    return torch.arange(8, device=policy.device)[None]


@contextmanager
def _checkpoint(name_or_dir: str | os.PathLike) -> Iterator[str]:
    """Where transformers finds a model; quiet, and with whatever goes wrong turned into a ModelError."""
    name = os.fspath(BY_NAME.get(os.fspath(name_or_dir), name_or_dir))
    try:
        local = Path(name).exists() or Path(name).parent.is_dir()  # "data/nan0" is a slip, not a hub name
    except (OSError, ValueError) as error:
        raise ModelError(f"no model has the name {name[:80]!r}: {error}") from None
    if local and (Path(name) / "model" / "config.json").is_file():  # a run directory
        name = str(Path(name) / "model")
    elif (Path(name) / "metrics.csv").is_file():
        raise ModelError(f"{name} is a run that has left no model: it is going on, or was killed")
    if local and not (Path(name) / "config.json").is_file():
        raise ModelError(
            f"no model in {name}: expected a directory with config.json, weights and tokenizer files"
        )
    try:
        with quiet():
            yield name
    except Exception as error:  # files that others wrote: transformers may raise anything
        where = (
            "a readable checkpoint" if local else "a checkpoint directory here, or a model the hub gives you"
        )
        said = f"cannot load {name}: expected {where}. {type(error).__name__}: {error}"
        raise ModelError("\n".join(filter(None, [said, _advice(error)]))) from None


def _advice(error: BaseException | None) -> str:
    """What to do about an error of the hub, found anywhere in the chain of its causes; "" if nothing is."""
    while error is not None:
        for names, text in HUB_ADVICE.items():
            if type(error).__name__ in names:
                return text
        error = error.__cause__ or error.__context__
    return ""
