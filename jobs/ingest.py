"""Copy items and interactions from the config's source (synthetic, Parquet, Delta, arrays, Amazon files) into the lake.

python jobs/ingest.py --config conf/demo.yaml
spark-submit jobs/ingest.py --config conf/beauty.yaml
"""

from pipelines import cli

if __name__ == "__main__":
    arguments = cli.choose(None, __doc__)
    cli.leave(cli.run(arguments, cli.stage("ingest", cli.entry("pipelines.ingest:run"))))
