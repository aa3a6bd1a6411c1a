"""Which of several candidates is right and the fastest: verification, interleaved timing, and the rule that decides."""

import statistics
from collections.abc import Callable

from ..backends.choice import Choice
from ..errors import typed_line, without_folders
from .cache import LAUNCHES

MARGIN = 1.02  # so much faster than the best vendor route one of our kernels has to be
FIRST_ROUNDS, ROUNDS = 3, 15
STILL_IN = 1.25  # times the fastest of the first rounds: what is slower is not timed any further

Check = Callable[[Choice], str | None]  # the reason why a candidate is wrong; may raise
Sample = Callable[[], float]  # seconds of one run
Timer = Callable[[Choice], Sample]  # may raise
Announce = Callable[[Choice], None]


def select(
    candidates: list[Choice],
    check: Check,
    timers: dict[str, Timer],
    announce: Announce = lambda choice: None,
    dropped: dict[str, str] | None = None,
) -> dict:
    """The entry that goes into the cache: for each way of launching the winner and the medians in µs; and what was
    dropped, with the reason.

    `timers` has one for each of `siglip_fast.tuning.cache.LAUNCHES`. `announce` is called before a candidate runs;
    `dropped` names those that must not run at all. A route is None where no candidate is left: the default runs then,
    unmeasured.
    """
    samples, dropped = admit(candidates, check, timers, announce, dropped)
    medians = {launch: medians_of(measure(samples[launch], announce)) for launch in timers}
    return {launch: result(decide(medians[launch]), medians[launch]) for launch in timers} | {"dropped": dropped}


def admit(
    candidates: list[Choice],
    check: Check,
    timers: dict[str, Timer],
    announce: Announce = lambda choice: None,
    dropped: dict[str, str] | None = None,
) -> tuple[dict[str, dict[Choice, Sample]], dict[str, str]]:
    """By way of launching the candidates that are right and run, ready to be timed; and those that were dropped."""
    dropped = dict(dropped or {})
    samples: dict[str, dict[Choice, Sample]] = {launch: {} for launch in timers}
    for choice in candidates:
        if str(choice) in dropped:
            continue
        announce(choice)
        try:
            if reason := check(choice):
                dropped[str(choice)] = reason
                continue
            made = {launch: timer(choice) for launch, timer in timers.items()}
        except Exception as error:  # whatever a compiler, a driver or a library raises: not a candidate here
            dropped[str(choice)] = without_folders(typed_line(error))
            continue
        for launch, sample in made.items():
            samples[launch][choice] = sample
    return samples, dropped


def unmeasured(reason: str) -> dict:
    """The entry of a case for which no candidate ran: its default stays in force."""
    return {launch: result(None, {}) for launch in LAUNCHES} | {"dropped": {"all": reason}}


def result(winner: Choice | None, medians: dict[Choice, float]) -> dict:
    """What an entry holds for a way of launching."""
    route, config = winner or (None, None)
    microseconds = {str(choice): round(1e6 * seconds, 2) for choice, seconds in medians.items()}
    return {"route": route, "config": config, "microseconds": microseconds}


def measure(
    samples: dict[Choice, Sample],
    announce: Announce = lambda choice: None,
    rounds: tuple[int, ...] = (FIRST_ROUNDS, ROUNDS),
) -> dict[Choice, list[float]]:
    """The seconds of each in each round, all taking turns, so that a clock that changes is unfair to none."""
    seconds: dict[Choice, list[float]] = {choice: [] for choice in samples}
    remaining = samples
    for count in rounds:
        for _ in range(count):
            for choice, sample in remaining.items():
                announce(choice)
                seconds[choice].append(sample())
        medians = medians_of(seconds)
        limit = STILL_IN * min(medians.values(), default=0)
        remaining = {choice: sample for choice, sample in samples.items() if medians[choice] <= limit}
    return seconds


def medians_of(seconds: dict[Choice, list[float]]) -> dict[Choice, float]:
    return {choice: statistics.median(values) for choice, values in seconds.items()}


def decide(medians: dict[Choice, float]) -> Choice | None:
    """The fastest vendor route, unless one of our kernels beats it by MARGIN."""
    ours = min((c for c in medians if c.route == "triton"), key=medians.get, default=None)
    vendor = min((c for c in medians if c.route != "triton"), key=medians.get, default=None)
    if ours is None or vendor is None:
        return ours or vendor
    return ours if medians[ours] * MARGIN < medians[vendor] else vendor
