"""Test how much memory there is for work outside the JVM, from files as Linux writes them."""

import os

import pytest

from pipelines.engines import memory

WHOLE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
GIB = 2**30


def group(folder, name, files):
    """A cgroup file system with ``files``, and the groups of a process."""
    root, process = folder / "cgroup", folder / "self"
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(f"{text}\n")
    process.write_text(name)
    return memory.limit(root, process)


@pytest.mark.parametrize(
    ("name", "files", "expected"),
    [
        ("0::/\n", {"memory.max": GIB // 2}, GIB // 2),  # a container sees its own group as the root
        ("0::/system.slice/a.service\n", {"system.slice/a.service/memory.max": GIB // 4}, GIB // 4),
        (
            "0::/pods/a\n",
            {"memory.max": "max", "pods/memory.max": GIB // 8, "pods/a/memory.max": GIB // 4},
            GIB // 8,
        ),
        ("4:cpu,memory:/pods/a\n", {"memory/pods/a/memory.limit_in_bytes": GIB // 2}, GIB // 2),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": 9_223_372_036_854_771_712}, WHOLE),
        ("4:cpu:/a\n", {"memory/a/memory.limit_in_bytes": 7}, WHOLE),
        ("0::/a\n", {"a/memory.max": "max"}, WHOLE),
    ],
)
def test_the_lowest_limit_of_the_groups_counts(tmp_path, name, files, expected):
    assert group(tmp_path, name, files) == expected


def test_without_groups_it_is_the_machines_memory(tmp_path):
    assert memory.limit(tmp_path / "none", tmp_path / "none") == WHOLE
    assert 0 < memory.taken() < memory.limit() <= WHOLE


@pytest.mark.parametrize(
    ("text", "size"), [("8g", 8 * GIB), ("512m", GIB // 2), ("2048", 2 * GIB), ("1gb", GIB), ("16K", 16_384)]
)
def test_sizes_are_read_as_spark_reads_them(text, size):
    assert memory.to_bytes(text) == size


def test_a_small_night_at_ten_million_items_takes_eight_gigabytes():
    assert memory.small_night(10_000_000) == 8 * 10**9
