"""What changed in the results of each stage: one line for each version of its algorithm, and for nothing else.

`lcmlora upgrade` prints these lines for the stages that become stale. CHANGELOG.md has them under the release that
brought them. tests/projects/upgrade/test_history.py holds the two together, and the versions of lcmlora/stages.py
against these.
"""

from __future__ import annotations

from dataclasses import dataclass

FIRST = "0.1.0"  # the release that numbered no stages: DVC looked at digests of source files there


@dataclass(frozen=True)
class StageVersion:
    """A version of a stage's algorithm."""

    stage: str
    version: int
    release: str  # of lcmlora, the first one with it
    change: str  # of the result for the same inputs and settings, in one line


# In the order of the stages, the oldest version first. Version 1 says what has changed since 0.1.0.
HISTORY = (
    StageVersion("pretrain", 1, "0.2.0", "the same weights as in 0.1.0"),
    StageVersion(
        "prepare",
        1,
        "0.2.0",
        "a caption belongs to the picture of its own name; files of test and validation splits are left out; damaged "
        "rows are rejected one by one",
    ),
    StageVersion("prepare", 2, "0.2.0", "captions are split into training, validation and test"),
    StageVersion("encode", 1, "0.2.0", "pictures with a colour profile are converted to sRGB"),
    StageVersion("reference", 1, "0.2.0", "the digest of the base covers its VAE and text encoders"),
    StageVersion(
        "reference",
        2,
        "0.2.0",
        "the best settings of each solver are searched on validation captions; second features measure every image set",
    ),
    StageVersion(
        "reference",
        3,
        "0.2.0",
        "the search draws settings that are far from the teacher only for a quarter of the pictures",
    ),
    StageVersion("distill", 1, "0.2.0", "the same weights as in 0.1.0; the base's digest covers all of its parts"),
    StageVersion("polish", 1, "0.2.0", "new: distribution matching from the distilled adapter"),
    StageVersion("evaluate", 1, "0.2.0", "caption retrieval that says nothing is reported as not measured"),
    StageVersion(
        "evaluate",
        2,
        "0.2.0",
        "figures are of test captions; intervals resample captions as well as seeds; worst captions and own prompts",
    ),
    StageVersion("style", 1, "0.2.0", "the same weights as in 0.1.0; the base's digest covers all of its parts"),
    StageVersion("finetune", 1, "0.2.0", "the same weights as in 0.1.0; the base's digest covers all of its parts"),
    StageVersion("alone", 1, "0.2.0", "the same pictures as in 0.1.0"),
    StageVersion("study", 1, "0.2.0", "the same figures as in 0.1.0"),
    StageVersion("study", 2, "0.2.0", "intervals resample captions as well as seeds"),
    StageVersion("compatibility", 1, "0.2.0", "new: what the adapter draws with additions to the base"),
    StageVersion("package", 1, "0.2.0", "provenance names the digests of all parts of the base"),
    StageVersion(
        "package",
        2,
        "0.2.0",
        "card and report show second features, costs and worst captions; one file spelling for all programs, with "
        "instructions for each; ComfyUI's workflow",
    ),
    StageVersion(
        "package",
        3,
        "0.2.0",
        "card and report have the table of compatibility, and one text on how to draw; the report is half as long",
    ),
    StageVersion(
        "package",
        4,
        "0.2.0",
        "card, report and provenance say what each number of steps is good for; the fewest within the gate are the "
        "default",
    ),
)


def since(stage: str, version: int | None) -> list[StageVersion]:
    """Returns the versions of a stage's algorithm after this one, the oldest first.

    Args:
        version: None for results of lcmlora 0.1.0, which had no versions.
    """
    return [each for each in HISTORY if each.stage == stage and each.version > (version or 0)]
