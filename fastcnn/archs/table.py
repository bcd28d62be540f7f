"""The networks as tables: of the whole zoo, and of one network's layers."""

from collections.abc import Sequence
from typing import Any

from fastcnn.archs import NETWORKS, get_network
from fastcnn.archs.spec import Network, flop, layer_table, parameters, totals, train_flop


def zoo_table(image_size: int | None, classes: int | None) -> list[dict[str, Any]]:
    """One entry a network; sizes and classes default to the network's own."""
    return [_entry(network, image_size, classes) for network in NETWORKS.values()]


def network_table(name: str, image_size: int | None, classes: int | None) -> dict[str, Any]:
    """A network's entry with its layers and torchsummary's totals (MB are 2^20 bytes)."""
    network = get_network(name)
    size, count = image_size or network.image_sizes[0], classes or network.classes
    layers = [
        {
            "layer": row.name,
            "module": row.layer,
            "output_shape": [-1, *row.output_shape],
            "parameters": row.parameters,
            "mflop": row.mflop,
        }
        for row in layer_table(network, size, count)
    ]
    summary = totals(network, size, count)._asdict()
    return {
        **_entry(network, size, count),
        "notes": network.notes,
        "layers": layers,
        "totals": summary,
    }


def _entry(network: Network, image_size: int | None, classes: int | None) -> dict[str, Any]:
    size, count = image_size or network.image_sizes[0], classes or network.classes
    return {
        "name": network.name,
        "report": network.report or None,
        "input": [3, size, size],
        "image_sizes": list(network.image_sizes),
        "classes": count,
        "parameters": parameters(network, size, count),
        "mflop": flop(network, size, count) / 1e6,
        "train_mflop": train_flop(network, size, count) / 1e6,
    }


def print_zoo(entries: list[dict[str, Any]]) -> None:
    """Print the list of networks."""
    rows = [
        (
            entry["name"],
            entry["report"] or "",
            "x".join(map(str, entry["input"][1:])),
            str(entry["classes"]),
            f"{entry['parameters']:,}",
            f"{entry['mflop']:,.1f}",
            f"{entry['train_mflop']:,.1f}",
        )
        for entry in entries
    ]
    heads = ("name", "report", "input", "classes", "parameters", "MFLOP", "MFLOP training")
    _print(heads, rows, left=2)
    print("MFLOP of one image, 2 a multiply-add: forward; forward and backward")


def print_network(entry: dict[str, Any]) -> None:
    """Print the layers of a network as torchsummary does."""
    rows = [
        (
            row["layer"],
            row["module"],
            str(row["output_shape"]),
            f"{row['parameters']:,}",
            f"{row['mflop']:,.3f}" if row["mflop"] else "",
        )
        for row in entry["layers"]
    ]
    report = f", report {entry['report']}" if entry["report"] else ""
    print(f"{entry['name']}{report}, input {entry['input']}, {entry['classes']} classes")
    _print(("layer (type)", "module", "output shape", "param #", "MFLOP"), rows, left=3)
    figures = entry["totals"]
    print(f"Total params: {figures['parameters']:,}")
    print(f"Trainable params: {figures['trainable']:,}")
    print(f"Non-trainable params: {figures['non_trainable']:,}")
    print(f"Input size (MB): {figures['input_mb']:.2f}")
    print(f"Forward/backward pass size (MB): {figures['forward_backward_mb']:.2f}")
    print(f"Params size (MB): {figures['parameters_mb']:.2f}")
    print(f"Estimated Total Size (MB): {figures['total_mb']:.2f}")
    print(f"MFLOP forward: {entry['mflop']:,.1f}, training: {entry['train_mflop']:,.1f}")
    if entry["notes"]:
        print(entry["notes"])


def _print(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]], left: int) -> None:
    """Columns wide enough for their longest cell; the first `left` of them flush left."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    for row in (heads, tuple("-" * width for width in widths), *rows):
        cells = [
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
