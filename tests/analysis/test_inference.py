"""From an image file to tokens: resizing, padding and cropping are followed."""

import cv2
import numpy as np
import pytest
import torch
from mini_models import LIBRARIES
from mmengine.config import Config

from mmsoft.analysis import load_image, load_model

HEIGHT, WIDTH = 60, 100
RESIZED = {
    "mmdet": dict(type="Resize", scale=(160, 128), keep_ratio=True),  # 160 x 96
    "mmseg": dict(type="Resize", scale=(128, 96), keep_ratio=False),
    "mmpretrain": dict(type="ResizeEdge", scale=96, edge="short", backend="pillow"),
}
PACK = dict(mmdet="PackDetInputs", mmseg="PackSegInputs", mmpretrain="PackInputs")
SHAPES = dict(mmdet=(96, 160), mmseg=(96, 128), mmpretrain=(64, 64))


def config_of(library, **wrapper):
    pipeline = [dict(type="LoadImageFromFile"), RESIZED[library]]
    if library == "mmpretrain":
        pipeline.append(dict(type="CenterCrop", crop_size=64))
    else:
        pipeline.append(dict(type="LoadAnnotations"))  # there are none to load
    if library == "mmdet":
        pack = dict(type=PACK[library], meta_keys=("img_path", "img_shape"))
    else:
        pack = dict(type=PACK[library])
    pipeline.append(pack)
    dataset = dict(type="Any", pipeline=pipeline)
    if wrapper:
        dataset = dict(type="RepeatDataset", dataset=dataset)
    model = LIBRARIES[library]()
    if library == "mmdet":
        model["data_preprocessor"].update(pad_size_divisor=64)
    return Config(dict(default_scope=library, model=model, test_dataloader=dict(dataset=dataset)))


@pytest.fixture
def path(tmp_path):
    """An image that is white at pixel (60, 30) and its neighbours, elsewhere black."""
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    image[28:33, 58:63] = 255
    path = tmp_path / "image.png"
    cv2.imwrite(str(path), image)
    return path


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_pixel_of_the_file_is_found_among_the_tokens(library, path):
    pytest.importorskip(library)
    config = config_of(library)
    model = load_model(config)
    image = load_image(config, model, path)
    assert image.picture.shape == (HEIGHT, WIDTH, 3)
    assert image.shape == SHAPES[library]
    # The maps give the position of the brightest spot of the backbone's input.
    spot = image.inputs[0].sum(0)
    rows, columns = torch.nonzero(spot > spot.max() * 0.5 + spot.min() * 0.5, as_tuple=True)
    x = columns.double().mean().item() * image.x_map[0] + image.x_map[1]
    y = rows.double().mean().item() * image.y_map[0] + image.y_map[1]
    assert (x, y) == pytest.approx((60, 30), abs=0.6)
    grid = (image.inputs.shape[2] // 8, image.inputs.shape[3] // 8)
    token = image.token_at(60, 30, grid)
    assert token == int(rows.double().mean() // 8) * grid[1] + int(columns.double().mean() // 8)
    # A backbone may leave padding out.
    part = tuple(-(-side // 8) for side in image.shape)
    where = image.token_at(60, 30, part)
    assert divmod(where, part[1]) == divmod(token, grid[1])
    # Without padding the grid covers the model's input exactly.
    if library != "mmdet":
        assert image.extent(grid) == pytest.approx(image.extent())
    left, right, bottom, top = image.extent()
    if library == "mmpretrain":  # 96 x 160 resized, the middle 64 x 64 of it
        assert (left, right) == pytest.approx((29.5, 69.5), abs=0.5)
        assert (top, bottom) == pytest.approx((9.5, 49.5), abs=0.5)
    else:
        assert (left, right) == pytest.approx((-0.5, WIDTH - 0.5), abs=0.3)
        assert (top, bottom) == pytest.approx((-0.5, HEIGHT - 0.5), abs=0.3)


def test_corners_and_pixels_outside(path):
    pytest.importorskip("mmpretrain")
    pytest.importorskip("mmseg")
    config = config_of("mmseg", wrapped=True)
    image = load_image(config, load_model(config), path)
    grid = (24, 32)
    assert image.token_at(0, 0, grid) == 0
    assert image.token_at(WIDTH - 1, HEIGHT - 1, grid) == 24 * 32 - 1
    for x, y in ((WIDTH, 0), (-1, 0), (0, HEIGHT)):
        with pytest.raises(ValueError, match=r"outside the image: x must be in 0\.\.99 .* 0\.\.59"):
            image.token_at(x, y, grid)
    config = config_of("mmpretrain")
    image = load_image(config, load_model(config), path)
    with pytest.raises(ValueError, match=r"cut off by .* test pipeline, which keeps x (29|30)\.\."):
        image.token_at(5, 30, (16, 16))


def test_invalid_files_and_configs(tmp_path, path):
    pytest.importorskip("mmseg")
    config = config_of("mmseg")
    model = load_model(config)
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(ValueError, match=r"text\.jpg is not an image that can be read"):
        load_image(config, model, tmp_path / "text.jpg")
    with pytest.raises(ValueError, match="the config has no test_dataloader"):
        load_image(Config(dict(default_scope="mmseg")), model, path)
    normalized = config_of("mmseg")
    normalized.test_dataloader.dataset.pipeline.insert(
        2, dict(type="Normalize", mean=[0.0] * 3, std=[1.0] * 3)
    )
    with pytest.raises(ValueError, match="must leave normalization to the data preprocessor"):
        load_image(normalized, model, path)


@pytest.mark.parametrize("size", [(1, 60), (60, 1), (1, 1)], ids=str)
def test_images_too_small_to_tell_their_pixels_apart(tmp_path, size):
    pytest.importorskip("mmseg")
    config = config_of("mmseg")
    cv2.imwrite(str(tmp_path / "line.png"), np.full((*size, 3), 128, np.uint8))
    with pytest.raises(ValueError, match=r"line\.png is too small after"):
        load_image(config, load_model(config), tmp_path / "line.png")


def test_checkpoints_load_or_do_not_fit(tmp_path):
    pytest.importorskip("mmpretrain")
    config = config_of("mmpretrain")
    model = load_model(config)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / "model.pth")
    again = load_model(config, str(tmp_path / "model.pth"))
    assert not again.training
    for name, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    assert again.dataset_meta == {}
    for meta, expected in ((dict(dataset_meta=dict(classes=["cat"])), ["cat"]), (["?"], None)):
        torch.save(dict(state_dict=model.state_dict(), meta=meta), tmp_path / "meta.pth")
        again = load_model(config, str(tmp_path / "meta.pth"))
        assert again.dataset_meta.get("classes") == expected
    weights = {k: v for k, v in model.state_dict().items() if "head" not in k}
    torch.save(dict(state_dict=weights), tmp_path / "part.pth")
    with pytest.raises(ValueError, match=r"part\.pth does not fit the config: .*head") as caught:
        load_model(config, str(tmp_path / "part.pth"))
    assert "\n" not in str(caught.value)
    with pytest.raises(OSError, match=r"nowhere\.pth"):
        load_model(config, str(tmp_path / "nowhere.pth"))
