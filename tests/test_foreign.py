"""Sets made elsewhere: what is read is exactly what was stored, and what does not fit is refused."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import CLASSES, NORMALIZATION, SIZE_PX
from PIL import Image

from ld3m.data.dataset import Dataset, Normalization, Split, initial_indices, load_dataset
from ld3m.evaluation.artefact import write_artefact
from ld3m.evaluation.foreign import read_set
from ld3m.reporting.export import export
from ld3m.runtime.paths import ROOT

IPC = 2
NAMES = ("a", "b", "c")
NORMALIZED = {"form": "normalized", "mean": [0.1], "std": [0.5]}


@pytest.fixture
def x(dataset):
    """Real images (N, 1, H, W) in [-1, 1], classes contiguous."""
    return dataset.train.x(initial_indices(dataset.train, ipc=IPC, seed=0))


@pytest.fixture
def labels():
    return torch.arange(CLASSES).repeat_interleave(IPC)


def check(read, x, labels):
    expected = (((x + 1) / 2).double() - NORMALIZATION.mean[0]) / NORMALIZATION.std[0]
    torch.testing.assert_close(read[0].double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(read[1], labels) and read[0].dtype == torch.float32


def with_splits(dataset, change, normalization=NORMALIZATION):
    parts = {part: change(getattr(dataset, part)) for part in ("train", "validation", "test")}
    return Dataset("toy", normalization=normalization, **parts)


def image_folder(folder, x, labels, names=NAMES, convert=lambda image: image):
    for k, (image, label) in enumerate(zip(x, labels, strict=True)):
        place = folder / names[label]
        place.mkdir(parents=True, exist_ok=True)
        uint8 = ((image[0] + 1) * 127.5).round().to(torch.uint8).numpy()
        convert(Image.fromarray(uint8)).save(place / f"{k}.png")
    return folder


def artefact(folder, x, labels, *, normalization=NORMALIZATION, classes=NAMES, **codes):
    recipe = {"learning_rate": 0.01, "epochs": 3}
    configuration = {"iterations": 4, "network": "convnet", "network_size": {"width": 8}, "seed": 0}
    configuration |= {"validation_recipe": recipe, "augmentation": "flip", "data_sha256": "d", "prior_sha256": None}
    record = {
        "configuration": configuration,
        "validation": [{"iteration": 0, "accuracy": 0.5}],
        "cost": {},
        "score": {"split": "validation", "accuracy": [0.5, 0.7]},
    }
    tensors = {"images": normalization.normalize(x)} | codes
    shared = {"labels": labels, "classes": classes, "normalization": normalization}
    write_artefact(folder, tensors, **shared, name="toy", record=record)
    return folder


def pair(folder, images, labels, names=("images_best.pt", "labels_best.pt")):
    folder.mkdir(exist_ok=True)
    torch.save(images, folder / names[0])
    torch.save(labels, folder / names[1])
    return folder


# What can be read


@pytest.mark.parametrize("names", [NAMES, ("0", "1", "2"), ("000", "001", "002"), ("000 a", "001 b", "002 c")])
def test_an_image_folder_is_read_by_name_and_by_index(tmp_path, dataset, x, labels, names):
    check(read_set(image_folder(tmp_path / "set", x, labels, names), dataset=dataset), x, labels)


def test_class_names_that_are_numbers_are_names(tmp_path, dataset, x, labels):
    other = with_splits(dataset, lambda split: Split(split.uint8, split.labels, ("2", "0", "1")))
    check(read_set(image_folder(tmp_path / "set", x, labels, ("2", "0", "1")), dataset=other), x, labels)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P"])
def test_modes_are_converted_where_nothing_is_lost(tmp_path, dataset, x, labels, mode):
    folder = image_folder(tmp_path / "set", x, labels, convert=lambda image: image.convert(mode))
    check(read_set(folder, dataset=dataset), x, labels)
    normalization = Normalization(NORMALIZATION.mean * 3, NORMALIZATION.std * 3)
    coloured = lambda split: Split(split.uint8.expand(-1, 3, -1, -1), split.labels, NAMES)  # noqa: E731
    read = read_set(folder, dataset=with_splits(dataset, coloured, normalization))
    check(read, x.expand(-1, 3, -1, -1), labels)


def test_images_are_in_the_order_of_their_numbers_class_by_class(tmp_path, dataset, x):
    x, labels = x.repeat(4, 1, 1, 1)[:18], torch.arange(18) % 3
    order = labels.argsort(stable=True)
    check(read_set(image_folder(tmp_path / "set", x, labels), dataset=dataset), x[order], labels[order])
    folder = pair(tmp_path / "pair", (x + 1) / 2, labels)
    check(read_set(folder, dataset=dataset, form="unit"), x[order], labels[order])


def test_images_are_on_the_device_of_the_dataset_and_labels_on_the_cpu(tmp_path, dataset, x, labels):
    """Evaluation networks train where the real images are; indices and labels stay on the CPU."""
    images, given = read_set(image_folder(tmp_path / "set", x, labels), dataset=dataset.to("meta"))
    assert images.device.type == "meta" and given.device.type == "cpu"


@pytest.mark.parametrize(
    "form, convert, scale",
    [
        ({"form": "unit"}, lambda x: (x + 1) / 2, 1),
        ({"form": "signed"}, lambda x: x, 1),
        ({"form": "uint8"}, lambda x: ((x + 1) * 127.5).round().to(torch.uint8), 1),
        ({"form": "uint8"}, lambda x: (x + 1) * 127.5, 1),
        (NORMALIZED, lambda x: (((x + 1) / 2 - 0.1) / 0.5).double(), 1),
        (NORMALIZED, lambda x: ((1.3 * x + 1) / 2 - 0.1) / 0.5, 1.3),  # nothing is clamped
    ],
)
@pytest.mark.parametrize("names", [("images_best.pt", "labels_best.pt"), ("images.pt", "labels.pt")])
def test_a_pair_of_tensors_is_read_in_the_stated_form(tmp_path, dataset, x, labels, names, form, convert, scale):
    folder = pair(tmp_path / "set", convert(x), labels.float(), names)
    for path in (folder, folder / names[0]):
        check(read_set(path, dataset=dataset, **form), scale * x, labels)


def test_a_dc_file_is_read_with_the_numbers_it_carries(tmp_path, dataset, x, labels):
    unit, file = (x + 1) / 2, tmp_path / "res_DC_toy_ConvNet_2ipc.pt"
    accuracies = {"ConvNet": [np.float64(0.4), np.float32(0.5), 0.6]}
    torch.save({"data": [[1 - unit, labels], [unit, labels]], "accs_all_exps": accuracies}, file)
    check(read_set(file, dataset=dataset, form="unit", experiment=1), x, labels)
    check(read_set(file, dataset=dataset, form="unit"), -x, labels)
    with pytest.raises(ValueError, match=r"experiment=2: .* has 2, counted from 0"):
        read_set(file, dataset=dataset, form="unit", experiment=2)


def test_an_artefact_is_read_whatever_its_normalization_and_class_order(tmp_path, dataset, x, labels):
    folder = artefact(tmp_path / "set", 1.2 * x, labels, normalization=Normalization((0.1,), (0.7,)))
    check(read_set(folder, dataset=dataset), 1.2 * x, labels)
    folder = artefact(tmp_path / "other", x, labels, classes=("b", "c", "a"))
    check(read_set(folder, dataset=dataset), x[[4, 5, 0, 1, 2, 3]], labels)  # its third class is our first


# What the exporters write


@pytest.mark.parametrize("form", ["folder", "huggingface", "ddranking"])
@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_exported_is_read_back(tmp_path, dataset, x, labels, form, channels):
    normalization = Normalization((0.1,) * channels, (0.5,) * channels)
    given = x.expand(-1, channels, -1, -1)
    source = artefact(tmp_path / "set", given, labels, normalization=normalization, z=labels.float())
    export(source, form, tmp_path / "exported")
    values = {"form": "normalized", "mean": [0.1] * channels, "std": [0.5] * channels} if form == "ddranking" else {}
    check(read_set(tmp_path / "exported", dataset=dataset, **values), x, labels)


def test_ddranking_gets_tensors_and_the_learned_rate(tmp_path, x, labels):
    source = artefact(tmp_path / "set", x, labels, student_lr=torch.tensor(0.25))
    export(source, "ddranking", tmp_path / "exported")
    loaded = {file.name: torch.load(file, weights_only=True) for file in (tmp_path / "exported").iterdir()}
    assert set(loaded) == {"images.pt", "labels.pt", "lr.pt"} and loaded["lr.pt"].item() == 0.25
    assert torch.equal(loaded["images.pt"], NORMALIZATION.normalize(x))
    assert loaded["labels.pt"].dtype == torch.int64 and torch.equal(loaded["labels.pt"], labels)


def test_the_hugging_face_dataset_is_one_for_the_library_and_for_our_loader(tmp_path, x, labels):
    import datasets

    export(artefact(tmp_path / "set", x, labels), "huggingface", tmp_path / "exported")
    table = datasets.load_dataset(str(tmp_path / "exported"), split="train", cache_dir=str(tmp_path / "cache"))
    assert table.features["label"].names == list(NAMES) and table["label"][:] == labels.tolist()
    np.testing.assert_array_equal(np.asarray(table[3]["image"]), ((x[3, 0] + 1) * 127.5).round().numpy())
    for file in (tmp_path / "exported").rglob("train*.parquet"):
        shutil.copy(file, file.with_name(file.name.replace("train", "test")))
    splits = {"train": "train", "validation": 0.5, "test": "test"}
    ours = load_dataset(tmp_path / "exported", name="toy", size_px=SIZE_PX, channels=1, splits=splits)
    assert torch.equal(ours.test.x(), x) and torch.equal(ours.test.labels, labels)


def test_the_command_exports_and_refuses_in_one_line(tmp_path, x, labels):
    source, target = artefact(tmp_path / "set", x, labels), tmp_path / "exported"

    def run(*arguments):
        command = [sys.executable, "-m", "ld3m.reporting.export", *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    assert run(source, "folder", target).returncode == 0 and (target / "000 a" / "0.png").is_file()
    again = run(source, "folder", target)
    assert again.returncode == 1 and again.stderr == f"{target} is there already: remove it, or name another\n"


def test_an_export_that_is_refused_writes_nothing(tmp_path, x, labels):
    source = artefact(tmp_path / "set", x, labels)
    with pytest.raises(ValueError, match="format is 'zip'; there are ddranking, folder, huggingface"):
        export(source, "zip", tmp_path / "exported")
    with pytest.raises(FileNotFoundError, match="is missing"):
        export(tmp_path / "absent", "folder", tmp_path / "exported")
    assert list(tmp_path.iterdir()) == [source]


# What is refused


@pytest.mark.parametrize(
    "form, images, reason",
    [
        ("unit", lambda x: x[:, :, :8, :8], r"shape \(6, 1, 8, 8\), toy needs \(N, 1 or 3, 16, 16\)"),
        ("unit", lambda x: x[:, 0], r"shape \(6, 16, 16\)"),
        ("unit", lambda x: x.movedim(1, -1), r"shape \(6, 16, 16, 1\)"),
        ("unit", lambda x: x[:0], "0 images need one class each"),
        ("unit", lambda x: x.tolist(), "images is a list, not a dense tensor"),
        ("unit", lambda x: x.to_sparse(), "not a dense tensor"),
        ("unit", lambda x: torch.where(x > 0.5, torch.nan, x), "not finite"),
        ("unit", lambda x: torch.rand(6, 3, 16, 16), "the images are coloured, toy is not"),
        (None, lambda x: x, "form=None: the values of .* are 0 to 1, which looks like form='unit'; forms are uint8, "),
        ("bytes", lambda x: 2 * x - 1, "form='bytes': .* are -1 to 1, which looks like form='signed'"),
        ("unit", lambda x: 255 * x, "form='unit': .*which looks like form='uint8'"),
        ("unit", lambda x: 2 * x - 1, "which looks like form='signed'"),
        ("unit", lambda x: 4 * x - 2, "which looks like form='normalized'"),
        ("uint8", lambda x: x, "which looks like form='unit'"),
        ("signed", lambda x: x, "which looks like form='unit'"),
        ("normalized", lambda x: x, "which looks like form='unit'"),
        ("normalized", lambda x: 80 * x - 40, "most values are far outside of .*or are no images"),
    ],
)
def test_images_that_do_not_fit_are_refused(tmp_path, dataset, x, labels, form, images, reason):
    unit = ((x + 1) / 2 - (x.min() + 1) / 2) * 2 / (x.max() - x.min())  # from 0 to 1 in full
    folder = pair(tmp_path / "set", images(unit), labels)
    with pytest.raises(ValueError, match=reason):
        read_set(folder, dataset=dataset, **(NORMALIZED if form == "normalized" else {"form": form}))


@pytest.mark.parametrize(
    "labels, reason",
    [
        ([0, 0, 1, 1, 2, 3], r"the labels are 0, 1, 2, 3, not all of 0\.\.2"),
        ([0, 0, 1, 1, 2, -1], r"the labels are -1, 0, 1, 2"),
        ([0, 0, 1, 1, 1, 1], r"the labels are 0, 1, not all"),
        ([0, 0, 1, 1, 2], r"6 images need one class each, the labels are \(5,\)"),
        ([[1.0, 0, 0]] * 6, r"the labels are \(6, 3\)"),
        ([0, 0, 1, 1, 2, 0.5], "the labels are 0.0, 0.5"),
        ([0, 0, 1, 1, 2, float("nan")], "nan, not all"),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path, dataset, x, labels, reason):
    folder = pair(tmp_path / "set", (x + 1) / 2, torch.tensor(labels))
    with pytest.raises(ValueError, match=reason):
        read_set(folder, dataset=dataset, form="unit")


def test_a_tensor_that_no_memory_holds_is_refused_at_once(tmp_path, dataset):
    count = 10**10
    images = torch.zeros(1, 1, SIZE_PX, SIZE_PX).expand(count, -1, -1, -1)
    folder = pair(tmp_path / "set", images, torch.zeros(1, dtype=torch.int64).expand(count))
    with pytest.raises(ValueError, match=r"has 10000000000 images: allowed are 3 \(one a class\) to 18"):
        read_set(folder, dataset=dataset, form="unit")


@pytest.mark.parametrize(
    "values, reason",
    [
        ({"form": "unit", "mean": [0.1]}, "mean and std are for form='normalized'"),
        ({"form": "normalized"}, "needs mean and std of 1 channels, not None and None"),
        ({"form": "normalized", "mean": [0.1] * 3, "std": [0.5] * 3}, "needs mean and std of 1 channels"),
        ({"form": "normalized", "mean": [0.1], "std": [0.0]}, "one positive std a channel"),
    ],
)
def test_mean_and_std_are_those_of_the_form(tmp_path, dataset, x, labels, values, reason):
    images = (x + 1) / 2 if values["form"] == "unit" else 1.5 * x
    with pytest.raises(ValueError, match=reason):
        read_set(pair(tmp_path / "set", images, labels), dataset=dataset, **values)
    with pytest.raises(ValueError, match=r"form, mean and std are for \.pt files"):
        read_set(image_folder(tmp_path / "folder", x, labels), dataset=dataset, **values)


@pytest.mark.parametrize(
    "names", [("a", "b", "d"), ("1", "2", "3"), ("a", "1", "2"), ("0", "00", "1"), ("000 b", "001 a", "002 c")]
)
def test_class_folders_that_do_not_fit_are_refused(tmp_path, dataset, x, labels, names):
    with pytest.raises(ValueError, match=r"has the classes .*; needed are 'a', 'b', 'c', by name, by index"):
        read_set(image_folder(tmp_path / "set", x, labels, names), dataset=dataset)


def test_an_artefact_of_other_classes_or_with_changed_tensors_is_refused(tmp_path, dataset, x, labels):
    with pytest.raises(ValueError, match="has the classes 'a', 'b', 'd'; needed are"):
        read_set(artefact(tmp_path / "other", x, labels, classes=("a", "b", "d")), dataset=dataset)
    file = artefact(tmp_path / "set", x, labels) / "distilled.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="do not match the hash"):
        read_set(tmp_path / "set", dataset=dataset)


def test_missing_classes_and_files_are_refused(tmp_path, dataset, x, labels):
    with pytest.raises(ValueError, match="needed are"):
        read_set(image_folder(tmp_path / "few", x[:4], labels[:4]), dataset=dataset)
    folder = image_folder(tmp_path / "many", x, labels)
    shutil.copytree(folder / "a", folder / "d")
    with pytest.raises(ValueError, match="and no other"):
        read_set(folder, dataset=dataset)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no class folders"):
        read_set(tmp_path / "empty", dataset=dataset)
    with pytest.raises(FileNotFoundError, match="absent is missing: give an image folder"):
        read_set(tmp_path / "absent", dataset=dataset)
    torch.save(torch.zeros(1), tmp_path / "images_best.pt")
    with pytest.raises(FileNotFoundError, match=r"labels_best\.pt is missing"):
        read_set(tmp_path, dataset=dataset, form="unit")
    (tmp_path / "set.zip").write_bytes(b"")
    with pytest.raises(ValueError, match=r"neither a folder nor a \.pt file"):
        read_set(tmp_path / "set.zip", dataset=dataset)


COLOUR = Image.new("RGB", (SIZE_PX, SIZE_PX), (200, 10, 10))


@pytest.mark.parametrize(
    "image, name, reason",
    [
        (COLOUR, "9.png", "the images are coloured, toy is not"),
        (Image.new("RGBA", COLOUR.size, (9, 9, 9, 254)), "9.png", "9.png is partly transparent"),
        (COLOUR.convert("CMYK"), "9.jpg", "9.jpg cannot be used .*mode CMYK: save it as"),
        (Image.fromarray(np.full(COLOUR.size, 300, np.uint16)), "9.png", "9.png cannot be used .*mode I;16"),
        (Image.new("L", (20, SIZE_PX)), "9.png", "9.png cannot be used .*20 x 16 px, not 16 x 16: resize it first"),
    ],
)
def test_images_that_would_lose_something_are_refused(tmp_path, dataset, x, labels, image, name, reason):
    folder = image_folder(tmp_path / "set", x, labels)
    image.save(folder / "b" / name)
    with pytest.raises(ValueError, match=reason):
        read_set(folder, dataset=dataset)
