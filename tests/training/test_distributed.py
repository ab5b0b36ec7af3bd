"""Several processes, started by train.py or by torchrun, on one machine or as if on two."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import REPOSITORY, TINY, assert_one_line_error, csv_rows, resumable, run

from lib.checkpoint import read_checkpoint

# The noise of an image does not depend on the rank that has it, and without free bits neither does
# the loss.
EXACT = [
    *TINY,
    "--noise",
    "image",
    "--free_bits",
    0,
    "--precision",
    "64-true",
    "--make_checkpoint",
    "--use_checkpoint",
]


def start(*command: object, **environment: str) -> subprocess.Popen:
    quiet = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    arguments = [sys.executable, *map(str, command)]
    return subprocess.Popen(
        arguments,
        cwd=REPOSITORY,
        env=quiet,
        text=True,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def torchrun(
    node: int, nodes: int, processes: int, port: int, *arguments: object
) -> subprocess.Popen:
    """One node's agent."""
    where = [
        "--master_addr",
        "127.0.0.1",
        "--master_port",
        port,
        "--node_rank",
        node,
        "--nnodes",
        nodes,
    ]
    return start(
        "-m", "torch.distributed.run", *where, "--nproc_per_node", processes, "train.py", *arguments
    )


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return read_checkpoint(folder / f"checkpoints/{name}/last.ckpt")["state_dict"]


def assert_same_training(folder: Path, name: str, expected: str) -> None:
    """Weights, average, logged gradients and validation agree up to the rounding of 64-bit
    numbers."""
    ours, theirs = weights(folder, name), weights(folder, expected)
    assert ours.keys() == theirs.keys()
    for key in ours:
        torch.testing.assert_close(
            ours[key], theirs[key], rtol=1e-7, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}"
        )
    for file, columns in (
        ("steps.csv", ["grad_norm"]),
        ("epochs.csv", ["val_neg_elbo", "val_kl_0", "val_distortion"]),
    ):
        a, b = (csv_rows(folder / f"checkpoints/{run}/{file}") for run in (name, expected))
        assert [row["step"] for row in a] == [row["step"] for row in b]
        for column in columns:
            assert [float(row[column]) for row in a] == pytest.approx(
                [float(row[column]) for row in b], rel=2e-7
            )  # float32


@pytest.fixture(scope="module")
def alone(tmp_path_factory, images):
    """The output folder of a run of 12 steps with one process, called one; 8 images in a step, 11
    in a validation."""
    folder = tmp_path_factory.mktemp("distributed")
    done = run(
        "train.py",
        *EXACT,
        *common(folder, images),
        "--exp_name",
        "one",
        "--batch",
        8,
        "--iters",
        12,
    )
    assert done.returncode == 0, done.stderr
    return folder


def common(folder: Path, images: Path) -> list[object]:
    return ["--root", images, "--output_dir", folder]


@pytest.mark.parametrize("processes", [2, 4])
def test_the_number_of_processes_changes_rounding_only(alone, images, processes):
    flags = [
        "--exp_name",
        f"several{processes}",
        "--num_processes",
        processes,
        "--batch",
        8 // processes,
        "--batch_val",
        3,
    ]
    done = run("train.py", *EXACT, *common(alone, images), *flags, "--iters", 12)
    assert done.returncode == 0, done.stderr
    assert_same_training(alone, f"several{processes}", "one")


def test_two_nodes_of_two_processes(alone, images):
    """Two agents of torchrun, each with its own processes, as on two machines."""
    port = free_port()
    flags = [
        *EXACT,
        *common(alone, images),
        "--exp_name",
        "nodes",
        "--num_nodes",
        2,
        "--num_processes",
        2,
        "--batch",
        2,
    ]
    agents = [torchrun(node, 2, 2, port, *flags, "--iters", 12) for node in (0, 1)]
    for agent in agents:
        _, errors = agent.communicate(timeout=300)
        assert agent.returncode == 0, errors
    assert_same_training(alone, "nodes", "one")


def test_a_job_of_another_size_is_one_line(tmp_path, images):
    job = {
        "SLURM_JOB_ID": "7",
        "SLURM_NTASKS": "4",
        "SLURM_NTASKS_PER_NODE": "4",
        "SLURM_NODELIST": "127.0.0.1",
    }
    job |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NNODES": "1", "SLURM_NODEID": "0"}
    done = run("train.py", *TINY, *common(tmp_path, images), "--num_processes", 2, **job)
    assert_one_line_error(done, "ntasks-per-node")


def test_two_tasks_of_slurm(alone, images):
    """Each is started by srun with its place in the job; a signal to the job ends both with a
    checkpoint."""
    job = {
        "SLURM_JOB_ID": "7",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NODELIST": "127.0.0.1",
    }
    job |= {
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    flags = [
        *EXACT,
        *common(alone, images),
        "--exp_name",
        "slurm",
        "--num_processes",
        2,
        "--batch",
        4,
    ]

    def tasks(*more: object) -> list[subprocess.Popen]:
        places = ({"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)} for task in (0, 1))
        return [start("train.py", *flags, *more, **job, **place) for place in places]

    first = tasks("--checkpoint_every_n_steps", 1)
    wait_for_steps(alone, "slurm", first[0])
    for task in first:
        task.send_signal(signal.SIGUSR1)
    for task in first:
        _, errors = task.communicate(timeout=60)
        assert task.returncode == 75, errors
    for task in tasks("--iters", 12):
        _, errors = task.communicate(timeout=120)
        assert task.returncode == 0, errors
    ours, theirs = weights(alone, "slurm"), weights(alone, "one")
    assert read_checkpoint(alone / "checkpoints/slurm/last.ckpt")["global_step"] == 12, (
        "it was stopped before"
    )
    assert all(torch.allclose(ours[key], theirs[key], rtol=1e-7, atol=1e-9) for key in ours)


@pytest.mark.parametrize("first", [2, 1])
def test_going_on_with_another_number_of_processes(alone, images, first):
    """Stopped inside an epoch; with the same global batch the run is the same."""
    name = f"from{first}"
    for processes, iters in ((first, 6), (3 - first, 12)):
        flags = [
            "--exp_name",
            name,
            "--num_processes",
            processes,
            "--batch",
            8 // processes,
            "--iters",
            iters,
        ]
        done = run("train.py", *EXACT, *common(alone, images), *flags)
        assert done.returncode == 0, done.stderr
    ours, theirs = weights(alone, name), weights(alone, "one")
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-7, atol=1e-9)


def wait_for_steps(folder: Path, name: str, process: subprocess.Popen) -> None:
    """Until the run has a checkpoint."""
    end = time.monotonic() + 120
    while not (folder / f"checkpoints/{name}/last.ckpt").exists():
        assert process.poll() is None and time.monotonic() < end, process.communicate()[1]
        time.sleep(0.2)


def workers_of(process: subprocess.Popen) -> list[int]:
    """The other training processes, which `process` started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [
        int(pid) for pid in children if b"LOCAL_RANK=" in Path(f"/proc/{pid}/environ").read_bytes()
    ]


@pytest.mark.parametrize("victim", ["child", "main"])
def test_a_dead_process_ends_the_run_with_a_message(tmp_path, images, victim):
    """Each process has loader workers, which end with it."""
    flags = ["--num_processes", 3, "--num_workers", 2, "--checkpoint_every_n_steps", 1]
    process = start("train.py", *resumable(images, tmp_path, *flags))
    wait_for_steps(tmp_path, "sdn", process)
    children = workers_of(process)
    assert len(children) == 2
    os.kill(children[0] if victim == "child" else process.pid, signal.SIGKILL)
    begin = time.monotonic()
    _, errors = process.communicate(timeout=60)  # until all of them have closed stderr
    assert time.monotonic() - begin < 60
    assert process.returncode == (1 if victim == "child" else -signal.SIGKILL), errors
    assert "Traceback" not in errors, errors
    assert re.search(
        r"lost contact with another process|died \(SIGKILL\)|the main process died", errors
    )
    assert not any(Path(f"/proc/{pid}").exists() and "Z" not in state_of(pid) for pid in children)


def test_a_port_in_use_is_one_line(tmp_path, images):
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        port = str(server.getsockname()[1])
        flags = [*TINY, *common(tmp_path, images), "--num_processes", 2]
        done = run("train.py", *flags, MASTER_PORT=port)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert f"error: port {port}, at which the processes of this run were to meet" in done.stderr


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def test_a_dead_process_ends_a_run_of_torchrun(tmp_path, images):
    flags = [
        *TINY,
        *common(tmp_path, images),
        "--num_processes",
        2,
        "--make_checkpoint",
        "--checkpoint_every_n_steps",
        1,
    ]
    agent = torchrun(0, 1, 2, free_port(), *flags)
    wait_for_steps(tmp_path, "sdn", agent)
    os.kill(workers_of(agent)[1], signal.SIGKILL)
    _, errors = agent.communicate(timeout=60)
    assert agent.returncode != 0
    assert "SIGKILL" in errors or "Signal 9" in errors, "torchrun says which process died"


@pytest.mark.parametrize("whom", ["main", "child"])
def test_one_signal_stops_all_processes_with_a_checkpoint(tmp_path, images, whom):
    """SLURM signals all processes of a job, a user only the one that he knows; both end it."""
    flags = [
        *TINY,
        *common(tmp_path, images),
        "--num_processes",
        2,
        "--make_checkpoint",
        "--checkpoint_every_n_steps",
        1,
    ]
    process = start("train.py", *flags)
    wait_for_steps(tmp_path, "sdn", process)
    os.kill(process.pid if whom == "main" else workers_of(process)[0], signal.SIGUSR1)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    (line,) = [line for line in errors.splitlines() if "stopped after step" in line]
    step = read_checkpoint(tmp_path / "checkpoints/sdn/last.ckpt")["global_step"]
    assert line == f"train.py: stopped after step {step}; --use_checkpoint goes on from there"


def test_damage_that_one_rank_finds_ends_all(tmp_path, images):
    """One line with the fault, no traceback of the others."""
    lmdb = pytest.importorskip("lmdb")
    for split in ("train", "validation"):
        (tmp_path / "ImageNet32").mkdir(exist_ok=True)
        environment = lmdb.open(str(tmp_path / f"ImageNet32/{split}.lmdb"), map_size=2**20)
        with environment, environment.begin(write=True) as transaction:
            for index in range(8):
                transaction.put(str(index).encode(), bytes(3072 if index != 2 else 7))
    done = run(
        "train.py", *TINY, "--root", tmp_path, "--output_dir", tmp_path, "--num_processes", 2
    )
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr, done.stderr
    assert "image 2 has 7 bytes" in done.stderr
