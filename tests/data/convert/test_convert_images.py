"""Any pictures become a data set: every kind of source, splits by content, never half a one."""

from __future__ import annotations

import gzip
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import REPOSITORY
from mixed_pictures import damaged, encoded, scene, write_mixed_folder

from data.convert import decoding, images, storing
from data.convert.images import Options, convert, main
from data.errors import DataError
from data.from_pictures import data_set_of
from data.get_dataset import dataset_spec, get_dataset, is_mirrored

pytest.importorskip("lmdb")
SHAPE = decoding.Shape(32, 32, 3, "crop")
COUNT = 24
SCENES = [scene(seed, 32, 32) for seed in range(COUNT)]


def names() -> list[str]:
    return [f"{'val' if number % 4 == 0 else 'train'}/{number:03d}.png" for number in range(COUNT)]


def files() -> dict[str, bytes]:
    return {name: encoded(picture) for name, picture in zip(names(), SCENES, strict=True)}


def write_folder(path: Path) -> str:
    for name, content in files().items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return str(path)


def write_zip(path: Path) -> str:
    with zipfile.ZipFile(path.with_suffix(".zip"), "w") as archive:
        for name, content in files().items():
            archive.writestr(name, content)
    return str(path.with_suffix(".zip"))


def write_tar(path: Path, content: dict[str, bytes], mode: str = "w") -> str:
    with tarfile.open(path, mode) as archive:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(path)


def write_shards(path: Path) -> str:
    """As WebDataset: each sample's files share a name."""
    items = list(files().items())
    for shard in range(3):
        content = {}
        for name, data in items[8 * shard : 8 * shard + 8]:
            content[name] = data
            content[name.replace(".png", ".json")] = b"{}"
            content[name.replace(".png", ".cls")] = b"3"
        write_tar(path.with_name(f"shard-{shard:03d}.tar"), content)
    return str(path.with_name("shard-{000..002}.tar"))


def write_npy(path: Path) -> str:
    np.save(path.with_suffix(".npy"), np.stack(SCENES))
    return str(path.with_suffix(".npy"))


def write_npz(path: Path) -> str:
    pictures = np.stack(SCENES).transpose(0, 3, 1, 2)
    held_out = np.arange(COUNT) % 4 == 0
    np.savez_compressed(
        path.with_suffix(".npz"),
        train=pictures[~held_out],
        val=pictures[held_out],
        labels=np.arange(COUNT),
    )
    return str(path.with_suffix(".npz"))


def write_encoded_lmdb(path: Path) -> str:
    import lmdb

    environment = lmdb.open(str(path), map_size=2**24)
    with environment, environment.begin(write=True) as transaction:
        transaction.put(b"length", b"24")
        for name, content in files().items():
            transaction.put(name.encode(), content)
    return str(path)


def write_parquet(path: Path) -> str:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path.mkdir()
    for split in ("train", "val"):
        rows = [
            {"bytes": content, "path": name}
            for name, content in files().items()
            if name.startswith(split)
        ]
        table = pyarrow.table({"label": list(range(len(rows))), "image": rows})
        parquet.write_table(table, path / f"{split}-00000-of-00001.parquet", row_group_size=5)
    return str(path)


WRITERS = {
    "folder": write_folder,
    "zip": write_zip,
    "tar": lambda path: write_tar(path.with_suffix(".tar"), files()),
    "tar.gz": lambda path: write_tar(path.with_suffix(".tar.gz"), files(), "w:gz"),
    "shards": write_shards,
    "npy": write_npy,
    "npz": write_npz,
    "lmdb": write_encoded_lmdb,
    "parquet": write_parquet,
}
WITH_SPLITS = ("folder", "zip", "tar", "npz", "parquet")


def stored(root: Path, name: str, split: str) -> list[bytes]:
    dataset = get_dataset(name, root, split)
    return [
        image.permute(1, 2, 0).numpy().tobytes()
        for image in map(dataset.__getitem__, range(len(dataset)))
    ]


@pytest.mark.parametrize("kind", WRITERS)
def test_every_source_gives_its_pictures_whole(tmp_path, kind):
    source = WRITERS[kind](tmp_path / "source")
    description = convert(Options(source, "cats", SHAPE, "0.3"), tmp_path / "root")
    splits = {split: stored(tmp_path / "root", "cats", split) for split in storing.SPLITS}
    assert sorted(splits["train"] + splits["validation"]) == sorted(p.tobytes() for p in SCENES)
    assert {split: len(found) for split, found in splits.items()} == description["images"]
    assert json.loads((tmp_path / "root/cats/dataset.json").read_text()) == description
    assert sorted(os.listdir(tmp_path / "root")) == ["cats"], "nothing else stays"
    assert sorted(os.listdir(tmp_path / "root/cats")) == [
        "dataset.json",
        "train.lmdb",
        "validation.lmdb",
    ]


@pytest.mark.parametrize("kind", WITH_SPLITS)
def test_a_split_of_the_source_validates(tmp_path, kind):
    source = WRITERS[kind](tmp_path / "source")
    convert(Options(source, "cats", SHAPE, "val"), tmp_path)
    held_out = [picture.tobytes() for picture in SCENES[::4]]
    assert sorted(stored(tmp_path, "cats", "validation")) == sorted(held_out)
    assert len(stored(tmp_path, "cats", "train")) == COUNT - len(held_out)
    with pytest.raises(DataError, match="nothing is called so; the source's splits are: .*'train'"):
        convert(Options(source, "dogs", SHAPE, "vali"), tmp_path)


def test_the_split_is_by_content_not_by_place(tmp_path):
    first = convert(Options(write_folder(tmp_path / "a"), "first", SHAPE, "0.3"), tmp_path)
    second = convert(Options(write_npy(tmp_path / "b"), "second", SHAPE, "0.3"), tmp_path)
    for split in storing.SPLITS:
        kept = [set(stored(tmp_path, name, split)) for name in ("first", "second")]
        assert kept[0] == kept[1]
    assert 0 < first["images"]["validation"] < COUNT // 2 and first["images"] == second["images"]


def test_duplicates_never_straddle_the_split(tmp_path):
    source = tmp_path / "source"
    for number in range(40):
        folder = source / str(number % 2)
        folder.mkdir(parents=True, exist_ok=True)
        format = ("PNG", "BMP")[number % 2]
        (folder / f"{number}.{format}").write_bytes(encoded(SCENES[number // 2], format))
    description = convert(Options(str(source), "twice", SHAPE, "0.3"), tmp_path)
    train, validation = (stored(tmp_path, "twice", split) for split in storing.SPLITS)
    assert not set(train) & set(validation) and len(train) + len(validation) == 40
    assert description["duplicates"] == 20


def test_pictures_of_validation_are_left_out_of_training(tmp_path):
    source = write_folder(tmp_path / "source")
    apart = tmp_path / "apart"
    apart.mkdir()
    for number in (3, 5):
        (apart / f"{number}.bmp").write_bytes(encoded(SCENES[number], "BMP"))
    description = convert(Options(source, "cats", SHAPE, str(apart)), tmp_path)
    assert description["images"] == {"train": COUNT - 2, "validation": 2}
    assert description["left_out_of_training"] == 2
    with pytest.raises(DataError, match="no picture is left for train"):
        convert(Options(source, "none", SHAPE, source), tmp_path)


@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_of_mnist(tmp_path, packed):
    digits = np.random.default_rng(0).integers(0, 256, (30, 28, 28), dtype=np.uint8)
    opened, suffix = (gzip.open, ".gz") if packed else (open, "")
    for name, part in (("train", digits[:20]), ("t10k", digits[20:])):
        header = struct.pack(">IIII", 0x803, len(part), 28, 28)
        with opened(tmp_path / f"{name}-images-idx3-ubyte{suffix}", "wb") as file:
            file.write(header + part.tobytes())
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(b"")
    shape = replace(SHAPE, channels=1, height=28, width=28)
    convert(Options(str(tmp_path), "digits", shape, "test"), tmp_path / "root")
    assert stored(tmp_path / "root", "digits", "train") == [d.tobytes() for d in digits[:20]]
    assert stored(tmp_path / "root", "digits", "validation") == [d.tobytes() for d in digits[20:]]
    assert get_dataset("digits", tmp_path / "root")[0].shape == (1, 28, 28)


def test_the_order_and_the_bytes_do_not_depend_on_the_processes(tmp_path):
    source = write_folder(tmp_path / "source")
    found = [
        convert(Options(source, name, SHAPE, "0.3"), tmp_path, processes=processes)
        for name, processes in (("none", 0), ("two", 2))
    ]
    assert found[0]["sha256"] == found[1]["sha256"]
    assert stored(tmp_path, "none", "train") == stored(tmp_path, "two", "train")


def test_grey_wide_patches(tmp_path):
    source = write_folder(tmp_path / "source")
    shape = decoding.Shape(16, 8, 1, "patches")
    description = convert(Options(source, "bits", shape, "0.3", flip=True), tmp_path)
    assert sum(description["images"].values()) == COUNT * 2 * 4
    assert all(count % 8 == 0 for count in description["images"].values()), "pictures stay whole"
    spec = dataset_spec("bits", tmp_path)
    assert spec.shape == (1, 16, 8) and spec.flip and is_mirrored("bits", tmp_path)
    assert get_dataset("bits", tmp_path).batch([0, 1]).shape == (2, 1, 16, 8)


def test_damaged_pictures_are_refused_by_name_or_left_out(tmp_path, capsys):
    source = tmp_path / "source"
    write_folder(source)
    for name, content in damaged().items():
        (source / name).write_bytes(content)
    arguments = [
        str(source),
        "--name",
        "cats",
        "--size",
        "32",
        "--validation",
        "0.3",
        "--root",
        str(tmp_path / "root"),
    ]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--num_workers", "0"])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and f"{len(damaged())} of {COUNT + len(damaged())}" in error
    assert all(name in error for name in damaged()) and "--skip_damaged" in error
    assert not (tmp_path / "root/cats").exists(), "no data set that is not whole"
    main([*arguments, "--num_workers", "0", "--skip_damaged"])
    printed = capsys.readouterr().out
    assert all(f"{name}: " in printed for name in damaged())
    assert json.loads((tmp_path / "root/cats/dataset.json").read_text())["damaged"] == 6


def test_an_interrupted_conversion_goes_on_where_it_was(tmp_path, monkeypatch):
    options = Options(write_folder(tmp_path / "source"), "cats", SHAPE, "0.3")
    whole = convert(replace(options, name="whole"), tmp_path)
    monkeypatch.setattr(storing, "COMMIT_ENTRIES", 5)
    decode, decoded = decoding.decode, []

    def failing(entry, shape):
        decoded.append(entry.name)
        if len(decoded) == 14:
            raise KeyboardInterrupt
        return decode(entry, shape)

    monkeypatch.setattr(decoding, "decode", failing)
    with pytest.raises(KeyboardInterrupt):
        convert(options, tmp_path)
    assert not (tmp_path / "cats").exists()
    with pytest.raises(DataError, match="unknown data set 'cats'"):
        dataset_spec("cats", tmp_path)
    decoded.extend(["-"] * 20)
    resumed = convert(options, tmp_path)
    assert resumed["sha256"] == whole["sha256"] and resumed["images"] == whole["images"]
    for split in storing.SPLITS:
        assert stored(tmp_path, "cats", split) == stored(tmp_path, "whole", split)
    assert decoded.count("train/001.png") == 1, "what was done is not done again"


def processes_about(path):
    """Numbers of the processes with a path in their command line, where there is /proc."""
    found = []
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if str(path).encode() in command.read_bytes():
                found.append(int(command.parent.name))
    return found


def test_a_killed_conversion_goes_on(tmp_path):
    """Kills the process in the middle of its work, without a chance to write anything."""
    source = tmp_path / "source.npy"
    many = np.random.default_rng(0).integers(0, 256, (30_000, 8, 8, 3), dtype=np.uint8)
    np.save(source, many)
    command = [sys.executable, "-m", "data.convert.images", str(source), "--name", "cats"]
    command += ["--size", "8", "--root", str(tmp_path), "--num_workers", "1"]
    here = REPOSITORY
    progress = tmp_path / "cats.partial/progress.json"
    process = subprocess.Popen(command, cwd=here, stderr=subprocess.DEVNULL)
    while process.poll() is None and not progress.exists():
        time.sleep(0.02)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while remaining := processes_about(source):
        assert time.monotonic() < deadline, remaining
        time.sleep(0.1)
    done = subprocess.run(command, cwd=here, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [set(stored(tmp_path, "cats", split)) for split in storing.SPLITS]
    assert found[0] | found[1] == {image.tobytes() for image in many}
    description = json.loads((tmp_path / "cats/dataset.json").read_text())
    assert sum(description["images"].values()) == len(many)


def test_other_options_start_anew(tmp_path):
    source = tmp_path / "source"
    write_folder(source)
    (source / "zero.png").write_bytes(b"")
    with pytest.raises(DataError, match="it is empty"):
        convert(Options(str(source), "cats", SHAPE, "0.3"), tmp_path)
    shape = replace(SHAPE, channels=1)
    description = convert(Options(str(source), "cats", shape, "0.3"), tmp_path, skip_damaged=True)
    assert description["shape"] == [1, 32, 32] and description["damaged"] == 1
    assert sum(description["images"].values()) == COUNT


def test_a_data_set_that_is_there_is_replaced_only_by_force(tmp_path):
    source = write_folder(tmp_path / "source")
    convert(Options(source, "cats", SHAPE, "0.3"), tmp_path)
    with pytest.raises(DataError, match="is there already; --force replaces it"):
        convert(Options(source, "cats", replace(SHAPE, channels=1), "0.3"), tmp_path)
    convert(Options(source, "cats", replace(SHAPE, channels=1), "0.3"), tmp_path, force=True)
    assert dataset_spec("cats", tmp_path).shape == (1, 32, 32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cats", "source"]


def test_a_second_conversion_to_the_same_name_is_refused(tmp_path):
    source = write_folder(tmp_path / "source")
    folder = storing.partial_folder(tmp_path, "cats")
    with images.exclusive_folder(folder, "held"), pytest.raises(DataError, match="another process"):
        convert(Options(source, "cats", SHAPE, "0.3"), tmp_path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "there is no"),
        (lambda path: path.mkdir(), "holds no pictures"),
        (lambda path: path.write_bytes(b"hello"), "is neither a folder nor"),
        (lambda path: np.save(path.open("wb"), np.zeros((3, 8, 8))), "neither a folder nor"),
    ],
)
def test_what_is_no_source_is_said(tmp_path, write, message):
    write(tmp_path / "source")
    with pytest.raises(DataError, match=message):
        convert(Options(str(tmp_path / "source"), "cats", SHAPE, "0.3"), tmp_path)


def test_damaged_archives_and_arrays_are_said(tmp_path):
    cut = {}
    for kind in ("zip", "tar", "tar.gz", "npy", "npz", "lmdb"):
        path = Path(WRITERS[kind](tmp_path / f"cut {kind}"))
        file = path / "data.mdb" if path.is_dir() else path
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        cut[kind] = path
    (tmp_path / "floats.npy").write_bytes(b"")
    np.save(tmp_path / "floats.npy", np.zeros((3, 8, 8)))
    np.save(tmp_path / "objects.npy", np.array([{}, []], dtype=object), allow_pickle=True)
    for path in (*cut.values(), tmp_path / "floats.npy", tmp_path / "objects.npy"):
        with pytest.raises(DataError) as raised:
            convert(Options(str(path), "cats", SHAPE, "0.3"), tmp_path)
        assert path.name in str(raised.value) and "\n" not in str(raised.value)


def test_an_lmdb_of_raw_images_is_told_from_encoded_ones(tmp_path):
    source = write_folder(tmp_path / "source")
    convert(Options(source, "cats", SHAPE, "0.3"), tmp_path)
    with pytest.raises(DataError, match="no pictures that can be used; .* something else"):
        convert(Options(str(tmp_path / "cats/train.lmdb"), "dogs", SHAPE, "0.3"), tmp_path)


def test_names_of_data_sets_are_plain(tmp_path):
    for name in ("", ".", "..", "a/b", "CIFAR10", ".hidden"):
        with pytest.raises(DataError, match="--name must be a plain folder name"):
            convert(Options(str(tmp_path), name, SHAPE, "0.3"), tmp_path)


@pytest.mark.parametrize("flags", [["--size", "0"], ["--size", "3x4x5"], ["--size", "a"]])
def test_wrong_sizes_are_one_line(flags, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["source", "--name", "cats", *flags])
    assert ended.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_a_path_becomes_a_data_set_the_first_time(tmp_path, capsys):
    source = write_folder(tmp_path / "pets")
    with pytest.raises(DataError, match="pictures need --image_size"):
        data_set_of(source, tmp_path / "root", [], 0)
    first = data_set_of(source, tmp_path / "root", [16], 1)
    assert (first.name, first.shape) == ("pets-16x16-grey", (1, 16, 16))
    assert "validation images of 16x16, grey" in capsys.readouterr().out
    assert data_set_of(source, tmp_path / "root", [16], 1).shape == (1, 16, 16)
    assert capsys.readouterr().out == "", "it is not converted again"
    other = write_folder(tmp_path / "elsewhere/pets")
    with pytest.raises(DataError, match="was made of other pictures"):
        data_set_of(other, tmp_path / "root", [16], 1)
    with pytest.raises(DataError, match="CIFAR10 has 3 x 32x32"):
        data_set_of("CIFAR10", tmp_path / "root", [16], 0)


def test_a_damaged_description_is_said(tmp_path):
    convert(Options(write_folder(tmp_path / "source"), "cats", SHAPE, "0.3"), tmp_path)
    path = tmp_path / "cats/dataset.json"
    for content in ("", "[]", '{"format": 1}', '{"format": 1, "shape": [2, 4, 4], "flip": true}'):
        path.write_text(content)
        with pytest.raises(DataError, match="dataset.json is damaged"):
            dataset_spec("cats", tmp_path)


def test_a_mixed_folder_is_read_to_the_last_picture(tmp_path):
    expected = write_mixed_folder(tmp_path / "mixed", plain=60)
    options = Options(str(tmp_path / "mixed"), "converted", SHAPE, "0.2")
    found = convert(options, tmp_path, processes=2, skip_damaged=True)
    assert {key: found[key] for key in expected} == expected
    assert sum(found["images"].values()) == expected["pictures"]
    assert len(found["remarks"]) >= 7
    assert not set(stored(tmp_path, "converted", "train")) & set(
        stored(tmp_path, "converted", "validation")
    )
