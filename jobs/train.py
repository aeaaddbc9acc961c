"""Train on Ray: the behaviour embeddings (SASRec), the tokenizer, and on its semantic IDs a retriever
or a click-through model. A killed run resumes from its checkpoint.

python jobs/train.py --config conf/demo.yaml --stage tokenizer
ray job submit --working-dir . -- python jobs/train.py --config conf/beauty.yaml --stage behavior
"""

from pipelines import cli

if __name__ == "__main__":
    arguments = cli.choose(
        None, __doc__, ("--stage", ("tokenizer", "behavior", "retrieval", "ranking"), "what to train")
    )
    cli.leave(cli.run(arguments, cli.stage(arguments.stage, cli.entry(f"pipelines.train:{arguments.stage}"))))
