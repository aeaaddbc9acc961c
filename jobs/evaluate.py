"""Train every retriever and ranker of the config's evaluate section on every tokenizer's SIDs, into one table and page.

  python jobs/evaluate.py --config conf/beauty.yaml

Needs item_features and sequences (jobs/build_features.py after jobs/train.py --stage behavior). An interrupted command
resumes with the cells that have no result; each cell is an MLflow run. Tokenizers that jobs/compare_tokenizers.py has
trained are reused. With --report nothing is trained.
"""

from pipelines import cli

if __name__ == "__main__":
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--report",
        action="store_true",
        help="train nothing: write the page of the results that are there, also while another evaluates",
    )
    arguments = parser.parse_args()
    cli.leave(
        cli.run(arguments, cli.stage("evaluate", cli.entry("pipelines.evaluate:run", train_cells=not arguments.report)))
    )
