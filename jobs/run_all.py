"""Run the whole chain on this machine: ingest, features, behaviour, item features, tokenizer, semantic IDs, report.

  python jobs/run_all.py --config conf/demo.yaml

Stages that are up to date are skipped; after a failure the same command goes on where it stopped.
"""

from pipelines import cli

if __name__ == "__main__":
    arguments = cli.choose(None, __doc__)
    from pipelines import chain

    cli.leave(cli.run(arguments, chain.run))
