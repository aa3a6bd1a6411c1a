"""Derived weights are never served stale, and never show."""

import copy

import pytest
import torch
from models import TINY, drop_in, stock_model
from torch import nn
from transformers import SiglipVisionConfig

from siglip_fast import SiglipVisionModel


def config():
    return SiglipVisionConfig(**TINY)


@pytest.fixture
def pixels():
    torch.manual_seed(1)
    return torch.randn(2, 3, 24, 24)


def layers(model):
    return getattr(model, "vision_model", model).encoder.layers


def tower(model):
    return getattr(model, "vision_model", model)


def load_state_dict(model):
    torch.manual_seed(5)
    model.load_state_dict({k: v + 0.1 * torch.randn_like(v) for k, v in model.state_dict().items()})


def load_state_dict_by_assignment(model):
    torch.manual_seed(5)
    model.load_state_dict({k: v + 0.1 * torch.randn_like(v) for k, v in model.state_dict().items()}, assign=True)


def optimizer_step(model):
    torch.manual_seed(5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    with torch.enable_grad():
        model(torch.randn(2, 3, 24, 24)).pooler_output.square().sum().backward()
    optimizer.step()
    model.zero_grad()


def edit_in_place(model):
    layers(model)[0].layer_norm1.weight.mul_(3)


def edit_probe(model):
    tower(model).head.probe.add_(1)


def edit_key_projection(model):
    layers(model)[1].self_attn.k_proj.weight[3] = 2


def replace_parameter(model):
    layers(model)[0].mlp.fc1.bias = nn.Parameter(torch.ones(100))


def replace_data(model):
    layers(model)[0].mlp.fc1.weight.data = torch.ones(100, 64) * 0.01


def replace_data_twice(model):
    """The second tensor may lie where the original did."""
    weight = layers(model)[0].mlp.fc1.weight
    weight.data = torch.ones(100, 64) * 0.02
    weight.data = torch.ones(100, 64) * 0.01


def replace_module(model):
    torch.manual_seed(5)
    layers(model)[1].self_attn.q_proj = nn.Linear(64, 64)


def replace_module_of_the_tower(model):
    torch.manual_seed(5)
    tower(model).post_layernorm = nn.LayerNorm(64)


def replace_children(model):
    mlp = layers(model)[0].mlp
    torch.manual_seed(5)
    mlp._modules = {**mlp._modules, "fc1": nn.Linear(64, 100)}


def replace_parameters(model):
    module = layers(model)[0].mlp.fc1
    module._parameters = {name: nn.Parameter(2 * p) for name, p in module._parameters.items()}


def set_state(model):
    mlp = layers(model)[0].mlp
    other = copy.deepcopy(mlp)
    other.fc1.weight.mul_(3)
    mlp.__setstate__(other.__dict__)


def drop_layer(model):
    tower(model).encoder.layers = layers(model)[:1]


def change_eps(model):
    layers(model)[0].layer_norm2.eps = 0.5


def to_float16_and_back(model):
    model.to(torch.float16).to(torch.float32)


def edit_in_training(model):
    """Even an edit that torch does not count, if it falls between train() and eval()."""
    model.train()
    layers(model)[0].mlp.fc1.weight.data.mul_(2)
    model.eval()


CHANGES = [
    load_state_dict,
    load_state_dict_by_assignment,
    optimizer_step,
    edit_in_place,
    edit_probe,
    edit_key_projection,
    replace_parameter,
    replace_data,
    replace_data_twice,
    replace_module,
    replace_module_of_the_tower,
    replace_children,
    replace_parameters,
    set_state,
    drop_layer,
    change_eps,
    to_float16_and_back,
    edit_in_training,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@torch.no_grad()
def test_changed_weights_are_seen(change, pixels):
    stock = stock_model(config())
    ours = drop_in(stock)
    before = ours(pixels).pooler_output
    change(stock)
    change(ours)
    assert ours.why_not(pixels) is None
    after = ours(pixels)
    assert not torch.equal(after.pooler_output, before)
    torch.testing.assert_close(after[:], stock(pixels)[:], atol=1e-4, rtol=0)


@torch.no_grad()
def test_unchanged_weights_are_derived_once(pixels):
    ours = drop_in(stock_model(config()))
    ours(pixels)
    derived = ours._derived[None]
    ours.eval().requires_grad_(False)
    ours(pixels)
    assert ours._derived.get(None) is derived


@torch.no_grad()
def test_casting_drops_the_old_copies(pixels):
    ours = drop_in(stock_model(config()))
    ours(pixels)
    ours.to(torch.bfloat16)
    assert not ours._derived
    assert ours(pixels).last_hidden_state.dtype == torch.bfloat16


@torch.no_grad()
def test_parameters_of_any_layout(pixels, backend, device):
    """Channels-last convolution, transposed and strided matrices: read by index, not by memory."""
    stock = stock_model(config()).to(device)
    ours = drop_in(stock, backend=backend).to(device, memory_format=torch.channels_last)
    for parameter in ours.parameters():
        if parameter.ndim == 2:
            parameter.data = parameter.data.T.contiguous().T
        elif parameter.ndim == 1:
            parameter.data = torch.stack([parameter.data, parameter.data + 1], dim=1)[:, 0]
    assert ours.why_not(pixels.to(device)) is None
    torch.testing.assert_close(ours(pixels.to(device))[:], stock(pixels.to(device))[:], atol=1e-4, rtol=0)


@torch.no_grad()
def test_invisible(pixels):
    ours = drop_in(stock_model(config()))
    names = set(ours.state_dict()), dict(ours.named_parameters()).keys(), dict(ours.named_buffers()).keys()
    ours(pixels)
    assert names == (
        set(ours.state_dict()), dict(ours.named_parameters()).keys(), dict(ours.named_buffers()).keys()
    )  # fmt: skip


def test_made_under_inference_mode_and_used_outside(pixels):
    ours = drop_in(stock_model(config())).requires_grad_(False)
    with torch.inference_mode():
        inside = ours(pixels).pooler_output
    assert torch.equal(ours(pixels).pooler_output, inside)


def test_parameters_made_under_inference_mode_delegate(pixels):
    """They have no version counter, so an edit could not be seen."""
    with torch.inference_mode():
        ours = SiglipVisionModel(config()).eval()
        assert "inference_mode" in ours.why_not(pixels)
        before = ours(pixels).pooler_output
        layers(ours)[0].mlp.fc1.weight.mul_(3)
        assert not torch.equal(ours(pixels).pooler_output, before)


@pytest.mark.parametrize("gamma", [6e4, 1e-4], ids=["overflow", "underflow"])
@torch.no_grad()
def test_folding_that_leaves_the_range_of_float16_delegates(gamma, pixels):
    stock = stock_model(config())
    layers(stock)[0].layer_norm1.weight.fill_(gamma)
    layers(stock)[0].self_attn.q_proj.weight[0, 0] = 2
    ours = drop_in(stock.half())
    assert "leaves float16's range" in ours.why_not(pixels)
    assert torch.equal(ours(pixels).pooler_output.isnan(), stock(pixels).pooler_output.isnan())
