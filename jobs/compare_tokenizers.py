"""Train every tokenizer of the config's compare section on the same features; write one table and page of metrics.

  python jobs/compare_tokenizers.py --config conf/beauty.yaml

Needs item_features (jobs/build_features.py after jobs/train.py --stage behavior). An interrupted command resumes with
the cells that have no result; each cell is an MLflow run.
"""

from pipelines import cli

if __name__ == "__main__":
    arguments = cli.choose(None, __doc__)
    cli.leave(cli.run(arguments, cli.stage("compare", cli.entry("pipelines.compare:run"))))
