"""Priors made of others: some of the classes, no classes, a random U-Net; and the label table of a DiT."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from ld3m.models.diffusion_prior import Prior
from ld3m.runtime.seeds import forked


def take_label_table(dit: nn.Module) -> nn.Embedding:
    """Remove the label table (classes + 1, D) from a DiT and return it; the DiT then takes rows of it, (B, D).

    In diffusers each block has a table. In a released model they are copies of one; ValueError if they differ.
    """
    table, *others = [block.norm1.emb.class_embedder.embedding_table for block in dit.transformer_blocks]
    if any(not torch.equal(other.weight, table.weight) for other in others):
        raise ValueError("the label tables of the DiT's blocks differ: only models whose blocks share one can be used")
    remove_label_tables(dit)
    return table


def remove_label_tables(dit: nn.Module) -> None:
    """Let a DiT take rows (B, D) of a label table in the place of labels, in place."""
    for block in dit.transformer_blocks:
        block.norm1.emb.class_embedder = nn.Identity()


def with_label_tables(dit: nn.Module, embedding: nn.Embedding) -> nn.Module:
    """A copy of a DiT without label tables, with a copy of `embedding` in each block: `take_label_table` inverts it."""
    with forked(0, "tables"):
        whole = type(dit).from_config(dit.config)
    table = "transformer_blocks.{}.norm1.emb.class_embedder.embedding_table.weight"
    tables = {table.format(k): embedding.weight for k in range(len(dit.transformer_blocks))}
    whole.load_state_dict(dit.state_dict() | tables)
    return whole


def unconditional(prior: Prior) -> Prior:
    """A prior with the null class in the place of every class."""
    null = prior.embedding.weight[-1:].expand_as(prior.embedding.weight)
    return replace(prior, embedding=nn.Embedding.from_pretrained(null.clone())).freeze_()


def with_classes(prior: Prior, classes: Sequence[int]) -> Prior:
    """A prior whose label k is class `classes[k]` of the given one; a prior without classes is returned unchanged."""
    if not prior.is_conditional:
        return prior
    if outside := [index for index in classes if not 0 <= index < prior.classes]:
        raise ValueError(f"prior.classes has {outside}: the classes of this prior are 0 to {prior.classes - 1}")
    rows = prior.embedding.weight[[*classes, prior.classes]]
    return replace(prior, embedding=nn.Embedding.from_pretrained(rows.clone())).freeze_()


def with_random_unet(prior: Prior, *, seed: int) -> Prior:
    """A prior with a denoiser of random weights, as in the paper's ablation."""
    with forked(seed, "random unet"):
        unet = type(prior.unet).from_config(prior.unet.config)
    if hasattr(unet, "transformer_blocks"):
        remove_label_tables(unet)
    return replace(prior, unet=unet.to(prior.embedding.weight), recordings={}).freeze_()
