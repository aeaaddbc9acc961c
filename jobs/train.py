"""Train a model on Ray: behaviour embeddings (SASRec), the tokenizer, a retriever or a click-through model.

  python jobs/train.py --config conf/demo.yaml --stage tokenizer
  ray job submit --working-dir . -- python jobs/train.py --config conf/beauty.yaml --stage behavior

The retriever and the click-through model read the live semantic IDs. A killed run resumes from its checkpoint.
"""

from pipelines import cli

_ENTRIES = {
    "tokenizer": "pipelines.training.tokenizer:run",
    "behavior": "pipelines.training.behavior:run",
    "retrieval": "pipelines.training.downstream:retrieval",
    "ranking": "pipelines.training.downstream:ranking",
}

if __name__ == "__main__":
    arguments = cli.choose(None, __doc__, ("--stage", tuple(_ENTRIES), "what to train"))
    entry = cli.entry(_ENTRIES[arguments.stage])
    cli.leave(cli.run(arguments, cli.stage(arguments.stage, entry)))
