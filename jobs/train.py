"""Train a model on Ray: behaviour embeddings (SASRec), the tokenizer, a retriever or a click-through model.

  python jobs/train.py --config conf/demo.yaml --stage tokenizer
  ray job submit --working-dir . -- python jobs/train.py --config conf/beauty.yaml --stage behavior

The retriever and the click-through model read the live semantic IDs. A killed run resumes from its checkpoint.
"""

from pipelines import cli

if __name__ == "__main__":
    arguments = cli.choose(
        None, __doc__, ("--stage", ("tokenizer", "behavior", "retrieval", "ranking"), "what to train")
    )
    cli.leave(cli.run(arguments, cli.stage(arguments.stage, cli.entry(f"pipelines.train:{arguments.stage}"))))
