"""The whole tables take minutes: they run where they are asked for, by `-m table`."""


def pytest_configure(config):
    config.addinivalue_line("markers", "table: all of PyTorch's tables; minutes, run by `pytest -m table`")


def pytest_collection_modifyitems(config, items):
    if "table" in config.option.markexpr:
        return
    whole = [item for item in items if item.get_closest_marker("table")]
    config.hook.pytest_deselected(items=whole)
    items[:] = [item for item in items if not item.get_closest_marker("table")]
