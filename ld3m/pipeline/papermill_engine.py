"""papermill as the stages of dvc.yaml run it: ended, it lets the notebook's step finish and its state be written.

    python -m ld3m.pipeline.papermill_engine NOTEBOOK OUTPUT ...    as python -m papermill

SIGTERM ends it as Ctrl-C does: papermill interrupts the kernel. Otherwise the kernel, whose parent is gone, would end
at once. And where papermill waits for five seconds until it kills the kernel, this waits for minutes; a second Ctrl-C
does not. After the last cell there is nothing to wait for, and this kills the kernel: asked to end, one that has had
worker processes would first signal the two that look after their shared memory, which ignore it, for half a minute.
"""

import signal
import sys

sys.modules["rfc3987_syntax"] = None  # of jsonschema, for IRIs, which no notebook has: a grammar that takes two seconds
sys.modules["pyarrow"] = None  # for notebooks in Hadoop's file system

from jupyter_client.provisioning import LocalProvisioner  # noqa: E402
from papermill.cli import papermill  # noqa: E402
from papermill.clientwrap import PapermillNotebookClient  # noqa: E402

PATIENCE_SECONDS = 600


def _patience(self: LocalProvisioner, recommended: float = 5.0) -> float:
    return PATIENCE_SECONDS


def _execute_cells(self: PapermillNotebookClient, execute=PapermillNotebookClient.papermill_execute_cells) -> None:
    execute(self)
    self.shutdown_kernel = "immediate"


if __name__ == "__main__":
    PapermillNotebookClient.papermill_execute_cells = _execute_cells
    LocalProvisioner.get_shutdown_wait_time = _patience
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    papermill()
