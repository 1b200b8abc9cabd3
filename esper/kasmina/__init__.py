"""Kasmina, the execution layer: seeds on host layers, their lifecycle and the kernel cache."""
