"""Encode every item with the trained tokenizer and publish the SIDs as a new generation if they pass the gates.

  spark-submit jobs/write_sids.py --config conf/beauty.yaml

Exit code 4: a gate refused, also where more SIDs would be removed or changed than retokenize.gates allow (on purpose:
--set sids.replace=true).
"""

from pipelines import cli

if __name__ == "__main__":
    arguments = cli.choose(None, __doc__)
    cli.leave(cli.run(arguments, cli.stage("sids", cli.entry("pipelines.sids:run"))))
