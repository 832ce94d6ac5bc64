"""The command line: translates and delegates. What needs torch is imported by its own command."""

from __future__ import annotations

import functools
import json
import logging
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import click

from luna_mp import __version__
from luna_mp.config import ROLES, Settings, read_file, resolve
from luna_mp.errors import LunaError, Unavailable

__all__ = ("main",)

NOTHING_RUNS = 3  # exit status of `status` and `stop`

_DIR = click.Path(file_okay=False, path_type=str)
_FILE = click.Path(dir_okay=False, path_type=str)


def _told(command: Callable[..., Any]) -> Callable[..., Any]:
    """Show an error of ours as its text, which says what to do; a traceback adds nothing."""

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except LunaError as exc:
            raise click.ClickException(str(exc)) from exc

    return wrapper


def _where(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say which services are meant."""
    command = click.option("--clip", help="Address: host:port or a socket's path.")(command)
    command = click.option("--vae", help="Address: host:port or a socket's path.")(command)
    command = click.option("--authkey-file", type=_FILE, default="", help="File of the key.")(
        command
    )
    return click.option("--runtime-dir", type=_DIR, default="", help="Where sockets lie.")(command)


@click.group()
@click.version_option(__version__, prog_name="luna-mp")
def main() -> None:
    """Load text encoders and VAEs once, and share them between image workers."""


def _per_service(name: str, help: str, **options: Any) -> Callable[..., Any]:
    """`--clip-NAME` and `--vae-NAME`."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for role in reversed(ROLES):
            flag = f"--{role}-{name}"
            command = click.option(flag, help=f"{help} ({role.upper()}).", **options)(command)
        return command

    return decorate


@main.command()
@click.option("--clip", "clip_device", metavar="DEVICE", help="Device of the CLIP service.")
@click.option("--vae", "vae_device", metavar="DEVICE", help="Device of the VAE service.")
@_per_service("model", "Folder or file of the default model; may be repeated", multiple=True)
@_per_service("type", "Model family, such as sd1, sdxl or flux")
@_per_service("dtype", "Torch dtype of the weights")
@_per_service("port", "TCP port; 0 takes a free one", type=int)
@click.option("--service-type", help="full, clip_only or vae_only.")
@click.option("--config", "file", type=_FILE, help="TOML file with [clip] and [vae] tables.")
@click.option("--host", help="Address for TCP; loopback unless --expose.")
@click.option("--expose", is_flag=True, default=None, help="Let other machines reach TCP.")
@click.option("--allow", multiple=True, type=_DIR, help="Where clients may load models from.")
@click.option("--max-leased", type=int, help="Bytes of GPU results that one client may hold.")
@click.option("--comfyui", type=_DIR, envvar="COMFYUI_PATH", help="ComfyUI whose loaders to use.")
@click.option(
    "--comfyui-flags", help="Its flags that change results: '--fp32-vae --deterministic'."
)
@click.option("--runtime-dir", type=_DIR, help="Directory of the sockets and the key.")
@click.option("--authkey-file", type=_FILE, help="File that holds the key.")
@click.option("--boot-timeout", type=float, help="Seconds for the models to load.")
@click.option("--log-level", help="DEBUG, INFO, WARNING or ERROR.")
@_told
def serve(file: str | None, **flags: Any) -> None:
    """Run the services in the foreground until Ctrl-C.

    A DEVICE is cpu, cuda, cuda:N or a GPU's UUID. With neither --clip nor --vae both run, on the
    first GPU if there is one.
    """
    from luna_mp.supervisor import Supervisor

    said = _said(flags)
    config = resolve(said.over(read_file(file)) if file else said)
    level = config.services[0].log_level
    logging.basicConfig(level=level, format="%(asctime)s luna-mp %(levelname)s %(message)s")
    supervisor = Supervisor(config)
    with _interrupts(supervisor.kill) as should_stop:
        try:
            if supervisor.start(should_stop):
                for role, ready in supervisor.ready.items():
                    place = f"{ready['device']}, {ready['host']}:{ready['port']}"
                    click.echo(f"{role}: ready on {place}")
                supervisor.run(should_stop)
                if should_stop():
                    grace = f"{config.grace:g} s"
                    click.echo(f"stopping: calls have {grace} to end; Ctrl-C ends them now")
        finally:
            supervisor.stop()
    click.echo("stopped")


def _said(flags: dict[str, Any]) -> Settings:
    """Only what was typed, by table."""
    said = Settings()
    for name, value in flags.items():
        if value is None or value == ():
            continue
        role, _, own = name.partition("_")
        if role in ROLES:
            said.table(role)["models" if own == "model" else own] = value
        elif name == "comfyui_flags":
            said.common[name] = shlex.split(value)
        else:
            said.common[name] = value
    return said


@contextmanager
def _interrupts(force: Callable[[], None]) -> Iterator[Callable[[], bool]]:
    """Gives the question whether a signal came; the second one forces."""
    # No Event: its lock is not reentrant, and a handler may find this very thread holding it.
    came: list[int] = []

    def handle(signum: int, _frame: object) -> None:
        if came:
            force()
        came.append(signum)

    signals = [signal.SIGINT, signal.SIGTERM]
    before = {signum: signal.signal(signum, handle) for signum in signals}
    try:
        yield lambda: bool(came)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@main.command()
@_where
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@_told
def status(as_json: bool, **where: Any) -> None:
    """What runs where, for whom, and how much it did."""
    from luna_mp.report import describe

    with _connected(where, "{}" if as_json else "") as luna:
        found = {role: _without(client, luna.status(role)) for role, client in luna.ids.items()}
    click.echo(json.dumps(found, indent=2) if as_json else describe(found))


@main.command()
@_where
@_told
def stop(**where: Any) -> None:
    """Stop the services of this machine."""
    with _connected(where) as luna:
        for role in luna.carriers:
            luna.stop(role)
            click.echo(f"{role}: stopping")


def _without(client: str, status: dict[str, Any]) -> dict[str, Any]:
    """The status without the client that asked for it."""
    return {**status, "clients": [each for each in status["clients"] if each["client"] != client]}


@contextmanager
def _connected(where: dict[str, Any], instead: str = "") -> Iterator[Any]:
    """A client; where nothing runs `instead` is printed, and the command ends."""
    from luna_mp.client import connect

    try:
        luna = connect(**where)
    except Unavailable as exc:
        if instead:
            click.echo(instead)
        click.echo(str(exc), err=True)
        sys.exit(NOTHING_RUNS)
    with luna:
        yield luna


def _conclude(
    report: dict[str, Any], as_json: bool, format_report: Callable[[dict[str, Any]], str]
) -> NoReturn:
    """Print what was found; the status is 0 where all of it is well."""
    click.echo(json.dumps(report, indent=2) if as_json else format_report(report))
    sys.exit(0 if report["ok"] else 1)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.option(
    "--picture",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("luna-mp-demo.png"),
    help="Where the decoded picture goes.",
)
@_told
def demo(as_json: bool, picture: Path) -> None:
    """Start services, use them from two processes, and compare with the models in process."""
    from luna_mp.demo import format_report, run_demo

    report = run_demo(picture)
    _conclude(report, as_json, format_report)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@_told
def bench(as_json: bool) -> None:
    """Time calls and crossings against the plain way, side by side."""
    from luna_mp.bench import format_report, run_bench

    report = run_bench()
    _conclude(report, as_json, format_report)


@main.command()
@click.option("--authkey-file", type=_FILE, default="", help="File of the key.")
@click.option("--runtime-dir", type=_DIR, default="", help="Where sockets lie.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@_told
def doctor(as_json: bool, **where: str) -> None:
    """Say whether the setup is sound, and why tensors do not go by the fast carrier."""
    from luna_mp.doctor import examine, format_report

    report = examine(**where)
    _conclude(report, as_json, format_report)


if __name__ == "__main__":
    main()
