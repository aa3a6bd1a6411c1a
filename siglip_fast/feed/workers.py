"""Images decoded ahead of the model, in order, by threads; processes.py does the same by processes."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from ..errors import first_line
from .kinds import Inputs
from .parts import Source
from .shards import Slice

Prepared = tuple[Any, Inputs | str]  # an image's name, and what the model takes of it or why it takes nothing


def load(source: Source, prepare: Callable[[str | bytes], Inputs]) -> Inputs | str:
    """What `prepare` makes of an image, or why it makes nothing."""
    try:
        if isinstance(source, Exception):
            raise source
        return prepare(source.read() if isinstance(source, Slice) else source)
    except Exception as error:  # whatever Pillow raises; of a type that might not survive a process
        return first_line(error)


class Threads:
    """For few images, and where processes of one's own are not wanted: Pillow lets go of Python's lock, mostly."""

    def __init__(self, prepare: Callable[[str | bytes], Inputs], number: int, ahead: int):
        """`prepare` runs in `number` threads, on no more than `ahead` images in advance."""
        self.number = number
        self._prepare, self._ahead = prepare, ahead
        self.images, self.busy = 0, 0.0  # done so far, and the seconds that took, of all threads together
        self._lock = threading.Lock()

    def _load(self, source: Source) -> Inputs | str:
        start = time.perf_counter()
        result = load(source, self._prepare)
        with self._lock:
            self.images += 1
            self.busy += time.perf_counter() - start
        return result

    def prepared(self, images: Iterable[tuple[Any, Source]]) -> Iterator[Prepared]:
        """(name, inputs or why there are none) of each image, in order."""
        pool = ThreadPoolExecutor(self.number)
        queue: deque[tuple[Any, Future]] = deque()
        try:
            for name, source in images:
                queue.append((name, pool.submit(self._load, source)))
                if len(queue) > self._ahead:
                    name, future = queue.popleft()
                    yield name, future.result()
            while queue:
                name, future = queue.popleft()
                yield name, future.result()
        finally:
            pool.shutdown(cancel_futures=True)
