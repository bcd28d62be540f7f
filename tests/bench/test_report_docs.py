"""benchmarks/report_docs.py: sections between their markers, figures beside the document."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import report_docs

TEXT = """# x

By hand.

<!-- table1 full -->
old
<!-- end of table1 full -->

Between.

<!-- table1 scale-0.1 -->
<!-- end of table1 scale-0.1 -->
"""


@pytest.fixture
def output(tmp_path, monkeypatch):
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "murgolo.md").write_text(TEXT)
    monkeypatch.setattr(report_docs, "DOCS", docs)
    folder = tmp_path / "out" / "murgolo" / "full"
    folder.mkdir(parents=True)
    (folder / "table1.md").write_text("## Section\n\n![Bars](table1-top1.png)\n")
    (folder / "table1-top1.png").write_bytes(b"png")
    return tmp_path / "out"


def test_a_section_is_replaced_and_all_else_kept(output, capsys):
    assert report_docs.main([str(output)]) == 0
    text = (report_docs.DOCS / "murgolo.md").read_text()
    assert "![Bars](figures/murgolo-full-table1-top1.png)" in text
    assert "old" not in text
    assert (
        text.replace(text[text.index("## S") : text.index("<!-- end of table1 full")], "old\n")
        == TEXT
    )
    assert (report_docs.DOCS / "figures" / "murgolo-full-table1-top1.png").read_bytes() == b"png"
    assert capsys.readouterr().out == "murgolo.md: table1 full\n"
    report_docs.main([str(output)])
    assert (report_docs.DOCS / "murgolo.md").read_text() == text


def test_without_a_folder_it_says_what_it_wants(capsys):
    assert report_docs.main(["nowhere"]) == 2
    assert "give the folder" in capsys.readouterr().err


DOCUMENTS = sorted((Path(__file__).resolve().parents[2] / "docs" / "reports").glob("*.md"))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_every_figure_of_the_documents_is_there_and_small(document):
    for name in report_docs.re.findall(r"\]\((figures/[^)]+)\)", document.read_text()):
        assert 0 < (document.parent / name).stat().st_size < 150_000
