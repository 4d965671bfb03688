"""What distilling costs at the size of the paper: one iteration with random weights of the size of `cin256-v2`.

    python -m benchmarks.full_size --device cuda --minutes 8 --out benchmarks/full_size_cuda.csv
    python -m benchmarks.full_size --device cpu --proof --out benchmarks/full_size_cpu.csv
    python -m benchmarks.full_size --device cpu --smoke --minutes 2 --out smoke.csv      # everything tiny

The cost: ten classes, LD3M's skip `x0` with guidance 3, ConvNet of width 128, 256 real images (random ones) of a class,
in fp32 (PyTorch's default: on CUDA its convolutions are in TF32) and in bf16 (autocast around the U-Net and the decoder
alone). Rows are written as soon as they are measured, those in the file already are left out, and the whole ends before
`--minutes` are over: call it again for the rest. Where memory runs out the row says so, and half as many images are
rendered at once. The paper reports 574 minutes and 29.4 GB for 20 steps on an A100-40GB; `--proof` is what a CPU shows:
one iteration of every objective at 128 px, with gradients, and memory that is flat in the number of steps.
"""

import argparse
import csv
import ctypes
import gc
import signal
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.flop import Flop
from ld3m.data.dataset import Normalization, Split
from ld3m.evaluation.experts import Experts
from ld3m.method.objectives import OBJECTIVES, ClassMatching, TrajectoryMatching
from ld3m.method.spaces import LatentCodes, start_latents
from ld3m.models.compvis import CIN256, Kind, build
from ld3m.models.diffusion_prior import Prior
from ld3m.models.networks import build as build_network
from ld3m.models.networks import flat_parameters
from ld3m.pipeline.estimate import clock
from ld3m.runtime.devices import describe
from ld3m.runtime.memory import forget_peak, is_out_of_memory, peak_gib
from ld3m.runtime.seeds import derive
from ld3m.runtime.storage import write_tensors

NORMALIZATION = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
STRATEGY = "color_crop_cutout_flip_scale_rotate"
RENDER_PIXELS = 20 * 128**2  # at most so many go through the U-Net at once
M_MMAP_THRESHOLD = -3  # of malloc.h
SLOW_S = 10.0  # iterations that take longer are timed once
FIELDS = (
    *("size_px", "steps", "ipc", "objective", "precision", "launch", "render_batch", "ms_per_iteration"),
    *("peak_gib", "hours_for_10000_iterations", "device", "torch"),
    *("tensors_gib", "timed_iterations", "tflop", "tflop_per_s", "matmul_tflop_per_s", "note"),
)
PROOF_FIELDS = (
    *("objective", "size_px", "ipc", "classes", "steps", "real_batch", "render_batch", "seconds", "peak_gib"),
    *("loss", "grad_norm_z", "grad_norm_c", "finite_and_non_zero", "device", "torch"),
)


class TimeUp(BaseException):
    """The minutes are over. No Exception: whatever is being measured must not catch it."""


@dataclass(frozen=True)
class Scale:
    """How large everything is: as in the paper, or tiny."""

    kind: Kind
    sizes_px: tuple[int, ...]
    steps: tuple[int, ...]  # the first is measured first
    ipc: tuple[int, ...]
    classes: int
    real_batch: int  # images a class
    network_width: int


PAPER = Scale(CIN256, (128, 256), (20, 10), (1, 10), classes=10, real_batch=256, network_width=128)
SMOKE = Scale(
    replace(CIN256, unet_widths=(64, 64, 96, 128), autoencoder_widths=(32, 32, 32), codebook=16, classes=4),
    *((32, 64), (3, 2), (1, 2)),
    classes=3,
    real_batch=4,
    network_width=8,
)


# Of the U-Net and the decoder: kernel by kernel, or as CUDA graphs
Launch = Literal["eager", "replayed"]


@dataclass(frozen=True)
class Case:
    """What a row is about."""

    size_px: int
    steps: int
    ipc: int
    objective: str
    precision: str
    launch: Launch

    @property
    def work(self) -> float:
        """Proportional to the arithmetic of the U-Net."""
        return self.size_px**2 * self.steps * self.ipc


def cases(scale: Scale, device: torch.device) -> list[Case]:
    """All, the most valuable first: one image a class before more, bf16 before fp32. The usual launch is as in the
    experiments: on CUDA replayed, on a CPU eager. The others are tried with one image a class in bf16."""
    usual = "replayed" if device.type == "cuda" else "eager"
    every = [
        Case(size_px, steps, ipc, objective, precision, usual)
        for ipc in scale.ipc
        for precision in ("bf16", "fp32")
        for size_px in scale.sizes_px
        for steps in scale.steps
        for objective in ("dm", "dc")
    ]
    single = [case for case in every if case.ipc == scale.ipc[0]]
    half = [case for case in single if case.precision == "bf16" and usual != "eager"]
    eager = [replace(case, launch="eager") for case in half]
    return [*eager[:1], *single, *eager[1:], *every[len(single) :]]


def prepare(weights: Prior, *, precision: str, device: torch.device) -> Prior:
    """A copy of the prior on the device; `measure` makes it replayed."""
    prior = deepcopy(weights).to(device)
    if precision == "bf16":
        prior = replace(prior, precision=torch.bfloat16)  # also where the CPU has no instructions for it
    return prior


def random_split(scale: Scale, size_px: int, device: torch.device) -> Split:
    """As many random images of every class as a batch takes."""
    count = scale.classes * scale.real_batch
    draw = torch.Generator(device).manual_seed(derive(0, "benchmark", size_px))
    uint8 = torch.randint(256, (count, 3, size_px, size_px), dtype=torch.uint8, device=device, generator=draw)
    labels = torch.arange(scale.classes).repeat_interleave(scale.real_batch)
    return Split(uint8, labels, tuple(map(str, range(scale.classes))))


def start(split: Split, prior: Prior, *, ipc: int, steps: int, render_batch: int) -> LatentCodes:
    """The codes of the first images of every class."""
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
        encoder_input="pixels",
        shifted_normalization=False,
        render_batch=render_batch,
        uncheckpointed_steps=0,
        threads=1,
        seed=0,
    )


def class_matching(
    objective: str, split: Split, scale: Scale, wrap: Callable[[Callable], Callable] = lambda f: f
) -> ClassMatching:
    matching = OBJECTIVES[objective](
        split,
        normalization=NORMALIZATION,
        new_network=network(scale, split.shape[-1], split.device),
        experts=None,
        real_batch=scale.real_batch,
        strategy=STRATEGY,
        threads=1,
        seed=0,
    )
    return replace(matching, distance=wrap(matching.distance))


def network(scale: Scale, size_px: int, device: torch.device) -> Callable[..., torch.nn.Module]:
    size = {"channels": 3, "size_px": size_px, "classes": scale.classes, "width": scale.network_width}
    return partial(build_network, "convnet", **size, device=device)


def iterate(codes: LatentCodes, objective: Any, optimizer: torch.optim.Optimizer, step: int) -> float:
    """One iteration, as `ld3m.method.distill` does it; returns the loss."""
    optimizer.zero_grad(set_to_none=True)
    images = codes.render(step=step)
    loss, grad_images = objective(images.detach(), codes.labels, step=step)
    images.backward(grad_images)
    optimizer.step()
    return loss


# measuring


@dataclass
class Machine:
    """A device and its memory."""

    device: torch.device

    @property
    def name(self) -> str:
        return describe(self.device.type, threads=torch.get_num_threads())

    def return_freed(self) -> None:
        """Lets the C library return every large piece of memory that is freed, so that the process holds what its
        tensors do. Else it keeps some, depending on the order of things, and more with every step until it suffices."""
        if self.device.type == "cpu":
            getattr(ctypes.CDLL(None), "mallopt", lambda option, value: None)(M_MMAP_THRESHOLD, 2**20)

    def reset_peak(self) -> None:
        gc.collect()
        if self.device.type == "cpu":
            getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)(0)  # what the C library kept for later
        forget_peak()

    def tensors_gib(self) -> float | str:
        return torch.cuda.max_memory_allocated(self.device) / 2**30 if self.device.type == "cuda" else ""

    def matmul_tflop_per_s(self, side: int) -> float:
        """The rate of a bf16 product of two square matrices: what the device can do at best."""
        a, b = (torch.randn(side, side, device=self.device).bfloat16() for _ in range(2))
        for _ in range(3):
            a @ b
        return 2 * side**3 / statistics.median(clock(lambda: a @ b) for _ in range(10)) / 1e12


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeUp inside the block when it takes longer."""

    def stop(*_: Any) -> None:
        raise TimeUp

    former = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def measure(
    case: Case, split: Split, prior: Prior, scale: Scale, machine: Machine, *, render_batch: int, deadline: float
) -> dict[str, Any]:
    """Milliseconds and peak memory of an iteration, the median after a first one. If that is eager, its arithmetic is
    counted: counting does not see into replayed code."""
    if case.launch == "replayed":
        prior = prior.with_cuda_graphs()  # of these shapes alone, that memory is not that of several
    machine.reset_peak()
    codes = start(split, prior, ipc=case.ipc, steps=case.steps, render_batch=render_batch)
    objective = class_matching(case.objective, split, scale)
    optimizer = torch.optim.SGD(list(codes.learnables.values()), lr=1e-6, momentum=0.5)
    flop = 0
    if case.launch != "eager":
        iterate(codes, objective, optimizer, 0)  # records
        first = clock(lambda: iterate(codes, objective, optimizer, 0))
    else:
        counts = [Flop()]

        def counted(distance: Callable) -> Callable:
            """Counting does not see into other threads, so the classes are counted there."""

            def call(*arguments: Any) -> Tensor:
                counts.append(Flop())
                with counts[-1]:
                    return distance(*arguments)

            return call

        counting = class_matching(case.objective, split, scale, counted)
        with counts[0]:
            first = clock(lambda: iterate(codes, counting, optimizer, 0))
        flop = sum(count.total for count in counts)
    times = []
    wanted = 5 if first < SLOW_S / 5 else 3 if first < SLOW_S else 1
    while len(times) < wanted and time.monotonic() + 1.5 * first < deadline:
        times.append(clock(lambda: iterate(codes, objective, optimizer, 1 + len(times))))
    seconds = statistics.median(times or [first])
    return {
        "ms_per_iteration": 1000 * seconds,
        "peak_gib": peak_gib(),
        "hours_for_10000_iterations": seconds * 10000 / 3600,
        "tensors_gib": machine.tensors_gib(),
        "timed_iterations": len(times),
        "tflop": flop / 1e12 or "",
        "tflop_per_s": flop / 1e12 / seconds or "",
        "note": "" if times else "the first iteration, no time for another",
    }


# the table


@dataclass
class Table:
    """A CSV file that grows by a row at a time."""

    file: Path
    fields: tuple[str, ...]

    def rows(self) -> list[dict[str, str]]:
        if not self.file.exists():
            return []
        with self.file.open(newline="") as opened:
            return list(csv.DictReader(opened))

    def add(self, row: dict[str, Any]) -> None:
        is_new = not self.file.exists()
        with self.file.open("a", newline="") as opened:
            writer = csv.DictWriter(opened, self.fields, lineterminator="\n")
            if is_new:
                writer.writeheader()
            writer.writerow({key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()})
        print(" ".join(f"{key} {value}" for key, value in self.rows()[-1].items() if value), flush=True)

    def of(self, **values: Any) -> list[dict[str, str]]:
        wanted = {key: str(value) for key, value in values.items()}
        return [row for row in self.rows() if wanted.items() <= row.items()]


def cost(scale: Scale, machine: Machine, table: Table, *, deadline: float) -> None:
    """Measures the cases that the table lacks, as far as the time goes."""
    weights: Prior | None = None
    prepared: tuple[Any, Prior | None] = (None, None)
    split: Split | None = None
    same = {"device": machine.name, "torch": torch.__version__}
    rate = None
    for case in cases(scale, machine.device):
        done = table.of(**asdict(case), **same)
        if any(row["ms_per_iteration"] or "memory" not in row["note"] for row in done):
            continue
        render_batch = max(1, min(RENDER_PIXELS // case.size_px**2, scale.classes * case.ipc))
        render_batch = min([render_batch, *(int(row["render_batch"]) // 2 for row in done)])
        if render_batch < 1:
            continue
        known = [row for row in table.of(precision=case.precision, **same) if row["ms_per_iteration"]]
        per_work = [float(row["ms_per_iteration"]) / 1000 / Case(*_case(row)).work for row in known]
        if 2.2 * min(per_work, default=0) * case.work > deadline - time.monotonic():
            print(f"left out, too long for the time that is left: {case}", flush=True)
            continue
        if rate is None:
            rate = machine.matmul_tflop_per_s(8192 if machine.device.type == "cuda" else 1024)
            weights = build(scale.kind, seed=0)
            print(f"{machine.name}: {rate:.3g} TFLOP/s in a bf16 product of large matrices", flush=True)
        if split is None or split.uint8.shape[-1] != case.size_px:
            split = None
            split = random_split(scale, case.size_px, machine.device)
        if prepared[0] != case.precision:
            prepared = (None, None)
            machine.reset_peak()
            prepared = (case.precision, prepare(weights, precision=case.precision, device=machine.device))
        while render_batch:
            shared = asdict(case) | same | {"render_batch": render_batch, "matmul_tflop_per_s": rate}
            try:
                row = measure(case, split, prepared[1], scale, machine, render_batch=render_batch, deadline=deadline)
            except Exception as error:  # whatever goes wrong in one case, the others are worth having
                is_memory = is_out_of_memory(error)
                if not is_memory:
                    traceback.print_exc()
                row = {"note": "out of memory" if is_memory else f"{type(error).__name__}: {str(error)[:200]!r}"}
            if case.launch != "eager" and "ms_per_iteration" in row:
                eager = table.of(**asdict(replace(case, launch="eager")), render_batch=render_batch, **same)
                if eager and eager[-1]["tflop"]:
                    row["tflop"] = float(eager[-1]["tflop"])
                    row["tflop_per_s"] = row["tflop"] / row["ms_per_iteration"] * 1000
            table.add(shared | row)
            render_batch = render_batch // 2 if row["note"] == "out of memory" else 0


def _case(row: dict[str, str]) -> tuple[int, int, int, str, str, Launch]:
    numbers = (int(row[key]) for key in ("size_px", "steps", "ipc"))
    return *numbers, row["objective"], row["precision"], row["launch"]


def roofline(table: Table) -> None:
    """Prints how much of the rate of one large matrix product the iterations reach."""
    for row in table.rows():
        if row["ms_per_iteration"] and row["tflop"]:
            share = float(row["tflop_per_s"]) / float(row["matmul_tflop_per_s"])
            print(
                f"roofline: {row['size_px']} px, {row['steps']} steps, IPC {row['ipc']}, {row['objective']}, "
                f"{row['precision']}, {row['launch']}: {row['tflop']} TFLOP in "
                f"{float(row['ms_per_iteration']) / 1000:.3g} s = {row['tflop_per_s']} TFLOP/s, {100 * share:.0f} % of "
                f"the {row['matmul_tflop_per_s']} TFLOP/s of a bf16 product"
            )


# the proof


def proof(scale: Scale, machine: Machine, table: Table, *, classes: int, steps: tuple[int, ...]) -> None:
    """One iteration of every objective at the smaller size and the first of `steps`, then MTT at the other `steps`:
    of the objectives it needs the least memory itself, so that what the reverse process needs is seen."""
    scale = replace(scale, classes=classes)
    size_px = scale.sizes_px[0]
    machine.return_freed()
    prior, split = build(scale.kind, seed=0).to(machine.device), random_split(scale, size_px, machine.device)
    same = {"device": machine.name, "torch": torch.__version__}
    todo = [(objective, steps[0]) for objective in ("dm", "dc", "mtt")] + [("mtt", count) for count in steps[1:]]
    for name, count in todo:
        if table.of(objective=name, steps=count, classes=classes, **same):
            continue
        machine.reset_peak()
        codes = start(split, prior, ipc=1, steps=count, render_batch=1)
        with tempfile.TemporaryDirectory() as folder:
            objective = (
                trajectory_matching(Path(folder), scale, size_px, machine.device)
                if name == "mtt"
                else class_matching(name, split, scale)
            )
            optimizer = torch.optim.SGD(list(codes.learnables.values()), lr=0.0)
            losses: list[float] = []
            seconds = clock(lambda: losses.append(iterate(codes, objective, optimizer, 0)))  # noqa: B023
        norms = {name: codes.learnables[name].grad.norm().item() for name in ("z", "c")}
        table.add(
            {
                "objective": name,
                "size_px": size_px,
                "ipc": 1,
                "classes": classes,
                "steps": count,
                "real_batch": "" if name == "mtt" else scale.real_batch,
                "render_batch": 1,
                "seconds": seconds,
                "peak_gib": peak_gib(),
                "loss": losses[0],
                "grad_norm_z": norms["z"],
                "grad_norm_c": norms["c"],
                "finite_and_non_zero": all(0 < norm < float("inf") for norm in norms.values()),
                **same,
            }
        )


def trajectory_matching(folder: Path, scale: Scale, size_px: int, device: torch.device) -> TrajectoryMatching:
    """MTT with ten student steps towards an expert that random steps of about a training's size made."""
    new_network = network(scale, size_px, device)
    begin = flat_parameters(new_network(seed=0)).cpu()
    draw = torch.Generator().manual_seed(0)
    snapshots = torch.stack([begin + 0.01 * k * torch.randn(begin.shape, generator=draw) for k in range(3)])
    file = folder / "expert-0000.safetensors"
    write_tensors(file, {"snapshots": snapshots}, {"expert": 0})
    return OBJECTIVES["mtt"](
        None,
        normalization=NORMALIZATION,
        new_network=new_network,
        experts=lambda last_epoch: Experts((file,)),
        strategy=STRATEGY,
        threads=1,
        seed=0,
        student_steps=10,
        student_batch=None,
        expert_epochs=2,
        max_start_epoch=1,
        student_lr=0.01,
        first_order=False,
    )


def main(arguments: list[str] | None = None) -> None:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--out", type=Path, required=True, help="a CSV file, which is added to")
    parser.add_argument("--minutes", type=float, default=8, help="of the whole program (not with --proof)")
    parser.add_argument("--smoke", action="store_true", help="everything tiny")
    parser.add_argument("--proof", action="store_true", help="one iteration of every objective")
    parser.add_argument("--classes", type=int, default=10, help="of the proof")
    parser.add_argument(
        "--steps", type=int, nargs="+", default=(5, 20), help="of the proof, all but the first with MTT alone"
    )
    given = parser.parse_args(arguments)
    scale = SMOKE if given.smoke else PAPER
    machine = Machine(torch.device(given.device))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    if given.proof:
        table = Table(given.out, PROOF_FIELDS)
        proof(scale, machine, table, classes=min(given.classes, scale.classes), steps=tuple(given.steps))
        return
    table = Table(given.out, FIELDS)
    deadline = began + 60 * given.minutes - min(10, 6 * given.minutes)
    try:
        with time_limit(deadline - time.monotonic()):
            cost(scale, machine, table, deadline=deadline)
    except TimeUp:
        print("the time is up; call again to go on", flush=True)
    roofline(table)


if __name__ == "__main__":
    main()
