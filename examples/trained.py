"""A trained, pruned network of twenty layers: 9,494 of the 10,000 test images of MNIST, as published.

    python examples/trained.py [FOLDER]

FOLDER holds trained/mnist-128x18.tar.gz and mnist/t10k-*.gz; by default ../shared/data. Unpacks into build/.
"""

import shutil
import sys
from pathlib import Path

from spdnn_jax import Clip, build_plan, infer
from spdnn_jax.io import read_array, read_network

data, files = Path(*sys.argv[1:] or ["../shared/data"]), Path("build/mnist-128x18")
shutil.unpack_archive(data / "trained/mnist-128x18.tar.gz", files.parent, filter="data")
activation = [Clip.relu(1)] * 19 + [Clip.identity()]  # the last layer gives logits
network = read_network(files / "weights", biases=files / "biases", index_base=0, activation=activation)
images = read_array(data / "mnist/t10k-images-idx3-ubyte.gz").reshape(-1, network.inputs) / 255
correct = infer(build_plan(network), images).argmax(axis=1) == read_array(data / "mnist/t10k-labels-idx1-ubyte.gz")
print(f"{correct.sum():,} of {correct.size:,} images")
