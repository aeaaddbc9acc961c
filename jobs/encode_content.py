"""Encode the items' raw text and pictures (content.encoders) into the vectors that the next stages read.

python jobs/encode_content.py --config conf/beauty.yaml
ray job submit --working-dir . -- python jobs/encode_content.py --config conf/beauty.yaml

Contents that have a vector are not encoded again; an interrupted job goes on with the parts that are left.
"""

from pipelines import cli

if __name__ == "__main__":
    arguments = cli.choose(None, __doc__)
    cli.leave(cli.run(arguments, cli.stage("content", cli.entry("pipelines.content:run"))))
