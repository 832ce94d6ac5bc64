"""The supervisor with real processes that die, hang and refuse; no model is loaded."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager

import psutil
import pytest

from luna_mp import supervisor as supervisor_module
from luna_mp.config import ServeConfig, ServiceConfig
from luna_mp.errors import BootFailed
from luna_mp.supervisor import Supervisor
from tests.helpers import wait_until
from tests.jobs import CHOSEN_PORT

COMMAND = (sys.executable, "-m", "tests.jobs")
ROLES = ("clip", "vae")

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the fakes use POSIX signals")


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(supervisor_module, "BACKOFF_SECONDS", (0.01, 0.02))
    monkeypatch.setattr(supervisor_module, "KILL_SECONDS", 0.3)


def make(*types: str, boot_timeout: float = 20.0, **options: object) -> Supervisor:
    services = [ServiceConfig(r, type=t, **options) for r, t in zip(ROLES, types, strict=False)]
    return Supervisor(ServeConfig(tuple(services), boot_timeout, grace=0.2), COMMAND)


def pid(supervisor: Supervisor, role: str = "clip") -> int:
    """Of the service that is ready, or 0 when it is not."""
    return supervisor.ready[role].get("pid", 0)


@contextmanager
def running(supervisor: Supervisor):
    """Run the loop in a thread; gives the thread and a list that takes its error."""
    should_stop = threading.Event()
    errors: list[BaseException] = []

    def loop() -> None:
        try:
            supervisor.run(should_stop.is_set)
        except BootFailed as exc:
            errors.append(exc)

    thread = threading.Thread(target=loop)
    with supervisor:
        thread.start()
        try:
            yield thread, errors
        finally:
            should_stop.set()
            thread.join(10.0)
            assert not thread.is_alive()


def test_start_returns_when_all_services_are_ready():
    with make("boot", "boot") as supervisor:
        assert {r: ready["role"] for r, ready in supervisor.ready.items()} == {
            "clip": "clip",
            "vae": "vae",
        }


def test_stop_leaves_no_process():
    with make("boot", "boot") as supervisor:
        pids = [pid(supervisor, role) for role in ROLES]
    assert not any(map(psutil.pid_exists, pids))


def test_stop_may_be_called_twice():
    with make("boot") as supervisor:
        supervisor.stop()
    supervisor.stop()


def test_stop_kills_a_service_that_does_not_listen():
    with make("stubborn") as supervisor:
        stubborn = pid(supervisor)
    assert not psutil.pid_exists(stubborn)


def test_service_runs_with_the_native_allocator(monkeypatch):
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "backend:cudaMallocAsync")
    with make("boot") as supervisor:
        env = supervisor.ready["clip"]["env"]
    assert set(env.values()) == {"backend:native"}


def test_service_is_out_of_reach_of_the_terminals_ctrl_c():
    with make("boot") as supervisor:
        assert supervisor.ready["clip"]["session"] != os.getsid(0)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("fail", "the model is not there"),
        ("wordless", "exit status 7"),
        ("crash", "SIGKILL"),
    ],
)
def test_first_boot_failure_says_why(kind, text):
    with pytest.raises(BootFailed, match=text):
        make(kind).start()


def test_boot_that_hangs_is_ended_with_its_limit_in_the_text():
    with pytest.raises(BootFailed, match=r"within 0\.5 s"):
        make("hang", boot_timeout=0.5).start()


def test_first_boot_failure_ends_the_other_service():
    with pytest.raises(BootFailed, match="vae"):
        make("boot", "fail").start()
    children = psutil.Process().children()
    assert not [child for child in children if "tests.jobs" in child.cmdline()]


def test_failure_is_heard_while_another_service_still_loads():
    with pytest.raises(BootFailed, match="the model is not there"):
        make("hang", "fail", boot_timeout=60.0).start()


def test_start_can_be_given_up():
    supervisor = make("hang", boot_timeout=60.0)
    assert supervisor.start(should_stop=lambda: True) is False


def test_stop_does_not_wait_for_a_service_that_still_loads():
    supervisor = Supervisor(ServeConfig((ServiceConfig("clip", type="hang"),), grace=60.0), COMMAND)
    assert supervisor.start(should_stop=lambda: True) is False


def test_killed_service_is_started_again():
    supervisor = make("boot", "boot")
    with running(supervisor):
        first, other = pid(supervisor), pid(supervisor, "vae")
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: pid(supervisor) not in (0, first))
        assert pid(supervisor, "vae") == other


def test_service_comes_back_on_the_port_that_the_system_chose():
    supervisor = make("boot")
    with running(supervisor):
        first = pid(supervisor)
        assert supervisor.ready["clip"]["asked"] == 0
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: pid(supervisor) not in (0, first))
        assert supervisor.ready["clip"]["asked"] == CHOSEN_PORT


def test_service_that_ends_with_status_0_ends_the_loop():
    supervisor = make("boot", "boot")
    with running(supervisor) as (thread, errors):
        os.kill(pid(supervisor), signal.SIGUSR1)
        thread.join(10.0)
        assert not thread.is_alive() and not errors


def test_supervisor_gives_up_on_a_service_that_keeps_failing(tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor_module, "MAX_DEATHS", 2)
    supervisor = make("boot_once", comfyui=str(tmp_path / "marker"))
    with running(supervisor) as (thread, errors):
        os.kill(pid(supervisor), signal.SIGKILL)
        thread.join(20.0)
        assert [type(error) for error in errors] == [BootFailed]


def test_killed_supervisor_leaves_no_service():
    code = (
        "import sys; from luna_mp.supervisor import Supervisor\n"
        "from luna_mp.config import ServeConfig, ServiceConfig\n"
        "config = ServeConfig((ServiceConfig('clip', type='boot'),))\n"
        "s = Supervisor(config, [sys.executable, '-m', 'tests.jobs']); s.start()\n"
        "print(s.ready['clip']['pid'], flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        service = psutil.Process(int(owner.stdout.readline()))
        owner.kill()
    service.wait(10.0)


def test_what_a_killed_service_left_in_shared_memory_is_removed(monkeypatch, tmp_path):
    from luna_mp.wire import leftovers

    monkeypatch.setattr(leftovers, "SHARED_MEMORY", tmp_path)
    for name in ("torch_77_1_0", "torch_777_1_0", "cuda.shm.0.4d.1", "cuda.shm.0.4e.1"):
        (tmp_path / name).touch()
    leftovers.remove_leftovers(77)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["cuda.shm.0.4e.1", "torch_777_1_0"]
