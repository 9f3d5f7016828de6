import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = (REPOSITORY / "docs" / "paper.md").read_text()


@pytest.mark.parametrize(("file", "name"), sorted(set(re.findall(r"`(\w+\.py):(\w+)`", PAGE))))
def test_what_the_page_on_the_paper_names_exists(file, name):
    folder = REPOSITORY / ("tests/layered_model" if file.startswith("test_") else "layered_model")
    assert re.search(rf"^(def|class) {name}\b", (folder / file).read_text(), re.MULTILINE)
