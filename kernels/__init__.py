"""Triton kernels. Imported as ``esper.kernels``, and only where Triton is installed."""
