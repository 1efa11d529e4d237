"""``python -m simfluence`` is the command line."""

from simfluence.cli import main

main()
