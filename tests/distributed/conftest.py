"""One pool of processes serves all tests of this folder, which one worker runs."""

import pytest
from ranks import Pool


def pytest_collection_modifyitems(items):
    for item in items:
        if "pool" in item.fixturenames:
            item.add_marker(pytest.mark.xdist_group("ranks"))


@pytest.fixture(scope="session")
def pool():
    pool = Pool()
    yield pool
    pool.close()
