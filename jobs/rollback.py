"""Make an older generation of the semantic-ID table live again, in one commit.

python jobs/rollback.py --config conf/beauty.yaml --to 3
"""

from pipelines import cli

if __name__ == "__main__":
    parser = cli.parser(__doc__)
    parser.add_argument("--to", required=True, type=int, metavar="GENERATION", help="number of the generation (see the table `generations`)")
    arguments = parser.parse_args()
    from pipelines.nightly import upkeep

    cli.leave(cli.run(arguments, cli.stage("rollback", lambda cfg, track: upkeep.rollback(cfg, track, arguments.to))))
