"""sdseg: medical image segmentation with latent diffusion in a single reverse step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdseg_cli.core.model.pipeline import SDSegPipeline

__version__ = "0.1.0"
__all__ = ["SDSegPipeline", "__version__"]


def __getattr__(name: str) -> Any:
    # Looked up when asked for: the command line must not import torch to print its help.
    if name == "SDSegPipeline":
        from sdseg_cli.core.model.pipeline import SDSegPipeline

        return SDSegPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
