"""Changes to bytes, to trees of plain values and to lists of opcodes; all drawn from a Random."""

import pickle
import pickletools
import struct
import zlib
from random import Random
from typing import Any

NUMBERS = (0, 1, 2, 127, 255, 256, 2**15, 2**16 - 1, 2**24, 2**27, 2**31 - 1, 2**32 - 1, 2**63 - 1)
NAMES = (
    "../outside.png",
    "/etc/outside.png",
    "train/../../outside.png",
    "a\nb/0.png",
    "a\x1b[2J/0.png",
    "a\x00b/0.png",
    "ant/" + "x" * 300 + ".png",
    "x/" * 200 + "0.png",
    "train",
    "",
    ".",
    "..",
    "./ant/0.png",
    "ant//0.png",
    "ant/0.png/",
    "ant\\..\\0.png",
    "C:\\0.png",
    "\u202eant/0.png",
    "é/0.png",
    "test/ant/0.PNG",
    "__MACOSX/ant/0.png",
    ".hidden/0.png",
    "val/val_annotations.txt",
    "wnids.txt",
)


def change_bytes(random: Random, data: bytes, most: int = 4) -> bytes:
    """Change a text or binary file in one to `most` places."""
    for _ in range(random.randint(1, most)):
        data = random.choice(CHANGES)(random, data)
    return data


def _span(random: Random, data: bytes, longest: int = 64) -> tuple[int, int]:
    start = random.randrange(len(data) + 1)
    return start, min(len(data), start + random.randint(1, longest))


def _flip(random: Random, data: bytes) -> bytes:
    if not data:
        return data
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 8))):
        changed[random.randrange(len(data))] ^= 1 << random.randrange(8)
    return bytes(changed)


def _cut(random: Random, data: bytes) -> bytes:
    return data[: random.randrange(len(data) + 1)]


def _drop(random: Random, data: bytes) -> bytes:
    start, end = _span(random, data, random.choice((4, 64, 2048)))
    return data[:start] + data[end:]


def _splice(random: Random, data: bytes) -> bytes:
    start, end = _span(random, data, random.choice((4, 64, 2048)))
    at = random.randrange(len(data) + 1)
    over = random.choice((0, end - start))
    return data[:at] + data[start:end] + data[at + over :]


def _repeat(random: Random, data: bytes) -> bytes:
    start, end = _span(random, data, random.choice((1, 16, 512)))
    return data[:end] + data[start:end] * random.choice((1, 2, 50, 1000)) + data[end:]


def _insert(random: Random, data: bytes) -> bytes:
    at = random.randrange(len(data) + 1)
    return data[:at] + random.randbytes(random.choice((1, 4, 16, 512))) + data[at:]


def _number(random: Random, data: bytes) -> bytes:
    """Put another number in the place of some bytes."""
    kind = random.choice("<B <H >H <I >I <Q >Q".split())  # noqa: SIM905
    size = struct.calcsize(kind)
    value = random.choice((*NUMBERS, random.getrandbits(64))) % 256**size
    at = random.randrange(len(data) + 1)
    return data[:at] + struct.pack(kind, value) + data[at + size :]


CHANGES = (_flip, _flip, _cut, _drop, _splice, _repeat, _insert, _number, _number)


def odd_value(random: Random) -> Any:
    """A plain value that hardly belongs where it is put."""
    return random.choice(
        (
            None,
            True,
            False,
            *NUMBERS,
            -1,
            -(2**63),
            2**200,
            10**400,
            0.5,
            -0.0,
            1e308,
            1e-320,
            float("nan"),
            float("inf"),
            "",
            "0",
            "1e-3",
            "nan",
            "auto",
            "last",
            "x" * 5000,
            *NAMES[:6],
            "<script>alert(1)</script>",
            "{0.__class__}",
            "%s%n",
            "\ud800",
            [],
            {},
            [[]],
            [None],
            [1, "a", None],
            {"": None},
            {"format": 1},
            nested(random.choice((3, 50, 200))),
        )
    )


def nested(depth: int) -> Any:
    """Lists in lists."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def change_tree(random: Random, tree: Any, most: int = 3) -> Any:
    """A copy of nested mappings, lists and values with one to `most` changes."""
    for _ in range(random.randint(1, most)):
        places = list(_places(tree))
        path = random.choice(places)
        tree = _changed(random, tree, path, random.choice(places))
    return tree


def _places(tree: Any, path: tuple[Any, ...] = ()) -> Any:
    yield path
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if _many(tree) else ()
    for key, value in inner:
        if len(path) < 8:
            yield from _places(value, (*path, key))


def _many(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _at(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _changed(random: Random, tree: Any, path: tuple[Any, ...], other: tuple[Any, ...]) -> Any:
    if not path:
        return random.choice((odd_value(random), [tree], tree))
    copied = dict(tree) if isinstance(tree, dict) else list(tree)
    key, rest = path[0], path[1:]
    if rest:
        copied[key] = _changed(random, copied[key], rest, other[1:])
        return copied
    value = copied[key]
    kind = random.randrange(6)
    if kind == 0:
        copied.pop(key)
    elif kind == 1 and isinstance(copied, dict):
        copied[random.choice(("", "x\ny", f"{key}s", "x" * 500))] = copied.pop(key)
    elif kind == 2:
        copied[key] = random.choice((str(value), [value], {"x": value}))
    elif kind == 3 and other and isinstance(copied, dict) and other[0] in copied:
        copied[key] = copied[other[0]]
    else:
        copied[key] = odd_value(random)
    return copied if isinstance(tree, dict | list) else tuple(copied)


# what a forged pickle asks for; each would leave a file, were it done
HOSTILE = (
    b"cposix\nsystem\n(S'touch executed'\ntR",
    b"cos\nsystem\n(S'touch executed'\ntR",
    b'cbuiltins\nexec\n(S\'open("executed", "w")\'\ntR',
    b'c__builtin__\neval\n(S\'open("executed", "w")\'\ntR',
    b"\x8c\x02os\x8c\x06system\x93(\x8c\x0etouch executedtR",
    b"cnumpy\nload\n(S'/etc/passwd'\ntR",
    b"cnumpy.f2py\ncompile\n(S'x'\ntR",
    b"ctorch\nload\n(S'/etc/passwd'\ntR",
    b"ctorch.hub\nload\n(S'x'\ntR",
    b"(S'touch executed'\nios\nsystem\n",
)
ODD_OPCODES = (
    b"r\xff\xff\xff\x0f0",  # LONG_BINPUT: a memo of 2^28 entries
    b"r\xff\xff\xff\x7f0",
    b"B\xff\xff\xff\x7f",  # BINBYTES of 2 GiB
    b"\x8e" + b"\xff" * 7 + b"\x7f",  # BINBYTES8
    b"\x8b\xff\xff\xff\x7f",  # LONG4
    b"\x95" + b"\xff" * 7 + b"\x7f",  # FRAME
    b"\x80\xff",  # PROTO 255
    b"I" + b"9" * 5000 + b"\n",
    b"(" * 2000,
    b"]" * 2000,
    b"2" * 2000,
    b"Q",
    b"P1\n",
    b"\x82\x01",
    b"\x81",
    b"\x92",
    b"b",
    b"R",
    b"o",
    b"u",
    b".",
)


def change_pickle(random: Random, data: bytes) -> bytes:
    """Change a pickle opcode by opcode."""
    try:
        starts = [at for _, _, at in pickletools.genops(data)]
    except Exception:
        return change_bytes(random, data)
    parts = [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)], strict=True)]
    for _ in range(random.randint(1, 3)):
        at = random.randrange(len(parts)) if parts else 0
        kind = random.randrange(7)
        if kind == 0 and parts:
            parts.pop(at)
        elif kind == 1 and parts:
            parts.insert(random.randrange(len(parts)), parts[at])
        elif kind == 2 and parts:
            other = random.randrange(len(parts))
            parts[at], parts[other] = parts[other], parts[at]
        elif kind == 3 and parts:
            parts[at] = change_bytes(random, parts[at], 1)
        elif kind == 4 and parts:
            parts[at : at + 1] = [pickle.dumps(odd_value(random), 2)[2:-1]]
        elif kind == 5:
            parts.insert(at, random.choice(HOSTILE))
        else:
            parts.insert(at, random.choice(ODD_OPCODES))
    return b"".join(parts)


def deflated_zeros(mebibytes: int) -> bytes:
    """Raw deflate data of so many MiB of zeros: one flushed block, again and again."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = deflate.compress(bytes(1 << 20)) + deflate.flush(zlib.Z_FULL_FLUSH)
    return block * mebibytes + deflate.flush()
