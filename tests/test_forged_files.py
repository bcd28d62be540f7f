"""Files that once broke a reader, or made it work without end: each is refused with one line that
names it. Most were found by fuzz.py."""

import io
import json
import tarfile
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from image_files import cifar_pickle, write_folder, write_tar, write_zip
from image_files import load as load_images
from run_folders import make_run
from small_runs import start

from fastcnn import api
from fastcnn.config import PlaceConfig, options_by_name
from fastcnn.data.sources.cifar import parse_python
from fastcnn.errors import CheckpointError, DataError, UsageError
from fastcnn.insight.run_page.page import write_page
from fastcnn.insight.run_page.saved_sections import saved_sections
from fastcnn.options import options_of, read_config_file
from fastcnn.study import record
from fastcnn.train.checkpoints import checkpoint
from fastcnn.train.checkpoints.load_run import load_trained
from fastcnn.train.rundir import RunFolder

CPU = torch.device("cpu")
# billions of values in a few lines, as a list and by merging mappings
BOMB = "milestones:\n- &b0 [x, x]\n" + "".join(
    f"- &b{i} [{', '.join([f'*b{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
MERGES = "a:\n- &b0 {x: 1}\n" + "".join(
    f"- &b{i} {{<<: [{', '.join([f'*b{i - 1}'] * 9)}]}}\n" for i in range(1, 12)
)
YAML = {
    "a date that is none": ("lr: 2020-99-99", "month must be in"),
    "a number that is none": ("lr: !!int x", "not YAML|cannot be read"),
    "a time that is none": ("lr: !!timestamp x", "NoneType"),
    "a number of 5000 digits": (f"epochs: {'9' * 5000}", "limit"),
    "billions of values": (BOMB, "aliases"),
    "billions of names": (MERGES, "aliases"),
    "a list that holds itself": ("milestones: &a [*a]", "aliases"),
    "a number that is no float": (f"lr: {10**400}", r"--lr: expected a finite number, got 100"),
    "a wrong value": ("lr: fast", "--lr: expected a number, got 'fast'"),
    "a list where a word belongs": (f"loader: {['x'] * 10}", r"'\['x', 'x', .*\.\.\.\]' is not"),
    "an unknown name": ("lrr: 1", "unknown option 'lrr'; did you mean 'lr'"),
}


@pytest.mark.parametrize("kind", YAML)
def test_a_configuration_is_refused_by_its_file_s_name(tmp_path, kind):
    text, told = YAML[kind]
    path = tmp_path / "config.yaml"
    path.write_text(text + "\n")
    options = [*options_by_name().values(), *options_of("place", PlaceConfig)]
    for read, error in (
        (lambda: read_config_file(str(path), options), UsageError),
        (RunFolder(tmp_path).read_config, CheckpointError),
    ):
        with pytest.raises(error, match=told) as caught:
            read()
        assert str(path) in str(caught.value)
        assert len(str(caught.value)) < 400


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return start(tmp_path_factory.mktemp("runs"), epochs=1, train_subset=24).folder


def changed(trained, tmp_path, **changes):
    """A checkpoint with other values, without the sums that would tell."""
    path = tmp_path / "last.pt"
    torch.save(checkpoint.load(trained.last) | changes, path)
    return path


NETWORK = {"arch": "murgolo-improved", "classes": [str(n) for n in range(10)], "image_size": 32}
UNIT = {"mode": "mean-image", "mean": [0.5] * 3, "std": [0.5] * 3}
CHANGES = {
    "weights in a list": {"ema": None, "model": [1]},
    "a weight that is none": {"ema": {"conv1.conv.weight": "x"}},
    "a sparse weight": {"ema": {"conv1.conv.weight": torch.zeros(2, 2).to_sparse()}},
    "a weight without values": {"ema": {"conv1.conv.weight": torch.zeros(2, device="meta")}},
    "a complex size": {"network": NETWORK | {"image_size": torch.zeros(2, dtype=torch.complex64)}},
    "a size in a list": {"network": NETWORK | {"image_size": [32]}},
    "a number of classes": {"network": NETWORK | {"classes": 10}},
    "a mean of two": {"normalization": {"mode": "unit", "mean": [0, 0], "std": [1, 1]}},
    "no data": {"data": None},
} | {
    f"a normalisation of {name}": {"normalization": {"mean_image": None, **normalization}}
    for name, normalization in {
        "zeros": {"mode": "zscore", "mean": [0.0] * 3, "std": [0.0] * 3},
        "no numbers": {"mode": "zscore", "mean": [float("nan")] * 3, "std": [1.0] * 3},
        "bytes": {"mode": "zscore", "mean": [125.0] * 3, "std": [60.0] * 3},
        "another mode": {"mode": "zeros", "mean": [0.5] * 3, "std": [0.5] * 3},
        "no image": UNIT,
        "a flat image": UNIT | {"mean_image": [[0.5] * 3]},
        "an odd image": UNIT | {"mean_image": [[[0.5] * 3], [[2.0] * 3]]},
    }.items()
}


@pytest.mark.parametrize("kind", CHANGES)
def test_odd_contents_of_a_checkpoint_are_refused(trained, tmp_path, kind):
    path = changed(trained, tmp_path, **CHANGES[kind])
    with pytest.raises(CheckpointError, match=r"last\.pt: not a checkpoint of a network"):
        load_trained(path, CPU, "torch")


def test_no_memory_is_asked_for_by_a_forged_size(trained, tmp_path):
    """A network for such images would have 10^15 weights."""
    path = changed(trained, tmp_path, network=NETWORK | {"image_size": 2**24})
    with pytest.raises(CheckpointError, match=r"last\.pt does not fit the network: fc1"):
        load_trained(path, CPU, "torch")


def test_a_compressed_checkpoint_is_refused(trained, tmp_path):
    """Its members could grow to any size; even where the sums of its folder agree."""
    path = tmp_path / "last.pt"
    with (
        zipfile.ZipFile(trained.last) as source,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for name in source.namelist():
            archive.writestr(name, source.read(name))
    with pytest.raises(CheckpointError, match=r"last\.pt: its part \S+ is compressed; refused"):
        checkpoint.load(path)
    own = {"bytes": path.stat().st_size, "sha256": checkpoint._sha256(path)}
    (tmp_path / checkpoint.SUMS).write_text(json.dumps({"last.pt": [own]}))
    with pytest.raises(CheckpointError, match="compressed; refused"):
        checkpoint.load(path)


def test_sums_of_nothing_are_none(trained, tmp_path):
    (tmp_path / "last.pt").write_bytes(trained.last.read_bytes())
    (tmp_path / checkpoint.SUMS).write_text('{"last.pt": []}')
    assert checkpoint.load(tmp_path / "last.pt")["step"]
    (tmp_path / checkpoint.SUMS).write_text('{"last.pt": [{"bytes": Infinity, "sha256": ""}]}')
    with pytest.raises(CheckpointError, match=r"checkpoints\.json cannot be read .*; remove it"):
        checkpoint.load(tmp_path / "last.pt")


def test_why_no_older_checkpoint_is_offered(trained, tmp_path):
    (tmp_path / "last-2.pt").write_bytes(trained.last.read_bytes())
    (tmp_path / checkpoint.SUMS).write_text("{")
    with pytest.raises(
        CheckpointError,
        match=r"no checkpoint at .*; no older one can be read: .*checkpoints\.json .*; remove it",
    ):
        checkpoint.load(tmp_path / "last.pt")


FIGURES = {
    "metrics.csv": (b"\xf4\x00garbage", b"epoch,lr\n1,x\n", b"epoch,lr\n1\n"),
    "confusion_matrix.csv": (b"\xf4", b"", b"t,a,b\na,1,2\n", b"t,a,b\na,1\nb,2\n", b"t,a\na,x\n"),
}


@pytest.mark.full
@pytest.mark.parametrize("name", FIGURES)
def test_a_finished_run_is_not_lost_for_a_damaged_table(tmp_path, caplog, name):
    for number, data in enumerate(FIGURES[name]):
        folder = make_run(tmp_path / str(number))
        (folder / "confusion_matrix.png").write_bytes(b"png")
        (folder / name).write_bytes(data)
        with caplog.at_level("WARNING", "fastcnn"):
            api.draw(folder)
        assert f"{folder / name} cannot be read" in caplog.text
        with pytest.raises(CheckpointError, match="cannot be read"):
            write_page(folder)


@pytest.mark.parametrize("change", [{"bad_images": "3"}, {"images": {"train": "3"}}])
def test_a_summary_with_texts_for_counts_is_refused(tmp_path, change):
    folder = make_run(tmp_path / "run", summary=change)
    with pytest.raises(CheckpointError, match=r"summary\.json: (bad_)?images"):
        write_page(folder)


TABLE = {"header": ["a", "b"], "rows": [["1", "2"]], "numbers": [1]}
SECTION = {
    "title": "title",
    "anchor": "anchor",
    "paragraphs": ["said"],
    "table": TABLE,
    "sentences": [],
    "figures": [["figure.png", "alt", "caption"]],
    "facts": [["name", "value"]],
}
RECORD = {
    "format": 1,
    "key": "key",
    "title": "title",
    "lead": "lead",
    "facts": [["name", "value"]],
    "table": TABLE,
    "sentences": ["one"],
    "notes": [],
    "drawings": [{"name": "figure", "alt": "alt", "title": "title"}],
}
ODD = {
    "title": [None, 3, ["x"]],
    "facts": [None, [["x"]], [[1, 2]], [["a", "b", "c"]]],
    "table": [[], TABLE | {"rows": [["1"]]}, TABLE | {"rows": [3]}, TABLE | {"numbers": [[]]}],
    "sentences": ["text", [3], 3],
}


def test_pages_take_texts_alone(tmp_path):
    for name, values in ODD.items():
        for value in values:
            content = {"format": 1, "sections": [SECTION | {name: value}]}
            (tmp_path / "ood.json").write_text(json.dumps(content))
            with pytest.raises(CheckpointError, match=r"ood\.json is not what fastcnn wrote"):
                saved_sections(tmp_path, "ood")
            (tmp_path / "key.json").write_text(json.dumps(RECORD | {name: value}))
            with pytest.raises(CheckpointError, match=r"key\.json is not a record"):
                record.read(tmp_path / "key.json")
    (tmp_path / "ood.json").write_text(json.dumps({"format": 1, "sections": [SECTION]}))
    (tmp_path / "key.json").write_text(json.dumps(RECORD))
    assert saved_sections(tmp_path, "ood")[0].facts == (("name", "value"),)
    assert record.read(tmp_path / "key.json").table.rows == (("1", "2"),)


def test_a_batch_asks_for_no_memory_that_it_does_not_fill(tmp_path):
    """Five bytes make pickle in C allocate 2^28 places of its memory of objects."""
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="not a CIFAR-10 batch"):
            parse_python("batch", b"\x80\x02Nr\xff\xff\xff\x070N.")
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"u1", b"O8"),
        (b"u1", b"i8"),
        (b"cnumpy\ndtype\n", b"cnumpy\nndarray\n"),
    ],
)
def test_a_batch_makes_no_types_of_numpy(old, new):
    data = cifar_pickle(np.zeros((2, 3072), np.uint8), [0, 1])
    assert parse_python("batch", data)[0].shape == (2, 3072)
    assert data.count(old) == 1
    with pytest.raises(DataError, match="batch: not a CIFAR-10 batch"):
        parse_python("batch", data.replace(old, new))


def test_a_long_name_of_any_length_is_no_image(tmp_path, own_cache):
    """A tar's header claims 2^62 bytes of a name, or more than an integer of C holds."""
    for number, size in enumerate((1 << 62, 1 << 70)):
        header = tarfile.TarInfo("name")
        header.type, header.size = tarfile.GNUTYPE_LONGNAME, size
        path = tmp_path / f"{number}.tar"
        path.write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
        with pytest.raises(DataError, match=rf"{number}\.tar: (a header of|cut, damaged)"):
            load_images(path)


def test_a_member_without_a_name_is_refused(tmp_path, own_cache):
    path = write_zip(tmp_path / "images.zip", {"ant/0.png": b"x", "y": b"x"}, zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    at = data.rfind(b"PK\x01\x02")
    data[at + 28 : at + 30] = bytes(2)  # the name's length
    data[at + 32 : at + 34] = b"\1\0"  # what was a name is a comment
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"images\.zip: a member without a name"):
        load_images(path)


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[2J"])
def test_line_breaks_in_names_stay_out_of_messages(tmp_path, own_cache, name):
    write_folder(tmp_path / "images", splits=("",))
    (tmp_path / "images" / name).mkdir()
    members = {f"{name}/0.png": b"x", "ant/0.png": b"x", "ant/1.png": b"x"}
    for path in (tmp_path / "images", write_tar(tmp_path / "images.tar", members)):
        with pytest.raises(DataError, match=r"a\\(n|x1b)") as caught:
            load_images(path)
        assert str(caught.value).isprintable()


def test_an_error_keeps_other_letters():
    assert str(DataError("Bücher/日本: no images")) == "Bücher/日本: no images"
    assert str(DataError("\udcff: no images")) == r"\udcff: no images"
    assert io.StringIO(str(DataError("a\r\nb"))).readlines() == [r"a\r\nb"]
