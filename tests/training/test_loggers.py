"""Dashboards: whatever a server, an environment or a missing package does, the run goes on."""

from __future__ import annotations

import base64
import http.server
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from endings import ending_of
from helpers import csv_rows, resumable

import train
from lib.config import TrainConfig
from lib.training import loggers
from lib.training.loggers import Dashboard

wandb = pytest.importorskip("wandb")
KEY = "0123456789" * 4
TRAINER = SimpleNamespace(is_global_zero=True, global_step=0)
VIEWER = {"data": {"viewer": {"id": "1", "entity": "me", "username": "me", "flags": "{}"}}}
BUCKET = {
    "data": {
        "upsertBucket": {
            "bucket": {
                "id": "1",
                "name": "a",
                "displayName": "a",
                "config": "{}",
                "historyLineCount": 0,
                "project": {"id": "1", "name": "sdn", "entity": {"id": "1", "name": "me"}},
            },
            "inserted": True,
        }
    }
}


class Server(http.server.ThreadingHTTPServer):
    """A server on the loopback address that pretends to be wandb's.

    `answer` maps the text of a query to a status and an answer, or to None: then it stays silent.
    """

    daemon_threads = True

    def __init__(self, answer):
        super().__init__(("127.0.0.1", 0), Requests)
        self.answer, self.asked, self.closing = answer, [], threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Requests(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        query = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode(
            errors="replace"
        )
        self.server.asked.append((self.headers.get("Authorization"), query))
        answer = self.server.answer(query)
        if answer is None:
            self.server.closing.wait(60)
            return
        status, content = answer
        content = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST

    def log_message(self, *arguments):
        pass


def refuses(query):
    return 401, {"error": "who are you?"}


def is_silent(query):
    return None


def knows_the_key_and_falls_silent(query):
    return (200, VIEWER) if "viewer" in query else None


def begins_a_run_and_falls_silent(query):
    if "mutation UpsertBucket" in query:
        return 200, BUCKET
    if "query RunResumeStatus" in query:
        return 200, {"data": {"model": None}}
    return knows_the_key_and_falls_silent(query)


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """An environment in which wandb could log online, but for a server."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr(loggers, "PATIENCE", 1)
    for name in ("WANDB_INIT_TIMEOUT", "WANDB_FINISH_TIMEOUT"):
        monkeypatch.setenv(name, "1")
    wandb.teardown()  # what it has read of another environment
    yield monkeypatch
    wandb.teardown()


@pytest.fixture
def server(request, environment):
    server = Server(request.param)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment.setenv("WANDB_BASE_URL", server.url)
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()


def flags_with(logger: str, images, folder, *more: object) -> list[str]:
    flags = resumable(images, folder, *more)
    flags[flags.index("--logger") + 1] = logger
    return flags


def used(folder, logger: str = "wandb") -> float:
    """The seconds that a dashboard takes which is opened, used and closed."""
    begin = time.monotonic()
    dashboard = Dashboard(TrainConfig(logger=logger), folder)
    dashboard.on_train_start(TRAINER, None)
    dashboard.scalars({"train/neg_elbo": 1.0}, 1)
    dashboard.teardown(TRAINER, None, "fit")
    return time.monotonic() - begin


def offline_runs(folder) -> list[str]:
    return [path.name for path in (folder / "wandb").glob("offline-run-*")]


@pytest.mark.parametrize("server", [refuses], indirect=True)
def test_a_run_goes_on_offline_if_the_server_refuses_the_key(server, tmp_path, images):
    """And so does a second part of the run, which is the same run there."""
    for iters in (1, 2):
        done = ending_of(train.main, flags_with("auto", images, tmp_path, "--iters", iters))
        assert done.status == 0 and "Traceback" not in done.err, done.err
        lines = [line for line in done.err.splitlines() if "wandb logs offline" in line]
        assert lines == [
            f"wandb logs offline to {tmp_path}/checkpoints/sdn/wandb (127.0.0.1: 401 "
            "Unauthorized); `wandb sync` uploads it"
        ]
    folder = tmp_path / "checkpoints/sdn"
    assert len(csv_rows(folder / "steps.csv")) == 2
    names = offline_runs(folder)
    assert len(names) == 2
    assert {name.rsplit("-", 1)[1] for name in names} == {(folder / "wandb_id").read_text()}
    key = "Basic " + base64.b64encode(f"api:{KEY}".encode()).decode()
    assert [asked[0] for asked in server.asked if "Viewer" in asked[1]] == [key, key]


@pytest.mark.parametrize(
    ("server", "reason"),
    [
        (is_silent, "(127.0.0.1: "),
        (knows_the_key_and_falls_silent, "(Failed to get resume status"),
        (lambda query: (200, {"data": {"viewer": None}}), "(127.0.0.1: the API key is not known"),
        (lambda query: (200, ["nonsense"]), "(127.0.0.1: cannot be reached"),
    ],
    indirect=["server"],
)
def test_a_server_that_is_of_no_use_costs_seconds(server, reason, tmp_path, capfd):
    """The limit is generous for busy machines; without ours wandb takes 90 s and more."""
    assert used(tmp_path) < 40
    assert f"wandb logs offline to {tmp_path}/wandb {reason}" in capfd.readouterr().err
    assert len(offline_runs(tmp_path)) == 1


@pytest.mark.parametrize("server", [begins_a_run_and_falls_silent], indirect=True)
def test_a_server_that_falls_silent_during_a_run_does_not_keep_it(server, tmp_path, capfd):
    assert used(tmp_path) < 40
    assert "offline" not in capfd.readouterr().err
    assert any("mutation UpsertBucket" in query for _, query in server.asked), "it was online"
    assert list((tmp_path / "wandb").glob("run-*/*.wandb")), "what `wandb sync` can upload"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"WANDB_API_KEY": None}, "wandb logs offline to {}/wandb (no API key)"),
        ({"WANDB_BASE_URL": "http://127.0.0.1:9"}, "(127.0.0.1: cannot be reached ([Errno"),
        ({"WANDB_MODE": "offline"}, "wandb logs offline to {}/wandb; `wandb sync`"),
        ({"WANDB_BASE_URL": "http://[::1"}, "note: wandb cannot go on (1 validation error"),
        ({"WANDB_BASE_URL": "not a url"}, "note: wandb cannot go on (1 validation error"),
        ({"WANDB_MODE": "sometimes"}, "note: wandb cannot go on (1 validation error"),
        ({"WANDB_MODE": "disabled"}, None),
    ],
)
def test_an_environment_of_no_use_is_one_line(changes, line, environment, tmp_path, capfd):
    for name, value in changes.items():
        if value is None:
            environment.delenv(name)
        else:
            environment.setenv(name, value)
    used(tmp_path)
    errors = capfd.readouterr().err
    assert "Traceback" not in errors
    lines = [told for told in errors.splitlines() if not told.startswith("wandb:")]
    assert [line.format(tmp_path) in told for told in lines] == [True] if line else not lines


def test_the_death_of_wandbs_process_is_one_line(environment, tmp_path, capfd):
    environment.setenv("WANDB_MODE", "offline")
    dashboard = Dashboard(TrainConfig(logger="wandb"), tmp_path)
    dashboard.on_train_start(TRAINER, None)
    dashboard.scalars({"train/neg_elbo": 1.0}, 1)
    pids = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    (service,) = [pid for pid in pids if b"wandb-core" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(int(service), signal.SIGKILL)
    os.waitid(os.P_PID, int(service), os.WEXITED | os.WNOWAIT)
    for step in range(2, 20):
        dashboard.scalars({"train/neg_elbo": 1.0}, step)
        time.sleep(0.05)
    dashboard.teardown(TRAINER, None, "fit")
    assert capfd.readouterr().err.count("note: wandb cannot go on (") == 1


def test_what_breaks_a_dashboard_does_not_break_the_run(tmp_path, images, monkeypatch):
    """One line, and no second attempt."""

    class Broken(loggers.TensorBoard):
        def scalars(self, values, step):
            raise RuntimeError("the other side\nis gone")

    monkeypatch.setattr(loggers, "TensorBoard", Broken)
    done = ending_of(train.main, flags_with("tensorboard", images, tmp_path, "--iters", 2))
    assert done.status == 0, done.err
    assert done.err.count("cannot go on (the other side is gone)") == 1


def test_tensorboard_has_the_numbers_and_the_pictures(tmp_path, images):
    """Also of a run in two parts."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for iters in (3, 5):
        done = ending_of(train.main, flags_with("tensorboard", images, tmp_path, "--iters", iters))
        assert done.status == 0, done.err
    folder = tmp_path / "checkpoints/sdn"
    events = accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    for name, column in (("train/neg_elbo", "neg_elbo"), ("train/kl_0", "kl_0")):
        rows = csv_rows(folder / "steps.csv")
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in shown] == [1, 2, 3, 4, 5]
        assert [value for _, value in shown] == pytest.approx([float(row[column]) for row in rows])
    validated = {
        int(row["step"]): float(row["val_neg_elbo"]) for row in csv_rows(folder / "epochs.csv")
    }
    shown = {event.step: event.value for event in events.Scalars("val/neg_elbo")}
    assert shown == pytest.approx(validated)
    for name in ("samples", "reconstructions"):
        pictures = events.Images(f"val/{name}")
        assert [picture.step for picture in pictures] == sorted(validated)
        assert pictures[0].encoded_image_string.startswith(b"\x89PNG")


def test_without_wandb_auto_writes_csv_files(tmp_path, images, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    done = ending_of(train.main, flags_with("auto", images, tmp_path, "--iters", 1))
    assert done.status == 0, done.err
    assert "wandb is not installed: metrics go to CSV files only" in done.err
