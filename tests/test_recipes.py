"""Recipes: what is left open comes from the recipe, what is given stands."""

import pytest

from fastcnn.archs import NETWORKS
from fastcnn.errors import UsageError
from fastcnn.recipes import resolve


@pytest.mark.parametrize("name", NETWORKS)
def test_both_recipes_of_every_network_are_valid(name):
    modern = resolve({"arch": name})
    assert modern.augment.flip == "random"
    if NETWORKS[name].report:
        printed = resolve({"arch": name, "recipe": "report"})
        assert printed.optim.label_smoothing == 0
        assert printed.optim.schedule != "one-cycle"


def test_a_network_without_a_report_has_no_report_recipe():
    with pytest.raises(UsageError, match="no report describes resnet18"):
        resolve({"arch": "resnet18", "recipe": "report"})


def test_what_the_user_gives_stands_above_the_recipe():
    config = resolve({"arch": "cnn-a", "recipe": "report", "lr": 0.5, "data": "digits"})
    assert (config.optim.lr, config.optim.optimizer, config.data.batch_size) == (0.5, "adam", 100)


def test_modern_recipe_depends_on_norms_and_on_data():
    assert resolve({"arch": "vgg16"}).optim.optimizer == "sgd"
    assert resolve({"arch": "cnn-a"}).optim.optimizer == "adam"
    assert resolve({"arch": "murgolo-improved"}).optim.optimizer == "adam"
    assert resolve({"arch": "resnet18"}).optim.optimizer == "sgd"
    assert resolve({"data": "digits"}).augment.flip == "none"


def test_a_saved_configuration_resolves_to_itself():
    config = resolve({"arch": "tiny-e", "recipe": "report", "seed": 5})
    assert resolve(config.flat()) == config


def test_paths_become_absolute_and_names_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "digits").mkdir()
    assert resolve({"data": "images"}).data.data == str(tmp_path / "images")
    assert resolve({"data_dir": "images"}).data.data_dir == str(tmp_path / "images")
    assert resolve({"data": "digits"}).data.data == "digits"
    for wrong in ("digts", "no/such", "x" * 5000, "~nobody/y"):
        assert resolve({"data": wrong}).data.data == wrong


def test_printed_numbers_of_the_reports():
    optim = resolve({"arch": "cnn-a", "recipe": "report"}).optim
    assert (optim.lr, optim.weight_decay, optim.epochs) == (1e-3, 5e-4, 50)
    optim = resolve({"arch": "murgolo-improved", "recipe": "report"}).optim
    assert (optim.lr, optim.weight_decay, optim.step_epochs, optim.epochs) == (2e-4, 4e-3, 16, 20)
    config = resolve({"arch": "mao-default", "recipe": "report"})
    assert (config.optim.lr, config.optim.momentum, config.optim.epochs) == (1e-3, 0.0, 300)
    assert (config.data.batch_size, config.data.shuffle) == (64, False)
    config = resolve({"arch": "tiny-e", "recipe": "report"})
    assert (config.optim.lr, config.optim.epochs, config.model.init) == (1e-2, 60, "he")
