"""Layer-wise learning-rate decay in all three libraries."""

from typing import Any

from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn

from mmsoft.registry import OPTIM_WRAPPER_CONSTRUCTORS


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """MMEngine's constructor, plus a learning rate that decays from the last layer to the first.

    The rate of a parameter of the backbone is multiplied by ``layer_decay_rate`` once for each
    layer after it; necks and heads keep the full rate. MMPreTrain's
    ``LearningRateDecayOptimWrapperConstructor`` does the same for its classifiers, but takes the
    depths from the whole model; those of MMDetection and MMSegmentation support only ConvNeXt, BEiT
    and MAE.

    ``paramwise_cfg`` takes ``layer_decay_rate`` (1 by default) and all of MMEngine's options::

        optim_wrapper = dict(
            constructor='mmsoft.LayerDecayOptimWrapperConstructor',
            optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.05),
            paramwise_cfg=dict(
                layer_decay_rate=0.9,
                norm_decay_mult=0.0,
                bias_decay_mult=0.0,
                custom_keys=dict(pos_embed=dict(decay_mult=0.0), cls_token=dict(decay_mult=0.0)),
            ),
        )
    """

    def add_params(
        self, params: list[dict], module: nn.Module, prefix: str = "", **kwargs: Any
    ) -> None:
        """Append one group for each parameter of ``module``.

        Raises:
            TypeError: the model has no ``backbone.get_layer_depth``.
        """
        super().add_params(params, module, prefix=prefix, **kwargs)  # calls us for the children
        if prefix:
            return
        backbone = getattr(module, "backbone", None)
        if backbone is None or not hasattr(backbone, "get_layer_depth"):
            raise TypeError(
                "layer-wise decay needs a model whose backbone has get_layer_depth, "
                f"got {type(module).__name__} with backbone {type(backbone).__name__}"
            )
        decay_rate = self.paramwise_cfg.get("layer_decay_rate", 1.0)
        names = {parameter: name for name, parameter in module.named_parameters()}
        for group in params:
            depth, layers = backbone.get_layer_depth(names[group["params"][0]], "backbone.")
            group["lr"] = group.get("lr", self.base_lr) * decay_rate ** (layers - depth - 1)
