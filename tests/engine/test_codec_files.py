"""Images on disk to files and back."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip("constriction")

from fastcil.compression.codec import ImageCodec
from fastcil.compression.errors import BitstreamError
from fastcil.compression.zoo import build_codec
from fastcil.engine.codec_files import (
    decode_files,
    encode_files,
    find_photos,
    find_streams,
    inspect_file,
    load_photos,
    streams_of,
    verify_files,
)
from fastcil.errors import DataError, FastcilError

Write = Callable[..., dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def codec() -> ImageCodec:
    torch.manual_seed(0)
    return ImageCodec(build_codec("hierarchical-tiny"))


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes small images under the temporary folder; what they hold, by name."""

    def write(*names: str) -> dict[str, np.ndarray]:
        found = {}
        for k, name in enumerate(names):
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            image = np.random.default_rng(k).integers(0, 256, (9 + k, 20, 3), dtype=np.uint8)
            cv2.imwrite(str(path), image[..., ::-1])
            found[os.path.splitext(name)[0]] = image
        return found

    return write


@pytest.mark.parametrize("packed", [False, True])
def test_names_are_paths_below_the_source(tmp_path: Path, write: Write, packed: bool) -> None:
    images = write("in/b.png", "in/a/c.png", "in/a.png")
    source = tmp_path / "in"
    if packed:
        with tarfile.open(tmp_path / "in.tar", "w") as tar:
            tar.add(source, ".")
        source = tmp_path / "in.tar"
    photos = load_photos([source])
    assert photos.names == ("a/c", "a", "b")
    for k, name in enumerate(photos.names):
        assert np.array_equal(photos.images.image(k).numpy(), images[f"in/{name}"])


def test_several_sources(tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    write("in/b.png", "c.png")
    monkeypatch.setenv("FASTCIL_DATA", str(tmp_path))
    assert list(find_photos([tmp_path / "c.png", "in"])) == ["c", "b"]
    with pytest.raises(DataError, match="two images are called 'c'"):
        find_photos(["c.png", tmp_path])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no image"):
        find_photos(["empty"])


def test_round_trip(tmp_path: Path, write: Write, codec: ImageCodec) -> None:
    write("in/b.png", "in/deep/a.png")
    out, back = tmp_path / "out", tmp_path / "back"
    made = dict(encode_files(codec, [tmp_path / "in"], 64.0, out))
    assert list(made) == [out / "b.fcl", out / "deep/a.fcl"]
    assert find_streams([out]) == {out / "b.fcl": "b", out / "deep/a.fcl": "deep/a"}
    for path, bpp in made.items():
        assert path.stat().st_size * 8 == pytest.approx(bpp * inspect_file(path)["height"] * 20)
    assert [wrong for _, wrong in verify_files([out])] == [None, None]
    assert [wrong for _, wrong in verify_files([out], codec)] == [None, None]
    assert list(decode_files(codec, [out], back)) == [back / "b.png", back / "deep/a.png"]
    for path, name in find_streams([out]).items():
        wanted = codec.decode(path.read_bytes()).numpy()
        assert np.array_equal(cv2.imread(str(back / f"{name}.png"))[..., ::-1], wanted)
    # The same again, over what is there, leaves nothing else behind.
    before = {path: path.read_bytes() for path in made}
    assert dict(encode_files(codec, [tmp_path / "in"], 64.0, out)) == made
    assert {path: path.read_bytes() for path in sorted(out.rglob("*.*"))} == before


def test_a_bad_image_leaves_the_good_ones_and_nothing_half(
    tmp_path: Path, write: Write, codec: ImageCodec
) -> None:
    write("in/a.png", "in/c.png")
    (tmp_path / "in/b.png").write_bytes((tmp_path / "in/a.png").read_bytes()[:60])
    with pytest.raises(DataError, match=r"b\.png does not decode"):
        list(encode_files(codec, [tmp_path / "in"], 64.0, tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.fcl"]
    small = ImageCodec(codec.model, max_pixels=190)
    with pytest.raises(FastcilError, match="'c': The image has 10 x 20 pixels"):
        list(encode_files(small, [tmp_path / "in/a.png", tmp_path / "in/c.png"], 64.0, tmp_path))


def test_nothing_is_written_that_does_not_decode(
    tmp_path: Path, write: Write, codec: ImageCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("a.png")

    def drifted(data: bytes) -> None:
        raise BitstreamError("The decoded symbols are not those that were coded.")

    monkeypatch.setattr(codec, "verify", drifted)
    with pytest.raises(BitstreamError, match="'a': The decoded symbols"):
        list(encode_files(codec, [tmp_path / "a.png"], 64.0, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_the_old_file(
    tmp_path: Path, write: Write, codec: ImageCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("a.png")
    (path,) = dict(encode_files(codec, [tmp_path / "a.png"], 64.0, tmp_path / "out"))
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastcil.engine.state.os.fsync", full)
    with pytest.raises(FastcilError, match=r"a\.fcl' can't be written: No space left on device"):
        list(encode_files(codec, [tmp_path / "a.png"], 128.0, tmp_path / "out"))
    assert [*path.parent.iterdir()] == [path] and path.read_bytes() == before


def test_verify_says_which_files_are_bad(tmp_path: Path, write: Write, codec: ImageCodec) -> None:
    write("in/a.png", "in/b.png", "in/c.png")
    a, b, c = dict(encode_files(codec, [tmp_path / "in"], 64.0, tmp_path / "out"))
    b.write_bytes(b.read_bytes()[:-1] + b"?")
    found = dict(verify_files([a.parent]))
    assert (found[a], found[c]) == (None, None) and "CRC-32" in str(found[b])
    other = ImageCodec(build_codec("hierarchical-tiny"))
    assert "coded with the entropy model" in str(dict(verify_files([c], other))[c])
    with pytest.raises(BitstreamError, match=r"b\.fcl': The stream's CRC-32"):
        list(decode_files(codec, [tmp_path / "out"], tmp_path / "back"))
    assert [path.name for path in (tmp_path / "back").iterdir()] == ["a.png"]
    with pytest.raises(BitstreamError, match=r"b\.fcl': The stream's CRC-32"):
        inspect_file(b)


def test_files_that_are_not_there(tmp_path: Path, codec: ImageCodec) -> None:
    with pytest.raises(DataError, match="nowhere does not exist"):
        find_streams([tmp_path / "nowhere"])
    with pytest.raises(DataError, match=r"no file whose name ends in \.fcl"):
        find_streams([tmp_path])
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        inspect_file(tmp_path)
    for name in ("x/a.fcl", "y/a.fcl"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(FastcilError, match="Two of the files have one name"):
        list(decode_files(codec, [tmp_path / "x", tmp_path / "y"], tmp_path / "back"))


def test_a_stream_belongs_to_the_image_that_its_path_ends_in(tmp_path: Path) -> None:
    for name in ("32/a.fcl", "32/deep/a.fcl", "1024/a.fcl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    assert streams_of([tmp_path], ("a", "deep/a")) == [
        ("a", b"1024/a.fcl"),
        ("a", b"32/a.fcl"),
        ("deep/a", b"32/deep/a.fcl"),
    ]
    with pytest.raises(DataError, match=r"a\.fcl is of none of the images, such as 'b'"):
        streams_of([tmp_path], ("b",))


def test_the_ends_of_a_range_need_not_be_float32(tmp_path: Path, write: Write) -> None:
    write("in/a.png")
    codec = ImageCodec(build_codec("hierarchical-tiny", lambda_range=(29.26125, 785.2)))
    for lmbda in (29.26125, 785.2):
        ((path, _),) = encode_files(codec, [tmp_path / "in"], lmbda, tmp_path / "out")
        assert inspect_file(path)["lmbda"] == np.float32(lmbda)
    with pytest.raises(FastcilError, match=r"lambda is 29\.2; the codec was trained from"):
        list(encode_files(codec, [tmp_path / "in"], 29.2, tmp_path / "out"))
