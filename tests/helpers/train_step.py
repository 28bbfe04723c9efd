"""One training step and one prediction of each config given, each in a fresh process.

    python train_step.py LIBRARY CONFIG...
    python train_step.py --build LIBRARY CONFIG...

The library is imported once and the process forks for every config, so that none is affected by
another, and mmsoft is first imported by the config. One line of JSON per config: its name,
and what is wrong or nothing.

With `--build`, no step, but in a second for the largest: pipelines, hooks, one pass through
backbone, neck and heads with arbitrary weights, the `settings` of the optimizer: learning rate
and weight decay of every parameter, and the names of those of normalization layers, `norms`.
"""

import json
import os
import sys
import traceback

import torch
from loading import look_up_once
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import HOOKS, MODELS, TRANSFORMS, init_default_scope

SIZE = 128
NORMS = (torch.nn.modules.batchnorm._BatchNorm, torch.nn.GroupNorm, torch.nn.LayerNorm)


def mmdet_batch(config):
    from mmdet.testing import demo_mm_inputs

    head = config.model.get("bbox_head") or config.model.roi_head.bbox_head
    classes = head.num_classes + 1  # its labels begin at 1
    batch = demo_mm_inputs(2, [(3, SIZE, SIZE)] * 2, num_classes=classes, with_mask=True)
    for sample in batch["data_samples"]:
        sample.gt_instances.labels -= 1
    return batch


def mmseg_batch(config):
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    config.model.data_preprocessor.size = (SIZE, SIZE)  # to which it pads
    shape, classes = (SIZE, SIZE), config.model.decode_head.num_classes
    samples = [SegDataSample(metainfo=dict(img_shape=shape, ori_shape=shape)) for _ in range(2)]
    for sample in samples:
        sample.gt_sem_seg = PixelData(data=torch.randint(classes, (1, *shape)))
    return images(), samples


def mmpretrain_batch(config):
    from mmpretrain.structures import DataSample

    return images(), [DataSample().set_gt_label(i) for i in range(2)]


def images():
    return list(torch.randint(256, (2, 3, SIZE, SIZE), dtype=torch.uint8))


def check_prediction(library, result):
    """Of one image."""
    if library == "mmdet":
        instances = result.pred_instances
        assert len(instances) > 0
        assert torch.isfinite(instances.bboxes).all()
        assert ((instances.scores >= 0) & (instances.scores <= 1)).all()
        assert "masks" not in instances or instances.masks.shape[1:] == (SIZE, SIZE)
    elif library == "mmseg":
        assert torch.isfinite(result.seg_logits.data).all()
        assert result.pred_sem_seg.data.shape == (1, SIZE, SIZE)
    else:
        assert abs(float(result.pred_score.sum()) - 1) < 1e-4


def read(library, path):
    """The config, as the Runner has it when it builds the model."""
    torch.manual_seed(0)
    config = Config.fromfile(path)
    assert config.default_scope == library, config.default_scope
    init_default_scope(library)
    if "data_preprocessor" in config:
        config.model.setdefault("data_preprocessor", config.data_preprocessor)
    if config.optim_wrapper.get("type") == "AmpOptimWrapper":
        config.optim_wrapper.type = "OptimWrapper"  # MMEngine asserts a GPU for it
    return config


def step(library, path):
    """Raise, or give a list of what is wrong."""
    config = read(library, path)
    batch = {"mmdet": mmdet_batch, "mmseg": mmseg_batch, "mmpretrain": mmpretrain_batch}[library]
    data = batch(config)
    if not isinstance(data, dict):
        data = dict(zip(("inputs", "data_samples"), data))
    if library == "mmdet":
        test_cfg = config.model.test_cfg
        test_cfg.get("rcnn", test_cfg).score_thr = 0  # the scores of an untrained detector are low
        if "rpn" in test_cfg:
            test_cfg.rpn.max_per_img = 64  # RoIAlign of 1000 takes seconds on a CPU
            test_cfg.rcnn.max_per_img = 10
    if "rcnn" in (config.model.get("train_cfg") or {}):
        config.model.train_cfg.rcnn.sampler.num = 64  # 512 takes seconds on a CPU
    model = revert_sync_batchnorm(MODELS.build(config.model))
    model.init_weights()

    model.train()
    for module in model.modules():
        if type(module).__name__ == "DropPath":
            module.drop_prob = 0  # so that no block is left out by chance
        if type(module).__name__ == "BasicBlock":
            torch.nn.init.ones_(module.norm2.weight)  # 0 at first, as are all gradients before it
    losses = model(**model.data_preprocessor(data, training=True), mode="loss")
    loss, _ = model.parse_losses(losses)
    loss.backward()
    problems = []
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # Of released landmarks, where they are by content: in the graph, with a gradient of 0.
    by_content = [n for n, m in model.named_modules() if getattr(m, "by_content", False)]
    idle = tuple(f"{n}.landmark_{part}." for n in by_content for part in ("conv", "norm"))
    for name, parameter in trained.items():
        if parameter.grad is None:
            problems.append(f"{name} is unused")
        elif not torch.isfinite(parameter.grad).all():
            problems.append(f"the gradient of {name} is not finite")
        elif not parameter.grad.any() and not name.startswith(idle):
            problems.append(f"the gradient of {name} is zero")

    wrapper = build_optim_wrapper(model, config.optim_wrapper)
    updated = [p for group in wrapper.optimizer.param_groups for p in group["params"]]
    # With paramwise_cfg, MMEngine leaves out those that are frozen.
    wanted = (trained.values(), model.parameters())
    if sorted(map(id, updated)) not in [sorted(map(id, parameters)) for parameters in wanted]:
        problems.append("the optimizer does not have every parameter once")

    model.eval()
    with torch.no_grad():
        results = model.val_step(data)
    assert len(results) == 2
    for result in results:
        check_prediction(library, result)
    return dict(problems=problems)


def outputs(library, model, features):
    """Outputs of the heads: tensors in lists and tuples."""
    if library == "mmpretrain":
        return model.head(features)
    if library == "mmseg":
        return [model.decode_head(features), model.auxiliary_head(features)]
    if hasattr(model, "bbox_head"):
        return model.bbox_head(features)
    boxes = model.roi_head._bbox_forward(features, torch.tensor([[0.0, 0, 0, SIZE, SIZE]]))
    masks = model.roi_head._mask_forward(features, torch.tensor([[0.0, 0, 0, SIZE, SIZE]]))
    return [model.rpn_head(features), *boxes.values(), *masks.values()]


def is_finite(out):
    if isinstance(out, torch.Tensor):
        return bool(torch.isfinite(out).all())
    return all(map(is_finite, out))


def build(library, path):
    """Raise, or give the optimizer's settings."""
    config = read(library, path)
    for name in ("train", "val", "test"):
        for transform in config[f"{name}_dataloader"].dataset.pipeline:
            TRANSFORMS.build(transform)
    for hook in config.get("custom_hooks") or ():
        hook.pop("priority", None)  # which the Runner takes
        HOOKS.build(hook)
    # Initializing the largest takes seconds; MMDetection's PVT cannot be built without.
    is_ours = config.model.backbone.type.startswith("mmsoft.")
    with torch.device("meta" if is_ours else "cpu"):
        model = MODELS.build(config.model)
    groups = build_optim_wrapper(model, config.optim_wrapper).optimizer.param_groups
    settings = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    settings = {name: settings[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    norms = [
        f"{name}.{parameter}"
        for name, module in model.named_modules()
        if isinstance(module, NORMS)
        for parameter, _ in module.named_parameters()
    ]

    if is_ours:  # emptying the peers' would also empty what they index with
        model = model.to_empty(device="cpu")
    model = revert_sync_batchnorm(model).eval()
    for parameter in model.parameters():
        torch.nn.init.uniform_(parameter, -0.05, 0.05)
    for module in model.modules():
        if hasattr(module, "reset_running_stats"):
            module.reset_running_stats()
    with torch.no_grad():
        features = model.extract_feat(torch.randn(1, 3, SIZE, SIZE))
        assert is_finite(outputs(library, model, features))
    return dict(problems=[], settings=settings, norms=norms)


def main(check, library, paths):
    torch.set_num_threads(1)
    __import__(f"{library}.models")
    look_up_once()
    Config.fromfile(paths[0], import_custom_modules=False)  # here, for all processes to come
    assert "mmsoft" not in sys.modules
    for path in paths:
        sys.stdout.flush()
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            continue
        try:
            result = check(library, path)
        except BaseException:
            result = dict(problems=[traceback.format_exc()])
        print(json.dumps(dict(config=path, **result)), flush=True)
        os._exit(0)


if __name__ == "__main__":
    is_build = sys.argv[1] == "--build"
    library, *paths = sys.argv[1 + is_build :]
    main(build if is_build else step, library, paths)
