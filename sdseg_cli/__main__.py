"""Run sdseg as a module: ``python -m sdseg_cli``, also under ``accelerate launch -m sdseg_cli``."""

from sdseg_cli.cli import main

main()
