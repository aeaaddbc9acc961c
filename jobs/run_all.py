"""Run the whole chain on this machine: ingest, features, behaviour, item features, tokenizer, semantic IDs, report.

  python jobs/run_all.py --config conf/demo.yaml
  python jobs/run_all.py --config conf/demo.yaml --plan     # which stages would run, and why; runs nothing

Stages that are up to date are skipped; after a failure the same command resumes.
"""

from pipelines import cli

if __name__ == "__main__":
    parser = cli.parser(__doc__)
    parser.add_argument("--plan", action="store_true", help="print which stages would run, and why; run nothing")
    arguments = parser.parse_args()
    cli.leave(cli.run(arguments, cli.entry(f"pipelines.chain:{'show_plan' if arguments.plan else 'run'}")))
