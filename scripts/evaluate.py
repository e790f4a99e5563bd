"""Measure what token pruning costs in accuracy: one configuration, or a sweep with -m. See README for the keys."""

import os

os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported, which torch does

import hydra
from omegaconf import DictConfig

from a2sf import app


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def evaluate(composed: DictConfig) -> object:
    return app.job(composed)


if __name__ == "__main__":
    app.guard(evaluate)
