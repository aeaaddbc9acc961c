"""Published results on the data sets that anyone can get, as printed; shown beside ours, never mixed with them.

``ADC_SID``: arXiv 2510.25622, table 2, Amazon Beauty with images; its slopes of NDCG are not those of single-target evaluation (methods 8.7),
so only the order of the methods can be compared. ``LEAVE_ONE_OUT``: last item = test, full ranking over the items, as here.
"""

from __future__ import annotations

ADC_SID: dict[str, dict[str, float]] = {
    "rq-vae": {"recall@50": 0.1213, "recall@100": 0.2398, "ndcg@50": 0.0803, "ndcg@100": 0.1304, "auc": 0.6446, "gauc": 0.5852},
    "opq": {"recall@50": 0.1117, "recall@100": 0.2189, "ndcg@50": 0.0802, "ndcg@100": 0.1302, "auc": 0.6449, "gauc": 0.5898},
    "rq-kmeans, aligned": {"recall@50": 0.1283, "recall@100": 0.2285, "ndcg@50": 0.0840, "ndcg@100": 0.1347, "auc": 0.6452, "gauc": 0.5909},
    "letter": {"recall@50": 0.1513, "recall@100": 0.2492, "ndcg@50": 0.0937, "ndcg@100": 0.1453, "auc": 0.6444, "gauc": 0.5973},
    "das": {"recall@50": 0.1503, "recall@100": 0.2403, "ndcg@50": 0.0933, "ndcg@100": 0.1445, "auc": 0.6466, "gauc": 0.5933},
    "mm-rq-vae": {"recall@50": 0.1673, "recall@100": 0.2598, "ndcg@50": 0.0945, "ndcg@100": 0.1461, "auc": 0.6453, "gauc": 0.5991},
    "adc-sid": {"recall@50": 0.1855, "recall@100": 0.2885, "ndcg@50": 0.0996, "ndcg@100": 0.1568, "auc": 0.6480, "gauc": 0.6125},
}

LEAVE_ONE_OUT: dict[str, dict[str, float]] = {
    "TIGER (paper)": {"recall@5": 0.0454, "ndcg@5": 0.0321, "recall@10": 0.0648, "ndcg@10": 0.0384},
    "LETTER (paper)": {"recall@5": 0.0431, "ndcg@5": 0.0286, "recall@10": 0.0672, "ndcg@10": 0.0364},
    "RPG (paper)": {"recall@5": 0.0550, "ndcg@5": 0.0381, "recall@10": 0.0809, "ndcg@10": 0.0464},
    "DiffGRM (paper, scored on SIDs)": {"recall@5": 0.0603, "ndcg@5": 0.0414, "recall@10": 0.0876, "ndcg@10": 0.0502},
    "SASRec, tuned (Cornac)": {"recall@5": 0.0508, "ndcg@5": 0.0348, "recall@10": 0.0740, "ndcg@10": 0.0423},
}
