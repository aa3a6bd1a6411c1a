"""transformers' own tests of SiglipVisionModel, run on the stock class and on ours: the outcomes must be the same.

The wheel of transformers has no tests. Check out the installed version's tag and name its folder:

    TRANSFORMERS_TESTS=~/transformers pytest -m slow tests/models/test_model_tester_mixin.py

`RUN_SLOW=1` adds what transformers itself marks slow. Its tests need the package `parameterized`.
"""

import importlib
import os
import sys
import types
import unittest

import pytest
import torch
import transformers

import siglip_fast

CHECKOUT = os.environ.get("TRANSFORMERS_TESTS")
NAMES = ["test_model"]
if CHECKOUT:
    # Their package `tests` under a name of its own: pytest may have imported this folder as `tests`.
    package = types.ModuleType("transformers_tests")
    package.__path__ = [os.path.join(os.path.expanduser(CHECKOUT), "tests")]
    sys.modules[package.__name__] = package
    theirs = importlib.import_module("transformers_tests.models.siglip.test_modeling_siglip")
    NAMES = unittest.TestLoader().getTestCaseNames(theirs.SiglipVisionModelTest)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHECKOUT, reason="TRANSFORMERS_TESTS names no checkout of transformers' source"),
]


def outcome(name: str, model_class: type, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """("passed" | "skipped" | "failed", why) of transformers' test `name` with `model_class` for the model."""
    # For their model tester, and for the tests that name the class.
    monkeypatch.setattr(theirs, "SiglipVisionModel", model_class)
    case = type("Test", (theirs.SiglipVisionModelTest,), {"all_model_classes": (model_class,)})(name)
    result = unittest.TestResult()
    transformers.set_seed(0)
    case.run(result)
    if problems := result.errors + result.failures:
        return "failed", problems[0][1]
    return ("skipped", result.skipped[0][1]) if result.skipped else ("passed", "")


@pytest.mark.parametrize("name", NAMES)
def test_same_outcome_as_stock(name, monkeypatch):
    stock, why = outcome(name, transformers.SiglipVisionModel, monkeypatch)
    if stock == "failed":
        pytest.skip(f"fails on the stock class: {why.splitlines()[-1]}")
    ours, problem = outcome(name, siglip_fast.SiglipVisionModel, monkeypatch)
    assert ours == stock, problem or why
    if stock == "skipped":
        pytest.skip(f"skipped on both: {why}")


def test_their_inputs_take_the_fused_path():
    """Most of their tests ask for hidden states, which the stock forward serves: this one is about ours."""
    config, inputs = theirs.SiglipVisionModelTester(None).prepare_config_and_inputs_for_common()
    stock = transformers.SiglipVisionModel(config).eval().to(theirs.torch_device)
    ours = siglip_fast.SiglipVisionModel(config).eval().to(theirs.torch_device)
    ours.load_state_dict(stock.state_dict())
    with torch.no_grad():
        assert ours.why_not(**inputs) is None
        ours, stock = ours(**inputs).to_tuple(), stock(**inputs).to_tuple()
    torch.testing.assert_close(ours, stock, rtol=1e-3, atol=1e-3)
