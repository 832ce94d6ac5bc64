"""Which CLIP or VAE a node gets: one of a service, or ComfyUI's own, by the node's `mode`."""

from __future__ import annotations

import atexit
import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import comfy.sd
import folder_paths
from comfy.cli_args import args as comfy_args

from luna_mp import runtime
from luna_mp.config import ROLES, Role
from luna_mp.errors import Broken, LunaError, ModelChanged, TimedOut, Unavailable
from luna_mp.integrations.comfyui import RemoteCLIP, RemoteVAE, load_clip, load_vae
from luna_mp.integrations.comfyui_service import Service, service
from luna_mp.models.comfy_facts import ARITHMETIC, fast, option
from luna_mp.report import describe
from luna_mp.serving import Serving, serve

__all__ = (
    "MODES",
    "checkpoint",
    "clip",
    "fingerprint",
    "shared_clip",
    "shared_vae",
    "start",
    "status",
    "unload",
    "vae",
)

logger = logging.getLogger(__name__)

Mode = Literal["auto", "service", "local"]
MODES: tuple[Mode, ...] = ("auto", "service", "local")
#: flags of this ComfyUI that a service started from it gets too
_FLAGS = (
    *ARITHMETIC,
    *("fp16_vae", "fp32_vae", "bf16_vae", "cpu_vae"),
    *("fp8_e4m3fn_text_enc", "fp8_e5m2_text_enc", "fp8_e8m0fnu_text_enc"),
    *("fp16_text_enc", "fp32_text_enc", "bf16_text_enc"),
)

T = TypeVar("T")


def vae(path: str, mode: Mode, address: str, local: Callable[[], Any]) -> Any:
    """The VAE in that file. Raises `Unavailable` in mode "service" where there is none."""
    return _by_mode(mode, "vae", address, lambda found: load_vae(found, [path])[0], local)


def clip(
    paths: Sequence[str], type: str, mode: Mode, address: str, local: Callable[[], Any]
) -> Any:
    """The text encoders in those files, one to four that belong together."""

    def remote(found: Service) -> RemoteCLIP:
        return load_clip(found, paths, type, embedding_directory=_embeddings())[0]

    return _by_mode(mode, "clip", address, remote, local)


def checkpoint(path: str, mode: Mode, clip_address: str, vae_address: str) -> tuple[Any, Any, Any]:
    """MODEL, which is loaded here, CLIP and VAE of one file; in mode "auto" each by itself."""
    clips = _chosen(mode, "clip", clip_address)
    vaes = _chosen(mode, "vae", vae_address)
    model, clip_, vae_, *_ = comfy.sd.load_checkpoint_guess_config(
        path,
        output_clip=clips is None,
        output_vae=vaes is None,
        embedding_directory=_embeddings(),
    )
    if clips is not None:
        clip_ = load_clip(clips, [path], embedding_directory=_embeddings())[0]
    if vaes is not None:
        vae_ = load_vae(vaes, [path])[0]
    return model, clip_, vae_


def shared_vae(address: str, use: Callable[[RemoteVAE], T]) -> T:
    """`use` with the default VAE of a service."""
    return _with_default("vae", address, lambda found: load_vae(found)[0], use)


def shared_clip(address: str, use: Callable[[RemoteCLIP], T]) -> T:
    """`use` with the default CLIP of a service."""

    def load(found: Service) -> RemoteCLIP:
        return load_clip(found, embedding_directory=_embeddings())[0]

    return _with_default("clip", address, load, use)


def fingerprint(paths: Sequence[str], mode: Mode) -> tuple[Any, ...]:
    """What a loader's result depends on besides its inputs: a file that is written anew loads anew.

    In mode "auto" also which services run, from their records; nothing is connected.
    """
    files = tuple((path, Path(path).stat().st_mtime_ns) for path in paths)
    if mode != "auto":
        return files
    directory = runtime.runtime_dir()
    return (*files, *(role for role in ROLES if runtime.read_records(directory, role)))


def status() -> str:
    """Text about each service of this machine, and how its tensors come here."""
    lines = []
    for role in ROLES:
        try:
            found = service(role, at_once=True)
            lines.append(describe({role: found.call("status")}))
            lines.append(f"  this ComfyUI: by {found.carrier}")
        except LunaError as exc:
            lines.append(f"{role}: {exc}")
    return "\n".join(lines)


def unload(role: Role, paths: Sequence[str]) -> bool:
    """Let a service of this machine drop the model in those files; False: it was not there."""
    was_there: bool = service(role).call("unload", {"paths": list(paths)})
    return was_there


def start(clip_device: str, vae_device: str) -> str:
    """Start services that end with this ComfyUI, with its flags and its models' directories.

    A service of this user that runs already stays the only one of its kind. Raises `BootFailed`
    with the service's own reason.
    """
    directory = runtime.runtime_dir()
    runs = {role for role in ROLES if runtime.read_records(directory, role)}
    clip_device = "" if "clip" in runs else clip_device
    vae_device = "" if "vae" in runs else vae_device
    with _lock:
        if (clip_device or vae_device) and not _started:
            folders = {
                f for paths, _ in folder_paths.folder_names_and_paths.values() for f in paths
            }
            serving = serve(
                clip=clip_device or None,
                vae=vae_device or None,
                # not `base_path`, which holds the models and may be elsewhere
                comfyui=str(Path(comfy.sd.__file__).resolve().parents[1]),
                comfyui_flags=tuple(_own_flags()),
                allow=tuple(sorted(folder for folder in folders if Path(folder).is_dir())),
            )
            _started.append(serving)
    return status()


_lock = threading.Lock()
_started: list[Serving] = []
_defaults: dict[tuple[Role, str], Any] = {}


@atexit.register
def _stop() -> None:
    with _lock:
        while _started:
            _started.pop().stop()


def _by_mode(
    mode: Mode,
    role: Role,
    address: str,
    remote: Callable[[Service], T],
    local: Callable[[], Any],
) -> Any:
    found = _chosen(mode, role, address)
    return local() if found is None else remote(found)


def _chosen(mode: Mode, role: Role, address: str) -> Service | None:
    """The service to load in, or None for this process; the log says which."""
    if mode == "local":
        return None
    try:
        found = service(role, address, at_once=mode == "auto")
    except (Unavailable, Broken, TimedOut) as exc:
        if mode == "service":
            raise
        logger.warning("the %s is loaded in this ComfyUI, since %s", role, exc)
        return None
    logger.info("the %s is loaded in %r", role, found)
    return found


def _with_default(
    role: Role, address: str, load: Callable[[Service], Any], use: Callable[[Any], T]
) -> T:
    """The default model may be another one after a restart of the service."""
    key = (role, address)
    if key not in _defaults:
        _defaults[key] = load(service(role, address))
    try:
        return use(_defaults[key])
    except ModelChanged:
        _defaults[key] = load(service(role, address))
        return use(_defaults[key])


def _embeddings() -> list[str]:
    found: list[str] = folder_paths.get_folder_paths("embeddings")
    return found


def _own_flags() -> list[str]:
    said = vars(comfy_args)
    flags = [option(name) for name in _FLAGS if said.get(name) is True]
    return [*flags, *(["--fast", *fast(said)] if fast(said) else [])]
