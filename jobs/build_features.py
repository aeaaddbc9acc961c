"""Check the raw tables and build sequences, long-tail statistics and, once behaviour embeddings exist, item features.

  spark-submit jobs/build_features.py --config conf/beauty.yaml

Run it before and after training the behaviour embeddings: each call builds what is out of date.
"""

from pipelines import cli

if __name__ == "__main__":
    arguments = cli.choose(
        None,
        __doc__,
        ("--part", ("auto", "events", "items"), "events: up to sequences; items: item_features; auto: what is due"),
    )
    cli.leave(cli.run(arguments, cli.stage("features", cli.entry("pipelines.features:run", part=arguments.part))))
