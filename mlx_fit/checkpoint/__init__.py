"""Checkpoints: everything a run goes on from, in a folder that is whole or not there."""

from mlx_fit.checkpoint.policy import CheckpointPolicy

__all__ = ["CheckpointPolicy"]
