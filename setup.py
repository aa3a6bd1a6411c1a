"""Packaging: `kernels/` is installed as `siglip_fast.kernels` (a top-level `kernels` would shadow Hugging Face's)."""

from setuptools import setup

setup(
    packages=[
        "siglip_fast",
        "siglip_fast.backends",
        "siglip_fast.integrations",
        "siglip_fast.tuning",
        "siglip_fast.kernels",
    ],
    package_dir={"siglip_fast.kernels": "kernels"},
)
