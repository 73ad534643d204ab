"""cffi's own way to build an API-mode module is through setuptools; the rest is in pyproject."""

from setuptools import setup

setup(cffi_modules=["cdefs/build.py:ffibuilder"])
