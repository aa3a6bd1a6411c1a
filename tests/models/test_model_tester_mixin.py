"""transformers' own tests of our drop-ins' classes, run on the stock class and on ours: the outcomes must be the same.

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
DROP_INS = {"siglip": "SiglipVisionModel", "siglip2": "Siglip2VisionModel"}
CASES = [(part, "test_model") for part in DROP_INS]
if CHECKOUT:
    # Their package `tests` under a name of its own: pytest may have imported this folder as `tests`.
    package = types.ModuleType("transformers_tests")
    package.__path__ = [os.path.join(os.path.expanduser(CHECKOUT), "tests")]
    sys.modules[package.__name__] = package
    theirs = {
        part: importlib.import_module(f"transformers_tests.models.{part}.test_modeling_{part}") for part in DROP_INS
    }
    CASES = [
        (part, name)
        for part, model in DROP_INS.items()
        for name in unittest.TestLoader().getTestCaseNames(getattr(theirs[part], f"{model}Test"))
    ]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHECKOUT, reason="TRANSFORMERS_TESTS names no checkout of transformers' source"),
]


@pytest.fixture(autouse=True)
def padded_by_zeros(monkeypatch):
    """As NaFlex's processor pads images. Theirs are padded by noise, which the drop-in leaves to stock's code."""
    tester = theirs["siglip2"].Siglip2VisionModelTester
    prepare = tester.prepare_config_and_inputs

    def padded(self):
        config, pixel_values, mask, shapes = prepare(self)
        return config, pixel_values * mask[..., None], mask, shapes

    monkeypatch.setattr(tester, "prepare_config_and_inputs", padded)


def outcome(part: str, name: str, model_class: type, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """("passed" | "skipped" | "failed", why) of transformers' test `name` with `model_class` for the model."""
    # For their model tester, and for the tests that name the class.
    monkeypatch.setattr(theirs[part], DROP_INS[part], model_class)
    test = getattr(theirs[part], f"{DROP_INS[part]}Test")
    case = type("Test", (test,), {"all_model_classes": (model_class,)})(name)
    result = unittest.TestResult()
    transformers.set_seed(0)
    case.run(result)
    if problems := result.errors + result.failures:
        return "failed", problems[0][1]
    return ("skipped", result.skipped[0][1]) if result.skipped else ("passed", "")


@pytest.mark.parametrize("part, name", CASES)
def test_same_outcome_as_stock(part, name, monkeypatch):
    stock, why = outcome(part, name, getattr(transformers, DROP_INS[part]), monkeypatch)
    if stock == "failed":
        pytest.skip(f"fails on the stock class: {why.splitlines()[-1]}")
    ours, problem = outcome(part, name, getattr(siglip_fast, DROP_INS[part]), monkeypatch)
    assert ours == stock, problem or why
    if stock == "skipped":
        pytest.skip(f"skipped on both: {why}")


@pytest.mark.parametrize("part", DROP_INS)
def test_their_inputs_take_the_fused_path(part):
    """Many of their tests ask for what the stock forward serves: this one is about ours."""
    stock_class, our_class = (getattr(module, DROP_INS[part]) for module in (transformers, siglip_fast))
    tester = getattr(theirs[part], f"{DROP_INS[part]}Tester")(None)
    config, inputs = tester.prepare_config_and_inputs_for_common()
    stock = stock_class(config).eval().to(theirs[part].torch_device)
    ours = our_class(config).eval().to(theirs[part].torch_device)
    ours.load_state_dict(stock.state_dict())
    with torch.no_grad():
        assert ours.why_not(**inputs) is None
        ours, stock = ours(**inputs).to_tuple(), stock(**inputs).to_tuple()
    torch.testing.assert_close(ours, stock, rtol=1e-3, atol=1e-3)
