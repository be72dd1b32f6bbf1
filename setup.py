"""Install opml_wb. Names and version come from settings.ini; dependencies are declared here."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
cfg = ConfigParser(delimiters=["="])
cfg.read(HERE / "settings.ini", encoding="utf-8")
cfg = cfg["DEFAULT"]

REQUIRES = [
    "numpy>=1.26", "scipy>=1.11", "pandas>=2.1", "pyarrow>=14", "scikit-learn>=1.4", "xgboost>=2.0", "torch>=2.2",
    "numba>=0.60", "simpy>=4.1", "hnswlib>=0.8",
    "jupyterlab>=4.1", "ipywidgets>=8.1", "anywidget>=0.9.9", "ipykernel>=6.29", "nbformat>=5.10", "nbclient>=0.10",
    "papermill>=2.6", "pyyaml>=6", "nbdime>=4", "plotly>=5.20", "matplotlib>=3.8",
    "pydantic>=2.7", "click>=8.1", "rich>=13.7", "tqdm>=4.66", "pooch>=1.8", "psutil>=5.9",
    "optuna>=4", "distributed>=2024.5", "threadpoolctl>=3", "fsspec>=2024.2", "duckdb>=1", "deltalake>=1",
    "pillow>=10", "safetensors>=0.4", "onnxruntime>=1.18", "onnx>=1.16",
    "starlette>=0.40", "uvicorn[standard]>=0.30", "orjson>=3.10", "prometheus-client>=0.20",
]
VISION = ["opencv-python-headless>=4.9", "scikit-image>=0.22"]
PEERS = ["mlflow-skinny>=2.14", "sqlalchemy>=2", "alembic>=1.13", "polars>=1", "duckdb>=1", "ciw>=3.2", "torchvision>=0.17", "litserve>=0.2.10", "flask>=3", "gunicorn>=22", "openlineage-python>=1",
         "faiss-cpu>=1.8"]
PG = ["psycopg[binary]>=3.1"]
DOCS = ["sphinx>=7.3", "myst-nb>=1.1", "pydata-sphinx-theme>=0.15", "sphinx-mathjax-offline>=0.0.2"]
# nbdev 3 refuses settings.ini; the four others are the versions that nbdev 2.4 works with
NBDEV = ["nbdev>=2.4.14,<3", "execnb<0.2", "fastcore<2", "ghapi<2", "fastgit<0.1"]
RAY = ["ray[serve]>=2.30"]
PROTOCOLS = ["tritonclient[http]>=2.48", "schemathesis>=4"]  # what the tests ask our server with
DEV = ["pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100", "playwright>=1.44"] + NBDEV + VISION + PEERS + PG + DOCS + PROTOCOLS

# In a wheel, the notebooks and the shipped data travel inside the package; a clone reads them where they lie.
CARRIED = {"opml_wb._nbs": "nbs", "opml_wb._data": "data"}
CARRIED = {name: folder for name, folder in CARRIED.items() if (HERE / folder).is_dir()}

setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], keywords=cfg["keywords"],
    long_description=(HERE / "README.md").read_text(encoding="utf-8"), long_description_content_type="text/markdown",
    license="Apache-2.0", author=cfg["author"], python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=["opml_wb", "opml_wb.*"]) + list(CARRIED),
    package_dir={"opml_wb": "opml_wb", **CARRIED},
    package_data={name: ["*", "*/*", "*/*/*"] for name in CARRIED},
    install_requires=REQUIRES,
    extras_require={"vision": VISION, "peers": PEERS, "pg": PG, "docs": DOCS, "ray": RAY, "dev": DEV},
    entry_points={
        "console_scripts": ["opml = opml_wb.core.cli.verbs:main"],
        "papermill.engine": ["opml = opml_wb.core.engine.papermill:OpmlEngine"],
        "opml_wb.commands": ["flexserve = opml_wb.flexserve.serve.cli:flexserve",
                             "trace = opml_wb.provenance.watch.trace:trace"] + [f"{verb} = opml_wb.provenance.ask.verbs:{verb}" for verb in ("lineage", "impact", "check", "search", "pipeline")],
        "opml_wb.run_hooks": ["provenance = opml_wb.provenance.watch.capture:capture"],
        "nbdev": [f"{cfg['lib_name']} = {cfg['lib_name']}._modidx:d"],
    },
    classifiers=["Development Status :: 3 - Alpha", "Intended Audience :: Science/Research",
                 "License :: OSI Approved :: Apache Software License", "Programming Language :: Python :: 3",
                 "Topic :: Scientific/Engineering", "Framework :: Jupyter"],
    zip_safe=False,
)
