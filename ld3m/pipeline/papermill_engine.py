"""Runs papermill with an engine that lets an interrupted notebook write its checkpoint, as dvc.yaml does.

    python -m ld3m.pipeline.papermill_engine NOTEBOOK OUTPUT ...    as python -m papermill

SIGTERM acts as Ctrl-C: papermill interrupts the kernel, which finishes its step, and waits for up to ten minutes. After
the last cell the kernel is killed: asked to exit, one that has had worker processes takes half a minute. A kernel that
the system kills is reported with the memory it used and the keys that lower it; plain papermill says only that it died.
"""

import signal
import sys
from pathlib import Path
from typing import Any

sys.modules["rfc3987_syntax"] = None  # an optional grammar of jsonschema: loading it takes two seconds
sys.modules["pyarrow"] = None  # for notebooks on Hadoop

from nbclient.exceptions import DeadKernelError  # noqa: E402
from papermill.cli import papermill  # noqa: E402
from papermill.clientwrap import PapermillNotebookClient  # noqa: E402
from papermill.engines import NBClientEngine, papermill_engines  # noqa: E402
from papermill.log import logger  # noqa: E402
from traitlets.config import Config  # noqa: E402

PATIENCE_SECONDS = 600.0


class Client(PapermillNotebookClient):
    def papermill_execute_cells(self) -> None:
        super().papermill_execute_cells()
        self.shutdown_kernel = "immediate"


class PatientEngine(NBClientEngine):
    @classmethod
    def execute_managed_notebook(
        cls, nb_man: Any, kernel_name: str, *, log_output: bool, start_timeout: int, **_: Any
    ) -> Any:
        patience = Config({"KernelManager": {"shutdown_wait_time": PATIENCE_SECONDS}})
        options = {"log": logger, "log_output": log_output, "startup_timeout": start_timeout, "timeout": None}
        try:
            return Client(nb_man, kernel_name=kernel_name, config=patience, **options).execute()
        except DeadKernelError as error:
            raise DeadKernelError(
                f"the kernel was killed, probably because memory ran out{_used()}. Lower in params.yaml `processes`, "
                "spaces.<space>.render_batch, objectives.<objective>.real_batch or evaluate.recipe.batch, whichever "
                "the stage uses; `python -m ld3m.pipeline.estimate` says what each stage needs"
            ) from error


def _used() -> str:
    try:
        import resource  # not on Windows
    except ImportError:
        return ""
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss  # of the processes that have ended
    return f" (its largest process used {largest / (2**30 if sys.platform == 'darwin' else 2**20):.1f} GiB)"


if __name__ == "__main__":
    papermill_engines.register(None, PatientEngine)  # None: the default of --engine
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for output in [argument for argument in sys.argv[1:] if argument.endswith(".ipynb")][1:2]:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
    papermill()
