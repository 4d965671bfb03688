"""The cells of the tables and the names of their parts."""

from ld3m.pipeline.params import Params

Cell = tuple[str, str, int]  # objective ("none" for a control), space or control, images per class
UNSEEN = "unseen"  # the mean over the architectures that were not used to distil
NAMES = {
    "convnet": "ConvNet", "alexnet": "AlexNet", "vgg11": "VGG11", "resnet18": "ResNet18", "vit": "ViT",
    "none": "-", "random_real": "Random real", "herding": "Herding", "k_center": "k-center",
    "iteration0": "Iteration 0", "prior_samples": "Prior samples",
    "dc": "DC", "dm": "DM", "mtt": "MTT", "pixel": "Pixel", "glad": "GLaD", "ld3m": "LD3M",
    "full_data": "Full data", UNSEEN: "Unseen mean",
}  # fmt: skip


def cells(params: Params, *, more: bool = False) -> list[Cell]:
    """(objective, space, ipc) of every row of the main table, or with `more` of the report's: of every IPC the controls
    first, the full data (ipc 0) last."""
    grid, added = params.grid, params.more if more else None
    found = {("none", control, ipc) for control in grid.control for ipc in grid.ipc}
    found |= {(o, space, ipc) for o in grid.objective for space in grid.space for ipc in grid.ipc}
    if added:
        found |= {("none", entry.control, entry.ipc) for entry in added.controls.values()}
        found |= {(entry.objective, entry.space, entry.ipc) for entry in added.cells.values()}
    order = list(NAMES)
    ranked = sorted(found, key=lambda cell: (cell[0] != "none", cell[2], order.index(cell[0]), order.index(cell[1])))
    return [*ranked, ("none", "full_data", 0)]
