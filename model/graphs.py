"""A decoding step as one launch: recorded as a CUDA graph, compared once with plain calls, and never required.

A token of a 3B model takes two thousand small kernels, and the host needs longer to launch them than the GPU to run
them. A CUDA graph launches all of them together. It replays the same kernels on the same addresses, so the step has to
keep everything that changes in buffers that stay where they are.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TOLERANCE = 0.02  # of the largest logit: a replay may take other kernels of cuBLAS, which round bf16 differently


@dataclass
class Graphs:
    """What this process knows about its graphs."""

    usable: bool = True
    compared: bool = False  # whether a replay has been compared with plain calls

    def give_up(self, reason: str) -> None:
        """Uses plain calls from now on."""
        self.usable = False
        print(f"warning: drawing without CUDA graphs, which is slower: {reason}", file=sys.stderr)


GRAPHS = Graphs()


def record_cuda_graph(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """The function that replays the step, and the tensor in which the replayed step leaves its result."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    # torch.cuda.graph would empty the allocator's cache each time. "thread_local": another thread prepares prompts.
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            result = step()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay, result


class GraphedStep:
    """A step that runs plainly the first time, and is recorded then and replayed from there on.

    `forget` has to be called when a buffer that the step reads or writes moves.
    """

    def __init__(
        self,
        step: Callable[[], Tensor],  # returns what is compared
        counters: Callable[[], list[Tensor]],  # the buffers in which a repeated step leaves something else
        record: Callable = record_cuda_graph,
    ):
        self.step, self.counters, self.record = step, counters, record
        self.replay: Callable[[], None] | None = None

    def forget(self) -> None:
        """Forgets what was recorded."""
        self.replay = None

    def __call__(self) -> None:
        """Takes one step."""
        if self.replay is not None:
            self.replay()
            return
        before = [] if GRAPHS.compared else _copies(self.counters())
        expected = self.step()  # also a warm-up: kernels that run for the first time cannot be recorded
        if not GRAPHS.usable:
            return
        try:
            self.replay, result = self.record(self.step)
        except RuntimeError as error:
            GRAPHS.give_up(f"the step could not be recorded ({str(error).splitlines()[0]})")
            return
        if not GRAPHS.compared:
            self._compare(before, expected, result)

    def _compare(self, before: list[Tensor], expected: Tensor, result: Tensor) -> None:
        """Repeats the step by a replay. If the two differ, restores what the plain call left, and gives graphs up."""
        counters, expected = self.counters(), expected.clone()
        after = _copies(counters)
        _restore(counters, before)
        self.replay()
        difference, largest = float((result - expected).abs().max()), float(expected.abs().max())
        GRAPHS.compared = True
        if not difference <= TOLERANCE * largest:  # so that NaN counts as a difference
            _restore(counters, after)
            self.replay = None
            GRAPHS.give_up(f"replayed logits are off by {difference:.3g} where the largest is {largest:.3g}")


def _copies(buffers: Sequence[Tensor]) -> list[Tensor]:
    return [buffer.clone() for buffer in buffers]


def _restore(buffers: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for buffer, value in zip(buffers, values, strict=True):
        buffer.copy_(value)
