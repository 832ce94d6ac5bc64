"""The command line: what it says, where, and with which exit status. No model is loaded."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from click.testing import CliRunner

from luna_mp import supervisor as supervisor_module
from luna_mp.cli import NOTHING_RUNS, _said, _without, main
from luna_mp.config import resolve
from luna_mp.report import describe
from tests.helpers import wait_until

STATUS = {
    "pid": 7,
    "device": "cuda:0",
    "uptime": 12.0,
    "addresses": ["/run/vae.sock", "127.0.0.1:19284"],
    "models": [{"paths": ["/models/sdxl"], "dtype": "torch.float16", "bytes": 160 << 20}],
    "rss": 900 << 20,
    "memory": {"allocated": 170 << 20},
    "queue": {
        "depth": 1,
        "dropped": 2,
        "line": [
            {"method": "decode", "client": "c" * 32, "waiting": 0.5},
            {"method": "encode", "client": "d" * 32, "waiting": 0.1},
        ],
        "methods": {"decode": {"calls": 4, "run_seconds": 0.4, "wait_seconds": 0.2}},
    },
    "clients": [
        {
            "client": "c" * 32,
            "pid": 8,
            "carrier": "shm",
            "reason": "no GPU",
            "calls": 5,
            "failures": 1,
            "last_call": 0.0,
        }
    ],
    "leases": {"8": {"bytes": 64 << 20, "leases": 3}},
}


def run(*arguments: str):
    return CliRunner().invoke(main, arguments)


def test_help_does_not_import_torch():
    code = "import sys, luna_mp.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=30).returncode == 0


@pytest.mark.parametrize("command", ["serve", "status", "stop", "doctor", "demo", "bench"])
def test_every_command_has_help(command):
    assert run(command, "--help").exit_code == 0


def test_the_key_itself_is_never_a_flag():
    assert "--authkey " not in run("serve", "--help").output


def test_flags_become_settings():
    flags = {"clip_device": "cpu", "clip_model": ("/a", "/b"), "vae_port": 0, "vae_model": ()}
    said = _said({**flags, "host": "127.0.0.2", "boot_timeout": 3.0, "allow": (), "expose": None})
    assert said.clip == {"device": "cpu", "models": ("/a", "/b")}
    assert said.vae == {"port": 0}
    assert said.common == {"boot_timeout": 3.0, "host": "127.0.0.2"}


def test_flags_for_nothing_run_both():
    assert [s.role for s in resolve(_said({"clip_device": None})).services] == ["clip", "vae"]


def test_bad_setting_is_one_line_on_stderr():
    result = run("serve", "--clip", "gpu0")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("Error: device 'gpu0' of clip")
    assert "Traceback" not in result.stderr


def test_bad_file_is_one_line_on_stderr(tmp_path):
    file = tmp_path / "luna.toml"
    file.write_text("[clip]\ndevise = 'cpu'\n")
    result = run("serve", "--config", str(file))
    assert result.exit_code == 1 and "unknown key 'devise'" in result.stderr


def test_boot_failure_is_one_line_on_stderr(monkeypatch, tmp_path):
    command = (sys.executable, "-m", "tests.jobs")
    monkeypatch.setattr(supervisor_module.Supervisor.__init__, "__defaults__", (command,))
    result = run("serve", "--clip", "cpu", "--clip-type", "fail", "--runtime-dir", str(tmp_path))
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == (
        "Error: the clip service did not start: the model is not there"
    )


@pytest.mark.skipif(sys.platform == "win32", reason="sends a POSIX signal")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_stops_the_services_with_status_0(signum):
    code = (
        "import sys; from luna_mp import supervisor\n"
        "supervisor.Supervisor.__init__.__defaults__ = ((sys.executable, '-c', sys.argv.pop()),)\n"
        "from luna_mp.cli import main; main()"
    )
    service = (
        "import sys, json; sys.stdin.readline()\n"
        "print(json.dumps({'ready': {'port': 9, 'device': 'cpu', 'host': 'h'}}), flush=True)\n"
        "sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, "serve", "--clip", "cpu", service]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "clip: ready on cpu, h:9\n"
        os.kill(process.pid, signum)
        output, errors = process.communicate(timeout=20)
    assert process.returncode == 0, errors
    assert output.startswith("stopping: calls have 10 s to end") and output.endswith("\nstopped\n")


@pytest.mark.skipif(sys.platform == "win32", reason="sends a POSIX signal")
def test_signal_ends_a_boot_with_status_0(tmp_path):
    """SIGTERM and Ctrl-C were once ignored until the models had loaded."""
    code = (
        "import sys; from luna_mp import supervisor\n"
        "supervisor.Supervisor.__init__.__defaults__ = ((sys.executable, '-c', sys.argv.pop()),)\n"
        "from luna_mp.cli import main; main()"
    )
    marker = tmp_path / "booting"
    service = f"import time; open({str(marker)!r}, 'w').close(); time.sleep(600)"
    command = [sys.executable, "-c", code, "serve", "--clip", "cpu", service]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        wait_until(marker.exists)
        process.terminate()
        output, _ = process.communicate(timeout=20)
    assert (process.returncode, output) == (0, "stopped\n")


def test_status_as_json_is_json_where_nothing_runs(runtime_dir):
    result = run("status", "--json")
    assert (result.exit_code, result.stdout) == (NOTHING_RUNS, "{}\n")


@pytest.mark.parametrize("command", ["status", "stop"])
def test_nothing_running_has_a_status_of_its_own(command, runtime_dir):
    result = run(command)
    assert result.exit_code == NOTHING_RUNS and "luna-mp serve" in result.stderr


def test_status_leaves_out_the_client_that_asks():
    assert _without("c" * 32, STATUS)["clients"] == []
    assert _without("another", STATUS) == STATUS


def test_report_says_what_runs_where():
    text = describe({"vae": STATUS})
    assert "vae: pid 7 on cuda:0, up 12 s" in text
    assert "model /models/sdxl: torch.float16, 160 MiB" in text


def test_report_says_who_waits():
    text = describe({"vae": STATUS})
    assert "queue 1 waiting, 2 dropped" in text
    assert "running: decode of cccccccc" in text and "place 1: encode of dddddddd" in text


def test_report_gives_times_for_each_method():
    assert "decode: 4 calls, 100.0 ms running and 50.0 ms waiting" in describe({"vae": STATUS})


def test_report_says_how_a_client_is_served():
    text = describe({"vae": STATUS})
    assert "client cccccccc: pid 8 by shm (because no GPU), 5 calls, 1 failed" in text


def test_report_says_who_holds_how_much_of_the_gpu():
    assert "pid 8 holds 64 MiB on the GPU in 3 results" in describe({"vae": STATUS})
