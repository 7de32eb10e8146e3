"""What all tests share."""

import os
from collections.abc import Iterator
from pathlib import Path

# Before torch, for the tests and for the commands that they start: most are small, a second thread would wait
# more than it works, and one that spins beside other tests makes both crawl.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: its kernels run on the CPU

import pytest  # noqa: E402

pytest.register_assert_rewrite("helpers")  # before anything imports it: its assertions say what failed

from helpers import runs  # noqa: E402
from helpers.models import tiny_policy  # noqa: E402
from hypothesis import settings  # noqa: E402

from nanotoolrl.env import Task  # noqa: E402
from nanotoolrl.loading import NANO, load  # noqa: E402
from nanotoolrl.model import Policy  # noqa: E402
from nanotoolrl.world.api import API_CLASSES, owner_of, schema  # noqa: E402
from nanotoolrl.world.goals import DOMAINS  # noqa: E402
from nanotoolrl.world.tasks import SPLITS, load_tasks  # noqa: E402

settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
settings.load_profile("untimed")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Each process gets tests that stand side by side, so that it makes few fixtures that another made."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log) if config.getoption("dist") == "load" else None


@pytest.fixture(scope="session")
def policy() -> Policy:
    """The built-in model on the CPU. Tests must not change it."""
    return load(NANO, device="cpu")


@pytest.fixture
def tiny(policy) -> Policy:
    """A small random policy of the test's own."""
    return tiny_policy(policy.tokenizer)


@pytest.fixture(scope="session")
def splits() -> dict[str, list[Task]]:
    """The committed tasks. Tests must not change them."""
    return {split: load_tasks(split) for split in SPLITS}


@pytest.fixture(scope="session")
def train(splits) -> list[Task]:
    """The committed training tasks. Tests must not change them."""
    return splits["train"]


@pytest.fixture(scope="session")
def four(tmp_path_factory) -> Path:
    """A run of four steps, the yardstick of the resume tests. Tests must not change it."""
    out = tmp_path_factory.mktemp("four") / "run"
    assert runs.run("--scheme", "hint", "--steps", 4, out=out) == 0
    assert all(int(row["contrast_groups"]) for row in runs.rows(out)), "a step teaches nothing"
    return out


@pytest.fixture
def classes() -> Iterator[None]:
    """API classes that a test defines are forgotten after it."""
    before = [(table, dict(table)) for table in (API_CLASSES, DOMAINS)]
    yield
    for table, rows in before:
        table.clear()
        table.update(rows)
    owner_of.cache_clear()
    schema.cache_clear()
