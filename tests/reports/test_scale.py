"""A part of an experiment: what becomes of images, epochs, drops and rates."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastcnn.recipes import resolve
from fastcnn.reports.catalogue import REPORTS
from fastcnn.reports.scale import LONGEST_STEP, longer_steps, scaled
from fastcnn.train.optim.schedule import learning_rate

CIFAR = (50_000, 10_000)
ROWS = [row for report in REPORTS.values() for one in report.experiments for row in one.rows]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.key)
def test_the_whole_experiment_is_the_report_s(row):
    found = scaled(row.options, 1.0, *CIFAR)
    assert found.options == dict(row.options)
    config = resolve(dict(row.options))
    assert (found.epochs, found.lr) == (config.optim.epochs, config.optim.lr)


def test_images_and_epochs_are_a_part():
    found = scaled({"arch": "mao-default", "recipe": "report"}, 0.2, *CIFAR)
    assert (found.train_images, found.test_images, found.epochs) == (10_000, 2_000, 60)
    assert found.options["train_subset"] == 10_000
    assert found.options["test_subset"] == 2_000


def test_a_subset_is_a_part_of_itself():
    options = {"arch": "cnn-a", "recipe": "report", "train_subset": 5000, "test_subset": 1000}
    found = scaled(options, 0.1, *CIFAR)
    assert (found.train_images, found.test_images, found.epochs) == (500, 100, 5)
    assert found.lr == 1e-3  # Adam's


def test_images_drawn_anew_each_epoch_come_from_all():
    options = {"arch": "cnn-a", "recipe": "report", "epoch_images": 5000}
    found = scaled(options, 0.1, *CIFAR)
    assert found.options["epoch_images"] == found.train_images == 500
    assert "train_subset" not in found.options
    resolve(found.options)


def test_less_data_than_an_experiment_takes_is_taken_whole():
    options = {"arch": "cnn-a", "recipe": "report", "train_subset": 5000, "test_subset": 1000}
    found = scaled(options, 1.0, 1437, 360)
    assert (found.train_images, found.test_images) == (1437, 360)
    assert found.options["train_subset"] is None
    assert found.options["test_subset"] is None


def distance(options, images):
    """The sum of the learning rates of all steps."""
    config = resolve(options)
    steps = -(-images // config.data.batch_size)
    total = steps * config.optim.epochs
    return sum(learning_rate(step, steps, config.optim) for step in range(total))


@pytest.mark.parametrize("arch", ["mao-default", "murgolo-improved", "murgolo-base"])
def test_the_rates_of_fewer_steps_of_sgd_come_as_far(arch):
    options = {"arch": arch, "recipe": "report"}
    found = scaled(options, 0.5, *CIFAR, longer_steps([options], 0.5, *CIFAR))
    assert found.train_images == 25_000
    whole = distance(options, 50_000)
    assert distance(found.options, 25_000) == pytest.approx(whole, rel=0.02)


def raised(*archs, scale=0.01, **options):
    rows = [{"arch": arch, "recipe": "report"} | options for arch in archs]
    longer = longer_steps(rows, scale, *CIFAR)
    return [scaled(row, scale, *CIFAR, longer).lr for row in rows]


def test_a_rate_is_raised_only_as_far_as_is_safe():
    assert raised("murgolo-base") == [pytest.approx(LONGEST_STEP * 0.1)]
    assert raised("mao-default") == [pytest.approx(LONGEST_STEP)]
    assert raised("vgg16") == [0.1]  # its own, which is more than that
    assert raised("mao-default", scale=1) == [0.001]


def test_rates_of_a_report_are_raised_by_one_factor():
    assert raised("murgolo-base", "murgolo-improved") == [0.01, 0.002]
    assert raised("murgolo-base", "vgg16") == [0.001, 0.1]


def test_a_row_about_the_rate_keeps_its_own():
    rows = [{"arch": "mao-default", "recipe": "report"}, {"arch": "mao-default", "lr": 0.1}]
    rows[1]["recipe"] = "report"
    longer = longer_steps(rows, 0.2, *CIFAR)
    assert [scaled(row, 0.2, *CIFAR, longer).lr for row in rows] == [pytest.approx(0.0249), 0.1]


def test_the_modern_recipe_keeps_its_rate():
    found = scaled({"arch": "mao-default", "recipe": "modern"}, 0.1, *CIFAR)
    assert found.lr == resolve({"arch": "mao-default"}).optim.lr


def test_the_epochs_of_drops_are_a_part():
    step = scaled({"arch": "murgolo-improved", "recipe": "report"}, 0.25, *CIFAR)
    assert (step.epochs, step.options["step_epochs"]) == (5, 4)
    options = {"arch": "vgg16", "schedule": "milestones", "milestones": [30, 31, 60], "epochs": 90}
    assert scaled(options, 0.1, *CIFAR).options["milestones"] == [3, 6]
    short = scaled({"arch": "murgolo-improved", "recipe": "report"}, 0.01, *CIFAR)
    assert (short.epochs, short.options["step_epochs"]) == (2, 1)
    warm = {"arch": "vgg16", "schedule": "cosine", "warmup_epochs": 5.0, "epochs": 90}
    assert scaled(warm, 0.1, *CIFAR).options["warmup_epochs"] == 0.5


@given(
    st.sampled_from(ROWS),
    st.floats(1e-4, 1),
    st.integers(20, 200_000),
    st.integers(20, 20_000),
)
def test_every_scale_of_every_row_is_a_run_of_that_data(row, scale, train, test):
    found = scaled(row.options, scale, train, test)
    config = resolve(found.options)
    assert 1 <= found.epochs == config.optim.epochs
    assert 1 <= (config.data.train_subset or train) <= train
    assert 1 <= (config.data.test_subset or test) <= test
    assert 1 <= found.train_images <= train
    assert found.lr == config.optim.lr >= found.full.optim.lr
