"""Batch-invariant operations on the Triton backend: an image's bits are the same alone, in any batch, at any place in it."""

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import reference
import torch
from siglip_fast.kernels.tiles import GPUS

from siglip_fast.backends import invariant
from siglip_fast.backends import triton as triton_backend
from siglip_fast.models.variants import config_for
from siglip_fast.models.weights import fold
from siglip_fast.ops import Linear, Norm, Ops, PatchEmbedding, Pool
from siglip_fast.running.uint8 import normalization
from siglip_fast.tuning.cache import LAUNCHES
from siglip_fast.tuning.cases import cases

BENCH = Path(__file__).parents[2] / "bench"
IMAGES = 19
D, F, H = 64, 2048, 1  # hidden_size; so wide that few rows are split over K; heads
OPERATIONS = ["patch_embed", "uint8", "qkv", "attention", "out_proj", "fc1", "fc2", "layernorm", "pool"]
HEAD = ["head_out_proj", "head_fc1", "head_fc2"]  # of as many rows as there are images


# The other two's configurations are as many more minutes of Triton's interpreter.
@pytest.fixture(params=["sm_90", *(pytest.param(arch, marks=pytest.mark.slow) for arch in ("sm_80", "sm_100"))])
def arch(request, monkeypatch) -> str:
    """Triton interprets whatever the GPU; its configurations are chosen for this one."""
    for home in ("kernels.gemm", "kernels.attention", "kernels.attention_pool", "kernels.patch_embed"):
        monkeypatch.setattr(f"siglip_fast.{home}.gpu_arch", lambda: request.param)
    for home in ("triton", "invariant"):
        monkeypatch.setattr(f"siglip_fast.backends.{home}.gpu_arch", lambda: request.param)
    monkeypatch.setattr("siglip_fast.kernels.gemm.multiprocessors", lambda: 8)
    monkeypatch.setattr("siglip_fast.kernels.linear_residual.multiprocessors", lambda: 8)
    return request.param


class Case:
    """An operation, the inputs of IMAGES images, and what it makes of some of them."""

    def __init__(self, name: str, dtype: torch.dtype, device: str, stream: torch.dtype | None = None):
        """`stream` is the residual stream's dtype, if another."""
        torch.manual_seed(len(name))
        self.name, self.dtype, self.device, self.stream = name, dtype, device, stream or dtype
        # tokens: so many that the default tiles of one image are not those of all; a pooled image has one
        N = self.tokens = 1 if name in HEAD else 131 if name in ("attention", "pool") else 33
        self.hidden = (torch.randn(IMAGES, N, D) * 3 + 1).to(device, self.stream)
        self.wide = torch.randn(IMAGES, N, F).to(device, dtype)
        self.narrow = torch.randn(IMAGES, N, D).to(device, dtype)
        self.qkv = torch.randn(IMAGES, N, 3, H, D // H).to(device, dtype)
        self.pixels = torch.randint(0, 256, (IMAGES, 3, 4, 4 * N), dtype=torch.uint8).to(device)
        self.norm = torch.nn.LayerNorm(D).to(device, dtype)

    def linear(self, out: int, K: int) -> Linear:
        torch.manual_seed(out + K)
        weight = (torch.randn(out, K) * K**-0.5).to(self.device, self.dtype)
        return Linear(weight, torch.randn(out).to(self.device, self.dtype))

    def folded(self, out: int):
        return fold(self.norm, *self.linear(out, D)[:2], self.dtype)

    @torch.no_grad()
    def outputs(self, ops: Ops, images: list[int]) -> list[torch.Tensor]:
        """Each `[images, …]`, the moments among them."""
        return [t.view(len(images), -1) for t in self._run(ops, images)]

    def _run(self, ops: Ops, images: list[int]) -> Iterable[torch.Tensor]:
        hidden, name = self.hidden[images], self.name.removeprefix("head_")
        moments = reference.moments(hidden).float()
        if name in ("patch_embed", "uint8"):
            return self._patch_embed(ops, images)
        if name == "attention":
            return [ops.attention(self.qkv[images])]
        if name == "pool":
            scores = torch.linspace(-0.1, 0.1, H * D, device=self.device).view(H, D)
            return [ops.attention_pool(self.narrow[images], Pool(scores, self.linear(D, D)))]
        if name == "layernorm":
            norm = Norm(self.norm.weight.detach().to(self.stream), self.norm.bias.detach().to(self.stream), 1e-6)
            return [ops.layernorm(hidden, moments, norm)]
        if name in ("qkv", "fc1"):
            folded = self.folded(3 * D if name == "qkv" else 2 * D)
            return [ops.layernorm_linear(hidden, moments, folded, "tanh" if name == "fc1" else None)]
        x, linear = (self.wide, self.linear(D, F)) if name == "fc2" else (self.narrow, self.linear(D, D))
        return ops.linear_residual(x[images], linear, None if self.name == "head_out_proj" else hidden)

    def _patch_embed(self, ops: Ops, images):
        patch = PatchEmbedding(*self.linear(D, 48)[:2], 4)
        pixels = self.pixels[images]
        if self.name == "uint8":
            patch = normalization((0.5, 0.4, 0.3), (0.5, 0.6, 0.7), 1 / 255, 3).fold(patch)
        else:
            pixels = pixels.to(self.dtype) / 64 - 2
        position = torch.linspace(-1, 1, self.tokens * D, device=self.device).view(self.tokens, D)
        return ops.patch_embed(pixels, patch, position.to(self.stream))


BATCHES = [[18], [9], [0], [*range(1, 9)], [*range(17, 8, -1)]]  # each image alone or at another place


def equal_rows(case: Case, ops: Ops, batches: list[list[int]] = BATCHES) -> int:
    """How many images have the bits that they have in a batch of all, in each of the batches that they are in."""
    whole, differing = case.outputs(ops, [*range(IMAGES)]), set()
    for batch in batches:
        for here, there in zip(case.outputs(ops, batch), whole, strict=True):
            differing |= {image for image, row in zip(batch, here, strict=True) if not torch.equal(row, there[image])}
    return IMAGES - len(differing)


@pytest.mark.parametrize("name", OPERATIONS + HEAD)
@pytest.mark.parametrize("backend", ["triton"])
def test_rows(name, dtype, backend, arch, device):
    assert equal_rows(Case(name, dtype, device), Ops(backend, batch_invariant=True)) == IMAGES


@pytest.mark.parametrize("name", ["patch_embed", "qkv", "fc2"])
@pytest.mark.parametrize("arch", ["sm_90"], indirect=True)
@pytest.mark.parametrize("backend", ["triton"])
def test_rows_in_autocast(name, dtype, backend, arch, device):
    """Whose residual stream is float32."""
    assert equal_rows(Case(name, dtype, device, torch.float32), Ops(backend, batch_invariant=True)) == IMAGES


@pytest.mark.parametrize("name", ["attention", "fc2", "pool"])
@pytest.mark.parametrize("arch", ["sm_90"], indirect=True)
@pytest.mark.parametrize("backend, dtype", [("triton", torch.float16)])
def test_without_it_rows_differ(name, backend, dtype, arch, device):
    """Or the tests above would show nothing."""
    assert equal_rows(Case(name, dtype, device), Ops(backend)) < IMAGES


@pytest.mark.parametrize("arch", [*GPUS, "gfx942", "gfx1100"])
@pytest.mark.parametrize("variant", ["base-patch16-224", "so400m-patch14-384"])
def test_one_configuration_for_any_number_of_rows(variant, arch, dtype, monkeypatch):
    monkeypatch.setattr(invariant, "gpu_arch", lambda: arch)
    chosen = invariant.Invariant(torch.device("cpu"))
    for batch in (1, 8, 64, 1000):
        for case in cases(config_for(variant), 196, dtype, [batch]):
            for launch in LAUNCHES:
                choice = chosen.choice(*case.operation, case.rows, launch)
                assert choice == chosen.choice(*case.operation, 1), case
                assert choice.route == "triton" and choice.config
                assert not {"SPLIT_K", "TAIL", "TMA"} & set(choice.config)


@pytest.mark.parametrize("view", ["a-slice", "channels-last", "unaligned", "every-second", "as-it-is"])
def test_pixels_are_laid_out_alike(view, monkeypatch):
    """Whatever memory they are in: Triton would compile other kernels."""
    pixels = torch.arange(3 * 3 * 6 * 10, dtype=torch.float32).view(3, 3, 6, 10)
    image = {
        "a-slice": pixels[1:2],
        "channels-last": pixels[1:2].to(memory_format=torch.channels_last),
        "unaligned": torch.cat([pixels.new_zeros(1), pixels[1].flatten()])[1:].view(1, 3, 6, 10),
        "every-second": pixels[::2].roll(1, 0)[1:].copy_(pixels[1:2]),
        "as-it-is": pixels[1:2].clone(),
    }[view]
    seen = []
    monkeypatch.setitem(
        triton_backend.RUN, "patch_embed", lambda choice, pixels, *_: seen.append(pixels) or (pixels, None)
    )
    patch = PatchEmbedding(torch.zeros(8, 12), torch.zeros(8), 2)
    Ops("triton", batch_invariant=True).patch_embed(image, patch, torch.zeros(15, 8))
    (laid_out,) = seen
    assert torch.equal(laid_out, pixels[1:2])
    assert laid_out.stride() == (180, 60, 10, 1) and laid_out.data_ptr() % 16 == 0
    assert (laid_out.data_ptr() == image.data_ptr()) == (view in ("a-slice", "every-second", "as-it-is"))


# Nothing is launched or loaded: every launch asks for the compiled kernel only.
CODE = """
import sys, torch
from static import forward, launches_of
from siglip_fast.backends import ahead

arch, loads_ahead = sys.argv[1:]
ahead.applies = lambda tensor: loads_ahead == "ahead"
compiled, of_one = set(), None
for batch in (3, 1, 2, 8, 19, 64, 1000):
    with launches_of(arch) as launches:
        forward("base-patch16-224", torch.bfloat16, batch, batch_invariant=True)
        kernels = [kernel.hash for *_, kernel in launches]
    compiled |= set(kernels)
    if batch != 3:  # during which others are loaded, too
        of_one = of_one or kernels
        print(batch, len(compiled), kernels == of_one)
"""


def lines_of(*arguments: str) -> list[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(BENCH)}
    done = subprocess.run([sys.executable, "-c", CODE, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("loads", ["ahead", "later"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_every_batch_launches_the_same_machine_code(arch, loads):
    """10 kernels, of which the first forward loads no others either."""
    pytest.importorskip("cuxray")  # which bench/static.py reads machine code with
    assert lines_of(arch, loads) == [f"{batch} 10 True" for batch in (1, 2, 8, 19, 64, 1000)]
