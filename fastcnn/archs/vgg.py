"""VGG for small images: Simonyan and Zisserman 2014, table 1 (A, B, D, E), with batch norm."""

from fastcnn.archs.spec import Conv, Layer, Linear, Network, Pool

FILTERS = (64, 128, 256, 512, 512)
CONVS_A_GROUP = {
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}

NOTES = (
    "Convolutions 3x3 → BN → ReLU in five groups, each ended by a 2x2 max-pool; "
    "FC 512 → BN → ReLU → dropout 0.5; FC classes. The report's text speaks of 3x3 pools and does "
    "not describe the FC layers; the figure it reprints is the standard network, which is taken."
)


def _group(filters: int, convs: int) -> list[Layer]:
    plain = [Conv(filters, norm=True, post_slope=0.0)] * (convs - 1)
    return [*plain, Conv(filters, norm=True, post_slope=0.0, pool=Pool())]


def _vgg(name: str, convs_a_group: tuple[int, ...]) -> Network:
    groups = [_group(k, n) for k, n in zip(FILTERS, convs_a_group, strict=True)]
    layers: list[Layer] = [conv for group in groups for conv in group]
    head = (Linear(512, norm=True, post_slope=0.0, dropout=0.5), Linear())
    return Network(name, "bohnstedt2019", (32, 64), 10, (*layers, *head), NOTES)


NETWORKS = tuple(_vgg(name, convs) for name, convs in CONVS_A_GROUP.items())
