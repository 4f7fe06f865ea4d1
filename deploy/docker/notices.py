"""Prints the licences of all installed Python packages, with their texts and notices.

python notices.py > NOTICES
"""

from __future__ import annotations

import importlib.metadata
import re
from importlib.metadata import Distribution
from pathlib import Path

# Names of files that licences ask to be passed on.
_TEXTS = re.compile(r"(^|/)(licen[cs]e|copying|notice|authors|copyright)[^/]*$|/licenses/[^/]", re.IGNORECASE)


def main() -> None:
    found = {str(each.metadata["Name"]).lower(): each for each in importlib.metadata.distributions()}
    for _, distribution in sorted(found.items()):
        print(f"{'=' * 80}\n{distribution.metadata['Name']} {distribution.version}: {name_of(distribution)}")
        for path, text in texts(distribution).items():
            print(f"\n--- {path}\n\n{text.strip()}")
        print()


def name_of(distribution: Distribution) -> str:
    """Returns what the package says its licence is."""
    metadata = distribution.metadata
    classified = [each.split(" :: ")[-1] for each in metadata.get_all("Classifier", []) if each.startswith("License")]
    said = metadata.get("License-Expression") or ", ".join(classified) or metadata.get("License") or "not said"
    return str(said).strip().splitlines()[0]


def texts(distribution: Distribution) -> dict[str, str]:
    """Returns the texts of licences and notices that lie beside the package's metadata, by their paths."""
    return {
        str(path): Path(str(path.locate())).read_bytes().decode(errors="replace")
        for path in distribution.files or []
        if ".dist-info/" in str(path) and _TEXTS.search(str(path)) and Path(str(path.locate())).is_file()
    }


if __name__ == "__main__":
    main()
