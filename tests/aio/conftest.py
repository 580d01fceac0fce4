"""Every test of the layer that does I/O runs once with each engine."""

from __future__ import annotations

import pytest

from blocklayer.aio.threads import ThreadEngine


@pytest.fixture(params=[ThreadEngine], ids=["threads"])
async def engine(request):
    """An engine that is closed at the end, whatever the test did."""
    engine = request.param()
    yield engine
    await engine.close()
