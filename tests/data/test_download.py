"""Resumable downloads from a server that misbehaves."""

import hashlib
import os

import pytest

from data import download as module
from data.download import download, main
from data.errors import DataError
from lib.files import locked

CONTENT = os.urandom(3_000_000)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.001)


@pytest.fixture
def web(server):
    server.content = CONTENT
    return server


@pytest.fixture
def target(tmp_path):
    return tmp_path / "new/file.tar"


def assert_complete(target, content=CONTENT):
    assert target.read_bytes() == content
    assert (
        target.with_name("file.tar.sha256").read_text()
        == f"{hashlib.sha256(content).hexdigest()}  file.tar\n"
    )
    assert sorted(path.name for path in target.parent.iterdir()) == ["file.tar", "file.tar.sha256"]


def test_a_download(web, target, capsys):
    main([web.url, str(target)])
    assert "3000000 bytes" in capsys.readouterr().out
    assert_complete(target)
    assert web.ranges == [None]


def test_it_is_not_downloaded_twice_but_checked(web, target):
    download(web.url, target)
    download(web.url, target)
    assert web.ranges == [None]
    damaged = bytearray(CONTENT)
    damaged[1_000] ^= 1
    target.write_bytes(damaged)
    with pytest.raises(DataError, match=r"has SHA-256 .* says"):
        download(web.url, target)


def test_cut_connections_go_on_where_they_were(web, target):
    web.cuts = [1_200_000, 10**9, 700_000]  # each new attempt first asks what file is there
    download(web.url, target)
    assert_complete(target)
    assert web.ranges == [None, None, "bytes=1200000-", None, "bytes=1900000-"]


def test_the_next_run_goes_on_where_the_last_one_gave_up(web, target, monkeypatch):
    monkeypatch.setattr(module, "ATTEMPTS", 1)
    web.cuts, web.statuses = [1_000_000], []
    original = module._fetch

    def once(*arguments):
        web.statuses = [503] if web.ranges else []
        return original(*arguments)

    monkeypatch.setattr(module, "_fetch", once)
    with pytest.raises(DataError, match="503"):
        download(web.url, target)
    assert not target.exists() and target.with_name("file.tar.partial").stat().st_size == 1_000_000
    monkeypatch.setattr(module, "_fetch", original)
    web.statuses = []
    download(web.url, target)
    assert web.ranges[-1] == "bytes=1000000-"
    assert_complete(target)


def test_a_server_without_ranges_sends_everything_again(web, target):
    web.ignore_range, web.cuts = True, [1_000_000]
    download(web.url, target)
    assert_complete(target)


@pytest.mark.parametrize("size", [3_000_000, 500_000, 4_000_000])
def test_a_file_that_changed_meanwhile_is_begun_again(web, target, monkeypatch, size):
    monkeypatch.setattr(module, "ATTEMPTS", 1)
    web.cuts = [1_000_000, 10**9, 0]
    with pytest.raises(DataError):
        download(web.url, target)
    web.content, web.tag = os.urandom(size), '"2"'
    web.ranges.clear()
    download(web.url, target)
    assert web.ranges == [None], "the whole file is asked for, and nothing of the other one is kept"
    assert_complete(target, web.content)


def test_a_server_that_announces_too_much_never_gives_a_file(web, target, capsys):
    web.extra_length = 10
    with pytest.raises(SystemExit) as stop:
        main([web.url, str(target)])
    first, *_, last = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "10 of 3000010 bytes too early" in first and "416" in last
    assert not target.exists() and not target.with_name("file.tar.sha256").exists()


def test_passing_errors_are_retried(web, target):
    web.statuses = [503, 429, 500]
    download(web.url, target)
    assert_complete(target)


def test_lasting_errors_are_not(web, target, capsys):
    web.statuses = [404]
    with pytest.raises(SystemExit) as stop:
        main([web.url, str(target)])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and line.startswith("data.download: error: ") and "404" in line
    assert len(web.ranges) == 1


@pytest.mark.parametrize(
    "url", ["http://example.org/x", "ftp://localhost/x", "file:///etc/hostname", "x"]
)
def test_only_https_is_downloaded(url, target):
    with pytest.raises(DataError, match="only https"):
        download(url, target)
    assert not target.parent.exists()


def test_redirections_are_checked_too(web, target):
    web.redirect = "http://example.org/file.tar"
    with pytest.raises(DataError, match=r"example\.org/file\.tar: only https"):
        download(web.url, target)


def test_too_little_room_is_said_before_anything_is_written(web, target, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(DataError, match="1000 bytes free, 3000000 more are needed"):
        download(web.url, target)
    assert target.with_name("file.tar.partial").stat().st_size == 0


def begin(web, target, monkeypatch, size=1_000_000):
    """Leaves a partial download of `size` bytes."""
    web.cuts = [size]
    with monkeypatch.context() as patch:
        patch.setattr(module, "_fetch_all", lambda *arguments: module._fetch(*arguments[:3]))
        with pytest.raises(module.TransferError):
            download(web.url, target)
    assert target.with_name("file.tar.partial").stat().st_size == size
    web.ranges.clear()


def test_a_partial_file_from_another_address_is_not_continued(web, target, monkeypatch):
    begin(web, target, monkeypatch)
    download(web.url + "?mirror", target)
    assert web.ranges == [None]
    assert_complete(target)


@pytest.mark.parametrize("note", [None, b"", b"[1]", b'{"url": 3}', b"\xff\xfe"])
def test_a_partial_file_of_unknown_origin_is_not_continued(web, target, monkeypatch, note):
    begin(web, target, monkeypatch)
    identity = target.with_name("file.tar.partial.json")
    identity.unlink() if note is None else identity.write_bytes(note)
    download(web.url, target)
    assert web.ranges == [None]
    assert_complete(target)


def test_a_partial_file_that_is_complete_is_only_checked(web, target, monkeypatch):
    begin(web, target, monkeypatch)
    target.with_name("file.tar.partial").write_bytes(CONTENT)
    download(web.url, target)
    assert web.ranges == [None]
    assert_complete(target)


def test_a_server_that_tells_no_length_is_refused(web, target, capsys):
    web.tell_length = False
    with pytest.raises(SystemExit) as stop:
        main([web.url, str(target)])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and "does not tell how long the file is" in line
    assert not target.exists()


def test_a_sum_written_down_before_the_download_is_checked(web, target, capsys):
    target.parent.mkdir()
    target.with_name("file.tar.sha256").write_text("0" * 64 + "  file.tar\n")
    with pytest.raises(SystemExit) as stop:
        main([web.url, str(target)])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and hashlib.sha256(CONTENT).hexdigest() in line and "0" * 64 in line
    assert not target.exists() and target.with_name("file.tar.partial").read_bytes() == CONTENT


def test_the_sum_of_the_published_file_is_checked(web, target, capsys):
    published = hashlib.sha256(b"published").hexdigest()
    with pytest.raises(SystemExit) as stop:
        main([web.url, str(target), "--sha256", published])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and f"the published file has {published}" in line
    assert not target.exists() and not target.with_name("file.tar.sha256").exists()
    target.with_name("file.tar.partial").unlink()
    web.content = b"published"
    main([web.url, str(target), "--sha256", published])
    assert_complete(target, b"published")
    main([web.url, str(target), "--sha256", "0" * 64])
    assert "as recorded" in capsys.readouterr().out, (
        "what is recorded counts: it may have been accepted"
    )


def test_a_sum_that_was_recorded_by_hand_may_have_another_form(target):
    target.parent.mkdir()
    target.write_bytes(CONTENT)
    recorded = f"{hashlib.sha256(CONTENT).hexdigest().upper()} *file.tar\n"
    target.with_name("file.tar.sha256").write_text(recorded)
    download("https://example.org/file.tar", target)
    assert target.read_bytes() == CONTENT


def test_a_file_that_lies_there_is_compared_with_the_sum_of_the_published_one(target, capsys):
    target.parent.mkdir()
    target.write_bytes(CONTENT)
    download("https://example.org/file.tar", target, sha256=hashlib.sha256(CONTENT).hexdigest())
    assert_complete(target)
    target.with_name("file.tar.sha256").unlink()
    with pytest.raises(DataError, match="but the published file has 000"):
        download("https://example.org/file.tar", target, sha256="0" * 64)
    assert target.read_bytes() == CONTENT


def test_a_record_that_is_no_text_is_one_line(web, target):
    download(web.url, target)
    target.with_name("file.tar.sha256").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="has SHA-256 .* says"):
        download(web.url, target)


def test_a_damaged_file_is_one_line_and_stays(web, target, capsys):
    download(web.url, target)
    target.write_bytes(CONTENT[:-1] + b"!")
    with pytest.raises(SystemExit) as stop:
        main([web.url, str(target)])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and f"{target}.sha256 says" in line
    assert target.read_bytes() == CONTENT[:-1] + b"!"


def test_a_second_download_of_the_same_file_is_refused(web, target):
    target.parent.mkdir()
    with (
        locked(target.with_name("file.tar.partial.lock"), ""),
        pytest.raises(DataError, match="another process is downloading"),
    ):
        download(web.url, target)
    assert web.ranges == []
    download(web.url, target)
    assert_complete(target)


def test_an_interruption_is_one_line(web, target, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_fetch", interrupt)
    with pytest.raises(SystemExit) as stop:
        main([web.url, str(target)])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and "interrupted; the same command goes on" in line


def test_pauses_double_and_end(web, target, monkeypatch):
    pauses = []
    monkeypatch.setattr(module.time, "sleep", pauses.append)
    monkeypatch.setattr(module, "FIRST_PAUSE", 1.0)
    web.statuses = [503] * 10
    with pytest.raises(DataError, match="503"):
        download(web.url, target)
    assert pauses == [1, 2, 4, 8, 16] and len(web.ranges) == 6
