"""Options: one definition for flags, YAML, help and checks."""

import dataclasses
import re
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastcnn.config import SECTIONS, Config, options_by_name
from fastcnn.errors import UsageError
from fastcnn.options import Option


def test_flat_and_back_is_the_same_configuration():
    config = Config.from_flat({"lr": 0.25, "milestones": [3, 5], "amp": True, "arch": "cnn-a"})
    assert Config.from_flat(config.flat()) == config
    assert (config.optim.lr, config.optim.milestones) == (0.25, [3, 5])


def test_names_are_unique_over_the_sections():
    names = [item.name for cls in SECTIONS.values() for item in dataclasses.fields(cls)]
    assert sorted(names) == sorted(options_by_name())


def test_every_default_passes_its_own_check_and_has_a_help_text():
    for option in options_by_name().values():
        option.check(option.default)
        assert option.help


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lrr": 1.0}, "unknown option 'lrr'; did you mean 'lr'?"),
        ({"lr": -1.0}, "--lr: must be more than 0, got -1.0"),
        ({"lr": float("nan")}, "--lr: expected a finite number"),
        ({"lr": "fast"}, "--lr: expected a number, got 'fast'"),
        ({"epoch_images": 9, "shuffle": False}, "--epoch-images: are drawn anew each epoch"),
        ({"epochs": 0}, "--epochs: must be at least 1, got 0"),
        ({"epochs": 2.5}, "--epochs: expected a whole number, got 2.5"),
        ({"epochs": True}, "--epochs: expected a whole number"),
        ({"amp": 1}, "--amp: expected true or false"),
        ({"val_fraction": 1.0}, "--val-fraction: must be less than 1"),
        ({"optimizer": "sdg"}, "is not one of sgd, adam, adamw; did you mean 'sgd'?"),
        ({"milestones": [2, 0]}, "--milestones: expected whole numbers from 1 up"),
        ({"schedule": "milestones"}, "--schedule milestones: give the epochs"),
        ({"milestones": [5, 3]}, "--milestones: expected rising epochs"),
        ({"optimizer": "adamw", "decay": "l2"}, "use --optimizer adam"),
        ({"warmup_epochs": 60}, "--warmup-epochs: must be less than --epochs"),
        ({"resized_crop": 0.5}, "add --crop-padding 0"),
        (
            {"conv": "fusd"},
            "--conv: 'fusd' is not one of auto, fused, vendor; did you mean 'fused'?",
        ),
        ({"arch": None}, "--arch: expected a text"),
    ],
)
def test_bad_values_are_one_line_that_names_the_flag(options, words):
    with pytest.raises(UsageError) as caught:
        Config.from_flat(options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.floats(allow_nan=True, allow_infinity=True), st.sampled_from(["lr", "ema", "rotation"]))
def test_a_number_is_refused_or_kept(value, name):
    bounds = options_by_name()[name].bounds
    low, high = bounds["low"], bounds["high"]
    inside = value > low if bounds["open_low"] else value >= low
    if high is not None:
        inside = inside and (value < high if bounds["open_high"] else value <= high)
    if inside and value != float("inf"):
        assert Config.from_flat({name: value}).flat()[name] == value
    else:
        with pytest.raises(UsageError):
            Config.from_flat({name: value})


@pytest.mark.parametrize(
    ("kind", "value", "says"),
    [
        (list[str], ["a", "b"], ""),
        (list[str], [], "expected one or more names"),
        (list[str], "a", "expected one or more names"),
        (list[str], [1], "expected one or more names"),
        (list[str], ["a", "a"], "a is given twice"),
        (list[Literal["red", "blue"]], ["red", "bleu"], "'bleu' is not one of red, blue; did you"),
        (list[Literal["red", "blue"]], ["blue", "red"], ""),
        (list[int], ["3", "x"], "expected whole numbers from 1 up"),
    ],
)
def test_lists_of_words_and_numbers(kind, value, says):
    option = Option("colors", "command", kind, [], "colours", {})
    assert option.scalar is list
    if not says:
        assert option.parse(value) == value
        return
    with pytest.raises(UsageError, match=re.escape(says)):
        option.parse(value)


def test_a_configuration_saved_before_there_was_a_choice_of_convolutions_still_loads():
    saved = Config.from_flat({"arch": "cnn-a"}).flat()
    assert saved.pop("conv") == "auto"
    assert Config.from_flat(saved).run.conv == "auto"
