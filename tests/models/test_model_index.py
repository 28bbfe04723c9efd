"""MMPreTrain's own ways to a model by name, through our metafile."""

from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.registry import init_default_scope

ROOT = Path(__file__).parents[2]
pytest.importorskip("mmpretrain")

PARAMETERS = dict(tiny=13.07, small=24.11, medium=45.81, large=64.70, huge=87.11)  # million
NAMES = {
    f"{variant}-{arch}_8xb{128 if arch in ('tiny', 'small') else 32}_in1k": (variant, arch)
    for variant in ("soft", "softpp")
    for arch in PARAMETERS
}
TINY = "softpp-tiny_8xb128_in1k"


@pytest.fixture(scope="module", autouse=True)
def model_index():
    from mmpretrain.apis import ModelHub
    from mmpretrain.utils import register_all_modules

    register_all_modules(init_default_scope=False)
    ModelHub._register_mmpretrain_models()
    ModelHub.register_model_index(ROOT / "configs/soft/metafile.yml", config_prefix=ROOT)
    yield
    for name in NAMES:
        del ModelHub._models_dict[name]


@pytest.fixture(autouse=True)
def default_scope():
    """Which every test leaves at MMEngine's."""
    init_default_scope("mmpretrain")


def test_every_classifier_is_listed_by_mmpretrain():
    from mmpretrain import list_models

    assert list_models("soft*") == sorted(NAMES)
    assert set(NAMES) <= set(list_models(task="Image Classification"))


def test_the_whole_index_is_sound():
    """Every entry is in a collection of ours and points to files that exist."""
    modelindex = pytest.importorskip("modelindex")
    index = modelindex.load_model_index.load(str(ROOT / "model-index.yml"))
    index.build_models_with_collections()
    models = {model.name: model for model in index.models}
    assert set(NAMES) < set(models)
    assert len(models) == len(index.models)
    for name, model in models.items():
        assert not model.check_errors, name
        assert (ROOT / model.config).stem == name
        assert (ROOT / model.config).is_file()
    for collection in index.collections:
        assert (ROOT / collection.readme).is_file()


@pytest.mark.cpu
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if arch == "tiny" else [pytest.mark.long])
        for name, (_, arch) in NAMES.items()
    ],
)
def test_get_model_and_inference(name):
    from mmpretrain import get_model, inference_model

    variant, arch = NAMES[name]
    model = get_model(name)
    assert type(model.backbone).__name__ == dict(soft="SOFT", softpp="SOFTPlusPlus")[variant]
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert parameters == pytest.approx(PARAMETERS[arch], abs=0.006)
    norm = model.backbone.stages[0].blocks[0].attn.landmark_norm
    model.init_weights()
    torch.testing.assert_close(norm.weight, torch.full_like(norm.weight, 0.3))  # not reset
    result = inference_model(model, np.zeros((50, 70, 3), np.uint8))
    assert result["pred_scores"].shape == (1000,)


@pytest.mark.cpu
def test_inferencer(tmp_path):
    """By name, with weights from a file: it predicts what the model that saved them does."""
    from mmpretrain import ImageClassificationInferencer, get_model, inference_model

    model, other = get_model(TINY), get_model(TINY)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "weights.pth")
    inferencer = ImageClassificationInferencer(TINY, str(tmp_path / "weights.pth"))
    image = np.random.default_rng(0).integers(0, 255, (80, 60, 3), np.uint8)
    (result,) = inferencer(image, show=False)
    assert 0 <= result["pred_label"] < 1000
    assert result["pred_scores"].sum() == pytest.approx(1, abs=1e-4)
    expected, differing = (inference_model(m, image)["pred_scores"] for m in (model, other))
    np.testing.assert_allclose(result["pred_scores"], expected, rtol=1e-5)
    assert np.abs(differing / expected - 1).max() > 0.1  # other random weights


def test_weights_that_are_not_published_are_one_clear_line():
    from mmpretrain import get_model

    with pytest.raises(FileNotFoundError, match=r"^mmsoft publishes no weights: .*='FILE'; .*$"):
        get_model(TINY, pretrained=True)
