"""Files, cases, splits and prepared data sets; knows no model."""
