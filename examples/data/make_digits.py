"""Writes digits.bin from scikit-learn's copy of the data. Needs scikit-learn; the result is in the tree.

The rows are shuffled once, here, so that every reader can split them by position: the first 1297 to train on, the last
500 to test on.
"""

import hashlib
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

digits = load_digits()
rows = np.concatenate([digits.data, digits.target[:, None]], axis=1).astype(np.uint8)
# argsort of random keys rather than shuffle(): the raw stream of MT19937 is the same in every version of NumPy.
order = np.argsort(np.random.MT19937(0).random_raw(len(rows)), kind="stable")
content = rows[order].tobytes()
Path(__file__).with_name("digits.bin").write_bytes(content)
print(len(content), hashlib.sha256(content).hexdigest())
