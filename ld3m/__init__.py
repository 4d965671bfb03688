"""Latent Dataset Distillation with Diffusion Models."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

# Nothing is reported to anybody; read when huggingface_hub and datasets are imported, which is later.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")

if TYPE_CHECKING:
    from torch import Tensor

__version__ = "0.1.0"


def load(path: str | Path) -> "tuple[Tensor, Tensor]":
    """Load a distilled set from its folder.

    Returns
    -------
    tuple of Tensor
        Images (N, C, H, W), normalized as the card says, and labels (N,).

    Raises
    ------
    FileNotFoundError, ValueError
        Where there is no set, or where it is broken or is not what was written.
    """
    from ld3m.evaluation.artefact import read_artefact  # here, so that `import ld3m` takes no time

    tensors, _ = read_artefact(Path(path))
    return tensors["images"], tensors["labels"]
