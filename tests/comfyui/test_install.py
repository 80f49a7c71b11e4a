"""The node as its README installs it, in ComfyUI's own server."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from comfy_server import ROOT, Server, checkout, running

import tap_diffusion

NODE = ROOT / "comfyui"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The folder alone, beside the package that its requirements name."""
    base = tmp_path_factory.mktemp("folder")
    shutil.copytree(NODE, base / "custom_nodes" / "tap-accelerate")
    model = base / "models" / "diffusion_models" / "empty.safetensors"
    model.parent.mkdir(parents=True)
    model.touch()
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", base / "wheels", ROOT], check=True)
    required = base / "custom_nodes" / "tap-accelerate" / "requirements.txt"
    subprocess.run(
        [*pip, "install", "--no-deps", "--no-index", "--find-links", base / "wheels", "--target", base / "packages",
         "--requirement", required], check=True,
    )  # fmt: skip
    with running(base, path=base / "packages") as server:
        yield server


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The whole repository, as ComfyUI-Manager clones it; it has no requirements.txt to be installed."""
    base = tmp_path_factory.mktemp("clone")
    checkout(base / "custom_nodes" / "tap-diffusion")
    with running(base) as server:
        yield server


@pytest.fixture(scope="module")
def link(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A link to the folder in a checkout."""
    base = tmp_path_factory.mktemp("link")
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / "tap").symlink_to(NODE)
    with running(base) as server:
        yield server


WAYS = {
    "folder": ("tap-accelerate", "packages"),
    "clone": ("tap-diffusion", "custom_nodes/tap-diffusion/src"),
    "link": ("tap", None),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_node_is_there(way: str, request: pytest.FixtureRequest) -> None:
    server: Server = request.getfixturevalue(way)
    name, packages = WAYS[way]
    found = server.get("/object_info/TAPAccelerate")["TAPAccelerate"]
    assert found["display_name"] == "TAP accelerate"
    assert found["python_module"] == f"custom_nodes.{name}"
    inputs = ["model", "enabled", "speedup", "full_steps", "start_percent", "end_percent"]
    assert found["input_order"] == {"required": inputs, "optional": ["config"]}
    assert found["output"] == ["MODEL"]
    assert "Unable to parse pyproject.toml" not in server.log

    place = server.base / packages if packages is not None else ROOT / "src"
    imported = server.get("/object_info/Witness")["Witness"]["input"]["required"]["found"][1]["default"]
    assert Path(imported["tap_diffusion"]) == place / "tap_diffusion" / "__init__.py"
    assert "diffusers" not in imported  # which ComfyUI can do without

    assert server.get("/workflow_templates") == {name: ["flux_tap"]}
    example = server.get(f"/api/workflow_templates/{name}/flux_tap.json")
    assert example == json.loads((NODE / "example_workflows" / "flux_tap.json").read_text())


SETTINGS = {"speedup": 5.0, "full_steps": 0, "enabled": True, "start_percent": 0.0, "end_percent": 1.0}
TOO_SMALL, TOO_BIG, OWN = "value_smaller_than_min", "value_bigger_than_max", "custom_validation_failed"


def workflow(**settings: Any) -> dict[str, Any]:
    return {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "empty.safetensors", "weight_dtype": "default"}},
        "2": {"class_type": "TAPAccelerate", "inputs": {"model": ["1", 0], **settings}},
        "3": {"class_type": "ModelSave", "inputs": {"model": ["2", 0], "filename_prefix": "x"}},
    }


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"speedup": 50}, {"speedup": TOO_BIG}),
        ({"speedup": 0.5}, {"speedup": TOO_SMALL}),
        ({"full_steps": 5000}, {"full_steps": TOO_BIG}),
        ({"full_steps": -1}, {"full_steps": TOO_SMALL}),
        ({"start_percent": -0.1}, {"start_percent": TOO_SMALL}),
        ({"end_percent": 1.1}, {"end_percent": TOO_BIG}),
        ({"config": '{"speed": 2}'}, {"config": OWN}),
        ({"config": "{", "speedup": 50}, {"config": OWN, "speedup": TOO_BIG}),
        ({"config": '{"orders": 3}', "full_steps": 5000}, {"config": OWN, "full_steps": TOO_BIG}),
        ({"enabled": False, "speedup": 50}, {"speedup": TOO_BIG}),
    ],
)
def test_each_error_is_told_once_and_at_its_input(
    folder: Server, given: dict[str, Any], expected: dict[str, str]
) -> None:
    status, answer = folder.queue(workflow(**SETTINGS | {"config": ""} | given))
    assert status == 400
    assert answer["node_errors"].keys() == {"2"}
    errors = answer["node_errors"]["2"]["errors"]
    assert sorted((error["extra_info"]["input_name"], error["type"]) for error in errors) == sorted(expected.items())
    (said,) = [error["details"] for error in errors if error["type"] == OWN] or ["config - TAP"]
    assert said.startswith("config - ")


def test_right_settings_are_taken(folder: Server) -> None:
    """Also without the optional input. The model is an empty file, which is all that is wrong then."""
    for given in (SETTINGS, SETTINGS | {"config": '{"granularity": "batch"}'}, SETTINGS | {"speedup": 1}):
        done = folder.run(workflow(**given))
        (error,) = [message for name, message in done["status"]["messages"] if name == "execution_error"]
        assert error["node_id"] == "1"


def test_the_version_is_the_package_s() -> None:
    assert f'version = "{tap_diffusion.__version__}"' in (NODE / "pyproject.toml").read_text()
