"""Settings of the whole suite."""

import os

import torch

# The models are tiny and pytest-xdist runs a process a core: more threads would only be in each other's way.
torch.set_num_threads(1)
# No test may wait for a network that is not there.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
