"""Device kernels launched and bytes moved by a forward in bf16: stock, and ours. Counted on meta tensors, not timed.

**Bytes** are those of global memory with no reuse between kernels: a kernel reads each of its distinct input tensors
once (a broadcast one at its real size) and writes each output once. What its programs read again, as those of every
GEMM do, comes from L2. Weights are what exists before the forward; they are listed a forward, because the images of
a batch share them, and are no part of the MB/image. 1 MB is 10⁶ bytes.

**Stock** runs under a dispatch mode. An operator is a kernel if it makes or changes memory: views and allocations are
none; a cast, a copy for the `matmul` of a strided operand, a `contiguous` that copies are one each. Where CUDA differs
from the meta device, or may do either:

- scaled_dot_product_attention is one fused kernel (flash, memory-efficient or cuDNN) whose result has the layout of
  its query, not the math decomposition; its logsumexp is not counted;
- LayerNorm first copies an input that is not contiguous, and writes mean and rstd;
- a GEMM and its bias are one (cuBLASLt's epilogue), a convolution and its bias too; no split-K, layout or workspace
  kernels of the libraries are counted. Where in doubt, the count favours stock. Pixels are bf16 already.

**siglip_fast** is its forward on the triton backend. Every Triton launch is recorded instead of run, with the tensors
that it is given; a torch operator in between would count as it does for stock. A program of the pooling kernel reads
its tokens twice, for their scores and for their sums, and all score weights: the row "with rereads" counts all of
these, as if no cache had caught any. Tiles are those for a GPU without figures: where a Hopper's split K or leave a tail of rows
(kernels/tiles.py), that is one or two launches more.

**The fused minimum** is that of the layers alone: each of the five operations of a layer reads its activations, and
the residual if it adds one, and writes its result, once. **Targets**, for the row with rereads: at most 5 launches a
layer plus 7, and at most 1.10 times the fused minimum for all activations, those of embedding, head and moments too.
"""

import argparse
import contextlib
import functools
import itertools
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import peers
import torch
from siglip_fast.kernels import attention_pool
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import SiglipVisionConfig
from triton.runtime.jit import KernelInterface

from siglip_fast.files import atomic
from siglip_fast.forward import forward
from siglip_fast.models.variants import VARIANTS, config_for
from siglip_fast.models.weights import tower_weights
from siglip_fast.ops import Ops

DEFAULT_VARIANTS = ("base-patch16-224", "base-patch16-384", "large-patch16-384",
                    "so400m-patch14-224", "so400m-patch14-384", "so400m-patch14-896")  # fmt: skip
BYTES_TARGET = 1.1  # times the fused minimum
aten = torch.ops.aten
Rows = dict[str, dict[str, float]]  # peer → what it launches and moves
ALLOCATIONS = (aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided)


class Launch(NamedTuple):
    name: str
    activations: int  # bytes
    weights: int  # bytes


class Counter(TorchDispatchMode):
    """The launches while it is active; the memory of the tensors `weights` counts as weights."""

    def __init__(self, weights: Iterable[Tensor]):
        super().__init__()
        self.launches: list[Launch] = []
        self.rereads = 0  # bytes
        self._weights = list(weights)  # kept, so that nothing else gets their addresses
        self._weight_memory = set(map(_memory, self._weights))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is aten.native_layer_norm.default and not args[0].is_contiguous():
            with self:
                args = (args[0].clone(memory_format=torch.contiguous_format), *args[1:])
        outputs = func(*args, **(kwargs or {}))
        read, written = _tensors((args, kwargs)), _tensors(outputs)
        made = set(map(_memory, written)) - set(map(_memory, read))
        if (made and func.overloadpacket not in ALLOCATIONS) or func._schema.is_mutable:
            self._add(func.overloadpacket.__name__, read, written)
        return outputs

    def sdpa(self, query: Tensor, key: Tensor, value: Tensor, *args, **kwargs) -> Tensor:
        out = torch.empty_like(query)
        self._add("scaled_dot_product_attention", _tensors((query, key, value, args, kwargs)), [out])
        return out

    def triton(self, kernel: Any, grid: tuple[int, ...], *args, **kwargs) -> None:
        self._add(kernel.fn.__name__, _tensors((args, kwargs)), [])  # inputs and outputs, all distinct
        if kernel is attention_pool._pool_kernel:
            given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
            self.rereads += _bytes([given["y_ptr"]]) + math.prod(grid) * _bytes([given["scores_weight_ptr"]])

    def _add(self, name: str, read: list[Tensor], written: list[Tensor]) -> None:
        distinct = {(_memory(t), t.storage_offset(), t.shape, t.stride()): t for t in read}.values()
        weights = [t for t in distinct if _memory(t) in self._weight_memory]
        activations = [t for t in distinct if _memory(t) not in self._weight_memory]
        self.launches.append(Launch(name, _bytes(activations + written), _bytes(weights)))


@contextlib.contextmanager
def counting(weights: Iterable[Tensor]) -> Iterator[Counter]:
    with (
        torch.no_grad(),
        Counter(weights) as counter,
        mock.patch.dict(os.environ, TRITON_INTERPRET="1"),  # the launchers then ask for no GPU
        mock.patch.object(nn.functional, "scaled_dot_product_attention", counter.sdpa),
        # `kernel[grid](...)`: the base of Triton's compiled and of its interpreted functions
        mock.patch.object(KernelInterface, "__getitem__", lambda *k: functools.partial(counter.triton, *k)),
    ):
        yield counter


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # meta tensors have no data_ptr


def _bytes(tensors: Iterable[Tensor]) -> int:
    # compress: without the dimensions of stride 0
    return sum(t.itemsize * math.prod(itertools.compress(t.shape, t.stride())) for t in tensors)


def meta_model(config: SiglipVisionConfig, attention: str) -> nn.Module:
    with torch.device("meta"):
        return peers.stock(config, attention, torch.bfloat16)


def count_stock(config: SiglipVisionConfig, pixels: Tensor, attention: str, fix: bool = False) -> Counter:
    model = meta_model(config, attention)
    if fix:
        peers.make_contiguous(model)
    with counting([*model.parameters(), *model.buffers()]) as counter:
        model(pixels)
    return counter


def count_ours(config: SiglipVisionConfig, pixels: Tensor) -> Counter:
    model = meta_model(config, "sdpa")
    tower = getattr(model, "vision_model", model)
    position = tower.embeddings.position_embedding.weight
    ops = Ops("triton")
    weights = tower_weights(tower, ops)  # not Derived, which refuses meta parameters
    with counting(_tensors((weights, position))) as counter:
        forward(ops, weights, pixels, position)
    return counter


PEERS = {
    "stock eager": functools.partial(count_stock, attention="eager"),
    "stock sdpa": functools.partial(count_stock, attention="sdpa"),
    "stock sdpa, contiguous": functools.partial(count_stock, attention="sdpa", fix=True),
    "siglip_fast": count_ours,
}
WITH_REREADS = "siglip_fast, with rereads"


def fused_minimum(config: SiglipVisionConfig) -> int:
    """Activation bytes an image of the layers, in bf16."""
    N = (config.image_size // config.patch_size) ** 2
    D, F = config.hidden_size, config.intermediate_size
    qkv, attention, out_proj, fc1, fc2 = D + 3 * D, 3 * D + D, D + D + D, D + F, F + D + D
    return 2 * config.num_hidden_layers * N * (qkv + attention + out_proj + fc1 + fc2)


def measure(config: SiglipVisionConfig, batch_size: int) -> Rows:
    size = config.image_size
    pixels = torch.empty(batch_size, config.num_channels, size, size, dtype=torch.bfloat16, device="meta")
    rows, minimum = {}, fused_minimum(config) / 1e6
    for peer, count in PEERS.items():
        counter = count(config, pixels)
        activations = sum(launch.activations for launch in counter.launches) / batch_size / 1e6
        weights = sum(launch.weights for launch in counter.launches) / 1e6
        rows[peer] = {"launches": len(counter.launches), "mb_per_image": activations, "weights_mb": weights}
    activations += counter.rereads / batch_size / 1e6  # of the last peer: ours
    rows[WITH_REREADS] = rows[peer] | {"mb_per_image": activations}
    rows["fused minimum"] = {"mb_per_image": minimum}
    rows["target"] = {"launches": 5 * config.num_hidden_layers + 7, "mb_per_image": BYTES_TARGET * minimum}
    return {name: row | {"ratio": row["mb_per_image"] / minimum} for name, row in rows.items()}


def missed(variant: str, rows: Rows) -> list[str]:
    """The targets that ours misses, in words."""
    ours, target, reasons = rows[WITH_REREADS], rows["target"], []
    if ours["launches"] > target["launches"]:
        reasons.append(f"{variant}: {ours['launches']} launches, target {target['launches']}")
    if ours["ratio"] > target["ratio"]:
        reasons.append(f"{variant}: {ours['ratio']:.3f} × the fused minimum bytes, target {BYTES_TARGET}")
    return reasons


def table(variant: str, rows: Rows) -> str:
    """Markdown that also reads well on a terminal."""
    lines = [f"## {variant}", "", f"| {'':25} | launches | MB/image | ÷ minimum | weights MB |"]
    lines.append(f"|{'-' * 27}|---------:|---------:|----------:|-----------:|")
    for name, row in rows.items():
        weights = f"{row['weights_mb']:.1f}" if "weights_mb" in row else ""
        cells = f"{row.get('launches', ''):>8} | {row['mb_per_image']:8.1f} | {row['ratio']:9.3f}"
        lines.append(f"| {name:25} | {cells} | {weights:>10} |")
    return "\n".join(lines)


def write(path: Path | None, text: str) -> None:
    if path is not None:
        with atomic(path) as file:
            file.write((text + "\n").encode())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--variant", nargs="+", choices=VARIANTS, default=DEFAULT_VARIANTS, metavar="NAME")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="default: 64")
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--markdown", type=Path, metavar="OUT")
    args = parser.parse_args(argv)
    results, tables, reasons = {}, [], []
    for variant in args.variant:
        results[variant] = measure(config_for(variant), args.batch_size)
        reasons += missed(variant, results[variant])
        tables.append(table(variant, results[variant]))
        print(tables[-1] + "\n")
    title = f"# Traffic and launches\n\nWritten by `python bench/traffic.py`, batch {args.batch_size}."
    write(args.markdown, "\n\n".join([title, __doc__.strip(), *tables]))
    content = {"batch_size": args.batch_size, "variants": results, "missed": reasons}
    write(args.json, json.dumps(content, indent=1))
    print("MISSED: " + "; ".join(reasons) if reasons else "All targets are met.")
    return 1 if reasons else 0


if __name__ == "__main__":
    sys.exit(main())
