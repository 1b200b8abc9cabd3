"""The suite by which Esper's cost is measured; ``python benchmarks/run.py`` runs it."""
