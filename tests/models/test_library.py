"""Models that clients ask for: from where, how many, and when a file has changed."""

from __future__ import annotations

import os

import pytest

from luna_mp.errors import BadModel
from luna_mp.models import ModelSpec
from tests.workers.fakes import FakeVae, library


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "allowed"
    path.mkdir()
    for name in ("a", "b", "c"):
        (path / name).write_text(name)
    return path


@pytest.fixture
def shelf(folder):
    return library(FakeVae(), allowed=(str(folder),), most=2)


def wanted(*paths, **options):
    return {"paths": [str(path) for path in paths], **options}


def test_without_a_wish_there_is_the_default(shelf):
    assert shelf.get(None)[1] is shelf.default


def test_a_model_is_loaded_once_for_each_set_of_options(shelf, folder):
    _, first = shelf.get(wanted(folder / "a"))
    assert shelf.get(wanted(folder / "a"))[1] is first
    assert shelf.get(wanted(folder / "a", dtype="float16"))[1] is not first


def test_a_file_that_changed_is_a_new_model(shelf, folder):
    _, first = shelf.get(wanted(folder / "a"))
    (folder / "a").write_text("changed")
    assert shelf.get(wanted(folder / "a"))[1] is not first


def test_the_least_used_model_makes_room(shelf, folder):
    models = {name: shelf.get(wanted(folder / name))[1] for name in ("a", "b")}
    shelf.get(wanted(folder / "a"))
    shelf.get(wanted(folder / "c"))
    assert shelf.get(wanted(folder / "a"))[1] is models["a"]
    assert shelf.get(wanted(folder / "b"))[1] is not models["b"]


def test_an_unloaded_model_is_gone(shelf, folder):
    shelf.get(wanted(folder / "a"))
    assert shelf.unload(wanted(folder / "a"))
    assert not shelf.unload(wanted(folder / "a"))


def test_paths_outside_the_allowed_directories_are_refused(shelf, folder, tmp_path):
    (tmp_path / "secret").write_text("x")
    os.symlink(tmp_path / "secret", folder / "link")
    for path in (tmp_path / "secret", folder / ".." / "secret", folder / "link"):
        with pytest.raises(BadModel, match=f"outside the directories .*{folder}"):
            shelf.get(wanted(path))


def test_without_allowed_directories_nothing_is_loaded(folder):
    with pytest.raises(BadModel, match="none: start it with --allow DIR"):
        library(FakeVae()).get(wanted(folder / "a"))


@pytest.mark.parametrize(
    "wish", [{"paths": "a"}, {"paths": []}, {"paths": [1]}, {}, {"paths": ["a"], "dtype": 1}]
)
def test_a_malformed_wish_is_refused(shelf, wish):
    with pytest.raises(BadModel):
        shelf.get(wish)


def test_a_missing_path_is_told(shelf, folder):
    with pytest.raises(BadModel, match="missing.* is not there"):
        shelf.get(wanted(folder / "missing"))


def test_the_default_asked_for_by_its_file_is_the_default(folder):
    path = folder / "default"
    path.write_text("weights")
    shelf = library(FakeVae(), default=ModelSpec((str(path),)))
    key, model = shelf.get(wanted(path))
    assert model is shelf.default
    assert shelf.get(None) == (key, model)
    assert shelf.get(wanted(path, dtype="float16"))[0] != key


@pytest.mark.parametrize("options", [{"type": "flux"}, {"dtype": "float16"}, {"source": "x"}])
def test_the_default_is_asked_for_by_its_options_too(folder, options):
    spec = ModelSpec((str(folder / "a"),), **options)
    shelf = library(FakeVae(), allowed=(str(folder),), default=spec)
    assert shelf.get(wanted(folder / "a", **options))[1] is shelf.default
    assert shelf.get(wanted(folder / "a"))[1] is not shelf.default


def test_the_default_is_found_by_any_of_its_paths(folder, tmp_path):
    os.symlink(folder / "a", tmp_path / "link")
    shelf = library(FakeVae(), default=ModelSpec((str(tmp_path / "link"),)))
    for path in (folder / "a", folder / ".." / folder.name / "a", tmp_path / "link"):
        assert shelf.get(wanted(path))[1] is shelf.default


def test_a_default_whose_file_changed_is_used_as_it_was_loaded(folder):
    shelf = library(FakeVae(), default=ModelSpec((str(folder / "a"),)))
    before = shelf.get(None)
    (folder / "a").write_text("changed")
    assert shelf.get(None) == shelf.get(wanted(folder / "a")) == before


def test_a_default_whose_file_has_gone_is_still_served(folder):
    shelf = library(FakeVae(), default=ModelSpec((str(folder / "a"),)))
    (folder / "a").unlink()
    assert shelf.get(wanted(folder / "a"))[1] is shelf.default


def test_a_default_whose_file_changed_has_another_key_in_the_next_service(folder):
    spec = ModelSpec((str(folder / "a"),))
    key, _ = library(FakeVae(), default=spec).get(None)
    assert library(FakeVae(), default=spec).get(None)[0] == key
    (folder / "a").write_text("changed")
    assert library(FakeVae(), default=spec).get(None)[0] != key


def test_a_library_without_a_default_says_what_to_name(folder):
    shelf = library(FakeVae(), allowed=(str(folder),), default=None)
    with pytest.raises(BadModel, match="name a file, .* or start it with --clip-model"):
        shelf.get(None)
    _, model = shelf.get(wanted(folder / "a"))
    assert [entry["paths"] for entry in shelf.to_data()] == [[str(folder / "a")]]
    assert shelf.get(wanted(folder / "a"))[1] is model
