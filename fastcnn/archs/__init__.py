"""The networks by name. Importing this, or asking for shapes and counts, needs no torch."""

from dataclasses import replace

from fastcnn.archs import reports, resnet, vgg
from fastcnn.archs.spec import Conv, Network
from fastcnn.errors import UsageError, nearest

NETWORKS: dict[str, Network] = {
    network.name: network for network in (*reports.NETWORKS, *vgg.NETWORKS, *resnet.NETWORKS)
}


NORM = "+norm"  # behind a network's name: with batch norm in each of its convolution layers


def get_network(name: str) -> Network:
    """Return the network of this name; "cnn-a+norm" is cnn-a with batch norm behind each
    convolution. Raises UsageError with the nearest valid name."""
    plain = name.removesuffix(NORM)
    if plain not in NETWORKS:
        hint = nearest(plain, NETWORKS) or "; `fastcnn archs` lists them"
        raise UsageError(f"unknown architecture '{name}'{hint}")
    network = NETWORKS[plain]
    if plain == name:
        return network
    records = (replace(r, norm=True) if isinstance(r, Conv) else r for r in network.layers)
    return replace(network, name=name, layers=tuple(records))
