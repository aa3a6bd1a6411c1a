"""The server from which processes.py forks: with what they need imported, without threads and CUDA, deaf to Ctrl-C.

Importing takes it 5 s, so it is started before this process imports as much; hence a module without imports of ours.
"""

import contextlib
import multiprocessing
import resource
import signal
from multiprocessing import forkserver


def start_server() -> None:
    """Starts it if it does not run yet, and does not wait until it is ready."""
    multiprocessing.set_forkserver_preload(["siglip_fast.feed.processes"])
    # Blocked signals are inherited: Ctrl-C reaches the whole group, and to end the others is for this process.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    # A tensor in shared memory is an open file, and 1024 are soon used up.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
