"""Every setting, its default and its unit. TOML files and flags end here as frozen dataclasses."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

from luna_mp.errors import BadConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ("DEFAULT_PORTS", "ROLES", "Role", "ServeConfig", "ServiceConfig", "read_file", "resolve")

Role = Literal["clip", "vae"]

ROLES: tuple[Role, ...] = ("clip", "vae")
DEFAULT_PORTS: dict[Role, int] = {"clip": 19283, "vae": 19284}
SERVICE_TYPES: dict[str, tuple[Role, ...]] = {
    "full": ("clip", "vae"),
    "clip_only": ("clip",),
    "vae_only": ("vae",),
}
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")

_UUID = r"(GPU-|MIG-)?[0-9a-f]{8}(-[0-9a-f]{0,12})*"
_DEVICE = re.compile(rf"auto|cpu|cuda|cuda:\d{{1,3}}|{_UUID}", re.IGNORECASE)


@dataclass(frozen=True)
class ServiceConfig:
    """One service process; it crosses to that process as JSON."""

    role: Role
    #: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:N" or a GPU's UUID
    device: str = "auto"
    #: the default model's folder or files; none: the small demo model
    models: tuple[str, ...] = ()
    #: the model family's convention, as in `models.base.ModelSpec`
    type: str = "auto"
    dtype: str = "auto"
    #: directories from which clients may load further models; ComfyUI's own are always among them
    allow: tuple[str, ...] = ()
    #: a ComfyUI checkout whose loaders are used; empty: diffusers and transformers
    comfyui: str = ""
    #: flags of ComfyUI's own command line, such as "--fp32-vae", that change results
    comfyui_flags: tuple[str, ...] = ()
    #: where TCP listens; a host that is not loopback needs `expose`
    host: str = "127.0.0.1"
    #: TCP port, which names the instance too; 0: any free one
    port: int = 0
    expose: bool = False
    #: most bytes of one message, tensors included
    max_message: int = 4 << 30
    #: bytes of results on the GPU that one client process may hold; 0: a quarter of the card
    max_leased: int = 0
    #: models held at once besides the default one
    max_models: int = 4
    #: bytes of conditioning that the CLIP service remembers
    cache_bytes: int = 256 << 20
    runtime_dir: str = ""
    authkey_file: str = ""
    #: seconds that running calls get to finish at a stop
    grace: float = 10.0
    log_level: str = "INFO"

    def to_json(self) -> str:
        """One line, for `from_json`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ServiceConfig:
        data = json.loads(text)
        lists = {name: tuple(data[name]) for name in ("models", "allow", "comfyui_flags")}
        return cls(**{**data, **lists})


@dataclass(frozen=True)
class ServeConfig:
    """What `serve` runs: one or two services."""

    services: tuple[ServiceConfig, ...]
    #: seconds that a service may take to load its models
    boot_timeout: float = 600.0
    #: seconds that running calls get to finish at a stop
    grace: float = 10.0


@dataclass(frozen=True)
class Settings:
    """What a file or the flags say: only what was said, by table. Later ones win over earlier."""

    common: dict[str, Any] = field(default_factory=dict)
    clip: dict[str, Any] = field(default_factory=dict)
    vae: dict[str, Any] = field(default_factory=dict)

    def table(self, role: Role) -> dict[str, Any]:
        return self.clip if role == "clip" else self.vae

    def over(self, base: Settings) -> Settings:
        """These settings where they say something, `base` elsewhere."""
        # What is said here for both wins over what the base says for one.
        left = {
            role: {k: v for k, v in base.table(role).items() if k not in self.common}
            for role in ROLES
        }
        return Settings(
            {**base.common, **self.common},
            *({**left[role], **self.table(role)} for role in ROLES),
        )


# What may be said where, by type; numbers are also taken without a fraction.
_EITHER: dict[str, type] = {
    "allow": tuple,
    "comfyui": str,
    "comfyui_flags": tuple,
    "host": str,
    "expose": bool,
    "max_message": int,
    "max_leased": int,
    "max_models": int,
    "cache_bytes": int,
}
_COMMON: dict[str, type] = {
    "service_type": str,
    "runtime_dir": str,
    "authkey_file": str,
    "boot_timeout": float,
    "grace": float,
    "log_level": str,
    **_EITHER,
}
_VAE: dict[str, type] = {
    "device": str,
    "models": tuple,
    "dtype": str,
    "port": int,
    **_EITHER,
}
#: only text encoders have a type: a VAE's shows in its file
_TABLES: dict[Role, dict[str, type]] = {"clip": {"type": str, **_VAE}, "vae": _VAE}


def read_file(path: str) -> Settings:
    """Settings of a TOML file: `[clip]`, `[vae]` and the keys for both at the top.

    Raises `BadConfig` with the file and the line, or the table and the key.
    """
    try:
        data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as exc:
        raise BadConfig(f"{path}: cannot be read: {exc.strerror}") from exc
    except ValueError as exc:  # a TOML error says its line; text that is not UTF-8 comes here too
        raise BadConfig(f"{path}: not TOML: {exc}") from exc
    tables = {role: data.pop(role, {}) for role in ROLES}
    for role, table in tables.items():
        if not isinstance(table, dict):
            raise BadConfig(f"{path}: {role} is a table: write [{role}] on a line of its own")
    return Settings(
        _checked(data, _COMMON, f"{path}, at the top"),
        *(_checked(tables[role], _TABLES[role], f"{path}, table [{role}]") for role in ROLES),
    )


def resolve(said: Settings, default_ports: Mapping[Role, int] = DEFAULT_PORTS) -> ServeConfig:
    """Fill in the defaults and check what cannot be told key by key. Raises `BadConfig`."""
    common = _checked(said.common, _COMMON, "the settings")
    roles = _roles(common.pop("service_type", None), said)
    _check_limits(common)
    boot_timeout = common.pop("boot_timeout", ServeConfig.boot_timeout)
    services = []
    for role in roles:
        own = _checked(said.table(role), _TABLES[role], f"the {role} service's settings")
        given = {"port": default_ports[role], **common, **own}
        services.append(_checked_service(ServiceConfig(role=role, **given)))
    ports = [service.port for service in services if service.port]
    if len(set(ports)) < len(ports):
        raise BadConfig(f"both services on port {ports[0]}: give each a port of its own")
    return ServeConfig(tuple(services), boot_timeout, common.get("grace", ServeConfig.grace))


def _roles(service_type: str | None, said: Settings) -> tuple[Role, ...]:
    """Which services are asked for: by type, else by a device, else by any setting, else both."""
    with_device = tuple(role for role in ROLES if "device" in said.table(role))
    mentioned = tuple(role for role in ROLES if said.table(role))
    if service_type is None:
        wanted = with_device or mentioned or ROLES
    elif service_type in SERVICE_TYPES:
        wanted = SERVICE_TYPES[service_type]
    else:
        raise BadConfig(f"service type {service_type!r} is none of {', '.join(SERVICE_TYPES)}")
    for role in mentioned:
        if role not in wanted:
            raise BadConfig(
                f"there are settings for {role} ({', '.join(said.table(role))}), which is not to "
                f"run: name its device too, or leave them out"
            )
    return wanted


def _check_limits(common: Mapping[str, Any]) -> None:
    level = common.get("log_level", ServiceConfig.log_level)
    if level not in LOG_LEVELS:
        raise BadConfig(f"log_level {level!r} is none of {', '.join(LOG_LEVELS)}")
    if not common.get("boot_timeout", ServeConfig.boot_timeout) > 0:
        raise BadConfig(f"boot_timeout is {common['boot_timeout']} s; it takes more than 0")


def _checked(table: Mapping[str, Any], known: Mapping[str, type], where: str) -> dict[str, Any]:
    checked = {}
    for key, value in table.items():
        if key not in known:
            raise BadConfig(f"{where}: unknown key {key!r}; there are {', '.join(known)}")
        checked[key] = _converted(value, known[key], f"{where}: {key}")
    return checked


def _converted(value: Any, kind: type, what: str) -> Any:
    if kind is tuple:
        items = [value] if isinstance(value, (str, os.PathLike)) else value
        if not isinstance(items, (list, tuple)) or not all(
            isinstance(item, (str, os.PathLike)) for item in items
        ):
            raise BadConfig(f"{what} is {value!r}; it takes text or a list of texts")
        return tuple(map(os.fspath, items))
    if kind is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise BadConfig(f"{what} is {value!r}, a {type(value).__name__}; it takes {kind.__name__}")
    return value


def _checked_service(service: ServiceConfig) -> ServiceConfig:
    if not _DEVICE.fullmatch(service.device):
        raise BadConfig(
            f"device {service.device!r} of {service.role}: write auto, cpu, cuda, cuda:N or a "
            "GPU's UUID (nvidia-smi -L lists them)"
        )
    if not 0 <= service.port <= 65535:
        raise BadConfig(f"port {service.port} of {service.role} is outside 0 to 65535")
    for name in ("max_message", "max_leased", "max_models", "cache_bytes", "grace"):
        if getattr(service, name) < 0:
            raise BadConfig(f"{name} of {service.role} is {getattr(service, name)}, below zero")
    if not service.expose and not _is_loopback(service.host):
        raise BadConfig(
            f"host {service.host!r} of {service.role} can be reached from other machines, and what "
            "crosses is neither encrypted nor sealed: use an SSH tunnel, or say --expose"
        )
    for folder in service.allow:
        if not os.path.isdir(os.path.expanduser(folder)):
            raise BadConfig(f"allow of {service.role}: {folder!r} is no directory on this machine")
    allow = (
        *service.allow,
        *([os.path.join(service.comfyui, "models")] if service.comfyui else []),
    )
    # Services run elsewhere than where the paths were typed.
    paths = {
        name: tuple(map(_absolute, given))
        for name, given in (("models", service.models), ("allow", allow))
    }
    single = {
        name: _absolute(value)
        for name in ("comfyui", "runtime_dir", "authkey_file")
        if (value := getattr(service, name))
    }
    return replace(service, **cast("dict[str, Any]", {**paths, **single}))


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
