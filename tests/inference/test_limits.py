import math
from typing import Any

import pytest

from lcmlora.errors import UserError
from lcmlora.inference.limits import Limits

ASKED: dict[str, Any] = {"steps": 4, "guidance": 1.0, "seed": 0, "width": 0, "height": 0}


def test_limits_are_the_environments_and_the_time_is_mlflows_where_none_is_named():
    assert Limits.read({}) == Limits() == Limits.read({"LCMLORA_MAX_STEPS": ""})
    assert Limits.read({"LCMLORA_MAX_STEPS": "8", "LCMLORA_MAX_QUEUE": "0"}) == Limits(steps=8, queue=0)
    assert Limits.read({"MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT": "7"}).seconds == 7
    both = {"MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT": "7", "LCMLORA_MAX_SECONDS": "5"}
    assert Limits.read(both).seconds == 5


@pytest.mark.parametrize("text", ["0", "-1", "many", "1.5", "1e3", "٣", " 4", "9" * 19])
def test_a_limit_that_is_no_number_is_named(text: str):
    with pytest.raises(UserError, match=r"^LCMLORA_MAX_PROMPTS: expected a whole number from 1 on, got "):
        Limits.read({"LCMLORA_MAX_PROMPTS": text})


@pytest.mark.parametrize(
    ("prompts", "asked", "message"),
    [
        ([], {}, "prompt: expected 1 to 2 in a request, got 0"),
        (["a"] * 3, {}, "prompt: expected 1 to 2 in a request, got 3"),
        (["a", "b" * 11], {}, "prompt 2: expected 10 characters at most, got 11"),
        (["\ud800"], {}, "prompt 1: has a zero character or half a surrogate pair"),
        (["a\0"], {}, "prompt 1: has a zero character or half a surrogate pair"),
        ([None], {}, "prompt: expected text, got None"),
        ([b"a"], {}, "prompt: expected text, got b'a'"),
        ([math.nan], {}, "prompt: expected text, got nan"),
        (["a"], {"steps": 9}, "steps: expected 8 at most, got 9"),
        (["a"], {"steps": 10**40}, "steps: expected 8 at most"),
        (["a"], {"steps": 1.5}, r"steps: expected a whole number, got 1\.5"),
        (["a"], {"steps": True}, "steps: expected a number, got True"),
        (["a"], {"guidance": math.nan}, "guidance: expected a number, got nan"),
        (["a"], {"guidance": math.inf}, "guidance: expected a number, got inf"),
        (["a"], {"guidance": 20.5}, r"guidance: expected 20 at most, got 20\.5"),
        (["a"], {"seed": -1}, "seed: expected 0 to 9223372036854775807, got -1"),
        (["a"], {"seed": 1 << 63}, "seed: expected 0 to 9223372036854775807, got 9223372036854775808"),
        (["a"], {"seed": "1"}, "seed: expected a number, got '1'"),
        (["a"], {"width": 40, "height": 32}, "width, height: expected 1024 pixels at most, got 40 x 32"),
        (["a"], {"width": 1032}, "width, height: expected 1024 pixels at most, got 1032 x 16"),
    ],
)
def test_what_is_too_much_or_no_number_is_named(prompts: list[Any], asked: dict[str, Any], message: str):
    limits = Limits(prompts=2, characters=10, steps=8)
    with pytest.raises(UserError, match=f"^{message}") as caught:
        limits.check(prompts, ASKED | asked, 16)
    assert str(caught.value).isprintable()
    limits.check(
        ["é" * 10, "b"], ASKED | {"steps": 8, "guidance": 20, "seed": (1 << 63) - 1, "width": 32, "height": 32}, 16
    )


def test_pixels_can_be_set():
    with pytest.raises(UserError, match="width, height: expected 100 pixels at most, got 16 x 16"):
        Limits(pixels=100).check(["a"], ASKED, 16)
