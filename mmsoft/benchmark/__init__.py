"""Time and memory beside what users would pick instead: ``python -m mmsoft.benchmark --help``."""
