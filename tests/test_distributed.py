"""A set that two processes render together: its images, its gradients and what is learned are those of one process."""

import pytest
import torch
import torch.distributed as dist
from conftest import NORMALIZATION, SIZE_PX, make_prior

from ld3m.checkpoint import Checkpoint
from ld3m.distill import distill
from ld3m.distributed import over_ranks
from ld3m.synthetic import start_ld3m

LABELS = torch.tensor([0, 1, 2])  # shared unevenly by two


def start(**changes):
    draw = torch.Generator().manual_seed(0)
    given = dict(start="real", learn="z", steps=2, guidance=3.0, skip="x0", eta=0.0, clamp="soft", noise="stored")
    return start_ld3m(
        torch.rand(3, 1, SIZE_PX, SIZE_PX, dtype=torch.float64, generator=draw) * 2 - 1,
        LABELS,
        prior=make_prior().to(torch.float64).frozen(),
        normalization=NORMALIZATION,
        encoder_input="pixels",
        render_batch=2,
        seed=0,
        **given | changes,
    )


class Towards:
    """An objective that couples all images: the squared distance of their mean to one."""

    learnables = {}

    def __call__(self, images, labels, *, step):
        images = images.requires_grad_()
        loss = (images.mean(0) - 1).square().sum()
        return loss.item(), torch.autograd.grad(loss, images)[0]


def learned(synthetic):
    """The images and gradients of the first iteration, then the codes after two."""
    images = synthetic.render(step=0)
    _, grad = Towards()(images.detach(), synthetic.labels, step=0)
    images.backward(grad)
    grads = {f"grad {name}": tensor.grad.clone() for name, tensor in synthetic.learnables.items()}
    distill(
        synthetic,
        Towards(),
        iterations=2,
        learning_rates={"z": 0.1, "c": 0.1},
        momentum=0.5,
        validate=lambda images: [0.0],
        validations=0,
        checkpoint=Checkpoint(),
    )
    return {"images": images.detach()} | grads | {k: v.detach() for k, v in synthetic.learnables.items()}


def work(rank, store, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.save(learned(over_ranks(start())), out / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_learn_what_one_does(tmp_path):
    torch.multiprocessing.spawn(work, (tmp_path / "store", tmp_path), nprocs=2)
    alone = learned(start())
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert set(first) == set(alone) and alone["grad z"].norm() > 0 and alone["grad c"].norm() > 0
    for name, expected in alone.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], expected, rtol=1e-9, atol=1e-9)


@pytest.fixture
def group(tmp_path, monkeypatch):
    """As if there were four processes."""
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)


def test_what_cannot_be_shared_is_refused(group, monkeypatch):
    with pytest.raises(ValueError, match="3 images cannot be shared by 4 processes"):
        over_ranks(start())
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="set it to stored"):
        over_ranks(start(noise="redrawn"))
