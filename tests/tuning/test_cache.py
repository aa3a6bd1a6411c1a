"""The cache of measured configurations: what is read, what is ignored, and which choice a number of rows gets."""

import json
import logging
import subprocess
import sys

import pytest
import torch

from siglip_fast.backends.choice import DEFAULT, Choice
from siglip_fast.tuning import cache
from siglip_fast.tuning.cache import Key, Operation, Selection

KEY = Key("A GPU", "1.2", "2.13", "3.8", "91900", "none", "0123")
OPERATION = Operation("linear_residual", (768, 3072, True), torch.bfloat16)
CONFIG = {"BLOCK_M": 64, "num_warps": 4}


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("SIGLIP_FAST_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("SIGLIP_FAST_TUNE", raising=False)
    return tmp_path


def entry(route="triton", config=CONFIG) -> dict:
    found = {"route": route, "config": config, "microseconds": {"x": 1.0}}
    return {"eager": found, "graph": found | {"route": "vendor", "config": None}, "dropped": {}}


def choice(entries: dict, rows: int, operation: Operation = OPERATION) -> Choice:
    return Selection(entries).choice(*operation, rows)


def test_written_and_read_again():
    entries = {str(OPERATION): {"256": entry()}}
    cache.write(KEY, entries)
    assert cache.read(KEY) == entries
    assert KEY.path().name.startswith("A-GPU-")
    assert [path.name for path in KEY.path().parent.iterdir()] == [KEY.path().name]  # no temporary file is left


def test_each_part_of_the_key_counts():
    cache.write(KEY, {str(OPERATION): {"256": entry()}})
    for field in Key._fields:
        assert cache.read(KEY._replace(**{field: "another"})) == {}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: "",
        lambda content: json.dumps(content)[:-30],
        lambda content: "[]",
        lambda content: json.dumps(content | {"format": 0}),
        lambda content: json.dumps(content | {"key": KEY._replace(gpu="B")._asdict()}),
        lambda content: json.dumps(content).replace("64", "63"),
        lambda content: json.dumps(content | {"operations": {}}),
        lambda content: json.dumps({key: value for key, value in content.items() if key != "digest"}),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_ignored_aloud(spoil, caplog):
    cache.write(KEY, {str(OPERATION): {"256": entry()}})
    KEY.path().write_text(spoil(json.loads(KEY.path().read_text())))
    with caplog.at_level(logging.WARNING):
        assert cache.read(KEY) == {}
    assert str(KEY.path()) in caplog.text


def test_a_foreign_file_that_was_shipped_under_this_name(caplog):
    other = KEY._replace(driver="9.9")
    cache.write(other, {str(OPERATION): {"256": entry()}})
    other.path().rename(KEY.path())
    assert cache.read(KEY) == {} and "another machine's" in caplog.text


def test_the_nearest_number_of_rows():
    tables = {str(OPERATION): {str(b): entry(config={"b": b}) for b in (256, 2048, 65536)}}
    wanted = {33: 256, 196: 256, 512: 256, 600: 2048, 1568: 2048, 4000: 2048, 16000: 65536, 262144: 65536}
    assert {rows: choice(tables, rows).config["b"] for rows in wanted} == wanted


@pytest.mark.parametrize("rows", [1, 32, 262145])
def test_too_far_from_what_was_measured(rows):
    """Tiles for a thousand rows are a bad guess for one."""
    assert choice({str(OPERATION): {str(b): entry() for b in (256, 65536)}}, rows) == DEFAULT


def test_a_tuned_one_goes_before_a_raced_one():
    raced = entry("vendor", None) | {"raced": True}
    tables = {str(OPERATION): {"256": raced, "1024": entry(config={"b": 1024}), "32768": raced}}
    wanted = {
        200: Choice("triton", {"b": 1024}),
        64: Choice("vendor"),
        32768: Choice("vendor"),
        2048: Choice("triton", {"b": 1024}),
    }
    assert {rows: choice(tables, rows) for rows in wanted} == wanted


def test_an_update_keeps_what_others_wrote():
    raced, tuned = entry("vendor", None) | {"raced": True}, entry()
    assert cache.update(KEY, {str(OPERATION): {"256": raced}}) == {str(OPERATION): {"256": raced}}
    cache.update(KEY, {"another": {"1": tuned}, str(OPERATION): {"8": raced}})
    assert cache.read(KEY) == {"another": {"1": tuned}, str(OPERATION): {"256": raced, "8": raced}}
    cache.update(KEY, {str(OPERATION): {"256": tuned}})
    assert cache.update(KEY, {str(OPERATION): {"256": raced, "16": raced}}, replace=False) == cache.read(KEY)
    assert cache.read(KEY)[str(OPERATION)] == {"256": tuned, "8": raced, "16": raced}


def test_a_file_that_cannot_be_used_is_updated_to_one_that_can():
    cache.update(KEY, {str(OPERATION): {"256": entry()}})
    KEY.path().write_text("{")
    cache.update(KEY, {"another": {"1": entry()}})
    assert cache.read(KEY) == {"another": {"1": entry()}}


def test_the_default_where_nothing_was_measured_or_nothing_passed():
    tables = {str(OPERATION): {"256": entry(route=None, config=None)}}
    assert choice(tables, 196) == DEFAULT
    for other in (OPERATION._replace(dtype=torch.float16), OPERATION._replace(dims=(768, 3072, False))):
        assert choice({str(OPERATION): {"256": entry()}}, 196, other) == DEFAULT


def test_launched_from_a_graph():
    selected = Selection({str(OPERATION): {"256": entry()}})
    assert selected.choice(*OPERATION, 200) == Choice("triton", CONFIG)
    assert selected.choice(*OPERATION, 200, "graph") == Choice("vendor")


def test_a_vendor_route():
    assert choice({str(OPERATION): {"256": entry("vendor", None)}}, 200) == Choice("vendor")


@pytest.mark.parametrize("rows, expected", [(1, 1), (2, 2), (3, 4), (196, 256), (256, 256), (257, 512)])
def test_bucket(rows, expected):
    assert cache.bucket(rows) == expected


def test_off(monkeypatch):
    cpu = torch.device("cpu")
    cache.write(Key.of(cpu), {str(OPERATION): {"256": entry()}})
    assert Selection.load(cpu).choice(*OPERATION, 196).config == CONFIG
    monkeypatch.setenv("SIGLIP_FAST_TUNE", "off")
    assert Selection.load(cpu).choice(*OPERATION, 196) == DEFAULT


def test_unknown_mode(monkeypatch):
    monkeypatch.setenv("SIGLIP_FAST_TUNE", "yes")
    with pytest.raises(ValueError, match="SIGLIP_FAST_TUNE: expected one of off, cached, auto, got 'yes'"):
        Selection.load(torch.device("cpu"))


def test_the_source_hash_is_that_of_every_process():
    code = "from siglip_fast.tuning.cache import source_hash; print(source_hash())"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == cache.source_hash()


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({"SIGLIP_FAST_CACHE_DIR": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a"),
        ({"XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/siglip_fast"),
        ({"XDG_CACHE_HOME": "", "HOME": "/c"}, "/c/.cache/siglip_fast"),
    ],
    ids=["ours", "xdg", "home"],
)
def test_where_the_cache_is(variables, expected, monkeypatch):
    for name in ("SIGLIP_FAST_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(cache.cache_dir()) == expected


def test_nobodys_home_is_an_empty_cache(monkeypatch):
    """A user without an entry in the password file, as containers have them."""
    for name in ("SIGLIP_FAST_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    assert cache.read(KEY) == {}
