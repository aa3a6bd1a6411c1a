"""What the server plugins share: the switch that turns them on, and that none of them stops a server."""

import functools
import logging
import os
from collections.abc import Callable

from ..errors import typed_line

SWITCH = "SIGLIP_FAST_PLUGIN"

logger = logging.getLogger("siglip_fast")


def plugin(server: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Makes an entry point of a function that changes `server`.

    The entry point does nothing unless SIGLIP_FAST_PLUGIN is "1", does it once a process, and never raises: what the
    function raises is logged with the remark that the server is as it was, which the function has to see to.
    """

    def decorate(change: Callable[[], None]) -> Callable[[], None]:
        done = False

        @functools.wraps(change)
        def entry_point() -> None:
            nonlocal done
            if done or os.environ.get(SWITCH) != "1":
                return
            try:
                change()
                done = True
            except Exception as error:  # of another version's of the server, whatever it is
                logger.warning("%s is left as it was: %s", server, typed_line(error))

        return entry_point

    return decorate
