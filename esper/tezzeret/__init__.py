"""Tezzeret, the compile forge: blueprint to kernel artifacts."""

from esper.tezzeret.forge import Tezzeret

__all__ = ["Tezzeret"]
