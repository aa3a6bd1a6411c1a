"""What is tuned of models for images of any size: the operations that their forwards run, on inputs that are right."""

import pytest
import torch
import zoo
from device import DEVICE
from gridded_towers import FAMILIES, INSTALLED, tower
from models import drop_in, stock_model
from packed_towers import naflex_inputs, qwen3_vl_inputs, qwen3_vl_tower
from transformers import Siglip2VisionConfig

import siglip_fast
from siglip_fast.backends import vendor
from siglip_fast.backends.choice import DEFAULT, Choice
from siglip_fast.backends.triton import Backend
from siglip_fast.tuning.cache import Operation, bucket
from siglip_fast.tuning.candidates import candidates, run
from siglip_fast.tuning.packed_cases import cases, cases_of, inputs, mix, usual_tokens
from siglip_fast.tuning.verify import Verifier

NAFLEX = Siglip2VisionConfig(**zoo.SIGLIP2_VISION)
QWEN = qwen3_vl_tower().config
GRIDDED = {family: tower(family).config for family in INSTALLED}
CONFIGS = pytest.mark.parametrize("config", [NAFLEX, QWEN], ids=["naflex", "qwen3_vl"])
ALL = pytest.mark.parametrize("config", [NAFLEX, QWEN, *GRIDDED.values()], ids=["naflex", "qwen3_vl", *GRIDDED])


@pytest.mark.parametrize("rows", [1, 2, 3, 17, 282, 283, 1000, 16384])
def test_a_mix_has_all_rows_once(rows):
    of = mix(rows)
    assert of.queries.sum() == rows and (of.queries >= of.keys).all() and (of.keys >= 1).all()
    assert of.queries.max() <= of.padded_to
    assert (of.first[1:] == (of.first + of.queries)[:-1]).all()


def forward(config):
    """Of a model, on a backend that notes what it is asked for."""
    if config is NAFLEX:
        model = drop_in(stock_model(config, "sdpa", "Siglip2VisionModel"), backend="triton", strict=True).to(DEVICE)
        return model, {k: v.to(DEVICE) for k, v in naflex_inputs([(3, 5), (4, 4)], 16).items()}
    for family, own in GRIDDED.items():
        if config is own:
            model = siglip_fast.apply_to(tower(family).to(DEVICE), backend="triton", strict=True)
            return model, {k: v.to(DEVICE) for k, v in FAMILIES[family].call([(1, 4, 4), (1, 2, 6)]).items()}
    model = siglip_fast.apply_to(qwen3_vl_tower().to(DEVICE), backend="triton", strict=True)
    rows, grid_thw = qwen3_vl_inputs([(1, 4, 4), (1, 2, 6)])
    return model, {"hidden_states": rows.to(DEVICE), "grid_thw": grid_thw}


@ALL
@torch.no_grad()
def test_they_are_those_of_a_forward(config, monkeypatch):
    """By name, shape and dtype, or what was tuned would not be found."""
    asked, run_by = set(), Backend._run

    def note(self, name, dims, tensors, *args):
        asked.add(str(Operation(name, dims, torch.float32)))
        return run_by(self, name, dims, tensors, *args)

    monkeypatch.setattr(Backend, "_run", note)
    model, call = forward(config)
    model(**call)
    assert asked == {str(case.operation) for case in cases(config, torch.float32, 28)}


@CONFIGS
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@torch.no_grad()
def test_all_routes_are_right(config, dtype):
    device = torch.device(DEVICE)
    for case in cases(config, dtype, 36):
        args = inputs(case, device)
        verify = Verifier(case, device, args)
        for choice in (DEFAULT, *map(Choice, vendor.routes(case.operation.name))):
            assert verify(lambda case=case, choice=choice, args=args: run(case, choice, args)) is None, (case, choice)


@CONFIGS
def test_a_case_a_bucket(config):
    found = cases_of(config, usual_tokens(config), torch.bfloat16, [1, 2, 3, 4])
    keys = [(case.operation, bucket(case.rows)) for case in found]
    assert len(keys) == len(set(keys))
    assert all(candidates(case)[0] is DEFAULT for case in found)
