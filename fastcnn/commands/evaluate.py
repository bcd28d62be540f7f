"""`fastcnn eval`: a run or a checkpoint on its own or other images."""

import json
from typing import Any, Literal

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

EVAL_OWN = (
    own_option("data", str | None, None, "other data than the run's own"),
    own_option("split", Literal["test", "val", "train"], "test", "which images"),
    WEIGHTS,
)


EVAL_SHARED = (
    "data_dir",
    "on_bad_image",
    "bad_limit",
    "loader",
    "store",
    "workers",
    "eval_batch_size",
    "test_fraction",
    "test_flip",
    "device",
    "backend",
    "conv",
    "amp",
    "amp_dtype",
    "threads",
)


def parser() -> Parser:
    found = new_parser("eval", "Evaluate a run or a checkpoint.", "RUN ")
    found.add_argument("run", type=str, help="run folder or checkpoint file")
    add_options(found, EVAL_OWN)
    add_options(found, shared_options(EVAL_SHARED), defaults=False)
    add_json(found)
    add_debug(found)
    return found


def run(given: dict[str, Any], command: list[str]) -> None:
    from fastcnn.train.run import evaluate_run

    own = read_values(given, EVAL_OWN)
    result = evaluate_run(
        given["run"],
        data=own.get("data"),
        split_name=own.get("split", "test"),
        weights=own.get("weights"),
        overrides=read_values(given, shared_options(EVAL_SHARED)),
    )
    if given.get("json"):
        print(json.dumps(result, indent=2))
        return
    flipped = " seen both ways" if result["test_flip"] else ""
    print(
        f"{result['arch']} ({result['checkpoint']}) on {result['data']} {result['split']}, "
        f"{result['images']:,} images{flipped}: top-1 {result['top1']:.2%}, "
        f"top-5 {result['top5']:.2%}, loss {result['loss']:.4f}, "
        f"{result['images_per_s']:,.0f} images/s"
    )
