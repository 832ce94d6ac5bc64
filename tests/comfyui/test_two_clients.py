"""Two processes with a CLIP each, of one service: nothing of one is in a result of the other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack

import pytest

from tests.comfyui import clip_services, services

comfy = services.comfy
folder = services.folder
serving = clip_services.serving

CALLS = 200


@pytest.mark.comfyui
@pytest.mark.timeout(600)
def test_two_processes_with_patches_of_their_own_get_no_result_of_the_other(serving, folder):
    runtime = serving._config.services[0].runtime_dir
    model = str(folder / "default.safetensors")
    command = [sys.executable, "-m", "tests.comfyui.clip_client"]
    with ExitStack() as stack:
        clients = [
            stack.enter_context(
                subprocess.Popen(
                    [*command, str(seed), str(CALLS), model, services.COMFYUI],
                    env={**os.environ, "LUNA_MP_RUNTIME_DIR": runtime},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            for seed in (1000, 2000)
        ]
        for client in clients:
            assert client.stdout.readline() == "ready\n"
        for client in clients:
            client.stdin.write("go\n")
            client.stdin.flush()
        for client in clients:
            assert json.loads(client.stdout.readline()) == {"wrong": 0, "distinct": CALLS}
