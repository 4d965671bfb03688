"""Turns folders of ImageNet classes, such as fastai's Imagenette or Imagewoof, into parquet files with ILSVRC's split.

    python -m ld3m.data.imagenette SOURCE OUT

SOURCE has a folder of JPEG files for each class, named by its wnid, or such folders in train/ and val/. Where a file
lies does not matter, for fastai's split mixes ILSVRC's: ILSVRC2012_val_<number> is a test image, <wnid>_<number> a
training image. OUT gets train-*.parquet and test-*.parquet: bytes of images unchanged, classes in ImageNet's order and
named by words.
"""

import argparse
import math
import re
import sys
from pathlib import Path

from ld3m.data.images import some
from ld3m.data.subsets import imagenet_classes
from ld3m.runtime.progress import progress
from ld3m.runtime.storage import new_folder, require_space

ROW_GROUP = 256  # images in memory at once

Files = dict[str, list[Path]]  # of a class: those of "train" and those of "test"


def find_images(source: Path) -> dict[int, Files]:
    """Returns the files of every class by its index in ImageNet-1k, ascending; ValueError names what does not fit."""
    index_of = {entry["wnid"]: index for index, entry in enumerate(imagenet_classes())}
    places = [place for place in (source / "train", source / "val") if place.is_dir()] or [source]
    folders = [folder for place in places for folder in _visible(place) if folder.is_dir()]
    unknown = [str(folder) for folder in folders if folder.name not in index_of]
    if unknown or not folders:
        problem = f"{len(unknown)} folders are no class of ImageNet-1k: {some(unknown)}" if unknown else "no folders"
        raise ValueError(f"{source}: {problem}: give each class one folder, named by its wnid, such as n01440764")
    found: dict[int, Files] = {index: {"train": [], "test": []} for index in sorted(index_of[f.name] for f in folders)}
    odd = []
    for file in (file for folder in folders for file in _visible(folder)):
        wnid = file.parent.name
        form = re.fullmatch(rf"(ILSVRC2012_val|{wnid})_\d+\.(?i:jpe?g)", file.name)
        if form and file.is_file():
            found[index_of[wnid]]["train" if form[1] == wnid else "test"].append(file)
        else:
            odd.append(str(file))
    if odd:
        names = "ILSVRC2012_val_<number>.JPEG or <wnid of its folder>_<number>.JPEG"
        raise ValueError(f"{len(odd)} files are not named {names}: {some(odd)}: rename or remove them")
    for split, prefix in (("train", "<wnid>"), ("test", "ILSVRC2012_val")):
        if empty := [imagenet_classes()[index]["wnid"] for index, files in found.items() if not files[split]]:
            advice = f"add some, named {prefix}_<number>.JPEG, or remove the class"
            raise ValueError(f"{source} has no {split} images of {some(empty)}: {advice}")
    return found


def _visible(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def convert(source: Path, out: Path) -> dict[int, Files]:
    """Writes the parquet files of `source` into `out`, whole or not at all, and returns what `find_images` found.

    `out` is new or empty, and not in `source`, else ValueError. OSError for a missing source and a disk too full.
    """
    import pyarrow
    from datasets import ClassLabel, Features, Image
    from pyarrow import parquet

    source, out = source.resolve(), out.resolve()
    if not source.is_dir():
        raise FileNotFoundError(f"SOURCE is {source}: there is no such folder")
    if out.is_relative_to(source) or out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"OUT is {out}: it must be a new or empty folder outside of SOURCE, {source}")
    found = find_images(source)
    require_space(out, sum(file.stat().st_size for files in found.values() for part in files.values() for file in part))
    words = [imagenet_classes()[index]["name"] for index in found]
    schema = Features(image=Image(), label=ClassLabel(names=words)).arrow_schema
    with new_folder(out) as partial:
        for split in ("train", "test"):
            ordered = (sorted(files[split], key=lambda file: file.name) for files in found.values())
            rows = [(label, file) for label, files in enumerate(ordered) for file in files]
            with parquet.ParquetWriter(partial / f"{split}-00000-of-00001.parquet", schema) as writer:
                for k in progress(math.ceil(len(rows) / ROW_GROUP), label=f"{split}: {ROW_GROUP} images"):
                    group = rows[k * ROW_GROUP : (k + 1) * ROW_GROUP]
                    cells = [{"bytes": file.read_bytes(), "path": "/".join(file.parts[-2:])} for _, file in group]
                    columns = {"image": cells, "label": [label for label, _ in group]}
                    writer.write_table(pyarrow.table(columns, schema=schema))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", metavar="SOURCE", type=Path, help="folders of classes named by wnid")
    parser.add_argument("out", metavar="OUT", type=Path, help="a new or empty folder")
    try:
        converted = convert(**vars(parser.parse_args()))
    except (ValueError, OSError) as problem:
        sys.exit(str(problem))
    print(f"{'class':32}{'wnid':12}{'index':>5}{'train':>8}{'test':>6}")
    for index, files in converted.items():
        entry = imagenet_classes()[index]
        print(f"{entry['name']:32}{entry['wnid']:12}{index:5}{len(files['train']):8}{len(files['test']):6}")
