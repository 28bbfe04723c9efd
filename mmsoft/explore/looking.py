"""What the page asks for: images, captured layers that are kept, and their numbers.

Every answer follows from the question alone, so that visitors cannot disturb each other.
"""

import copy
import math
import secrets
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS
from torch import Tensor, nn

from mmsoft.analysis import (
    BlockState,
    KeptRows,
    ModelImage,
    attention_blocks,
    attention_usage,
    capture,
    choose_block,
    inverse_filter,
    landmark_regions,
    load_image,
    rows_inside,
    softmax_rows,
    spectrum,
)
from mmsoft.analysis.inference import inference_pipeline
from mmsoft.ops import landmark_centres
from mmsoft.ops.checks import SOLVERS

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}
UPLOAD_BYTES = 20_000_000
UPLOAD_PIXELS = 40_000_000
LARGEST_BUDGET = 1_000_000  # landmarks
UPLOADS = 32  # kept at once; the oldest goes
STRIDE = 4  # pixels per token of the first stage
LARGEST_GRID = 131_072  # tokens of the first stage: 2048 x 1024 pixels
COUNT = 128  # of anything that is kept
CAPTURE_BYTES = 3 << 30  # of the layers kept; the largest model and image have 1.3 GiB
KERNEL_BYTES = 2 << 30  # of the kernels kept for rows, with the layers that they are of
FOUND_BYTES = 1 << 28  # of the answers kept
SMALLEST = 1e-6  # eigenvalue shown, relative to the largest
SCORE = 0.3  # predictions below are not shown


class NotFoundError(ValueError):
    """There is no such image."""


@dataclass(frozen=True)
class Settings:
    """What the page can change about a model: the landmark budget and the solver."""

    budget: int | None
    solver: str


@dataclass(frozen=True)
class View:
    """A point of view: an image, the settings, a block, a head and a pixel of the file."""

    image: str
    settings: Settings
    stage: int
    block: int
    head: int
    x: float
    y: float


@dataclass
class Captured:
    """An image under some settings: the layers' inputs and the last features."""

    key: Hashable  # other for another file of the same name
    version: str
    image: ModelImage
    states: dict[tuple[int, int], BlockState]
    features: Tensor


def _bytes(kept: Any) -> int:
    """Of the tensors and arrays in something, without those of modules, which are the model's."""
    if (size := getattr(kept, "nbytes", None)) is not None:
        return size
    if isinstance(kept, nn.Module):
        return 0
    if not isinstance(kept, list | tuple):
        kept = (kept if isinstance(kept, dict) else getattr(kept, "__dict__", {})).values()
    return sum(map(_bytes, kept))


class Kept:
    """Values by key, those used last; one thread makes each, others wait.

    Args:
        count: of the values, at most.
        limit: of their bytes, unless there is only one.
    """

    def __init__(self, count: int, limit: float = math.inf):
        self.count, self.limit = count, limit
        self.values: OrderedDict[Hashable, Any] = OrderedDict()
        self.making: dict[Hashable, Future] = {}
        self.lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The value of a key, made if it is not there. Those who wait get the maker's error too."""
        with self.lock:
            if key in self.values:
                self.values.move_to_end(key)
                return self.values[key]
            another, mine = self.making.get(key), Future[Any]()
            if another is None:
                self.making[key] = mine
        if another is not None:
            return another.result()
        try:
            value = make()
        except BaseException as error:
            with self.lock:
                del self.making[key]
            mine.set_exception(error)
            raise
        with self.lock:
            self._keep(key, value)
            del self.making[key]
        mine.set_result(value)
        return value

    def _keep(self, key: Hashable, value: Any) -> None:
        self.values[key] = value
        total = sum(map(_bytes, self.values.values()))
        while len(self.values) > 1 and (total > self.limit or len(self.values) > self.count):
            total -= _bytes(self.values.popitem(last=False)[1])


class Explorer:
    """A model and a folder of images.

    Args:
        config: of mmdet, mmseg or mmpretrain.
        model: from :func:`mmsoft.analysis.load_model`.
        folder: of the images; nothing else is read.

    Raises:
        ValueError: the folder is none, or the model has no softmax-free attention.
    """

    def __init__(self, config: Config, model: Any, folder: str):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"{folder} is not a folder of images")
        self.config, self.model = config, model
        self.layers = attention_blocks(model)
        layer = next(iter(self.layers.values()))
        self.own = Settings(layer.max_landmarks, layer.solver)
        self.by_content = layer.by_content  # without an inverse, and so a solver
        self.names = _classes(config, model)
        self.uploads: OrderedDict[str, Path] = OrderedDict()
        self.listed: dict[str, Path] = {}
        self.running = threading.RLock()  # one forward pass at a time: settings are the model's
        self.captures = Kept(COUNT, CAPTURE_BYTES)
        self.rows = Kept(COUNT, KERNEL_BYTES)
        self.found = Kept(COUNT, FOUND_BYTES)

    def __enter__(self) -> "Explorer":
        self._temporary = TemporaryDirectory(prefix="mmsoft-explore-")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._temporary.cleanup()

    # ----------------------------------------------------------------------------------- images

    def images(self) -> dict[str, Path]:
        """The folder's images by name; those that a link takes elsewhere are left out."""
        self.listed = {
            path.relative_to(self.folder).as_posix(): path
            for path in sorted(self.folder.rglob("*"))
            if self._is_shown(path)
        }
        return self.listed

    def _is_shown(self, path: Path) -> bool:
        return (
            path.suffix.lower() in SUFFIXES
            and path.is_file()
            and path.resolve().is_relative_to(self.folder.resolve())
        )

    def path(self, name: str) -> Path:
        """The file of an image: one of those listed, or an upload whose secret name is known."""
        if (path := self.uploads.get(name)) is not None:
            return path
        # To list a large folder takes longer than a click may.
        path = self.listed.get(name) or self.images().get(name)
        if path is None or not self._is_shown(path):
            raise NotFoundError(f"there is no image {name!r}")
        return path

    def upload(self, content: bytes) -> str:
        """Take a picture and return the name that only its sender knows.

        Raises:
            ValueError: it is no picture, or too large.
        """
        from PIL import Image

        # The last two for malformed EXIF (Pillow 13).
        unreadable = (OSError, SyntaxError, Image.DecompressionBombError, TypeError, struct.error)
        if len(content) > UPLOAD_BYTES:
            raise ValueError(f"a picture may have {UPLOAD_BYTES // 1_000_000} MB")
        try:
            opened = Image.open(BytesIO(content), formats=("BMP", "JPEG", "PNG", "WEBP"))
            if opened.width * opened.height > UPLOAD_PIXELS:  # before anything is decoded
                raise ValueError(f"a picture may have {UPLOAD_PIXELS // 1_000_000} million pixels")
            opened.load()  # OpenCV makes something of what is cut off
        except unreadable as error:
            raise ValueError("this is not a picture that can be read") from error
        # As the pipelines read a file: upright, 16 bits scaled to 8.
        picture = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
        if picture is None:
            raise ValueError("this is not a picture that can be read")
        name = f"upload-{secrets.token_urlsafe(16)}"
        path = Path(self._temporary.name, f"{name}.png")
        cv2.imwrite(str(path), picture)
        with self.running:
            self.uploads[name] = path
            while len(self.uploads) > UPLOADS:
                self.uploads.popitem(last=False)[1].unlink()
        return name

    # ----------------------------------------------------------------------------------- layers

    def captured(self, name: str, settings: Settings) -> Captured:
        """Run the backbone on an image under some settings, unless that was done just now."""
        path = self.path(name)
        status = path.stat()
        version = f"{status.st_mtime_ns}-{status.st_size}"
        key = (name, version, settings)

        def make() -> Captured:
            return Captured(key, version, *self._capture(path, name, settings))

        return self.captures.get(key, make)

    @torch.no_grad()
    def _capture(
        self, path: Path, name: str, settings: Settings
    ) -> tuple[ModelImage, dict[tuple[int, int], BlockState], Tensor]:
        if settings.solver not in SOLVERS:
            raise ValueError(f"solver must be one of {SOLVERS}, got {settings.solver!r}")
        if settings.budget is not None and not 1 <= settings.budget <= LARGEST_BUDGET:
            raise ValueError(
                f"the budget must be at least 1 and at most {LARGEST_BUDGET}, got {settings.budget}"
            )
        picture = cv2.imread(str(path))
        if picture is not None and picture[..., 0].size > LARGEST_GRID * STRIDE**2:
            # To follow a picture's pixels takes many times what the pipeline alone does.
            data = inference_pipeline(self.config)(dict(img_path=str(path), img_id=0))
            _check_size(name, data["inputs"])
        try:
            image = load_image(self.config, self.model, str(path))
        except ValueError as error:  # where the folder is, is nobody's business
            raise ValueError(str(error).replace(str(path), name)) from error
        _check_size(name, image.inputs)
        with self.running, _Changed(self, settings), capture(self.model) as states:
            features = self.model.backbone(image.inputs.to(_device(self.model)))[-1]
            for state in states.values():
                state.layer = copy.copy(state.layer)  # with these settings, whatever comes next
        return image, dict(states), features

    def state(self, view: View) -> tuple[Captured, BlockState]:
        """The layer that a view looks at.

        Raises:
            ValueError: there is no such layer or head.
        """
        captured = self.captured(view.image, view.settings)
        state = captured.states[choose_block(self.model, view.stage, view.block)]
        if not -1 <= view.head < state.layer.num_heads:
            raise ValueError(
                f"head must be -1 for the mean, or 0 to {state.layer.num_heads - 1}, "
                f"got {view.head}"
            )
        return captured, state

    def row(self, view: View) -> tuple[Captured, BlockState, int, Tensor]:
        """The attention of a pixel: the token that holds it, and its row, ``[heads, N]``."""
        captured, state = self.state(view)
        token = captured.image.token_at(view.x, view.y, state.hw_shape)
        key = (captured.key, view.stage, view.block)
        rows = self.rows.get(key, lambda: KeptRows(state))
        return captured, state, token, rows([token])[0, :, 0].cpu()

    # ------------------------------------------------------------------------------------ answers

    def attention(self, view: View) -> dict[str, Any]:
        """Rows by head, of the layer and of softmax, and what the settings changed."""
        captured, state, token, rows = self.row(view)
        softmax = rows_inside(softmax_rows, state.q, [token], state.mask)[0, :, 0].cpu()
        changed = None
        if view.settings != self.own:
            own = self.row(View(**{**vars(view), "settings": self.own}))[3]
            before = self.captured(view.image, self.own).features
            changed = dict(
                row=float((rows - own).norm() / own.norm().clamp(min=1e-300)),
                features=float((captured.features - before).norm() / before.norm()),
            )
        return dict(
            version=captured.version,
            grid=state.hw_shape,
            token=token,
            extent=captured.image.extent(state.hw_shape),
            landmarks=_used(state),
            rows=rows,
            softmax=softmax,
            changed=changed,
        )

    def usage(self, view: View) -> dict[str, Any]:
        """Effective rank and the rest of :func:`mmsoft.analysis.attention_usage`, head by head."""
        captured, state = self.state(view)
        key = (captured.key, view.stage, view.block)
        found = self.found.get(("usage", *key), lambda: attention_usage(state))
        return {name: value.tolist() for name, value in vars(found).items()}

    def landmarks(self, view: View) -> dict[str, Any]:
        """Regions ``[rows, columns]`` of one head, how well they are explained, and centres."""
        captured, state = self.state(view)
        head = max(view.head, 0)
        layer, landmarks = state.layer, state.landmarks[:, [head]]
        centres = landmark_centres(*state.hw_shape, layer.landmark_stride, layer.max_landmarks)
        if state.present is not None and state.index is not None:  # each head has its own
            chosen = state.present[0, head]
            centres = landmark_centres(*state.hw_shape, layer.landmark_stride)
            centres = centres[state.index[0, head][chosen].cpu()]
            landmarks = landmarks[:, :, chosen]
        regions, strength = landmark_regions(state.q[:, [head]], landmarks)
        return dict(
            grid=state.hw_shape,
            extent=captured.image.extent(state.hw_shape),
            head=head,
            regions=regions[0, 0].unflatten(0, state.hw_shape).cpu(),
            strength=strength[0, 0].unflatten(0, state.hw_shape).cpu(),
            centres=centres,
        )

    def spectrum(self, view: View) -> dict[str, Any]:
        """Eigenvalues of the landmarks' Gram matrices and the filters of their inverses.

        Raises:
            ValueError: nothing is inverted, with landmarks by content.
        """
        _, state = self.state(view)
        if state.layer.by_content:
            raise ValueError("landmarks by content have no inverse, and so no filter")
        landmarks = state.landmarks
        eigenvalues = spectrum(landmarks)[0].cpu()
        x = torch.logspace(0, 1, 400, base=SMALLEST, dtype=torch.float64).flip(0)
        x = x * float(eigenvalues.max()) * 1.05
        filters = inverse_filter(landmarks, x, **state.options)[0].cpu()
        return dict(eigenvalues=eigenvalues, x=x, filters=filters)

    def predictions(self, view: View) -> dict[str, Any]:
        """What the whole model says of the image: boxes, a map of classes, or class scores."""
        key = self.captured(view.image, view.settings).key
        return self.found.get(
            ("predictions", key), lambda: self._predict(view.image, view.settings)
        )

    @torch.no_grad()
    def _predict(self, name: str, settings: Settings) -> dict[str, Any]:
        data = inference_pipeline(self.config)(dict(img_path=str(self.path(name)), img_id=0))
        with self.running, _Changed(self, settings):
            result = self.model.test_step(pseudo_collate([data]))[0]
        if (found := result.get("pred_instances")) is not None:
            kept = found.scores >= SCORE
            return dict(
                kind="boxes",
                threshold=SCORE,
                names=self.names,
                boxes=found.bboxes[kept].cpu(),
                scores=found.scores[kept].cpu(),
                labels=found.labels[kept].cpu(),
            )
        if (found := result.get("pred_sem_seg")) is not None:
            classes = found.data[0].cpu()
            few = int(classes.max()) < 256
            classes = classes.to(torch.uint8 if few else torch.int32)
            return dict(kind="classes", names=self.names, map=classes)
        scores = result.pred_score.cpu()
        best = scores.topk(min(5, len(scores)))
        return dict(kind="scores", names=self.names, labels=best.indices, scores=best.values)

    def about(self) -> dict[str, Any]:
        """What there is to choose from."""
        heads = [
            dict(stage=stage, block=block, heads=layer.num_heads)
            for (stage, block), layer in sorted(self.layers.items())
        ]
        return dict(
            model=type(self.model).__name__,
            backbone=type(self.model.backbone).__name__,
            variant=getattr(self.model.backbone, "variant", "attention"),
            blocks=heads,
            budget=self.own.budget,
            solver=self.own.solver,
            solvers=SOLVERS,
            by_content=self.by_content,
            images=list(self.images()),
            upload_bytes=UPLOAD_BYTES,
        )


class _Changed:
    """The model under some settings, within a ``with`` block and the explorer's lock."""

    def __init__(self, explorer: Explorer, settings: Settings):
        self.layers, self.own, self.settings = explorer.layers, explorer.own, settings

    def __enter__(self) -> None:
        self._set(self.settings)

    def __exit__(self, *error: Any) -> None:
        self._set(self.own)

    def _set(self, settings: Settings) -> None:
        for layer in self.layers.values():
            layer.max_landmarks, layer.solver = settings.budget, settings.solver


def _check_size(name: str, inputs: Tensor) -> None:
    """Refuse an input of the backbone whose layers would fill the memory."""
    height, width = inputs.shape[-2:]
    tokens = -(-height // STRIDE) * -(-width // STRIDE)
    if tokens > LARGEST_GRID:
        raise ValueError(
            f"{name} comes to the model as {height} x {width} pixels, {tokens} tokens of its first "
            f"stage, and the explorer takes at most {LARGEST_GRID}"
        )


def _device(model: Any) -> torch.device:
    return next(model.parameters()).device


def _used(state: BlockState) -> list[int]:
    """Landmarks of each head."""
    if state.present is None:
        return [state.landmarks.shape[2]] * state.landmarks.shape[1]
    return state.present[0].sum(-1).tolist()


def _classes(config: Config, model: Any) -> list[str] | None:
    """Names of the classes: those in the config, in the checkpoint, or of the data set's class."""
    dataset = (config.get("test_dataloader") or {}).get("dataset", {})
    while "metainfo" not in dataset and (inner := dataset.get("dataset", dataset.get("datasets"))):
        dataset = inner[0] if isinstance(inner, list) else inner
    for meta in (
        dataset.get("metainfo"),
        getattr(model, "dataset_meta", None),
        _metainfo(dataset.get("type"), config.get("default_scope")),
    ):
        if isinstance(classes := (meta or {}).get("classes"), list | tuple):
            return [str(name) for name in classes]
    return None


def _metainfo(kind: Any, scope: str | None) -> dict[str, Any] | None:
    """What a data set's class, or the class of that name, says of itself."""
    if isinstance(kind, str):
        with DATASETS.switch_scope_and_registry(scope) as registry:
            try:
                kind = registry.get(kind)
            except RuntimeError:  # nobody knows it
                return None
    return getattr(kind, "METAINFO", None)


def picture_bytes(picture: np.ndarray, side: int | None = None) -> bytes:
    """A PNG of ``[H, W, 3]``, RGB, no side longer than ``side``."""
    from PIL import Image

    image = Image.fromarray(picture)
    if side is not None:
        image.thumbnail((side, side))
    stream = BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()
