"""Install opml_wb. Names and version come from settings.ini; dependencies are declared here, one list for each part.

`pip install .` installs all parts. `OPML_WB_PARTS=riann pip install .` installs the core and the named parts only; add `run` for
its chapter. `OPML_WB_CPU=1` takes xgboost's CPU build. (An extra can only add to what a plain install brings, so the extras
of the same names leave nothing out.)"""
import os
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
cfg = ConfigParser(delimiters=["="])
cfg.read(HERE / "settings.ini", encoding="utf-8")
cfg = cfg["DEFAULT"]

CORE = [  # the library: store, log, data, parameters, command line
    "numpy>=1.26", "pydantic>=2.7", "annotated-types>=0.6", "click>=8.1", "rich>=13.7", "tqdm>=4.66", "platformdirs>=4", "pooch>=1.8",
    "psutil>=5.9", "fsspec>=2024.2", "fastcore>=1.5.29,<2",
]
PARTS = {  # what the rest needs beside it
    "run": ["pandas>=2.1", "pyarrow>=14", "plotly>=5.20", "matplotlib>=3.8", "ipython>=8.20", "ipykernel>=6.29", "ipywidgets>=8.1",
            "anywidget>=0.9.9", "jupyter_client>=8", "nbclient>=0.10", "nbformat>=5.10", "papermill>=2.6", "tornado>=6.4", "traitlets>=5.14"],
    "lab": ["jupyterlab>=4.1", "nbconvert>=7", "pygments>=2.17"],
    "sweep": ["optuna>=4", "distributed>=2024.5", "scikit-learn>=1.4"],
    "compare": ["nbdime>=4", "scikit-learn>=1.4", "scipy>=1.11"],
    "dlspec": ["pandas>=2.1", "pyyaml>=6", "semantic-version>=2.10", "packaging>=23", "scikit-learn>=1.4", "joblib>=1.3", "pillow>=10",
               "onnxruntime>=1.18"],
    "analyzer": ["pandas>=2.1", "pyarrow>=14", "duckdb>=1", "scipy>=1.11", "scikit-learn>=1.4", "threadpoolctl>=3", "jupyter_core>=5",
                 "jupyter_server>=2.7"],
    "eligibility": ["pandas>=2.1", "pyarrow>=14", "numba>=0.60", "scipy>=1.11", "scikit-learn>=1.4",
                    "xgboost>=2.0"],
    "provenance": ["pandas>=2.1", "pyarrow>=14", "deltalake>=1"],
    "pipesim": ["pandas>=2.1", "pyarrow>=14", "numba>=0.60", "scipy>=1.11", "scikit-learn>=1.4", "xgboost>=2.0", "simpy>=4.1",
                "duckdb>=1", "threadpoolctl>=3", "torch>=2.2"],
    "riann": ["pandas>=2.1", "numba>=0.60", "llvmlite>=0.43", "scipy>=1.11", "scikit-learn>=1.4", "xgboost>=2.0", "pillow>=10",
              "pyyaml>=6", "hnswlib>=0.8"],
    "flexserve": ["torch>=2.2", "onnx>=1.16", "onnxruntime>=1.18", "safetensors>=0.4", "pillow>=10", "pyyaml>=6", "scikit-learn>=1.4",
                  "skl2onnx>=1.17", "xgboost>=2.0", "pandas>=2.1", "pyarrow>=14", "starlette>=0.40", "uvicorn[standard]>=0.30", "orjson>=3.10", "prometheus-client>=0.20"],
    "explain": ["pandas>=2.1", "numba>=0.60", "llvmlite>=0.43", "scipy>=1.11", "scikit-learn>=1.4", "xgboost>=2.0"],
    "diagnostics": ["pandas>=2.1", "pyarrow>=14", "numba>=0.60", "scipy>=1.11", "scikit-learn>=1.4", "torch>=2.2", "pyyaml>=6", "cryptography>=42"],
    "moderation": ["pandas>=2.1", "scipy>=1.11", "scikit-learn>=1.4", "xgboost>=2.0", "torch>=2.2", "onnx>=1.16", "onnxruntime>=1.18",
                   "pillow>=10", "redis>=5", "starlette>=0.40", "uvicorn[standard]>=0.30", "pyarrow>=14", "deltalake>=1"],
}
CHOSEN = os.environ.get("OPML_WB_PARTS", " ".join(PARTS)).replace(",", " ").split()
if unknown := set(CHOSEN) - set(PARTS): raise SystemExit(f"OPML_WB_PARTS: no part {sorted(unknown)}; there are: {', '.join(PARTS)}")

EXTRAS = {
    "vision": ["opencv-python-headless>=4.9", "scikit-image>=0.22"],
    "zoo": ["torch>=2.2", "torchvision>=0.17", "timm>=1,<2"],  # what builds the zoo's architectures; weights: opml dlspec wheels
    "sign": ["cryptography>=42"],  # signed versions in the model store
    "pg": ["psycopg[binary]>=3.1"],
    "s3": ["s3fs>=2024.2"],
    "docs": ["sphinx>=7.3", "myst-nb>=1.1", "pydata-sphinx-theme>=0.15", "sphinx-mathjax-offline>=0.0.2",
             "PyStemmer>=2.2"],
    "ray": ["ray[serve]>=2.30"],
    "peers": ["mlflow-skinny>=2.14", "sqlalchemy>=2", "alembic>=1.13", "polars>=1", "duckdb>=1", "ciw>=3.2", "torchvision>=0.17",
              "litserve>=0.2.10", "mosec>=0.9.6; sys_platform == 'linux'", "python-multipart>=0.0.9", "flask>=3", "gunicorn>=22", "openlineage-python>=1", "faiss-cpu>=1.8", "shap>=0.46"],
}
# nbdev 3 refuses settings.ini; the others are the versions that nbdev 2.4 works with
NBDEV = ["nbdev>=2.4.14,<3", "execnb<0.2", "fastcore<2", "ghapi<2", "fastgit<0.1"]
TESTS = ["pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100", "playwright>=1.44", "moto[s3,server]>=5", "ruff>=0.6", "mypy>=1.11",
         "tritonclient[http]>=2.48", "schemathesis>=4",
         "axe-playwright-python>=0.1.4"]
DEV = TESTS + NBDEV + [r for name, lines in EXTRAS.items() if name != "ray" for r in lines]

# In a wheel, the notebooks and the shipped data travel inside the package; a clone reads them where they lie.
CARRIED = {"opml_wb._nbs": "nbs", "opml_wb._data": "data"}
CARRIED = {name: folder for name, folder in CARRIED.items() if (HERE / folder).is_dir()}

def light(requirement):
    "With `OPML_WB_CPU=1`, xgboost's build without CUDA, which brings no NCCL wheel (hundreds of MB)."
    return requirement.replace("xgboost>", "xgboost-cpu>") if os.environ.get("OPML_WB_CPU") else requirement


# until 0.2: the verbs of `opml provenance` that were commands of their own, and the noun that each belongs to
PROVENANCE = "trace", "lineage", "impact", "check", "search", "pipeline"

setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], keywords=cfg["keywords"],
    long_description=(HERE / "README.md").read_text(encoding="utf-8"), long_description_content_type="text/markdown",
    license="Apache-2.0", author=cfg["author"], python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=["opml_wb", "opml_wb.*"]) + list(CARRIED),
    package_dir={"opml_wb": "opml_wb", **CARRIED},
    package_data={"opml_wb": ["py.typed"], **{name: ["*", "*/*", "*/*/*"] for name in CARRIED}},
    install_requires=sorted({light(r) for r in [*CORE, *(r for part in CHOSEN for r in PARTS[part])]}),
    extras_require={**PARTS, **EXTRAS, "all": sorted({r for lines in PARTS.values() for r in lines}), "dev": DEV},
    entry_points={
        "console_scripts": ["opml = opml_wb.core.cli:main"],
        "papermill.engine": ["opml = opml_wb.core.engine:OpmlEngine"],
        "opml_wb.commands": ["provenance = opml_wb.provenance.commands:provenance",
                             "flexserve = opml_wb.flexserve.commands.cli:flexserve",
                             "dlspec = opml_wb.dlspec.commands:dlspec",
                             "analyzer = opml_wb.analyzer.commands:analyzer",
                             "telemetry = opml_wb.analyzer.commands:telemetry",
                             "diagnostics = opml_wb.diagnostics.commands:diagnostics",
                             "moderation = opml_wb.moderation.commands:moderation",
                             "explain = opml_wb.explain.commands:explain"],
        "opml_wb.model_sources": ["dlspec = opml_wb.dlspec.zoo.serving:servable"],
        "opml_wb.command_hooks": ["analyzer = opml_wb.analyzer.watch.telemetry:command"],
        "opml_wb.moved_commands": [f"{name} = opml_wb.provenance.commands:provenance" for name in PROVENANCE],
        "opml_wb.run_hooks": ["provenance = opml_wb.provenance.watch.capture:capture",
                              "analyzer = opml_wb.analyzer.watch.collect:run_hook"],
        "nbdev": [f"{cfg['lib_name']} = {cfg['lib_name']}._modidx:d"],
    },
    classifiers=["Development Status :: 3 - Alpha", "Intended Audience :: Science/Research",
                 "License :: OSI Approved :: Apache Software License", "Programming Language :: Python :: 3",
                 "Topic :: Scientific/Engineering", "Framework :: Jupyter"],
    zip_safe=False,
)
