"""For tests of captured forwards: CUDA graphs on a GPU; elsewhere a recorder that repeats the recorded work into the same
output memory, which is all that the rest of the code knows of a graph."""

import contextlib
import weakref

import pytest
from device import DEVICE
from torch.utils._pytree import tree_leaves

from siglip_fast.running import graphs


class FakeRecorder:
    """As `siglip_fast.running.graphs.Recorder`, on any device."""

    recorded, recording = 0, False
    replayed: list[int] = []

    def __init__(self, device):
        pass

    def record(self, run):
        assert not FakeRecorder.recording, "a process can capture one graph at a time"
        FakeRecorder.recording, FakeRecorder.recorded = True, FakeRecorder.recorded + 1
        outputs = run()
        FakeRecorder.recording = False
        reference = weakref.ref(run)  # a graph keeps nothing alive that it reads

        def replay():
            FakeRecorder.replayed.append(len(outputs[0]))
            assert reference() is not None, "the graph reads memory that was freed"
            for static, new in zip(*map(tree_leaves, (outputs, reference()())), strict=True):
                if static is not None:
                    static.copy_(new)

        return replay, outputs

    def in_order(self):
        return contextlib.nullcontext()


def install(monkeypatch: pytest.MonkeyPatch) -> type[FakeRecorder]:
    """Counts what is recorded and replayed, by what is there."""
    real = graphs.Recorder
    FakeRecorder.recorded, FakeRecorder.recording, FakeRecorder.replayed = 0, False, []
    if DEVICE == "cpu":
        monkeypatch.setattr(graphs, "Recorder", FakeRecorder)
        return FakeRecorder

    class Counting(real):
        def record(self, run):
            FakeRecorder.recorded += 1
            replay, outputs = super().record(run)

            def counted():
                FakeRecorder.replayed.append(len(outputs[0]))
                replay()

            return counted, outputs

    monkeypatch.setattr(graphs, "Recorder", Counting)
    return FakeRecorder
