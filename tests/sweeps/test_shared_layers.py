"""A layer whose gradients or parameters are shared by several processes: DDP and FSDP2."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lib.nn import ResSDNLayer, SDNLayer

PROCESSES = 2


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        SDNLayer(2, 4, 3, padding=1, dirs=[0, 3]), nn.ReLU(), ResSDNLayer(4, 3, dirs=[1])
    ).double()


def loss(network, x):
    return network(x).square().mean()


def compare(rank: int, folder: str) -> None:
    """In one of the processes: its part of a batch gives the output that the plain network gives,
    and all parts together its gradients; what was divided can be stored."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES
    )
    plain, x = network(), torch.randn(4, 2, 5, 4, dtype=torch.float64)
    loss(plain, x).backward()
    own = x.chunk(PROCESSES)[rank]

    replicated = nn.parallel.DistributedDataParallel(network())
    torch.testing.assert_close(replicated(own), plain(own))
    loss(replicated, own).backward()
    for one, other in zip(replicated.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)

    from torch.distributed.fsdp import fully_shard

    sharded = network()
    mesh = dist.init_device_mesh("cpu", (PROCESSES,))
    for layer in (sharded[0], sharded[2], sharded):
        fully_shard(layer, mesh=mesh)
    torch.testing.assert_close(sharded(own), plain(own))
    loss(sharded, own).backward()
    for one, other in zip(sharded.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad.full_tensor(), other.grad)
    whole = {name: each.full_tensor() for name, each in sharded.state_dict().items()}
    for name, expected in plain.state_dict().items():
        assert torch.equal(whole.pop(name), expected), name
    assert not whole
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_replicated_and_sharded_layers_train_as_plain_ones(tmp_path):
    torch.multiprocessing.spawn(compare, (str(tmp_path),), PROCESSES)
