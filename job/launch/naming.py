"""Names of a sweep's points, with and without a cluster: each is named after what differs between them."""

from __future__ import annotations

from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, flag_override


class NameByDifference(Callback):
    """Leaves what all points have in common out of hydra.job.override_dirname, of which run directories are made."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        overrides = config.hydra.overrides
        given = OverridesParser.create().parse_overrides(list(overrides.task))
        common = [override.key_or_group for override in given if not override.is_sweep_override()]
        exclusion = f"hydra.job.config.override_dirname.exclude_keys=[{','.join(common)}]"
        # Among the overrides, because Hydra composes every point anew from them; first, so that the user's own wins.
        with flag_override(overrides, "readonly", False):
            overrides.hydra.insert(0, exclusion)
