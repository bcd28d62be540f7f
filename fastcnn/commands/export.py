"""`fastcnn export`: the network of a run as a file for other programs."""

from typing import Any, get_args

from fastcnn.commands.output import as_text
from fastcnn.commands.parser import (
    WEIGHTS,
    Parser,
    add_debug,
    add_json,
    add_options,
    new_parser,
    own_option,
    read_values,
    shared_options,
)
from fastcnn.errors import UsageError
from fastcnn.export.formats import Format, Names, check_options

EXPORT_OWN = (
    own_option("format", Format, None, "of the file; torch: a torch.export program (.pt2)"),
    own_option("output", str | None, None, "file to write; default: <network>.<ending> in the run"),
    own_option("preprocess", bool, False, "take uint8 RGB pixels (N, H, W, 3), normalise inside"),
    own_option("names", Names, "own", "safetensors: the weights' names; torchvision: of vgg*_bn"),
    WEIGHTS,
    own_option("data", str | None, None, "check with the test images of other data than the run's"),
    own_option("images", int, 256, "how many images the file is checked with", 1),
    own_option("opset", int | None, None, "ONNX: version of its operations; default: torch's"),
)

EXPORT_SHARED = ("data_dir", "on_bad_image", "bad_limit", "store", "threads")


def parser() -> Parser:
    found = new_parser(
        "export",
        "Write the network of a run as a file for other programs: batch norms folded, any number "
        "of images, checked against the run's own test images.",
        "RUN --format FORMAT ",
    )
    found.add_argument("run", type=str, help="run folder or checkpoint file")
    add_options(found, EXPORT_OWN)
    add_options(found, shared_options(EXPORT_SHARED), defaults=False)
    add_json(found)
    add_debug(found)
    return found


def run(given: dict[str, Any], command: list[str]) -> None:
    own = {option.name: option.default for option in EXPORT_OWN} | read_values(given, EXPORT_OWN)
    if own["format"] is None:
        raise UsageError(f"--format: none given; one of {', '.join(get_args(Format))}")
    shared = read_values(given, shared_options(EXPORT_SHARED))
    check_options(own["format"], own["preprocess"], own["names"], own["opset"])
    # after the check: the rest takes torch's seconds to import
    from fastcnn.export.run import export_run

    result = export_run(given["run"], overrides=shared, **own).to_plain()
    print(as_text(result) if given.get("json") else told(result))


def told(result: dict[str, Any]) -> str:
    """The result in a few lines."""
    found, taken = result["comparison"], result["input"]
    lines = [f"{result['path']}: {result['bytes']:,} bytes, {result['arch']}"]
    if taken:
        shape = ", ".join(map(str, taken["shape"]))
        lines.append(f"takes {taken['dtype']} {taken['name']} ({shape}): {taken['values']}")
    sizes = ", ".join(map(str, dict.fromkeys(found["batches"])))
    lines.append(
        f"checked on {found['images']:,} {result['checked_on']} (batches of {sizes}): "
        f"max error of a logit {found['error']:.2g}, {found['relative']:.1e} of the largest "
        f"(allowed {found['tolerance']:g}), {found['equal']:.2%} equal predictions"
    )
    return "\n".join(lines)
