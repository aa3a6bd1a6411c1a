"""What `embed` is given: lists of files, tar shards whole and cut short, and the kinds that a run cannot mix."""

import io
import os
import sys
import tarfile
from argparse import Namespace
from pathlib import Path

import pytest
from embed_command import here, write_shard

from siglip_fast.errors import UserError
from siglip_fast.feed.parts import find_parts, read_part, total_of
from siglip_fast.feed.paths import read_list
from siglip_fast.feed.shards import Slice

__all__ = ["here"]  # a fixture

NOTHING = {"paths": [], "from_file": None, "part_size": None, "image_column": None, "id_column": None}


def arguments(*paths: str, **others) -> Namespace:
    return Namespace(**NOTHING | {"paths": list(paths)} | others)


def read(path: str, **others) -> list[tuple[str, bytes | str]]:
    """The bytes of each image, or what is wrong."""
    ((part,), _) = find_parts(arguments(path, **others))
    assert part["rows"] is None and total_of([part]) is None
    return [
        (name, source.read() if isinstance(source, Slice) else str(source))
        for name, source in read_part(part, os.getcwd())
    ]


MEMBERS = {
    "a/0001.jpg": b"one",
    "a/0001.json": b"{}",
    "a/0002.JPEG": b"two" * 400,
    "a/0002.mask.png": b"mask",
    "v1.5/0003.png": b"three",
    "v1.5/0003.cls": b"3",
    "é" * 120 + ".webp": b"long name",
    "empty.png": b"",
}


class TestShards:
    @pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    def test_images_by_their_extension(self, here, format):
        members = {name: data for name, data in MEMBERS.items() if format != tarfile.USTAR_FORMAT or "é" not in name}
        write_shard("x.tar", members, format)
        images = [name for name in members if name.rpartition(".")[2] in ("jpg", "JPEG", "png", "webp")]
        images.remove("a/0002.mask.png")
        assert read("x.tar") == [(f"x.tar/{name}", MEMBERS[name]) for name in images]
        assert read("x.tar", image_column="mask.png") == [("x.tar/a/0002.mask.png", b"mask")]

    def test_what_is_no_file(self, here):
        with tarfile.open("x.tar", "w") as archive:
            for name, kind in {
                "folder.png": tarfile.DIRTYPE,
                "link.png": tarfile.SYMTYPE,
                "pipe.png": tarfile.FIFOTYPE,
            }.items():
                member = tarfile.TarInfo(name)
                member.type, member.linkname = kind, "/etc/passwd"
                archive.addfile(member)
        assert read("x.tar") == [("x.tar", "no member that is an image in it")]

    def test_a_name_that_no_output_can_hold(self, here):
        write_shard("x.tar", {"\udcff.png": b"1"})
        assert read("x.tar") == [("x.tar/\\udcff.png", b"1")]

    def test_cut_anywhere(self, here):
        """What came before is kept, the shard named: also where it is cut between members, or in its end mark."""
        write_shard("whole.tar", {f"{i}.png": bytes([i]) * 700 for i in range(3)})
        whole = Path("whole.tar").read_bytes()
        assert len(read("whole.tar")) == 3
        member = 512 + 1024
        for length in (
            1,
            300,
            512,
            1000,
            member - 1,
            member,
            member + 1,
            member + 512,
            member + 600,
            3 * member,
            3 * member + 9,
        ):
            Path("x.tar").write_bytes(whole[:length])
            found = read_cut("x.tar")
            headers = (length + 1024) // member  # as many as are whole
            assert [name for name, _ in found] == [f"x.tar/{i}.png" for i in range(headers)] + ["x.tar"]
            for i, (_, data) in enumerate(found[:-1]):
                cut = length < i * member + 512 + 700
                assert data.startswith("cut short: ") if cut else data == bytes([i]) * 700
            assert found[-1][1].startswith(f"cut short or damaged behind {headers} images: ")

    def test_damaged_in_its_midst(self, here):
        write_shard("x.tar", {f"{i}.png": b"1" for i in range(4)})
        data = bytearray(Path("x.tar").read_bytes())
        data[2048:2060] = b"no header at"
        Path("x.tar").write_bytes(data)
        assert [name for name, _ in read("x.tar")] == ["x.tar/0.png", "x.tar/1.png", "x.tar"]
        Path("x.tar").write_bytes(b"no shard" * 1000)
        ((name, wrong),) = read("x.tar")
        assert name == "x.tar" and wrong.startswith("cut short or damaged behind 0 images: ")


def read_cut(path: str) -> list[tuple[str, bytes | str]]:
    ((part,), _) = find_parts(arguments(path))
    found = []
    for name, source in read_part(part, os.getcwd()):
        try:
            found.append((name, source.read() if isinstance(source, Slice) else str(source)))
        except ValueError as error:
            found.append((name, str(error)))
    return found


class TestLists:
    @pytest.mark.parametrize(
        ("data", "wanted"),
        [
            (b"a.png\nb c.png\n", ["a.png", "b c.png"]),
            (b"a.png\r\n\r\nb.png", ["a.png", "b.png"]),
            (b"a\nb.png\0c.png\0", ["a\nb.png", "c.png"]),
            (b"\xff.png\n[1].png\n", ["\udcff.png", "[1].png"]),
        ],
    )
    def test_lines_or_nul(self, here, monkeypatch, data, wanted):
        Path("list").write_bytes(data)
        assert read_list("list") == wanted
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        assert read_list("-") == wanted

    def test_names_are_taken_literally_and_once(self, here):
        Path("1.png").touch()
        Path("list").write_text("[1].png\nnowhere.png\n./1.png\n1.png\n")
        parts, repeated = find_parts(arguments(from_file="list", part_size=2))
        assert [part["images"] for part in parts] == [["[1].png", "nowhere.png"], ["./1.png"]]
        assert repeated == 1 and total_of(parts) == 3

    def test_shards_in_a_list(self, here):
        Path("list").write_text("b.tar\na.tar")
        assert [part["shard"] for part in find_parts(arguments(from_file="list"))[0]] == ["b.tar", "a.tar"]

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (arguments(), "expected either images"),
            (arguments("a.png", from_file="list"), "expected either images"),
            (arguments(from_file="list"), "--from-file list: no paths in it"),
            (arguments("a.png", "b.tar"), "expected one kind of input, got images and tar shards"),
            (arguments("b.parquet", "b.tar"), "expected one kind of input, got Parquet files and tar shards"),
            (arguments("a.tar", id_column="x"), "--id-column is for Parquet files, and the paths are tar shards"),
            (arguments("a.png", image_column="x"), "--image-column is for Parquet files and tar shards"),
            (arguments("a.tar"), "a.tar: no such file or folder"),
        ],
    )
    def test_what_cannot_be(self, here, given, message):
        Path("list").write_text("\n")
        with pytest.raises(UserError, match=message):
            find_parts(given)
