"""The networks by name. Importing this, or asking for shapes and counts, needs no torch."""

from fastcnn.archs import reports, resnet, vgg
from fastcnn.archs.spec import Network
from fastcnn.errors import UsageError, nearest

NETWORKS: dict[str, Network] = {
    network.name: network for network in (*reports.NETWORKS, *vgg.NETWORKS, *resnet.NETWORKS)
}


def get_network(name: str) -> Network:
    """Return the network of this name. Raises UsageError with the nearest valid name."""
    if name not in NETWORKS:
        hint = nearest(name, NETWORKS) or "; `fastcnn archs` lists them"
        raise UsageError(f"unknown architecture '{name}'{hint}")
    return NETWORKS[name]
