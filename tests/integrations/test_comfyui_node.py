"""The folder of the node for ComfyUI, as far as it can be seen without ComfyUI."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import tap_diffusion as tap
from tap_diffusion import ConfigError, TAPConfig

FOLDER = Path(__file__).parents[2] / "comfyui"
MODEL = object()


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The folder, imported as ComfyUI imports it. What it asks of the integration comes out in the model's place."""
    spec = importlib.util.spec_from_file_location("custom_nodes_tap", FOLDER / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "accelerate", lambda *args, **kwargs: (args, kwargs))
    return module


def test_node(package: Any) -> None:
    assert package.NODE_CLASS_MAPPINGS.keys() == package.NODE_DISPLAY_NAME_MAPPINGS.keys() == {"TAPAccelerate"}
    node = package.NODE_CLASS_MAPPINGS["TAPAccelerate"]
    inputs = node.INPUT_TYPES()
    named = inputs["required"] | inputs["optional"]
    assert list(named) == ["model", "enabled", "speedup", "full_steps", "start_percent", "end_percent", "config"]
    assert all(options["tooltip"] for _, options in named.values())
    defaults = {name: options["default"] for name, (_, options) in named.items() if "default" in options}
    assert defaults == {
        "enabled": True, "speedup": TAPConfig().speedup, "full_steps": 0, "start_percent": 0.0, "end_percent": 1.0,
        "config": "",
    }  # fmt: skip
    run = getattr(node(), node.FUNCTION)
    assert node.RETURN_TYPES == ("MODEL",)
    assert run(MODEL) == run(MODEL, **defaults)
    assert run(MODEL, **defaults) == (((MODEL, TAPConfig()), {"start_percent": 0.0, "end_percent": 1.0}),)
    assert run(MODEL, full_steps=7, start_percent=0.2, end_percent=0.8) == (
        ((MODEL, TAPConfig(full_steps=7)), {"start_percent": 0.2, "end_percent": 0.8}),
    )
    assert run(MODEL, **defaults | {"enabled": False}) == (MODEL,)


def test_settings_of_the_node(package: Any) -> None:
    config, validate = package._config, package.TAPAccelerate.VALIDATE_INPUTS
    assert config(3.0, 0, "") == TAPConfig(speedup=3.0)
    assert config(3.0, 7, "  ") == TAPConfig(full_steps=7)
    assert config(3.0, 7, '{"interval": 4, "granularity": "batch"}') == TAPConfig(interval=4, granularity="batch")
    assert config(3.0, 7, '{"full_steps": [0, 2, 5]}') == TAPConfig(full_steps=(0, 2, 5))
    example = package.TAPAccelerate.INPUT_TYPES()["optional"]["config"][1]["tooltip"].split("example: ")[1]
    assert config(5.0, 0, example) == TAPConfig.paper(6, offload="cpu")
    assert list(inspect.signature(validate).parameters) == ["config"]  # ComfyUI checks the bounds of the others
    assert validate() is True
    assert validate(config=example) is True
    assert "not JSON" in validate(config="{")
    assert "no field 'speed'" in validate(config='{"speed": 2}')
    assert "must be a JSON object" in validate(config="[1]")
    assert "TAPConfig.family" in validate(config='{"family": []}')
    assert "TAPConfig.orders" in validate(config='{"orders": [[1]]}')


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"speedup": 50.0}, r"speedup is 50.0; it must be from 1 to 20"),
        ({"speedup": float("nan")}, "speedup is nan"),
        ({"full_steps": 5000}, r"full_steps is 5000; it must be from 0 to 1000"),
    ],
)
def test_bounds_are_kept_where_a_value_comes_from_another_node(package: Any, given: dict[str, Any], said: str) -> None:
    """ComfyUI checks what is typed in alone."""
    node = package.TAPAccelerate()
    with pytest.raises(ConfigError, match=said):
        node.accelerate(MODEL, **given)
    assert node.accelerate(MODEL, **given, enabled=False) == (MODEL,)


@pytest.mark.slow
def test_the_integration_needs_no_diffusers() -> None:
    """Nor what comes with it: ComfyUI's environment is not to be disturbed (`pip install --no-deps`)."""
    code = (
        "import sys\n"
        "for name in ('diffusers', 'accelerate', 'transformers', 'typer', 'rich'): sys.modules[name] = None\n"
        "import importlib.util as u\n"
        f"spec = u.spec_from_file_location('node', {str(FOLDER / '__init__.py')!r})\n"
        "spec.loader.exec_module(u.module_from_spec(spec))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_registry_metadata() -> None:
    """docs.comfy.org/registry/specifications; an icon has at most 400 × 400 pixels."""
    data = tomllib.loads((FOLDER / "pyproject.toml").read_text())
    assert {"Repository"} <= data["project"]["urls"].keys()
    assert re.fullmatch("[a-z0-9-]+", data["project"]["name"])
    required = [line for line in (FOLDER / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert required == data["project"]["dependencies"]
    assert {"name", "version", "description", "license", "dependencies"} <= data["project"].keys()
    assert data["project"]["version"] == tap.__version__
    assert {"PublisherId", "DisplayName", "Icon", "requires-comfyui"} <= data["tool"]["comfy"].keys()
    assert (FOLDER / data["tool"]["comfy"]["Icon"].rpartition("/")[2]).exists()


# Of the nodes in the example that are ComfyUI's own: links in, links out, and how many widgets. Read in ComfyUI's
# templates (the package comfyui-workflow-templates-json, 0.1.123).
CORE: dict[str, tuple[list[str], list[str], int]] = {
    "UNETLoader": ([], ["MODEL"], 2),
    "DualCLIPLoader": ([], ["CLIP"], 4),
    "VAELoader": ([], ["VAE"], 1),
    "CLIPTextEncode": (["CLIP"], ["CONDITIONING"], 1),
    "FluxGuidance": (["CONDITIONING"], ["CONDITIONING"], 1),
    "ConditioningZeroOut": (["CONDITIONING"], ["CONDITIONING"], 0),
    "EmptySD3LatentImage": ([], ["LATENT"], 3),
    "KSampler": (["MODEL", "CONDITIONING", "CONDITIONING", "LATENT"], ["LATENT"], 7),
    "VAEDecode": (["LATENT", "VAE"], ["IMAGE"], 0),
    "SaveImage": (["IMAGE"], [], 1),
}


def test_example_workflow(package: Any) -> None:
    """Its links are whole, and its nodes are what ComfyUI and the node say they are."""
    graph = json.loads((FOLDER / "example_workflows" / "flux_tap.json").read_text())
    nodes = {node["id"]: node for node in graph["nodes"]}
    assert (graph["version"], graph["last_node_id"], graph["last_link_id"]) == (0.4, max(nodes), len(graph["links"]))
    for number, origin, out, target, into, kind in graph["links"]:
        assert number in nodes[origin]["outputs"][out]["links"]
        assert nodes[target]["inputs"][into]["link"] == number
        assert nodes[origin]["outputs"][out]["type"] == nodes[target]["inputs"][into]["type"] == kind
        assert nodes[origin]["order"] < nodes[target]["order"]
    assert all(slot["link"] is not None for node in nodes.values() for slot in node["inputs"])
    for node in nodes.values():
        inputs, outputs = ([slot["type"] for slot in node[side]] for side in ("inputs", "outputs"))
        if node["type"] in CORE:
            assert (inputs, outputs, len(node["widgets_values"])) == CORE[node["type"]]
    (own,) = [node for node in nodes.values() if node["type"] not in CORE]
    cls = package.NODE_CLASS_MAPPINGS[own["type"]]
    assert own["title"] == package.NODE_DISPLAY_NAME_MAPPINGS[own["type"]]
    types = cls.INPUT_TYPES()
    named = types["required"] | types["optional"]
    links = {name: kind for name, (kind, _) in named.items() if kind == "MODEL"}
    assert {slot["name"]: slot["type"] for slot in own["inputs"]} == links
    assert tuple(slot["type"] for slot in own["outputs"]) == cls.RETURN_TYPES
    widgets = {
        name: value for name, value in zip([n for n in named if n not in links], own["widgets_values"], strict=True)
    }
    assert cls.VALIDATE_INPUTS(widgets["config"]) is True
    for name, value in widgets.items():
        assert isinstance(value, {"BOOLEAN": bool, "FLOAT": float, "INT": int, "STRING": str}[named[name][0]])
    assert (FOLDER / "example_workflows" / "flux_tap.jpg").exists()
