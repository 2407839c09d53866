"""Settings of the whole suite."""

import os
from importlib.util import find_spec

import pytest
import torch

# Before anything imports Triton: where there is no GPU its interpreter runs the kernel.
if find_spec("triton") is not None and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The models are tiny and pytest-xdist runs a process a core: more threads would only be in each other's way.
torch.set_num_threads(1)
# No test may wait for a network that is not there.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session", autouse=True)
def cache_of_their_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What earlier runs kept must not answer for the code of today, nor the tests fill the user's cache."""
    os.environ["BARBER_CACHE"] = str(tmp_path_factory.mktemp("cache"))
