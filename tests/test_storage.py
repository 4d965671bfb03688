"""Files and folders are whole or absent, on a full disk too; a file of another program is refused."""

import errno
import os

import pytest
import torch
from safetensors.torch import save_file

from ld3m.runtime import storage
from ld3m.runtime.storage import new_folder, read_tensors, write_bytes, write_tensors

TENSORS = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor([1, 2]), "scalar": torch.tensor(0.1)}


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def test_a_file_is_on_the_disk_before_it_replaces_the_former_one_and_a_full_disk_keeps_that(tmp_path, monkeypatch):
    file, seen = tmp_path / "deep" / "file", []
    write_bytes(file, b"former")
    monkeypatch.setattr(os, "fsync", lambda descriptor: seen.append((file.read_bytes(), os.fstat(descriptor).st_size)))
    write_bytes(file, iter([b"newer", b" one"]))
    assert seen == [(b"former", 9)] and file.read_bytes() == b"newer one"

    def fail(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="file could not be written .No space left.*; what was there before") as failed:
        write_bytes(file, b"newest")
    assert failed.value.errno == errno.ENOSPC
    assert file.read_bytes() == b"newer one" and names(file.parent) == ["file"]


def test_tensors_and_metadata_come_back_as_they_were_from_the_same_bytes(tmp_path):
    metadata = {"float": 0.1 + 0.2, "text": "ä\n", "list": [1, None, True]}
    tensors = TENSORS | {"transposed": TENSORS["b"].T.clone().requires_grad_()}
    write_tensors(tmp_path / "one", tensors, metadata)
    write_tensors(tmp_path / "two", dict(reversed(tensors.items())), dict(reversed(metadata.items())))
    found, read = read_tensors(tmp_path / "one")
    assert read == metadata and found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(found[name], tensor.detach(), rtol=0, atol=0)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("metadata", [None, {storage.METADATA_KEY: "not json"}])
def test_a_file_of_another_program_is_named_with_what_to_do(tmp_path, metadata):
    save_file(TENSORS, tmp_path / "file.safetensors", metadata)
    with pytest.raises(ValueError, match=r"file\.safetensors is broken or not written by ld3m.*delete it"):
        read_tensors(tmp_path / "file.safetensors")
    with pytest.raises(FileNotFoundError):
        read_tensors(tmp_path / "absent")


def test_a_folder_that_was_being_replaced_when_its_process_was_killed_is_there_again(tmp_path):
    (tmp_path / ".folder.partial/former").mkdir(parents=True)
    (tmp_path / ".folder.partial/former/old").touch()
    with pytest.raises(ValueError, match="wrong"), new_folder(tmp_path / "folder"):
        raise ValueError("wrong")
    assert names(tmp_path / "folder") == ["old"] and names(tmp_path) == ["folder"]


@pytest.mark.parametrize("error", [None, ValueError("wrong"), KeyboardInterrupt()])
def test_a_folder_is_replaced_whole_or_if_the_block_fails_not_at_all(tmp_path, error):
    folder, left = tmp_path / "deep" / "folder", tmp_path / "deep" / ".folder.partial"
    for made in (folder, left / "new"):  # the latter by a killed process
        made.mkdir(parents=True)
        (made / "former").touch()
    try:
        with new_folder(folder) as partial:
            (partial / "new").touch()
            assert names(folder) == ["former"]
            if error:
                raise error
    except (ValueError, KeyboardInterrupt) as raised:
        assert raised is error
    assert names(folder) == ["former" if error else "new"] and names(folder.parent) == ["folder"]
