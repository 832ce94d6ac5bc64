"""Fixtures: tiny pipelines, saved once for all tests of the models."""

from __future__ import annotations

import pytest

from tests.models import makers


@pytest.fixture(scope="session")
def sd1(tmp_path_factory):
    """Folder and pipeline."""
    folder = tmp_path_factory.mktemp("pipelines") / "sd1"
    return folder, makers.sd1_pipeline(folder)


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines") / "sdxl"
    return folder, makers.sdxl_pipeline(folder)


@pytest.fixture(scope="session")
def flux(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines") / "flux"
    return folder, makers.flux_pipeline(folder)
