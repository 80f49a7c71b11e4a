"""Workflows through the API of ComfyUI's own server, on small checkpoint files that it takes for SD3 and Wan 2.1."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import real  # noqa: F401 - finds ComfyUI

# isort: split
import nodes
import torch
from comfy import sd, utils
from comfy_server import ROOT, Server, running
from runs import distance
from safetensors.torch import load_file
from tiny_comfy import MODELS, Tiny, build, noise
from torch import Tensor

from tap_diffusion import TAPConfig
from tap_diffusion.integrations.comfyui import accelerate, report

# ComfyUI reads sizes off a checkpoint, but takes all heads of Wan to be of 128 channels, and its text features of 4096.
SHORT = {"SD3": "SD3", "Wan": "WAN21_T2V"}
LARGER = {"dim": 128, "num_heads": 1, "text_dim": 4096, "freq_dim": 256}
# A node of the tests: conditions without a text encoder, whose weights would be large.
CONDITIONS = """
import torch

def noise(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

class Condition:
    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "make", "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seed": ("INT", {}), "width": ("INT", {"max": 4096})}}

    def make(self, seed, width):
        return ([[noise(1, 5, width, seed=seed), {"pooled_output": noise(1, 8, seed=seed + 100)}]],)

NODE_CLASS_MAPPINGS = {"Condition": Condition}
"""


def tiny(kind: str) -> Tiny:
    known = MODELS[SHORT[kind]]
    return known if kind == "SD3" else Tiny(known.settings | LARGER, known.latent, (5, 4096), known.rest)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    base = tmp_path_factory.mktemp("server")
    for name in ("custom_nodes", "models/diffusion_models"):
        (base / name).mkdir(parents=True)
    (base / "custom_nodes" / "tap").symlink_to(ROOT / "comfyui")
    (base / "custom_nodes" / "conditions.py").write_text(CONDITIONS)
    with pytest.MonkeyPatch.context() as patch:
        for kind, name in SHORT.items():
            patch.setitem(MODELS, name, tiny(kind))
            weights = build(name).model.diffusion_model.state_dict()
            utils.save_torch_file(weights, str(base / "models" / "diffusion_models" / f"{kind}.safetensors"))
    with running(base) as server:
        yield server


STEPS, CFG, SEED = 12, 3.0, 6


def workflow(kind: str, *settings: dict[str, Any] | None, **nodes: Any) -> dict[str, Any]:
    """One model, and for each of some settings TAP's node, a sampler and a saved latent. ``None``: without TAP."""

    def node(name: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": name, "inputs": inputs}

    width = tiny(kind).text[1]
    graph = {
        "model": node("UNETLoader", unet_name=f"{kind}.safetensors", weight_dtype="default"),
        "positive": node("Condition", seed=1, width=width),
        "negative": node("Condition", seed=2, width=width),
        "latent": node("EmptySD3LatentImage", width=64, height=64, batch_size=1)
        if kind == "SD3"
        else node("EmptyHunyuanLatentVideo", width=64, height=64, length=9, batch_size=1),
    }
    for i, given in enumerate(settings):
        model = "model"
        if given is not None:
            model = f"tap {i}"
            graph[model] = node("TAPAccelerate", model=["model", 0], **DEFAULTS | given)
        graph[f"sampler {i}"] = node(
            "KSampler", model=[model, 0], positive=["positive", 0], negative=["negative", 0],
            latent_image=["latent", 0], seed=SEED, steps=STEPS, cfg=CFG, sampler_name="euler", scheduler="simple",
            denoise=1.0,
        )  # fmt: skip
        graph[f"save {i}"] = node("SaveLatent", samples=[f"sampler {i}", 0], filename_prefix="latent")
    return graph | nodes


DEFAULTS = {"enabled": True, "speedup": 5.0, "full_steps": 0, "start_percent": 0.0, "end_percent": 1.0}


def saved(server: Server, done: dict[str, Any]) -> list[Tensor]:
    """What a run has saved, in the order of its branches."""
    assert done["status"]["status_str"] == "success", done["status"]["messages"]
    found = []
    for name in sorted(done["outputs"]):
        (file,) = done["outputs"][name]["latents"]
        path = server.base / "output" / file["subfolder"] / file["filename"]
        found.append(load_file(path)["latent_tensor"])
    return found


def lines(server: Server) -> list[str]:
    """What TAP's logger has said."""
    return re.findall(r"TAP: \d+ of \d+ steps full, [\d.]+x faster, cache [\d.]+ MB", server.log)


def test_the_node_tells_its_bounds(server: Server) -> None:
    found = server.get("/object_info/TAPAccelerate")["TAPAccelerate"]["input"]["required"]
    bounds = {name: (given[1]["min"], given[1]["max"]) for name, given in found.items() if "min" in given[1]}
    part = (0.0, 1.0)
    assert bounds == {"speedup": (1.0, 20.0), "full_steps": (0, 1000), "start_percent": part, "end_percent": part}
    assert {name: given[1]["default"] for name, given in found.items() if "default" in given[1]} == DEFAULTS


@pytest.mark.parametrize("kind", SHORT)
def test_branches_of_a_graph_with_tap_and_without(server: Server, kind: str) -> None:
    before = len(lines(server))
    off, all_full = {"enabled": False}, {"full_steps": STEPS}
    done = server.run(workflow(kind, None, {"full_steps": 5}, off, all_full))
    plain, accelerated, plain_too, whole = saved(server, done)
    assert torch.equal(plain_too, plain)
    assert torch.equal(whole, plain)
    assert 0 < distance(accelerated, plain) < 0.5
    said = sorted(line.split(" full")[0] for line in lines(server)[before:])
    assert said == ["TAP: 12 of 12 steps", "TAP: 5 of 12 steps"]


@pytest.mark.parametrize("kind", SHORT)
def test_the_server_gives_what_the_library_does(server: Server, kind: str) -> None:
    (result,) = saved(server, server.run(workflow(kind, {"config": '{"full_steps": [0, 1, 2, 5, 8]}'})))
    with torch.inference_mode():
        path = server.base / "models" / "diffusion_models" / f"{kind}.safetensors"
        model = accelerate(sd.load_diffusion_model(str(path)), TAPConfig(full_steps=(0, 1, 2, 5, 8)))
        conditions = [
            [[noise(1, *tiny(kind).text, seed=seed), {"pooled_output": noise(1, 8, seed=seed + 100)}]]
            for seed in (1, 2)
        ]
        empty = {"samples": torch.zeros(1, *tiny(kind).latent)}
        (expected,) = nodes.common_ksampler(model, SEED, STEPS, CFG, "euler", "simple", *conditions, empty)
    found = report(model)
    assert found is not None
    assert found.full_steps == 5
    assert result.shape == expected["samples"].shape
    assert distance(result, expected["samples"]) < 1e-4


def test_a_setting_that_changes_runs_anew_and_no_other_does(server: Server) -> None:
    first = saved(server, server.run(workflow("SD3", {"full_steps": 6})))
    before = len(lines(server))
    server.run(workflow("SD3", {"full_steps": 6}))  # which ComfyUI has in its cache
    assert len(lines(server)) == before
    again = saved(server, server.run(workflow("SD3", {"full_steps": 7})))
    assert [line.split(" steps")[0] for line in lines(server)[before:]] == ["TAP: 7 of 12"]
    assert distance(again[0], first[0]) > 0


@pytest.mark.parametrize("behind", [False, True], ids=["before", "behind"])
def test_an_error_of_a_run_is_shown_at_its_node(server: Server, behind: bool) -> None:
    """EasyCache is told of by the sampler, since only there all nodes of the model are known."""
    cache = {
        "class_type": "EasyCache",
        "inputs": {
            "model": ["tap 0" if behind else "model", 0], "reuse_threshold": 0.2, "start_percent": 0.15,
            "end_percent": 0.95, "verbose": False,
        },
    }  # fmt: skip
    graph = workflow("SD3", {"full_steps": 5}, cache=cache)
    graph["sampler 0" if behind else "tap 0"]["inputs"]["model"] = ["cache", 0]
    error = _error(server.run(graph))
    assert error["node_id"] == "sampler 0"
    assert error["exception_message"].startswith("EasyCache and TAP are both on this model")


def test_settings_that_are_wrong_together_are_shown_at_the_node(server: Server) -> None:
    error = _error(server.run(workflow("SD3", {"start_percent": 0.8, "end_percent": 0.2})))
    assert error["node_id"] == "tap 0"
    assert "start_percent" in error["exception_message"]


def test_an_interrupted_run_leaves_nothing_to_the_next(server: Server) -> None:
    (before,) = saved(server, server.run(workflow("Wan", {"full_steps": 4})))
    graph = workflow("Wan", {"full_steps": 6})
    graph["sampler 0"]["inputs"]["steps"] = 2000
    status, answer = server.queue(graph)
    assert status == 200
    server.wait_for(lambda: answer["prompt_id"] in str(server.get("/queue")["queue_running"]))
    server.post("/interrupt", {})
    assert server.ended(answer["prompt_id"])["status"]["status_str"] == "error"
    anew = {"full_steps": 4, "config": "{}"}  # or ComfyUI would take what it has in its cache
    (after,) = saved(server, server.run(workflow("Wan", anew)))
    assert torch.equal(after, before)


def _error(done: dict[str, Any]) -> dict[str, Any]:
    (error,) = [message for name, message in done["status"]["messages"] if name == "execution_error"]
    return dict(error)
