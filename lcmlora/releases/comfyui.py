"""A release as a ComfyUI workflow: the graph that draws with its adapter, as clients.py describes it in words.

ComfyUI has two forms of a graph. The one of its API, by node id, is what a server is sent (`POST /prompt`); the one of
its editor has positions and numbered links, and is what a person opens or drags in. A picture can carry both, in the
PNG's text chunks `prompt` and `workflow`, and opens like a file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, TypedDict

from lcmlora.releases.clients import LATENT_CONSISTENCY, Student

if TYPE_CHECKING:
    from PIL.PngImagePlugin import PngInfo

Value: TypeAlias = str | int | float | bool

_SEED_CONTROL = "fixed"  # the editor's widget beside a seed: what becomes of it after a picture
_WIDTH, _HEIGHT = 320, 260  # of a node with its distance to the next, in the editor


class NodeType(NamedTuple):
    """A node of ComfyUI, as far as these workflows use it; names and order are ComfyUI's.

    inputs: the types of what is linked to it, by name.
    widgets: the names of what is typed into it, in the order of the editor's values.
    outputs: the types of what it gives, by name.
    """

    inputs: dict[str, str]
    widgets: tuple[str, ...]
    outputs: dict[str, str]


# ComfyUI a125cd84: nodes.py, comfy_extras/nodes_custom_sampler.py and nodes_model_advanced.py; JettHu/ComfyUI-TCD 1.0.
NODE_TYPES = {
    "CheckpointLoaderSimple": NodeType({}, ("ckpt_name",), {"MODEL": "MODEL", "CLIP": "CLIP", "VAE": "VAE"}),
    "LoraLoaderModelOnly": NodeType({"model": "MODEL"}, ("lora_name", "strength_model"), {"MODEL": "MODEL"}),
    "ModelSamplingDiscrete": NodeType({"model": "MODEL"}, ("sampling", "zsnr"), {"MODEL": "MODEL"}),
    "CLIPTextEncode": NodeType({"clip": "CLIP"}, ("text",), {"CONDITIONING": "CONDITIONING"}),
    "EmptyLatentImage": NodeType({}, ("width", "height", "batch_size"), {"LATENT": "LATENT"}),
    "KSampler": NodeType(
        {"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING", "latent_image": "LATENT"},
        ("seed", "steps", "cfg", "sampler_name", "scheduler", "denoise"),
        {"LATENT": "LATENT"},
    ),
    "SamplerCustom": NodeType(
        {
            "model": "MODEL",
            "positive": "CONDITIONING",
            "negative": "CONDITIONING",
            "sampler": "SAMPLER",
            "sigmas": "SIGMAS",
            "latent_image": "LATENT",
        },
        ("add_noise", "noise_seed", "cfg"),
        {"output": "LATENT", "denoised_output": "LATENT"},
    ),
    "SamplerEulerAncestral": NodeType({}, ("eta", "s_noise"), {"SAMPLER": "SAMPLER"}),
    "BasicScheduler": NodeType({"model": "MODEL"}, ("scheduler", "steps", "denoise"), {"SIGMAS": "SIGMAS"}),
    "TCDModelSamplingDiscrete": NodeType(
        {"model": "MODEL"},
        ("steps", "scheduler", "denoise", "eta"),
        {"MODEL": "MODEL", "SAMPLER": "SAMPLER", "SIGMAS": "SIGMAS"},
    ),
    "VAEDecode": NodeType({"samples": "LATENT", "vae": "VAE"}, (), {"IMAGE": "IMAGE"}),
    "SaveImage": NodeType({"images": "IMAGE"}, ("filename_prefix",), {}),
}


class ApiNode(TypedDict):
    """A node in the API's form; a linked input is [node id, index of the output]."""

    class_type: str
    inputs: dict[str, Value | list[str | int]]


class Workflow(TypedDict):
    """Both forms of one graph."""

    prompt: dict[str, ApiNode]
    workflow: dict[str, object]  # ComfyUI's own format, version 0.4


class Output(NamedTuple):
    """One output of a node."""

    node: int
    name: str


@dataclass(frozen=True)
class _Node:
    type: str
    links: Mapping[str, Output]
    values: Mapping[str, Value]


class _Graph:
    """Nodes by id, in the order in which they were added, which is from left to right."""

    def __init__(self) -> None:
        self.nodes: dict[int, _Node] = {}

    def add(self, kind: str, *, values: Mapping[str, Value] | None = None, **links: Output) -> int:
        """Adds a node and returns its id. Raises ValueError if an input is missing or does not fit."""
        values, expected = values or {}, NODE_TYPES[kind]
        if links.keys() != expected.inputs.keys() or tuple(values) != expected.widgets:
            raise ValueError(f"{kind}: expected {[*expected.inputs, *expected.widgets]}, got {[*links, *values]}")
        for name, output in links.items():
            given = NODE_TYPES[self.nodes[output.node].type].outputs[output.name]
            if given != expected.inputs[name]:
                raise ValueError(f"{kind}: {name} takes {expected.inputs[name]}, got {given}")
        self.nodes[len(self.nodes) + 1] = _Node(kind, links, values)
        return len(self.nodes)

    def api(self) -> dict[str, ApiNode]:
        """Returns the API's form."""
        return {
            str(number): {
                "class_type": node.type,
                "inputs": {
                    **{name: [str(output.node), self._slot(output)] for name, output in node.links.items()},
                    **node.values,
                },
            }
            for number, node in self.nodes.items()
        }

    def editor(self) -> dict[str, object]:
        """Returns the editor's form."""
        links: list[list[int | str]] = []
        entering: dict[tuple[int, str], int] = {}
        leaving: dict[tuple[int, int], list[int]] = {}
        for number, node in self.nodes.items():
            for slot, (name, given) in enumerate(NODE_TYPES[node.type].inputs.items()):
                output = node.links[name]
                link, start = len(links) + 1, self._slot(output)
                links.append([link, output.node, start, number, slot, given])
                entering[number, name] = link
                leaving.setdefault((output.node, start), []).append(link)
        nodes = []
        for number, node in self.nodes.items():
            kind = NODE_TYPES[node.type]
            nodes.append(
                {
                    "id": number,
                    "type": node.type,
                    "pos": [(number - 1) % 4 * _WIDTH, (number - 1) // 4 * _HEIGHT],
                    "size": [_WIDTH - 40, 60 + 24 * max(len(kind.inputs), len(kind.widgets))],
                    "flags": {},
                    "order": number - 1,
                    "mode": 0,
                    "inputs": [
                        {"name": name, "type": given, "link": entering[number, name]}
                        for name, given in kind.inputs.items()
                    ],
                    "outputs": [
                        {"name": name, "type": given, "links": leaving.get((number, slot), []), "slot_index": slot}
                        for slot, (name, given) in enumerate(kind.outputs.items())
                    ],
                    "properties": {"Node name for S&R": node.type},
                    "widgets_values": _widgets(node.values),
                }
            )
        return {
            "last_node_id": len(nodes),
            "last_link_id": len(links),
            "nodes": nodes,
            "links": links,
            "groups": [],
            "config": {},
            "extra": {},
            "version": 0.4,
        }

    def _slot(self, output: Output) -> int:
        return list(NODE_TYPES[self.nodes[output.node].type].outputs).index(output.name)


def checkpoint_name(source: str | None) -> str:
    """Returns the likely name of a base's file below ComfyUI/models/checkpoints, to be chosen anew where it differs."""
    name = PurePosixPath(source or "base").name
    return name if name.endswith((".safetensors", ".ckpt")) else f"{name}.safetensors"


def workflow(student: Student, *, weights: str, checkpoint: str, prompt: str, side: int, seed: int = 0) -> Workflow:
    """Returns the workflow that draws one picture with the adapter, at guidance 1.

    An adapter for strategic stochastic sampling takes the node of JettHu/ComfyUI-TCD, which makes its steps exactly; on
    a base that predicts v, which that node does not know, it takes ComfyUI's ancestral Euler sampler.

    Args:
        weights: the file's name below ComfyUI/models/loras.
        checkpoint: the base's file below ComfyUI/models/checkpoints.
        side: pixels of the square picture.
    """
    graph = _Graph()
    loaded = graph.add("CheckpointLoaderSimple", values={"ckpt_name": checkpoint})
    adapted = graph.add(
        "LoraLoaderModelOnly", values={"lora_name": weights, "strength_model": 1.0}, model=Output(loaded, "MODEL")
    )
    model = Output(adapted, "MODEL")
    latent = student.sampler.scheduler == LATENT_CONSISTENCY
    if latent or student.predicts_v:
        sampling = "v_prediction" if student.predicts_v else "lcm"
        changed = graph.add("ModelSamplingDiscrete", values={"sampling": sampling, "zsnr": False}, model=model)
        model = Output(changed, "MODEL")
    clip = Output(loaded, "CLIP")
    common = {
        "positive": Output(graph.add("CLIPTextEncode", values={"text": prompt}, clip=clip), "CONDITIONING"),
        # At guidance 1 it is not evaluated, but the node asks for it.
        "negative": Output(graph.add("CLIPTextEncode", values={"text": ""}, clip=clip), "CONDITIONING"),
    }
    size: dict[str, Value] = {"width": side, "height": side, "batch_size": 1}
    empty = Output(graph.add("EmptyLatentImage", values=size), "LATENT")
    if student.sampler.gamma and not latent:
        samples = _strategic(graph, student, model, common, empty, seed)
    else:
        sampler = "lcm" if latent else "euler"
        drawing: dict[str, Value] = {"seed": seed, "steps": student.steps, "cfg": 1.0, "sampler_name": sampler}
        drawing |= {"scheduler": "simple", "denoise": 1.0}
        number = graph.add("KSampler", values=drawing, model=model, latent_image=empty, **common)
        samples = Output(number, "LATENT")
    decoded = graph.add("VAEDecode", samples=samples, vae=Output(loaded, "VAE"))
    graph.add("SaveImage", values={"filename_prefix": "lcmlora"}, images=Output(decoded, "IMAGE"))
    return {"prompt": graph.api(), "workflow": graph.editor()}


def _strategic(
    graph: _Graph, student: Student, model: Output, common: dict[str, Output], latents: Output, seed: int
) -> Output:
    """Adds the nodes of strategic stochastic sampling and returns the latents that they give."""
    assert student.sampler.gamma is not None and student.ancestral_eta is not None
    schedule: dict[str, Value] = {"scheduler": "simple", "steps": student.steps, "denoise": 1.0}
    if student.predicts_v:
        noise: dict[str, Value] = {"eta": round(student.ancestral_eta, 2), "s_noise": 1.0}
        sampler = Output(graph.add("SamplerEulerAncestral", values=noise), "SAMPLER")
        sigmas = Output(graph.add("BasicScheduler", values=schedule, model=model), "SIGMAS")
    else:
        schedule = {"steps": student.steps, "scheduler": "simple", "denoise": 1.0, "eta": student.sampler.gamma}
        node = graph.add("TCDModelSamplingDiscrete", values=schedule, model=model)
        model, sampler, sigmas = (Output(node, name) for name in ("MODEL", "SAMPLER", "SIGMAS"))
    drawing: dict[str, Value] = {"add_noise": True, "noise_seed": seed, "cfg": 1.0}
    drawn = graph.add(
        "SamplerCustom", values=drawing, model=model, sampler=sampler, sigmas=sigmas, latent_image=latents, **common
    )
    return Output(drawn, "output")


def _widgets(values: Mapping[str, Value]) -> list[Value]:
    """Returns the editor's values, in which a seed is followed by what becomes of it after a picture."""
    found: list[Value] = []
    for name, value in values.items():
        found += [value, _SEED_CONTROL] if name.endswith("seed") else [value]
    return found


def file_content(drawn: Workflow) -> dict[str, object]:
    """Returns the content of comfyui.json: the editor's form, which opens like a picture, and in `extra.prompt` the
    API's.

    The editor takes a file for one form or the other, and leaves what it does not know in `extra` alone.
    """
    return drawn["workflow"] | {"extra": {"prompt": drawn["prompt"]}}


def png_chunks(drawn: Workflow) -> PngInfo:
    """Returns what makes a PNG open as this workflow: `picture.save(path, pnginfo=png_chunks(drawn))`."""
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    chunks.add_text("prompt", json.dumps(drawn["prompt"]))
    chunks.add_text("workflow", json.dumps(drawn["workflow"]))
    return chunks
