"""Train the small class-conditional GAN of the space `glad` on the training split."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, softplus
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ld3m.data.augment import augment, draw
from ld3m.data.dataset import Split
from ld3m.models.gan import SMALLEST_PX, Generator
from ld3m.runtime.checkpoint import Checkpoint
from ld3m.runtime.memory import explain_out_of_memory
from ld3m.runtime.progress import progress
from ld3m.runtime.seeds import forked, generator
from ld3m.runtime.training_state import TrainingState

GROUP = 4  # images of one class in a row of a batch, for the minibatch standard deviation


class Discriminator(nn.Module):
    """Strided convolutions to 4 px and a projection on the class (Miyato and Koyama, 2018).

    The minibatch standard deviation of each group (Karras et al., 2018) shows it a generator that ignores its noise.
    `widths` are the channels at half the image's side, at a quarter, ... and at 4 px.
    """

    def __init__(self, *, channels: int, classes: int, widths: tuple[int, ...]):
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(i, o, 4, stride=2, padding=1) for i, o in zip((channels, *widths), widths, strict=False)
        )
        self.hidden = nn.Linear((widths[-1] + 1) * SMALLEST_PX**2, widths[-1])
        self.realness = nn.Linear(widths[-1], 1)
        self.embedding = nn.Embedding(classes, widths[-1])

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """Images x (B, C, H, W) and labels (B,), in groups of one class, to logits (B,), positive for real."""
        maps = x
        for convolution in self.convolutions:
            maps = leaky_relu(convolution(maps), 0.2)
        groups = maps.unflatten(0, (-1, GROUP))
        std = groups.var(dim=1, unbiased=False).add(1e-8).sqrt().mean(dim=(1, 2, 3))  # (B / GROUP,)
        std = std.repeat_interleave(GROUP)[:, None, None, None].expand(-1, 1, SMALLEST_PX, SMALLEST_PX)
        h = leaky_relu(self.hidden(torch.cat([maps, std], dim=1).flatten(1)), 0.2)
        return self.realness(h).squeeze(1) + (self.embedding(labels.to(h.device)) * h).sum(1) / h.shape[1] ** 0.5


@explain_out_of_memory("gan.batch")
def fit_gan(
    gan: Generator,
    split: Split,
    *,
    discriminator_widths: tuple[int, ...],
    steps: int,
    batch: int,
    learning_rate: float,
    r1: float,
    r1_every: int,
    ema_decay: float,
    strategy: str,
    seed: int,
    checkpoint: Checkpoint | None = None,
) -> list[dict[str, float]]:
    """Train the generator in place with the non-saturating loss; it ends as the moving average (EMA) of its weights.

    Both networks have Adam with `learning_rate`. An interrupted run goes on from `checkpoint`, to the same bits.

    Parameters
    ----------
    batch
        Images in a step, a multiple of 4.
    r1, r1_every
        The R1 penalty, `r1` / 2 times the squared gradient of the logit at real images, is taken every `r1_every` steps
        and as many times as large.
    ema_decay
        Of the moving average, in [0, 1).
    strategy
        Of the augmentation (`augment.draw`) of real and generated images alike.

    Returns
    -------
    list of dict
        The losses of each step, {"generator": ..., "discriminator": ...}.

    Raises
    ------
    ValueError
        Where a loss or a weight is not finite.
    """
    device = split.device
    with forked(seed, "discriminator"):
        discriminator = Discriminator(channels=gan.config["channels"], classes=gan.classes, widths=discriminator_widths)
    discriminator.to(device)
    average = AveragedModel(gan, multi_avg_fn=get_ema_multi_avg_fn(ema_decay))
    adam = partial(torch.optim.Adam, lr=learning_rate, betas=(0.0, 0.99))
    optimizers = {"optimizer 0": adam(gan.parameters()), "optimizer 1": adam(discriminator.parameters())}
    training = TrainingState(
        {"generator": gan, "discriminator": discriminator, "average": average, **optimizers},
        losses=torch.zeros(steps, 2, device=device),
        advice="lower the learning rate of the gan",
    )
    with checkpoint or Checkpoint() as checkpoint:
        checkpoint.resume(training.restore)
        for step in progress(steps, label="gan", start=training.done, status=training.status):
            with checkpoint.step(training.state):
                rng = generator(seed, "gan", step)
                index = _draw_groups(split, batch, rng)
                noise = torch.randn(2, batch, gan.noise_width, generator=rng).to(device)
                labels = split.labels[index]
                augmentation = draw(strategy, count=batch, generator=rng)
                real = augment(split.x(index), augmentation)

                with torch.no_grad():
                    fake = augment(gan(noise[0], labels), augmentation)
                is_penalized = step % r1_every == 0
                logits = discriminator(real.requires_grad_(is_penalized), labels)
                loss_d = softplus(-logits).mean() + softplus(discriminator(fake, labels)).mean()
                penalty = 0.0
                if is_penalized:
                    (gradient,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
                    penalty = r1 / 2 * gradient.square().sum(dim=(1, 2, 3)).mean()
                _step(optimizers["optimizer 1"], loss_d + r1_every * penalty)

                discriminator.requires_grad_(False)
                loss_g = softplus(-discriminator(augment(gan(noise[1], labels), augmentation), labels)).mean()
                _step(optimizers["optimizer 0"], loss_g)
                discriminator.requires_grad_(True)
                average.update_parameters(gan)
                training.record(torch.stack([loss_g.detach(), loss_d.detach()]))
    gan.load_state_dict(average.module.state_dict())
    gan.freeze_()
    return [dict(zip(("generator", "discriminator"), losses, strict=True)) for losses in training.losses.tolist()]


def _draw_groups(split: Split, batch: int, rng: torch.Generator) -> Tensor:
    """Indices (batch,) of training images, `GROUP` in a row of one class."""
    labels = torch.randint(len(split.classes), (batch // GROUP,), generator=rng).tolist()
    members = [split.of_class(label) for label in labels]
    return torch.cat([of[torch.randint(len(of), (GROUP,), generator=rng)] for of in members])


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
