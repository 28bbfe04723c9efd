"""The package: import, versions, registry, config prefix, wheel."""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from mmengine.config import Config

import mmsoft
from mmsoft import integration
from mmsoft.registry import MODELS

EXTRAS = ("mmdet", "mmseg", "mmpretrain")
DISTRIBUTIONS = ("mmdet", "mmsegmentation", "mmpretrain")


def test_import_is_quiet_and_needs_no_extra_and_no_gpu(run_outside):
    program = f"import sys; sys.modules.update(dict.fromkeys({EXTRAS!r})); import mmsoft"
    process = run_outside("-W", "error", "-c", program, CUDA_VISIBLE_DEVICES="")
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")


def test_import_does_not_import_models_and_mmcv(run_outside):
    program = "import sys, mmsoft; print({'mmcv', 'mmsoft.models'} & set(sys.modules))"
    assert run_outside("-c", program).stdout == "set()\n"


def test_version_is_the_distribution_version():
    assert mmsoft.__version__ == metadata.version("mmsoft")


def fake_versions(monkeypatch, **versions):
    real = metadata.version

    def version(name):
        if name not in versions:
            return real(name)
        if versions[name] is None:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "version", version)


@pytest.mark.parametrize(
    ("name", "found", "wanted"),
    [
        ("torch", "2.0.1+cu117", "torch>=2.1"),
        ("mmengine", "0.10.3", "mmengine>=0.10.4,<1.0"),
        ("mmengine", "1.0.0", "mmengine>=0.10.4,<1.0"),
        ("mmcv", "1.7.2", "mmcv>=2.0.0,<2.2.0"),
        ("mmcv", "2.2.0", "mmcv>=2.0.0,<2.2.0"),
    ],
)
def test_version_out_of_range(monkeypatch, name, found, wanted):
    fake_versions(monkeypatch, **{name: found})
    message = re.escape(f"mmsoft needs {wanted}, but {name} {found} is installed.")
    with pytest.raises(ImportError, match=message):
        integration.check_versions()


@pytest.mark.parametrize("name", ["torch", "mmengine", "mmcv"])
def test_missing_dependency(monkeypatch, name):
    fake_versions(monkeypatch, **{name: None, f"{name}-lite": None})
    with pytest.raises(ImportError, match=rf"mmsoft needs {name}>=.*, but {name} is not installed"):
        integration.check_versions()


@pytest.mark.parametrize("version", ["2.1.0a0+git1", "2.1.2+cu121", "2.13.0+cpu", "3.0.0"])
def test_torch_in_range(monkeypatch, version):
    fake_versions(monkeypatch, torch=version, numpy="1.26.4")
    integration.check_versions()


@pytest.mark.parametrize(
    ("torch", "numpy", "fits"),
    [
        ("2.1.2+cu121", "2.2.6", False),
        ("2.2.2", "2.0.0", False),
        ("2.1.2", "1.26.4", True),
        ("2.3.0a0+git1", "2.2.6", True),
        ("2.1.2", None, True),
    ],
)
def test_numpy_2_needs_torch_2_3(monkeypatch, torch, numpy, fits):
    fake_versions(monkeypatch, torch=torch, numpy=numpy)
    if fits:
        integration.check_versions()
        return
    message = f"torch {torch} works with NumPy 1 alone, but numpy {numpy} is installed: "
    message += "pip install 'numpy<2' 'opencv-python<4.12'"
    with pytest.raises(ImportError, match=f"{re.escape(message)}$"):
        integration.check_versions()


@pytest.mark.parametrize(
    ("torch", "advice"),
    [
        ("2.1.2+cu121", "prebuilt: pip uninstall -y mmcv mmcv-lite; .* && mim install mmcv==2.1.0"),
        ("2.13.0", "compiled, .*MMCV_WITH_OPS=1 pip install --no-build-isolation .*mmcv==2.1.0"),
    ],
)
def test_the_command_for_mmcv_fits_the_torch(monkeypatch, torch, advice):
    versions = {"torch": torch, "numpy": "1.26.4", "mmcv": None, "mmcv-lite": None}
    fake_versions(monkeypatch, mmdet="3.3.0", **versions)
    with pytest.raises(ImportError, match=f"mmcv is not installed.*{advice}"):
        integration.check_versions()
    monkeypatch.setattr(metadata, "files", lambda name: [Path("mmcv/__init__.py")])
    monkeypatch.setitem(sys.modules, "mmdet", object())
    with pytest.raises(ImportError, match=f"mmdet needs mmcv with its compiled .*{advice}"):
        integration.check_libraries()


@pytest.mark.parametrize(("name", "distribution"), zip(EXTRAS, DISTRIBUTIONS))
def test_libraries_are_checked_once_imported(monkeypatch, name, distribution):
    for other in EXTRAS:
        monkeypatch.delitem(sys.modules, other, raising=False)
    fake_versions(monkeypatch, **{distribution: "0.30.0"})
    integration.check_libraries()
    monkeypatch.setitem(sys.modules, name, object())
    with pytest.raises(ImportError, match=rf"mmsoft needs {name}>=.*, but {name} 0.30.0 is inst"):
        integration.check_libraries()


@pytest.mark.parametrize(
    ("torch", "fitting"), [("2.1.2+cu121", "==0.16.2"), ("2.13.0", "==0.28.0"), ("3.0.0", "")]
)
def test_mmpretrain_needs_the_torchvision_of_this_torch(monkeypatch, torch, fitting):
    fake_versions(monkeypatch, mmpretrain="1.2.0", torch=torch, torchvision=None)
    message = f"mmpretrain needs torchvision, .* pip install torchvision{fitting}$"
    with pytest.raises(ImportError, match=message):
        integration.check_library("mmpretrain")


@pytest.mark.parametrize(
    ("torch", "torchvision", "fitting"),
    [
        ("2.1.2+cu121", "0.16.0+cpu", None),
        ("2.13.0", "0.28.1", None),
        ("2.13.0", "0.27.0", "0.28.0"),
        ("2.1.2+cu121", "0.17.2", "0.16.2"),
        ("2.6.0a0+nv24.12", "0.20.0a0", None),  # a pair of one vendor
        ("3.0.0", "0.40.0", None),
    ],
)
def test_torchvision_is_of_this_torch(monkeypatch, torch, torchvision, fitting):
    fake_versions(monkeypatch, mmpretrain="1.2.0", torch=torch, torchvision=torchvision)
    if fitting is None:
        integration.check_library("mmpretrain")
        return
    message = f"torchvision, but {torchvision} is of another torch than {torch}. For this torch: "
    message += f"pip install torchvision=={fitting}"
    with pytest.raises(ImportError, match=f"{re.escape(message)}$"):
        integration.check_library("mmpretrain")


@pytest.mark.parametrize("files", [["mmcv/__init__.py", "mmcv/_ext.so"], ["mmcv.egg-link"], None])
def test_mmcv_with_operators_or_unknown_files_is_accepted(monkeypatch, files):
    monkeypatch.setattr(metadata, "files", lambda name: files)
    assert integration._mmcv_has_operators()


def test_the_extras_are_the_versions_that_are_checked(root, monkeypatch):
    fake_versions(monkeypatch, torch="2.1.2")
    text = (root / "pyproject.toml").read_text()
    for (distribution,), versions in integration.LIBRARIES.values():
        assert f'"{distribution}{versions}"' in text
    assert all(f"{extra} = [" in text for extra in ("det", "seg", "cls"))
    assert text.count('"mmsoft[commands]"') == 3
    for cap in re.findall("'(.*?)'", integration._mmcv_command()):
        assert f'"{cap}"' in text or cap in integration.NUMPY_1


def test_mmcv_lite_is_enough(monkeypatch):
    fake_versions(monkeypatch, mmcv=None, **{"mmcv-lite": "2.1.0"})
    integration.check_versions()


BY_THE_REGISTRY = "from mmengine.registry import MODELS\nMODELS.build(dict(type='mmsoft.SOFT'))\n"
BY_A_CONFIG = (
    "from mmengine.config import Config\n"
    "Config.fromstring('custom_imports = dict(imports=[\\'mmsoft\\'])', '.py')\n"
)


@pytest.mark.parametrize("how", [BY_THE_REGISTRY, BY_A_CONFIG], ids=["registry", "config"])
def test_wrong_version_is_named_when_mmengine_imports_us(run_outside, how):
    # MMEngine drops ImportErrors there, and would say only that SOFT is not registered, or raises
    # one of its own.
    program = (
        "from importlib import metadata\n"
        "real = metadata.version\n"
        "metadata.version = lambda name: '2.0.1' if name == 'torch' else real(name)\n"
    )
    error = run_outside("-c", program + how).stderr
    assert error.rstrip().endswith("mmsoft needs torch>=2.1, but torch 2.0.1 is installed.")


def test_registry_is_a_child_of_mmengines_with_its_locations():
    from mmengine.registry import MODELS as PARENT

    assert MODELS.scope == "mmsoft"
    assert MODELS.parent is PARENT
    assert MODELS._locations == ["mmsoft.models"]


@pytest.mark.parametrize("codebase", EXTRAS)
def test_backbone_builds_by_its_scoped_name(run_outside, codebase):
    program = (
        "from mmengine.registry import init_default_scope\n"
        f"from {codebase}.registry import MODELS\n"
        f"init_default_scope({codebase!r})\n"
        "print(type(MODELS.build(dict(type='mmsoft.SOFTPlusPlus', arch='tiny'))))\n"
    )
    process = run_outside("-c", program)
    assert process.stdout.strip().endswith("SOFTPlusPlus'>"), process.stderr


def test_config_prefix_resolves_after_import(run_outside, tmp_path, root):
    config = next((root / "configs").glob("*/*.py")).relative_to(root / "configs")
    (tmp_path / "config.py").write_text(f"_base_ = 'mmsoft::{config}'\n")
    program = "import mmsoft; from mmengine import Config; print(len(Config.fromfile('config.py')))"
    process = run_outside("-c", program)
    assert process.returncode == 0, process.stderr
    assert int(process.stdout) > 0


# ------------------------------------------------------------------------------------ wheel


def test_wheel_carries_configs_tools_and_model_index(wheel, root):
    tracked = subprocess.run(
        ["git", "ls-files", "mmsoft", "configs", "tools", "model-index.yml"],
        cwd=root,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    dev = "tools/dev/"  # for checkouts
    tracked = [name for name in tracked if (root / name).exists() and not name.startswith(dev)]
    wanted = {name if name.startswith("mmsoft/") else f"mmsoft/.mim/{name}" for name in tracked}
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert wanted <= names
    assert not [name for name in names if dev in name]
    assert not [name for name in names if name.startswith(("tests", "configs", "tools"))]


BUILD_DETECTOR = """
import torch
from mmengine import Config
from mmengine.registry import init_default_scope
from mmdet.registry import MODELS

config = Config.fromfile('detector.py')
init_default_scope(config.default_scope)
detector = MODELS.build(config.model).eval()
with torch.no_grad():
    scores, boxes = detector(torch.zeros(1, 3, 64, 64))
print([tuple(score.shape[2:]) for score in scores])

import mmsoft
print(mmsoft.__file__)
"""


def test_wheel_in_a_fresh_environment_builds_a_detector(fresh_python, run_outside, tmp_path, root):
    shutil.copy(root / "projects/template/configs/retinanet_stock.py", tmp_path / "detector.py")
    process = run_outside("-c", BUILD_DETECTOR, python=fresh_python, PYTHONPATH="")
    assert process.returncode == 0, process.stderr
    shapes, file = process.stdout.splitlines()[-2:]
    assert shapes == "[(8, 8), (4, 4), (2, 2), (1, 1), (1, 1)]"
    assert file.startswith(str(fresh_python.parents[1]))


def test_mim_and_mmengine_find_the_configs_of_the_wheel(fresh_python, run_outside):
    program = (
        "import mmsoft\n"
        "from mim.utils import get_installed_path as of_mim\n"
        "from mmengine.utils import get_installed_path as of_mmengine\n"
        "from mmengine.config.utils import MODULE2PACKAGE\n"
        "print(of_mim('mmsoft'))\n"
        "print(of_mmengine('mmsoft'))\n"
        "print(of_mmengine(MODULE2PACKAGE['mmsoft']))\n"
    )
    process = run_outside("-c", program, python=fresh_python, PYTHONPATH="")
    (package,) = fresh_python.parents[1].glob("lib/python*/site-packages/mmsoft")
    assert (package / ".mim" / "model-index.yml").is_file()
    assert process.stdout.splitlines() == [str(package)] * 3, process.stderr


def test_mim_searches_and_downloads_from_the_wheel(fresh_python, run_outside, tmp_path, root):
    """There are no weights to download: the config is copied, and one line says so."""

    def mim(*arguments):
        done = run_outside("-m", "mim", *arguments, python=fresh_python, PYTHONPATH="")
        assert done.returncode == 0, done.stderr
        return done.stdout

    mim("search", "mmsoft", "--field", "weight", "released_file", "--json", "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["weight"]) == 25
    assert set(found["weight"].values()) == {"none published/"}
    links = [entry["URL"] for entry in found["released_file"].values() if entry]
    assert len(links) == 5
    page = (root / "docs/weights.md").read_text()
    assert all(f"]({link})" in page for link in links)  # Google's names have capital letters

    names = ["retinanet_softpp-t_fpn_1x_coco", "upernet_softpp-t_8xb2-160k_ade20k-512x512"]
    printed = mim("download", "mmsoft", "--config", *names, "--dest", "out")
    assert printed.count("mmsoft publishes no weights; those that the authors released are ") == 1
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [f"{n}.py" for n in names]
    config = Config.fromfile(tmp_path / "out" / f"{names[0]}.py")
    assert config.model.backbone.type == "mmsoft.SOFTPlusPlus"


UNCHANGED = """
import logging, os, sys, warnings
import torch
from mmengine.analysis.complexity_analysis import _DEFAULT_SUPPORTED_FLOP_OPS as counters
from mmengine.hooks import CheckpointHook
from mmengine.runner.checkpoint import CheckpointLoader
from mmengine.registry import HOOKS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS

def state():
    return dict(
        finders=list(sys.meta_path),
        loaders=dict(CheckpointLoader._schemes),
        counters={name: f for name, f in counters.items() if not name.startswith("mmsoft::")},
        hooks=dict(HOOKS.module_dict),
        models=dict(MODELS.module_dict),
        constructors=dict(OPTIM_WRAPPER_CONSTRUCTORS.module_dict),
        warnings=list(warnings.filters),
        logging=(logging.root.level, list(logging.root.handlers)),
        environment=dict(os.environ),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        threads=torch.get_num_threads(),
        dtype=torch.get_default_dtype(),
        matmul=torch.get_float32_matmul_precision(),
        tf32=(torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
    )

import torchvision, mmcv.cnn, mmengine.model, mmengine.optim  # which register something themselves
before = state()
import mmsoft.models, mmsoft.engine, mmsoft.checkpoint, mmsoft.analysis, mmsoft.visualization
import mmsoft.benchmark
after = state()
# The one thing that is added: names of our configs, beside those of the library.
added = [finder for finder in after.pop("finders") if finder not in before["finders"]]
before.pop("finders")
assert [type(finder).__name__ for finder in added] == ["_InferencersKnowOurNames"]
assert HOOKS.get("CheckpointHook") is CheckpointHook
assert HOOKS.get("mmsoft.CheckpointHook") is mmsoft.engine.CheckpointHook
for key in before:
    assert before[key] == after[key], key
import mmsoft.checkpoint.loader
assert state()["loaders"] != before["loaders"]

from mmengine.infer import BaseInferencer
def is_ours(function):
    return hasattr(function, "__code__") and "mmsoft/integration" in function.__code__.co_filename

ours = [name for name, value in vars(BaseInferencer).items() if is_ours(value)]
assert ours == ["_load_model_from_metafile"], ours
assert not set(added) & set(sys.meta_path)
"""


def test_imports_change_nothing_for_other_packages(run_outside):
    """What replaces a part of MMEngine is enabled by name; inferencers learn names in addition."""
    done = run_outside("-W", "ignore", "-c", UNCHANGED)
    assert done.returncode == 0, done.stderr[-2000:]
