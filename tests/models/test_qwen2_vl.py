"""Qwen2-VL's vision tower: what is its own, beside test_gridded.py."""

import pytest
import torch
import zoo
from gridded_towers import FAMILIES, MIXED, assert_as, fast, tower
from torch import nn

CALL = FAMILIES["qwen2_vl"].call


@pytest.mark.parametrize("family, width", [("qwen2_vl", "embed_dim"), ("ernie4_5_vl_moe", "hidden_size")])
@pytest.mark.parametrize("backend", ["torch", "cpu", "cpu-avx2", "triton"], indirect=True)
@torch.no_grad()
def test_head_dim_of_the_published(family, width, backend, dtype):
    """80, which is no power of two; two layers, so that what one makes of the other's rows shows."""
    pytest.importorskip(f"transformers.models.{family}")
    stock = tower(family, dtype, **{width: 160, "num_hidden_layers": 2})
    assert_as(stock, fast(stock, backend=backend), FAMILIES[family].call([(1, 4, 6), (2, 2, 4)], dtype))


@torch.no_grad()
def test_frames_of_a_video_do_not_see_each_other():
    ours, call = fast(tower("qwen2_vl")), CALL([(2, 4, 4)])
    before = zoo.tensors(ours(**call))
    call["hidden_states"][16:] += 1
    for name, tensor in zoo.tensors(ours(**call)).items():
        changed, half = (tensor != before[name]).flatten(1).any(1), len(tensor) // 2
        assert changed.tolist() == [False] * half + [True] * half


@torch.no_grad()
def test_both_frames_of_a_patch_count():
    """The projection of patches takes two, which of a video are not alike."""
    ours, call = fast(tower("qwen2_vl")), CALL([(1, 4, 4)])
    before = zoo.tensors(ours(**call))
    call["hidden_states"].view(16, 3, 2, 16)[:, :, 1] += 1
    assert zoo.error(zoo.tensors(ours(**call)), before) > 0.01


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda m: setattr(m, "spatial_merge_size", 4), "spatial_merge_size is 4, by the config 2"),
        (lambda m: (setattr(m, "spatial_merge_size", 4), setattr(m.config, "spatial_merge_size", 4)), "merger"),
        (lambda m: setattr(m.merger.mlp[1], "approximate", "tanh"), "merger.mlp.1.approximate"),
        (lambda m: setattr(m.blocks[1].mlp, "act", nn.SiLU()), "mlp.act is a SiLU"),
        (lambda m: setattr(m.patch_embed, "proj", nn.Linear(96, 64)), "proj is a Linear"),
        (lambda m: m.merger.register_forward_hook(lambda *args: None), "forward hooks"),
    ],
)
@torch.no_grad()
def test_reasons_of_the_tower(change, reason):
    """Whether it was so before the first forward, or became so."""
    ours, changed = fast(tower("qwen2_vl")), fast(tower("qwen2_vl"))
    ours(**CALL(MIXED))
    for model in (ours, changed):
        change(model)
        assert reason in (model.why_not(**CALL(MIXED)) or "")
        with pytest.raises(RuntimeError, match="does not apply"):
            model(**CALL(MIXED))


@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_pytorch_tanh"])
@torch.no_grad()
def test_another_gelu_is_stocks(hidden_act):
    ours = fast(tower("qwen2_vl", hidden_act=hidden_act))
    assert f"hidden_act is '{hidden_act}', not 'quick_gelu'" in ours.why_not(**CALL(MIXED))


@torch.no_grad()
def test_in_a_model():
    model, inputs = zoo.build("qwen2_vl")
    expected = zoo.run(model, inputs)
    fast_model = fast(model)
    with zoo.fused_attentions() as calls:
        assert zoo.error(zoo.run(fast_model, inputs), expected) < 1e-5
    assert calls == ["torch"] * 2
