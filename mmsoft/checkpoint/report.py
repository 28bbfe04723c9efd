"""What loading did: one line with counts, and the names in the log's file."""

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence

from mmengine.logging import MMLogger, print_log
from torch import Tensor


class LoadReport:
    """What became of the tensors of a checkpoint and of a model that holds one of our backbones.

    The names of other parts are read when the report is written: ``load_state_dict`` goes on
    through them after it has passed the backbone.

    Args:
        weights: the state dict, as the backbone is given it.
        prefix: what precedes the backbone's own names in it and in the model.
        own: the backbone's own tensors.
        missing: the list of ``load_state_dict``, to which it adds what the checkpoint lacks.
        unexpected: that of what the model lacks.
        errors: that of its messages, which name what has another size.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        prefix: str,
        own: Mapping[str, Tensor],
        missing: Sequence[str],
        unexpected: Sequence[str],
        errors: Sequence[str],
    ):
        self.prefix, self.own = prefix, frozenset(own)
        given = {name: weights.get(prefix + name) for name in own}
        self.loaded = [name for name, tensor in given.items() if tensor is not None]
        self.missing = [prefix + name for name, tensor in given.items() if tensor is None]
        self.resized = [
            name for name, t in given.items() if t is not None and t.shape != own[name].shape
        ]
        self.not_built: list[str] = []  # left out on purpose, before load_state_dict
        self.left_out: list[str] = []  # likewise: what is no part of the backbone
        self._missing, self._unexpected, self._errors = missing, unexpected, errors

    def write(self, what: str) -> None:
        """Log the line, as a warning if parts of the model have no weights; names go to files.

        Args:
            what: how the line begins: who loaded, or from where.
        """
        others = [name for name in self._missing if not name.startswith(self.prefix)]
        others = [name for name in others if not name.endswith("num_batches_tracked")]
        mismatched = re.findall(r"size mismatch for (\S+):", "\n".join(self._errors))
        others += mismatched
        loaded, resized = (
            [self.prefix + name for name in names if self.prefix + name not in mismatched]
            for names in (self.loaded, self.resized)
        )
        left_out = [*self.left_out, *self._unexpected]
        left = Counter({"stages not built": len(self.not_built)} if self.not_built else {})
        left.update(name.partition(".")[0] for name in left_out)
        complete = len(loaded) == len(self.own)
        missing = [name for name in self.missing if not name.endswith("num_batches_tracked")]
        if not self.loaded:
            line = f"{what}: loaded none of the {len(self.own)} tensors of the backbone, untrained"
            if bare := self.own.intersection(self._unexpected):
                line += (
                    f"; {len(bare)} have their names without {self.prefix!r}: a file of the "
                    "backbone alone is for init_cfg=dict(type='Pretrained', checkpoint=...)"
                )
        else:
            line = f"{what}: loaded {'all ' if complete else f'{len(loaded)} of '}{len(self.own)}"
            line += " tensors of the backbone"
            if missing:
                line += f" ({len(missing)} are not in it, and untrained)"
        if resized:
            line += f", {len(resized)} of them resized"
        if left:
            line += f"; left out {left.total()} of the checkpoint ({_counts(left)})"
        if others:
            parts = Counter(name.partition(".")[0] for name in others)
            line += (
                f"; {len(others)} tensors of the model are not in it, or have another size, and "
                f"are untrained ({_counts(parts)})"
            )
        level = logging.WARNING if others or not complete else logging.INFO
        print_log(line, logger="current", level=level)
        names = {
            "loaded": loaded,
            "resized": resized,
            "left out": [*self.not_built, *left_out],
            "untrained": [*self.missing, *others],
        }
        text = "".join(f"\n{key}: {', '.join(some)}" for key, some in names.items() if some)
        record = dict(name="mmengine", levelno=logging.INFO, levelname="INFO", msg=f"tensors{text}")
        for handler in MMLogger.get_current_instance().handlers:
            if isinstance(handler, logging.FileHandler):  # where MMEngine lists initializations
                handler.handle(logging.makeLogRecord(record))


def _counts(parts: Counter[str]) -> str:
    return ", ".join(f"{count} of {part}" for part, count in parts.items())
