"""A patch: attributes of a network's modules that are replaced in place, listed and put back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

_RECORD = "_lcmlora_patches"  # in vars(network), so that it is copied and collected together with the network


class _Absent:
    """Marks an attribute that the instance did not have. The class itself is the marker: copies of it are the same."""


@dataclass(frozen=True)
class Swap:
    """A replaced attribute of a module. `before` is _Absent if the instance had none and used its class's."""

    module: nn.Module
    attribute: str
    before: Any
    after: Any
    variant: str = ""  # which of a patch's replacements this is, where it has several

    @property
    def holds(self) -> bool:
        return vars(self.module).get(self.attribute, _Absent) is self.after


def swap(module: nn.Module, attribute: str, value: Any, variant: str = "") -> Swap:
    """Replaces an attribute of this module alone and returns what `Patch.undo` needs to put it back."""
    # Past nn.Module.__setattr__, which walks through parameters, buffers and submodules.
    before = vars(module).get(attribute, _Absent)
    vars(module)[attribute] = value
    return Swap(module, attribute, before, value, variant)


class Patch(ABC):
    """One change of modules that torch, diffusers or PEFT define. Instances differ in their settings alone."""

    name: ClassVar[str]
    replaces: ClassVar[str]  # the attribute that is replaced, by the library's name
    reason: ClassVar[str]

    def install(self, network: nn.Module) -> None:
        """Patches the network. If this patch is installed already, it is undone first, so that the last call counts."""
        self.undo(network)
        swaps = list(self._apply(network))
        if swaps:
            vars(network).setdefault(_RECORD, {})[self.name] = self, swaps

    @abstractmethod
    def _apply(self, network: nn.Module) -> Iterable[Swap]:
        """Replaces the attributes and returns the swaps."""

    def undo(self, network: nn.Module) -> None:
        """Puts back the very objects that `install` replaced; does nothing if this patch is not installed.

        Raises:
            RuntimeError: something else has replaced an attribute since. Patches are undone in reverse order.
        """
        record = vars(network).get(_RECORD, {})
        _, swaps = record.get(self.name, (self, []))
        for each in swaps:
            if not each.holds:
                raise RuntimeError(
                    f"patch {self.name!r}: {type(each.module).__name__}.{each.attribute} was replaced again after this "
                    "patch was installed; undo that replacement first"
                )
        for each in swaps:
            if each.before is _Absent:
                del vars(each.module)[each.attribute]
            else:
                vars(each.module)[each.attribute] = each.before
        record.pop(self.name, None)
        if not record:
            vars(network).pop(_RECORD, None)


@dataclass(frozen=True)
class Installed:
    """A patch, and the names of the modules whose attributes it has replaced ("" is the network itself)."""

    patch: Patch
    modules: tuple[str, ...]
    variants: dict[str, int] = field(default_factory=dict)  # modules by the replacement they got

    def __str__(self) -> str:
        text = f"{self.patch.name}: {len(self.modules)} x {self.patch.replaces}"
        variants = ", ".join(f"{count} {variant}" for variant, count in self.variants.items() if variant)
        return f"{text} ({variants})" if variants else text


def installed(network: nn.Module) -> list[Installed]:
    """Returns the patches of a network in the order they were installed.

    Modules that have left the network, or whose attribute was replaced again, are not listed.
    """
    names = {id(module): name for name, module in network.named_modules()}
    found = []
    for patch, swaps in vars(network).get(_RECORD, {}).values():
        held = [each for each in swaps if each.holds and id(each.module) in names]
        if held:
            by_module = {names[id(each.module)]: each.variant for each in held}
            found.append(Installed(patch, tuple(by_module), dict(Counter(by_module.values()))))
    return found
