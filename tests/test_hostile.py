"""Every reader of files from outside: whatever they hold, it gives a valid result or a ValueError or OSError that names
the file; it executes nothing of theirs, does not hang, and raises nothing else.

Files are damaged ones that were valid, ones that are made of the format's own parts, and noise.
"""

import io
import json
import os
import pickle
import signal
import struct
import zipfile
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import make_prior
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from ld3m.data import decoded
from ld3m.data.dataset import load_dataset
from ld3m.evaluation.artefact import read_artefact
from ld3m.evaluation.experts import open_experts
from ld3m.evaluation.foreign import read_set
from ld3m.models import compvis
from ld3m.models.gan import build_generator, load_generator, save_generator
from ld3m.models.prior_io import load_prior, save_prior
from ld3m.pipeline import profiles as config
from ld3m.runtime import paths
from ld3m.runtime.checkpoint import Checkpoint
from ld3m.runtime.storage import METADATA_KEY, read_tensors, tensors_hash

SECONDS = 20  # in which a reader must have done, on a slow machine
few = partial(
    settings,
    deadline=None,
    derandomize="LD3M_KILLS" not in os.environ,  # `make test-all` draws others every time
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
ONE = st.lists(JSON, min_size=1, max_size=1)
DEEP = "[" * 3000


@contextmanager
def in_time():
    def too_long(number, frame):
        raise AssertionError(f"not done after {SECONDS} s")

    former = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)


def survives(read, *names):
    """What is read, or None for an error, which must name one of `names`."""
    with in_time():
        try:
            return read()
        except (ValueError, OSError) as error:
            assert any(name in str(error) for name in names), f"{type(error).__name__}: {error}"
    return None


@st.composite
def damaged(draw, whole: bytes) -> bytes:
    """The bytes with some cut off, flipped, put in or repeated; half of it near the front, where headers are."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        end = draw(st.sampled_from([min(200, len(data)), len(data)]))
        at = draw(st.integers(0, end))
        match draw(st.sampled_from(["flip", "flip", "set", "cut", "put in", "repeat"])):
            case "flip" if at < len(data):
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "set" if at < len(data):
                data[at] = draw(st.integers(0, 255))
            case "cut":
                del data[at : at + draw(st.integers(1, 1 + len(data)))]
            case "put in":
                data[at:at] = draw(st.binary(min_size=1, max_size=12))
            case "repeat":
                data[at:at] = data[at : at + draw(st.integers(1, 40))]
    return bytes(data)


@st.composite
def safetensors_files(draw) -> bytes:
    """A header of the format's own words, about anything, and some bytes behind it."""
    dtypes = st.sampled_from(["F32", "F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "X"])
    sizes = st.integers(0, 4) | st.sampled_from([2**31, 2**63, -1])
    entry = st.fixed_dictionaries(
        {
            "dtype": dtypes,
            "shape": st.lists(sizes, max_size=5),
            "data_offsets": st.lists(st.integers(0, 64), max_size=3),
        }
    )
    names = st.sampled_from(["images", "labels", "snapshots", "weight", "0"]) | st.text(max_size=4)
    header = draw(st.dictionaries(names, entry | JSON, max_size=3))
    if draw(st.booleans()):
        header["__metadata__"] = {METADATA_KEY: json.dumps(draw(JSON))}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + draw(st.binary(max_size=64))


def tensors_with(metadata) -> bytes:
    """A file whose tensors are in order and whose metadata are not."""
    return save({"images": torch.zeros(2, 1, 4, 4), "labels": torch.tensor([0, 1])}, {METADATA_KEY: metadata})


ANY_TENSORS = (
    st.binary(max_size=100) | safetensors_files() | st.builds(tensors_with, JSON.map(json.dumps) | st.just(DEEP))
)


@few(max_examples=200)
@given(data=ANY_TENSORS | damaged(tensors_with('{"a": 1}')))
def test_tensors_of_ours(tmp_path, data):
    file = tmp_path / "some.safetensors"
    file.write_bytes(data)
    found = survives(lambda: read_tensors(file), file.name)
    assert found is None or isinstance(found[0], dict)


def artefact_bytes(**changes) -> bytes:
    tensors = {"images": torch.zeros(2, 1, 4, 4), "labels": torch.tensor([0, 1])}
    metadata = {
        "tensors_sha256": tensors_hash(tensors),
        "classes": ["a", "b"],
        "normalization": {"mean": [0.4], "std": [0.3]},
    } | changes
    return save(tensors, {METADATA_KEY: json.dumps(metadata)})


@few(max_examples=300)
@given(
    data=ANY_TENSORS
    | damaged(artefact_bytes())
    | st.builds(artefact_bytes, classes=JSON)
    | st.builds(artefact_bytes, normalization=JSON)
    | st.builds(lambda mean, std: artefact_bytes(normalization={"mean": mean, "std": std}), ONE, ONE)
)
def test_a_distilled_set(tmp_path, dataset, data):
    folder = tmp_path / "set"
    folder.mkdir(exist_ok=True)
    (folder / "distilled.safetensors").write_bytes(data)
    survives(lambda: read_artefact(folder), "distilled.safetensors")
    survives(lambda: read_set(folder, dataset=dataset), str(folder))


@pytest.fixture(scope="module")
def state(tmp_path_factory) -> bytes:
    file = tmp_path_factory.mktemp("state") / "run.safetensors"
    with Checkpoint(file, configuration={"seed": 0}) as checkpoint, checkpoint.step(lambda: [{0: torch.ones(3)}, 1.5]):
        pass
    return file.read_bytes()


@few(max_examples=200)
@given(data=st.data())
def test_a_checkpoint(tmp_path, state, data):
    file = tmp_path / "run.safetensors"
    file.write_bytes(data.draw(ANY_TENSORS | damaged(state)))
    states = []
    survives(lambda: Checkpoint(file, configuration={"seed": 0}).resume(states.append), file.name)
    assert not states or states[0][0][0].tolist() == [1, 1, 1]


@few(max_examples=40)
@given(data=ANY_TENSORS | damaged(save({"snapshots": torch.zeros(3, 5)})))
def test_an_expert(tmp_path, data):
    (tmp_path / "expert-0000.safetensors").write_bytes(data)
    experts = survives(lambda: open_experts(tmp_path, count=1, last_epoch=2, parameters=5), "expert-0000")
    assert experts is None or experts.snapshots(0, [0, 2]).shape == (2, 5)


def saved(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


class Harmful:
    """Writes a file when it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return (Path.touch, (self.file,))


IMAGES = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
PLAIN = st.recursive(
    st.none() | st.integers() | st.floats() | st.just(IMAGES) | st.just(torch.tensor([0, 1, 2])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["data", "x"]), inner, max_size=2),
    max_leaves=5,
)
PICKLES = st.binary(max_size=60).map(lambda data: b"\x80\x02" + data + b".")


def in_zip(pickled: bytes) -> bytes:
    """A file as torch.save writes it, with that pickle."""
    buffer = io.BytesIO(saved({"data": [[IMAGES, torch.tensor([0, 1, 2])]]}))
    made = io.BytesIO()
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(made, "w") as new:
        for entry in old.infolist():
            new.writestr(entry, pickled if entry.filename.endswith("data.pkl") else old.read(entry))
    return made.getvalue()


ANY_PT = (
    st.binary(max_size=80)
    | PICKLES
    | PICKLES.map(in_zip)
    | PLAIN.map(saved)
    | damaged(saved({"data": [[IMAGES, torch.tensor([0, 1, 2])]]}))
    | damaged(pickle.dumps({"data": [1, 2]}))
)


@few(max_examples=80)
@given(data=ANY_PT, labels=st.just(torch.tensor([0, 1, 2])).map(saved) | ANY_PT, together=st.booleans())
def test_a_foreign_set_of_tensors(tmp_path, dataset, data, labels, together):
    if together:
        file = tmp_path / "res.pt"
    else:
        file = tmp_path / "images.pt"
        (tmp_path / "labels.pt").write_bytes(labels)
    file.write_bytes(data)
    found = survives(lambda: read_set(file, dataset=dataset, form="unit"), str(tmp_path))
    assert found is None or found[0].shape[1:] == (1, 16, 16)


@pytest.mark.parametrize("wrap", [pickle.dumps, saved, lambda value: in_zip(pickle.dumps(value, protocol=2))])
@pytest.mark.parametrize("nested", [lambda x: x, lambda x: {"data": [[x, x]]}, lambda x: {"state_dict": {"a": x}}])
def test_no_pickle_is_executed(tmp_path, dataset, wrap, nested):
    executed, file = tmp_path / "executed", tmp_path / "set.pt"
    file.write_bytes(wrap(nested(Harmful(executed))))
    assert survives(lambda: read_set(file, dataset=dataset, form="unit"), file.name) is None
    assert survives(lambda: compvis.load_checkpoint(file), file.name) is None
    assert not executed.exists()
    pickle.loads(pickle.dumps(Harmful(executed)))
    assert executed.exists()  # it would have been seen


@few(max_examples=40)
@given(data=ANY_PT | damaged(saved({"state_dict": {"model.diffusion_model.input_blocks.0.0.weight": IMAGES}})))
def test_a_compvis_checkpoint(tmp_path, data):
    file = tmp_path / "model.ckpt"
    file.write_bytes(data)
    assert survives(lambda: compvis.load_checkpoint(file), file.name) is None


def encoded(form: str, mode: str = "RGB", **options) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 4), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(buffer, form, **options)
    return buffer.getvalue()


VALID_IMAGES = [
    encoded("PNG"), encoded("PNG", "P"), encoded("PNG", "LA"), encoded("JPEG"), encoded("GIF"), encoded("BMP"),
    encoded("WEBP"), encoded("TIFF"), encoded("PPM"), encoded("ICO"),
]  # fmt: skip
ANY_IMAGE = st.binary(max_size=100) | st.sampled_from(VALID_IMAGES).flatmap(damaged)


@few(max_examples=80)
@given(data=ANY_IMAGE, suffix=st.sampled_from(["png", "jpg", "gif", "tif", "webp", "ico"]))
def test_images_in_folders(tmp_path, dataset, data, suffix):
    for split in ("train", "test"):
        for name in ("a", "b", "c"):
            place = tmp_path / "images" / split / name
            place.mkdir(parents=True, exist_ok=True)
            for number in range(2):
                (place / f"{number}.png").write_bytes(VALID_IMAGES[0])
    odd = tmp_path / "images/train/a" / f"odd.{suffix}"
    odd.write_bytes(data)
    options = {"name": "theirs", "size_px": 16, "channels": 1, "splits": SPLITS}
    survives(lambda: load_dataset(tmp_path / "images", **options), "datasets.theirs")
    survives(lambda: read_set(tmp_path / "images/train", dataset=dataset), str(tmp_path))
    odd.unlink()


SPLITS = {"train": "train", "validation": 0.5, "test": "test"}


@pytest.fixture(scope="module")
def parquet(tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("parquet")
    columns = {"image": [{"bytes": VALID_IMAGES[0], "path": None}] * 6, "label": [0, 1, 2] * 2}
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b", "c"]))
    datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / "x.parquet")
    return (folder / "x.parquet").read_bytes()


@few(max_examples=60)
@given(data=st.data())
def test_parquet(tmp_path, dataset, parquet, data):
    folder = tmp_path / "parquet"
    folder.mkdir(exist_ok=True)
    (folder / "train.parquet").write_bytes(data.draw(st.binary(max_size=100) | damaged(parquet)))
    (folder / "test.parquet").write_bytes(parquet)
    options = {"name": "theirs", "size_px": 16, "channels": 1, "splits": SPLITS}
    survives(lambda: load_dataset(folder, **options), "datasets.theirs", str(folder))
    survives(lambda: read_set(folder, dataset=dataset), str(folder))


@few(max_examples=40)
@given(data=st.data())
def test_decoded_images(tmp_path, data):
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((2, 1, 4, 4), np.uint8))
    harmful = io.BytesIO()
    np.save(harmful, np.array([Harmful(tmp_path / "executed")]), allow_pickle=True)
    whole = st.just(harmful.getvalue()) | damaged(buffer.getvalue()) | damaged(harmful.getvalue())
    file = tmp_path / "x.npy"
    file.write_bytes(data.draw(whole | st.binary(max_size=100)))
    survives(lambda: decoded.open_images(file, shape=(2, 1, 4, 4)), file.name)
    assert not (tmp_path / "executed").exists()


PARAMS = paths.PARAMS.read_bytes()
BOMB = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
YAML = st.sampled_from(
    [
        BOMB + "seed: *i\n",
        "seed: &a [*a]\n",
        DEEP,
        "{" * 5000,
        "? " * 5000,
        "seed: 2001-99-99\n",
        "seed: 0x\n",
        "a: !!x b\n",
    ]
    + ["!!python/object/apply:os.system ['true']\n", "seed: 1e999\n", "seed: " + "9" * 5000 + "\n", "seed: !!int _\n"]
)


@few(max_examples=60)
@given(
    data=st.binary(max_size=60) | YAML.map(str.encode) | damaged(PARAMS) | YAML.map(lambda text: PARAMS + text.encode())
)
def test_parameters_and_profiles(tmp_path, data):
    file, profile = tmp_path / "params.yaml", tmp_path / "profile.yaml"
    file.write_bytes(data)
    found = survives(lambda: config.load_params(path=file), file.name)
    assert found is None or found.grid
    file.write_bytes(PARAMS)
    profile.write_bytes(data)
    survives(lambda: config.apply_profile(profile, path=file), profile.name)
    config.load_params(path=file)


@pytest.fixture(scope="module")
def priors(tmp_path_factory):
    folder = tmp_path_factory.mktemp("priors")
    save_prior(make_prior(), folder / "prior")
    save_generator(
        build_generator(channels=1, classes=3, noise_width=4, w_width=4, widths=(4, 4), seed=0), folder / "gan"
    )
    return folder


@few(max_examples=50)
@given(data=st.data())
@pytest.mark.parametrize("kind, load", [("prior", load_prior), ("gan", load_generator)])
def test_a_prior(priors, kind, load, data):
    folder = priors / kind
    file = data.draw(st.sampled_from(sorted(path for path in folder.rglob("*") if path.is_file())))
    whole = file.read_bytes()
    values = (
        ANY_TENSORS if file.suffix == ".safetensors" else JSON.map(json.dumps).map(str.encode) | st.just(DEEP.encode())
    )
    file.write_bytes(data.draw(damaged(whole) | values))
    try:
        survives(lambda: load(folder), str(folder))
    finally:
        file.write_bytes(whole)


@few(max_examples=20)
@given(link=JSON | st.fixed_dictionaries({"source": st.text(max_size=9), "classes": JSON, "sha256": JSON}))
def test_a_prior_that_stands_for_another(tmp_path, link):
    (tmp_path / "source.json").write_text(json.dumps(link))
    survives(lambda: load_prior(tmp_path), str(tmp_path), "prior")
    (tmp_path / "source.json").write_text(json.dumps({"source": str(tmp_path), "classes": [0], "sha256": ""}))
    assert survives(lambda: load_prior(tmp_path), str(tmp_path)) is None
