"""The networks of four reports, as published; `notes` says how each is read where it is ambiguous.

Learning rates, weight decay over the whole network and schedules are recipes, not networks; the L2
penalties that skagerstrom2018 puts on single layers are part of the network.
"""

from dataclasses import replace

from fastcnn.archs.spec import LEAKY_SLOPE, Conv, Layer, Linear, Network, Pool

# marie2019: figure 1


def _marie(name: str, units: int) -> Network:
    layers: list[Layer] = []
    for filters in (32, 64, 128, 256)[:units]:
        layers += [Conv(filters, post_slope=0.0), Conv(filters, post_slope=0.0, pool=Pool())]
    head = (Linear(128, post_slope=0.0), Linear())
    return Network(name, "marie2019", (32,), 10, (*layers, *head))


MARIE = (_marie("cnn-a", 2), _marie("cnn-b", 3), _marie("cnn-c", 4))

# murgolo: sections 2.1, 3.1 and table 1


def _murgolo(name: str, norm: bool, dropout: float, notes: str) -> Network:
    conv = Conv(32, 5, post_slope=0.0, pool=Pool(3, 2))
    layers = (
        replace(conv, norm=norm),
        conv,
        replace(conv, filters=64),
        Linear(64, post_slope=0.0, dropout=dropout),
        Linear(),
    )
    return Network(name, "murgolo", (32,), 10, layers, f"{_MURGOLO_POOLS} {notes}")


_MURGOLO_POOLS = "The 3x3 pools have stride 2 and no padding (32 → 15 → 7 → 3)."
_MURGOLO_NORM = "The one BN follows the first convolution, before its ReLU."
_MURGOLO_DROPOUT = "The one dropout (0.2) follows the ReLU of FC 64."
_MURGOLO_BOTH = f"{_MURGOLO_NORM} {_MURGOLO_DROPOUT}"
_MURGOLO_SAME = "The network of murgolo-improved: this ablation changes the recipe alone."

MURGOLO = (
    _murgolo("murgolo-base", False, 0.0, "No BN, no dropout."),
    _murgolo("murgolo-improved", True, 0.2, _MURGOLO_BOTH),
    _murgolo("murgolo-no-scheduler", True, 0.2, f"{_MURGOLO_BOTH} {_MURGOLO_SAME}"),
    _murgolo("murgolo-no-l2", True, 0.2, f"{_MURGOLO_BOTH} {_MURGOLO_SAME}"),
    _murgolo("murgolo-no-batchnorm", False, 0.2, _MURGOLO_DROPOUT),
    _murgolo("murgolo-no-dropout", True, 0.0, _MURGOLO_NORM),
)

# skagerstrom2018: tables 1 and 2


def _tiny(name: str, hidden: tuple[Linear, ...], norm: bool, l2: float, notes: str) -> Network:
    layers: list[Layer] = []
    for filters, kernels in ((32, (2, (2, 1), (1, 2))), (48, (2, 2, 2)), (80, (2, 2, 2))):
        # bias=True: a Keras convolution has one before a BN too
        convs = [Conv(filters, k, norm=norm, post_slope=0.0, bias=True) for k in kernels]
        layers += [*convs[:-1], replace(convs[-1], pool=Pool(), l2=l2)]
    notes = f"{_TINY_SAME} {notes}".strip()
    return Network(name, "skagerstrom2018", (64,), 200, (*layers, *hidden, Linear()), notes)


_TINY_SAME = "Convolutions keep the size (Keras' same padding)."
_TINY_NORM = (
    "BN stands between the product and the ReLU, though the table's cells end with it; layers "
    "before a BN have a bias, as in Keras; the BN has torch's eps and momentum."
)
_TINY_L2 = (
    "λ·Σw² on the last convolution of each group and on the hidden FC layers, as marked in "
    "table 2; the output layer is not marked."
)
_FC_2048 = Linear(2048, post_slope=0.0)
_FC_2048_NORM = replace(_FC_2048, norm=True, bias=True)
_FC_4096 = Linear(4096, norm=True, post_slope=0.0, bias=True, l2=1e-3)

SKAGERSTROM = (
    _tiny("tiny-a", (_FC_2048,), False, 0.0, ""),
    _tiny("tiny-b", (_FC_2048_NORM,), True, 0.0, _TINY_NORM),
    _tiny("tiny-c", (replace(_FC_2048, dropout=0.3),), False, 0.0, ""),
    _tiny("tiny-d", (replace(_FC_2048_NORM, dropout=0.3),), True, 0.0, _TINY_NORM),
    _tiny("tiny-e", (_FC_4096,) * 3, True, 1e-3, f"{_TINY_NORM} {_TINY_L2}"),
    _tiny("tiny-f", (), True, 5e-3, f"{_TINY_NORM} {_TINY_L2}"),
)

# mao2022: section 2.1 and figure 1 (default), section 3 (variants)


def _mao(
    name: str,
    notes: str,
    filters: tuple[int, int, int] = (64, 128, 256),
    kernels: tuple[int, int, int] = (5, 3, 3),
    slope: float = 0.0,
    fc: tuple[int, ...] = (512,),
    norm: bool = False,
    dropout: float = 0.0,
) -> Network:
    # a norm stands after the activation: the slope then belongs before it
    act = (1.0, slope) if not norm else (slope, 1.0)
    convs = [
        Conv(k, r, padding="valid", norm=norm, pre_slope=act[0], post_slope=act[1], pool=Pool())
        for k, r in zip(filters[:2], kernels[:2], strict=True)
    ]
    last = Conv(filters[2], kernels[2], padding="valid", pool=Pool())
    hidden = [
        Linear(units, norm=norm, pre_slope=act[0], post_slope=act[1], dropout=dropout)
        for units in fc
    ]
    notes = f"{_MAO_LAST} {notes}".strip()
    return Network(name, "mao2022", (32,), 10, (*convs, last, *hidden, Linear()), notes)


_MAO_LAST = "The third convolution has no activation, as in the printed code and figure 1."
_MAO_LEAKY = f"On mao-filters; every ReLU becomes a leaky ReLU of torch's slope {LEAKY_SLOPE}."

MAO = (
    _mao("mao-default", "", filters=(24, 48, 96)),
    _mao("mao-filters", ""),
    _mao(
        "mao-fc",
        "On mao-default: FC 128 → ReLU between FC 512 and the output layer.",
        filters=(24, 48, 96),
        fc=(512, 128),
    ),
    _mao("mao-kernels", "On mao-filters.", kernels=(7, 5, 3)),
    _mao("mao-leaky", _MAO_LEAKY, slope=LEAKY_SLOPE),
    _mao("mao-dropout", "On mao-leaky.", slope=LEAKY_SLOPE, dropout=0.3),
    _mao(
        "mao-batchnorm",
        "On mao-dropout: a BN follows each activation, those of conv 1, conv 2 and FC 512 (before "
        "the dropout); conv 3 has no activation and so gets none.",
        slope=LEAKY_SLOPE,
        dropout=0.3,
        norm=True,
    ),
)

NETWORKS = (*MARIE, *MURGOLO, *SKAGERSTROM, *MAO)
