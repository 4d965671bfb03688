"""The functions of the notebook `explore`, taken from its cells."""

import ast

import nbformat
import torch

from ld3m.data.dataset import Split
from ld3m.runtime.paths import ROOT


def function(name):
    """A function of the notebook that needs torch alone."""
    cells = nbformat.read(ROOT / "notebooks/explore.ipynb", as_version=4).cells
    nodes = [node for cell in cells if cell.cell_type == "code" for node in ast.parse(cell.source).body]
    (node,) = [node for node in nodes if isinstance(node, ast.FunctionDef) and node.name == name]
    scope = {"torch": torch}
    exec(ast.unparse(node), scope)
    return scope[name]


class OnDevice(torch.Tensor):
    """A tensor of another device: arithmetic with one of the CPU, and an index into one of the CPU, raise."""

    @classmethod
    def __torch_function__(cls, operation, types, arguments=(), keywords=None):
        if any(type(value) is torch.Tensor for value in arguments):
            raise RuntimeError("expected all tensors to be on the same device")
        made = super().__torch_function__(operation, types, arguments, keywords or {})
        return made.as_subclass(torch.Tensor) if operation is torch.Tensor.cpu else made


class SplitOnDevice(Split):
    def x(self, *rows):
        return super().x(*rows).as_subclass(OnDevice)


def test_the_nearest_are_those_of_the_plain_distances():
    draw = torch.Generator().manual_seed(0)
    uint8 = torch.randint(256, (2300, 1, 4, 4), dtype=torch.uint8, generator=draw)
    split = Split(uint8, torch.zeros(2300, dtype=torch.int64), ("a",))
    x = split.x(torch.tensor([7, 2200])) + 0.01
    plain = ((x[:, None].double() - split.x().double()) ** 2).sum((2, 3, 4)).argsort(1)[:, :3]
    for given, others in ((x, split), (x.as_subclass(OnDevice), SplitOnDevice(uint8, split.labels, ("a",)))):
        index = function("nearest")(given, others, count=3)
        assert index.tolist() == plain.tolist() and index[:, 0].tolist() == [7, 2200]
        assert type(index) is torch.Tensor  # on the CPU, where the labels are


def test_confusion_counts_true_classes_in_rows_wherever_the_network_is():
    labels = torch.tensor([0, 0, 1, 2, 2, 2])
    logits = torch.eye(3)[torch.tensor([0, 2, 1, 0, 0, 2])]
    for network in (torch.nn.Identity(), lambda images: images.as_subclass(OnDevice)):
        counts = function("confusion")(network, logits.__getitem__, labels)
        assert counts.tolist() == [[1, 0, 1], [0, 1, 0], [2, 0, 1]]
