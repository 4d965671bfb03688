"""Decoded images are made once, are those of the source as it is now, and cost other processes nothing."""

import os
import pickle
import shutil
import subprocess
import sys
import time
import warnings
from collections import namedtuple
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from ld3m.data import dataset as data
from ld3m.data import decoded, sources
from ld3m.runtime import paths, storage
from ld3m.runtime.parallel import end_workers, fan_out
from ld3m.runtime.paths import ROOT

SPLITS = {"train": "train", "validation": 0.25, "test": "test"}
SETTINGS = {"name": "toy", "size_px": 8, "channels": 3, "splits": SPLITS}
FIXED = data.Normalization((0.5,) * 3, (0.5,) * 3)  # of images all alike, which have no spread to measure


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "DECODED", tmp_path / "cache" / "decoded")
    return paths.DECODED


@pytest.fixture
def folder(tmp_path):
    """An image folder: 8 training and 2 test images of noise in each of the classes "ant", "bee" and "cat"."""
    rng = np.random.default_rng(0)
    for split, count in {"train": 8, "test": 2}.items():
        for name in ("ant", "bee", "cat"):
            (tmp_path / "toy" / split / name).mkdir(parents=True)
            for k in range(count):
                pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "toy" / split / name / f"{k}.bmp")
    return tmp_path / "toy"


@pytest.fixture
def opened(monkeypatch):
    """The rows decoded so far, and whether anything was read of the source."""
    rows, decode, read = [], sources.decode, sources.read_split
    reads = []

    def counted(table, column, wanted, **settings):
        rows.extend(wanted.tolist())
        return decode(table, column, wanted, **settings)

    monkeypatch.setattr(sources, "decode", counted)
    monkeypatch.setattr(sources, "read_split", lambda *given, **key: reads.append(given) or read(*given, **key))
    return rows, reads


def load(folder, **changes):
    return data.load_dataset(folder, **SETTINGS | changes)


def test_nothing_is_read_a_second_time_and_the_images_are_the_same(folder, opened, cache):
    rows, reads = opened
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's, of arrays that may not be written
        first = load(folder)
        assert sorted(rows) == sorted([*range(24), *range(6)]) and len(reads) == 2
        again = load(folder)
    assert len(rows) == 30 and len(reads) == 2
    assert first.fingerprint == again.fingerprint and first.normalization == again.normalization
    for part in ("train", "validation", "test"):
        assert torch.equal(getattr(first, part).uint8, getattr(again, part).uint8)
        assert torch.equal(getattr(first, part).labels, getattr(again, part).labels)
    expected = np.stack([np.array(Image.open(folder / "test" / "bee" / f"{k}.bmp")) for k in range(2)])
    np.testing.assert_array_equal(again.test.uint8[2:4].permute(0, 2, 3, 1).numpy(), expected)
    assert not list(cache.glob(".*"))


def test_train_and_validation_share_the_stored_images(folder):
    dataset = load(folder)
    assert dataset.train.stored.data_ptr() == dataset.validation.stored.data_ptr()
    assert (len(dataset.train), len(dataset.validation), len(dataset.train.stored)) == (18, 6, 24)
    for part in (dataset.train, dataset.validation):
        index = torch.tensor([3, 0])
        assert torch.equal(part.x(index), part.x()[index])
        assert torch.equal(torch.cat(list(part.chunks(4))), part.uint8)
        assert part.shape == (3, 8, 8) and part.device == torch.device("cpu")
        assert torch.equal(part.to("meta").labels, part.labels) and len(part.to("meta").uint8) == len(part)
        assert part.to("cpu") is part


def test_a_subset_decodes_its_own_rows_and_only_once(folder, opened):
    rows, _ = opened
    one = load(folder, classes=["bee"])
    assert len(rows) == 10
    load(folder, classes=["bee"])
    assert len(rows) == 10
    whole = load(folder)
    assert len(rows) == 40
    two = load(folder, classes=["cat", "bee"])
    assert len(rows) == 60 and two.train.classes == ("cat", "bee")
    assert torch.equal(two.train.uint8[two.train.of_class(1)], one.train.uint8)
    assert torch.equal(two.test.uint8[two.test.of_class(0)], whole.test.uint8[whole.test.of_class(2)])


def test_a_subset_is_found_among_all_where_all_are_there(folder, tmp_path, opened):
    """Of a parquet file, which is read in whole to find its labels."""
    rows, _ = opened
    for split in ("train", "test"):
        table = sources._read_image_folder(folder / split)
        cells = [{"bytes": Path(item["path"]).read_bytes(), "path": None} for item in table["image"]]
        columns = {"image": cells, "label": table["label"]}
        (tmp_path / "parquet").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(columns, table.features).to_parquet(tmp_path / f"parquet/{split}.parquet")
    whole, expected = load(tmp_path / "parquet"), load(folder, classes=["cat", "bee"])
    rows.clear()
    two = load(tmp_path / "parquet", classes=["cat", "bee"])
    assert rows == [] and two.train.classes == ("cat", "bee") and two.fingerprint == expected.fingerprint
    assert two.train.stored.data_ptr() == two.validation.stored.data_ptr() and len(two.train.stored) == 24
    assert torch.equal(two.test.uint8[two.test.of_class(0)], whole.test.uint8[whole.test.of_class(2)])


def test_the_folders_of_other_classes_are_not_looked_into(folder, monkeypatch):
    looked, rglob, stat = [], Path.rglob, os.stat
    monkeypatch.setattr(Path, "rglob", lambda place, pattern: looked.append(place.name) or rglob(place, pattern))
    monkeypatch.setattr(os, "stat", lambda path, **given: looked.append(Path(path).parent.name) or stat(path, **given))
    load(folder, classes=["cat", 1])
    load(folder, classes=["cat", 1])
    assert {"bee", "cat"} <= set(looked) and "ant" not in looked
    (folder / "train/ant/8.bmp").write_bytes(b"of another class")
    looked.clear()
    assert len(load(folder, classes=["cat", 1]).test) == 4 and "ant" not in looked


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("is_there", [False, True])
def test_a_chosen_class_without_images_is_named(folder, split, is_there):
    shutil.rmtree(folder / split / "cat")
    if is_there:
        (folder / split / "cat").mkdir()
    for classes in (["cat"], ["bee", "cat"]):
        with pytest.raises(ValueError, match=f"split '{split}' has no images of class 'cat': add them"):
            load(folder, classes=classes)
    assert load(folder, classes=["bee", "ant"]).test.classes == ("bee", "ant")


@pytest.mark.parametrize(
    "changes", [{"size_px": 16}, {"channels": 1}, {"code": "another to_square"}, {"code": "another Pillow"}]
)
def test_what_the_images_depend_on_makes_others(folder, opened, monkeypatch, changes):
    rows, _ = opened
    load(folder)
    match changes.pop("code", None):
        case "another to_square":
            monkeypatch.setattr(sources, "to_square", lambda *given, **settings: Image.new("RGB", (8, 8), "red"))
        case "another Pillow":
            monkeypatch.setattr(sources.PIL, "__version__", "0.1")
    changed = load(folder, **changes, normalization=None if "channels" in changes else FIXED)
    assert len(rows) == 60
    if changes:
        load(folder)
        assert len(rows) == 60  # both are kept
    if not changes and sources.PIL.__version__ != "0.1":
        assert changed.test.uint8.max(dim=0).values[1:].max() == 0


def change(folder, how):
    file = folder / "train" / "bee" / "3.bmp"
    status = file.stat()
    match how:
        case "other pixels":
            Image.new("RGB", (8, 8), "red").save(file)
            assert file.stat().st_size == status.st_size
        case "touched":
            os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        case "renamed":
            file.rename(file.with_name("x.bmp"))
        case "removed":
            file.unlink()
        case "added":
            shutil.copy2(file, file.with_name("9.bmp"))
        case "another class":
            (folder / "train" / "ant" / "7.bmp").rename(file.with_name("+.bmp"))  # the order of all stays
        case "larger":
            Image.new("RGB", (9, 9), "red").save(file)
            os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("how", ["other pixels", "touched", "renamed", "removed", "added", "another class", "larger"])
def test_a_changed_source_is_noticed(folder, opened, how, tmp_path, monkeypatch):
    rows, _ = opened
    load(folder)
    change(folder, how)
    changed = load(folder)
    assert len(rows) == 54 + {"added": 1, "removed": -1}.get(how, 0)  # train again, test not
    monkeypatch.setattr(paths, "DECODED", tmp_path / "other")
    assert load(folder).fingerprint == changed.fingerprint


def test_a_changed_parquet_file_is_noticed(tmp_path, opened):
    def write(split, colour):
        columns = {"image": [Image.new("RGB", (8, 8), colour)] * 8, "label": ["a"] * 8}
        features = datasets.Features(image=datasets.Image(), label=datasets.Value("string"))
        datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / f"{split}.parquet")

    write("train", "red")
    write("test", "red")
    assert load(tmp_path, normalization=FIXED).test.uint8[0, 0].min() == 255
    write("test", "blue")
    assert load(tmp_path, normalization=FIXED).test.uint8[0, 0].max() == 0 and len(opened[0]) == 24


def test_a_hub_dataset_is_known_by_its_fingerprint(folder, opened, monkeypatch):
    rows, _ = opened
    tables = {split: sources._read_image_folder(folder / split) for split in ("train", "test")}
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", folder)  # where those of the hub lie
    monkeypatch.setattr(datasets, "load_dataset", lambda source, *, split: tables[split])
    expected = load("org/toy").fingerprint
    assert load("org/toy").fingerprint == expected and len(rows) == 30
    tables["test"] = tables["test"].select([0, 2, 4, 5])
    assert len(load("org/toy").test) == 4 and len(rows) == 34


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
@pytest.mark.parametrize("suffix", ["npy", "json"])
def test_a_file_cut_short_is_made_again(folder, opened, cache, suffix, kept):
    expected = load(folder).fingerprint
    for file in cache.glob(f"*.{suffix}"):
        whole = file.read_bytes()
        file.unlink()
        file.write_bytes(whole[:kept])
    assert load(folder).fingerprint == expected
    opened[0].clear()
    assert load(folder).fingerprint == expected and opened[0] == []


def test_a_file_of_another_kind_is_made_again(folder, cache):
    expected = load(folder).fingerprint
    for file in cache.glob("*.npy"):
        file.unlink()
        np.save(file, np.zeros((2, 3, 8, 8)))
    assert load(folder).fingerprint == expected


def test_a_broken_image_leaves_no_file_and_all_broken_are_named(folder, cache):
    for k in (7, 1, 3):
        (folder / "train" / "cat" / f"{k}.bmp").write_bytes(b"")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"(?s)replace or remove 3 .*row 17 \(.*cat/1\.bmp.*row 19.*row 23 "):
            load(folder)
        assert not list(cache.glob("*.npy")) and not list(cache.glob(".*"))
    for file in (folder / "train" / "bee").iterdir():
        file.write_bytes(b"BM")
    with pytest.raises(ValueError, match="replace or remove 11 images that cannot be read") as caught:
        load(folder)
    named = [int(line.split()[1]) for line in str(caught.value).splitlines()[1:]]
    assert named == [*range(8, 16), 17, 19, 23]


def test_a_stage_says_every_few_seconds_how_far_decoding_is(folder, monkeypatch, capsys):
    monkeypatch.setattr(sources, "CHUNK", 4)
    monkeypatch.setattr(sources.time, "monotonic", iter(range(0, 1000, 4)).__next__)  # four seconds a chunk
    monkeypatch.setenv("DVC_STAGE", "prior")
    load(folder)
    said = [line for line in capsys.readouterr().out.splitlines() if "split 'train'" in line]
    assert said[0] == "datasets.toy, split 'train': 12 of 24 images decoded, once" and len(said) == 2


def test_writing_into_a_split_does_not_reach_the_file(folder):
    dataset = load(folder)
    expected = dataset.fingerprint
    dataset.train.stored.zero_()
    assert load(folder).fingerprint == expected


def test_space_is_asked_for_before_decoding(folder, opened, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda _: usage(0, 0, 24 * 3 * 8 * 8 - 1))
    with pytest.raises(OSError, match=r"MiB needed in .*decoded.*make room"):
        load(folder)
    assert opened[0] == []


# Processes


def total(split):
    return sum(int(chunk.long().sum()) for chunk in split.chunks(7)), len(pickle.dumps(split))


def test_a_pickled_split_is_the_name_of_its_file(tmp_path, cache):
    rng = np.random.default_rng(0)
    for split, count in {"train": 40, "test": 4}.items():
        (tmp_path / "big" / split / "a").mkdir(parents=True)
        for k in range(count):
            pixels = rng.integers(0, 256, (128, 128, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "big" / split / "a" / f"{k}.bmp")
    dataset = load(tmp_path / "big", size_px=128)
    assert dataset.train.stored.nbytes > 1_900_000
    for split in (dataset.train, dataset.validation, dataset.test):
        assert len(pickle.dumps(split)) < 4000
        copy = pickle.loads(pickle.dumps(split))
        assert torch.equal(copy.uint8, split.uint8) and torch.equal(copy.labels, split.labels)
        assert copy.file == split.file and copy.classes == split.classes
    in_memory = data.Split(dataset.test.uint8, dataset.test.labels, dataset.test.classes)
    assert torch.equal(pickle.loads(pickle.dumps(in_memory)).uint8, dataset.test.uint8)
    found = fan_out(total, [{"split": dataset.train}] * 3, processes=2, label="totals")
    end_workers()
    pixels, _ = total(dataset.train)
    assert all(given == pixels and size < 4000 for given, size in found)


LOADING = """
import sys, pathlib, time
from ld3m.data import dataset as data
from ld3m.runtime import paths
paths.DECODED = pathlib.Path(sys.argv[2])
print(data.load_dataset(sys.argv[1], name="toy", size_px=8, channels=3, splits={SPLITS}).fingerprint)
"""


def test_two_processes_may_make_the_same_files_at_once(folder, cache):
    command = [sys.executable, "-c", LOADING.replace("{SPLITS}", repr(SPLITS)), str(folder), str(cache)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    found = {process.communicate()[0].strip() for process in processes}
    assert found == {load(folder).fingerprint} and all(process.returncode == 0 for process in processes)
    assert len(list(cache.iterdir())) == 4


def test_writers_of_one_file_do_not_disturb_one_another(tmp_path):
    file, seen = tmp_path / "file", []

    def parts():
        yield b"one "
        seen.append([entry.name for entry in tmp_path.iterdir()])
        storage.write_parts(tmp_path / "other", [b"other"])
        yield b"two"

    storage.write_parts(file, parts())
    assert file.read_bytes() == b"one two" and len(seen[0]) == 1 and str(os.getpid()) in seen[0][0]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "other"]


def test_what_a_killed_process_left_goes_after_an_hour(tmp_path):
    old, young = tmp_path / ".file.1-1.partial", tmp_path / ".file.2-2.partial"
    for file, age in ((old, 4000), (young, 100)):
        file.write_bytes(b"left")
        os.utime(file, (time.time() - age,) * 2)
    storage.write_parts(tmp_path / "file", [b"new"])
    assert sorted(file.name for file in tmp_path.iterdir()) == [young.name, "file"]


def test_a_file_is_read_as_it_lies_on_disk(tmp_path):
    array = np.arange(2 * 3 * 4 * 4, dtype=np.uint8).reshape(2, 3, 4, 4)
    storage.write_parts(tmp_path / "a.npy", decoded._npy(array.shape, iter([array[:1], array[1:]])))
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), array)
    np.testing.assert_array_equal(decoded.open_images(tmp_path / "a.npy").numpy(), array)
    with pytest.raises(ValueError, match="holds uint8"):
        decoded.open_images(tmp_path / "a.npy", shape=(3, 3, 4, 4))


# Files of every kind, in one folder


def save_kinds(folder, left, right):
    """Two-coloured files, 12 x 8 and upright `left` | `right`, in the ways that files hold colours."""
    image = Image.new("RGB", (12, 8), left)
    image.paste(right, (6, 0, 12, 8))
    image.save(folder / "rgb.png")
    image.quantize(4).save(folder / "palette.png")
    image.convert("CMYK").save(folder / "cmyk.jpg", quality=100, subsampling=0)
    image.convert("YCbCr").save(folder / "ycc.tiff")
    image.convert("RGBA").save(folder / "alpha.webp", lossless=True)
    frames = [image, Image.new("RGB", (12, 8), "white")]
    frames[0].save(folder / "animated.gif", save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side: to be turned clockwise by 90 degrees
    image.transpose(Image.Transpose.ROTATE_90).save(folder / "turned.jpg", quality=100, subsampling=0, exif=exif)
    image.resize((120, 80), Image.Resampling.NEAREST).save(folder / "large.BMP")


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


def test_what_cannot_be_an_image_is_named_before_any_work(folder, monkeypatch):
    place = folder / "train" / "ant"
    (place / "0.bmp").write_bytes(b"")
    Image.new("RGB", (64, 64), "red").save(place / "cut.png")
    (place / "cut.png").write_bytes((place / "cut.png").read_bytes()[:100])
    Image.new("1", (40, 40)).save(place / "huge.png")
    Image.new("F", (8, 8)).save(place / "unbounded.tif")
    (place / "text.jpg").write_text("no image")
    (place / "unknown.xyz").write_text("left out")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)  # a file twice as large as this is refused
    Image.new("1", (20, 20)).save(place / "small.png")
    with pytest.raises(ValueError) as refused:
        load(folder)
    message = str(refused.value)
    for name in ("0.bmp", "cut.png", "huge.png", "unbounded.tif", "text.jpg"):
        assert f"{name})" in message
    assert "1600 pixels" in message and "small.png" not in message and "unknown.xyz" not in message
