"""timm's VisionTransformer with SigLIP's settings: `vit_*_siglip_*`, and with it the image tower of open_clip.

Importing this imports timm; `siglip_fast.apply_to` does where a model has such a tower. Before timm 1.0.15 attention
pooling has exact GELU always; where the blocks have the tanh form, timm's own code runs then.
"""

from collections.abc import Iterator
from types import SimpleNamespace

import torch
from timm.layers import LayerNorm
from timm.layers.activations import GELU, GELUTanh
from timm.models import vision_transformer as stock
from torch import Tensor, nn

from .anatomy import Anatomy, Unsupported, block_view, check_head_dim, check_tensors, compare, compare_class, descendant
from .base import Fused

# Of the tower itself, whose every forward looks at them; what lies below it is compared once, then watched.
_SETTINGS = {"cls_token": None, "reg_token": None, "num_prefix_tokens": 0, "dynamic_img_size": False}
_EXACT_GELU = (nn.GELU, GELU)  # many published models have it, though SigLIP was trained with the tanh form
_METHODS = ("forward_features", "forward_head", "pool", "_pos_embed")


def check(tower: stock.VisionTransformer) -> None:
    """Raise Unsupported unless the operations compute what the modules of the tower do."""
    compare_class("patch_embed", tower.patch_embed, stock.PatchEmbed)
    compare_class("patch_embed.proj", tower.patch_embed.proj, nn.Conv2d)
    D, C, p, _ = tower.patch_embed.proj.weight.shape
    shape = None if tower.pos_embed is None else tuple(tower.pos_embed.shape)
    if shape != (1, tower.patch_embed.num_patches, D):
        raise Unsupported(f"pos_embed has shape {shape}, not one position for each patch")
    with torch.device("meta"):
        compare("patch_embed", tower.patch_embed, stock.PatchEmbed(tower.patch_embed.img_size, p, C, D))
        compare("pos_drop", tower.pos_drop, nn.Dropout(0.0))
        compare("patch_drop", tower.patch_drop, nn.Identity())
        compare("norm_pre", tower.norm_pre, nn.Identity())
        _check_blocks(tower, D)
    check_tensors(tower, tower.patch_embed.proj.weight)


def _check_blocks(tower: stock.VisionTransformer, D: int) -> None:
    compare_class("norm", tower.norm, LayerNorm if isinstance(tower.norm, LayerNorm) else nn.LayerNorm)
    compare_class("blocks", tower.blocks, nn.Sequential)
    if not len(tower.blocks):
        raise Unsupported("there are no blocks")
    kinds = {"": stock.Block, ".attn": stock.Attention, ".mlp": stock.Mlp, ".mlp.fc1": nn.Linear}
    for name, kind in kinds.items():
        compare_class(f"blocks.0{name}", tower.get_submodule(f"blocks.0{name}"), kind)
    attention, mlp = tower.blocks[0].attn, tower.blocks[0].mlp
    if type(mlp.act) not in (GELUTanh, *_EXACT_GELU):
        raise Unsupported(f"the activation is {mlp.act}, no GELU")
    check_head_dim(attention.head_dim)
    ratio = (len(mlp.fc1.weight) + 0.5) / D  # timm rounds the product down
    norm, heads = type(tower.norm), attention.num_heads
    block = stock.Block(D, heads, ratio, qkv_bias=True, norm_layer=norm, act_layer=type(mlp.act))
    for i, own in enumerate(tower.blocks):
        compare(f"blocks.{i}", own, block)
    compare("norm", tower.norm, norm(D))
    if tower.attn_pool is not None:
        pool = stock.AttentionPoolLatent(D, num_heads=heads, mlp_ratio=ratio, norm_layer=norm)
        pool.mlp.act = type(mlp.act)()  # before timm 1.0.15 it is exact whatever the blocks have
        compare("attn_pool", tower.attn_pool, pool)


def view(tower: stock.VisionTransformer) -> SimpleNamespace:
    """The tower under the names of transformers' SigLIP."""
    conv, pool = tower.patch_embed.proj, tower.attn_pool
    return SimpleNamespace(
        embeddings=SimpleNamespace(
            patch_embedding=conv, patch_size=conv.kernel_size[0], num_patches=tower.patch_embed.num_patches
        ),
        encoder=SimpleNamespace(layers=[block_view(block, block.mlp) for block in tower.blocks]),
        post_layernorm=tower.norm,
        use_head=pool is not None,
        head=None if pool is None else _head(pool),
        activation="erf" if type(tower.blocks[0].mlp.act) in _EXACT_GELU else "tanh",
    )


def _head(pool: nn.Module) -> SimpleNamespace:
    attention = SimpleNamespace(
        in_proj_weight=torch.cat([pool.q.weight, pool.kv.weight]),
        in_proj_bias=torch.cat([pool.q.bias, pool.kv.bias]),
        out_proj=pool.proj,
        num_heads=pool.num_heads,
    )
    return SimpleNamespace(attention=attention, probe=pool.latent, layernorm=pool.norm, mlp=pool.mlp)


class VisionTransformer(Fused, stock.VisionTransformer):
    """timm's VisionTransformer whose `forward` and `forward_features` run fused, or as timm's where that cannot be.

    All else, such as masks and `forward_intermediates`, is timm's. Under torch.compile timm's code is traced; for
    torch.jit.script call `siglip_fast.restore` first. RuntimeError is raised where `strict` is set and the fused path
    does not apply, or the backend asked for cannot run.
    """

    anatomy = Anatomy(check, view, patch_embedding=lambda tower: descendant(tower, "patch_embed", "proj"), watched=())

    @classmethod
    def declines(cls, tower: stock.VisionTransformer) -> str | None:
        return "it has a class token or registers, so it is not SigLIP's" if tower.num_prefix_tokens else None

    def forward_features(self, x: Tensor, *args, **kwargs) -> Tensor:
        """`x [B, C, H, W]` → the tokens `[B, N, D]` after the last LayerNorm."""
        outputs = self._outputs(x, False, *args, **kwargs)
        return super().forward_features(x, *args, **kwargs) if outputs is None else outputs[0]

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """`x [B, C, H, W]` → the pooled tokens `[B, D]`, or what the classifier makes of them."""
        outputs = self._outputs(x, True, *args, **kwargs)
        if outputs is None:
            return super().forward(x, *args, **kwargs)
        tokens, pooled = outputs
        if not self.batch_invariant:
            return self._classified(tokens, pooled)
        images = zip(tokens.split(1), [None] * len(tokens) if pooled is None else pooled.split(1), strict=True)
        return torch.cat([self._classified(*image) for image in images])

    def _classified(self, tokens: Tensor, pooled: Tensor | None) -> Tensor:
        """By timm's own code."""
        return self.forward_head(tokens) if pooled is None else self.head(self.head_drop(self.fc_norm(pooled)))

    def _outputs(self, x: Tensor, pool: bool, *args, **kwargs) -> tuple[Tensor, Tensor | None] | None:
        """The tokens and, if asked for, what `attn_pool` makes of them; None where timm's code has to run."""
        if not isinstance(x, Tensor) or torch.compiler.is_exporting():
            return None
        if torch.compiler.is_compiling():
            return self._delegate("torch.compile traces timm's code")
        derived, reason = self._route(x, *args, **kwargs)
        if reason is not None:
            return self._delegate(reason)
        return derived.run(x, self.pos_embed[0], head=pool)

    def _call_reasons(self, pixel_values: Tensor, *args, **kwargs) -> Iterator[str]:
        yield from super()._call_reasons(pixel_values, *args, **kwargs)
        weight, size = self._patch_weight(), getattr(self.patch_embed, "img_size", None)
        if weight is None or size is None:
            return  # the tower has a reason
        own = (*pixel_values.shape[1:], pixel_values.dtype)
        if own != (expected := (weight.shape[1], *size, weight.dtype)):
            yield f"the images are {own}, not {expected}"

    def _request_reasons(self, *args, **kwargs) -> Iterator[str]:
        if any(value is not None and value is not False for value in (*args, *kwargs.values())):
            yield "more than the images was given (a mask)"
        for name, expected in _SETTINGS.items():
            own = getattr(self, name, None)
            if type(own) is not type(expected) or own != expected:
                yield f"{name} is set"
        for name in _METHODS:
            home = getattr(getattr(stock.VisionTransformer, name, None), "__module__", None)
            if home != stock.__name__ or name in vars(self):
                yield f"{name} is replaced"
