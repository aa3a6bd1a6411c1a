"""Which backend runs where Triton would lack what it compiles its launchers with."""

import shutil

import pytest
import torch

from siglip_fast.backends import select

pytest.importorskip("triton")
GPU = torch.device("cuda")


@pytest.fixture
def compilers(tmp_path, monkeypatch):
    """A folder that is all of PATH, on a machine with a Hopper GPU and no C compiler."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    select._triton_unavailable.cache_clear()
    yield tmp_path
    select._triton_unavailable.cache_clear()


def test_without_a_c_compiler_triton_is_an_error_that_names_it(compilers):
    with pytest.raises(RuntimeError, match="cannot run on cuda: Triton needs a C compiler, and neither gcc nor clang"):
        select.backend_for("triton", GPU)


def test_without_a_c_compiler_auto_has_the_reason_and_torch_runs(compilers):
    name, reason = select.backend_for("auto", GPU)
    assert name is None and "C compiler" in reason
    assert select.backend_for("torch", GPU) == ("torch", None)


@pytest.mark.parametrize("name", ["gcc", "clang"])
def test_either_compiler_will_do(name, compilers):
    (compilers / name).write_text("#!/bin/sh\n")
    (compilers / name).chmod(0o755)
    assert shutil.which(name) and select.backend_for("auto", GPU) == ("triton", None)


def test_any_other_will_do_if_it_is_named(compilers, monkeypatch):
    monkeypatch.setenv("CC", "zig cc")
    assert select.backend_for("auto", GPU) == ("triton", None)


def test_triton_itself_would_refuse(compilers):
    """Where it looks; it is asked as it builds, so that a version that looks elsewhere is noticed."""
    from triton.runtime import build

    if hasattr(build, "_find_compiler"):
        build._find_compiler.cache_clear()
    with pytest.raises(RuntimeError, match="Failed to find C compiler"):
        build._build("x", str(compilers / "x.c"), str(compilers), [], [], [], [])
