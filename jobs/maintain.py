"""Compact the lake's tables and remove files that no kept generation, no model, and no run of the last retokenize.lineage_days needs.

python jobs/maintain.py --config conf/beauty.yaml
"""

from pipelines import cli

if __name__ == "__main__":
    arguments = cli.choose(None, __doc__)
    cli.leave(cli.run(arguments, cli.stage("maintain", cli.entry("pipelines.nightly.upkeep:maintain"))))
