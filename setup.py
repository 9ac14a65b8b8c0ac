"""Packaging of deptjax: dependencies, extras and the console command. Tools are configured in pyproject.toml."""

from __future__ import annotations

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).resolve().parent


def read(path: str) -> str:
    """Returns the text of a file beside this one, or an empty string where it is absent."""
    file = ROOT / path
    return file.read_text(encoding="utf-8") if file.is_file() else ""


match = re.search(r'^__version__ = "([^"]+)"$', read("deptjax/version.py"), flags=re.MULTILINE)
if match is None:
    raise SystemExit('setup.py: deptjax/version.py holds no line of the form __version__ = "1.2.3"; restore it.')

CORE = [
    "jax>=0.10",
    # jax 0.11 took away a name that flax before 0.12.9 needs. jax 0.11 exists for Python 3.12 and later only, and
    # Python 3.11 gets flax 0.12.8 at most, so the Python version tells the two apart.
    "flax>=0.12.8; python_version < '3.12'",
    "flax>=0.12.9; python_version >= '3.12'",
    "optax>=0.2.5",
    "orbax-checkpoint>=0.11.20",
    "grain>=0.2.10",
    "qwix>=0.1.8",  # quantised kernels; it needs jax, flax and numpy alone
    "jaxtyping>=0.3.0",
    "ml_dtypes>=0.5.0",
    "numpy>=2.0",
    "transformers>=5.0",
    "tokenizers>=0.22",
    "sentencepiece>=0.2.0",  # transformers needs these two for a tokenizer that is a spiece.model alone
    "protobuf>=5.28",
    "safetensors>=0.6",
    "huggingface_hub>=1.0",
    "tensorstore>=0.1.84",
    "gguf>=0.17",
    "gin-config>=0.5.0",
    "pyarrow>=17.0",
    "scikit-learn>=1.5",
    "tensorboardX>=2.6.2",
    "tqdm>=4.66",
]
TORCH = ["torch>=2.6", "peft>=0.17", "accelerate>=1.0"]
DATASETS = ["datasets>=4.0"]
# Reads array_record files; TFRecord needs tensorflow beside. tfds imports importlib_resources and does not ask for it.
TFDS = ["tensorflow-datasets>=4.9.7", "array-record>=0.5", "importlib-resources>=6.0"]
PLOT = ["matplotlib>=3.9"]
NOTEBOOKS = [*PLOT, "nbclient>=0.10", "nbformat>=5.10", "ipykernel>=6.29"]
# All that the tests need but torch: tests against torch are skipped without it, and `dev` has it.
TESTS = ["pytest>=8.3", "pytest-xdist>=3.6", *DATASETS, *TFDS, *NOTEBOOKS]

EXTRAS = {
    "gpu": ["jax[cuda12]>=0.10"],
    "gpu13": ["jax[cuda13]>=0.10"],
    "tpu": ["jax[tpu]>=0.10"],
    "torch": TORCH,
    "datasets": DATASETS,
    "tfds": TFDS,
    "seqio": ["seqio>=0.0.19"],  # brings TensorFlow, about 2 GB
    "plot": PLOT,
    "notebooks": NOTEBOOKS,
    "tests": TESTS,
    "dev": [
        *TESTS,
        "ruff>=0.15",
        "mypy>=1.18",
        "beartype>=0.20",
        # The oracle of the parity tests, pinned so that a golden can be made again from the same code.
        "torch==2.13.0",
        *TORCH[1:],
    ],
}

setup(
    name="deptjax",
    version=match.group(1),
    description="Prompt tuning (DePT, prompt tuning, LoRA) of frozen T5, LLaMA, GPT-2 and BERT-family models in JAX",
    long_description=read("README.md"),
    long_description_content_type="text/markdown",
    author="The deptjax authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    packages=find_packages(include=["deptjax", "deptjax.*"]),
    python_requires=">=3.11",
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["deptjax=deptjax.cli.main:main"]},
    zip_safe=False,
)
