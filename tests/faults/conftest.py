"""How much test_fuzz.py tries: in the suite, the same examples every time; and in `make fuzz`."""

from hypothesis import settings

settings.register_profile("quick", max_examples=60, derandomize=True, database=None)
settings.register_profile("fuzz", max_examples=200)
