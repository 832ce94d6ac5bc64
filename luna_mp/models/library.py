"""The models that a service holds: its own, and those that clients asked for."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from luna_mp.errors import BadModel
from luna_mp.models.base import Model, ModelSpec

__all__ = ("Library",)

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=Model)
# Files, sizes and times of change, and the options: a file that is written anew is a new model.
Key = tuple[Any, ...]

MAX_FILES = 1000  # of one model's folder
OPTIONS = ("type", "dtype", "source")


class Library(Generic[M]):
    """Loads each model once. The default one stays; of the others the least used one goes first.

    Callers hold the service's lock. `default` may be None: clients then name what they want.
    """

    def __init__(
        self,
        load: Callable[[ModelSpec], M],
        default: ModelSpec | None,
        allowed: Sequence[str],
        most: int,
        device: torch.device,
    ) -> None:
        self.device = device
        self._load = load
        self._allowed = [Path(folder).resolve() for folder in allowed]
        self._most = most
        self._spec = default and replace(
            default, paths=tuple(str(Path(p).resolve()) for p in default.paths)
        )
        self._default_key = _key(self._spec) if self._spec else ()
        self.default = load(default) if default else None
        self._others: OrderedDict[Key, M] = OrderedDict()

    def __repr__(self) -> str:
        return f"<Library default and {len(self._others)} of {self._most} others>"

    def get(self, wanted: dict[str, Any] | None) -> tuple[Key, M]:
        """The model for what a client sent (None: the default), loaded if need be.

        Raises `BadModel` for a path outside the allowed directories, or with no model in it.
        """
        spec = self.spec(wanted)
        if self.default is not None and spec == self._spec:
            return self._default_key, self.default
        key = _key(spec)
        if key not in self._others:
            while len(self._others) >= self._most:
                old, _ = self._others.popitem(last=False)
                logger.info("unloaded %s to make room", old)
            self._others[key] = self._load(spec)
            logger.info("loaded %s", ", ".join(spec.paths))
        self._others.move_to_end(key)
        return key, self._others[key]

    def spec(self, wanted: dict[str, Any] | None) -> ModelSpec:
        """What a client means, with paths resolved. Raises `BadModel`."""
        if wanted is not None:
            return self._checked(wanted)
        if self._spec is None:
            raise BadModel(
                "this service has no model of its own: name a file, in ComfyUI by a loader, or "
                "start it with --clip-model or --vae-model"
            )
        return self._spec

    def unload(self, wanted: dict[str, Any]) -> bool:
        """Let go of a model that a client asked for; False when it was not loaded."""
        paths = self._checked(wanted).paths
        keys = [key for key in self._others if tuple(entry[0] for entry in key[0]) == paths]
        for key in keys:
            del self._others[key]
        return bool(keys)

    def to_data(self) -> list[dict[str, Any]]:
        """For `status`: paths, dtype and bytes of each model."""
        names = [[entry[0] for entry in key[0]] for key in self._others]
        models = list(self._others.values())
        if self._spec and self.default is not None:
            names.insert(0, list(self._spec.paths) or ["demo"])
            models.insert(0, self.default)
        return [
            {"paths": paths, "dtype": str(model.dtype), "bytes": model.weight_bytes()}
            for paths, model in zip(names, models, strict=True)
        ]

    def _checked(self, wanted: dict[str, Any]) -> ModelSpec:
        paths = wanted.get("paths")
        options = {name: wanted.get(name, "auto") for name in OPTIONS}
        if not isinstance(paths, list) or not all(isinstance(p, str) for p in paths) or not paths:
            raise BadModel(f"a model is named by a list of paths, not by {paths!r:.100}")
        if not all(isinstance(value, str) for value in options.values()):
            raise BadModel(f"a model's type, dtype and source are text, not {options}")
        return replace(ModelSpec(**options), paths=tuple(map(self._resolved, paths)))

    def _resolved(self, path: str) -> str:
        own = self._spec.paths if self._spec else ()
        if path in own:
            return path
        try:
            resolved = Path(path).resolve(strict=True)
        except (OSError, ValueError, RuntimeError) as exc:
            raise BadModel(f"{path!r:.300} is not there on the service's machine: {exc}") from exc
        if str(resolved) not in own and not any(resolved.is_relative_to(f) for f in self._allowed):
            allowed = ", ".join(map(str, self._allowed)) or "none: start it with --allow DIR"
            raise BadModel(
                f"{path!r:.300} is outside the directories that this service loads from ({allowed})"
            )
        return str(resolved)


def _key(spec: ModelSpec) -> Key:
    found = tuple((path, *_files(Path(path))) for path in spec.paths)
    return (found, *(getattr(spec, name) for name in OPTIONS))


def _files(path: Path) -> list[tuple[str, int, int]]:
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    if len(files) > MAX_FILES:
        raise BadModel(f"{path} holds {len(files)} files; a model's folder has at most {MAX_FILES}")
    return [(str(p), (stat := p.stat()).st_size, stat.st_mtime_ns) for p in files]
