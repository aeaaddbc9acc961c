"""Run the nightly job: give new and changed items SIDs, measure drift and churn, and publish the table if it passes.

  spark-submit jobs/retokenize.py --config conf/beauty.yaml --run-date 2026-11-22
  spark-submit jobs/retokenize.py --config conf/beauty.yaml --run-date 2026-11-22 --dry-run

A refused table leaves the live generation as it is. The job may run twice, late, or concurrently with itself.
Exit code 3: an earlier stage is out of date; 4: a gate refused, or the live generation is on hold; 5: another run is
at work.
"""

from pipelines import cli

if __name__ == "__main__":
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--run-date",
        required=True,
        type=cli.day,
        metavar="DATE",
        help="the day whose table this is: YYYY-MM-DD, today or yesterday (UTC)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="publish nothing: print every gate, write the page, end with 0 or 4 (warm and refit train a tokenizer)",
    )
    arguments = parser.parse_args()
    run_date, dry = arguments.run_date, arguments.dry_run
    cli.leave(
        cli.run(
            arguments,
            cli.stage("retokenize", cli.entry("pipelines.nightly.retokenize:run", run_date=run_date, dry=dry)),
        )
    )
