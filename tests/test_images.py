"""Reading and decoding: every layout and format, decoded once, and again where the source or a setting has changed."""

import io
import itertools
import os
import pickle
import shutil
import threading
import unicodedata
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, HTTPServer

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image

from ld3m.data import dataset as data
from ld3m.data import images
from ld3m.runtime import paths, storage
from ld3m.runtime.hub import go_offline_if_unreachable

SPLITS = {"train": "train", "validation": 0.25, "test": "test"}
SETTINGS = {"name": "toy", "size_px": 8, "channels": 3, "splits": SPLITS}
NAMES = datasets.ClassLabel(names=["cat", "dog"])
REVERSED = datasets.ClassLabel(names=["dog", "cat"])
COUNTS = {"train": 8, "test": 2}


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
    for (split, count), (label, name) in itertools.product(COUNTS.items(), enumerate(("ant", "bee", "cat"))):
        (tmp_path / "toy" / split / name).mkdir(parents=True)
        for k in range(count):
            Image.fromarray(noise(100 * label + k + count)).save(tmp_path / "toy" / split / name / f"{k}.bmp")
    return tmp_path / "toy"


def noise(seed):
    return np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return buffer.getvalue()


def write_parquet(file, labels, *, feature=NAMES, cells=None, first=0):
    file.parent.mkdir(parents=True, exist_ok=True)
    cells = cells or [{"bytes": png(noise(first + row)), "path": None} for row in range(len(labels))]
    features = datasets.Features(image=datasets.Image(), label=feature)
    datasets.Dataset.from_dict({"image": cells, "label": labels}, features=features).to_parquet(file)


@pytest.fixture
def parquet(tmp_path):
    """Parquet files of "cat" and "dog", six training and six test images of each."""
    for split in COUNTS:
        write_parquet(tmp_path / "files" / f"{split}.parquet", [0, 1] * 6)
    return tmp_path / "files"


def load(source, **changes):
    return data.load_dataset(source, **SETTINGS | changes)


def refusal(message, source, **changes):
    """Loading is refused in words that match the message; returns them."""
    with pytest.raises(ValueError, match=message) as refused:
        load(source, **changes)
    return str(refused.value)


def test_parquet_images_arrive_unchanged_also_after_a_change_and_classes_are_matched_by_name(parquet, decoded):
    load(parquet)
    write_parquet(parquet / "test.parquet", [0, 0, 1], feature=REVERSED)
    test = load(parquet).test
    np.testing.assert_array_equal(test.uint8.permute(0, 2, 3, 1).numpy(), np.stack([noise(row) for row in range(3)]))
    assert test.classes == ("cat", "dog") and test.labels.tolist() == [1, 1, 0] and test.labels.dtype == torch.int64
    assert len(decoded) == 24 + 3
    cats, dogs = (load(parquet, classes=[name]).train.stored for name in ("cat", "dog"))
    assert not torch.equal(cats, dogs)


def test_shards_are_one_split_in_the_layouts_of_the_hub(parquet, tmp_path):
    whole = tmp_path / "sharded"
    sharded = whole / "plain_text"
    for split, part in itertools.product(COUNTS, range(2)):
        write_parquet(sharded / f"{split}-0000{part}-of-00002.parquet", [0, 1] * 3, first=6 * part)
    for classes in (None, ["dog"]):
        assert load(whole, classes=classes).fingerprint == load(parquet, classes=classes).fingerprint
    write_parquet(sharded / "train-00001-of-00002.parquet", [0, 1], feature=REVERSED)
    refusal("different class names", whole)
    (sharded / "train-00001-of-00002.parquet").unlink()
    refusal(r"'train' has 1 of \[2\] files: fetch the others", whole)
    shutil.copytree(sharded, whole / "other")
    refusal("'train' is in each of the folders .*: set source to one of them", whole)


def test_a_hub_dataset_is_known_by_its_fingerprint(folder, decoded, monkeypatch):
    expected = load(folder)
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["ant", "bee", "cat"]))
    tables = {}
    for split in COUNTS:
        files = sorted(map(str, (folder / split).rglob("*.bmp")))
        columns = {"image": files, "label": np.repeat(range(3), len(files) // 3)}
        tables[split] = datasets.Dataset.from_dict(columns, features=features)
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", folder)  # where the hub's files are
    monkeypatch.setattr(datasets, "load_dataset", lambda source, *, split: {"org/toy": tables}[source][split])
    decoded.clear()
    assert load("org/toy").fingerprint == load("org/toy").fingerprint == expected.fingerprint and len(decoded) == 30
    tables["test"] = tables["test"].select([0, 2, 4, 5]).flatten_indices()
    assert len(load("org/toy").test) == 4 and len(decoded) == 34
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", folder / "test")  # cells may name no file elsewhere
    refusal(r"'train': replace or remove 24 unreadable images(.|\s)*: there are no bytes", "org/toy", size_px=16)

    monkeypatch.setattr(datasets, "load_dataset", lambda source, *, split: {}[source])
    for source in ("org/toy", "toy"):
        with pytest.raises(FileNotFoundError, match=r"KeyError.*train/<class>.*in a folder and name it"):
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
    refusal(r"test has no class folders: place its images in <class>/", folder)


@pytest.mark.parametrize(
    "labels, feature, classes, expected",
    [
        ([2, 0, 1, 0], datasets.Value("int64"), ("0", "1", "2"), [2, 0, 1, 0]),
        (["b", "c", "a", "a"], datasets.Value("string"), ("a", "b", "c"), [1, 2, 0, 0]),
    ],
)
def test_labels_without_class_names_are_in_the_order_of_their_values(parquet, labels, feature, classes, expected):
    for split in COUNTS:
        write_parquet(parquet / f"{split}.parquet", labels * 2, feature=feature)
    test = load(parquet, splits=SPLITS | {"validation": 0.5}).test
    assert test.classes == classes and test.labels.tolist() == expected * 2


def test_impossible_labels_and_columns_are_refused(parquet):
    for labels, kind, message in [
        ([0, -1, 1], "int64", "not '-1', '0', '1': change label_column, or remove rows"),
        (["a", None], "string", "not 'None', 'a'"),
        ([0, 2**40], "int64", "not '0', '1099511627776'"),
        ([], "int64", "not no rows at all"),
    ]:
        write_parquet(parquet / "train.parquet", labels, feature=datasets.Value(kind), cells=None if labels else [])
        refusal(f"split 'train', column 'label': .* integers from 0, {message}", parquet)
    for setting in ("image_column", "label_column"):
        refusal(rf"{setting}='img': the columns are \['image', 'label'\]", parquet, **{setting: "img"})
    refusal("column 'label' holds int64, not images", parquet, image_column="label")


def test_a_chosen_class_without_images_is_named_before_decoding(folder, decoded):
    for file in (folder / "test" / "cat").iterdir():
        file.rename(file.with_suffix(".heic"))
    for classes in (["bee", "cat"], None):
        refusal(r"'test' has no images of class 'cat': add some \(PNG, JPEG", folder, classes=classes)
        shutil.rmtree(folder / "test" / "cat", ignore_errors=True)
    assert decoded == []
    assert load(folder, classes=["bee", "ant"]).test.classes == ("bee", "ant")


def test_images_are_decoded_once_and_again_where_their_file_is_damaged(folder, decoded, cache):
    first, expected = load(folder), [np.array(Image.open(folder / f"test/bee/{k}.bmp")) for k in range(2)]
    np.testing.assert_array_equal(first.test.uint8[2:4].permute(0, 2, 3, 1).numpy(), np.stack(expected))
    for times, length in enumerate((None, 0, 100, -1), 1):
        for file in cache.iterdir():
            file.write_bytes(file.read_bytes()[:length])
        assert load(folder).fingerprint == load(folder).fingerprint == first.fingerprint
        assert len(decoded) == 30 * times and len(list(cache.iterdir())) == 2


def test_train_and_validation_share_the_stored_images(folder):
    dataset = load(folder)
    assert dataset.train.stored.data_ptr() == dataset.validation.stored.data_ptr()
    assert (len(dataset.train), len(dataset.validation), len(dataset.train.stored)) == (18, 6, 24)
    for part in (dataset.train, dataset.validation):
        assert torch.equal(part.x(torch.tensor([3, 0])), part.x()[[3, 0]])
        assert torch.equal(torch.cat(list(part.chunks())), part.uint8)
        moved = part.to("meta")
        assert torch.equal(moved.labels, part.labels) and len(moved.stored) == len(part) and moved.rows is None
    expected = dataset.fingerprint
    dataset.train.stored.zero_()  # in memory, not in the file
    assert load(folder).fingerprint == expected


def test_another_setting_or_version_and_changed_files_are_decoded_again(folder, decoded, monkeypatch):
    file, found = folder / "train/bee/3.bmp", [load(folder).fingerprint]
    Image.new("RGB", (8, 8), "red").save(file)  # of the same size
    found.append(load(folder).fingerprint)
    (folder / "train/ant/7.bmp").rename(file.with_name("+.bmp"))  # the order of all stays
    found.append(load(folder).fingerprint)
    assert len(set(found)) == 3 and len(decoded) == 30 + 24 + 24  # train again, test not
    for changes in ({"size_px": 16}, {"channels": 1}):
        load(folder, **changes)
    for module, name in ((images, "SQUARE_VERSION"), (images.PIL, "__version__")):
        monkeypatch.setattr(module, name, "another")
        load(folder)
    assert len(decoded) == 78 + 4 * 30


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


def test_broken_images_are_named_up_to_five_and_nothing_is_kept(folder, cache, monkeypatch):
    place = folder / "train" / "ant"
    (place / "0.bmp").write_bytes(b"")
    (place / "deeper").mkdir()
    (place / "deeper/cut.png").write_bytes(png(noise(0))[:100])
    Image.new("1", (40, 40)).save(place / "huge.png")
    Image.new("F", (8, 8)).save(place / "unbounded.tif")
    for name in ("text.jpg", "unshown.jpg", "unknown.xyz", "._hidden.png"):  # the last two are left out
        (place / name).write_text("no image")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow itself refuses only a file twice as large
    words = refusal("split 'train': replace or remove 6 unreadable images", folder)
    *named, more = [line.split(": ")[0] for line in words.splitlines()[1:]]
    assert named == [str(place / name) for name in ("0.bmp", "deeper/cut.png", "huge.png", "text.jpg", "unbounded.tif")]
    assert "it has 40 x 40 pixels" in words and more == "and 1 more" and not list(cache.iterdir())


def test_broken_cells_and_cells_that_name_a_file_are_refused(parquet):
    whole, broken = {"bytes": png(noise(0)), "path": None}, {"bytes": b"nonsense", "path": "x.png"}
    cells = [whole, broken, None, {"bytes": None, "path": __file__}]
    write_parquet(parquet / "test.parquet", [1, 0, 0, 0], cells=cells)
    words = refusal("split 'test': replace or remove 3 unreadable images", parquet, classes=["cat"])
    for named in ("1 (x.png): UnidentifiedImageError", "2 (no file name): ValueError", f"3 ({__file__}): ValueError"):
        assert f"row {named}" in words
    assert len(load(parquet, classes=["dog"]).test) == 1


def test_an_image_for_which_pillow_starts_a_program_and_a_pipe_are_refused(folder, tmp_path, monkeypatch):
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    Image.fromarray(noise(3)).save(folder / "train/cat/2.png", "EPS")
    refusal(r"train/cat/2\.png: UnidentifiedImageError", folder)
    assert not (tmp_path / "started").exists()
    os.mkfifo(folder / "train/cat/pipe.png")
    refusal(r"split 'train': .*train/cat/pipe\.png is no regular file: remove it", folder)


@pytest.mark.parametrize(
    "where, named, write",  # the images of class {}; the folders of images; what to write if these are the classes
    [
        ("images/{}", "images holds folders of images, 'ant', 'bee', 'cat'", "images"),
        ("mine/images/{}", "mine/images holds folders of images, 'ant', 'bee', 'cat'", "mine/images"),
        ("{}/batch2", "ant holds folders of images, 'batch2'", "ant"),
    ],
)
def test_folders_too_deep_are_named(folder, where, named, write):
    for split, name in itertools.product(COUNTS, ("ant", "bee", "cat")):
        (folder / split / name).rename(folder / "moved")
        (folder / split / where.format(name)).parent.mkdir(parents=True, exist_ok=True)
        (folder / "moved").rename(folder / split / where.format(name))
    refusal(f"train/{named}. .*write 'train/{write}' in place of 'train'; else move their images up into", folder)
    if write != "ant":
        splits = {"train": f"train/{write}", "validation": 0.25, "test": f"test/{write}"}
        assert load(folder, splits=splits).train.classes == ("ant", "bee", "cat")


@pytest.mark.parametrize(
    "names, classes, expected",  # of the folders of ant, bee and cat; asked for; read
    [
        (("10", "02", "1"), None, "1 02 10"),
        (("class10", "class2", "class1b"), None, "class1b class2 class10"),
        (("b", "C", "a"), None, "C a b"),
        (("10", "2", "1"), [10, 1], "10 1"),
        (("10", "02", "01"), [10, 2], "10 02"),
        (("ant", "bee", "cat"), [2, "ant"], "cat ant"),
    ],
)
def test_classes_are_in_natural_order_and_a_number_is_a_name_where_names_are_numbers(folder, names, classes, expected):
    first = {}  # the first test image of each class
    for label, (former, name) in enumerate(zip(("ant", "bee", "cat"), names, strict=True)):
        first[name] = torch.from_numpy(noise(100 * label + 2)).movedim(2, 0)
        for split in COUNTS:
            (folder / split / former).rename(folder / split / name)
    test = load(folder, classes=classes).test
    assert " ".join(test.classes) == expected
    assert all(torch.equal(test.uint8[test.of_class(k)[0]], first[name]) for k, name in enumerate(test.classes))
    if names[0] == "10":
        refusal("classes has 0: write names, such as '", folder, classes=[0, 1])


def test_what_systems_and_tools_leave_is_no_class_and_no_image_of_one(folder):
    expected = load(folder).fingerprint
    left = "__MACOSX __pycache__ @eaDir #recycle $RECYCLE.BIN .ipynb_checkpoints lost+found System_Volume_Information"
    for place, name in itertools.product(("train", "test", "train/bee"), left.split()):
        shutil.copytree(folder / "test/ant", folder / place / name.replace("_V", " V").replace("_I", " I"))
    (folder / "train/bee/#1.bmp").hardlink_to(folder / "train/ant/0.bmp")
    assert len(load(folder).train) == 19 and load(folder).train.classes == ("ant", "bee", "cat")
    (folder / "train/bee/#1.bmp").unlink()
    assert load(folder).fingerprint == expected


def test_unicode_forms_of_a_name_are_one_class_and_names_that_differ_in_case_are_refused(folder):
    composed, decomposed = (unicodedata.normalize(form, "Bä") for form in ("NFC", "NFD"))
    for place, former, name in (("train", "ant", decomposed), ("test", "ant", composed), ("train", "bee", composed)):
        (folder / place / former).rename(folder / place / name)
    assert load(folder, classes=["cat", decomposed]).train.labels.bincount().tolist() == [6, 12]
    for split in COUNTS:
        shutil.copytree(folder / split / "cat", folder / split / "straße")
        shutil.copytree(folder / split / "cat", folder / split / "strasse")
    shutil.rmtree(folder / "test/bee")
    assert load(folder).train.classes == ("Bä", "cat", "strasse", "straße")
    (folder / "test/cat").rename(folder / "test/Cat")
    refusal("classes 'cat' and 'Cat' are one or differ in case only: rename one", folder)


def test_images_of_almost_one_color_are_named_and_refused_where_they_are_half_of_a_class(folder, capsys):
    for k in range(4):  # 12 bits in 16
        assert load(folder).train.classes == ("ant", "bee", "cat")
        file = folder / f"train/bee/{k}.bmp"
        file.unlink()
        Image.fromarray(noise(k)[:, :, 0].astype(np.uint16) * 16).save(file.with_suffix(".png"))
    printed = [line for line in capsys.readouterr().out.splitlines() if "almost" in line]
    assert len(printed) == 3 and "3 of 24 images have almost one color" in printed[2]
    assert str(folder / "train/bee/2.png") in printed[2]
    for _ in range(2):  # nothing of it is kept
        words = refusal(r"'train': 4 of 8 images of class 'bee' have almost one color .*12 bits in 16", folder)
        assert str(folder / "train/bee/0.png") in words and "ant" not in words


@pytest.mark.parametrize("answers", [True, False])
def test_a_hub_that_does_not_answer_is_not_asked(monkeypatch, answers):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:  # answers that it does not know the method
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        if answers:
            threading.Thread(target=server.handle_request, daemon=True).start()
        else:
            server.server_close()
        go_offline_if_unreachable()
    assert constants.HF_HUB_OFFLINE != answers
