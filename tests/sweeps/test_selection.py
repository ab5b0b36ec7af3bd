"""Which backend is taken: candidates that are wrong are struck out, the fastest of the others is
remembered. The CPU stands for a GPU here."""

import json
import os
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from helpers import REPOSITORY

from lib.nn import SDNLayer
from lib.sweeps import checking, graphs, lines_backend, selection, torch_backend

LINES = torch.zeros(4, 5, 3, 6)


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """No choices, and a cache file of the test's own."""
    monkeypatch.setattr(selection, "_choices", {})
    monkeypatch.setattr(selection, "_verdicts", {})
    monkeypatch.setattr(selection, "ON_CPU", ())  # a CPU is measured as a GPU is
    monkeypatch.setenv("SDN_CACHE", str(tmp_path / "cache" / "sweeps.json"))
    monkeypatch.delenv("SDN_BACKEND", raising=False)
    return tmp_path / "cache" / "sweeps.json"


@pytest.fixture
def times(monkeypatch):
    """What a measurement finds, by candidate; and how often something was measured."""
    measured = {"lines": 2.0, "torch": 3.0}
    calls = []

    def measure(names, lines, product_dtype):
        calls.append(names)
        return {name: measured[name] for name in names}

    monkeypatch.setattr(selection, "_measure", measure)
    return SimpleNamespace(measured=measured, calls=calls)


def resolve(lines=LINES):
    return selection.resolve("auto", lines, torch.float32)


def test_the_fastest_is_taken_and_remembered(times, fresh):
    assert resolve() == "lines" and resolve() == "lines"
    assert times.calls == [["lines", "torch"]]
    (entry,) = json.loads(fresh.read_text()).values()
    assert entry == {"backend": "lines", "milliseconds": times.measured}
    times.measured["lines"] = 4.0
    assert resolve() == "lines", "in this process a choice stays"
    assert resolve(LINES[:3]) == "torch", "another shape is another choice"
    assert len(json.loads(fresh.read_text())) == 2
    selection._choices.clear()
    assert resolve() == "lines", "another process reads what was measured"
    assert len(times.calls) == 2


def test_measurements_are_times_of_real_sweeps(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: None)
    found = selection._measure(["lines", "torch"], LINES, torch.float32)
    assert found.keys() == {"lines", "torch"} and min(found.values()) > 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_layer_chooses_in_its_first_pass(times, mode, recwarn):
    """Inside of the operator, where autograd does not record."""
    layer, x = SDNLayer(2, 3, 4, [0, 3]), torch.randn(2, 2, 4, 5)
    with mode():
        y = layer(x)
    assert {choice.backend for choice in selection._choices.values()} == {"lines"}
    assert not recwarn.list
    torch.testing.assert_close(y, layer(x))
    layer(x).sum().backward()


@pytest.mark.parametrize(
    "content",
    ["", "{", "[1, 2]", '{"a": 3}', "\x00\xff", None],
    ids=["empty", "cut off", "a list", "strange", "bytes", "a folder"],
)
def test_a_damaged_cache_is_measured_again(times, fresh, content):
    fresh.parent.mkdir()
    fresh.mkdir() if content is None else fresh.write_text(content)
    assert resolve() == "lines" and len(times.calls) == 1


@pytest.mark.parametrize("entry", [7, {"backend": "cluster"}, {"backend": "magic"}, {}], ids=str)
def test_entries_that_cannot_be_are_measured_again(times, fresh, entry):
    fresh.parent.mkdir()
    key = selection.Case.of(LINES, torch.float32).key()
    fresh.write_text(json.dumps({key: entry}))
    assert resolve() == "lines" and len(times.calls) == 1


@pytest.mark.parametrize("where", ["", "/proc/nothing/sweeps.json"])
def test_without_a_place_for_the_cache(times, monkeypatch, where):
    monkeypatch.setenv("SDN_CACHE", where)
    assert resolve() == "lines"


def test_no_home(times, monkeypatch):
    for name in ("SDN_CACHE", "HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # an unknown user
    assert selection.cache_file() is None
    assert resolve() == "lines"


def stale_image(output):
    output = output.clone()
    output[:, :, -1] = 0
    return output


def wrong_edge(output):
    output = output.clone()
    output[:, 0] *= 1.5
    return output


def not_a_number(output):
    output = output.clone()
    output[-1, -1, -1, -1] = float("nan")
    return output


def unwritten(output):
    """A row that nobody wrote: memory is poisoned while a candidate is checked."""
    result = torch.empty_like(output)
    result[1:] = output[1:]
    return result


def fails(output):
    raise RuntimeError("of the test\nand more")


@pytest.mark.parametrize("broken", [stale_image, wrong_edge, not_a_number, unwritten, fails])
@pytest.mark.parametrize("part", ["sweep", "sweep_backward"])
def test_a_wrong_candidate_is_struck_out_with_one_warning(monkeypatch, times, part, broken):
    right = getattr(lines_backend, part)

    def wrong(*arguments):
        result = right(*arguments)
        return broken(result) if part == "sweep" else (broken(result[0]), *result[1:])

    monkeypatch.setattr(lines_backend, part, wrong)
    what = "of the test" if broken is fails else "differs from the reference"
    with pytest.warns(UserWarning, match=f"do not use the backend 'lines'.*{what}") as noted:
        assert resolve() == "torch"
        assert resolve(LINES[:2]) == "torch"
    assert len(noted) == 1 and times.calls == []


def test_a_wrong_gradient_of_a_bias_is_found(monkeypatch, times):
    right = lines_backend.sweep_backward

    def wrong(*arguments):
        *gradients, bias = right(*arguments)
        return *gradients, bias.roll(1)

    monkeypatch.setattr(lines_backend, "sweep_backward", wrong)
    with pytest.warns(UserWarning, match="grad bias_hh"):
        assert resolve() == "torch"


def test_one_wrong_image_in_many_is_found_by_its_row():
    """By the norm of all it would pass for rounding to bfloat16."""
    expected = torch.randn(8, 8, 128, 16, dtype=torch.float64)
    found = expected.clone()
    found[3, :, 77] *= 0.7
    whole, worst = checking.errors(found, expected)
    assert whole < checking.TOLERANCES[torch.bfloat16][0]
    assert worst > checking.TOLERANCES[torch.bfloat16][1]


def test_without_a_right_candidate_there_is_the_reference(monkeypatch):
    for module in (lines_backend, torch_backend):
        monkeypatch.setattr(module, "sweep", lambda lines, *rest: lines * 0)
    with pytest.warns(UserWarning):
        assert resolve() == "reference"
        layer = SDNLayer(2, 3, 4, [0, 3])
        reference = SDNLayer(2, 3, 4, [0, 3], backend="reference")
        reference.load_state_dict(layer.state_dict())
        x = torch.randn(2, 2, 4, 5)
        found = [torch.autograd.grad(e(x).sum(), list(e.parameters())) for e in (layer, reference)]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_nothing_is_measured_inside_a_capture(monkeypatch, times):
    monkeypatch.setattr(graphs, "is_capturing", lambda device: True)
    assert resolve() == "torch" and times.calls == [] and not selection._choices
    monkeypatch.setattr(graphs, "is_capturing", lambda device: False)
    assert resolve() == "lines"
    monkeypatch.setattr(graphs, "is_capturing", lambda device: True)
    assert resolve() == "lines"
    assert resolve(LINES[:2]) == "lines", "checked, though not measured on this shape"


def test_without_memory_the_first_right_one_is_taken(monkeypatch):
    def out_of_memory(*arguments):
        raise torch.OutOfMemoryError("of the test")

    monkeypatch.setattr(selection, "_seconds", out_of_memory)
    assert resolve() == "lines"


def test_the_environment_takes_the_place_of_auto(monkeypatch, times):
    for name in ("torch", "reference", "lines"):
        monkeypatch.setenv("SDN_BACKEND", name)
        assert resolve() == name
    assert selection.resolve("torch", LINES, torch.float32) == "torch"
    monkeypatch.setenv("SDN_BACKEND", "magic")
    with pytest.raises(ValueError, match="SDN_BACKEND must be auto, reference, .*; got 'magic'"):
        resolve()
    assert times.calls == []


def test_a_backend_that_cannot_run_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(lines_backend, "unsupported", lambda *arguments: "of the test")
    with pytest.raises(RuntimeError, match="'lines' cannot run: of the test; 'torch' and"):
        selection.resolve("lines", LINES, torch.float32)


def test_a_cpu_is_not_measured(monkeypatch, times):
    monkeypatch.setattr(selection, "ON_CPU", ("cpu", "meta"))
    assert resolve() == "torch" and times.calls == []


def test_processes_agree(times):
    """The second adopts the first one's choices, on its own device."""
    resolve()
    shared = selection.shared_choices()
    selection._choices.clear()
    times.measured["lines"] = 9.0
    selection.adopt(shared, torch.device("cpu"))
    assert resolve() == "lines" and len(times.calls) == 1
    (choice,) = selection.choices().values()
    assert choice["backend"] == "lines" and choice["reason"] == "as the first process"


def test_the_report_says_what_is_chosen_and_why(times, monkeypatch):
    broken = ModuleType("broken")
    broken.unsupported = lambda *arguments: "of the test"
    resolve()
    module = selection.backend_module
    monkeypatch.setattr(
        selection, "backend_module", lambda name: broken if name == "torch" else module(name)
    )
    text = selection.report("cpu")
    assert "lines: agrees with the reference" in text and "torch: of the test" in text
    assert "4x5x4x6: lines, the fastest (lines 2.00 ms, torch 3.00 ms)" in text


def test_the_report_as_a_command():
    command = [sys.executable, "-m", "lib.sweeps", "cpu"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "torch: agrees with the reference" in done.stdout
