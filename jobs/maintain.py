"""Compact the lake's tables and vacuum the files that no retained version needs.

Versions of the last retokenize.keep generations, of the models and of the runs of the last retokenize.lineage_days are
retained.

  python jobs/maintain.py --config conf/beauty.yaml
  python jobs/maintain.py --config conf/beauty.yaml --migrate    # only migrate a lake of an older format
"""

from pipelines import cli

if __name__ == "__main__":
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--migrate", action="store_true", help="bring a lake of an older version of adasid up to date, and nothing else"
    )
    arguments = parser.parse_args()
    what = "migrate" if arguments.migrate else "maintain"
    body = cli.stage(what, cli.entry(f"pipelines.nightly.upkeep:{what}"), migrates=arguments.migrate)
    cli.leave(cli.run(arguments, body))
