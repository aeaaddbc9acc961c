"""Compact the lake's tables, vacuum the files that no retained version needs, and remove old exports, models, rejected
rows and files of MLflow's runs.

Versions of the last retokenize.keep generations, sources of the last retokenize.retention.sources, and what the runs of
the last retokenize.lineage_days read and wrote are retained.

  python jobs/maintain.py --config conf/beauty.yaml
  python jobs/maintain.py --config conf/beauty.yaml --migrate            # only migrate a lake of an older format
  python jobs/maintain.py --config conf/beauty.yaml --forget-user u42    # only remove users, from all versions
"""

from pipelines import cli

if __name__ == "__main__":
    parser = cli.parser(__doc__)
    only = parser.add_mutually_exclusive_group()
    only.add_argument(
        "--migrate", action="store_true", help="bring a lake of an older version of adasid up to date, and nothing else"
    )
    only.add_argument(
        "--forget-user", action="append", default=[], metavar="ID", help="remove this user from all tables (repeatable)"
    )
    only.add_argument("--forget-users", action="append", default=[], metavar="FILE", help="the same, one id a line")
    arguments = parser.parse_args()
    what, options = "migrate" if arguments.migrate else "maintain", {}
    module = "upkeep"
    if arguments.forget_user or arguments.forget_users:
        what = module = "forget"
        options = {"users": arguments.forget_user, "files": arguments.forget_users}
    body = cli.stage(what, cli.entry(f"pipelines.nightly.{module}:{what}", **options), migrates=arguments.migrate)
    cli.leave(cli.run(arguments, body))
