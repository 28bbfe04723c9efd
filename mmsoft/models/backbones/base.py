"""What backbones share: loading of weights, and the parameters that do not decay."""

import logging
from typing import Any

from mmengine.logging import print_log
from mmengine.model import BaseModule, PretrainedInit
from torch import Tensor

from mmsoft.checkpoint import LoadReport, foresee_backbone, load_backbone
from mmsoft.ops.checks import SOLVERS
from mmsoft.safe_globals import warn_of_other_loaders

from ..attention import SoftmaxFreeAttention
from .arch import check_init_cfg


class Backbone(BaseModule):
    """A backbone whose weights tell the variant and the landmarks that they were trained with.

    Args:
        init_cfg: ``dict(type='Pretrained', checkpoint=...)``, or ``None``.
    """

    mark = "stages.0.pos_embed"  # a parameter by which a checkpoint is known to hold one
    normalize = False
    variant = "SOFT"
    init_cfg: Any

    def __init__(self, init_cfg: dict | list[dict] | None):
        check_init_cfg(init_cfg)
        super().__init__(init_cfg=init_cfg)
        warn_of_other_loaders()  # here, because MMEngine runs a file before it hands over weights
        self.load_report: LoadReport | None = None  # of weights loaded since the last train()
        self._register_state_dict_hook(_save_notes)

    def match_weights(self, state_dict: dict, prefix: str, local_metadata: dict) -> None:
        """Become the backbone for which weights were trained, as far as they and the notes tell.

        Args:
            state_dict: the weights, maybe of more than the backbone.
            prefix: of the backbone's names in it.
            local_metadata: what is noted of the backbone beside it.
        """
        self._match_landmarks(state_dict, prefix)

    def _foresee_weights(self) -> None:
        """Do so before the model is copied, as MMEngine's EMAHook does before it loads them."""
        cfgs = [self.init_cfg] if isinstance(self.init_cfg, dict) else self.init_cfg or []
        for cfg in cfgs:
            if cfg["type"] in ("Pretrained", PretrainedInit):
                foresee_backbone(self, **{k: v for k, v in cfg.items() if k != "type"})

    def _init_queries(self) -> None:
        for module in self.modules():
            if isinstance(module, SoftmaxFreeAttention):
                module.init_queries()

    def init_weights(self) -> None:
        """Apply ``init_cfg``; ``Pretrained`` goes through :func:`mmsoft.checkpoint.load_backbone`.

        Raises:
            ValueError, RuntimeError: the checkpoint is refused or does not fit.
        """
        init_cfg, self._pretrained = self.init_cfg, []
        if not self.is_init and init_cfg:
            cfgs = [init_cfg] if isinstance(init_cfg, dict) else init_cfg
            self._pretrained = [
                cfg for cfg in cfgs if cfg["type"] in ("Pretrained", PretrainedInit)
            ]
            self.init_cfg = [cfg for cfg in cfgs if cfg not in self._pretrained]
        try:
            super().init_weights()
        finally:
            self.init_cfg = init_cfg
        self._load_pretrained()

    def _dump_init_info(self) -> None:
        """Load the weights before MMEngine logs what initialized each parameter.

        With a root module it does so at the end of its own ``init_weights``.
        """
        self._load_pretrained()
        super()._dump_init_info()

    def _load_pretrained(self) -> None:
        while self._pretrained:
            cfg = dict(self._pretrained.pop(0))
            del cfg["type"]
            load_backbone(self, **cfg)
            for parameter in self.parameters():
                if info := getattr(self, "_params_init_info", {}).get(parameter):
                    info["init_info"] = f"loaded from {cfg['checkpoint']}"
                    info["tmp_mean_value"] = parameter.detach().mean().cpu()

    def _note_loading(self, state_dict: dict, prefix: str, own: dict, *args: Any) -> None:
        """Keep a report, and say so where MMEngine would note that a mean is as before.

        Of heads, whose names are not known here, what is written from now on counts as loaded.
        """
        self.load_report = LoadReport(state_dict, prefix, own, *args)
        noted = self.__dict__.get("_params_init_info", {})
        for parameter, info in noted.items():
            if not parameter.is_inference():
                info["tmp_mean_value"] = _MeanBefore(parameter, info["tmp_mean_value"])
        for name, parameter in self.named_parameters():
            if prefix + name in state_dict and (info := noted.get(parameter)):
                info["init_info"] = "loaded from a checkpoint"

    def train(self, mode: bool = True) -> Any:
        """Switch mode, and log what loading a whole model did.

        In either mode: when loading passes the backbone, the heads are still to come.
        """
        super().train(mode)
        if self.load_report is not None:
            report, self.load_report = self.load_report, None
            report.write(type(self).__name__)
        return self

    def _match_variant(self, local_metadata: dict) -> None:
        """Refuse weights of another variant, whose names are the same."""
        variant = local_metadata.get("variant")
        if isinstance(variant, str) and variant != self.variant:
            raise ValueError(
                f"the checkpoint is of {variant} but the config has {self.variant}; change the "
                "type of the config's backbone, or name another checkpoint"
            )

    def notes(self) -> dict[str, Any]:
        """What is not in the weights but belongs to them.

        The variant; of released landmarks the options that decide about their inverse, too.
        """
        inverses = [
            _inverse(layer)
            for layer in self.modules()
            if isinstance(layer, SoftmaxFreeAttention) and not layer.by_content
        ]
        alike = bool(inverses) and all(each == inverses[0] for each in inverses)
        return dict(variant=self.variant, **(inverses[0] if alike else {}))

    def _compare_inverse(self, local_metadata: dict) -> None:
        """Warn of weights that were saved with another inverse, which a config decides about."""
        ours = self.notes()
        solver, steps = (local_metadata.get(name) for name in ("solver", "newton_steps"))
        if "solver" not in ours or solver not in SOLVERS:
            return
        noted = dict(solver=solver)
        if solver == "newton" and type(steps) is int:
            noted["newton_steps"] = steps
        other = [name for name in noted if noted[name] != ours.get(name)]
        if other:
            theirs, here = (
                ", ".join(f"{name}={of[name]!r}" for name in other if name in of)
                for of in (noted, ours)
            )
            print_log(
                f"{type(self).__name__}: the weights were saved with {theirs}, the config has "
                f"{here}, another filter of the landmarks' inverse: write {theirs} in the config's "
                "backbone for theirs",
                logger="current",
                level=logging.WARNING,
            )

    def _own_tensors(self) -> dict[str, Tensor]:
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}

    def _match_landmarks(self, state_dict: dict, prefix: str) -> None:
        """Weights decide for which landmarks they were trained."""
        switched = set()
        for name, layer in self.named_modules():
            key = f"{prefix}{name}."
            if (
                isinstance(layer, SoftmaxFreeAttention)
                and f"{key}landmark_norm.weight" in state_dict
            ):
                by_content = f"{key}content_landmarks" in state_dict
                if by_content != layer.by_content:
                    trained = "content" if by_content else "released"
                    layer.use_landmarks(trained)
                    switched.add(trained)
        if switched:
            print_log(
                f"{type(self).__name__}: the weights were trained with landmarks="
                f"{' and '.join(map(repr, sorted(switched)))}, as they are used from now on",
                logger="current",
            )

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that train without weight decay, by timm's convention.

        Position embeddings, class token, every norm and every bias: what ``norm_decay_mult=0``,
        ``bias_decay_mult=0`` and the ``custom_keys`` ``pos_embed`` and ``cls_token`` exempt.
        """
        return {
            name
            for name, parameter in self.named_parameters()
            if parameter.dim() == 1 or name.rpartition(".")[2] in ("pos_embed", "cls_token")
        }


def _inverse(layer: SoftmaxFreeAttention) -> dict[str, Any]:
    """The options of a layer that decide about the inverse of its landmarks' Gram matrix."""
    if layer.solver == "newton":
        return dict(solver=layer.solver, newton_steps=layer.newton_steps)
    return dict(solver=layer.solver)


class _MeanBefore:
    """What MMEngine compares with a parameter's mean to see whether something has set it.

    Writing the parameter counts, too: loading leaves the mean of most biases at 0.
    """

    def __init__(self, parameter: Tensor, mean: Any):
        self._parameter, self._version, self._mean = parameter, parameter._version, mean

    def __ne__(self, mean: Any) -> bool:
        return self._parameter._version != self._version or bool(self._mean != mean)


def _save_notes(module: Any, state_dict: dict, prefix: str, local_metadata: dict) -> None:
    """Note what the keys and tensors of a state dict do not tell beside it."""
    local_metadata.update(module.notes())
