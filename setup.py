"""The packages: msenc, and the folder configs as msenc.configs."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["msenc*"]), "msenc.configs"], package_dir={"msenc.configs": "configs"})
