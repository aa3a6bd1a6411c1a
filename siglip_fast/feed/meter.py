"""What limits a run: how long decoding, copying and the model were at work, and how many images each could do a second."""

from dataclasses import dataclass
from typing import Protocol


class Workers(Protocol):
    """Threads or Processes: how many, on how many images they were at work so far, and for how many seconds, all
    together."""

    number: int
    images: int
    busy: float


@dataclass
class Meter:
    """Seconds of work on embedded images, of all devices together; waiting is none."""

    devices: int = 1  # that compute at the same time
    embedded: int = 0
    copying: float = 0.0
    model: float = 0.0

    def rates(self, workers: Workers) -> dict[str, float]:
        """Images a second that each could do if it never had to wait; of those that have been at work."""
        work = {
            "decoding": (workers.images * workers.number, workers.busy),
            "copying": (self.embedded, self.copying),
            "the model": (self.embedded * self.devices, self.model),
        }
        return {name: images / seconds for name, (images, seconds) in work.items() if images and seconds}

    def limit(self, workers: Workers) -> str:
        """Such as "the model limits, at 5.4/s; decoding could do 98.1/s, copying 9000.0/s"; empty at the beginning."""
        rates = sorted(self.rates(workers).items(), key=lambda item: item[1])
        if len(rates) < 3:
            return ""
        (slowest, rate), (second, more), (third, most) = rates
        return f"{slowest} limits, at {rate:.1f}/s; {second} could do {more:.1f}/s, {third} {most:.1f}/s"
