"""What all tests share."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: its kernels run on the CPU

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

from nanotoolrl.model import NANO, Policy, load  # noqa: E402

torch.set_num_threads(1)  # most tests are small: a second thread would wait more than it works
settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def policy() -> Policy:
    """The built-in model on the CPU. Tests must not change it."""
    return load(NANO, device="cpu")
