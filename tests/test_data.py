"""Normalization, splits, the choice of images, and what `load_dataset` makes of a source."""

import dataclasses
import hashlib

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from ld3m.data import dataset as data
from ld3m.data import mnist5k

SPLITS = {"train": "train", "validation": "validation", "test": "test"}
MNIST = {"source": "data/mnist5k", "name": "mnist5k", "size_px": 32, "channels": 1, "splits": SPLITS}
SETTINGS = {"name": "toy", "size_px": 8, "channels": 3, "splits": SPLITS}


@pytest.fixture(scope="module")
def embedded():
    if not (mnist5k.FOLDER / "train.parquet").exists():
        pytest.fail("data/mnist5k is missing: run `dvc pull data.dvc`")
    return data.load_dataset(**MNIST)


@pytest.fixture(scope="module")
def source_digits():
    return mnist5k.digits()


@pytest.fixture
def folder(tmp_path):
    """An image folder of noise: "cat" and "dog", six images each in every split."""
    rng = np.random.default_rng(0)
    for split in SPLITS:
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for k in range(6):
                image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
                image.save(tmp_path / split / name / f"{k}.bmp")
    return tmp_path


# Normalization


def test_normalization_is_affine_and_inverted():
    normalization = data.Normalization((0.1, 0.5, 0.8), (0.2, 0.3, 0.4))
    x = torch.rand(2, 3, 4, 5, dtype=torch.float64) * 2 - 1
    normalized = normalization.normalize(x)
    for channel, (mean, std) in enumerate(zip(normalization.mean, normalization.std, strict=True)):
        expected = (x[:, channel].numpy() * 0.5 + 0.5 - mean) / std
        np.testing.assert_allclose(normalized[:, channel].numpy(), expected, rtol=1e-12)
    assert normalized.dtype == torch.float64
    torch.testing.assert_close(normalization.denormalize(normalized), x)


def test_uint8_images_are_normalized_as_their_x_is():
    normalization = data.Normalization((0.4, 0.5, 0.1), (0.2, 0.3, 0.25))
    uint8 = torch.randint(256, (5, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split = data.Split(uint8, torch.zeros(3, dtype=torch.long), ("a",), rows=torch.tensor([4, 0, 2]))
    normalized = split.normalized(normalization, torch.tensor([2, 0]))
    assert normalized.dtype == torch.float32
    expected = normalization.normalize(uint8[[2, 4]] / 127.5 - 1)
    torch.testing.assert_close(normalized, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mean, std", [((), ()), ((0.5,), (0.5, 0.5)), ((0.5,), (0.0,)), ((0.5,), (float("nan"),))])
def test_impossible_statistics_are_refused(mean, std):
    with pytest.raises(ValueError, match="positive std"):
        data.Normalization(mean, std)
    with pytest.raises(ValueError, match="1 channels"):
        data.Normalization((0.5,), (0.5,)).normalize(torch.zeros(2, 3, 4, 4))


def test_measured_normalization_is_exact():
    uint8 = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (600, 3, 5, 4), dtype=np.uint8))
    uint8[:, 1] //= 7
    measured = data.measure_normalization(data.Split(uint8, torch.zeros(600, dtype=torch.int64), ("a",)))
    values = uint8.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(measured.mean, values.mean(axis=(0, 2, 3)), rtol=1e-13)
    np.testing.assert_allclose(measured.std, values.std(axis=(0, 2, 3)), rtol=1e-13)


# Splits and the choice of images


def toy_split(counts=(5, 3)):
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    uint8 = torch.arange(len(labels), dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 2, 2)
    return data.Split(uint8, labels, tuple("abcdefgh"[: len(counts)]))


def test_x_spans_minus_one_to_one():
    split = data.Split(torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1), torch.zeros(256).long(), ("a",))
    x = split.x()
    assert x.dtype == torch.float32 and x.shape == (256, 1, 1, 1) and len(split) == 256
    np.testing.assert_allclose(x.flatten().numpy(), np.arange(256, dtype=np.float64) * 2 / 255 - 1, atol=1e-7)
    assert x[0] == -1 and x[255] == 1
    torch.testing.assert_close(split.x(torch.tensor([7, 3])), x[[7, 3]])


def test_of_class_partitions_the_split():
    split = toy_split()
    for label, count in enumerate((5, 3)):
        members = split.of_class(label)
        assert members.tolist() == [row for row in range(8) if split.labels[row] == label] and len(members) == count
    for label in (-1, 2):
        with pytest.raises(ValueError, match=rf"label={label}: must be in 0\.\.1"):
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
    for ipc in (0, 4):
        with pytest.raises(ValueError, match=rf"ipc={ipc}: class '.' has [35] images"):
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
    with pytest.raises(ValueError, match="count=0"):
        data.class_batch(split, 1, count=0, generator=generator)


def test_fingerprint_depends_on_everything(folder):
    dataset = data.load_dataset(folder, **SETTINGS)
    assert dataset.fingerprint == data.load_dataset(folder, **SETTINGS).fingerprint and len(dataset.fingerprint) == 64
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


# The arguments of load_dataset


def test_a_share_for_validation_is_stratified_and_follows_from_the_seed_alone(embedded):
    def load(share, **changes):
        return data.load_dataset(**MNIST | {"splits": SPLITS | {"validation": share}} | changes)

    dataset = load(0.1)
    assert torch.bincount(dataset.validation.labels).tolist() == [35] * 10
    assert torch.bincount(dataset.train.labels).tolist() == [315] * 10
    parts = [*dataset.train.uint8, *dataset.validation.uint8]
    whole = sorted(image.numpy().tobytes() for image in embedded.train.uint8)
    assert sorted(image.numpy().tobytes() for image in parts) == whole
    assert dataset.normalization == data.measure_normalization(dataset.train)
    assert load(0.1, name="renamed").fingerprint == dataset.fingerprint
    assert load(0.1, seed=1).fingerprint != dataset.fingerprint
    alone = load(0.1, classes=["7"]).validation  # a class is divided alike whichever others are kept
    assert torch.equal(alone.uint8, dataset.validation.uint8[dataset.validation.of_class(7)])
    with pytest.raises(ValueError, match=r"splits\.validation=0\.001 is 0 of the 350 training images of class '0'"):
        load(0.001)


@pytest.mark.parametrize(
    "changes",
    [{"validation": 1.5}, {"validation": 0}, {"validation": "train"}, {"test": 0.1}, {"valid": "validation"}],
)
def test_impossible_splits_are_refused(folder, changes):
    with pytest.raises(ValueError, match="dataset 'toy': splits"):
        data.load_dataset(folder, **SETTINGS | {"splits": SPLITS | changes})


def test_classes_are_kept_and_relabelled_in_order(embedded):
    dataset = data.load_dataset(**MNIST, classes=["7", 2])
    assert dataset.train.classes == dataset.test.classes == ("7", "2")
    for label, digit in enumerate((7, 2)):
        for part in SPLITS:
            kept, whole = getattr(dataset, part), getattr(embedded, part)
            assert torch.equal(kept.uint8[kept.of_class(label)], whole.uint8[whole.of_class(digit)])
    assert dataset.normalization == data.measure_normalization(dataset.train) != embedded.normalization


@pytest.mark.parametrize(
    "classes, message",
    [
        (["cot"], r"'cot': allowed are 0\.\.1 and class names, such as 'cat'$"),
        ([-1], "'-1'"),
        (["cat", 0], "each class to keep once"),
    ],
)
def test_unknown_and_repeated_classes_are_refused(folder, classes, message):
    with pytest.raises(ValueError, match=rf"dataset 'toy': classes.*{message}"):
        data.load_dataset(folder, **SETTINGS, classes=classes)


def test_given_normalization_is_used(folder):
    given = data.Normalization((0.5,) * 3, (0.25,) * 3)
    assert data.load_dataset(folder, **SETTINGS, normalization=given).normalization == given
    with pytest.raises(ValueError, match="channels must be 1 or 3, size_px at least 1"):
        data.load_dataset(folder, **SETTINGS | {"channels": 2})
    with pytest.raises(ValueError, match="normalization has 3 channels, channels=1"):
        data.load_dataset(folder, **SETTINGS | {"channels": 1}, normalization=given)


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


def test_embedded_files_are_rebuilt_to_the_byte(embedded, tmp_path, monkeypatch, source_digits):
    monkeypatch.setattr(mnist5k, "digits", lambda: source_digits)  # reading them takes seconds
    for built in mnist5k.build(tmp_path):
        kept = mnist5k.FOLDER / built.name
        if parquet.read_metadata(kept).created_by != parquet.read_metadata(built).created_by:
            pytest.skip("data/mnist5k was written by another version of pyarrow")
        digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in (built, kept)]
        assert digests[0] == digests[1], f"{kept} is not what this code builds: run `dvc pull -f data.dvc`"
    assert sorted(file.stem for file in tmp_path.iterdir()) == ["test", "train", "validation"]
