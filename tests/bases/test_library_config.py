"""Values of foreign configurations are checked where they are taken."""

from collections.abc import Callable
from pathlib import Path

import pytest
from diffusers import DDIMScheduler

from lcmlora.bases.examination.library_config import LibraryConfig
from lcmlora.errors import UserError

CONFIG = LibraryConfig(
    {"class": "UNet", "channels": 4, "scale": 0.5, "zeros": True, "blocks": [8, 16], "unset": None}, "unet/config.json"
)


def test_values_of_the_expected_type_are_returned():
    assert (CONFIG.text("class"), CONFIG.integer("channels", 1), CONFIG.number("scale", 1.0)) == ("UNet", 4, 0.5)
    assert CONFIG.number("channels", 1.0) == 4.0 and isinstance(CONFIG.number("channels", 1.0), float)
    assert (CONFIG.flag("zeros", False), CONFIG.length("blocks", 4)) == (True, 2)


@pytest.mark.parametrize("key", ["unset", "absent"])
def test_an_unset_value_is_the_default(key: str):
    assert (CONFIG.text(key), CONFIG.integer(key, 3), CONFIG.number(key, 2.5), CONFIG.length(key, 4)) == (
        None, 3, 2.5, 4,
    )  # fmt: skip
    assert CONFIG.flag("absent", True) and not CONFIG.flag("unset", True)  # null is false to the libraries


@pytest.mark.parametrize(
    ("take", "message"),
    [
        (lambda: CONFIG.text("channels"), "channels is 4; expected a text"),
        (lambda: CONFIG.integer("scale", 1), "scale is 0.5; expected a whole number"),
        (lambda: CONFIG.integer("zeros", 1), "zeros is True; expected a whole number"),
        (lambda: CONFIG.number("class", 1.0), "class is 'UNet'; expected a number"),
        (lambda: CONFIG.flag("channels", True), "channels is 4; expected true or false"),
        (lambda: CONFIG.length("class", 4), "class is 'UNet'; expected a list"),
    ],
)
def test_a_value_of_another_type_is_refused_with_file_key_and_value(take: Callable[[], object], message: str):
    with pytest.raises(UserError, match=rf"^unet/config\.json: {message}$"):
        take()


def test_a_configuration_is_read_from_a_file_and_from_a_module(tmp_path: Path):
    scheduler = DDIMScheduler(num_train_timesteps=10)
    scheduler.save_pretrained(tmp_path)
    written = LibraryConfig.read(tmp_path / "scheduler_config.json")
    loaded = LibraryConfig.of_module(scheduler)
    assert written.integer("num_train_timesteps", 1000) == loaded.integer("num_train_timesteps", 1000) == 10
    assert len(DDIMScheduler.from_config(written).alphas_cumprod) == 10
    with pytest.raises(UserError, match=r"^the configuration of DDIMScheduler: beta_schedule is 'linear'; expected"):
        loaded.number("beta_schedule", 1.0)
