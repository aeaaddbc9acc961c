"""Train with two ranks in two processes (gloo), without Ray: state stays identical, and a killed run resumes
exactly."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from adasid import config
from adasid.data.samples import Sample
from adasid.distributed import Workers, settle
from adasid.metrics.ranking import auc
from adasid.recommenders import retriever
from adasid.tokenizers import artifact
from adasid.training.behavior import BehaviorTraining
from adasid.training.item_table import ItemTable
from adasid.training.tokenizer import TokenizerTraining
from tests.planted import catalogue
from tests.unit.test_ranking import events
from tests.unit.test_ranking import training as ranking
from tests.unit.test_retriever import clumped
from tests.unit.test_retriever import training as retrieval
from tests.unit.test_sasrec import SMALL, data, is_drawn
from tests.unit.test_tokenizers import TOKENIZERS, data_of

EPOCHS, KILLED_AT = 14, 7
# 3 steps an epoch, revival every 20 steps, checkpoints every 5 epochs: usage counts are under way in every checkpoint
TRAINING = config.Training(epochs=EPOCHS, batch=128, lr=0.003, log_epochs=1, checkpoint_epochs=5)
RESUMED = "adc-sid"


def brief(name):
    """Eight epochs are enough for one revival."""
    if not hasattr(TOKENIZERS[name], "training"):
        return TOKENIZERS[name]
    training = TRAINING if name == RESUMED else TRAINING.model_copy(update={"epochs": 8})
    return TOKENIZERS[name].model_copy(update={"training": training})


SETTINGS = {name: brief(name) for name in TOKENIZERS if " " not in name or name == "rq-kmeans by modality"}


class Killed(Exception):
    pass


def kill(rows):
    if len(rows) == KILLED_AT:
        raise Killed


def tokenizer_state(name, folder, workers, report=lambda rows: None):
    settings = SETTINGS[name]
    mine = data_of(settings, *catalogue(items=300), workers)
    torch.manual_seed(5)
    loop = TokenizerTraining(artifact.build(settings, mine.widths), settings, mine, folder, 5, workers, "v0")
    rows = loop.run(report)
    return loop.tokenizer.state_dict(), rows


def kill_early(rows):
    if len(rows) == 3:
        raise Killed


def table_of_two(workers):
    """Whether a table of two workers is that of one, before and after steps with gradients of both, some of the same
    rows."""
    mine, one = (ItemTable(11, 4, 3, 0.1, who) for who in (workers, Workers()))
    equal = [torch.equal(mine.rows, one.rows[workers.rank :: 2])]
    asked = [torch.tensor([8, 1, 3, 0, 5]), torch.tensor([3, 1, 9])]
    for step in range(3):
        gradients = [torch.full((len(ids), 4), 0.5 + rank) + step for rank, ids in enumerate(asked)]
        rows, request = mine.fetch(asked[workers.rank])
        equal.append(torch.allclose(rows, one.rows[asked[workers.rank]]))
        mine.update(request, gradients[workers.rank])
        ids, inverse = torch.unique(torch.cat(asked), return_inverse=True)
        total = torch.zeros(len(ids), 4).index_add_(0, inverse, torch.cat(gradients)) / 2
        one.update(one.fetch(ids)[1], total)
        equal.append(torch.allclose(mine.rows, one.rows[workers.rank :: 2]))
    equal.append(torch.allclose(mine.norms(torch.tensor([10, 3, 2])), one.rows[[10, 3, 2]].norm(dim=1)))
    return all(equal)


def gradients_of_two(workers):
    """Whether the gradients of two workers are averaged, and one that neither has stays missing."""
    both, one, none = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    loss = (both * (1 + workers.rank)).sum() + (one.sum() if workers.rank else 0)
    loss.backward()
    workers.average_gradients([both, one, none])
    return both.grad.tolist() == [1.5, 1.5] and one.grad.tolist() == [0.5, 0.5] and none.grad is None


def sparse_as_dense(folder, workers):
    """Whether both workers get the same table from sparse gradients, and that of dense ones."""
    tables = []
    for rows in (1, 10**6):
        retriever.SPARSE_FROM = rows
        run = retrieval("item", folder / f"sparse from {rows}", 1, workers)
        run.epoch(1)
        tables.append(run.model.table.detach())
    same = torch.equal(*workers.gather(tables[0][None]))
    return {"sparse": same, "sparse as dense": torch.allclose(*tables, rtol=1e-4, atol=1e-5)}


def run_rank(rank, folder):
    folder = Path(folder)
    settle(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    workers = Workers.current()
    across, use = {}, {}
    for name in SETTINGS:
        state, rows = tokenizer_state(name, folder / name, workers)
        across |= {
            f"{name} {key}": torch.equal(*workers.gather(tensor[None].double())) for key, tensor in state.items()
        }
        use[name] = rows[-1]["utilisation"]
        if name == RESUMED:
            whole = state
    try:
        tokenizer_state(RESUMED, folder / "killed", workers, kill)
    except Killed:
        resumed, _ = tokenizer_state(RESUMED, folder / "killed", workers)
    same = {name: torch.equal(tensor, resumed[name]) for name, tensor in whole.items()}

    d = data()
    d.train, d.validation, d.test = (part.part(rank, 2) for part in (d.train, d.validation, d.test))
    training, ranks = BehaviorTraining(SMALL, d, folder / "sasrec", 1, workers), []
    result = training.run(lambda rows: ranks.append(training._ranks("test").sort().values))
    across |= {"ranks": torch.equal(*workers.gather(ranks[-1][None]))}
    try:
        BehaviorTraining(SMALL, d, folder / "sasrec killed", 1, workers).run(kill_early)
    except Killed:
        other = BehaviorTraining(SMALL, d, folder / "sasrec killed", 1, workers).run()
    same["sasrec"] = torch.equal(result.embeddings, other.embeddings) and torch.equal(result.norms, other.norms)
    result.write(folder / f"embeddings-{rank}.parquet")
    uneven = data()
    uneven.train = uneven.train.part(0, 2) if rank == 0 else uneven.train.part(1, 6)
    users = np.arange(300) * 3
    sample = Sample(40, workers).chosen(users[rank::2]) == Sample(40, Workers()).chosen(users)[rank::2]
    across |= {
        "item table": table_of_two(workers),
        "sample": bool(sample.all()),
        "logq": is_drawn(BehaviorTraining(SMALL, uneven, folder / "uneven", 1, workers), 6, SMALL.batch_users),
        "gradients": gradients_of_two(workers),
    }
    downstream = {
        "retrieval": lambda where, epochs: retrieval(
            "item", where, epochs, workers, users=385
        ),  # the last step has one user, of rank 0
        "ranking": lambda where, epochs: ranking(where, events(), epochs, workers, patience=20),
    }
    tests = {}
    for name, make in downstream.items():
        training = make(folder / name, 12)
        tests[name] = training.run()
        across |= {
            f"{name} {key}": torch.equal(*workers.gather(tensor[None].double()))
            for key, tensor in training.model.state_dict().items()
        }
        try:
            make(folder / f"{name} killed", 12).run(kill)
        except Killed:
            same[name] = make(folder / f"{name} killed", 12).run()["strata"] == tests[name]["strata"]
    across |= sparse_as_dense(folder, workers)
    training.shards_from = 1  # of ranking, the last
    shards = [str(training.folder / "scores" / name) for name in training.test()["scores"]]
    scored = clumped(
        retrieval("item", folder / "scored", 1, workers, repeatable=False), np.minimum(np.arange(40) // 8, 3)
    )
    scored.data.test = (
        scored.data.test.part(0, 2) if rank == 0 else scored.data.test.part(len(scored.data.test), 1)
    )  # rank 1 has no users
    facts = {
        "scored": scored.test()["strata"],
        "shards": shards,
        "tests": {name: result["test"] for name, result in tests.items()},
        "resumed": same,
        "across": across,
        "utilisation": use,
        "recall": result.summary["test"]["recall@5"],
        "users": result.summary["users"],
        "ranks": ranks[-1].tolist(),
    }
    (folder / f"{rank}.json").write_text(json.dumps(facts))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    mp.spawn(run_rank, (str(folder),), nprocs=2)
    return [{"folder": folder, **json.loads((folder / f"{rank}.json").read_text())} for rank in range(2)]


def test_all_ranks_hold_the_same_state(facts):
    for rank in facts:
        assert all(rank["across"].values()), [name for name, equal in rank["across"].items() if not equal]


def test_a_killed_run_of_two_workers_ends_as_it_would_have(facts):
    for rank in facts:
        assert all(rank["resumed"].values()), [name for name, equal in rank["resumed"].items() if not equal]


def test_two_workers_learn_as_one_does(facts):
    assert facts[0]["utilisation"][RESUMED] > 0.9
    assert facts[0]["recall"] > 0.5
    assert facts[0]["users"] == 120


def test_one_worker_resumes_what_two_have_trained_and_ranks_as_they_do(facts):
    folder = facts[0]["folder"]
    one = BehaviorTraining(SMALL, data(), folder / "sasrec", 1, Workers())
    one._resume()
    one.model.eval()
    assert one._ranks("test").sort().values.tolist() == facts[0]["ranks"]
    result = one.run()  # all epochs are done
    parts = pa.concat_tables([pq.read_table(folder / f"embeddings-{rank}.parquet") for rank in range(2)])
    parts = parts.sort_by("item_index")
    known = result.learned
    assert parts["item_index"].to_pylist() == result.index[known].tolist() and result.index.tolist() == list(range(41))
    assert parts["embedding"].to_pylist() == result.embeddings[known].tolist()
    assert parts["norm"].to_pylist() == pytest.approx(result.norms[known].tolist())


def test_lists_of_two_workers_are_counted_as_those_of_one(facts, tmp_path):
    one = clumped(retrieval("item", tmp_path, 1, repeatable=False), np.minimum(np.arange(40) // 8, 3))
    one.data.test = one.data.test.part(0, 4)
    assert facts[0]["scored"] == facts[1]["scored"] == json.loads(json.dumps(one.test()["strata"]))


def test_downstream_models_of_two_workers_are_scored_on_all_users_alike(facts, tmp_path):
    assert facts[0]["tests"] == facts[1]["tests"]
    one = {
        "retrieval": retrieval("item", tmp_path / "a", 12).run()["test"],
        "ranking": ranking(tmp_path / "b", events(), 12, patience=20).run()["test"],
    }
    assert facts[0]["tests"]["retrieval"]["recall@5"] == pytest.approx(one["retrieval"]["recall@5"], abs=0.12)
    assert facts[0]["tests"]["ranking"]["auc"] == pytest.approx(one["ranking"]["auc"], abs=0.05)


def test_score_shards_of_two_workers_hold_what_is_gathered(facts):
    assert facts[0]["shards"] == facts[1]["shards"]
    each = [pq.read_table(path) for path in facts[0]["shards"]]
    assert [{user % 2 for user in part["user"].to_pylist()} for part in each] == [{0}, {1}]
    rows = pa.concat_tables(each)
    assert auc(rows["score"].to_numpy(), rows["label"].to_numpy()) == pytest.approx(
        facts[0]["tests"]["ranking"]["auc"], abs=1e-12
    )
