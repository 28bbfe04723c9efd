#!/usr/bin/env python
"""Test a config of a library of OpenMMLab: `mim test mmsoft CONFIG --checkpoint FILE`.

The library that the config's `default_scope` names does it, with its own test.py, whose options
these are: `mim test mmdet -h`. Unlike with `mim test mmdet`, `mmsoft::` bases need no import.
"""

from mmsoft.commands import run_of_library

if __name__ == "__main__":
    run_of_library("test.py", __doc__)
