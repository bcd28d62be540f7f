"""Checkpoints of earlier formats, brought to the present one when they are read."""

from collections.abc import Callable
from typing import Any

import torch

FORMAT = 3

State = dict[str, Any]


def migrate(state: State) -> None:
    """Bring a state of format 1 to FORMAT to the last of these, in place.

    Raises whatever Python does where the state is not what that format holds.
    """
    for number in range(state["format"], FORMAT):
        STEPS[number](state)
    state["format"] = FORMAT


def _from_1(state: State) -> None:
    """Its optimiser was torch's, of other names: what is left are weights to evaluate with."""
    state.pop("optimizer", None)


def _from_2(state: State) -> None:
    """Steps that were skipped were not counted, and one process trained."""
    if "optimizer" not in state:
        return
    state["guard"] = {"counts": torch.zeros(3)}
    state["rng_of_ranks"] = []
    state["steps_per_epoch"] = None
    for row in state["progress"]["history"]:
        row["skipped_steps"] = 0


STEPS: dict[int, Callable[[State], None]] = {1: _from_1, 2: _from_2}
