"""Kernels that must pass."""
