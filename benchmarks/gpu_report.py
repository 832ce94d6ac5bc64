"""Where figures of a GPU come from, what limits they keep, and how they are shown."""

from __future__ import annotations

import os
import platform
import subprocess
from typing import Any

import torch

__all__ = ("limits", "markdown", "where")


def where() -> dict[str, str]:
    """What the figures come from."""
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")[0]
    return {
        "card": torch.cuda.get_device_name(),
        "driver": driver,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": os.environ.get("LUNA_MP_COMMIT", "unknown"),
    }


def limits(found: dict[str, Any]) -> dict[str, bool]:
    """Which limits hold, in words."""
    crossings, decodes, together = found["crossing"], found["decode"], found["eight clients"]
    return {
        "crossing returned ≤ 0.2 ms": all(row["returned"] <= 0.2 for row in crossings.values()),
        "cuda ≤ 0.25 ms over the floor": all(
            row["cuda - floor"] <= 0.25 for row in decodes.values()
        ),
        "floor ≤ 1 ms over in process": all(
            row["floor - in process"] <= 1 for row in decodes.values()
        ),
        "cpu ≤ 1.02 × in process with the copy, from 512² on": all(
            row["cpu / in process"] <= 1.02 for row in list(decodes.values())[1:]
        ),
        "throughput ≥ 0.98": together["throughput against in process"] >= 0.98,
        "peak ≤ 1.1 × one decode + results": together["peak against 1.1 × one and results held"]
        <= 1,
    }


def markdown(report: dict[str, Any]) -> str:
    """All of it as tables and lists, with the limits last."""
    lines = [
        ", ".join(f"{name} {value}" for name, value in report["where"].items()),
        "",
        "A decode's differences and ratios are medians of neighbours in time, not of the columns.",
        "",
    ]
    for title in ("decode", "floor", "crossing", "input"):
        table = report[title]
        columns = list(next(iter(table.values())))
        lines += [f"| {title}, ms | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        lines += [
            f"| {name} | {' | '.join(f'{row[column]:.3f}' for column in columns)} |"
            for name, row in table.items()
        ]
        lines.append("")
    figures = report["calls"] | report["eight clients"]
    lines += [f"- {name}: {value}" for name, value in figures.items()]
    lines.append("")
    lines += [f"- {'holds' if ok else 'FAILS'}: {text}" for text, ok in report["limits"].items()]
    return "\n".join(lines) + "\n"
