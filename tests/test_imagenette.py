"""Folders of ImageNet classes: found by wnid, named by words, converted with ILSVRC's own split."""

import os
import runpy
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import relative_difference
from PIL import Image
from pyarrow import parquet
from test_foreign import image_folder

from ld3m.data import imagenette
from ld3m.data.dataset import load_dataset
from ld3m.data.subsets import IMAGENET, imagenet_classes
from ld3m.evaluation.foreign import read_set
from ld3m.models.prior_io import fitted, load_prior

WOOF = [imagenet_classes()[index] for index in IMAGENET["woof"]]
SIZE_PX = 32


def jpeg(file, *, label, k):
    """An image whose red is a class and whose green is a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(100 * label + k).integers(0, 256, (SIZE_PX, SIZE_PX + 4, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "JPEG", quality=95)


@pytest.fixture
def source(tmp_path):
    """Imagewoof as fastai has it: ILSVRC's training and validation images in both folders, of every class 4 and 2."""
    for label, entry in enumerate(WOOF):
        wnid = entry["wnid"]
        names = [f"{wnid}_{100 + k}.JPEG" for k in range(4)] + [
            f"ILSVRC2012_val_{label:04d}{k:04d}.JPEG" for k in (0, 1)
        ]
        for k, name in enumerate(names):
            jpeg(tmp_path / "source" / ("val" if k in (3, 5) else "train") / wnid / name, label=label, k=k)
    (tmp_path / "source" / "noisy.csv").write_text("path\n")
    (tmp_path / "source" / "train" / ".DS_Store").touch()
    return tmp_path / "source"


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["imagenette", *map(str, arguments)])
    runpy.run_path(imagenette.__file__, run_name="__main__")


def load(source, **changes):
    given = {"size_px": SIZE_PX, "channels": 3, "splits": {"train": "train", "validation": 0.25, "test": "test"}}
    return load_dataset(source, name="toy", **given | changes)


@pytest.mark.parametrize("nested", [True, False])
def test_the_split_is_that_of_the_file_names_and_bytes_are_those_of_the_files(
    source, tmp_path, monkeypatch, capsys, nested
):
    files = {f"{file.parent.name}/{file.name}": file.read_bytes() for file in source.rglob("*.JPEG")}
    if not nested:
        for name in files:
            (source / name).parent.mkdir(exist_ok=True)
            next(source.glob(f"*/{name}")).rename(source / name)
        for name in ("train", "val"):
            shutil.rmtree(source / name)
    run(monkeypatch, source, tmp_path / "out")
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    in_order = [imagenet_classes()[index] | {"index": index} for index in sorted(IMAGENET["woof"])]
    assert lines == ["class wnid index train test"] + [f"{e['name']} {e['wnid']} {e['index']} 4 2" for e in in_order]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    written = {}
    for split, count in (("train", 40), ("test", 20)):
        (file,) = (tmp_path / "out").glob(f"{split}-*.parquet")
        rows = parquet.read_table(file).to_pylist()
        assert len(rows) == count
        assert [row["image"]["path"] for row in rows] == sorted(row["image"]["path"] for row in rows)
        for row in rows:
            wnid, name = row["image"]["path"].split("/")
            assert name.startswith("ILSVRC2012_val_" if split == "test" else f"{wnid}_")
            assert in_order[row["label"]]["wnid"] == wnid
            written[row["image"]["path"]] = row["image"]["bytes"]
    assert written == files


def test_what_is_written_is_what_the_loader_reads(source, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(imagenette, "ROW_GROUP", 7)
    imagenette.convert(source, tmp_path / "out")
    (file,) = (tmp_path / "out").glob("train-*.parquet")
    assert parquet.ParquetFile(file).num_row_groups == 6
    features = datasets.load_dataset("parquet", data_dir=str(tmp_path / "out"), cache_dir=str(tmp_path)).values()
    words = [imagenet_classes()[index]["name"] for index in sorted(IMAGENET["woof"])]
    for split in features:
        assert isinstance(split.features["image"], datasets.Image) and split.features["label"].names == words
    dataset = load(tmp_path / "out", classes="woof")
    assert dataset.train.classes == tuple(entry["name"] for entry in WOOF)
    for label, entry in enumerate(WOOF):
        files = sorted(source.glob(f"*/{entry['wnid']}/ILSVRC*"))
        expected = [
            np.asarray(Image.open(file).convert("RGB"))[:, 2:-2] for file in sorted(files, key=lambda f: f.name)
        ]
        found = dataset.test.uint8[dataset.test.of_class(label)].movedim(1, -1).numpy()
        assert np.array_equal(found, np.stack(expected))


def misspelled(source, wnid):
    shutil.copytree(source / "train" / wnid, source / "train" / wnid.upper())


def without(pattern):
    def remove(source, wnid):
        for file in source.glob(f"*/{wnid}/{pattern.format(wnid)}"):
            file.unlink()

    return remove


def flat(source, wnid):
    for file in source.glob("*/*/*.JPEG"):
        file.rename(source / file.name)
    for name in ("train", "val"):
        shutil.rmtree(source / name)


def odd(*names):
    def write(source, wnid):
        for name in names:
            (source / "train" / wnid / name).touch()

    return write


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda source, _: (source / "val/dogs").mkdir(), "1 folders are no class of ImageNet-1k: .*val/dogs': give"),
        (
            lambda source, _: (source / "val/n00000001").mkdir(),
            "no class of ImageNet-1k: .*n00000001': .*such as n01440",
        ),
        (lambda source, _: (source / "val/beagle").mkdir(), "no class of .*val/beagle': give each class one folder"),
        (misspelled, "no class of ImageNet-1k: .*train/N02096294': give each class one folder"),
        (flat, "source: no folders: give each class one folder, named by its wnid"),
        (without("ILSVRC*"), r"no test images of 'n02096294': add some, named ILSVRC2012_val_<number>.JPEG"),
        (without("{}_*"), r"no train images of 'n02096294': add some, named <wnid>_<number>.JPEG, or remove the class"),
        (
            odd("dog.JPEG"),
            r"1 files are not named ILSVRC2012_val_<number>.JPEG or .*: .*n02096294/dog.JPEG': rename or",
        ),
        (odd("n01440764_1.JPEG"), "1 files are not named .*n02096294/n01440764_1.JPEG"),  # of another class
        (odd("N02096294_1.JPEG"), "1 files are not named .*/N02096294_1.JPEG"),
        (odd(*(f"{k}.JPEG" for k in range(7))), r"7 files are not named .*/0.JPEG.*/4.JPEG' and 2 more: rename"),
        (lambda source, wnid: os.mkfifo(source / f"val/{wnid}/{wnid}_1.JPEG"), "1 files .*n02096294_1.JPEG"),
        (lambda source, wnid: (source / f"val/{wnid}/{wnid}_1.JPEG").mkdir(), "1 files .*n02096294_1.JPEG"),
        (lambda source, _: shutil.rmtree(source), "SOURCE is .*source: there is no such folder"),
    ],
)
def test_what_is_wrong_is_named_before_anything_is_written(source, tmp_path, monkeypatch, change, message):
    change(source, WOOF[0]["wnid"])
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_in_out_is_kept(source, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "own").touch()
    before = sorted(tmp_path.rglob("*"))
    for out in (source, source / "out", source / "train/../new", tmp_path / "full", tmp_path / "full/own", tmp_path):
        with pytest.raises(SystemExit, match="OUT is .*: it must be a new or empty folder outside of SOURCE"):
            run(monkeypatch, source, out)
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "empty").mkdir()
    run(monkeypatch, source, tmp_path / "empty")
    assert len([*(tmp_path / "empty").iterdir()]) == 2


def test_an_interrupted_conversion_leaves_nothing(source, tmp_path, monkeypatch):
    def interrupted(total, **options):
        yield 0
        raise KeyboardInterrupt

    monkeypatch.setattr(imagenette, "progress", interrupted)
    with pytest.raises(KeyboardInterrupt):
        imagenette.convert(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


SPLITS = {"train": "train", "validation": 0.25, "test": "val"}


def test_folders_named_by_wnid_are_named_by_words_and_chosen_by_either(source):
    for classes in ("woof", [entry["wnid"] for entry in WOOF], [entry["name"] for entry in WOOF]):
        dataset = load(source, splits=SPLITS, classes=classes)
        assert dataset.train.classes == dataset.test.classes == tuple(entry["name"] for entry in WOOF)
        assert torch.bincount(dataset.test.labels).tolist() == [2] * 10
    in_order = load(source, splits=SPLITS)
    assert in_order.train.classes == tuple(imagenet_classes()[index]["name"] for index in sorted(IMAGENET["woof"]))


@pytest.mark.parametrize("name", ["beagle", "N02088364", "Beagle"])
def test_two_folders_of_one_class_are_refused(source, name):
    jpeg(source / "train" / name / "0.JPEG", label=0, k=0)
    with pytest.raises(ValueError, match="classes .* and .* are one or differ in case only: rename one") as refused:
        load(source, splits=SPLITS)
    assert "'n02088364'" in str(refused.value) and repr(name) in str(refused.value)


def test_folders_that_are_no_wnid_of_imagenet_keep_their_names(source):
    for split in ("train", "val"):
        (source / split / "n02088364").rename(source / split / "n00000001")
    classes = load(source, splits=SPLITS, classes=["n00000001", "dingo"]).train.classes
    assert classes == ("n00000001", "dingo")
    with pytest.raises(ValueError, match=r"classes='woof' needs n02088364 too"):
        load(source, splits=SPLITS, classes="woof")


@pytest.mark.parametrize("key", ["wnid", "name"])
def test_a_set_made_elsewhere_is_matched_by_wnid_or_word(source, tmp_path, key):
    dataset = load(source, splits=SPLITS, classes="woof")
    x = torch.stack([dataset.train.x(dataset.train.of_class(label)[:1])[0] for label in range(10)])
    folder = image_folder(
        tmp_path / "set", x, range(10), [entry[key] for entry in WOOF], lambda image: image.convert("RGB")
    )
    assert read_set(folder, dataset=dataset)[1].tolist() == list(range(10))


@pytest.mark.parametrize("classes", ["woof", None, ["dingo", "n02088364"]])
def test_a_prior_of_imagenet_is_asked_for_the_class_of_the_wnid(source, tmp_path, dit_folder, classes):
    imagenette.convert(source, tmp_path / "out")
    prior, subset = load_prior(dit_folder), classes if isinstance(classes, str) else None
    index_of = {entry["name"]: index for index, entry in enumerate(imagenet_classes())}
    for given in (load(source, splits=SPLITS, classes=classes), load(tmp_path / "out", classes=classes)):
        fitting = {"size_px": SIZE_PX, "channels": 3, "names": given.train.classes, "classes": None}
        restricted, found = fitted(prior, source="dit", subset=subset, **fitting)
        assert found == tuple(index_of[name] for name in given.train.classes)
        expected = prior.embed(torch.tensor(found))
        assert relative_difference(restricted.embed(torch.arange(len(found))), expected) == 0
