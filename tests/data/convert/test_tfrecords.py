"""The converter of Glow's TFRecord archives, on small archives with the real names and format."""

import io
import os
import signal
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import REPOSITORY

from data.convert import tfrecords
from data.convert.tfrecord import masked_crc32c, parse_example, records
from data.convert.tfrecords import convert, main
from data.errors import DataError
from data.lmdb_datasets import LmdbImages
from lib.files import LOCK, locked

lmdb = pytest.importorskip("lmdb")
pytest.importorskip("google_crc32c")
SHARD = "mnt/host/imagenet-oord-tfr/train/train-r05-s-{:04d}-of-0002.tfrecords"


@pytest.fixture
def archive(tmp_path, formats):
    files, images = formats.imagenet_shards()
    (tmp_path / "source.tar").write_bytes(formats.tar_of(files))
    return tmp_path / "source.tar", images


def assert_images(folder, split, images):
    stored = LmdbImages(folder / f"{split}.lmdb", (3, 32, 32), "get it")
    assert torch.equal(torch.stack(list(stored)), torch.from_numpy(images).permute(0, 3, 1, 2))


def fails(files, tmp_path, formats, capsys, *messages):
    """Runs the command on these shards: one line on stderr, status 2, no LMDB; returns the line."""
    (tmp_path / "bad.tar").write_bytes(formats.tar_of(files))
    target = tmp_path / "target"
    with pytest.raises(SystemExit) as stop:
        main(["ImageNet32", "--source", str(tmp_path / "bad.tar"), "--target", str(target)])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("data.convert.tfrecords: error: ")
    for message in messages:
        assert message in line
    assert not list(target.glob("train.lmdb*")), "nothing half-written is left"


def test_checksums_against_a_bitwise_computation(formats):
    assert formats.crc32c(b"123456789") == 0xE3069283  # the check value of CRC-32C
    for data in (b"", b"abc", bytes(range(256))):
        assert struct.pack("<I", masked_crc32c(data)) == formats.masked(data)


@pytest.mark.parametrize("packed", [True, False])
def test_examples_are_parsed(formats, packed):
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    features = parse_example(formats.example(image, packed, shape=(2, 4, 300)))
    assert features == {"shape": [2, 4, 300], "data": [image.tobytes()], "label": [-3]}


def test_fields_may_come_in_any_order_and_unknown_ones_are_skipped(formats):
    name, value = formats.field(1, b"shape"), formats.field(2, formats.int_feature([7]))
    unknown = (
        formats.varint(9 << 3 | 5)
        + b"abcd"
        + formats.varint(8 << 3)
        + b"\x96\x01"
        + formats.varint(7 << 3 | 1)
        + bytes(8)
    )
    floats = formats.field(
        1, formats.field(2, formats.field(2, formats.field(1, bytes(4)))) + formats.field(1, b"f")
    )
    entry = formats.field(1, unknown + value + name)
    assert parse_example(unknown + formats.field(1, floats + entry)) == {"shape": [7]}


def test_a_list_in_two_parts_is_joined(formats):
    """Two fields 3 of one feature, then two features of one entry, then entries of one name."""
    first, second = formats.int_feature([32, 32]), formats.int_feature([3], packed=False)
    entry = formats.field(1, b"shape") + formats.field(2, first + second)
    assert parse_example(formats.field(1, formats.field(1, entry))) == {"shape": [32, 32, 3]}
    entry = formats.field(1, b"shape") + formats.field(2, first) + formats.field(2, second)
    assert parse_example(formats.field(1, formats.field(1, entry))) == {"shape": [32, 32, 3]}


def test_examples_in_parts_are_read_as_protobuf_reads_them(formats):
    """Random messages whose fields come in any order and number, against protobuf's own parser."""
    descriptor_pb2 = pytest.importorskip("google.protobuf.descriptor_pb2")
    from google.protobuf import descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="t", syntax="proto3")

    def message(parent, name, *fields):
        made = parent.add(name=name)
        for number, (field, kind, label) in enumerate(fields, 1):
            given = {"type": kind} if isinstance(kind, int) else {"type": 11, "type_name": kind}
            made.field.add(name=field, number=number, label=label, **given)
        return made

    once, many = 1, 3
    message(file.message_type, "BytesList", ("value", 12, many))
    message(file.message_type, "FloatList", ("value", 2, many))
    message(file.message_type, "Int64List", ("value", 3, many))
    lists = (("bytes", ".t.BytesList"), ("floats", ".t.FloatList"), ("integers", ".t.Int64List"))
    feature = message(file.message_type, "Feature", *((n, kind, once) for n, kind in lists))
    feature.oneof_decl.add(name="kind")
    for field in feature.field:
        field.oneof_index = 0
    features = message(file.message_type, "Features", ("feature", ".t.Features.Entry", many))
    entry = message(features.nested_type, "Entry", ("key", 9, once), ("value", ".t.Feature", once))
    entry.options.map_entry = True
    message(file.message_type, "Example", ("features", ".t.Features", once))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    Example = message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))  # noqa: N806

    rng = np.random.default_rng(0)

    def some(make, most):
        return b"".join(make() for _ in range(rng.integers(most + 1)))

    def one_list():
        kind = int(rng.choice([1, 2, 3, 3, 3]))
        if kind == 3:
            numbers = rng.integers(-5, 300, size=rng.integers(4)).tolist()
            return formats.int_feature(numbers, packed=bool(rng.integers(2)))
        value = b"abc" if kind == 1 else bytes(4)
        return formats.field(kind, some(lambda: formats.field(1, value), 2))

    def one_entry():
        name = formats.field(1, bytes([int(rng.choice(list(b"xyz")))]))
        value = some(lambda: formats.field(2, some(one_list, 3)), 2)
        return formats.field(1, name + value if rng.integers(2) else value + name)

    joined = 0
    for _ in range(300):
        record = some(lambda: formats.field(1, some(one_entry, 4)), 2)
        expected = {}
        for name, value in Example.FromString(record).features.feature.items():
            if (kind := value.WhichOneof("kind")) in ("bytes", "integers"):
                expected[name] = list(getattr(value, kind).value)
        joined += any(len(values) > 3 for values in expected.values())
        assert parse_example(record) == expected, record
    assert joined > 10


@pytest.mark.parametrize("garbage", [b"\x0a\xff\x01abc", b"\x0a", b"\x0b", b"\x08" + b"\xff" * 11])
def test_garbage_is_no_example(garbage):
    with pytest.raises(ValueError):
        parse_example(garbage)


def test_records_reads_what_was_framed(formats):
    data = [b"", b"a", bytes(1000)]
    assert list(records(io.BytesIO(b"".join(map(formats.frame, data))), "shard")) == data


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda whole: whole[:-1], "record 1: cut off after"),
        (lambda whole: whole[: 12 + 5 + 4 + 7], "record 1: cut off inside the length"),
        (lambda whole: whole[:21] + b"\x09" + whole[22:], "record 1: the checksum of the length"),
        (lambda whole: whole[:14] + b"!" + whole[15:], "record 0: the checksum of the data"),
    ],
)
def test_damaged_records_are_named(formats, damage, message):
    whole = formats.frame(b"first") + formats.frame(b"second")
    with pytest.raises(DataError, match=f"shard-7, {message}"):
        list(records(io.BytesIO(damage(whole)), "shard-7"))


def test_a_missing_checksum_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "google_crc32c", None)
    with pytest.raises(DataError, match="pip install google-crc32c"):
        masked_crc32c(b"")


def test_a_tar_becomes_two_lmdbs_in_order(archive, tmp_path, capsys):
    source, images = archive
    main(["ImageNet32", "--source", str(source), "--target", str(tmp_path / "t")])
    out = capsys.readouterr().out
    assert "train.lmdb: 5 images" in out and "validation.lmdb: 3 images" in out
    for split in images:
        folder = str(tmp_path / "t" / f"{split}.lmdb")
        with (
            lmdb.open(folder, readonly=True, lock=False) as environment,
            environment.begin() as transaction,
        ):
            stored = dict(transaction.cursor())
        assert stored == {str(i).encode(): image.tobytes() for i, image in enumerate(images[split])}
    assert sorted(path.name for path in (tmp_path / "t").iterdir()) == [
        "train.lmdb",
        "validation.lmdb",
    ]


@pytest.mark.parametrize("inside", ["", "mnt/host/imagenet-oord-tfr"])
def test_an_unpacked_folder_does_as_well(tmp_path, formats, inside):
    files, images = formats.imagenet_shards()
    for name, content in files.items():
        (tmp_path / "unpacked" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "unpacked" / name).write_bytes(content)
    assert convert("ImageNet32", tmp_path / "unpacked" / inside, tmp_path / "t") == {
        "train": 5,
        "validation": 3,
    }
    assert_images(tmp_path / "t", "train", images["train"])


def test_shards_may_lie_flat(tmp_path, formats):
    files, images = formats.imagenet_shards(prefix="./")
    flat = {f"./{name.rsplit('/', 1)[1]}": content for name, content in files.items()}
    (tmp_path / "flat.tar").write_bytes(formats.tar_of(flat))
    assert convert("ImageNet32", tmp_path / "flat.tar", tmp_path / "t") == {
        "train": 5,
        "validation": 3,
    }
    assert_images(tmp_path / "t", "train", images["train"])


def test_celeba_has_other_shard_names_and_shapes(tmp_path, formats):
    images = np.random.default_rng(0).integers(0, 256, (2, 256, 256, 3), dtype=np.uint8)
    files = {
        f"celeba-tfr/{split}/{split}-r08-s-0000-of-0001.tfrecords": _unchecked(formats, image)
        for split, image in zip(("train", "validation"), images, strict=True)
    }
    (tmp_path / "c.tar").write_bytes(formats.tar_of(files))
    assert convert("CelebAHQ256", tmp_path / "c.tar", tmp_path / "t") == {
        "train": 1,
        "validation": 1,
    }
    stored = LmdbImages(tmp_path / "t/validation.lmdb", (3, 256, 256), "get it")
    assert torch.equal(stored[0], torch.from_numpy(images[1]).permute(2, 0, 1))


def _unchecked(formats, image):
    """A record whose checksums come from the code under test: bit by bit, 200 kB take seconds."""
    data = formats.example(image)
    length = struct.pack("<Q", len(data))
    checksums = [struct.pack("<I", masked_crc32c(part)) for part in (length, data)]
    return length + checksums[0] + data + checksums[1]


def test_the_map_grows(archive, tmp_path, monkeypatch):
    monkeypatch.setattr(tfrecords, "BATCH_BYTES", 2**13)  # the map begins with 4 of these
    source, images = archive
    convert("ImageNet32", source, tmp_path / "t")
    assert (tmp_path / "t/train.lmdb/data.mdb").stat().st_size > 5 * 3072
    assert_images(tmp_path / "t", "train", images["train"])


def test_a_finished_split_is_left_alone_unless_forced(archive, tmp_path, capsys):
    source, images = archive
    command = ["ImageNet32", "--source", str(source), "--target", str(tmp_path / "t")]
    main(command)
    before = (tmp_path / "t/train.lmdb/data.mdb").stat()
    capsys.readouterr()
    main(command)
    assert "train.lmdb is there already; --force renews it" in capsys.readouterr().out
    assert (tmp_path / "t/train.lmdb/data.mdb").stat().st_ino == before.st_ino
    main([*command, "--force"])
    assert (tmp_path / "t/train.lmdb/data.mdb").stat().st_mtime_ns > before.st_mtime_ns
    assert_images(tmp_path / "t", "train", images["train"])
    assert sorted(path.name for path in (tmp_path / "t").iterdir()) == [
        "train.lmdb",
        "validation.lmdb",
    ]


def test_a_failed_renewal_keeps_the_old_lmdb(archive, tmp_path, formats):
    source, images = archive
    convert("ImageNet32", source, tmp_path / "t")
    files, _ = formats.imagenet_shards()
    files[SHARD.format(1)] = files[SHARD.format(1)][:-1]
    source.write_bytes(formats.tar_of(files))
    with pytest.raises(DataError, match="cut off"):
        convert("ImageNet32", source, tmp_path / "t", force=True)
    assert_images(tmp_path / "t", "train", images["train"])


KILLED = """
import os, signal, sys
from data.convert import tfrecords
whole = tfrecords.images
def then_killed(*arguments):
    yield from list(whole(*arguments))[:3]
    os.kill(os.getpid(), signal.SIGKILL)
tfrecords.images, tfrecords.BATCH_BYTES = then_killed, 3072
tfrecords.main(sys.argv[1:])
"""


def test_a_killed_conversion_leaves_no_lmdb_and_starts_again(archive, tmp_path, formats):
    source, images = archive
    command = ["ImageNet32", "--source", str(source), "--target", str(tmp_path / "t")]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *command], cwd=REPOSITORY, capture_output=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = {path.name for path in (tmp_path / "t").iterdir()} - {LOCK}
    assert left == {"train.lmdb.partial"}
    with pytest.raises(DataError, match="there is no"):
        LmdbImages(tmp_path / "t/train.lmdb", (3, 32, 32), "get it")
    formats.write_lmdb(tmp_path / "t/train.lmdb.partial", {99: bytes(3072)})
    main(command)
    assert_images(tmp_path / "t", "train", images["train"])
    assert not list((tmp_path / "t").glob("*.partial"))


def test_a_conversion_that_stops_between_its_two_renamings_keeps_the_old_lmdb(
    archive, tmp_path, formats, monkeypatch
):
    source, images = archive
    convert("ImageNet32", source, tmp_path / "t")
    rename = os.rename

    def stop_before_the_second(before, after):
        if before.name == "train.lmdb.partial":
            raise KeyboardInterrupt
        rename(before, after)

    monkeypatch.setattr(tfrecords.os, "rename", stop_before_the_second)
    with pytest.raises(KeyboardInterrupt):
        convert("ImageNet32", source, tmp_path / "t", force=True)
    monkeypatch.undo()
    assert not (tmp_path / "t/train.lmdb").exists()
    whole = source.read_bytes()
    files, _ = formats.imagenet_shards()
    source.write_bytes(formats.tar_of(files | {SHARD.format(1): files[SHARD.format(1)][:-1]}))
    with pytest.raises(DataError, match="cut off"):
        convert("ImageNet32", source, tmp_path / "t")
    assert_images(tmp_path / "t", "train", images["train"])
    source.write_bytes(whole)
    convert("ImageNet32", source, tmp_path / "t", force=True)
    assert sorted(path.name for path in (tmp_path / "t").iterdir()) == [
        "train.lmdb",
        "validation.lmdb",
    ]


@pytest.mark.parametrize(
    "command", [["CIFAR10", "--source", "a", "--target", "b"], ["ImageNet32", "--source", "a"]]
)
def test_wrong_flags_are_one_line(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main(command)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and line.startswith("data.convert.tfrecords: error: ")
    assert ("CIFAR10" if "CIFAR10" in command else "--target") in line


def test_a_second_conversion_to_the_same_folder_is_refused(archive, tmp_path):
    (tmp_path / "t").mkdir()
    with (
        locked(tmp_path / "t" / LOCK, ""),
        pytest.raises(DataError, match="another process is writing into"),
    ):
        convert("ImageNet32", archive[0], tmp_path / "t")
    assert convert("ImageNet32", archive[0], tmp_path / "t") == {"train": 5, "validation": 3}


def test_missing_shards_are_named(tmp_path, formats, capsys):
    files, _ = formats.imagenet_shards(train=(1, 1, 1, 1))
    for number in (1, 3):
        del files[f"mnt/host/imagenet-oord-tfr/train/train-r05-s-{number:04d}-of-0004.tfrecords"]
    fails(
        files,
        tmp_path,
        formats,
        capsys,
        "lacks train-r05-s-0001-of-0004, train-r05-s-0003-of-0004;",
        "get_imagenet_data.sh",
    )


def test_a_missing_split_is_an_error(tmp_path, formats, capsys):
    files, _ = formats.imagenet_shards()
    files = {name: content for name, content in files.items() if "/validation/" not in name}
    fails(files, tmp_path, formats, capsys, "has no shards of ImageNet32's validation split")


def test_shards_of_two_sets_are_an_error(tmp_path, formats, capsys):
    files, _ = formats.imagenet_shards()
    files[SHARD.format(0).replace("0002", "0003")] = b""
    fails(files, tmp_path, formats, capsys, "shards of train come from sets of 2 and 3")


def test_a_shard_that_is_there_twice_is_an_error(tmp_path, formats, capsys):
    files, _ = formats.imagenet_shards()
    files["again/" + SHARD.format(1)] = files[SHARD.format(1)]
    both = f"{SHARD.format(1)}, again/{SHARD.format(1)}"
    fails(files, tmp_path, formats, capsys, f"has 3 shards of train instead of 2: see {both}")


def test_damaged_shards_are_named(tmp_path, formats, capsys):
    files, images = formats.imagenet_shards()
    whole = files[SHARD.format(1)]
    name = "train-r05-s-0001-of-0002.tfrecords"
    fails(
        files | {SHARD.format(1): whole[:-10]},
        tmp_path,
        formats,
        capsys,
        f"{name}, record 2: cut off after",
    )
    flipped = whole[:100] + bytes([whole[100] ^ 1]) + whole[101:]
    fails(
        files | {SHARD.format(1): flipped},
        tmp_path,
        formats,
        capsys,
        f"{name}, record 0: the checksum of the data",
    )
    fails(files | {SHARD.format(1): b""}, tmp_path, formats, capsys, f"{name} is empty")
    other = formats.frame(formats.example(images["train"][0][:16]))
    fails(
        files | {SHARD.format(1): other},
        tmp_path,
        formats,
        capsys,
        f"{name}, record 0: the image's shape is [16, 32, 3]",
    )
    short = formats.frame(formats.example(images["train"][0][:16], shape=(32, 32, 3)))
    fails(
        files | {SHARD.format(1): short},
        tmp_path,
        formats,
        capsys,
        "record 0: 1536 bytes of image instead of 3072",
    )
    fails(
        files | {SHARD.format(1): formats.frame(b"\x0b")},
        tmp_path,
        formats,
        capsys,
        "record 0: no tf.train.Example",
    )


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.95])
def test_a_cut_off_archive_is_an_error(archive, tmp_path, keep):
    source, _ = archive
    whole = source.read_bytes().rstrip(b"\0")
    source.write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(DataError, match="is no whole tar archive|lacks |has no shards"):
        convert("ImageNet32", source, tmp_path / "t")
    assert not list(tmp_path.glob("t/*"))


def test_sources_that_are_no_archive(tmp_path):
    (tmp_path / "page.tar").write_text("<html>not found</html>")
    with pytest.raises(DataError, match="is no whole tar archive"):
        convert("ImageNet32", tmp_path / "page.tar", tmp_path / "t")
    with pytest.raises(
        DataError, match=r"there is no .*nothing\.tar; get it with: bash .*/get_imagenet_data\.sh"
    ):
        convert("ImageNet32", tmp_path / "nothing.tar", tmp_path / "t")


def test_too_little_room_is_said_before_anything_is_written(archive, tmp_path, monkeypatch):
    monkeypatch.setattr(tfrecords.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(DataError, match="GB free, the conversion needs about"):
        convert("ImageNet32", archive[0], tmp_path / "t")
    assert not list((tmp_path / "t").iterdir())
