"""The list of verbs in `lcmlora --help`: their order, their panels, and hints for words that are no verbs."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from typer.core import TyperGroup

# A verb of another package that is in no panel comes last.
PANELS: dict[str, tuple[str, ...]] = {
    "Project": ("init", "check", "config", "bases", "data", "fetch", "doctor", "upgrade"),
    "Runs": ("run", "status", "report"),
    "Schedules": (
        "up",
        "down",
        "login",
        "deploy",
        "schedule",
        "watch",
        "notify",
        "summary",
        "metrics",
        "backup",
        "restore",
    ),
    "Adapters": ("generate", "serve", "prompts", "comfyui", "convert", "combine"),
    "Registry and releases": ("registry", "approve", "reject", "releases", "prune"),
    "Stages (`run` runs the stale ones)": (
        "resolve",
        "prepare",
        "encode",
        "reference",
        "distill",
        "polish",
        "evaluate",
        "style",
        "finetune",
        "study",
        "compatibility",
        "package",
    ),
}
_OTHERS = "Verbs of other packages"

HIDDEN = ("pretrain", "alone", "remeasure")  # dvc.yaml and the flow call these; a person seldom does

# Words that people try, with the verb that does it.
_HINTS = {
    "retrain": "run",
    "train": "run",
    "repro": "run",
    "publish": "run",
    "new": "init",
    "create": "init",
    "update": "upgrade",
    "validate": "check",
    "start": "up",
    "stop": "down",
    "draw": "generate",
    "sample": "generate",
    "merge": "combine",
    "list": "registry list",
    "ls": "registry list",
    "show": "registry show",
    "promote": "registry promote",
    "rollback": "registry rollback",
    "pull": "registry pull",
    "download": "registry pull",
    "verify": "releases verify",
    "gc": "prune",
    "clean": "prune",
    "delete": "prune",
}

_PANEL_OF = {name: panel for panel, names in PANELS.items() for name in names}
_ORDER = {name: number for number, name in enumerate(_PANEL_OF)}


class Verbs(TyperGroup):
    """The group of all verbs."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for name, command in self.commands.items():
            command.hidden = command.hidden or name in HIDDEN
            command.rich_help_panel = _PANEL_OF.get(name, _OTHERS)  # type: ignore[attr-defined]

    def list_commands(self, ctx: Any) -> list[str]:
        """Returns the names of all verbs in the order of the panels."""
        return sorted(self.commands, key=lambda name: _ORDER.get(name, len(_ORDER)))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Returns the verb that a command line names. Ends with status 2 and a hint where there is none."""
        word = args[0]
        if word not in self.commands and not word.startswith("-") and not ctx.resilient_parsing:
            ctx.fail(f"there is no verb {word!r}{self._hint(ctx, word)}")
        return super().resolve_command(ctx, args)

    def _hint(self, ctx: Any, word: str) -> str:
        shown = [name for name in self.list_commands(ctx) if not self.commands[name].hidden]
        if word in _HINTS:
            verb, _, part = _HINTS[word].partition(" ")
            command: Any = self.commands.get(verb)
            if command is not None and part:
                command = command.commands.get(part)
            if command is not None:
                return f"; `lcmlora {_HINTS[word]}`: {command.get_short_help_str(120)}"
        close = get_close_matches(word, shown)
        return f"; did you mean {' or '.join(close)}?" if close else "; `lcmlora --help` lists all of them"
