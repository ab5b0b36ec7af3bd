"""The importance-weighted likelihood: its value, resumption, and several processes."""

from __future__ import annotations

import math
import multiprocessing
import os
import resource
import signal
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import REPOSITORY, SMALL_SDN

from data.errors import DataError
from lib.DensityVAE import DensityVAE
from lib.evaluation.importance import ImportanceSampler, LikelihoodError
from lib.evaluation.ledger import Ledger, LedgerError
from lib.evaluation.likelihood import negative_log_likelihood
from lib.utils import keyed_noise

IDENTITY = {"weights": "abc", "dataset": "random"}
OPTIONS = dict(image_shape=(3, 8, 8), samples=6, seed=0, identity=IDENTITY, chunk=4)


def open_small(device: str = "cpu", count: int = 8, image_size=8, dtype=torch.float32, **changes):
    """A small model and random images; at the module's level, so that worker processes can call
    it."""
    torch.manual_seed(0)
    model = DensityVAE(image_size, **(SMALL_SDN | changes)).to(device, dtype).eval()
    return model, torch.randint(0, 256, (count, *model.image_shape), dtype=torch.uint8)


class Trap:
    """Images of which one is damaged, or kills the process that reads it."""

    def __init__(self, images, place: int, end: str):
        self.images, self.place, self.end = images, place, end

    def __getitem__(self, index: int):
        if index == self.place and self.end == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if index == self.place:
            raise DataError(f"image {index} is damaged")
        return self.images[index]


def open_trap(device: str, place: int, end: str):
    model, images = open_small(device)
    return model, Trap(images, place, end)


@pytest.fixture
def rows_computed(monkeypatch):
    """The number of rows of each top-down pass."""
    rows = []
    top_down = DensityVAE.top_down

    def counted(self, batch, **options):
        rows.append(batch)
        return top_down(self, batch, **options)

    monkeypatch.setattr(DensityVAE, "top_down", counted)
    return rows


def values_in(ledger: Path) -> dict[int, float]:
    """The log-likelihood of each finished image, and that none is there twice."""
    rows = [line.split(",") for line in ledger.read_text().splitlines()[2:]]
    finished = [
        (int(image), float(value))
        for image, samples, value in rows
        if int(samples) == OPTIONS["samples"]
    ]
    assert len(dict(finished)) == len(finished)
    return dict(finished)


def comparable(result: dict) -> dict:
    """What does not depend on how the work was done."""
    return {key: result[key] for key in ("bits_per_dim", "standard_error", "images", "samples")}


@pytest.fixture
def one_thread():
    """Workers have a share of this process's threads, and with another number of them sums may
    differ in a bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def uninterrupted(tmp_path):
    """Result and values of all eight images, computed at once by one process."""
    result = negative_log_likelihood(
        open_small, range(8), ledger=tmp_path / "uninterrupted.csv", **OPTIONS
    )
    return comparable(result), values_in(tmp_path / "uninterrupted.csv")


@pytest.mark.parametrize("obs_model", ["DML", "DL"])
@pytest.mark.parametrize("nbits", [8, 5])
def test_it_is_the_mean_importance_weight_in_bits_per_dimension(tmp_path, obs_model, nbits):
    open_model = partial(
        open_small, image_size=(8, 12), dtype=torch.float64, obs_model=obs_model, nbits=nbits
    )
    model, images = open_model()
    bits = []
    for index in (2, 5, 7):
        x = model.observation.encode(images[index : index + 1]).double()
        weights = []
        for sample in range(11):
            with torch.no_grad():
                noise = [
                    eps.double() for eps in keyed_noise(model.latent_shapes, 3, [index], [sample])
                ]
                posterior, _ = model.bottom_up(x)
                _, rates, params = model.top_down(1, posterior=posterior, noise=noise)
                weights.append((model.observation.log_prob(params, x) - rates.sum()).item())
        largest = max(weights)
        mean_weight = sum(math.exp(weight - largest) for weight in weights) / 11
        bits.append(-(largest + math.log(mean_weight)) / (3 * 8 * 12 * math.log(2)))
    result = negative_log_likelihood(
        open_model,
        [2, 5, 7],
        image_shape=(3, 8, 12),
        samples=11,
        seed=3,
        ledger=tmp_path / "ledger.csv",
        identity=IDENTITY,
        chunk=4,
    )
    assert result["bits_per_dim"] == pytest.approx(statistics.mean(bits), rel=1e-9)
    assert result["standard_error"] == pytest.approx(
        statistics.stdev(bits) / math.sqrt(3), rel=1e-6
    )
    assert (result["images"], result["samples"], result["computed"]) == (3, 11, 3)


def test_importance_weighted_bound():
    """Equals the ELBO at one sample, and rises on average with the number of samples."""
    model, images = open_small(count=4, dtype=torch.float64)

    def log_likelihoods(samples: int, seed: int) -> torch.Tensor:
        sampler = ImportanceSampler(model, images, samples=samples, seed=seed, chunk=64)
        return torch.tensor([sampler(image) for image in range(4)], dtype=torch.float64)

    with torch.no_grad():
        noise = [eps.double() for eps in keyed_noise(model.latent_shapes, 0, range(4))]
        torch.testing.assert_close(
            log_likelihoods(1, 0), model(model.observation.encode(images).double(), noise).elbo
        )
    bounds = [
        torch.stack([log_likelihoods(samples, seed) for seed in range(24)]).mean(0)
        for samples in (1, 4, 16)
    ]
    assert (bounds[1] > bounds[0]).all() and (bounds[2] > bounds[1]).all()


def test_importance_weights_are_one_sample_in_a_model_with_analytic_kl(tmp_path):
    analytic, sampled = (
        partial(open_small, post_model="IsoGaussian", analytic_kl=closed)
        for closed in (True, False)
    )
    results = [
        comparable(
            negative_log_likelihood(open_model, [0, 1], ledger=tmp_path / f"{i}.csv", **OPTIONS)
        )
        for i, open_model in enumerate((analytic, sampled))
    ]
    assert results[0] == results[1]
    model, images = analytic()
    x = model.observation.encode(images)
    assert not torch.allclose(model(x).rates, sampled()[0](x).rates)


def test_neither_chunk_nor_order_matters_but_the_seed_does(tmp_path, uninterrupted):
    for chunk in (1, 5, 1000):
        path = tmp_path / f"{chunk}.csv"
        result = negative_log_likelihood(
            open_small, range(7, -1, -1), ledger=path, **OPTIONS | {"chunk": chunk}
        )
        assert result["bits_per_dim"] == pytest.approx(uninterrupted[0]["bits_per_dim"], rel=1e-6)
        assert result["standard_error"] == pytest.approx(
            uninterrupted[0]["standard_error"], rel=1e-4
        )
        assert values_in(path) == pytest.approx(uninterrupted[1], rel=1e-6)
    other = negative_log_likelihood(
        open_small, range(8), ledger=tmp_path / "seed.csv", **OPTIONS | {"seed": 1}
    )
    assert other["bits_per_dim"] != pytest.approx(uninterrupted[0]["bits_per_dim"], rel=1e-6)


def test_one_image_has_no_standard_error(tmp_path):
    result = negative_log_likelihood(open_small, [3], ledger=tmp_path / "ledger.csv", **OPTIONS)
    assert result["standard_error"] is None and result["images"] == 1


@pytest.mark.parametrize(
    "changes",
    [dict(indices=[]), dict(indices=[1, 1]), dict(devices=()), dict(samples=0), dict(chunk=0)],
)
def test_what_cannot_be_computed_is_refused(tmp_path, changes):
    with pytest.raises(ValueError, match="needs images, each once"):
        negative_log_likelihood(
            **(dict(open_model=open_small, indices=[0], ledger=tmp_path / "l") | OPTIONS | changes)
        )
    assert not (tmp_path / "l").exists()


def test_a_likelihood_that_is_not_finite_is_an_error_and_not_kept(tmp_path):
    model, images = open_small()
    log_prob, calls = model.observation.log_prob, []

    def diverged(params, x):
        calls.append(len(x))
        return log_prob(params, x) + (math.nan if len(calls) > 3 else 0.0)

    model.observation.log_prob = diverged
    message = "the log-likelihood of image 5 is nan after 6 samples: did training diverge"
    with pytest.raises(LikelihoodError, match=message):
        negative_log_likelihood(
            lambda device: (model, images), range(4, 8), ledger=tmp_path / "l", **OPTIONS
        )
    assert list(values_in(tmp_path / "l")) == [4]


def test_nothing_finished_is_computed_twice(tmp_path, uninterrupted, rows_computed):
    path = tmp_path / "ledger.csv"
    told = []

    def interrupt(images: int, estimate: str) -> None:
        told.append((images, estimate))
        if len(told) == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        negative_log_likelihood(open_small, range(8), ledger=path, progress=interrupt, **OPTIONS)
    assert [images for images, _ in told] == 6 * [1] and len(values_in(path)) == 6
    rows_computed.clear()

    told.clear()
    tell = lambda images, estimate: told.append((images, estimate))  # noqa: E731
    result = negative_log_likelihood(open_small, range(8), ledger=path, progress=tell, **OPTIONS)
    assert result["computed"] == 2 and rows_computed == [4, 2] * 2, "the two that were missing"
    assert (comparable(result), values_in(path)) == uninterrupted
    shown = f"{result['bits_per_dim']:.4f} +- {result['standard_error']:.4f}"
    assert [images for images, _ in told] == [6, 1, 1] and told[2][1] == shown != told[0][1]

    rows_computed.clear()
    told.clear()
    again = negative_log_likelihood(open_small, range(8), ledger=path, progress=tell, **OPTIONS)
    assert (again["computed"], again["chunk"], rows_computed, told) == (0, None, [], [(8, shown)])
    assert comparable(again) == comparable(result)


def test_more_images_build_on_fewer_and_fewer_on_more(tmp_path, uninterrupted):
    path = tmp_path / "ledger.csv"
    computed = []
    for count in (3, 8, 2):
        result = negative_log_likelihood(open_small, range(count), ledger=path, **OPTIONS)
        computed.append(result["computed"])
    assert computed == [3, 5, 0] and result["images"] == 2
    assert values_in(path) == uninterrupted[1]


def test_an_image_is_encoded_once(tmp_path, monkeypatch):
    batches = []
    bottom_up = DensityVAE.bottom_up
    monkeypatch.setattr(
        DensityVAE, "bottom_up", lambda self, x: batches.append(len(x)) or bottom_up(self, x)
    )
    negative_log_likelihood(open_small, range(8), ledger=tmp_path / "l", **OPTIONS | {"chunk": 2})
    assert batches == 8 * [1]


def test_rows_of_fewer_samples_which_earlier_versions_wrote_do_not_count(tmp_path, uninterrupted):
    path = tmp_path / "ledger.csv"
    negative_log_likelihood(open_small, range(2), ledger=path, **OPTIONS)
    with path.open("a") as file:
        file.write("2,1,-99.0\n2,4,-98.0\n")
    result = negative_log_likelihood(open_small, range(8), ledger=path, **OPTIONS)
    assert result["computed"] == 6
    assert (comparable(result), values_in(path)) == uninterrupted


def in_another_process(call: str) -> subprocess.Popen:
    """A process, and group of its own, that calls a function given with its module."""
    folders = (REPOSITORY, REPOSITORY / "tests", REPOSITORY / "tests/evaluation")
    return subprocess.Popen(
        [sys.executable, "-c", f"import {call.partition('.')[0]}; {call}"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders)), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell's background jobs ignore Ctrl-C, and hand that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def assert_ended(processes: list[int]) -> None:
    """All are gone soon, or wait only for their parent to take note."""
    deadline = time.monotonic() + 60
    while left := [pid for pid in processes if state(pid) != "Z"]:
        assert time.monotonic() < deadline, f"processes {left} do not end"
        time.sleep(0.02)


def state(pid: int) -> str:
    """One letter, as /proc has it; Z for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="reads /proc")


def compute_and_stall(path: str, workers: int) -> None:
    """Run in a process of its own: computes images, and stalls when four are finished, having told
    its children."""
    count = 0

    def stall(images: int, estimate: str) -> None:
        nonlocal count
        count += images
        if count >= 4:
            print(
                "stalled", *(child.pid for child in multiprocessing.active_children()), flush=True
            )
            time.sleep(60)

    negative_log_likelihood(
        open_small, range(8), ledger=path, devices=["cpu"] * workers, progress=stall, **OPTIONS
    )


@needs_proc
@pytest.mark.parametrize(
    ("workers", "number"),
    [(1, signal.SIGKILL), (2, signal.SIGKILL), (2, signal.SIGTERM), (2, signal.SIGINT)],
)
def test_a_killed_run_goes_on_and_its_workers_end(
    tmp_path, uninterrupted, workers, number, one_thread
):
    path = tmp_path / "ledger.csv"
    with in_another_process(
        f"test_likelihood.compute_and_stall({str(path)!r}, {workers})"
    ) as process:
        word, *children = process.stdout.readline().split()
        assert word == "stalled" and len(children) == (workers if workers > 1 else 0)
        with pytest.raises(LedgerError, match="in use by another process"):
            negative_log_likelihood(open_small, range(8), ledger=path, **OPTIONS)
        if number == signal.SIGINT:  # Ctrl-C reaches them all, and is the parent's to handle
            for child in children:
                os.kill(int(child), number)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
        assert stderr.count("Traceback") == (number == signal.SIGINT), stderr
        assert_ended([int(child) for child in children])
    assert len(values_in(path)) == 4
    result = negative_log_likelihood(open_small, range(8), ledger=path, **OPTIONS)
    assert result["computed"] == 4
    assert (comparable(result), values_in(path)) == uninterrupted


@pytest.mark.parametrize("kept", [10, 60, -1, -9])
def test_a_row_or_head_that_was_cut_off_is_dropped(tmp_path, uninterrupted, kept):
    path = tmp_path / "ledger.csv"
    negative_log_likelihood(open_small, range(8), ledger=path, **OPTIONS)
    path.write_bytes(path.read_bytes()[:kept])
    result = negative_log_likelihood(open_small, range(8), ledger=path, **OPTIONS)
    assert result["computed"] == (8 if kept > 0 else 1)
    assert values_in(path) == pytest.approx(uninterrupted[1], rel=1e-6)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda text: text.replace("abc", "abd"),
            r"holds other numbers \(weights abd there, abc now\): move it away",
        ),
        (lambda text: text.replace('"seed": 0', '"seed": 1'), r"seed 1 there, 0 now"),
        (lambda text: text.replace("image,", "picture,"), "another file format"),
        (lambda text: "a letter to my aunt\n", "is not a file of finished images"),
        (
            lambda text: text.replace("\n1,", "\none,"),
            r"line 4 is damaged or out of place \('one,6,",
        ),
        (lambda text: text + "0,6,-1.0\n", "line 5 is damaged"),
        (lambda text: text + "2,7,-1.0\n", "line 5 is damaged"),
        (lambda text: text + "2,6,nan\n", "line 5 is damaged"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_and_left_alone(tmp_path, damage, message):
    path = tmp_path / "ledger.csv"
    negative_log_likelihood(open_small, range(2), ledger=path, **OPTIONS)
    damaged = damage(path.read_text())
    path.write_text(damaged)
    with pytest.raises(LedgerError, match=message) as caught:
        negative_log_likelihood(open_small, range(2), ledger=path, **OPTIONS)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert path.read_text() == damaged


def test_a_ledger_without_images_binds_nobody(tmp_path):
    def open_nothing(device: str):
        raise DataError("no such data")

    with pytest.raises(DataError, match="no such data"):
        negative_log_likelihood(open_nothing, range(2), ledger=tmp_path / "l", **OPTIONS)
    result = negative_log_likelihood(
        open_small, range(2), ledger=tmp_path / "l", **OPTIONS | {"seed": 1}
    )
    assert result["computed"] == 2


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(LedgerError, match="cannot open .*file/ledger.csv"):
        negative_log_likelihood(
            open_small, range(2), ledger=tmp_path / "file" / "ledger.csv", **OPTIONS
        )


def test_a_full_disk_is_one_line_and_keeps_what_is_written(tmp_path):
    path = tmp_path / "ledger.csv"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Ledger(path, {"samples": 6}) as ledger:
        ledger.add(0, -1.5)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, limits[1]))
        try:
            with pytest.raises(
                LedgerError, match="cannot write .*ledger.csv .*: what is in it stays; make room"
            ):
                ledger.add(1, -2.5)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with Ledger(path, {"samples": 6}) as ledger:
        assert ledger.rows == {0: -1.5}


def test_two_workers_find_what_one_finds(tmp_path, one_thread, uninterrupted):
    path = tmp_path / "ledger.csv"
    told = []
    result = negative_log_likelihood(
        open_small,
        range(8),
        ledger=path,
        devices=["cpu", "cpu"],
        progress=lambda *now: told.append(now),
        **OPTIONS,
    )
    assert (comparable(result), values_in(path)) == uninterrupted
    assert sum(images for images, _ in told) == result["computed"] == 8


@pytest.mark.parametrize("end", ["raises", "dies"])
def test_a_worker_that_fails_ends_the_run_and_loses_nothing(tmp_path, end):
    path = tmp_path / "ledger.csv"
    kind, message = {
        "raises": (DataError, "^image 5 is damaged$"),
        "dies": (LikelihoodError, "^a worker process was killed, perhaps .*; what was finished"),
    }[end]
    with pytest.raises(kind, match=message):
        negative_log_likelihood(
            partial(open_trap, place=5, end=end),
            range(8),
            ledger=path,
            devices=["cpu", "cpu"],
            **OPTIONS,
        )
    assert not multiprocessing.active_children()
    finished = values_in(path) if path.stat().st_size else {}
    assert 5 not in finished
    result = negative_log_likelihood(open_small, range(8), ledger=path, **OPTIONS)
    assert result["computed"] == 8 - len(finished)
