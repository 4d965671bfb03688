"""What the allocator does with freed memory, in a process of its own."""

import subprocess
import sys

import pytest

PAGES = """
import resource
import ld3m.{module}
import torch
faults = []
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        [torch.ones(2**22) for _ in range(3)]  # 16 MiB each
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(faults[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_the_pipeline_keeps_the_memory_that_it_frees():
    """The second time no page is asked from the system; without, all of every round."""
    asked = [
        int(subprocess.run([sys.executable, "-c", PAGES.format(module=module)], capture_output=True, check=True).stdout)
        for module in ("pipeline", "runtime")
    ]
    assert asked[0] < 1000 < 10_000 < asked[1]
