#!/usr/bin/env python
"""Train a config of MMDetection, MMSegmentation or MMPreTrain: `mim train mmsoft CONFIG`.

The library that the config's `default_scope` names does it, with its own train.py, whose options
these are: `mim train mmdet -h`. Unlike with `mim train mmdet`, `mmsoft::` bases need no import.
"""

from mmsoft.commands import run_of_library

if __name__ == "__main__":
    run_of_library("train.py", __doc__)
