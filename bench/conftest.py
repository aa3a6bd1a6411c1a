"""What every benchmark gets: a clean end, and results that say where they were measured."""

import sys

import environment
import pytest
import rounds


@pytest.fixture(autouse=True)
def clean_end():
    yield
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()  # or the next batch size would be compiled beside the last
    rounds.free_memory()


def pytest_benchmark_update_machine_info(config, machine_info):
    del machine_info["node"]  # results get published
    machine_info["about"] = environment.about(machine_info["cpu"].get("brand_raw", "unknown"))
