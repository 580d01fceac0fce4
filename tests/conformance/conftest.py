"""Disks of these tests lie in files that nobody needs after a power cut: what would make them durable is left out."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="package", autouse=True)
def files_are_not_made_durable():
    """A tenth of the time: waiting for the disk cannot be seen from inside. Crash states have tests of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fdatasync", os.fstat)
        yield
