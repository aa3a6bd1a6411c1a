"""Towers whose operations can be measured on the GPU at hand: `model.tune()`, and SIGLIP_FAST_TUNE=auto."""

import math
from collections.abc import Sequence

from torch import Tensor

from ..backends.select import is_capturing
from ..tuning.tune import Report, first_contact, tune
from .base import Fused
from .weights import Derived


class Tuned(Fused):
    def tune(self, batch_sizes: Sequence[int] = (1, 8, 64), *, budget: float = 900.0, force: bool = False) -> Report:
        """Measure on this GPU how each of the model's operations runs fastest, and use that from now on.

        Every kernel configuration and every vendor route is verified and timed in a process of its own; the results
        stay in a cache file (`siglip_fast.tuning.cache`) that later processes read. What it holds already is not
        measured again unless `force`; what a first forward's race found (`siglip_fast.tuning.race`) is. The same as `siglip-fast tune`.

        Args:
            batch_sizes: images a forward. Batches up to four times larger or smaller run as the nearest of these. Of images of any
                size as many patches are measured as so many of 1024 have, or of the config's num_patches.
            budget: seconds; what is not measured by then stays as it was.

        Raises:
            ValueError: a batch size is not a positive integer.
            RuntimeError: the Triton kernels do not run on the model's device, or the model is batch invariant and would not
                use what is measured.
        """
        if self.batch_invariant:
            raise RuntimeError("tune: a batch-invariant model runs built-in configurations, whatever is measured")
        weight = self._patch_weight()
        try:
            return tune(self.config, weight.dtype, batch_sizes, weight.device, budget=budget, force=force)
        finally:
            self.forget_derived()  # the next forward reads the cache

    def _first_contact(self, derived: Derived, pixel_values: Tensor) -> None:
        """To be called before a forward runs on weights that are new."""
        if derived.ops.backend == "triton" and not is_capturing(pixel_values):
            derived.is_new = False
            if derived.ops.batch_invariant:
                return
            patch = derived.weights.patch
            tokens = math.prod(size // patch.patch_size for size in pixel_values.shape[2:])
            first_contact(self.config, patch.weight.dtype, len(pixel_values), tokens, patch.weight.device)
