"""Measures distillation at the size of the paper: one iteration with random weights of the size of `cin256-v2`.

    python -m benchmarks.full_size --device cuda --out costs.csv
    python -m benchmarks.full_size --device cpu --objectives mtt --steps 5 20 --out costs.csv
    python -m benchmarks.full_size --device cpu --smoke --out smoke.csv              # everything tiny

Ten classes, one image each, skip `x0` with guidance 3, ConvNet of width 128, 256 random real images of a class. On CUDA
U-Net and decoder are replayed as CUDA graphs (`--eager`: kernel by kernel). A row is written as soon as it is measured;
rows that the file has are not measured again. The paper reports 574 minutes and 29.4 GB for 20 steps on an A100-40GB.
"""

import argparse
import gc
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from ld3m.data.dataset import Normalization, Split
from ld3m.evaluation.experts import Experts
from ld3m.method.distill import Objective
from ld3m.method.objectives import OBJECTIVES
from ld3m.method.spaces import LatentCodes, start_latents
from ld3m.models.compvis import CIN256, Kind, build
from ld3m.models.diffusion_prior import Prior
from ld3m.models.networks import build as build_network
from ld3m.models.networks import flat_parameters
from ld3m.pipeline.estimate import clock
from ld3m.runtime.devices import describe
from ld3m.runtime.memory import forget_peak, is_out_of_memory, peak_gib
from ld3m.runtime.seeds import derive
from ld3m.runtime.storage import write_bytes, write_tensors

NORMALIZATION = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SLOW_S = 10.0  # iterations that take longer are timed once
KEYS = ("size_px", "steps", "ipc", "objective", "precision", "launch", "render_batch", "device", "torch")
FIELDS = (*KEYS, "ms_per_iteration", "timed_iterations", "peak_gib", "loss", "grad_norm_z", "grad_norm_c", "note")


@dataclass(frozen=True)
class Scale:
    """How large everything is: as in the paper, or tiny."""

    kind: Kind
    sizes_px: tuple[int, ...]
    steps: tuple[int, ...]
    classes: int
    real_batch: int  # images per class
    network_width: int


PAPER = Scale(CIN256, (128,), (20,), classes=10, real_batch=256, network_width=128)
SMOKE = Scale(
    replace(CIN256, unet_widths=(64, 64, 96, 128), autoencoder_widths=(32, 32, 32), codebook=16, classes=4),
    *((32,), (2,)),
    classes=3,
    real_batch=4,
    network_width=8,
)


def random_split(scale: Scale, size_px: int, device: torch.device) -> Split:
    """Draws as many random images of every class as a batch takes."""
    count = scale.classes * scale.real_batch
    draw = torch.Generator(device).manual_seed(derive(0, "benchmark", size_px))
    uint8 = torch.randint(256, (count, 3, size_px, size_px), dtype=torch.uint8, device=device, generator=draw)
    labels = torch.arange(scale.classes).repeat_interleave(scale.real_batch)
    return Split(uint8, labels, tuple(map(str, range(scale.classes))))


def start(split: Split, prior: Prior, *, ipc: int, steps: int, render_batch: int) -> LatentCodes:
    """Encodes the first images of every class."""
    index = torch.cat([split.of_class(label)[:ipc] for label in range(len(split.classes))])
    return start_latents(
        split.x(index),
        split.labels[index],
        prior=prior,
        normalization=NORMALIZATION,
        start="real",
        learn="auto",
        steps=steps,
        guidance=3.0,
        skip="x0",
        clamp="soft",
        noise="stored",
        encoder_input="x",
        shifted_normalization=False,
        render_batch=render_batch,
        uncheckpointed_steps=0,
        threads=1,
        seed=0,
    )


def matching(name: str, split: Split, scale: Scale, folder: Path) -> Objective:
    """Makes an objective; MTT takes ten student steps towards random snapshots, which are written to `folder`."""
    size = {"channels": 3, "size_px": split.shape[-1], "classes": scale.classes, "width": scale.network_width}
    new_network = partial(build_network, "convnet", **size, device=split.device)
    begin, rng = flat_parameters(new_network(seed=0)).cpu(), torch.Generator().manual_seed(0)
    snapshots = torch.stack([begin + 0.01 * k * torch.randn(begin.shape, generator=rng) for k in range(3)])
    write_tensors(folder / "expert-0000.safetensors", {"snapshots": snapshots}, {"expert": 0})
    student = {"student_steps": 10, "student_batch": None, "student_lr": 0.01, "first_order": False}
    return OBJECTIVES[name](
        split,
        normalization=NORMALIZATION,
        new_network=new_network,
        experts=lambda last_epoch: Experts((folder / "expert-0000.safetensors",)),
        strategy="color_crop_cutout_flip_scale_rotate",
        threads=1,
        seed=0,
        **student | {"expert_epochs": 2, "max_start_epoch": 1} if name == "mtt" else {"real_batch": scale.real_batch},
    )


def iterate(codes: LatentCodes, objective: Objective) -> float:
    """Does one iteration as `ld3m.method.distill`, without the step; returns the loss."""
    for tensor in codes.learnables.values():
        tensor.grad = None
    images = codes.render(step=0)
    loss, gradient = objective(images.detach(), codes.labels, step=0)
    images.backward(gradient)
    return loss


def measure(case: dict[str, Any], split: Split, prior: Prior, scale: Scale) -> dict[str, Any]:
    """Times an iteration, the median after a first one, and takes its peak memory and its gradients' norms."""
    gc.collect()
    if case["precision"] == "bfloat16":
        prior = replace(prior, precision=torch.bfloat16)  # also where a CPU has no instructions for it
    if case["launch"] == "replayed":
        prior = prior.with_cuda_graphs()  # of these shapes alone
    forget_peak()
    with tempfile.TemporaryDirectory() as folder:
        codes = start(split, prior, ipc=case["ipc"], steps=case["steps"], render_batch=case["render_batch"])
        objective, losses = matching(case["objective"], split, scale, Path(folder)), []
        once: Callable[[], None] = lambda: losses.append(iterate(codes, objective))  # noqa: E731
        first = clock(once)
        times = [clock(once) for _ in range(3 if first < SLOW_S else 0)]
    norms = {f"grad_norm_{name}": codes.learnables[name].grad.norm().item() for name in ("z", "c")}
    milliseconds = 1000 * statistics.median(times or [first])
    found = {"ms_per_iteration": milliseconds, "timed_iterations": max(1, len(times)), "peak_gib": peak_gib()}
    return found | {"loss": losses[0]} | norms


def read(file: Path) -> pd.DataFrame:
    return pd.read_csv(file, dtype=str) if file.exists() else pd.DataFrame(columns=FIELDS)


def add(file: Path, row: dict[str, Any]) -> None:
    shown = {key: f"{value:.4g}" if isinstance(value, float) else str(value) for key, value in row.items()}
    table = pd.concat([read(file), pd.DataFrame([shown])])[list(FIELDS)]
    write_bytes(file, table.to_csv(index=False).encode())
    print(" ".join(f"{key} {value}" for key, value in shown.items()), flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--out", type=Path, required=True, help="a CSV file, which is added to")
    parser.add_argument("--smoke", action="store_true", help="everything tiny")
    parser.add_argument("--sizes-px", type=int, nargs="+", help="128")
    parser.add_argument("--steps", type=int, nargs="+", help="of the reverse process: 20")
    parser.add_argument("--ipc", type=int, nargs="+", default=[1], help="images per class: 1")
    parser.add_argument("--objectives", nargs="+", choices=list(OBJECTIVES), default=list(OBJECTIVES))
    parser.add_argument("--precisions", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16"])
    parser.add_argument("--render-batch", type=int, help="images through the U-Net at once: all")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    given = parser.parse_args(arguments)
    scale, device = SMOKE if given.smoke else PAPER, torch.device(given.device)
    same = {"launch": "replayed" if given.device == "cuda" and not given.eager else "eager"}
    same |= {"device": describe(given.device, threads=torch.get_num_threads()), "torch": torch.__version__}
    prior = build(scale.kind, seed=0).to(device)
    sizes = given.sizes_px or scale.sizes_px
    for size_px, steps, ipc, *names in product(
        sizes, given.steps or scale.steps, given.ipc, given.objectives, given.precisions
    ):
        case = {"size_px": size_px, "steps": steps, "ipc": ipc} | dict(zip(("objective", "precision"), names)) | same  # noqa: B905
        case["render_batch"] = given.render_batch or scale.classes * ipc
        if (read(given.out)[list(KEYS)] == [str(case[key]) for key in KEYS]).all(axis=1).any():
            continue
        try:
            found = measure(case, random_split(scale, size_px, device), prior, scale)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            found = {"note": "out of memory: lower --render-batch"}
        add(given.out, case | found)


if __name__ == "__main__":
    main()
