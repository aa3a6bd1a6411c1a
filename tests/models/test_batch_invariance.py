"""`batch_invariant=True`: an image has the same bits alone, in any batch, and at any place in it."""

import copy
import pickle

import pytest
import torch
from models import TINY, drop_in, stock_model
from transformers import SiglipVisionConfig

from siglip_fast import SiglipVisionModel, apply_to, restore

IMAGES = 19
# So wide that libraries choose other kernels for other batches
SIZES = TINY | {"hidden_size": 192, "intermediate_size": 520, "image_size": 40}
BATCHES = [[18], [9], [0], [*range(1, 9)], [*range(17, 8, -1)]]  # each image alone or at another place


@pytest.fixture(scope="module")
def stock():
    return stock_model(SiglipVisionConfig(**SIZES), "sdpa")


@pytest.fixture(autouse=True)
def on_a_hopper(monkeypatch):
    """Triton interprets whatever the GPU; its configurations are chosen for this one, with few multiprocessors."""
    pytest.importorskip("triton")
    for home in ("kernels.gemm", "kernels.attention", "kernels.attention_pool", "kernels.patch_embed"):
        monkeypatch.setattr(f"siglip_fast.{home}.gpu_arch", lambda: "sm_90")
    monkeypatch.setattr("siglip_fast.backends.invariant.gpu_arch", lambda: "sm_90")
    monkeypatch.setattr("siglip_fast.backends.triton.gpu_arch", lambda: "sm_90")


def images(dtype=torch.float32, device="cpu"):
    torch.manual_seed(1)
    return torch.randn(IMAGES, 3, 40, 40).to(device, dtype)


def leaves(output) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(dict(output)) if leaf is not None]


def equal_images(forward, pixels, batches=BATCHES) -> int:
    """How many images have the bits that they have in a batch of all, in each of the batches that they are in."""
    whole, differing = forward(pixels), set()
    for batch in batches:
        for here, there in zip(forward(pixels[batch]), whole, strict=True):
            differing |= {image for image, row in zip(batch, here, strict=True) if not torch.equal(row, there[image])}
    return len(pixels) - len(differing)


@torch.no_grad()
def test_images(stock, backend, dtype, device):
    ours = drop_in(stock, backend=backend, strict=True, batch_invariant=True).to(device, dtype)
    pixels = images(dtype, device)
    assert equal_images(lambda batch: leaves(ours(batch)), pixels) == IMAGES
    with_states = leaves(ours(pixels, output_hidden_states=True))
    assert len(with_states) == 2 + 3 and all(len(leaf) == IMAGES for leaf in with_states)
    assert all(map(torch.equal, with_states, leaves(ours(pixels))))


@torch.no_grad()
def test_hidden_states_and_other_image_sizes(stock, backend, device):
    ours = drop_in(stock, backend=backend, strict=True, batch_invariant=True).to(device)
    some = [[3], [0, 4, 2, 1]]
    states = lambda batch: leaves(ours(batch, output_hidden_states=True))  # noqa: E731
    assert equal_images(states, images(device=device)[:5], some) == 5
    larger = torch.randn(5, 3, 56, 40).to(device)
    interpolated = lambda batch: leaves(ours(batch, interpolate_pos_encoding=True))  # noqa: E731
    assert equal_images(interpolated, larger, some) == 5


@torch.no_grad()
def test_bytes(stock, backend, device):
    ours = drop_in(stock, backend=backend, strict=True, batch_invariant=True).to(device)
    pixels = torch.randint(0, 256, (5, 3, 40, 40), dtype=torch.uint8).to(device)
    assert equal_images(lambda batch: leaves(ours.forward_uint8(batch)), pixels, [[3], [0, 4, 2, 1]]) == 5


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@torch.no_grad()
def test_autocast(stock, backend):  # Triton runs no bf16 here; tests/backends/test_invariant.py has its operations
    ours = drop_in(stock, backend=backend, strict=True, batch_invariant=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert equal_images(lambda batch: leaves(ours(batch)), images()) == IMAGES


@torch.no_grad()
def test_views_of_any_layout(stock, backend, device):
    """Slices, channels last, addresses that are no multiple of 16: an image is what it holds."""
    ours = drop_in(stock, backend=backend, strict=True, batch_invariant=True).to(device)
    pixels = images(device=device)[:2]
    expected = leaves(ours(pixels))
    shifted = torch.cat([pixels.new_zeros(1), pixels.flatten()])[1:].view(pixels.shape)
    for view in (shifted, pixels.to(memory_format=torch.channels_last), shifted[1:]):
        rows = slice(len(pixels) - len(view), None)
        assert all(torch.equal(a, b[rows]) for a, b in zip(leaves(ours(view)), expected, strict=True))


@pytest.mark.parametrize("batch_invariant, equal", [(True, IMAGES), (False, 0)])
@torch.no_grad()
def test_a_library_whose_results_depend_on_the_number_of_rows(stock, batch_invariant, equal, monkeypatch):
    """By as much as can be: what those of this machine do depends on the machine."""
    linear = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, *args: linear(x, *args) + 1e-3 * x[..., 0].numel())
    ours = drop_in(stock, backend="torch", strict=True, batch_invariant=batch_invariant)
    assert equal_images(lambda batch: leaves(ours(batch, output_hidden_states=True)), images()) == equal


@torch.no_grad()
def test_results_are_right(stock, backend, device):
    ours = drop_in(stock, backend=backend, strict=True, batch_invariant=True).to(device)
    expected, actual = stock(images()[:3]), ours(images(device=device)[:3])
    for a, b in zip(leaves(actual), leaves(expected), strict=True):
        torch.testing.assert_close(a.cpu(), b, atol=1e-4, rtol=0)


class TestHowItIsAskedFor:
    @pytest.fixture(autouse=True)
    def not_set(self, monkeypatch):
        monkeypatch.delenv("SIGLIP_FAST_BATCH_INVARIANT", raising=False)

    @pytest.mark.parametrize("value, expected", [(None, False), ("", False), ("0", False), ("1", True)])
    def test_environment(self, stock, monkeypatch, value, expected):
        if value is not None:
            monkeypatch.setenv("SIGLIP_FAST_BATCH_INVARIANT", value)
        assert drop_in(stock).batch_invariant is expected
        assert apply_to(copy.deepcopy(stock)).batch_invariant is expected
        for argument in (True, False):
            assert drop_in(stock, batch_invariant=argument).batch_invariant is argument

    @pytest.mark.parametrize("value", ["yes", "2", "true", " "])
    def test_environment_of_something_else(self, stock, monkeypatch, value):
        monkeypatch.setenv("SIGLIP_FAST_BATCH_INVARIANT", value)
        for make in (drop_in, lambda model: apply_to(copy.deepcopy(model))):
            with pytest.raises(ValueError, match=f"SIGLIP_FAST_BATCH_INVARIANT: expected 0 or 1, got '{value}'"):
                make(stock)
        drop_in(stock, batch_invariant=False)  # is not asked then

    @pytest.mark.parametrize("value", ["no", 1, 0])
    def test_argument_of_another_type(self, stock, value):
        model = copy.deepcopy(stock)
        for make in (drop_in, apply_to):
            with pytest.raises(TypeError, match=f"batch_invariant: expected a bool, got {value!r}"):
                make(model, batch_invariant=value)
        assert type(model) is type(stock)

    def test_from_pretrained_copies_pickles_and_restore(self, stock, tmp_path):
        stock.save_pretrained(tmp_path)
        ours = SiglipVisionModel.from_pretrained(tmp_path, batch_invariant=True)
        for other in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert other.batch_invariant
        assert "batch_invariant" not in ours.config.to_dict()
        swapped = restore(apply_to(copy.deepcopy(stock), batch_invariant=True))
        assert not hasattr(swapped, "batch_invariant")

    @torch.no_grad()
    def test_of_a_model_that_has_run(self, stock):
        ours = drop_in(stock, backend="torch")
        for value in (True, False, True):
            ours.batch_invariant = value
            ours(images()[:1])
            assert ours._derived[None].ops.batch_invariant is value

    def test_tuning_is_refused(self, stock):
        with pytest.raises(RuntimeError, match="tune: a batch-invariant model runs built-in configurations"):
            drop_in(stock, batch_invariant=True).tune([1])

    @torch.no_grad()
    def test_delegation_says_that_it_is_not(self, stock, caplog):
        for invariant in (False, True):
            drop_in(stock, batch_invariant=invariant)(images()[:1], output_attentions=True)
        first, second = [record.getMessage() for record in caplog.records if "stock" in record.getMessage()]
        assert first == "running the stock SiglipVisionModel forward: output_attentions was asked for"
        assert second == (
            "running the stock SiglipVisionModel forward, which is not batch invariant: output_attentions was asked for"
        )
