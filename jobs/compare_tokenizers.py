"""Train every tokenizer of the config's compare section on the same features and measure them alike: one table, one
page.

python jobs/compare_tokenizers.py --config conf/beauty.yaml

Needs item_features (jobs/build_features.py after jobs/train.py --stage behavior). It goes on where it stopped; each
cell is an MLflow run."""

from pipelines import cli

if __name__ == "__main__":
    arguments = cli.choose(None, __doc__)
    cli.leave(cli.run(arguments, cli.stage("compare", cli.entry("pipelines.compare:run"))))
