"""Where settings come from, which wins, and what is refused with which words."""

from __future__ import annotations

import pytest

from luna_mp.config import (
    DEFAULT_PORTS,
    ServeConfig,
    ServiceConfig,
    Settings,
    read_file,
    resolve,
)
from luna_mp.errors import BadConfig

UUID = "GPU-8b5c8a3e-1d2f-4c6b-9a7e-0123456789ab"


@pytest.fixture
def toml(tmp_path):
    """Write a file's text; gives its path."""

    def write(text: str | bytes) -> str:
        path = tmp_path / "luna.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


def only(config: ServeConfig) -> ServiceConfig:
    (service,) = config.services
    return service


def roles(config: ServeConfig) -> list[str]:
    return [service.role for service in config.services]


def test_service_config_crosses_as_one_line_unchanged():
    config = ServiceConfig("vae", models=("/a b", "/ü\n"), allow=("/c",), port=7, expose=True)
    text = config.to_json()
    assert "\n" not in text and ServiceConfig.from_json(text) == config


def test_nothing_said_runs_both_on_the_best_device_at_the_default_ports():
    services = resolve(Settings()).services
    assert {s.role: (s.device, s.port) for s in services} == {
        role: ("auto", port) for role, port in DEFAULT_PORTS.items()
    }


@pytest.mark.parametrize("role", ["clip", "vae"])
def test_a_device_for_one_service_runs_that_one(role):
    assert roles(resolve(Settings(**{role: {"device": "cpu"}}))) == [role]


@pytest.mark.parametrize(
    ("service_type", "expected"),
    [("full", ["clip", "vae"]), ("clip_only", ["clip"]), ("vae_only", ["vae"])],
)
def test_service_type_chooses(service_type, expected):
    assert roles(resolve(Settings({"service_type": service_type}))) == expected


def test_service_type_that_contradicts_a_device_is_refused():
    with pytest.raises(BadConfig, match=r"settings for vae \(device\), which is not to run"):
        resolve(Settings({"service_type": "clip_only"}, vae={"device": "cpu"}))


def test_unknown_service_type_is_refused_with_those_there_are():
    with pytest.raises(BadConfig, match="'half' is none of full, clip_only, vae_only"):
        resolve(Settings({"service_type": "half"}))


def test_flags_win_over_the_file_and_the_file_over_the_defaults(toml):
    file = read_file(toml("[clip]\ndevice = 'cuda:1'\nport = 5\ndtype = 'bfloat16'\n"))
    config = only(resolve(Settings(clip={"device": "cpu"}).over(file)))
    assert (config.device, config.port, config.dtype, config.type) == ("cpu", 5, "bfloat16", "auto")


def test_top_level_keys_reach_every_service(toml, tmp_path):
    file = read_file(toml(f"runtime_dir = '{tmp_path}'\nlog_level = 'DEBUG'\ngrace = 2\n"))
    config = resolve(file)
    assert {(s.runtime_dir, s.log_level, s.grace) for s in config.services} == {
        (str(tmp_path), "DEBUG", 2.0)
    }
    assert config.grace == 2.0


@pytest.mark.parametrize("models", ["'/m'", "['/m']"])
def test_models_are_text_or_a_list(toml, models):
    assert read_file(toml(f"[vae]\nmodels = {models}")).vae == {"models": ("/m",)}


def test_port_0_stays_any_free_port():
    assert only(resolve(Settings(clip={"device": "cpu", "port": 0}))).port == 0


def test_paths_are_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    config = only(resolve(Settings(vae={"device": "cpu", "models": ("a", "~/b")})))
    assert config.models == (str(tmp_path / "a"), "/home/someone/b")


@pytest.mark.parametrize(
    "device", ["auto", "cpu", "cuda", "cuda:0", "cuda:12", UUID, "MIG" + UUID[3:]]
)
def test_device_spelling_is_taken(device):
    assert only(resolve(Settings(clip={"device": device}))).device == device


@pytest.mark.parametrize(
    "device", ["", "gpu0", "cuda:", "cuda:-1", "cuda:a", "cpu:0", "GPU-", "mps"]
)
def test_other_device_spelling_is_refused_with_the_forms(device):
    with pytest.raises(BadConfig, match="of clip: write auto, cpu, cuda, cuda:N or a GPU's UUID"):
        resolve(Settings(clip={"device": device}))


@pytest.mark.parametrize("port", [-1, 65536])
def test_port_out_of_range_is_refused(port):
    with pytest.raises(BadConfig, match=f"port {port} of vae is outside 0 to 65535"):
        resolve(Settings(vae={"device": "cpu", "port": port}))


@pytest.mark.parametrize(
    ("said", "message"),
    [({"log_level": "LOUD"}, "'LOUD' is none of DEBUG"), ({"boot_timeout": 0.0}, "more than 0")],
)
def test_top_level_value_out_of_range_is_refused(said, message):
    with pytest.raises(BadConfig, match=message):
        resolve(Settings(said))


def test_one_port_for_both_is_refused():
    with pytest.raises(BadConfig, match="both services on port 5"):
        resolve(Settings(clip={"port": 5}, vae={"port": 5}))


def test_any_free_port_for_both_is_two_ports():
    assert roles(resolve(Settings(clip={"port": 0}, vae={"port": 0}))) == ["clip", "vae"]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "my-host", ""])
def test_host_that_others_reach_needs_expose(host):
    with pytest.raises(BadConfig, match="neither encrypted nor sealed.*--expose"):
        resolve(Settings(clip={"device": "cpu", "host": host}))


def test_folders_that_clients_may_load_from_have_to_be_there(tmp_path):
    assert resolve(Settings(vae={"allow": str(tmp_path)})).services[0].allow == (str(tmp_path),)
    missing = str(tmp_path / "nope")
    with pytest.raises(BadConfig, match=f"allow of vae: '{missing}' is no directory"):
        resolve(Settings(vae={"allow": missing}))


def test_expose_allows_any_host():
    said = Settings(clip={"device": "cpu", "host": "0.0.0.0", "expose": True})
    assert only(resolve(said)).host == "0.0.0.0"


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.8.8", "::1"])
def test_loopback_needs_no_expose(host):
    assert only(resolve(Settings(clip={"device": "cpu", "host": host}))).host == host


@pytest.mark.parametrize(
    ("text", "where", "known"),
    [
        ("[clip]\ndevise = 'cpu'", r"table \[clip\]: unknown key 'devise'", "device, models"),
        ("bot_timeout = 3", "at the top: unknown key 'bot_timeout'", "boot_timeout"),
        ("[vea]\ndevice = 'cpu'", "at the top: unknown key 'vea'", "service_type"),
        ("[vae]\nrole = 'clip'", r"table \[vae\]: unknown key 'role'", "device"),
        ("[vae]\ntype = 'sdxl'", r"table \[vae\]: unknown key 'type'", "device, models, dtype"),
    ],
)
def test_unknown_key_is_refused_with_the_place_and_the_known_ones(toml, text, where, known):
    with pytest.raises(BadConfig, match=rf"luna\.toml, {where}; there are .*{known}"):
        read_file(toml(text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[clip]\nport = '5'", r"table \[clip\]: port is '5', a str; it takes int"),
        ("[clip]\nport = true", r"table \[clip\]: port is True, a bool; it takes int"),
        ("[vae]\nexpose = 1", r"table \[vae\]: expose is 1, a int; it takes bool"),
        ("[vae]\nmodels = [1]", r"table \[vae\]: models is \[1\]; it takes text or a list"),
        ("boot_timeout = 'long'", "at the top: boot_timeout is 'long'"),
        ("clip = 'cpu'", r"clip is a table: write \[clip\]"),
    ],
)
def test_wrong_type_is_refused_with_the_place(toml, text, message):
    with pytest.raises(BadConfig, match=rf"luna\.toml.*{message}"):
        read_file(toml(text))


def test_toml_error_names_file_and_line(toml):
    with pytest.raises(BadConfig, match=r"luna\.toml: .*line 2"):
        read_file(toml("[clip]\ndevice = = 'cpu'\n"))


def test_file_that_is_not_text_is_refused(toml):
    with pytest.raises(BadConfig, match=r"luna\.toml: not TOML"):
        read_file(toml(b"\xff\xfe"))


def test_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(BadConfig, match="cannot be read: No such file"):
        read_file(str(tmp_path / "missing.toml"))


def test_settings_of_a_service_that_is_not_to_run_are_refused():
    with pytest.raises(BadConfig, match=r"settings for vae \(port\), which is not to run"):
        resolve(Settings(clip={"device": "cpu"}, vae={"port": 5}))


def test_a_flag_for_both_wins_over_a_file_for_one():
    flags, file = Settings(common={"host": "127.0.0.2"}), Settings(vae={"host": "127.0.0.3"})
    assert {service.host for service in resolve(flags.over(file)).services} == {"127.0.0.2"}
