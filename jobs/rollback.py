"""Make an older generation of the semantic-ID table live again, in one commit; --hold keeps it live until --release.

  python jobs/rollback.py --config conf/beauty.yaml --to 3 --hold
  python jobs/rollback.py --config conf/beauty.yaml --release

Under a hold retokenize.py and write_sids.py check their tables but publish nothing and end with exit code 4.
"""

from pipelines import cli

if __name__ == "__main__":
    parser = cli.parser(__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--to", type=int, metavar="GENERATION", help="its number (see the table `generations`)")
    what.add_argument("--release", action="store_true", help="end the hold: the next nightly run may publish")
    parser.add_argument("--hold", action="store_true", help="with --to: nothing else is published until --release")
    arguments = parser.parse_args()
    if arguments.release and arguments.hold:
        parser.error("--hold needs --to GENERATION, and cannot be used with --release")
    number, hold = arguments.to, arguments.hold
    cli.leave(
        cli.run(
            arguments, cli.stage("rollback", cli.entry("pipelines.nightly.upkeep:rollback", number=number, hold=hold))
        )
    )
