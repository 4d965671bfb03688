"""One cell looked at closely, on a toy experiment whose artefact is written by the real writer."""

import json
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from conftest import CLASSES, SIZE_PX

from ld3m.data.dataset import Normalization, Split
from ld3m.pipeline.profiles import load_params
from ld3m.reporting import explore, figures
from ld3m.runtime import paths

GRID = {"grid.objective": ["dm"], "grid.space": ["pixel", "ld3m"], "grid.ipc": [1, 2]}


@pytest.fixture
def params(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    return load_params(GRID)


def on_disk(params, *names):
    for name in names:
        paths.distilled_folder(params.dataset, name, 0).mkdir(parents=True)


def test_the_menu_has_the_distilled_cells_and_starts_with_ld3m(params):
    on_disk(params, "dm-pixel-1", "dm-ld3m-2", "dc-ld3m-1")  # the last is of a former grid
    choice = explore.chooser(params)
    assert dict(choice.options) == {"DM Pixel, IPC 1": ("dm", "pixel", 1), "DM LD3M, IPC 2": ("dm", "ld3m", 2)}
    assert choice.value == ("dm", "ld3m", 2)


def test_without_a_distilled_cell_it_says_what_makes_one(params):
    with pytest.raises(FileNotFoundError, match="dvc repro distill"):
        explore.chooser(params)


def test_the_figures_follow_the_menu(params, monkeypatch):
    on_disk(params, "dm-pixel-1", "dm-ld3m-1")
    choice, shown = explore.chooser(params), []
    handle = SimpleNamespace(update=shown.append)
    monkeypatch.setattr(explore, "display", lambda figure, display_id: shown.append(figure) or handle)
    explore.follow(choice, lambda experiment, cell: (experiment, cell), "experiment")
    choice.value = ("dm", "pixel", 1)
    assert shown == [("experiment", ("dm", "ld3m", 1)), ("experiment", ("dm", "pixel", 1))]


def test_the_nearest_are_those_of_the_plain_distances():
    draw = torch.Generator().manual_seed(0)
    uint8 = torch.randint(256, (2300, 1, 4, 4), dtype=torch.uint8, generator=draw)
    split = Split(uint8, torch.zeros(2300, dtype=torch.int64), ("a",))
    pixels = split.x(torch.tensor([7, 2200])) + 0.01
    plain = ((pixels[:, None].double() - split.x().double()) ** 2).sum((2, 3, 4)).argsort(1)[:, :3]
    index = explore.nearest(pixels, split, count=3)
    assert index.tolist() == plain.tolist() and index[:, 0].tolist() == [7, 2200]


def test_confusion_counts_true_classes_in_rows():
    labels = torch.tensor([0, 0, 1, 2, 2, 2])
    called = torch.tensor([0, 2, 1, 0, 0, 2])
    logits = torch.eye(3)[called]
    counts = explore.confusion(torch.nn.Identity(), logits.__getitem__, labels)
    assert counts.tolist() == [[1, 0, 1], [0, 1, 0], [2, 0, 1]]
    drawn = figures.confusion(counts, ["a", "b", "c"]).axes[0]
    assert [label.get_text() for label in drawn.get_yticklabels()] == ["a (50 %)", "b (100 %)", "c (33 %)"]
    assert "50.0 % right" in drawn.get_title()


def test_a_set_of_other_parameters_is_not_restored(params, monkeypatch):
    stored = params.spaces.ld3m.model_dump() | {"steps": params.spaces.ld3m.steps + 1}
    metadata = json.loads(json.dumps({"configuration": {"space_parameters": stored}}))
    monkeypatch.setattr(explore, "read_artefact", lambda folder: ({}, metadata))
    with pytest.raises(ValueError, match="dm-ld3m-1 was distilled with other values of spaces.ld3m"):
        explore.restored(SimpleNamespace(params=params), ("dm", "ld3m", 1))


@pytest.mark.parametrize("space", ["pixel", "glad", "ld3m"])
def test_the_images_stand_below_what_their_space_starts_from(monkeypatch, space):
    start = {name: torch.full((2 * CLASSES, 1, 4, 4), float(k)) for k, name in enumerate(("pixel", "glad", "ld3m"))}
    learned, normalization, shown = torch.rand(2 * CLASSES, 1, 4, 4), Normalization((0.4,), (0.3,)), {}
    experiment = SimpleNamespace(
        dataset=SimpleNamespace(normalization=normalization, train=SimpleNamespace(classes=("a", "b", "c"))),
        synthetic=lambda name, ipc: SimpleNamespace(render=lambda: start[name] if ipc == 2 else None),
        images_of=lambda *cell: (learned, None),
    )
    monkeypatch.setattr(figures, "image_rows", lambda rows, columns: shown.update(rows))
    explore.images(experiment, ("dm", space, 2))
    assert list(shown) == ["start 1", "distilled 1", "start 2", "distilled 2"]
    assert shown["start 2"].equal(normalization.denormalize(start[space])[1::2])
    assert shown["distilled 2"].equal(normalization.denormalize(learned)[1::2])


def test_gradient_norms_of_one_image_have_no_bars():
    rows = [("x0", "z", steps, k, steps + k) for steps in (5, 10) for k in range(2)]
    norms = pd.DataFrame(rows, columns=["skip", "learned", "steps", "image", "norm"])
    bars = [len(figures.gradient_norms(part).axes[0].containers) for part in (norms, norms[norms.image == 0])]
    assert bars == [1, 0]


def test_a_space_without_a_reverse_process_says_so():
    figure = explore.denoising_path(None, ("dm", "pixel", 1))
    assert "Pixel has no reverse process" in figure.axes[0].texts[0].get_text()


def test_a_sheet_has_a_column_a_class_and_repeats(tmp_path):
    from PIL import Image

    pixels = torch.linspace(-1, 1, CLASSES * 2)[:, None, None, None].expand(-1, 1, SIZE_PX, SIZE_PX)
    files = [figures.save_sheet(pixels, name, columns=CLASSES, folder=tmp_path) for name in ("a", "b")]
    assert files[0].read_bytes() == files[1].read_bytes()
    image = Image.open(files[0])
    assert image.size == (CLASSES * (SIZE_PX + 1), 2 * (SIZE_PX + 1))
    middles = [[image.getpixel((17 * column + 8, 17 * row + 8)) for column in range(CLASSES)] for row in range(2)]
    assert middles == [[0, 102, 204], [51, 153, 255]]  # image 2 of class 0 is below image 1
