"""Pure functions from arrays to scores."""
