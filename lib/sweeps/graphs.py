"""Sweeps captured as CUDA graphs and replayed.

A sweep over a small map is some hundred kernels of microseconds each, which take longer to launch
from Python than to run. Captured once for a shape, with its inputs in buffers of the graph's own,
it is one launch: inputs are copied in, the graph is replayed, results are copied out. All layers of
one shape share a graph, as their weights are inputs, too.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Rows times channels of a sweep that is captured. Larger ones spend their time in kernels, and
# their copies would take much memory.
LARGEST = 2**25
MOST_GRAPHS = 64  # the one that was not used for longest makes room

Function = Callable[..., tuple[Tensor, ...]]
_graphs: OrderedDict[tuple, Recording] = OrderedDict()
_pools: dict[tuple[int, int], tuple[int, int]] = {}  # by device and stream
_lock = threading.Lock()  # data-parallel threads, and autograd's, share the graphs


class Recording:
    """A function of tensors, recorded once and run again on other values.

    Arguments:
        function: Takes tensors and options, and returns tensors that it has allocated itself.
        tensors: Values to record it with; later ones have their shapes, strides and types.
        options: Arguments that stay the same.
        record: Runs a function once and returns a callable that runs it again on the same memory.
    """

    def __init__(
        self,
        function: Function,
        tensors: Sequence[Tensor],
        options: Sequence[object],
        record: Callable[[Callable[[], None]], Callable[[], None]],
    ):
        self.inputs = [torch.empty_like(tensor).copy_(tensor) for tensor in tensors]
        self.results: tuple[Tensor, ...] = ()

        def run() -> None:
            self.results = function(*self.inputs, *options)

        self._run_again = record(run)

    def __call__(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        for own, given in zip(self.inputs, tensors, strict=True):
            own.copy_(given)
        self._run_again()
        return tuple(torch.empty_like(result).copy_(result) for result in self.results)


def captured(function: Callable[[], None]) -> Callable[[], None]:
    """Captures a function as a CUDA graph and returns what replays it.

    The graphs of a stream share the memory of their intermediate results, as they run one after
    another.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()  # compiles kernels and loads libraries, which a capture must not
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.current_stream().synchronize()
    here = (torch.cuda.current_device(), torch.cuda.current_stream().cuda_stream)
    if here not in _pools:
        _pools[here] = torch.cuda.graph_pool_handle()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=_pools[here], capture_error_mode="thread_local"):
        function()
    return graph.replay


def is_small(lines: Tensor) -> bool:
    """Whether a sweep over such lines is to be replayed."""
    return 0 < lines.numel() <= LARGEST


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured, by whomever."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def replays(lines: Tensor) -> bool:
    """Whether a sweep over such lines is replayed here and now: on a CUDA device, if it is small,
    and outside of any other capture."""
    return lines.is_cuda and is_small(lines) and not is_capturing(lines.device)


def replayed(
    function: Function, tensors: Sequence[Tensor], options: Sequence[object]
) -> tuple[Tensor, ...]:
    """`function(*tensors, *options)`, by a graph where :func:`replays` says so."""
    if not replays(tensors[0]):
        return function(*tensors, *options)
    device = tensors[0].device
    # Buffers made in inference mode could not be written outside of it.
    with _lock, torch.cuda.device_of(tensors[0]), torch.inference_mode(False), torch.no_grad():
        stream = torch.cuda.current_stream().cuda_stream if device.type == "cuda" else 0
        layouts = tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors)
        key = (function, device, stream, layouts, tuple(options), _precision())
        recording = _graphs.pop(key, None)
        if recording is None:
            recording = Recording(function, tensors, options, captured)
            if len(_graphs) >= MOST_GRAPHS:
                torch.cuda.synchronize()  # its memory may still be in use
                _graphs.popitem(last=False)
        _graphs[key] = recording
        return recording(tensors)


def _precision() -> tuple[object, ...]:
    """Settings of torch that a captured product keeps."""
    matmul = torch.backends.cuda.matmul
    return (getattr(matmul, "fp32_precision", None), matmul.allow_bf16_reduced_precision_reduction)
