"""The pack as ComfyUI loads it, with a stand-in for what its nodes import of ComfyUI."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
IMPORT_SECONDS = 0.05
# Saved workflows name these; so do the predecessor's.
IDS = {
    "LunaCheckpointLoader",
    "LunaDaemonCLIPLoader",
    "LunaDaemonVAELoader",
    "LunaServiceStart",
    "LunaServiceStatus",
    "LunaServiceUnload",
    "LunaSharedCLIPEncode",
    "LunaSharedCLIPEncodeDual",
    "LunaSharedCLIPEncodeSDXL",
    "LunaSharedVAEDecode",
    "LunaSharedVAEDecodeTiled",
    "LunaSharedVAEEncode",
    "LunaSharedVAEEncodeTiled",
}
LINKED = {"CLIP", "CONDITIONING", "IMAGE", "LATENT", "MODEL", "VAE"}
WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))


def load():
    command = [sys.executable, "-m", "tests.nodes.load_pack"]
    return json.loads(subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout)


@pytest.fixture(scope="module")
def pack():
    return load()


@pytest.fixture(scope="module")
def nodes(pack):
    return {node["id"]: node for node in pack["nodes"]}


def test_every_node_is_there_under_its_old_name(nodes):
    assert nodes.keys() == IDS


def test_every_node_and_every_input_says_what_it_is(nodes):
    for node in nodes.values():
        assert node["name"].endswith("(luna-mp)")
        assert node["description"].endswith((".", "text."))
        assert node["category"].split("/")[0] == "luna-mp"
        for put in node["inputs"]:
            assert put["tooltip"].endswith("."), (node["id"], put["id"])


def test_loading_the_pack_starts_nothing_and_opens_nothing(pack):
    assert pack["held"]
    assert pack["started"] == []


def test_the_pack_finds_its_library_and_hides_nothing_of_comfyuis(pack):
    assert pack["found"]["luna_mp"] == str(ROOT / "luna_mp/__init__.py")
    assert pack["found"]["nodes"] == str(ROOT / "tests/nodes/stubs/nodes.py")


def test_loading_the_pack_is_quick(pack):
    fastest = min(pack["seconds"], *(load()["seconds"] for _ in range(4)))
    assert fastest < IMPORT_SECONDS


def test_every_node_has_a_help_page_that_names_its_inputs(pack, nodes):
    folder = ROOT / pack["web"] / "docs"
    assert {page.stem for page in folder.glob("*.md")} == IDS
    for name, node in nodes.items():
        rows = re.findall(r"^\| ([\w, ]+) \|", (folder / f"{name}.md").read_text(), re.MULTILINE)
        named = {each for row in rows for each in row.split(", ")}
        assert {put["id"] for put in node["inputs"]} <= named, name


def test_what_is_new_to_a_saved_workflow_is_optional(nodes):
    """Or workflows that were saved before it was there would not load."""
    for node in nodes.values():
        for put in node["inputs"]:
            if put["id"] in ("mode", "daemon_address", "clip_address", "vae_address"):
                assert put["optional"] and "default" in put


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_links_of_an_example_fit(path):
    found = json.loads(path.read_text())
    by_id = {node["id"]: node for node in found["nodes"]}
    for number, source, output, target, input_, kind in found["links"]:
        assert by_id[source]["outputs"][output]["type"] == kind
        assert number in by_id[source]["outputs"][output]["links"]
        assert by_id[target]["inputs"][input_]["type"] == kind
        assert by_id[target]["inputs"][input_]["link"] == number
    assert all(put["link"] for node in found["nodes"] for put in node["inputs"])


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_nodes_of_an_example_are_those_of_the_pack(nodes, path):
    ours = [n for n in json.loads(path.read_text())["nodes"] if n["type"].startswith("Luna")]
    assert ours
    for node in ours:
        declared = nodes[node["type"]]
        links = [put["id"] for put in declared["inputs"] if put["type"] in LINKED]
        assert [put["name"] for put in node["inputs"]] == links
        assert len(node["widgets_values"]) == len(declared["inputs"]) - len(links)
        assert [put["type"] for put in node["outputs"]] == declared["outputs"]
