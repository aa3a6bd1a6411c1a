"""What every test gets: NaN in memory that nobody wrote, weights packed whatever the CPU, nothing logged before."""

import importlib.util
import os
import sys

import pytest
import torch
from device import DEVICE, ON_GPU
from tiers import tier_of

os.environ.pop("PYTEST_ADDOPTS", None)  # is for this pytest, not for those that tests start

torch.backends.cudnn.allow_tf32 = False  # stock's convolution would be good for 1e-3 only

with torch.device("meta"):
    torch.empty(0)  # torch lists the functions that a device context concerns now, and not while one is replaced below


@pytest.hookimpl(tryfirst=True)  # before -m looks at the markers
def pytest_collection_modifyitems(items):
    for item in items:
        # On a GPU, and under ttsem, nothing is interpreted, and whoever runs there wants to see everything.
        if not ON_GPU and (tier := tier_of(item.nodeid)) and not item.get_closest_marker("slow"):
            item.add_marker(tier)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    try:
        return (yield)
    except Exception as error:
        # Triton 3.6's interpreter calls int() on arrays of one element, which NumPy 2.5 refuses; later ones do not.
        if "only 0-dimensional arrays can be converted to Python scalars" in str(error) and _is_triton_36():
            pytest.skip("Triton 3.6 cannot interpret this kernel's loops beside NumPy 2.5")
        raise


def _is_triton_36() -> bool:
    import triton

    return triton.__version__.startswith("3.6.") and triton.knobs.runtime.interpret


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture(params=["torch", "cpu", "cpu-avx2", "triton"])
def backend(request, monkeypatch) -> str:
    name, _, isa = request.param.partition("-")
    if isa:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: isa.upper())
    return name


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture(autouse=True)
def interpreter_has_no_bf16(request):
    values = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if not ON_GPU and values.get("backend") == "triton" and values.get("dtype") == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bf16 wrongly: run under ttsem or on a GPU")


@pytest.fixture(autouse=True)
def nothing_was_logged_before():
    """A reason is logged once a process; a test should not depend on those before it."""
    if "siglip_fast.models.base" in sys.modules:
        sys.modules["siglip_fast.models.base"]._logged.clear()


@pytest.fixture(autouse=True)
def no_kernels_ahead(monkeypatch):
    """Each test has shapes of its own: it would compile, and under ttsem run, the tiles of all batch sizes of each."""
    if ON_GPU and importlib.util.find_spec("triton"):
        monkeypatch.setattr("siglip_fast.backends.ahead.applies", lambda tensor: False)


@pytest.fixture(autouse=True)
def no_races(monkeypatch):
    """They would time the shapes of each test, choose by it what the test runs, and write into the user's cache."""
    if ON_GPU and importlib.util.find_spec("triton"):
        monkeypatch.setattr("siglip_fast.tuning.race.applies", lambda tensor: False)


@pytest.fixture(autouse=True)
def packs_weights_everywhere(monkeypatch):
    """The cpu backend packs weights for the CPU it is on; it has to be right wherever oneDNN is."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")


@pytest.fixture(autouse=True)
def poison_empty(monkeypatch):
    """`torch.empty` returns NaN, so that an output element which a kernel forgets fails its test."""

    def poisoned(make):
        def wrapper(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return wrapper

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


def pytest_terminal_summary(terminalreporter):
    reports = [
        (outcome, report)
        for outcome in ("passed", "failed")
        for report in terminalreporter.getreports(outcome)
        if "test_mutants.py::test_killed" in report.nodeid
    ]
    if reports:
        killed = sum(outcome == "passed" for outcome, _ in reports)
        terminalreporter.write_line(f"{killed} of {len(reports)} mutants killed")
