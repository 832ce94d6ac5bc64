"""The directory that only this user can enter: the key, the sockets, and who serves where."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import stat
import tempfile
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import platformdirs

from luna_mp.config import DEFAULT_PORTS, Role
from luna_mp.errors import BadConfig, Unavailable
from luna_mp.processes import is_running
from luna_mp.wire.stream import is_answered

__all__ = (
    "Record",
    "authkey",
    "find",
    "parse_key",
    "read_records",
    "remove_record",
    "runtime_dir",
    "socket_path",
    "write_record",
)

KEY_BYTES = 32
SOCKET_PATH_BYTES = 107  # sockaddr_un's limit on Linux, less the final zero


@dataclass(frozen=True)
class Record:
    """One running service, as it wrote itself down."""

    role: Role
    pid: int
    #: as `processes.born` says it
    born: float
    #: path of the local socket, or "" where there are none
    socket: str
    host: str
    port: int
    started: float

    @property
    def address(self) -> str | tuple[str, int]:
        """Where a client of this machine connects."""
        return self.socket or (self.host, self.port)

    def is_running(self) -> bool:
        # One of another PID namespace has another pid here, and is there all the same.
        return is_running(self.pid, self.born) or bool(self.socket) and is_answered(self.socket)


def runtime_dir(explicit: str = "") -> Path:
    """The directory, made if need be: `explicit`, else LUNA_MP_RUNTIME_DIR, else the system's.

    Raises `BadConfig` where other users could enter it.
    """
    named = explicit or os.environ.get("LUNA_MP_RUNTIME_DIR", "")
    path = Path(named or _usual_dir()).absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    except OSError as exc:
        raise BadConfig(
            f"the runtime directory {path} cannot be made ({exc.strerror}): "
            "name another one with LUNA_MP_RUNTIME_DIR"
        ) from exc
    if hasattr(os, "getuid"):
        _check_private(path, found, "chmod 700")
    if not stat.S_ISDIR(found.st_mode):
        raise BadConfig(f"the runtime directory {path} is not a directory of its own")
    return path


def _usual_dir() -> str:
    with warnings.catch_warnings():
        # Without XDG_RUNTIME_DIR it is a directory of the user's in the temporary one: good enough.
        warnings.simplefilter("ignore")
        return platformdirs.user_runtime_dir("luna-mp")


def authkey(explicit_file: str, directory: Path) -> bytes:
    """The key: of the file named, else of LUNA_MP_AUTHKEY, else of the directory, made once.

    Raises `BadConfig` for a key that is too short, or that others can read.
    """
    if explicit_file:
        return _read_key(Path(explicit_file))
    if text := os.environ.get("LUNA_MP_AUTHKEY"):
        return parse_key(text)
    path = directory / "authkey"
    if not path.exists():
        _make_key(path)
    return _read_key(path)


def parse_key(key: bytes | str) -> bytes:
    """A key from bytes, or from text: 64 or more hexadecimal digits, or any 32 characters."""
    if isinstance(key, str):
        key = key.strip()
        with contextlib.suppress(ValueError):
            if len(decoded := bytes.fromhex(key)) >= KEY_BYTES:
                return decoded
        key = key.encode()
    if len(key) < KEY_BYTES:
        raise BadConfig(
            f"the authkey (authkey=, LUNA_MP_AUTHKEY or the authkey file) has {len(key)} bytes; it "
            f"takes at least {KEY_BYTES}: copy it from the services' runtime directory"
        )
    return key


def socket_path(directory: Path, role: Role, port: int) -> Path:
    """Where a service's local socket lies. Raises `BadConfig` where that is too long."""
    path = directory / f"{role}.{port}.sock"
    if len(os.fsencode(path)) > SOCKET_PATH_BYTES:
        raise BadConfig(
            f"the socket's path {path} has {len(os.fsencode(path))} bytes and the limit is "
            f"{SOCKET_PATH_BYTES}: name a shorter directory with LUNA_MP_RUNTIME_DIR"
        )
    return path


def write_record(directory: Path, record: Record) -> None:
    """Write down a running service, for `find`."""
    _write(_record_path(directory, record.role, record.port), json.dumps(asdict(record)).encode())


def remove_record(directory: Path, role: Role, port: int) -> None:
    _record_path(directory, role, port).unlink(missing_ok=True)


def read_records(directory: Path, role: Role) -> list[Record]:
    """The services that run; what killed ones left behind is removed."""
    running = []
    for path in sorted(directory.glob(f"{role}.*.json")):
        record = _read_record(path)
        if record is None:
            continue
        if record.is_running():
            running.append(record)
        else:
            path.unlink(missing_ok=True)
    return running


def find(directory: Path, role: Role) -> Record:
    """The service at the default port, else the only one. Raises `Unavailable`."""
    records = read_records(directory, role)
    default = [record for record in records if record.port == DEFAULT_PORTS[role]]
    if len(default or records) == 1:
        return (default or records)[0]
    if not records:
        raise Unavailable(
            f"no {role} service of this user runs on this machine (looked in {directory}): "
            "start one with `luna-mp serve`, or name an address"
        )
    addresses = ", ".join(str(record.socket or record.port) for record in records)
    raise Unavailable(f"several {role} services run, name one with {role}=…: {addresses}")


def _record_path(directory: Path, role: Role, port: int) -> Path:
    return directory / f"{role}.{port}.json"


def _read_record(path: Path) -> Record | None:
    try:
        return Record(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        # Removed meanwhile, of another version, or out of descriptors here: it is not known to be
        # dead, so its file stays.
        return None


def _write(path: Path, data: bytes) -> None:
    """Write whole or not at all, readable by this user only (mkstemp's mode is 0600)."""
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=".")
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
        os.replace(name, path)
    except OSError as exc:
        os.unlink(name)
        raise BadConfig(f"{path} cannot be written: {exc.strerror}") from exc


def _make_key(path: Path) -> None:
    """Make the key; of two processes that try at once, one wins and both use its key."""
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=".")
    try:
        with os.fdopen(fd, "w") as file:
            file.write(secrets.token_hex(KEY_BYTES))
        with contextlib.suppress(FileExistsError):
            os.link(name, path)
    except OSError as exc:
        raise BadConfig(f"the key {path} cannot be written: {exc.strerror}") from exc
    finally:
        os.unlink(name)


def _read_key(path: Path) -> bytes:
    try:
        if hasattr(os, "getuid"):
            _check_private(path, path.stat(), "chmod 600")
        data = path.read_bytes()
        return parse_key(data.decode() if data.isascii() else data)
    except OSError as exc:
        raise BadConfig(f"the key {path} cannot be read: {exc.strerror}") from exc


def _check_private(path: Path, found: os.stat_result, cure: str) -> None:
    if found.st_uid != os.getuid():
        raise BadConfig(f"{path} belongs to user {found.st_uid}, not to {os.getuid()}")
    if stat.S_IMODE(found.st_mode) & 0o077 and not stat.S_ISLNK(found.st_mode):
        raise BadConfig(f"{path} can be used by others: type `{cure} {path}`")
