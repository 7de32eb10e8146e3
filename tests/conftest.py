"""What all tests share."""

import os

import pytest
import torch
from hypothesis import settings

from nanotoolrl.model import NANO, Policy, load

torch.set_num_threads(2)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: its kernels run on the CPU
settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def policy() -> Policy:
    """The built-in model on the CPU. Tests must not change it."""
    return load(NANO, device="cpu")
