"""The page to play with: its answers, and its server."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
import torch
from helpers import REPOSITORY, SMALL_SDN, run
from mixed_pictures import encoded, scene

import demo
from lib.config import TrainConfig
from lib.DensityVAE import DensityVAE
from lib.DisentanglementVAE import DisentanglementVAE
from lib.evaluation.loading import LoadedModel
from lib.pictures import load_image


def answers(model):
    return demo.Answers(LoadedModel(model.eval(), TrainConfig(), 6, [], "0" * 12))


@pytest.fixture
def pictures(tmp_path):
    paths = [tmp_path / f"{number}.png" for number in range(2)]
    for number, path in enumerate(paths):
        path.write_bytes(encoded(scene(number)))
    return [str(path) for path in paths]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_ladder_answers_with_pictures(pictures, channels):
    torch.manual_seed(0)
    given = answers(DensityVAE((16, 24), channels=channels, **SMALL_SDN))
    samples = np.asarray(given.samples(3, 0.8, 4))
    assert (samples == np.asarray(given.samples(3.0, 0.8, 4.0))).all()
    assert (samples != np.asarray(given.samples(4, 0.8, 4))).any()
    pair, around = given.variations(pictures[0], 2, 0.8, 0)
    assert pair.size[0] > pair.size[1] and around.size > pair.size
    kept = np.asarray(given.variations(pictures[0], 3, 0.8, 0)[1])  # nothing is left to vary
    period = 2 * (16 + 1)  # of rows in the grid, each pixel two large
    assert (kept[:period] == kept[period : 2 * period]).all()
    assert (np.asarray(around)[:period] != np.asarray(around)[period : 2 * period]).any()
    row = given.between(*pictures, 2, 0.8, 0)
    assert row.size[0] > 5 * row.size[1]


def test_a_beta_vae_answers_with_a_row_for_each_dimension(pictures):
    given = answers(DisentanglementVAE(z_size=3, sdn_nfeat=4))
    grid = given.traversal(pictures[0])
    assert grid.size == (demo.FRAMES * 65 + 1, 3 * 65 + 1)
    given.variations(pictures[0], 1, 0.8, 0)


def test_what_is_no_picture_is_said(tmp_path):
    given = answers(DensityVAE(16, **SMALL_SDN))
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match="text.png cannot be read as a picture"):
        given.variations(str(tmp_path / "text.png"), 1, 0.8, 0)
    with pytest.raises(ValueError, match="choose a picture first"):
        given.between(None, None, 1, 0.8, 0)


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(demo.ConfigError, match="pip install gradio"):
        demo.page(answers(DensityVAE(16, **SMALL_SDN)), "tiny")


def test_only_a_beta_vae_has_traversals():
    pytest.importorskip("gradio")
    for model, there in (
        (DisentanglementVAE(z_size=3, sdn_nfeat=4), True),
        (DensityVAE(16, **SMALL_SDN), False),
    ):
        names = [call.api_name for call in demo.page(answers(model), "tiny").fns.values()]
        assert {"samples", "variations", "between"} <= {*names}
        assert ("traversal" in names) is there


@pytest.mark.slow
def test_the_server_answers_this_machine(finished, tmp_path, pictures):
    pytest.importorskip("gradio")
    from gradio_client import Client, handle_file

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["demo.py", "--model", "tiny", "--output_dir", finished, "--port", port]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *map(str, command), "--device", "cpu"],
            cwd=REPOSITORY,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        address = f"http://127.0.0.1:{port}"
        client = _when_it_is_there(address, process, lambda: Client(address, verbose=False))
        samples = client.predict(5, 0.8, 4, api_name="/samples")
        assert load_image(samples, (3, 67, 67)).float().std() > 0
        pair, around = client.predict(handle_file(pictures[0]), 1, 0.8, 0, api_name="/variations")
        assert pair != around
        ends = [handle_file(path) for path in pictures]
        assert client.predict(*ends, 1, 0.8, 0, api_name="/between")
    finally:
        process.terminate()
        process.wait(30)


def _when_it_is_there(address, process, connect):
    for _ in range(600):
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return connect()
        except OSError:
            assert process.poll() is None, "the server has ended"
            time.sleep(0.2)
    raise AssertionError("the server does not answer")


def test_a_model_that_is_not_there_is_one_line(tmp_path):
    done = run("demo.py", "--model", "absent", "--output_dir", tmp_path)
    assert done.returncode == 2 and "absent" in done.stderr and "Traceback" not in done.stderr
