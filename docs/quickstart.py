"""Fit a tokenizer, encode items, save and load it, and measure the codes. Runs in under a minute on a CPU.

    python docs/quickstart.py [FOLDER]

FOLDER is where the tokenizer is saved; without it, a temporary folder.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

import adasid

# 1. The data: a catalogue of 2,000 items in 20 planted topics, with a text and a behaviour embedding each.
#    Popularity follows Zipf's law. The more often an item was clicked, the longer and the cleaner is its behaviour
#    vector. The last 200 items are new: nobody has clicked them, so their behaviour is a row of NaN.
rng = np.random.default_rng(0)
items, topics, new = 2000, 20, 200
topic = rng.integers(topics, size=items)
counts = (2000 / np.arange(1, items + 1) ** 0.8).astype(int)
counts[-new:] = 0

text = rng.normal(size=(topics, 64))[topic] + 0.5 * rng.normal(size=(items, 64))
noise = rng.normal(size=(items, 32)) / np.sqrt(1 + counts[:, None])
behavior = np.log1p(counts)[:, None] * (rng.normal(size=(topics, 32))[topic] / np.sqrt(32) + noise)
behavior[-new:] = np.nan

# 2. Fit. Any setting of the tokenizer is a keyword; nested sections are dicts.
tokenizer = adasid.fit(
    "adc-sid",
    {"text": text, "behavior": behavior},
    counts=counts,
    seed=17,
    codebook_size=32,
    hidden=[128, 64],
    decoder_hidden=[64, 128],
    training={"epochs": 25, "batch": 256, "lr": 0.003},
    progress=False,
)
print(tokenizer)

# 3. Encode. Codes are [n, L]; -1 (PAD) stands where an item lacks the slot's modality.
sids = tokenizer.encode({"text": text, "behavior": behavior})
print("a popular item:", " ".join(sids.tokens[0]), sids.weights[0].round(2))
print("a new item:    ", " ".join(sids.tokens[-1]), sids.weights[-1].round(2))

# 4. Save and load. The folder holds weights.safetensors and manifest.json.
with tempfile.TemporaryDirectory() as temporary:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else temporary) / "my-tokenizer"
    tokenizer.save(folder)
    again = adasid.load(folder)
assert again.digest == tokenizer.digest
assert np.array_equal(again.encode({"text": text, "behavior": behavior}).codes, sids.codes)

# 5. Encode one new item: any number of rows will do.
one = tokenizer.encode({"text": text[:1], "behavior": np.full((1, 32), np.nan)})
print("without clicks:", " ".join(one.tokens[0]))

# 6. Measure the codes.
metrics = adasid.evaluate_codes(sids, {"text": text, "behavior": behavior})
print(f"codes in use: {np.mean(metrics.utilisation):.0%}")
print(f"items whose SID is not unique: {metrics.collision_items:.1%}")
print(f"variance of text that the codes leave unexplained: {metrics.readout['text']:.0%}")

# 7. How well the best slot tells the planted topics: the share of items in the majority topic of their code.
purity = [
    sum(np.bincount(topic[codes == code]).max() for code in np.unique(codes)) / items
    for codes, slot in zip(sids.codes.T, sids.slots)
    if slot.kind != "behavior"
]
print(f"purity of the best slot: {max(purity):.0%}")
