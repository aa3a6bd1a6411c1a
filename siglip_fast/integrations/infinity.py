"""Infinity: its command line, the vision towers of the models that it loads made fast. Written against Infinity 0.0.78.

    python -m siglip_fast.integrations.infinity v2 --model-id google/siglip-base-patch16-224

Infinity runs on a transformers without a patch mapping, and loads by AutoModel, so `siglip_fast.register` cannot reach it: what
is replaced is the constructor of the class that holds a loaded model. Arguments, routes and answers are Infinity's.
"""

import functools
import logging
from typing import Any

import siglip_fast

from ..errors import UserError

logger = logging.getLogger("siglip_fast")


def apply_swap() -> None:
    """Replaces the constructor. Raises UserError where Infinity is not installed, or of another build."""
    try:
        from infinity_emb.transformer.vision.torch_vision import TIMM
    except ImportError as error:
        raise UserError(f"Infinity cannot be imported (pip install 'infinity-emb[all]==0.0.78'): {error}") from error
    stock = TIMM.__init__

    @functools.wraps(stock)
    def construct(self: Any, *args, **kwargs) -> None:
        stock(self, *args, **kwargs)
        if siglip_fast.towers(self.model):
            siglip_fast.apply_to(self.model)
            logger.warning("Infinity: %s", "; ".join(map(repr, siglip_fast.towers(self.model))))

    TIMM.__init__ = construct


def main() -> None:
    """What the command `infinity_emb` does."""
    apply_swap()
    from infinity_emb.cli import cli

    cli()


if __name__ == "__main__":
    main()
