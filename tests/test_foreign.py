"""Sets made elsewhere: what is read is exactly what was stored, and what does not fit is refused."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import CLASSES, NORMALIZATION, SIZE_PX
from PIL import Image
from test_artefact import RECORD

from ld3m.data.dataset import Dataset, Normalization, Split, initial_indices
from ld3m.evaluation.artefact import write_artefact
from ld3m.evaluation.foreign import read_set
from ld3m.reporting.export import export
from ld3m.runtime.paths import ROOT

IPC = 2
NAMES = ("a", "b", "c")
SIZE = (SIZE_PX, SIZE_PX)
UNIT = {"form": "unit"}
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


def image_folder(folder, x, labels, names=NAMES, convert=lambda image: image):
    for k, (image, label) in enumerate(zip(x, labels, strict=True)):
        place = folder / names[label]
        place.mkdir(parents=True, exist_ok=True)
        uint8 = ((image[0] + 1) * 127.5).round().to(torch.uint8).numpy()
        convert(Image.fromarray(uint8)).save(place / f"{k}.png")
    return folder


def artefact(folder, x, labels, *, normalization=NORMALIZATION, classes=NAMES, **codes):
    tensors = {"images": normalization.normalize(x)} | codes
    shared = {"labels": labels, "classes": classes, "normalization": normalization}
    write_artefact(folder, tensors, **shared, name="toy", record=RECORD)
    return folder


def pair(folder, images, labels, names=("images_best.pt", "labels_best.pt")):
    folder.mkdir(exist_ok=True)
    torch.save(images, folder / names[0])
    torch.save(labels, folder / names[1])
    return folder


def refuse(path, dataset, message, *, error=ValueError, **form):
    with pytest.raises(error, match=message):
        read_set(path, dataset=dataset, **form)


@pytest.mark.parametrize(
    "names, mode, classes, channels",
    [
        (NAMES, "L", NAMES, 1),
        (("0", "1", "2"), "LA", NAMES, 1),
        (("000", "001", "002"), "RGB", NAMES, 3),
        (("000 a", "001 b", "002 c"), "RGBA", NAMES, 3),
        (("2", "0", "1"), "P", ("2", "0", "1"), 3),  # names, not indices
    ],
)
def test_an_image_folder_is_read_by_name_and_by_index(tmp_path, dataset, x, labels, names, mode, classes, channels):
    split = Split(dataset.train.uint8.expand(-1, channels, -1, -1), dataset.train.labels, classes)
    normalization = Normalization(NORMALIZATION.mean * channels, NORMALIZATION.std * channels)
    folder = image_folder(tmp_path / "set", x, labels, names, convert=lambda image: image.convert(mode))
    read = read_set(folder, dataset=Dataset("toy", split, split, split, normalization))
    check(read, x.expand(-1, channels, -1, -1), labels)


def test_images_are_in_the_order_of_their_numbers_and_on_the_device_of_the_dataset(tmp_path, dataset, x):
    x, labels = x.repeat(4, 1, 1, 1)[:18], torch.arange(18) % 3
    order = labels.argsort(stable=True)
    folder = image_folder(tmp_path / "set", x, labels)
    check(read_set(folder, dataset=dataset), x[order], labels[order])
    check(read_set(pair(tmp_path / "pair", x, labels), dataset=dataset, form="signed"), x[order], labels[order])
    images, labels = read_set(folder, dataset=dataset.to("meta"))
    assert images.device.type == "meta" and labels.device.type == "cpu"


@pytest.mark.parametrize(
    "form, convert, scale",
    [
        (UNIT, lambda x: (x + 1) / 2, 1),
        ({"form": "signed"}, lambda x: x, 1),
        ({"form": "uint8"}, lambda x: ((x + 1) * 127.5).round().to(torch.uint8), 1),
        (NORMALIZED, lambda x: ((1.3 * x.double() + 1) / 2 - 0.1) / 0.5, 1.3),  # nothing is clamped
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
    refuse(file, dataset, r"experiment=2: .*\.pt holds 2, counted from 0, each .*\[images", form="unit", experiment=2)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "pack, reason",
    [
        (lambda x, y: {"images": x, "labels": y}, None),
        (lambda x, y: (x, y), None),
        (lambda x, y: {"x": x, "y": y}, r"holds a dict of 'x', 'y': save \[images, labels\]"),
        (lambda x, y: {"data": x, "labels": y}, "holds a dict of 'data', 'labels'"),
        (lambda x, y: {"data": [x, 1]}, r"experiment=0: .* holds 2, .* must be \[images, labels\]"),
        (lambda x, y: x, "holds a Tensor: save"),
        (lambda x, y: [x, y, 0.1], "holds a list of 3: save"),
        (lambda x, y: [x.numpy(), y], r"Nothing of it was run: save .* of a numpy array torch\.from_numpy"),
    ],
)
def test_a_file_is_a_pair_or_the_error_says_what_it_holds(tmp_path, dataset, x, labels, pack, reason):
    torch.save(pack(x, labels), tmp_path / "set.pt")
    if reason:
        refuse(tmp_path / "set.pt", dataset, reason, form="signed")
    else:
        check(read_set(tmp_path / "set.pt", dataset=dataset, form="signed"), x, labels)


def test_it_is_printed_which_class_is_which(tmp_path, dataset, x, labels, capsys):
    pair(tmp_path / "pair", x, labels)
    image_folder(tmp_path / "folder", x, labels, ("2", "0", "1"))
    artefact(tmp_path / "own", x, labels, classes=("b", "c", "a"))
    for name, form in (("pair", {"form": "signed"}), ("folder", {}), ("own", {})):
        read_set(tmp_path / name, dataset=dataset, **form)
    assert capsys.readouterr().out.splitlines() == [
        "label of the file -> class of toy: 0 -> a, 1 -> b, 2 -> c",
        "class of the set -> class of toy: 0 -> a, 1 -> b, 2 -> c",
        "class of the set -> class of toy: b -> b, c -> c, a -> a",
    ]


def test_a_pair_is_read_and_cut(tmp_path, dataset, x, labels):
    torch.save([x, labels], tmp_path / "set.pt")
    found, kinds = read_set(tmp_path / "set.pt", dataset=dataset, form="signed", factor=2)
    assert len(found) == 4 * len(x) and torch.equal(kinds, labels.repeat_interleave(4))
    for k, part in enumerate((x[..., :8, :8], x[..., :8, 8:], x[..., 8:, :8], x[..., 8:, 8:])):
        large = torch.nn.functional.interpolate(part, size=(16, 16), mode="bilinear")
        torch.testing.assert_close(dataset.normalization.denormalize(found[k::4]), large, rtol=0, atol=1e-5)
    refuse(tmp_path / "set.pt", dataset, "factor=3: must divide the side of the images, 16", form="signed", factor=3)


def test_an_artefact_is_read_whatever_its_normalization_and_class_order(tmp_path, dataset, x, labels):
    folder = artefact(tmp_path / "set", 1.2 * x, labels, normalization=Normalization((0.1,), (0.7,)))
    check(read_set(folder, dataset=dataset), 1.2 * x, labels)
    folder = artefact(tmp_path / "other", x, labels, classes=("b", "c", "a"))
    check(read_set(folder, dataset=dataset), x[[4, 5, 0, 1, 2, 3]], labels)  # its third class is our first


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("form", ["folder", "huggingface", "ddranking"])
def test_what_is_exported_is_read_back(tmp_path, dataset, x, labels, form, channels):
    normalization = Normalization((0.1,) * channels, (0.5,) * channels)
    given, rate = x.expand(-1, channels, -1, -1), torch.tensor(0.25)
    source = artefact(tmp_path / "set", given, labels, normalization=normalization, student_lr=rate)
    export(source, form, tmp_path / "exported")
    check(read_set(tmp_path / "exported", dataset=dataset), x, labels)
    if form == "ddranking":
        loaded = {file.stem: torch.load(file, weights_only=True) for file in (tmp_path / "exported").glob("*.pt")}
        expected = {"images": normalization.normalize(given), "labels": labels, "lr": rate}
        torch.testing.assert_close(loaded, expected, rtol=0, atol=0)


def test_the_hugging_face_dataset_is_one_for_the_library(tmp_path, x, labels):
    import datasets

    export(artefact(tmp_path / "set", x, labels), "huggingface", tmp_path / "exported")
    table = datasets.load_dataset(str(tmp_path / "exported"), split="train", cache_dir=str(tmp_path / "cache"))
    assert table.features["label"].names == list(NAMES) and table["label"][:] == labels.tolist()
    np.testing.assert_array_equal(np.asarray(table[3]["image"]), ((x[3, 0] + 1) * 127.5).round().numpy())


def test_an_export_that_is_refused_writes_nothing_and_is_one_line_of_the_command(tmp_path, x, labels):
    source, target = artefact(tmp_path / "set", x, labels), tmp_path / "exported"
    with pytest.raises(ValueError, match="format is 'zip'; there are ddranking, folder, huggingface"):
        export(source, "zip", target)
    with pytest.raises(FileNotFoundError, match="is missing"):
        export(tmp_path / "absent", "folder", target)
    assert list(tmp_path.iterdir()) == [source]
    command = [sys.executable, "-m", "ld3m.reporting.export", str(source), "folder", str(target)]
    first, again = (subprocess.run(command, cwd=ROOT, capture_output=True, text=True) for _ in range(2))
    assert first.returncode == 0 and (target / "000 a" / "0.png").is_file()
    assert again.returncode == 1 and again.stderr == f"{target} is there already: remove it, or name another\n"


@pytest.mark.parametrize(
    "form, change, reason",
    [
        (UNIT, lambda x, y: (x.movedim(1, -1), y), r"shape \(6, 16, 16, 1\), .*last: save images\.movedim\(-1, 1\)"),
        (UNIT, lambda x, y: (x[:, :, :8, :8], y), r"shape \(6, 1, 8, 8\), toy needs \(N, 1 or 3, 16, 16\) with N"),
        (UNIT, lambda x, y: (x[:0], y[:0]), r"shape \(0, 1, 16, 16\)"),
        (UNIT, lambda x, y: (x[:1].expand(10**10, -1, -1, -1), y), r"10000000000, .* 3 \(one a class\) to 18"),
        (UNIT, lambda x, y: (x, y.tolist()), "must be dense real tensors, not list"),
        (UNIT, lambda x, y: (x.to_sparse(), y), "must be dense real tensors"),
        (UNIT, lambda x, y: (x, y.to(torch.complex64)), "must be dense real tensors"),
        (NORMALIZED, lambda x, y: (torch.where(x > 0.99, 1e300, x.double()), y), "values that are not finite"),
        (UNIT, lambda x, y: (torch.rand(6, 3, 16, 16), y), "the images are colored, toy is not"),
        ({}, lambda x, y: (x, y), r"form is not given: .* 0 to 1, which looks like form='unit'; forms are unit \[0, 1"),
        ({"form": "bytes"}, lambda x, y: (2 * x - 1, y), "form='bytes': .* are -1 to 1, .* like form='signed'"),
        (UNIT, lambda x, y: (255 * x, y), "form='unit': .*which looks like form='uint8'"),
        (NORMALIZED, lambda x, y: (x, y), "which looks like form='unit'"),
        (NORMALIZED, lambda x, y: (80 * x - 40, y), "most values are far outside of .*or are no images"),
        (NORMALIZED | {"std": [0.0]}, lambda x, y: (3 * x - 1, y), "one positive std a channel"),
        ({"form": "normalized"}, lambda x, y: (3 * x - 1, y), "needs 1 numbers .*, not mean=None and std=None"),
        (UNIT | {"mean": [0.1]}, lambda x, y: (x, y), "form='unit' needs 0 numbers as mean and as std"),
        (UNIT, lambda x, y: (x, torch.tensor([0, 0, 1, 1, 2, 3])), r"the labels are 0, 1, 2, 3, not all of 0\.\.2"),
        (UNIT, lambda x, y: (x, y + 1), r"the labels are 1, 2, 3, not all of 0\.\.2; they count from 1: subtract 1"),
        (UNIT, lambda x, y: (x, y[:5]), r"the labels must be a class an image, \(6,\), not \(5,\)"),
        (UNIT, lambda x, y: (x, torch.eye(3)[y]), r"not \(6, 3\)\. Soft labels .* save labels\.argmax\(1\)"),
        (UNIT | {"experiment": 3}, lambda x, y: (x, y), "experiment=3: .* holds 1, counted from 0"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path, dataset, x, labels, form, change, reason):
    unit = ((x + 1) / 2 - (x.min() + 1) / 2) * 2 / (x.max() - x.min())  # from 0 to 1 in full
    refuse(pair(tmp_path / "set", *change(unit, labels)), dataset, reason, **form)


@pytest.mark.parametrize(
    "names, reason",
    [
        (("a", "b", "d"), "missing: 'c'; further: 'd'"),
        (("a", "1", "2"), "missing: 'a'; further: 'a'"),
        (("0", "00", "1"), "missing: 'c'; further: '0'"),
        (("000 b", "001 a", "002 c"), "missing: 'a', 'b'; further: '000 b', '001 a'"),
        (("1", "2", "3"), "missing: 'a'; further: '3'. They count from 1, labels from 0"),
        (("001 a", "002 b", "003 c"), "'003 c'. They count from 1, labels from 0"),
    ],
)
def test_classes_that_do_not_fit_are_refused(tmp_path, dataset, x, labels, names, reason):
    theirs = image_folder(tmp_path / "set", x, labels, names)
    ours = artefact(tmp_path / "own", x, labels, classes=names)
    for folder in (theirs, ours):
        refuse(folder, dataset, f"classes are not those of the data set; .*{reason}. Needed is each class once")


@pytest.mark.parametrize("inside", ["images", "train/images", "run-0", "test"])
def test_the_folder_that_holds_the_classes_is_named(tmp_path, dataset, x, labels, inside):
    make = artefact if inside == "run-0" else image_folder
    make(tmp_path / "set" / inside, x, labels)
    (tmp_path / "set" / "logs").mkdir()
    refuse(tmp_path / "set", dataset, f"not hold the classes of toy, but '{inside}' in it: .* never one of test images")


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "[]",
            "null",
            "\xff",
            '{"mean": [0.4]}',
            '{"mean": 0.4, "std": 0.3}',
            '{"mean": [0.4, 0.4], "std": [0.3]}',
        ),
        *('{"mean": [NaN], "std": [1]}', '{"mean": [0.4], "std": [0]}', '{"mean": ["a"], "std": [1]}'),
        '{"mean": [0.4, 0.4, 0.4], "std": [0.3, 0.3, 0.3]}',
    ],
)
def test_a_broken_normalization_beside_the_images_is_refused(tmp_path, dataset, x, labels, text):
    folder = pair(tmp_path / "set", NORMALIZATION.normalize(x), labels)
    (folder / "normalization.json").write_text(text, encoding="latin-1")
    refuse(folder, dataset, r'normalization.json must hold {"mean": \[...\], "std": .* with 1 numbers each')


@pytest.mark.parametrize(
    "names, asked, reason",
    [
        (("images_zca_best.pt", "labels_best.pt"), "", r"zca_best\.pt: by the file names .* whitened images \(ZCA\)"),
        (("images_zca_5.pt", "images_5.pt", "labels_5.pt"), "images_5.pt", "images_5.pt: .* whitened"),  # MTT's
        (("images_best.pt",), "", r"labels_best\.pt is missing"),
        (("images_5.pt", "images_10.pt"), "", "holds 'images_10.pt', 'images_5.pt': name one of these files"),
    ],
)
def test_files_that_cannot_be_meant_are_refused(tmp_path, dataset, x, labels, names, asked, reason):
    for name in names:
        torch.save(labels if "labels" in name else x, tmp_path / name)
    refuse(tmp_path / asked, dataset, reason, error=(ValueError, FileNotFoundError), form="signed")


def test_missing_folders_and_further_classes_are_refused(tmp_path, dataset, x, labels):
    folder = image_folder(tmp_path / "many", x, labels)
    for given in ({"form": "unit"}, {"experiment": 3}):
        refuse(folder, dataset, r"form, mean, std, experiment and factor are for \.pt files", **given)
    shutil.copytree(folder / "a", folder / "d")
    refuse(folder, dataset, "not those of the data set; further: 'd'. Needed")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", dataset, "has no class folders")
    for absent in ("absent", "absent.pt"):
        refuse(tmp_path / absent, dataset, f"{absent} is neither a folder of images", error=FileNotFoundError)


@pytest.mark.parametrize(
    "image, reason",
    [
        (Image.new("RGB", SIZE, (200, 10, 10)), "the images are colored, toy is not"),
        (Image.new("RGBA", SIZE, (9, 9, 9, 254)), "mode RGBA: save it as one opaque 8 bit"),
        (Image.fromarray(np.full(SIZE, 300, np.uint16)), "9.png cannot be used .*mode I;16"),
        (Image.new("L", (20, SIZE_PX)), "9.png cannot be used .*20 x 16 px .* of 16 x 16 px"),
    ],
)
def test_images_that_would_lose_something_are_refused(tmp_path, dataset, x, labels, image, reason):
    folder = image_folder(tmp_path / "set", x, labels)
    image.save(folder / "b" / "9.png")
    refuse(folder, dataset, reason)
