"""What a version has cost: seconds of devices, energy and price, as tags of the version."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lcmlora.config import Registry
from lcmlora.registry.tracking import connect, reaching
from lcmlora.settings.services import Costs

_SECONDS, _ENERGY, _PRICE, _DEVICES = "device_seconds", "energy_kwh", "price", "devices"  # tags
_JOULES = 3.6e6  # of a kilowatt-hour


@dataclass(frozen=True)
class Use:
    """The use of one kind of device.

    device: `cpu`, or the GPU's name as its driver says it.
    seconds: of the device; two devices for a minute are 120.
    joules: None where the device does not say it.
    """

    device: str
    seconds: float
    joules: float | None = None


@dataclass(frozen=True)
class Spent:
    """What was spent on devices. None: not measured, or without a price in `costs.per_hour`."""

    seconds: float
    joules: float | None
    price: float | None
    currency: str
    devices: tuple[tuple[str, float], ...]  # device, seconds

    @property
    def kwh(self) -> float | None:
        """The energy in kilowatt-hours."""
        return None if self.joules is None else self.joules / _JOULES

    def tags(self) -> dict[str, str]:
        """Returns the tags of a version. What is not known has none."""
        found = {_SECONDS: f"{self.seconds:.1f}"}
        found[_DEVICES] = "; ".join(f"{device}: {seconds:.1f} s" for device, seconds in self.devices)
        if self.kwh is not None:
            found[_ENERGY] = f"{self.kwh:.6g}"
        if self.price is not None:
            found[_PRICE] = f"{self.price:.6g} {self.currency}"
        return {key: value for key, value in found.items() if value}

    def rows(self) -> list[tuple[str, str]]:
        """Returns names and values for a table."""
        return [
            ("device time", f"{duration(self.seconds)}{self._by_device()}"),
            ("energy", self._energy() or "not measured"),
            ("price", self._price() or "no price in costs.per_hour"),
        ]

    def _energy(self) -> str | None:
        return None if self.kwh is None else f"{self.kwh:.3g} kWh"

    def _price(self) -> str | None:
        return None if self.price is None else f"{self.price:.2f} {self.currency}"

    def _by_device(self) -> str:
        return f" ({', '.join(device for device, _ in self.devices)})" if self.devices else ""

    @property
    def line(self) -> str:
        """What is known of it in one line."""
        time = f"{duration(self.seconds)}{self._by_device()}"
        return ", ".join(value for value in (time, self._energy(), self._price()) if value)


def add_up(uses: Iterable[Use], settings: Costs) -> Spent:
    """Returns the sum of uses. Energy and price are None if one of the uses has none."""
    seconds: dict[str, float] = {}
    joules: float | None = 0.0
    for use in uses:
        seconds[use.device] = seconds.get(use.device, 0.0) + use.seconds
        joules = None if joules is None or use.joules is None else joules + use.joules
    prices = [price_of(device, each, settings) for device, each in seconds.items()]
    known = [price for price in prices if price is not None]
    price = sum(known) if len(known) == len(prices) and settings.per_hour else None
    return Spent(sum(seconds.values()), joules if seconds else None, price, settings.currency, tuple(seconds.items()))


def price_of(device: str, seconds: float, settings: Costs) -> float | None:
    """Returns the price of so many seconds of a device, None where `costs.per_hour` has no price of it."""
    named = [name for name in settings.per_hour if device.lower().startswith(name.lower())]
    return settings.per_hour[max(named, key=len)] * seconds / 3600 if named else None


def of_tags(tags: Mapping[str, str]) -> list[tuple[str, str]]:
    """Returns the rows of a version's costs for a table; none for versions from before they were counted."""
    if _SECONDS not in tags:
        return []
    try:
        time = duration(float(tags[_SECONDS]))
    except ValueError:  # anybody can write a tag
        return []
    devices = f" ({tags[_DEVICES]})" if tags.get(_DEVICES) else ""
    energy = f"{tags[_ENERGY]} kWh" if _ENERGY in tags else "not measured"
    return [("device time", f"{time}{devices}"), ("energy", energy), ("price", tags.get(_PRICE, "not known"))]


def figures(tags: Mapping[str, str]) -> dict[str, float | str | None]:
    """Returns the costs of a version by the names of their tags, numbers as numbers, to compare two versions."""
    found: dict[str, float | str | None] = {}
    for key in (_SECONDS, _ENERGY, _PRICE):
        text = tags.get(key)
        try:
            found[key] = None if text is None else float(text)
        except ValueError:
            found[key] = text
    return found


def duration(seconds: float) -> str:
    """Returns a duration for a person to read."""
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 3600:.2f} h"


def record(spent: Spent, name: str, version: int, settings: Registry) -> None:
    """Writes the costs into the tags of a version. A version that has its costs keeps them.

    Raises:
        UserError: MLflow cannot be reached.
    """
    with reaching(settings, "the next run writes the costs"):
        client = connect(settings)
        if _SECONDS in client.get_model_version(name, str(version)).tags:
            return
        # The seconds last: they say that the others are there.
        for key, value in sorted(spent.tags().items(), key=lambda item: item[0] == _SECONDS):
            client.set_model_version_tag(name, str(version), key, value)
