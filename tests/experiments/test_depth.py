"""The study of deep stacks: that it runs, and what a row says."""

import json

from experiments import depth


def test_rows_and_file(tmp_path):
    output = tmp_path / "depth.json"
    flags = ["--depths", "1", "2", "--directions", "2", "--seeds", "0", "--steps", "3"]
    depth.main([*flags, "--output", str(output)])
    result = json.loads(output.read_text())
    assert result["command"].startswith("python -m experiments.depth --depths 1 2")
    cases = [(row["layer"], row["depth"], row["init"]) for row in result["rows"]]
    assert len(set(cases)) == len(cases) == 2 + 2 * 2 * 2
    for row in result["rows"]:
        assert row["error"] > 0
        assert (row["first_over_last_gradient"] == 1) == (row["depth"] == 1)


def test_what_the_stack_shall_learn_can_be_learned():
    """A single layer with a sweep from left to right learns the shift, a 3x3 convolution cannot."""
    sweep = depth.run("SDNLayer", 1, 1, "paper", seed=0, steps=150)["error"]
    assert sweep < 0.1 < depth.run("conv", 1, 0, "", seed=0, steps=150)["error"]
