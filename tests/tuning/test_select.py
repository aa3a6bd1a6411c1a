"""The rule that picks a winner, on candidates and times that are made up."""

import itertools

import pytest

from siglip_fast.backends.choice import Choice
from siglip_fast.tuning.cache import is_measured
from siglip_fast.tuning.select import FIRST_ROUNDS, ROUNDS, select, unmeasured

TILE_A, TILE_B = Choice("triton", {"BLOCK_M": 64}), Choice("triton", {"BLOCK_M": 128})
VENDOR, OTHER_VENDOR = Choice("vendor"), Choice("sdpa flash")


class FakeTimer:
    """Seconds that are told, and a record of the order in which they were asked for."""

    def __init__(self, seconds: dict):
        self.seconds = {
            str(choice): itertools.cycle(s if isinstance(s, list) else [s]) for choice, s in seconds.items()
        }
        self.asked: list[str] = []

    def __call__(self, choice):
        def sample():
            self.asked.append(str(choice))
            return next(self.seconds[str(choice)])

        return sample


def passes(choice):
    return None


def select_eager(candidates, check, timer, *args) -> dict:
    """What was found for eager launches, with what was dropped; graphs are timed by a timer that always says 1."""
    entry = select(candidates, check, {"eager": timer, "graph": lambda choice: lambda: 1.0}, *args)
    return entry["eager"] | {"dropped": entry["dropped"]}


def winner(seconds: dict, check=passes) -> Choice | None:
    entry = select_eager(list(seconds), check, FakeTimer(seconds))
    return Choice(entry["route"], entry["config"]) if entry["route"] else None


def test_each_way_of_launching_has_its_own_winner():
    timers = {"eager": FakeTimer({TILE_A: 1e-6, VENDOR: 2e-6}), "graph": FakeTimer({TILE_A: 2e-6, VENDOR: 1e-6})}
    entry = select([TILE_A, VENDOR], passes, timers)
    assert entry["eager"] == {
        "route": "triton",
        "config": TILE_A.config,
        "microseconds": {str(TILE_A): 1.0, "vendor": 2.0},
    }
    assert entry["graph"]["route"] == "vendor" and is_measured(entry)


def test_the_fastest_wins():
    assert winner({TILE_A: 3e-6, TILE_B: 1e-6, VENDOR: 2e-6}) == TILE_B
    assert winner({TILE_A: 3e-6, TILE_B: 4e-6, VENDOR: 2e-6, OTHER_VENDOR: 1e-6}) == OTHER_VENDOR


@pytest.mark.parametrize("ours, expected", [(100e-6, VENDOR), (98.1e-6, VENDOR), (97.9e-6, TILE_A)])
def test_more_than_two_percent_displace_the_vendor(ours, expected):
    assert winner({TILE_A: ours, VENDOR: 100e-6}) == expected


def test_a_tie_goes_to_the_first():
    assert winner({TILE_A: 1e-6, TILE_B: 1e-6}) == TILE_A


def test_medians_decide_not_means_nor_minima():
    assert winner({TILE_A: [1e-6, 5e-6, 5e-6], TILE_B: [3e-6, 3e-6, 90e-6], VENDOR: 4e-6}) == TILE_B


def test_a_wrong_candidate_never_wins():
    timer = FakeTimer({TILE_A: 1e-9, TILE_B: 1e-6, VENDOR: 2e-6})
    entry = select_eager([TILE_A, TILE_B, VENDOR], lambda c: "wrong: error 1" if c == TILE_A else None, timer)
    assert entry["config"] == TILE_B.config
    assert entry["dropped"] == {str(TILE_A): "wrong: error 1"}
    assert str(TILE_A) not in timer.asked and str(TILE_A) not in entry["microseconds"]


def raises(choice):
    if choice != VENDOR:
        raise ValueError("no such tile\nand more")


def test_exceptions_drop_a_candidate():
    entry = select_eager([TILE_A, VENDOR], raises, FakeTimer({VENDOR: 1e-6}))
    assert entry["route"] == "vendor" and entry["dropped"] == {str(TILE_A): "ValueError: no such tile"}


def test_an_exception_while_recording_drops_a_candidate():
    def timer(choice):
        raises(choice)
        return lambda: 1e-6

    entry = select_eager([TILE_A, VENDOR], passes, timer)
    assert entry["route"] == "vendor" and list(entry["dropped"]) == [str(TILE_A)]


def test_an_interrupt_is_no_dropped_candidate():
    def check(choice):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        select_eager([TILE_A, VENDOR], check, FakeTimer({}))


def test_nothing_is_left():
    entry = select_eager([TILE_A, TILE_B], lambda c: "wrong", FakeTimer({}))
    assert entry["route"] is None and entry["config"] is None
    assert entry["microseconds"] == {} and len(entry["dropped"]) == 2
    assert not is_measured(unmeasured("for a test"))


def test_those_that_must_not_run_do_not():
    ran = []
    entry = select_eager(
        [TILE_A, VENDOR], lambda c: ran.append(c), FakeTimer({VENDOR: 1e-6}), ran.append, {str(TILE_A): "hung"}
    )
    assert set(ran) == {VENDOR} and len(ran) > 2  # announced, checked, and announced each time that it is timed
    assert entry["dropped"] == {str(TILE_A): "hung"}


def test_they_take_turns_and_the_slow_ones_stop():
    timer = FakeTimer({TILE_A: 1e-6, TILE_B: 1.2e-6, VENDOR: 2e-6})
    select_eager([TILE_A, TILE_B, VENDOR], passes, timer)
    a, b, vendor = map(str, (TILE_A, TILE_B, VENDOR))
    assert timer.asked == [a, b, vendor] * FIRST_ROUNDS + [a, b] * ROUNDS
