"""bench/feed.py: its candidates prepare the same image, and the report says what was missed, and who was missing."""

import pytest
import torch

pytest.importorskip("skimage", reason="scikit-image is not installed")

import feed  # noqa: E402


@pytest.fixture
def state(monkeypatch):
    """Of a candidate's process, here."""
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(feed, "_state", {})
    return feed._state


@pytest.mark.parametrize("variant", feed.VARIANTS.values())
def test_candidates_agree(state, variant):
    source, levels = feed.encoded(feed.mosaic(700, 600), "JPEG"), {}
    for name in (feed.BEFORE, feed.BARE, feed.TORCHVISION, *feed.DECODERS, "pillow, draft"):
        state.clear()
        feed._begin(name, variant)
        if feed._why_missing() is None:
            levels[name] = feed._levels(source)
            assert feed._timed(source) > 0 and feed._on_all_cores(source, 2) > 0
    exact = levels[feed.BEFORE]
    used = exact != exact[-1] if exact.ndim == 2 else slice(None)  # padding is zero before, and black in bytes
    assert torch.equal(levels["pillow"][used], exact[used])
    for name in {*levels} & {"torch", "simplejpeg"}:
        assert (levels[name] - exact)[used].abs().max() <= 1


def test_a_mosaic_has_every_size():
    for size in feed.SIZES.values():
        assert feed.mosaic(*size).size == size


def test_report(tmp_path):
    def rows(times):
        row = {
            "format": "JPEG",
            "milliseconds": 2.0,
            "images_per_second": 500.0,
            "all_cores": 900.0,
            "times_before": times,
        }
        return [
            row | {"size": size, "candidate": name}
            for size in feed.SIZES
            for name in ("before", "pillow", "simplejpeg")
        ]

    result = {"about": {"device": "a CPU"}, "versions": {"torch": "2"}, "cores": 2, "rounds": 3, "note": "Busy."}
    result |= {"rows": {"224²": rows(2.1)}, "absent": {"torchvision": "not installed"}, "profile": [], "draft": []}
    text = feed.markdown(result)
    assert "| 1 MP | pillow | 2.10 | 2.2 | **missed** |" in text and "| 12 MP | pillow | 2.10 | 2.0 |  |" in text
    assert "torchvision did not take part: not installed." in text and "Busy." in text
    assert "| 256² JPEG | pillow | 2.00 | 500 | 900 | 2.10 |  | 2 | 20 |" in text
    feed.plot(result, tmp_path / "feed.png")
    assert (tmp_path / "feed.png").read_bytes().startswith(b"\x89PNG")
