"""Refuses an old Python in one line; everything else stands in pyproject.toml.

pip before 23.1 does not do it: given a folder and an extra, it looks for other versions of every
dependency, for minutes.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(
        "sdlite needs Python 3.11 or newer, and this is Python {}.{}:"
        " make the environment with a newer one.".format(*sys.version_info)
    )

from setuptools import setup

# A wheel's name says it too: for 3.11 and newer, so that pip need not resolve its dependencies
# first.
setup(options={"bdist_wheel": {"python_tag": "py311"}})
