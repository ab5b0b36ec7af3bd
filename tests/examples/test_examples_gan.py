"""The GAN of examples/gan.py: its distance and the penalty's second derivatives."""

import pytest
import torch

from examples import gan


def test_distance_of_equal_and_of_shifted_pictures():
    """Patches all shifted by one vector are apart by the mean of its projections' sizes."""
    torch.manual_seed(0)
    x = torch.rand(4, 3, 32, 32)
    assert gan.sliced_wasserstein(x, x[[2, 0, 3, 1]]) == pytest.approx(0, abs=1e-4)
    near, far = (gan.sliced_wasserstein(x, x + shift) for shift in (0.1, 0.2))
    assert far == pytest.approx(2 * near, rel=1e-3) and near > 10


def test_penalty_has_gradients_for_every_part_of_the_sweeps():
    torch.manual_seed(0)
    judge = gan.ARMS["SDN in the discriminator"][1]()
    with torch.no_grad():
        for parameter in judge[4].sdn.project_out_stage.parameters():
            parameter.add_(torch.randn_like(parameter))  # which convert sets to zero
    x = torch.randn(2, 3, 32, 32, requires_grad=True)
    (gradient,) = torch.autograd.grad(judge(x).sum(), x, create_graph=True)
    gradient.square().sum().backward()
    sweeps = {n: p.grad for n, p in judge.named_parameters() if "gru" in n}
    assert len(sweeps) == 16
    assert all(g is not None and g.isfinite().all() and g.any() for g in sweeps.values())


def test_quick_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gan, "scenes", lambda count, seed: torch.rand(count, 3, 32, 32))
    results = tmp_path / "gan.jsonl"
    arm = "SDN in the discriminator"
    flags = ["--quick", "--arms", arm, "--results", str(results)]
    assert gan.main([*flags, "--picture", str(tmp_path / "samples.png")]) == 0
    assert f"| {arm} | 1 |" in capsys.readouterr().out
    assert len(results.read_text().splitlines()) == 1
    assert (tmp_path / "samples.png").exists()
