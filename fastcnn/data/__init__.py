"""Images in memory, from wherever they are. The rooms that they go through, one after the other:

sources     what images there are, with classes, labels and splits, and how to read one
scan        each decoded once: its size, its sums, whether it can be read
select      what is left out; subsets and the validation part
store       packed as uint8, or left in their files
loaders     batches on the device: resident, DALI's or torch's
"""

import functools
from dataclasses import replace

import torch

from fastcnn.config import DataConfig
from fastcnn.data.choose import choose
from fastcnn.data.examine import View
from fastcnn.data.images import Dataset, Images, LeftOut
from fastcnn.data.loaders import Loader, make_loader
from fastcnn.data.normalize import Normalization
from fastcnn.data.scan import first_sides, is_readable_now, scan_images
from fastcnn.data.select import Selection, checked, select_images, split, warn_ignored
from fastcnn.data.sources import Contents, open_source
from fastcnn.data.store import is_packed, key_of, leave_in_files, pack

__all__ = ["Dataset", "Images", "Loader", "Normalization", "load_dataset", "make_loader", "split"]

CPU = torch.device("cpu")


def load_dataset(config: DataConfig, default_size: int, device: torch.device = CPU) -> Dataset:
    """Return the dataset that `config.data` names: CIFAR-10, Tiny ImageNet, digits, an image folder
    or an archive of one. `split` draws subsets from it, `make_loader` loads its parts.

    Its `loader` is that of --loader or, for `auto`, the one that suits images and `device`.

    Images keep their size unless `config.image_size` is given; the digits take that or
    `default_size`, the network's own. Raises UsageError for a name that is empty or neither known
    nor a path, DataError for data that is missing or not usable.
    """
    source = open_source(config, default_size, functools.partial(is_packed, config))
    view, choice = View.of(config), None

    @functools.cache
    def contents() -> Contents:  # an archive is opened only where it is not packed yet
        found = source.contents()
        warn_ignored(found)
        return found

    def selected() -> Selection:
        return select_images(scan_images(contents(), view, keep_pixels=not in_files), config)

    def is_stale(left_out: LeftOut) -> bool:
        return source.in_files and is_readable_now(contents(), left_out)

    if source.in_files:  # the loader decides whether they stay there
        sides = first_sides(contents(), view)
        choice = choose(config, len(contents()), sides, True, device)
    in_files = choice is not None and choice.store == "files"
    if in_files:
        dataset = leave_in_files(source.name, selected())
    else:
        dataset = pack(source.name, key_of(source, config), selected, is_stale)
    dataset = checked(dataset, source.where, config)
    if choice is None:
        count = len(dataset.train) + len(dataset.test) + len(dataset.val or ())
        choice = choose(config, count, dataset.train.sides, False, device)
    return replace(dataset, loader=choice.loader, why=choice.why)
