"""From a config to a model, in every library."""

from importlib import metadata

import pytest
import torch
from mini_models import LIBRARIES, import_library
from mmengine.config import Config

from mmsoft import builder
from mmsoft.builder import build_model, config_parser, read_config
from mmsoft.models import SOFTPlusPlus

PREPROCESSORS = dict(
    mmdet="DetDataPreprocessor", mmseg="SegDataPreProcessor", mmpretrain="ClsDataPreprocessor"
)


@pytest.mark.parametrize("library", LIBRARIES)
def test_whole_model_and_backbone_alone(library):
    import_library(library)
    model = LIBRARIES[library]()
    model.pop("data_preprocessor", None)  # outside the model, as MMEngine's runner allows
    preprocessor = dict(type=PREPROCESSORS[library], mean=[1, 2, 3], std=[1, 1, 1])
    config = Config(dict(default_scope=library, model=model, data_preprocessor=preprocessor))
    built = build_model(config)
    assert built.data_preprocessor.mean.flatten().tolist() == [1, 2, 3]
    assert "data_preprocessor" not in config.model
    alone = build_model(config, "backbone")
    assert type(alone) is type(built.backbone) is SOFTPlusPlus
    assert alone.state_dict().keys() == built.backbone.state_dict().keys()


def test_sync_batch_norm_becomes_batch_norm():
    pytest.importorskip("mmdet")
    backbone = dict(type="ResNet", depth=18, norm_cfg=dict(type="SyncBN"), norm_eval=False)
    model = build_model(Config(dict(default_scope="mmdet", model=dict(x=backbone))), "x")
    assert not any(isinstance(module, torch.nn.SyncBatchNorm) for module in model.modules())
    assert model(torch.zeros(2, 3, 32, 32))[0].shape == (2, 64, 8, 8)


def test_cfg_options_change_the_config(tmp_path):
    (tmp_path / "config.py").write_text("model = dict(depth=1, width=2)\n")
    arguments = [str(tmp_path / "config.py"), "--cfg-options", "model.depth=3"]
    config = read_config(config_parser("What it does.\n\nMore.").parse_args(arguments))
    assert config.model == dict(depth=3, width=2)
    assert "More" not in config_parser("What it does.\n\nMore.").format_help()


@pytest.fixture
def installed(monkeypatch):
    """Pretend that only these distributions are installed, and that every package is there."""
    versions = {}

    def version(name):
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(builder, "find_spec", lambda name: object())
    return versions


@pytest.mark.parametrize(
    ("package", "found", "wanted", "extra"),
    [
        ("onnx", "1.16.2", ">=1.23", "deploy"),
        ("onnxruntime", "1.18.0", ">=1.32", "deploy"),
        ("onnxscript", "0.6.9", ">=0.7", "deploy"),
        ("flask", "2.3.0", ">=3", "explore"),
    ],
)
def test_versions_of_optional_packages_are_checked(installed, package, found, wanted, extra):
    installed[package] = found
    with pytest.raises(ImportError) as caught:
        builder.require(package)
    assert str(caught.value) == (
        f"mmsoft needs {package}{wanted}, but {package} {found} is installed. "
        f"pip install 'mmsoft[{extra}]'"
    )
    installed[package] = f"{wanted[2:]}.0+local"
    builder.require(package)


def test_optional_packages_without_a_version_or_of_another_name(installed):
    builder.require("onnxruntime")  # built by hand
    installed["onnxruntime-gpu"] = "1.18.0"
    with pytest.raises(ImportError, match=r"but onnxruntime 1\.18\.0 is installed"):
        builder.require("onnxruntime")
    builder.require("matplotlib")


def test_versions_that_are_checked_are_those_of_the_extras(root):
    text = (root / "pyproject.toml").read_text()
    assert set(builder._VERSIONS) <= set(builder._EXTRAS)
    for package, (_, versions) in builder._VERSIONS.items():
        assert f'"{package}{versions}"' in text
