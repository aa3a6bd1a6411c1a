"""Where the tests of this process run: on how many threads, and on which device. Imported before Triton is."""

import os

import torch

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores, and so do the processes that they start
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# A GPU, or ttsem, which says of every tensor that it is on one.
ON_GPU = torch.cuda.is_available() or torch.empty(0).is_cuda
DEVICE = "cuda" if ON_GPU else "cpu"
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
