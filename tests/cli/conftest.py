import os

import pytest


@pytest.fixture(autouse=True)
def same_environment():
    """Verbs that are called here set variables for their own process, which later tests' programs would inherit."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
