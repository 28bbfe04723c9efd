#!/usr/bin/env python
"""Draw the training samples of a segmentor: MMSegmentation's `browse_dataset`, fixed.

    python tools/analysis_tools/browse_seg_dataset.py CONFIG --output-dir painted --not-show

takes the options of that script. mmseg 1.2.2 hands its visualizer a picture whose memory order
OpenCV cannot write to, and stops with "Layout of the output array img is incompatible".
"""

import runpy
from pathlib import Path
from typing import Any

import mmseg
import numpy as np
from mmseg.visualization import SegLocalVisualizer

SCRIPT = Path(".mim/tools/analysis_tools/browse_dataset.py")


class ContiguousVisualizer(SegLocalVisualizer):
    """Takes pictures in any memory order."""

    def add_datasample(self, name: str, image: np.ndarray, *args: Any, **kwargs: Any) -> None:
        """Draw a sample, see the base class."""
        super().add_datasample(name, np.ascontiguousarray(image), *args, **kwargs)


def main() -> None:
    """Run mmseg's script with this visualizer."""
    from mmseg.registry import VISUALIZERS

    VISUALIZERS.register_module(name="SegLocalVisualizer", module=ContiguousVisualizer, force=True)
    runpy.run_path(str(Path(mmseg.__file__).parent / SCRIPT), run_name="__main__")


if __name__ == "__main__":
    main()
