"""Sections of a page that are kept in a file."""

import json

import pytest
from mutations import mutated
from PIL import Image

from fastcnn.errors import CheckpointError
from fastcnn.insight.html.document import Figure, Page, Section, write_page
from fastcnn.insight.html.table import Table
from fastcnn.insight.run_page.saved_sections import save_sections, saved_sections


@pytest.fixture
def sections(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "one.png")
    table = Table(("class", "F1"), (("ant", "0.5"), ("bée", "1")), frozenset({1}))
    figure = Figure(tmp_path / "one.png", "what it shows", "the line below")
    full = Section("Title", "anchor", ("p",), table, ("s",), (figure,), (("name", "value"),))
    return [full, Section("Bare", "bare", (), Table((), ()))]


def test_sections_come_back_as_they_were(tmp_path, sections):
    save_sections(tmp_path, "analysis", sections)
    assert saved_sections(tmp_path, "analysis") == sections
    assert saved_sections(tmp_path, "ood") == []


def test_a_figure_that_was_taken_away_is_left_out(tmp_path, sections):
    save_sections(tmp_path, "analysis", sections)
    (tmp_path / "one.png").unlink()
    assert saved_sections(tmp_path, "analysis")[0].figures == ()


@pytest.mark.parametrize("text", ["", "[]", '{"format": 9, "sections": []}', '{"format": 1}'])
def test_another_file_is_refused(tmp_path, text):
    (tmp_path / "analysis.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"analysis\.json is not what fastcnn wrote"):
        saved_sections(tmp_path, "analysis")


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname", "", ".", "link.png", "a/b.png"])
def test_a_page_takes_no_file_from_outside(tmp_path, sections, name):
    """The folder may be a stranger's, and a page holds the bytes of its figures."""
    folder = tmp_path / "analysis"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(b"secret")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "one.png").rename(folder / "one.png")
    save_sections(folder, "analysis", sections)
    path = folder / "analysis.json"
    path.write_text(path.read_text().replace('"one.png"', json.dumps(name)))
    with pytest.raises(CheckpointError, match=r"analysis\.json is not what fastcnn wrote"):
        saved_sections(folder, "analysis")


@pytest.mark.full
def test_a_value_of_another_kind_is_refused_or_shown(tmp_path, sections):
    """A page is drawn at the end of a run, which no file of an analysis shall end."""
    path = save_sections(tmp_path, "analysis", sections)
    refused, shown = [], 0
    for content in mutated(json.loads(path.read_text())):
        path.write_text(json.dumps(content))
        try:
            found = saved_sections(tmp_path, "analysis")
        except CheckpointError as error:
            refused.append(str(error))
        else:
            write_page(tmp_path / "index.html", Page("title", "lead", tuple(found)))
            shown += 1
    assert len(refused) > 300
    assert all("analysis.json is not what fastcnn wrote" in line for line in refused)
    assert 10 < shown < 100  # lists may be empty, and a text another
