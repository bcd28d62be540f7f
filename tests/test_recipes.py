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


@pytest.mark.parametrize("name", NETWORKS)
def test_the_fast_recipe_needs_batch_norm_everywhere(name):
    if name.startswith(("vgg", "resnet")) or name in ("tiny-b", "tiny-d", "tiny-e", "tiny-f"):
        config = resolve({"arch": name, "recipe": "fast"})
        assert config.model.whiten
        assert config.optim.test_flip
    else:
        with pytest.raises(UsageError, match=f"which {name} lacks; take --recipe modern"):
            resolve({"arch": name, "recipe": "fast"})


def test_the_fast_recipe_has_what_it_is_known_for():
    found = resolve({"recipe": "fast"}).flat()
    expected = {
        "optimizer": "sgd",
        "nesterov": True,
        "schedule": "one-cycle",
        "flip": "alternating",
        "label_smoothing": 0.2,
        "exempt_norm_bias": True,
        "crop_mode": "reflect",
        "normalize": "zscore",
        "whiten": True,
        "freeze_first": True,
        "test_flip": True,
    }
    assert {name: found[name] for name in expected} == expected
    assert found["epochs"] < resolve({}).optim.epochs
    # the average must forget: it spans less than a tenth of the steps on 50,000 images
    steps = found["epochs"] * 50_000 / found["batch_size"]
    assert 0.02 < 1 / (1 - found["ema"]) / steps < 0.1
    # by image, the rate is that of the modern recipe
    modern = resolve({}).flat()
    rates = [options["lr"] / options["batch_size"] for options in (found, modern)]
    assert rates[0] == rates[1]


def test_the_fast_recipe_on_digits_does_not_mirror_them():
    config = resolve({"recipe": "fast", "data": "digits"})
    assert (config.augment.flip, config.optim.test_flip) == ("none", False)
    assert config.optim.lr / config.data.batch_size == 0.4 / 512
    assert resolve({"recipe": "fast", "data": "digits", "epochs": 3}).optim.epochs == 3
