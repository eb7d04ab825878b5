"""Packaging of neo. From a clone: `pip install -e . -c constraints.txt`, with extras `pip install -e '.[hf]'`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"', (HERE / "neo/__init__.py").read_text(), re.MULTILINE).group(1)
README = HERE / "README.md"

# What every command may need. tests/test_packaging.py holds it against the imports of the code.
REQUIRED = [
    "array-record>=0.8",
    "etils[epath]>=1.10",
    "flax>=0.12.8",
    "fsspec>=2025.2",
    "grain>=0.2.16",
    "jax>=0.10",
    "jaxtyping>=0.3",
    "matplotlib>=3.9",
    "ml-collections>=1.0",
    "ml_dtypes>=0.5",
    "numpy>=2.0",
    "optax>=0.2.6",
    "orbax-checkpoint>=0.12",
    "pyarrow>=18",
    "rich>=13",
    "sentencepiece>=0.2",
    "tensorstore>=0.1.70",
    "zstandard>=0.22",
]

# The compilers for accelerators are published for these machines; elsewhere their extras are empty.
COMPILERS = "sys_platform == 'linux' and platform_machine == 'x86_64'"
EXTRAS = {
    "tpu": ["jax[tpu]>=0.10"],
    "cuda": ["jax[cuda12]>=0.10"],  # runs on CUDA 13 drivers too
    "cloud": ["gcsfs", "s3fs"],  # gs:// and s3:// through fsspec and etils.epath
    "data": ["seqio>=0.0.20", "tensorflow>=2.20", "tensorflow-text>=2.20", "absl-py>=2"],
    "hf": ["transformers>=4.56", "tokenizers>=0.22", "huggingface_hub>=0.34", "datasets>=4.0", "safetensors>=0.6"],
    "gguf": ["gguf>=0.19", "xllamacpp"],  # the writer, and llama.cpp prebuilt: K-quants, and the check by running the file
    # libtpu compiles for TPUs on a machine without one; jax knows which one fits it.
    "plan": [f"jax[tpu]>=0.10; {COMPILERS}"],
    # Compiles the Hopper kernels on a machine without a GPU, down to their registers: tests on the newest JAX have it.
    "aot": [f"jax-cuda13-plugin>=0.10; {COMPILERS}", f"jax-cuda13-pjrt>=0.10; {COMPILERS}"],
    "wandb": ["wandb>=0.20"],
    "notebook": ["notebook>=7", "nbconvert>=7", "ipykernel>=6"],
    "test": ["pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "hypothesis>=6.100", "ruff>=0.12", "safetensors>=0.6",
             "tokenizers>=0.22"],
    # Tests against transformers' own models and llama.cpp; CI has them.
    "parity": ["torch>=2.7", "transformers>=4.56", "gguf>=0.19", "xllamacpp"],
    "remote": ["moto[s3]>=5.1", "flask>=3", "flask-cors>=5", "s3fs"],  # tests against a local S3 server; CI has it
    "bench": ["torch>=2.7", "transformers>=4.56", "datasets>=4.0"],
}

setup(
    name="neo-pretrain",  # `neo` is taken by an unrelated project with the same import name
    version=VERSION,
    description="An open LLM pre-training stack, JAX first: raw text to a trained, documented, exportable model",
    long_description=README.read_text() if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["neo", "neo.*"]),
    package_data={"neo.kernels.attention.tpu": ["*.csv"]},
    install_requires=REQUIRED,
    extras_require=EXTRAS,
)
