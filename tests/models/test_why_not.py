"""Right or delegated: everything that the fused path does not compute runs as stock's, for a reason that is told."""

import copy
import logging
import re

import pytest
import torch
import transformers
from models import TINY, drop_in, stock_model
from torch import nn
from transformers import SiglipVisionConfig


@pytest.fixture
def stock():
    return stock_model(SiglipVisionConfig(**TINY), "sdpa")


@pytest.fixture
def pixels():
    torch.manual_seed(1)
    return torch.randn(2, 3, 24, 24)


def tower(model):
    return getattr(model, "vision_model", model)


def layer(model):
    return tower(model).encoder.layers[1]


class DoubledLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def double_linear(model):
    old = layer(model).self_attn.out_proj
    layer(model).self_attn.out_proj = DoubledLinear(64, 64)
    layer(model).self_attn.out_proj.load_state_dict(old.state_dict())


def forward_hook(model):
    layer(model).register_forward_hook(lambda module, args, output: output + 1)


def pre_hook(model):
    layer(model).mlp.fc1.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def hook_on_embeddings(model):
    tower(model).embeddings.register_forward_hook(lambda module, args, output: output + 1)


def replaced_forward(model):
    module = tower(model).post_layernorm
    module.forward = lambda x: nn.LayerNorm.forward(module, x) + 1


def no_bias(model):
    layer(model).mlp.fc2.bias = None


def other_activation(model):
    layer(model).mlp.activation_fn = nn.ReLU()


def other_scale(model):
    layer(model).self_attn.scale = 1.0


def parametrization(model):
    class Triple(nn.Module):
        def forward(self, x):
            return 3 * x

    torch.nn.utils.parametrize.register_parametrization(layer(model).mlp.fc1, "weight", Triple())


def wide_stride(model):
    tower(model).embeddings.patch_embedding.stride = (7, 7)


def shuffled_positions(model):
    tower(model).embeddings.position_ids = torch.arange(9).flip(0)[None]


def eager_by_name(model):
    model.config._attn_implementation = "eager"


def eager_in_one_layer(model):
    attention = layer(model).self_attn
    attention.config = copy.deepcopy(attention.config)
    attention.config._attn_implementation = "eager"


def sibling_forward(model):
    layer(model).forward = tower(model).encoder.layers[0].forward


def exchanged_forward(model):
    """As many attributes as before."""
    module = layer(model).mlp.fc1
    module.forward = lambda x: nn.Linear.forward(module, x) + 1
    del module.in_features


def hook_in_another_dictionary(model):
    module = layer(model).mlp.fc1
    module._forward_hooks = {0: lambda module, args, output: output + 1}


def another_dictionary(model):
    module = layer(model).mlp.fc1
    module.__dict__ = dict(module.__dict__)
    module.forward = lambda x: nn.Linear.forward(module, x) + 1


def inner_forward(model):
    tower(model).embeddings.patch_embedding._conv_forward = lambda x, weight, bias: nn.functional.conv2d(
        x, 2 * weight, bias, stride=8
    )


def inner_activation(model):
    layer(model).mlp.activation_fn.act = torch.relu


def causal(model):
    layer(model).self_attn.is_causal = True


def padded_convolution(model):
    tower(model).embeddings.patch_embedding.stride = (12, 12)
    tower(model).embeddings.patch_embedding.padding = (4, 4)


def position_norm(model):
    tower(model).embeddings.position_embedding.max_norm = 0.1


def attention_to_zero(model):
    tower(model).head.attention.add_zero_attn = True


CHANGES = {
    double_linear: "out_proj is a DoubledLinear, not a Linear",
    forward_hook: "a SiglipEncoderLayer has forward hooks",
    pre_hook: "a Linear has forward hooks",
    hook_on_embeddings: "a SiglipVisionEmbeddings has forward hooks",
    replaced_forward: "the forward of a LayerNorm is replaced",
    sibling_forward: "the forward of a SiglipEncoderLayer is replaced",
    exchanged_forward: "the forward of a Linear is replaced",
    hook_in_another_dictionary: "a Linear has forward hooks",
    another_dictionary: "the forward of a Linear is replaced",
    inner_forward: "patch_embedding._conv_forward is replaced",
    no_bias: "fc2.bias has shape None",
    other_activation: "activation_fn is a ReLU",
    inner_activation: "activation_fn.act is",
    other_scale: "scale is 1.0, by the config 0.25",
    causal: "is_causal is True",
    parametrization: "fc1 is a ParametrizedLinear",
    wide_stride: "patch_embedding.stride is (7, 7)",
    padded_convolution: "patch_embedding.stride is (12, 12)",
    shuffled_positions: "position_ids are not 0, 1, 2",
    position_norm: "max_norm is 0.1",
    attention_to_zero: "add_zero_attn is True",
    eager_in_one_layer: "attention implementation 'eager' was asked for",
    eager_by_name: "attention implementation 'eager' was asked for",
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@torch.no_grad()
def test_changed_models_delegate(change, when, stock, pixels):
    """Also where the change comes after a fused forward."""
    ours = drop_in(stock)
    if when == "after":
        ours(pixels)
    change(stock)
    change(ours)
    assert CHANGES[change] in ours.why_not(pixels)
    assert torch.equal(ours(pixels).last_hidden_state, stock(pixels).last_hidden_state)


@torch.no_grad()
def test_a_replaced_forward_of_the_inner_tower_delegates(stock, pixels):
    """Until transformers 5.6 the tower is a module inside of the model."""
    if tower(stock) is stock:
        pytest.skip("this version's tower is the model itself")
    ours = drop_in(stock)
    ours(pixels)
    inner = tower(ours)
    inner.forward = lambda *args, **kwargs: type(inner).forward(inner, *args, **kwargs)
    assert "is replaced" in ours.why_not(pixels)


@pytest.mark.parametrize("when", ["before", "after"])
@torch.no_grad()
def test_patched_classes_delegate(when, stock, pixels, monkeypatch):
    """What libraries such as Liger do to modeling_siglip."""
    ours = drop_in(stock)
    if when == "after":
        ours(pixels)
    monkeypatch.setattr(type(layer(ours).mlp), "forward", lambda self, hidden_states: 3 * hidden_states)
    assert "the forward of SiglipMLP is patched" in ours.why_not(pixels)
    assert torch.equal(ours(pixels).last_hidden_state, stock(pixels).last_hidden_state)


@torch.no_grad()
def test_another_attention_under_the_same_name_delegates(stock, pixels, monkeypatch):
    ours = drop_in(stock)
    ours(pixels)
    monkeypatch.setitem(
        transformers.AttentionInterface._global_mapping,
        "sdpa",
        lambda module, q, k, v, *_, **__: (v.transpose(1, 2), None),
    )
    assert "is not transformers' own" in ours.why_not(pixels)
    assert torch.equal(ours(pixels).last_hidden_state, stock(pixels).last_hidden_state)


def test_data_parallel_replicas_delegate(stock, pixels):
    """Their parameters are no Parameters, so that nothing seems to need a gradient."""
    ours = drop_in(stock)
    with torch.no_grad():
        ours(pixels)
    replica = ours._replicate_for_data_parallel()
    replicas = {ours: replica}
    for module in list(ours.modules())[1:]:
        replicas[module] = module._replicate_for_data_parallel()
    for module, twin in replicas.items():
        for name, child in module._modules.items():
            setattr(twin, name, replicas[child])
        for name, parameter in module._parameters.items():
            # with its history, as Broadcast gives it
            setattr(twin, name, None if parameter is None else parameter.clone())
    assert "DataParallel" in replica.why_not(pixels)
    assert replica(pixels).pooler_output.requires_grad


@torch.no_grad()
def test_hooks_that_bring_the_weights_delegate(stock, pixels):
    """As offloading libraries do: outside of a forward there are none."""
    ours = drop_in(stock)
    for module in ours.modules():
        if type(module) is nn.Linear:  # the pooling head reads its own out_proj past any hook
            kept, module.weight.data = module.weight.data, torch.empty(0)
            module.register_forward_pre_hook(lambda m, args, kept=kept: setattr(m.weight, "data", kept))
    assert torch.equal(ours(pixels).pooler_output, stock(pixels).pooler_output)


@pytest.mark.parametrize("hidden_act", ["relu", "gelu", "quick_gelu", "gelu_python_tanh"])
@torch.no_grad()
def test_other_activations_by_the_config_delegate(hidden_act, pixels):
    stock = stock_model(SiglipVisionConfig(**TINY, hidden_act=hidden_act), "sdpa")
    ours = drop_in(stock)
    assert ours.why_not(pixels)
    assert torch.equal(ours(pixels).last_hidden_state, stock(pixels).last_hidden_state)


@torch.no_grad()
def test_wide_heads_delegate(pixels):
    stock = stock_model(SiglipVisionConfig(**TINY | {"hidden_size": 288, "num_attention_heads": 2}))
    assert "head_dim is above 128" in drop_in(stock).why_not(pixels)


@torch.no_grad()
def test_a_mended_model_is_fused_again(stock, pixels):
    ours = drop_in(stock)
    bias, layer(ours).mlp.fc2.bias = layer(ours).mlp.fc2.bias, None
    assert ours.why_not(pixels)
    layer(ours).mlp.fc2.bias = bias
    assert ours.why_not(pixels) is None


@torch.no_grad()
def test_traced_by_make_fx(stock, pixels):
    ours = drop_in(stock)
    traced = torch.fx.experimental.proxy_tensor.make_fx(lambda x: ours(x).pooler_output)(pixels)
    assert torch.equal(traced(pixels + 1), stock(pixels + 1).pooler_output)


def test_global_hooks_delegate(stock, pixels):
    ours = drop_in(stock)
    with torch.no_grad():
        handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
        try:
            assert "global module hooks" in ours.why_not(pixels)
        finally:
            handle.remove()
        assert ours.why_not(pixels) is None


CALLS = {
    "output_attentions": {"output_attentions": True},
    "attention_mask": {"attention_mask": torch.zeros(2, 1, 9, 9).index_fill_(3, torch.tensor([0]), -1e4)},
}


@pytest.mark.parametrize("name", CALLS)
@torch.no_grad()
def test_calls_that_ask_for_more_delegate(name, stock, pixels):
    ours = drop_in(stock)
    ours(pixels)
    expected, actual = stock(pixels, **CALLS[name]), ours(pixels, **CALLS[name])
    assert ours.why_not(pixels, **CALLS[name])
    assert actual.keys() == expected.keys()
    torch.testing.assert_close(actual.last_hidden_state, expected.last_hidden_state, atol=0, rtol=0)
    # and the plain call after it is fused again
    assert ours.why_not(pixels) is None
    torch.testing.assert_close(ours(pixels)[:], stock(pixels)[:], atol=1e-5, rtol=0)


@torch.no_grad()
def test_config_that_asks_for_attentions_delegates(pixels):
    ours = drop_in(stock_model(SiglipVisionConfig(**TINY)))
    ours.set_attn_implementation("eager")
    ours.config.output_attentions = True
    assert "output_attentions" in ours.why_not(pixels)
    assert len(ours(pixels).attentions) == 2


@torch.no_grad()
def test_attention_dropout_in_training_delegates(pixels):
    ours = drop_in(stock_model(SiglipVisionConfig(**TINY, attention_dropout=0.5)))
    assert ours.why_not(pixels) is None
    ours.train()
    assert "dropout" in ours.why_not(pixels)


@torch.no_grad()
def test_functional_call_delegates(stock, pixels):
    ours = drop_in(stock)
    ours(pixels)
    weights = {name: 2 * parameter.detach() for name, parameter in ours.named_parameters()}
    actual = torch.func.functional_call(ours, weights, (pixels,))
    expected = torch.func.functional_call(stock, weights, (pixels,))
    assert torch.equal(actual.pooler_output, expected.pooler_output)


@torch.no_grad()
def test_vmap_delegates(stock, pixels):
    ours = drop_in(stock)
    actual = torch.func.vmap(lambda x: ours(x).pooler_output)(torch.stack([pixels, pixels + 1]))
    torch.testing.assert_close(actual[1], stock(pixels + 1).pooler_output, atol=1e-5, rtol=0)


@torch.no_grad()
def test_compiled(stock, pixels):
    ours = drop_in(stock)
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(pixels)[:], stock(pixels)[:], atol=1e-5, rtol=0)


def test_exported(stock, pixels):
    ours = drop_in(stock)
    program = torch.export.export(ours, (pixels,))
    torch.testing.assert_close(program.module()(pixels)[1], stock(pixels)[1], atol=1e-5, rtol=0)


@torch.no_grad()
def test_lora(stock, pixels):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    ours = peft.get_peft_model(drop_in(stock), peft.LoraConfig(target_modules=["q_proj", "fc1"]))
    nn.init.normal_(next(p for n, p in ours.named_parameters() if "lora_B" in n))
    assert "peft.tuners.lora.layer.Linear, not a torch" in ours.base_model.model.why_not(pixels)
    adapted = ours(pixels).pooler_output
    merged = ours.merge_and_unload()
    assert merged.why_not(pixels) is None
    torch.testing.assert_close(merged(pixels).pooler_output, adapted, atol=1e-5, rtol=0)


@torch.no_grad()
def test_strict_raises_the_reason(stock, pixels):
    ours = drop_in(stock, strict=True)
    with pytest.raises(RuntimeError, match="output_attentions was asked for"):
        ours(pixels, output_attentions=True)


def test_every_reason_is_listed_and_the_first_is_logged_once(stock, pixels, caplog):
    ours = drop_in(stock)
    reasons = ours.why_not(pixels, output_attentions=True, attention_mask=pixels).split("; ")
    assert [re.sub(r"\W.*", "", r) for r in reasons] == ["gradients", "output_attentions", "the"]
    with caplog.at_level(logging.WARNING, "siglip_fast"):
        ours(pixels)
        ours(pixels)
    assert [r.message for r in caplog.records if r.name == "siglip_fast"] == [
        f"running the stock SiglipVisionModel forward: {reasons[0]}"
    ]


@torch.no_grad()
def test_asking_for_triton_where_it_cannot_run_is_an_error(stock, pixels, monkeypatch, device):
    if device == "cuda":
        pytest.skip("Triton runs on this device")
    from triton import knobs

    from siglip_fast.backends import select

    monkeypatch.setattr(knobs.runtime, "interpret", False)
    select._triton_unavailable.cache_clear()
    try:
        with pytest.raises(RuntimeError, match="backend='triton' cannot run on cpu"):
            drop_in(stock, backend="triton")(pixels)
    finally:
        select._triton_unavailable.cache_clear()


@torch.no_grad()
def test_meta_device_delegates(stock, pixels):
    ours = copy.deepcopy(drop_in(stock)).to("meta")
    assert ours.why_not(pixels.to("meta"))
    assert ours(pixels.to("meta")).last_hidden_state.shape == (2, 9, 64)


@torch.no_grad()
def test_a_patched_stock_forward_delegates(stock, pixels, monkeypatch):
    ours, forward = drop_in(stock), transformers.SiglipVisionModel.forward

    def doubled(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.pooler_output = 2 * output.pooler_output
        return output

    expected = 2 * stock(pixels).pooler_output
    monkeypatch.setattr(transformers.SiglipVisionModel, "forward", doubled)
    assert "patched" in ours.why_not(pixels)
    assert torch.equal(ours(pixels).pooler_output, expected)


class Wrapped(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


@pytest.mark.parametrize("part", ["embeddings", "encoder", "head", "post_layernorm"])
@torch.no_grad()
def test_wrapped_parts_delegate(part, stock, pixels):
    ours = drop_in(stock)
    ours(pixels)
    setattr(tower(ours), part, Wrapped(getattr(tower(ours), part)))
    assert "Wrapped" in ours.why_not(pixels)
    assert torch.equal(ours(pixels).pooler_output, stock(pixels).pooler_output)


@torch.no_grad()
def test_no_layers_delegate(pixels):
    stock = stock_model(SiglipVisionConfig(**TINY | {"num_hidden_layers": 0}), "sdpa")
    ours = drop_in(stock)
    assert "no layers" in ours.why_not(pixels)
    assert torch.equal(ours(pixels).pooler_output, stock(pixels).pooler_output)


@torch.no_grad()
def test_interpolation_is_no_reason(stock, pixels):
    ours = drop_in(stock, strict=True)
    assert ours.why_not(pixels, True) is None
    assert ours.why_not(pixels, interpolate_pos_encoding=True) is None


@torch.no_grad()
def test_fused_again_after_gradient_checkpointing(stock, pixels):
    ours = drop_in(stock)
    ours.gradient_checkpointing_enable()
    ours.gradient_checkpointing_disable()
    assert ours.why_not(pixels) is None
