"""What the allocator does with freed memory, in a process of its own."""

import subprocess
import sys

import pytest

LAYERS = """
import resource
import {module}
import torch
from torch.nn.functional import conv2d, group_norm

torch.set_num_threads(1)
x, weight = torch.randn(64, 48, 32, 32), torch.randn(48, 48, 3, 3)
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        group_norm(conv2d(x, weight, padding=1).relu(), 48)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_the_pipeline_keeps_the_memory_that_it_frees():
    """In the second round few pages are asked from the system; without, those of every layer."""
    asked = [
        int(subprocess.check_output([sys.executable, "-c", LAYERS.format(module=module)]))
        for module in ("ld3m.pipeline", "ld3m")
    ]
    assert asked[0] < asked[1] / 5, asked
