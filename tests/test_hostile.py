"""Every reader of files: a broken or hostile one gives an error that names it, and nothing of it is executed."""

import io
import json
import pickle
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import NORMALIZATION, make_prior
from PIL import Image
from safetensors.torch import save_file

from ld3m.data.dataset import load_dataset
from ld3m.evaluation.artefact import read_artefact
from ld3m.evaluation.experts import open_experts
from ld3m.evaluation.foreign import read_set
from ld3m.models.compvis import load_checkpoint
from ld3m.models.gan import build_generator, load_generator, save_generator
from ld3m.models.prior_io import load_prior, save_prior
from ld3m.pipeline import profiles
from ld3m.runtime.checkpoint import Checkpoint
from ld3m.runtime.storage import tensors_hash, write_tensors

IMAGES, LABELS = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2])
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16), dtype=np.uint8))


def artefact(folder, dataset):
    content = {"images": IMAGES, "labels": LABELS}
    metadata = {"classes": ["a", "b", "c"], "normalization": vars(NORMALIZATION)}
    file = folder / "distilled.safetensors"
    write_tensors(file, content, metadata | {"tensors_sha256": tensors_hash(content)})
    return [file], [lambda: read_artefact(folder), lambda: read_set(folder, dataset=dataset)]


def checkpoint(folder, dataset):
    file = folder / "run.safetensors"
    with Checkpoint(file, configuration={"seed": 0}) as opened, opened.step(lambda: [{0: torch.ones(3)}, 1.5]):
        pass
    return [file], [lambda: Checkpoint(file, configuration={"seed": 0}).resume(list)]


def expert(folder, dataset):
    file = folder / "expert-0000.safetensors"
    save_file({"snapshots": torch.zeros(3, 5)}, file)
    return [file], [lambda: open_experts(folder, count=1, last_epoch=2, parameters=5).snapshots(0, [0, 2])]


def prior(folder, dataset):
    save_prior(make_prior(), folder / "prior")
    return sorted((folder / "prior").rglob("*.*")), [lambda: load_prior(folder / "prior")]


def generator(folder, dataset):
    sizes = {"channels": 1, "classes": 3, "noise_width": 4, "w_width": 4, "widths": (4, 4)}
    save_generator(build_generator(**sizes, seed=0), folder / "gan")
    return sorted((folder / "gan").rglob("*.*")), [lambda: load_generator(folder / "gan")]


def dc_file(folder, dataset):
    torch.save({"data": [[IMAGES, LABELS]]}, folder / "res.pt")
    return [folder / "res.pt"], [lambda: read_set(folder / "res.pt", dataset=dataset, form="unit")]


def load(folder):
    splits = {"train": "train", "validation": 0.5, "test": "test"}
    return load_dataset(folder, name="theirs", size_px=16, channels=1, splits=splits)


def image(folder, dataset):
    for name in (f"{split}/{label}/{number}.png" for split in ("train", "test") for label in "abc" for number in "01"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        PICTURE.save(folder / name)
    return [folder / "train/b/1.png"], [lambda: load(folder), lambda: read_set(folder / "train", dataset=dataset)]


def parquet(folder, dataset):
    columns = {"image": [PICTURE] * 6, "label": [0, 1, 2] * 2}
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b", "c"]))
    for split in ("train", "test"):
        datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}.parquet")
    return [folder / "train.parquet"], [lambda: load(folder), lambda: read_set(folder, dataset=dataset)]


def parameters(folder, dataset):
    file, profile = folder / "params.yaml", folder / "profile.yaml"
    file.write_bytes(profiles.PARAMS.read_bytes())
    profile.write_text("seed: 1\n")
    read, apply = lambda: profiles.load_params(path=file), lambda: profiles.apply_profiles(profile, path=file)
    return [file, profile], [read, apply]


READERS = [artefact, checkpoint, expert, prior, generator, dc_file, image, parquet, parameters]


class Harmful:
    """Creates a file when it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return (Path.touch, (self.file,))


def saved(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


DAMAGES = {
    "empty": lambda whole, harmful: b"",
    "text": lambda whole, harmful: b"\xff of another kind",
    "half": lambda whole, harmful: whole[: len(whole) // 2],
    "deep": lambda whole, harmful: b"[" * 1200,
    "pickle": lambda whole, harmful: pickle.dumps(harmful),
    "torch": lambda whole, harmful: saved({"data": [[harmful, harmful]], "state_dict": {"a": harmful}}),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("reader", READERS)
def test_a_broken_file_names_itself_and_is_not_executed(tmp_path, dataset, reader, damage):
    folder, executed = tmp_path / "files", tmp_path / "executed"
    folder.mkdir()
    files, reads = reader(folder, dataset)
    for read in reads:
        read()
    for file in files:
        whole = file.read_bytes()
        file.write_bytes(DAMAGES[damage](whole, Harmful(executed)))
        for read in reads:
            try:
                read()
            except (ValueError, OSError) as error:
                assert file.name in str(error) or str(folder) in str(error), error
            else:
                assert reader in (image, parameters), f"{file} was read"  # one of the reads is of another file
        file.write_bytes(whole)
    assert not executed.exists()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_compvis_checkpoint_names_itself_and_is_not_executed(tmp_path, damage):
    whole = saved({"state_dict": {"model.diffusion_model.input_blocks.0.0.weight": IMAGES}})
    (tmp_path / "model.ckpt").write_bytes(DAMAGES[damage](whole, Harmful(tmp_path / "executed")))
    with pytest.raises(ValueError, match=r"model\.ckpt"):
        load_checkpoint(tmp_path / "model.ckpt")
    assert not (tmp_path / "executed").exists()


def test_the_hostile_files_would_execute_something(tmp_path):
    pickle.loads(pickle.dumps(Harmful(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()


def test_a_file_of_tensors_that_could_run_code_is_refused_with_that_reason(tmp_path, dataset):
    (file,), (read,) = dc_file(tmp_path, dataset)
    torch.save(Harmful(tmp_path / "executed"), file)
    with pytest.raises(ValueError, match=r"res\.pt was not read: .* which could run code"):
        read()


def test_a_prior_that_is_linked_to_itself_is_refused(tmp_path):
    (tmp_path / "source.json").write_text(json.dumps({"source": str(tmp_path), "classes": [0], "sha256": ""}))
    with pytest.raises((ValueError, OSError), match=str(tmp_path)):
        load_prior(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["seed: &a [*a]", "{" * 1200, "seed: 2001-99-99", f"seed: {'9' * 5000}", "!!python/object/apply:os.system [a]"],
)
def test_yaml_that_expands_or_executes_is_refused(tmp_path, text):
    for file, read in zip(*parameters(tmp_path, None), strict=True):
        whole = file.read_text()
        file.write_text(text)
        with pytest.raises((ValueError, OSError), match=file.name):
            read()
        file.write_text(whole)
