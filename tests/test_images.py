"""Reading and decoding: every layout and format, decoded once, and again where the source or a setting has changed."""

import io
import os
import pickle
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from ld3m.data import dataset as data
from ld3m.data import images
from ld3m.runtime import paths, storage
from ld3m.runtime.paths import ROOT

SPLITS = {"train": "train", "validation": 0.25, "test": "test"}
SETTINGS = {"name": "toy", "size_px": 8, "channels": 3, "splits": SPLITS}
FIXED = data.Normalization((0.5,) * 3, (0.5,) * 3)  # of images all alike, which have no spread to measure
NAMES = datasets.ClassLabel(names=["cat", "dog"])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "DECODED", tmp_path / "cache" / "decoded")
    return paths.DECODED


@pytest.fixture
def decoded(monkeypatch):
    """The paths or bytes of the images decoded so far."""
    seen, open_image = [], images.open_image
    monkeypatch.setattr(images, "open_image", lambda content: seen.append(content) or open_image(content))
    return seen


@pytest.fixture
def folder(tmp_path):
    """An image folder: 8 training and 2 test images of noise in each of the classes "ant", "bee" and "cat"."""
    for split, count in {"train": 8, "test": 2}.items():
        for label, name in enumerate(("ant", "bee", "cat")):
            (tmp_path / "toy" / split / name).mkdir(parents=True)
            for k in range(count):
                Image.fromarray(noise(100 * label + k + count)).save(tmp_path / "toy" / split / name / f"{k}.bmp")
    return tmp_path / "toy"


def noise(seed, height=8, width=8):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return buffer.getvalue()


def write_parquet(file, labels, *, feature=NAMES, cells=None):
    file.parent.mkdir(exist_ok=True)
    cells = cells or [{"bytes": png(noise(row)), "path": None} for row in range(len(labels))]
    features = datasets.Features(image=datasets.Image(), label=feature)
    datasets.Dataset.from_dict({"image": cells, "label": labels}, features=features).to_parquet(file)


@pytest.fixture
def parquet(tmp_path):
    """Parquet files of "cat" and "dog", six training and six test images of each."""
    for split in ("train", "test"):
        write_parquet(tmp_path / "files" / f"{split}.parquet", [0, 1] * 6)
    return tmp_path / "files"


def load(source, **changes):
    return data.load_dataset(source, **SETTINGS | changes)


# Layouts


def test_parquet_images_and_labels_arrive_unchanged(parquet):
    test = load(parquet).test
    np.testing.assert_array_equal(test.uint8.permute(0, 2, 3, 1).numpy(), np.stack([noise(row) for row in range(12)]))
    assert test.labels.tolist() == [0, 1] * 6 and test.classes == ("cat", "dog") and test.labels.dtype == torch.int64


@pytest.mark.parametrize("place", [".", "data", "plain_text"])
def test_shards_are_one_split_in_the_layouts_of_the_hub(parquet, tmp_path, place):
    expected = load(parquet).fingerprint
    sharded = tmp_path / "sharded" / place
    sharded.mkdir(parents=True)
    for split in ("train", "test"):
        whole = datasets.Dataset.from_parquet(str(parquet / f"{split}.parquet"), cache_dir=str(tmp_path / "hub"))
        for part in range(2):
            shard = whole.shard(2, part, contiguous=True)
            shard.to_parquet(sharded / f"{split}-0000{part}-of-00002.parquet", batch_size=4)  # several row groups
    assert load(tmp_path / "sharded").fingerprint == expected
    if place == "plain_text":
        shutil.copytree(sharded, tmp_path / "sharded/other")
        with pytest.raises(ValueError, match="'train' is in each of the folders .*other, .*plain_text: set source"):
            load(tmp_path / "sharded")
        shutil.rmtree(tmp_path / "sharded/other")
    (sharded / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(ValueError, match=r"'train' should be \[2\] files"):
        load(tmp_path / "sharded")


def test_shards_of_other_class_names_are_refused(parquet):
    (parquet / "train.parquet").rename(parquet / "train-0.parquet")
    write_parquet(parquet / "train-1.parquet", [0, 1], feature=datasets.ClassLabel(names=["dog", "cat"]))
    with pytest.raises(ValueError, match="different class names"):
        load(parquet)


def test_a_hub_dataset_is_known_by_its_fingerprint(folder, decoded, monkeypatch):
    expected = load(folder)
    tables = {}
    for split, count in {"train": 8, "test": 2}.items():
        files = [str(folder / split / name / f"{k}.bmp") for name in ("ant", "bee", "cat") for k in range(count)]
        features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["ant", "bee", "cat"]))
        columns = {"image": files, "label": [0] * count + [1] * count + [2] * count}
        tables[split] = datasets.Dataset.from_dict(columns, features=features)
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", folder)  # where the hub's files are
    monkeypatch.setattr(datasets, "load_dataset", lambda source, *, split: {"org/toy": tables}[source][split])
    decoded.clear()
    assert load("org/toy").fingerprint == load("org/toy").fingerprint == expected.fingerprint and len(decoded) == 30
    tables["test"] = tables["test"].select([0, 2, 4, 5]).flatten_indices()
    assert len(load("org/toy").test) == 4 and len(decoded) == 34

    def offline(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    for source in ("org/toy", "toy"):
        with pytest.raises(FileNotFoundError, match=r"no network.*train/<class>.*set source to that folder"):
            load(source)


def test_missing_paths_say_what_to_place(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub for a path"))
    monkeypatch.setattr(images, "ROOT", tmp_path)  # a checkout without data/
    (tmp_path / "tests").mkdir()
    for source in (tmp_path / "none", "./none", "../none", "data/none", "tests/none", "a/b/c", "no such"):
        with pytest.raises(FileNotFoundError, match=r"dataset 'toy', split 'train': source=.*train\.parquet"):
            load(source)
    shutil.rmtree(folder / "test")
    with pytest.raises(FileNotFoundError, match=r"split 'test': .* no such split: place test\.parquet"):
        load(folder)
    (folder / "test").mkdir()
    with pytest.raises(ValueError, match=r"test has no class folders: place its images as test/<class>/"):
        load(folder)


# Labels and classes


@pytest.mark.parametrize(
    "labels, feature, classes, expected",
    [
        ([2, 0, 1, 0], datasets.Value("int64"), ("0", "1", "2"), [2, 0, 1, 0]),
        (["b", "c", "a", "a"], datasets.Value("string"), ("a", "b", "c"), [1, 2, 0, 0]),
    ],
)
def test_labels_without_class_names(parquet, labels, feature, classes, expected):
    for split in ("train", "test"):
        write_parquet(parquet / f"{split}.parquet", labels * 2, feature=feature)
    test = load(parquet, splits=SPLITS | {"validation": 0.5}).test
    assert test.classes == classes and test.labels.tolist() == expected * 2


def test_classes_are_matched_across_splits_by_name(parquet):
    write_parquet(parquet / "test.parquet", [0, 0, 1], feature=datasets.ClassLabel(names=["dog", "cat"]))
    test = load(parquet).test
    assert test.classes == ("cat", "dog") and test.labels.tolist() == [1, 1, 0]


@pytest.mark.parametrize(
    "labels, feature, message",
    [
        ([0, -1, 1], datasets.Value("int64"), "1 rows have no label, first row 1"),
        (["a", None], datasets.Value("string"), "1 rows have no label, first row 1"),
        ([0, 2**40], datasets.Value("int64"), "integers from 0"),
        ([0.5, 1.5], datasets.Value("float32"), "integers from 0, not '0.5', '1.5': change label_column"),
        ([], datasets.Value("int64"), "the split is empty"),
    ],
)
def test_impossible_labels_are_refused(parquet, labels, feature, message):
    write_parquet(parquet / "train.parquet", labels, feature=feature, cells=None if labels else [])
    with pytest.raises(ValueError, match=f"split 'train', column 'label': .*{message}"):
        load(parquet)


def test_columns_are_named_and_those_that_do_not_fit_refused(parquet):
    for changes in ({"image_column": "img"}, {"label_column": "img"}):
        with pytest.raises(ValueError, match=rf"{next(iter(changes))}='img': the columns are \['image', 'label'\]"):
            load(parquet, **changes)
    with pytest.raises(ValueError, match="column 'label' holds int64, not images"):
        load(parquet, image_column="label")


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("exists", [False, True])
def test_a_chosen_class_without_images_is_named(folder, split, exists):
    shutil.rmtree(folder / split / "cat")
    if exists:
        (folder / split / "cat").mkdir()
    for classes in (["cat"], ["bee", "cat"], None):
        with pytest.raises(ValueError, match=f"split '{split}' has no images of class 'cat': add them"):
            load(folder, classes=classes)
    assert load(folder, classes=["bee", "ant"]).test.classes == ("bee", "ant")


def test_the_folders_of_other_classes_are_not_listed(folder, monkeypatch):
    listed, rglob = [], Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda place, pattern: listed.append(place.name) or rglob(place, pattern))
    load(folder, classes=["cat", 1])
    assert set(listed) == {"bee", "cat"}


# The cache


def test_images_are_decoded_once(folder, decoded, cache):
    first = load(folder)
    assert len(decoded) == 30
    again = load(folder)
    assert len(decoded) == 30 and first.fingerprint == again.fingerprint and first.normalization == again.normalization
    expected = np.stack([np.array(Image.open(folder / "test" / "bee" / f"{k}.bmp")) for k in range(2)])
    np.testing.assert_array_equal(again.test.uint8[2:4].permute(0, 2, 3, 1).numpy(), expected)
    assert len(list(cache.iterdir())) == 2
    for _ in range(2):
        bees = load(folder, classes=["cat", "bee"]).train
        assert torch.equal(bees.uint8[bees.of_class(1)], first.train.uint8[first.train.of_class(1)])
        assert len(decoded) == 50


def test_train_and_validation_share_the_stored_images(folder):
    dataset = load(folder)
    assert dataset.train.stored.data_ptr() == dataset.validation.stored.data_ptr()
    assert (len(dataset.train), len(dataset.validation), len(dataset.train.stored)) == (18, 6, 24)
    for part in (dataset.train, dataset.validation):
        index = torch.tensor([3, 0])
        assert torch.equal(part.x(index), part.x()[index])
        assert torch.equal(torch.cat(list(part.chunks(4))), part.uint8)
        assert part.shape == (3, 8, 8) and part.device == torch.device("cpu") and part.to("cpu") is part
        assert torch.equal(part.to("meta").labels, part.labels) and len(part.to("meta").uint8) == len(part)
    expected = dataset.fingerprint
    dataset.train.stored.zero_()  # in memory, not in the file
    assert load(folder).fingerprint == expected


@pytest.mark.parametrize("change", [{"size_px": 16}, {"channels": 1}, "SQUARE_VERSION", "Pillow"])
def test_another_setting_or_version_decodes_again(folder, decoded, monkeypatch, change):
    load(folder)
    if change == "SQUARE_VERSION":
        monkeypatch.setattr(images, "SQUARE_VERSION", images.SQUARE_VERSION + 1)
    elif change == "Pillow":
        monkeypatch.setattr(images.PIL, "__version__", "0.1")
    load(folder, **change if isinstance(change, dict) else {})
    assert len(decoded) == 60
    monkeypatch.undo()


def change_file(folder, how):
    file = folder / "train" / "bee" / "3.bmp"
    status = file.stat()
    match how:
        case "other pixels":
            Image.new("RGB", (8, 8), "red").save(file)
            assert file.stat().st_size == status.st_size
        case "renamed":
            file.rename(file.with_name("x.bmp"))
        case "another class":
            (folder / "train" / "ant" / "7.bmp").rename(file.with_name("+.bmp"))  # the order of all stays
        case "larger":
            Image.new("RGB", (9, 9), "red").save(file)
            os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("how", ["other pixels", "renamed", "another class", "larger"])
def test_a_changed_file_is_noticed(folder, decoded, how, tmp_path, monkeypatch):
    load(folder)
    change_file(folder, how)
    changed = load(folder)
    assert len(decoded) == 54  # train again, test not
    monkeypatch.setattr(paths, "DECODED", tmp_path / "other")
    assert load(folder).fingerprint == changed.fingerprint


def test_a_changed_parquet_file_is_noticed(parquet, decoded):
    load(parquet)
    write_parquet(parquet / "test.parquet", [1, 0])
    assert load(parquet).test.labels.tolist() == [1, 0] and len(decoded) == 26


@pytest.mark.parametrize("damage", [0, -1, "another array"])
def test_a_damaged_file_is_decoded_again(folder, decoded, cache, damage):
    expected = load(folder).fingerprint
    for file in cache.iterdir():
        whole = file.read_bytes()
        file.unlink()
        if damage == "another array":
            np.save(file, np.zeros((2, 3, 8, 8)))
        else:
            file.write_bytes(whole[:damage])
    assert load(folder).fingerprint == load(folder).fingerprint == expected and len(decoded) == 60


def test_space_is_asked_for_before_decoding(folder, decoded, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda _: usage(0, 0, 24 * 3 * 8 * 8 - 1))
    with pytest.raises(OSError, match=r"MiB needed in .*decoded.*make room"):
        load(folder)
    assert decoded == []


def test_a_pickled_split_is_the_name_of_its_file(folder):
    dataset = load(folder, size_px=64)
    for split in (dataset.train, dataset.validation, dataset.test):
        assert len(pickle.dumps(split)) < 3000 < split.stored.nbytes
        copy = pickle.loads(pickle.dumps(split))
        assert torch.equal(copy.uint8, split.uint8) and torch.equal(copy.labels, split.labels)
        assert copy.file == split.file and copy.classes == split.classes
    in_memory = data.Split(dataset.test.uint8, dataset.test.labels, dataset.test.classes)
    assert torch.equal(pickle.loads(pickle.dumps(in_memory)).uint8, dataset.test.uint8)


def test_several_processes_decode_the_same_files_at_once(folder, cache):
    code = (
        "import pathlib\nfrom ld3m.data import dataset as data\nfrom ld3m.runtime import paths\n"
        f"paths.DECODED = pathlib.Path({str(cache)!r})\n"
        f"print(data.load_dataset({str(folder)!r}, **{SETTINGS}).fingerprint)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    found = {process.communicate()[0].splitlines()[-1] for process in processes}
    assert found == {load(folder).fingerprint} and all(process.returncode == 0 for process in processes)
    assert len(list(cache.iterdir())) == 2


# Broken and hostile images


def test_all_broken_images_are_named_and_nothing_is_kept(folder, cache, monkeypatch):
    place = folder / "train" / "ant"
    (place / "0.bmp").write_bytes(b"")
    Image.new("RGB", (64, 64), "red").save(place / "cut.png")
    (place / "cut.png").write_bytes((place / "cut.png").read_bytes()[:100])
    Image.new("1", (40, 40)).save(place / "huge.png")
    Image.new("F", (8, 8)).save(place / "unbounded.tif")
    (place / "text.jpg").write_text("no image")
    (place / "unknown.xyz").write_text("left out")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow itself refuses only a file twice as large
    Image.new("1", (20, 20)).save(place / "small.png")
    with pytest.raises(ValueError, match="split 'train': replace or remove 5 images that cannot be read") as refused:
        load(folder)
    named = [line.split(": ")[0] for line in str(refused.value).splitlines()[1:]]
    assert named == [str(place / name) for name in ("0.bmp", "cut.png", "huge.png", "text.jpg", "unbounded.tif")]
    assert "it has 40 x 40 pixels" in str(refused.value) and not list(cache.iterdir())


@pytest.mark.parametrize(
    "cell, message",
    [
        ({"bytes": b"nonsense", "path": "x.png"}, r"row 3 \(x\.png\): UnidentifiedImageError"),
        (None, r"row 3 \(no file name\): ValueError: there are no bytes"),
        ({"bytes": None, "path": __file__}, r"row 3 \(.*test_images\.py\): ValueError: there are no bytes"),
    ],
)
def test_broken_cells_and_cells_that_name_a_file_are_refused(parquet, cell, message):
    good = {"bytes": png(noise(0)), "path": None}
    write_parquet(parquet / "test.parquet", [1, 1, 0, 0], cells=[good, good, good, cell])
    with pytest.raises(ValueError, match=rf"(?s)split 'test': replace or remove 1 images .*\n{message}"):
        load(parquet, classes=["cat"])
    assert len(load(parquet, classes=["dog"]).test) == 2


def test_an_image_for_which_pillow_starts_a_program_is_refused(folder, tmp_path, monkeypatch):
    started = tmp_path / "started"
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {started}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    Image.fromarray(noise(3)).save(folder / "train/cat/2.png", "EPS")
    with pytest.raises(ValueError, match=r"train/cat/2\.png: UnidentifiedImageError"):
        load(folder)
    assert not started.exists()


def test_files_that_are_no_images_are_named(folder):
    os.mkfifo(folder / "train/cat/pipe.png")
    with pytest.raises(ValueError, match=r"split 'train': .*train/cat/pipe\.png is no regular file: remove it"):
        load(folder)
    (folder / "train/cat/pipe.png").unlink()
    for file in (folder / "train/cat").iterdir():
        file.rename(file.with_suffix(".heic"))
    with pytest.raises(ValueError, match=r"train/cat has 8 files \(.*0\.heic \.\.\.\), but none .* of PNG, JPEG, "):
        load(folder)


# One image


def square(image, size_px=8, channels=3):
    return np.array(images.to_square(image, size_px=size_px, channels=channels))


def test_the_centre_is_cropped_and_keeps_its_pixels():
    for array in (noise(0), noise(1, 8, 13), noise(2, 12, 8)):
        top, left = (array.shape[0] - 8) // 2, (array.shape[1] - 8) // 2
        np.testing.assert_array_equal(square(Image.fromarray(array)), array[top : top + 8, left : left + 8])


def test_resizing_is_antialiased_and_centred():
    stripes = np.zeros((64, 128, 3), dtype=np.uint8)
    stripes[:, ::2] = 255  # averages to grey; aliased it would be black or white
    assert abs(square(Image.fromarray(stripes)).astype(int) - 128).max() < 12
    marked = np.zeros((64, 128, 3), dtype=np.uint8)
    marked[:, 32:96] = 255  # exactly the centre square
    assert (square(Image.fromarray(marked))[:, 1:-1] > 240).all()
    assert (square(Image.fromarray(np.roll(marked, 64, axis=1))) < 200).all()


def test_alpha_is_composited_onto_black():
    alpha = np.dstack([np.full((8, 8, 3), 200, np.uint8), np.full((8, 8), 128, np.uint8)])
    assert abs(square(Image.fromarray(alpha)).astype(int) - 100).max() <= 1
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([255, 255, 255] * 256)
    palette.info["transparency"] = 0
    assert square(palette).max() == 0


def save_kinds(folder, left, right):
    """Saves two-coloured files, 12 x 8 and upright `left` | `right`, in the ways that files hold colours."""
    image = Image.new("RGB", (12, 8), left)
    image.paste(right, (6, 0, 12, 8))
    image.save(folder / "rgb.png")
    image.quantize(4).save(folder / "palette.png")
    image.convert("CMYK").save(folder / "cmyk.jpg", quality=100, subsampling=0)
    image.convert("YCbCr").save(folder / "ycc.tiff")
    image.convert("RGBA").save(folder / "alpha.webp", lossless=True)
    image.save(folder / "animated.gif", save_all=True, append_images=[Image.new("RGB", (12, 8), "white")])
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side: to be turned clockwise by 90 degrees
    image.transpose(Image.Transpose.ROTATE_90).save(folder / "turned.jpg", quality=100, subsampling=0, exif=exif)
    (folder / "deeper").mkdir()
    image.resize((120, 80), Image.Resampling.NEAREST).save(folder / "deeper" / "large.BMP")
    (folder / "._rgb.png").write_text("hidden")


def test_files_of_every_kind_show_the_same_picture(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        save_kinds(tmp_path / split / "a", (250, 40, 10), (10, 90, 240))
    test = load(tmp_path).test
    assert len(test) == 8 and test.shape == (3, 8, 8)
    for image in test.uint8.int():  # the centre 8 x 8: columns 2..9
        assert (image[:, :, 0] - torch.tensor([250, 40, 10])[:, None]).abs().max() <= 6
        assert (image[:, :, -1] - torch.tensor([10, 90, 240])[:, None]).abs().max() <= 6


def test_grey_files_of_every_depth_show_the_same_picture(tmp_path):
    ramp = np.repeat(np.linspace(0, 255, 8).round().astype(np.uint8)[None], 8, axis=0)
    wide = ramp.astype(np.uint16) * 257
    for split in ("train", "test"):
        place = tmp_path / split / "a"
        place.mkdir(parents=True)
        Image.fromarray(ramp).save(place / "grey.png")
        Image.fromarray(wide).save(place / "grey16.png")
        Image.fromarray(wide).save(place / "grey16.tif")
        Image.fromarray(ramp).convert("LA").save(place / "alpha.png")
        Image.fromarray(ramp).save(place / "plain.pgm")
    for channels in (1, 3):
        test = load(tmp_path, channels=channels).test
        assert len(test) == 5
        for image in test.uint8:
            np.testing.assert_array_equal(image.numpy(), np.repeat(ramp[None], channels, axis=0))
