"""Time and memory, ours and of alternatives: ``python -m mmsoft.benchmark --help``."""
