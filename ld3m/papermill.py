"""papermill as the stages of dvc.yaml run it: ended, it lets the notebook's step finish and its state be written.

    python -m ld3m.papermill NOTEBOOK OUTPUT ...    as python -m papermill

SIGTERM ends it as Ctrl-C does: papermill interrupts the kernel. Otherwise the kernel, whose parent is gone, would end
at once. And where papermill waits for five seconds until it kills the kernel, this waits for minutes; a second Ctrl-C
does not.
"""

import signal
import sys

sys.modules["rfc3987_syntax"] = None  # of jsonschema, for IRIs, which no notebook has: a grammar that takes two seconds

from jupyter_client.provisioning import LocalProvisioner  # noqa: E402
from papermill.cli import papermill  # noqa: E402

PATIENCE_SECONDS = 600


def _patience(self: LocalProvisioner, recommended: float = 5.0) -> float:
    return PATIENCE_SECONDS


if __name__ == "__main__":
    LocalProvisioner.get_shutdown_wait_time = _patience
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    papermill()
