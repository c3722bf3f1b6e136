"""Networks, schedule, losses and the pipeline; knows no files but weights."""
