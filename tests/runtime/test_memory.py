"""What is kept of freed memory must not pile up."""

import subprocess
import sys

import pytest

# Batches of logits, of each of which a small figure is kept, as an evaluation does after a walk.
BATCHES = """
import torch
from barber.runtime.memory import keep_freed_memory

def resident():
    status = open("/proc/self/status").read()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024

keep_freed_memory()
figures, size = [], 64
for batch in range(12):
    logits = torch.full((size, 2**18), float(batch))
    figures.append(logits[0, :8].clone() + logits.mean())
    if batch == 1:
        before = resident()
print(resident() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is kept on Linux only")
def test_large_tensors_of_one_size_do_not_take_new_memory_every_time() -> None:
    found = subprocess.run([sys.executable, "-c", BATCHES], capture_output=True, text=True, check=True)
    assert float(found.stdout) < 2 * 64  # MiB, of 10 batches of 64
