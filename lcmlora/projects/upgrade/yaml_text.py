"""Changing a YAML file that a person wrote, key by key: all other lines, comments and spaces stay as they are."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

import yaml

from lcmlora.errors import UserError
from lcmlora.io.parsing import JsonObject, Malformed, as_object, parse_yaml

Path = Sequence[str]  # the keys that lead to a value, from the top


class YamlText:
    """A YAML mapping as text. After each change its value is read again, and must be what the change asks for."""

    def __init__(self, text: str, file: str) -> None:
        """Raises UserError, which names the file, if the text is no YAML mapping."""
        self.text, self.file = text, file
        self.values: JsonObject = as_object(self._parsed(text), file)
        self._root = self._first_root = _composed(text)

    def get(self, path: Path) -> Any:
        """Returns the value of a key; None where there is none."""
        value: Any = self.values
        for key in path:
            if not isinstance(value, dict) or key not in value:
                return None
            value = value[key]
        return value

    def has(self, path: Path) -> bool:
        """Returns whether there is such a key."""
        return isinstance(above := self.get(path[:-1]), dict) and path[-1] in above

    def line(self, path: Path) -> int:
        """Returns the line of a key in the text before all changes, counted from 1. Raises UserError if it had none."""
        return int(self._find(path, self._first_root)[1].start_mark.line) + 1

    def prepend(self, comment: str) -> None:
        """Puts a line of a comment before everything."""
        self.text = comment + self.text
        self._root = _composed(self.text)

    def rename(self, path: Path, name: str) -> None:
        """Gives a key another name. Raises UserError if the text cannot be changed in place."""
        _, key, _ = self._find(path, self._root)
        *above, last = path
        changed = copy.deepcopy(self.values)
        mapping = _inner(changed, above)
        renamed = {name if old == last else old: value for old, value in mapping.items()}
        mapping.clear()
        mapping.update(renamed)
        self._put(key.start_mark.index, key.end_mark.index, name, changed, path)

    def replace(self, path: Path, value: Any) -> None:
        """Gives a key another value, written in one line. Raises UserError if the text cannot be changed in place."""
        _, key, node = self._find(path, self._root)
        changed = copy.deepcopy(self.values)
        _inner(changed, path[:-1])[path[-1]] = value
        start, new = node.start_mark.index, _flow(value)
        if node.start_mark.line > key.start_mark.line:  # a block begins below its key, perhaps with a comment between
            colon = self.text.index(":", key.end_mark.index) + 1
            start, new = colon, f" {new}{self.text[colon:start].rstrip()}"
        self._put(start, _end(node), new, changed, path)

    def insert_after(self, path: Path, name: str, value: Any) -> None:
        """Adds a key after another one of the same mapping. Raises UserError if the text cannot be changed in place."""
        mapping, key, node = self._find(path, self._root)
        *above, last = path
        changed = copy.deepcopy(self.values)
        inner = _inner(changed, above)
        entries = list(inner.items())
        inner.clear()
        for old, kept in entries:
            inner[old] = kept
            if old == last:
                inner[name] = value
        entry = f"{name}: {_flow(value)}"
        end = _end(node)
        if mapping.flow_style:
            self._put(end, end, f", {entry}", changed, path)
        else:
            end = self._end_of_line(end)
            self._put(end, end, f"\n{' ' * key.start_mark.column}{entry}", changed, path)

    def remove(self, path: Path) -> None:
        """Removes a key with its value. A comment in its lines goes with it; comments above and below stay.

        Raises:
            UserError: the text cannot be changed in place.
        """
        mapping, key, node = self._find(path, self._root)
        changed = copy.deepcopy(self.values)
        inner = _inner(changed, path[:-1])
        del inner[path[-1]]
        start, end = key.start_mark.index, _end(node)
        if mapping.flow_style or not inner:  # the last key leaves an empty mapping
            start, end = self._with_comma(start, end) if mapping.flow_style else (start, end)
            self._put(start, end, "" if mapping.flow_style else "{}", changed, path)
            return
        start = self.text.rfind("\n", 0, start) + 1
        end = min(self._end_of_line(end) + 1, len(self.text))
        if self.text[:start].endswith("\n\n") and self.text[end:].startswith("\n"):
            end += 1  # one blank line is enough between what was above and what was below
        self._put(start, end, "", changed, path)

    def _with_comma(self, start: int, end: int) -> tuple[int, int]:
        """Returns the span of an entry of {a: 1, b: 2} with the comma that goes with it."""
        if after := re.match(r"\s*,\s*", self.text[end:]):
            return start, end + after.end()
        before = re.search(r",\s*$", self.text[:start])
        return (before.start(), end) if before else (start, end)

    def _end_of_line(self, index: int) -> int:
        found = self.text.find("\n", index)
        return len(self.text) if found < 0 else found

    def _put(self, start: int, end: int, new: str, expected: JsonObject, path: Path) -> None:
        text = self.text[:start] + new + self.text[end:]
        try:
            found = parse_yaml(text)
        except Malformed:
            found = None
        if found != expected:
            raise UserError(f"{self.file}: {'.'.join(path)}: cannot be changed in place; change it by hand")
        self.text, self.values, self._root = text, expected, _composed(text)

    def _find(self, path: Path, root: yaml.Node) -> tuple[yaml.MappingNode, yaml.Node, yaml.Node]:
        """Returns the mapping that has a key, the key and its value."""
        found = _find(root, path)
        if found is None:
            raise UserError(f"{self.file}: {'.'.join(path)}: is not written there, but merged (<<); change it by hand")
        return found

    def _parsed(self, text: str) -> Any:
        try:
            return parse_yaml(text)
        except Malformed as error:
            raise UserError(f"{self.file}: {error}") from None


def _composed(text: str) -> yaml.Node:
    """Returns the nodes of a text that has been read before."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    assert root is not None, "a mapping has a node"
    return root


def _find(node: yaml.Node, path: Path) -> tuple[yaml.MappingNode, yaml.Node, yaml.Node] | None:
    """Returns the mapping that has a key, the key and its value; None if the key is not written."""
    found = None
    for name in path:
        entries = node.value if isinstance(node, yaml.MappingNode) else ()
        entry = next((entry for entry in entries if entry[0].value == name), None)
        if entry is None:
            return None
        assert isinstance(node, yaml.MappingNode)
        found, node = (node, *entry), entry[1]
    return found


def _inner(values: JsonObject, path: Path) -> JsonObject:
    for key in path:
        values = values[key]
    return values


def _end(node: yaml.Node) -> int:
    """Returns the index after a value. The end mark of a block is behind the comments that follow it."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(last[1] if isinstance(last, tuple) else last)
    return int(node.end_mark.index)


def _flow(value: Any) -> str:
    """Returns a value as YAML in one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10**9, allow_unicode=True, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")
