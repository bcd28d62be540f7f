"""Images that stay in their files: the packed ones' pixels, and files that change."""

import os

import numpy as np
import pytest
from image_files import IN_FILES, encoded, load, noise, write, write_folder

from fastcnn.errors import DataError

pytestmark = pytest.mark.usefixtures("own_cache")


def mixed(root):
    """Images of several sizes, formats and modes."""
    write_folder(root, ("train", "test", "val"))
    write(root / "train/ant/oblong.png", encoded(noise((11, 17, 3))))
    write(root / "train/ant/tall.jpg", encoded(noise((23, 9, 3)), "JPEG"))
    write(root / "train/bee/grey.png", encoded(noise((8, 12))))
    write(root / "test/bee/clear.png", encoded(noise((8, 12, 4))))
    return root


@pytest.mark.parametrize("options", [{}, {"image_size": 12}, {"image_size": 12, "resize": "crop"}])
def test_files_and_packed_images_agree(root, options):
    if options:
        mixed(root)
    else:
        write_folder(root, ("train", "test", "val"))
    packed, files = load(root, store="packed", **options), load(root, **IN_FILES, **options)
    assert files.digest == packed.digest
    assert files.classes == packed.classes
    for name in ("train", "test", "val"):
        one, other = getattr(packed, name), getattr(files, name)
        assert other.sides == one.sides
        assert np.array_equal(other.labels, one.labels)
        everything = range(len(other))
        assert np.array_equal(other.pixels_of(everything), one.pixels_of(everything))
        some = np.arange(len(other))[::2]
        assert np.array_equal(other.take(some).pixels_of([1, 0]), one.take(some).pixels_of([1, 0]))


def test_digest_follows_contents_labels_size_and_view(root):
    digests = [load(mixed(root), image_size=12, **IN_FILES).digest]
    digests.append(load(root, image_size=14, **IN_FILES).digest)
    digests.append(load(root, image_size=12, resize="crop", **IN_FILES).digest)
    write(root / "train/ant/0.png", encoded(noise((8, 8, 3), seed=77)))
    digests.append(load(root, image_size=12, **IN_FILES).digest)
    (root / "train/ant/tall.jpg").rename(root / "train/bee/0.jpg")
    digests.append(load(root, image_size=12, **IN_FILES).digest)
    assert len(set(digests)) == 5


def truncate(path):
    os.truncate(path, 30)


def replace_by_text(path):
    path.write_bytes(b"x" * path.stat().st_size)


def replace_by_good(path):
    """Another image of as many bytes and equal sides, under the old mtime."""
    other = path.parent.parent / "ant/1.png"
    length, times = path.stat().st_size, (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    assert other.stat().st_size <= length
    path.write_bytes(other.read_bytes().ljust(length, b"\0"))
    os.utime(path, ns=times)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "changed since it was scanned: .* bytes then, 30 now"),
        (os.remove, "No such file or directory; it was readable when it was scanned"),
        (replace_by_text, "changed since it was scanned; put it back"),
        (replace_by_good, "changed since it was scanned; put it back"),
    ],
)
def test_a_file_that_changes_later_is_named(root, damage, message):
    files = load(write_folder(root), **IN_FILES).train
    damage(root / "train/bee/1.png")
    files.pixels_of([0, 1])
    with pytest.raises(DataError, match=rf"train/bee/1\.png: {message}"):
        files.pixels_of([3, 4])


def test_a_file_that_is_touched_or_copied_goes_on(root):
    files = load(write_folder(root), **IN_FILES).train
    wanted = files.pixels_of([3, 4])
    for path in (root / "train/bee").iterdir():
        os.utime(path, ns=(5, 5))
        path.chmod(0o600)
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data)
    assert np.array_equal(files.pixels_of([3, 4]), wanted)


def test_no_images_have_no_pixels(root):
    files = load(write_folder(root), **IN_FILES).train
    assert files.pixels_of([]).shape == (0, 8, 8, 3)
