"""Sphinx configuration of the book: README, docs/ and the notebooks with their committed outputs (`make book`).

The source folder is the project itself (`sphinx-build -c docs . build/book`), so that the pages' links to each other
hold in the book as they do in the repository. Nothing in the book is loaded from another host.
"""

import shutil
from pathlib import Path

from docutils import nodes
from myst_nb.core.render import NbElementRenderer

from ivt_utils.exercises import LESSONS

project = "Iterative Visual Thinking"
author = "The IVT course authors"
copyright = "The IVT course authors, Apache-2.0"
extensions = ["myst_nb"]
root_doc = "docs/index"
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md", "data/student/README.md"]
include_patterns += [f"notebooks/{stem}.ipynb" for stem in LESSONS]  # and no copies of them
exclude_patterns = [".*", "build", "data/hub", "runs", "scratch"]  # not walked through
html_additional_pages = {"index": "start.html"}  # the root leads to docs/index.html
templates_path = ["_templates"]

nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "myst"  # tables; "gfm" takes Acc@0.5 for a mail address
nb_ipywidgets_js = {}  # no widget manager: its scripts would come from another host
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
myst_update_mathjax = False

html_theme = "sphinx_book_theme"
html_title = "Iterative Visual Thinking"
html_favicon = "_static/favicon.svg"
html_static_path = ["_static"]
html_css_files = ["book.css"]
html_js_files = [("book.js", {"defer": "defer"})]
html_context = {"default_mode": "auto"}  # dark or light as the system says, until the reader chooses
html_show_sphinx = False
html_use_index = False
html_theme_options = {
    "show_toc_level": 2,
    "use_download_button": True,
    "use_fullscreen_button": False,
    "use_source_button": False,
    "use_repository_button": False,
    "use_issues_button": False,
}


def alt_kept(render):
    """Return a renderer of an output's image that keeps the alt text of its metadata; MyST-NB keeps only the size."""

    def render_image(self, data):
        images = render(self, data)
        about = data.output_metadata.get(data.mime_type, {})
        images[0]["alt"] = about.get("alt", "")
        return images

    return render_image


def fold_code(app, page, name):
    """Let the reader fold the code of every cell; that of the set-up cell is folded already."""
    for cell in list(page.findall(nodes.container)):
        if cell.get("nb_element") == "cell_code" and cell[0].get("nb_element") == "cell_code_source":
            opened, said = ("", "Set-up") if "tag_setup" in cell["classes"] else (" open", "Code")
            summary = f'<details class="code-fold"{opened}><summary>{said}</summary>'
            cell.insert(1, nodes.raw("", "</details>", format="html"))
            cell.insert(0, nodes.raw("", summary, format="html"))


def write_samples(app):
    """Write the explorer's samples beside the static files."""
    from ivt_utils.course.book import write_explorer

    folder = Path(app.doctreedir) / "explorer"
    write_explorer(folder / "explorer_samples.js")
    app.config.html_static_path.append(str(folder))


def take_live(app):
    """Take what `ivt build live` has made of today's students into the book; else the page says what is missing."""
    from ivt_utils.course.live import LIVE, is_current

    if is_current():
        folder = Path(app.doctreedir) / "live"
        shutil.copytree(LIVE, folder / "live", dirs_exist_ok=True)
        app.config.html_static_path.append(str(folder))


def setup(app):
    """Connect the functions above."""
    NbElementRenderer.render_image = alt_kept(NbElementRenderer.render_image)
    app.connect("builder-inited", write_samples, priority=100)
    app.connect("builder-inited", take_live, priority=100)
    app.connect("doctree-resolved", fold_code)
