import errno
import os
import stat

import pytest
import torch
from safetensors.torch import save_file

from ld3m.runtime import storage
from ld3m.runtime.storage import new_folder, read_tensors, write_bytes, write_tensors

TENSORS = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor([1, 2]), "scalar": torch.tensor(0.1)}


def names(folder):
    return sorted(file.name for file in folder.iterdir())


@pytest.fixture
def full_disk(monkeypatch):
    def fail(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)


def test_a_file_is_on_the_disk_before_it_takes_the_place_of_the_former_one(tmp_path, monkeypatch):
    file, seen = tmp_path / "deep" / "file", []
    write_bytes(file, b"former")

    def fsync(descriptor):
        status = os.fstat(descriptor)
        seen.append((file.read_bytes(), "folder" if stat.S_ISDIR(status.st_mode) else status.st_size))

    monkeypatch.setattr(os, "fsync", fsync)
    write_bytes(file, b"newer one")
    assert seen == [(b"former", 9), (b"newer one", "folder")]  # the rename is on the disk too
    assert file.read_bytes() == b"newer one" and names(file.parent) == ["file"]


def test_a_full_disk_leaves_the_former_file_and_nothing_else(tmp_path, full_disk):
    file = tmp_path / "file"
    file.write_bytes(b"former")
    with pytest.raises(OSError, match="file could not be written .no space is left") as failed:
        write_bytes(file, b"new")
    assert failed.value.errno == errno.ENOSPC
    assert file.read_bytes() == b"former" and names(tmp_path) == ["file"]


def test_tensors_and_metadata_come_back_as_they_were(tmp_path):
    metadata = {"float": 0.1 + 0.2, "text": "ä\n", "list": [1, None, True]}
    transposed = TENSORS["b"].T.requires_grad_()
    write_tensors(tmp_path / "file", TENSORS | {"transposed": transposed}, metadata)
    tensors, read = read_tensors(tmp_path / "file")
    assert read == metadata and set(tensors) == {*TENSORS, "transposed"}
    for name, tensor in (TENSORS | {"transposed": transposed.detach()}).items():
        torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=0)


def test_the_same_tensors_give_the_same_bytes(tmp_path):
    write_tensors(tmp_path / "one", TENSORS, {"a": 1, "b": 2})
    write_tensors(tmp_path / "two", dict(reversed(TENSORS.items())), {"b": 2, "a": 1})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("metadata", [None, {storage.METADATA_KEY: "not json"}])
def test_a_file_of_another_program_is_named_with_what_to_do(tmp_path, metadata):
    save_file(TENSORS, tmp_path / "file.safetensors", metadata)
    with pytest.raises(ValueError, match=r"file\.safetensors is broken or not written by ld3m.*delete it"):
        read_tensors(tmp_path / "file.safetensors")
    with pytest.raises(FileNotFoundError):
        read_tensors(tmp_path / "absent")


@pytest.fixture
def former(tmp_path):
    folder = tmp_path / "deep" / "folder"
    folder.mkdir(parents=True)
    (folder / "former").write_text("former")
    return folder


def test_a_folder_is_replaced_whole(former):
    (former.parent / ".folder.partial").mkdir()  # what a killed process left
    (former.parent / ".folder.partial" / "stale").touch()
    with new_folder(former) as partial:
        (partial / "new").touch()
        assert names(former) == ["former"]
    assert names(former) == ["new"] and names(former.parent) == ["folder"]


@pytest.mark.parametrize("error", [ValueError("wrong"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
def test_a_block_that_fails_keeps_the_former_folder(former, error):
    with pytest.raises(type(error)):
        with new_folder(former) as partial:
            (partial / "new").touch()
            raise error
    assert names(former) == ["former"] and names(former.parent) == ["folder"]


def test_a_full_disk_inside_the_block_is_explained(former, full_disk):
    with pytest.raises(OSError, match="folder could not be written .no space is left.*unchanged"):
        with new_folder(former) as partial:
            write_bytes(partial / "new", b"new")
    assert names(former) == ["former"]


def test_a_folder_is_on_the_disk_before_it_takes_the_place_of_the_former_one(former, monkeypatch):
    flushed = []
    monkeypatch.setattr(storage, "_flush", lambda path: flushed.append((path.name, names(former))))
    with new_folder(former) as partial:
        (partial / "new").mkdir()
        (partial / "new/file").touch()
    assert flushed == [(name, ["former"]) for name in ("new", "file", ".folder.partial")] + [("deep", ["new"])]


def test_an_error_of_the_block_keeps_its_own_words(former):
    with pytest.raises(FileNotFoundError, match="run `dvc repro prior`"):
        with new_folder(former):
            raise FileNotFoundError("the prior is missing: run `dvc repro prior`")
