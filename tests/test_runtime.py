"""The runtime directory: private, one key for all, and records of those that live."""

from __future__ import annotations

import errno
import os
import pathlib
import subprocess
import sys
import time

import psutil
import pytest

from luna_mp import runtime
from luna_mp.config import DEFAULT_PORTS
from luna_mp.errors import BadConfig, Unavailable
from luna_mp.processes import born
from luna_mp.wire import stream
from tests.helpers import wait_until

posix = pytest.mark.skipif(sys.platform == "win32", reason="modes and links are POSIX")
HEX = "ab" * 32


def record(port: int = 5, role: str = "clip", **changed: object) -> runtime.Record:
    """Of this process."""
    fields = {"pid": os.getpid(), "born": born(os.getpid()), "socket": f"/run/{role}.{port}.sock"}
    fields |= {"host": "127.0.0.1", "started": time.time()}
    return runtime.Record(**{"role": role, "port": port, **fields, **changed})


@pytest.fixture
def ended():
    """Pid and birth of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        return {"pid": process.pid, "born": born(process.pid)}


@posix
def test_directory_is_made_for_this_user_only(tmp_path):
    path = runtime.runtime_dir(str(tmp_path / "a" / "b"))
    assert path.is_dir() and path.stat().st_mode & 0o777 == 0o700


def test_flag_wins_over_the_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("LUNA_MP_RUNTIME_DIR", str(tmp_path / "variable"))
    assert runtime.runtime_dir(str(tmp_path / "flag")) == tmp_path / "flag"
    assert runtime.runtime_dir() == tmp_path / "variable"


@posix
@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701])
def test_directory_that_others_enter_is_refused_with_the_cure(tmp_path, mode):
    path = tmp_path / "open"
    path.mkdir()
    path.chmod(mode)
    with pytest.raises(BadConfig, match=f"chmod 700 {path}"):
        runtime.runtime_dir(str(path))


@posix
def test_directory_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(BadConfig, match="not a directory of its own"):
        runtime.runtime_dir(str(tmp_path / "link"))


@posix
def test_directory_of_another_user_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(BadConfig, match="belongs to user"):
        runtime.runtime_dir(str(tmp_path))


def test_directory_that_cannot_be_made_is_refused_with_the_variable(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(BadConfig, match="LUNA_MP_RUNTIME_DIR"):
        runtime.runtime_dir(str(tmp_path / "file" / "run"))


def test_key_is_made_once_of_32_bytes(runtime_dir):
    key = runtime.authkey("", runtime_dir)
    assert len(key) == 32 and runtime.authkey("", runtime_dir) == key


@posix
def test_key_is_private_whatever_the_umask(runtime_dir):
    before = os.umask(0)
    try:
        runtime.authkey("", runtime_dir)
    finally:
        os.umask(before)
    assert (runtime_dir / "authkey").stat().st_mode & 0o777 == 0o600


def test_processes_that_come_at_once_agree_on_one_key(runtime_dir):
    code = (
        "import sys, pathlib; from luna_mp import runtime; sys.stdin.readline()\n"
        "print(runtime.authkey('', pathlib.Path(sys.argv[1])).hex())"
    )
    command = [sys.executable, "-c", code, str(runtime_dir)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    crowd = [subprocess.Popen(command, **pipes) for _ in range(6)]
    for process in crowd:
        process.stdin.write("go\n")
        process.stdin.flush()
    keys = {process.communicate(timeout=30)[0] for process in crowd}
    assert keys == {runtime.authkey("", runtime_dir).hex() + "\n"}
    assert os.listdir(runtime_dir) == ["authkey"]


def test_loser_of_the_race_takes_the_winners_key(runtime_dir):
    key = runtime.authkey("", runtime_dir)
    runtime._make_key(runtime_dir / "authkey")
    assert runtime.authkey("", runtime_dir) == key


def test_file_wins_over_the_variable_and_that_over_the_directory(runtime_dir, monkeypatch):
    made = runtime.authkey("", runtime_dir)
    monkeypatch.setenv("LUNA_MP_AUTHKEY", HEX)
    file = runtime_dir / "mine"
    file.write_text("a key of more than 32 bytes, in words\n")
    file.chmod(0o600)
    assert runtime.authkey("", runtime_dir) == bytes.fromhex(HEX) != made
    assert runtime.authkey(str(file), runtime_dir) == b"a key of more than 32 bytes, in words"


@posix
@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604])
def test_key_file_that_others_read_is_refused_with_the_cure(runtime_dir, mode):
    file = runtime_dir / "mine"
    file.write_text(HEX)
    file.chmod(mode)
    with pytest.raises(BadConfig, match=f"chmod 600 {file}"):
        runtime.authkey(str(file), runtime_dir)


def test_key_file_that_is_not_there_is_refused(runtime_dir):
    with pytest.raises(BadConfig, match="missing cannot be read"):
        runtime.authkey(str(runtime_dir / "missing"), runtime_dir)


@pytest.mark.parametrize(
    ("text", "key"),
    [(HEX, bytes.fromhex(HEX)), (f" {HEX}\n", bytes.fromhex(HEX)), ("x" * 32, b"x" * 32)],
    ids=["hex", "hex with a newline", "text"],
)
def test_key_is_hex_or_any_long_text(text, key):
    assert runtime.parse_key(text) == key


def test_short_key_is_refused_and_not_shown():
    with pytest.raises(BadConfig, match="at least 32") as caught:
        runtime.parse_key("hunter2")
    assert "hunter2" not in str(caught.value)


def test_socket_is_named_by_role_and_port(tmp_path):
    assert runtime.socket_path(tmp_path, "vae", 7).name == "vae.7.sock"


@posix
def test_socket_path_that_is_too_long_is_refused_with_the_limit_and_the_cure(tmp_path):
    with pytest.raises(BadConfig, match="limit is 107: .*LUNA_MP_RUNTIME_DIR"):
        runtime.socket_path(tmp_path / ("x" * 100), "vae", 7)


def test_written_record_is_read(runtime_dir):
    written = record()
    runtime.write_record(runtime_dir, written)
    assert runtime.read_records(runtime_dir, "clip") == [written]


def test_record_of_the_other_role_is_not_read(runtime_dir):
    runtime.write_record(runtime_dir, record(role="vae"))
    assert runtime.read_records(runtime_dir, "clip") == []


@posix
def test_record_is_private(runtime_dir):
    runtime.write_record(runtime_dir, record())
    assert (runtime_dir / "clip.5.json").stat().st_mode & 0o777 == 0o600


def test_removed_record_is_gone_and_may_be_removed_again(runtime_dir):
    runtime.write_record(runtime_dir, record())
    for _ in range(2):
        runtime.remove_record(runtime_dir, "clip", 5)
    assert os.listdir(runtime_dir) == []


def test_record_of_an_ended_process_is_removed(runtime_dir, ended):
    runtime.write_record(runtime_dir, record(**ended))
    assert runtime.read_records(runtime_dir, "clip") == [] == os.listdir(runtime_dir)


@posix
def test_record_of_a_service_that_answers_is_left_whatever_its_pid(runtime_dir, ended):
    """Another PID namespace counts its processes otherwise."""
    path = str(runtime_dir / "s")
    with stream.listen(path):
        runtime.write_record(runtime_dir, record(socket=path, **ended))
        assert len(runtime.read_records(runtime_dir, "clip")) == 1
    assert runtime.read_records(runtime_dir, "clip") == []


def test_record_of_a_pid_that_was_used_again_is_removed(runtime_dir):
    runtime.write_record(runtime_dir, record(born=born(os.getpid()) - 60))
    assert runtime.read_records(runtime_dir, "clip") == []


def test_record_that_cannot_be_read_just_now_is_left(runtime_dir, monkeypatch):
    """A reader without a free descriptor once removed the records of running services."""
    runtime.write_record(runtime_dir, record())

    def fail(_path):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(pathlib.Path, "read_bytes", fail)
        assert runtime.read_records(runtime_dir, "clip") == []
    assert runtime.find(runtime_dir, "clip").port == 5


@posix
def test_record_of_a_killed_process_that_nobody_reaped_is_removed(runtime_dir):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        service = psutil.Process(process.pid)
        birth = born(process.pid)
        process.kill()
        wait_until(lambda: service.status() == psutil.STATUS_ZOMBIE)
        runtime.write_record(runtime_dir, record(pid=process.pid, born=birth))
        assert runtime.read_records(runtime_dir, "clip") == []


@pytest.mark.parametrize("ports", [(DEFAULT_PORTS["clip"], 5, 6), (5,)], ids=["default", "only"])
def test_find_gives_the_default_ports_service_or_the_only_one(runtime_dir, ports):
    for port in ports:
        runtime.write_record(runtime_dir, record(port))
    assert runtime.find(runtime_dir, "clip").port == ports[0]


def test_find_says_how_to_start_one_when_there_is_none(runtime_dir):
    with pytest.raises(Unavailable, match="luna-mp serve"):
        runtime.find(runtime_dir, "clip")


def test_find_lists_several_and_how_to_name_one(runtime_dir):
    for port in (5, 6):
        runtime.write_record(runtime_dir, record(port))
    with pytest.raises(Unavailable, match=r"clip=.*clip\.5\.sock, .*clip\.6\.sock"):
        runtime.find(runtime_dir, "clip")


def test_address_is_the_socket_or_else_host_and_port():
    assert record().address == "/run/clip.5.sock"
    assert record(socket="").address == ("127.0.0.1", 5)
