"""Every setting, its default and its unit. TOML files and flags end here as frozen dataclasses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ("DEFAULT_PORTS", "ServeConfig", "ServiceConfig")

Role = Literal["clip", "vae"]

ROLES: tuple[Role, ...] = ("clip", "vae")
DEFAULT_PORTS: dict[Role, int] = {"clip": 19283, "vae": 19284}


@dataclass(frozen=True)
class ServiceConfig:
    """One service process; it crosses to that process as JSON."""

    role: Role
    #: "cpu", "cuda", "cuda:N" or a GPU's UUID
    device: str = "cpu"
    #: the default model's folder or files; none: the small demo model
    models: tuple[str, ...] = ()
    type: str = "auto"
    dtype: str = "auto"
    #: directories from which clients may load further models
    allow: tuple[str, ...] = ()
    #: a ComfyUI checkout whose loaders are used; empty: diffusers and transformers
    comfyui: str = ""
    #: where TCP listens; a host that is not loopback needs `expose`
    host: str = "127.0.0.1"
    #: TCP port, which names the instance too; 0: any free one
    port: int = 0
    expose: bool = False
    runtime_dir: str = ""
    authkey_file: str = ""
    #: most bytes of one message, tensors included
    max_message: int = 4 << 30
    #: models held at once besides the default one
    max_models: int = 4
    #: bytes of conditioning that the CLIP service remembers
    cache_bytes: int = 256 << 20
    #: seconds that running calls get to finish at a stop
    grace: float = 10.0
    log_level: str = "INFO"


@dataclass(frozen=True)
class ServeConfig:
    """What `serve` runs: one or two services."""

    services: tuple[ServiceConfig, ...]
    #: seconds that a service may take to load its models
    boot_timeout: float = 600.0
    #: seconds that running calls get to finish at a stop
    grace: float = 10.0
