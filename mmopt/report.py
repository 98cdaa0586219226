"""Text tables and PNG files: what several rooms need to show what they found."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mmopt.spec.files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# ------------------------------------------------------------------------------------------------------------- as text
def number(x: float) -> str:
    """1.32e10 as ``13.2 G``."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= size:
            return f"{x / size:.4g} {prefix}"
    return f"{x:.4g}"


def grouped(lines: list[str], most: int = 6) -> list[str]:
    """The first lines of a long list, and how many more there are."""
    return lines if len(lines) <= most else [*lines[:most], f"... and {len(lines) - most} more"]


def pass_text(
    name: str, contract: str, rewrites: list[str], skipped: list[str], checked: str, seconds: float = 0.0
) -> str:
    """What one pass did, as the fields of a `mmopt.Report` tell it."""
    lines = [f"{name} ({contract}, {checked}): {len(rewrites)} rewrites"]
    lines += [f"  did   {r}" for r in grouped(rewrites)]
    lines += [f"  left  {s}" for s in grouped(skipped)]
    return "\n".join(lines)


def png_figure(path: str | Path, size: tuple[float, float]) -> Figure:
    """An empty figure of so many inches, to be saved under a name.

    Raises ImportError without matplotlib, ValueError for a name that does not end in .png.
    """
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"{path}: expected the name of a PNG file")
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as e:
        raise ImportError("a plot needs matplotlib: pip install 'mmopt[plot]'") from e
    return Figure(figsize=size, layout="constrained")


def save_png(figure: Figure, path: str | Path) -> None:
    """Write a figure, whole or not at all."""
    write_whole(path, lambda partial: figure.savefig(partial, format="png", dpi=120))
