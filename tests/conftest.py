"""For all tests: tiny models are fastest on one thread, and two workers share the machine."""

import pytest
import torch


torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """What a module makes once is made by one worker (`--dist loadgroup`); all other tests go to whoever is free."""
    for item in items:
        made = (definitions[-1].scope for definitions in item._fixtureinfo.name2fixturedefs.values())
        if "module" in made:
            item.add_marker(pytest.mark.xdist_group(item.module.__name__))
