"""Write the report page of the stages that have run, and its figures: <runs_dir>/<name>/report/index.html.

python jobs/report.py --config conf/demo.yaml
"""

from pipelines import cli

if __name__ == "__main__":
    arguments = cli.choose(None, __doc__)
    cli.leave(cli.run(arguments, cli.stage("report", cli.entry("pipelines.report:run"))))
