"""Spatial Dependency Networks: the layers, and the networks that are built on them.

    from sdn import ResSDNLayer, SDNLayer, convert

In a checkout of the repository the package is called `lib`.
"""

from .convert import convert
from .nn import ResSDNLayer, SDNLayer

__all__ = ["ResSDNLayer", "SDNLayer", "convert"]
