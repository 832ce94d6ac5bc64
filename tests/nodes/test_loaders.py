"""Where the nodes load, with a stand-in for what they import of ComfyUI."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED_NODES = 7
HELP = "start one with `luna-mp serve`"
EMBEDDINGS = {"embedding_directory": ["/models/embeddings"]}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    directory.chmod(0o700)
    env = {**os.environ, "LUNA_MP_RUNTIME_DIR": str(directory)}
    command = [sys.executable, "-m", "tests.nodes.ask_loaders"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind", ["vae", "clip"])
@pytest.mark.parametrize("where", ["local, none", "local, a service", "auto, none"])
def test_a_model_is_loaded_here(answers, kind, where):
    assert answers["modes"][f"{kind}, {where}"] == "local"


@pytest.mark.parametrize("mode", ["auto", "service"])
def test_a_model_is_loaded_in_the_service_at_the_address(answers, mode):
    found = answers["modes"]
    assert found[f"vae, {mode}, a service"] == "v in vae at here"
    assert found[f"clip, {mode}, a service"] == f"c flux in clip at here{EMBEDDINGS}"


@pytest.mark.parametrize("kind", ["vae", "clip"])
def test_mode_service_without_one_says_how_to_start_it(answers, kind):
    said = answers["modes"][f"{kind}, service, none"]
    assert said.startswith("Unavailable: ") and HELP in said


@pytest.mark.parametrize("number", [0, 1])
def test_mode_auto_warns_that_it_loads_here_and_why(answers, number):
    line = answers["modes"]["log, auto, none"][number]
    kind = ("vae", "clip")[number]
    assert line.startswith(f"WARNING the {kind} is loaded in this ComfyUI, since no {kind} service")


def test_mode_auto_says_in_which_service_it_loads(answers):
    first, second = answers["modes"]["log, auto, a service"]
    assert first == "INFO the vae is loaded in 'vae at here'"
    assert second == "INFO the clip is loaded in 'clip at here'"


@pytest.mark.parametrize("running", ["", "clip", "vae", "clip vae"])
def test_parts_of_a_checkpoint_are_in_the_services_that_there_are(answers, running):
    _, clip, vae = answers["checkpoints"][running]
    assert clip == (f"k in clip at {EMBEDDINGS}" if "clip" in running else "local clip")
    assert vae == ("k in vae at " if "vae" in running else "local vae")


@pytest.mark.parametrize("running", ["", "clip", "vae", "clip vae"])
def test_what_a_service_has_of_a_checkpoint_is_not_loaded_here(answers, running):
    model, _, _ = answers["checkpoints"][running]
    parts = f"output_clip={'clip' not in running}, output_vae={'vae' not in running}"
    assert model == f"model of k, {parts}"


@pytest.mark.parametrize("mode", ["auto", "service", "local"])
def test_a_file_that_was_written_is_loaded_anew(answers, mode):
    assert answers["fingerprints"][f"{mode}, file written"]


@pytest.mark.parametrize(("mode", "is_new"), [("auto", True), ("service", False), ("local", False)])
def test_a_service_that_started_matters_to_mode_auto(answers, mode, is_new):
    assert answers["fingerprints"][f"{mode}, a service started"] is is_new


def test_as_long_as_nothing_happens_nothing_is_loaded_anew(answers):
    assert not answers["fingerprints"]["nothing"]


def test_a_default_model_is_described_once_for_each_address(answers):
    found = answers["defaults"]
    assert found["once"] == ["default 0 in vae at a"] * 2
    assert found["other"] == "default 1 in vae at b"


def test_a_default_model_that_changed_is_described_anew_once(answers):
    found = answers["defaults"]
    assert found["changed"] == "default 2 in vae at a"
    assert found["again"] == "ModelChanged: not default 3 in vae at a"


def test_every_shared_node_alone_says_how_to_start_a_service(answers):
    found = answers["nodes_alone"]
    assert len(found) == SHARED_NODES
    for said in found.values():
        assert said.startswith("Unavailable: ") and HELP in said


def test_the_vae_loader_alone_does_as_comfyuis_own(answers):
    assert answers["nodes_local"]["vae"] == ["local some.vae"]


def test_the_checkpoint_loader_alone_loads_all_parts(answers):
    model = "model of /models/checkpoints/k, output_clip=True, output_vae=True"
    assert answers["nodes_local"]["checkpoint"] == [model, "local clip", "local vae"]


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        ("clip", "STABLE_DIFFUSION of /models/text_encoders/a"),
        ("clip of our type", "STABLE_DIFFUSION of /models/text_encoders/a"),
        ("clip of two", "FLUX of /models/text_encoders/a /models/text_encoders/b"),
    ],
)
def test_the_clip_loader_alone_gives_files_and_type_to_comfyui(answers, asked, given):
    [found] = answers["nodes_local"][asked]
    assert found == f"local {given}, embeddings ['/models/embeddings']"


def test_services_started_here_get_this_comfyui_and_its_flags(answers):
    asked = answers["starts"]["asked"][0]
    assert asked["comfyui"] == str(ROOT / "tests/nodes/stubs")
    assert asked["comfyui_flags"] == ["--force-fp32", "--fast", "autotune", "fp16_accumulation"]


def test_services_started_here_may_load_from_each_folder_that_is_there(answers):
    assert answers["starts"]["asked"][0]["allow"] == ["/"]


def test_a_service_without_a_device_is_not_started(answers):
    asked = answers["starts"]["asked"][0]
    assert (asked["clip"], asked["vae"]) == (None, "cpu")


def test_no_service_is_started_beside_one_that_runs(answers):
    assert answers["starts"]["beside others"] == 0


def test_services_are_started_once_and_stopped_at_the_end(answers):
    assert [set(each) == {"stopped"} for each in answers["starts"]["asked"]] == [False, True]


def test_the_status_names_each_service_that_is_not_there(answers):
    clip, vae = answers["starts"]["text"].split("\n")
    assert clip.startswith("clip: no clip service") and HELP in clip
    assert vae.startswith("vae: no vae service") and HELP in vae
