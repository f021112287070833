"""Runs experiments: learner, trainer, scenarios, checkpoints, results, reports."""
