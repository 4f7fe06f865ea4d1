from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lcmlora.adapters.metadata import Sampler
from lcmlora.bases.schedule import Schedule
from lcmlora.releases import comfyui
from lcmlora.releases.clients import Student
from tests.support import client_schedules, comfyui_nodes
from tests.support.comfyui_nodes import NODES

LEVELS = torch.tensor(1 / (1 + client_schedules.stable_diffusion() ** 2))
STUDENTS = [
    (Sampler(), "epsilon"),
    (Sampler(), "v_prediction"),
    (Sampler("TCDScheduler", 0.3), "epsilon"),
    (Sampler("TCDScheduler", 0.3), "v_prediction"),
    (Sampler("TCDScheduler", 0.0), "epsilon"),
]


def drawn(sampler: Sampler, prediction_type: str = "epsilon", steps: int = 4) -> comfyui.Workflow:
    student = Student.of(sampler, Schedule.variance_preserving(LEVELS, prediction_type), steps)
    return comfyui.workflow(
        student, weights="lora.safetensors", checkpoint="base.safetensors", prompt="a cat", side=512
    )


def nodes(workflow: comfyui.Workflow) -> dict[str, Any]:
    return {node["class_type"]: node["inputs"] for node in workflow["prompt"].values()}


@pytest.mark.parametrize(("sampler", "prediction_type"), STUDENTS)
def test_a_server_takes_every_node_and_link(sampler: Sampler, prediction_type: str) -> None:
    prompt = drawn(sampler, prediction_type)["prompt"]
    for node in prompt.values():
        kind = node["class_type"]
        assert node["inputs"].keys() == NODES[kind]["input"].keys(), kind
        for name, value in node["inputs"].items():
            if not comfyui_nodes.is_linked(kind, name):
                comfyui_nodes.check(kind, name, value)
                continue
            assert isinstance(value, list)
            number, slot = value
            given = NODES[prompt[str(number)]["class_type"]]["output"][int(slot)]
            assert given == NODES[kind]["input"][name][0], (kind, name)


@pytest.mark.parametrize(("sampler", "prediction_type"), STUDENTS)
def test_the_editor_shows_the_same_graph(sampler: Sampler, prediction_type: str) -> None:
    workflow = drawn(sampler, prediction_type)
    editor: Any = workflow["workflow"]
    links = {link[0]: link for link in editor["links"]}
    assert len({tuple(node["pos"]) for node in editor["nodes"]}) == len(editor["nodes"])
    for node in editor["nodes"]:
        known, inputs = NODES[node["type"]], workflow["prompt"][str(node["id"])]["inputs"]
        assert [output["type"] for output in node["outputs"]] == known["output"]
        for slot, given in enumerate(node["inputs"]):
            link = links[given["link"]]
            assert link[3:] == [node["id"], slot, known["input"][given["name"]][0]]
            assert inputs[given["name"]] == [str(link[1]), link[2]]
            source = next(each for each in editor["nodes"] if each["id"] == link[1])
            assert link[0] in source["outputs"][link[2]]["links"]
        expected: list[object] = []
        for name, (_, *options) in known["input"].items():
            if not comfyui_nodes.is_linked(node["type"], name):
                expected += (
                    [inputs[name], "fixed"] if options and "control_after_generate" in options[0] else [inputs[name]]
                )
        assert node["widgets_values"] == expected, node["type"]


def test_each_objective_gets_its_sampler() -> None:
    latent = nodes(drawn(Sampler()))
    assert latent["ModelSamplingDiscrete"]["sampling"] == "lcm"
    settings = {name: latent["KSampler"][name] for name in ("sampler_name", "scheduler", "steps", "cfg", "denoise")}
    assert settings == {"sampler_name": "lcm", "scheduler": "simple", "steps": 4, "cfg": 1.0, "denoise": 1.0}
    strategic = nodes(drawn(Sampler("TCDScheduler", 0.3)))
    assert "ModelSamplingDiscrete" not in strategic
    assert strategic["TCDModelSamplingDiscrete"]["eta"] == 0.3
    assert nodes(drawn(Sampler("TCDScheduler", 0.3), "v_prediction"))["SamplerEulerAncestral"]["eta"] == 0.85
    assert nodes(drawn(Sampler("TCDScheduler", 0.0)))["KSampler"]["sampler_name"] == "euler"


def test_a_picture_opens_as_its_workflow(tmp_path: Path) -> None:
    workflow = drawn(Sampler())
    path = tmp_path / "picture.png"
    Image.new("RGB", (8, 8)).save(path, pnginfo=comfyui.png_chunks(workflow))
    with Image.open(path) as opened:
        chunks = dict(opened.info)
    assert {name: json.loads(chunks[name]) for name in ("prompt", "workflow")} == workflow


def test_the_file_is_the_editors_form_and_has_the_apis_in_extra() -> None:
    """The editor takes a file for the API's form if every value in it has a class_type, and else for its own."""
    workflow = drawn(Sampler())
    content = json.loads(json.dumps(comfyui.file_content(workflow)))
    assert content.pop("extra") == {"prompt": workflow["prompt"]}
    assert content == {key: value for key, value in workflow["workflow"].items() if key != "extra"}
    assert {"nodes", "links", "last_node_id", "last_link_id", "version"} <= content.keys()


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("stabilityai/stable-diffusion-xl-base-1.0", "stable-diffusion-xl-base-1.0.safetensors"),
        ("checkpoints/toon.safetensors", "toon.safetensors"),
        ("bases/emoji", "emoji.safetensors"),
        (None, "base.safetensors"),
    ],
)
def test_the_checkpoint_is_named_after_the_base(source: str | None, name: str) -> None:
    assert comfyui.checkpoint_name(source) == name


def test_a_graph_refuses_what_does_not_fit() -> None:
    graph = comfyui._Graph()
    loaded = graph.add("CheckpointLoaderSimple", values={"ckpt_name": "base.safetensors"})
    with pytest.raises(ValueError, match="clip takes CLIP, got MODEL"):
        graph.add("CLIPTextEncode", values={"text": ""}, clip=comfyui.Output(loaded, "MODEL"))
    with pytest.raises(ValueError, match="EmptyLatentImage: expected"):
        graph.add("EmptyLatentImage", values={"width": 512})
