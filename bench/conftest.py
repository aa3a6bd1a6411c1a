"""What every benchmark gets: a clean start, and results that say where they were measured."""

import environment
import pytest
import rounds
import torch


@pytest.fixture(autouse=True)
def clean_start():
    yield
    torch._dynamo.reset()
    rounds.free_memory()


def pytest_benchmark_update_machine_info(config, machine_info):
    del machine_info["node"]  # results get published
    machine_info["about"] = environment.about(machine_info["cpu"].get("brand_raw", "unknown"))
