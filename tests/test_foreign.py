"""Sets that others made: what is read is exactly what was stored, and what does not fit is refused unread."""

import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import CLASSES, NORMALIZATION, SIZE_PX
from PIL import Image

from ld3m.data.dataset import Dataset, Normalization, Split, initial_indices
from ld3m.data.sources import decode, read_split
from ld3m.evaluation.artefact import write_artefact
from ld3m.evaluation.foreign import read_set
from ld3m.reporting.export import export
from ld3m.runtime.paths import ROOT

IPC = 2
NAMES = ("a", "b", "c")
FORMS = {"form": "normalised", "mean": [0.1], "std": [0.5]}
UNIT = {"form": "unit"}


@pytest.fixture
def pixels(dataset):
    """Real pixels (N, 1, H, W), classes contiguous."""
    return dataset.train.x(initial_indices(dataset.train, ipc=IPC, seed=0))


@pytest.fixture
def labels():
    return torch.arange(CLASSES).repeat_interleave(IPC)


def expected(pixels):
    return (((pixels + 1) / 2).double() - NORMALIZATION.mean[0]) / NORMALIZATION.std[0]


def check(read, pixels, labels):
    images, given = read
    torch.testing.assert_close(images.double(), expected(pixels), rtol=1e-5, atol=1e-5)
    assert torch.equal(given, labels) and images.dtype == torch.float32


def coloured(dataset):
    """The data set with three equal channels."""
    parts = {name: getattr(dataset, name) for name in ("train", "validation", "test")}
    parts = {name: Split(part.uint8.expand(-1, 3, -1, -1), part.labels, NAMES) for name, part in parts.items()}
    normalization = Normalization(NORMALIZATION.mean * 3, NORMALIZATION.std * 3)
    return Dataset("toy", normalization=normalization, **parts)


def image_folder(folder, pixels, labels, names=NAMES, convert=lambda image: image, suffix="png"):
    for k, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        place = folder / names[label]
        place.mkdir(parents=True, exist_ok=True)
        uint8 = ((image[0] + 1) * 127.5).round().to(torch.uint8).numpy()
        convert(Image.fromarray(uint8)).save(place / f"{k}.{suffix}")
    return folder


def artefact(folder, pixels, labels, *, normalization=NORMALIZATION, classes=NAMES, **codes):
    recipe = {"learning_rate": 0.01, "epochs": 3}
    configuration = {"iterations": 4, "network": "convnet", "network_size": {"width": 8}, "seed": 0}
    configuration |= {"validation_recipe": recipe, "augmentation": "flip", "data_sha256": "d", "prior_sha256": None}
    write_artefact(
        folder,
        {"images": normalization.normalize(pixels)} | codes,
        labels=labels,
        classes=classes,
        normalization=normalization,
        name="toy",
        record={
            "configuration": configuration,
            "validation": [{"iteration": 0, "accuracy": 0.5}],
            "cost": {},
            "score": {"split": "validation", "accuracy": [0.5, 0.7]},
        },
    )
    return folder


def pair(folder, images, labels, names=("images_best.pt", "labels_best.pt")):
    folder.mkdir(exist_ok=True)
    torch.save(images, folder / names[0])
    torch.save(labels, folder / names[1])
    return folder


# what can be read


@pytest.mark.parametrize("names", [NAMES, ("0", "1", "2"), ("000", "001", "002"), ("000 a", "001 b", "002 c")])
def test_an_image_folder_is_read_by_name_and_by_index(tmp_path, dataset, pixels, labels, names):
    check(read_set(image_folder(tmp_path / "set", pixels, labels, names), dataset=dataset), pixels, labels)


def test_class_names_that_are_numbers_are_names(tmp_path, dataset, pixels, labels):
    splits = {name: getattr(dataset, name) for name in ("train", "validation", "test")}
    other = {name: Split(split.uint8, split.labels, ("2", "0", "1")) for name, split in splits.items()}
    folder = image_folder(tmp_path / "set", pixels, labels, ("2", "0", "1"))
    check(read_set(folder, dataset=Dataset("toy", normalization=NORMALIZATION, **other)), pixels, labels)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P"])
def test_modes_are_converted_where_nothing_is_lost(tmp_path, dataset, pixels, labels, mode):
    folder = image_folder(tmp_path / "set", pixels, labels, convert=lambda image: image.convert(mode))
    check(read_set(folder, dataset=dataset), pixels, labels)
    images, _ = read_set(folder, dataset=coloured(dataset))
    torch.testing.assert_close(images.double(), expected(pixels).expand(-1, 3, -1, -1), rtol=1e-5, atol=1e-5)


def test_files_are_in_the_order_of_their_numbers(tmp_path, dataset, pixels):
    pixels, labels = pixels.repeat(4, 1, 1, 1)[:18], torch.arange(18) % 3
    images, read = read_set(image_folder(tmp_path / "set", pixels, labels), dataset=dataset)
    order = labels.argsort(stable=True)
    check((images, read), pixels[order], labels[order])


@pytest.mark.parametrize("names", [("images_best.pt", "labels_best.pt"), ("images.pt", "labels.pt")])
def test_a_pair_of_tensors_is_read_as_what_it_is_said_to_be(tmp_path, dataset, pixels, labels, names):
    unit = (pixels + 1) / 2
    check(read_set(pair(tmp_path / "unit", unit, labels, names), dataset=dataset, form="unit"), pixels, labels)
    folder = pair(tmp_path / "normalised", ((unit - 0.1) / 0.5).double(), labels.float(), names)
    check(read_set(folder, dataset=dataset, **FORMS), pixels, labels)
    check(read_set(folder / names[0], dataset=dataset, **FORMS), pixels, labels)


def test_images_are_on_the_device_of_the_dataset_and_labels_on_the_cpu(tmp_path, dataset, pixels, labels):
    """Evaluation networks train where the real images are; indices and labels stay on the CPU."""
    images, given = read_set(image_folder(tmp_path / "set", pixels, labels), dataset=dataset.to("meta"))
    assert images.device.type == "meta" and given.device.type == "cpu"


def test_images_are_sorted_by_class(tmp_path, dataset, pixels, labels):
    order = torch.tensor([4, 0, 2, 5, 3, 1])  # leaves the two images of a class in their order
    folder = pair(tmp_path / "set", ((pixels + 1) / 2)[order], labels[order])
    check(read_set(folder, dataset=dataset, form="unit"), pixels, labels)


def test_values_beyond_the_range_of_pixels_are_kept(tmp_path, dataset, pixels, labels):
    pixels = 1.3 * pixels
    folder = pair(tmp_path / "set", ((pixels + 1) / 2 - 0.1) / 0.5, labels)
    check(read_set(folder, dataset=dataset, **FORMS), pixels, labels)


def test_a_dc_file_is_read_with_the_numbers_it_carries(tmp_path, dataset, pixels, labels):
    unit = (pixels + 1) / 2
    accuracies = {"ConvNet": [np.float64(0.4), np.float32(0.5), 0.6]}
    file = tmp_path / "res_DC_toy_ConvNet_2ipc.pt"
    torch.save({"data": [[1 - unit, labels], [unit, labels]], "accs_all_exps": accuracies}, file)
    check(read_set(file, dataset=dataset, form="unit", experiment=1), pixels, labels)
    check(read_set(file, dataset=dataset, form="unit"), -pixels, labels)
    with pytest.raises(ValueError, match="has 2 experiments, experiment is 2"):
        read_set(file, dataset=dataset, form="unit", experiment=2)


def test_our_artefact_is_read_whatever_it_is_normalised_with(tmp_path, dataset, pixels, labels):
    other = Normalization((0.1,), (0.7,))
    folder = artefact(tmp_path / "set", 1.2 * pixels, labels, normalization=other)
    check(read_set(folder, dataset=dataset), 1.2 * pixels, labels)


def test_the_classes_of_an_artefact_are_matched_by_name(tmp_path, dataset, pixels, labels):
    folder = artefact(tmp_path / "set", pixels, labels, classes=("b", "c", "a"))
    order = torch.tensor([4, 5, 0, 1, 2, 3])  # its third class is our first
    check(read_set(folder, dataset=dataset), pixels[order], labels)


# what the exporters write


@pytest.mark.parametrize("form", ["folder", "huggingface", "ddranking"])
@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_exported_is_read_back(tmp_path, dataset, pixels, labels, form, channels):
    normalization = Normalization((0.1,) * channels, (0.5,) * channels)
    source = artefact(
        tmp_path / "set", pixels.expand(-1, channels, -1, -1), labels, normalization=normalization, z=labels.float()
    )
    export(source, form, tmp_path / "exported")
    values = {"form": "normalised", "mean": [0.1] * channels, "std": [0.5] * channels} if form == "ddranking" else {}
    check(read_set(tmp_path / "exported", dataset=dataset, **values), pixels, labels)


def test_ddranking_gets_tensors_and_the_learned_rate(tmp_path, pixels, labels):
    source = artefact(tmp_path / "set", pixels, labels, student_lr=torch.tensor(0.25))
    export(source, "ddranking", tmp_path / "exported")
    loaded = {file.name: torch.load(file, weights_only=True) for file in (tmp_path / "exported").iterdir()}
    assert set(loaded) == {"images.pt", "labels.pt", "lr.pt"} and loaded["lr.pt"].item() == 0.25
    assert torch.equal(loaded["images.pt"], NORMALIZATION.normalize(pixels))
    assert loaded["labels.pt"].dtype == torch.int64 and torch.equal(loaded["labels.pt"], labels)


def test_the_hugging_face_dataset_is_one_for_the_library_and_for_our_loader(tmp_path, pixels, labels):
    import datasets

    export(artefact(tmp_path / "set", pixels, labels), "huggingface", tmp_path / "exported")
    table = datasets.load_dataset(str(tmp_path / "exported"), split="train", cache_dir=str(tmp_path / "cache"))
    assert table.features["label"].names == list(NAMES) and table["label"][:] == labels.tolist()
    np.testing.assert_array_equal(np.asarray(table[3]["image"]), ((pixels[3, 0] + 1) * 127.5).round().numpy())
    ours = read_split(str(tmp_path / "exported"), "train", key="toy")
    settings = {"size_px": SIZE_PX, "channels": 1, "named": None, "where": "toy"}
    uint8 = torch.from_numpy(np.concatenate(list(decode(ours, "image", np.arange(len(ours)), **settings))))
    assert torch.equal(uint8.float() / 127.5 - 1, pixels)


def test_the_command_exports_and_refuses_in_one_line(tmp_path, pixels, labels):
    source, target = artefact(tmp_path / "set", pixels, labels), tmp_path / "exported"

    def run(*arguments):
        command = [sys.executable, "-m", "ld3m.reporting.export", *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    assert run(source, "folder", target).returncode == 0 and (target / "000 a" / "0.png").is_file()
    again = run(source, "folder", target)
    assert again.returncode == 1 and again.stderr == f"{target} is there already: remove it, or name another\n"


def test_an_export_that_is_refused_writes_nothing(tmp_path, pixels, labels):
    source = artefact(tmp_path / "set", pixels, labels)
    with pytest.raises(ValueError, match="format is 'zip'; there are ddranking, folder, huggingface"):
        export(source, "zip", tmp_path / "exported")
    with pytest.raises(FileNotFoundError, match="is missing"):
        export(tmp_path / "absent", "folder", tmp_path / "exported")
    assert list(tmp_path.iterdir()) == [source]


# what is refused


class Payload:
    def __reduce__(self):
        return exec, ("raise SystemExit('the code of the file was run')",)


def test_a_file_that_carries_code_is_refused_and_not_run(tmp_path, dataset, labels):
    folder = pair(tmp_path / "set", Payload(), labels)
    with pytest.raises(ValueError, match=r"images_best\.pt was not read: .*could run code \(GLOBAL \S*exec") as caught:
        read_set(folder, dataset=dataset, form="unit")
    assert "weights_only" not in str(caught.value)
    with pytest.raises(SystemExit):  # it would have been
        torch.load(folder / "images_best.pt", weights_only=False)
    (folder / "images_best.pt").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ValueError, match="was not read"):
        read_set(folder, dataset=dataset, form="unit")


def test_a_broken_file_is_refused(tmp_path, dataset, pixels, labels):
    folder = pair(tmp_path / "set", pixels, labels)
    data = (folder / "images_best.pt").read_bytes()
    for broken in (b"", b"not a tensor", data[: len(data) // 2]):
        (folder / "images_best.pt").write_bytes(broken)
        with pytest.raises(ValueError, match=r"images_best\.pt was not read: it is broken"):
            read_set(folder, dataset=dataset, form="unit")


@pytest.mark.parametrize(
    "images, reason",
    [
        (lambda x: x[:, :, :8, :8], r"shape \(6, 1, 8, 8\), toy needs \(N, 1 or 3, 16, 16\)"),
        (lambda x: x[:, 0], r"shape \(6, 16, 16\)"),
        (lambda x: x.expand(-1, 2, -1, -1), r"shape \(6, 2, 16, 16\)"),
        (lambda x: x.movedim(1, -1), r"shape \(6, 16, 16, 1\)"),
        (lambda x: x[:0], r"0 images need as many labels"),
        (lambda x: x.tolist(), "images is a list, not a dense tensor"),
        (lambda x: x.to_sparse(), "not a dense tensor"),
        (lambda x: (255 * x).to(torch.uint8), "images are torch.uint8: save them as floating point"),
        (lambda x: 255 * x, "the values are 0 to 2.*which is not form='unit'"),
        (lambda x: 2 * x - 1, "the values are -1 to .*which is not form='unit'"),
        (lambda x: torch.where(x > 0.5, torch.nan, x), "not finite"),
        (lambda x: torch.where(x > 0.5, torch.inf, x), "to inf, which is not form='unit'"),
        (lambda x: torch.rand(6, 3, 16, 16), "the images are coloured, the data set is not"),
    ],
)
def test_images_that_do_not_fit_are_refused(tmp_path, dataset, pixels, labels, images, reason):
    folder = pair(tmp_path / "set", images((pixels + 1) / 2), labels)
    with pytest.raises(ValueError, match=reason):
        read_set(folder, dataset=dataset, form="unit")


@pytest.mark.parametrize(
    "labels, reason",
    [
        ([0, 0, 1, 1, 2, 3], r"the labels are \[0, 1, 2, 3\], but toy has the classes 0\.\.2"),
        ([0, 0, 1, 1, 2, -1], r"the labels are \[-1, 0, 1, 2\]"),
        ([0, 0, 1, 1, 1, 1], r"the labels are \[0, 1\], .* each needs an image"),
        ([0, 0, 1, 1, 2], r"6 images need as many labels"),
        ([[1.0, 0, 0]] * 6, r"shape \(6, 3\) \(soft labels are not judged\)"),
        ([0, 0, 1, 1, 2, 0.5], "labels must be whole numbers"),
        ([0, 0, 1, 1, 2, float("nan")], "labels must be whole numbers"),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path, dataset, pixels, labels, reason):
    folder = pair(tmp_path / "set", (pixels + 1) / 2, torch.tensor(labels))
    with pytest.raises(ValueError, match=reason):
        read_set(folder, dataset=dataset, form="unit")


def test_a_tensor_that_no_memory_holds_is_refused_at_once(tmp_path, dataset):
    count = 10**10
    images = torch.zeros(1, 1, SIZE_PX, SIZE_PX).expand(count, -1, -1, -1)
    folder = pair(tmp_path / "set", images, torch.zeros(1, dtype=torch.int64).expand(count))
    with pytest.raises(ValueError, match=r"has 10000000000 images; allowed are 3 \(one a class\) to 18"):
        read_set(folder, dataset=dataset, form="unit")


@pytest.mark.parametrize(
    "values, reason",
    [
        ({}, "form is None: say what the values"),
        ({"form": "bytes"}, "form is 'bytes': say"),
        ({"form": "unit", "mean": [0.1]}, "mean and std are for form='normalised'"),
        ({"form": "normalised"}, "needs mean and std of 1 channels, got None and None"),
        ({"form": "normalised", "mean": [0.1] * 3, "std": [0.5] * 3}, "needs mean and std of 1 channels"),
        ({"form": "normalised", "mean": [0.1], "std": [0.0]}, "one positive std a channel"),
        (FORMS, "no pixel is below the mean: this looks like form='unit'"),
    ],
)
def test_the_form_must_be_said_and_be_plausible(tmp_path, dataset, pixels, labels, values, reason):
    folder = pair(tmp_path / "set", (pixels + 1) / 2, labels)
    with pytest.raises(ValueError, match=reason):
        read_set(folder, dataset=dataset, **values)


def test_another_normalisation_is_noticed_where_it_shows(tmp_path, dataset, pixels, labels):
    folder = pair(tmp_path / "set", 40 * pixels, labels)
    with pytest.raises(ValueError, match=r"the pixels are far outside of \[0, 1\]: another mean and std"):
        read_set(folder, dataset=dataset, **FORMS)


@pytest.mark.parametrize(
    "names, reason",
    [
        (("a", "b", "d"), r"has the classes \['a', 'b', 'd'\]; needed are all of \['a', 'b', 'c'\]"),
        (("1", "2", "3"), "by index from 0"),
        (("a", "1", "2"), "no other"),
        (("0", "00", "1"), "no other"),
        (("000 b", "001 a", "002 c"), "no other"),
    ],
)
def test_class_folders_that_do_not_fit_are_refused(tmp_path, dataset, pixels, labels, names, reason):
    with pytest.raises(ValueError, match=reason):
        read_set(image_folder(tmp_path / "set", pixels, labels, names), dataset=dataset)


def test_a_missing_class_and_one_too_many_are_refused(tmp_path, dataset, pixels, labels):
    with pytest.raises(ValueError, match="needed are all of"):
        read_set(image_folder(tmp_path / "few", pixels[:4], labels[:4]), dataset=dataset)
    folder = image_folder(tmp_path / "many", pixels, labels)
    shutil.copytree(folder / "a", folder / "d")
    with pytest.raises(ValueError, match="and no other"):
        read_set(folder, dataset=dataset)


def test_empty_folders_and_what_is_not_there_are_refused(tmp_path, dataset):
    with pytest.raises(ValueError, match="has no images"):
        read_set(tmp_path, dataset=dataset)
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match="has no images"):
        read_set(tmp_path, dataset=dataset)
    with pytest.raises(FileNotFoundError, match="absent is missing: give an image folder"):
        read_set(tmp_path / "absent", dataset=dataset)
    torch.save(torch.zeros(1), tmp_path / "images_best.pt")
    with pytest.raises(FileNotFoundError, match=r"labels_best\.pt is missing"):
        read_set(tmp_path, dataset=dataset, form="unit")
    (tmp_path / "set.zip").write_bytes(b"")
    with pytest.raises(ValueError, match=r"neither a folder nor a \.pt file"):
        read_set(tmp_path / "set.zip", dataset=dataset)


def test_mixed_sizes_are_refused_with_the_sizes(tmp_path, dataset, pixels, labels):
    folder = image_folder(tmp_path / "set", pixels, labels)
    Image.new("L", (20, SIZE_PX)).save(folder / "b" / "2.png")
    with pytest.raises(ValueError, match="images of 16 x 16, 20 x 16 px, toy of 16 x 16: sets are not resized"):
        read_set(folder, dataset=dataset)


def spoilt(kind):
    colour = Image.new("RGB", (SIZE_PX, SIZE_PX), (200, 10, 10))
    return {
        "coloured": colour,
        "transparent": Image.new("RGBA", colour.size, (9, 9, 9, 254)),
        "CMYK": colour.convert("CMYK"),
        "16 bit": Image.fromarray(np.full(colour.size, 300, np.uint16)),
    }[kind]


@pytest.mark.parametrize(
    "kind, suffix, reason",
    [
        ("coloured", "png", "the images are coloured, the data set is not"),
        ("transparent", "png", "partly transparent"),
        ("CMYK", "jpg", "mode CMYK, 1 frames: save it as 8 bit"),
        ("16 bit", "png", "mode I;16, 1 frames: save it as 8 bit"),
    ],
)
def test_modes_that_would_lose_something_are_refused(tmp_path, dataset, pixels, labels, kind, suffix, reason):
    folder = image_folder(tmp_path / "set", pixels, labels)
    spoilt(kind).save(folder / "b" / f"9.{suffix}")
    with pytest.raises(ValueError, match=reason):
        read_set(folder, dataset=dataset)


def test_files_that_are_no_images_are_refused(tmp_path, dataset, pixels, labels):
    folder = image_folder(tmp_path / "set", pixels, labels)
    (folder / "a" / ".hidden").write_text("is left out")
    read_set(folder, dataset=dataset)
    for name, reason in (("a/notes.txt", "cannot be used as an image"), ("7.png", "is in no class")):
        (folder / name).write_text("%!PS-Adobe-3.0 EPSF-3.0\n")
        with pytest.raises(ValueError, match=reason):
            read_set(folder, dataset=dataset)
        (folder / name).unlink()
    (folder / "a" / "deeper").mkdir()
    with pytest.raises(ValueError, match="deeper is no file"):
        read_set(folder, dataset=dataset)


def test_the_form_is_for_tensors_only(tmp_path, dataset, pixels, labels):
    with pytest.raises(ValueError, match=r"form, mean and std are for \.pt files"):
        read_set(image_folder(tmp_path / "set", pixels, labels), dataset=dataset, form="unit")


def test_an_artefact_of_other_classes_or_with_changed_tensors_is_refused(tmp_path, dataset, pixels, labels):
    with pytest.raises(ValueError, match=r"has the classes \['a', 'b', 'd'\], toy has \['a', 'b', 'c'\]"):
        read_set(artefact(tmp_path / "other", pixels, labels, classes=("a", "b", "d")), dataset=dataset)
    folder = artefact(tmp_path / "set", pixels, labels)
    file = folder / "distilled.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="do not match the hash"):
        read_set(folder, dataset=dataset)
