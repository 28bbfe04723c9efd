"""MMPreTrain's own ways to a model by name, through our model index."""

from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
NAMES = ["soft-tiny_8xb128_in1k", "softpp-tiny_8xb128_in1k"]


@pytest.fixture(scope="module", autouse=True)
def model_index():
    from mmpretrain.apis import ModelHub
    from mmpretrain.utils import register_all_modules

    register_all_modules()  # other tests leave the scopes of other libraries behind
    ModelHub._register_mmpretrain_models()
    ModelHub.register_model_index(ROOT / "model-index.yml", config_prefix=ROOT)
    yield
    for name in NAMES:
        del ModelHub._models_dict[name]


@pytest.mark.parametrize("name", NAMES)
def test_get_model_and_inference(name):
    from mmpretrain import get_model, inference_model, list_models

    assert name in list_models("soft*")
    model = get_model(name)
    assert type(model.backbone).__name__ == {"soft": "SOFT"}.get(
        name[: name.index("-")], "SOFTPlusPlus"
    )
    norm = model.backbone.stages[0].blocks[0].attn.landmark_norm
    model.init_weights()
    torch.testing.assert_close(norm.weight, torch.full_like(norm.weight, 0.3))  # not reset
    result = inference_model(model, np.zeros((50, 70, 3), np.uint8))
    assert result["pred_scores"].shape == (1000,)


def test_inferencer(tmp_path):
    from mmpretrain import ImageClassificationInferencer, get_model

    model = get_model(NAMES[1])
    torch.save({"state_dict": model.state_dict()}, tmp_path / "weights.pth")
    inferencer = ImageClassificationInferencer(NAMES[1], str(tmp_path / "weights.pth"))
    image = np.random.default_rng(0).integers(0, 255, (80, 60, 3), np.uint8)
    (result,) = inferencer(image, show=False)
    assert 0 <= result["pred_label"] < 1000
    assert result["pred_scores"].sum() == pytest.approx(1, abs=1e-4)
