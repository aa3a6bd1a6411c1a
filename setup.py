"""Packaging: `kernels/` is installed as `siglip_fast.kernels` (a top-level `kernels` would shadow Hugging Face's)."""

from setuptools import setup

setup(
    packages=[
        "siglip_fast",
        *(
            f"siglip_fast.{wing}"
            for wing in ("backends", "cli", "feed", "integrations", "kernels", "models", "running", "tuning")
        ),
    ],
    package_dir={"siglip_fast.kernels": "kernels"},
)
