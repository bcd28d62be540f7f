"""The DALI loader: the resident loader's batches to the bit, whatever the files are; its position;
and the habits of DALI that it is built around, so that a change in them is noticed.

Faults under a running epoch are in test_dali_faults.py.
"""

import gc
import os
import struct
import subprocess
import sys
from dataclasses import replace
from zlib import compress, crc32

import numpy as np
import pytest
import torch
from dali_cases import encode, made, packed, scanned, smooth, stored, write_files, write_sizes
from graph_twin import CpuTwin
from image_files import coordinates, make_images, write
from loader_cases import EVERYTHING, FUSED, assert_same_batches, by_label, epoch_labels
from PIL import Image
from scipy import stats

from fastcnn.config import AugmentConfig
from fastcnn.data import Normalization
from fastcnn.data.augment import resized_boxes
from fastcnn.data.decode import decode, resize_box
from fastcnn.data.draws import generator
from fastcnn.data.images import Images
from fastcnn.data.loaders import dali, dali_sources
from fastcnn.errors import UsageError
from fastcnn.train.graph import Replay

pytest.importorskip("nvidia.dali")
from nvidia.dali import Pipeline, fn, types

P_LIMIT = 1e-4  # of the statistical tests, all with fixed seeds


@pytest.fixture(autouse=True, scope="module")
def _library(library):
    return library


@pytest.fixture(autouse=True)
def _cache(own_cache):
    return own_cache


def threads():
    return len(os.listdir("/proc/self/task"))


def held_kb():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


def images_of(kind, root):
    """23 images of one kind: stored, in memory, or in files of equal or different sizes."""
    if kind == "memory":
        return make_images(23)
    if kind == "store":
        return stored(root / "pixels.npy", make_images(23))
    if kind == "equal":
        return scanned(root, write_files(root, 23, form="both"))
    return scanned(root, write_sizes(root, 23), sides=(16, 14), resize=kind)


KINDS = ["memory", "store", "equal", "stretch", "crop"]


def resident(images, augment=None, **options):
    whole = images if isinstance(images, Images) else packed(images)
    return made(whole, "resident", augment, **options)


@pytest.fixture
def root(tmp_path):
    return tmp_path


# the same batches as the other loaders


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["zscore", "mean-image"])
def test_dali_torch_and_resident_are_bit_equal_without_augmentation(kind, mode, root):
    images = images_of(kind, root)
    whole = images if isinstance(images, Images) else packed(images)
    options = {"normalization": Normalization.fit(whole, mode)}
    loader = made(images, **options)
    wanted, other = resident(images, **options), made(whole, "torch", **options)
    for _ in range(2):
        batches = list(loader)
        assert_same_batches(batches, list(wanted))
        assert_same_batches(batches, list(other))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["fused", "torch"])
@pytest.mark.parametrize(
    "augment", [AugmentConfig(), FUSED, EVERYTHING, AugmentConfig(crop_mode="zero", crop_padding=5)]
)
def test_augmented_batches_are_the_resident_loader_s(kind, backend, augment, root):
    images = images_of(kind, root)
    options = {"augment": augment, "backend": backend, "seed": 2**31 - 1, "batch": 7}
    loader, wanted = made(images, **options), resident(images, **options)
    for _ in range(3):
        assert_same_batches(list(loader), list(wanted))


def test_random_resized_crops_of_packed_images_are_the_resident_loader_s(root):
    images = images_of("store", root)
    augment = AugmentConfig(crop_padding=0, resized_crop=0.3)
    assert_same_batches(list(made(images, augment=augment)), list(resident(images, augment)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtype_shape_and_layout(dtype, root):
    images = images_of("stretch", root)
    for x, y in made(images, augment=AugmentConfig(), dtype=dtype, batch=23):
        assert (x.shape, x.dtype) == ((23, 3, 16, 14), dtype)
        assert x.stride() == (16 * 14 * 3, 1, 14 * 3, 3)
        assert (y.dtype, y.shape) == (torch.int64, (23,))
    wanted = resident(images, AugmentConfig(), dtype=dtype)
    assert_same_batches(list(made(images, augment=AugmentConfig(), dtype=dtype)), list(wanted))


ODD = {
    "grey.jpg": ("JPEG", "L", {}),
    "grey.png": ("PNG", "L", {}),
    "bilevel.png": ("PNG", "1", {}),
    "palette.png": ("PNG", "P", {}),
    "rgba.png": ("PNG", "RGBA", {}),
    "cmyk.jpg": ("JPEG", "CMYK", {}),
    "progressive.jpg": ("JPEG", "RGB", {"progressive": True}),
    "x.bmp": ("BMP", "RGB", {}),
    "x.ppm": ("PPM", "RGB", {}),
    "x.gif": ("GIF", "P", {}),
    "x.webp": ("WEBP", "RGB", {"lossless": True}),
    "x.tiff": ("TIFF", "RGB", {}),
}


def write_odd(root):
    """Images of every mode and format, 30 pixels wide and 20 high, whatever they need for it."""
    pixels = smooth(20, 30)
    for name, (form, mode, options) in ODD.items():
        write(root / name, encode(pixels, form, mode, **options))
    for turned in range(2, 9):
        exif = Image.Exif()
        exif[0x112] = turned
        lying = pixels if turned < 5 else pixels.transpose(1, 0, 2).copy()
        write(root / f"exif {turned}.jpg", encode(lying, "JPEG", exif=exif))
    clear = Image.fromarray(pixels).convert("RGBA")
    clear.putalpha(100)
    clear.save(root / "clear.png")
    write_deep(root)
    good, photo = encode(pixels), encode(pixels, "JPEG")
    write(root / "no end.png", good[:-12])
    write(root / "checksum.png", good[:-16] + bytes(4) + good[-12:])
    write(root / "filled.jpg", photo[:2] + b"\xff\xff" + photo[2:])
    names = sorted(os.listdir(root))
    assert len(names) == len(ODD) + 8 + len(DEEP) + len(UNSOUND)
    return names


NOT_DALIS = ["bmp", "gif", "ppm", "tiff", "webp"]
DEEP = ["grey 16.png", "grey 16.pgm", "rgb 16.png", "1023.pgm", "100.pgm", "100.ppm", "ascii.ppm"]
UNSOUND = ["no end.png", "checksum.png", "filled.jpg"]  # Pillow reads them
NOT_PLAIN = {*DEEP, *UNSOUND, "rgba.png", "clear.png", *(f"x.{x}" for x in NOT_DALIS)}


def write_deep(root):
    """Images of values that must be rounded to 8 bits, all residues of 257 among them."""
    rng = np.random.default_rng(0)
    grey = (np.arange(600) * 109 + rng.integers(0, 109, 600)).astype(">u2")
    assert len(np.unique(grey % 257)) > 230
    write(root / "grey 16.png", png(grey.reshape(20, 30), 0))
    write(root / "grey 16.pgm", b"P5\n30 20\n65535\n" + grey.tobytes())
    write(root / "rgb 16.png", png(rng.integers(0, 65536, (20, 90)).astype(">u2"), 2))
    ten = rng.integers(0, 1024, 600).astype(">u2")
    write(root / "1023.pgm", b"P5\n30 20\n1023\n" + ten.tobytes())
    write(root / "100.pgm", b"P5\n30 20\n100\n" + rng.integers(0, 101, 600, "u1").tobytes())
    write(root / "100.ppm", b"P6\n30 20\n100\n" + rng.integers(0, 101, 1800, "u1").tobytes())
    text = " ".join(map(str, rng.integers(0, 256, 1800)))
    write(root / "ascii.ppm", f"P3\n30 20\n255\n{text}\n".encode())


def png(rows, colours):
    """A PNG file of uint16 (H, channels * W), which Pillow does not write in colour."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc32(name + data))

    header = struct.pack(">IIBBBBB", 30, 20, 16, colours, 0, 0, 0)
    data = compress(b"".join(b"\0" + row.tobytes() for row in rows))
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.mark.parametrize("sides", [None, (9, 11)])
def test_odd_files_are_decoded_as_by_decode_py(root, sides):
    names = write_odd(root / "odd")
    files = scanned(root / "odd", names, sides)
    assert {name for name, plain in zip(names, files.plain, strict=True) if not plain} == NOT_PLAIN
    assert_decoded(files)


def assert_decoded(files):
    """DALI's pixels of each file are decode.py's, resized."""
    found = by_label(made(files, normalization=Normalization("unit", (0,) * 3, (1,) * 3)))
    for number, name in enumerate(files.paths.tolist()):
        pixels = decode((files.root / name).read_bytes()).pixels
        wanted = resize_box(pixels, np.array([0, 0, *pixels.shape[:2]]), files.sides)
        got = (found[number].permute(1, 2, 0) * 255).round().byte().numpy()
        assert np.array_equal(got, wanted), name


@pytest.mark.parametrize("first", b"\t\n\r #\0\xff")
def test_decoded_pixels_reach_dali_whatever_they_begin_with(root, first):
    pixels = np.full((3, 4, 3), first, np.uint8)
    pixels[1:] = smooth(2, 4)
    write(root / "x.tiff", encode(pixels, "TIFF"))
    assert_decoded(scanned(root, ["x.tiff"]))


# random resized crops of files


def test_boxes_are_drawn_from_each_image_s_own_size(root):
    files = scanned(root, write_sizes(root, 23), sides=(16, 16))
    loader = made(files, augment=AugmentConfig(crop_padding=0, flip="none", resized_crop=0.3))
    found = by_label(loader)
    shapes = torch.from_numpy(files.shapes)
    boxes = resized_boxes(shapes, 0.3, generator(0, "resized crop", 0))
    assert (boxes[:, :2] + boxes[:, 2:] <= shapes).all()
    assert len(boxes.unique(dim=0)) == 23
    for sample, box in enumerate(boxes.numpy()):
        wanted = resize_box(files.read(sample), box, (16, 16))
        unit = (found[sample].permute(1, 2, 0).double() * 255).round().byte().numpy()
        assert np.array_equal(unit, wanted)


def test_boxes_do_not_depend_on_the_chunks_they_are_drawn_in(monkeypatch):
    shapes = torch.tensor([[9, 40], [200, 30]]).repeat(1000, 1)
    boxes = resized_boxes(shapes, 0.1, generator(0, "test"))
    monkeypatch.setattr("fastcnn.data.augment.CHUNK", 300)
    other = resized_boxes(shapes, 0.1, generator(0, "test"))
    assert other.shape == boxes.shape
    for column in range(4):  # other draws of the same distribution
        for size in range(2):
            pair = boxes[size::2, column], other[size::2, column]
            assert stats.ks_2samp(*pair, method="asymp").pvalue > P_LIMIT


def crops_of(loader, epochs):
    """Corners and sides, read from images that hold their coordinates: (n, 4)."""
    found = []
    for _ in range(epochs):
        for x, _ in loader:
            y, x = (x[:, channel].double() * 255 for channel in range(2))
            rows, columns = y.mean(2), x.mean(1)
            found.append(torch.stack([rows[:, 0], rows[:, -1], columns[:, 0], columns[:, -1]], 1))
    return torch.cat(found).numpy()


def test_random_resized_crops_are_distributed_as_the_torch_loader_s(root):
    images = coordinates(400, side=32)
    names = [f"{i}.png" for i in range(400)]
    for name, pixels in zip(names, images.pixels, strict=True):
        write(root / name, encode(pixels))
    files = scanned(root, names)
    augment = AugmentConfig(crop_padding=0, flip="none", resized_crop=0.2)
    ours = crops_of(made(files, augment=augment, batch=50), 3)
    theirs = crops_of(made(files, "torch", augment, batch=50, seed=7), 3)
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > P_LIMIT
    spans = [(x[:, 1] - x[:, 0], x[:, 3] - x[:, 2]) for x in (ours, theirs)]
    area, aspect = zip(*[(h * w, w / h) for h, w in spans], strict=True)
    assert stats.ks_2samp(*area).pvalue > P_LIMIT
    assert stats.ks_2samp(*aspect).pvalue > P_LIMIT


def test_offsets_are_uniform_and_half_are_mirrored(root):
    images = stored(root / "x.npy", coordinates(500))
    loader = made(images, augment=AugmentConfig(crop_mode="zero"), batch=64)
    offsets, mirrored = np.zeros((9, 9), int), 0
    for x, _ in (batch for _ in range(8) for batch in loader):
        pixels = (x * 255).round().long()
        ahead = pixels[:, 1, 8, 8] > pixels[:, 1, 8, 7]
        mirrored += int((~ahead).sum())
        upright = torch.where(ahead[:, None, None, None], pixels, pixels.flip(3))
        down, right = upright[:, 0, 8, 8] - 9, upright[:, 1, 8, 8] - 9
        np.add.at(offsets, (down.numpy() + 4, right.numpy() + 4), 1)
    assert stats.chisquare(offsets.ravel()).pvalue > P_LIMIT
    assert stats.binomtest(mirrored, 4000).pvalue > P_LIMIT


# order and position


@pytest.mark.parametrize("kind", ["store", "stretch"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_each_sample_once_an_epoch(kind, shuffle, root):
    images = images_of(kind, root)
    images = replace(images, labels=np.arange(23))
    loader = made(images, batch=5, shuffle=shuffle)
    orders = [epoch_labels(loader) for _ in range(3)]
    assert all(sorted(order) == list(range(23)) for order in orders)
    assert shuffle == (orders[0] != orders[1])
    assert [len(y) for _, y in loader] == [5, 5, 5, 5, 3]
    dropping = made(images, batch=5, drop_last=True)
    assert [len(y) for _, y in dropping] == [5, 5, 5, 5]
    assert [len(y) for _, y in made(images, batch=100)] == [23]
    parts = [made(images, batch=5, rank=rank, world=3) for rank in range(3)]
    seen = [epoch_labels(part) for part in parts]
    assert sorted(label for part in seen for label in part) == list(range(23))


@pytest.mark.parametrize("kind", ["store", "stretch"])
@pytest.mark.parametrize("augment", [FUSED, AugmentConfig(crop_padding=0, resized_crop=0.4)])
def test_resume_at_every_position(kind, augment, root):
    images = images_of(kind, root)
    whole = made(images, augment=augment)
    states, batches = [whole.state_dict()], []
    for _ in range(2):
        for batch in whole:
            batches.append(batch)
            states.append(whole.state_dict())
    assert states[3] == {"epoch": 0, "position": 12}
    resumed = made(images, augment=augment)
    for done, state in enumerate(states):
        resumed.load_state_dict(state)
        rest = list(resumed)
        if len(batches) - done - len(rest) > 0:
            rest += list(resumed)
        assert_same_batches(rest, batches[done:])
    other = made(images, augment=augment, batch=3)
    other.load_state_dict(states[2])
    rest = torch.cat([x for x, _ in batches[2:6]])
    assert torch.equal(torch.cat([x for x, _ in other]), rest)


@pytest.mark.parametrize("kind", ["memory", "stretch"])
def test_an_iteration_given_up_goes_on_where_it_stopped(kind, root):
    images = images_of(kind, root)
    wanted = list(made(images, augment=FUSED))
    for given_up in range(len(wanted) + 1):
        loader, first = made(images, augment=FUSED), []
        for count in loader.begin()[:given_up]:
            loader.stage(count)
            first.append(loader.batch(count))
            loader.advance(count)
        assert_same_batches(first + list(loader), wanted)


def test_a_loader_that_begins_again_and_again_makes_the_same_batches(root):
    images = images_of("stretch", root)
    loader, wanted = made(images, augment=FUSED), list(made(images, augment=FUSED))
    for taken in (0, 1, 2, 5, 6, 3):
        loader.load_state_dict({"epoch": 0, "position": 0})
        for count, (x, y) in zip(loader.begin()[:taken], wanted, strict=False):
            loader.stage(count)
            assert_same_batches([loader.batch(count)], [(x, y)])


def test_two_loaders_work_at_once(root):
    images = images_of("stretch", root)
    train, val = (made(images, batch=size, shuffle=False) for size in (4, 9))
    wanted = resident(images, shuffle=False)
    found = []
    for i, batch in enumerate(train):
        found.append(batch)
        if i == 2:
            assert sum(len(y) for _, y in val) == 23
    assert_same_batches(found, list(wanted))


def test_the_number_of_threads_changes_nothing(root, monkeypatch):
    images = images_of("crop", root)
    wanted = list(made(images, augment=FUSED))
    for count in (1, 5):
        monkeypatch.setattr(dali, "cores", lambda count=count: count)
        assert_same_batches(list(made(images, augment=FUSED)), wanted)


def test_addresses_stay(root):
    loader = made(images_of("stretch", root), augment=FUSED)
    buffers = [loader.pixels, loader.labels, loader.order, loader.at]
    before = [buffer.data_ptr() for buffer in buffers]
    for _ in range(3):
        list(loader)
        assert [buffer.data_ptr() for buffer in buffers] == before
    assert loader.pixels is buffers[0]


@pytest.mark.parametrize("kind", ["store", "stretch"])
def test_batches_made_inside_a_graph_are_those_made_outside(kind, root):
    images = images_of(kind, root)
    loader, wanted = (made(images, augment=FUSED, drop_last=True) for _ in range(2))
    recorder, found = CpuTwin(), []
    replay = Replay(recorder, required=True)
    seen = torch.zeros(4, 3, *images.sides), torch.zeros(4, dtype=torch.int64)

    def work(x, y):
        seen[0].copy_(x)
        seen[1].copy_(y)

    for _ in range(2):
        for _ in replay.epoch(loader, work):
            found.append(tuple(tensor.clone() for tensor in seen))
    assert recorder.captures == 1
    assert_same_batches(found, [*wanted, *wanted])


# what it leaves behind


def test_threads_end_with_the_loader(root):
    images = images_of("stretch", root)
    before = threads()
    loader = made(images)
    begun = iter(made(images))
    next(begun)
    list(loader)
    assert threads() > before
    gc.disable()  # without a cycle of references to be found first
    try:
        del loader, begun
        assert threads() == before
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", ["store", "stretch"])
def test_memory_stays_flat(kind, root):
    if kind == "store":
        images = stored(root / "x.npy", make_images(2000, 32, 32))
    else:
        images = scanned(root, write_sizes(root, 200), sides=(32, 32))
    loader = made(images, augment=AugmentConfig(), batch=64)
    for _ in range(10):
        list(loader)
    before, running = held_kb(), threads()
    for _ in range(20):
        list(loader)
        next(iter(loader))  # given up
    assert held_kb() - before < 4000
    assert threads() == running


@pytest.mark.full
def test_dali_comes_before_torchvision_and_only_with_its_loader():
    code = """
import sys, numpy as np, torch
from fastcnn.config import DataConfig
from fastcnn.data import Images, Normalization, make_loader
def made(name):
    return make_loader(
        Images(np.zeros((4, 8, 8, 3), np.uint8), np.arange(4)), DataConfig(loader=name), None,
        Normalization("unit", (0,) * 3, (1,) * 3), batch_size=2, device=torch.device("cpu"),
        seed=0, shuffle=True, drop_last=False, backend="torch")
list(made("resident"))
assert "nvidia.dali" not in sys.modules
list(made("dali"))
assert "nvidia.dali" in sys.modules and "torchvision" not in sys.modules
list(made("torch"))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


# DALI's own habits


def run_once(build, batch=64, **options):
    pipeline = Pipeline(batch_size=batch, num_threads=1, device_id=None, seed=1, **options)
    with pipeline:
        pipeline.set_outputs(*build())
    pipeline.build()
    return pipeline


def test_dali_s_cast_rounds_so_that_random_offsets_are_biased():
    # why DALI draws nothing here
    pipeline = run_once(
        lambda: [fn.cast(fn.random.uniform(range=(0.0, 8.999)), dtype=types.INT32)], 256
    )
    drawn = np.concatenate([np.asarray(pipeline.run()[0].as_tensor()) for _ in range(40)])
    assert set(drawn.ravel()) == set(range(10))  # 9 is out of range
    counts = np.bincount(drawn.ravel(), minlength=10)
    assert counts[0] < 0.7 * counts[4]


def reader(root):
    names = write_files(root, 10)
    options = {"file_root": str(root), "files": names, "labels": list(range(10))}

    def build():
        data, labels = fn.readers.file(**options, name="reader")
        return fn.decoders.image(data), labels

    return build


def test_dali_s_readers_give_labels_of_another_shape_and_dtype(root):
    # why labels come from the scan
    labels = run_once(reader(root), 4).run()[1].as_tensor()
    assert np.asarray(labels).dtype == np.int32
    assert np.asarray(labels).shape == (4, 1)


def test_dali_s_fill_carries_samples_into_the_next_epoch(root):
    # why order and sizes of the batches come from the loader
    from nvidia.dali.plugin.pytorch import DALIGenericIterator, LastBatchPolicy

    pipeline = run_once(reader(root), 4)
    iterator = DALIGenericIterator(
        [pipeline],
        ["data", "label"],
        reader_name="reader",
        last_batch_policy=LastBatchPolicy.FILL,
        auto_reset=True,
    )
    epochs = [[int(y) for batch in iterator for y in batch[0]["label"]] for _ in range(2)]
    assert len(epochs[0]) == 12  # of 10 images
    assert not set(range(10)) <= set(epochs[1])  # those two are missing
    loader = made(scanned(root, write_files(root, 10), labels=range(10)), batch=4)
    assert [sorted(epoch_labels(loader)) for _ in range(3)] == [list(range(10))] * 3


# a GPU


def test_dali_without_a_gpu_is_one_line(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    source = dali_sources.PackedSource(make_images(4))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(UsageError, match=r"DALI cannot work on cuda: .*; take --loader") as found:
        dali.Stream(source, 4, torch.device("cuda"))
    assert "\n" not in str(found.value)


@pytest.mark.cuda
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("augment", [None, FUSED])
def test_a_gpu_s_batches_are_the_cpu_s(kind, augment, root):
    images = images_of(kind, root)
    exact = isinstance(images, Images)
    wanted = list(resident(images, augment))
    loader = made(images, augment=augment, device="cuda")
    for _ in range(2):
        for (x, y), (want_x, want_y) in zip(loader, wanted, strict=True):
            assert x.is_cuda
            assert torch.equal(y.cpu(), want_y)
            # nvJPEG rounds otherwise, and DALI's resize weighs otherwise than torch's
            assert (x.cpu() - want_x).abs().max() <= (0 if exact else 12 / 255)
        loader.load_state_dict({"epoch": 0, "position": 0})


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["store", "stretch"])
def test_batches_replayed_from_a_graph_without_waiting(kind, root):
    images = images_of(kind, root)
    loader, other = (made(images, augment=FUSED, device="cuda", drop_last=True) for _ in range(2))
    for count in loader.begin():  # what torch does at its first call must not be captured
        loader.stage(count)
        loader.batch(count)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x, y = loader.batch(4)
    for _ in range(2):
        for count, want in zip(loader.begin(), list(other), strict=True):
            torch.cuda.set_sync_debug_mode("error")
            try:
                loader.stage(count)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            graph.replay()
            loader.advance(count)
            assert_same_batches([(x, y)], [want])
        loader.finish()
