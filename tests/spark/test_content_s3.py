"""The stage ``content`` with source, pictures, parts and tables in a bucket."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from adasid.config import build
from adasid.files import location
from pipelines import ingest
from tests import models, s3
from tests.conftest import INTERPRETED
from tests.spark.test_content import picture, ran, vectors

pytest.importorskip("obstore")


def test_contents_and_their_vectors_lie_in_a_bucket(spark, bucket, tmp_path):
    hadoop = spark.sparkContext._jsc.hadoopConfiguration()
    for key, name in {"access.key": "AWS_ACCESS_KEY_ID", "secret.key": "AWS_SECRET_ACCESS_KEY"}.items():
        hadoop.set(f"fs.s3a.{key}", s3.ENVIRONMENT[name])  # the JVM was started before the server
    names = [f"pictures/{i}.png" for i in range(8)]
    for i, name in enumerate(names[:6]):
        location(f"{bucket}/shop/{name}").write_bytes(picture(i, "PNG"))
    ids = [f"i{i}" for i in range(8)]
    items = {"item_id": ids, "title": [f"rose soap {i}" for i in range(8)], "image": names}
    events = {"user_id": ["u"] * 4, "item_id": ids[:4], "timestamp": [1_500_000_000 + i for i in range(4)]}
    for name, columns in (("items", items), ("events", events)):
        pq.write_table(pa.table(columns), tmp_path / name)
        location(f"{bucket}/shop/{name}.parquet").upload(tmp_path / name)
    visual = {"model": str(models.siglip(tmp_path / "siglip")), "field": "image"}
    cfg = build(
        {
            "name": "t",
            "runs_dir": f"{bucket}/runs",
            "tracking": {"uri": f"sqlite:///{tmp_path}/mlflow.db"},
            "source": {
                "kind": "tables",
                "tables": {"items": f"{bucket}/shop/items.parquet", "interactions": f"{bucket}/shop/events.parquet"},
            },
            "content": {"encoders": {"text": {"fields": ["title"], "width": 8}, "visual": visual}, "part_items": 3},
            "spark": {"master": "local[2]", "driver_memory": "2g", "shuffle_partitions": 2, "conf": INTERPRETED},
            "ray": {"workers": 0},
        }
    )
    ran(cfg, ingest.run)
    context = ran(cfg)
    assert context.facts == {"refused contents": 2, "encoded": 16}
    found = vectors(context.lake)
    assert sum(vector is not None for vector, _ in found.values()) == 14 and len(found) == 16
    assert ran(cfg).status == "up to date"
