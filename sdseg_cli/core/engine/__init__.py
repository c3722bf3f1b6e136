"""Training, prediction, evaluation and stability: where data, model and recipe meet."""
