"""Load a model and an image file, and map the pixels of the file to tokens.

For classifiers, detectors and segmentors. The image goes through the config's own test pipeline and
data preprocessor. Where a segmentor tests with a sliding window, the whole image is taken.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import init_default_scope
from mmengine.runner import load_checkpoint
from torch import Tensor

from mmsoft.builder import build_model

from .capture import BlockId, BlockState, capture, choose_block


def load_model(config: Config, checkpoint: str | None = None, device: str = "cpu") -> Any:
    """Build a config's model in evaluation mode.

    Args:
        config: of mmdet, mmseg or mmpretrain.
        checkpoint: an OpenMMLab checkpoint of that config; with None, the config's own ``init_cfg``
            decides, which usually leaves weights random.
        device: where to put it.

    Returns:
        The model. Its ``dataset_meta`` is that of the checkpoint, such as the names of ``classes``,
        or empty.

    Raises:
        ValueError: the checkpoint does not fit.
        OSError: there is no such checkpoint.
    """
    model = build_model(config)
    model.dataset_meta = {}
    if checkpoint is None:
        model.init_weights()
    else:
        try:
            loaded = load_checkpoint(
                model, checkpoint, map_location="cpu", strict=True, logger="silent"
            )
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{checkpoint} does not fit the config: {reason[:300]}") from error
        meta = loaded.get("meta")
        meta = meta.get("dataset_meta") if isinstance(meta, dict) else None
        if isinstance(meta, dict):
            model.dataset_meta = meta
    return model.to(device).eval()


def inference_pipeline(config: Config) -> Compose:
    """The transforms of the config's test images, those that load annotations left out.

    Raises:
        ValueError: the config has no test data set with a pipeline.
    """
    init_default_scope(config.get("default_scope", "mmengine"))
    dataset = config.get("test_dataloader", {}).get("dataset", {})
    while dataset and "pipeline" not in dataset:  # data sets that wrap others
        inner = dataset.get("dataset") or dataset.get("datasets")
        dataset = inner[0] if isinstance(inner, list) else inner
    if not dataset:
        raise ValueError("the config has no test_dataloader.dataset.pipeline")
    return Compose([t for t in dataset.pipeline if "Annotation" not in str(t["type"])])


def _run(pipeline: Compose, path: str) -> dict[str, Any]:
    data = pipeline(dict(img_path=path, img_id=0))
    if data["inputs"].dtype != torch.uint8:
        raise ValueError("the test pipeline must leave normalization to the data preprocessor")
    return data


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Slope and offset of the line through points."""
    slope, offset = np.polyfit(x, y, 1)
    return float(slope), float(offset)


@dataclass
class ModelImage:
    """An image file, and the input of the backbone that results from it.

    Pixels are counted so that the first has its centre at 0. ``x_map`` and ``y_map`` are slope and
    offset from a pixel of the model's input to one of the file.
    """

    picture: np.ndarray  # [height, width, 3], RGB, 8 bits: the file
    inputs: Tensor  # [1, 3, H, W], normalized and padded: what the backbone receives
    shape: tuple[int, int]  # (H, W) of the inputs before padding
    x_map: tuple[float, float]
    y_map: tuple[float, float]

    def _stride(self, hw_shape: tuple[int, int]) -> int:
        """Pixels per token: a power of two, as the grid rounds up.

        The grid is that of the inputs, or of what the backbone leaves of them, without padding.
        """
        for whole in (self.shape, tuple(self.inputs.shape[2:])):
            for stride in (1 << n for n in range(max(whole).bit_length() + 1)):
                if tuple(-(-side // stride) for side in whole) == tuple(hw_shape):
                    return stride
        stride = 1  # a black border that was left out, too
        while -(-self.shape[1] // stride) > hw_shape[1]:
            stride *= 2
        return stride

    def token_at(self, x: float, y: float, hw_shape: tuple[int, int]) -> int:
        """The token whose patch holds a pixel of the file.

        Args:
            x: column of the pixel.
            y: row of the pixel.
            hw_shape: the grid of tokens.

        Raises:
            ValueError: it is outside the image, or the test pipeline cuts it off.
        """
        height, width = self.picture.shape[:2]
        if not (0 <= x <= width - 1 and 0 <= y <= height - 1):
            raise ValueError(
                f"query {x:g},{y:g} is outside the image: x must be in 0..{width - 1} "
                f"and y in 0..{height - 1}"
            )
        column = (x - self.x_map[1]) / self.x_map[0] + 0.5
        row = (y - self.y_map[1]) / self.y_map[0] + 0.5
        if not (-0.5 <= column <= self.shape[1] + 0.5 and -0.5 <= row <= self.shape[0] + 0.5):
            left, right, bottom, top = self.extent()
            raise ValueError(
                f"query {x:g},{y:g} is cut off by the config's test pipeline, which keeps "
                f"x {max(left, 0):.0f}..{right:.0f} and y {max(top, 0):.0f}..{bottom:.0f}"
            )
        stride = self._stride(hw_shape)
        row = min(max(int(row // stride), 0), hw_shape[0] - 1)
        column = min(max(int(column // stride), 0), hw_shape[1] - 1)
        return row * hw_shape[1] + column

    def extent(self, hw_shape: tuple[int, int] | None = None) -> tuple[float, float, float, float]:
        """Left, right, bottom, top edge in pixels of the file, for ``imshow``.

        Of a grid of tokens, each painted as the ``stride x stride`` patch of the input it stands
        for; or of the model's input before padding.
        """
        if hw_shape is None:
            height, width = self.shape
        else:
            stride = self._stride(hw_shape)
            height, width = hw_shape[0] * stride, hw_shape[1] * stride
        (sx, ox), (sy, oy) = self.x_map, self.y_map
        return ox - sx / 2, ox + sx * (width - 0.5), oy + sy * (height - 0.5), oy - sy / 2


def load_image(config: Config, model: Any, path: str) -> ModelImage:
    """Pass an image file through the config's test pipeline and the model's data preprocessor.

    Where a pixel of the file ends up is found by sending a picture of coordinates the same way, so
    that resizing, padding and cropping of any library are followed.

    Args:
        config: of mmdet, mmseg or mmpretrain.
        model: built by :func:`load_model`.
        path: the file.

    Raises:
        ValueError: the file is not an image, or the pipeline normalizes by itself.
    """
    picture = cv2.imread(str(path))
    if picture is None:
        raise ValueError(f"{path} is not an image that can be read")
    pipeline = inference_pipeline(config)
    data = _run(pipeline, str(path))
    height, width = picture.shape[:2]
    coordinates = np.full((height, width, 3), 255, np.uint8)
    coordinates[..., 0] = np.linspace(0, 255, width).round()[None]
    coordinates[..., 1] = np.linspace(0, 255, height).round()[:, None]
    with tempfile.TemporaryDirectory() as folder:
        target = str(Path(folder, "coordinates.png"))
        cv2.imwrite(target, coordinates)
        seen = _run(pipeline, target)["inputs"].double().numpy()
    # Without the borders, which interpolation distorts, and the padding, where the third channel is
    # not 255.
    inside = (seen[2] > 250) & (seen[:2].min(0) > 4) & (seen[:2].max(0) < 251)
    rows, columns = np.nonzero(inside)
    if not rows.size or np.ptp(rows) < 2 or np.ptp(columns) < 2:
        raise ValueError(f"{path} is too small after the config's test pipeline")
    x_map = _line(columns, seen[0][inside] * (width - 1) / 255)
    y_map = _line(rows, seen[1][inside] * (height - 1) / 255)
    with torch.no_grad():
        inputs = model.data_preprocessor(pseudo_collate([data]), False)["inputs"]
    return ModelImage(
        cv2.cvtColor(picture, cv2.COLOR_BGR2RGB),
        inputs,
        (seen.shape[1], seen.shape[2]),
        x_map,
        y_map,
    )


def capture_image(
    config: Config, model: Any, file: str, stage: int, block: int
) -> tuple[ModelImage, BlockId, BlockState]:
    """What one softmax-free attention layer of a loaded model gets from an image file.

    Args:
        config: the model's.
        model: from :func:`load_model`.
        file: of the image.
        stage: from 0.
        block: from 0; -1 for the last.

    Raises:
        ValueError: there is no such layer, or the file is not an image.
    """
    chosen = choose_block(model, stage, block)
    image = load_image(config, model, file)
    with torch.no_grad(), capture(model, chosen) as states:
        model.backbone(image.inputs)
    return image, chosen, states[chosen]
