"""Check the raw tables, build sequences and long-tail statistics, and, once behaviour embeddings exist, the items'
features.

  spark-submit jobs/build_features.py --config conf/beauty.yaml

Run it before and after training the behaviour embeddings: it does what is due.
"""

from pipelines import cli

if __name__ == "__main__":
    arguments = cli.choose(
        None,
        __doc__,
        ("--part", ("auto", "events", "items"), "events: up to sequences; items: item_features; auto: what is due"),
    )
    cli.leave(cli.run(arguments, cli.stage("features", cli.entry("pipelines.features:run", part=arguments.part))))
