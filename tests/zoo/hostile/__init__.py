"""Kernels that must be rejected."""
