"""The gallery: a folder of images that the commands are tried on, and the current folder of the tests that ask for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.helpers.gallery import make_gallery

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def all_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder."""
    folder = tmp_path_factory.mktemp("gallery")
    make_gallery(folder)
    return folder


@pytest.fixture
def gallery(all_images: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Be in the folder."""
    monkeypatch.chdir(all_images)
    return all_images


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Be in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
