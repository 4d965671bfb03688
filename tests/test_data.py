"""Normalization, splits, the choice of images, what `load_dataset` makes of its arguments, and images as squares."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import make_split
from PIL import Image
from pyarrow import parquet

from ld3m.data import dataset as data
from ld3m.data import images as files
from ld3m.data import mnist5k
from ld3m.data.coresets import herding, k_center
from ld3m.data.subsets import IMAGENET, imagenet_classes, imagenet_indices, of_imagenet
from ld3m.pipeline.profiles import load_params

SPLITS = {"train": "train", "validation": "validation", "test": "test"}


def load(**changes):
    settings = {"source": "data/mnist5k", "name": "toy", "size_px": 32, "channels": 1, "splits": SPLITS}
    return data.load_dataset(**settings | changes)


@pytest.fixture(scope="module")
def embedded():
    if not (mnist5k.FOLDER / "train.parquet").exists():
        pytest.fail("data/mnist5k is missing: run `dvc pull data.dvc`")
    return load()


def test_normalization_is_affine_inverted_and_measured_exactly():
    normalization, x = data.Normalization((0.1, 0.5), (0.2, 0.3)), torch.rand(2, 2, 4, 5, dtype=torch.float64) * 2 - 1
    normalized = normalization.normalize(x)
    expected = torch.stack([(x[:, 0] * 0.5 + 0.5 - 0.1) / 0.2, (x[:, 1] * 0.5 + 0.5 - 0.5) / 0.3], dim=1)
    torch.testing.assert_close(normalized, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(normalization.denormalize(normalized), x)
    with pytest.raises(ValueError, match="2 channels"):
        normalization.normalize(torch.zeros(2, 1, 4, 4))
    for mean, std in (((), ()), ((0.5,), (0.5, 0.5)), ((0.5,), (0.0,)), ((0.5,), (float("nan"),))):
        with pytest.raises(ValueError, match="positive std"):
            data.Normalization(mean, std)
    uint8 = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (600, 3, 5, 4), dtype=np.uint8))
    uint8[:, 1] //= 7
    measured = data.measure_normalization(data.Split(uint8, torch.zeros(600, dtype=torch.int64), ("a",)))
    values = uint8.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(measured.mean, values.mean(axis=(0, 2, 3)), rtol=1e-13)
    np.testing.assert_allclose(measured.std, values.std(axis=(0, 2, 3)), rtol=1e-13)


def test_images_span_minus_one_to_one_and_are_normalized():
    normalization, index = data.Normalization((0.4,), (0.2,)), torch.tensor([7, 3])
    split = data.Split(torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1), torch.zeros(256).long(), ("a",))
    reverse = dataclasses.replace(split, rows=torch.arange(255, -1, -1))
    x = split.x()
    assert x.dtype == torch.float32 and x[0] == -1 and x[255] == 1
    np.testing.assert_allclose(x.flatten().numpy(), np.arange(256, dtype=np.float64) * 2 / 255 - 1, atol=1e-7)
    for images, expected in ((split, x[[7, 3]]), (reverse, x[[248, 252]])):
        assert torch.equal(images.x(index), expected)
        normalized = images.normalized(normalization, index)
        torch.testing.assert_close(normalized, normalization.normalize(expected), rtol=1e-5, atol=1e-5)


def test_initial_indices_are_contiguous_distinct_and_nested(embedded):
    split = embedded.train
    ten = data.initial_indices(split, ipc=10, seed=3)
    assert split.labels[ten].tolist() == [image // 10 for image in range(100)] and len(set(ten.tolist())) == 100
    for ipc in (1, 4):
        smaller = data.initial_indices(split, ipc=ipc, seed=3)
        assert torch.equal(smaller.view(10, ipc), ten.view(10, 10)[:, :ipc])
    assert not torch.equal(ten, data.initial_indices(split, ipc=10, seed=4))
    for ipc in (0, 351):
        with pytest.raises(ValueError, match=rf"ipc={ipc}: class '0' has 350 images, ipc must be in 1\.\.350"):
            data.initial_indices(split, ipc=ipc, seed=0)


def test_class_batch_draws_without_replacement():
    split, generator = make_split(5, seed=0), torch.Generator().manual_seed(0)
    members = [row for row in range(15) if split.labels[row] == 1]
    batches = [data.class_batch(split, 1, count=3, generator=generator).tolist() for _ in range(30)]
    assert all(len(set(batch)) == 3 for batch in batches) and sorted(set().union(*batches)) == members
    assert sorted(data.class_batch(split, 1, count=10, generator=generator).tolist()) == members


def test_fingerprint_depends_on_everything(dataset):
    assert dataclasses.replace(dataset, name="renamed").fingerprint == dataset.fingerprint
    changed = [dataset, dataclasses.replace(dataset, train=dataclasses.replace(dataset.train, classes=("a", "b", "z")))]
    for part in SPLITS:
        split = getattr(dataset, part)
        uint8, labels = split.uint8.clone(), split.labels.clone()
        uint8[-1, -1, -1, -1] ^= 1
        labels[-1] ^= 1
        for other in (dataclasses.replace(split, stored=uint8), dataclasses.replace(split, labels=labels)):
            changed.append(dataclasses.replace(dataset, **{part: other}))
    assert len({each.fingerprint for each in changed}) == 8


def test_a_share_for_validation_is_stratified_and_follows_from_the_seed_alone(embedded):
    settings = {"splits": SPLITS | {"validation": 0.1}}
    dataset = load(**settings)
    assert torch.bincount(dataset.validation.labels).tolist() == [35] * 10
    parts = torch.cat([dataset.train.uint8, dataset.validation.uint8])
    assert sorted(parts.flatten(1).tolist()) == sorted(embedded.train.uint8.flatten(1).tolist())
    assert dataset.normalization == data.measure_normalization(dataset.train)
    assert load(**settings, name="renamed").fingerprint == dataset.fingerprint
    assert load(**settings, seed=1).fingerprint != dataset.fingerprint
    alone = load(**settings, classes=["7"]).validation  # alike whichever others are kept
    assert torch.equal(alone.uint8, dataset.validation.uint8[dataset.validation.of_class(7)])


def test_classes_are_kept_and_relabeled_in_order(embedded):
    dataset = load(classes=["7", 2])
    assert dataset.train.classes == dataset.test.classes == ("7", "2")
    for label, digit in enumerate((7, 2)):
        for part in SPLITS:
            kept, whole = getattr(dataset, part), getattr(embedded, part)
            assert torch.equal(kept.uint8[kept.of_class(label)], whole.uint8[whole.of_class(digit)])
    assert dataset.normalization == data.measure_normalization(dataset.train) != embedded.normalization
    assert load(normalization=data.Normalization((0.5,), (0.25,))).normalization == data.Normalization((0.5,), (0.25,))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"splits": SPLITS | {"validation": 1.5}}, r"splits\.validation=1.5 is 525 of the 350 .* of class '0'"),
        ({"splits": SPLITS | {"validation": 0.001}}, r"splits\.validation=0\.001 is 0 of the 350 .* of class '0'"),
        ({"splits": SPLITS | {"validation": "train"}}, "splits=.*: name three different splits"),
        ({"classes": ["11"]}, r"classes has '11': write names, such as '1', '"),
        ({"classes": ["0", 0]}, r"classes=\['0', 0\]: name each class to keep once"),
        ({"classes": []}, r"classes=\[\]: name each class to keep once"),
        ({"channels": 2}, "channels=2: give 1 or 3"),
        (
            {"channels": 3, "normalization": data.Normalization((0.5,), (0.2,))},
            "channels=3: .* means and stds in normalization",
        ),
    ],
)
def test_impossible_arguments_are_refused(embedded, changes, message):
    with pytest.raises(ValueError, match=f"dataset 'toy': {message}"):
        load(**changes)


def test_embedded_digits_are_the_source_divided_and_rebuilt_to_the_byte(embedded, tmp_path):
    found = []
    for part, count in (("train", 350), ("validation", 50), ("test", 100)):
        split = getattr(embedded, part)
        assert split.uint8.shape == (count * 10, 1, 32, 32) and split.classes == tuple("0123456789")
        assert torch.bincount(split.labels).tolist() == [count] * 10
        assert len(split.labels[:50].unique()) == 10  # shuffled
        found += zip((image.numpy().tobytes() for image in split.uint8), split.labels.tolist(), strict=True)
    images, labels = mnist5k.digits()
    every = zip((image.tobytes() for image in images), labels.tolist(), strict=True)
    assert sorted(found) == sorted(every)  # every digit once, hence disjoint splits
    mnist5k.build(tmp_path)
    for part in SPLITS:
        kept, built = mnist5k.FOLDER / f"{part}.parquet", tmp_path / f"{part}.parquet"
        if parquet.read_metadata(kept).created_by != parquet.read_metadata(built).created_by:
            pytest.skip("data/mnist5k was written by another version of pyarrow")
        assert kept.read_bytes() == built.read_bytes(), f"{kept} differs: run `dvc pull -f data.dvc`"


def square(image, channels=3):
    return np.array(files.to_square(image, size_px=8, channels=channels))


@pytest.mark.parametrize("height, width", [(8, 8), (8, 13), (12, 8)])
def test_the_center_is_cropped_and_keeps_its_pixels(height, width):
    array = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    top, left = (height - 8) // 2, (width - 8) // 2
    np.testing.assert_array_equal(square(Image.fromarray(array)), array[top : top + 8, left : left + 8])


def test_resizing_is_antialiased_and_centered():
    stripes = np.zeros((64, 128, 3), dtype=np.uint8)
    stripes[:, ::2] = 255  # averages to gray; aliased it would be black or white
    assert abs(square(Image.fromarray(stripes)).astype(int) - 128).max() < 12
    marked = np.zeros((64, 128, 3), dtype=np.uint8)
    marked[:, 32:96] = 255  # exactly the center square
    assert (square(Image.fromarray(marked))[:, 1:-1] > 240).all()
    assert (square(Image.fromarray(np.roll(marked, 64, axis=1))) < 200).all()


def test_alpha_is_composited_onto_black():
    alpha = np.dstack([np.full((8, 8, 3), 200, np.uint8), np.full((8, 8), 128, np.uint8)])
    assert abs(square(Image.fromarray(alpha)).astype(int) - 100).max() <= 1
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([255, 255, 255] * 256)
    palette.info["transparency"] = 0
    assert square(palette).max() == 0


def test_files_of_every_kind_and_gray_ones_of_every_depth_show_the_same_picture(tmp_path):
    image = Image.new("RGB", (12, 8), (250, 40, 10))
    image.paste((10, 90, 240), (6, 0, 12, 8))
    image.save(tmp_path / "rgb.png")
    image.quantize(4).save(tmp_path / "palette.png")
    image.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100, subsampling=0)
    image.convert("RGBA").save(tmp_path / "alpha.webp", lossless=True)
    image.save(tmp_path / "animated.gif", save_all=True, append_images=[Image.new("RGB", (12, 8), "white")])
    image.resize((120, 80), Image.Resampling.NEAREST).save(tmp_path / "large.bmp")
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side: to be turned clockwise by 90 degrees
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.jpg", quality=100, subsampling=0, exif=exif)
    for file in tmp_path.glob("*.*"):
        pixels = square(files.open_image(str(file))).astype(int)  # the center 8 x 8: columns 2..9
        assert abs(pixels[:, 0] - [250, 40, 10]).max() <= 6 and abs(pixels[:, -1] - [10, 90, 240]).max() <= 6
    ramp = np.repeat(np.linspace(0, 255, 8).round().astype(np.uint8)[None], 8, axis=0)
    deep = Image.fromarray(ramp.astype(np.uint16) * 257)
    for name, gray in {"8.pgm": Image.fromarray(ramp), "16.png": deep, "16.tif": deep}.items():
        gray.save(tmp_path / name)
        np.testing.assert_array_equal(square(files.open_image(str(tmp_path / name)), channels=1), ramp)


def test_every_subset_is_ten_distinct_classes_and_an_unknown_one_lists_them():
    assert " ".join(IMAGENET) == "a b c d e nette woof birds fruits cats yellow geo food mammals marine"
    assert all(len(set(indices)) == 10 for indices in IMAGENET.values())
    assert len({index for name in "abcde" for index in IMAGENET[name]}) == 50
    assert sum(map(sum, IMAGENET.values())) == 68011  # of the published numbers
    with pytest.raises(ValueError, match=r"datasets\.mnist5k\.classes: .*named 'dogs'; there are a, .*\[dogs\]"):
        load_params({"datasets.mnist5k.classes": "dogs"})


def test_a_subset_is_its_classes_in_the_published_order(tmp_path):
    wnids = [imagenet_classes()[index]["wnid"] for index in IMAGENET["woof"]]
    for label, wnid in enumerate(wnids):
        for file in (f"train/{wnid}/0.png", f"train/{wnid}/1.png", f"val/{wnid}/0.png"):
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            Image.frombytes("L", (8, 8), bytes(range(label, label + 64))).save(tmp_path / file)
    splits = {"train": "train", "validation": 0.5, "test": "val"}
    dataset = load(source=tmp_path, size_px=8, splits=splits, classes="woof")
    assert dataset.train.classes == tuple(imagenet_classes()[k]["name"] for k in IMAGENET["woof"])
    assert imagenet_indices(dataset.train.classes) == IMAGENET["woof"] != tuple(sorted(IMAGENET["woof"]))
    for part in (dataset.train, dataset.validation, dataset.test):
        assert part.uint8[part.labels.argsort(), 0, 0, 0].tolist() == list(range(10))


def test_a_subset_is_found_by_wnid_or_word_or_in_imagenet_s_order():
    wnids, words = ([entry[key] for entry in imagenet_classes()] for key in ("wnid", "name"))
    assert (
        len(set(wnids)) == len(set(map(str.lower, words))) == 1000
        and wnids == sorted(wnids)
        and (wnids[0], words[701]) == ("n01440764", "parachute")
    )
    numbers, hub = [str(index) for index in range(1000)], ["tench, Tinca tinca", *map(str.upper, words[1:])]
    for names in (numbers, hub, wnids):
        assert of_imagenet("nette", names, where="toy") == [names[index] for index in IMAGENET["nette"]]
    for names in (wnids, words):
        ten = [names[index] for index in IMAGENET["woof"]]
        assert of_imagenet("woof", sorted(ten), where="toy") == ten  # just those ten, in any order
        assert imagenet_indices(ten) == IMAGENET["woof"] and imagenet_indices([*ten, "0"]) is None
    assert imagenet_indices(["crane"]) is None  # a bird and a machine
    for names in (sorted(numbers), wnids[1:], [f"animal {index:03d}" for index in range(1000)]):
        with pytest.raises(ValueError, match=r"toy: classes='nette' needs n01440764.* too .*name folders by wnid"):
            of_imagenet("nette", names, where="toy")


@pytest.fixture
def features():
    return torch.randn(30, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_herding_and_k_center_take_the_best_next_image(features):
    near_mean, far = herding(features, 6).tolist(), k_center(features, 6).tolist()
    mean = features.mean(0)
    assert far[0] == (features - mean).norm(dim=1).argmin()
    for k in range(6):
        gap = {i: (features[[*near_mean[:k], i]].mean(0) - mean).norm().item() for i in range(30)}
        assert near_mean[k] == min(gap.keys() - set(near_mean[:k]), key=gap.get)
        distance = [min((features[i] - features[j]).norm().item() for j in far[: max(k, 1)]) for i in range(30)]
        assert k == 0 or distance[far[k]] == max(distance)


@pytest.mark.parametrize("choose", [herding, k_center])
def test_all_images_once_and_refusals(choose, features):
    for rows in (features, torch.zeros(3, 2)):  # equal rows are distinct images
        assert sorted(choose(rows, len(rows)).tolist()) == list(range(len(rows)))
    for count in (0, 31):
        with pytest.raises(ValueError, match="choose 1..30"):
            choose(features, count)
