"""A Hydra sweeper whose jobs are groups of cells. It checks the grid first, and leaves out equal and finished cells.

Hydra finds its plugins in the namespace package `hydra_plugins`, which is next to `a2sf` in a clone and in the wheel.
"""

import copy
import re
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn
from omegaconf import OmegaConf, open_dict

from a2sf.compat.hydra import BasicSweeper, apply_overrides


@dataclass
class CellSweeperConfig:
    _target_: str = "hydra_plugins.cell_sweeper.CellSweeper"
    max_batch_size: int | None = None
    params: dict[str, str] | None = field(default_factory=dict)


ConfigStore.instance().store(group="hydra/sweeper", name="cells", node=CellSweeperConfig, provider="a2sf")


class CellSweeper(BasicSweeper):
    """Like Hydra's basic sweeper, with one job per group of cells that must be computed."""

    def sweep(self, arguments: list[str]) -> Any:
        from a2sf.app.folders import adopt
        from a2sf.app.grid import run_grid
        from a2sf.sweep.config.grid import addable, route
        from a2sf.sweep.config.keys import check_keys
        from a2sf.sweep.config.overrides import as_written

        assert self.config is not None
        assert self.hydra_context is not None
        adopt(self.config.hydra)
        loader = self.hydra_context.config_loader
        params = [as_written(p) for p in self._preset_overrides(arguments)]  # those of the command are quoted already
        parsed = OverridesParser.create(config_loader=loader).parse_overrides([*params, *arguments])
        (points,) = self.split_arguments(parsed, None)
        points = [[as_written(o) for o in point] for point in points]  # Hydra drops the quotes in choice("1.10","1.20")

        # Hydra takes 60 ms to compose: do it once per choice of groups, and set the other values on copies
        known = set(loader.list_groups(""))
        bases: dict[tuple[str, ...], Any] = {}

        def compose(overrides: list[str]) -> Any:
            parsed = OverridesParser.create(config_loader=loader).parse_overrides(overrides)
            groups = [o for o in parsed if o.key_or_group in known]
            values = [o for o in parsed if o not in groups]
            key = tuple(str(o.input_line) for o in groups)
            if key not in bases:
                base = loader.load_sweep_config(self.config, list(key))
                with open_dict(base):
                    del base["hydra"]
                bases[key] = base
            composed = copy.deepcopy(bases[key])
            apply_overrides(values, composed)
            return composed

        check_keys(compose([addable(o) for o in points[0]]))  # before policies are imported
        routed = route(points, lambda choice: str(OmegaConf.select(compose(list(choice)), "policy._target_")))
        composed = [(p, compose(p)) for p in routed]
        for _, point in composed:
            check_keys(point)
        from a2sf.sweep.workers import choose_device, gpu_request

        launcher = self.config.hydra.launcher
        for _, point in composed:
            choose_device(launcher, point)
        return run_grid(composed, self._launch, computes_here=gpu_request(launcher) is None)

    def _preset_overrides(self, arguments: list[str]) -> list[str]:
        """The preset's parameters as overrides; `${budget.ratio}` in them is resolved in each cell if that key is swept."""
        assert self.config is not None
        known = dict(self.params or {})
        swept = {*known, *(a.partition("=")[0].lstrip("+") for a in arguments)}
        written = OmegaConf.to_container(self.config.hydra.sweeper.params or OmegaConf.create({}), resolve=False)
        assert isinstance(written, dict)
        unresolved = {k: v for k, v in written.items() if swept.intersection(re.findall(r"\$\{([\w.]+)\}", str(v)))}
        return [f"{k}={v}" for k, v in (known | unresolved).items()]

    def _launch(self, jobs: list[list[str]]) -> list[JobReturn]:
        assert self.launcher is not None
        return list(self.launcher.launch(jobs, initial_job_idx=0))
