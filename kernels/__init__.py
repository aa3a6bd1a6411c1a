"""Triton kernels of the SigLIP vision tower, one file an operation. Installed as `siglip_fast.kernels`.

The launchers trust their arguments (contiguous, of one dtype, of matching shapes): call them through
`siglip_fast.ops`, which states the contracts and checks them. Importing this package imports no Triton;
importing one of its modules does.
"""
