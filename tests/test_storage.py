import errno
import json
import os
import stat
from collections import namedtuple

import pytest
import torch
from safetensors.torch import save_file

from ld3m.runtime import storage
from ld3m.runtime.storage import new_folder, read_tensors, require_space, write_bytes, write_json, write_tensors

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


@pytest.mark.parametrize(
    "write",
    [
        lambda file: write_bytes(file, b"new"),
        lambda file: write_json(file, {"new": 1}),
        lambda file: write_tensors(file, TENSORS, {}),
    ],
)
def test_a_full_disk_leaves_the_former_file_and_nothing_else(tmp_path, full_disk, write):
    file = tmp_path / "file"
    file.write_bytes(b"former")
    with pytest.raises(OSError, match="file could not be written .no space is left") as failed:
        write(file)
    assert failed.value.errno == errno.ENOSPC
    assert file.read_bytes() == b"former" and names(tmp_path) == ["file"]


def test_a_rename_that_fails_leaves_the_former_file_and_nothing_else(tmp_path, monkeypatch):
    def fail(source, target):
        raise OSError(errno.EROFS, "Read-only file system")

    file = tmp_path / "file"
    file.write_bytes(b"former")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="read-only"):
        write_bytes(file, b"new")
    assert file.read_bytes() == b"former" and names(tmp_path) == ["file"]


def test_values_that_are_not_json_do_not_touch_the_file(tmp_path):
    file = tmp_path / "file.json"
    write_json(file, {"former": 1})
    with pytest.raises(TypeError):
        write_json(file, {"new": object()})
    assert json.loads(file.read_text()) == {"former": 1} and names(tmp_path) == ["file.json"]


def test_json_bytes_do_not_depend_on_the_order_of_keys(tmp_path):
    write_json(tmp_path / "one", {"a": 1, "b": [0.1, None]})
    write_json(tmp_path / "two", {"b": [0.1, None], "a": 1})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert json.loads((tmp_path / "one").read_text()) == {"a": 1, "b": [0.1, None]}


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


@pytest.mark.parametrize("damage", ["empty", "header", "half", "one byte", "text", "foreign", "foreign metadata"])
def test_a_broken_or_foreign_file_is_named_with_what_to_do(tmp_path, damage):
    file = tmp_path / "file.safetensors"
    write_tensors(file, TENSORS, {"a": 1})
    whole = file.read_bytes()
    match damage:
        case "foreign":
            save_file(TENSORS, file)
        case "foreign metadata":
            save_file(TENSORS, file, {storage.METADATA_KEY: "not json"})
        case _:
            kept = {"empty": b"", "header": whole[:12], "half": whole[: len(whole) // 2], "text": b"hello, world\n" * 9}
            file.write_bytes(kept.get(damage, whole[:-1]))
    with pytest.raises(ValueError, match=r"file\.safetensors is broken or not written by ld3m.*delete it"):
        read_tensors(file)


def test_a_missing_file_is_missing_and_not_broken(tmp_path):
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


def test_a_folder_that_is_not_there_yet_appears_with_its_parents(tmp_path):
    with new_folder(tmp_path / "a" / "b") as partial:
        (partial / "new").touch()
    assert names(tmp_path / "a" / "b") == ["new"]


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


def test_space_is_asked_for_before_the_work(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    asked = []
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda folder: asked.append(folder) or usage(0, 0, 3 * 2**20))
    require_space(tmp_path / "not" / "yet", 3 * 2**20)
    assert asked == [tmp_path]
    with pytest.raises(OSError, match=r"4\.0 MiB needed in .*yet, 3\.0 MiB are free: make room") as failed:
        require_space(tmp_path / "not" / "yet", 4 * 2**20)
    assert failed.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())
