"""CUDA graphs of the fused forward: one for each captured batch size, replayed without the cost of its launches."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.select import for_graph
from ..forward import Outputs

RECORDING = threading.RLock()  # CUDA allows one capture at a time in a process

Forward = Callable[[Tensor], Outputs]


class Graphs:
    """The forwards of some batch sizes of images `[C, H, W]`, recorded once.

    Images are copied into a graph's own input and its outputs are cloned, so nothing that a later replay overwrites
    leaves this class. All graphs share one memory pool.
    """

    def __init__(self, forward: Forward, batch_sizes: Iterable[int], image: Tensor, is_interpolated: bool = False):
        """`forward` maps images to outputs; `image [C, H, W]` has their shape, dtype and device; `is_interpolated` if their
        size is not that of the model's positions."""
        self.is_interpolated = is_interpolated
        self._image = image
        self._lock = threading.Lock()
        # Outputs that inference mode made could not be written to outside of it.
        with RECORDING, torch.inference_mode(False), torch.no_grad():
            self._recorder = Recorder(image.device)
            self._graphs = {
                size: self._record(forward, image.new_zeros((size, *image.shape)))
                for size in sorted(batch_sizes, reverse=True)
            }

    def _record(self, forward: Forward, pixels: Tensor) -> "Graph":
        run = functools.partial(forward, pixels)
        return Graph(pixels, *self._recorder.record(run), run)

    def batch_size_for(self, pixel_values: Tensor) -> int | None:
        """The captured batch size that these images run on, or None: the next one that is less than twice theirs."""
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != self._image.shape:
            return None
        size = min((size for size in self._graphs if size >= len(pixel_values)), default=None)
        return size if size is not None and size < 2 * len(pixel_values) else None

    def replay(self, size: int, pixel_values: Tensor) -> Outputs:
        """The forward of `pixel_values [B, C, H, W]` with B ≤ size, cast to the graph's dtype."""
        B = len(pixel_values)
        pixels, replay, outputs, _ = self._graphs[size]
        with self._lock, self._recorder.in_order():
            pixels[:B].copy_(pixel_values)
            replay()
            last_hidden_state, pooler_output = (None if out is None else out[:B].clone() for out in outputs)
        return last_hidden_state, pooler_output


class Graph(NamedTuple):
    pixels: Tensor
    replay: Callable[[], None]
    outputs: Outputs
    run: Callable[[], Outputs]  # holds whatever else the graph reads: it knows addresses only


class Recorder:
    """Records and replays graphs on a CUDA device. Raises RuntimeError on another."""

    def __init__(self, device: torch.device):
        if device.type != "cuda":
            raise RuntimeError(f"CUDA graphs need a CUDA device; the model is on {device}")
        self._device = device
        with torch.cuda.device(device):
            # Its own: torch's default for captures belongs to the device of the process's first one.
            self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()
        self._last_replay = torch.cuda.Event()

    def record(self, run: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        """The function that repeats `run`, and the outputs that it writes."""
        # The outer stream context brings the caller's stream back where a capture fails, which torch's does not.
        caller = torch.cuda.stream(torch.cuda.current_stream(self._device))
        with for_graph(), torch.cuda.device(self._device), caller:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                run()  # compiles kernels, makes libraries' workspaces
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            _clear_workspaces()  # or the graph would use memory that others may free
            # thread_local: what other threads do meanwhile, such as pinning memory, does not end the capture
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                outputs = run()
            _clear_workspaces()  # or others would use the graph's
        return graph.replay, outputs

    @contextlib.contextmanager
    def in_order(self) -> Iterator[None]:
        """Replays on different streams wait for each other: they share buffers."""
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self._last_replay)
            yield
            self._last_replay.record(stream)


def _clear_workspaces() -> None:
    """cuBLAS's, which torch keeps for each stream; as torch's own CUDA graph trees do around a capture."""
    getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)()
