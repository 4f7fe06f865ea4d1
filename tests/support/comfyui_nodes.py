"""Nodes of ComfyUI as its server describes them (`GET /object_info`, shortened), recorded for the tests of workflows.

ComfyUI a125cd84: nodes.py, comfy_extras/nodes_custom_sampler.py, comfy_extras/nodes_model_advanced.py.
JettHu/ComfyUI-TCD 1.0: __init__.py.
"""

from __future__ import annotations

from typing import Any, TypedDict

_SAMPLERS = ["euler", "euler_ancestral", "heun", "dpmpp_2m", "lcm", "ddim", "uni_pc"]
_SCHEDULERS = ["simple", "sgm_uniform", "karras", "exponential", "ddim_uniform", "beta", "normal", "linear_quadratic"]
_SEED = ["INT", {"min": 0, "max": 2**64 - 1, "control_after_generate": True}]
_STEPS = ["INT", {"min": 1, "max": 10000}]
_CFG = ["FLOAT", {"min": 0.0, "max": 100.0}]
_SHARE = ["FLOAT", {"min": 0.0, "max": 1.0}]
_NOISE = ["FLOAT", {"min": 0.0, "max": 100.0}]
_SIDE = ["INT", {"min": 16, "max": 16384}]


class Node(TypedDict):
    """What a node takes, in order, and what it gives."""

    input: dict[str, list[Any]]
    output: list[str]


NODES: dict[str, Node] = {
    "CheckpointLoaderSimple": {"input": {"ckpt_name": ["FILE"]}, "output": ["MODEL", "CLIP", "VAE"]},
    "LoraLoaderModelOnly": {
        "input": {
            "model": ["MODEL"],
            "lora_name": ["FILE"],
            "strength_model": ["FLOAT", {"min": -100.0, "max": 100.0}],
        },
        "output": ["MODEL"],
    },
    "ModelSamplingDiscrete": {
        "input": {
            "model": ["MODEL"],
            "sampling": [["eps", "v_prediction", "lcm", "x0", "img_to_img"]],
            "zsnr": ["BOOLEAN"],
        },
        "output": ["MODEL"],
    },
    "CLIPTextEncode": {"input": {"text": ["STRING"], "clip": ["CLIP"]}, "output": ["CONDITIONING"]},
    "EmptyLatentImage": {
        "input": {"width": _SIDE, "height": _SIDE, "batch_size": ["INT", {"min": 1, "max": 4096}]},
        "output": ["LATENT"],
    },
    "KSampler": {
        "input": {
            "model": ["MODEL"],
            "seed": _SEED,
            "steps": _STEPS,
            "cfg": _CFG,
            "sampler_name": [_SAMPLERS],
            "scheduler": [_SCHEDULERS],
            "positive": ["CONDITIONING"],
            "negative": ["CONDITIONING"],
            "latent_image": ["LATENT"],
            "denoise": _SHARE,
        },
        "output": ["LATENT"],
    },
    "SamplerCustom": {
        "input": {
            "model": ["MODEL"],
            "add_noise": ["BOOLEAN"],
            "noise_seed": _SEED,
            "cfg": _CFG,
            "positive": ["CONDITIONING"],
            "negative": ["CONDITIONING"],
            "sampler": ["SAMPLER"],
            "sigmas": ["SIGMAS"],
            "latent_image": ["LATENT"],
        },
        "output": ["LATENT", "LATENT"],
    },
    "SamplerEulerAncestral": {"input": {"eta": _NOISE, "s_noise": _NOISE}, "output": ["SAMPLER"]},
    "BasicScheduler": {
        "input": {"model": ["MODEL"], "scheduler": [_SCHEDULERS], "steps": _STEPS, "denoise": _SHARE},
        "output": ["SIGMAS"],
    },
    "TCDModelSamplingDiscrete": {
        "input": {
            "model": ["MODEL"],
            "steps": ["INT", {"min": 1, "max": 50}],
            "scheduler": [["simple", "sgm_uniform"]],
            "denoise": _SHARE,
            "eta": _SHARE,
        },
        "output": ["MODEL", "SAMPLER", "SIGMAS"],
    },
    "VAEDecode": {"input": {"samples": ["LATENT"], "vae": ["VAE"]}, "output": ["IMAGE"]},
    "SaveImage": {"input": {"images": ["IMAGE"], "filename_prefix": ["STRING"]}, "output": []},
}
_TYPED = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool, "FILE": str}


def check(kind: str, name: str, value: object) -> None:
    """Fails where ComfyUI would refuse a value that is typed into a node."""
    given, *options = NODES[kind]["input"][name]
    if isinstance(given, list):
        assert value in given, (kind, name, value)
        return
    assert type(value) is _TYPED[given], (kind, name, value)
    limits = options[0] if options else {}
    assert isinstance(value, str | bool) or limits.get("min", value) <= value <= limits.get("max", value), (kind, name)


def is_linked(kind: str, name: str) -> bool:
    """Whether an input is linked to another node's output, and not typed in."""
    given = NODES[kind]["input"][name][0]
    return isinstance(given, str) and given not in _TYPED
